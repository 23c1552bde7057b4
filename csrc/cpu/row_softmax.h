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
// How far ahead of use rows are fetched into the second-level cache. Measured on 2048 x 49,152
// float: 10.8 cycles for 16 numbers, against 12.3 one block ahead into the first level.
constexpr int64_t kAhead = 16 << 10;

// The largest of n numbers, -FLT_MAX of none. Where one is NaN it is any of the others, or NaN.
template <class T>
inline float largest_of(const T* x, int64_t n) {
  constexpr int w = Vec::width;
  const Vec lowest = set1(-FLT_MAX);
  Vec top[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int j = 0; j < 4; ++j) top[j] = max(load(x + i + j * w), top[j]);
  for (; i + w <= n; i += w) top[0] = max(load(x + i), top[0]);
  if (i < n) top[0] = max(load_part(x + i, n - i, -INFINITY), top[0]);
  return maximum(max(max(top[0], top[1]), max(top[2], top[3])));
}

#if defined(__AVX512BW__)
// Bits of non-negative numbers order as signed integers do, and come after all negative ones;
// those order backwards, so of negative numbers alone the largest has the least unsigned bits.
inline float largest_of(const Bf16* x, int64_t n) {
  constexpr int64_t w = 32;
  const auto part = [&](int64_t i) {  // past the end -inf, the least of the ordered bits
    const __mmask32 kept = n - i >= w ? ~0u : (1u << (n - i)) - 1;
    return _mm512_mask_loadu_epi16(_mm512_set1_epi16(int16_t(0xff80)), kept, x + i);
  };
  __m512i top[2], least[2];
  for (int j = 0; j < 2; ++j) top[j] = _mm512_set1_epi16(INT16_MIN), least[j] = _mm512_set1_epi16(-1);
  int64_t i = 0;
  for (; i + 2 * w <= n; i += 2 * w)
    for (int j = 0; j < 2; ++j) {
      const __m512i bits = _mm512_loadu_si512(x + i + j * w);
      top[j] = _mm512_max_epi16(bits, top[j]);
      least[j] = _mm512_min_epu16(bits, least[j]);
    }
  for (; i < n; i += w) {
    top[0] = _mm512_max_epi16(part(i), top[0]);
    least[0] = _mm512_min_epu16(part(i), least[0]);
  }
  const __m512i signed_top = _mm512_max_epi16(top[0], top[1]);
  const __m512i in_high = _mm512_max_epi32(signed_top, _mm512_slli_epi32(signed_top, 16));
  const int high = _mm512_reduce_max_epi32(in_high);
  if (high >= 0) return as_float(uint32_t(high) & 0xffff0000u);
  const __m512i unsigned_least = _mm512_min_epu16(least[0], least[1]);
  const __m512i low_halves = _mm512_and_si512(unsigned_least, _mm512_set1_epi32(0xffff));
  const __m512i halves = _mm512_min_epu32(low_halves, _mm512_srli_epi32(unsigned_least, 16));
  return as_float(_mm512_reduce_min_epu32(halves) << 16);
}
#endif

class RowSoftmax {
 public:
  explicit RowSoftmax(double temperature) : exp_(temperature), temperature_(temperature) {}

  // One block of at most kBlock values; what lies `ahead` bytes behind them is prefetched.
  template <bool kEntropy, int64_t ahead = 0, class T>
  void add(const T* x, int64_t n) {
    constexpr int w = Vec::width;
    raise(largest_of(x, n));

    const Vec largest = set1(largest_);
    Vec sums[4], weighted[4];
    for (int j = 0; j < 4; ++j) sums[j] = weighted[j] = set1(0.f);
    const auto term = [&](Vec value, int j) {
      const Vec d = exp_.clamp(value - largest);
      if constexpr (kEntropy) {
        Vec e;
        sums[j] = exp_.add(d, sums[j], e);
        weighted[j] = fma(e, d, weighted[j]);
      } else {
        sums[j] = exp_.add(d, sums[j]);
      }
    };
    int64_t i = 0;
    for (; i + 4 * w <= n; i += 4 * w) {
      if constexpr (ahead > 0) {
        for (size_t line = 0; line < 4 * w * sizeof(T); line += 64)
          __builtin_prefetch((const char*)(x + i) + ahead + line, 0, 2);
      }
      Vec a, b, c, d;
      load_two(x + i, a, b);
      load_two(x + i + 2 * w, c, d);
      term(a, 0), term(b, 1), term(c, 2), term(d, 3);
    }
    for (; i + w <= n; i += w) term(load(x + i), 0);
    if (i < n) term(load_part(x + i, n - i, -INFINITY), 0);
    sum_ += double(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
    if constexpr (kEntropy)
      weighted_ += double(sum((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])));
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
