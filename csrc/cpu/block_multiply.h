// The one product linear_logprobs is made of: 32 x 32 blocks, C (+)= Σ_k A_k B_k.
//
// A block of A is [32 rows][32 k]; a block of B is [32 k][32 lanes], in bf16 with two
// consecutive k interleaved, as the dot-product instructions want it: [16 k pairs][32 lanes][2].
// C is [32 rows][32 lanes] float. Every element of C adds its products in ascending k, a few blocks
// at a time, whatever surrounds it, so results do not depend on how rows were batched.
#pragma once

#include "cpu/float_vec.h"

namespace deeprec {
namespace {  // see dtype.h

constexpr int kSide = 32;
constexpr int64_t kBlockSize = kSide * kSide;

#if defined(__AVX512BF16__)
using Element = Bf16;
#else
using Element = float;
#endif
#if defined(DEEPREC_SPLIT_FLOAT)
// A float is the sum of three bf16 to within 2^-27 of it. Of the nine products of two such sums
// the six above 2^-26 are formed, so that tiles multiply floats as exactly as float arithmetic
// does and 2.5 times as fast (Henry, Tang and Heinecke, arXiv 1904.06376).
constexpr int kParts = 3;
#else
constexpr int kParts = 1;
#endif

struct alignas(64) Packed {
  Element part[kParts][kBlockSize];
};

// A sequence of blocks along k.
struct Blocks {
  const Packed* first;
  int64_t step;  // blocks from one to the next
};

#if defined(__AMX_BF16__)

// Holds the tile registers configured on this thread: 8 tiles of 16 rows x 64 bytes.
class MultiplyScope {
 public:
  MultiplyScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~MultiplyScope() { _tile_release(); }
  MultiplyScope(const MultiplyScope&) = delete;
  MultiplyScope& operator=(const MultiplyScope&) = delete;
};

// Tiles 0-3 are the quarters of C, 4-5 the row halves of A, 6-7 the lane halves of B.
inline void load_a(const Element* x) {
  _tile_loadd(4, x, kSide * 2);
  _tile_loadd(5, x + 16 * kSide, kSide * 2);
}

inline void load_b(const Element* y) {
  _tile_loadd(6, y, kSide * 4);
  _tile_loadd(7, y + kSide, kSide * 4);
}

inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

inline void multiply(Blocks a, Blocks b, int64_t n, float* c, bool accumulate) {
  constexpr int c_row = kSide * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_row);
    _tile_loadd(1, c + 16, c_row);
    _tile_loadd(2, c + 16 * kSide, c_row);
    _tile_loadd(3, c + 16 * kSide + 16, c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < n; ++k) {
    const auto& x = a.first[k * a.step].part;
    const auto& y = b.first[k * b.step].part;
#if defined(DEEPREC_SPLIT_FLOAT)
    // Ordered so that each step loads only one side.
    load_a(x[2]), load_b(y[0]), add_products();
    load_a(x[1]), add_products();
    load_b(y[1]), add_products();
    load_a(x[0]), add_products();
    load_b(y[2]), add_products();
    load_b(y[0]), add_products();
#else
    load_a(x[0]), load_b(y[0]), add_products();
#endif
  }
  _tile_stored(0, c, c_row);
  _tile_stored(1, c + 16, c_row);
  _tile_stored(2, c + 16 * kSide, c_row);
  _tile_stored(3, c + 16 * kSide + 16, c_row);
}

#else

struct MultiplyScope {};

#if defined(__AVX512BF16__)
// One k step is a pair of bf16 in a 32-bit word.
constexpr int kSteps = kSide / 2;
using Word = uint32_t;
inline Vec multiply_add(Word x, const Word* y, Vec sum) {
  const __m512i a = _mm512_set1_epi32(int(x)), b = _mm512_loadu_si512(y);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b)};
}
#else
constexpr int kSteps = kSide;
using Word = float;
inline Vec multiply_add(Word x, const Word* y, Vec sum) { return fma(set1(x), load(y), sum); }
#endif

// The accumulators that fit the registers: 8 x 2 of 32 with AVX-512, 4 x 2 of 16 below.
constexpr int kRows = Vec::width == 16 ? 8 : 4, kColumns = 2;
// Blocks of B that stay in the first-level cache while every row passes over them. Their sum starts
// at 0 and is then added to C, which keeps rounding errors from growing along all of k. A block of
// bf16 is half as large, and its sums go through half as many steps.
#if defined(__AVX512BF16__)
constexpr int64_t kResident = 4;
#else
constexpr int64_t kResident = 2;
#endif

