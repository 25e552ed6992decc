// The embeddings of tokens and a linear on the first token of each row, by the vector kernels. Their tables and weights
// are read as torch has them, so no copy can be out of date. No value depends on the other rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "../bindings.h"
#include "names.h"

namespace earlyexit::cpu {
namespace {

constexpr const char* kEmbedding = "Embedding";
constexpr const char* kLinear = "first_tokens_linear_cpp";
// Values of embeddings, and multiply-adds of a linear, that are worth another thread.
constexpr int64_t kThreadValues = 1 << 13, kThreadWork = 1 << 16;

using MaybeTensor = std::optional<at::Tensor>;

// layer_norm(words[id] + types[type] + positions[position]), float32. Calls do not change it, so threads may share it.
class Embedding {
 public:
  Embedding(at::Tensor words, MaybeTensor positions, MaybeTensor types, at::Tensor weight, at::Tensor bias, double eps)
      : kernels_(native_kernels()),
        words_(std::move(words)),
        positions_(std::move(positions)),
        types_(std::move(types)),
        weight_(std::move(weight)),
        bias_(std::move(bias)),
        eps_(static_cast<float>(eps)) {
    EE_CHECK(kernels_ != nullptr, kEmbedding, "expected a processor with AVX2 or AVX-512, which this one has not");
    check_tensor(kEmbedding, "words", words_, at::kFloat, {kAnySize, kAnySize});
    const int64_t width = words_.size(1);
    EE_CHECK(width > 0, kEmbedding, "expected words [V, E], got ", words_.sizes());
    if (positions_) check_tensor(kEmbedding, "positions", *positions_, at::kFloat, {kAnySize, width});
    if (types_) check_tensor(kEmbedding, "types", *types_, at::kFloat, {kAnySize, width});
    check_tensor(kEmbedding, "weight", weight_, at::kFloat, {width});
    check_tensor(kEmbedding, "bias", bias_, at::kFloat, {width});
  }

  // The embeddings [1, T, E] of ids, positions and types [1, T].
  at::Tensor operator()(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& types) const {
    const int64_t tokens = ids.numel(), width = words_.size(1);
    const Looked added[] = {look_up("words", words_, ids, tokens), look_up("types", types_, types, tokens),
                            look_up("positions", positions_, positions, tokens)};
    at::Tensor out = at::empty({1, tokens, width}, words_.options());
    float* results = out.mutable_data_ptr<float>();
    const float *scale = weight_.const_data_ptr<float>(), *shift = bias_.const_data_ptr<float>();
    const std::vector<float> zeros(width);
    at::parallel_for(0, tokens, 1 + kThreadValues / width, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(width);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (const Looked& looked : added) {
          if (looked.table == nullptr) continue;
          const float* row = looked.table + looked.indices.const_data_ptr<int64_t>()[t] * width;
          for (int64_t h = 0; h < width; ++h) sum[h] += row[h];
        }
        kernels_->add_norm(sum.data(), zeros.data(), scale, shift, eps_, width, results + t * width);
      }
    });
    return out;
  }

 private:
  // The rows of a table that are added.
  struct Looked {
    const float* table;  // null: none
    at::Tensor indices;
  };

  static Looked look_up(const char* name, const MaybeTensor& table, const at::Tensor& indices, int64_t tokens) {
    if (!table) return {nullptr, indices};
    EE_CHECK(indices.scalar_type() == at::kLong && indices.numel() == tokens, kEmbedding, "expected int64 indices of ",
             tokens, " tokens for ", name, ", got ", dtype_name(indices.scalar_type()), " ", indices.sizes());
    const Looked looked{table->const_data_ptr<float>(), indices.contiguous()};
    const int64_t* values = looked.indices.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      EE_CHECK(values[t] >= 0 && values[t] < table->size(0), kEmbedding, "expected indices of ", name, " in [0, ",
               table->size(0) - 1, "], got ", values[t]);
    }
    return looked;
  }

  const Kernels* kernels_;
  at::Tensor words_;
  MaybeTensor positions_, types_;
  at::Tensor weight_, bias_;
  float eps_;
};

float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case Activation::kGeluTanh: return x / (1.0f + std::exp(-1.59576912f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    case Activation::kTanh: return std::tanh(x);
  }
  return x;
}

// What the vector kernels compute, on a processor without them.
template <class scalar_t>
void plain_dots(const Dots& d, Activation activation) {
  const scalar_t* weight = static_cast<const scalar_t*>(d.weight);
  for (int64_t r = 0; r < d.rows; ++r) {
    for (int64_t n = 0; n < d.outputs; ++n) {
      float sum = 0.0f;
      for (int64_t k = 0; k < d.depth; ++k) sum += d.x[r][k] * static_cast<float>(weight[n * d.depth + k]);
      d.out[r * d.out_stride + n] = activated(activation, sum + d.bias[n]);
    }
  }
}

