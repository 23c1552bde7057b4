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
// Bytes widened to 16 bits, as the kernels of this set do: a multiplication and an addition.
struct Int8 {
  using Vector = __m512i;
  static constexpr double kOperations = 64;
  static Vector step(Vector sum, Vector a, Vector b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  }
};

constexpr Kernels kKernels{run_steps<Fp32>, run_steps<Fp64>, run_steps<Int8>, nullptr};

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

}  // namespace deeprec::peaks
