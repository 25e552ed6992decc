// The Python module. Loading it registers the ops, whose schemas are in earlyexit_kernels/ops/schema.py.

#include "bindings.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "call.h"
#include "cpu/simd/table.h"

namespace earlyexit {
namespace {

// With pages of 4 KiB, looking up the addresses of packed weights takes a part of the time of reading them.
void prefer_huge_pages(uintptr_t address, uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

pybind11::dict layer_kernels() {
  pybind11::dict described;
  if (const cpu::Kernels* kernels = cpu::native_kernels()) {
    std::vector<int64_t> terms;
    for (const cpu::Format& format : kernels->formats) terms.push_back(format.terms);
    described["name"] = kernels->name;
    described["columns"] = kernels->columns;
    described["terms"] = terms;
  }
  return described;
}

}  // namespace
}  // namespace earlyexit

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of earlyexit_kernels; `criteria` lists the supported exit rules.";
  module.attr("criteria") = pybind11::tuple(pybind11::cast(std::vector<std::string>(
      std::begin(earlyexit::kRuleNames), std::end(earlyexit::kRuleNames))));
  earlyexit::bind_seal(module);
  earlyexit::cpu::bind_embedding(module);
  earlyexit::cpu::bind_packed_layer(module);
  earlyexit::cpu::bind_onednn_layer(module);
  module.def("prefer_huge_pages", &earlyexit::prefer_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"),
             "Ask the system for huge pages, for whole pages of memory that has not been written to.");
  module.def("layer_kernels", &earlyexit::layer_kernels,
             "Return the vector kernels of this processor, and the layout of the weights that they read, or {}.");
}
