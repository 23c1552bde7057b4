#include "cpu/topk_queries.h"

#include <algorithm>
#include <cmath>

#include "cpu/topk_rotate.h"

namespace deeprec::topk {
namespace {

// Bits of the hash filter per excluded id: one look-up in sixteen that need not be is made.
constexpr int64_t kBitsPerId = 16;
constexpr double kRoundUp = 1.0 + 0x1p-40;

// std::nearbyint for |x| < 2^51, without a call.
double nearest(double x) {
  constexpr double kWhole = 0x1.8p52;
  return (x + kWhole) - kWhole;
}

uint64_t hash_bit(uint32_t id, int64_t words) {
  return (uint64_t(id) * 0x9e3779b97f4a7c15u >> 20) & uint64_t(words * 64 - 1);
}

}  // namespace

Queries::Queries(const Index& index, const Request& request)
    : index_(index), request_(request), padded_((index.rows.dim + 7) / 8 * 8),
      code_bytes_(index.filter.codes ? code_shape(index.rows.dim).quads * 4 : 0),
      exact_(size_t(request.count * padded_)),
      rotated_(index.filter.fine ? exact_.size() : 0), codes_(size_t(request.count * code_bytes_)),
      coded_(size_t(request.count)), finite_(size_t(request.count)),
      filter_offset_(size_t(request.count) + 1) {
  if (!request.exclude.offsets) return;
  for (int64_t b = 0; b < request.count; ++b) {
    const int64_t ids = request.exclude.offsets[b + 1] - request.exclude.offsets[b];
    int64_t words = ids ? 1 : 0;
    while (words * 64 < ids * kBitsPerId) words *= 2;
    filter_offset_[size_t(b) + 1] = filter_offset_[size_t(b)] + words;
  }
  filter_.resize(size_t(filter_offset_.back()));
}

void Queries::prepare(int64_t query) {
  const int64_t dim = index_.rows.dim;
  const float* from = request_.queries + query * dim;
  double* exact = &exact_[size_t(query * padded_)];
  bool finite = true;
  for (int64_t d = 0; d < dim; ++d) {
    exact[d] = from[d];
    finite &= std::isfinite(from[d]);
  }
  finite_[size_t(query)] = finite;
  coded_[size_t(query)].exact = exact;
  if (finite && code_bytes_) code(query);

  const int64_t words = filter_offset_[size_t(query) + 1] - filter_offset_[size_t(query)];
  if (!words) return;
  uint64_t* bits = &filter_[size_t(filter_offset_[size_t(query)])];
  for (int64_t i = request_.exclude.offsets[query]; i < request_.exclude.offsets[query + 1]; ++i) {
    const uint64_t bit = hash_bit(uint32_t(request_.exclude.ids[i]), words);
    bits[bit / 64] |= uint64_t(1) << bit % 64;
  }
}

void Queries::code(int64_t query) {
  const int64_t dim = index_.rows.dim;
  CodedQuery& coded = coded_[size_t(query)];
  int8_t* codes = &codes_[size_t(query * code_bytes_)];
  std::vector<double> z(coded.exact, coded.exact + dim);
  rotate(z.data(), dim);
  coded.rotated = nullptr;
  if (!rotated_.empty()) {
    double* kept = &rotated_[size_t(query * padded_)];
    std::copy(z.begin(), z.end(), kept);
    coded.rotated = kept;
    double length = 0;
    for (double x : z) length += x * x;
    coded.length = std::sqrt(length) * kRoundUp;
  }
  double peak = 0;
  for (double x : z) peak = std::max(peak, std::fabs(x));
  coded.scale = peak > 0 ? peak / 127 : 1.0;
  double squares = 0, errors = 0, sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double scaled = z[size_t(d)] / coded.scale;
    const double u = std::max(-127.0, std::min(127.0, nearest(scaled)));
    codes[d] = int8_t(u);
    squares += u * u;
    errors += (scaled - u) * (scaled - u);
    sum += u;
  }
  coded.norm = std::sqrt(squares) * kRoundUp;
  coded.error = std::sqrt(errors) * kRoundUp + 1e-9;  // z / s itself is rounded
  coded.offset = 128 * sum;
  coded.codes = codes;
}

bool Queries::excluded(int64_t query, uint32_t id) const {
  const int64_t first = filter_offset_[size_t(query)];
  const int64_t words = filter_offset_[size_t(query) + 1] - first;
  if (!words) return false;
  const uint64_t bit = hash_bit(id, words);
  if (!(filter_[size_t(first) + bit / 64] >> bit % 64 & 1)) return false;
  const int64_t* ids = request_.exclude.ids;
  const int64_t* offsets = request_.exclude.offsets;
  return std::binary_search(ids + offsets[query], ids + offsets[query + 1], int64_t(id));
}

}  // namespace deeprec::topk
