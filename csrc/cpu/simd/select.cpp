// Chooses the vector kernels of this processor, after a test of every kind of tile against plain sums.

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cmath>
#include <string>
#include <vector>

#include "table.h"

namespace earlyexit::cpu {
namespace {

// A number that float32, float16 and bfloat16 represent, and times 32 a whole one from -127 to 127.
float value(int64_t i) { return static_cast<float>(i * 37 % 255 - 127) / 32; }

// Values as the weights of a tile have them.
std::vector<char> stored(WeightType type, const std::vector<float>& values) {
  const auto as = [&](auto convert) {
    std::vector<decltype(convert(0.0f))> converted;
    for (const float x : values) converted.push_back(convert(x));
    const char* begin = reinterpret_cast<const char*>(converted.data());
    return std::vector<char>(begin, begin + converted.size() * sizeof(converted[0]));
  };
  switch (type) {
    case WeightType::kFloat32: return as([](float x) { return x; });
    case WeightType::kFloat16: return as([](float x) { return c10::Half(x).x; });
    case WeightType::kBFloat16: return as([](float x) { return c10::BFloat16(x).x; });
    case WeightType::kInt8: return as([](float x) { return static_cast<uint8_t>(static_cast<int>(x * 32) + 128); });
  }
  return {};
}

// Returns whether the tile of `rows` rows computes the sums, which are exact in float32.
bool is_right(const Kernels& kernels, WeightType type, int64_t rows) {
  constexpr int64_t kDepth = 2 * kDepthBlock + 40, kStride = kDepth + 64;
  const Format& format = kernels.format(type);
  const int64_t columns = kernels.columns, terms = format.terms;
  const auto place = [&](int64_t k, int64_t c) { return (k / terms * columns + c) * terms + k % terms; };
  std::vector<float> a(rows * kStride), bias(columns), weight(kDepth * columns), out(rows * columns);
  for (size_t i = 0; i < a.size(); ++i) a[i] = value(i);
  for (int64_t c = 0; c < columns; ++c) bias[c] = value(c + 5);
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t c = 0; c < columns; ++c) weight[place(k, c)] = value(k * columns + c + 11);
  }
  const std::vector<float> column_scales(columns, 1.0f / 32);
  const std::vector<char> weights = stored(type, weight);
  std::vector<char> narrowed(format.narrow == nullptr ? 0 : rows * kStride * format.input_bytes);
  std::vector<float> scales(rows);
  std::vector<int32_t> sums(rows);
  for (int64_t r = 0; r < rows && format.narrow != nullptr; ++r) {
    char* to = narrowed.data() + r * kStride * format.input_bytes;
    format.narrow(a.data() + r * kStride, kDepth, to, &scales[r], &sums[r]);
  }
  const void* inputs = format.narrow == nullptr ? static_cast<const void*>(a.data()) : narrowed.data();
  format.tiles[rows - 1]({inputs, kStride, weights.data(), columns * terms, bias.data(), kDepth, out.data(), columns,
                          column_scales.data(), scales.data(), sums.data()});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      float sum = bias[c];
      for (int64_t k = 0; k < kDepth; ++k) sum += a[r * kStride + k] * weight[place(k, c)];
      if (out[r * columns + c] != sum) return false;
    }
  }
  return true;
}

bool all_right(const Kernels& kernels) {
  for (int type = 0; type < kWeightTypes; ++type) {
    if (kernels.formats[type].terms == 0) continue;
    for (int64_t rows = 1; rows <= kernels.tile_rows; ++rows) {
      if (!is_right(kernels, static_cast<WeightType>(type), rows)) return false;
    }
  }
  return true;
}

// Returns the kernels of one of torch's capabilities, or null where the processor lacks an instruction of theirs.
const Kernels* kernels_of([[maybe_unused]] const std::string& capability) {
#if defined(EE_X86)
#define EE_HAS(feature) static_cast<bool>(__builtin_cpu_supports(feature))
  if (capability == "AVX512" && EE_HAS("avx512f") && EE_HAS("avx512bw") && EE_HAS("avx512dq") && EE_HAS("avx512vl")) {
    return avx512_kernels(EE_HAS("avx512bf16"), EE_HAS("avx512vnni"));
  }
  if (capability == "AVX2" && EE_HAS("avx2") && EE_HAS("fma") && EE_HAS("f16c")) return avx2_kernels();
#undef EE_HAS
#endif
  return nullptr;
}

const Kernels* choose() {
  const std::string capability = at::get_cpu_capability();
  for (const Kernels* kernels : {kernels_of(capability), capability == "AVX512" ? kernels_of("AVX2") : nullptr}) {
    if (kernels == nullptr) continue;
    if (all_right(*kernels)) return kernels;
    TORCH_WARN("earlyexit_kernels: the ", kernels->name, " kernels compute wrong sums on this processor and are not used");
  }
  return nullptr;
}

}  // namespace

const Kernels* native_kernels() {
  static const Kernels* const kernels = choose();
  return kernels;
}

}  // namespace earlyexit::cpu
