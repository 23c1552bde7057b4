#include "cpu/logprobs_body.h"

namespace deeprec {
extern const GatherKernels kGather_avx2{&forward, &backward, &exp_sum};
}  // namespace deeprec
