#include "cpu/linear_logprobs_backward_body.h"

namespace deeprec {
extern const LinearKernels kLinear_scalar{&forward, &backward};
}  // namespace deeprec
