#include <immintrin.h>

#include "cpu/peaks.h"

namespace deeprec::peaks {
namespace {

#include "cpu/peaks_body.h"

struct Fp32 {
  using Vector = __m256;
  static constexpr double kOperations = 16;
  static Vector step(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
};
struct Fp64 {
  using Vector = __m256d;
  static constexpr double kOperations = 8;
  static Vector step(Vector sum, Vector a, Vector b) { return _mm256_fmadd_pd(a, b, sum); }
};
struct Int8 {
  using Vector = __m256i;
  static constexpr double kOperations = 64;
  static Vector step(Vector sum, Vector a, Vector b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
};

constexpr Kernels kKernels{run_steps<Fp32>, run_steps<Fp64>, run_steps<Int8>, nullptr};

}  // namespace

const Kernels* avx_vnni_kernels() { return &kKernels; }

}  // namespace deeprec::peaks
