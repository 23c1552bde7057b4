#include "cpu/linear_logprobs_backward_body.h"

namespace deeprec {
extern const LinearKernels kLinear_avx512{&forward, &backward};
}  // namespace deeprec
