// One post-norm encoder layer on packed tokens, composed of torch kernels. The reference implementation and the
// documentation of the arguments are in earlyexit_kernels/ops/encoder_layer.py (encoder_layer_torch).

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../checks.h"

namespace earlyexit {
namespace {

constexpr const char* kOp = "encoder_layer_cpp";

// A linear with its weight, bias and, if oneDNN is used, the packed weight.
struct Product {
  const at::Tensor& weight;
  const at::Tensor& bias;
  const at::Tensor* packed;
};

using Scalars = c10::List<std::optional<at::Scalar>>;
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                          Scalars, std::optional<std::string_view>);
using LinearBinary = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, std::string_view);

at::Tensor onednn(const at::Tensor& x, const Product& p, std::string_view activation, std::string_view variant) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
  return op.call(x, *p.packed, p.bias, activation, Scalars(), variant);
}

at::Tensor plain(const at::Tensor& x, const Product& p) {
  return p.packed ? onednn(x, p, "none", "") : at::linear(x, p.weight, p.bias);
}

at::Tensor activated(const at::Tensor& x, const Product& p, std::string_view name, std::string_view variant,
                     bool in_product) {
  if (p.packed && in_product) return onednn(x, p, name, variant);
  at::Tensor y = plain(x, p);
  return name == "gelu" ? at::gelu_(y, variant) : at::relu_(y);
}

at::Tensor added(const at::Tensor& x, const Product& p, const at::Tensor& other) {
  if (!p.packed) return at::linear(x, p.weight, p.bias).add_(other);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "binary").typed<LinearBinary>();
  return op.call(x, other, *p.packed, p.bias, "add");
}

using Optionals = c10::List<std::optional<at::Tensor>>;

at::Tensor attend(const at::Tensor& qkv, int64_t heads, at::IntArrayRef rows, at::IntArrayRef widths,
                  const Optionals& slots, const Optionals& masks, const Optionals& kept,
                  const std::optional<at::Tensor>& inverse) {
  std::vector<at::Tensor> parts;
  parts.reserve(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::optional<at::Tensor> slot = slots.get(i), mask = masks.get(i), tokens = kept.get(i);
    const at::Tensor x = slot ? qkv.index_select(0, *slot) : qkv;
    const at::Tensor split = x.view({rows[i], widths[i], 3, heads, -1}).permute({2, 0, 3, 1, 4});
    const at::Tensor out = at::scaled_dot_product_attention(split[0], split[1], split[2], mask);
    const at::Tensor flat = out.transpose(1, 2).reshape({rows[i] * widths[i], -1});
    parts.push_back(tokens ? flat.index_select(0, *tokens) : flat);
  }
  return inverse ? at::cat(parts).index_select(0, *inverse) : parts[0];
}

at::Tensor encoder_layer(const at::Tensor& x, at::TensorList weights, at::TensorList packed, at::ArrayRef<double> eps,
                         int64_t heads, std::string_view activation, std::string_view variant, bool in_product,
                         at::IntArrayRef rows, at::IntArrayRef widths, const Optionals& slots, const Optionals& masks,
                         const Optionals& kept, const std::optional<at::Tensor>& inverse) {
  EE_CHECK(weights.size() == 12, kOp, "expected 12 weights, got ", weights.size(), "; pass a weight and a bias each");
  EE_CHECK(packed.empty() || packed.size() == 4, kOp, "expected 4 packed weights or none, got ", packed.size());
  EE_CHECK(eps.size() == 2, kOp, "expected eps of 2 norms, got ", eps.size());
  const size_t buckets = rows.size();
  EE_CHECK(buckets > 0 && widths.size() == buckets && slots.size() == buckets && masks.size() == buckets &&
               kept.size() == buckets && (buckets == 1 || inverse),
           kOp, "expected rows, widths, slots, masks and kept of each bucket, and inverse for several, got ", buckets,
           " rows");
  const auto product = [&](size_t at, size_t number) {
    return Product{weights[at], weights[at + 1], packed.empty() ? nullptr : &packed[number]};
  };
  const auto norm = [&](const at::Tensor& y, size_t at, double epsilon) {
    return at::layer_norm(y, {y.size(1)}, weights[at], weights[at + 1], epsilon);
  };
  const at::Tensor context = attend(plain(x, product(0, 0)), heads, rows, widths, slots, masks, kept, inverse);
  const at::Tensor y = norm(added(context, product(2, 1), x), 4, eps[0]);
  return norm(added(activated(y, product(6, 2), activation, variant, in_product), product(8, 3), y), 10, eps[1]);
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) { library.impl("encoder_layer_cpp", &encoder_layer); }
// packed weights have the dispatch key of oneDNN tensors
TORCH_LIBRARY_IMPL(earlyexit_kernels, MkldnnCPU, library) { library.impl("encoder_layer_cpp", &encoder_layer); }

}  // namespace earlyexit
