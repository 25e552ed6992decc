// Emulates CUDA kernels on the CPU: blocks run one after the other, threads are fibers, both in random order. Detects
// invalid indices, barriers that a thread misses and most missing barriers; does not detect effects of caches and of
// concurrent warps. Replaces the CUDA headers that csrc/cuda includes.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 0, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::min;
using cudaStream_t = void*;

namespace emulator {

// Of a thread; made when the thread waits for it.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

enum class Wait { kNothing, kWarp, kBlock, kDone };

// Started by a context; later switches are jumps, which require no system call.
struct Fiber {
  static constexpr size_t kStack = 1 << 16;
  Wait wait = Wait::kNothing;
  bool started = false;
  std::vector<Copy> copies;
  size_t committed = 0;
  jmp_buf place;
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline int running;
inline std::function<void()> kernel;
inline dim3 thread_index, block_index, block_size, grid_size;
inline unsigned long long shown[1024];  // values that threads exchange within their warps
inline std::minstd_rand shuffler;
constexpr size_t kSharedBytes = 48 << 10;
alignas(16) inline char shared_memory[kSharedBytes];

inline void wait_for(Wait wait) {
  Fiber& fiber = *fibers[running];
  fiber.wait = wait;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  for (;;) {
    kernel();
    wait_for(Wait::kDone);
  }
}

__attribute__((noinline)) inline void resume(int k) {
  running = k;
  thread_index.x = k;
  Fiber& fiber = *fibers[k];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::kStack;
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
}

inline bool all_wait(int begin, int end, Wait wait) {
  return std::all_of(fibers.begin() + begin, fibers.begin() + end, [&](const auto& f) { return f->wait == wait; });
}

inline void release(int begin, int end, Wait wait) {
  if (!all_wait(begin, end, wait)) return;
  for (int k = begin; k < end; ++k) fibers[k]->wait = Wait::kNothing;
}

inline void run_block(int threads) {
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  for (int k = 0; k < threads; ++k) fibers[k]->wait = Wait::kNothing;
  std::vector<int> warps(threads / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  std::shuffle(warps.begin(), warps.end(), shuffler);
  std::shuffle(lanes.begin(), lanes.end(), shuffler);
  // each warp runs up to the next barrier of the block before another one starts, so that a missing barrier shows
  while (!all_wait(0, threads, Wait::kDone)) {
    bool ran = false;
    for (int warp : warps) {
      for (bool moved = true; moved; ran |= moved) {
        moved = false;
        for (int lane : lanes) {
          if (fibers[warp * 32 + lane]->wait != Wait::kNothing) continue;
          resume(warp * 32 + lane);
          moved = true;
        }
        release(warp * 32, warp * 32 + 32, Wait::kWarp);
      }
    }
    if (!ran) {
      fibers.clear();
      throw std::runtime_error("emulator: some threads wait at a barrier that others do not reach");
    }
    release(0, threads, Wait::kBlock);
  }
  if (std::any_of(fibers.begin(), fibers.begin() + threads, [](const auto& f) { return !f->copies.empty(); })) {
    fibers.clear();
    throw std::runtime_error("emulator: a thread ends before its copies");
  }
}

inline void run(std::function<void()> body, dim3 grid, int threads, size_t shared_bytes, cudaStream_t) {
  if (grid.x == 0 || grid.y == 0 || threads % 32 || threads > 1024 || shared_bytes > kSharedBytes) {
    throw std::runtime_error("emulator: invalid launch configuration");
  }
  kernel = std::move(body);
  grid_size = grid;
  block_size = dim3(threads);
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), shuffler);
  for (unsigned block : blocks) {
    block_index = dim3(block % grid.x, block / grid.x);
    std::memset(shared_memory, 0xff, sizeof(shared_memory));
    run_block(threads);
  }
}

// Returns the value of thread `from`, after all threads of the warp have stored theirs.
template <class T>
T exchange(T mine, int from) {
  std::memcpy(&shown[running], &mine, sizeof(T));
  wait_for(Wait::kWarp);
  std::memcpy(&mine, &shown[from], sizeof(T));
  wait_for(Wait::kWarp);
  return mine;
}

}  // namespace emulator

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::wait_for(emulator::Wait::kBlock); }

template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int from = emulator::running - delta;
  return emulator::exchange(value, emulator::running % 32 < delta ? emulator::running : from);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, emulator::running ^ mask);
}

template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) std::abort();
  emulator::fibers[emulator::running]->copies.push_back({to, from, bytes});
}

inline void __pipeline_commit() {
  emulator::Fiber& fiber = *emulator::fibers[emulator::running];
  fiber.committed = fiber.copies.size();
}

inline void __pipeline_wait_prior(size_t) {
  emulator::Fiber& fiber = *emulator::fibers[emulator::running];
  for (size_t k = 0; k < fiber.committed; ++k) {
    const emulator::Copy& copy = fiber.copies[k];
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + fiber.committed);
  fiber.committed = 0;
}

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline c10::Half __ushort_as_half(unsigned short bits) { return c10::Half(bits, c10::Half::from_bits()); }
inline float __half2float(c10::Half x) { return x; }

#define C10_CUDA_CHECK(call) (call)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};
}  // namespace c10::cuda
