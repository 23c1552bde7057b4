// Exact scores, and the search that computes all of them.
#pragma once

#include "cpu/topk.h"
#include "cuda/topk_best.cuh"

namespace deeprec::cuda {

// Eight threads share a score: thread j is lane j of the contract, which adds the products of
// dimensions j, j + 8, … in fp64, where they are exact. They are then summed in the contract's
// order, and rounded once: all eight threads return the same.
constexpr int kLanes = 8;

template <class T, int kRows, int kQueries>
__device__ __forceinline__ void exact_scores(const T* const (&rows)[kRows],
                                             const float* const (&queries)[kQueries], int64_t dim,
                                             float (&scores)[kRows][kQueries]) {
  const int lane = int(threadIdx.x) % kLanes;
  double sum[kRows][kQueries] = {};
  for (int64_t d = lane; d < dim; d += kLanes) {
    double row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = double(widen(rows[r][d]));
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const double query = double(queries[q][d]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r][q] = __fma_rn(row[r], query, sum[r][q]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      double total = sum[r][q];  // 0+4, then +(2+6), then +((1+5)+(3+7)); addition commutes
      total = __dadd_rn(total, __shfl_xor_sync(kFullWarp, total, 4));
      total = __dadd_rn(total, __shfl_xor_sync(kFullWarp, total, 2));
      total = __dadd_rn(total, __shfl_xor_sync(kFullWarp, total, 1));
      scores[r][q] = __double2float_rn(total);
    }
}

// Whether `id` is among the ascending ids of the query's row.
__device__ __forceinline__ bool is_excluded(const topk::Exclusions& exclude, int64_t query,
                                            uint32_t id) {
  if (!exclude.offsets) return false;
  int64_t low = exclude.offsets[query], high = exclude.offsets[query + 1];
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (exclude.ids[middle] < int64_t(id)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < exclude.offsets[query + 1] && exclude.ids[low] == int64_t(id);
}

// ---- the direct search ----

// A block has one warp a query, and scores 4 rows a thread group at a time.
constexpr int kDirectRows = 4;

template <int kQueries>
struct DirectShape {
  static constexpr int kThreads = 32 * kQueries;
  static constexpr int kStep = kThreads / kLanes * kDirectRows;  // rows of a step
  static int smem(int64_t k) {
    return kQueries * (BestList<WarpGroup>::bytes(list_slots<WarpGroup>(k)) + 16 +
                       kStep * int(sizeof(float)));
  }
};

struct DirectJob {
  topk::ItemRows items;
  const float* queries;
  int64_t count;
  topk::Exclusions exclude;
  int k;
  const uint32_t* needed;  // [count] only queries where it exceeds `enough`; null: all
  uint32_t enough;
  Key* parts;  // [count, gridDim.y, k]
};

// Block (x, y) has queries x kQueries … and the y-th part of the items. Blocks a multiprocessor:
// as many as there are registers for without spilling.
template <class T, int kQueries>
__global__ void __launch_bounds__(DirectShape<kQueries>::kThreads, kQueries > 4 ? 1 : 4)
    topk_direct(const DirectJob job) {
  using Shape = DirectShape<kQueries>;
  const int slots = list_slots<WarpGroup>(job.k);
  Key* keys = dynamic_smem<Key>();
  int* counts = reinterpret_cast<int*>(keys + kQueries * slots);
  float* scored = reinterpret_cast<float*>(counts + 4 * kQueries);  // [kQueries][kStep]

  const int64_t first = int64_t(blockIdx.x) * kQueries, n = job.items.count, dim = job.items.dim;
  if (job.needed) {
    bool any = false;
    for (int q = 0; q < kQueries; ++q)
      any = any || (first + q < job.count && job.needed[first + q] > job.enough);
    if (!any) return;  // all threads of the block
  }
  const float* queries[kQueries];
#pragma unroll
  for (int q = 0; q < kQueries; ++q)
    queries[q] = job.queries + (first + q < job.count ? first + q : first) * dim;

  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t query = first + warp;
  BestList<WarpGroup> best{keys + warp * slots, counts + 4 * warp, job.k, slots};
  best.clear();

  const T* data = static_cast<const T*>(job.items.data);
  const int64_t begin = n * blockIdx.y / gridDim.y, end = n * (blockIdx.y + 1) / gridDim.y;
  const int group = int(threadIdx.x) / kLanes;
  for (int64_t base = begin; base < end; base += Shape::kStep) {
    const T* rows[kDirectRows];
    float scores[kDirectRows][kQueries];
#pragma unroll
    for (int r = 0; r < kDirectRows; ++r) {
      const int64_t row = base + group * kDirectRows + r;
      rows[r] = data + (row < end ? row : begin) * job.items.stride;
    }
    exact_scores(rows, queries, dim, scores);
    if (threadIdx.x % kLanes == 0) {
#pragma unroll
      for (int r = 0; r < kDirectRows; ++r)
#pragma unroll
        for (int q = 0; q < kQueries; ++q)
          scored[q * Shape::kStep + group * kDirectRows + r] = scores[r][q];
    }
    __syncthreads();
    for (int i = lane; i < Shape::kStep; i += 32) {
      const int64_t row = base + i;
      Key key = 0;
      if (row < end && query < job.count) {
        key = make_key(scored[warp * Shape::kStep + i], uint32_t(row));
        if (key > best.threshold() && is_excluded(job.exclude, query, uint32_t(row))) key = 0;
      }
      best.offer(key);
    }
    __syncthreads();
  }
  best.settle();
  if (query < job.count) {
    Key* out = job.parts + (query * gridDim.y + blockIdx.y) * job.k;
    for (int i = lane; i < job.k; i += 32) out[i] = best.keys[i];
  }
}

// ---- the merge of partial answers ----

constexpr int kMergeThreads = 256;
using MergeGroup = BlockGroup<kMergeThreads>;

struct MergeJob {
  const Key* parts;  // [count, candidates]
  int64_t candidates;
  int k;
  const uint32_t* needed;  // as in DirectJob
  uint32_t enough;
  topk::Answer answer;
  int64_t scored;  // exact scores that were computed for a query
};

__device__ __forceinline__ void write_answer(const topk::Answer& answer, int64_t query, int k,
                                             const Key* keys, int64_t scored) {
  for (int i = int(threadIdx.x); i < k; i += int(blockDim.x)) {
    const Key key = keys[i];
    answer.values[query * k + i] = key ? key_value(key) : -__uint_as_float(0x7f800000u);
    answer.indices[query * k + i] = key ? int64_t(key_index(key)) : -1;
  }
  if (threadIdx.x == 0) answer.rescored[query] = scored;
}

// One block a query.
__global__ void __launch_bounds__(kMergeThreads) topk_merge(const MergeJob job) {
  const int64_t query = blockIdx.x;
  if (job.needed && job.needed[query] <= job.enough) return;  // all threads of the block
  const int slots = list_slots<MergeGroup>(job.k);
  Key* keys = dynamic_smem<Key>();
  BestList<MergeGroup> best{keys, reinterpret_cast<int*>(keys + slots), job.k, slots};
  best.clear();
  for (int64_t base = 0; base < job.candidates; base += kMergeThreads) {
    const int64_t i = base + threadIdx.x;
    best.offer(i < job.candidates ? job.parts[query * job.candidates + i] : 0);
  }
  best.settle();
  write_answer(job.answer, query, job.k, best.keys, job.scored);
}

}  // namespace deeprec::cuda