// Asks for the part of a block that lies where rows [row, row + kRows) of an A block do.
inline void prefetch(const Packed* block, int row) {
  const char* part = (const char*)block + sizeof(Packed) / kSide * row;
  for (size_t i = 0; i < sizeof(Packed) / kSide * kRows; i += 64) __builtin_prefetch(part + i);
}

inline void multiply(Blocks a, Blocks b, int64_t n, float* c, bool accumulate) {
  constexpr int w = Vec::width;
  for (int64_t start = 0; start < n; start += kResident) {
    const int64_t end = start + kResident < n ? start + kResident : n;
    for (int lane = 0; lane < kSide; lane += kColumns * w)
      for (int row = 0; row < kSide; row += kRows) {
        float* out = c + row * kSide + lane;
        Vec sums[kRows][kColumns];
        for (int r = 0; r < kRows; ++r)
          for (int j = 0; j < kColumns; ++j)
            sums[r][j] = set1(0.f);
        for (int64_t k = start; k < end; ++k) {
          const Word* x = (const Word*)a.first[k * a.step].part[0] + row * kSteps;
          const Word* y = (const Word*)b.first[k * b.step].part[0] + lane;
          prefetch(a.first + (k + 1) * a.step, row);
          prefetch(b.first + (k + kResident) * b.step, row);
          for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
              for (int j = 0; j < kColumns; ++j)
                sums[r][j] = multiply_add(x[r * kSteps + i], y + i * kSide + j * w, sums[r][j]);
        }
        for (int r = 0; r < kRows; ++r)
          for (int j = 0; j < kColumns; ++j) {
            float* at = out + r * kSide + j * w;
            store(at, accumulate || start ? load(at) + sums[r][j] : sums[r][j]);
          }
      }
  }
}

#endif

// --- packing: a tile of plain floats into a block ---

// Row-major, 32 x 32.
using Tile = float[kBlockSize];

#if defined(__AVX512F__)
// 16 x 16: interleaving rows r and r + 8 four times brings columns to rows.
inline void transpose_quarter(const float* in, float* out) {
  __m512i x[16], y[16];
  for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(in + r * kSide);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      y[2 * r] = _mm512_permutex2var_epi32(x[r], low, x[r + 8]);
      y[2 * r + 1] = _mm512_permutex2var_epi32(x[r], high, x[r + 8]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) x[r] = y[r];
  }
  for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + r * kSide, x[r]);
}

inline void transpose(const float* in, float* out) {
  for (int r = 0; r < kSide; r += 16)
    for (int c = 0; c < kSide; c += 16)
      transpose_quarter(in + r * kSide + c, out + c * kSide + r);
}
#else
inline void transpose(const float* in, float* out) {
  for (int r = 0; r < kSide; ++r)
    for (int c = 0; c < kSide; ++c) out[c * kSide + r] = in[r * kSide + c];
}
#endif

// Takes the nearest bf16 off every number.
inline void subtract_part(float* tile) {
  for (int i = 0; i < kBlockSize; i += Vec::width) {
    Bf16 nearest[Vec::width];
    const Vec x = load(tile + i);
    store(nearest, x);
    store(tile + i, x - load(nearest));
  }
}

// Splits a tile into the parts of a block, each written by `pack`; overwrites the tile.
template <class Pack>
inline void pack_parts(float* tile, Packed& block, Pack pack) {
  for (int part = 0; part < kParts; ++part) {
    if (part) subtract_part(tile);
    pack(tile, block.part[part]);
  }
}

// Rows are rows, columns are k. Overwrites the tile.
inline void pack_a(float* tile, Packed& block) {
  pack_parts(tile, block, [](const float* x, Element* out) {
    for (int i = 0; i < kBlockSize; i += Vec::width) store(out + i, load(x + i));
  });
}

// Rows are k, columns are lanes. Overwrites the tile.
inline void pack_b(float* tile, Packed& block) {
#if defined(__AVX512BF16__)
  pack_parts(tile, block, [](const float* x, Element* out) {
    for (int r = 0; r < kSide; r += 2)
      for (int c = 0; c < kSide; c += 16) {
        const __m256i even = (__m256i)_mm512_cvtneps_pbh(load(x + r * kSide + c).v);
        const __m256i odd = (__m256i)_mm512_cvtneps_pbh(load(x + (r + 1) * kSide + c).v);
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
        const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even), high);
        _mm512_storeu_si512(out + r * kSide + 2 * c, pairs);
      }
  });
#else
  pack_a(tile, block);
#endif
}

// A row of an A block again.
inline float sum_of_row(const Packed& block, int row) {
  Vec total = set1(0.f);
  for (int part = kParts - 1; part >= 0; --part)
    for (int c = 0; c < kSide; c += Vec::width)
      total = total + load(block.part[part] + row * kSide + c);
  return sum(total);
}

}  // namespace
}  // namespace deeprec
