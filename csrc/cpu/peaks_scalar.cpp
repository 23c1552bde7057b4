#include "cpu/peaks.h"

namespace deeprec::peaks {
namespace {

#include "cpu/peaks_body.h"

struct Fp32 {
  using Vector = float;
  static constexpr double kOperations = 2;
  static Vector step(Vector sum, Vector a, Vector b) { return sum + a * b; }
};
struct Fp64 {
  using Vector = double;
  static constexpr double kOperations = 2;
  static Vector step(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

constexpr Kernels kKernels{run_steps<Fp32>, run_steps<Fp64>, nullptr, nullptr};

}  // namespace

const Kernels* scalar_kernels() { return &kKernels; }

}  // namespace deeprec::peaks
