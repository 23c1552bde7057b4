// The 8-bit codes of an index, and why they lose nothing.
//
// A row x is centred, rotated and rounded: y = R(x - m), codes v = round(y * r) with one m and one
// r a block, decoded y' = v / r. A query q is rotated and rounded: z = Rq, codes u = round(z / s),
// z' = s u. R is orthogonal, so over the reals q.x = q.m + z.y, and by Cauchy-Schwarz
//
//   |z.y - z'.y'| = |z'.(y - y') + (z - z').y| <= |z'| |y - y'| + |z - z'| |y|.             (1)
//
// Everything is computed in fp64 (unit u = 2^-53), which adds, with p = D rounded up:
//   - x - m: u (|x| + |m|); R: 2 (log2 p + 1) roundings, each u relative to the norm; the same
//     for z. Both change z.y by at most (4 log2 p + 6) u |q| (|x| + |m|);
//   - q.m, summed in any order: D u |q| |m|;
//   - the score itself, eight lanes: (D / 8 + 4) u |q| |x|.
// Together less than (2 D + 64) u |q| (|x| + |m|), doubled below for second-order terms. Since
// |z'| >= 127 s and |z - z'| <= s sqrt(D) / 2, |q| <= |z'| (1 + sqrt(D) / 254) up to rounding, so
// the term is charged to |y - y'| in (1): the stored error of a block is
//
//   error = max |y - y'| + slack(D) max(|x| + |m|),  slack = (D + 32) 2^-51 (1 + sqrt(D) / 254)
//
// and with norm = max |y| (bumped for its own rounding and for storage as fp32)
//
//   |exact fp64 score - (q.m + z'.y')| <= |z'| error + |z - z'| norm.                       (2)
//
// In units of s / r, z'.y' is the integer u.v and (2) reads
//   d = u.v,  radius = (|z'| / s) (r error) + (|z - z'| / s) (r norm).
// BlockBound keeps r error and r norm; the query side keeps the other two factors.
//
// Rows that this leaves may have a second code, w = round(y * t) of 16 bits with y'' = w / t, which
// meets the query as it is: |z.y - z.y''| <= |z| |y - y''|. z.w is computed in fp64, so that to the
// list above comes (D / 8 + 4) u |q| (|x| + |m|), for which the first line leaves room. FineBound
// keeps t error, with error = max |y - y''| + slack(D) max(|x| + |m|). t is 258 r, so what both
// levels leave is hundreds of times closer than what the first does. A row can only
// be among the best if its score, rounded to fp32, is at least the running k-th best T, an fp32
// number; topk.cpp lowers T by more than half a unit in its last place before the comparison.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/float_env.h"
#include "cpu/topk.h"
#include "cpu/topk_rotate.h"

namespace deeprec::topk {
namespace {

#include "cpu/topk_items.h"

// fp64 -> fp32 conversions and products of already rounded factors: generous, and free.
constexpr double kRoundUp = 1.0 + 0x1p-20;

// Rows whose largest entry is below this are coded as zero with their norm as error: 1 / scale
// stays a normal fp32 number.
constexpr double kSmallestPeak = 0x1p-100;

double element(const ItemRows& rows, int64_t row, int64_t d) {
  const int64_t at = row * rows.stride + d;
  switch (rows.type) {
    case Dtype::f32: return static_cast<const float*>(rows.data)[at];
    case Dtype::bf16: return to_float(static_cast<const Bf16*>(rows.data)[at]);
    case Dtype::f16: return to_float(static_cast<const Half*>(rows.data)[at]);
  }
  return 0;
}

double norm_of(const double* v, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += v[d] * v[d];
  return std::sqrt(sum);
}

class BlockEncoder {
 public:
  BlockEncoder(const ItemRows& rows, const Prefilter& filter)
      : rows_(rows), filter_(filter), shape_(code_shape(rows.dim)),
        slack_((double(rows.dim) + 32) * 0x1p-51 * (1 + std::sqrt(double(rows.dim)) / 254)),
        vectors_(size_t(kBlockRows * rows.dim)) {}

