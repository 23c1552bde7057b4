// mma.sync: fragment layouts of the PTX ISA ("Matrix Fragments for mma.m16n8k8 / k16 / k32").
//
// Lane l is member t = l % 4 of group g = l / 4. A register holds kPack elements. For every type
// here, A's registers are (row g | g + 8) x (elements t kPack … | the second half of k), B's the
// two halves of k of column g, and C's rows g and g + 8 of columns 2 t and 2 t + 1.
#pragma once

#include <cmath>

#include "cpu/dtype.h"
#include "warp.h"

namespace emulator {

struct Bf16Pair {
  static constexpr int kPack = 2;
  static double a(uint32_t word, int i) {
    return deeprec::to_float(deeprec::Bf16{uint16_t(word >> 16 * i)});
  }
  static double b(uint32_t word, int i) { return a(word, i); }
};
struct F16Pair {
  static constexpr int kPack = 2;
  static double a(uint32_t word, int i) {
    return deeprec::to_float(deeprec::F16{uint16_t(word >> 16 * i)});
  }
  static double b(uint32_t word, int i) { return a(word, i); }
};
struct Tf32 {  // the lower 13 bits are not read
  static constexpr int kPack = 1;
  static double a(uint32_t word, int) { return deeprec::as_float(word & ~0x1fffu); }
  static double b(uint32_t word, int i) { return a(word, i); }
};
struct S8 {
  static constexpr int kPack = 4;
  static int64_t a(uint32_t word, int i) { return int8_t(word >> 8 * i); }
  static int64_t b(uint32_t word, int i) { return int8_t(word >> 8 * i); }
};
struct U8S8 {
  static constexpr int kPack = 4;
  static int64_t a(uint32_t word, int i) { return uint8_t(word >> 8 * i); }
  static int64_t b(uint32_t word, int i) { return int8_t(word >> 8 * i); }
};

// Tensor cores add the products with more bits than fp32 and then truncate (Fasi et al.,
// "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021). So do we: kernels must not rely on
// rounding to nearest. What the hardware keeps of small terms varies; tests have tolerances.
inline float truncated(double x) {
  const float nearest = float(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}
inline void finish(double sum, float* out) { *out = truncated(sum); }
inline void finish(int64_t sum, int32_t* out) { *out = int32_t(uint32_t(sum)); }  // wraps

template <class Type, class Scalar>
void mma(const char* what, Scalar (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const Site& site) {
  constexpr int kPack = Type::kPack, kDepth = 8 * kPack;
  struct In {
    uint32_t a[4], b[2];
    Scalar c[4];
  };
  struct Out {
    Scalar d[4];
  };
  In in;
  std::memcpy(in.a, a, sizeof a);
  std::memcpy(in.b, b, sizeof b);
  std::memcpy(in.c, d, sizeof d);
  const Out out = collective<Out>(~0u, what, site, in, [](Lanes ins, Lanes outs) {
    using Wide = decltype(Type::a(0, 0));
    Wide left[16][kDepth], right[8][kDepth];
    for (int l = 0; l < 32; ++l) {
      const In& x = at<In>(ins[l]);
      const int g = l / 4, t = l % 4;
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < kPack; ++i) {
          const int k = (half * 4 + t) * kPack + i;
          left[g][k] = Type::a(x.a[2 * half], i);
          left[g + 8][k] = Type::a(x.a[2 * half + 1], i);
          right[g][k] = Type::b(x.b[half], i);
        }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        Wide sum = Wide(at<In>(ins[l]).c[i]);
        for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[column][k];
        finish(sum, &at<Out>(outs[l]).d[i]);
      }
  });
  std::memcpy(d, out.d, sizeof d);
}

}  // namespace emulator
