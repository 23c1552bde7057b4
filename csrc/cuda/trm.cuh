// The kernels of the TRM. Items of all users lie one after the other, without padding; matrix
// products run on tensor cores over all of them (mma_tile.cuh, float as two tf32 parts), and what
// is one user's or one row's own is done by a block or a warp.
#pragma once

#include <limits>

#include "cuda/mma_tile.cuh"
#include "cuda/trm.h"

namespace deeprec::cuda::trm {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

__device__ inline float warp_sum(float x) {
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int distance = 16; distance; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, distance));
  return x;
}

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// LayerNorm of a row by one warp; in == out is fine.
__device__ inline void normalize_row(const float* in, int64_t n, const Norm& norm, float eps,
                                     float* out) {
  const int lane = threadIdx.x % 32;
  float sum = 0;
  for (int64_t h = lane; h < n; h += 32) sum += in[h];
  const float mean = warp_sum(sum) / float(n);
  float squares = 0;
  for (int64_t h = lane; h < n; h += 32) squares = fmaf(in[h] - mean, in[h] - mean, squares);
  const float scale = 1 / sqrtf(warp_sum(squares) / float(n) + eps);
  for (int64_t h = lane; h < n; h += 32)
    out[h] = fmaf((in[h] - mean) * scale, norm.weight[h], norm.bias[h]);
}

// ---- the encoder's input: gather, both convolutions, gates, position, LayerNorm ----

struct EmbedJob {
  const float *items, *texts, *kernel, *gates, *gate_bias, *positions;
  Norm norm;
  int64_t n_items, hidden, period;
  float eps;
  bool padding_row;
  Histories histories;
  float* out;  // [items of all users, hidden]
};

// A block a user, a warp a position, lanes along the channels.
__global__ void __launch_bounds__(kThreads) trm_embed_kernel(EmbedJob job) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t hidden = job.hidden, period = job.period;
  const int64_t start = job.histories.starts[blockIdx.x];
  const int64_t length = job.histories.starts[blockIdx.x + 1] - start;
  const int64_t* history = job.histories.items + int64_t(blockIdx.x) * job.histories.width;
  float* filtered = dynamic_smem<float>() + warp * 2 * hidden;
  float* fused = filtered + hidden;
  const auto row = [&](int64_t position) {
    const int64_t id = position < length ? history[position] : 0;
    return (id >= 0 && id <= job.n_items ? id : 0) * hidden;
  };
  const float scale = 1 / sqrtf(float(period));
  const int64_t sources = job.padding_row ? period : length;
  for (int64_t t = warp; t < length; t += kWarps) {
    float gate_a = 0, gate_b = 0;
    for (int64_t h = lane; h < hidden; h += 32) {
      float a = 0, b = 0;
      for (int64_t s = 0; s < sources; ++s) {
        const float id = job.items[row(s) + h];
        const int64_t shift = t >= s ? t - s : t - s + period;
        a = fmaf(id, job.kernel[shift * hidden + h], a);
        if (shift < sources) b = fmaf(id, job.texts[row(shift) + h], b);
      }
      filtered[h] = a;
      fused[h] = b *= scale;
      gate_a = fmaf(a, job.gates[h], gate_a);
      gate_b = fmaf(b, job.gates[hidden + h], gate_b);
    }
    gate_a = 2 * sigmoid(warp_sum(gate_a) + job.gate_bias[0]);
    gate_b = 2 * sigmoid(warp_sum(gate_b) + job.gate_bias[1]);
    // A lane reads back what it wrote itself.
    for (int64_t h = lane; h < hidden; h += 32)
      filtered[h] = fmaf(filtered[h], gate_a, fmaf(fused[h], gate_b, job.positions[t * hidden + h]));
    normalize_row(filtered, hidden, job.norm, job.eps, job.out + (start + t) * hidden);
  }
}

// ---- matrix products ----

enum class Epilogue { none, gelu, residual };

struct DenseJob {
  const float* x;
  int64_t rows;             // at most
  const int64_t* count;     // rows that there are, on the device; null: `rows`
  const int64_t* list;      // row i is made of row list[i] of x; null: i
  const int64_t* residual_list;  // and row residual_list[i] of `residual` is added
  Dense dense;
  const float* residual;    // [.., dense.out]
  float* y;                 // [rows, dense.out]; may be `residual`
};

__device__ inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

template <Epilogue kEpilogue>
__global__ void __launch_bounds__(kTileThreads) trm_dense_kernel(DenseJob job) {
  const int64_t row = int64_t(blockIdx.x) * kTile, column = int64_t(blockIdx.y) * kTile;
  const int64_t rows = job.count ? *job.count : job.rows;
  if (row >= rows) return;  // the whole block
  const Dense& dense = job.dense;
  const Lines x = {job.x, DType::f32, dense.in, job.list, rows, dense.in};
  const Lines weight = {dense.weight, DType::f32, dense.in, nullptr, dense.out, dense.in};
  TileSums tile;
  multiply_tile<float, Layout::by_row, Layout::by_row>(x, row, weight, column, dense.in,
                                                       dynamic_smem<unsigned char>(), tile);
  tile.for_each([&](int r, int c, float y) {
    const int64_t at = row + r, h = column + c;
    if (at >= rows || h >= dense.out) return;
    if (dense.bias) y += dense.bias[h];
    if (kEpilogue == Epilogue::gelu) y = gelu(y);
    if (kEpilogue == Epilogue::residual)
      y += job.residual[(job.residual_list ? job.residual_list[at] : at) * dense.out + h];
    job.y[at * dense.out + h] = y;
  });
}

