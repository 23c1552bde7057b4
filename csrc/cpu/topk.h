// Exact top-k by inner product: what the bindings call (topk.cpp, topk_encode.cpp).
//
// An index is a view on memory that the caller owns: the item rows, and optionally a prefilter
// (8-bit codes with a proven error bound, topk_encode.cpp) that decides which rows need an exact
// score at all. The result is the same with and without it.
#pragma once

#include <cstdint>

namespace deeprec::topk {

enum class Dtype : int { f32 = 0, bf16, f16 };

struct ItemRows {
  const void* data;
  int64_t count;   // rows
  int64_t dim;     // elements of a row, contiguous
  int64_t stride;  // elements from one row to the next
  Dtype type;
};

// Rows of a block share one scale. A block is read front to back, as prefetchers want it: four
// dimensions of 32 rows fill two lines, codes[block][dim / 4][row][dim % 4], biased by 128 to be
// unsigned.
constexpr int64_t kBlockRows = 32;

// What the bound needs to know of a block, in units of the block's scale (1 / inverse_scale).
struct BlockBound {
  float inverse_scale;
  float error;  // >= max over rows of |row - decoded row|, rounding included
  float norm;   // >= max over rows of |row|
};

// The same for 16-bit codes, whose scale is finer; no norm: the query is not coded.
struct FineBound {
  float inverse_scale;
  float error;
};

struct Prefilter {
  uint8_t* codes = nullptr;          // [blocks, quads, 32, 4]
  BlockBound* bounds = nullptr;      // [blocks]
  const uint32_t* order = nullptr;   // [count] item stored at each position
  const double* center = nullptr;    // [centers, dim] one is subtracted from every row before coding
  int64_t centers = 0;
  const int32_t* cluster = nullptr;  // [blocks] which; nullptr: the first

  // A second level, for tables whose scores lie closer together than 8 bits can tell.
  int16_t* fine = nullptr;           // [count, dim] in stored order; nullptr: none
  FineBound* fine_bounds = nullptr;  // [blocks]

  // nullptr: nothing is subtracted.
  const double* center_of(int64_t block, int64_t dim) const {
    return center ? center + (cluster ? cluster[block] : 0) * dim : nullptr;
  }
};

struct Index {
  ItemRows rows;
  Prefilter filter;  // codes == nullptr: none
};

// Items not to be returned, per query: ids[offsets[b] .. offsets[b + 1]) ascending.
struct Exclusions {
  const int64_t* offsets = nullptr;  // nullptr: none
  const int64_t* ids = nullptr;
};

struct Request {
  const float* queries;  // [count, dim], contiguous
  int64_t count;
  int64_t k;
  Exclusions exclude;
  int threads;
};

struct Answer {
  float* values;      // [count, k] descending; -inf where fewer than k items are left
  int64_t* indices;   // [count, k]; -1 where fewer than k items are left
  int64_t* rescored;  // [count] exact scores computed for each query
  int64_t* refined = nullptr;  // [count] scores by 16-bit codes, if wanted
};

void search(const Index& index, const Request& request, const Answer& answer);

// --- building an index (topk_encode.cpp) ---

// How many groups of four dimensions a code row has, for rows of `dim` elements. They are split
// into `steps` equal parts of at most 16, the depth of a matrix-unit tile.
struct CodeShape {
  int64_t quads;
  int64_t steps;
};
inline CodeShape code_shape(int64_t dim) {
  const int64_t quads = (dim + 3) / 4, steps = (quads + 15) / 16;
  return {(quads + steps - 1) / steps * steps, steps};
}

// |row - center| of every row in fp64 (center may be null); not finite where the row is not.
void row_norms(const ItemRows& rows, const double* center, double* norms, int threads);

// Rows divided by their fp64 norm (lanes as in the score) and rounded to fp32. The row must not
// be zero.
void normalize_rows(const ItemRows& rows, float* out, int threads);

// Codes and bounds of `blocks` (of every block when null).
void encode_blocks(const ItemRows& rows, const Prefilter& filter, const int64_t* blocks,
                   int64_t n_blocks, int threads);

}  // namespace deeprec::topk
