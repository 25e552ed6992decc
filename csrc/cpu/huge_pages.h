// Large memory pages for packed weights: with pages of 4 KiB, looking up their addresses takes a part of the time of
// reading them.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace earlyexit::cpu {

// Asks the system to use huge pages for whole pages of some memory, which it may decline.
inline void prefer_huge_pages(uintptr_t address, uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace earlyexit::cpu
