// What the preference-aware TRM does to single rows of floats.
#pragma once

#include "cpu/exp.h"
#include "cpu/trm_gemm.h"

namespace deeprec::trm {
namespace {  // see dtype.h

#if defined(__AVX512F__)
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
#elif defined(__AVX2__)
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
#else
inline Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
#endif

// x Φ(x). Φ - 1/2 = x p(2 x² / A² - 1) with a minimax p, |error| < 2e-7 |x|; beyond A = 5.2 Φ is
// 0 or 1 to float accuracy.
constexpr float kPhi[14] = {-0x1.f8a21cp-12f, 0x1.4c87c4p-10f, -0x1.40396ep-10f, 0x1.d7e5c2p-10f,
                            -0x1.39d976p-8f,  0x1.187e04p-7f,  -0x1.99c4eap-7f,  0x1.262be2p-6f,
                            -0x1.95125ep-6f,  0x1.060fcep-5f,  -0x1.471ae8p-5f,  0x1.99cd06p-5f,
                            -0x1.157a62p-4f,  0x1.166cf4p-3f};
inline Vec gelu(Vec x) {
  constexpr float kScale = float(-2 / (5.2 * 5.2));
  const Vec t = min(set1(1.f), fma(x * x, set1(-kScale), set1(-1.f)));
  Vec p = set1(kPhi[0]);
#pragma GCC unroll 13
  for (int i = 1; i < 14; ++i) p = fma(p, t, set1(kPhi[i]));
  const Vec half = set1(.5f), q = max(set1(-.5f), min(half, x * p));
  return x * (q + half);
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vec total = set1(0.f);
  for (int64_t i = 0; i < n; i += Vec::width) total = fma(load(a + i), load(b + i), total);
  return sum(total);
}

inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

// out = LayerNorm(x); padded columns of x are 0, and those of `out` as well.
inline void layer_norm(const Model& m, const float* x, const Norm& norm, const float* valid,
                       float* out) {
  Vec total = set1(0.f);
  for (int64_t i = 0; i < m.width; i += Vec::width) total = total + load(x + i);
  const Vec mean = set1(sum(total) / float(m.hidden));
  Vec squares = set1(0.f);
  for (int64_t i = 0; i < m.width; i += Vec::width) {
    const Vec centred = (load(x + i) - mean) * load(valid + i);
    squares = fma(centred, centred, squares);
  }
  const Vec scale = set1(1.f / std::sqrt(sum(squares) / float(m.hidden) + m.eps));
  for (int64_t i = 0; i < m.width; i += Vec::width)
    store(out + i, fma((load(x + i) - mean) * scale, load(norm.weight + i), load(norm.bias + i)));
}

// Softmax of n scores, padded to whole vectors by -inf.
inline void softmax(float* x, int64_t n) {
  const ScaledExp exp(1.0);
  Vec top = load(x);
  for (int64_t i = Vec::width; i < n; i += Vec::width) top = max(top, load(x + i));
  const Vec highest = set1(maximum(top));
  Vec total = set1(0.f);
  for (int64_t i = 0; i < n; i += Vec::width) {
    const Vec e = exp(exp.clamp(load(x + i) - highest));
    store(x + i, e);
    total = total + e;
  }
  const Vec scale = set1(1.f / sum(total));
  for (int64_t i = 0; i < n; i += Vec::width) store(x + i, load(x + i) * scale);
}

// c += row, a residual connection.
inline void add(float* c, const float* row, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::width) store(c + i, load(c + i) + load(row + i));
}

}  // namespace
}  // namespace deeprec::trm
