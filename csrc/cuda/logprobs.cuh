// gather_logprobs: one block a row, which is read once forward and once backward.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/logprobs.h"
#include "cuda/permitted.cuh"
#include "cuda/row_softmax.cuh"

namespace deeprec::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;
// Logits a thread takes at a time: four 128-bit loads in flight in fp32, two in 16 bits.
constexpr int kGatherChunk = 16;
constexpr int kGatherShared = kGatherWarps * int(sizeof(PartialSoftmax));

template <class T>
__device__ const T* logits_row(const GatherProblem& p, int64_t row) {
  return static_cast<const T*>(p.logits) + (p.row_offsets ? p.row_offsets[row] : row * p.vocabulary);
}

// This thread's part of the softmax of a row.
template <bool kEntropy, class T>
__device__ PartialSoftmax partial_softmax(const T* x, int64_t n, const Permitted& permitted,
                                          const ScaledExp& exp) {
  PartialSoftmax softmax;
  const auto single = [&](int64_t i) {
    const float z[1] = {widen(x[i])};
    softmax.add<kEntropy>(z, exp);
  };
  if (permitted.restricts()) {
    for (int64_t i = threadIdx.x; i < permitted.count; i += blockDim.x)
      if (in_vocabulary(permitted.ids[i], n)) single(permitted.ids[i]);
  } else {
    const bool vectors = on_vectors(x);
    share_row<kGatherChunk>(
        n,
        [&](int64_t first) {
          float z[kGatherChunk];
          load_floats(x + first, vectors, z);
          softmax.add<kEntropy>(z, exp);
        },
        single);
  }
  return softmax;
}

// The block's parts joined, in every thread; the order depends on nothing but the thread's place.
template <bool kEntropy>
__device__ PartialSoftmax join_block(PartialSoftmax softmax, PartialSoftmax* shared,
                                     const ScaledExp& exp) {
  softmax = join_lanes<kEntropy>(softmax, 32, exp);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = softmax;
  __syncthreads();
  softmax = shared[0];
  for (int warp = 1; warp < kGatherWarps; ++warp) softmax.join<kEntropy>(shared[warp], exp);
  __syncthreads();  // the next row may write
  return softmax;
}

