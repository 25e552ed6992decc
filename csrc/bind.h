// Builds the `Call` of an exit op from its tensors, with all checks that do not read device memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "call.h"
#include "checks.h"

namespace earlyexit {

struct Criterion {
  std::string_view name;
  Rule rule;
  bool needs_aux;
  int param_count;
  int state_width;
  int state_per_class;
};

#define EE_ENTRY(name, Functor)                                                                               \
  Criterion{#name, Rule::k##Functor, Functor::needs_aux, Functor::param_count, Functor::state_width, \
            Functor::state_per_class},
constexpr Criterion kCriteria[] = {EE_CRITERIA(EE_ENTRY)};
#undef EE_ENTRY

#define EE_FITS(name, Functor) static_assert(Functor::param_count <= kMaxParams, #name " has too many params");
EE_CRITERIA(EE_FITS)
#undef EE_FITS

inline const Criterion& find_criterion(const char* op, std::string_view name, size_t params) {
  for (const Criterion& criterion : kCriteria) {
    if (criterion.name != name) continue;
    EE_CHECK(params == static_cast<size_t>(criterion.param_count), op, "expected ", criterion.param_count,
             " params for criterion '", name, "', got ", params, "; pass those of Criterion.params(layer)");
    return criterion;
  }
  std::string known;
  for (const Criterion& criterion : kCriteria) known += (known.empty() ? "" : ", ") + std::string(criterion.name);
  EE_CHECK(false, op, "expected criterion to be one of ", known, ", got '", name,
           "'; use backend='torch', or add it to csrc/criteria/all.h");
}

inline Pooling find_pooling(const char* op, std::string_view name) {
  if (name == "first") return Pooling::kFirst;
  if (name == "mean") return Pooling::kMean;
  EE_CHECK(name == "none", op, "expected pooling to be 'first', 'mean' or 'none', got '", name, "'");
  return Pooling::kNone;
}

// The tensors of an exit op, named as in the schema.
struct ExitTensors {
  const std::optional<at::Tensor>& hidden;
  const std::optional<at::Tensor>& offsets;
  const std::optional<at::Tensor>& weight;
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& logits;
  const std::optional<at::Tensor>& aux;
  const at::Tensor& row_ids;
  const at::Tensor& state;
  const at::Tensor& answers;
  const at::Tensor& exit_layer;

