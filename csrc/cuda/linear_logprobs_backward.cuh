// linear_logprobs backward. Slice by slice of the vocabulary and chunk by chunk of the rows the
// logits are computed again and turned into their gradients D, which are multiplied with the head
// (hidden gradient) and with the hidden states (weight gradient). Every sum has one owner and a
// fixed order, so results are the same every time; hidden gradients do not depend on the batch.
#pragma once

#include "cuda/linear_logprobs.cuh"

namespace deeprec::cuda {

// Rows of D held at a time: 2,048 slice columns of them are 32 MB in float, 16 in bf16.
constexpr int64_t kChunk = 4096;
constexpr int kColumnThreads = 256;

__device__ inline void store_element(void* data, DType dtype, int64_t at, float x) {
  switch (dtype) {
    case DType::f32: return narrow(x, static_cast<float*>(data) + at);
    case DType::bf16: return narrow(x, static_cast<Bf16*>(data) + at);
    case DType::f16: return narrow(x, static_cast<F16*>(data) + at);
  }
}

// The gradient in the logits of one row.
struct LogitGradient {
  RowGradient rest;
  float own;
  int64_t id;

  __device__ static LogitGradient of(const OrderedProblem& p, const OrderedBackward& io,
                                     int64_t row) {
    const double g = io.grad_values[row];
    return {RowGradient::of(io.states[row], g, io.grad_entropy ? io.grad_entropy[row] : 0.f,
                            io.grad_entropy ? io.entropy[row] : 0.f, p.temperature),
            float(g / p.temperature), p.ids[row]};
  }
  __device__ float operator()(float z, int64_t token, const ScaledExp& exp) const {
    return rest(z, exp) + (token == id ? own : 0.f);
  }
};

struct BackwardWorkspace {
  void* gradients;      // D: [rows of a chunk, kSlice], of the operands' type
  LogitGradient* rows;  // [rows], in the order of the problem
  float* hidden;        // [rows, size], in that order; null where grad_hidden itself is float
  float* weight;        // [kSlice, size]
  float* permitted;     // [length of allowed.ids]

  int64_t bytes = 0;

  BackwardWorkspace(const OrderedProblem& p, const OrderedBackward& io, void* memory) {
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t size, bool wanted) -> void* {
      constexpr int64_t kLine = 128;
      const int64_t taken = wanted ? parts(size, kLine) * kLine : 0;
      void* place = wanted ? next + bytes : nullptr;
      bytes += taken;
      return place;
    };
    const int64_t chunk = p.hidden.rows < kChunk ? p.hidden.rows : kChunk;
    const int64_t line = p.hidden.columns * int64_t(sizeof(float));
    gradients = take(chunk * kSlice * (all_bf16(p) ? 2 : 4), true);
    rows = static_cast<LogitGradient*>(take(p.hidden.rows * int64_t(sizeof(LogitGradient)), true));
    hidden = static_cast<float*>(
        take(p.hidden.rows * line, io.grad_hidden && p.hidden.dtype != DType::f32));
    weight = static_cast<float*>(take(kSlice * line, io.grad_weight));
    permitted = static_cast<float*>(take(io.permitted * int64_t(sizeof(float)), io.permitted));
  }
};

// What is being done: tokens [first, first + tokens) for rows [chunk, …) of the order.
struct Part {
  int64_t first, tokens, chunk;

  __device__ int64_t rows(const OrderedProblem& p) const {
    return max(int64_t(0), min(p.counts[0] - chunk, kChunk));
  }
};

template <class T>
__device__ Lines gradient_lines(const OrderedProblem& p, const BackwardWorkspace& w, Part part) {
  return {w.gradients, dtype_of<T>(), kSlice, nullptr, part.rows(p), part.tokens};
}
__device__ inline Lines token_lines(const OrderedProblem& p, Part part) {
  const int64_t size = p.weight.dtype == DType::f32 ? 4 : 2;
  return {static_cast<const char*>(p.weight.data) + part.first * p.weight.row_stride * size,
          p.weight.dtype, p.weight.row_stride, nullptr, part.tokens, p.weight.columns};
}
__device__ inline Lines hidden_lines(const OrderedProblem& p, Part part) {
  return {p.hidden.data, p.hidden.dtype, p.hidden.row_stride, p.order + part.chunk, part.rows(p),
          p.hidden.columns};
}

__global__ void __launch_bounds__(kColumnThreads)
    row_gradients_kernel(OrderedProblem p, OrderedBackward io, BackwardWorkspace w) {
  const int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place < p.counts[0]) w.rows[place] = LogitGradient::of(p, io, p.order[place]);
}