// Four blocks a multiprocessor leave a thread the registers it needs: none is spilled.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kGatherThreads, 4)
    gather_forward_kernel(GatherProblem p, GatherForward out, ScaledExp exp) {
  PartialSoftmax* shared = dynamic_smem<PartialSoftmax>();
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float* values = out.values + row * p.ids_per_row;
    if (p.mask && !p.mask[row]) {
      for (int64_t k = threadIdx.x; k < p.ids_per_row; k += blockDim.x) values[k] = 0;
      if (threadIdx.x == 0) {
        if (kEntropy) out.entropy[row] = 0;
        out.states[row] = {0, 1};
      }
      continue;
    }
    const T* x = logits_row<T>(p, row);
    const Permitted permitted(p.allowed, row);
    const PartialSoftmax softmax =
        join_block<kEntropy>(partial_softmax<kEntropy>(x, p.vocabulary, permitted, exp),
                             shared, exp);
    const int64_t* ids = p.ids + row * p.ids_per_row;
    for (int64_t k = threadIdx.x; k < p.ids_per_row; k += blockDim.x) {
      float z = kNaN;
      if (in_vocabulary(ids[k], p.vocabulary))
        z = permitted.permits(ids[k]) ? widen(x[ids[k]]) : -kInfinity;
      values[k] = logprob(softmax, z, p.temperature);
    }
    if (threadIdx.x == 0) {
      if (kEntropy) out.entropy[row] = entropy(softmax, p.temperature);
      out.states[row] = {softmax.largest, softmax.sum};
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads)
    gather_backward_kernel(GatherProblem p, GatherBackward in, ScaledExp exp) {
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    T* out = static_cast<T*>(in.grad_logits) + row * p.vocabulary;
    const Permitted permitted(p.allowed, row);
    const bool counts = !p.mask || p.mask[row];
    if (!counts || permitted.restricts()) {
      const float zeros[kGatherChunk] = {};
      share_row<kGatherChunk>(
          p.vocabulary, [&](int64_t first) { store_floats(zeros, on_vectors(out), out + first); },
          [&](int64_t i) { narrow(0.f, out + i); });
    }
    if (!counts) continue;

    const T* x = logits_row<T>(p, row);
    const int64_t* ids = p.ids + row * p.ids_per_row;
    const float* grads = in.grad_values + row * p.ids_per_row;
    double total = 0;
    for (int64_t k = 0; k < p.ids_per_row; ++k) total += double(grads[k]);
    const RowGradient gradient = RowGradient::of(
        in.states[row], total,
        in.grad_entropy ? in.grad_entropy[row] : 0.f, in.grad_entropy ? in.entropy[row] : 0.f,
        p.temperature);
    const auto single = [&](int64_t i) {
      out[i] = narrowed<T>(gradient(widen(x[i]), exp));
    };
    if (permitted.restricts()) {
      __syncthreads();  // the zeros are written
      for (int64_t i = threadIdx.x; i < permitted.count; i += blockDim.x)
        if (in_vocabulary(permitted.ids[i], p.vocabulary)) single(permitted.ids[i]);
    } else {
      const bool read = on_vectors(x), written = on_vectors(out);
      share_row<kGatherChunk>(
          p.vocabulary,
          [&](int64_t first) {
            float z[kGatherChunk];
            load_floats(x + first, read, z);
#pragma unroll
            for (int i = 0; i < kGatherChunk; ++i) z[i] = gradient(z[i], exp);
            store_floats(z, written, out + first);
          },
          single);
    }
    // The tokens' own terms are added before the one rounding to T, repeated tokens together.
    __syncthreads();
    for (int64_t k = threadIdx.x; k < p.ids_per_row; k += blockDim.x) {
      if (!in_vocabulary(ids[k], p.vocabulary) || !permitted.permits(ids[k])) continue;
      double own = 0;
      bool first = true;
      for (int64_t j = 0; j < p.ids_per_row; ++j) {
        if (ids[j] != ids[k]) continue;
        own += double(grads[j]);
        first &= j >= k;
      }
      if (!first) continue;
      const float rest = gradient(widen(x[ids[k]]), exp);
      out[ids[k]] = narrowed<T>(float(double(rest) + own / p.temperature));
    }
  }
}

// ---- launchers ----

inline dim3 gather_grid(const GatherProblem& p) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  return dim3(unsigned(p.rows < kMostBlocks ? p.rows : kMostBlocks));
}

template <class T>
void launch_gather_forward(const GatherProblem& p, const GatherForward& out, void* stream) {
  launch("gather_logprobs", {gather_grid(p), kGatherThreads, kGatherShared, stream},
         out.entropy ? gather_forward_kernel<T, true> : gather_forward_kernel<T, false>, p, out,
         ScaledExp::of(p.temperature));
}

void gather_logprobs(const GatherProblem& p, const GatherForward& out, void* stream) {
  switch (p.dtype) {
    case DType::f32: return launch_gather_forward<float>(p, out, stream);
    case DType::bf16: return launch_gather_forward<Bf16>(p, out, stream);
    case DType::f16: return launch_gather_forward<F16>(p, out, stream);
  }
}

template <class T>
void launch_gather_backward(const GatherProblem& p, const GatherBackward& io, void* stream) {
  launch("gather_logprobs_backward", {gather_grid(p), kGatherThreads, 0, stream},
         gather_backward_kernel<T>, p, io, ScaledExp::of(p.temperature));
}

void gather_logprobs_backward(const GatherProblem& p, const GatherBackward& io,
                                     void* stream) {
  switch (p.dtype) {
    case DType::f32: return launch_gather_backward<float>(p, io, stream);
    case DType::bf16: return launch_gather_backward<Bf16>(p, io, stream);
    case DType::f16: return launch_gather_backward<F16>(p, io, stream);
  }
}

}  // namespace deeprec::cuda
