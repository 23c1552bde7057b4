// The search: which rows are looked at by whom, and with what.
//
// Work is a grid of query parts x item parts, one cell a thread. A cell walks its items in chunks
// that stay in the cache while all its tiles of queries pass over them. Each query of a cell keeps
// a CandidateList; the lists of a query's cells are merged at the end, when only what the bounds
// cannot decide is scored exactly. Nothing but the counters depends on the grid.
#include "cpu/topk.h"

#include <omp.h>
#include <pthread.h>
#include <unistd.h>

#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/float_env.h"
#include "cpu/isa.h"
#include "cpu/topk_candidates.h"
#include "cpu/topk_queries.h"

namespace deeprec::topk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kParallelWork = int64_t(1) << 20;
// With this many queries a thread (half a tile), items are read from memory seldom enough for threads to share
// the queries among them, not the items; then each query has one list.
constexpr int64_t kQueriesPerThread = 32;
// A table of fewer rows, or one of which a sixteenth is asked for, is scanned exactly.
constexpr int64_t kSmallestTable = 512, kLargestShare = 16;
// A sample of n rows sets the first threshold. It costs in proportion to n, the candidates that
// pass it to k N / n, each about 36 times as much as a sampled row: n = sqrt(36 k N) is the least.
constexpr double kSampleFactor = 6;
// When an eighth of what a tile scans are candidates, exact scores at once are cheaper; after
// eight chunks the codes get another chance.
constexpr int64_t kDenseShare = 8, kDenseChunks = 8;
constexpr int64_t kHits = 8192;
// Queries of one round: what a search keeps of a query (its products with all centers, candidates)
// is some kilobytes, and a batch may have any size.
constexpr int64_t kRound = 4096;

// A child of fork() has none of its parent's OpenMP threads and would wait for them forever.
bool g_forked = false;
const int g_at_fork = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

int64_t cache_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (l2 > 0) return int64_t(l2);
#endif
    return int64_t(1) << 20;
  }();
  return bytes;
}

struct Grid {
  int64_t query_parts, item_parts;
};

struct Plan {
  const Index& index;
  const Request& request;
  const Kernels& kernels;
  bool use_codes;
  int64_t k;       // what is asked for, or all there is
  int64_t blocks;  // of kBlockRows rows
  int64_t chunk;   // blocks
  Grid grid;
};

Plan make_plan(const Index& index, const Request& request) {
  const int64_t n = index.rows.count, blocks = (n + kBlockRows - 1) / kBlockRows;
  const int64_t k = std::max<int64_t>(1, std::min(request.k, n));
  const bool use_codes = index.filter.codes && n >= kSmallestTable && k <= n / kLargestShare;
  const int64_t row_bytes =
      use_codes ? code_shape(index.rows.dim).quads * 4
                : index.rows.dim * (index.rows.type == Dtype::f32 ? 4 : 2);
  int64_t threads = g_forked ? 1 : std::max(1, request.threads);
  if (request.count * n * index.rows.dim < kParallelWork) threads = 1;
  Grid grid;
  grid.query_parts = std::min(threads, std::max<int64_t>(1, request.count / kQueriesPerThread));
  grid.item_parts = std::max<int64_t>(1, std::min(threads / grid.query_parts, blocks));
  return {index, request, active_kernels(), use_codes, k, blocks,
          std::max<int64_t>(8, cache_bytes() / 2 / (kBlockRows * row_bytes)), grid};
}

// One thread's share: a range of queries against a range of blocks.
class Cell {
 public:
  Cell(const Plan& plan, const Queries& queries, CandidateList* lists, int64_t query_begin,
       int64_t query_end, int64_t block_begin, int64_t block_end)
      : plan_(plan), queries_(queries), lists_(lists), block_begin_(block_begin),
        block_end_(block_end), shape_(code_shape(plan.index.rows.dim)),
        table_{plan.index.filter.codes, plan.index.filter.bounds, plan.index.filter.cluster,
               shape_.quads, shape_.steps},
        rescorer_(plan.kernels, plan.index, CandidateList::capacity(plan.k)),
        hits_(size_t(std::max<int64_t>(kHits, kMaxTile * kBlockRows))),
        buffer_{hits_.data(), int64_t(hits_.size()), 0} {
    const int64_t width = plan.kernels.tile(shape_.quads);
    for (int64_t q = query_begin; q < query_end; q += width)
      tiles_.push_back({q, int(std::min(width, query_end - q)), 0, nullptr});
  }

  void run() {
    if (plan_.use_codes) prepare_tiles();
    for (int64_t g = block_begin_; g < block_end_; g += plan_.chunk) {
      const int64_t end = std::min(block_end_, g + plan_.chunk);
      for (Span& span : tiles_) {
        if (!span.coded) {
          direct(span, g, end);
        } else if (span.dense > 0) {
          --span.dense;
          direct(span, g, end);
        } else {
          scan(span, g, end);
        }
      }
    }
  }