// D of one tile: rows along x, tokens along y.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    logit_gradients_kernel(OrderedProblem p, BackwardWorkspace w, Part part, ScaledExp exp) {
  unsigned char* shared = dynamic_smem<unsigned char>();
  const int64_t row = int64_t(blockIdx.x) * kTile, column = int64_t(blockIdx.y) * kTile;
  const Lines hidden = hidden_lines(p, part);
  if (row >= hidden.lines) return;  // the whole block
  TileSums tile;
  multiply_tile<T, Layout::by_row, Layout::by_row>(hidden, row, token_lines(p, part), column,
                                                   p.hidden.columns, shared, tile);
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int64_t place = row + tile_row(slot);
    if (place >= hidden.lines) continue;
    const LogitGradient gradient = w.rows[part.chunk + place];
    const int64_t first = column + threadIdx.x / 32 % 2 * kWarpColumns + threadIdx.x % 4 * 2;
    T* out = static_cast<T*>(w.gradients) + place * kSlice;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int64_t at = first + i / 2 * 8 + i % 2, token = part.first + at;
      if (at >= part.tokens) continue;
      const float z = tile.sum[slot / 2][i / 2][slot % 2 * 2 + i % 2] + (p.bias ? p.bias[token] : 0.f);
      out[at] = narrowed<T>(gradient(z, token, exp));
    }
  }
}

// Hidden gradient += D·W: rows along x, dimensions along y. Registers as in linear_slice_kernel.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 1)
    hidden_gradient_kernel(OrderedProblem p, OrderedBackward io, BackwardWorkspace w, Part part) {
  unsigned char* shared = dynamic_smem<unsigned char>();
  const int64_t row = int64_t(blockIdx.x) * kTile, column = int64_t(blockIdx.y) * kTile;
  const Lines gradients = gradient_lines<T>(p, w, part);
  if (row >= gradients.lines) return;  // the whole block
  TileSums tile;
  multiply_tile<T, Layout::by_row, Layout::by_depth>(gradients, row, token_lines(p, part), column,
                                                     part.tokens, shared, tile);
  const int64_t size = p.hidden.columns;
  tile.for_each([&](int r, int c, float x) {
    if (row + r >= gradients.lines || column + c >= size) return;
    const int64_t place = part.chunk + row + r;
    float* out = w.hidden ? w.hidden + place * size
                          : static_cast<float*>(io.grad_hidden) + p.order[place] * size;
    out[column + c] = part.first ? out[column + c] + x : x;
  });
}

// Weight gradient of a slice += Dᵀ·X: tokens along x, dimensions along y.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    weight_gradient_kernel(OrderedProblem p, BackwardWorkspace w, Part part) {
  unsigned char* shared = dynamic_smem<unsigned char>();
  const int64_t token = int64_t(blockIdx.x) * kTile, column = int64_t(blockIdx.y) * kTile;
  const Lines gradients = gradient_lines<T>(p, w, part);
  if (part.chunk && !gradients.lines) return;  // the whole block; the first chunk writes zeros
  TileSums tile;
  multiply_tile<T, Layout::by_depth, Layout::by_depth>(gradients, token, hidden_lines(p, part),
                                                       column, gradients.lines, shared, tile);
  const int64_t size = p.hidden.columns;
  tile.for_each([&](int r, int c, float x) {
    if (token + r >= part.tokens || column + c >= size) return;
    float* out = w.weight + (token + r) * size + column + c;
    *out = part.chunk ? *out + x : x;
  });
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    bias_gradient_kernel(OrderedProblem p, OrderedBackward io, BackwardWorkspace w, Part part) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= part.tokens) return;
  const T* gradients = static_cast<const T*>(w.gradients) + at;
  const int64_t rows = part.rows(p);
  float sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += widen(gradients[row * kSlice]);
  io.grad_bias[part.first + at] += sum;
}

// Adds what the restricted rows give a token and writes its gradients: one block a token.
__global__ void __launch_bounds__(kColumnThreads)
    finish_tokens_kernel(OrderedProblem p, OrderedBackward io, BackwardWorkspace w, Part part) {
  const int64_t token = part.first + blockIdx.x, size = p.hidden.columns;
  const Lines hidden = lines_of(p.hidden);
  const int64_t start = io.by_token.starts ? io.by_token.starts[token] : 0;
  const int64_t end = io.by_token.starts ? io.by_token.starts[token + 1] : 0;
  if (io.grad_weight) {
    for (int64_t h = threadIdx.x; h < size; h += blockDim.x) {
      float sum = w.weight[blockIdx.x * size + h];
      for (int64_t i = start; i < end; ++i)
        sum = fmaf(w.permitted[io.by_token.positions[i]],
                   element(hidden, hidden.at(io.by_token.rows[i]) + h), sum);
      store_element(io.grad_weight, p.weight.dtype, token * size + h, sum);
    }
  }
  if (io.grad_bias && threadIdx.x == 0)
    for (int64_t i = start; i < end; ++i)
      io.grad_bias[token] += w.permitted[io.by_token.positions[i]];
}

// Rounds the hidden gradient's sums: one block a row.
__global__ void __launch_bounds__(kColumnThreads)
    finish_hidden_kernel(OrderedProblem p, OrderedBackward io, BackwardWorkspace w) {
  if (int64_t(blockIdx.x) >= p.counts[0]) return;
  const int64_t size = p.hidden.columns, row = p.order[blockIdx.x];
  for (int64_t h = threadIdx.x; h < size; h += blockDim.x)
    store_element(io.grad_hidden, p.hidden.dtype, row * size + h, w.hidden[blockIdx.x * size + h]);
}

