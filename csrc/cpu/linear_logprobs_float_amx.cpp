#define DEEPREC_SPLIT_FLOAT
#include "cpu/linear_logprobs_backward_body.h"

namespace deeprec {
extern const LinearKernels kLinearFloat_amx{&forward, &backward};
}  // namespace deeprec
