#include "cpu/linear_logprobs_backward_body.h"

namespace deeprec {
extern const LinearKernels kLinear_amx{&forward, &backward};
}  // namespace deeprec
