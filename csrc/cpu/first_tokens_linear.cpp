// f(x W + b) of the first token of each present row, by the vector kernels of csrc/cpu/kernels. The reference
// implementation and the documentation are in earlyexit_kernels/ops/first_tokens_linear.py.
//
// The weight is read as torch has it, so no copy of it can be out of date. No sum depends on the other rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "activations.h"
#include "kernels/kernels.h"

namespace earlyexit::cpu {
namespace {

constexpr const char* kOp = "first_tokens_linear_cpp";
// Multiply-adds that are worth another thread.
constexpr int64_t kThreadWork = 1 << 16;

// What the op reads and writes; all rows of x are float32.
struct Problem {
  std::vector<const float*> x;
  const at::Tensor& weight;
  std::vector<float> bias;
  int64_t outputs, depth;
};

template <class scalar_t>
float plain_dot(const float* x, const scalar_t* weight, int64_t depth) {
  float sum = 0.0f;
  for (int64_t k = 0; k < depth; ++k) sum += x[k] * static_cast<float>(weight[k]);
  return sum;
}

float plain_activation(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case Activation::kGeluTanh: return x / (1.0f + std::exp(-1.59576912f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    case Activation::kTanh: return std::tanh(x);
  }
  return x;
}

// The outputs begin .. end of all rows, of a processor without vector kernels.
template <class scalar_t>
void plain(const Problem& p, int64_t begin, int64_t end, float* out, int64_t stride, Activation activation) {
  const scalar_t* weight = p.weight.const_data_ptr<scalar_t>();
  for (size_t r = 0; r < p.x.size(); ++r) {
    for (int64_t n = begin; n < end; ++n) {
      out[r * stride + n] =
          plain_activation(activation, plain_dot(p.x[r], weight + n * p.depth, p.depth) + p.bias[n]);
    }
  }
}

template <class scalar_t>
constexpr WeightType kStored = std::is_same_v<scalar_t, float>      ? WeightType::kFloat32
                               : std::is_same_v<scalar_t, at::Half> ? WeightType::kFloat16
                                                                    : WeightType::kBFloat16;

// Writes f(x W + b), [rows, stride]; the stride is a multiple of the columns of a panel.
template <class scalar_t>
void multiply(const Problem& p, float* out, int64_t stride, Activation activation) {
  const Kernels* kernels = native_kernels();
  const int64_t rows = static_cast<int64_t>(p.x.size()), columns = kernels == nullptr ? 1 : kernels->columns;
  const int64_t work = rows * p.depth * columns;
  at::parallel_for(0, stride / columns, 1 + kThreadWork / (work + 1), [&](int64_t first, int64_t last) {
    const int64_t begin = first * columns, end = std::min(last * columns, p.outputs);
    if (kernels == nullptr) return plain<scalar_t>(p, begin, end, out, stride, activation);
    const scalar_t* weight = p.weight.const_data_ptr<scalar_t>() + begin * p.depth;
    kernels->dots[static_cast<int>(kStored<scalar_t>)](
        {p.x.data(), rows, weight, p.bias.data() + begin, end - begin, p.depth, out + begin, stride});
    kernels->activate(activation, out + begin, stride, rows, (last - first) * columns);
  });
}

// The op on tensors of one dtype, for the rows `present`.
template <class scalar_t>
void run(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const int32_t* offsets,
         const std::vector<int64_t>& present, at::Tensor& out, Activation activation) {
  constexpr bool kConverts = !std::is_same_v<scalar_t, float>;
  const int64_t outputs = weight.size(0), depth = weight.size(1), rows = static_cast<int64_t>(present.size());
  Problem p{{}, weight, std::vector<float>(outputs), outputs, depth};
  std::copy_n(bias.const_data_ptr<scalar_t>(), outputs, p.bias.begin());
  std::vector<float> converted(kConverts ? rows * depth : 0);
  for (int64_t r = 0; r < rows; ++r) {
    const scalar_t* token = hidden.const_data_ptr<scalar_t>() + offsets[present[r]] * depth;
    if constexpr (kConverts) {
      std::copy_n(token, depth, converted.data() + r * depth);
      p.x.push_back(converted.data() + r * depth);
    } else {
      p.x.push_back(token);
    }
  }
  const Kernels* kernels = native_kernels();
  const int64_t columns = kernels == nullptr ? 1 : kernels->columns, stride = (outputs + columns - 1) / columns * columns;
  std::vector<float> sums(rows * stride);
  multiply<scalar_t>(p, sums.data(), stride, activation);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(sums.data() + r * stride, outputs, out.mutable_data_ptr<scalar_t>() + present[r] * outputs);
  }
}

void first_tokens_linear(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
                         const at::Tensor& offsets, const at::Tensor& row_ids, at::Tensor& out,
                         std::string_view activation) {
  check_float_dtype(kOp, "hidden", hidden);
  const at::ScalarType dtype = hidden.scalar_type();
  check_tensor(kOp, "hidden", hidden, dtype, {kAnySize, kAnySize});
  const int64_t tokens = hidden.size(0), depth = hidden.size(1), rows = row_ids.size(0);
  check_tensor(kOp, "weight", weight, dtype, {kAnySize, depth});
  const int64_t outputs = weight.size(0);
  check_tensor(kOp, "bias", bias, dtype, {outputs});
  check_tensor(kOp, "row_ids", row_ids, at::kInt, {rows});
  check_tensor(kOp, "offsets", offsets, at::kInt, {rows + 1});
  check_tensor(kOp, "out", out, dtype, {rows, outputs});
  const int32_t* ids = row_ids.const_data_ptr<int32_t>();
  const int32_t* starts = offsets.const_data_ptr<int32_t>();
  check_offsets(kOp, "offsets", starts, rows, kAnySize);
  const Activation function = find_activation(kOp, activation);
  std::vector<int64_t> present;
  for (int64_t i = 0; i < rows; ++i) {
    if (ids[i] < 0) continue;
    EE_CHECK(starts[i] < tokens, kOp, "expected the first token of row ", i, " among the ", tokens, " tokens, got ",
             starts[i]);
    present.push_back(i);
  }
  if (present.empty() || outputs == 0) return;
  switch (dtype) {
    case at::kHalf: return run<at::Half>(hidden, weight, bias, starts, present, out, function);
    case at::kBFloat16: return run<at::BFloat16>(hidden, weight, bias, starts, present, out, function);
    default: return run<float>(hidden, weight, bias, starts, present, out, function);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) {
  library.impl("first_tokens_linear_cpp", &first_tokens_linear);
}

}  // namespace earlyexit::cpu
