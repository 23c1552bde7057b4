// Log-probs of given tokens under logits, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/allowed_rows.h"
#include "cpu/dtype.h"
#include "cpu/softmax_state.h"

namespace deeprec {

struct GatherProblem {
  const void* logits = nullptr;
  DType dtype = DType::f32;
  const int64_t* row_offsets = nullptr;  // [rows], in elements; nullptr: rows are contiguous
  int64_t rows = 0, vocabulary = 0, ids_per_row = 0;
  const int64_t* ids = nullptr;  // [rows, ids_per_row]
  const uint8_t* mask = nullptr;  // [rows], 0 = does not count; nullptr: all count
  AllowedRows allowed;
  double temperature = 1;
  int threads = 1;
};

struct GatherForward {
  float* values = nullptr;         // [rows, ids_per_row]
  float* entropy = nullptr;        // [rows], or nullptr
  SoftmaxState* states = nullptr;  // [rows]
};

struct GatherBackward {
  const float* grad_values = nullptr;   // [rows, ids_per_row]
  const float* grad_entropy = nullptr;  // [rows], or nullptr
  const float* entropy = nullptr;       // [rows], with grad_entropy
  const SoftmaxState* states = nullptr;
  void* grad_logits = nullptr;  // [rows, vocabulary], contiguous, of the logits' dtype
};

void gather_logprobs(const GatherProblem& problem, const GatherForward& out);
void gather_logprobs_backward(const GatherProblem& problem, const GatherBackward& io);

// Exponentials a second when the logits wait in the first-level cache: what gather_logprobs could
// do if memory cost nothing. A yardstick, like those of peaks.h.
double exp_sum_rate(double seconds, int threads);

// Of one instruction set.
struct GatherKernels {
  void (*forward)(const GatherProblem&, const GatherForward&);
  void (*backward)(const GatherProblem&, const GatherBackward&);
  double (*exp_sum)(int64_t rounds);  // returns its exponentials
};

}  // namespace deeprec
