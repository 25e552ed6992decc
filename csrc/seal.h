// What modules were when weights were packed or a layer was captured, to detect changes each time it is used.
// earlyexit_kernels/core/seal.py says what is compared and why.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace earlyexit {

class Seal {
 public:
  // modules: compared by type. tables: dicts, compared by the identity of their values, except those of ignored keys.
  // tensors: compared by address, dtype, shape and strides. copied: CPU tensors among these, compared by version
  // counter and the bytes of a few elements too; elements holds the flat positions for each. kept receives every
  // compared object; the caller must keep it as long as this object, which has pointers only (the address of a freed
  // object may be reused), so that the garbage collector sees the references.
  Seal(const pybind11::list& modules, const pybind11::list& tables, const pybind11::set& ignored,
              const pybind11::list& tensors, const pybind11::list& copied,
              const std::vector<std::vector<int64_t>>& elements, pybind11::list kept);

  bool holds();

 private:
  struct Value {
    PyObject* object;
    Py_ssize_t position;  // within its dict, as counted by PyDict_Next
  };
  struct Table {
    PyObject* dict;
    uint64_t version;  // version of the dict when its values were last compared
    Py_ssize_t size;
    size_t begin, end;  // range of its values in values_
  };
  struct Layout {
    PyObject* tensor;
    const void* address;
    int8_t dtype;
    std::vector<int64_t> sizes_and_strides;
  };
  struct Content {
    PyObject* tensor;
    int64_t version;
    int64_t item;  // bytes per element
    std::vector<int64_t> offsets;  // bytes from the tensor's address
    std::vector<uint64_t> values;
  };

  PyObject* keep(const pybind11::handle& object);
  void add_table(PyObject* dict, const pybind11::set& ignored);
  void add_layout(const pybind11::handle& object);
  void add_content(const pybind11::handle& object, const std::vector<int64_t>& positions);
  bool tables_hold();
  bool table_holds(const Table& table) const;
  bool layouts_hold() const;
  bool contents_hold() const;

  pybind11::list* kept_;  // during construction only
  std::vector<PyObject*> modules_;
  std::vector<PyTypeObject*> types_;
  std::vector<Table> tables_;
  std::vector<Value> values_;
  std::vector<Layout> layouts_;
  std::vector<Content> contents_;
};

void bind_seal(pybind11::module_& module);

}  // namespace earlyexit
