// Body of gather_logprobs, included once by the source of every instruction set.
#pragma once

#include <cmath>

#include "cpu/logprobs.h"
#include "cpu/row_softmax.h"

namespace deeprec {
namespace {  // see dtype.h

inline bool counts(const GatherProblem& p, int64_t row) { return !p.mask || p.mask[row]; }

template <class T>
const T* logits_row(const GatherProblem& p, int64_t row) {
  return static_cast<const T*>(p.logits) + (p.row_offsets ? p.row_offsets[row] : row * p.vocabulary);
}

// The permitted ids of a row; empty when it is unrestricted.
struct Permitted {
  const int64_t* begin = nullptr;
  const int64_t* end = nullptr;

  Permitted(const AllowedRows& allowed, int64_t row) {
    if (!allowed.offsets) return;
    begin = allowed.ids + allowed.offsets[row];
    end = allowed.ids + allowed.offsets[row + 1];
  }
  bool restricts() const { return begin != end; }
  bool contains(int64_t id) const {
    const int64_t *low = begin, *high = end;  // ascending ids
    while (low < high) {
      const int64_t* middle = low + (high - low) / 2;
      if (*middle < id) low = middle + 1; else high = middle;
    }
    return low < end && *low == id;
  }
};

template <bool kEntropy, class T>
RowSoftmax softmax_of(const GatherProblem& p, const T* x, const Permitted& permitted) {
  RowSoftmax softmax(p.temperature);
  if (permitted.restricts()) {
    float block[kBlock];
    for (const int64_t* id = permitted.begin; id < permitted.end;) {
      int64_t n = 0;
      while (n < kBlock && id < permitted.end) block[n++] = to_float(x[*id++]);
      softmax.add<kEntropy>(block, n);
    }
    return softmax;
  }
  for (int64_t start = 0; start < p.vocabulary; start += kBlock) {
    const int64_t left = p.vocabulary - start;
    softmax.add<kEntropy, kAhead>(x + start, left < kBlock ? left : kBlock);
  }
  return softmax;
}

template <bool kEntropy, class T>
void forward_row(const GatherProblem& p, const GatherForward& out, int64_t row) {
  float* values = out.values + row * p.ids_per_row;
  if (!counts(p, row)) {
    for (int64_t k = 0; k < p.ids_per_row; ++k) values[k] = 0;
    if (kEntropy) out.entropy[row] = 0;
    out.states[row] = {0, 1};
    return;
  }
  const T* x = logits_row<T>(p, row);
  const Permitted permitted(p.allowed, row);
  const RowSoftmax softmax = softmax_of<kEntropy>(p, x, permitted);
  const int64_t* ids = p.ids + row * p.ids_per_row;
  for (int64_t k = 0; k < p.ids_per_row; ++k) {
    const bool possible = !permitted.restricts() || permitted.contains(ids[k]);
    values[k] = softmax.logprob(possible ? to_float(x[ids[k]]) : -INFINITY);
  }
  if (kEntropy) out.entropy[row] = softmax.entropy();
  out.states[row] = softmax.state();
}

// The gradient in a logit is e·(a + b·d) plus the incoming gradients of its own token / T, where
// d = x - largest and e = exp(d / T): p = e / s, and dH/dz = -p (log p + H).
struct RowGradient {
  float a, b;

