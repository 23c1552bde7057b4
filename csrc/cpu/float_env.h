// Exact results need subnormals and rounding to nearest, whatever the calling thread has set
// (torch.set_flush_denormal, libraries built with -ffast-math).
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace deeprec {

class DefaultFloatEnv {
 public:
#if defined(__x86_64__)
  DefaultFloatEnv() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnv() { _mm_setcsr(saved_); }
  DefaultFloatEnv(const DefaultFloatEnv&) = delete;
  DefaultFloatEnv& operator=(const DefaultFloatEnv&) = delete;

 private:
  unsigned saved_;
#else
  DefaultFloatEnv() {}
  ~DefaultFloatEnv() {}
#endif
};

}  // namespace deeprec