 private:
  struct Span {
    int64_t first;  // query
    int count;
    int64_t dense;  // chunks still to be scored directly
    Tile* coded;    // nullptr: no prefilter
  };

  void prepare_tiles() {
    const int64_t code_bytes = shape_.quads * 4;
    const int64_t scratch = (plan_.kernels.scratch_bytes(shape_.quads) + 63) / 64 * 64;
    const int64_t width = (tiles_[0].count + kSubtile - 1) / kSubtile * kSubtile;
    const int64_t centers = std::max<int64_t>(1, plan_.index.filter.centers);
    const int64_t shifts = centers * width * int64_t(sizeof(double));
    const int64_t size = kMaxTile * code_bytes + scratch + shifts;
    // Rows of a matrix-unit tile are fetched fastest from whole cache lines.
    storage_.resize(size_t(size) * tiles_.size() + 64);
    char* at =
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
    coded_.resize(tiles_.size());
    for (size_t t = 0; t < tiles_.size(); ++t, at += size) {
      Tile& tile = coded_[t];
      tiles_[t].coded = &tile;
      tile.count = tiles_[t].count;
      tile.codes = reinterpret_cast<int8_t*>(at);
      tile.scratch = at + kMaxTile * code_bytes;
      tile.packed = false;
      tile.shift = reinterpret_cast<double*>(at + kMaxTile * code_bytes + scratch);
      tile.shift_stride = width;
      const double* exact[kMaxTile];
      for (int j = 0; j < tile.count; ++j) {
        const CodedQuery& query = queries_[tiles_[t].first + j];
        exact[j] = query.exact;
        std::copy(query.codes, query.codes + code_bytes, tile.codes + j * code_bytes);
        tile.inverse_scale[j] = 1 / query.scale;
        tile.norm[j] = query.norm;
        tile.error[j] = query.error;
        tile.offset[j] = query.offset;
        tile.threshold[j] = -kInfinity;
      }
      for (int j = tile.count; j % kSubtile; ++j) {
        tile.norm[j] = tile.error[j] = tile.offset[j] = 0;
        tile.inverse_scale[j] = 1;
        tile.threshold[j] = kInfinity;  // never reached
      }
      if (plan_.index.filter.center)
        plan_.kernels.products(plan_.index.filter.center, centers, plan_.index.rows.dim, exact,
                               tile.count, tile.shift, width);
      start(tiles_[t]);
    }
  }

