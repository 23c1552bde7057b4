// The shipped kernels, launchers and bindings as a Python module, on the emulator.
#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "fibers.h"

namespace py = pybind11;

namespace {

void set_schedule(const std::string& order, uint64_t seed, bool eager_copies) {
  using emulator::Order;
  const Order chosen = order == "forward"    ? Order::forward
                       : order == "reverse"  ? Order::reverse
                       : order == "shuffled" ? Order::shuffled
                                             : throw std::invalid_argument("order: " + order);
  emulator::schedule() = {chosen, seed, eager_copies};
}

}  // namespace

PYBIND11_MODULE(EMULATED_MODULE, m) {
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 1,
        py::arg("eager_copies") = false);
  deeprec::cuda::bind(m);
}
