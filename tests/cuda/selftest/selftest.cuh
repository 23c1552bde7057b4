// Small kernels that use every part of csrc/cuda/ptx.cuh, for the tests of the emulator itself.
#pragma once

#include "cuda/ptx.cuh"

namespace deeprec::cuda {

// ---- the sum of a block: shuffles, shared memory, one atomic ----

constexpr int kSumThreads = 128;

__global__ void __launch_bounds__(kSumThreads) block_sum(const float* x, float* out, int n) {
  float* partial = dynamic_smem<float>();
  float sum = 0;
  for (int i = int(blockIdx.x) * kSumThreads + int(threadIdx.x); i < n;
       i += int(gridDim.x) * kSumThreads)
    sum += x[i];
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bit);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < kSumThreads / 32; ++w) total += partial[w];
    atomicAdd(out, total);
  }
}

// ---- c[m, n] = a[m, d] b[n, d]^T: a ring of cp.async, ldmatrix, mma ----

constexpr int kTile = 32, kDepth = 32, kPad = 8, kStages = 3, kMatmulThreads = 64;
constexpr int kMatmulSmem = kStages * 2 * kTile * (kDepth + kPad) * int(sizeof(Bf16));

// d is a multiple of kDepth; warp w computes rows 16 w … of the tile.
__global__ void __launch_bounds__(kMatmulThreads)
    matmul_bf16(const Bf16* a, const Bf16* b, float* c, int m, int n, int d) {
  using Tile = Bf16[kTile][kDepth + kPad];
  Tile* left = dynamic_smem<Tile>();
  Tile* right = left + kStages;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int m0 = int(blockIdx.y) * kTile, n0 = int(blockIdx.x) * kTile;
  const auto fetch = [&](int step) {
    if (step < d / kDepth) {
      for (int i = thread; i < kTile * kDepth / 8; i += kMatmulThreads) {
        const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
        const bool in_a = m0 + row < m, in_b = n0 + row < n;
        cp_async16(&left[step % kStages][row][column],
                   a + int64_t(in_a ? m0 + row : 0) * d + step * kDepth + column, in_a ? 16 : 0);
        cp_async16(&right[step % kStages][row][column],
                   b + int64_t(in_b ? n0 + row : 0) * d + step * kDepth + column, in_b ? 16 : 0);
      }
    }
    cp_async_commit();  // an empty group keeps the count of groups and steps equal
  };
  float sum[4][4] = {};
  fetch(0);
  fetch(1);
  for (int step = 0; step < d / kDepth; ++step) {
    cp_async_wait<1>();
    __syncthreads();
    fetch(step + 2);
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t x[4], y[2][4];
      const int row = lane % 16, column = k + lane / 16 * 8;
      ldmatrix_x4(x, &left[step % kStages][warp * 16 + row][column]);
      for (int j = 0; j < 2; ++j)
        ldmatrix_x4(y[j], &right[step % kStages][j * 16 + row][column]);
      for (int j = 0; j < 4; ++j) {
        const uint32_t pair[2] = {y[j / 2][j % 2], y[j / 2][j % 2 + 2]};
        mma_bf16(sum[j], x, pair);
      }
    }
  }
  cp_async_wait<0>();
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) {
      const int row = m0 + warp * 16 + lane / 4 + i / 2 * 8, column = n0 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[int64_t(row) * n + column] = sum[j][i];
    }
}

// ---- one mma of each type on fragments that the test lays out ----

// type: 0 bf16, 1 f16, 2 tf32, 3 s8, 4 u8 x s8. Fragments are [lane][register].
__global__ void one_mma(int type, const uint32_t* a, const uint32_t* b, uint32_t* c) {
  const int lane = int(threadIdx.x);
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i) x[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) y[i] = b[lane * 2 + i];
  float f[4];
  int32_t s[4];
  for (int i = 0; i < 4; ++i) {
    s[i] = int32_t(c[lane * 4 + i]);
    f[i] = __uint_as_float(c[lane * 4 + i]);
  }
  if (type == 0) mma_bf16(f, x, y);
  if (type == 1) mma_f16(f, x, y);
  if (type == 2) mma_tf32(f, x, y);
  if (type == 3) mma_s8(s, x, y);
  if (type == 4) mma_u8s8(s, x, y);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = type < 3 ? __float_as_uint(f[i]) : uint32_t(s[i]);
}

// ---- a transposed tile: ldmatrix.trans, named barrier ----

__global__ void transpose8(const uint16_t* x, uint32_t* out) {
  uint16_t* tile = dynamic_smem<uint16_t>();
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tile[i] = x[i];
  named_barrier(1, 32);
  uint32_t r[4];
  ldmatrix_x4_transposed(r, tile + lane * 8);
  for (int j = 0; j < 4; ++j) out[lane * 4 + j] = r[j];
}

}  // namespace deeprec::cuda
