#include "selftest.h"

#include "selftest.cuh"

namespace deeprec::cuda {

void run_block_sum(const float* x, float* out, int n, int blocks) {
  launch("block_sum", {dim3(unsigned(blocks)), dim3(kSumThreads), 64, nullptr}, block_sum, x, out,
         n);
}

void run_matmul(const void* a, const void* b, float* c, int m, int n, int d) {
  const dim3 grid(unsigned(n + kTile - 1) / kTile, unsigned(m + kTile - 1) / kTile);
  launch("matmul_bf16", {grid, dim3(kMatmulThreads), kMatmulSmem, nullptr}, matmul_bf16,
         static_cast<const Bf16*>(a), static_cast<const Bf16*>(b), c, m, n, d);
}

void run_one_mma(int type, const uint32_t* a, const uint32_t* b, uint32_t* c) {
  launch("one_mma", {dim3(1), dim3(32), 0, nullptr}, one_mma, type, a, b, c);
}

void run_transpose8(const uint16_t* x, uint32_t* out) {
  launch("transpose8", {dim3(1), dim3(32), 512, nullptr}, transpose8, x, out);
}

}  // namespace deeprec::cuda
