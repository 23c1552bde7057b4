// Backward body of linear_logprobs, included once by the source of every instruction set.
//
// Slice by slice of the vocabulary the logits are computed again and turned into their gradients
// D. One phase shares the panels out among the threads: logits, D, hidden gradient += D W. A
// second shares out the blocks of the weight gradient: += D^T X. So neither is ever added up
// across threads, and both are the same for every number of threads.
#pragma once

#include <cstring>

#include "cpu/linear_logprobs_body.h"

namespace deeprec {
namespace {  // see dtype.h

// Panels whose D is held at a time: 2 MB for one slice in float.
constexpr int64_t kChunk = 64;

// The gradient in a logit is e·(a + b·d), plus the incoming gradient / T at the row's own token,
// where d = z - largest and e = exp(d / T): p = e / s, and dH/dz = -p (log p + H).
struct LogitGradient {
  float largest = 0, a = 0, b = 0, own = 0;

  LogitGradient() = default;
  LogitGradient(const LinearProblem& p, const LinearBackward& io, int64_t row) {
    const double g = double(io.grad_values[row]), sum = double(io.states[row].sum);
    const double per_e = -1 / (sum * p.temperature);
    double rest = 0, grad_entropy = 0;
    if (io.grad_entropy) {
      grad_entropy = double(io.grad_entropy[row]);
      rest = grad_entropy * (double(io.entropy[row]) - std::log(sum));
    }
    largest = io.states[row].largest;
    a = float(per_e * (g + rest));
    b = float(per_e * grad_entropy / p.temperature);
    own = float(g / p.temperature);
  }
};

// The gradients of 32 tokens, one a lane; zero behind the last.
struct alignas(64) PanelGradient {
  float largest[kSide], a[kSide], b[kSide], own[kSide];
  int64_t id[kSide];

  PanelGradient(const LinearProblem& p, const LinearBackward& io, const int64_t* rows,
                int64_t count) {
    for (int i = 0; i < kSide; ++i) {
      const LogitGradient g = i < count ? LogitGradient(p, io, rows[i]) : LogitGradient();
      largest[i] = g.largest, a[i] = g.a, b[i] = g.b, own[i] = g.own;
      id[i] = i < count ? p.ids[rows[i]] : -1;
    }
  }

