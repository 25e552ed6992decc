// Checks of what keeps memory safe: dtypes, shapes, strides, devices, and values that become addresses. Python checks
// the meaning. All raise ValueError with what was expected, what came and what to do.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>

namespace earlyexit {

#define EE_CHECK(condition, op, ...) TORCH_CHECK_VALUE(condition, op, ": ", __VA_ARGS__)

constexpr int64_t kAnySize = -1;

inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// Requires a contiguous tensor of this dtype and shape; kAnySize matches every size.
inline void check_tensor(
    const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
  bool fits = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t k = 0; fits && k < shape.size(); ++k) fits = shape[k] == kAnySize || shape[k] == tensor.size(k);
  EE_CHECK(fits, op, "expected ", name, " to be ", dtype_name(dtype), " ", shape, " (-1: any size), got ",
           dtype_name(tensor.scalar_type()), " ", tensor.sizes(), "; convert or reshape it");
  EE_CHECK(tensor.is_contiguous(), op, "expected ", name, " to be contiguous, got strides ", tensor.strides(),
           " for shape ", tensor.sizes(), "; call .contiguous() on it");
}

// Returns the dtype of hidden states or logits, if it is supported.
inline at::ScalarType float_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  EE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, "expected ", name,
           " to be float32, float16 or bfloat16, got ", dtype_name(dtype), "; convert it");
  return dtype;
}

// Returns f(a number of the C++ type) of a dtype that `float_dtype` has checked.
template <class F>
auto with_float_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kHalf: return f(at::Half());
    case at::kBFloat16: return f(at::BFloat16());
    default: return f(0.0f);
  }
}

// Returns the value of an enumeration whose names are in a table, in its order.
template <class Enum, class Names>
Enum find_name(const char* op, const char* what, const Names& names, std::string_view name) {
  const auto known = std::find(std::begin(names), std::end(names), name);
  if (known != std::end(names)) return static_cast<Enum>(known - std::begin(names));
  std::string all;
  for (const std::string_view other : names) all += (all.empty() ? "'" : ", '") + std::string(other) + "'";
  EE_CHECK(false, op, "expected ", what, " to be one of ", all, ", got '", name, "'");
}

// Requires valid offsets: row i has the tokens offsets[i] .. offsets[i + 1] of a buffer of `tokens` tokens (kAnySize:
// not checked).
inline void check_offsets(const char* op, const char* name, const int32_t* offsets, int64_t rows, int64_t tokens) {
  EE_CHECK(offsets[0] >= 0, op, "expected ", name, " to start at 0 or above, got ", offsets[0],
           "; pass cumulative lengths");
  for (int64_t i = 0; i < rows; ++i) {
    EE_CHECK(offsets[i] <= offsets[i + 1], op, "expected ", name, " never to decrease, got ", offsets[i], " then ",
             offsets[i + 1], " at row ", i, "; pass cumulative lengths");
  }
  EE_CHECK(tokens == kAnySize || offsets[rows] <= tokens, op, "expected ", name, " to end within the ", tokens,
           " tokens given, got ", offsets[rows], "; pass the buffer these offsets were made for");
}

// The tensors of one op, whose addresses are returned once they are checked. All are on one device, and those that are
// written, which come first, share no memory with others: a row id overwritten by an answer would index out of range.
class Arguments {
 public:
  Arguments(const char* op, at::Device device) : op_(op), device_(device) {}

  void* write(const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
    const char* begin = static_cast<const char*>(read(name, tensor, dtype, shape));
    written_[count_++] = {name, begin, begin + tensor.nbytes()};
    return tensor.mutable_data_ptr();
  }

  const void* read(const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) const {
    check_tensor(op_, name, tensor, dtype, shape);
    EE_CHECK(tensor.device() == device_, op_, "expected ", name, " on ", device_, ", got ", tensor.device(),
             "; use one device");
    const char* begin = static_cast<const char*>(tensor.const_data_ptr());
    const char* end = begin + tensor.nbytes();
    for (size_t k = 0; k < count_; ++k) {
      const Written& other = written_[k];
      EE_CHECK(std::max(begin, other.begin) >= std::min(end, other.end), op_, "expected ", other.name,
               " to share no memory with ", name, "; pass a second buffer");
    }
    return begin;
  }

  template <class T>
  T* write(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
    return static_cast<T*>(write(name, tensor, c10::CppTypeToScalarType<T>::value, shape));
  }

  template <class T>
  const T* read(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) const {
    return static_cast<const T*>(read(name, tensor, c10::CppTypeToScalarType<T>::value, shape));
  }

 private:
  struct Written {
    const char *name, *begin, *end;
  };
  const char* op_;
  at::Device device_;
  Written written_[4];
  size_t count_ = 0;
};

}  // namespace earlyexit
