#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace deeprec {
namespace {


#if defined(__x86_64__)
struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
  Cpuid r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

uint64_t enabled_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Linux hands out the AMX tile registers only to processes that ask for them.
bool request_amx_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::scalar};
#if defined(__x86_64__)
  const auto bit = [](uint32_t word, int n) { return ((word >> n) & 1u) != 0; };
  const Cpuid one = cpuid(1, 0);
  if (!bit(one.ecx, 27)) return found;  // OSXSAVE: the state below can be read
  const uint64_t state = enabled_state();
  const Cpuid seven = cpuid(7, 0), seven1 = cpuid(7, 1);
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  const bool avx2 = ymm && bit(one.ecx, 12) && bit(one.ecx, 29) && bit(seven.ebx, 5);
  const bool avx512 = avx2 && zmm && bit(seven.ebx, 16) && bit(seven.ebx, 17) &&
                      bit(seven.ebx, 30) && bit(seven.ebx, 31);
  const bool vnni512 = avx512 && bit(seven.ecx, 11) && bit(seven1.eax, 5);
  const bool tiles = (state & 0x60000) == 0x60000;
  if (avx2) found.push_back(Isa::avx2);
  if (avx2 && bit(seven1.eax, 4)) found.push_back(Isa::avx_vnni);
  if (avx512) found.push_back(Isa::avx512);
  if (vnni512) found.push_back(Isa::avx512_vnni);
  if (vnni512 && tiles && bit(seven.edx, 22) && bit(seven.edx, 24) && bit(seven.edx, 25) &&
      request_amx_tiles())
    found.push_back(Isa::amx);
#endif
  return found;
}

Isa parse(const std::string& name) {
  if (name.empty() || name == "auto") return available_isas().back();
  std::string choices = "auto";
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    choices += std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument("isa \"" + name + "\" is not available on this machine; choose one of: " +
                              choices);
}

std::atomic<int>& active() {
  static std::atomic<int> isa{[] {
    const char* forced = std::getenv("DEEPREC_ISA");
    return int(parse(forced ? forced : ""));
  }()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx_vnni: return "avx_vnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512_vnni: return "avx512_vnni";
    case Isa::amx: return "amx";
  }
  return "unknown";
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

Isa active_isa() { return Isa(active().load(std::memory_order_relaxed)); }

void set_isa(const std::string& name) { active().store(int(parse(name))); }

}  // namespace deeprec
