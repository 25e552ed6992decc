// Input checks of the C++ ops. All raise ValueError with what was expected, what was given and what to do.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>

namespace earlyexit {

#define EE_CHECK(condition, op, ...) TORCH_CHECK_VALUE(condition, op, ": ", __VA_ARGS__)

constexpr int64_t kAnySize = -1;

inline const char* given(const std::optional<at::Tensor>& tensor) { return tensor ? "given" : "None"; }

inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return "float64";
    case at::kFloat: return "float32";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    default: return c10::toString(dtype);
  }
}

inline std::string shape_name(at::IntArrayRef shape) {
  std::ostringstream text;
  text << '[';
  for (size_t k = 0; k < shape.size(); ++k) {
    text << (k ? ", " : "");
    shape[k] == kAnySize ? text << '*' : text << shape[k];
  }
  text << ']';
  return text.str();
}

inline bool has_shape(const at::Tensor& tensor, at::IntArrayRef shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  for (size_t k = 0; k < shape.size(); ++k) {
    if (shape[k] != kAnySize && shape[k] != tensor.size(k)) return false;
  }
  return true;
}

// Requires a contiguous tensor of this dtype and shape; kAnySize matches every size.
inline void check_tensor(
    const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
  EE_CHECK(tensor.scalar_type() == dtype && has_shape(tensor, shape), op, "expected ", name, " to be ",
           dtype_name(dtype), " ", shape_name(shape), ", got ", dtype_name(tensor.scalar_type()), " ",
           shape_name(tensor.sizes()), "; convert or reshape it");
  EE_CHECK(tensor.is_contiguous(), op, "expected ", name, " to be contiguous, got strides ",
           shape_name(tensor.strides()), " for shape ", shape_name(tensor.sizes()), "; call .contiguous() on it");
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                         const at::Tensor& other) {
  EE_CHECK(tensor.device() == other.device(), op, "expected ", name, " on ", other.device(), ", where ", other_name,
           " is, got ", tensor.device(), "; use one device");
}

// Rows and tokens are counted in int32.
inline void check_row_count(const char* op, int64_t rows) {
  EE_CHECK(rows <= std::numeric_limits<int32_t>::max(), op, "expected at most ", std::numeric_limits<int32_t>::max(),
           " rows, got ", rows, "; split the batch");
}

// Requires a dtype supported for hidden states and logits.
inline void check_float_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  EE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, "expected ", name,
           " to be float32, float16 or bfloat16, got ", dtype_name(dtype), "; convert it");
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

// Checks the tensors of gather_rows; only the CPU op checks their values.
inline void check_gather(const char* op, const at::Tensor& hidden, const at::Tensor& offsets, const at::Tensor& source,
                         const at::Tensor& new_offsets, const at::Tensor& out) {
  // a copy supports float64 too
  if (hidden.scalar_type() != at::kDouble) check_float_dtype(op, "hidden", hidden);
  check_tensor(op, "hidden", hidden, hidden.scalar_type(), {kAnySize, kAnySize});
  check_tensor(op, "out", out, hidden.scalar_type(), {kAnySize, hidden.size(1)});
  check_tensor(op, "source", source, at::kInt, {kAnySize});
  check_tensor(op, "offsets", offsets, at::kInt, {kAnySize});
  check_tensor(op, "new_offsets", new_offsets, at::kInt, {source.size(0) + 1});
  EE_CHECK(offsets.size(0) > 0, op, "expected offsets [B + 1], got an empty tensor; pass cumulative lengths");
  check_device(op, "out", out, "hidden", hidden);
  check_device(op, "source", source, "hidden", hidden);
  check_device(op, "offsets", offsets, "hidden", hidden);
  check_device(op, "new_offsets", new_offsets, "hidden", hidden);
}

}  // namespace earlyexit
