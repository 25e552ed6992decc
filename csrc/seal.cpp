#include "seal.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

namespace earlyexit {
namespace {

namespace py = pybind11;

const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

// Tensors created in inference mode have no version counter.
int64_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? -1 : tensor._version(); }

// Returns the version tag of a dict (PEP 509), which changes with the dict, so that unchanged dicts are not compared; 0
// if this version of Python has none.
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

uint64_t bytes_at(const void* address, int64_t offset, int64_t item) {
  uint64_t value = 0;
  std::memcpy(&value, static_cast<const char*>(address) + offset, item);
  return value;
}

// Returns the offset in bytes of the element at a flat position.
int64_t offset_of(const at::Tensor& tensor, int64_t position) {
  int64_t offset = 0;
  for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
    offset += position % tensor.size(dim) * tensor.stride(dim);
    position /= tensor.size(dim);
  }
  return offset * static_cast<int64_t>(tensor.element_size());
}

}  // namespace

Seal::Seal(const py::list& modules, const py::list& tables, const py::set& ignored,
                         const py::list& tensors, const py::list& copied,
                         const std::vector<std::vector<int64_t>>& elements, py::list kept)
    : kept_(&kept) {
  for (const py::handle& module : modules) {
    modules_.push_back(keep(module));
    types_.push_back(Py_TYPE(module.ptr()));
    keep(py::type::handle_of(module));
  }
  for (const py::handle& dict : tables) add_table(keep(dict), ignored);
  for (const py::handle& object : tensors) add_layout(object);
  if (copied.size() != elements.size()) throw py::value_error("Seal: expected elements for each copied tensor");
  for (size_t number = 0; number < elements.size(); ++number) add_content(copied[number], elements[number]);
  kept_ = nullptr;
}

PyObject* Seal::keep(const py::handle& object) {
  kept_->append(object);
  return object.ptr();
}

void Seal::add_table(PyObject* dict, const py::set& ignored) {
  if (!PyDict_Check(dict)) throw py::type_error("Seal: expected tables to be dicts");
  const size_t begin = values_.size();
  PyObject *key, *value;
  Py_ssize_t next = 0;
  while (PyDict_Next(dict, &next, &key, &value)) {
    if (!ignored.contains(py::handle(key))) values_.push_back({keep(value), next - 1});
  }
  tables_.push_back({dict, version_of(dict), PyDict_GET_SIZE(dict), begin, values_.size()});
}

void Seal::add_layout(const py::handle& object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("Seal: expected tensors");
  const at::Tensor& tensor = tensor_of(object.ptr());
  Layout layout{keep(object), tensor.const_data_ptr(), static_cast<int8_t>(tensor.scalar_type()), tensor.sizes().vec()};
  layout.sizes_and_strides.insert(layout.sizes_and_strides.end(), tensor.strides().begin(), tensor.strides().end());
  layouts_.push_back(std::move(layout));
}

void Seal::add_content(const py::handle& object, const std::vector<int64_t>& positions) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("Seal: expected tensors");
  const at::Tensor& tensor = tensor_of(object.ptr());
  const int64_t item = tensor.element_size();
  if (!tensor.is_cpu() || tensor.is_sparse() || item > 8) {
    throw py::value_error("Seal: expected dense tensors on the CPU of at most 8 bytes an element");
  }
  Content content{keep(object), version_of(tensor), item, {}, {}};
  for (const int64_t position : positions) {
    if (position < 0 || position >= tensor.numel()) throw py::value_error("Seal: element out of range");
    content.offsets.push_back(offset_of(tensor, position));
    content.values.push_back(bytes_at(tensor.const_data_ptr(), content.offsets.back(), item));
  }
  contents_.push_back(std::move(content));
}

// Contents come last: they are read at addresses that the layouts have verified.
bool Seal::holds() { return tables_hold() && layouts_hold() && contents_hold(); }

bool Seal::tables_hold() {
  for (size_t i = 0; i < modules_.size(); ++i) {
    if (Py_TYPE(modules_[i]) != types_[i]) return false;
  }
  for (Table& table : tables_) {
    const uint64_t version = version_of(table.dict);
    if (version != 0 && version == table.version) continue;
    if (!table_holds(table)) return false;
    table.version = version;
  }
  return true;
}

bool Seal::table_holds(const Table& table) const {
  if (PyDict_GET_SIZE(table.dict) != table.size) return false;
  for (size_t i = table.begin; i < table.end; ++i) {
    PyObject *key, *value;
    Py_ssize_t position = values_[i].position;
    if (!PyDict_Next(table.dict, &position, &key, &value) || value != values_[i].object) return false;
  }
  return true;
}

bool Seal::layouts_hold() const {
  for (const Layout& layout : layouts_) {
    const at::Tensor& tensor = tensor_of(layout.tensor);
    const size_t dims = tensor.dim();
    if (tensor.const_data_ptr() != layout.address || static_cast<int8_t>(tensor.scalar_type()) != layout.dtype ||
        layout.sizes_and_strides.size() != 2 * dims) {
      return false;
    }
    for (size_t dim = 0; dim < dims; ++dim) {
      if (tensor.sizes()[dim] != layout.sizes_and_strides[dim] ||
          tensor.strides()[dim] != layout.sizes_and_strides[dims + dim]) {
        return false;
      }
    }
  }
  return true;
}

bool Seal::contents_hold() const {
  for (const Content& content : contents_) {
    const at::Tensor& tensor = tensor_of(content.tensor);
    if (version_of(tensor) != content.version) return false;
    const void* address = tensor.const_data_ptr();
    uint64_t different = 0;
    for (size_t k = 0; k < content.offsets.size(); ++k) {
      different |= bytes_at(address, content.offsets[k], content.item) ^ content.values[k];
    }
    if (different != 0) return false;
  }
  return true;
}

void bind_seal(py::module_& module) {
  py::class_<Seal>(module, "Seal")
      .def(py::init<const py::list&, const py::list&, const py::set&, const py::list&, const py::list&,
                    const std::vector<std::vector<int64_t>>&, py::list>())
      .def("holds", &Seal::holds);
}

}  // namespace earlyexit
