// The k best of a stream of candidates, in shared memory.
#pragma once

#include "cuda/ptx.cuh"

namespace deeprec::cuda {

// A candidate as one number, larger is better: value descending, then index ascending, -0 = +0.
// Bit 0 keeps the sign of a zero. 0 is no candidate.
using Key = unsigned long long;

__device__ __forceinline__ Key make_key(float value, uint32_t index) {
  const bool zero = value == 0.0f;
  uint32_t bits = zero ? 0u : __float_as_uint(value);
  const uint32_t negative_zero = zero && __float_as_uint(value) != 0u;
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return Key(bits) << 32 | Key(0x7fffffffu - index) << 1 | negative_zero;
}
__device__ __forceinline__ float key_value(Key key) {
  uint32_t bits = uint32_t(key >> 32);
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
  return __uint_as_float(bits | uint32_t(key & 1) << 31);
}
__device__ __forceinline__ uint32_t key_index(Key key) {
  return 0x7fffffffu - (uint32_t(key) >> 1);
}

// The threads that share a list.
struct WarpGroup {
  static constexpr int kSize = 32;
  __device__ static int rank() { return int(threadIdx.x % 32); }
  __device__ static void sync() { __syncwarp(); }
};
template <int kThreads>
struct BlockGroup {
  static constexpr int kSize = kThreads;
  __device__ static int rank() { return int(threadIdx.x); }
  __device__ static void sync() { __syncthreads(); }
};

// Slots of a list for k: a power of two (for the sort) with room for one offer of every thread.
template <class Group>
constexpr int list_slots(int64_t k) {
  int slots = 64;
  while (slots < k + Group::kSize) slots *= 2;
  return slots;
}

// Bitonic; n a power of two.
template <class Group>
__device__ void sort_descending(Key* keys, int n) {
  for (int size = 2; size <= n; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = Group::rank(); i < n / 2; i += Group::kSize) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const Key a = keys[low], b = keys[high];
        if ((a < b) == ((low & size) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      Group::sync();
    }
}

// keys[0 … k) are the best so far once sorted; what is offered waits behind them until the list is
// full. All methods are called by all threads of the group.
template <class Group>
struct BestList {
  Key* keys;   // [slots]
  int* count;  // slots in use, in shared memory
  int k, slots;

  static constexpr int bytes(int slots) { return slots * int(sizeof(Key)); }

  __device__ void clear() {
    for (int i = Group::rank(); i < slots; i += Group::kSize) keys[i] = 0;
    if (Group::rank() == 0) *count = k;
    Group::sync();
  }
  // What a candidate must exceed to matter.
  __device__ Key threshold() const { return keys[k - 1]; }
  // One key a thread; 0 for none.
  __device__ void offer(Key key) {
    const bool full = *count > slots - Group::kSize;
    Group::sync();  // nobody appends before everybody has read the count
    if (full) settle();
    if (key > threshold()) keys[atomicAdd(count, 1)] = key;
    Group::sync();
  }
  // Afterwards keys[0 … k) are the best, in order.
  __device__ void settle() {
    sort_descending<Group>(keys, slots);
    for (int i = k + Group::rank(); i < slots; i += Group::kSize) keys[i] = 0;
    if (Group::rank() == 0) *count = k;
    Group::sync();
  }
};

}  // namespace deeprec::cuda
