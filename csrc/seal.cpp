// What modules were when weights were packed or a layer was captured, to detect changes each time it is used.
// earlyexit_kernels/core/seal.py says what is compared and why.

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <vector>

#include "bindings.h"

namespace earlyexit {
namespace {

namespace py = pybind11;

const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

// Tensors created in inference mode have no version counter.
int64_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? -1 : tensor._version(); }

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

struct Module {
  PyObject* object;
  PyTypeObject* type;

  bool holds() const { return Py_TYPE(object) == type; }
};

struct Table {
  struct Value {
    PyObject* object;
    Py_ssize_t position;  // as counted by PyDict_Next
  };
  PyObject* dict;
  Py_ssize_t size;
  std::vector<Value> values;

  bool holds() const {
    if (PyDict_GET_SIZE(dict) != size) return false;
    for (const Value& then : values) {
      PyObject *key, *value;
      Py_ssize_t position = then.position;
      if (!PyDict_Next(dict, &position, &key, &value) || value != then.object) return false;
    }
    return true;
  }
};

struct Layout {
  PyObject* tensor;
  const void* address;
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;

  bool holds() const {
    const at::Tensor& now = tensor_of(tensor);
    return now.const_data_ptr() == address && now.scalar_type() == dtype && now.sizes() == sizes &&
           now.strides() == strides;
  }
};

struct Content {
  PyObject* tensor;
  int64_t version;
  int64_t item;                  // bytes per element
  std::vector<int64_t> offsets;  // bytes from the tensor's address
  std::vector<uint64_t> values;

  bool holds() const {
    const at::Tensor& now = tensor_of(tensor);
    if (version_of(now) != version) return false;
    const void* address = now.const_data_ptr();
    uint64_t different = 0;
    for (size_t k = 0; k < offsets.size(); ++k) different |= bytes_at(address, offsets[k], item) ^ values[k];
    return different == 0;
  }
};

template <class T>
bool all_hold(const std::vector<T>& compared) {
  for (const T& then : compared) {
    if (!then.holds()) return false;
  }
  return true;
}

class Seal {
 public:
  // modules: compared by type. tables: dicts, compared by the identity of their values, except those of ignored keys.
  // tensors: compared by address, dtype, shape and strides. copied: CPU tensors among these, compared by version
  // counter and the bytes of a few elements too; elements holds the flat positions for each. kept receives every
  // compared object; the caller must keep it as long as this object, which has pointers only (the address of a freed
  // object may be reused), so that the garbage collector sees the references.
  Seal(const py::list& modules, const py::list& tables, const py::set& ignored, const py::list& tensors,
       const py::list& copied, const std::vector<std::vector<int64_t>>& elements, py::list kept) {
    const auto keep = [&](const py::handle& object) {
      kept.append(object);
      return object.ptr();
    };
    const auto keep_tensor = [&](const py::handle& object) {
      if (!THPVariable_Check(object.ptr())) throw py::type_error("Seal: expected tensors");
      return keep(object);
    };
    for (const py::handle& module : modules) {
      modules_.push_back({keep(module), Py_TYPE(module.ptr())});
      keep(py::type::handle_of(module));
    }
    for (const py::handle& dict : tables) {
      if (!PyDict_Check(dict.ptr())) throw py::type_error("Seal: expected tables to be dicts");
      Table table{keep(dict), PyDict_GET_SIZE(dict.ptr()), {}};
      PyObject *key, *value;
      Py_ssize_t next = 0;
      while (PyDict_Next(dict.ptr(), &next, &key, &value)) {
        if (!ignored.contains(py::handle(key))) table.values.push_back({keep(value), next - 1});
      }
      tables_.push_back(std::move(table));
    }
    for (const py::handle& object : tensors) {
      PyObject* kept_object = keep_tensor(object);
      const at::Tensor& tensor = tensor_of(kept_object);
      layouts_.push_back({kept_object, tensor.const_data_ptr(), tensor.scalar_type(), tensor.sizes().vec(),
                          tensor.strides().vec()});
    }
    if (copied.size() != elements.size()) throw py::value_error("Seal: expected elements for each copied tensor");
    for (size_t number = 0; number < elements.size(); ++number) {
      contents_.push_back(content_of(keep_tensor(copied[number]), elements[number]));
    }
  }

  // Contents come last: they are read at addresses that the layouts have verified.
  bool holds() const { return all_hold(modules_) && all_hold(tables_) && all_hold(layouts_) && all_hold(contents_); }

 private:
  static Content content_of(PyObject* object, const std::vector<int64_t>& positions) {
    const at::Tensor& tensor = tensor_of(object);
    const int64_t item = tensor.element_size();
    if (!tensor.is_cpu() || tensor.is_sparse() || item > 8) {
      throw py::value_error("Seal: expected dense tensors on the CPU of at most 8 bytes an element");
    }
    Content content{object, version_of(tensor), item, {}, {}};
    for (const int64_t position : positions) {
      if (position < 0 || position >= tensor.numel()) throw py::value_error("Seal: element out of range");
      content.offsets.push_back(offset_of(tensor, position));
      content.values.push_back(bytes_at(tensor.const_data_ptr(), content.offsets.back(), item));
    }
    return content;
  }

  std::vector<Module> modules_;
  std::vector<Table> tables_;
  std::vector<Layout> layouts_;
  std::vector<Content> contents_;
};

}  // namespace

void bind_seal(py::module_& module) {
  py::class_<Seal>(module, "Seal")
      .def(py::init<const py::list&, const py::list&, const py::set&, const py::list&, const py::list&,
                    const std::vector<std::vector<int64_t>>&, py::list>())
      .def("holds", &Seal::holds);
}

}  // namespace earlyexit
