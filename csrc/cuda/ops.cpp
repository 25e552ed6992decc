// The ops on CUDA: checks, allocation and the current stream around the kernels. Device memory is not read, so row ids
// and offsets are not checked.

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "../bind.h"
#include "kernels.h"

namespace earlyexit {
namespace {

Dtype dtype_of(const at::Tensor& input) {
  const at::ScalarType dtype = input.scalar_type();
  return dtype == at::kFloat ? Dtype::kFloat32 : dtype == at::kHalf ? Dtype::kFloat16 : Dtype::kBFloat16;
}

// Returns a matrix whose rows are made of whole packs, which the kernels load: itself, or a copy with zeros after each
// row. They change no bit, since a sum of products is never -0.
at::Tensor in_packs(const at::Tensor& x) {
  const int64_t beyond = x.size(1) * x.element_size() % kPackBytes;
  if (beyond == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kPackBytes == 0) return x;
  return at::constant_pad_nd(x, {0, (kPackBytes - beyond) % kPackBytes / x.element_size()});
}

// Launches an exit kernel: calls `launcher` with the arguments of the call, followed by `last`.
template <class Launcher, class Last>
void launch(const char* op, Launcher launcher, Call call, const ExitTensors& tensors, const Last& last) {
  const Dtype dtype = dtype_of(tensors.input());
  EE_CHECK(call.width <= kMaxWidth, op, "expected hidden of width at most ", kMaxWidth, ", got ", call.width);
  at::Tensor hidden;
  at::Tensor weight;
  if (tensors.hidden) {
    hidden = in_packs(*tensors.hidden);
    weight = in_packs(*tensors.weight);
    call.input = hidden.const_data_ptr();
    call.weight = weight.const_data_ptr();
    call.width = hidden.size(1);
  }
  Frame frame = new_frame(call, dtype);
  at::Tensor scratch;
  if (frame.shared_bytes() > kSharedBytes) {  // from some thousands of classes on
    scratch = at::empty({call.rows, frame.floats}, tensors.answers.options());
    frame.scratch = scratch.mutable_data_ptr<float>();
  }
  launcher(call, frame, dtype, last, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor exit_step(
    const std::optional<at::Tensor>& hidden, const std::optional<at::Tensor>& offsets,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& logits, const std::optional<at::Tensor>& aux, const at::Tensor& row_ids,
    const at::Tensor& state, const at::Tensor& answers, const at::Tensor& exit_layer, std::string_view criterion,
    at::ArrayRef<double> params, std::string_view pooling, int64_t layer, int64_t depth) {
  constexpr const char* kOp = "exit_step_cpp";
  const ExitTensors tensors{hidden, offsets, weight, bias, logits, aux, row_ids, state, answers, exit_layer};
  const Call call = bind_exit(kOp, tensors, criterion, params, pooling, layer, depth);
  const c10::cuda::CUDAGuard guard(row_ids.device());
  at::Tensor counts = at::zeros({kCounts}, row_ids.options());
  if (call.rows > 0) launch(kOp, launch_exit_step, call, tensors, counts.mutable_data_ptr<int32_t>());
  return counts.narrow(0, 0, 3);
}

void resident_exit(
    const std::optional<at::Tensor>& hidden, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& logits,
    const std::optional<at::Tensor>& aux, const at::Tensor& row_ids, const at::Tensor& offsets,
    const at::Tensor& old_offsets, const at::Tensor& source, const at::Tensor& counts, const at::Tensor& state,
    const at::Tensor& answers, const at::Tensor& exit_layer, std::string_view criterion, at::ArrayRef<double> params,
    std::string_view pooling, int64_t layer, int64_t depth, int64_t tile, int64_t capacity,
    std::optional<int64_t> handle) {
  constexpr const char* kOp = "resident_exit_cpp";
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max() / 2;
  const std::optional<at::Tensor> segments = offsets;
  const ExitTensors tensors{hidden, segments, weight, bias, logits, aux, row_ids, state, answers, exit_layer};
  const Call call = bind_exit(kOp, tensors, criterion, params, pooling, layer, depth);
  EE_CHECK(call.rows >= 1, kOp, "expected capacity for at least one row, got row_ids ", shape_name(row_ids.sizes()));
  EE_CHECK(1 <= capacity && capacity <= kMaxTokens, kOp, "expected a capacity of 1 to ", kMaxTokens,
           " tokens per side, got ", capacity);
  EE_CHECK(1 <= tile && tile <= kMaxTokens, kOp, "expected a tile of 1 to ", kMaxTokens, " tokens, got ", tile);
  EE_CHECK(!hidden || !call.pools_tokens() || hidden->size(0) == 2 * capacity, kOp, "expected hidden [", 2 * capacity,
           ", H], two sides of ", capacity, " tokens, got ", shape_name(hidden->sizes()));
  for (const auto& [name, tensor, size] : {std::tuple("old_offsets", &old_offsets, call.rows + 1),
                                           std::tuple("source", &source, call.rows),
                                           std::tuple("counts", &counts, kCounts)}) {
    check_tensor(kOp, name, *tensor, at::kInt, {size});
    check_device(kOp, name, *tensor, "row_ids", row_ids);
  }
  EE_CHECK(reinterpret_cast<uintptr_t>(counts.const_data_ptr()) % sizeof(int64_t) == 0, kOp,
           "expected counts at an address of whole 8 bytes, got a slice; pass a tensor of its own");
  const c10::cuda::CUDAGuard guard(row_ids.device());
  const Settle settle{offsets.mutable_data_ptr<int32_t>(), old_offsets.mutable_data_ptr<int32_t>(),
                      source.mutable_data_ptr<int32_t>(), counts.mutable_data_ptr<int32_t>(),
                      Divisor(static_cast<uint32_t>(tile)), static_cast<int32_t>(capacity),
                      handle.has_value(), static_cast<unsigned long long>(handle.value_or(0))};
  launch(kOp, launch_resident_exit, call, tensors, settle);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> compact(const at::Tensor& row_ids, const at::Tensor& offsets) {
  constexpr const char* kOp = "compact_cpp";
  check_tensor(kOp, "row_ids", row_ids, at::kInt, {kAnySize});
  check_row_count(kOp, row_ids.size(0));
  check_tensor(kOp, "offsets", offsets, at::kInt, {row_ids.size(0) + 1});
  check_device(kOp, "offsets", offsets, "row_ids", row_ids);
  const c10::cuda::CUDAGuard guard(row_ids.device());
  at::Tensor new_row_ids = at::empty_like(row_ids);
  at::Tensor new_offsets = at::empty_like(offsets);
  at::Tensor source = at::empty_like(row_ids);
  launch_compact(row_ids.const_data_ptr<int32_t>(), offsets.const_data_ptr<int32_t>(),
                 new_row_ids.mutable_data_ptr<int32_t>(), new_offsets.mutable_data_ptr<int32_t>(),
                 source.mutable_data_ptr<int32_t>(), row_ids.size(0), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {new_row_ids, new_offsets, source};
}

void gather_rows(const at::Tensor& hidden, const at::Tensor& offsets, const at::Tensor& source,
                 const at::Tensor& new_offsets, const at::Tensor& out) {
  constexpr const char* kOp = "gather_rows_cpp";
  check_gather(kOp, hidden, offsets, source, new_offsets, out);
  // the two sides of a resident batch lie in one buffer, at different offsets
  const at::MemOverlapStatus overlap = at::get_overlap_status(hidden, out);
  EE_CHECK(overlap == at::MemOverlapStatus::No || overlap == at::MemOverlapStatus::Full, kOp,
           "expected out to be hidden itself, or to share no memory with it; pass a second buffer");
  const int64_t token_bytes = hidden.size(1) * hidden.element_size();
  if (source.size(0) == 0 || token_bytes == 0) return;
  // within one buffer no token is both read and written, so at most half of them move
  const int64_t max_tokens = overlap == at::MemOverlapStatus::Full ? out.size(0) / 2 : out.size(0);
  const c10::cuda::CUDAGuard guard(hidden.device());
  launch_gather_rows({hidden.const_data_ptr(), offsets.const_data_ptr<int32_t>(), source.const_data_ptr<int32_t>(),
                      new_offsets.const_data_ptr<int32_t>(), out.mutable_data_ptr(), source.size(0), max_tokens,
                      token_bytes},
                     c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CUDA, library) {
  library.impl("exit_step_cpp", &exit_step);
  library.impl("resident_exit_cpp", &resident_exit);
  library.impl("compact_cpp", &compact);
  library.impl("gather_rows_cpp", &gather_rows);
}

}  // namespace earlyexit
