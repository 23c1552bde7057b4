#include "cpu/peaks.h"

#include <algorithm>
#include <chrono>
#include <memory>

#include "cpu/huge_pages.h"
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
  // Beyond any private cache; like the tables it is compared with, a server's shared one may
  // hold it.
  const int64_t words = (int64_t(128) << 20) / 8;
  const int64_t passes = std::max<int64_t>(4, int64_t(seconds / 0.01));
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    // As the tables of an index: on huge pages where there are any, and written after the advice.
    const std::unique_ptr<uint64_t[]> data(new uint64_t[size_t(words)]);
    advise_huge_pages(data.get(), words * 8);
    std::fill_n(data.get(), words, 1);
    double best = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
#pragma omp barrier
      const Clock::time_point start = Clock::now();
      uint64_t sum[16] = {};
      for (int64_t i = 0; i < words; i += 16)
        for (int j = 0; j < 16; ++j) sum[j] += data[size_t(i + j)];
      uint64_t read = 0;
      for (uint64_t words_read : sum) read += words_read;  // every word is 1
      best = std::max(best, double(read) * 8 / since(start));
    }
    total = best;
  }
  return total;
}

double operations(Unit unit, double seconds, int threads) {
  const Kernels& kernels = active_kernels();
  double (*const run)(int64_t) = unit == Unit::fp32_fma   ? kernels.fp32_fma
                                 : unit == Unit::fp64_fma ? kernels.fp64_fma
                                 : unit == Unit::int8_dot ? kernels.int8_dot
                                                          : kernels.bf16_dot;
  return run ? best_rate(run, seconds, threads) : 0;
}

double best_rate(double (*run)(int64_t rounds), double seconds, int threads) {
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
      best = std::max(best, done / since(start));
    } while (since(begin) < seconds);
    total = best;
  }
  return total;
}

}  // namespace deeprec::peaks