// A warp a row, in place.
__global__ void __launch_bounds__(kThreads)
    trm_norm_kernel(float* x, int64_t rows, const int64_t* count, int64_t hidden, Norm norm,
                    float eps) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row < (count ? *count : rows)) {
    float* at = x + row * hidden;
    normalize_row(at, hidden, norm, eps, at);
  }
}

// ---- attention ----

struct AttentionJob {
  const float *queries, *keys, *values;
  int64_t query_stride, key_stride;
  const int64_t* starts;
  int64_t hidden, head;
  bool last_only;  // queries and out have a row a user, for the last position
  float* out;      // [.., hidden]
};

// A block a user and head, a warp a query. Scores of up to 128 keys lie four a lane.
__global__ void __launch_bounds__(kThreads) trm_attention_kernel(AttentionJob job) {
  constexpr int kScores = int(kMaxLength) / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = int(job.head);
  const int64_t user = blockIdx.x, first = int64_t(blockIdx.y) * job.head;
  const int64_t start = job.starts[user];
  const int length = int(job.starts[user + 1] - start);
  const float* keys = job.keys + start * job.key_stride + first;
  const float* values = job.values + start * job.key_stride + first;
  const float scale = 1 / sqrtf(float(head));
  const int queries = job.last_only ? 1 : length;
  for (int t = warp; t < queries; t += kWarps) {
    const int64_t at = job.last_only ? user : start + t;
    const float* query = job.queries + at * job.query_stride + first;
    float score[kScores], top = -kInfinity, sum = 0;
#pragma unroll
    for (int c = 0; c < kScores; ++c) {
      score[c] = -kInfinity;
#pragma unroll 1
      for (int s = c * 32; s < min(length, c * 32 + 32); ++s) {
        const float* key = keys + s * job.key_stride;
        float product = 0;
        for (int d = lane; d < head; d += 32) product = fmaf(query[d], key[d], product);
        product = warp_sum(product) * scale;
        if (lane == s % 32) score[c] = product;
      }
      top = fmaxf(top, score[c]);
    }
    top = warp_max(top);
#pragma unroll
    for (int c = 0; c < kScores; ++c) sum += score[c] = expf(score[c] - top);
    sum = warp_sum(sum);
#pragma unroll 1
    for (int d = lane; d - lane < head; d += 32) {  // the whole warp, for its shuffles
      float result = 0;
#pragma unroll
      for (int c = 0; c < kScores; ++c)
#pragma unroll 1
        for (int s = c * 32; s < min(length, c * 32 + 32); ++s) {
          const float p = __shfl_sync(kFullWarp, score[c], s % 32);
          if (d < head) result = fmaf(p, values[s * job.key_stride + d], result);
        }
      if (d < head) job.out[at * job.hidden + first + d] = result / sum;
    }
  }
}

// ---- the preference ----

struct FuseJob {
  const float *states, *preference, *expert_gates;
  const float* projected;  // [count, n_experts * hidden]
  int64_t hidden, text_dim, n_experts;
  Norm norm;
  float eps;
  float* users;
};

// A warp a user: gates, their weighted sum of the experts, LayerNorm.
__global__ void __launch_bounds__(kThreads) trm_fuse_kernel(FuseJob job, int64_t count) {
  const int lane = threadIdx.x % 32;
  const int64_t user = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (user >= count) return;  // the whole warp
  float* out = job.users + user * job.hidden;
  const float* states = job.states + user * job.hidden;
  float gate = -kInfinity;  // of expert `lane`
  if (job.preference) {
    const float* preference = job.preference + user * job.text_dim;
    for (int64_t e = 0; e < job.n_experts; ++e) {
      float logit = 0;
      for (int64_t d = lane; d < job.text_dim; d += 32)
        logit = fmaf(preference[d], job.expert_gates[e * job.text_dim + d], logit);
      logit = warp_sum(logit);
      if (lane == e) gate = logit;
    }
    gate = expf(gate - warp_max(gate));
    gate /= warp_sum(gate);
  }
  for (int64_t base = 0; base < job.hidden; base += 32) {
    const int64_t h = base + lane;
    float sum = 0;
    if (job.preference)
      for (int64_t e = 0; e < job.n_experts; ++e) {
        const float weight = __shfl_sync(kFullWarp, gate, int(e));
        if (h < job.hidden)
          sum = fmaf(weight, job.projected[(user * job.n_experts + e) * job.hidden + h], sum);
      }
    if (h < job.hidden) out[h] = states[h] + sum;
  }
  normalize_row(out, job.hidden, job.norm, job.eps, out);
}

}  // namespace deeprec::cuda::trm