  // Turns the logits of a slice into D, in place; rows behind the vocabulary's end become 0.
  void apply(float* z, int64_t first, int64_t rows, const ScaledExp& exp) const {
    for (int c = 0; c < kSide; c += Vec::width) {
      const Vec top = load(largest + c), constant = load(a + c), slope = load(b + c);
      for (int64_t r = 0; r < rows; ++r) {
        const Vec d = exp.clamp(load(z + r * kSide + c) - top);
        store(z + r * kSide + c, exp(d) * fma(slope, d, constant));
      }
      for (int64_t r = rows; r < blocks_of(rows) * kSide; ++r) store(z + r * kSide + c, set1(0.f));
    }
    for (int i = 0; i < kSide; ++i)
      if (id[i] >= first && id[i] < first + rows) z[(id[i] - first) * kSide + i] += own[i];
  }
};

template <class T>
inline void store_row_of(const float* x, int64_t n, T* out) {
  constexpr int w = Vec::width;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(out + i, load(x + i));
  if (i < n) store_part(out + i, n - i, load(x + i));  // rows of x are padded to whole chunks
}

// Row `row` of a contiguous gradient with the dtype and the width of `like`.
inline void store_row(const float* x, const Matrix& like, int64_t row, void* out) {
  const int64_t n = like.columns;
  switch (like.dtype) {
    case DType::f32: return store_row_of(x, n, static_cast<float*>(out) + row * n);
    case DType::bf16: return store_row_of(x, n, static_cast<Bf16*>(out) + row * n);
    case DType::f16: return store_row_of(x, n, static_cast<F16*>(out) + row * n);
  }
}

template <class T>
inline void add_row_of(float scale, const T* x, int64_t n, float* out) {
  constexpr int w = Vec::width;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(out + i, fma(set1(scale), load(x + i), load(out + i)));
  for (; i < n; ++i) out[i] += scale * to_float(x[i]);
}

// out += scale · row of m
inline void add_row(float scale, const Matrix& m, int64_t row, float* out) {
  const int64_t at = row * m.row_stride, n = m.columns;
  switch (m.dtype) {
    case DType::f32: return add_row_of(scale, static_cast<const float*>(m.data) + at, n, out);
    case DType::bf16: return add_row_of(scale, static_cast<const Bf16*>(m.data) + at, n, out);
    case DType::f16: return add_row_of(scale, static_cast<const F16*>(m.data) + at, n, out);
  }
}

// --- rows with a full softmax, and the sums of the weight gradient ---

class FullBackward {
 public:
  FullBackward(const LinearProblem& p, const LinearBackward& io, const RowSplit& split,
               const SparseGradient& sparse)
      : p_(p), io_(io), sparse_(sparse), rows_(split.full.data()),
        count_(int64_t(split.full.size())), panels_(blocks_of(count_)),
        depth_(blocks_of(p.weight.columns)), to_hidden_(io.grad_hidden && count_),
        to_weight_(io.grad_weight), keeps_gradients_(io.grad_weight || io.grad_bias),
        token_lanes_(panels_ * depth_ * kBytes),
        depth_lanes_(to_weight_ ? panels_ * depth_ * kBytes : 0),
        slice_(kSliceBlocks * depth_ * kBytes),
        turned_slice_(to_hidden_ ? kSliceBlocks * depth_ * kBytes : 0),
        gradients_(keeps_gradients_ ? kChunk * kSliceBlocks * kBytes : 0),
        hidden_(to_hidden_ ? panels_ * depth_ * kFloatBytes : 0),
        weight_(to_weight_ ? kSliceBlocks * depth_ * kFloatBytes : 0),
        line_(p.threads * depth_ * kSide * int64_t(sizeof(float))) {}

  void run() {
    pack_panels(p_, rows_, count_, packed(token_lanes_));
#pragma omp parallel num_threads(p_.threads)
    {
      [[maybe_unused]] const MultiplyScope scope;
      if (to_weight_) pack_depth_lanes();
      if (to_hidden_) clear_hidden();
      for (int64_t first = 0; first < p_.weight.rows; first += kSlice)
        slice(first, least(kSlice, p_.weight.rows - first));
      if (to_hidden_) write_hidden();
    }
  }

 private:
  static constexpr int64_t kBytes = sizeof(Packed);
  static constexpr int64_t kFloatBytes = kBlockSize * int64_t(sizeof(float));

  static Packed* packed(const Scratch& memory) { return static_cast<Packed*>(memory.get()); }
  static float* floats(const Scratch& memory) { return static_cast<float*>(memory.get()); }
  float* line() const { return floats(line_) + omp_get_thread_num() * depth_ * kSide; }

  // Every thread of the region calls these; `omp for` shares their work out.

