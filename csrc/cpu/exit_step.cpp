// The CPU skeleton of exit_step: load a row, compute its logits, let the criterion decide, write the answer where the
// row leaves. One code path and one reduction order a row, so its bits know nothing of the batch.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../checks.h"
#include "../criteria/all.h"

namespace earlyexit {
namespace {

constexpr const char* kOp = "exit_step_cpp";

struct Criterion {
  std::string_view name;
  bool needs_aux;
  int param_count;
  int state_width;
  int state_per_class;
  bool (*step)(const Row&);
};

#define EE_ENTRY(name, Functor) \
  Criterion{#name, Functor::needs_aux, Functor::param_count, Functor::state_width, Functor::state_per_class, \
            &Functor::step},
constexpr Criterion kCriteria[] = {EE_CRITERIA(EE_ENTRY)};
#undef EE_ENTRY

enum class Pooling { kFirst, kMean, kNone };

// One call, checked: raw pointers, sizes as in the schema (B rows present of N, C classes, H width).
struct Call {
  const Criterion* criterion;
  std::vector<float> params;
  Pooling pooling;
  int layer;
  int depth;
  int64_t rows;      // B
  int64_t requests;  // N
  int64_t classes;   // C
  int64_t width;     // H, 0 where logits are given
  const void* input;  // hidden [T, H], or logits [B, C] where weight is null
  const float* weight;
  const float* bias;
  const int32_t* offsets;  // null: one token a row
  const float* aux;
  int32_t* row_ids;
  float* state;
  float* answers;
  int64_t* exit_layer;

  // Whether the rows of `input` are tokens to find through `offsets`, rather than one vector a row.
  bool pools_tokens() const { return offsets != nullptr && pooling != Pooling::kNone; }
};

// Sixteen running sums, folded in a fixed order: vectorised as written, without permission to reorder.
float dot(const float* a, const float* b, int64_t size) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
  }
  for (int k = 0; i + k < size; ++k) lanes[k] += a[i + k] * b[i + k];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

// The pooled vector [H] of row i in float32.
template <class scalar_t>
void pool(const Call& call, int64_t i, float* pooled) {
  const int64_t first = call.pools_tokens() ? call.offsets[i] : i;
  const bool mean = call.pools_tokens() && call.pooling == Pooling::kMean;
  const int64_t end = mean ? call.offsets[i + 1] : first + 1;
  const scalar_t* token = static_cast<const scalar_t*>(call.input) + first * call.width;
  for (int64_t h = 0; h < call.width; ++h) pooled[h] = static_cast<float>(token[h]);
  for (int64_t t = first + 1; t < end; ++t) {
    token += call.width;
    for (int64_t h = 0; h < call.width; ++h) pooled[h] += static_cast<float>(token[h]);
  }
  if (mean) {
    const float tokens = static_cast<float>(end - first);
    for (int64_t h = 0; h < call.width; ++h) pooled[h] /= tokens;
  }
}

template <class scalar_t>
void row_logits(const Call& call, int64_t i, float* pooled, float* z) {
  if (call.weight == nullptr) {
    const scalar_t* logits = static_cast<const scalar_t*>(call.input) + i * call.classes;
    for (int64_t c = 0; c < call.classes; ++c) z[c] = static_cast<float>(logits[c]);
    return;
  }
  pool<scalar_t>(call, i, pooled);
  for (int64_t c = 0; c < call.classes; ++c) {
    z[c] = dot(pooled, call.weight + c * call.width, call.width) + call.bias[c];
  }
}

// Rows begin .. end; returns how many of them were invalid.
template <class scalar_t>
int32_t step_rows(const Call& call, int64_t begin, int64_t end) {
  std::vector<float> scratch(call.width + 2 * call.classes);
  float* pooled = scratch.data();
  float* z = pooled + call.width;
  float* answer = z + call.classes;
  const int classes = static_cast<int>(call.classes);
  int32_t invalid = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = call.row_ids[i];
    if (n < 0) continue;
    row_logits<scalar_t>(call, i, pooled, z);
    std::copy_n(z, classes, answer);
    const float aux = call.criterion->needs_aux ? call.aux[i] : 0.0f;
    bool leave = call.layer == call.depth;
    if (is_invalid(z, classes) || aux != aux) {
      ++invalid;
    } else {
      leave |= call.criterion->step(Row{z, classes, aux, call.state + n, call.requests, call.layer, call.depth,
                                        call.params.data(), answer});
    }
    if (leave) {
      std::copy_n(answer, classes, call.answers + n * call.classes);
      call.exit_layer[n] = call.layer;
      call.row_ids[i] = -1;
    }
  }
  return invalid;
}

