// layer_norm(words[id] + types[type] + positions[position]) of the present tokens, by the vector kernels of
// csrc/cpu/kernels. The reference implementation and the documentation are in earlyexit_kernels/ops/rows_embed.py.
//
// The tables are read as torch has them, so no copy of them can be out of date. No value depends on the other tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../checks.h"
#include "kernels/kernels.h"

namespace earlyexit::cpu {
namespace {

constexpr const char* kOp = "rows_embed_cpp";
// Values that are worth another thread.
constexpr int64_t kThreadWork = 1 << 13;

// A table and the index of each token in it.
struct Table {
  const at::Tensor& values;
  const int64_t* indices;
};

// out = norm(x), of a processor without vector kernels
void plain_norm(const float* x, const float* weight, const float* bias, float eps, int64_t width, float* out) {
  float sum = 0.0f, squares = 0.0f;
  for (int64_t h = 0; h < width; ++h) sum += x[h];
  const float mean = sum / static_cast<float>(width);
  for (int64_t h = 0; h < width; ++h) squares += (x[h] - mean) * (x[h] - mean);
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for (int64_t h = 0; h < width; ++h) out[h] = (x[h] - mean) * factor * weight[h] + bias[h];
}

// The op on tensors of one dtype, for the first `present` tokens. The tables are added in order.
template <class scalar_t>
void run(const std::vector<Table>& tables, const at::Tensor& weight, const at::Tensor& bias, float eps,
         int64_t present, at::Tensor& out) {
  const int64_t width = out.size(1);
  std::vector<float> scale(width), shift(width), zeros(width);
  std::copy_n(weight.const_data_ptr<scalar_t>(), width, scale.begin());
  std::copy_n(bias.const_data_ptr<scalar_t>(), width, shift.begin());
  scalar_t* results = out.mutable_data_ptr<scalar_t>();
  const Kernels* kernels = native_kernels();
  at::parallel_for(0, present, 1 + kThreadWork / width, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width), normed(width);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const Table& table : tables) {
        const scalar_t* row = table.values.const_data_ptr<scalar_t>() + table.indices[t] * width;
        for (int64_t h = 0; h < width; ++h) sum[h] += static_cast<float>(row[h]);
      }
      if (kernels != nullptr) {
        kernels->add_norm(sum.data(), zeros.data(), scale.data(), shift.data(), eps, width, normed.data());
      } else {
        plain_norm(sum.data(), scale.data(), shift.data(), eps, width, normed.data());
      }
      std::copy_n(normed.data(), width, results + t * width);
    }
  });
}

void rows_embed(const at::Tensor& tokens, const at::Tensor& words, const std::optional<at::Tensor>& positions,
                const std::optional<at::Tensor>& types, const at::Tensor& weight, const at::Tensor& bias, double eps,
                const at::Tensor& offsets, at::Tensor& out) {
  check_float_dtype(kOp, "out", out);
  const at::ScalarType dtype = out.scalar_type();
  check_tensor(kOp, "out", out, dtype, {kAnySize, kAnySize});
  const int64_t capacity = out.size(0), width = out.size(1);
  check_tensor(kOp, "tokens", tokens, at::kLong, {4, capacity});
  check_tensor(kOp, "weight", weight, dtype, {width});
  check_tensor(kOp, "bias", bias, dtype, {width});
  check_tensor(kOp, "offsets", offsets, at::kInt, {kAnySize});
  const int64_t rows = offsets.size(0) - 1;
  EE_CHECK(rows >= 0, kOp, "expected offsets [R + 1], got an empty tensor");
  const int32_t* starts = offsets.const_data_ptr<int32_t>();
  check_offsets(kOp, "offsets", starts, rows, kAnySize);
  const int64_t present = starts[rows] - starts[0];
  EE_CHECK(present <= capacity, kOp, "expected at most ", capacity, " present tokens, got ", present);

  std::vector<Table> tables;
  const auto add = [&](const char* name, const at::Tensor& table, int64_t row) {
    check_tensor(kOp, name, table, dtype, {kAnySize, width});
    const int64_t* indices = tokens.const_data_ptr<int64_t>() + row * capacity;
    for (int64_t t = 0; t < present; ++t) {
      EE_CHECK(indices[t] >= 0 && indices[t] < table.size(0), kOp, "expected indices of ", name, " in [0, ",
               table.size(0) - 1, "], got ", indices[t]);
    }
    tables.push_back({table, indices});
  };
  add("words", words, 0);
  if (types) add("types", *types, 2);
  if (positions) add("positions", *positions, 1);
  if (present == 0 || width == 0) return;
  const float epsilon = static_cast<float>(eps);
  switch (dtype) {
    case at::kHalf: return run<at::Half>(tables, weight, bias, epsilon, present, out);
    case at::kBFloat16: return run<at::BFloat16>(tables, weight, bias, epsilon, present, out);
    default: return run<float>(tables, weight, bias, epsilon, present, out);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) {
  library.impl("rows_embed_cpp", &rows_embed);
}

}  // namespace earlyexit::cpu