  void slice(int64_t first, int64_t n) {
    const int64_t blocks = blocks_of(n);
    if (count_) {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        pack_slice(p_.weight, first, block, packed(slice_));
        if (to_hidden_) pack_turned_slice(first, block);
      }
    }
    for (int64_t chunk = 0; chunk < panels_; chunk += kChunk) {
      const int64_t end = least(chunk + kChunk, panels_);
#pragma omp for schedule(dynamic)
      for (int64_t panel = chunk; panel < end; ++panel) logit_phase(first, n, chunk, panel);
      if (to_weight_) {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < depth_ * blocks; ++item)
          weight_phase(item / blocks, item % blocks, chunk, end);
      }
      if (io_.grad_bias) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n; ++r) bias_phase(first, r, chunk, end);
      }
    }
    if (keeps_gradients_) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < n; ++r) finish_token(first, r);
    }
  }

  // Hidden states as B blocks [H block][panel], k = tokens and one lane an H.
  void pack_depth_lanes() {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels_; ++panel)
      for (int64_t h = 0; h < depth_; ++h) {
        alignas(64) Tile tile;
        load_listed(p_.hidden, rows_ + panel * kSide, count_ - panel * kSide, h, tile);
        pack_b(tile, packed(depth_lanes_)[h * panels_ + panel]);
      }
  }

  void clear_hidden() {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels_; ++panel)
      std::memset(floats(hidden_) + panel * depth_ * kBlockSize, 0, size_t(depth_ * kFloatBytes));
  }

  void write_hidden() {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const float* blocks = floats(hidden_) + panel * depth_ * kBlockSize;
      for (int64_t t = panel * kSide; t < least(count_, (panel + 1) * kSide); ++t) {
        float* x = line();
        for (int64_t h = 0; h < depth_ * kSide; ++h) x[h] = blocks[h * kSide + t % kSide];
        store_row(x, p_.hidden, rows_[t], io_.grad_hidden);
      }
    }
  }

  // The slice as A blocks [H block][slice block], k = the slice's tokens.
  void pack_turned_slice(int64_t first, int64_t block) {
    for (int64_t h = 0; h < depth_; ++h) {
      alignas(64) Tile tile, turned;
      load_tile(p_.weight, first + block * kSide, h, tile);
      transpose(tile, turned);
      pack_a(turned, packed(turned_slice_)[h * kSliceBlocks + block]);
    }
  }

  // D of one panel, and its part of the hidden gradient.
  void logit_phase(int64_t first, int64_t n, int64_t chunk, int64_t panel) {
    alignas(64) float z[kSlice * kSide];
    Packed lanes[kSliceBlocks];
    const int64_t done = panel * kSide, blocks = blocks_of(n);
    slice_logits(p_, first, n, packed(slice_), packed(token_lanes_) + panel * depth_, z);
    const PanelGradient gradient(p_, io_, rows_ + done, count_ - done);
    gradient.apply(z, first, n, ScaledExp(p_.temperature));
    for (int64_t block = 0; block < blocks; ++block) {
      float* tile = z + block * kBlockSize;
      if (to_hidden_) {
        alignas(64) Tile copy;
        std::memcpy(copy, tile, sizeof copy);
        pack_b(copy, lanes[block]);
      }
      if (keeps_gradients_)
        pack_a(tile, packed(gradients_)[block * kChunk + panel - chunk]);
    }
    if (!to_hidden_) return;
    for (int64_t h = 0; h < depth_; ++h)
      multiply({packed(turned_slice_) + h * kSliceBlocks, 1}, {lanes, 1}, blocks,
               floats(hidden_) + (panel * depth_ + h) * kBlockSize, true);
  }

  // One block of the weight gradient, over the panels of a chunk.
  void weight_phase(int64_t h, int64_t block, int64_t chunk, int64_t end) {
    multiply({packed(gradients_) + block * kChunk, 1},
             {packed(depth_lanes_) + h * panels_ + chunk, 1}, end - chunk,
             floats(weight_) + (h * kSliceBlocks + block) * kBlockSize, chunk > 0);
  }

  void bias_phase(int64_t first, int64_t r, int64_t chunk, int64_t end) {
    const Packed* block = packed(gradients_) + r / kSide * kChunk;
    float total = 0;
    for (int64_t panel = chunk; panel < end; ++panel, ++block)
      total += sum_of_row(*block, int(r % kSide));
    io_.grad_bias[first + r] += total;
  }

  // Adds what the restricted rows give this token and writes its gradients out.
  void finish_token(int64_t first, int64_t r) {
    const int64_t token = first + r;
    float* x = line();
    for (int64_t h = 0; to_weight_ && h < depth_; ++h) {
      const float* row = floats(weight_) + h * kSliceBlocks * kBlockSize + r * kSide;
      for (int c = 0; c < kSide; ++c) x[h * kSide + c] = count_ ? row[c] : 0.f;
    }
    if (!sparse_.starts.empty()) {
      for (int64_t i = sparse_.starts[token]; i < sparse_.starts[token + 1]; ++i) {
        const float gradient = sparse_.values[sparse_.positions[i]];
        if (to_weight_) add_row(gradient, p_.hidden, sparse_.rows[i], x);
        if (io_.grad_bias) io_.grad_bias[token] += gradient;
      }
    }
    if (to_weight_) store_row(x, p_.weight, token, io_.grad_weight);
  }

  const LinearProblem& p_;
  const LinearBackward& io_;
  const SparseGradient& sparse_;
  const int64_t* rows_;
  int64_t count_, panels_, depth_;
  bool to_hidden_, to_weight_, keeps_gradients_;
  Scratch token_lanes_;   // hidden as B blocks, one lane a token
  Scratch depth_lanes_;   // hidden as B blocks, one lane an H
  Scratch slice_;         // of the head, as A blocks with rows of the vocabulary
  Scratch turned_slice_;  // the same with rows of H
  Scratch gradients_;     // D of a chunk, as A blocks [slice block][panel]
  Scratch hidden_;        // hidden gradient, [panel][H block], one lane a token
  Scratch weight_;        // weight gradient of a slice, [H block][slice block], one lane an H
  Scratch line_;          // a row for every thread
};

