// Checks, the split into ranges of users, and the search behind the user vectors.
#include "cpu/trm.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cpu/float_env.h"
#include "cpu/isa.h"

namespace deeprec::trm {

extern const Kernels kKernels_scalar;
#if defined(__x86_64__)
extern const Kernels kKernels_avx2, kKernels_avx512, kKernels_avx512_vnni;
#endif

namespace {

// A range has at most so many users and, beyond one user, items: products with a row a user are
// efficient from some dozen rows on, and the context of a range (H 128: a megabyte) is read again
// by the last layer.
constexpr int64_t kRangeUsers = 64, kRangeItems = 2048;

const Kernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512_vnni) return kKernels_avx512_vnni;
  if (active_isa() >= Isa::avx512) return kKernels_avx512;
  if (active_isa() >= Isa::avx2) return kKernels_avx2;
#endif
  return kKernels_scalar;
}

// Memory that a thread keeps from call to call.
class Memory {
 public:
  float* floats(int64_t n) {
    if (n > size_) {
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(n * 4 + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = n;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

std::string row_text(const char* name, int64_t row) {
  return std::string(name) + ": row " + std::to_string(row) + " ";
}

void check_history(const Model& m, const Request& r) {
  if (!r.history || !r.lengths) return;
  for (int64_t b = 0; b < r.count; ++b) {
    const int64_t n = r.lengths[b];
    if (n < 1 || n > r.history_width)
      throw std::invalid_argument(
          "lengths: expected values from 1 to " + std::to_string(r.history_width) +
          " (the width of history), got " + std::to_string(n) + " in row " + std::to_string(b) +
          "; leave out users without history");
    const int64_t* ids = r.history + b * r.history_width;
    for (int64_t t = 0; t < n; ++t)
      if (ids[t] < 1 || ids[t] > m.n_items)
        throw std::out_of_range(row_text("history", b) + "holds " + std::to_string(ids[t]) +
                                " at position " + std::to_string(t) +
                                ", but items are 1 … " + std::to_string(m.n_items));
    for (int64_t t = n; t < r.history_width; ++t)
      if (ids[t] != 0)
        throw std::invalid_argument(row_text("history", b) + "holds item " +
                                    std::to_string(ids[t]) + " at position " + std::to_string(t) +
                                    ", beyond its length of " + std::to_string(n) +
                                    "; pad with 0 on the right");
  }
}

int64_t first_bad_row(const float* rows, int64_t count, int64_t width) {
  for (int64_t b = 0; b < count; ++b)
    for (int64_t i = 0; i < width; ++i)
      if (!std::isfinite(rows[b * width + i])) return b;
  return -1;
}

bool finite_rows(const float* rows, int64_t count, int64_t width, int64_t stride) {
  bool finite = true;
  for (int64_t b = 0; b < count; ++b) {
    float total = 0;  // NaN or infinity, if any element is
    for (int64_t i = 0; i < width; ++i) total += std::fabs(rows[b * stride + i]);
    finite = finite && std::isfinite(total);
  }
  return finite;
}

// Says whose fault it is.
[[noreturn]] void not_finite(const Model& m, const Request& r) {
  for (auto [name, rows, width] : {std::make_tuple("preference", r.preference, m.text_dim),
                                   std::make_tuple("states", r.states, m.hidden)}) {
    const int64_t bad = rows ? first_bad_row(rows, r.count, width) : -1;
    if (bad >= 0)
      throw std::invalid_argument(row_text(name, bad) +
                                  "holds NaN or infinity; every row must be finite");
  }
  throw std::invalid_argument(
      "user vectors are not finite: the model's parameters are too large for float32");
}

// Ranges of users of about equal work, [n + 1] bounds.
std::vector<int64_t> split(const Request& r, int threads) {
  int64_t items = 0;
  for (int64_t b = 0; b < r.count; ++b) items += r.states ? 1 : r.lengths[b];
  const int64_t rounds = std::max((r.count + kRangeUsers * threads - 1) / (kRangeUsers * threads),
                                  (items + kRangeItems * threads - 1) / (kRangeItems * threads));
  const int64_t ranges = std::max<int64_t>(1, std::min(r.count, rounds * threads));
  std::vector<int64_t> bounds{0};
  int64_t done = 0, users = 0;
  for (int64_t b = 0; b < r.count; ++b) {
    done += r.states ? 1 : r.lengths[b];
    ++users;
    if (done * ranges >= items * int64_t(bounds.size()) || users == kRangeUsers) {
      bounds.push_back(b + 1);
      users = 0;
    }
  }
  if (bounds.back() != r.count) bounds.push_back(r.count);
  return bounds;
}

// User vectors [count, m.width], in memory that the next call of this thread overwrites. The thread
// that made those of a range of users passes them to after(first, last, rows).
template <class After>
const float* user_rows(const Model& m, const Request& r, After after) {
  thread_local Memory states_memory, scratch_memory;
  const int threads = r.threads;
  const Kernels& k = kernels();
  const std::vector<int64_t> bounds = split(r, threads);
  const int64_t ranges = int64_t(bounds.size()) - 1;
  const int workers = int(std::min<int64_t>(threads, ranges));
  int64_t scratch = 0;
  for (int64_t i = 0; i < ranges; ++i) {
    int64_t tokens = 0;
    for (int64_t b = bounds[i]; !r.states && b < bounds[i + 1]; ++b) tokens += r.lengths[b];
    const int64_t users = bounds[i + 1] - bounds[i];
    scratch = std::max(scratch, k.scratch(m, users, std::max(tokens, users)));
  }
  float* states = states_memory.floats(r.count * m.width);
  float* memory = scratch_memory.floats(scratch * workers);
  bool finite = true;
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const DefaultFloatEnv env;
    float* mine = memory + scratch * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) reduction(&& : finite)
    for (int64_t i = 0; i < ranges; ++i) {
      const int64_t first = bounds[i], last = bounds[i + 1];
      float* rows = states + first * m.width;
      if (r.states) {
        for (int64_t b = first; b < last; ++b) {
          float* row = states + b * m.width;
          std::memcpy(row, r.states + b * m.hidden, size_t(m.hidden) * 4);
          std::fill(row + m.hidden, row + m.width, 0.f);
        }
      } else {
        k.history(m, r, first, last, rows, mine);
      }
      for (int64_t b = first; r.states_out && b < last; ++b)
        std::memcpy(r.states_out + b * m.hidden, states + b * m.width, size_t(m.hidden) * 4);
      k.preference(m, r, first, last, rows, mine);
      finite = finite && finite_rows(rows, last - first, m.hidden, m.width);
      after(first, last, rows);
    }
  }
  if (!finite) not_finite(m, r);
  return states;
}

// Rows of the index that may not be found: ids of `exclude` and of the history, less one.
class Excluded {
 public:
  // Room for all ids of every user; checks those given.
  void prepare(const Model& m, const Request& r, const Retrieval& retrieval) {
    const topk::Exclusions& given = retrieval.exclude;
    offsets_.assign(1, 0);
    counts_.assign(size_t(r.count), 0);
    for (int64_t b = 0; b < r.count; ++b) {
      int64_t room = retrieval.exclude_history ? r.lengths[b] : 0;
      if (given.offsets) {
        room += given.offsets[b + 1] - given.offsets[b];
        for (int64_t i = given.offsets[b]; i < given.offsets[b + 1]; ++i)
          if (given.ids[i] < 1 || given.ids[i] > m.n_items)
            throw std::out_of_range(row_text("exclude", b) + "holds " +
                                    std::to_string(given.ids[i]) + ", but items are 1 … " +
                                    std::to_string(m.n_items));
      }
      offsets_.push_back(offsets_.back() + room);
    }
    ids_.resize(size_t(offsets_.back()));
  }

  // One user's, ascending and each once. Users may be taken by different threads.
  void fill(const Request& r, const Retrieval& retrieval, int64_t b) {
    const topk::Exclusions& given = retrieval.exclude;
    int64_t *const first = ids_.data() + offsets_[size_t(b)], *last = first;
    if (given.offsets)
      for (int64_t i = given.offsets[b]; i < given.offsets[b + 1]; ++i) *last++ = given.ids[i] - 1;
    if (retrieval.exclude_history) {
      int64_t* const middle = last;
      const int64_t* ids = r.history + b * r.history_width;
      for (int64_t t = 0; t < r.lengths[b]; ++t) *last++ = ids[t] - 1;
      std::sort(middle, last);
      std::inplace_merge(first, middle, last);
      last = std::unique(first, last);
    }
    counts_[size_t(b)] = last - first;
  }

  // All users', the gaps between them closed.
  topk::Exclusions rows() {
    int64_t end = 0;
    for (size_t b = 0; b < counts_.size(); ++b) {
      const int64_t* from = ids_.data() + offsets_[b];
      std::copy(from, from + counts_[b], ids_.data() + end);
      offsets_[b] = end;
      end += counts_[b];
    }
    offsets_.back() = end;
    return end ? topk::Exclusions{offsets_.data(), ids_.data()} : topk::Exclusions{};
  }

 private:
  std::vector<int64_t> offsets_, counts_, ids_;
};

}  // namespace

Model::Model(const std::map<std::string, int64_t>& sizes, double epsilon,
             const std::map<std::string, uintptr_t>& tensors) {
  n_items = sizes.at("n_items");
  text_dim = sizes.at("text_dim");
  hidden = sizes.at("hidden");
  inner = sizes.at("inner");
  n_layers = sizes.at("n_layers");
  n_heads = sizes.at("n_heads");
  n_experts = sizes.at("n_experts");
  max_length = sizes.at("max_length");
  half = sizes.at("half") != 0;
  padding_row = sizes.at("padding_row") != 0;
  eps = float(epsilon);
  width = padded(hidden);
  head = padded(hidden / n_heads);

  const auto floats = [&](const std::string& name) {
    return reinterpret_cast<const float*>(tensors.at(name));
  };
  const auto norm = [&](const std::string& name) {
    return Norm{floats(name + ".weight"), floats(name + ".bias")};
  };
  const auto map = [&](const std::string& name, int64_t in, int64_t out) {
    const auto bias = tensors.find(name + ".bias");
    return Linear{floats(name + ".weight"),
                  bias == tensors.end() ? nullptr : floats(name + ".bias"), padded(in),
                  padded(out), half};
  };
  items = floats("items");
  texts = floats("texts");
  kernel = floats("kernel");
  gates = floats("gates.weight");
  gate_bias = floats("gates.bias");
  positions = floats("positions");
  input_norm = norm("input_norm");
  output_norm = norm("output_norm");
  adaptor_gate = map("adaptor.gate", text_dim, n_experts);
  adaptor = map("adaptor.experts", text_dim, width);
  for (int64_t i = 0; i < n_layers; ++i) {
    const std::string name = "layer." + std::to_string(i) + ".";
    const bool last = i == n_layers - 1;
    Layer l;
    l.project = map(name + "project", hidden, (last ? 1 : 3) * n_heads * head);
    if (last) {
      l.key = map(name + "key", head, hidden);
      l.value = map(name + "value", hidden, head);
    }
    l.out = map(name + "out", n_heads * head, hidden);
    l.up = map(name + "up", hidden, inner);
    l.down = map(name + "down", inner, hidden);
    l.attention_norm = norm(name + "attention_norm");
    l.feed_norm = norm(name + "feed_norm");
    layers_.push_back(l);
  }
  layer = layers_.data();
}

void encode(const Model& model, const Request& request) {
  if (!request.count) return;
  check_history(model, request);
  user_rows(model, request, [&](int64_t first, int64_t last, const float* rows) {
    for (int64_t b = first; request.users && b < last; ++b, rows += model.width)
      std::memcpy(request.users + b * model.hidden, rows, size_t(model.hidden) * 4);
  });
}

void retrieve(const Model& model, const Request& request, const Retrieval& retrieval) {
  const int64_t count = request.count, hidden = model.hidden, k = retrieval.k;
  if (!count) return;
  check_history(model, request);
  thread_local Excluded excluded_memory;
  thread_local std::vector<float> queries_memory;
  thread_local std::vector<int64_t> rescored;
  Excluded& excluded = excluded_memory;  // this thread's, for those that work for it as well
  excluded.prepare(model, request, retrieval);
  queries_memory.resize(size_t(count * hidden));
  float* queries = queries_memory.data();
  const float* users =
      user_rows(model, request, [&](int64_t first, int64_t last, const float* rows) {
        topk::normalize_rows({rows, last - first, hidden, model.width, topk::Dtype::f32},
                             queries + first * hidden, 1);
        for (int64_t b = first; b < last; ++b) excluded.fill(request, retrieval, b);
      });
  for (int64_t b = 0; b < count; ++b)
    if (std::all_of(users + b * model.width, users + b * model.width + hidden,
                    [](float x) { return x == 0; }))
      throw std::invalid_argument(row_text("user vectors", b) +
                                  "is zero, which has no cosine: is OutLayerNorm zero?");
  rescored.resize(size_t(count));
  topk::search(retrieval.index, {queries, count, k, excluded.rows(), request.threads},
               {retrieval.values, retrieval.indices, rescored.data()});
  for (int64_t i = 0; i < count * k; ++i)
    if (retrieval.indices[i] >= 0) ++retrieval.indices[i];
}

}  // namespace deeprec::trm
