#pragma once

namespace deeprec {

// What the backward pass needs of a row: its largest logit and Σ exp((x - largest) / T).
struct SoftmaxState {
  float largest, sum;
};

}  // namespace deeprec
