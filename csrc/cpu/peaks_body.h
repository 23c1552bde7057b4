// Peak kernels from vector types: included by every peaks_ISA.cpp inside its own namespace.
// `Step` has a Vector, how many operations one step does, and step(sum, a, b).

// Enough independent sums to cover an instruction's latency on every port.
constexpr int kSums = 12;

template <class Step>
double run_steps(int64_t rounds) {
  typename Step::Vector a{}, b{}, sum[kSums] = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) {
      sum[j] = Step::step(sum[j], a, b);
      asm volatile("" : "+v"(sum[j]));  // neither reordered into loops of one sum nor dropped
    }
  }
  return double(rounds) * kSums * Step::kOperations;
}
