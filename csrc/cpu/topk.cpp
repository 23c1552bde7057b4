// The search: which rows are looked at by whom, and with what.
//
// Work is a grid of query parts x item parts, one cell a thread (topk_cell.h). The candidates that
// a query's cells found are merged at the end, when only what the bounds cannot decide is scored
// exactly. Nothing but the counters depends on the grid.
#include "cpu/topk.h"

#include <omp.h>
#include <unistd.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/float_env.h"
#include "cpu/isa.h"
#include "cpu/topk_cell.h"
#include "cpu/topk_queries.h"

namespace deeprec::topk {
namespace {

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kParallelWork = int64_t(1) << 19;
// With this many queries a thread (half a tile), items are read from memory seldom enough for
// threads to share the queries among them, not the items; then each query has one list.
constexpr int64_t kQueriesPerThread = 32;
// A table of fewer rows, or one of which a sixteenth is asked for, is scanned exactly.
constexpr int64_t kSmallestTable = 512, kLargestShare = 16;
// Where more than one in so many queries must be searched for again, all are, together.
constexpr int64_t kFewMisses = 8;
// Queries of one round: what a search keeps of a query (its products with all centers, candidates)
// is some kilobytes, and a batch may have any size.
constexpr int64_t kRound = 4096;

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

Plan make_plan(const Index& index, const Request& request, Start start) {
  const int64_t n = index.rows.count, blocks = (n + kBlockRows - 1) / kBlockRows;
  const int64_t k = std::max<int64_t>(1, std::min(request.k, n));
  const bool use_codes = index.filter.codes && n >= kSmallestTable && k <= n / kLargestShare;
  const int64_t row_bytes =
      use_codes ? code_shape(index.rows.dim).quads * 4
                : index.rows.dim * (index.rows.type == Dtype::f32 ? 4 : 2);
  int64_t threads = request.threads;
  if (request.count * n * index.rows.dim < kParallelWork) threads = 1;
  Grid grid;
  grid.query_parts = std::min(threads, std::max<int64_t>(1, request.count / kQueriesPerThread));
  grid.item_parts = std::max<int64_t>(1, std::min(threads / grid.query_parts, blocks));
  return {index, request, active_kernels(), use_codes, k, blocks,
          std::max<int64_t>(8, cache_bytes() / 2 / (kBlockRows * row_bytes)), grid,
          index.filter.cluster ? Start::prove : start};
}

// The end of one query's search, in two steps: between them, other queries' work hides the time
// that the rows to be scored take to arrive.
class Finish {
 public:
  Finish(const Plan& plan, const Queries& queries, const CandidateList* lists)
      : plan_(plan), queries_(queries), lists_(lists), rescorer_(plan.kernels, plan.index, 0) {}

  // Merges the candidates of the query's cells, the likeliest first.
  void merge(int64_t query) {
    query_ = query;
    threshold_ = guess_ = -kInfinity;
    rescored_ = refined_ = 0;
    all_.clear();
    for (int64_t part = 0; part < plan_.grid.item_parts; ++part) {
      const CandidateList& list = lists_[part * plan_.request.count + query];
      all_.insert(all_.end(), list.items, list.items + list.count);
      threshold_ = std::max(threshold_, list.threshold);
      guess_ = std::max(guess_, list.guess);
      rescored_ += list.rescored;
      refined_ += list.refined;
    }
    const int64_t k = plan_.k;
    if (plan_.index.filter.fine && count() > 2 * k) {
      drop(rescorer_.kth_lower(all_.data(), count(), k));
      if (count() > 2 * k) refined_ += rescorer_.refine(all_.data(), count(), queries_[query]);
    }
    likeliest_ = count() > k ? rescorer_.likeliest_first(all_.data(), count(), k) : count();
    rescorer_.fetch(all_.data(), likeliest_);
  }

  // The k best, exactly, into the query's row of the answer; false if a guess was too high, so that
  // there may be better ones.
  bool write(const Answer& answer) {
    const int64_t k = plan_.k, asked = plan_.request.k;
    if (count() > likeliest_) {
      // Once the likeliest are exact, the k-th of them rules out most of the others.
      rescored_ += rescorer_.resolve(all_.data(), likeliest_, queries_[query_]);
      drop(rescorer_.kth_lower(all_.data(), likeliest_, k));
    }
    rescored_ += rescorer_.resolve(all_.data(), count(), queries_[query_]);
    const int64_t kept = std::min(k, count());
    if (!rank(kept))
      std::partial_sort(all_.begin(), all_.begin() + kept, all_.end(), RanksBefore());
    float* values = answer.values + query_ * asked;
    int64_t* indices = answer.indices + query_ * asked;
    for (int64_t i = 0; i < asked; ++i) {
      values[i] = i < kept ? all_[size_t(i)].lower : -kInfinity;
      indices[i] = i < kept ? int64_t(all_[size_t(i)].id) : -1;
    }
    answer.rescored[query_] += rescored_;
    if (answer.refined) answer.refined[query_] += refined_;
    return guess_ == -kInfinity || (kept == k && all_[size_t(k - 1)].lower >= guess_);
  }

