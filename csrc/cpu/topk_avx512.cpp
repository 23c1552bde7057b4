#include <immintrin.h>

#include "cpu/topk_kernels.h"

namespace deeprec::topk {
namespace {

#include "cpu/topk_items.h"
#include "cpu/topk_lanes_avx512.h"
#include "cpu/topk_pairs.h"

struct Unit {
  using Vector = __m512i;
  struct Items {
    __m512i even, odd;
  };
  struct Query {
    __m512i even, odd;
  };
  static constexpr int kRows = 16, kVectors = 2, kQueries = 8, kScratch = 2;

  static void pack(int64_t quads, Tile& tile) { pack_pairs(quads, tile); }
  static Vector zero() { return _mm512_setzero_si512(); }
  static Items items(const uint8_t* p) {
    const __m512i x = _mm512_loadu_si512(p);
    return {_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8)};
  }
  static Query query(const Tile& tile, int64_t quads, int j, int64_t quad) {
    const int32_t* pairs = pairs_of(tile, quads, j, quad);
    return {_mm512_set1_epi32(pairs[0]), _mm512_set1_epi32(pairs[1])};
  }
  static Vector add(Vector sum, const Items& x, const Query& q) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x.even, q.even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(x.odd, q.odd));
  }
  static uint32_t reach(Vector sum, int32_t need) {
    return _mm512_cmpge_epi32_mask(sum, _mm512_set1_epi32(need));
  }
  static void store(int32_t* p, Vector x) { _mm512_store_si512(p, x); }
};

#include "cpu/topk_dots.h"
#include "cpu/topk_body.h"

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

}  // namespace deeprec::topk
