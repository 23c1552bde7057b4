// The preference-aware TRM's arithmetic, for a range of users at a time.
//
// Users lie one after the other without padding between them. The layers before the last take
// them in groups of some hundred items, so that what passes between two products stays in the
// cache. The last layer is read at one position a user, and needs no key or value of any other:
// a query q scores item x as q·(K x + b), which is (K^T q)·x plus the same number for every
// item, and attends to V (Σ p x) + b. So its projections are made once a user, not once an item.
#pragma once

#include "cpu/trm_rows.h"

namespace deeprec::trm {
namespace {  // see dtype.h

// Items of a group: eight or nine tiles of rows, whose activations fit half a megabyte.
constexpr int64_t kGroupItems = 120;
// Rows are this many floats further apart than they are long: no power of two, which would put
// the rows of a tile into the same few cache sets.
constexpr int64_t kGap = 16;

// Where everything lies in the scratch memory; a null base measures it.
struct Scratch {
  Scratch(const Model& m, int64_t users, int64_t tokens, float* base) : start_(base), at_(base) {
    const int64_t longest = padded(m.max_length), heads = m.n_heads * m.head;
    const int64_t group = (tokens < kGroupItems ? tokens : kGroupItems) + m.max_length;
    const int64_t rows = group > users ? group : users;
    const int64_t inner = padded(m.inner), text = padded(m.text_dim);
    int64_t widest = m.width > heads ? m.width : heads;
    if (inner > widest) widest = inner;
    if (text > widest) widest = text;
    if (longest > widest) widest = longest;
    states = take((tokens + 1) * row(m.width));
    projected = take(rows * row(3 * heads > inner ? 3 * heads : inner));
    attended = take(rows * row(heads));
    mixed = take(rows * row(m.width));
    packed = take(rows * widest + 2 * kPanel);
    scores = take((longest + 1) * row(longest));
    keys = take(longest * m.head);
    mask = take(longest);
    filtered = take(rows * row(m.width));
    columns = take(2 * kWords * 3 * m.max_length);
    sums = take(2 * m.width);
    per_head = take(users * row(m.n_heads * m.width));
    text_rows = take(users * row(text));
    gate = take(users * row(padded(m.n_experts)));
    last = take(users * row(m.width));
    valid = take(m.width);
  }

  static int64_t row(int64_t width) { return width + kGap; }
  int64_t size() const { return at_ - start_; }

  float *states;     // [tokens] context of the last layer
  float *projected;  // [group] queries, keys, values; or the inner layer
  float *attended;   // [group] heads' outputs
  float *mixed;      // [group] before a LayerNorm
  float *packed;     // rows as a product wants them
  float *scores, *keys, *mask;  // of one head of one user
  float *filtered;   // [group] the convolution with the filter
  float *columns;    // a few channels of one user's sequences
  float *sums;       // [2] of a user's ids and texts
  float *per_head;   // [users, heads] last layer: keys^T q, then weighted sums of items
  float *text_rows;  // [users] padded preferences
  float *gate;       // [users] of the experts
  float *last;       // [users] the last items
  float *valid;      // 1 in real columns, 0 in padded ones

