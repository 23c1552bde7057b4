// What kernels may use beyond plain CUDA C++, and how they are launched. The only file with inline
// PTX, and the only one that knows of two worlds: nvcc compiles the first half; g++ compiles the
// same kernels and launchers against tests/cuda/emulator, which has the same names on the CPU.
//
// Rules for kernels, so that the emulator proves something (docs/GPU.md):
//   - shared memory only through dynamic_smem<T>(), which the emulator poisons;
//   - warp intrinsics with explicit masks, no __activemask, no return before a barrier;
//   - blocks do not wait for each other;
//   - inputs are aligned as the launcher checks; everything else is read element by element.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/dtype.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace deeprec::cuda {

// ---- shared memory ----

// The block's dynamic shared memory from `offset` bytes on; aligned to 128 bytes at offset 0.
template <class T>
__device__ __forceinline__ T* dynamic_smem(int offset = 0) {
  extern __shared__ __align__(128) unsigned char deeprec_smem[];
  return reinterpret_cast<T*>(deeprec_smem + offset);
}

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// A barrier of `threads` threads (a multiple of 32) of the block; id 1 … 15, 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- asynchronous copies from global to shared memory ----

// 16 bytes, both ends aligned to 16; only the first `bytes` are read, the rest become zero.
__device__ __forceinline__ void cp_async16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kPending of this thread's groups are in flight. Others' copies need a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- fragments and matrix multiplication: d += a b, layouts of the PTX ISA ----

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

#define DEEPREC_MMA(name, shape, constraint, scalar)                                            \
  __device__ __forceinline__ void name(scalar(&d)[4], const uint32_t(&a)[4],                    \
                                       const uint32_t(&b)[2]) {                                 \
    asm volatile("mma.sync.aligned." shape                                                      \
                 " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                       \
                 : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]),            \
                   "+" constraint(d[3])                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
DEEPREC_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", "f", float)
DEEPREC_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32", "f", float)
DEEPREC_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32", "f", float)
DEEPREC_MMA(mma_s8, "m16n8k32.row.col.s32.s8.s8.s32", "r", int32_t)
DEEPREC_MMA(mma_u8s8, "m16n8k32.row.col.s32.u8.s8.s32", "r", int32_t)
#undef DEEPREC_MMA

// Rounded to the 10 bits of fraction that mma_tf32 reads, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// ---- stored number formats ----

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Round to nearest, ties to even.
__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(float x, Bf16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}
__device__ __forceinline__ void narrow(float x, F16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}
// Two of them in one register, `low` in the lower half, as the fragments want them.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x to 2 ulp (PTX ISA, ex2.approx.ftz.f32).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- launching ----

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Shared memory that a block may use without asking for more.
constexpr int kDefaultSmem = 48 << 10;

template <class... Parameters, class... Arguments>
void launch_on(dim3 grid, dim3 block, int smem, void* stream, const char* name,
               void (*kernel)(Parameters...), Arguments... arguments) {
  if (smem > kDefaultSmem)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), name);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(smem);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

inline void zero_on(void* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "memset");
}

}  // namespace deeprec::cuda

#else

#include "emulator.h"

#endif

namespace deeprec::cuda {

// Where a kernel runs: grid and block, dynamic shared memory in bytes, and a cudaStream_t.
struct Launch {
  dim3 grid;
  dim3 block;
  int smem;
  void* stream;
};

// Starts kernel(arguments...) and throws std::runtime_error if the driver refuses it. An empty grid
// does nothing. Never waits for the kernel.
template <class Kernel, class... Arguments>
void launch(const char* name, const Launch& where, Kernel* kernel, Arguments... arguments) {
  if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return;
  launch_on(where.grid, where.block, where.smem, where.stream, name, kernel, arguments...);
}

constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace deeprec::cuda
