// Small matrix products: rows of floats times panels of 32 columns.
//
// Rows are first packed into tiles of at most kRows: [k / 16][rows][16 words], so that the inner
// loop reads them through one pointer with constant offsets. A word is a float, or a pair of bf16
// where the machine multiplies those. Every element of the result adds its products in ascending
// k, whatever the tile, so results do not depend on how users were batched.
#pragma once

#include "cpu/float_vec.h"
#include "cpu/trm.h"

namespace deeprec::trm {
namespace {  // see dtype.h

constexpr int64_t kWords = 16;
// The accumulators that fit the registers: 14 x 2 of 32 with AVX-512, 6 x 2 of 16 with AVX2.
constexpr int kColumns = 2;
constexpr int kRows = Vec::width == 16 ? 14 : Vec::width == 8 ? 6 : 4;

inline int64_t tiles(int64_t rows) { return (rows + kRows - 1) / kRows; }

// Floats that packed rows take.
inline int64_t packed_size(int64_t rows, int64_t k) {
  return rows * ((k + kWords - 1) / kWords * kWords);
}

// --- one tile times one panel; b is [k][step] words ---

template <int R>
inline void multiply(const float* a, const float* b, int64_t step, int64_t k, const float* bias,
                     float* c, int64_t stride) {
  constexpr int w = Vec::width;
  for (int lane = 0; lane < kPanel; lane += kColumns * w) {
    Vec sums[R][kColumns];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) sums[r][j] = load(bias + lane + j * w);
    const float *x = a, *y = b + lane;
    for (int64_t start = 0; start < k; start += kWords, x += R * kWords) {
      const int64_t n = k - start < kWords ? k - start : kWords;
      for (int64_t i = 0; i < n; ++i, y += step) {
        Vec column[kColumns];
        for (int j = 0; j < kColumns; ++j) column[j] = load(y + j * w);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
          const Vec row = set1(x[r * kWords + i]);
#pragma GCC unroll 2
          for (int j = 0; j < kColumns; ++j) sums[r][j] = fma(row, column[j], sums[r][j]);
        }
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) store(c + r * stride + lane + j * w, sums[r][j]);
  }
}

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;  // rows are packed as pairs of bf16

template <int R>
inline void multiply_pairs(const float* a, const uint32_t* b, int64_t step, int64_t words,
                           const float* bias, float* c, int64_t stride) {
  Vec sums[R][kColumns];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) sums[r][j] = load(bias + 16 * j);
  const uint32_t* x = (const uint32_t*)a;
  for (int64_t start = 0; start < words; start += kWords, x += R * kWords)
    for (int64_t i = 0; i < kWords; ++i, b += step) {
      __m512bh column[kColumns];
      for (int j = 0; j < kColumns; ++j) column[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        const __m512bh row = (__m512bh)_mm512_set1_epi32(int(x[r * kWords + i]));
#pragma GCC unroll 2
        for (int j = 0; j < kColumns; ++j)
          sums[r][j].v = _mm512_dpbf16_ps(sums[r][j].v, row, column[j]);
      }
    }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) store(c + r * stride + 16 * j, sums[r][j]);
}
#else
constexpr bool kPairs = false;  // bf16 weights are widened, rows stay floats

#if defined(__AVX512F__)
inline void widen(const uint32_t* p, Vec& even, Vec& odd) {
  const __m512i pair = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000u))));
}
#elif defined(__AVX2__)
inline void widen(const uint32_t* p, Vec& even, Vec& odd) {
  const __m256i pair = _mm256_loadu_si256((const __m256i*)p);
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000u))));
}
#else
inline void widen(const uint32_t* p, Vec& even, Vec& odd) {
  even = each([&](int i) { return as_float(p[i] << 16); });
  odd = each([&](int i) { return as_float(p[i] & 0xffff0000u); });
}
#endif

template <int R>
inline void multiply_pairs(const float* a, const uint32_t* b, int64_t step, int64_t words,
                           const float* bias, float* c, int64_t stride) {
  constexpr int w = Vec::width;
  for (int lane = 0; lane < kPanel; lane += w) {
    Vec sums[R];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) sums[r] = load(bias + lane);
    const float* x = a;
    const uint32_t* y = b + lane;
    for (int64_t start = 0; start < 2 * words; start += kWords, x += R * kWords)
      for (int64_t i = 0; i < kWords; i += 2, y += step) {
        Vec even, odd;
        widen(y, even, odd);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r)
          sums[r] = fma(set1(x[r * kWords + i + 1]), odd,
                        fma(set1(x[r * kWords + i]), even, sums[r]));
      }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) store(c + r * stride + lane, sums[r]);
  }
}
#endif

