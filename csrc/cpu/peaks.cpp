#include "cpu/peaks.h"

#include <omp.h>

#include <chrono>
#include <vector>

#include "cpu/isa.h"

namespace deeprec::peaks {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

const Kernels& active_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::avx2: return *avx2_kernels();
    case Isa::avx_vnni: return *avx_vnni_kernels();
    case Isa::avx512: return *avx512_kernels();
    case Isa::avx512_vnni: return *avx512_vnni_kernels();
    case Isa::amx: return *amx_kernels();
#endif
    default: return *scalar_kernels();
  }
}

}  // namespace

double read_bandwidth(double seconds, int threads) {
  // Far beyond any cache but a server's last level, which a table of this size shares too.
  const int64_t words = (int64_t(256) << 20) / 8;
  double best = 0;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint64_t> data(size_t(words), 1);
    const Clock::time_point begin = Clock::now();
    while (since(begin) < seconds) {
#pragma omp barrier
      const Clock::time_point start = Clock::now();
      uint64_t sum[8] = {};
      for (int64_t i = 0; i < words; i += 8)
        for (int j = 0; j < 8; ++j) sum[j] += data[size_t(i + j)];
      const uint64_t total = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
      const double rate = double(total) * 8 / since(start);  // every word is 1
#pragma omp critical
      best = rate > best ? rate : best;
#pragma omp barrier
      break;
    }
  }
  return best * threads;
}

double operations(Unit unit, double seconds, int threads) {
  const Kernels& kernels = active_kernels();
  double (*const run)(int64_t) = unit == Unit::fp32_fma   ? kernels.fp32_fma
                                 : unit == Unit::fp64_fma ? kernels.fp64_fma
                                 : unit == Unit::int8_dot ? kernels.int8_dot
                                                          : kernels.bf16_dot;
  if (!run) return 0;
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    // The best of many short stretches: a peak is what the machine can do, not what it does
    // while something else runs.
    constexpr int64_t kRounds = 20000;
    double best = 0;
    const Clock::time_point begin = Clock::now();
    do {
      const Clock::time_point start = Clock::now();
      const double done = run(kRounds);
      const double rate = done / since(start);
      best = rate > best ? rate : best;
    } while (since(begin) < seconds);
    total = best;
  }
  return total;
}

}  // namespace deeprec::peaks
