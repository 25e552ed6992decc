// One post-norm encoder layer on packed tokens, composed of torch's and oneDNN's kernels, called from C++: for short rows
// the overhead of Python exceeds the time of the products. earlyexit_kernels/cpu/bert.py is the same in Python.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../bindings.h"
#include "../check.h"

namespace earlyexit::cpu {
namespace {

constexpr const char* kOp = "OneDnnLayer";

using Tensors = std::vector<at::Tensor>;
using Optionals = std::vector<std::optional<at::Tensor>>;
using Scalars = c10::List<std::optional<at::Scalar>>;
using LinearOp = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            Scalars, std::optional<std::string_view>);
using BinaryOp = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            std::string_view);

// A linear with its weight, bias and, where oneDNN computes it, the packed weight.
struct Product {
  const at::Tensor& weight;
  const at::Tensor& bias;
  const at::Tensor* packed;
};

at::Tensor onednn(const at::Tensor& x, const Product& p, std::string_view activation, std::string_view variant) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<LinearOp>();
  return op.call(x, *p.packed, p.bias, activation, Scalars(), variant);
}

at::Tensor plain(const at::Tensor& x, const Product& p) {
  return p.packed ? onednn(x, p, "none", "") : at::linear(x, p.weight, p.bias);
}

at::Tensor added(const at::Tensor& x, const Product& p, const at::Tensor& other) {
  if (!p.packed) return at::linear(x, p.weight, p.bias).add_(other);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "binary").typed<BinaryOp>();
  return op.call(x, other, *p.packed, p.bias, "add");
}

// Attention bucket by bucket, [T, 3 H] -> [T, H]; the arguments are those of core/length_buckets.py.
at::Tensor attend(const at::Tensor& qkv, int64_t heads, const std::vector<int64_t>& rows,
                  const std::vector<int64_t>& widths, const Optionals& slots, const Optionals& masks,
                  const Optionals& kept, const std::optional<at::Tensor>& inverse) {
  Tensors parts;
  parts.reserve(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const at::Tensor x = slots[i] ? qkv.index_select(0, *slots[i]) : qkv;
    const at::Tensor split = x.view({rows[i], widths[i], 3, heads, -1}).permute({2, 0, 3, 1, 4});
    const at::Tensor out = at::scaled_dot_product_attention(split[0], split[1], split[2], masks[i]);
    const at::Tensor flat = out.transpose(1, 2).reshape({rows[i] * widths[i], -1});
    parts.push_back(kept[i] ? flat.index_select(0, *kept[i]) : flat);
  }
  return inverse ? at::cat(parts).index_select(0, *inverse) : parts[0];
}

// A layer with its weights. Calls do not change it, so threads may share it.
class OneDnnLayer {
 public:
  // weights: weight and bias of qkv, out, the first norm, inner, outer and the second norm. packed: the weights of qkv,
  // out, inner and outer in oneDNN's layout, used for up to `packed_up_to` tokens, or none.
  OneDnnLayer(Tensors weights, Tensors packed, std::vector<double> eps, int64_t heads, std::string activation,
              std::string variant, bool in_product, int64_t packed_up_to)
      : weights_(std::move(weights)),
        packed_(std::move(packed)),
        eps_(std::move(eps)),
        heads_(heads),
        activation_(std::move(activation)),
        variant_(std::move(variant)),
        in_product_(in_product),
        packed_up_to_(packed_up_to) {
    EE_CHECK(weights_.size() == 12, kOp, "expected 12 weights, got ", weights_.size());
    EE_CHECK(packed_.empty() || packed_.size() == 4, kOp, "expected 4 packed weights or none, got ", packed_.size());
    EE_CHECK(eps_.size() == 2, kOp, "expected eps of 2 norms, got ", eps_.size());
  }

  // x: tokens [1, T, H].
  at::Tensor operator()(const at::Tensor& x, const std::vector<int64_t>& rows, const std::vector<int64_t>& widths,
                        const Optionals& slots, const Optionals& masks, const Optionals& kept,
                        const std::optional<at::Tensor>& inverse) const {
    const size_t buckets = rows.size();
    EE_CHECK(buckets > 0 && widths.size() == buckets && slots.size() == buckets && masks.size() == buckets &&
                 kept.size() == buckets && (buckets == 1 || inverse),
             kOp, "expected rows, widths, slots, masks and kept of each bucket, and inverse for several, got ", buckets,
             " rows");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor tokens = x.squeeze(0);
    const bool packed = !packed_.empty() && tokens.size(0) <= packed_up_to_;
    const auto product = [&](size_t at, size_t number) {
      return Product{weights_[at], weights_[at + 1], packed ? &packed_[number] : nullptr};
    };
    const auto norm = [&](const at::Tensor& y, size_t at, double epsilon) {
      return at::layer_norm(y, {y.size(1)}, weights_[at], weights_[at + 1], epsilon);
    };
    const at::Tensor context =
        attend(plain(tokens, product(0, 0)), heads_, rows, widths, slots, masks, kept, inverse);
    const at::Tensor y = norm(added(context, product(2, 1), tokens), 4, eps_[0]);
    const at::Tensor z = norm(added(activated(y, product(6, 2)), product(8, 3), y), 10, eps_[1]);
    return z.unsqueeze(0);
  }

 private:
  at::Tensor activated(const at::Tensor& x, const Product& p) const {
    if (p.packed && in_product_) return onednn(x, p, activation_, variant_);
    at::Tensor y = plain(x, p);
    return activation_ == "gelu" ? at::gelu_(y, variant_) : at::relu_(y);
  }

  Tensors weights_, packed_;
  std::vector<double> eps_;
  int64_t heads_;
  std::string activation_, variant_;
  bool in_product_;
  int64_t packed_up_to_;
};

}  // namespace

void bind_onednn_layer(pybind11::module_& module) {
  bind_class<OneDnnLayer, Tensors, Tensors, std::vector<double>, int64_t, std::string, std::string, bool, int64_t>(
      module, kOp);
}

}  // namespace earlyexit::cpu
