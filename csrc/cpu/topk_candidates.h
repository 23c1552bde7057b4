// The rows that may still be among a query's best, known exactly or only between two bounds.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/topk_kernels.h"
#include "cpu/topk_queries.h"

namespace deeprec::topk {

// fp32 neighbours that enclose a real number, rounding to nearest and subnormals included.
inline float below(double x) { return float(x - std::fabs(x) * 0x1p-23 - 0x1p-149); }
inline float above(double x) { return float(x + std::fabs(x) * 0x1p-23 + 0x1p-149); }

struct Candidate {
  float lower, upper;  // equal once the score is exact
  uint32_t id;
  uint32_t position;  // in stored order; kRefined once its 16-bit codes have been used

  static constexpr uint32_t kRefined = ~uint32_t(0);

  bool exact() const { return lower == upper; }
  // Bounds may be infinite, but this is a number.
  float middle() const { return std::max(-FLT_MAX, lower / 2 + upper / 2); }
};

// Orders are types, so that sorting compiles them in.
// Value descending, then index ascending; only for exact scores.
struct RanksBefore {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.lower > b.lower || (a.lower == b.lower && a.id < b.id);
  }
};

struct Likelier {
  bool operator()(const Candidate& a, const Candidate& b) const { return a.middle() > b.middle(); }
};

// Scores one query's rows better than the first codes do, a batch at a time.
class Rescorer {
 public:
  Rescorer(const Kernels& kernels, const Index& index, int64_t capacity)
      : kernels_(kernels), index_(index) {
    ids_.reserve(size_t(capacity));
    scores_.resize(size_t(capacity));
    if (index.filter.fine) products_.resize(size_t(capacity));
  }

  // Narrows the bounds of candidates [0, n) by their 16-bit codes, where there are any; returns of
  // how many.
  int64_t refine(Candidate* list, int64_t n, const CodedQuery& query) {
    const Prefilter& filter = index_.filter;
    if (!filter.fine) return 0;
    ids_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (!list[i].exact() && list[i].position != Candidate::kRefined)
        ids_.push_back(list[i].position);
    const int64_t dim = index_.rows.dim;
    products_.resize(std::max(products_.size(), ids_.size()));
    kernels_.fine(filter.fine, dim, query.rotated, ids_.data(), int64_t(ids_.size()),
                  products_.data());
    const double* product = products_.data();
    const double* center = nullptr;
    double shift = 0;
    for (int64_t i = 0; i < n; ++i) {
      Candidate& c = list[i];
      if (c.exact() || c.position == Candidate::kRefined) continue;
      const int64_t block = c.position / kBlockRows;
      if (const double* next = filter.center_of(block, dim); next != center) {
        center = next;
        kernels_.products(center, 1, dim, &query.exact, 1, &shift, 1);
      }
      const FineBound& bound = filter.fine_bounds[block];
      const double unit = 1 / double(bound.inverse_scale);
      const double middle = shift + *product++ * unit;
      const double radius = query.length * bound.error * unit * (1 + 0x1p-40);
      c.lower = std::max(c.lower, below(middle - radius));
      c.upper = std::min(c.upper, above(middle + radius));
      c.position = Candidate::kRefined;
    }
    return int64_t(ids_.size());
  }

  // Has the rows of candidates [0, n) brought into the cache.
  void fetch(const Candidate* list, int64_t n) const {
    const ItemRows& rows = index_.rows;
    const int64_t size = rows.type == Dtype::f32 ? 4 : 2, bytes = rows.dim * size;
    for (int64_t i = 0; i < n; ++i) {
      if (list[i].exact()) continue;
      const char* row = static_cast<const char*>(rows.data) + list[i].id * rows.stride * size;
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
    }
  }

