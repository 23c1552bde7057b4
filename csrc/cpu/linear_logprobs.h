// Log-probs of given tokens under a linear head, forward and backward, without its logits.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/allowed_rows.h"
#include "cpu/dtype.h"
#include "cpu/softmax_state.h"

namespace deeprec {

struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, columns = 0, row_stride = 0;  // stride in elements
};

struct LinearProblem {
  Matrix hidden, weight;        // [rows, size], [vocabulary, size]
  const float* bias = nullptr;  // [vocabulary], or nullptr
  const int64_t* ids = nullptr;
  const uint8_t* mask = nullptr;  // [rows], 0 = does not count; nullptr: all count
  AllowedRows allowed;
  double temperature = 1;
  int threads = 1;
};

struct LinearForward {
  float* values = nullptr;
  float* entropy = nullptr;  // or nullptr
  SoftmaxState* states = nullptr;
};

struct LinearBackward {
  const float* grad_values = nullptr;
  const float* grad_entropy = nullptr;  // or nullptr
  const float* entropy = nullptr;       // with grad_entropy
  const SoftmaxState* states = nullptr;
  void* grad_hidden = nullptr;  // of hidden's dtype, contiguous; nullptr: not wanted
  void* grad_weight = nullptr;  // of weight's dtype, contiguous; nullptr: not wanted
  float* grad_bias = nullptr;   // nullptr: not wanted
};

void linear_logprobs(const LinearProblem& problem, const LinearForward& out);
void linear_logprobs_backward(const LinearProblem& problem, const LinearBackward& io);

// --- between the driver and the kernels of one instruction set ---

// Rows that count, split by what their softmax runs over.
struct RowSplit {
  std::vector<int64_t> full, restricted;
};

// The permitted ids of the restricted rows, by token: the weight gradient's sparse part.
struct SparseGradient {
  std::vector<int64_t> starts;     // [vocabulary + 1] into the two below
  std::vector<int64_t> rows;       // of hidden, ascending for every token
  std::vector<int64_t> positions;  // in `values`
  std::vector<float> values;       // [nnz]: gradient in the logit, by position in allowed.ids
};

// Scratch memory on a 64-byte line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

struct LinearKernels {
  void (*forward)(const LinearProblem&, const LinearForward&, const RowSplit&);
  void (*backward)(const LinearProblem&, const LinearBackward&, const RowSplit&, SparseGradient&);
};

}  // namespace deeprec
