// The CUDA kernels in Python: `_C.cuda`, and the tests' emulated module.
#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include "cuda/topk.h"

namespace py = pybind11;

namespace deeprec::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_topk(py::module_& m) {
  // Local to the module: a process may hold the real kernels and emulated ones.
  py::class_<TopkRequest>(m, "TopkRequest", py::module_local())
      .def(py::init([](const topk::ItemRows& rows, const topk::Prefilter& filter,
                       uintptr_t queries, int64_t count, int64_t k,
                       std::pair<uintptr_t, uintptr_t> exclude, int multiprocessors) {
             return TopkRequest{{rows, filter},
                                pointer<const float>(queries),
                                count,
                                k,
                                {pointer<const int64_t>(exclude.first),
                                 pointer<const int64_t>(exclude.second)},
                                multiprocessors};
           }),
           py::kw_only(), py::arg("rows"), py::arg("filter"), py::arg("queries"),
           py::arg("count"), py::arg("k"), py::arg("exclude"), py::arg("multiprocessors"));
  m.def("topk_workspace_bytes", &topk_workspace_bytes, py::arg("request"));
  m.def(
      "topk_search",
      [](const TopkRequest& request, std::tuple<uintptr_t, uintptr_t, uintptr_t> answer,
         const PyWorkspace& workspace, uintptr_t stream) {
        topk_search(request,
                    {pointer<float>(std::get<0>(answer)), pointer<int64_t>(std::get<1>(answer)),
                     pointer<int64_t>(std::get<2>(answer))},
                    {pointer<void>(workspace.first), workspace.second}, pointer<void>(stream));
      },
      py::arg("request"), py::arg("answer"), py::arg("workspace"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind(py::module_& m) {
  m.attr("MAX_K") = kMaxK;
  bind_topk(m);
  bind_logprobs(m);
  bind_trm(m);
}

}  // namespace deeprec::cuda
