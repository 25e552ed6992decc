// Prints the float32 operations and the bytes read from memory, per second, that THREADS threads of this processor reach:
// independent fused multiply-adds in registers of VECTOR_BYTES, and sums over a buffer much larger than the caches.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr long kLanes = VECTOR_BYTES / sizeof(float), kSums = 12, kSteps = 200'000'000;
constexpr long kBytes = 1L << 28;  // of each thread
constexpr long kHugePage = 2L << 20;
constexpr long kAhead = 4096;
constexpr int kRepeats = 9;

volatile float sink = 1.0f;

void multiply_add(const float*) {
  Vector sums[kSums], factor = Vector{} + 0.999f, term = Vector{} + 1.0f;
  for (long k = 0; k < kSums; ++k) sums[k] = Vector{} + static_cast<float>(k) * sink;  // unknown to the compiler
  for (long i = 0; i < kSteps / kSums; ++i) {
#pragma GCC unroll 12
    for (long k = 0; k < kSums; ++k) sums[k] = sums[k] * factor + term;
  }
  for (const Vector& sum : sums) sink = sum[0];
}

void read(const float* data) {
  Vector sums[8] = {};
  for (const char* at = reinterpret_cast<const char*>(data); at < reinterpret_cast<const char*>(data) + kBytes;) {
#pragma GCC unroll 8
    for (Vector& sum : sums) {
      __builtin_prefetch(at + kAhead);
      sum += *reinterpret_cast<const Vector*>(at);
      at += sizeof(Vector);
    }
  }
  for (const Vector& sum : sums) sink = sum[0];
}

// The shortest time, in seconds, in which all threads have run a function on a buffer each.
double seconds(int threads, void (*work)(const float*), const std::vector<float*>& data) {
  double best = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) running.emplace_back(work, data[t]);
    for (std::thread& each : running) each.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  std::vector<float*> data;
  for (int t = 0; t < threads; ++t) {
    data.push_back(static_cast<float*>(std::aligned_alloc(kHugePage, kBytes)));
#if defined(MADV_HUGEPAGE)
    madvise(data.back(), kBytes, MADV_HUGEPAGE);  // as packed weights have them
#endif
    std::fill_n(data.back(), kBytes / sizeof(float), 1.0f);
  }
  const double operations = 2.0 * kLanes * (kSteps / kSums) * kSums * threads;
  std::printf("%.4g %.4g\n", operations / seconds(threads, multiply_add, data),
              static_cast<double>(kBytes) * threads / seconds(threads, read, data));
}
