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

at::Tensor exit_step(
    const std::optional<at::Tensor>& hidden, const std::optional<at::Tensor>& offsets,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& logits, const std::optional<at::Tensor>& aux, const at::Tensor& row_ids,
    const at::Tensor& state, const at::Tensor& answers, const at::Tensor& exit_layer, std::string_view criterion,
    at::ArrayRef<double> params, std::string_view pooling, int64_t layer, int64_t depth) {
  constexpr const char* kOp = "exit_step_cpp";
  const ExitTensors tensors{hidden, offsets, weight, bias, logits, aux, row_ids, state, answers, exit_layer};
  Call call = bind_exit(kOp, tensors, criterion, params, pooling, layer, depth);
  const c10::cuda::CUDAGuard guard(row_ids.device());
  at::Tensor counts = at::zeros({kCounts}, row_ids.options());
  if (call.rows == 0) return counts;
  EE_CHECK(call.width <= kMaxWidth, kOp, "expected hidden of width at most ", kMaxWidth, ", got ", call.width);
  at::Tensor packed_hidden;
  at::Tensor packed_weight;
  if (hidden) {
    packed_hidden = in_packs(*hidden);
    packed_weight = in_packs(*weight);
    call.input = packed_hidden.const_data_ptr();
    call.weight = packed_weight.const_data_ptr();
    call.width = packed_hidden.size(1);
  }
  const Dtype dtype = dtype_of(tensors.input());
  Frame frame = new_frame(call, dtype);
  at::Tensor scratch;
  if (frame.shared_bytes() > kSharedBytes) {  // from some thousands of classes on
    scratch = at::empty({call.rows, frame.floats}, answers.options());
    frame.scratch = scratch.mutable_data_ptr<float>();
  }
  launch_exit_step(call, frame, dtype, counts.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return counts;
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
  EE_CHECK(at::get_overlap_status(hidden, out) == at::MemOverlapStatus::No, kOp,
           "expected out to share no memory with hidden; pass a second buffer");
  const int64_t token_bytes = hidden.size(1) * hidden.element_size();
  if (source.size(0) == 0 || token_bytes == 0) return;
  const c10::cuda::CUDAGuard guard(hidden.device());
  launch_gather_rows({hidden.const_data_ptr(), offsets.const_data_ptr<int32_t>(), source.const_data_ptr<int32_t>(),
                      new_offsets.const_data_ptr<int32_t>(), out.mutable_data_ptr(), source.size(0), out.size(0),
                      token_bytes},
                     c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CUDA, library) {
  library.impl("exit_step_cpp", &exit_step);
  library.impl("compact_cpp", &compact);
  library.impl("gather_rows_cpp", &gather_rows);
}

}  // namespace earlyexit
