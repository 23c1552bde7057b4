// linear_logprobs forward: logits tile by tile on tensor cores, reduced where they are.
//
// A block takes 128 rows and a slice of the vocabulary and leaves one partial softmax a row and
// slice; a second kernel joins the slices in their order. Slices do not depend on the rows, so a
// row's result does not depend on the batch. Rows restricted to permitted ids read only those.
#pragma once

#include "cuda/linear_logprobs.h"
#include "cuda/mma_tile.cuh"
#include "cuda/permitted.cuh"
#include "cuda/row_softmax.cuh"

namespace deeprec::cuda {

// Of the vocabulary, to a block: 16 tiles, so that 2,048 rows and a head of 49,152 make 384 blocks.
constexpr int64_t kSlice = 2048;
constexpr int kRowThreads = 128;  // for a row that is restricted

__host__ __device__ inline int64_t parts(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}
inline int64_t slices(const OrderedProblem& p) { return parts(p.weight.rows, kSlice); }

__device__ inline Lines lines_of(const Matrix& m) {
  return {m.data, m.dtype, m.row_stride, nullptr, m.rows, m.columns};
}
__device__ inline Lines full_rows(const OrderedProblem& p) {
  return {p.hidden.data, p.hidden.dtype, p.hidden.row_stride, p.order, p.counts[0],
          p.hidden.columns};
}

// What the forward pass keeps of a row and slice: [slices, rows], and the row's own logit.
struct SliceSoftmax {
  PartialSoftmax* parts;
  float* own;

  SliceSoftmax(const OrderedProblem& p, void* workspace)
      : parts(static_cast<PartialSoftmax*>(workspace)),
        own(reinterpret_cast<float*>(parts + slices(p) * p.hidden.rows)) {}
};

// This thread's four rows of a tile: place in the tile and in `order`.
__device__ inline int tile_row(int slot) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return warp / 2 * kWarpRows + slot / 2 * 16 + slot % 2 * 8 + lane / 4;
}

// One block a multiprocessor is enough: registers for two would be spilled in float.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kTileThreads, 1)
    linear_slice_kernel(OrderedProblem p, SliceSoftmax out, ScaledExp exp) {
  unsigned char* shared = dynamic_smem<unsigned char>();
  const int64_t first_row = int64_t(blockIdx.x) * kTile, count = p.counts[0];
  if (first_row >= count) return;  // the whole block
  const int64_t first = int64_t(blockIdx.y) * kSlice;
  const int64_t end = min(first + kSlice, p.weight.rows);
  const Lines hidden = full_rows(p), weight = lines_of(p.weight);
  PartialSoftmax softmax[4];
  int64_t ids[4];
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int64_t place = first_row + tile_row(slot);
    ids[slot] = place < count ? p.ids[p.order[place]] : -1;
  }
  for (int64_t token = first; token < end; token += kTile) {
    TileSums tile;
    multiply_tile<T, Layout::by_row, Layout::by_row>(hidden, first_row, weight, token,
                                                     p.hidden.columns, shared, tile);
    const int column = threadIdx.x / 32 % 2 * kWarpColumns + threadIdx.x % 4 * 2;
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      float z[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int64_t id = token + column + i / 2 * 8 + i % 2;
        z[i] = tile.sum[slot / 2][i / 2][slot % 2 * 2 + i % 2];
        if (id >= end) z[i] = -kInfinity;
        else if (p.bias) z[i] += p.bias[id];
        if (id == ids[slot]) out.own[first_row + tile_row(slot)] = z[i];
      }
      softmax[slot].add<kEntropy>(z, exp);
    }
  }
  // Joined over the four lanes of a row, then over the two warps of it.
  PartialSoftmax* halves = reinterpret_cast<PartialSoftmax*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    softmax[slot] = join_lanes<kEntropy>(softmax[slot], 4, exp);
    if (warp % 2 && lane % 4 == 0) halves[tile_row(slot)] = softmax[slot];
  }
  __syncthreads();
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int64_t place = first_row + tile_row(slot);
    if (warp % 2 || lane % 4 || place >= count) continue;
    softmax[slot].join<kEntropy>(halves[tile_row(slot)], exp);
    out.parts[int64_t(blockIdx.y) * p.hidden.rows + place] = softmax[slot];
  }
}

__device__ inline void write_row(const OrderedProblem& p, const LinearForward& out, int64_t row,
                                 const PartialSoftmax& softmax, float own) {
  out.values[row] = logprob(softmax, own, p.temperature);
  if (out.entropy) out.entropy[row] = entropy(softmax, p.temperature);
  out.states[row] = {softmax.largest, softmax.sum};
}

