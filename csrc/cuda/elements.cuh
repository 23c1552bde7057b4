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

// kCount consecutive elements from an address on a 16-byte line.
template <class T, int kCount>
__device__ inline void load_floats(const T* x, float (&out)[kCount]) {
  static_assert(kCount % kPerVector<T> == 0, "whole vectors");
#pragma unroll
  for (int v = 0; v < kCount / kPerVector<T>; ++v) {
    const Vector<T> part = reinterpret_cast<const Vector<T>*>(x)[v];
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) out[v * kPerVector<T> + i] = widen(part.lane[i]);
  }
}

template <class T, int kCount>
__device__ inline void store_floats(const float (&x)[kCount], T* out) {
  static_assert(kCount % kPerVector<T> == 0, "whole vectors");
#pragma unroll
  for (int v = 0; v < kCount / kPerVector<T>; ++v) {
    Vector<T> part;
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i)
      part.lane[i] = narrowed<T>(x[v * kPerVector<T> + i]);
    reinterpret_cast<Vector<T>*>(out)[v] = part;
  }
}

// A row as the threads of a block share it out: single elements up to the first 16-byte line,
// chunks of kCount, and single elements again.
template <class T, int kCount>
struct RowParts {
  int64_t head, chunks, length;

  __device__ RowParts(const T* row, int64_t n) : length(n) {
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = past ? min(int64_t(kPerVector<T>) - past, n) : 0;
    chunks = (n - head) / kCount;
  }
  __device__ int64_t tail() const { return head + chunks * kCount; }

  // chunk(first element) and single(element) for all that is this thread's.
  template <class Chunk, class Single>
  __device__ void for_each(Chunk&& chunk, Single&& single) const {
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x) single(i);
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) chunk(head + c * kCount);
    for (int64_t i = tail() + threadIdx.x; i < length; i += blockDim.x) single(i);
  }
};

}  // namespace deeprec::cuda
