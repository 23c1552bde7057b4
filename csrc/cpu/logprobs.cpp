#include "cpu/logprobs.h"

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/peaks.h"

namespace deeprec {

extern const GatherKernels kGather_scalar;
#if defined(__x86_64__)
extern const GatherKernels kGather_avx2, kGather_avx512;
#endif

namespace {

const GatherKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return kGather_avx512;
  if (active_isa() >= Isa::avx2) return kGather_avx2;
#endif
  return kGather_scalar;
}

}  // namespace

void gather_logprobs(const GatherProblem& p, const GatherForward& out) { kernels().forward(p, out); }

void gather_logprobs_backward(const GatherProblem& p, const GatherBackward& io) {
  advise_huge_pages(io.grad_logits, p.rows * p.vocabulary * dtype_size(p.dtype));
  kernels().backward(p, io);
}

double exp_sum_rate(double seconds, int threads) {
  return peaks::best_rate(kernels().exp_sum, seconds, threads);
}

}  // namespace deeprec
