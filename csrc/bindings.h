// The classes of the Python module.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace earlyexit {

// Binds a class whose objects are called, without the GIL. `Arguments` are those of its constructor.
template <class Class, class... Arguments>
void bind_class(pybind11::module_& module, const char* name) {
  pybind11::class_<Class>(module, name)
      .def(pybind11::init(torch::wrap_pybind_function(
          [](Arguments... arguments) { return Class(std::move(arguments)...); })))
      .def("__call__", torch::wrap_pybind_function_no_gil(&Class::operator()));
}

void bind_seal(pybind11::module_& module);

namespace cpu {

// Embeddings and encoder layers, which hold their weights.
void bind_embedding(pybind11::module_& module);
void bind_packed_layer(pybind11::module_& module);
void bind_onednn_layer(pybind11::module_& module);

}  // namespace cpu
}  // namespace earlyexit
