#include "cpu/logprobs_body.h"

namespace deeprec {
extern const GatherKernels kGather_avx512{&forward, &backward, &exp_sum};
}  // namespace deeprec