// A function template for the number of rows at hand.
template <int R = kRows>
inline void multiply_rows(int64_t rows, const float* a, const float* b, int64_t step, int64_t k,
                          const float* bias, float* c, int64_t stride) {
  if (rows == R) return multiply<R>(a, b, step, k, bias, c, stride);
  if constexpr (R > 1) multiply_rows<R - 1>(rows, a, b, step, k, bias, c, stride);
}

template <int R = kRows>
inline void multiply_pair_rows(int64_t rows, const float* a, const uint32_t* b, int64_t words,
                               const float* bias, float* c, int64_t stride) {
  if (rows == R) return multiply_pairs<R>(a, b, kPanel, words, bias, c, stride);
  if constexpr (R > 1) multiply_pair_rows<R - 1>(rows, a, b, words, bias, c, stride);
}

// --- packing rows ---

// Row range of a tile, evenly split.
struct Range {
  int64_t first, count;
};
inline Range tile_rows(int64_t rows, int64_t tile) {
  const int64_t n = tiles(rows), first = rows * tile / n;
  return {first, rows * (tile + 1) / n - first};
}

// Reads past k up to the next multiple of 16: rows must have that much memory, of any content.
inline void pack_floats(const float* a, int64_t stride, int64_t rows, int64_t k, float* out) {
  for (int64_t t = 0; t < tiles(rows); ++t) {
    const Range range = tile_rows(rows, t);
    for (int64_t i = 0; i < k; i += kWords)
      for (int64_t r = 0; r < range.count; ++r, out += kWords)
        for (int64_t v = 0; v < kWords; v += Vec::width)
          store(out + v, load(a + (range.first + r) * stride + i + v));
  }
}

// For weights of one type; k is padded.
inline void pack_rows(const float* a, int64_t stride, int64_t rows, int64_t k, bool half,
                      float* out) {
  if (!half || !kPairs) return pack_floats(a, stride, rows, k, out);
  for (int64_t t = 0; t < tiles(rows); ++t) {
    const Range range = tile_rows(rows, t);
    for (int64_t i = 0; i < k; i += 2 * kWords)
      for (int64_t r = 0; r < range.count; ++r, out += kWords)
        for (int64_t v = 0; v < 2 * kWords; v += Vec::width)
          store((Bf16*)out + v, load(a + (range.first + r) * stride + i + v));
  }
}

// Where element (row, column) of rows that a product of weights of this type takes lies; its tile
// is `range`.
inline void put_packed(Vec x, const Range& range, int64_t row, int64_t column, int64_t k,
                       bool half, float* packed) {
  if (half && kPairs) {
    float* at = packed + range.first * (k / 2) + column / (2 * kWords) * range.count * kWords +
                (row - range.first) * kWords;
    store((Bf16*)at + column % (2 * kWords), x);
  } else {
    store(packed + range.first * k + column / kWords * range.count * kWords +
              (row - range.first) * kWords + column % kWords,
          x);
  }
}

// --- whole products ---

alignas(64) const float kNoBias[kPanel] = {};

// c = packed rows times panel `panel` of a linear map, plus its bias, tile by tile, each followed
// by finish(its rows): c and the rows it reads are in the first-level cache then.
template <class Finish>
inline void linear_panel(const float* packed, int64_t rows, const Linear& map, int64_t panel,
                         float* c, int64_t stride, Finish finish) {
  const bool pairs = map.half && kPairs;
  const int64_t words = map.half ? map.in / 2 : map.in;
  const uint32_t* weight = (const uint32_t*)map.weight + panel * words * kPanel;
  const float* bias = map.bias ? map.bias + panel * kPanel : kNoBias;
  for (int64_t t = 0; t < tiles(rows); ++t) {
    const Range range = tile_rows(rows, t);
    const float* a = packed + range.first * (pairs ? words : map.in);
    float* out = c + range.first * stride;
    if (map.half)
      multiply_pair_rows(range.count, a, weight, words, bias, out, stride);
    else
      multiply_rows(range.count, a, (const float*)weight, kPanel, words, bias, out, stride);
    finish(range);
  }
}

// c = a W^T + b of packed rows, then finish(rows of a tile, the first of 32 columns).
template <class Finish>
inline void linear_packed(const float* packed, int64_t rows, const Linear& map, float* c,
                          int64_t c_stride, Finish finish) {
  for (int64_t panel = 0; panel < map.out / kPanel; ++panel) {
    const int64_t column = panel * kPanel;
    linear_panel(packed, rows, map, panel, c + column, c_stride,
                 [&](const Range& range) { finish(range, column); });
  }
}

// c = a W^T + b.
inline void linear(const float* a, int64_t a_stride, int64_t rows, const Linear& map,
                   float* packed, float* c, int64_t c_stride) {
  pack_rows(a, a_stride, rows, map.in, map.half, packed);
  linear_packed(packed, rows, map, c, c_stride, [](const Range&, int64_t) {});
}

}  // namespace
}  // namespace deeprec::trm
