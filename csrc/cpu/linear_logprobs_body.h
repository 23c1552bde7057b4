// Forward body of linear_logprobs, included once by the source of every instruction set.
//
// The vocabulary is cut into slices. For a panel of 32 tokens the logits of one slice fill a
// buffer that stays in the second-level cache, [slice][32 tokens], are absorbed into the running
// softmax of every token (one per lane) and are overwritten by the next slice.
#pragma once

#include <omp.h>

#include <cfloat>
#include <cmath>

#include "cpu/block_multiply.h"
#include "cpu/linear_logprobs.h"
#include "cpu/row_softmax.h"

namespace deeprec {
namespace {  // see dtype.h

// Tokens of the vocabulary. The backward pass keeps a slice in two packings, which at H 576 take
// 1.2 MB of the second-level cache in float and 0.9 MB in three parts (256 costs 15% there).
constexpr int kSlice = kParts == 1 ? 256 : 128;
constexpr int kSliceBlocks = kSlice / kSide;
// Consecutive slices share one running softmax, so that its memory does not grow with the
// vocabulary; their number bounds the threads that can help.
constexpr int64_t kMaxSpans = 64;
// Panels that share one packing of a slice.
constexpr int64_t kGroup = 32;

inline int64_t blocks_of(int64_t n) { return (n + kSide - 1) / kSide; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- operands ---

template <class T>
inline void load_chunk_of(const T* p, int64_t n, float* out) {
  constexpr int w = Vec::width;
  if (n == kSide) {
    for (int c = 0; c < kSide; c += w) store(out + c, load(p + c));
  } else {
    for (int c = 0; c < kSide; ++c) out[c] = c < n ? to_float(p[c]) : 0.f;
  }
}

// Columns [first, first + 32) of a row as floats, zeros behind the end; a zero row for row < 0.
inline void load_chunk(const Matrix& m, int64_t row, int64_t first, float* out) {
  const int64_t n = row < 0 ? 0 : least(m.columns - first, kSide);
  const int64_t at = row < 0 ? 0 : row * m.row_stride + first;
  switch (m.dtype) {
    case DType::f32: return load_chunk_of(static_cast<const float*>(m.data) + at, n, out);
    case DType::bf16: return load_chunk_of(static_cast<const Bf16*>(m.data) + at, n, out);
    case DType::f16: return load_chunk_of(static_cast<const F16*>(m.data) + at, n, out);
  }
}

// Rows [first, first + 32) of a block column, zeros behind the last row.
inline void load_tile(const Matrix& m, int64_t first, int64_t column_block, float* tile) {
  for (int r = 0; r < kSide; ++r)
    load_chunk(m, first + r < m.rows ? first + r : -1, column_block * kSide, tile + r * kSide);
}

// 32 of the listed rows, zeros behind the last.
inline void load_listed(const Matrix& m, const int64_t* rows, int64_t count, int64_t column_block,
                        float* tile) {
  for (int r = 0; r < kSide; ++r)
    load_chunk(m, r < count ? rows[r] : -1, column_block * kSide, tile + r * kSide);
}

// A slice of the head as A blocks [slice block][H block].
inline void pack_slice(const Matrix& weight, int64_t first, int64_t block, Packed* out) {
  const int64_t depth = blocks_of(weight.columns);
  for (int64_t h = 0; h < depth; ++h) {
    alignas(64) Tile tile;
    load_tile(weight, first + block * kSide, h, tile);
    pack_a(tile, out[block * depth + h]);
  }
}

// Hidden states as B blocks [panel][H block], k = H and one lane a token.
inline void pack_panels(const LinearProblem& p, const int64_t* rows, int64_t count, Packed* out) {
  const int64_t panels = blocks_of(count), depth = blocks_of(p.hidden.columns);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = panel * kSide;
    for (int64_t h = 0; h < depth; ++h) {
      alignas(64) Tile tile, turned;
      load_listed(p.hidden, rows + first, count - first, h, tile);
      transpose(tile, turned);
      pack_b(turned, out[panel * depth + h]);
    }
  }
}

// Logits of one slice and one panel, [rows][32 tokens], the bias included.
inline void slice_logits(const LinearProblem& p, int64_t first, int64_t rows, const Packed* slice,
                         const Packed* panel, float* z) {
  const int64_t depth = blocks_of(p.weight.columns);
  for (int64_t block = 0; block * kSide < rows; ++block)
    multiply({slice + block * depth, 1}, {panel, 1}, depth, z + block * kBlockSize, false);
  if (!p.bias) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kSide; c += Vec::width)
      store(z + r * kSide + c, load(z + r * kSide + c) + set1(p.bias[first + r]));
}

// --- the running softmax of a panel ---

struct alignas(64) PanelSoftmax {
  float largest[kSide], sum[kSide], weighted[kSide];

