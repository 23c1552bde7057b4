// The preference-aware TRM in one call: history and preference in, ranked items out (trm.cpp).
//
// A model is a view on packed tensors that the caller owns (src/deeprec/trm/packed.py lays them
// out and is the place to read what each holds). Widths are padded with zeros to whole panels of
// 32 columns; padded columns stay zero from the first table to the last LayerNorm.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cpu/topk.h"

namespace deeprec::trm {

constexpr int64_t kPanel = 32;
namespace {  // each instruction set keeps its own copy
constexpr int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
}  // namespace

// y = x W^T + b. Weights lie in panels of 32 outputs: float [out / 32][in][32], or bf16 with two
// consecutive inputs side by side, [out / 32][in / 2][32][2].
struct Linear {
  const void* weight = nullptr;
  const float* bias = nullptr;  // nullptr: none
  int64_t in = 0, out = 0;      // padded
  bool half = false;            // bf16
};

struct Norm {
  const float *weight, *bias;
};

// Every head is padded to whole panels; queries are scaled by 1 / sqrt(head width).
struct Layer {
  Linear project;     // queries, keys and values; in the last layer queries alone
  Linear key, value;  // last layer, one a head: head -> hidden and hidden -> head
  Linear out, up, down;
  Norm attention_norm, feed_norm;
};

struct Model {
  Model(const std::map<std::string, int64_t>& sizes, double eps,
        const std::map<std::string, uintptr_t>& tensors);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  int64_t n_items, text_dim, hidden, inner, n_layers, n_heads, n_experts, max_length;
  bool half;         // weights are bf16
  bool padding_row;  // row 0 of a table is not zero
  float eps;
  const float *items, *texts;     // [n_items + 1, hidden]
  const float* kernel;            // [padded hidden / 16, 2 max_length, 16]: the filter in time, twice
  const float *gates, *gate_bias; // [2, padded hidden], [2]: of the filtered and the fused part
  const float* positions;         // [max_length, padded hidden]
  Norm input_norm, output_norm;
  const Layer* layer;
  Linear adaptor_gate;  // text -> experts
  Linear adaptor;       // text -> all experts' hidden, one after the other

  int64_t width, head;  // of states and of one head, padded

 private:
  std::vector<Layer> layers_;
};

// Either histories or the states that an earlier call made of them.
struct Request {
  int64_t count = 0;
  const int64_t* history = nullptr;  // [count, history_width] item ids, zeros on the right
  int64_t history_width = 0;
  const int64_t* lengths = nullptr;  // [count]
  const float* states = nullptr;     // [count, hidden]; histories are not encoded then
  const float* preference = nullptr; // [count, text_dim]; nullptr: none
  float* states_out = nullptr;       // [count, hidden], or nullptr
  float* users = nullptr;            // [count, hidden], or nullptr
  int threads = 1;
};

struct Retrieval {
  topk::Index index;  // normalised rows; row i is item i + 1
  int64_t k;
  topk::Exclusions exclude;  // item ids
  bool exclude_history;
  float* values;     // [count, k]
  int64_t* indices;  // [count, k] item ids
};

// States and user vectors. Throws std::invalid_argument or std::out_of_range naming the argument.
void encode(const Model& model, const Request& request);
// User vectors, and the items nearest to them by cosine.
void retrieve(const Model& model, const Request& request, const Retrieval& retrieval);

// --- once per instruction set (trm_ISA.cpp) ---

struct Kernels {
  // Floats of scratch that a range of `users` with `tokens` items in all takes.
  int64_t (*scratch)(const Model&, int64_t users, int64_t tokens);
  // The states of users [first, last): [last - first, width] into `states`.
  void (*history)(const Model&, const Request&, int64_t first, int64_t last, float* states,
                  float* scratch);
  // Adds the preferences of users [first, last) to `states` and normalises: user vectors.
  void (*preference)(const Model&, const Request&, int64_t first, int64_t last, float* states,
                     float* scratch);
};

}  // namespace deeprec::trm
