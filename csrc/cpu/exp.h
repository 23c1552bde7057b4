// exp(x / temperature) of x <= 0, relative error below 2^-22 where the result is normal.
#pragma once

#include <cfloat>

#include "cpu/float_vec.h"

namespace deeprec {
namespace {  // see dtype.h

// 2^n · 2^f with n the nearest integer: 2^f on [-1/2, 1/2] is 1 + f·q(f), whose minimax
// coefficients leave 1.9 · 2^-24 (2.7 · 2^-24 in float arithmetic) and make exp(0) exactly 1.
// log2(e) / temperature is split in two floats so that the reduction of x does not round.
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

  // Of a clamped argument; exactly 0 at the bound, NaN of NaN.
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

 private:
  float high_, low_, lowest_;
};

}  // namespace
}  // namespace deeprec