  // A first threshold: k rows of a sample have lower bounds that large.
  void start(const Span& span) {
    Tile& tile = *span.coded;
    const int64_t k = plan_.k, blocks = block_end_ - block_begin_;
    const double rows = kSampleFactor * std::sqrt(double(k) * double(blocks * kBlockRows));
    const int64_t sampled = std::min(blocks / 2, int64_t(rows) / kBlockRows);
    const int64_t lanes = (2 * k + kBlockRows - 1) / kBlockRows * kBlockRows;
    if (sampled < 2 * lanes / kBlockRows) return;
    const size_t size = size_t(tile.count * lanes);
    std::vector<float> score(size, -kInfinity);
    std::vector<int32_t> dot(size);
    std::vector<int32_t> position(size);
    Table part = table_;
    part.codes += block_begin_ * shape_.quads * 4 * kBlockRows;
    part.bounds += block_begin_;
    if (part.cluster) part.cluster += block_begin_;
    plan_.kernels.sample(part, tile, sampled, blocks / sampled, lanes,
                         {score.data(), dot.data(), position.data()});
    std::vector<Candidate> found;
    for (int j = 0; j < tile.count; ++j) {
      found.clear();
      for (int64_t l = 0; l < lanes; ++l) {
        const size_t at = size_t(j * lanes + l);
        Candidate candidate;
        const uint32_t p = uint32_t(block_begin_ * kBlockRows + position[at]);
        if (score[at] > -kInfinity && bounded(span, j, p, dot[at], candidate))
          found.push_back(candidate);
      }
      if (int64_t(found.size()) < k) continue;
      // The likeliest k, scored exactly: their least score is nearer the truth than its bound.
      std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), likelier);
      CandidateList& kept = list(span, j);
      kept.rescored += rescorer_.resolve(found.data(), k, queries_[span.first + j]);
      kept.threshold = rescorer_.kth_lower(found.data(), k, k);
      publish(span, j);
    }
  }

  CandidateList& list(const Span& span, int j) { return lists_[span.first + j]; }

  // What is known of a row from its codes; false if it is padding or excluded.
  bool bounded(const Span& span, int j, uint32_t position, int32_t dot, Candidate& out) const {
    if (position >= plan_.index.rows.count) return false;
    out.id = item(position);
    out.position = position;
    if (queries_.excluded(span.first + j, out.id)) return false;
    const CodedQuery& q = queries_[span.first + j];
    const BlockBound& block = table_.bounds[position / kBlockRows];
    const double unit = q.scale / block.inverse_scale;
    const double shift = shifts_of(table_, *span.coded, position / kBlockRows)[j];
    const double middle = shift + (dot - q.offset) * unit;
    const double radius = (q.norm * block.error + q.error * block.norm) * unit * (1 + 0x1p-40);
    out.lower = below(middle - radius);
    out.upper = above(middle + radius);
    return true;
  }

  uint32_t item(uint32_t position) const {
    const uint32_t* order = plan_.index.filter.order;
    return order ? order[position] : position;
  }

  // The list's threshold as the scan wants it: below the fp32 rounding of any score that ties.
  void publish(const Span& span, int j) {
    if (!span.coded) return;
    const double t = std::min(list(span, j).threshold, FLT_MAX);
    span.coded->threshold[j] = t - (std::fabs(t) * 0x1p-23 + 0x1p-148);
  }

  void add(int64_t query, CandidateList& list, const Candidate& candidate) {
    if (candidate.upper < list.threshold) return;
    if (list.count == CandidateList::capacity(plan_.k))
      list.make_room(plan_.k, rescorer_, queries_[query]);
    list.items[list.count++] = candidate;
  }

  void scan(Span& span, int64_t begin, int64_t end) {
    Tile& tile = *span.coded;
    // Without a threshold everything is a candidate: start with a few blocks.
    int64_t step = std::isinf(tile.threshold[0]) ? 4 : end - begin, found = 0;
    for (int64_t g = begin; g < end;) {
      buffer_.count = 0;
      const int64_t stop = std::min(end, g + step);
      g = plan_.kernels.scan(table_, tile, g, stop, buffer_);
      if (g == stop) step *= 2;
      found += buffer_.count;
      for (int64_t i = 0; i < buffer_.count; ++i) {
        const Hit& hit = buffer_.hits[i];
        const int64_t query = span.first + hit.query;
        Candidate candidate;
        if (bounded(span, hit.query, hit.position, hit.dot, candidate))
          add(query, lists_[query], candidate);
      }
      for (int j = 0; buffer_.count && j < span.count; ++j) publish(span, j);
    }
    // Rows of a cluster lie together: where they end, so do the candidates.
    if (!table_.cluster && begin != block_begin_ && found * kDenseShare > (end - begin) * kBlockRows * span.count)
      span.dense = kDenseChunks;
  }

  void direct(const Span& span, int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlockRows, plan_.index.rows.count);
    const double* exact[kMaxTile];
    for (int j = 0; j < span.count; ++j) exact[j] = queries_[span.first + j].exact;
    int64_t step = list(span, 0).count < plan_.k ? 32 : kHits / span.count;
    for (int64_t p = begin * kBlockRows; p < last;) {
      float thresholds[kMaxTile];
      for (int j = 0; j < span.count; ++j) thresholds[j] = list(span, j).threshold;
      buffer_.count = 0;
      const int64_t stop = std::min(last, p + step);
      plan_.kernels.direct(plan_.index.rows, plan_.index.filter.order, exact, span.count,
                           thresholds, p, stop, buffer_);
      for (int j = 0; j < span.count; ++j) list(span, j).rescored += stop - p;
      for (int64_t i = 0; i < buffer_.count; ++i) {
        const Hit& hit = buffer_.hits[i];
        const int64_t query = span.first + hit.query;
        const uint32_t id = item(hit.position);
        if (!queries_.excluded(query, id))
          add(query, lists_[query], {hit.score, hit.score, id, Candidate::kRefined});
      }
      p = stop;
      step = std::min(2 * step, kHits / span.count);
    }
    for (int j = 0; j < span.count; ++j) publish(span, j);
  }

  const Plan& plan_;
  const Queries& queries_;
  CandidateList* lists_;  // by query
  const int64_t block_begin_, block_end_;
  const CodeShape shape_;
  const Table table_;
  Rescorer rescorer_;
  std::vector<Hit> hits_;
  HitBuffer buffer_;
  std::vector<Span> tiles_;
  std::vector<Tile> coded_;
  std::vector<char> storage_;
};

