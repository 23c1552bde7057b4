// Softmax of a row seen piece by piece: what a thread keeps of it, and how pieces are joined.
//
// With m the largest logit so far and d = z - m: sum = Σ exp(d / T) and weighted = Σ d·exp(d / T).
// Then log p = d / T - log sum and the entropy is log sum - weighted / (sum·T): both of its terms
// are >= 0, so nothing cancels. NaN and +inf make the sums NaN, -inf adds nothing.
#pragma once

#include <cfloat>
#include <limits>

#include "cpu/softmax_state.h"
#include "cuda/ptx.cuh"

namespace deeprec::cuda {

// exp(d / T) of d <= 0.
struct ScaledExp {
  float inverse, lowest;

  // exp(-104) is 0 in float. A finite bound keeps 0·d at 0.
  static ScaledExp of(double temperature) {
    return {float(1.0 / temperature), float(-104.0 * temperature)};
  }
  __device__ float clamp(float d) const { return d < lowest ? lowest : d; }  // NaN stays
  __device__ float operator()(float d) const { return expf(d * inverse); }   // of a clamped d
};

struct PartialSoftmax {
  float largest = -FLT_MAX, sum = 0, weighted = 0;

  // kCount logits at once: one change of the largest for all of them.
  template <bool kEntropy, int kCount>
  __device__ void add(const float (&z)[kCount], const ScaledExp& exp) {
    float top = largest;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, z[i]);
    raise<kEntropy>(top, exp);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float d = exp.clamp(z[i] - largest), e = exp(d);
      sum += e;
      if (kEntropy) weighted = fmaf(e, d, weighted);
    }
  }

  // The same two pieces give the same bits in either order of the arguments.
  template <bool kEntropy>
  __device__ void join(PartialSoftmax other, const ScaledExp& exp) {
    const float top = fmaxf(largest, other.largest);
    raise<kEntropy>(top, exp);
    other.template raise<kEntropy>(top, exp);
    sum += other.sum;
    weighted += other.weighted;
  }

 private:
  template <bool kEntropy>
  __device__ void raise(float top, const ScaledExp& exp) {
    if (!(top > largest)) return;
    const float shift = exp.clamp(largest - top), ratio = exp(shift);
    if (kEntropy) weighted = ratio * fmaf(sum, shift, weighted);
    sum *= ratio;
    largest = top;
  }
};

template <bool kEntropy>
__device__ PartialSoftmax join_lanes(PartialSoftmax softmax, int width, const ScaledExp& exp) {
  for (int distance = width / 2; distance; distance /= 2) {
    PartialSoftmax other;
    other.largest = __shfl_xor_sync(kFullWarp, softmax.largest, distance);
    other.sum = __shfl_xor_sync(kFullWarp, softmax.sum, distance);
    if (kEntropy) other.weighted = __shfl_xor_sync(kFullWarp, softmax.weighted, distance);
    softmax.join<kEntropy>(other, exp);
  }
  return softmax;
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Log-prob of a logit of the row; NaN when the row has no softmax.
__device__ inline float logprob(const PartialSoftmax& softmax, float z, double temperature) {
  if (softmax.sum == 0) return kNaN;
  return float((double(z) - double(softmax.largest)) / temperature - log(double(softmax.sum)));
}

__device__ inline float entropy(const PartialSoftmax& softmax, double temperature) {
  if (softmax.sum == 0) return kNaN;
  const double sum = softmax.sum;
  return float(log(sum) - double(softmax.weighted) / (sum * temperature));
}

// The gradient in a logit is e·(a + b·d), plus the incoming gradient / T at the row's own tokens,
// where d = z - largest and e = exp(d / T): p = e / sum, and dH/dz = -p (log p + H).
struct RowGradient {
  float largest, a, b;

  __device__ static RowGradient of(SoftmaxState state, double grad_values, double grad_entropy,
                                   double entropy, double temperature) {
    const double sum = state.sum, per_e = -1 / (sum * temperature);
    const double rest = grad_entropy ? grad_entropy * (entropy - log(sum)) : 0;
    return {state.largest, float(per_e * (grad_values + rest)),
            float(per_e * grad_entropy / temperature)};
  }
  __device__ float operator()(float z, const ScaledExp& exp) const {
    const float d = exp.clamp(z - largest);
    return exp(d) * fmaf(b, d, a);
  }
};

}  // namespace deeprec::cuda
