#include "cuda/topk.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/topk_codes.cuh"

namespace deeprec::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries that share a read of the items; fewer where their lists would not fit on chip.
constexpr int kManyQueries = 8, kFewQueries = 4;
constexpr int64_t kManyMaxK = 480;  // lists of 512
// Blocks a multiprocessor should have to hide latency, and rows that make one worth starting.
constexpr int64_t kBlocksEach = 4, kRowsEach = 1024;

// ---- plan ----

// Everything a search keeps in its workspace, for so many queries at a time.
constexpr int64_t kWorkspaceBytes = INT64_C(256) << 20;
// Queries of a scan's block; small batches waste fewer lanes with the lesser tile.
constexpr int kManyTiles = 8, kFewTiles = 2;
// One block in so many is sampled, at least so many a set of classes.
constexpr int64_t kSampleStride = 16, kSamplesEach = 4;
// Classes beyond k, so that few of the best rows share one.
constexpr int64_t kClassesEach = 4, kMinClasses = 1024;
// Rows listed per one that is expected; more are searched directly.
constexpr int64_t kListedEach = 8, kMinListed = 4096;

struct Plan {
  // direct
  int queries;    // of a block
  int64_t parts;  // of items
  // coded; no steps: no codes
  int steps = 0, tiles = 0, sets = 0;
  int64_t blocks = 0, stride = 1, samples = 0, sample_blocks = 0, scan_parts = 0, capacity = 0;
  // both
  int64_t chunk;  // queries at a time
  int64_t bytes;  // of workspace
};

// Memory in consecutive pieces, aligned for every vector load.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += divide_up(count * int64_t(sizeof(T)), 256) * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Buffers {
  Key* parts;
  uint4* fragments;
  EncodedQuery* encoded;
  double* shift;
  double* scale;
  Key* sampled;
  uint32_t* counts;
  uint32_t* listed;
};

int64_t padded(const Plan& plan, int64_t queries) {
  return divide_up(queries, plan.tiles * 8) * plan.tiles * 8;
}

// Where everything lies for `queries` at a time; returns the bytes.
int64_t lay_out(const Plan& plan, int64_t queries, int64_t k, void* base, Buffers* buffers) {
  Pieces pieces(base);
  buffers->parts = pieces.take<Key>(queries * plan.parts * k);
  if (plan.steps) {
    const int64_t all = padded(plan, queries);
    buffers->fragments = pieces.take<uint4>(all / kFragmentQueries * plan.steps * 32);
    buffers->encoded = pieces.take<EncodedQuery>(all);
    buffers->shift = pieces.take<double>(all);
    buffers->scale = pieces.take<double>(all);
    buffers->sampled = pieces.take<Key>(all * plan.sets * 32);
    buffers->counts = pieces.take<uint32_t>(all);
    buffers->listed = pieces.take<uint32_t>(queries * plan.capacity);
  }
  return pieces.used();
}

void plan_codes(const TopkRequest& request, Plan& plan) {
  const topk::ItemRows& items = request.index.rows;
  const int64_t quads = topk::code_shape(items.dim).quads;
  plan.steps = int(divide_up(quads, kStepQuads));
  plan.tiles = request.count > kFewTiles * 8 ? kManyTiles : kFewTiles;
  plan.blocks = divide_up(items.count, topk::kBlockRows);
  plan.sets = 1;
  while (plan.sets * 32 < std::max(kMinClasses, kClassesEach * request.k)) plan.sets *= 2;
  const int64_t wanted = std::max(plan.blocks / kSampleStride, kSamplesEach * plan.sets);
  plan.stride = std::max<int64_t>(plan.blocks / wanted, 1);
  plan.samples = divide_up(plan.blocks, plan.stride);
  const int64_t sample_tiles = padded(plan, request.count) / kSampleQueries;
  plan.sample_blocks =
      std::clamp<int64_t>(divide_up(kBlocksEach * request.multiprocessors,
                                    sample_tiles * plan.sets), 1, 65535 / plan.sets) * plan.sets;
  const int64_t scan_tiles = padded(plan, request.count) / (plan.tiles * 8);
  plan.scan_parts = std::clamp<int64_t>(divide_up(kBlocksEach * request.multiprocessors, scan_tiles),
                                        1, std::min<int64_t>(divide_up(plan.blocks, kScanWarps), 65535));
  plan.capacity =
      std::min(items.count, std::max(kMinListed, kListedEach * request.k * plan.stride));
}

Plan make_plan(const TopkRequest& request) {
  const topk::ItemRows& items = request.index.rows;
  if (request.k < 1 || request.k > kMaxK)
    throw std::invalid_argument("k must be 1 … " + std::to_string(kMaxK) + ", got " +
                                std::to_string(request.k));
  if (items.count > kMaxItems || items.dim < 1 || request.count < 0 || request.count > kMaxItems)
    throw std::invalid_argument("items and queries must be fewer than 2^31");
  if (reinterpret_cast<uintptr_t>(request.index.filter.codes) % 16)
    throw std::invalid_argument("codes must be aligned to 16 bytes");
  Plan plan;
  plan.queries = request.k <= kManyMaxK ? kManyQueries : kFewQueries;
  const int64_t tiles = divide_up(std::max<int64_t>(request.count, 1), plan.queries);
  plan.parts = std::clamp<int64_t>(
      divide_up(items.count, kRowsEach), 1,
      std::min<int64_t>(divide_up(kBlocksEach * request.multiprocessors, tiles), 65535));
  if (request.index.filter.codes && items.dim <= kMaxEncodedDim) plan_codes(request, plan);
  Buffers unused;
  plan.chunk = std::max<int64_t>(request.count, 1);
  while ((plan.bytes = lay_out(plan, plan.chunk, request.k, nullptr, &unused)) > kWorkspaceBytes &&
         plan.chunk > 64)
    plan.chunk = divide_up(plan.chunk / 2, 64) * 64;
  return plan;
}

