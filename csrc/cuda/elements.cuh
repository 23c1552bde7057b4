// float, bf16 and fp16 elements as floats, one by one and 16 bytes at a time.
#pragma once

#include "cuda/ptx.cuh"

namespace deeprec::cuda {

template <class T>
__device__ inline T narrowed(float x) {
  T y;
  narrow(x, &y);
  return y;
}

// Elements of 16 bytes.
template <class T>
constexpr int kPerVector = 16 / int(sizeof(T));

template <class T>
struct alignas(16) Vector {
  T lane[kPerVector<T>];
};

// Whether rows may be read 16 bytes at a time.
template <class T>
__device__ inline bool on_vectors(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// kCount consecutive elements; `vectors`: from an address on a 16-byte line.
template <class T, int kCount>
__device__ inline void load_floats(const T* x, bool vectors, float (&out)[kCount]) {
  static_assert(kCount % kPerVector<T> == 0, "whole vectors");
  if (vectors) {
#pragma unroll
    for (int v = 0; v < kCount / kPerVector<T>; ++v) {
      const Vector<T> part = reinterpret_cast<const Vector<T>*>(x)[v];
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) out[v * kPerVector<T> + i] = widen(part.lane[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = widen(x[i]);
  }
}

template <class T, int kCount>
__device__ inline void store_floats(const float (&x)[kCount], bool vectors, T* out) {
  static_assert(kCount % kPerVector<T> == 0, "whole vectors");
  if (vectors) {
#pragma unroll
    for (int v = 0; v < kCount / kPerVector<T>; ++v) {
      Vector<T> part;
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i)
        part.lane[i] = narrowed<T>(x[v * kPerVector<T> + i]);
      reinterpret_cast<Vector<T>*>(out)[v] = part;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) narrow(x[i], out + i);
  }
}

// A row of n elements as the threads of a block share it out: chunk(first element) for whole
// chunks of kCount, single(element) for what is left. The same for every address of the row, so
// that results do not depend on where it lies.
template <int kCount, class Chunk, class Single>
__device__ void share_row(int64_t n, Chunk&& chunk, Single&& single) {
  const int64_t whole = n / kCount * kCount;
  for (int64_t i = threadIdx.x * kCount; i < whole; i += blockDim.x * kCount) chunk(i);
  for (int64_t i = whole + threadIdx.x; i < n; i += blockDim.x) single(i);
}

}  // namespace deeprec::cuda
