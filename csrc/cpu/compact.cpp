// Compaction on the CPU: `compact` computes the positions of the live rows, `gather_rows` copies their tokens.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../ops.h"

namespace earlyexit {
namespace {

void plan(const Compaction& c, const at::Tensor&) {
  check_offsets(kCompact, "offsets", c.offsets, c.rows, kAnySize);
  int64_t live = 0;
  c.new_offsets[0] = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    if (c.row_ids[i] < 0) continue;
    c.new_ids[live] = c.row_ids[i];
    c.source[live] = static_cast<int32_t>(i);
    // adding before subtracting could overflow
    c.new_offsets[live + 1] = c.new_offsets[live] + (c.offsets[i + 1] - c.offsets[i]);
    ++live;
  }
  std::fill(c.new_ids + live, c.new_ids + c.rows, -1);
  std::fill(c.source + live, c.source + c.rows, -1);
  std::fill(c.new_offsets + live + 1, c.new_offsets + c.rows + 1, c.new_offsets[live]);
}

// Minimum bytes to copy per thread.
constexpr int64_t kBytesPerThread = int64_t{1} << 19;

void copy(const Gather& g, const at::Tensor& hidden, const at::Tensor& offsets) {
  const int64_t old_rows = offsets.size(0) - 1;
  check_offsets(kGatherRows, "offsets", g.offsets, old_rows, hidden.size(0));
  check_offsets(kGatherRows, "new_offsets", g.new_offsets, g.rows, g.tokens);
  for (int64_t j = 0; j < g.rows; ++j) {
    const int32_t i = g.source[j];
    EE_CHECK(i < old_rows, kGatherRows, "expected source below the ", old_rows, " rows of offsets, got ", i,
             " at row ", j, "; pass what compact returned");
    if (i < 0) continue;
    const int32_t old_length = g.offsets[i + 1] - g.offsets[i];
    const int32_t new_length = g.new_offsets[j + 1] - g.new_offsets[j];
    EE_CHECK(old_length == new_length, kGatherRows, "expected new_offsets to keep the ", old_length, " tokens of row ",
             i, ", got ", new_length, " at row ", j, "; pass what compact returned");
  }
  if (g.token_bytes == 0) return;
  const char* from = static_cast<const char*>(g.hidden);
  char* to = static_cast<char*>(g.out);
  const int64_t grain = g.rows * kBytesPerThread / std::max<int64_t>(g.new_offsets[g.rows] * g.token_bytes, 1);
  at::parallel_for(0, g.rows, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t first = g.new_offsets[j], bytes = (g.new_offsets[j + 1] - first) * g.token_bytes;
      if (g.source[j] < 0 || bytes == 0) continue;
      std::memcpy(to + first * g.token_bytes, from + g.offsets[g.source[j]] * g.token_bytes, bytes);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) {
  library.impl("compact_cpp", &compact<plan>);
  library.impl("gather_rows_cpp", &gather_rows<copy>);
}

}  // namespace earlyexit
