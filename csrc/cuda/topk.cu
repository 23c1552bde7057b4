#include "cuda/topk.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/topk_exact.cuh"

namespace deeprec::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries that share a read of the items; fewer where their lists would not fit on chip.
constexpr int kManyQueries = 8, kFewQueries = 4;
constexpr int64_t kManyMaxK = 480;  // lists of 512
// Blocks a multiprocessor should have to hide latency, and rows that make one worth starting.
constexpr int64_t kBlocksEach = 4, kRowsEach = 1024;

struct Plan {
  int queries;      // of a block
  int64_t tiles;    // of queries
  int64_t parts;    // of items
  int64_t bytes;    // of workspace
};

Plan make_plan(const TopkRequest& request) {
  const topk::ItemRows& items = request.index.rows;
  if (request.k < 1 || request.k > kMaxK)
    throw std::invalid_argument("k must be 1 … " + std::to_string(kMaxK) + ", got " +
                                std::to_string(request.k));
  if (items.count > kMaxItems || items.dim < 1 || request.count < 0 ||
      request.count > kMaxItems)
    throw std::invalid_argument("items and queries must be fewer than 2^31");
  Plan plan;
  plan.queries = request.k <= kManyMaxK ? kManyQueries : kFewQueries;
  plan.tiles = divide_up(request.count, plan.queries);
  const int64_t wanted = divide_up(kBlocksEach * request.multiprocessors, std::max<int64_t>(plan.tiles, 1));
  plan.parts = std::clamp<int64_t>(divide_up(items.count, kRowsEach), 1,
                                   std::clamp<int64_t>(wanted, 1, 65535));
  plan.bytes = request.count * plan.parts * request.k * int64_t(sizeof(Key));
  return plan;
}

template <class T, int kQueries>
void launch_direct(const Plan& plan, const DirectJob& job, void* stream) {
  using Shape = DirectShape<kQueries>;
  launch("topk_direct",
         {dim3(unsigned(plan.tiles), unsigned(plan.parts)), dim3(Shape::kThreads),
          Shape::smem(job.k), stream},
         topk_direct<T, kQueries>, job);
}

template <class T>
void launch_direct(const Plan& plan, const DirectJob& job, void* stream) {
  if (plan.queries == kManyQueries) {
    launch_direct<T, kManyQueries>(plan, job, stream);
  } else {
    launch_direct<T, kFewQueries>(plan, job, stream);
  }
}

void launch_direct(const Plan& plan, const DirectJob& job, void* stream) {
  switch (job.items.type) {
    case topk::Dtype::f32: return launch_direct<float>(plan, job, stream);
    case topk::Dtype::bf16: return launch_direct<Bf16>(plan, job, stream);
    case topk::Dtype::f16: return launch_direct<F16>(plan, job, stream);
  }
}

void launch_merge(int64_t queries, const MergeJob& job, void* stream) {
  const int slots = list_slots<MergeGroup>(job.k);
  launch("topk_merge",
         {dim3(unsigned(queries)), dim3(kMergeThreads), BestList<MergeGroup>::bytes(slots) + 16,
          stream},
         topk_merge, job);
}

}  // namespace

int64_t topk_workspace_bytes(const TopkRequest& request) { return make_plan(request).bytes; }

void topk_search(const TopkRequest& request, const topk::Answer& answer,
                 const Workspace& workspace, void* stream) {
  const Plan plan = make_plan(request);
  if (workspace.bytes < plan.bytes)
    throw std::invalid_argument("workspace: expected " + std::to_string(plan.bytes) +
                                " bytes, got " + std::to_string(workspace.bytes));
  const int k = int(request.k);
  Key* parts = static_cast<Key*>(workspace.data);
  launch_direct(plan,
                {request.index.rows, request.queries, request.count, request.exclude, k, nullptr,
                 0, parts},
                stream);
  launch_merge(request.count,
               {parts, plan.parts * k, k, nullptr, 0, answer, request.index.rows.count}, stream);
}

}  // namespace deeprec::cuda
