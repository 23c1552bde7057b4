#include "cpu/logprobs_body.h"

namespace deeprec {
extern const GatherKernels kGather_scalar{&forward, &backward, &exp_sum};
}  // namespace deeprec