__global__ void __launch_bounds__(kRowThreads)
    restricted_backward_kernel(OrderedProblem p, OrderedBackward io, BackwardWorkspace w,
                               ScaledExp exp) {
  if (int64_t(blockIdx.x) >= p.counts[1]) return;  // the whole block
  const int64_t row = p.order[p.counts[0] + blockIdx.x], size = p.hidden.columns;
  const int64_t start = p.allowed.offsets[row], end = p.allowed.offsets[row + 1];
  const LogitGradient gradient = LogitGradient::of(p, io, row);
  for (int64_t i = start + threadIdx.x / 32; i < end; i += kRowThreads / 32) {
    const int64_t token = p.allowed.ids[i];
    const bool valid = in_vocabulary(token, p.weight.rows);
    const float d = valid ? gradient(token_logit(p, row, token), token, exp) : 0;
    if (threadIdx.x % 32 == 0) w.permitted[i] = d;
  }
  __syncthreads();  // the row's gradients are written
  if (!io.grad_hidden) return;
  const Lines weight = lines_of(p.weight);
  for (int64_t h = threadIdx.x; h < size; h += blockDim.x) {
    float sum = 0;
    for (int64_t i = start; i < end; ++i)
      if (in_vocabulary(p.allowed.ids[i], p.weight.rows))
        sum = fmaf(w.permitted[i], element(weight, weight.at(p.allowed.ids[i]) + h), sum);
    store_element(io.grad_hidden, p.hidden.dtype, row * size + h, sum);
  }
}

// ---- launchers ----

int64_t linear_backward_workspace(const OrderedProblem& p, const OrderedBackward& io) {
  return BackwardWorkspace(p, io, nullptr).bytes;
}

template <class T>
void launch_part(const OrderedProblem& p, const OrderedBackward& io, const BackwardWorkspace& w,
                 Part part, void* stream) {
  const auto tiles = [](int64_t rows, int64_t columns) {
    return dim3(unsigned(parts(rows, kTile)), unsigned(parts(columns, kTile)));
  };
  constexpr Layout row = Layout::by_row, depth = Layout::by_depth;
  const int64_t left = p.hidden.rows - part.chunk, rows = left < kChunk ? left : kChunk;
  launch("linear_logprobs_backward, logits",
         {tiles(rows, part.tokens), kTileThreads, kTileShared<T, row, row>, stream},
         logit_gradients_kernel<T>, p, w, part, ScaledExp::of(p.temperature));
  if (io.grad_hidden)
    launch("linear_logprobs_backward, hidden",
           {tiles(rows, p.hidden.columns), kTileThreads, kTileShared<T, row, depth>, stream},
           hidden_gradient_kernel<T>, p, io, w, part);
  if (io.grad_weight)
    launch("linear_logprobs_backward, weight",
           {tiles(part.tokens, p.hidden.columns), kTileThreads, kTileShared<T, depth, depth>, stream},
           weight_gradient_kernel<T>, p, w, part);
  if (io.grad_bias)
    launch("linear_logprobs_backward, bias",
           {unsigned(parts(part.tokens, kColumnThreads)), kColumnThreads, 0, stream},
           bias_gradient_kernel<T>, p, io, w, part);
}

void linear_logprobs_backward(const OrderedProblem& p, const OrderedBackward& io,
                                     void* workspace, void* stream) {
  const BackwardWorkspace w(p, io, workspace);
  const unsigned rows = unsigned(p.hidden.rows);
  if (p.allowed.offsets)
    launch("linear_logprobs_backward, restricted", {rows, kRowThreads, 0, stream},
           restricted_backward_kernel, p, io, w, ScaledExp::of(p.temperature));
  launch("linear_logprobs_backward, rows",
         {unsigned(parts(p.hidden.rows, kColumnThreads)), kColumnThreads, 0, stream},
         row_gradients_kernel, p, io, w);
  for (Part part{0, 0, 0}; part.first < p.weight.rows; part.first += kSlice) {
    const int64_t left = p.weight.rows - part.first;
    part.tokens = left < kSlice ? left : kSlice;
    for (part.chunk = 0; part.chunk < p.hidden.rows; part.chunk += kChunk) {
      if (all_bf16(p)) launch_part<Bf16>(p, io, w, part, stream);
      else launch_part<float>(p, io, w, part, stream);
    }
    if (io.grad_weight || io.grad_bias)
      launch("linear_logprobs_backward, tokens",
             {unsigned(part.tokens), kColumnThreads, 0, stream}, finish_tokens_kernel, p, io, w,
             part);
  }
  if (w.hidden)
    launch("linear_logprobs_backward, hidden sums", {rows, kColumnThreads, 0, stream},
           finish_hidden_kernel, p, io, w);
}

}  // namespace deeprec::cuda