  void clear() {
    for (int i = 0; i < kSide; ++i) largest[i] = -FLT_MAX, sum[i] = 0, weighted[i] = 0;
  }

  // The arithmetic of RowSoftmax, one token a lane.
  template <bool kEntropy>
  void absorb(const float* z, int64_t rows, const ScaledExp& exp) {
    constexpr int w = Vec::width;
    for (int c = 0; c < kSide; c += w) {
      const Vec before = load(largest + c);
      Vec top[4] = {before, before, before, before};
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        for (int j = 0; j < 4; ++j) top[j] = max(load(z + (r + j) * kSide + c), top[j]);
      for (; r < rows; ++r) top[0] = max(load(z + r * kSide + c), top[0]);
      const Vec now = max(max(top[0], top[1]), max(top[2], top[3]));

      const Vec shift = exp.clamp(before - now), ratio = exp(shift);
      Vec sums[2] = {load(sum + c) * ratio, set1(0.f)};
      Vec terms[2] = {fma(load(sum + c), shift, load(weighted + c)) * ratio, set1(0.f)};
      const auto term = [&](int64_t row, int j) {
        const Vec d = exp.clamp(load(z + row * kSide + c) - now);
        if constexpr (kEntropy) {
          Vec e;
          sums[j] = exp.add(d, sums[j], e);
          terms[j] = fma(e, d, terms[j]);
        } else {
          sums[j] = exp.add(d, sums[j]);
        }
      };
      for (r = 0; r + 2 <= rows; r += 2) term(r, 0), term(r + 1, 1);
      for (; r < rows; ++r) term(r, 0);
      store(largest + c, now);
      store(sum + c, sums[0] + sums[1]);
      if constexpr (kEntropy) store(weighted + c, terms[0] + terms[1]);
    }
  }
};

struct Outcome {
  double largest = -FLT_MAX, sum = 0, weighted = 0;

