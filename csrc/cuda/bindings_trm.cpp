// The TRM's kernels in Python.
#include <pybind11/stl.h>

#include <map>

#include "cuda/bindings.h"
#include "cuda/trm.h"

namespace py = pybind11;

namespace deeprec::cuda {
namespace {

using trm::Model;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Tensors by the names that src/deeprec/trm/packed_cuda.py gives them.
Model make_model(const std::map<std::string, int64_t>& sizes, double eps,
                 const std::map<std::string, uintptr_t>& tensors) {
  const auto at = [&](const std::string& name) { return pointer<const float>(tensors.at(name)); };
  const auto norm = [&](const std::string& name) {
    return trm::Norm{at(name + ".weight"), at(name + ".bias")};
  };
  const auto dense = [&](const std::string& name, int64_t in, int64_t out) {
    return trm::Dense{at(name + ".weight"), at(name + ".bias"), in, out};
  };
  Model m;
  m.n_items = sizes.at("n_items");
  m.text_dim = sizes.at("text_dim");
  m.hidden = sizes.at("hidden");
  m.n_heads = sizes.at("n_heads");
  m.n_experts = sizes.at("n_experts");
  m.max_length = sizes.at("max_length");
  m.padding_row = sizes.at("padding_row") != 0;
  m.eps = float(eps);
  m.items = at("items");
  m.texts = at("texts");
  m.kernel = at("kernel");
  m.gates = at("gates.weight");
  m.gate_bias = at("gates.bias");
  m.positions = at("positions");
  m.input_norm = norm("input_norm");
  m.output_norm = norm("output_norm");
  m.expert_gates = at("adaptor.gate");
  m.experts = {at("adaptor.experts"), nullptr, m.text_dim, m.n_experts * m.hidden};
  for (int64_t i = 0; i < sizes.at("n_layers"); ++i) {
    const std::string layer = "layer." + std::to_string(i) + ".";
    const int64_t inner = sizes.at("inner");
    m.layers.push_back({dense(layer + "project", m.hidden, 3 * m.hidden),
                        dense(layer + "out", m.hidden, m.hidden),
                        dense(layer + "up", m.hidden, inner),
                        dense(layer + "down", inner, m.hidden),
                        norm(layer + "attention_norm"), norm(layer + "feed_norm")});
  }
  return m;
}

}  // namespace

void bind_trm(py::module_& m) {
  m.attr("TRM_MAX_LENGTH") = trm::kMaxLength;
  m.attr("TRM_MAX_HIDDEN") = trm::kMaxHidden;
  py::class_<Model>(m, "TRMModel", py::module_local())
      .def(py::init(&make_model), py::arg("sizes"), py::arg("eps"), py::arg("tensors"));
  m.def("trm_encode_workspace", &trm::encode_workspace, py::arg("model"), py::arg("count"),
        py::arg("width"));
  m.def("trm_fuse_workspace", &trm::fuse_workspace, py::arg("model"), py::arg("count"));
  m.def(
      "trm_encode",
      [](const Model& model, std::pair<int64_t, int64_t> shape,
         std::tuple<uintptr_t, uintptr_t, uintptr_t> histories, uintptr_t states,
         const PyWorkspace& workspace, uintptr_t stream) {
        trm::encode(model,
                    {shape.first, shape.second, pointer<int64_t>(std::get<0>(histories)),
                     pointer<int64_t>(std::get<1>(histories)),
                     pointer<int64_t>(std::get<2>(histories))},
                    pointer<float>(states),
                    checked(workspace, trm::encode_workspace(model, shape.first, shape.second)),
                    pointer<void>(stream));
      },
      py::arg("model"), py::kw_only(), py::arg("shape"), py::arg("histories"), py::arg("states"),
      py::arg("workspace"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "trm_fuse",
      [](const Model& model, int64_t count, uintptr_t states, uintptr_t preference,
         uintptr_t users, const PyWorkspace& workspace, uintptr_t stream) {
        trm::fuse(model, count, pointer<float>(states), pointer<float>(preference),
                  pointer<float>(users), checked(workspace, trm::fuse_workspace(model, count)),
                  pointer<void>(stream));
      },
      py::arg("model"), py::kw_only(), py::arg("count"), py::arg("states"), py::arg("preference"),
      py::arg("users"), py::arg("workspace"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace deeprec::cuda
