// The ops that every device has, from their tensors: checks that do not read device memory, and memory for results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "call.h"
#include "check.h"

namespace earlyexit {

constexpr const char* kExitStep = "exit_step_cpp";
constexpr const char* kCompact = "compact_cpp";
constexpr const char* kGatherRows = "gather_rows_cpp";

// Requires a number of rows that int32 counts.
inline int64_t rows_of(const char* op, const at::Tensor& row_ids) {
  const int64_t rows = row_ids.numel();
  EE_CHECK(rows <= std::numeric_limits<int32_t>::max(), op, "expected at most ", std::numeric_limits<int32_t>::max(),
           " rows, got ", rows, "; split the batch");
  return rows;
}

using MaybeTensor = std::optional<at::Tensor>;

// The tensors of exit_step, named as in the schema.
struct ExitTensors {
  const MaybeTensor &hidden, &offsets, &weight, &bias, &logits, &aux;
  const at::Tensor &row_ids, &state, &answers, &exit_layer;

  const at::Tensor& input() const { return hidden ? *hidden : *logits; }
};

// Returns the checked arguments of exit_step. The tensors must outlive the call, which holds their addresses.
inline Call bind_exit(const ExitTensors& t, std::string_view name, at::ArrayRef<double> params,
                      std::string_view pooling, int64_t layer, int64_t depth) {
  const bool fused = t.hidden && t.weight && t.bias && !t.logits;
  EE_CHECK(fused || (t.logits && !t.hidden && !t.weight && !t.bias), kExitStep,
           "expected hidden, weight and bias, or logits alone, got others");
  EE_CHECK(1 <= layer && layer <= depth && depth <= std::numeric_limits<int>::max(), kExitStep,
           "expected 1 <= layer <= depth, got layer ", layer, " of ", depth, "; layers count from 1");
  Call call{};
  call.rule = find_name<Rule>(kExitStep, "criterion", kRuleNames, name);
  const size_t expected = with_rule(call.rule, [](auto functor) { return functor.params; });
  EE_CHECK(params.size() == expected && expected <= kMaxParams, kExitStep, "expected ", expected,
           " params for criterion '", name, "', got ", params.size(), "; pass those of Criterion.params(layer)");
  EE_CHECK(t.aux || !with_rule(call.rule, [](auto functor) { return functor.needs_aux; }), kExitStep,
           "expected aux for criterion '", name, "', got None");
  for (size_t k = 0; k < params.size(); ++k) call.params[k] = static_cast<float>(params[k]);
  call.pooling = find_name<Pooling>(kExitStep, "pooling", kPoolingNames, pooling);
  call.layer = static_cast<int>(layer);
  call.depth = static_cast<int>(depth);
  call.rows = rows_of(kExitStep, t.row_ids);
  EE_CHECK(t.answers.dim() == 2 && t.answers.size(1) >= 1 && t.answers.size(1) <= std::numeric_limits<int>::max(),
           kExitStep, "expected answers [N, C] with at least one class, got ", t.answers.sizes());
  call.requests = t.answers.size(0);
  call.classes = t.answers.size(1);
  const int64_t state_size = with_rule(call.rule, [&](auto functor) { return functor.state_size(call.classes); });

  Arguments arguments(kExitStep, t.row_ids.device());
  call.row_ids = arguments.write<int32_t>("row_ids", t.row_ids, {call.rows});
  call.state = arguments.write<float>("state", t.state, {state_size, call.requests});
  call.answers = arguments.write<float>("answers", t.answers, {call.requests, call.classes});
  call.exit_layer = arguments.write<int64_t>("exit_layer", t.exit_layer, {call.requests});
  if (t.offsets) call.offsets = arguments.read<int32_t>("offsets", *t.offsets, {call.rows + 1});
  if (t.aux) call.aux = arguments.read<float>("aux", *t.aux, {call.rows});
  const at::ScalarType dtype = float_dtype(kExitStep, fused ? "hidden" : "logits", t.input());
  if (!fused) {
    call.input = arguments.read("logits", *t.logits, dtype, {call.rows, call.classes});
    return call;
  }
  call.input = arguments.read("hidden", *t.hidden, dtype, {call.pools_tokens() ? kAnySize : call.rows, kAnySize});
  call.width = t.hidden->size(1);
  EE_CHECK(call.width >= 1, kExitStep, "expected hidden of width >= 1, got ", t.hidden->sizes());
  call.weight = arguments.read("weight", *t.weight, dtype, {call.classes, call.width});
  call.bias = arguments.read("bias", *t.bias, dtype, {call.classes});
  return call;
}

// exit_step by the function of a device, which returns the counts.
template <at::Tensor (*RUN)(const ExitTensors&, Call)>
at::Tensor exit_step(const MaybeTensor& hidden, const MaybeTensor& offsets, const MaybeTensor& weight,
                     const MaybeTensor& bias, const MaybeTensor& logits, const MaybeTensor& aux,
                     const at::Tensor& row_ids, const at::Tensor& state, const at::Tensor& answers,
                     const at::Tensor& exit_layer, std::string_view criterion, at::ArrayRef<double> params,
                     std::string_view pooling, int64_t layer, int64_t depth) {
  const ExitTensors tensors{hidden, offsets, weight, bias, logits, aux, row_ids, state, answers, exit_layer};
  return RUN(tensors, bind_exit(tensors, criterion, params, pooling, layer, depth));
}

// compact by the function of a device.
template <void (*RUN)(const Compaction&, const at::Tensor&)>
std::tuple<at::Tensor, at::Tensor, at::Tensor> compact(const at::Tensor& row_ids, const at::Tensor& offsets) {
  const Arguments arguments(kCompact, row_ids.device());
  const int64_t rows = rows_of(kCompact, row_ids);
  const int32_t* ids = arguments.read<int32_t>("row_ids", row_ids, {rows});
  const int32_t* ends = arguments.read<int32_t>("offsets", offsets, {rows + 1});
  const at::Tensor new_ids = at::empty_like(row_ids), new_offsets = at::empty_like(offsets);
  const at::Tensor source = at::empty_like(row_ids);
  RUN({ids, ends, new_ids.mutable_data_ptr<int32_t>(), new_offsets.mutable_data_ptr<int32_t>(),
       source.mutable_data_ptr<int32_t>(), rows},
      row_ids);
  return {new_ids, new_offsets, source};
}

// gather_rows by the function of a device.
template <void (*RUN)(const Gather&, const at::Tensor& hidden, const at::Tensor& offsets)>
void gather_rows(const at::Tensor& hidden, const at::Tensor& offsets, const at::Tensor& source,
                 const at::Tensor& new_offsets, const at::Tensor& out) {
  const at::ScalarType dtype = hidden.scalar_type();
  if (dtype != at::kDouble) float_dtype(kGatherRows, "hidden", hidden);  // a copy supports float64 too
  EE_CHECK(hidden.dim() == 2, kGatherRows, "expected hidden [T, H], got ", hidden.sizes());
  EE_CHECK(offsets.numel() > 0, kGatherRows, "expected offsets [B + 1], got an empty tensor; pass cumulative lengths");
  Arguments arguments(kGatherRows, hidden.device());
  const int64_t rows = source.numel(), width = hidden.size(1);
  void* to = arguments.write("out", out, dtype, {kAnySize, width});
  const void* from = arguments.read("hidden", hidden, dtype, {kAnySize, width});
  const Gather gather{from,
                      arguments.read<int32_t>("offsets", offsets, {kAnySize}),
                      arguments.read<int32_t>("source", source, {rows}),
                      arguments.read<int32_t>("new_offsets", new_offsets, {rows + 1}),
                      to,
                      rows,
                      out.size(0),
                      width * hidden.element_size()};
  RUN(gather, hidden, offsets);
}

}  // namespace earlyexit
