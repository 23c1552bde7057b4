// The functions that exist once per instruction set, as a table (topk_ISA.cpp fills one each).
//
// The files that implement it are compiled with their set's flags, so nothing inline from
// elsewhere may end up in them: plain structs and pointers only.
#pragma once

#include "cpu/topk.h"

namespace deeprec::topk {

// Queries a scan may work on at once.
constexpr int kMaxTile = 64;
// Queries that a block is ruled out for together.
constexpr int kSubtile = 8;

struct Hit {
  uint32_t position;  // row in stored order
  int32_t query;      // within the tile
  union {
    int32_t dot;  // of the codes, offset included (scan)
    float score;  // exact (direct)
  };
};

// Queries as the scan sees them. With unsigned row codes the scan's dots are too large by
// offset = 128 * sum(query codes); a row whose dot is d in block b stays a candidate if
//   d - offset >= (threshold - shift_b) * inverse_scale * inverse_scale_b - norm * error_b
//                 - error * norm_b,
// where shift_b is the query's product with the center of the block's rows (the proof is in
// topk_encode.cpp). No row of the block can be one if norm * (norm_b + error_b) is less than the
// right-hand side, because |u.v| <= |u| |v|. kRounding covers the rounding of these lines: terms
// beyond 2^40 saturate the integer, smaller ones are good to 2^-13 each; NaN counts as a candidate.
constexpr double kRounding = 0.002;

// Every `stride`-th block from `first` on, `count` of them.
struct Strided {
  int64_t first = 0, stride = 1, count = 0;

  int64_t operator[](int64_t i) const { return first + i * stride; }
  // The first of them that is not before `block`; if there is none, one that no table has.
  int64_t next(int64_t block) const {
    const int64_t i = block <= first ? 0 : (block - first + stride - 1) / stride;
    return i < count ? first + i * stride : INT64_MAX;
  }
};

struct Tile {
  int count;       // queries in use; the fields below are defined up to a whole subtile
  int8_t* codes;   // [kMaxTile, quads * 4]; zero beyond count
  void* scratch;   // the kernels' own form of the codes: scratch_bytes(quads)
  bool packed;     // scratch is filled
  double* shift;   // [centers, shift_stride] products with every center; on a cache line
  int64_t shift_stride;
  Strided sampled;  // blocks that a scan leaves out
  alignas(64) double threshold[kMaxTile];
  alignas(64) double inverse_scale[kMaxTile];  // of the query's codes; the next three are in it
  alignas(64) double norm[kMaxTile];
  alignas(64) double error[kMaxTile];
  alignas(64) double offset[kMaxTile];
};

struct Table {
  const uint8_t* codes;
  const BlockBound* bounds;
  const int32_t* cluster;  // nullptr: all blocks have the first center
  int64_t quads;
  int64_t steps;
};

static inline const double* shifts_of(const Table& table, const Tile& tile, int64_t block) {
  return tile.shift + (table.cluster ? table.cluster[block] : 0) * tile.shift_stride;
}

struct HitBuffer {
  Hit* hits;
  int64_t capacity;
  int64_t count;
};

// Dots of the sampled blocks, dots[block][pitch][kBlockRows], and of every `lanes` disjoint sets of
// rows (a multiple of kBlockRows) the best: entry [query * lanes + lane].
struct Sample {
  int32_t* dots;      // offset included, as in Hit
  int64_t pitch;      // queries that there is room for: pitch_of(tile.count)
  int64_t lanes;
  float* score;       // approximate, in units of the query's scale; must come filled with -inf
  int32_t* position;  // where the set is not empty
};

// Matrix units write the dots of sixteen queries at a time; where queries are few, none is used.
static inline int64_t pitch_of(int count) { return count <= 4 ? count : (count + 15) / 16 * 16; }

struct Kernels {
  int (*tile)(int64_t quads);  // queries worth giving to one scan
  int64_t (*scratch_bytes)(int64_t quads);
  // Appends candidates of blocks [begin, end), but those of the sample; returns the first block
  // not done, because the buffer had no room for a whole block.
  int64_t (*scan)(const Table&, Tile&, int64_t begin, int64_t end, HitBuffer&);
  // Fills in a sample of tile.sampled.
  void (*sample)(const Table&, Tile&, const Sample&);
  // Appends candidates of sampled blocks [begin, end) as scan does, from the dots kept.
  int64_t (*collect)(const Table&, const Tile&, const Sample&, int64_t begin, int64_t end,
                     HitBuffer&);
  // Products of `count` rows of fp64 numbers with `queries`, widened and zero-padded to 8:
  // out[row * stride + query].
  void (*products)(const double* rows, int64_t count, int64_t dim, const double* const* queries,
                   int n_queries, double* out, int64_t stride);
  // Dot products of 16-bit codes at `positions` with a query like that.
  void (*fine)(const int16_t* codes, int64_t dim, const double* query, const uint32_t* positions,
               int64_t n, double* out);
  // Exact scores of rows `ids` against a query widened to fp64 and zero-padded to 8.
  void (*score)(const ItemRows&, const double* query, const uint32_t* ids, int64_t n, float* out);
  // Exact scores of positions [begin, end) against `count` queries; appends those that reach
  // their query's threshold. The buffer must have room for all.
  void (*direct)(const ItemRows&, const uint32_t* order, const double* const* queries, int count,
                 const float* thresholds, int64_t begin, int64_t end, HitBuffer&);
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* amx_kernels();
// Those of the active instruction set.
const Kernels& active_kernels();

}  // namespace deeprec::topk
