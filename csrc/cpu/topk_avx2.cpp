#include <immintrin.h>

#include "cpu/topk_kernels.h"

namespace deeprec::topk {
namespace {

#include "cpu/topk_items.h"
#include "cpu/topk_lanes_avx2.h"
#include "cpu/topk_pairs.h"

struct Unit {
  using Vector = __m256i;
  struct Items {
    __m256i even, odd;
  };
  struct Query {
    __m256i even, odd;
  };
  static constexpr int kRows = 8, kVectors = 2, kQueries = 4, kScratch = 2;

  static void pack(int64_t quads, Tile& tile) { pack_pairs(quads, tile); }
  static Vector zero() { return _mm256_setzero_si256(); }
  static Items items(const uint8_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)};
  }
  static Query query(const Tile& tile, int64_t quads, int j, int64_t quad) {
    const int32_t* pairs = pairs_of(tile, quads, j, quad);
    return {_mm256_set1_epi32(pairs[0]), _mm256_set1_epi32(pairs[1])};
  }
  static Vector add(Vector sum, const Items& x, const Query& q) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.even, q.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x.odd, q.odd));
  }
  static uint32_t reach(Vector sum, int32_t need) {
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(need), sum);
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(below))) ^ 0xff;
  }
  static void store(int32_t* p, Vector x) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), x);
  }
};

#include "cpu/topk_dots.h"
#include "cpu/topk_body.h"

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

}  // namespace deeprec::topk
