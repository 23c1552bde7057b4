// One 128 × 128 tile of a product C = A·Bᵀ on tensor cores, for kernels that use C on the spot.
//
// Operands come from global memory through a ring of shared-memory stages (cp.async), in either
// layout: "by row", where a line of memory is a row of the operand and runs along the summed
// dimension, or "by depth", where a line is one step of the summed dimension and runs along the
// rows. Lines may be picked by a list. bf16 products are exact; float operands are split into two
// tf32 numbers of 11 bits each and multiplied three times (high·high, high·low, low·high), which
// leaves about 2^-22 of a product, and are added outside of the tensor cores (Ootomo, Yokota,
// "Recovering single precision accuracy from Tensor Cores", 2022). Sums are float, over ascending
// depth.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"

namespace deeprec::cuda {

constexpr int kTile = 128;  // rows of A and of B in a tile
constexpr int kTileThreads = 256;
constexpr int kStages = 3;
// Warps lie 4 × 2 on the tile and hold 32 × 64 of it.
constexpr int kWarpRows = 32, kWarpColumns = 64;

enum class Layout { by_row, by_depth };

// Steps of the summed dimension in a stage: 64 bytes a row.
template <class T>
constexpr int kTileDepth = 64 / int(sizeof(T));

// A stage of one operand in shared memory. A line is padded by 16 bytes, so that its neighbours
// start in other banks.
template <class T, Layout kLayout>
struct Stage {
  static constexpr bool kByRow = kLayout == Layout::by_row;
  static constexpr int kLines = kByRow ? kTile : kTileDepth<T>;
  static constexpr int kWidth = kByRow ? kTileDepth<T> : kTile;
  static constexpr int kPitch = kWidth + kPerVector<T>;
  static constexpr int kElements = kLines * kPitch;
};

template <class T, Layout kA, Layout kB>
constexpr int kTileShared =
    kStages * (Stage<T, kA>::kElements + Stage<T, kB>::kElements) * int(sizeof(T));

// Lines in global memory. Elements outside of lines × width are zeros and never read.
struct Lines {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;             // between lines, in elements
  const int64_t* list = nullptr;  // line i is line list[i] of data; null: i
  int64_t lines = 0, width = 0;

  __device__ int64_t at(int64_t line) const { return (list ? list[line] : line) * stride; }
};

__device__ inline float element(const Lines& from, int64_t at) {
  switch (from.dtype) {
    case DType::f32: return static_cast<const float*>(from.data)[at];
    case DType::bf16: return widen(static_cast<const Bf16*>(from.data)[at]);
    default: return widen(static_cast<const F16*>(from.data)[at]);
  }
}

template <class T>
__device__ constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::bf16;
}

// Part [line, line + lines) × [column, column + width) of `from` to shared memory, by the whole
// block. Lines of another dtype, or off the 16-byte grid, go element by element.
template <class T, Layout kLayout>
__device__ void load_lines(const Lines& from, int64_t line, int64_t column, T* to) {
  constexpr int kLines = Stage<T, kLayout>::kLines, kWidth = Stage<T, kLayout>::kWidth;
  constexpr int kPitch = Stage<T, kLayout>::kPitch;
  const bool vectors = from.dtype == dtype_of<T>() && from.stride % kPerVector<T> == 0 &&
                       reinterpret_cast<uintptr_t>(from.data) % 16 == 0;
  if (vectors) {
    constexpr int kVectors = kWidth / kPerVector<T>;
#pragma unroll
    for (int v = threadIdx.x; v < kLines * kVectors; v += kTileThreads) {
      const int l = v / kVectors, c = v % kVectors * kPerVector<T>;
      const int64_t left = line + l < from.lines ? from.width - column - c : 0;
      const int bytes = int(max(int64_t(0), min(left, int64_t(kPerVector<T>)))) * int(sizeof(T));
      const T* source = static_cast<const T*>(from.data);
      if (bytes) source += from.at(line + l) + column + c;
      cp_async16(to + l * kPitch + c, source, bytes);
    }
  } else {
    for (int e = threadIdx.x; e < kLines * kWidth; e += kTileThreads) {
      const int l = e / kWidth, c = e % kWidth;
      const bool inside = line + l < from.lines && column + c < from.width;
      to[l * kPitch + c] =
          narrowed<T>(inside ? element(from, from.at(line + l) + column + c) : 0.f);
    }
  }
}

// Where an element of a 16 × 16 operand lies in a stage, for the lane that fetches it.
template <Layout kLayout>
__device__ inline const Bf16* ldmatrix_address(const Bf16* stage, int row,
                                                        int depth, int lane) {
  constexpr int kPitch = Stage<Bf16, kLayout>::kPitch;
  if (kLayout == Layout::by_row) return stage + (row + lane % 16) * kPitch + depth + lane / 16 * 8;
  return stage + (depth + lane % 8 + lane / 16 * 8) * kPitch + row + lane / 8 % 2 * 8;
}

