// An orthogonal map that spreads a vector's energy over its dimensions, so that one large entry
// does not cost the others their resolution when they share a scale.
#pragma once

#include <cmath>
#include <cstdint>

namespace deeprec::topk {

// In place, normalised Hadamard transform of a power-of-two length.
inline void hadamard(double* v, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t i = 0; i < n; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const double a = v[j], b = v[j + half];
        v[j] = a + b;
        v[j + half] = a - b;
      }
    }
  }
  const double scale = 1.0 / std::sqrt(double(n));
  for (int64_t i = 0; i < n; ++i) v[i] *= scale;
}

// The largest power of two that fits is transformed at the front, then at the back: every
// dimension takes part, and a composition of orthogonal maps is orthogonal.
inline void rotate(double* v, int64_t dim) {
  int64_t n = 1;
  while (2 * n <= dim) n *= 2;
  hadamard(v, n);
  if (n != dim) hadamard(v + (dim - n), n);
}

}  // namespace deeprec::topk
