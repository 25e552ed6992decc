// The Python module. Loading it registers the ops, whose schemas are in earlyexit_kernels/ops/schema.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/huge_pages.h"
#include "cpu/kernels/kernels.h"
#include "cpu/layers.h"
#include "criteria/all.h"
#include "seal.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of earlyexit_kernels; `criteria` lists the supported exit rules.";
#define EE_NAME(name, Functor) #name,
  constexpr const char* kNames[] = {EE_CRITERIA(EE_NAME)};
#undef EE_NAME
  pybind11::list names;
  for (const char* name : kNames) names.append(name);
  module.attr("criteria") = pybind11::tuple(names);
  earlyexit::bind_seal(module);
  earlyexit::cpu::bind_embedding(module);
  earlyexit::cpu::bind_packed_layer(module);
  earlyexit::cpu::bind_onednn_layer(module);
  module.def("prefer_huge_pages", &earlyexit::cpu::prefer_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"),
             "Ask the system for huge pages, for memory that has not been written to.");
  module.def("layer_kernels", [] {
    const earlyexit::cpu::Kernels* kernels = earlyexit::cpu::native_kernels();
    pybind11::dict found;
    if (kernels == nullptr) return found;
    found["name"] = kernels->name;
    found["columns"] = kernels->columns;
    found["terms"] = std::vector<int64_t>(std::begin(kernels->terms), std::end(kernels->terms));
    return found;
  }, "Return the vector kernels of this processor, and the layout of the weights that they read; empty without any.");
}
