// The rows that may still be among a query's best, known exactly or only between two bounds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/topk_kernels.h"

namespace deeprec::topk {

struct Candidate {
  float lower, upper;  // equal once the score is exact
  uint32_t id;

  bool exact() const { return lower == upper; }
};

// Value descending, then index ascending; only for exact scores.
inline bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.lower > b.lower || (a.lower == b.lower && a.id < b.id);
}

inline bool likelier(const Candidate& a, const Candidate& b) { return a.lower > b.lower; }

// Scores one query's rows exactly, a batch at a time.
class Rescorer {
 public:
  Rescorer(const Kernels& kernels, const ItemRows& rows, int64_t capacity)
      : kernels_(kernels), rows_(rows) {
    ids_.reserve(size_t(capacity));
    scores_.resize(size_t(capacity));
  }

  // Makes candidates [0, n) exact; returns how many were not.
  int64_t resolve(Candidate* list, int64_t n, const double* query) {
    ids_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (!list[i].exact()) ids_.push_back(list[i].id);
    kernels_.score(rows_, query, ids_.data(), int64_t(ids_.size()), scores_.data());
    const float* score = scores_.data();
    for (int64_t i = 0; i < n; ++i)
      if (!list[i].exact()) list[i].lower = list[i].upper = *score++;
    return int64_t(ids_.size());
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
  const Kernels& kernels_;
  const ItemRows& rows_;
  std::vector<uint32_t> ids_;
  std::vector<float> scores_;
};

inline int64_t drop_below(Candidate* list, int64_t n, float threshold) {
  return std::remove_if(list, list + n,
                        [=](const Candidate& c) { return c.upper < threshold; }) - list;
}

// Storage belongs to the search. The threshold only rises: at least k rows score that much.
struct CandidateList {
  Candidate* items;
  int64_t count = 0;
  int64_t rescored = 0;
  float threshold = -std::numeric_limits<float>::infinity();

  // Room for the k best, as many that the bounds cannot tell from them, and a batch to come: with
  // a smaller batch the bounds are compared before they say much, and twice as many are scored.
  static int64_t capacity(int64_t k) { return 8 * k + 96; }

  // Called when full: bounds first, exact scores where the bounds leave too many.
  void make_room(int64_t k, Rescorer& rescorer, const double* query) {
    const int64_t full = count;
    threshold = std::max(threshold, rescorer.kth_lower(items, count, k));
    count = drop_below(items, count, threshold);
    if (count <= full - full / 4) return;
    rescored += rescorer.resolve(items, count, query);
    std::nth_element(items, items + (k - 1), items + count, ranks_before);
    threshold = std::max(threshold, items[k - 1].lower);
    count = k;
  }
};

}  // namespace deeprec::topk
