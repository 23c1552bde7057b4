// The prefilter of exact top-k on tensor cores: products of 8-bit codes, and what they prove.
//
// The codes, the bound on what they leave out and its proof are those of cpu/topk_encode.cpp: for a
// row in block b and a query, with d = u.v the (exact) integer product of their codes,
//
//   |score - shift - (s / r) d| <= (s / r) radius,   radius = |u| error_b + |z / s - u| norm_b.
//
// Four kernels: encode the queries; from a sample of the rows, find a value that the k best reach
// (topk_sample, topk_threshold); list every row whose bound reaches it (topk_scan); score the
// listed rows exactly. Where a list overflows, topk_direct scores everything instead.
//
// Here bounds are evaluated in fp32. Each of the sums below has fewer than eight roundings, of
// numbers no larger than the sum of the terms' magnitudes, hence the slack of 2^-20 of that sum;
// kCodeSlack, in units of the codes, covers what underflows.
#pragma once

#include <limits>

#include "cuda/topk_exact.cuh"

namespace deeprec::cuda {

constexpr float kRelativeSlack = 0x1p-20f, kCodeSlack = 0.001f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kUnreachable = 0x1p30f;  // beyond any product of codes, 127 * 127 * kMaxEncodedDim

// ---- encoding queries ----

constexpr int kEncodeThreads = 128;
constexpr int kMaxEncodedDim = 8192;  // a query in fp64 fills 64 KiB on chip
constexpr int kFragmentQueries = 16;  // of one 128-bit load: two tiles of mma
constexpr int kStepQuads = 8;         // groups of 4 dimensions that one mma multiplies

struct alignas(16) EncodedQuery {
  float norm;     // >= |u|
  float error;    // >= |z / s - u|
  float need;     // a row matters if d + radius >= need * r; -infinity until known
  int32_t offset;  // rows' codes are biased by 128: 128 times the sum of u
};

struct EncodeJob {
  const float* queries;
  int64_t count, dim;
  const double* center;
  int steps;                // ceil(quads / kStepQuads)
  uint32_t* fragments;      // [queries / 16][steps][lane][4]: B operands of two mma tiles
  EncodedQuery* encoded;    // [padded]
  double* shift;            // [padded] q.m
  double* scale;            // [padded] s
  Key* sampled;             // [padded, classes] set to 0, none
  int classes;
  uint32_t* counts;         // [padded] set to 0
};

// A sum (or maximum) over the block; `scratch` has a double a warp.
template <class Combine>
__device__ double block_reduce(double value, double* scratch, Combine combine) {
  for (int bit = 16; bit > 0; bit /= 2)
    value = combine(value, __shfl_xor_sync(kFullWarp, value, bit));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double total = scratch[0];
  for (int w = 1; w < kEncodeThreads / 32; ++w) total = combine(total, scratch[w]);
  return total;
}
struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Max {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// cpu/topk_rotate.h, a pair of elements a thread.
__device__ __forceinline__ void hadamard(double* v, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int i = int(threadIdx.x); i < n / 2; i += kEncodeThreads) {
      const int low = 2 * i - (i & (half - 1));
      const double a = v[low], b = v[low + half];
      v[low] = a + b;
      v[low + half] = a - b;
    }
    __syncthreads();
  }
  const double scale = 1.0 / sqrt(double(n));
  for (int i = int(threadIdx.x); i < n; i += kEncodeThreads) v[i] *= scale;
  __syncthreads();
}

