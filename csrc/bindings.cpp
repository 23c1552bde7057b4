// Argument types become pointers and sizes here (and in cuda/bindings.cpp): no other file includes
// pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/linear_logprobs.h"
#include "cpu/logprobs.h"
#include "cpu/peaks.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "cpu/topk.h"
#include "cpu/trm.h"
#ifdef DEEPREC_CUDA_ARCHITECTURES  // by CMakeLists.txt, where there is an nvcc
#include "cuda/bindings.h"
#endif

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

// A tensor crosses as its address (Tensor.data_ptr()), 0 for none.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// ---- top-k ----

topk::ItemRows item_rows(uintptr_t data, int64_t count, int64_t dim, int64_t stride,
                         const std::string& dtype) {
  if (count < 0 || count > INT64_C(0xffffffff) || dim < 1 || stride < dim)
    throw std::invalid_argument("items: expected up to 2^32 - 1 rows of at least one element");
  const auto type = dtype == "float32"    ? topk::Dtype::f32
                    : dtype == "bfloat16" ? topk::Dtype::bf16
                    : dtype == "float16"
                        ? topk::Dtype::f16
                        : throw std::invalid_argument("items: expected float32, bfloat16 or "
                                                      "float16, got " + dtype);
  return {pointer<const void>(data), count, dim, stride, type};
}

void bind_topk(py::module_& m) {
  using namespace topk;
  py::class_<ItemRows>(m, "ItemRows")
      .def(py::init(&item_rows), py::arg("data"), py::arg("count"), py::arg("dim"),
           py::arg("stride"), py::arg("dtype"));
  py::class_<Prefilter>(m, "Prefilter")
      .def(py::init<>())
      .def(py::init([](uintptr_t codes, uintptr_t bounds, uintptr_t order, uintptr_t center,
                       int64_t centers, uintptr_t cluster, uintptr_t fine,
                       uintptr_t fine_bounds) {
             return Prefilter{pointer<uint8_t>(codes),         pointer<BlockBound>(bounds),
                              pointer<const uint32_t>(order),  pointer<const double>(center),
                              centers,                         pointer<const int32_t>(cluster),
                              pointer<int16_t>(fine),          pointer<FineBound>(fine_bounds)};
           }),
           py::arg("codes"), py::arg("bounds"), py::arg("order"), py::arg("center"),
           py::arg("centers"), py::arg("cluster"), py::arg("fine"), py::arg("fine_bounds"));
  m.def("advise_huge_pages", [](uintptr_t data, int64_t bytes) {
    advise_huge_pages(pointer<void>(data), bytes);
  });
  m.def("topk_code_shape", [](int64_t count, int64_t dim) {
    const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
    return std::make_tuple(blocks, code_shape(dim).quads, kBlockRows);
  });
  m.def("topk_row_norms",
        [](const ItemRows& rows, uintptr_t center, uintptr_t norms, int threads) {
          row_norms(rows, pointer<const double>(center), pointer<double>(norms),
                    usable_threads(threads));
        },
        py::call_guard<py::gil_scoped_release>());
  m.def("topk_normalize_rows",
        [](const ItemRows& rows, uintptr_t out, int threads) {
          normalize_rows(rows, pointer<float>(out), usable_threads(threads));
        },
        py::call_guard<py::gil_scoped_release>());
  m.def("topk_encode_blocks",
        [](const ItemRows& rows, const Prefilter& filter, uintptr_t blocks, int64_t n_blocks,
           int threads) {
          encode_blocks(rows, filter, pointer<const int64_t>(blocks), n_blocks,
                        usable_threads(threads));
        },
        py::call_guard<py::gil_scoped_release>());
  m.def("topk_search",
        [](const ItemRows& rows, const Prefilter& filter, uintptr_t queries, int64_t count,
           int64_t k, std::pair<uintptr_t, uintptr_t> exclude,
           std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t> answer, int threads) {
          search({rows, filter},
                 {pointer<const float>(queries), count, k,
                  {pointer<const int64_t>(exclude.first), pointer<const int64_t>(exclude.second)},
                  usable_threads(threads)},
                 {pointer<float>(std::get<0>(answer)), pointer<int64_t>(std::get<1>(answer)),
                  pointer<int64_t>(std::get<2>(answer)), pointer<int64_t>(std::get<3>(answer))});
        },
        py::call_guard<py::gil_scoped_release>());
}

