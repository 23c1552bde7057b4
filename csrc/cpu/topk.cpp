// The search: which rows are looked at by whom, and with what.
//
// Work is a grid of query parts x item parts, one cell a thread (topk_cell.h). The candidates that
// a query's cells found are merged at the end, when only what the bounds cannot decide is scored
// exactly. Nothing but the counters depends on the grid.
#include "cpu/topk.h"

#include <omp.h>
#include <pthread.h>
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
constexpr int64_t kParallelWork = int64_t(1) << 20;
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

Plan make_plan(const Index& index, const Request& request, Start start) {
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
          std::max<int64_t>(8, cache_bytes() / 2 / (kBlockRows * row_bytes)), grid,
          index.filter.cluster ? Start::prove : start};
}

// The k best of a query's candidates, exactly, into its row of the answer; false if a guess was too
// high, so that there may be better ones.
bool finish(const Plan& plan, const Queries& queries, const CandidateList* lists, int64_t query,
            std::vector<Candidate>& all, Rescorer& rescorer, const Answer& answer) {
  const int64_t k = plan.k, asked = plan.request.k, count = plan.request.count;
  all.clear();
  float threshold = -kInfinity, guess = -kInfinity;
  int64_t rescored = 0, refined = 0;
  for (int64_t part = 0; part < plan.grid.item_parts; ++part) {
    const CandidateList& list = lists[part * count + query];
    all.insert(all.end(), list.items, list.items + list.count);
    threshold = std::max(threshold, list.threshold);
    guess = std::max(guess, list.guess);
    rescored += list.rescored;
    refined += list.refined;
  }
  Candidate* c = all.data();
  int64_t n = int64_t(all.size());
  const auto drop = [&] { n = drop_below(c, n, threshold); };
  if (plan.index.filter.fine && n > 2 * k) {
    threshold = std::max(threshold, rescorer.kth_lower(c, n, k));
    drop();
    if (n > 2 * k) refined += rescorer.refine(c, n, queries[query]);
  }
  if (n > k) {
    // Once the likeliest k are exact, the least of them rules out most of the others.
    std::nth_element(c, c + (k - 1), c + n, Likelier());
    rescored += rescorer.resolve(c, k, queries[query]);
    threshold = std::max(threshold, std::max_element(c, c + k, RanksBefore())->lower);
    drop();
  }
  rescored += rescorer.resolve(c, n, queries[query]);
  const int64_t kept = std::min(k, n);
  std::partial_sort(c, c + kept, c + n, RanksBefore());
  float* values = answer.values + query * asked;
  int64_t* indices = answer.indices + query * asked;
  for (int64_t i = 0; i < asked; ++i) {
    values[i] = i < kept ? c[i].lower : -kInfinity;
    indices[i] = i < kept ? int64_t(c[i].id) : -1;
  }
  answer.rescored[query] += rescored;
  if (answer.refined) answer.refined[query] += refined;
  return guess == -kInfinity || (kept == k && c[k - 1].lower >= guess);
}

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
      Rescorer rescorer(plan.kernels, index, capacity * grid.item_parts);
      std::vector<Candidate> all;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < count; ++b)
        answered[size_t(b)] = finish(plan, queries, lists.data(), b, all, rescorer, answer);
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
