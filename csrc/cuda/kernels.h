// The CUDA kernels' launchers, without torch: the kernels compile alone, in seconds, and ops.cpp calls them.
#pragma once

#include <cuda_runtime_api.h>

#include "../call.h"

namespace earlyexit {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

constexpr int kTickets = 1 << 13;
constexpr int kPackBytes = 16;
constexpr int kThreads = 128;
constexpr int kMeanThreads = 512;
constexpr int kMeanBlocks = 2;  // a multiprocessor: 64 registers a thread, so that 8 blocks of kThreads fit as well
// What every card gives a block without being asked, less the kernels' own variables.
constexpr int64_t kSharedFloats = 47 * 1024 / sizeof(float);

// How a block works on one row. Nothing here depends on the batch, so neither do a row's bits.
struct Frame {
  int threads;
  int columns;     // threads beside each other along the width, a pack of 16 bytes each
  int groups;      // of that many threads, which share the tokens of a mean; 0 where logits are given
  int64_t padded;  // H up to whole packs
  int64_t floats;  // what a block keeps: sums [groups, padded], z [C], answer [C]
  bool input_aligned;
  bool weight_aligned;
  float* scratch;  // [B, floats] in global memory where they don't fit in shared memory, else null
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

// counts [3]: rows left in the batch, their tokens, rows without a meaningful answer.
void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int ticket, int32_t* counts,
                      cudaStream_t stream);

// What follows an exit in a loop that the host doesn't watch. R rows of capacity, arrays as in the schema.
struct Settle {
  int32_t* offsets;           // [R + 1], those of the call
  int32_t* old_offsets;       // [R + 1]
  int32_t* source;            // [R]
  int32_t* counts;            // [4]: as above, and the tokens present afterwards
  int32_t tile;               // rows move where that spares a tile of so many tokens
  int32_t capacity;           // tokens of a side
  unsigned long long handle;  // of a conditional graph node, set to whether a row is left; or 0
};

void launch_resident_exit(const Call& call, const Frame& frame, Dtype dtype, int ticket, const Settle& settle,
                          cudaStream_t stream);

// For the nodes of a conditional graph: `chosen` gets *turn, which is counted up, and `again` whether turns are left.
void launch_take_turn(int32_t* turn, unsigned long long chosen, unsigned long long again, int32_t turns,
                      cudaStream_t stream);

void launch_compact(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                    int32_t* source, int64_t rows, cudaStream_t stream);

// Tokens of `token_bytes` each; `hidden` and `out` may be one buffer where no segment read is written.
struct Gather {
  const void* hidden;
  const int32_t* offsets;
  const int32_t* source;
  const int32_t* new_offsets;
  void* out;
  int64_t rows;
  int64_t tokens;  // that move at most
  int64_t token_bytes;
};

void launch_gather_rows(const Gather& gather, cudaStream_t stream);

}  // namespace earlyexit