  RowGradient(double grad_values, double grad_entropy, double entropy, double sum,
              double temperature) {
    const double per_e = -1 / (sum * temperature);
    a = float(per_e * (grad_values + (grad_entropy ? grad_entropy * (entropy - std::log(sum)) : 0)));
    b = float(per_e * grad_entropy / temperature);
  }
  Vec operator()(Vec e, Vec d) const { return e * fma(set1(b), d, set1(a)); }
};

template <class T>
void backward_row(const GatherProblem& p, const GatherBackward& in, const ScaledExp& exp,
                  int64_t row) {
  constexpr int w = Vec::width;
  T* out = static_cast<T*>(in.grad_logits) + row * p.vocabulary;
  const Permitted permitted(p.allowed, row);
  if (!counts(p, row) || permitted.restricts())
    std::memset(static_cast<void*>(out), 0, size_t(p.vocabulary) * sizeof(T));
  if (!counts(p, row)) return;

  const T* x = logits_row<T>(p, row);
  const int64_t* ids = p.ids + row * p.ids_per_row;
  const float* grads = in.grad_values + row * p.ids_per_row;
  const auto possible = [&](int64_t id) { return !permitted.restricts() || permitted.contains(id); };
  double total = 0;
  for (int64_t k = 0; k < p.ids_per_row; ++k) total += double(grads[k]);
  const SoftmaxState state = in.states[row];
  const RowGradient gradient(total, in.grad_entropy ? in.grad_entropy[row] : 0,
                             in.grad_entropy ? in.entropy[row] : 0, state.sum, p.temperature);
  const Vec largest = set1(state.largest);
  const auto at = [&](Vec value) {
    const Vec d = exp.clamp(value - largest);
    return gradient(exp(d), d);
  };
  const auto at_one = [&](int64_t id) {
    float lanes[w];
    store(lanes, at(set1(to_float(x[id]))));
    return lanes[0];
  };

  if (permitted.restricts()) {
    for (const int64_t* id = permitted.begin; id < permitted.end; ++id)
      from_float(at_one(*id), out + *id);
  } else {
    int64_t i = 0;
    for (; i + 2 * w <= p.vocabulary; i += 2 * w) {
      store(out + i, at(load(x + i)));
      store(out + i + w, at(load(x + i + w)));
    }
    for (; i < p.vocabulary; i += w) {
      const int64_t n = p.vocabulary - i < w ? p.vocabulary - i : w;
      store_part(out + i, n, at(load_part(x + i, n, -INFINITY)));
    }
  }
  // The tokens' own terms are added before the one rounding to T, repeated tokens together.
  for (int64_t k = 0; k < p.ids_per_row; ++k) {
    if (!possible(ids[k])) continue;
    double own = 0;
    for (int64_t j = 0; j < p.ids_per_row; ++j)
      if (ids[j] == ids[k]) own += double(grads[j]);
    from_float(float(double(at_one(ids[k])) + own / p.temperature), out + ids[k]);
  }
}

template <class T>
void forward_rows(const GatherProblem& p, const GatherForward& out) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 8)
  for (int64_t row = 0; row < p.rows; ++row) {
    if (out.entropy) forward_row<true, T>(p, out, row); else forward_row<false, T>(p, out, row);
  }
}

template <class T>
void backward_rows(const GatherProblem& p, const GatherBackward& in) {
  const ScaledExp exp(p.temperature);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 8)
  for (int64_t row = 0; row < p.rows; ++row) backward_row<T>(p, in, exp, row);
}

double exp_sum(int64_t rounds) {
  float block[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) block[i] = -20.f * float(i) / kBlock;
  RowSoftmax softmax(1);
  rounds = rounds / kBlock + 1;
  for (int64_t i = 0; i < rounds; ++i) softmax.add<false>(block, kBlock);
  const volatile float kept = softmax.state().sum;  // or the compiler drops it all
  static_cast<void>(kept);
  return double(rounds * kBlock);
}

void forward(const GatherProblem& p, const GatherForward& out) {
  switch (p.dtype) {
    case DType::f32: return forward_rows<float>(p, out);
    case DType::bf16: return forward_rows<Bf16>(p, out);
    case DType::f16: return forward_rows<F16>(p, out);
  }
}

void backward(const GatherProblem& p, const GatherBackward& in) {
  switch (p.dtype) {
    case DType::f32: return backward_rows<float>(p, in);
    case DType::bf16: return backward_rows<Bf16>(p, in);
    case DType::f16: return backward_rows<F16>(p, in);
  }
}

}  // namespace
}  // namespace deeprec
