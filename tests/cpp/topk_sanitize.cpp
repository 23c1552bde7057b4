// Exact top-k under AddressSanitizer and UBSan: every kernel this machine has, on shapes whose
// tails do not fill a register, a block or a tile. Buffers have exactly the size they must have,
// so that one element too many is an error. Compiled and run by tests/ops/test_topk_sanitize.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "cpu/topk.h"

using namespace deeprec;
using namespace deeprec::topk;

namespace {

struct Problem {
  int64_t items, dim, queries, k;
};

void fail(const char* what, const Problem& p) {
  std::fprintf(stderr, "%s: %ld x %ld, %ld queries, k %ld, %s\n", what, long(p.items), long(p.dim),
               long(p.queries), long(p.k), isa_name(active_isa()));
  std::exit(1);
}

struct Result {
  std::vector<float> values;
  std::vector<int64_t> indices, rescored;
  explicit Result(const Problem& p)
      : values(size_t(p.queries * p.k)), indices(values.size()), rescored(size_t(p.queries)) {}
};

template <class T>
void run(const Problem& p, Dtype type, const std::vector<T>& items, std::mt19937& random,
         float scale) {
  std::normal_distribution<float> normal;
  std::vector<float> queries(size_t(p.queries * p.dim));
  for (float& x : queries) x = normal(random) * scale;
  std::vector<uint32_t> order(static_cast<size_t>(p.items));
  for (size_t i = 0; i < order.size(); ++i) order[i] = uint32_t(order.size() - 1 - i);
  // Two centers, in turn, and 16-bit codes.
  std::vector<double> center(size_t(2 * p.dim), 0.25 * scale);
  std::fill(center.begin() + p.dim, center.end(), -0.5 * scale);

  const int64_t blocks = (p.items + kBlockRows - 1) / kBlockRows;
  const int64_t quads = code_shape(p.dim).quads;
  std::vector<uint8_t> codes(size_t(blocks * quads * kBlockRows * 4));
  std::vector<BlockBound> bounds(static_cast<size_t>(blocks));
  Index index{{items.data(), p.items, p.dim, p.dim, type}, {}};
  std::vector<int32_t> cluster(static_cast<size_t>(blocks));
  for (size_t b = 0; b < cluster.size(); ++b) cluster[b] = int32_t(b % 2);
  std::vector<int16_t> fine(size_t(p.items * p.dim));
  std::vector<FineBound> fine_bounds(static_cast<size_t>(blocks));
  const Prefilter filter{codes.data(),  bounds.data(),      order.data(), center.data(), 2,
                         cluster.data(), fine.data(), fine_bounds.data()};
  encode_blocks(index.rows, filter, nullptr, blocks, 2);

  std::vector<int64_t> offsets{0}, ids;
  for (int64_t q = 0; q < p.queries; ++q) {
    for (int64_t i = q; i < p.items; i += 7 + q) ids.push_back(i);
    offsets.push_back(int64_t(ids.size()));
  }
  for (const bool exclude : {false, true}) {
    Request request{queries.data(), p.queries, p.k, {}, 2};
    if (exclude) request.exclude = {offsets.data(), ids.data()};
    set_isa("scalar");
    Result expected(p);
    index.filter = {};
    search(index, request, {expected.values.data(), expected.indices.data(), expected.rescored.data()});
    for (const Isa isa : available_isas()) {
      set_isa(isa_name(isa));
      for (const bool coded : {false, true}) {
        index.filter = coded ? filter : Prefilter{};
        Result got(p);
        search(index, request, {got.values.data(), got.indices.data(), got.rescored.data()});
        if (got.indices != expected.indices || got.values != expected.values)
          fail("answers differ", p);
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const Problem problems[] = {{1, 1, 1, 3},    {31, 5, 3, 40},   {600, 7, 9, 5},
                              {1025, 33, 6, 20}, {2000, 68, 37, 10}, {5000, 16, 130, 2}};
  for (const Problem& p : problems) {
    const size_t size = size_t(p.items * p.dim);
    for (const float scale : {1.0f, 1e-39f, 1e37f}) {
      std::vector<float> wide(size);
      for (float& x : wide) x = float(int(normal(random) * 4)) * scale;
      run(p, Dtype::f32, wide, random, scale);
    }
    std::vector<uint16_t> narrow(size);
    for (uint16_t& x : narrow) x = uint16_t(0x3c00 + random() % 512 + (random() % 2 << 15));
    run(p, Dtype::bf16, narrow, random, 1.0f);
    run(p, Dtype::f16, narrow, random, 1.0f);
    std::vector<double> norms(static_cast<size_t>(p.items));
    std::vector<float> unit(size);
    const ItemRows rows{narrow.data(), p.items, p.dim, p.dim, Dtype::f16};
    row_norms(rows, nullptr, norms.data(), 2);
    normalize_rows(rows, unit.data(), 2);
  }
  const float nan[2] = {1.0f, __builtin_nanf("")}, one[2] = {1.0f, 1.0f};
  float value;
  int64_t index, rescored;
  try {
    search({{one, 1, 2, 2, Dtype::f32}, {}}, {nan, 1, 1, {}, 1}, {&value, &index, &rescored});
  } catch (const std::exception&) {
    std::puts("ok");
    return 0;
  }
  fail("NaN accepted", {1, 2, 1, 1});
}
