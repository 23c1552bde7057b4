#pragma once

#include <cstdint>

namespace deeprec::cuda {

void run_block_sum(const float* x, float* out, int n, int blocks);
void run_matmul(const void* a, const void* b, float* c, int m, int n, int d);
void run_one_mma(int type, const uint32_t* a, const uint32_t* b, uint32_t* c);
void run_transpose8(const uint16_t* x, uint32_t* out);

}  // namespace deeprec::cuda
