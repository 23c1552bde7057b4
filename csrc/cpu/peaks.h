// What this machine can do at best: the yardsticks of the benchmarks. Each runs for about
// `seconds` on `threads` threads and returns operations (or bytes) per second; 0 where the active
// instruction set has no such instruction.
#pragma once

#include <cstdint>

namespace deeprec::peaks {

double read_bandwidth(double seconds, int threads);  // bytes/s

// Multiply-adds count two operations.
struct Kernels {
  // Each runs `rounds` times a fixed block of independent instructions and returns its operations.
  double (*fp32_fma)(int64_t rounds);
  double (*fp64_fma)(int64_t rounds);
  double (*int8_dot)(int64_t rounds);
  double (*bf16_dot)(int64_t rounds);
};

enum class Unit { fp32_fma, fp64_fma, int8_dot, bf16_dot };
double operations(Unit unit, double seconds, int threads);

// What `run` does in a second at best, summed over threads; it returns what one call did.
double best_rate(double (*run)(int64_t rounds), double seconds, int threads);

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* amx_kernels();

}  // namespace deeprec::peaks