  const at::Tensor& input() const { return hidden ? *hidden : *logits; }
};

// Raises if a tensor that is written overlaps another one: a row id overwritten by an answer would index out of range.
inline void check_apart(const char* op, const ExitTensors& t) {
  struct Span {
    const char* name;
    const char* begin;
    const char* end;
  };
  Span spans[10];
  size_t count = 0;
  size_t written = 0;
  const auto add = [&](const char* name, const at::Tensor& tensor) {
    const char* begin = static_cast<const char*>(tensor.const_data_ptr());
    const Span span{name, begin, begin + tensor.nbytes()};
    for (size_t k = 0; k < written; ++k) {
      EE_CHECK(span.begin >= spans[k].end || spans[k].begin >= span.end, op, "expected ", spans[k].name,
               " to share no memory with ", name, "; pass a second buffer");
    }
    spans[count++] = span;
  };
  for (const auto& [name, tensor] : {std::pair("row_ids", &t.row_ids), std::pair("state", &t.state),
                                     std::pair("answers", &t.answers), std::pair("exit_layer", &t.exit_layer)}) {
    add(name, *tensor);
    written = count;
  }
  for (const auto& [name, tensor] : {std::pair("hidden", &t.hidden), std::pair("offsets", &t.offsets),
                                     std::pair("weight", &t.weight), std::pair("bias", &t.bias),
                                     std::pair("logits", &t.logits), std::pair("aux", &t.aux)}) {
    if (*tensor) add(name, **tensor);
  }
}

// Binds the tensors that are indexed by rows of the batch or of the request.
inline void bind_rows(const char* op, Call& call, const Criterion& criterion, const ExitTensors& t) {
  check_tensor(op, "row_ids", t.row_ids, at::kInt, {kAnySize});
  check_tensor(op, "answers", t.answers, at::kFloat, {kAnySize, kAnySize});
  call.rows = t.row_ids.size(0);
  check_row_count(op, call.rows);
  call.requests = t.answers.size(0);
  call.classes = t.answers.size(1);
  EE_CHECK(call.classes >= 1 && call.classes <= std::numeric_limits<int>::max(), op,
           "expected answers [N, C] with at least one class, got ", shape_name(t.answers.sizes()));
  check_tensor(op, "exit_layer", t.exit_layer, at::kLong, {call.requests});
  const int64_t per_row = criterion.state_width + criterion.state_per_class * call.classes;
  check_tensor(op, "state", t.state, at::kFloat, {per_row, call.requests});
  if (t.offsets) {
    check_tensor(op, "offsets", *t.offsets, at::kInt, {call.rows + 1});
    call.offsets = t.offsets->const_data_ptr<int32_t>();
  }
  EE_CHECK(t.aux || !criterion.needs_aux, op, "expected aux [", call.rows, "] float32 for criterion '", criterion.name,
           "', got None; pass the scalar that its head produces");
  if (t.aux) {
    check_tensor(op, "aux", *t.aux, at::kFloat, {call.rows});
    call.aux = t.aux->const_data_ptr<float>();
  }
  call.row_ids = t.row_ids.mutable_data_ptr<int32_t>();
  call.state = t.state.mutable_data_ptr<float>();
  call.answers = t.answers.mutable_data_ptr<float>();
  call.exit_layer = t.exit_layer.mutable_data_ptr<int64_t>();
}

// Binds the linear head over hidden states, or the given logits.
inline void bind_input(const char* op, Call& call, const ExitTensors& t) {
  const at::Tensor& input = t.input();
  const at::ScalarType dtype = input.scalar_type();
  call.input = input.const_data_ptr();
  if (!t.hidden) return check_tensor(op, "logits", input, dtype, {call.rows, call.classes});
  const int64_t tokens = call.pools_tokens() ? kAnySize : call.rows;
  check_tensor(op, "hidden", input, dtype, {tokens, kAnySize});
  call.width = input.size(1);
  EE_CHECK(call.width >= 1, op, "expected hidden of width >= 1, got ", shape_name(input.sizes()));
  check_tensor(op, "weight", *t.weight, dtype, {call.classes, call.width});
  check_tensor(op, "bias", *t.bias, dtype, {call.classes});
  call.weight = t.weight->const_data_ptr();
  call.bias = t.bias->const_data_ptr();
}

// Returns the checked arguments of an exit op. The tensors must outlive the call, which holds their pointers.
inline Call bind_exit(const char* op, const ExitTensors& t, std::string_view criterion_name,
                      at::ArrayRef<double> params, std::string_view pooling, int64_t layer, int64_t depth) {
  const bool fused = t.hidden && t.weight && t.bias && !t.logits;
  const bool ready = t.logits && !t.hidden && !t.weight && !t.bias;
  EE_CHECK(fused || ready, op, "expected hidden, weight and bias, or logits alone, got hidden ", given(t.hidden),
           ", weight ", given(t.weight), ", bias ", given(t.bias), ", logits ", given(t.logits));
  check_float_dtype(op, fused ? "hidden" : "logits", t.input());
  EE_CHECK(1 <= layer && layer <= depth && depth <= std::numeric_limits<int>::max(), op,
           "expected 1 <= layer <= depth, got layer ", layer, " of ", depth, "; layers count from 1");
  const Criterion& criterion = find_criterion(op, criterion_name, params.size());
  Call call{};
  call.rule = criterion.rule;
  for (size_t k = 0; k < params.size(); ++k) call.params[k] = static_cast<float>(params[k]);
  call.pooling = find_pooling(op, pooling);
  call.layer = static_cast<int>(layer);
  call.depth = static_cast<int>(depth);
  bind_rows(op, call, criterion, t);
  bind_input(op, call, t);
  for (const auto& [name, tensor] : {std::pair("hidden", &t.hidden), std::pair("offsets", &t.offsets),
                                     std::pair("weight", &t.weight), std::pair("bias", &t.bias),
                                     std::pair("logits", &t.logits), std::pair("aux", &t.aux)}) {
    if (*tensor) check_device(op, name, **tensor, "row_ids", t.row_ids);
  }
  for (const auto& [name, tensor] : {std::pair("state", &t.state), std::pair("answers", &t.answers),
                                     std::pair("exit_layer", &t.exit_layer)}) {
    check_device(op, name, *tensor, "row_ids", t.row_ids);
  }
  check_apart(op, t);
  return call;
}

}  // namespace earlyexit
