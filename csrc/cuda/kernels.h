// Launchers of the CUDA kernels, without torch headers, so that the kernels compile in seconds; called by ops.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "../call.h"

namespace earlyexit {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// Number of int32 that an exit counts in: live rows, their tokens, rows with invalid logits.
constexpr int64_t kCounts = 3;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPackBytes = 16;
// Most values of a hidden state, so that distances between tokens fit into 32 bits.
constexpr int64_t kMaxWidth = 1 << 26;
constexpr int kThreads = 128;
constexpr int kMeanThreads = 512;
constexpr int kMeanBlocks = 2;  // per multiprocessor: 64 registers per thread, so that 8 blocks of kThreads fit too
// Shared memory of a block on every card without opt-in, less the static variables of the kernels.
constexpr int64_t kSharedBytes = 47 * 1024;
// Most packs that a lane of each warp has of a weight in shared memory, and of all warps together (16 KB).
constexpr int kMaxChunk = 8;
constexpr int kMaxStaged = 32;

// Divides numbers of less than 2^31 by a multiplication.
struct Divisor {
  uint32_t by = 1;
  uint32_t factor = 1u << 31;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : by(divisor) {
    while (shift < 62 && (uint64_t{1} << (shift - 31)) < by) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + by - 1) / by);
  }
  EE_HD uint32_t divide(uint32_t x) const { return static_cast<uint32_t>(static_cast<uint64_t>(x) * factor >> shift); }
};

// Layout of the work of a block on one row. It does not depend on the batch, so neither do the bits of a row.
struct Frame {
  int threads;
  int width;
  int classes;
  Divisor columns;  // adjacent threads along the width, with one pack of 16 bytes each
  int groups;       // groups of `columns` threads, which share the tokens of a mean; 0 if logits are given
  int chunk;        // packs of a class's weight that a lane has in shared memory at a time
  int staged;       // floats of shared memory for them, before the scratch memory
  int sums;         // floats of those, at the beginning of the scratch memory
  int64_t floats;   // scratch memory of a block: sums [groups, H], z [C], answer [C], in whole packs
  float* scratch;   // [B, floats] in global memory if it does not fit into shared memory, else null

  int64_t shared_bytes() const { return (staged + (scratch == nullptr ? floats : 0)) * sizeof(float); }
};

inline int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Rows of `hidden` and `weight` are made of whole packs: see ops.cpp.
inline Frame new_frame(const Call& call, Dtype dtype) {
  constexpr int64_t kPackFloats = kPackBytes / sizeof(float);
  const int64_t packs = std::max<int64_t>(1, call.width * (dtype == Dtype::kFloat32 ? 4 : 2) / kPackBytes);
  Frame frame{};
  frame.threads = call.pools_mean() ? kMeanThreads : kThreads;
  frame.width = static_cast<int>(call.width);
  frame.classes = static_cast<int>(call.classes);
  frame.columns = Divisor(static_cast<uint32_t>(std::min<int64_t>(packs, frame.threads)));
  if (call.weight != nullptr) {
    frame.groups = call.pools_mean() ? frame.threads / frame.columns.by : 1;
    const int64_t warps = std::min<int64_t>(call.classes, frame.threads / kWarp);
    frame.chunk = static_cast<int>(std::min({divide_up(packs, kWarp), kMaxStaged / warps, int64_t{kMaxChunk}}));
    frame.staged = static_cast<int>(warps * frame.chunk * kWarp * kPackFloats);
  }
  frame.sums = frame.groups * frame.width;
  frame.floats = divide_up(frame.sums + 2 * call.classes, kPackFloats) * kPackFloats;
  return frame;
}

// counts [kCounts], 0 before the launch.
void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int32_t* counts, cudaStream_t stream);

void launch_compact(const Compaction& compaction, cudaStream_t stream);

void launch_gather_rows(const Gather& gather, cudaStream_t stream);

}  // namespace earlyexit
