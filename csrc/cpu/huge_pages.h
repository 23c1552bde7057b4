// Large tables on 2 MB pages where the system grants them to those who ask: a search reads them
// end to end and then jumps about in them, and with 4 KB pages both wait for address translation
// (measured: 19 against 32 GB/s for a stream).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace deeprec {

// To be called before the memory is first written. A hint: nothing depends on its success.
inline void advise_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace deeprec