// One block a query, of the padded number.
__global__ void __launch_bounds__(kEncodeThreads) topk_encode(const EncodeJob job) {
  double* scratch = dynamic_smem<double>();
  double* z = scratch + kEncodeThreads / 32;
  const int64_t query = blockIdx.x;
  const int thread = int(threadIdx.x), dim = int(job.dim);
  const bool real = query < job.count;  // else codes are zero
  for (int i = thread; i < job.classes; i += kEncodeThreads)
    job.sampled[query * job.classes + i] = 0;

  double shift = 0;
  for (int d = thread; d < dim; d += kEncodeThreads) {
    z[d] = real ? double(job.queries[query * dim + d]) : 0.0;
    if (job.center) shift += z[d] * job.center[d];
  }
  shift = block_reduce(shift, scratch, Add());
  int n = 1;
  while (2 * n <= dim) n *= 2;
  hadamard(z, n);
  if (n != dim) hadamard(z + (dim - n), n);

  double peak = 0;
  for (int d = thread; d < dim; d += kEncodeThreads) peak = Max()(peak, fabs(z[d]));
  peak = block_reduce(peak, scratch, Max());
  const double scale = peak > 0 ? peak / 127 : 1.0;
  const auto code = [&](int d) {
    return d < dim ? max(-127, min(127, __double2int_rn(z[d] / scale))) : 0;
  };
  double squares = 0, errors = 0, sum = 0;
  for (int d = thread; d < dim; d += kEncodeThreads) {
    const double u = code(d), off = z[d] / scale - u;
    squares += u * u;
    errors += off * off;
    sum += u;
  }
  squares = block_reduce(squares, scratch, Add());
  errors = block_reduce(errors, scratch, Add());
  sum = block_reduce(sum, scratch, Add());
  if (thread == 0) {
    constexpr double kRoundUp = 1 + 0x1p-40;
    job.encoded[query] = {__double2float_ru(sqrt(squares) * kRoundUp),
                          __double2float_ru(sqrt(errors) * kRoundUp + 1e-9), -kInfinity,
                          128 * int32_t(sum)};
    job.shift[query] = shift;
    job.scale[query] = scale;
    job.counts[query] = 0;
  }
  const int64_t pair = query / kFragmentQueries;
  const int tile = int(query) % kFragmentQueries / 8, column = int(query) % 8;
  for (int quad = thread; quad < job.steps * kStepQuads; quad += kEncodeThreads) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= uint32_t(code(4 * quad + i) & 0xff) << 8 * i;
    const int step = quad / kStepQuads, half = quad % kStepQuads / 4, lane = column * 4 + quad % 4;
    job.fragments[((pair * job.steps + step) * 32 + lane) * 4 + tile * 2 + half] = word;
  }
}

// ---- products of codes ----

// A warp multiplies the 32 rows of a block with kTiles * 8 queries. Lane l, member t = l % 4 of
// group g = l / 4, loads rows 4 g … of a quad with one 128-bit load. Two go to each of two mma
// tiles, as their rows g and g + 8; so the lane ends up with dots[tile][i][j]: its four rows i, and
// queries 8 tile + 2 t + j.
constexpr uint32_t kBlockRows = uint32_t(topk::kBlockRows);
static_assert(kBlockRows == 32, "four rows for each of a warp's groups");
constexpr int kLaneRows = 4;

struct CodeTable {
  const uint8_t* codes;  // [blocks, quads, 32, 4]
  const topk::BlockBound* bounds;
  const uint32_t* order;
  uint32_t count;
  int blocks, quads, steps;
};

template <int kTiles>
__device__ __forceinline__ void multiply_block(const CodeTable& table, const uint4* fragments,
                                               int block, int32_t (&dots)[kTiles][4][2]) {
  constexpr int kQuadVectors = int(kBlockRows) / kLaneRows;
  const int lane = int(threadIdx.x) % 32, member = lane % 4;
  const uint4* rows = reinterpret_cast<const uint4*>(table.codes) +
                      int64_t(block) * table.quads * kQuadVectors + lane / 4;
  // Beyond the last quad the queries' codes are zero: any row will do.
  const auto load = [&](int quad) {
    return rows[(quad < table.quads ? quad : 0) * kQuadVectors];
  };
  int32_t sums[2][kTiles][4] = {};
  uint4 next[2] = {load(member), load(member + 4)};
  for (int step = 0; step < table.steps; ++step) {
    const uint4 low = next[0], high = next[1];
    if (step + 1 < table.steps) {
      next[0] = load((step + 1) * kStepQuads + member);
      next[1] = load((step + 1) * kStepQuads + member + 4);
    }
    const uint32_t upper[4] = {low.x, low.y, high.x, high.y};
    const uint32_t lower[4] = {low.z, low.w, high.z, high.w};
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      const uint4 query = fragments[(pair * table.steps + step) * 32 + lane];
      const uint32_t first[2] = {query.x, query.y}, second[2] = {query.z, query.w};
      mma_u8s8(sums[0][2 * pair], upper, first);
      mma_u8s8(sums[1][2 * pair], lower, first);
      mma_u8s8(sums[0][2 * pair + 1], upper, second);
      mma_u8s8(sums[1][2 * pair + 1], lower, second);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 8; ++i) dots[tile][i / 2][i % 2] = sums[i / 4][tile][i % 4];
}