// Multiply-adds that are worth a second thread: some 50 us on one core.
constexpr int64_t kWorkPerThread = int64_t{1} << 18;

template <class scalar_t>
int32_t step_all(const Call& call) {
  const bool by_token = call.offsets != nullptr && call.pooling == Pooling::kMean;
  const int64_t tokens = by_token ? call.offsets[call.rows] : call.rows;
  const int64_t work = tokens * call.width + call.rows * call.classes * (call.width + 16);
  const int64_t grain = call.rows * kWorkPerThread / std::max<int64_t>(work, 1);
  std::atomic<int32_t> invalid{0};
  at::parallel_for(0, call.rows, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    invalid += step_rows<scalar_t>(call, begin, end);
  });
  return invalid;
}

const Criterion& find_criterion(std::string_view name, size_t params) {
  for (const Criterion& criterion : kCriteria) {
    if (criterion.name != name) continue;
    EE_CHECK(params == static_cast<size_t>(criterion.param_count), kOp, "expected ", criterion.param_count,
             " params for criterion '", name, "', got ", params, "; pass those of Criterion.params(layer)");
    return criterion;
  }
  std::string known;
  for (const Criterion& criterion : kCriteria) known += (known.empty() ? "" : ", ") + std::string(criterion.name);
  EE_CHECK(false, kOp, "expected criterion to be one of ", known, ", got '", name,
           "'; use backend='torch', or add it to csrc/criteria/all.h");
}

Pooling find_pooling(std::string_view name) {
  if (name == "first") return Pooling::kFirst;
  if (name == "mean") return Pooling::kMean;
  EE_CHECK(name == "none", kOp, "expected pooling to be 'first', 'mean' or 'none', got '", name, "'");
  return Pooling::kNone;
}

Call new_call(
    std::string_view criterion, at::ArrayRef<double> params, std::string_view pooling, int64_t layer, int64_t depth) {
  EE_CHECK(1 <= layer && layer <= depth && depth <= std::numeric_limits<int>::max(), kOp,
           "expected 1 <= layer <= depth, got layer ", layer, " of ", depth, "; layers count from 1");
  Call call{};
  call.criterion = &find_criterion(criterion, params.size());
  call.params.assign(params.begin(), params.end());
  call.pooling = find_pooling(pooling);
  call.layer = static_cast<int>(layer);
  call.depth = static_cast<int>(depth);
  return call;
}

// What is indexed by rows, present or of the request.
void bind_rows(Call& call, const at::Tensor& row_ids, const at::Tensor& state, const at::Tensor& answers,
               const at::Tensor& exit_layer, const std::optional<at::Tensor>& offsets,
               const std::optional<at::Tensor>& aux) {
  check_tensor(kOp, "row_ids", row_ids, at::kInt, {kAnySize});
  check_tensor(kOp, "answers", answers, at::kFloat, {kAnySize, kAnySize});
  call.rows = row_ids.size(0);
  call.requests = answers.size(0);
  call.classes = answers.size(1);
  EE_CHECK(call.classes >= 1 && call.classes <= std::numeric_limits<int>::max(), kOp,
           "expected answers [N, C] with at least one class, got ", shape_name(answers.sizes()));
  check_tensor(kOp, "exit_layer", exit_layer, at::kLong, {call.requests});
  const int64_t per_row = call.criterion->state_width + call.criterion->state_per_class * call.classes;
  check_tensor(kOp, "state", state, at::kFloat, {per_row, call.requests});
  if (offsets) {
    check_tensor(kOp, "offsets", *offsets, at::kInt, {call.rows + 1});
    call.offsets = offsets->const_data_ptr<int32_t>();
  }
  EE_CHECK(aux || !call.criterion->needs_aux, kOp, "expected aux [", call.rows, "] float32 for criterion '",
           call.criterion->name, "', got None; pass the scalar its head produces");
  if (aux) {
    check_tensor(kOp, "aux", *aux, at::kFloat, {call.rows});
    call.aux = aux->const_data_ptr<float>();
  }
  call.row_ids = row_ids.mutable_data_ptr<int32_t>();
  call.state = state.mutable_data_ptr<float>();
  call.answers = answers.mutable_data_ptr<float>();
  call.exit_layer = exit_layer.mutable_data_ptr<int64_t>();
}

