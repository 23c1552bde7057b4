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
struct Int8 {
  using Vector = __m512i;
  static constexpr double kOperations = 128;
  static Vector step(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
};
struct Bfloat16 {
  using Vector = __m512;
  static constexpr double kOperations = 64;
  static Vector step(Vector sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

constexpr Kernels kKernels{run_steps<Fp32>, run_steps<Fp64>, run_steps<Int8>, run_steps<Bfloat16>};

}  // namespace

const Kernels* avx512_vnni_kernels() { return &kKernels; }

}  // namespace deeprec::peaks
