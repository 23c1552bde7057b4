#include <immintrin.h>

#include "cpu/peaks.h"

namespace deeprec::peaks {
namespace {

#include "cpu/peaks_body.h"

struct Fp32 {
  using Vector = __m512;
  static constexpr double kOperations = 32;
  static Vector step(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};
struct Fp64 {
  using Vector = __m512d;
  static constexpr double kOperations = 16;
  static Vector step(Vector sum, Vector a, Vector b) { return _mm512_fmadd_pd(a, b, sum); }
};
struct alignas(64) Config {
  unsigned char palette, start_row, reserved[14];
  unsigned short bytes[16];
  unsigned char rows[16];
};

// Four tiles of sums from two left and two right tiles, all zero: the values do not matter.
template <class Multiply>
double run_tiles(int64_t rounds) {
  Config config{};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = 16;
    config.bytes[t] = 64;
  }
  // GCC 12 thinks that the next line reads eight bytes, and would drop the other stores.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < rounds; ++i) Multiply::four();
  _tile_release();
  return double(rounds) * 4 * Multiply::kOperations;
}

struct Int8 {
  static constexpr double kOperations = 2 * 16 * 16 * 64;
  static void four() {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
};
struct Bfloat16 {
  static constexpr double kOperations = 2 * 16 * 16 * 32;
  static void four() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

constexpr Kernels kKernels{run_steps<Fp32>, run_steps<Fp64>, run_tiles<Int8>, run_tiles<Bfloat16>};

}  // namespace

const Kernels* amx_kernels() { return &kKernels; }

}  // namespace deeprec::peaks
