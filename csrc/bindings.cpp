// The only file that includes pybind11: argument types become pointers and sizes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace deeprec;

namespace {

void bind_isa(py::module_& m) {
  m.def("isa", [] { return std::string(isa_name(active_isa())); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("set_isa", &set_isa, py::arg("name"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of deeprec";
  bind_isa(m);
}
