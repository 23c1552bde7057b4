#include "cpu/trm_body.h"

namespace deeprec::trm {
extern const Kernels kKernels_avx512{&scratch_floats, &history_states, &add_preference};
}  // namespace deeprec::trm