  int64_t query() const { return query_; }

 private:
  int64_t count() const { return int64_t(all_.size()); }

  void drop(float proven) {
    threshold_ = std::max(threshold_, proven);
    all_.resize(size_t(drop_below(all_.data(), count(), threshold_)));
  }

  // Puts the best in order, if few candidates are left and no two of the same value. Counting what
  // is better has no branches that go either way, where sorting has one at every step: some 3% of
  // a search.
  bool rank(int64_t kept) {
    const int64_t n = count();
    if (n > kRanked) return false;
    float values[kRanked];
    Candidate best[kRanked];
    uint8_t taken[kRanked] = {};
    for (int64_t i = 0; i < n; ++i) values[i] = all_[size_t(i)].lower;
    for (int64_t i = 0; i < n; ++i) {
      int32_t better = 0;
      for (int64_t j = 0; j < n; ++j) better += values[j] > values[i];
      if (taken[better]++) return false;
      best[better] = all_[size_t(i)];
    }
    std::copy(best, best + kept, all_.begin());
    return true;
  }

  static constexpr int64_t kRanked = 64;

  const Plan& plan_;
  const Queries& queries_;
  const CandidateList* lists_;
  Rescorer rescorer_;
  std::vector<Candidate> all_;
  int64_t query_ = -1, likeliest_ = 0, rescored_ = 0, refined_ = 0;
  float threshold_ = 0, guess_ = 0;
};

// Queries [first, first + count) of a request, and where their answers belong.
Request part_of(const Request& request, int64_t first, int64_t count, int64_t dim) {
  Request part = request;
  part.queries += first * dim;
  part.count = count;
  if (part.exclude.offsets) part.exclude.offsets += first;
  return part;
}

Answer part_of(const Answer& answer, int64_t first, int64_t k) {
  return {answer.values + first * k, answer.indices + first * k, answer.rescored + first,
          answer.refined ? answer.refined + first : nullptr};
}

// Returns a query that is not finite, or -1.
int64_t search_round(const Index& index, const Request& request, const Answer& answer,
                     Start start) {
  const Plan plan = make_plan(index, request, start);
  const Grid grid = plan.grid;
  Queries queries(index, request);
  const int64_t capacity = CandidateList::capacity(plan.k), count = request.count;
  std::vector<CandidateList> lists(size_t(grid.item_parts * count));
  const std::unique_ptr<Candidate[]> storage(new Candidate[lists.size() * size_t(capacity)]);
  for (size_t i = 0; i < lists.size(); ++i) lists[i].items = &storage[i * size_t(capacity)];

  const int64_t cells = grid.query_parts * grid.item_parts;
  bool finite = true;
  std::vector<uint8_t> answered;
  answered.resize(size_t(count));
#pragma omp parallel num_threads(int(cells)) if (cells > 1)
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
      Finish one(plan, queries, lists.data()), other = one;
      Finish *merged = &one, *next = &other;
      const auto write = [&](Finish& last) {
        if (last.query() >= 0) answered[size_t(last.query())] = last.write(answer);
      };
#pragma omp for schedule(static) nowait
      for (int64_t b = 0; b < count; ++b) {
        next->merge(b);
        write(*merged);
        std::swap(merged, next);
      }
      write(*merged);
    }
  }
  for (int64_t b = 0; !finite && b < count; ++b)
    if (!queries.finite(b)) return b;

  const int64_t missed = std::count(answered.begin(), answered.end(), 0);
  if (missed * kFewMisses > count) return search_round(index, request, answer, Start::prove);
  for (int64_t b = 0; missed && b < count; ++b)
    if (!answered[size_t(b)])
      search_round(index, part_of(request, b, 1, index.rows.dim), part_of(answer, b, request.k),
                   Start::prove);
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
  std::fill_n(answer.rescored, request.count, 0);
  if (answer.refined) std::fill_n(answer.refined, request.count, 0);
  for (int64_t first = 0; first < request.count; first += kRound) {
    const int64_t count = std::min(kRound, request.count - first);
    const int64_t bad = search_round(index, part_of(request, first, count, index.rows.dim),
                                     part_of(answer, first, request.k), Start::guess);
    if (bad >= 0)
      throw std::invalid_argument("queries: row " + std::to_string(first + bad) +
                                  " holds NaN or infinity; every query must be finite");
  }
}

}  // namespace deeprec::topk
