// exit_step on the CPU: for each row, compute the logits, let the criterion decide, and write the answer if the row
// leaves. Each row has one code path and one reduction order, so its bits do not depend on the batch.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../ops.h"

namespace earlyexit {
namespace {

// Sixteen partial sums, added in a fixed order: vectorises without reordering of floating-point operations.
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

// Computes the pooled vector [H] of row i in float32.
template <class scalar_t>
void pool(const Call& call, int64_t i, float* pooled) {
  const int64_t first = call.pools_tokens() ? call.offsets[i] : i;
  const bool mean = call.pools_mean();
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
  const float* weight = static_cast<const float*>(call.weight);
  const float* bias = static_cast<const float*>(call.bias);
  for (int64_t c = 0; c < call.classes; ++c) z[c] = dot(pooled, weight + c * call.width, call.width) + bias[c];
}

// What the op returns: the rows that stay, their tokens (1 a row without offsets), and the rows with invalid logits.
struct Counts {
  int32_t live = 0;
  int32_t tokens = 0;
  int32_t invalid = 0;
};

// Runs rows begin .. end.
template <class scalar_t>
Counts step_rows(const Call& call, int64_t begin, int64_t end) {
  std::vector<float> scratch(call.width + 2 * call.classes);
  float* pooled = scratch.data();
  float* z = pooled + call.width;
  float* answer = z + call.classes;
  Counts counts;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = call.row_ids[i];
    if (n < 0) continue;
    row_logits<scalar_t>(call, i, pooled, z);
    std::copy_n(z, call.classes, answer);
    Decision decision{};
    with_rule(call.rule, [&](auto rule) {
      using Criterion = decltype(rule);
      decision = decide<Criterion>(call, n, aux_of<Criterion>(call, i), z, answer);
    });
    counts.invalid += decision.invalid;
    if (decision.leaves) {
      std::copy_n(answer, call.classes, call.answers + n * call.classes);
      call.exit_layer[n] = call.layer;
      call.row_ids[i] = -1;
    } else {
      ++counts.live;
      counts.tokens += call.offsets == nullptr ? 1 : call.offsets[i + 1] - call.offsets[i];
    }
  }
  return counts;
}

// Minimum multiply-adds per thread: about 50 us on one core.
constexpr int64_t kWorkPerThread = int64_t{1} << 18;

template <class scalar_t>
Counts step_all(const Call& call) {
  const int64_t tokens = call.pools_mean() ? call.offsets[call.rows] : call.rows;
  const int64_t work = tokens * call.width + call.rows * call.classes * (call.width + 16);
  const int64_t grain = call.rows * kWorkPerThread / std::max<int64_t>(work, 1);
  std::atomic<int32_t> live{0};
  std::atomic<int32_t> present{0};
  std::atomic<int32_t> invalid{0};
  at::parallel_for(0, call.rows, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    const Counts part = step_rows<scalar_t>(call, begin, end);
    live += part.live;
    present += part.tokens;
    invalid += part.invalid;
  });
  return {live, present, invalid};
}

// Requires row ids within the request, and at least one token for every row to pool. Called before any write.
void check_rows(const Call& call, int64_t tokens) {
  if (call.offsets != nullptr) check_offsets(kExitStep, "offsets", call.offsets, call.rows, tokens);
  const bool pools = call.weight != nullptr && call.pools_tokens();
  int32_t highest = -1;
  for (int64_t i = 0; i < call.rows; ++i) highest = std::max(highest, call.row_ids[i]);
  if (!pools && highest < call.requests) return;
  for (int64_t i = 0; i < call.rows; ++i) {
    const int32_t n = call.row_ids[i];
    EE_CHECK(n < call.requests, kExitStep, "expected row_ids below the ", call.requests, " rows of answers, got ", n,
             " at row ", i, "; row ids are rows of the request, or -1 for a row that has left");
    EE_CHECK(n < 0 || !pools || call.offsets[i] < call.offsets[i + 1], kExitStep, "expected row ", i,
             " to have a token to pool, got an empty segment at ", call.offsets[i],
             "; drop empty rows before packing, or set their row id to -1");
  }
}

at::Tensor run(const ExitTensors& tensors, Call call) {
  check_rows(call, tensors.hidden && call.pools_tokens() ? tensors.hidden->size(0) : kAnySize);
  at::Tensor weight, bias;
  if (tensors.hidden) {
    at::AutoDispatchBelowAutograd no_gradients;
    weight = tensors.weight->to(at::kFloat);
    bias = tensors.bias->to(at::kFloat);
    call.weight = weight.const_data_ptr();
    call.bias = bias.const_data_ptr();
  }
  const Counts counts = with_float_type(
      tensors.input().scalar_type(), [&](auto typed) { return step_all<decltype(typed)>(call); });
  at::Tensor out = at::empty({3}, tensors.row_ids.options());
  int32_t* numbers = out.mutable_data_ptr<int32_t>();
  numbers[0] = counts.live;
  numbers[1] = counts.tokens;
  numbers[2] = counts.invalid;
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) { library.impl("exit_step_cpp", &exit_step<run>); }

}  // namespace earlyexit
