// The preference-aware TRM on CUDA devices: histories to states, states and preferences to user
// vectors. All pointers are device memory; nothing is allocated, nothing synchronises.
#pragma once

#include <cstdint>
#include <vector>

namespace deeprec::cuda::trm {

// y = x Wᵀ + b; weight [out, in], contiguous; bias may be null.
struct Dense {
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t in = 0, out = 0;
};

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct Layer {
  Dense project;  // queries, keys and values: [3 hidden, hidden]
  Dense out, up, down;
  Norm attention_norm, feed_norm;
};

struct Model {
  int64_t n_items = 0, text_dim = 0, hidden = 0, n_heads = 0, n_experts = 0, max_length = 0;
  float eps = 0;
  bool padding_row = false;        // row 0 of a table is not zero
  const float* items = nullptr;    // [n_items + 1, hidden]
  const float* texts = nullptr;    // adapted, [n_items + 1, hidden]
  const float* kernel = nullptr;   // the filter in time, [max_length, hidden]
  const float* gates = nullptr;    // [2, hidden]: of the filtered and the fused part
  const float* gate_bias = nullptr;  // [2]
  const float* positions = nullptr;  // [max_length, hidden]
  Norm input_norm, output_norm;
  std::vector<Layer> layers;
  const float* expert_gates = nullptr;  // [n_experts, text_dim]
  Dense experts;                        // text_dim -> n_experts * hidden
};

// Ids out of range count as padding.
struct Histories {
  int64_t count = 0, width = 0;      // width <= max_length
  const int64_t* items = nullptr;    // [count, width], zeros on the right
  const int64_t* starts = nullptr;   // [count + 1]: sums of lengths, each from 1 to width
  const int64_t* last = nullptr;     // [count]: starts[i + 1] - 1
};

constexpr int64_t kMaxLength = 128;  // four scores a lane
constexpr int64_t kMaxHidden = 512;

// Bytes of workspace of encode, and of fuse.
int64_t encode_workspace(const Model& model, int64_t count, int64_t width);
int64_t fuse_workspace(const Model& model, int64_t count);

// states [count, hidden] of histories.
void encode(const Model& model, const Histories& histories, float* states, void* workspace,
            void* stream);

// users [count, hidden] = LayerNorm(states + adaptor(preference)); preference [count, text_dim] or
// null.
void fuse(const Model& model, int64_t count, const float* states, const float* preference,
          float* users, void* workspace, void* stream);

}  // namespace deeprec::cuda::trm
