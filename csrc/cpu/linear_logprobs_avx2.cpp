#include "cpu/linear_logprobs_backward_body.h"

namespace deeprec {
extern const LinearKernels kLinear_avx2{&forward, &backward};
}  // namespace deeprec
