#include "cuda/linear_logprobs.cuh"
#include "cuda/linear_logprobs_backward.cuh"