__global__ void __launch_bounds__(kRowThreads)
    linear_join_kernel(OrderedProblem p, SliceSoftmax in, int64_t n_slices, LinearForward out,
                       ScaledExp exp) {
  const int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place >= p.counts[0]) return;
  PartialSoftmax softmax = in.parts[place];
  for (int64_t slice = 1; slice < n_slices; ++slice)
    softmax.join<true>(in.parts[slice * p.hidden.rows + place], exp);
  const int64_t row = p.order[place];
  write_row(p, out, row, softmax, in_vocabulary(p.ids[row], p.weight.rows) ? in.own[place] : kNaN);
}

// ---- rows restricted to permitted ids: a warp an id, lanes along the dimensions ----

// The logit of one token, in every lane.
__device__ inline float token_logit(const OrderedProblem& p, int64_t row, int64_t token) {
  const Lines hidden = lines_of(p.hidden), weight = lines_of(p.weight);
  const int64_t at_row = hidden.at(row), at_token = weight.at(token);
  float sum = 0;
  for (int64_t h = threadIdx.x % 32; h < p.hidden.columns; h += 32)
    sum = fmaf(element(hidden, at_row + h), element(weight, at_token + h), sum);
  for (int distance = 16; distance; distance /= 2)
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  return p.bias ? sum + p.bias[token] : sum;
}

__global__ void __launch_bounds__(kRowThreads)
    restricted_forward_kernel(OrderedProblem p, LinearForward out, ScaledExp exp) {
  unsigned char* shared = dynamic_smem<unsigned char>();
  constexpr int kWarps = kRowThreads / 32;
  PartialSoftmax* parts = reinterpret_cast<PartialSoftmax*>(shared);
  float* own = reinterpret_cast<float*>(parts + kWarps);
  if (int64_t(blockIdx.x) >= p.counts[1]) return;  // the whole block
  const int64_t row = p.order[p.counts[0] + blockIdx.x];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0)  // of an id that is not permitted
    *own = in_vocabulary(p.ids[row], p.weight.rows) ? -kInfinity : kNaN;
  __syncthreads();
  PartialSoftmax softmax;
  for (int64_t i = p.allowed.offsets[row] + warp; i < p.allowed.offsets[row + 1]; i += kWarps) {
    const int64_t token = p.allowed.ids[i];
    if (!in_vocabulary(token, p.weight.rows)) continue;
    const float z[1] = {token_logit(p, row, token)};
    softmax.add<true>(z, exp);
    if (lane == 0 && token == p.ids[row]) *own = z[0];
  }
  if (lane == 0) parts[warp] = softmax;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; ++w) softmax.join<true>(parts[w], exp);
  write_row(p, out, row, softmax, *own);
}

// ---- launchers ----

int64_t linear_forward_workspace(const OrderedProblem& p) {
  return slices(p) * p.hidden.rows * int64_t(sizeof(PartialSoftmax)) +
         p.hidden.rows * int64_t(sizeof(float));
}

template <class T, bool kEntropy>
void launch_slices(const OrderedProblem& p, const SliceSoftmax& out, void* stream) {
  constexpr int kShared = kTileShared<T, Layout::by_row, Layout::by_row>;
  const dim3 grid(unsigned(parts(p.hidden.rows, kTile)), unsigned(slices(p)));
  launch("linear_logprobs, slices", {grid, kTileThreads, kShared, stream},
         linear_slice_kernel<T, kEntropy>, p, out, ScaledExp::of(p.temperature));
}

// The bf16 kernels need bf16 on both sides; the float ones take any dtype.
inline bool all_bf16(const OrderedProblem& p) {
  return p.hidden.dtype == DType::bf16 && p.weight.dtype == DType::bf16;
}

void linear_logprobs(const OrderedProblem& p, const LinearForward& out, void* workspace,
                            void* stream) {
  const SliceSoftmax sliced(p, workspace);
  const ScaledExp exp = ScaledExp::of(p.temperature);
  if (all_bf16(p))
    out.entropy ? launch_slices<Bf16, true>(p, sliced, stream)
                : launch_slices<Bf16, false>(p, sliced, stream);
  else
    out.entropy ? launch_slices<float, true>(p, sliced, stream)
                : launch_slices<float, false>(p, sliced, stream);
  launch("linear_logprobs, join",
         {unsigned(parts(p.hidden.rows, kRowThreads)), kRowThreads, 0, stream}, linear_join_kernel,
         p, sliced, slices(p), out, exp);
  if (!p.allowed.offsets) return;
  constexpr int kShared = kRowThreads / 32 * int(sizeof(PartialSoftmax)) + int(sizeof(float));
  launch("linear_logprobs, restricted", {unsigned(p.hidden.rows), kRowThreads, kShared, stream},
         restricted_forward_kernel, p, out, exp);
}

}  // namespace deeprec::cuda