  // Makes candidates [0, n) exact; returns how many were not.
  int64_t resolve(Candidate* list, int64_t n, const CodedQuery& query) {
    ids_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (!list[i].exact()) ids_.push_back(list[i].id);
    scores_.resize(std::max(scores_.size(), ids_.size()));
    kernels_.score(index_.rows, query.exact, ids_.data(), int64_t(ids_.size()), scores_.data());
    const float* score = scores_.data();
    for (int64_t i = 0; i < n; ++i)
      if (!list[i].exact()) list[i].lower = list[i].upper = *score++;
    return int64_t(ids_.size());
  }

  // Moves the likeliest of n > k candidates to the front: k of them, and the few that share the
  // last one's place among kPlaces between the least and the most likely. Returns how many.
  int64_t likeliest_first(Candidate* list, int64_t n, int64_t k) {
    scores_.resize(std::max(scores_.size(), size_t(n)));
    float low = FLT_MAX, high = -FLT_MAX;
    for (int64_t i = 0; i < n; ++i) {
      const float middle = list[i].middle();
      scores_[size_t(i)] = middle;
      low = std::min(low, middle);
      high = std::max(high, middle);
    }
    const float places = float(kPlaces - 1) / (high - low);
    if (!(places > 0 && places < FLT_MAX)) {
      std::nth_element(list, list + (k - 1), list + n, Likelier());
      return k;
    }
    const auto place = [=](float middle) { return int((middle - low) * places); };
    int32_t counts[kPlaces] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[place(scores_[size_t(i)])];
    int last = kPlaces;
    for (int64_t found = 0; found < k;) found += counts[--last];
    return std::partition(list, list + n, [=](const Candidate& c) {
             return place(c.middle()) >= last;
           }) - list;
  }

  // The k-th largest lower bound of n >= k candidates: a valid threshold.
  float kth_lower(const Candidate* list, int64_t n, int64_t k) {
    scores_.resize(std::max(scores_.size(), size_t(n)));
    for (int64_t i = 0; i < n; ++i) scores_[size_t(i)] = list[i].lower;
    const auto kth = scores_.begin() + (k - 1);
    std::nth_element(scores_.begin(), kth, scores_.begin() + n, std::greater<float>());
    return *kth;
  }

 private:
  static constexpr int kPlaces = 64;

  const Kernels& kernels_;
  const Index& index_;
  std::vector<uint32_t> ids_;  // or positions
  std::vector<float> scores_;
  std::vector<double> products_;
};

inline int64_t drop_below(Candidate* list, int64_t n, float threshold) {
  return std::remove_if(list, list + n,
                        [=](const Candidate& c) { return c.upper < threshold; }) - list;
}

// Storage belongs to the search. The threshold only rises: at least k rows score that much, unless
// it is a guess.
struct CandidateList {
  Candidate* items;
  int64_t count = 0;
  int64_t rescored = 0, refined = 0;
  float threshold = -std::numeric_limits<float>::infinity();
  float guess = threshold;  // what the threshold began with, to be confirmed by the answer

  // Room for the k best, as many that the bounds cannot tell from them, and a batch to come: with
  // a smaller batch the bounds are compared before they say much, and twice as many are scored.
  static int64_t capacity(int64_t k) { return 8 * k + 96; }

  // Called when full: bounds first, finer ones and then exact scores where they leave too many.
  void make_room(int64_t k, Rescorer& rescorer, const CodedQuery& query) {
    const int64_t full = count;
    drop(k, rescorer);
    if (count <= full - full / 4) return;
    if (const int64_t n = rescorer.refine(items, count, query)) {
      refined += n;
      drop(k, rescorer);
      if (count <= full - full / 4) return;
    }
    rescored += rescorer.resolve(items, count, query);
    std::nth_element(items, items + (k - 1), items + count, RanksBefore());
    threshold = std::max(threshold, items[k - 1].lower);
    count = k;
  }

  void drop(int64_t k, Rescorer& rescorer) {
    threshold = std::max(threshold, rescorer.kth_lower(items, count, k));
    count = drop_below(items, count, threshold);
  }
};

}  // namespace deeprec::topk
