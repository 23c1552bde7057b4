// Token log-probs under a linear head on CUDA devices, without its logits. Problems are those of
// the CPU with pointers to device memory. Nothing is allocated, nothing synchronises: which rows
// count, and how many, is read on the device.
#pragma once

#include "cpu/linear_logprobs.h"

namespace deeprec::cuda {

// `mask` and `threads` mean nothing. Results of rows that do not count are left as they are.
struct OrderedProblem : LinearProblem {
  // Rows of hidden: those with a full softmax, then the restricted ones, then the rest.
  const int64_t* order = nullptr;   // [rows]
  const int64_t* counts = nullptr;  // [2]: full, restricted
};

// The permitted ids of the restricted rows by token, rows ascending for every token: the weight
// gradient's sparse part.
struct ByToken {
  const int64_t* starts = nullptr;     // [vocabulary + 1] into the two below; null: no such rows
  const int64_t* rows = nullptr;       // of hidden
  const int64_t* positions = nullptr;  // in allowed.ids
};

// Gradients of the bias start as zeros.
struct OrderedBackward : LinearBackward {
  ByToken by_token;
  int64_t permitted = 0;  // length of allowed.ids
};

// Bytes of workspace: bounded by slices of the vocabulary and chunks of rows, not by their product.
int64_t linear_forward_workspace(const OrderedProblem& problem);
int64_t linear_backward_workspace(const OrderedProblem& problem, const OrderedBackward& io);

// At least one row.
void linear_logprobs(const OrderedProblem& problem, const LinearForward& out, void* workspace,
                     void* stream);
void linear_logprobs_backward(const OrderedProblem& problem, const OrderedBackward& io,
                              void* workspace, void* stream);

}  // namespace deeprec::cuda
