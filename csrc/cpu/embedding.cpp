// layer_norm(words[id] + types[type] + positions[position]) of packed tokens, by the vector kernels of csrc/cpu/kernels.
//
// The tables are read as torch has them, so no copy of them can be out of date. No value depends on the other tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "kernels/kernels.h"
#include "layers.h"

namespace earlyexit::cpu {
namespace {

constexpr const char* kOp = "Embedding";
// Values that are worth another thread.
constexpr int64_t kThreadWork = 1 << 13;

using MaybeTensor = std::optional<at::Tensor>;

// Embeddings with their tables and norm, float32. Calls do not change them, so threads may share them.
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
    EE_CHECK(kernels_ != nullptr, kOp, "expected a processor with AVX2 or AVX-512, which this one has not");
    EE_CHECK(words_.dim() == 2 && words_.size(1) > 0, kOp, "expected words [V, E], got ", shape_name(words_.sizes()));
    const int64_t width = words_.size(1);
    check_tensor(kOp, "words", words_, at::kFloat, {kAnySize, width});
    if (positions_) check_tensor(kOp, "positions", *positions_, at::kFloat, {kAnySize, width});
    if (types_) check_tensor(kOp, "types", *types_, at::kFloat, {kAnySize, width});
    check_tensor(kOp, "weight", weight_, at::kFloat, {width});
    check_tensor(kOp, "bias", bias_, at::kFloat, {width});
  }

  // The embeddings [1, T, E] of ids, positions and types [1, T].
  at::Tensor operator()(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& types) const {
    const int64_t tokens = ids.numel(), width = words_.size(1);
    const Rows rows[] = {rows_of("words", words_, ids, tokens), rows_of("types", types_, types, tokens),
                         rows_of("positions", positions_, positions, tokens)};
    at::Tensor out = at::empty({1, tokens, width}, words_.options());
    float* results = out.mutable_data_ptr<float>();
    const float *scale = weight_.const_data_ptr<float>(), *shift = bias_.const_data_ptr<float>();
    const std::vector<float> zeros(width);
    at::parallel_for(0, tokens, 1 + kThreadWork / width, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(width);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (const Rows& each : rows) {
          if (each.table == nullptr) continue;
          const float* row = each.table + each.indices.const_data_ptr<int64_t>()[t] * width;
          for (int64_t h = 0; h < width; ++h) sum[h] += row[h];
        }
        kernels_->add_norm(sum.data(), zeros.data(), scale, shift, eps_, width, results + t * width);
      }
    });
    return out;
  }

 private:
  struct Rows {
    const float* table;  // null where nothing is added
    at::Tensor indices;
  };

  static Rows rows_of(const char* name, const MaybeTensor& table, const at::Tensor& indices, int64_t tokens) {
    if (!table) return {nullptr, indices};
    EE_CHECK(indices.scalar_type() == at::kLong && indices.numel() == tokens, kOp, "expected int64 indices of ", tokens,
             " tokens for ", name, ", got ", dtype_name(indices.scalar_type()), " ", shape_name(indices.sizes()));
    const at::Tensor each = indices.contiguous();
    const int64_t* values = each.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      EE_CHECK(values[t] >= 0 && values[t] < table->size(0), kOp, "expected indices of ", name, " in [0, ",
               table->size(0) - 1, "], got ", values[t]);
    }
    return {table->const_data_ptr<float>(), each};
  }

  const Kernels* kernels_;
  at::Tensor words_;
  MaybeTensor positions_, types_;
  at::Tensor weight_, bias_;
  float eps_;
};

}  // namespace

void bind_embedding(pybind11::module_& module) {
  pybind11::class_<Embedding>(module, "Embedding")
      .def(pybind11::init(torch::wrap_pybind_function([](at::Tensor words, MaybeTensor positions, MaybeTensor types,
                                                         at::Tensor weight, at::Tensor bias, double eps) {
        return Embedding(std::move(words), std::move(positions), std::move(types), std::move(weight), std::move(bias),
                         eps);
      })))
      .def("__call__", torch::wrap_pybind_function_no_gil(
                           [](const Embedding& embedding, const at::Tensor& ids, const at::Tensor& positions,
                              const at::Tensor& types) { return embedding(ids, positions, types); }));
}

}  // namespace earlyexit::cpu
