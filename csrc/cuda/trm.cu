#include "cuda/trm.h"

#include <algorithm>

#include "cuda/trm.cuh"

namespace deeprec::cuda::trm {
namespace {

unsigned parts(int64_t whole, int64_t part) { return unsigned((whole + part - 1) / part); }

template <Epilogue kEpilogue>
void dense(const DenseJob& job, void* stream) {
  const dim3 grid(parts(job.rows, kTile), parts(job.dense.out, kTile));
  launch("trm, dense",
         {grid, kTileThreads, kTileShared<float, Layout::by_row, Layout::by_row>, stream},
         trm_dense_kernel<kEpilogue>, job);
}

// The activations of one encoding.
struct Activations {
  float *states, *projected, *attended, *inner, *queries;
  int64_t floats = 0;

  Activations(const Model& m, int64_t count, int64_t width, void* workspace) {
    float* next = static_cast<float*>(workspace);
    const auto take = [&](int64_t rows, int64_t columns) {
      float* place = next + floats;
      floats += (rows * columns + 31) / 32 * 32;
      return place;
    };
    int64_t inner_width = 0;
    for (const Layer& layer : m.layers) inner_width = std::max(inner_width, layer.up.out);
    const int64_t rows = count * width;
    states = take(rows, m.hidden);
    projected = take(rows, 3 * m.hidden);
    attended = take(rows, m.hidden);
    inner = take(rows, inner_width);
    queries = take(count, m.hidden);
  }
};

void normalize(const Model& m, float* x, int64_t rows, const int64_t* count, const Norm& norm,
               void* stream) {
  launch("trm, norm", {parts(rows, kWarps), kThreads, 0, stream}, trm_norm_kernel, x, rows, count,
         m.hidden, norm, m.eps);
}

// What follows attention: projection, residual, norm, feed-forward, residual, norm. The layer's
// input is row list[i] of the states for row i; y gets the output.
void finish_layer(const Model& m, const Layer& layer, const Activations& a, int64_t rows,
                  const int64_t* count, const int64_t* list, float* y, void* stream) {
  dense<Epilogue::residual>({a.attended, rows, count, nullptr, list, layer.out, a.states, y},
                            stream);
  normalize(m, y, rows, count, layer.attention_norm, stream);
  dense<Epilogue::gelu>({y, rows, count, nullptr, nullptr, layer.up, nullptr, a.inner}, stream);
  dense<Epilogue::residual>({a.inner, rows, count, nullptr, nullptr, layer.down, y, y}, stream);
  normalize(m, y, rows, count, layer.feed_norm, stream);
}

}  // namespace

int64_t encode_workspace(const Model& m, int64_t count, int64_t width) {
  return Activations(m, count, width, nullptr).floats * int64_t(sizeof(float));
}

void encode(const Model& m, const Histories& h, float* states, void* workspace, void* stream) {
  const Activations a(m, h.count, h.width, workspace);
  const int64_t rows = h.count * h.width;
  const int64_t* total = h.starts + h.count;
  launch("trm, embed",
         {unsigned(h.count), kThreads, int(kWarps * 2 * m.hidden * int64_t(sizeof(float))), stream},
         trm_embed_kernel,
         EmbedJob{m.items, m.texts, m.kernel, m.gates, m.gate_bias, m.positions, m.input_norm,
                  m.n_items, m.hidden, m.max_length, m.eps, m.padding_row, h, a.states});
  for (size_t i = 0; i < m.layers.size(); ++i) {
    const Layer& layer = m.layers[i];
    const int64_t head = m.hidden / m.n_heads;
    const dim3 grid(unsigned(h.count), unsigned(m.n_heads));
    if (i + 1 < m.layers.size()) {
      dense<Epilogue::none>(
          {a.states, rows, total, nullptr, nullptr, layer.project, nullptr, a.projected}, stream);
      launch("trm, attention", {grid, kThreads, 0, stream}, trm_attention_kernel,
             AttentionJob{a.projected, a.projected + m.hidden, a.projected + 2 * m.hidden,
                          3 * m.hidden, 3 * m.hidden, h.starts, m.hidden, head, false, a.attended});
      finish_layer(m, layer, a, rows, total, nullptr, a.states, stream);
      continue;
    }
    // Only the last position of every user is read: one query each, keys and values of all items.
    Dense query = layer.project, rest = layer.project;
    query.out = m.hidden;
    rest.weight += m.hidden * m.hidden;
    rest.bias += m.hidden;
    rest.out = 2 * m.hidden;
    dense<Epilogue::none>(
        {a.states, h.count, nullptr, h.last, nullptr, query, nullptr, a.queries}, stream);
    dense<Epilogue::none>({a.states, rows, total, nullptr, nullptr, rest, nullptr, a.projected},
                          stream);
    launch("trm, attention", {grid, kThreads, 0, stream}, trm_attention_kernel,
           AttentionJob{a.queries, a.projected, a.projected + m.hidden, m.hidden, 2 * m.hidden,
                        h.starts, m.hidden, head, true, a.attended});
    finish_layer(m, layer, a, h.count, nullptr, h.last, states, stream);
  }
}

int64_t fuse_workspace(const Model& m, int64_t count) {
  return count * m.n_experts * m.hidden * int64_t(sizeof(float));
}

void fuse(const Model& m, int64_t count, const float* states, const float* preference,
          float* users, void* workspace, void* stream) {
  float* projected = static_cast<float*>(workspace);
  if (preference)
    dense<Epilogue::none>(
        {preference, count, nullptr, nullptr, nullptr, m.experts, nullptr, projected}, stream);
  launch("trm, fuse", {parts(count, kWarps), kThreads, 0, stream}, trm_fuse_kernel,
         FuseJob{states, preference, m.expert_gates, projected, m.hidden, m.text_dim, m.n_experts,
                 m.output_norm, m.eps, users},
         count);
}

}  // namespace deeprec::cuda::trm
