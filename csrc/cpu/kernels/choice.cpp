// Chooses the vector kernels of this processor, after a test of every kind of tile against plain sums.

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels.h"

namespace earlyexit::cpu {
namespace {

// A number that float32, float16 and bfloat16 represent, and times 32 a whole one from -127 to 127.
float value(int64_t i) { return static_cast<float>(i * 37 % 255 - 127) / 32; }

// Values as the weights of a tile have them.
std::vector<char> stored(WeightType type, const std::vector<float>& values) {
  const auto as = [&](auto convert) {
    std::vector<decltype(convert(0.0f))> found;
    for (const float x : values) found.push_back(convert(x));
    const char* begin = reinterpret_cast<const char*>(found.data());
    return std::vector<char>(begin, begin + found.size() * sizeof(found[0]));
  };
  switch (type) {
    case WeightType::kFloat32: return as([](float x) { return x; });
    case WeightType::kFloat16: return as([](float x) { return c10::Half(x).x; });
    case WeightType::kBFloat16: return as([](float x) { return c10::BFloat16(x).x; });
    case WeightType::kInt8: return as([](float x) { return static_cast<uint8_t>(static_cast<int>(x * 32) + 128); });
  }
  return {};
}

// The inputs of a tile, with the scales and sums of its rows.
struct Inputs {
  std::vector<char> data;
  int64_t stride;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

Inputs narrowed(const Kernels& kernels, WeightType type, const std::vector<float>& a, int64_t rows) {
  const NarrowFunction narrow = kernels.narrow[static_cast<int>(type)];
  const int64_t depth = static_cast<int64_t>(a.size()) / rows;
  if (narrow == nullptr) return {stored(WeightType::kFloat32, a), depth, {}, {}};
  const int64_t stride = depth + 64, itemsize = kernels.input_bytes[static_cast<int>(type)];
  Inputs found{std::vector<char>(rows * stride * itemsize), stride, std::vector<float>(rows), std::vector<int32_t>(rows)};
  for (int64_t r = 0; r < rows; ++r) {
    char* to = found.data.data() + r * stride * itemsize;
    narrow(a.data() + r * depth, depth, to, &found.scales[r], &found.sums[r]);
  }
  return found;
}

// Returns whether the tile of `rows` rows computes the sums, which are exact in float32.
bool is_right(const Kernels& kernels, WeightType type, int64_t rows) {
  constexpr int64_t kDepth = 2 * kDepthBlock + 40;
  const int64_t columns = kernels.columns, terms = kernels.terms[static_cast<int>(type)];
  const auto place = [&](int64_t k, int64_t c) { return (k / terms * columns + c) * terms + k % terms; };
  std::vector<float> a(rows * kDepth), bias(columns), weight(kDepth * columns), out(rows * columns);
  for (int64_t i = 0; i < static_cast<int64_t>(a.size()); ++i) a[i] = value(i);
  for (int64_t c = 0; c < columns; ++c) bias[c] = value(c + 5);
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t c = 0; c < columns; ++c) weight[place(k, c)] = value(k * columns + c + 11);
  }
  const std::vector<float> column_scales(columns, 1.0f / 32);
  const std::vector<char> weights = stored(type, weight);
  const Inputs inputs = narrowed(kernels, type, a, rows);
  kernels.tiles[static_cast<int>(type)][rows - 1](
      {inputs.data.data(), inputs.stride, weights.data(), columns * terms, bias.data(), kDepth, out.data(), columns,
       column_scales.data(), inputs.scales.data(), inputs.sums.data()});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      float sum = bias[c];
      for (int64_t k = 0; k < kDepth; ++k) sum += a[r * kDepth + k] * weight[place(k, c)];
      if (out[r * columns + c] != sum) return false;
    }
  }
  return true;
}

bool all_right(const Kernels& kernels) {
  for (int type = 0; type < kWeightTypes; ++type) {
    if (kernels.terms[type] == 0) continue;
    for (int64_t rows = 1; rows <= kernels.tile_rows; ++rows) {
      if (!is_right(kernels, static_cast<WeightType>(type), rows)) return false;
    }
  }
  return true;
}

const Kernels* choose() {
  const std::string capability = at::get_cpu_capability();
  for (const Kernels* kernels : {capability == "AVX512" ? avx512_kernels() : nullptr,
                                 capability == "AVX512" || capability == "AVX2" ? avx2_kernels() : nullptr}) {
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