 private:
  float* take(int64_t n) {
    float* here = at_;
    at_ += (n + kWords - 1) / kWords * kWords;
    return here;
  }
  float *start_, *at_;
};

// --- the contextual convolution ---

// Columns [start, start + Vec::width) of the rows of `ids`, less row 0; `rows` of [width].
inline void gather(const Model& m, const float* table, const int64_t* ids, int64_t n,
                   int64_t start, float* out) {
  const int64_t left = m.hidden - start;
  const bool whole = left >= Vec::width;
  const auto read = [&](int64_t id) {
    const float* row = table + id * m.hidden + start;
    return whole ? load(row) : load_part(row, left > 0 ? left : 0, 0.f);
  };
  if (!m.padding_row) {
    for (int64_t j = 0; j < n; ++j) store(out + j * Vec::width, read(ids[j]));
    return;
  }
  const Vec padding = read(0);
  for (int64_t j = 0; j < n; ++j) store(out + j * Vec::width, read(ids[j]) - padding);
}

// Has the rows of a user's items brought into the second-level cache, while those of another user
// are worked on: they lie anywhere in the tables.
inline void fetch(const Model& m, const int64_t* ids, int64_t n) {
  constexpr int64_t line = 16;  // floats
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m.hidden; i += line) {
      __builtin_prefetch(m.items + ids[j] * m.hidden + i, 0, 2);
      __builtin_prefetch(m.texts + ids[j] * m.hidden + i, 0, 2);
    }
}

constexpr int kOutputs = 4;  // positions of a convolution computed together

// Positions [t, t + n) of both convolutions in one vector of channels: `ids` [length] with the
// kernel, whose row of lag 0 is at `kernel`, and with texts. Two positions next to each other use
// the same rows one step apart, so each row is read once and handed on.
template <int n>
inline void convolve_block(const float* ids, int64_t length, const float* kernel,
                           const float* texts, Vec (&a)[kOutputs], Vec (&b)[kOutputs]) {
  constexpr int w = Vec::width;
  Vec rows[n], words[n];  // of lags -j ... n - 1 - j, lag l at l mod n
#pragma GCC unroll 4
  for (int i = 1; i < n; ++i) {
    rows[i] = load(kernel + i * kWords);
    words[i] = load(texts + i * w);
  }
  const auto step = [&](int64_t j, int u) {
    const Vec id = load(ids + j * w);
    const int first = (n - u) % n;
    rows[first] = load(kernel - j * kWords);
    words[first] = load(texts - j * w);
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      a[i] = fma(id, rows[(first + i) % n], a[i]);
      b[i] = fma(id, words[(first + i) % n], b[i]);
    }
  };
  int64_t j = 0;
  for (; j + n <= length; j += n)
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) step(j + u, u);
#pragma GCC unroll 4
  for (int u = 0; u < n - 1; ++u)
    if (j + u < length) step(j + u, u);
}

template <int n = kOutputs>
inline void convolve_rest(int count, const float* ids, int64_t length, const float* kernel,
                          const float* texts, Vec (&a)[kOutputs], Vec (&b)[kOutputs]) {
  if (count == n) return convolve_block<n>(ids, length, kernel, texts, a, b);
  if constexpr (n > 1) convolve_rest<n - 1>(count, ids, length, kernel, texts, a, b);
}

// Both circular convolutions of one user, per channel and over max_length positions: ids with the
// filter, and ids with texts / sqrt(max_length). Rows beyond the history hold row 0 of the
// tables; with it taken off every row they are zero, and what it adds is put back as sums.
inline void convolve(const Model& m, const int64_t* ids, int64_t n, Scratch& s, float* filtered,
                     float* fused) {
  constexpr int w = Vec::width;
  const int64_t stride = Scratch::row(m.width), period = m.max_length;
  float *x = s.columns, *texts = x + period * w;  // texts: two periods
  const Vec scale = set1(float(1 / std::sqrt(double(period))));
  for (int64_t start = 0; start < m.width; start += w) {
    const float* kernel = m.kernel + start / kWords * 2 * period * kWords + start % kWords;
    gather(m, m.items, ids, n, start, x);
    gather(m, m.texts, ids, n, start, texts);
    for (int64_t j = n; j < period; ++j) store(texts + j * w, set1(0.f));
    for (int64_t j = 0; j < period; ++j) store(texts + (period + j) * w, load(texts + j * w));
    Vec constant_a = set1(0.f), constant_b = set1(0.f);
    if (m.padding_row) {
      Vec sum_ids = set1(0.f), sum_texts = set1(0.f), sum_kernel = set1(0.f);
      for (int64_t j = 0; j < n; ++j) {
        sum_ids = sum_ids + load(x + j * w);
        sum_texts = sum_texts + load(texts + j * w);
      }
      for (int64_t j = 0; j < period; ++j)
        sum_kernel = sum_kernel + load(kernel + j * kWords);
      const int64_t left = m.hidden - start < w ? m.hidden - start : w;
      const Vec id = load_part(m.items + start, left > 0 ? left : 0, 0.f);
      const Vec text = load_part(m.texts + start, left > 0 ? left : 0, 0.f);
      constant_a = id * sum_kernel;
      constant_b = fma(id, sum_texts, fma(text, sum_ids, set1(float(period)) * id * text));
    }
    const float* zero_lag = kernel + period * kWords;
    for (int64_t t = 0; t < n; t += kOutputs) {
      const int count = int(n - t < kOutputs ? n - t : kOutputs);
      Vec a[kOutputs], b[kOutputs];
      for (int i = 0; i < kOutputs; ++i) a[i] = constant_a, b[i] = constant_b;
      convolve_rest(count, x, n, zero_lag + t * kWords, texts + (period + t) * w, a, b);
      for (int i = 0; i < count; ++i) {
        store(filtered + (t + i) * stride + start, a[i]);
        store(fused + (t + i) * stride + start, b[i] * scale);
      }
    }
  }
}

