// Softmax of one row read once, block by block.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/exp.h"
#include "cpu/softmax_state.h"

namespace deeprec {

namespace {  // see dtype.h

// Values a block holds: it stays in the first-level cache between its two passes.
constexpr int64_t kBlock = 2048;

class RowSoftmax {
 public:
  explicit RowSoftmax(double temperature) : exp_(temperature), temperature_(temperature) {}

  // One block of at most kBlock values; `next`, when not null, is prefetched meanwhile.
  template <bool kEntropy, class T>
  void add(const T* x, int64_t n, const T* next = nullptr) {
    constexpr int w = Vec::width;
    const int64_t whole = n - n % w;
    const Vec lowest = set1(-FLT_MAX);
    Vec top[4] = {lowest, lowest, lowest, lowest};
    int64_t i = 0;
    for (; i + 4 * w <= whole; i += 4 * w)
      for (int j = 0; j < 4; ++j) top[j] = max(load(x + i + j * w), top[j]);
    for (; i < whole; i += w) top[0] = max(load(x + i), top[0]);
    if (whole < n) top[0] = max(load_part(x + whole, n - whole, -INFINITY), top[0]);
    raise(maximum(max(max(top[0], top[1]), max(top[2], top[3]))));

    const Vec largest = set1(largest_);
    Vec sums[2] = {set1(0.f), set1(0.f)}, weighted[2] = {set1(0.f), set1(0.f)};
    const auto term = [&](Vec value, int j) {
      const Vec d = exp_.clamp(value - largest), e = exp_(d);
      sums[j] = sums[j] + e;
      if constexpr (kEntropy) weighted[j] = fma(e, d, weighted[j]);
    };
    for (i = 0; i + 2 * w <= whole; i += 2 * w) {
      if (next) {  // 64-byte lines: one or two of them hold the next 2 w values
        __builtin_prefetch(next + i);
        if (2 * w * sizeof(T) > 64) __builtin_prefetch(next + i + w);
      }
      term(load(x + i), 0);
      term(load(x + i + w), 1);
    }
    for (; i < whole; i += w) term(load(x + i), 0);
    if (whole < n) term(load_part(x + whole, n - whole, -INFINITY), 0);
    sum_ += double(sum(sums[0] + sums[1]));
    if constexpr (kEntropy) weighted_ += double(sum(weighted[0] + weighted[1]));
  }

  SoftmaxState state() const { return {largest_, float(sum_)}; }

  // log-prob of a logit of this row; NaN when the row has no softmax.
  float logprob(float x) const {
    if (empty()) return NAN;
    return float((double(x) - double(largest_)) / temperature_ - std::log(sum_));
  }

  // log s - Σ e·d / (s·T): both terms are >= 0, so nothing cancels.
  float entropy() const {
    if (empty()) return NAN;
    return float(std::log(sum_) - weighted_ / (sum_ * temperature_));
  }

 private:
  // Only -inf so far: every term was 0.
  bool empty() const { return sum_ == 0; }

  void raise(float block_largest) {
    if (!(block_largest > largest_)) return;
    const double shift = double(largest_) - double(block_largest);
    const double ratio = std::exp(shift / temperature_);
    if (sum_ > 0) weighted_ = ratio * (weighted_ + sum_ * shift);
    sum_ *= ratio;
    largest_ = block_largest;
  }

  ScaledExp exp_;
  double temperature_;
  float largest_ = -FLT_MAX;
  double sum_ = 0, weighted_ = 0;
};

}  // namespace
}  // namespace deeprec
