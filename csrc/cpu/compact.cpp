// Compaction on the CPU: `compact` computes the positions of the live rows, `gather_rows` copies their tokens.

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../checks.h"

namespace earlyexit {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> compact(const at::Tensor& row_ids, const at::Tensor& offsets) {
  constexpr const char* kOp = "compact_cpp";
  check_tensor(kOp, "row_ids", row_ids, at::kInt, {kAnySize});
  const int64_t rows = row_ids.size(0);
  check_row_count(kOp, rows);
  check_tensor(kOp, "offsets", offsets, at::kInt, {rows + 1});
  const int32_t* old_ids = row_ids.const_data_ptr<int32_t>();
  const int32_t* old_offsets = offsets.const_data_ptr<int32_t>();
  check_offsets(kOp, "offsets", old_offsets, rows, kAnySize);

  at::Tensor new_row_ids = at::empty_like(row_ids);
  at::Tensor new_offsets = at::empty_like(offsets);
  at::Tensor source = at::empty_like(row_ids);
  int32_t* ids = new_row_ids.mutable_data_ptr<int32_t>();
  int32_t* ends = new_offsets.mutable_data_ptr<int32_t>();
  int32_t* from = source.mutable_data_ptr<int32_t>();
  int64_t live = 0;
  ends[0] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (old_ids[i] < 0) continue;
    ids[live] = old_ids[i];
    from[live] = static_cast<int32_t>(i);
    ends[live + 1] = ends[live] + (old_offsets[i + 1] - old_offsets[i]);  // adding before subtracting could overflow
    ++live;
  }
  std::fill(ids + live, ids + rows, -1);
  std::fill(from + live, from + rows, -1);
  std::fill(ends + live + 1, ends + rows + 1, ends[live]);
  return {new_row_ids, new_offsets, source};
}

// Minimum bytes to copy per thread.
constexpr int64_t kBytesPerThread = int64_t{1} << 19;

void gather_rows(const at::Tensor& hidden, const at::Tensor& offsets, const at::Tensor& source,
                 const at::Tensor& new_offsets, const at::Tensor& out) {
  constexpr const char* kOp = "gather_rows_cpp";
  check_gather(kOp, hidden, offsets, source, new_offsets, out);
  const int64_t rows = source.size(0);
  const int64_t old_rows = offsets.size(0) - 1;
  EE_CHECK(at::get_overlap_status(hidden, out) == at::MemOverlapStatus::No, kOp,
           "expected out to share no memory with hidden, got overlapping buffers; pass a second buffer");

  const int32_t* old_begin = offsets.const_data_ptr<int32_t>();
  const int32_t* new_begin = new_offsets.const_data_ptr<int32_t>();
  const int32_t* from = source.const_data_ptr<int32_t>();
  check_offsets(kOp, "offsets", old_begin, old_rows, hidden.size(0));
  check_offsets(kOp, "new_offsets", new_begin, rows, out.size(0));
  for (int64_t j = 0; j < rows; ++j) {
    EE_CHECK(from[j] < old_rows, kOp, "expected source below the ", old_rows, " rows of offsets, got ", from[j],
             " at row ", j, "; pass what compact returned");
    if (from[j] < 0) continue;
    const int32_t old_length = old_begin[from[j] + 1] - old_begin[from[j]];
    const int32_t new_length = new_begin[j + 1] - new_begin[j];
    EE_CHECK(old_length == new_length, kOp, "expected new_offsets to keep the ", old_length, " tokens of row ", from[j],
             ", got ", new_length, " at row ", j, "; pass what compact returned");
  }

  const int64_t token_bytes = hidden.size(1) * hidden.element_size();
  if (token_bytes == 0) return;
  const char* input = static_cast<const char*>(hidden.const_data_ptr());
  char* output = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grain = rows * kBytesPerThread / std::max<int64_t>(new_begin[rows] * token_bytes, 1);
  at::parallel_for(0, rows, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t tokens = new_begin[j + 1] - new_begin[j];
      if (from[j] < 0 || tokens == 0) continue;
      std::memcpy(output + new_begin[j] * token_bytes, input + old_begin[from[j]] * token_bytes, tokens * token_bytes);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) {
  library.impl("compact_cpp", &compact);
  library.impl("gather_rows_cpp", &gather_rows);
}

}  // namespace earlyexit
