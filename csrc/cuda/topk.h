// Exact top-k on a GPU: what the bindings call (topk.cu). The views are those of the CPU kernels,
// with device addresses; so are the contract and the codes (cpu/topk.h, cpu/topk_encode.cpp).
#pragma once

#include <cstddef>

#include "cpu/topk.h"

namespace deeprec::cuda {

constexpr int64_t kMaxK = 1024;                       // lists of twice as many fit on chip
constexpr int64_t kMaxItems = INT64_C(0x7fffffff);    // an index shares 32 bits with the sign of 0

struct TopkRequest {
  topk::Index index;
  const float* queries;  // [count, dim], contiguous
  int64_t count;
  int64_t k;
  topk::Exclusions exclude;
  int multiprocessors;  // of the device: how many blocks make it busy
};

struct Workspace {
  void* data;  // aligned to 256 bytes
  int64_t bytes;
};

// Throws std::invalid_argument where a size is out of range.
int64_t topk_workspace_bytes(const TopkRequest& request);

// Starts the kernels on `stream` and returns. Excluded ids out of range exclude nothing; the
// answer to a query that is not finite means nothing.
void topk_search(const TopkRequest& request, const topk::Answer& answer,
                 const Workspace& workspace, void* stream);

}  // namespace deeprec::cuda
