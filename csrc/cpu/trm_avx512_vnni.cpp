#include "cpu/trm_body.h"

namespace deeprec::trm {
extern const Kernels kKernels_avx512_vnni{&scratch_floats, &history_states, &add_preference};
}  // namespace deeprec::trm