constexpr int kScanWarps = 8, kScanThreads = 32 * kScanWarps;

// ---- a threshold from a sample ----

struct SampleJob {
  CodeTable table;
  const uint4* fragments;
  const EncodedQuery* encoded;
  int samples, stride;  // blocks 0, stride, 2 stride …
  int sets;             // of 32 classes; gridDim.y is a multiple
  Key* sampled;         // [padded, sets * 32] best lower bound of a class, and its position
};

constexpr int kSampleTiles = 2;  // best bounds and positions stay in registers
constexpr int kSampleQueries = kSampleTiles * 8;
constexpr int kSampleSmem = kSampleQueries * 32 * int(sizeof(Key));

// Rows fall into classes; the k-th largest of the classes' best lower bounds is one that k
// different rows reach. Block (x, y) has 16 queries and samples y, y + gridDim.y, …
__global__ void __launch_bounds__(kScanThreads) topk_sample(const SampleJob job) {
  Key* best = dynamic_smem<Key>();  // [kSampleQueries][32 rows of a block]
  for (int i = int(threadIdx.x); i < kSampleQueries * 32; i += kScanThreads) best[i] = 0;
  __syncthreads();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row = lane / 4 * kLaneRows;
  const int64_t first = int64_t(blockIdx.x) * kSampleQueries;
  const uint4* fragments = job.fragments + first / kFragmentQueries * job.table.steps * 32;
  EncodedQuery queries[kSampleTiles][2];
  float bounds[kSampleTiles][4][2];
  uint32_t positions[kSampleTiles][4][2];
#pragma unroll
  for (int tile = 0; tile < kSampleTiles; ++tile)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      queries[tile][j] = job.encoded[first + tile * 8 + lane % 4 * 2 + j];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        bounds[tile][r][j] = -kInfinity;
        positions[tile][r][j] = 0;
      }
    }
  for (int i = int(blockIdx.y) + int(gridDim.y) * warp; i < job.samples;
       i += int(gridDim.y) * kScanWarps) {
    const int block = i * job.stride;
    int32_t dots[kSampleTiles][4][2];
    multiply_block<kSampleTiles>(job.table, fragments, block, dots);
    const topk::BlockBound bound = job.table.bounds[block];
    const float scale = 1.0f / bound.inverse_scale;
#pragma unroll
    for (int tile = 0; tile < kSampleTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const EncodedQuery& q = queries[tile][j];
        const float radius = q.norm * bound.error + q.error * bound.norm;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t position = uint32_t(block) * kBlockRows + uint32_t(row + r);
          const float dot = float(dots[tile][r][j] - q.offset);
          const float lower =
              (dot - radius - kCodeSlack - (fabsf(dot) + radius) * kRelativeSlack) * scale;
          if (position < job.table.count && lower > bounds[tile][r][j]) {
            bounds[tile][r][j] = lower;
            positions[tile][r][j] = position;
          }
        }
      }
  }