// The k best of a query's candidates, exactly, into its row of the answer.
void finish(const Plan& plan, const Queries& queries, const std::vector<CandidateList>& lists,
            int64_t query, std::vector<Candidate>& all, Rescorer& rescorer, const Answer& answer) {
  const int64_t k = plan.k, asked = plan.request.k, count = plan.request.count;
  all.clear();
  float threshold = -kInfinity;
  int64_t rescored = 0, refined = 0;
  for (int64_t part = 0; part < plan.grid.item_parts; ++part) {
    const CandidateList& list = lists[size_t(part * count + query)];
    all.insert(all.end(), list.items, list.items + list.count);
    threshold = std::max(threshold, list.threshold);
    rescored += list.rescored;
    refined += list.refined;
  }
  Candidate* c = all.data();
  int64_t n = int64_t(all.size());
  if (n > k) {
    threshold = std::max(threshold, rescorer.kth_lower(c, n, k));
    n = drop_below(c, n, threshold);
    if (n > 2 * k) {
      refined += rescorer.refine(c, n, queries[query]);
      n = drop_below(c, n, rescorer.kth_lower(c, n, k));
    }
    // Once the likeliest k are exact, the k-th of them rules out most of the others.
    std::nth_element(c, c + (k - 1), c + n, likelier);
    rescored += rescorer.resolve(c, k, queries[query]);
    n = drop_below(c, n, rescorer.kth_lower(c, n, k));
  }
  rescored += rescorer.resolve(c, n, queries[query]);
  const int64_t kept = std::min(k, n);
  std::partial_sort(c, c + kept, c + n, ranks_before);
  float* values = answer.values + query * asked;
  int64_t* indices = answer.indices + query * asked;
  for (int64_t i = 0; i < asked; ++i) {
    values[i] = i < kept ? c[i].lower : -kInfinity;
    indices[i] = i < kept ? int64_t(c[i].id) : -1;
  }
  answer.rescored[query] = rescored;
  if (answer.refined) answer.refined[query] = refined;
}

// Returns a query that is not finite, or -1.
int64_t search_round(const Index& index, const Request& request, const Answer& answer) {
  const Plan plan = make_plan(index, request);
  const Grid grid = plan.grid;
  Queries queries(index, request);
  const int64_t capacity = CandidateList::capacity(plan.k), count = request.count;
  std::vector<CandidateList> lists(size_t(grid.item_parts * count));
  std::vector<Candidate> storage(lists.size() * size_t(capacity));
  for (size_t i = 0; i < lists.size(); ++i) lists[i].items = &storage[i * size_t(capacity)];

  const int64_t cells = grid.query_parts * grid.item_parts;
  bool finite = true;
#pragma omp parallel num_threads(int(cells))
  {
    const DefaultFloatEnv env;
#pragma omp for schedule(static) reduction(&& : finite)
    for (int64_t b = 0; b < count; ++b) {
      queries.prepare(b);
      finite = finite && queries.finite(b);
    }
    if (finite) {
#pragma omp for schedule(static, 1)
      for (int64_t cell = 0; cell < cells; ++cell) {
        const int64_t qp = cell / grid.item_parts, ip = cell % grid.item_parts;
        Cell(plan, queries, &lists[size_t(ip * count)], count * qp / grid.query_parts,
             count * (qp + 1) / grid.query_parts, plan.blocks * ip / grid.item_parts,
             plan.blocks * (ip + 1) / grid.item_parts)
            .run();
      }
      Rescorer rescorer(plan.kernels, index, capacity * grid.item_parts);
      std::vector<Candidate> all;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < count; ++b)
        finish(plan, queries, lists, b, all, rescorer, answer);
    }
  }
  for (int64_t b = 0; !finite && b < count; ++b)
    if (!queries.finite(b)) return b;
  return -1;
}

}  // namespace

const Kernels& active_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::avx2: return *avx2_kernels();
    case Isa::avx_vnni: return *avx_vnni_kernels();
    case Isa::avx512: return *avx512_kernels();
    case Isa::avx512_vnni: return *avx512_vnni_kernels();
    case Isa::amx: return *amx_kernels();
#endif
    default: return *scalar_kernels();
  }
}

void search(const Index& index, const Request& request, const Answer& answer) {
  const int64_t dim = index.rows.dim, k = request.k;
  for (int64_t first = 0; first < request.count; first += kRound) {
    Request part = request;
    part.queries += first * dim;
    part.count = std::min(kRound, request.count - first);
    if (part.exclude.offsets) part.exclude.offsets += first;
    const int64_t bad = search_round(
        index, part,
        {answer.values + first * k, answer.indices + first * k, answer.rescored + first,
         answer.refined ? answer.refined + first : nullptr});
    if (bad >= 0)
      throw std::invalid_argument("queries: row " + std::to_string(first + bad) +
                                  " holds NaN or infinity; every query must be finite");
  }
}

}  // namespace deeprec::topk
