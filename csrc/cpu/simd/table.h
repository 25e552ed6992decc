// The vector kernels of an encoder layer on the CPU, as a table of functions for each instruction set.
// All add in an order that depends on the sizes of one row alone, so that a row has the same bits in every batch.
#pragma once

#include <cstdint>

namespace earlyexit::cpu {

enum class Activation { kNone, kGelu, kGeluTanh, kRelu, kTanh };

// How the values of a packed weight are stored. Values of kInt8 are bytes x + 128 with a scale for each column.
enum class WeightType { kFloat32, kFloat16, kBFloat16, kInt8 };
constexpr int kWeightTypes = 4;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Terms of a sum that are added before they are added to the sum of the terms before them.
constexpr int64_t kDepthBlock = 384;
constexpr int kMaxTileRows = 14;
// Terms of a sum of products of bytes that cannot overflow: 2^17 * 127 * 127 < 2^31
constexpr int64_t kMostByteTerms = 1 << 17;

// out[r][c] = bias[c] + sum over k of a[r][k] * weight[k][c], for the rows of a tile and all columns of a panel.
struct Tile {
  const void* a;  // float32, or narrowed if the kernels narrow the inputs of this type of weight
  int64_t a_stride;
  const void* weight;
  int64_t weight_stride;  // from one step of the sum to the next
  const float* bias;      // null: none
  int64_t depth;          // terms of the sum
  float* out;
  int64_t out_stride;
  const float* column_scales = nullptr;  // of kInt8, as the next ones
  const float* row_scales = nullptr;
  const int32_t* row_sums = nullptr;
  const char* next = nullptr;  // a line of the cache in the first step of the panel that is read next, or null
};

using TileFunction = void (*)(const Tile&);

// out[r][n] = bias[n] + x[r] . weight[n] for some rows and outputs of a weight as torch has it.
struct Dots {
  const float* const* x;
  int64_t rows;
  const void* weight;  // [outputs, depth], of the type of the function
  const float* bias;
  int64_t outputs, depth;
  float* out;
  int64_t out_stride;
};

using DotsFunction = void (*)(const Dots&);

// Narrows a row of inputs; `out` has room for whole vectors. Inputs of kInt8 are whole numbers between -127 and 127, with
// their scale, which is NaN for a row that is not finite, and their sum; the others need neither.
using NarrowFunction = void (*)(const float* x, int64_t count, void* out, float* scale, int32_t* sum);

// The kernels of one type of weights.
struct Format {
  int64_t terms;  // of a sum that lie side by side in a panel: as many as are multiplied at once. 0: none runs
  int64_t input_bytes;               // of one input of a tile
  NarrowFunction narrow;             // null where the inputs are float32
  TileFunction tiles[kMaxTileRows];  // by the number of rows - 1
  DotsFunction dots;                 // null for kInt8
};

struct Kernels {
  const char* name;
  int64_t tile_rows;  // of the largest tile
  int64_t columns;    // of a panel
  Format formats[kWeightTypes];
  const Format& format(WeightType type) const { return formats[static_cast<int>(type)]; }

  // f(x) in place for some rows of a panel
  void (*activate)(Activation activation, float* x, int64_t stride, int64_t rows, int64_t count);
  // x = x + residual; out = (x - mean) / sqrt(variance + eps) * weight + bias
  void (*add_norm)(float* x, const float* residual, const float* weight, const float* bias, float eps, int64_t width,
                   float* out);
  // x = exp(scale * (x - max x)) for `count` scores; x has room for whole panels. Returns 1 / sum.
  float (*softmax)(float* x, int64_t count, float scale);
  // out = factor * x
  void (*scale)(const float* x, float factor, int64_t count, float* out);
};

#if defined(__x86_64__) && defined(__GNUC__)
#define EE_X86
// The kernels of an instruction set, to be called where the processor has it; optional instructions are arguments.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels(bool has_bfloat16, bool has_vnni);
#endif

// Returns the kernels of this processor, or null. ATEN_CPU_CAPABILITY limits them as it limits those of torch.
const Kernels* native_kernels();

}  // namespace earlyexit::cpu
