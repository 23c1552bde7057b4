// Token log-probs on CUDA devices; the problems are those of the CPU, with pointers to device
// memory. Nothing is allocated, nothing synchronises.
#pragma once

#include "cpu/logprobs.h"

namespace deeprec::cuda {

// `row_offsets` may be null here: rows are contiguous then. `threads` means nothing.
void gather_logprobs(const GatherProblem& problem, const GatherForward& out, void* stream);
void gather_logprobs_backward(const GatherProblem& problem, const GatherBackward& io, void* stream);

}  // namespace deeprec::cuda