// The linear head over hidden states; `weight` and `bias` come back in float32, to outlive the call.
void bind_head(Call& call, const at::Tensor& hidden, at::Tensor& weight, at::Tensor& bias) {
  const at::ScalarType dtype = hidden.scalar_type();
  const int64_t tokens = call.pools_tokens() ? kAnySize : call.rows;
  check_tensor(kOp, "hidden", hidden, dtype, {tokens, kAnySize});
  check_tensor(kOp, "weight", weight, dtype, {call.classes, hidden.size(1)});
  check_tensor(kOp, "bias", bias, dtype, {call.classes});
  at::AutoDispatchBelowAutograd no_gradients;
  weight = weight.to(at::kFloat);
  bias = bias.to(at::kFloat);
  call.width = hidden.size(1);
  call.weight = weight.const_data_ptr<float>();
  call.bias = bias.const_data_ptr<float>();
}

// Row ids within the request, and a token to read for every row that will be pooled. Before anything is written.
void check_rows(const Call& call, int64_t tokens) {
  if (call.offsets != nullptr) check_offsets(kOp, "offsets", call.offsets, call.rows, tokens);
  const bool pools = call.weight != nullptr && call.pools_tokens();
  for (int64_t i = 0; i < call.rows; ++i) {
    const int32_t n = call.row_ids[i];
    EE_CHECK(n < call.requests, kOp, "expected row_ids below the ", call.requests, " rows of answers, got ", n,
             " at row ", i, "; row ids name rows of the request, -1 a row that has left");
    EE_CHECK(n < 0 || !pools || call.offsets[i] < call.offsets[i + 1], kOp, "expected row ", i,
             " to have a token to pool, got an empty segment at ", call.offsets[i],
             "; drop empty rows before packing, or set their row id to -1");
  }
}

at::Tensor count_rows(const Call& call, int32_t invalid, const at::TensorOptions& options) {
  at::Tensor counts = at::empty({3}, options);
  int32_t live = 0;
  int32_t tokens = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    if (call.row_ids[i] < 0) continue;
    ++live;
    tokens += call.offsets == nullptr ? 1 : call.offsets[i + 1] - call.offsets[i];
  }
  int32_t* out = counts.mutable_data_ptr<int32_t>();
  out[0] = live;
  out[1] = tokens;
  out[2] = invalid;
  return counts;
}

at::Tensor exit_step(
    const std::optional<at::Tensor>& hidden, const std::optional<at::Tensor>& offsets,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& logits, const std::optional<at::Tensor>& aux, const at::Tensor& row_ids,
    const at::Tensor& state, const at::Tensor& answers, const at::Tensor& exit_layer, std::string_view criterion,
    at::ArrayRef<double> params, std::string_view pooling, int64_t layer, int64_t depth) {
  const bool fused = hidden && weight && bias && !logits;
  const bool ready = logits && !hidden && !weight && !bias;
  EE_CHECK(fused || ready, kOp, "expected hidden, weight and bias, or logits alone, got hidden ", given(hidden),
           ", weight ", given(weight), ", bias ", given(bias), ", logits ", given(logits));
  const at::Tensor& input = fused ? *hidden : *logits;
  check_float_dtype(kOp, fused ? "hidden" : "logits", input);

  Call call = new_call(criterion, params, pooling, layer, depth);
  bind_rows(call, row_ids, state, answers, exit_layer, offsets, aux);
  at::Tensor weight32 = fused ? *weight : at::Tensor();
  at::Tensor bias32 = fused ? *bias : at::Tensor();
  if (fused) {
    bind_head(call, input, weight32, bias32);
  } else {
    check_tensor(kOp, "logits", input, input.scalar_type(), {call.rows, call.classes});
  }
  check_rows(call, fused && call.pools_tokens() ? input.size(0) : kAnySize);
  call.input = input.const_data_ptr();

  int32_t invalid = 0;
  AT_DISPATCH_SWITCH(
      input.scalar_type(), kOp,
      AT_DISPATCH_CASE(at::kFloat, [&] { invalid = step_all<scalar_t>(call); })
      AT_DISPATCH_CASE(at::kHalf, [&] { invalid = step_all<scalar_t>(call); })
      AT_DISPATCH_CASE(at::kBFloat16, [&] { invalid = step_all<scalar_t>(call); }));
  return count_rows(call, invalid, row_ids.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) { library.impl("exit_step_cpp", &exit_step); }

}  // namespace earlyexit
