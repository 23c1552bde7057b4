// exp(x / temperature) of x <= 0, relative error below 2^-22 where the result is normal.
//
// log2(e) / temperature is split in two floats so that the reduction of x does not round.
#pragma once

#include <cfloat>

#include "cpu/float_vec.h"

namespace deeprec {
namespace {  // see dtype.h

class ScaledExp {
 public:
  explicit ScaledExp(double temperature) {
    const double factor = 1.4426950408889634 / temperature;
    high_ = float(factor);
    low_ = float(factor - double(high_));
    // At this x the result is 0; below it the reduction would overflow.
    lowest_ = float(double(kZeroExponent) / factor);
  }

  // x, or the bound below which exp is 0 anyway (finite, so that 0 · x stays 0); NaN stays.
  Vec clamp(Vec x) const { return max(set1(lowest_), x); }

#if defined(__AVX512F__)

  // Of a clamped argument; exactly 0 at the bound, exactly 1 at 0, NaN of NaN.
  Vec operator()(Vec x) const {
    const Reduced r = reduce(x);
    return polynomial(fma(x, set1(low_), r.rest)) * r.power;
  }

  // sum + exp of a clamped argument, for softmax denominators: without `low`, whose absence costs
  // |x / temperature| · 2^-25 of a term that is itself exp(x / temperature) of the largest.
  Vec add(Vec x, Vec sum) const {
    const Reduced r = reduce(x);
    return fma(polynomial(r.rest), r.power, sum);
  }

  // The same sum, and the term that entropy needs by itself.
  Vec add(Vec x, Vec sum, Vec& term) const {
    const Reduced r = reduce(x);
    const Vec fraction = polynomial(r.rest);
    term = fraction * r.power;
    return fma(fraction, r.power, sum);
  }

 private:
  // x · log2(e) / temperature = k / 32 + rest; 2^(k / 32) is one of 32 numbers, held in two
  // registers, times a power of two. |rest| <= 1/64 leaves a parabola for 2^rest.
  struct Reduced {
    Vec rest, power;
  };

  Reduced reduce(Vec x) const {
    // Adding 1.5 · 2^18 rounds to multiples of 1/32 and leaves k's low bits as the mantissa's.
    const Vec magic = set1(393216.f), shifted = fma(x, set1(high_), magic), k = shifted - magic;
    const __m512 root = _mm512_permutex2var_ps(_mm512_load_ps(kRoots),
                                               _mm512_castps_si512(shifted.v),
                                               _mm512_load_ps(kRoots + 16));
    return {fms(x, set1(high_), k), scale({root}, k)};
  }

  // Minimax with 2^0 = 1: 0.9 · 2^-24, 2.5 · 2^-24 with the roundings of the root and the product.
  static Vec polynomial(Vec f) {
    return fma(fma(f, set1(0x1.ebfbdep-3f), set1(0x1.62e584p-1f)), f, set1(1.f));
  }

  alignas(64) static constexpr float kRoots[32] = {
      0x1p+0f,        0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f,
      0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9ep+0f,  0x1.306fep+0f,  0x1.371a74p+0f,
      0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f,
      0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f,
      0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f,
      0x1.b7f77p+0f,  0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
      0x1.ea4afap+0f, 0x1.f50766p+0f};

#else

  // 2^n · 2^f with n the nearest integer: 2^f on [-1/2, 1/2] is 1 + f·q(f), whose minimax
  // coefficients leave 1.9 · 2^-24 (2.7 · 2^-24 in float arithmetic) and make exp(0) exactly 1.
  Vec operator()(Vec x) const {
    const Vec high = set1(high_), n = round(x * high);
    const Vec f = fma(x, set1(low_), fms(x, high, n));
    Vec p = set1(0x1.5bba14p-10f);
    p = fma(p, f, set1(0x1.3cea88p-7f));
    p = fma(p, f, set1(0x1.c6b752p-5f));
    p = fma(p, f, set1(0x1.ebf9bcp-3f));
    p = fma(p, f, set1(0x1.62e42ap-1f));
    return scale(fma(p, f, set1(1.f)), n);
  }

  Vec add(Vec x, Vec sum) const { return sum + (*this)(x); }
  Vec add(Vec x, Vec sum, Vec& term) const { return sum + (term = (*this)(x)); }

 private:
#endif

  float high_, low_, lowest_;
};

}  // namespace
}  // namespace deeprec
