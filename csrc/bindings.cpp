// The only file that includes pybind11: argument types become pointers and sizes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/linear_logprobs.h"
#include "cpu/logprobs.h"

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

// ---- bind_logprobs: begin ----

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

// A tensor crosses as its address (Tensor.data_ptr()), 0 for none.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_logprobs(py::module_& m) {
  py::class_<GatherProblem>(m, "GatherProblem")
      .def(py::init([](uintptr_t logits, const std::string& dtype, uintptr_t row_offsets,
                       std::tuple<int64_t, int64_t, int64_t> shape, uintptr_t ids, uintptr_t mask,
                       std::pair<uintptr_t, uintptr_t> allowed, double temperature, int threads) {
             GatherProblem p;
             p.logits = pointer<void>(logits);
             p.dtype = parse_dtype(dtype);
             p.row_offsets = pointer<int64_t>(row_offsets);
             std::tie(p.rows, p.vocabulary, p.ids_per_row) = shape;
             p.ids = pointer<int64_t>(ids);
             p.mask = pointer<uint8_t>(mask);
             p.allowed = {pointer<int64_t>(allowed.first), pointer<int64_t>(allowed.second)};
             p.temperature = temperature;
             p.threads = threads;
             return p;
           }),
           py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("row_offsets"),
           py::arg("shape"), py::arg("ids"), py::arg("mask"), py::arg("allowed"),
           py::arg("temperature"), py::arg("threads"));
  m.def(
      "gather_logprobs",
      [](const GatherProblem& p, uintptr_t values, uintptr_t entropy, uintptr_t states) {
        gather_kernels().forward(
            p, {pointer<float>(values), pointer<float>(entropy), pointer<SoftmaxState>(states)});
      },
      py::arg("problem"), py::kw_only(), py::arg("values"), py::arg("entropy"), py::arg("states"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gather_logprobs_backward",
      [](const GatherProblem& p, uintptr_t grad_values, uintptr_t grad_entropy, uintptr_t entropy,
         uintptr_t states, uintptr_t grad_logits) {
        gather_kernels().backward(
            p, {pointer<float>(grad_values), pointer<float>(grad_entropy), pointer<float>(entropy),
                pointer<SoftmaxState>(states), pointer<void>(grad_logits)});
      },
      py::arg("problem"), py::kw_only(), py::arg("grad_values"), py::arg("grad_entropy"),
      py::arg("entropy"), py::arg("states"), py::arg("grad_logits"),
      py::call_guard<py::gil_scoped_release>());
}

// address, dtype, rows, columns, row stride
Matrix parse_matrix(const std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t>& m) {
  return {pointer<void>(std::get<0>(m)), parse_dtype(std::get<1>(m)), std::get<2>(m),
          std::get<3>(m), std::get<4>(m)};
}

void bind_linear_logprobs(py::module_& m) {
  using MatrixTuple = std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t>;
  py::class_<LinearProblem>(m, "LinearProblem")
      .def(py::init([](const MatrixTuple& hidden, const MatrixTuple& weight, uintptr_t bias,
                       uintptr_t ids, uintptr_t mask, std::pair<uintptr_t, uintptr_t> allowed,
                       double temperature, int threads) {
             LinearProblem p;
             p.hidden = parse_matrix(hidden);
             p.weight = parse_matrix(weight);
             p.bias = pointer<float>(bias);
             p.ids = pointer<int64_t>(ids);
             p.mask = pointer<uint8_t>(mask);
             p.allowed = {pointer<int64_t>(allowed.first), pointer<int64_t>(allowed.second)};
             p.temperature = temperature;
             p.threads = threads;
             return p;
           }),
           py::kw_only(), py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("ids"),
           py::arg("mask"), py::arg("allowed"), py::arg("temperature"), py::arg("threads"));
  m.def(
      "linear_logprobs",
      [](const LinearProblem& p, uintptr_t values, uintptr_t entropy, uintptr_t states) {
        linear_logprobs(
            p, {pointer<float>(values), pointer<float>(entropy), pointer<SoftmaxState>(states)});
      },
      py::arg("problem"), py::kw_only(), py::arg("values"), py::arg("entropy"), py::arg("states"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear_logprobs_backward",
      [](const LinearProblem& p, uintptr_t grad_values, uintptr_t grad_entropy, uintptr_t entropy,
         uintptr_t states, uintptr_t grad_hidden, uintptr_t grad_weight, uintptr_t grad_bias) {
        linear_logprobs_backward(
            p, {pointer<float>(grad_values), pointer<float>(grad_entropy), pointer<float>(entropy),
                pointer<SoftmaxState>(states), pointer<void>(grad_hidden),
                pointer<void>(grad_weight), pointer<float>(grad_bias)});
      },
      py::arg("problem"), py::kw_only(), py::arg("grad_values"), py::arg("grad_entropy"),
      py::arg("entropy"), py::arg("states"), py::arg("grad_hidden"), py::arg("grad_weight"),
      py::arg("grad_bias"), py::call_guard<py::gil_scoped_release>());
}

// ---- bind_logprobs: end ----

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of deeprec";
  bind_isa(m);
  bind_logprobs(m);
  bind_linear_logprobs(m);
}