template <Layout kLayout>
__device__ inline void load_fragment(const Bf16* stage, int row, int depth, int lane,
                                     uint32_t (&fragment)[4]) {
  if (kLayout == Layout::by_row)
    ldmatrix_x4(fragment, ldmatrix_address<kLayout>(stage, row, depth, lane));
  else
    ldmatrix_x4_transposed(fragment, ldmatrix_address<kLayout>(stage, row, depth, lane));
}

// The accumulators of one thread. `for_each(f)` calls f(row, column, value) with places in the tile.
struct TileSums {
  float sum[2][8][4];  // [16 rows][8 columns][place in the mma's result]

  template <class F>
  __device__ void for_each(F&& f) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          f(warp / 2 * kWarpRows + i * 16 + c / 2 * 8 + lane / 4,
            warp % 2 * kWarpColumns + j * 8 + lane % 4 * 2 + c % 2, sum[i][j][c]);
  }
};

template <Layout kA, Layout kB>
__device__ inline void multiply_stage(const Bf16* a, const Bf16* b,
                                      TileSums& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * kWarpRows, column = warp % 2 * kWarpColumns;
#pragma unroll
  for (int depth = 0; depth < kTileDepth<Bf16>; depth += 16) {
    uint32_t left[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_fragment<kA>(a, row + i * 16, depth, lane, left[i]);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t right[4];
      load_fragment<kB>(b, column + j * 8, depth, lane, right);
      const uint32_t even[2] = {right[0], right[2]}, odd[2] = {right[1], right[3]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_bf16(sums.sum[i][j], left[i], even);
        mma_bf16(sums.sum[i][j + 1], left[i], odd);
      }
    }
  }
}

// x = high + low up to 2^-22 of it.
__device__ inline void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = to_tf32(x);
  low = to_tf32(x - __uint_as_float(high));
}

template <Layout kLayout>
__device__ inline float stage_element(const float* stage, int row, int depth) {
  constexpr int kPitch = Stage<float, kLayout>::kPitch;
  return kLayout == Layout::by_row ? stage[row * kPitch + depth] : stage[depth * kPitch + row];
}

template <Layout kA, Layout kB>
__device__ inline void multiply_stage(const float* a, const float* b, TileSums& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * kWarpRows + lane / 4, column = warp % 2 * kWarpColumns + lane / 4;
#pragma unroll 1  // two steps at once would spill
  for (int depth = lane % 4; depth < kTileDepth<float>; depth += 8) {
    uint32_t left[2][4], left_low[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        split_tf32(stage_element<kA>(a, row + i * 16 + c % 2 * 8, depth + c / 2 * 4), left[i][c],
                   left_low[i][c]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t right[2], right_low[2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
        split_tf32(stage_element<kB>(b, column + j * 8, depth + c * 4), right[c], right_low[c]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Tensor cores truncate what they add to, which over a long depth costs more than the
        // products' parts: they start at zero, and the sum is rounded to nearest.
        float part[4] = {};
        mma_tf32(part, left_low[i], right);
        mma_tf32(part, left[i], right_low);
        mma_tf32(part, left[i], right);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums.sum[i][j][c] += part[c];
      }
    }
  }
}

// sums = the tile of A·Bᵀ whose first rows are row_a and row_b, over the first `depth` steps.
// Shared memory: kTileShared<T, kA, kB> bytes. Every thread of the block must call it.
template <class T, Layout kA, Layout kB>
__device__ void multiply_tile(const Lines& a, int64_t row_a, const Lines& b, int64_t row_b,
                              int64_t depth, unsigned char* shared, TileSums& sums) {
  constexpr int kElementsA = Stage<T, kA>::kElements, kElementsB = Stage<T, kB>::kElements;
  T* stages_a = reinterpret_cast<T*>(shared);
  T* stages_b = stages_a + kStages * kElementsA;
  const auto load = [&](int64_t step) {
    const int64_t at = step * kTileDepth<T>;
    const int stage = int(step % kStages);
    T* to_a = stages_a + stage * kElementsA;
    T* to_b = stages_b + stage * kElementsB;
    if (kA == Layout::by_row) load_lines<T, kA>(a, row_a, at, to_a);
    else load_lines<T, kA>(a, at, row_a, to_a);
    if (kB == Layout::by_row) load_lines<T, kB>(b, row_b, at, to_b);
    else load_lines<T, kB>(b, at, row_b, to_b);
  };
  const int64_t steps = (depth + kTileDepth<T> - 1) / kTileDepth<T>;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums.sum[i][j][c] = 0;
  // kStages - 1 groups are in flight; a step that loads nothing still closes its group.
  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is complete, and nobody reads the one that is loaded next
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    const int stage = int(step % kStages);
    multiply_stage<kA, kB>(stages_a + stage * kElementsA, stages_b + stage * kElementsB, sums);
  }
  cp_async_wait<0>();
  __syncthreads();  // the next tile may load
}

}  // namespace deeprec::cuda