#pragma unroll
  for (int tile = 0; tile < kSampleTiles; ++tile)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (bounds[tile][r][j] > -kInfinity)
          atomicMax(&best[(tile * 8 + lane % 4 * 2 + j) * 32 + row + r],
                    make_key(bounds[tile][r][j], positions[tile][r][j]));
  __syncthreads();
  const int set = int(blockIdx.y) % job.sets;
  for (int i = int(threadIdx.x); i < kSampleQueries * 32; i += kScanThreads)
    if (best[i]) atomicMax(&job.sampled[((first + i / 32) * job.sets + set) * 32 + i % 32], best[i]);
}

constexpr int kThresholdThreads = 256;

struct ThresholdJob {
  const Key* sampled;
  int classes;  // a power of two
  int k;
  const uint32_t* order;
  topk::Exclusions exclude;
  const double* shift;
  const double* scale;
  EncodedQuery* encoded;
};

// One block a query.
__global__ void __launch_bounds__(kThresholdThreads) topk_threshold(const ThresholdJob job) {
  Key* keys = dynamic_smem<Key>();
  const int64_t query = blockIdx.x;
  for (int i = int(threadIdx.x); i < job.classes; i += kThresholdThreads) {
    Key key = job.sampled[query * job.classes + i];
    if (key) {
      const uint32_t position = key_index(key), id = job.order ? job.order[position] : position;
      if (is_excluded(job.exclude, query, id)) key = 0;
    }
    keys[i] = key;
  }
  __syncthreads();
  sort_descending<BlockGroup<kThresholdThreads>>(keys, job.classes);
  const Key kth = keys[job.k - 1];
  if (threadIdx.x != 0 || kth == 0) return;
  // In fp64: k rows score at least `reached`. A lesser row may still equal them once both are
  // rounded to fp32, so half a unit in the last place is taken off, generously.
  const float found = key_value(kth);
  const double shift = job.shift[query], scale = job.scale[query];
  double reached = shift + scale * double(found < kLargest ? found : kLargest);
  if (reached < -double(kLargest)) return;
  reached = reached < double(kLargest) ? reached : double(kLargest);  // more rounds to infinity too
  reached -= fabs(reached) * 0x1p-22 + 0x1p-140;
  const double need = (reached - shift) / scale;
  // What was rounded here: shift + scale * found, the difference, the quotient.
  const double slack = ((fabs(reached) + 2 * fabs(shift)) / scale + fabs(need)) * 0x1p-50;
  job.encoded[query].need = __double2float_rd(need - slack);
}

// ---- the scan ----

struct ScanJob {
  CodeTable table;
  const uint4* fragments;
  const EncodedQuery* encoded;
  int64_t count;  // of queries
  topk::Exclusions exclude;
  uint32_t capacity;
  uint32_t* counts;  // [padded] rows that mattered; those beyond the capacity are not listed
  uint32_t* listed;  // [count, capacity] their ids
};

// The least product of codes with which a row matters. Not a number: anything may.
__device__ __forceinline__ int32_t least_dot(const EncodedQuery& q, const topk::BlockBound& bound) {
  const float radius = q.norm * bound.error + q.error * bound.norm;
  const float reach = q.need * bound.inverse_scale;
  const float least = reach - radius - 1.0f - (fabsf(reach) + radius) * kRelativeSlack;
  if (!(least > -kUnreachable)) return -int32_t(kUnreachable);
  return least < kUnreachable ? __float2int_rd(least) : int32_t(kUnreachable);
}

