#include "cuda/logprobs.cuh"
