// Launchers of the CUDA kernels, without torch headers, so that the kernels compile in seconds; called by ops.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include "../call.h"

namespace earlyexit {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// Number of int32 that an exit writes its counts to, the last two of which are a ticket: see ticket.cuh.
constexpr int64_t kCounts = 6;
constexpr int64_t kTicket = 4;
constexpr int kPackBytes = 16;
constexpr int kThreads = 128;
constexpr int kMeanThreads = 512;
constexpr int kMeanBlocks = 2;  // per multiprocessor: 64 registers per thread, so that 8 blocks of kThreads fit too
// Shared memory of a block on every card without opt-in, less the static variables of the kernels.
constexpr int64_t kSharedFloats = 47 * 1024 / sizeof(float);

// Layout of the work of a block on one row. It does not depend on the batch, so neither do the bits of a row.
struct Frame {
  int threads;
  int columns;     // adjacent threads along the width, with one pack of 16 bytes each
  int groups;      // groups of `columns` threads, which share the tokens of a mean; 0 if logits are given
  int64_t padded;  // H, rounded up to whole packs
  int64_t floats;  // scratch memory of a block: sums [groups, padded], z [C], answer [C]
  bool input_aligned;
  bool weight_aligned;
  float* scratch;  // [B, floats] in global memory if it does not fit into shared memory, else null
};

inline bool in_packs(const void* memory, int64_t row_bytes) {
  return row_bytes > 0 && row_bytes % kPackBytes == 0 && reinterpret_cast<uintptr_t>(memory) % kPackBytes == 0;
}

inline Frame new_frame(const Call& call, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t pack = kPackBytes / bytes;
  const int64_t packs = call.width > pack ? (call.width + pack - 1) / pack : 1;
  Frame frame{};
  frame.threads = call.pools_mean() ? kMeanThreads : kThreads;
  frame.columns = static_cast<int>(packs < frame.threads ? packs : frame.threads);
  frame.groups = call.weight == nullptr ? 0 : call.pools_mean() ? frame.threads / frame.columns : 1;
  frame.padded = packs * pack;
  frame.floats = frame.groups * frame.padded + 2 * call.classes;
  frame.input_aligned = in_packs(call.input, call.width * bytes);
  frame.weight_aligned = in_packs(call.weight, call.width * bytes);
  return frame;
}

// counts [kCounts]: live rows, their tokens, rows with invalid logits.
void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int32_t* counts, cudaStream_t stream);

// Compaction after an exit of the device-resident loop, with capacity for R rows; arrays as in the schema.
struct Settle {
  int32_t* offsets;           // [R + 1], those of the call
  int32_t* old_offsets;       // [R + 1]
  int32_t* source;            // [R]
  int32_t* counts;            // [kCounts]: as above, and the tokens present after the compaction
  int32_t tile;               // tokens per tile; rows move if that saves a tile
  int32_t capacity;           // tokens of one side of the buffer
  bool sets_handle;           // whether to set the condition of a graph node to whether rows are left
  unsigned long long handle;  // that condition
};

void launch_resident_exit(const Call& call, const Frame& frame, Dtype dtype, const Settle& settle,
                          cudaStream_t stream);

void launch_compact(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                    int32_t* source, int64_t rows, cudaStream_t stream);

// Tokens of `token_bytes` each; `hidden` and `out` may be one buffer if no segment is both read and written.
struct Gather {
  const void* hidden;
  const int32_t* offsets;
  const int32_t* source;
  const int32_t* new_offsets;
  void* out;
  int64_t rows;
  int64_t tokens;  // maximum number of tokens to move
  int64_t token_bytes;
};

void launch_gather_rows(const Gather& gather, cudaStream_t stream);

}  // namespace earlyexit