// --- restricted rows ---

class RestrictedBackward {
 public:
  RestrictedBackward(const LinearProblem& p, const LinearBackward& io, SparseGradient& sparse)
      : p_(p), io_(io), sparse_(sparse), exp_(p.temperature),
        width_(blocks_of(p.hidden.columns) * kSide),
        lines_(2 * p.threads * width_ * int64_t(sizeof(float))) {}

  void run(const int64_t* rows, int64_t count) const {
#pragma omp parallel for num_threads(p_.threads) schedule(dynamic, 16)
    for (int64_t i = 0; i < count; ++i) row(rows[i]);
  }

 private:
  void row(int64_t row) const {
    float* x = static_cast<float*>(lines_.get()) + 2 * omp_get_thread_num() * width_;
    float* grad = x + width_;
    load_row(p_.hidden, row, x);
    std::memset(grad, 0, size_t(width_) * sizeof(float));
    const LogitGradient gradient(p_, io_, row);
    for (int64_t i = p_.allowed.offsets[row]; i < p_.allowed.offsets[row + 1]; ++i) {
      const int64_t token = p_.allowed.ids[i];
      const float d = logit_gradient(gradient, token_logit(p_, x, token)) +
                      (token == p_.ids[row] ? gradient.own : 0.f);
      if (!sparse_.values.empty()) sparse_.values[i] = d;
      if (io_.grad_hidden) add_row(d, p_.weight, token, grad);
    }
    if (io_.grad_hidden) store_row(grad, p_.hidden, row, io_.grad_hidden);
  }

  float logit_gradient(const LogitGradient& g, float z) const {
    float lanes[Vec::width];
    const Vec d = exp_.clamp(set1(z) - set1(g.largest));
    store(lanes, exp_(d) * fma(set1(g.b), d, set1(g.a)));
    return lanes[0];
  }

  const LinearProblem& p_;
  const LinearBackward& io_;
  SparseGradient& sparse_;
  ScaledExp exp_;
  int64_t width_;
  Scratch lines_;
};

void backward(const LinearProblem& p, const LinearBackward& io, const RowSplit& split,
              SparseGradient& sparse) {
  RestrictedBackward(p, io, sparse)
      .run(split.restricted.data(), int64_t(split.restricted.size()));
  if (!split.full.empty() || io.grad_weight || io.grad_bias)
    FullBackward(p, io, split, sparse).run();
}

}  // namespace
}  // namespace deeprec
