// The ops on CUDA: checks, allocation and the current stream around the kernels. Device memory is not read, so row ids
// and offsets are not checked.

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../ops.h"
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

at::Tensor run(const ExitTensors& tensors, Call call) {
  const c10::cuda::CUDAGuard guard(tensors.row_ids.device());
  const at::Tensor counts = at::zeros({kCounts}, tensors.row_ids.options());
  if (call.rows == 0) return counts;
  EE_CHECK(call.width <= kMaxWidth, kExitStep, "expected hidden of width at most ", kMaxWidth, ", got ", call.width);
  at::Tensor hidden, weight, scratch;
  if (tensors.hidden) {
    hidden = in_packs(*tensors.hidden);
    weight = in_packs(*tensors.weight);
    call.input = hidden.const_data_ptr();
    call.weight = weight.const_data_ptr();
    call.width = hidden.size(1);
  }
  const Dtype dtype = dtype_of(tensors.input());
  Frame frame = new_frame(call, dtype);
  if (frame.shared_bytes() > kSharedBytes) {  // from some thousands of classes on
    scratch = at::empty({call.rows, frame.floats}, tensors.answers.options());
    frame.scratch = scratch.mutable_data_ptr<float>();
  }
  launch_exit_step(call, frame, dtype, counts.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return counts;
}

void plan(const Compaction& compaction, const at::Tensor& row_ids) {
  const c10::cuda::CUDAGuard guard(row_ids.device());
  launch_compact(compaction, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void copy(const Gather& gather, const at::Tensor& hidden, const at::Tensor&) {
  if (gather.rows == 0 || gather.token_bytes == 0) return;
  const c10::cuda::CUDAGuard guard(hidden.device());
  launch_gather_rows(gather, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CUDA, library) {
  library.impl("exit_step_cpp", &exit_step<run>);
  library.impl("compact_cpp", &compact<plan>);
  library.impl("gather_rows_cpp", &gather_rows<copy>);
}

}  // namespace earlyexit
