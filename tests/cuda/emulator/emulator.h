// The CUDA that kernels may use, on the CPU. Found instead of the CUDA headers by csrc/cuda/ptx.cuh
// when g++ compiles a .cu file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "launches.h"
#include "mma.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// A site is taken where a call is written: these builtins are evaluated by the caller.
#define EMULATOR_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()

// ---- vector types ----

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- coordinates ----

#define threadIdx (::emulator::thread().index)
#define blockIdx (::emulator::block().index)
#define blockDim (::emulator::block().size)
#define gridDim (::emulator::block().grid)

// ---- barriers, votes, shuffles ----

inline void __syncthreads(EMULATOR_SITE) { emulator::barrier(0, 0, {file_, line_}); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
  emulator::ballot("__syncwarp", mask, true, {file_, line_}, true);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, EMULATOR_SITE) {
  return emulator::ballot("__ballot_sync", mask, predicate, {file_, line_});
}
inline bool __any_sync(unsigned mask, bool predicate, EMULATOR_SITE) {
  return emulator::ballot("__any_sync", mask, predicate, {file_, line_}) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, EMULATOR_SITE) {
  return emulator::ballot("__all_sync", mask, predicate, {file_, line_}) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle("__shfl_sync", mask, value, width, {file_, line_},
                           [&](int, int base) { return base + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(
      "__shfl_up_sync", mask, value, width, {file_, line_},
      [&](int lane, int base) { return lane - delta < base ? lane : lane - delta; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(
      "__shfl_down_sync", mask, value, width, {file_, line_},
      [&](int lane, int base) { return lane + delta < base + width ? lane + delta : lane; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(
      "__shfl_xor_sync", mask, value, width, {file_, line_},
      [&](int lane, int base) { return (lane ^ bits) < base + width ? lane ^ bits : lane; });
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, EMULATOR_SITE) {
  return emulator::reduce("__reduce_add_sync", mask, value, {file_, line_},
                          [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, EMULATOR_SITE) {
  return emulator::reduce("__reduce_max_sync", mask, value, {file_, line_},
                          [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, EMULATOR_SITE) {
  return emulator::reduce("__reduce_min_sync", mask, value, {file_, line_},
                          [](T a, T b) { return a < b ? a : b; });
}

// ---- atomics: fibers switch only where they wait, so plain reads and writes are atomic ----

namespace emulator {
template <class T, class Next>
T atomic(T* p, Next next) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("atomic on a misaligned address");
  T old, wanted;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do wanted = next(old);
  while (!__atomic_compare_exchange(p, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace emulator
template <class T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  return emulator::atomic(p, [&](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> value) {
  return emulator::atomic(p, [&](T old) { return old > value ? old : value; });
}
template <class T>
T atomicMin(T* p, std::common_type_t<T> value) {
  return emulator::atomic(p, [&](T old) { return old < value ? old : value; });
}
template <class T>
T atomicOr(T* p, std::common_type_t<T> value) {
  return emulator::atomic(p, [&](T old) { return T(old | value); });
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> value) {
  return emulator::atomic(p, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulator::atomic(p, [&](T old) { return old == expected ? value : old; });
}
inline void __threadfence() {}

// ---- scalar intrinsics ----

using std::max;
using std::min;

template <class To, class From>
To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }

namespace emulator {
// Conversions of the device saturate, and make zero of NaN.
template <class To>
To saturate(double x) {
  using Limits = std::numeric_limits<To>;
  if (x != x) return 0;
  if (x <= double(Limits::min())) return Limits::min();
  if (x >= double(Limits::max())) return Limits::max();
  return To(x);
}
}  // namespace emulator
inline int __float2int_rn(float x) { return emulator::saturate<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return emulator::saturate<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return emulator::saturate<int>(std::ceil(x)); }
inline int __float2int_rz(float x) { return emulator::saturate<int>(std::trunc(x)); }
inline int __double2int_rn(double x) { return emulator::saturate<int>(std::nearbyint(x)); }
inline float __double2float_rn(double x) { return float(x); }
inline float __double2float_rd(double x) {
  const float nearest = float(x);
  return double(nearest) > x ? std::nextafterf(nearest, -INFINITY) : nearest;
}
inline float __double2float_ru(double x) { return -__double2float_rd(-x); }

// ---- csrc/cuda/ptx.cuh: the same names, in the same order ----

namespace deeprec::cuda {

template <class T>
T* dynamic_smem(int offset = 0) {
  return reinterpret_cast<T*>(emulator::block().smem + offset);
}

inline void named_barrier(int id, int threads, EMULATOR_SITE) {
  if (threads <= 0 || threads % 32) emulator::fail("bar.sync of a partial warp");
  emulator::barrier(id, threads, {file_, line_});
}

inline void cp_async16(void* to, const void* from, int bytes = 16, EMULATOR_SITE) {
  const emulator::Site site{file_, line_};
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15)
    emulator::fail("cp.async at " + emulator::describe(site) + ": not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16)
    emulator::fail("cp.async at " + emulator::describe(site) + ": more than 16 bytes");
  emulator::start_copy({to, from, 16, bytes, 0});
}
inline void cp_async_commit() { ++emulator::thread().copy_group; }
template <int kPending>
void cp_async_wait() {
  emulator::finish_copies(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_SITE) {
  const auto words = emulator::ldmatrix(row, false, {file_, line_});
  std::memcpy(r, words.word, sizeof r);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, EMULATOR_SITE) {
  const auto words = emulator::ldmatrix(row, true, {file_, line_});
  std::memcpy(r, words.word, sizeof r);
}

#define EMULATOR_MMA(name, type, scalar)                                                   \
  inline void name(scalar(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2],            \
                   EMULATOR_SITE) {                                                        \
    emulator::mma<emulator::type>(#name, d, a, b, {file_, line_});                         \
  }
EMULATOR_MMA(mma_bf16, Bf16Pair, float)
EMULATOR_MMA(mma_f16, F16Pair, float)
EMULATOR_MMA(mma_tf32, Tf32, float)
EMULATOR_MMA(mma_s8, S8, int32_t)
EMULATOR_MMA(mma_u8s8, U8S8, int32_t)
#undef EMULATOR_MMA

inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return to_float(x); }
inline float widen(F16 x) { return to_float(x); }
template <class T>
void narrow(float x, T* out) {
  from_float(x, out);
}
template <class T>
uint32_t pack_pair(float low, float high) {
  T a, b;
  from_float(low, &a);
  from_float(high, &b);
  return a.bits | uint32_t(b.bits) << 16;
}
inline uint32_t pack_bf16(float low, float high) { return pack_pair<Bf16>(low, high); }
inline uint32_t pack_f16(float low, float high) { return pack_pair<F16>(low, high); }

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // .ftz
}

template <class... Parameters, class... Arguments>
void launch_on(dim3 grid, dim3 block, int smem, void*, const char* name,
               void (*kernel)(Parameters...), Arguments... arguments) {
  emulator::record_launch(reinterpret_cast<const void*>(kernel), grid, block, smem,
                          Parameters(arguments)...);
  emulator::run(name, grid, block, smem, [=] { kernel(Parameters(arguments)...); });
}

inline void zero_on(void* memory, size_t bytes, void*) { std::memset(memory, 0, bytes); }

}  // namespace deeprec::cuda
