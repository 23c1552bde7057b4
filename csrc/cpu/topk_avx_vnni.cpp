#include <immintrin.h>

#include "cpu/topk_kernels.h"

namespace deeprec::topk {
namespace {

#include "cpu/topk_items.h"
#include "cpu/topk_lanes_avx2.h"

struct Unit {
  using Vector = __m256i;
  using Items = __m256i;
  using Query = __m256i;
  static constexpr int kRows = 8, kVectors = 2, kQueries = 4, kScratch = 0;

  static void pack(int64_t, Tile&) {}
  static Vector zero() { return _mm256_setzero_si256(); }
  static Items items(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Query query(const Tile& tile, int64_t quads, int j, int64_t quad) {
    int32_t codes;
    __builtin_memcpy(&codes, tile.codes + (j * quads + quad) * 4, sizeof codes);
    return _mm256_set1_epi32(codes);
  }
  static Vector add(Vector sum, Items x, Query q) { return _mm256_dpbusd_avx_epi32(sum, x, q); }
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

const Kernels* avx_vnni_kernels() { return &kKernels; }

}  // namespace deeprec::topk