  void encode(int64_t block) {
    uint8_t* codes = filter_.codes + block * shape_.quads * kBlockRows * 4;
    std::memset(codes, 128, size_t(shape_.quads * kBlockRows * 4));
    const int64_t first = block * kBlockRows;
    const int64_t n = std::min(kBlockRows, rows_.count - first);
    const double* center = filter_.center_of(block, rows_.dim);
    const double center_norm = center ? norm_of(center, rows_.dim) : 0;
    double peak = kSmallestPeak, norm = 0, size = 0;
    for (int64_t r = 0; r < n; ++r) {
      double* y = &vectors_[size_t(r * rows_.dim)];
      const int64_t row = filter_.order ? filter_.order[first + r] : first + r;
      double squares = 0;
      for (int64_t d = 0; d < rows_.dim; ++d) {
        const double x = element(rows_, row, d);
        squares += x * x;
        y[d] = center ? x - center[d] : x;
      }
      rotate(y, rows_.dim);
      for (int64_t d = 0; d < rows_.dim; ++d) peak = std::max(peak, std::fabs(y[d]));
      norm = std::max(norm, norm_of(y, rows_.dim));
      size = std::max(size, std::sqrt(squares) + center_norm);
    }
    // The fp32 number itself is the scale; at most 127 after rounding because it is rounded down.
    const float inverse_scale = std::nextafterf(float(127.0 / peak), 0.0f);
    double error = 0;
    for (int64_t r = 0; r < n; ++r) {
      const double* y = &vectors_[size_t(r * rows_.dim)];
      double squares = 0;
      for (int64_t d = 0; d < rows_.dim; ++d) {
        const double scaled = y[d] * double(inverse_scale), code = std::nearbyint(scaled);
        codes[(d / 4 * kBlockRows + r) * 4 + d % 4] = uint8_t(int(code) + 128);
        squares += (scaled - code) * (scaled - code);
      }
      error = std::max(error, std::sqrt(squares));
    }
    if (filter_.fine) encode_fine(block, n, peak, size);
    BlockBound& bound = filter_.bounds[block];
    bound.inverse_scale = inverse_scale;
    // The error is measured in units of the scale already; 1e-9 covers y * r being rounded.
    bound.error = float((error + 1e-9 + slack_ * size * inverse_scale) * kRoundUp);
    bound.norm = float(norm * inverse_scale * kRoundUp);
  }

 private:
  // Of the rows that encode() has just centred and rotated.
  void encode_fine(int64_t block, int64_t n, double peak, double size) {
    const float inverse_scale = std::nextafterf(float(32767.0 / peak), 0.0f);
    double error = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double* y = &vectors_[size_t(i * rows_.dim)];
      int16_t* codes = filter_.fine + (block * kBlockRows + i) * rows_.dim;
      double squares = 0;
      for (int64_t d = 0; d < rows_.dim; ++d) {
        const double scaled = y[d] * double(inverse_scale), code = std::nearbyint(scaled);
        codes[d] = int16_t(code);
        squares += (scaled - code) * (scaled - code);
      }
      error = std::max(error, std::sqrt(squares));
    }
    // As below; y * t is 258 times larger.
    filter_.fine_bounds[block] = {
        inverse_scale, float((error + 1e-6 + slack_ * size * inverse_scale) * kRoundUp)};
  }

  ItemRows rows_;
  Prefilter filter_;
  CodeShape shape_;
  double slack_;
  std::vector<double> vectors_;
};

}  // namespace

void row_norms(const ItemRows& rows, const double* center, double* norms, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const DefaultFloatEnv env;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows.count; ++i) {
      double sum = 0;
      for (int64_t d = 0; d < rows.dim; ++d) {
        const double x = element(rows, i, d) - (center ? center[d] : 0.0);
        sum += x * x;
      }
      norms[i] = std::sqrt(sum);
    }
  }
}

void normalize_rows(const ItemRows& rows, float* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const DefaultFloatEnv env;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows.count; ++i) {
      double lane[8] = {};
      for (int64_t d = 0; d < rows.dim; ++d) {
        const double x = element(rows, i, d);
        lane[d % 8] += x * x;
      }
      const double norm = std::sqrt(((lane[0] + lane[4]) + (lane[2] + lane[6])) +
                                    ((lane[1] + lane[5]) + (lane[3] + lane[7])));
      for (int64_t d = 0; d < rows.dim; ++d)
        out[i * rows.dim + d] = float(element(rows, i, d) / norm);
    }
  }
}

void encode_blocks(const ItemRows& rows, const Prefilter& filter, const int64_t* blocks,
                   int64_t n_blocks, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const DefaultFloatEnv env;
    BlockEncoder encoder(rows, filter);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_blocks; ++i) encoder.encode(blocks ? blocks[i] : i);
  }
}

}  // namespace deeprec::topk
