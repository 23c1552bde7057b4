// Queries made ready for a search: widened for exact scores, coded for the scan, their exclusions
// hashed for a quick no.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/topk.h"

namespace deeprec::topk {

struct CodedQuery {
  const double* exact;  // [dim rounded up to 8], zero-padded
  const int8_t* codes;  // [quads * 4]; nullptr without a prefilter
  double scale;         // s: codes * s approximate the rotated query
  double norm, error;   // |z'| / s and |z - z'| / s
  double offset;        // 128 * sum(codes)
  const double* rotated;  // z, padded like exact; nullptr without 16-bit codes
  double length;          // >= |z|
};

class Queries {
 public:
  Queries(const Index& index, const Request& request);

  void prepare(int64_t query);  // independent of the others; false fields are filled in
  bool finite(int64_t query) const { return finite_[std::size_t(query)] != 0; }
  const CodedQuery& operator[](int64_t query) const { return coded_[std::size_t(query)]; }
  bool excluded(int64_t query, uint32_t id) const;

 private:
  void code(int64_t query);

  const Index& index_;
  const Request& request_;
  int64_t padded_, code_bytes_;
  std::vector<double> exact_, rotated_;
  std::vector<int8_t> codes_;
  std::vector<CodedQuery> coded_;
  std::vector<uint8_t> finite_;
  std::vector<uint64_t> filter_;        // one bit a hash
  std::vector<int64_t> filter_offset_;  // [count + 1] in words; a power of two, or none
};

}  // namespace deeprec::topk
