// Which ids count for a row.
#pragma once

#include "cpu/allowed_rows.h"
#include "cuda/ptx.cuh"

namespace deeprec::cuda {

// Ids are not checked on the host, which would have to wait for them: one outside of the vocabulary
// is never used as an address, and its log-prob is NaN.
__device__ inline bool in_vocabulary(int64_t id, int64_t vocabulary) {
  return id >= 0 && id < vocabulary;
}

// The permitted ids of a row; none when it is unrestricted.
struct Permitted {
  const int64_t* ids = nullptr;
  int64_t count = 0;

  __device__ Permitted(const AllowedRows& allowed, int64_t row) {
    if (!allowed.offsets) return;
    ids = allowed.ids + allowed.offsets[row];
    count = allowed.offsets[row + 1] - allowed.offsets[row];
  }
  __device__ bool restricts() const { return count > 0; }
  __device__ bool permits(int64_t id) const {
    if (!restricts()) return true;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (ids[middle] < id) low = middle + 1; else high = middle;
    }
    return low < count && ids[low] == id;
  }
};

}  // namespace deeprec::cuda