// The encoder's input: 2 (a σ(gate a) + b σ(gate b)) + position, LayerNorm.
inline void embed(const Model& m, const int64_t* ids, int64_t n, Scratch& s, float* out) {
  const int64_t stride = Scratch::row(m.width);
  convolve(m, ids, n, s, s.filtered, out);
  for (int64_t t = 0; t < n; ++t) {
    float *a = s.filtered + t * stride, *b = out + t * stride;
    const Vec gate_a = set1(2 * sigmoid(dot(a, m.gates, m.width) + m.gate_bias[0]));
    const Vec gate_b = set1(2 * sigmoid(dot(b, m.gates + m.width, m.width) + m.gate_bias[1]));
    const float* position = m.positions + t * m.width;
    for (int64_t i = 0; i < m.width; i += Vec::width)
      store(a + i, fma(load(a + i), gate_a, fma(load(b + i), gate_b, load(position + i))));
    layer_norm(m, a, m.input_norm, s.valid, b);
  }
}

// --- attention of the layers before the last ---

#if defined(__AVX512F__)
// 16 x 16, the last of `rows` again where there are fewer: interleaving rows r and r + 8 four
// times brings columns to rows.
inline void transpose_square(const float* in, int64_t in_stride, int64_t rows, float* out,
                             int64_t out_stride) {
  __m512i x[16], y[16];
  for (int r = 0; r < 16; ++r)
    x[r] = _mm512_loadu_si512(in + (r < rows ? r : rows - 1) * in_stride);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      y[2 * r] = _mm512_permutex2var_epi32(x[r], low, x[r + 8]);
      y[2 * r + 1] = _mm512_permutex2var_epi32(x[r], high, x[r + 8]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) x[r] = y[r];
  }
  for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + r * out_stride, x[r]);
}
#else
inline void transpose_square(const float* in, int64_t in_stride, int64_t rows, float* out,
                             int64_t out_stride) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c)
      out[c * out_stride + r] = in[(r < rows ? r : rows - 1) * in_stride + c];
}
#endif

// One user: softmax(Q K^T) V of every head, from [n] rows of queries, keys and values. Keys beyond
// n repeat the last one, masked.
inline void attend(const Model& m, const float* qkv, int64_t stride, int64_t n, Scratch& s,
                   float* out) {
  const int64_t heads = m.n_heads * m.head, keys = padded(n), score_row = Scratch::row(keys);
  for (int64_t j = 0; j < keys; ++j) s.mask[j] = j < n ? 0.f : -1e30f;
  for (int64_t h = 0; h < m.n_heads; ++h) {
    const float *q = qkv + h * m.head, *k = q + heads, *v = k + heads;
    for (int64_t j = 0; j < keys; j += 16)
      for (int64_t d = 0; d < m.head; d += 16) {
        float* panel = s.keys + (j / kPanel * m.head + d) * kPanel + j % kPanel;
        // Whole squares beyond n are masked as well, whatever they hold, but it must be finite.
        const int64_t row = j < n ? j : n - 1;
        transpose_square(k + row * stride + d, stride, n - row, panel, kPanel);
      }
    pack_floats(q, stride, n, m.head, s.packed);
    for (int64_t t = 0; t < tiles(n); ++t) {
      const Range range = tile_rows(n, t);
      for (int64_t j = 0; j < keys; j += kPanel)
        multiply_rows(range.count, s.packed + range.first * m.head, s.keys + j * m.head, kPanel,
                      m.head, s.mask + j, s.scores + range.first * score_row + j, score_row);
    }
    for (int64_t i = 0; i < n; ++i) softmax(s.scores + i * score_row, keys);
    pack_floats(s.scores, score_row, n, n, s.packed);
    const int64_t depth = (n + kWords - 1) / kWords * kWords;
    for (int64_t t = 0; t < tiles(n); ++t) {
      const Range range = tile_rows(n, t);
      for (int64_t d = 0; d < m.head; d += kPanel)
        multiply_rows(range.count, s.packed + range.first * depth, v + d, stride, n, kNoBias,
                      out + range.first * Scratch::row(heads) + h * m.head + d,
                      Scratch::row(heads));
    }
  }
}