// Block (x, y): queries x kTiles 8 …, and the y-th part of the rows' blocks, one a warp at a time.
// Three blocks a multiprocessor would spill registers with two tiles, too.
template <int kTiles>
__global__ void __launch_bounds__(kScanThreads, 2) topk_scan(const ScanJob job) {
  constexpr int kQueries = kTiles * 8;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int32_t* least = dynamic_smem<int32_t>() + warp * kQueries;  // products that matter, by query
  const int64_t first = int64_t(blockIdx.x) * kQueries;
  const uint4* fragments = job.fragments + first / kFragmentQueries * job.table.steps * 32;

  const int64_t blocks = job.table.blocks;
  const int begin = int(blocks * blockIdx.y / gridDim.y);
  const int end = int(blocks * (blockIdx.y + 1) / gridDim.y);
  for (int block = begin + warp; block < end; block += kScanWarps) {
    int32_t dots[kTiles][4][2];
    multiply_block<kTiles>(job.table, fragments, block, dots);
    const topk::BlockBound bound = job.table.bounds[block];
    __syncwarp();  // the last block's are no longer read
    for (int query = lane; query < kQueries; query += 32) {
      const EncodedQuery q = job.encoded[first + query];
      least[query] = first + query < job.count ? least_dot(q, bound) + q.offset
                                               : std::numeric_limits<int32_t>::max();
    }
    __syncwarp();
    unsigned long long reaching = 0;  // bit 8 tile + 2 r + j
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int column = tile * 8 + lane % 4 * 2;
      const int2 both = *reinterpret_cast<const int2*>(&least[column]);
      uint32_t byte = 0;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        byte |= uint32_t(dots[tile][r][0] >= both.x) << (2 * r);
        byte |= uint32_t(dots[tile][r][1] >= both.y) << (2 * r + 1);
      }
      reaching |= static_cast<unsigned long long>(byte) << (8 * tile);
    }
    while (reaching) {
      const int bit = __ffsll(static_cast<long long>(reaching)) - 1;
      reaching &= reaching - 1;
      const uint32_t position =
          uint32_t(block) * kBlockRows + uint32_t(lane / 4 * kLaneRows + bit / 2 % 4);
      if (position >= job.table.count) continue;
      const int64_t query = first + bit / 8 * 8 + lane % 4 * 2 + bit % 2;
      const uint32_t id = job.table.order ? job.table.order[position] : position;
      if (is_excluded(job.exclude, query, id)) continue;
      const uint32_t slot = atomicAdd(&job.counts[query], 1u);
      if (slot < job.capacity) job.listed[query * job.capacity + slot] = id;
    }
  }
}

// ---- exact scores of what is listed ----

constexpr int kRescoreRows = 4;  // of a thread group at a time

struct RescoreJob {
  topk::ItemRows items;
  const float* queries;
  const uint32_t* counts;
  const uint32_t* listed;
  uint32_t capacity;
  int k;
  topk::Answer answer;
};

// One block a query.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) topk_rescore(const RescoreJob job) {
  constexpr int kStep = kMergeThreads / kLanes * kRescoreRows;
  const int64_t query = blockIdx.x;
  const int64_t count = job.counts[query];
  if (count > job.capacity) return;  // all threads; topk_direct answers
  const int slots = list_slots<MergeGroup>(job.k);
  Key* keys = dynamic_smem<Key>();
  BestList<MergeGroup> best{keys, reinterpret_cast<int*>(keys + slots), job.k, slots};
  best.clear();
  const uint32_t* listed = job.listed + query * job.capacity;
  const T* data = static_cast<const T*>(job.items.data);
  const float* const queries[1] = {job.queries + query * job.items.dim};
  const int lane = int(threadIdx.x) % kLanes, group = int(threadIdx.x) / kLanes;
  for (int64_t base = 0; base < count; base += kStep) {
    const T* rows[kRescoreRows];
    float scores[kRescoreRows][1];
    uint32_t id = 0;  // of the row that this thread offers
    float score = 0;
#pragma unroll
    for (int r = 0; r < kRescoreRows; ++r) {
      const int64_t i = base + group * kRescoreRows + r;
      const uint32_t row = listed[i < count ? i : 0];
      rows[r] = data + int64_t(row) * job.items.stride;
      if (lane == r) id = row;
    }
    exact_scores(rows, queries, job.items.dim, scores);
#pragma unroll
    for (int r = 0; r < kRescoreRows; ++r)
      if (lane == r) score = scores[r][0];
    const bool mine = lane < kRescoreRows && base + group * kRescoreRows + lane < count;
    best.offer(mine ? make_key(score, id) : 0);
  }
  best.settle();
  write_answer(job.answer, query, job.k, best.keys, count);
}

}  // namespace deeprec::cuda