// f(x W + b) of the tokens `first`, one for each of the rows `present`.
template <class scalar_t>
void multiply(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, scalar_t* out,
              const std::vector<int64_t>& first, const std::vector<int64_t>& present, Activation activation) {
  constexpr bool kConverts = !std::is_same_v<scalar_t, float>;
  const Kernels* kernels = native_kernels();
  const int64_t outputs = weight.size(0), depth = weight.size(1), rows = static_cast<int64_t>(present.size());
  const int64_t columns = kernels == nullptr ? 1 : kernels->columns, panels = (outputs + columns - 1) / columns;
  const int64_t stride = panels * columns;
  std::vector<float> converted(kConverts ? rows * depth : 0), bias32(outputs), sums(rows * stride);
  std::copy_n(bias.const_data_ptr<scalar_t>(), outputs, bias32.begin());
  std::vector<const float*> x;
  for (int64_t r = 0; r < rows; ++r) {
    const scalar_t* token = hidden.const_data_ptr<scalar_t>() + first[r] * depth;
    if constexpr (kConverts) {
      x.push_back(converted.data() + r * depth);
      std::copy_n(token, depth, converted.data() + r * depth);
    } else {
      x.push_back(token);
    }
  }
  at::parallel_for(0, panels, 1 + kThreadWork / (rows * depth * columns + 1), [&](int64_t from, int64_t to) {
    const int64_t begin = from * columns, count = std::min(to * columns, outputs) - begin;
    float* panel_sums = sums.data() + begin;
    const Dots dots{x.data(), rows, weight.const_data_ptr<scalar_t>() + begin * depth, bias32.data() + begin, count,
                    depth, panel_sums, stride};
    if (kernels == nullptr) return plain_dots<scalar_t>(dots, activation);
    kernels->format(*find_type(weight.scalar_type())).dots(dots);
    kernels->activate(activation, panel_sums, stride, rows, (to - from) * columns);
  });
  for (int64_t r = 0; r < rows; ++r) std::copy_n(sums.data() + r * stride, outputs, out + present[r] * outputs);
}

// The reference implementation and the documentation are in earlyexit_kernels/ops/first_tokens_linear.py.
void first_tokens_linear(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
                         const at::Tensor& offsets, const at::Tensor& row_ids, at::Tensor& out,
                         std::string_view activation) {
  const at::ScalarType dtype = float_dtype(kLinear, "hidden", hidden);
  EE_CHECK(hidden.dim() == 2 && weight.dim() == 2, kLinear, "expected hidden [T, K] and weight [N, K], got ",
           hidden.sizes(), " and ", weight.sizes());
  const int64_t tokens = hidden.size(0), depth = hidden.size(1), outputs = weight.size(0), rows = row_ids.numel();
  Arguments arguments(kLinear, hidden.device());
  void* results = arguments.write("out", out, dtype, {rows, outputs});
  arguments.read("hidden", hidden, dtype, {tokens, depth});
  arguments.read("weight", weight, dtype, {outputs, depth});
  arguments.read("bias", bias, dtype, {outputs});
  const int32_t* ids = arguments.read<int32_t>("row_ids", row_ids, {rows});
  const int32_t* starts = arguments.read<int32_t>("offsets", offsets, {rows + 1});
  check_offsets(kLinear, "offsets", starts, rows, kAnySize);
  const Activation function = find_activation(kLinear, activation);
  std::vector<int64_t> first, present;
  for (int64_t i = 0; i < rows; ++i) {
    if (ids[i] < 0) continue;
    EE_CHECK(starts[i] < tokens, kLinear, "expected the first token of row ", i, " among the ", tokens, " tokens, got ",
             starts[i]);
    first.push_back(starts[i]);
    present.push_back(i);
  }
  if (present.empty() || outputs == 0) return;
  with_float_type(dtype, [&](auto typed) {
    multiply(hidden, weight, bias, static_cast<decltype(typed)*>(results), first, present, function);
  });
}

}  // namespace

void bind_embedding(pybind11::module_& module) {
  bind_class<Embedding, at::Tensor, MaybeTensor, MaybeTensor, at::Tensor, at::Tensor, double>(module, kEmbedding);
}

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) {
  library.impl("first_tokens_linear_cpp", &first_tokens_linear);
}

}  // namespace earlyexit::cpu
