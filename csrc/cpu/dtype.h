// The stored number formats and their exact scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace deeprec {

enum class DType : int { f32 = 0, bf16, f16 };

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline int64_t dtype_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Unnamed: every translation unit keeps the copy compiled with its own instruction set.
namespace {

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) { return as_float(uint32_t(x.bits) << 16); }

inline float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifted into place a float16 reads 2^-112 times its value, subnormals included.
  return as_float(sign | as_bits(as_float(magnitude << 13) * as_float(0x77800000u)));
}

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, Bf16* out) {
  const uint32_t bits = as_bits(x);
  out->bits = x != x ? 0x7fc0u : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void from_float(float x, F16* out) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal's bits
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

}  // namespace
}  // namespace deeprec
