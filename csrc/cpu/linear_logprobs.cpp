#include "cpu/linear_logprobs.h"

#include <cstdlib>
#include <new>

#include "cpu/isa.h"

namespace deeprec {

extern const LinearKernels kLinear_scalar;
#if defined(__x86_64__)
extern const LinearKernels kLinear_avx2, kLinear_avx512, kLinear_avx512_vnni, kLinear_amx,
    kLinearFloat_amx;
#endif

namespace {

// The float kernels take any dtype; the bf16 ones need bf16 on both sides.
const LinearKernels& kernels(const LinearProblem& p) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (p.hidden.dtype == DType::bf16 && p.weight.dtype == DType::bf16) {
    if (isa >= Isa::amx) return kLinear_amx;
    if (isa >= Isa::avx512_vnni) return kLinear_avx512_vnni;
  }
  if (isa >= Isa::amx) return kLinearFloat_amx;
  if (isa >= Isa::avx512) return kLinear_avx512;
  if (isa >= Isa::avx2) return kLinear_avx2;
#endif
  return kLinear_scalar;
}

RowSplit split(const LinearProblem& p) {
  RowSplit rows;
  for (int64_t row = 0; row < p.hidden.rows; ++row)
    if (!p.mask || p.mask[row]) (p.allowed.restricts(row) ? rows.restricted : rows.full).push_back(row);
  return rows;
}

// A counting sort of the restricted rows' permitted ids by token.
SparseGradient by_token(const LinearProblem& p, const RowSplit& rows) {
  SparseGradient sparse;
  if (rows.restricted.empty()) return sparse;
  const int64_t *offsets = p.allowed.offsets, *ids = p.allowed.ids;
  sparse.starts.assign(size_t(p.weight.rows) + 1, 0);
  for (int64_t row : rows.restricted)
    for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) ++sparse.starts[ids[i] + 1];
  for (int64_t token = 0; token < p.weight.rows; ++token)
    sparse.starts[token + 1] += sparse.starts[token];
  sparse.rows.resize(size_t(sparse.starts.back()));
  sparse.positions.resize(sparse.rows.size());
  sparse.values.resize(size_t(offsets[p.hidden.rows]));
  std::vector<int64_t> next(sparse.starts.begin(), sparse.starts.end() - 1);
  for (int64_t row : rows.restricted)
    for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
      const int64_t at = next[ids[i]]++;
      sparse.rows[at] = row;
      sparse.positions[at] = i;
    }
  return sparse;
}

}  // namespace

Scratch::Scratch(int64_t bytes) {
  memory_ = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64 + 64));
  if (!memory_) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(memory_); }

void linear_logprobs(const LinearProblem& p, const LinearForward& out) {
  for (int64_t row = 0; row < p.hidden.rows; ++row) {
    if (!p.mask || p.mask[row]) continue;
    out.values[row] = 0;
    out.states[row] = {0, 1};
    if (out.entropy) out.entropy[row] = 0;
  }
  kernels(p).forward(p, out, split(p));
}

void linear_logprobs_backward(const LinearProblem& p, const LinearBackward& io) {
  const RowSplit rows = split(p);
  SparseGradient sparse;
  if (io.grad_weight || io.grad_bias) sparse = by_token(p, rows);
  kernels(p).backward(p, io, rows, sparse);
}

}  // namespace deeprec