// ---- launches ----

template <class T, int kQueries>
void launch_direct(const Plan& plan, const DirectJob& job, void* stream) {
  using Shape = DirectShape<kQueries>;
  launch("topk_direct",
         {dim3(unsigned(divide_up(job.count, kQueries)), unsigned(plan.parts)),
          dim3(Shape::kThreads), Shape::smem(job.k), stream},
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

template <int kTiles>
void launch_scan(const Plan& plan, const ScanJob& job, void* stream) {
  launch("topk_scan",
         {dim3(unsigned(divide_up(job.count, kTiles * 8)), unsigned(plan.scan_parts)),
          dim3(kScanThreads), kScanWarps * kTiles * 8 * int(sizeof(int32_t)), stream},
         topk_scan<kTiles>, job);
}

void launch_rescore(int64_t queries, const RescoreJob& job, void* stream) {
  const Launch where{dim3(unsigned(queries)), dim3(kMergeThreads),
                     BestList<MergeGroup>::bytes(list_slots<MergeGroup>(job.k)) + 16, stream};
  switch (job.items.type) {
    case topk::Dtype::f32: return launch("topk_rescore", where, topk_rescore<float>, job);
    case topk::Dtype::bf16: return launch("topk_rescore", where, topk_rescore<Bf16>, job);
    case topk::Dtype::f16: return launch("topk_rescore", where, topk_rescore<F16>, job);
  }
}

// Lists what may be among the best, and answers from the lists that did not overflow.
void search_codes(const Plan& plan, const TopkRequest& request, const Buffers& to,
                  const topk::Answer& answer, void* stream) {
  const topk::Index& index = request.index;
  const int k = int(request.k), classes = plan.sets * 32;
  const int64_t all = padded(plan, request.count), dim = index.rows.dim;
  launch("topk_encode",
         {dim3(unsigned(all)), dim3(kEncodeThreads),
          int(dim + kEncodeThreads / 32) * int(sizeof(double)), stream},
         topk_encode,
         EncodeJob{request.queries, request.count, dim, index.filter.center, plan.steps,
                   reinterpret_cast<uint32_t*>(to.fragments), to.encoded, to.shift, to.scale,
                   to.sampled, classes, to.counts});
  const CodeTable table{index.filter.codes, index.filter.bounds, index.filter.order,
                        uint32_t(index.rows.count), int(plan.blocks), int(topk::code_shape(dim).quads),
                        plan.steps};
  launch("topk_sample",
         {dim3(unsigned(all / kSampleQueries), unsigned(plan.sample_blocks)), dim3(kScanThreads),
          kSampleSmem, stream},
         topk_sample,
         SampleJob{table, to.fragments, to.encoded, int(plan.samples), int(plan.stride), plan.sets,
                   to.sampled});
  launch("topk_threshold",
         {dim3(unsigned(request.count)), dim3(kThresholdThreads), classes * int(sizeof(Key)),
          stream},
         topk_threshold,
         ThresholdJob{to.sampled, classes, k, table.order, request.exclude, to.shift, to.scale,
                      to.encoded});
  const ScanJob scan{table, to.fragments, to.encoded, request.count, request.exclude,
                     uint32_t(plan.capacity), to.counts, to.listed};
  if (plan.tiles == kManyTiles) {
    launch_scan<kManyTiles>(plan, scan, stream);
  } else {
    launch_scan<kFewTiles>(plan, scan, stream);
  }
  launch_rescore(request.count,
                 {index.rows, request.queries, to.counts, to.listed, uint32_t(plan.capacity), k,
                  answer},
                 stream);
}

}  // namespace

int64_t topk_workspace_bytes(const TopkRequest& request) { return make_plan(request).bytes; }

void topk_search(const TopkRequest& request, const topk::Answer& answer,
                 const Workspace& workspace, void* stream) {
  const Plan plan = make_plan(request);
  if (workspace.bytes < plan.bytes)
    throw std::invalid_argument("workspace: expected " + std::to_string(plan.bytes) +
                                " bytes, got " + std::to_string(workspace.bytes));
  if (reinterpret_cast<uintptr_t>(workspace.data) % 16)
    throw std::invalid_argument("workspace must be aligned to 16 bytes");
  const int k = int(request.k);
  const topk::ItemRows& items = request.index.rows;
  Buffers to;
  lay_out(plan, plan.chunk, k, workspace.data, &to);
  for (int64_t begin = 0; begin < request.count; begin += plan.chunk) {
    TopkRequest part = request;
    part.queries += begin * items.dim;
    part.count = std::min(plan.chunk, request.count - begin);
    if (part.exclude.offsets) part.exclude.offsets += begin;
    const topk::Answer out{answer.values + begin * k, answer.indices + begin * k,
                           answer.rescored + begin};
    // With codes, only the queries whose list overflowed are still searched directly.
    const uint32_t* needed = plan.steps ? to.counts : nullptr;
    if (plan.steps) search_codes(plan, part, to, out, stream);
    launch_direct(plan,
                  {items, part.queries, part.count, part.exclude, k, needed,
                   uint32_t(plan.capacity), to.parts},
                  stream);
    launch_merge(part.count,
                 {to.parts, plan.parts * k, k, needed, uint32_t(plan.capacity), out, items.count},
                 stream);
  }
}

}  // namespace deeprec::cuda