// From the heads' outputs on: projection, residual, LayerNorm, feed-forward, LayerNorm, in place.
inline void finish_layer(const Model& m, const Layer& layer, const float* attended, int64_t rows,
                         Scratch& s, float* x) {
  const int64_t stride = Scratch::row(m.width);
  const auto residual = [&](const Range& range, int64_t column) {
    for (int64_t r = range.first; r < range.first + range.count; ++r)
      add(s.mixed + r * stride + column, x + r * stride + column, kPanel);
  };
  pack_rows(attended, Scratch::row(layer.out.in), rows, layer.out.in, m.half, s.packed);
  linear_packed(s.packed, rows, layer.out, s.mixed, stride, residual);
  for (int64_t r = 0; r < rows; ++r)
    layer_norm(m, s.mixed + r * stride, layer.attention_norm, s.valid, x + r * stride);

  // The inner layer goes from one product's tile into the rows of the next.
  pack_rows(x, stride, rows, layer.up.in, m.half, s.packed);
  for (int64_t panel = 0; panel < layer.up.out / kPanel; ++panel)
    linear_panel(s.packed, rows, layer.up, panel, s.mixed, kPanel, [&](const Range& range) {
      for (int64_t r = range.first; r < range.first + range.count; ++r)
        for (int64_t v = 0; v < kPanel; v += Vec::width)
          put_packed(gelu(load(s.mixed + r * kPanel + v)), range, r, panel * kPanel + v,
                     layer.down.in, m.half, s.projected);
    });
  linear_packed(s.projected, rows, layer.down, s.mixed, stride, residual);
  for (int64_t r = 0; r < rows; ++r)
    layer_norm(m, s.mixed + r * stride, layer.feed_norm, s.valid, x + r * stride);
}

// --- the last layer ---

// Attends from the last item of every user, [users] rows of `x`, to all of its items.
inline void attend_last(const Model& m, const Layer& layer, const int64_t* lengths, int64_t users,
                        Scratch& s, const float* x, float* out) {
  const int64_t stride = Scratch::row(m.width), heads = Scratch::row(m.n_heads * m.head);
  const int64_t wide = Scratch::row(m.n_heads * m.width);
  linear(x, stride, users, layer.project, s.packed, s.projected, heads);
  const int64_t key_size = layer.key.in * layer.key.out / (m.half ? 2 : 1);  // in words of 4 bytes
  for (int64_t h = 0; h < m.n_heads; ++h) {
    Linear key = layer.key;
    key.weight = (const float*)key.weight + h * key_size;
    linear(s.projected + h * m.head, heads, users, key, s.packed, s.per_head + h * m.width, wide);
  }
  const float* context = s.states;
  for (int64_t u = 0; u < users; ++u) {
    const int64_t n = lengths[u], keys = padded(n);
    for (int64_t h = 0; h < m.n_heads; ++h) {
      float* q = s.per_head + u * wide + h * m.width;
      for (int64_t j = 0; j < keys; ++j)
        s.scores[j] = j < n ? dot(q, context + j * stride, m.width) : -1e30f;
      softmax(s.scores, keys);
      for (int64_t i = 0; i < m.width; i += Vec::width) {
        Vec total = set1(0.f);
        for (int64_t j = 0; j < n; ++j)
          total = fma(set1(s.scores[j]), load(context + j * stride + i), total);
        store(q + i, total);
      }
    }
    context += n * stride;
  }
  for (int64_t h = 0; h < m.n_heads; ++h) {
    Linear value = layer.value;
    value.weight = (const float*)value.weight + h * key_size;
    value.bias += h * m.head;
    linear(s.per_head + h * m.width, wide, users, value, s.packed, out + h * m.head, heads);
  }
}

// --- what trm.cpp calls ---

inline void set_valid(const Model& m, Scratch& s) {
  for (int64_t i = 0; i < m.width; ++i) s.valid[i] = i < m.hidden ? 1.f : 0.f;
}