// ---- bind_logprobs: begin ----

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
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
             p.threads = usable_threads(threads);
             return p;
           }),
           py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("row_offsets"),
           py::arg("shape"), py::arg("ids"), py::arg("mask"), py::arg("allowed"),
           py::arg("temperature"), py::arg("threads"));
  m.def(
      "gather_logprobs",
      [](const GatherProblem& p, uintptr_t values, uintptr_t entropy, uintptr_t states) {
        gather_logprobs(
            p, {pointer<float>(values), pointer<float>(entropy), pointer<SoftmaxState>(states)});
      },
      py::arg("problem"), py::kw_only(), py::arg("values"), py::arg("entropy"), py::arg("states"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gather_logprobs_backward",
      [](const GatherProblem& p, uintptr_t grad_values, uintptr_t grad_entropy, uintptr_t entropy,
         uintptr_t states, uintptr_t grad_logits) {
        gather_logprobs_backward(
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
             p.threads = usable_threads(threads);
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

// ---- the preference-aware TRM ----

void bind_trm(py::module_& m) {
  py::class_<trm::Model>(m, "TRMModel")
      .def(py::init<const std::map<std::string, int64_t>&, double,
                    const std::map<std::string, uintptr_t>&>(),
           py::arg("sizes"), py::arg("eps"), py::arg("tensors"));
  py::class_<trm::Request>(m, "TRMRequest")
      .def(py::init([](int64_t count, std::tuple<uintptr_t, int64_t, uintptr_t> history,
                       uintptr_t states, uintptr_t preference, int threads) {
             trm::Request r;
             r.count = count;
             r.history = pointer<const int64_t>(std::get<0>(history));
             r.history_width = std::get<1>(history);
             r.lengths = pointer<const int64_t>(std::get<2>(history));
             r.states = pointer<const float>(states);
             r.preference = pointer<const float>(preference);
             r.threads = usable_threads(threads);
             return r;
           }),
           py::arg("count"), py::arg("history"), py::arg("states"), py::arg("preference"),
           py::arg("threads"));
  m.def(
      "trm_encode",
      [](const trm::Model& model, trm::Request request, uintptr_t states, uintptr_t users) {
        request.states_out = pointer<float>(states);
        request.users = pointer<float>(users);
        encode(model, request);
      },
      py::arg("model"), py::arg("request"), py::kw_only(), py::arg("states"), py::arg("users"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "trm_retrieve",
      [](const trm::Model& model, const trm::Request& request, const topk::ItemRows& rows,
         const topk::Prefilter& filter, int64_t k, std::pair<uintptr_t, uintptr_t> exclude,
         bool exclude_history, std::pair<uintptr_t, uintptr_t> answer) {
        retrieve(model, request,
                 {{rows, filter},
                  k,
                  {pointer<const int64_t>(exclude.first), pointer<const int64_t>(exclude.second)},
                  exclude_history,
                  pointer<float>(answer.first),
                  pointer<int64_t>(answer.second)});
      },
      py::arg("model"), py::arg("request"), py::arg("rows"), py::arg("filter"), py::arg("k"),
      py::arg("exclude"), py::arg("exclude_history"), py::arg("answer"),
      py::call_guard<py::gil_scoped_release>());
}

// ---- peaks ----

void bind_peaks(py::module_& m) {
  using namespace peaks;
  const std::pair<const char*, Unit> units[] = {{"peak_fp32_fma", Unit::fp32_fma},
                                                {"peak_fp64_fma", Unit::fp64_fma},
                                                {"peak_int8_dot", Unit::int8_dot},
                                                {"peak_bf16_dot", Unit::bf16_dot}};
  for (const auto& [name, unit] : units) {
    m.def(name,
          [unit = unit](double seconds, int threads) { return operations(unit, seconds, threads); },
          py::arg("seconds"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  }
  m.def("peak_exp_sum", &exp_sum_rate, py::arg("seconds"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("peak_read_bandwidth", &read_bandwidth, py::arg("seconds"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of deeprec";
  bind_isa(m);
  bind_topk(m);
  bind_peaks(m);
  bind_logprobs(m);
  bind_linear_logprobs(m);
  bind_trm(m);
#ifdef DEEPREC_CUDA_ARCHITECTURES
  py::module_ kernels = m.def_submodule("cuda", "CUDA kernels of deeprec");
  kernels.attr("ARCHITECTURES") = std::vector<int>{DEEPREC_CUDA_ARCHITECTURES};
  deeprec::cuda::bind(kernels);
#endif
}
