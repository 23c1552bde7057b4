#include "cpu/logprobs.h"

#include "cpu/isa.h"

namespace deeprec {

extern const GatherKernels kGather_scalar;
#if defined(__x86_64__)
extern const GatherKernels kGather_avx2, kGather_avx512;
#endif

const GatherKernels& gather_kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return kGather_avx512;
  if (active_isa() >= Isa::avx2) return kGather_avx2;
#endif
  return kGather_scalar;
}

}  // namespace deeprec