int64_t scratch_floats(const Model& m, int64_t users, int64_t tokens) {
  return Scratch(m, users, tokens, nullptr).size();
}

void history_states(const Model& m, const Request& request, int64_t first, int64_t last,
                    float* states, float* memory) {
  const int64_t stride = Scratch::row(m.width), heads = Scratch::row(m.n_heads * m.head);
  const int64_t* lengths = request.lengths;
  int64_t tokens = 0;
  for (int64_t u = first; u < last; ++u) tokens += lengths[u];
  Scratch s(m, last - first, tokens, memory);
  set_valid(m, s);
  float* x = s.states;
  for (int64_t u = first; u < last;) {
    int64_t end = u, rows = 0;
    for (; end < last && (end == u || rows + lengths[end] <= kGroupItems); ++end) {
      const int64_t* ids = request.history + end * request.history_width;
      if (end + 1 < last) fetch(m, ids + request.history_width, lengths[end + 1]);
      embed(m, ids, lengths[end], s, x + rows * stride);
      rows += lengths[end];
    }
    for (int64_t l = 0; l < m.n_layers - 1; ++l) {
      const Layer& layer = m.layer[l];
      const int64_t qkv = Scratch::row(layer.project.out);
      linear(x, stride, rows, layer.project, s.packed, s.projected, qkv);
      for (int64_t v = u, at = 0; v < end; at += lengths[v], ++v)
        attend(m, s.projected + at * qkv, qkv, lengths[v], s, s.attended + at * heads);
      finish_layer(m, layer, s.attended, rows, s, x);
    }
    x += rows * stride;
    u = end;
  }

  const int64_t users = last - first;
  const float* at = s.states;
  for (int64_t u = 0; u < users; ++u) {
    at += lengths[first + u] * stride;
    for (int64_t i = 0; i < m.width; i += Vec::width)
      store(s.last + u * stride + i, load(at - stride + i));
  }
  const Layer& layer = m.layer[m.n_layers - 1];
  attend_last(m, layer, lengths + first, users, s, s.last, s.attended);
  finish_layer(m, layer, s.attended, users, s, s.last);
  for (int64_t u = 0; u < users; ++u)
    for (int64_t i = 0; i < m.width; i += Vec::width)
      store(states + u * m.width + i, load(s.last + u * stride + i));
}

// states += Σ_e gate_e W_e text, the mixture of experts, then LayerNorm.
void add_preference(const Model& m, const Request& request, int64_t first, int64_t last,
                    float* states, float* memory) {
  const int64_t users = last - first;
  Scratch s(m, users, users, memory);
  set_valid(m, s);
  if (request.preference) {
    const int64_t text = Scratch::row(m.adaptor.in), experts = Scratch::row(padded(m.n_experts));
    for (int64_t u = 0; u < users; ++u) {
      const float* from = request.preference + (first + u) * m.text_dim;
      for (int64_t i = 0; i < m.adaptor.in; ++i)
        s.text_rows[u * text + i] = i < m.text_dim ? from[i] : 0.f;
    }
    linear(s.text_rows, text, users, m.adaptor_gate, s.packed, s.gate, experts);
    for (int64_t u = 0; u < users; ++u) {
      float* gate = s.gate + u * experts;
      for (int64_t e = m.n_experts; e < padded(m.n_experts); ++e) gate[e] = -1e30f;
      softmax(gate, padded(m.n_experts));
    }
    pack_rows(s.text_rows, text, users, m.adaptor.in, m.half, s.packed);
    for (int64_t column = 0; column < m.width; column += kPanel)
      for (int64_t e = 0; e < m.n_experts; ++e)
        linear_panel(s.packed, users, m.adaptor, (e * m.width + column) / kPanel, s.mixed, kPanel,
                     [&](const Range& range) {
                       for (int64_t u = range.first; u < range.first + range.count; ++u) {
                         const Vec gate = set1(s.gate[u * experts + e]);
                         float* out = states + u * m.width + column;
                         for (int64_t i = 0; i < kPanel; i += Vec::width)
                           store(out + i, fma(gate, load(s.mixed + u * kPanel + i), load(out + i)));
                       }
                     });
  }
  for (int64_t u = 0; u < users; ++u)
    layer_norm(m, states + u * m.width, m.output_norm, s.valid, states + u * m.width);
}

}  // namespace
}  // namespace deeprec::trm