  void merge(const PanelSoftmax& other, int lane, double temperature) {
    const double theirs = double(other.largest[lane]), top = theirs > largest ? theirs : largest;
    const auto moved = [&](double from, double s, double w, double& out_s, double& out_w) {
      if (s == 0) return;  // nothing absorbed: its largest is not a logit
      const double shift = from - top, ratio = shift == 0 ? 1 : std::exp(shift / temperature);
      out_s += ratio * s;
      out_w += ratio * (w + s * shift);
    };
    double s = 0, w = 0;
    moved(largest, sum, weighted, s, w);
    moved(theirs, double(other.sum[lane]), double(other.weighted[lane]), s, w);
    largest = top, sum = s, weighted = w;
  }
};

inline void finish_row(const LinearProblem& p, const LinearForward& out, int64_t row,
                       const Outcome& o, float chosen) {
  const bool none = o.sum == 0;  // every logit was -inf
  const double log_sum = std::log(o.sum);
  out.values[row] =
      none ? NAN : float((double(chosen) - o.largest) / p.temperature - log_sum);
  if (out.entropy)
    out.entropy[row] = none ? NAN : float(log_sum - o.weighted / (o.sum * p.temperature));
  out.states[row] = {float(o.largest), float(o.sum)};
}

template <bool kEntropy>
void forward_full(const LinearProblem& p, const LinearForward& out, const int64_t* rows,
                  int64_t count) {
  const int64_t panels = blocks_of(count), depth = blocks_of(p.weight.columns);
  const int64_t slices = (p.weight.rows + kSlice - 1) / kSlice;
  const int64_t span = (slices + kMaxSpans - 1) / kMaxSpans, spans = (slices + span - 1) / span;
  const int64_t groups = (panels + kGroup - 1) / kGroup;

  const int64_t slice_size = kSliceBlocks * depth;
  const Scratch packed_memory(panels * depth * int64_t(sizeof(Packed)));
  const Scratch softmax_memory(spans * panels * int64_t(sizeof(PanelSoftmax)));
  const Scratch chosen_memory(count * int64_t(sizeof(float)));
  const Scratch slice_memory(p.threads * slice_size * int64_t(sizeof(Packed)));
  auto* packed = static_cast<Packed*>(packed_memory.get());
  auto* softmaxes = static_cast<PanelSoftmax*>(softmax_memory.get());
  auto* chosen = static_cast<float*>(chosen_memory.get());

  pack_panels(p, rows, count, packed);
#pragma omp parallel num_threads(p.threads)
  {
    [[maybe_unused]] const MultiplyScope scope;
    const ScaledExp exp(p.temperature);
    alignas(64) float z[kSlice * kSide];
    Packed* slice = static_cast<Packed*>(slice_memory.get()) + omp_get_thread_num() * slice_size;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < spans * groups; ++item) {
      const int64_t s = item % spans, first_panel = item / spans * kGroup;
      const int64_t last_panel = least(first_panel + kGroup, panels);
      for (int64_t panel = first_panel; panel < last_panel; ++panel)
        softmaxes[s * panels + panel].clear();
      for (int64_t i = s * span; i < least((s + 1) * span, slices); ++i) {
        const int64_t first = i * kSlice, n = least(kSlice, p.weight.rows - first);
        for (int64_t b = 0; b * kSide < n; ++b) pack_slice(p.weight, first, b, slice);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          slice_logits(p, first, n, slice, packed + panel * depth, z);
          softmaxes[s * panels + panel].template absorb<kEntropy>(z, n, exp);
          for (int64_t t = panel * kSide; t < least(count, (panel + 1) * kSide); ++t) {
            const int64_t id = p.ids[rows[t]] - first;
            if (id >= 0 && id < n) chosen[t] = z[id * kSide + t % kSide];
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      Outcome outcome;
      for (int64_t s = 0; s < spans; ++s)
        outcome.merge(softmaxes[s * panels + t / kSide], int(t % kSide), p.temperature);
      finish_row(p, out, rows[t], outcome, chosen[t]);
    }
  }
}

// --- restricted rows: one dot product for every permitted token ---

template <class T>
inline float dot_of(const float* x, const T* y, int64_t n) {
  constexpr int w = Vec::width;
  Vec sums[4] = {set1(0.f), set1(0.f), set1(0.f), set1(0.f)};
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int j = 0; j < 4; ++j) sums[j] = fma(load(x + i + j * w), load(y + i + j * w), sums[j]);
  for (; i + w <= n; i += w) sums[0] = fma(load(x + i), load(y + i), sums[0]);
  if (i < n) sums[1] = fma(load_part(x + i, n - i, 0.f), load_part(y + i, n - i, 0.f), sums[1]);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline float token_logit(const LinearProblem& p, const float* x, int64_t token) {
  const Matrix& m = p.weight;
  const int64_t at = token * m.row_stride;
  const float bias = p.bias ? p.bias[token] : 0.f;
  switch (m.dtype) {
    case DType::f32: return dot_of(x, static_cast<const float*>(m.data) + at, m.columns) + bias;
    case DType::bf16: return dot_of(x, static_cast<const Bf16*>(m.data) + at, m.columns) + bias;
    case DType::f16: return dot_of(x, static_cast<const F16*>(m.data) + at, m.columns) + bias;
  }
  return NAN;
}

// A row of hidden as floats, padded to whole chunks.
inline void load_row(const Matrix& m, int64_t row, float* out) {
  for (int64_t h = 0; h < m.columns; h += kSide) load_chunk(m, row, h, out + h);
}

template <bool kEntropy>
void forward_restricted_row(const LinearProblem& p, const LinearForward& out, int64_t row,
                            float* x) {
  load_row(p.hidden, row, x);
  RowSoftmax softmax(p.temperature);
  float chosen = -INFINITY, z[kBlock];
  const int64_t end = p.allowed.offsets[row + 1];
  for (int64_t i = p.allowed.offsets[row]; i < end;) {
    int64_t n = 0;
    for (; n < kBlock && i < end; ++n, ++i) {
      z[n] = token_logit(p, x, p.allowed.ids[i]);
      if (p.allowed.ids[i] == p.ids[row]) chosen = z[n];
    }
    softmax.add<kEntropy>(z, n);
  }
  out.values[row] = softmax.logprob(chosen);
  if (kEntropy) out.entropy[row] = softmax.entropy();
  out.states[row] = softmax.state();
}

template <bool kEntropy>
void forward_restricted(const LinearProblem& p, const LinearForward& out, const int64_t* rows,
                        int64_t count) {
  const int64_t width = blocks_of(p.hidden.columns) * kSide;
  const Scratch memory(p.threads * width * int64_t(sizeof(float)));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 16)
  for (int64_t i = 0; i < count; ++i)
    forward_restricted_row<kEntropy>(
        p, out, rows[i], static_cast<float*>(memory.get()) + omp_get_thread_num() * width);
}

template <bool kEntropy>
void forward_rows(const LinearProblem& p, const LinearForward& out, const RowSplit& split) {
  // Longer batches go through in parts, which bounds the packed copy of the hidden states.
  constexpr int64_t kPart = 8192;
  const int64_t full = int64_t(split.full.size());
  for (int64_t i = 0; i < full; i += kPart)
    forward_full<kEntropy>(p, out, split.full.data() + i, least(kPart, full - i));
  if (!split.restricted.empty())
    forward_restricted<kEntropy>(p, out, split.restricted.data(),
                                 int64_t(split.restricted.size()));
}

void forward(const LinearProblem& p, const LinearForward& out, const RowSplit& split) {
  if (out.entropy) forward_rows<true>(p, out, split); else forward_rows<false>(p, out, split);
}

}  // namespace
}  // namespace deeprec
