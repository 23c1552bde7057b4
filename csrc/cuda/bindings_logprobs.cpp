// Log-prob kernels in Python. The problems are the classes that `_C` binds for the CPU.
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "cuda/linear_logprobs.h"
#include "cuda/logprobs.h"

namespace py = pybind11;

namespace deeprec::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Pair = std::pair<uintptr_t, uintptr_t>;
using Triple = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

OrderedProblem ordered(const LinearProblem& problem, const Pair& order) {
  OrderedProblem p;
  static_cast<LinearProblem&>(p) = problem;
  p.order = pointer<int64_t>(order.first);
  p.counts = pointer<int64_t>(order.second);
  return p;
}

void bind_gather(py::module_& m) {
  m.def(
      "gather_logprobs",
      [](const GatherProblem& p, uintptr_t values, uintptr_t entropy, uintptr_t states,
         uintptr_t stream) {
        gather_logprobs(
            p, {pointer<float>(values), pointer<float>(entropy), pointer<SoftmaxState>(states)},
            pointer<void>(stream));
      },
      py::arg("problem"), py::kw_only(), py::arg("values"), py::arg("entropy"), py::arg("states"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "gather_logprobs_backward",
      [](const GatherProblem& p, uintptr_t grad_values, uintptr_t grad_entropy, uintptr_t entropy,
         uintptr_t states, uintptr_t grad_logits, uintptr_t stream) {
        gather_logprobs_backward(
            p, {pointer<float>(grad_values), pointer<float>(grad_entropy), pointer<float>(entropy),
                pointer<SoftmaxState>(states), pointer<void>(grad_logits)},
            pointer<void>(stream));
      },
      py::arg("problem"), py::kw_only(), py::arg("grad_values"), py::arg("grad_entropy"),
      py::arg("entropy"), py::arg("states"), py::arg("grad_logits"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}

void bind_linear(py::module_& m) {
  py::class_<OrderedBackward>(m, "LinearBackward", py::module_local())
      .def(py::init([](uintptr_t grad_values, uintptr_t grad_entropy, uintptr_t entropy,
                       uintptr_t states, const Triple& gradients, const Triple& by_token,
                       int64_t permitted) {
             OrderedBackward io;
             io.grad_values = pointer<float>(grad_values);
             io.grad_entropy = pointer<float>(grad_entropy);
             io.entropy = pointer<float>(entropy);
             io.states = pointer<SoftmaxState>(states);
             io.grad_hidden = pointer<void>(std::get<0>(gradients));
             io.grad_weight = pointer<void>(std::get<1>(gradients));
             io.grad_bias = pointer<float>(std::get<2>(gradients));
             io.by_token = {pointer<int64_t>(std::get<0>(by_token)),
                            pointer<int64_t>(std::get<1>(by_token)),
                            pointer<int64_t>(std::get<2>(by_token))};
             io.permitted = permitted;
             return io;
           }),
           py::kw_only(), py::arg("grad_values"), py::arg("grad_entropy"), py::arg("entropy"),
           py::arg("states"), py::arg("gradients"), py::arg("by_token"), py::arg("permitted"));
  m.def(
      "linear_forward_workspace",
      [](const LinearProblem& p) { return linear_forward_workspace(ordered(p, {})); },
      py::arg("problem"));
  m.def(
      "linear_backward_workspace",
      [](const LinearProblem& p, const OrderedBackward& io) {
        return linear_backward_workspace(ordered(p, {}), io);
      },
      py::arg("problem"), py::arg("io"));
  m.def(
      "linear_logprobs",
      [](const LinearProblem& p, const Pair& order, uintptr_t values, uintptr_t entropy,
         uintptr_t states, const PyWorkspace& workspace, uintptr_t stream) {
        const OrderedProblem problem = ordered(p, order);
        linear_logprobs(
            problem,
            {pointer<float>(values), pointer<float>(entropy), pointer<SoftmaxState>(states)},
            checked(workspace, linear_forward_workspace(problem)), pointer<void>(stream));
      },
      py::arg("problem"), py::kw_only(), py::arg("order"), py::arg("values"), py::arg("entropy"),
      py::arg("states"), py::arg("workspace"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear_logprobs_backward",
      [](const LinearProblem& p, const OrderedBackward& io, const Pair& order,
         const PyWorkspace& workspace, uintptr_t stream) {
        const OrderedProblem problem = ordered(p, order);
        linear_logprobs_backward(problem, io,
                                 checked(workspace, linear_backward_workspace(problem, io)),
                                 pointer<void>(stream));
      },
      py::arg("problem"), py::arg("io"), py::kw_only(), py::arg("order"), py::arg("workspace"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_logprobs(py::module_& m) {
  bind_gather(m);
  bind_linear(m);
}

}  // namespace deeprec::cuda
