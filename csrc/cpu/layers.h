// Embeddings and encoder layers as objects of Python, which hold their weights.
#pragma once

#include <pybind11/pybind11.h>

namespace earlyexit::cpu {

void bind_embedding(pybind11::module_& module);
void bind_packed_layer(pybind11::module_& module);
void bind_onednn_layer(pybind11::module_& module);

}  // namespace earlyexit::cpu
