// One post-norm encoder layer on packed tokens, by the vector kernels of csrc/cpu/kernels. The reference implementation
// and the documentation of the arguments are in earlyexit_kernels/ops/packed_layer.py (packed_layer_torch).
//
// Rows are computed in blocks of whole rows, whose intermediate results fit into the cache. The work of each step is
// divided among the threads of torch; no sum depends on the division.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "../checks.h"
#include "activations.h"
#include "kernels/kernels.h"

namespace earlyexit::cpu {
namespace {

constexpr const char* kOp = "packed_layer_cpp";
// Tokens of a block: its results take 29 MB for a model of width 768.
constexpr int64_t kBlockTokens = 1024;
// Bytes of the inputs of the tiles that use a panel one after the other, which stay in the cache of a core.
constexpr int64_t kInputBytes = 320 * 1024;
// Multiply-adds, or values read, that are worth another thread.
constexpr int64_t kThreadWork = 1 << 16;
constexpr int64_t kLineBytes = 64;  // of the cache
// Values by which the rows of a buffer are apart beyond their length, so that they do not share sets of the cache.
constexpr int64_t kRowGap = 16;

// A buffer of this thread that keeps its memory.
template <class T>
T* scratch(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

struct Matrix {
  float* data;
  int64_t stride;
  float* row(int64_t i) const { return data + i * stride; }
};

struct Linear {
  const void* weight;   // [panels, depth / terms, columns, terms]
  const float* bias;    // [panels * columns]
  const float* scales;  // [panels * columns] of kInt8, else null
  WeightType type;
  int64_t itemsize, panels;
  int64_t inputs;  // values of a row
  int64_t depth;   // terms of a sum: the inputs, and zeros up to a multiple of `terms`
  int64_t terms;
};

class Layer {
 public:
  Layer(const Kernels& kernels, int64_t width, int64_t heads) : kernels_(kernels), width_(width), heads_(heads) {}

  // out = activation(x W + b) for `rows` rows
  void multiply(const Linear& linear, const Matrix& x, int64_t rows, const Matrix& out,
                Activation activation = Activation::kNone) const {
    const int64_t most = std::max(kInputBytes / (linear.depth * int64_t{sizeof(float)}), kernels_.tile_rows);
    const int64_t groups = (rows + most - 1) / most;
    const int64_t work = rows / groups * linear.depth * kernels_.columns;
    // A thread gets neighbouring panels, of which the first and the last may be for some of the groups only. It
    // computes them group by group, so that the inputs of a group stay in its cache.
    at::parallel_for(0, linear.panels * groups, 1 + kThreadWork / (work + 1), [&](int64_t begin, int64_t end) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first_panel = (begin - g + groups - 1) / groups, last_panel = (end - g + groups - 1) / groups;
        if (first_panel >= last_panel) continue;
        const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
        const Inputs inputs = inputs_of(linear, {x.row(first), x.stride}, count);
        for (int64_t p = first_panel; p < last_panel; ++p) {
          const Matrix panel_out{out.row(first) + p * kernels_.columns, out.stride};
          multiply_panel(linear, p, p + 1 < last_panel, inputs, count, panel_out, activation);
        }
      }
    });
  }

  // Attention within each row of a block, [T, 3 H] -> [T, H]. `starts` are the row's first tokens within the block.
  void attend(const Matrix& qkv, const std::vector<int64_t>& starts, const Matrix& out) const {
    const int64_t rows = static_cast<int64_t>(starts.size()) - 1;
    std::vector<int64_t> before(rows + 1, 0);  // the work of a head in all rows before
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t length = starts[i + 1] - starts[i];
      before[i + 1] = before[i] + length * (length + kernels_.columns);
    }
    const int64_t per_head = before[rows], size = width_ / heads_;
    // a thread computes the rows of the heads whose work begins within its share
    at::parallel_for(0, per_head * heads_, 1 + kThreadWork / size, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin / per_head; head * per_head < end; ++head) {
        const int64_t from = begin - head * per_head, to = end - head * per_head;
        int64_t i = std::lower_bound(before.begin(), before.end(), from) - before.begin();
        for (; i < rows && before[i] < to; ++i) {
          const Matrix row{qkv.row(starts[i]) + head * size, qkv.stride};
          attend_row(row, starts[i + 1] - starts[i], {out.row(starts[i]) + head * size, out.stride});
        }
      }
    });
  }

  // x += residual; out = norm(x), row by row
  void add_norm(const Matrix& x, const float* residual, int64_t residual_stride, const float* weight,
                const float* bias, float eps, int64_t rows, const Matrix& out) const {
    at::parallel_for(0, rows, 1 + kThreadWork / (4 * width_), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        kernels_.add_norm(x.row(r), residual + r * residual_stride, weight, bias, eps, width_, out.row(r));
      }
    });
  }

 private:
  // The inputs of a product: float32, or narrowed as the kernels of the weight's type require.
  struct Inputs {
    const char* data;
    int64_t stride, itemsize;
    const float* scales = nullptr;
    const int32_t* sums = nullptr;
  };

  Inputs inputs_of(const Linear& linear, const Matrix& x, int64_t rows) const {
    const NarrowFunction narrow = kernels_.narrow[static_cast<int>(linear.type)];
    const int64_t itemsize = kernels_.input_bytes[static_cast<int>(linear.type)];
    if (narrow == nullptr) return {reinterpret_cast<const char*>(x.data), x.stride, itemsize};
    static thread_local std::vector<char> buffer;
    static thread_local std::vector<float> scale_buffer;
    static thread_local std::vector<int32_t> sum_buffer;
    const int64_t stride = linear.depth + kLineBytes / itemsize, gap = linear.depth - linear.inputs;
    char* values = scratch(buffer, rows * stride * itemsize);
    float* scales = scratch(scale_buffer, rows);
    int32_t* sums = scratch(sum_buffer, rows);
    for (int64_t r = 0; r < rows; ++r) {
      char* to = values + r * stride * itemsize;
      narrow(x.row(r), linear.inputs, to, scales + r, sums + r);
      std::fill_n(to + linear.inputs * itemsize, gap * itemsize, char{0});
    }
    return {values, stride, itemsize, scales, sums};
  }

  // The first tiles prefetch the next panel, if the thread has one; a single tile reads it as fast as memory gives it.
  void multiply_panel(const Linear& linear, int64_t panel, bool has_next, const Inputs& inputs, int64_t rows,
                      const Matrix& out, Activation activation) const {
    const int64_t columns = kernels_.columns;
    const int64_t step_bytes = columns * linear.terms * linear.itemsize;
    const int64_t panel_bytes = linear.depth * columns * linear.itemsize;
    const char* weight = static_cast<const char*>(linear.weight) + panel * panel_bytes;
    const char* next = has_next && rows > kernels_.tile_rows ? weight + panel_bytes : nullptr;
    const char* next_end = next + (next == nullptr ? 0 : step_bytes);
    const float* bias = linear.bias + panel * columns;
    each_tile(rows, [&](int64_t r, int64_t height) {
      const void* from = inputs.data + r * inputs.stride * inputs.itemsize;
      Tile tile{from, inputs.stride, weight, columns * linear.terms, bias, linear.depth, out.row(r), out.stride};
      if (next < next_end) {
        tile.next = next;
        next += kLineBytes;
      }
      if (linear.scales != nullptr) {
        tile.column_scales = linear.scales + panel * columns;
        tile.row_scales = inputs.scales + r;
        tile.row_sums = inputs.sums + r;
      }
      kernels_.tiles[static_cast<int>(linear.type)][height - 1](tile);
      kernels_.activate(activation, out.row(r), out.stride, height, columns);
    });
  }

  // Calls f(first row, rows) for tiles of nearly equal height.
  template <class F>
  void each_tile(int64_t rows, F f) const {
    const int64_t tiles = (rows + kernels_.tile_rows - 1) / kernels_.tile_rows;
    for (int64_t t = 0, r = 0; t < tiles; ++t) {
      const int64_t height = rows / tiles + (t < rows % tiles);
      f(r, height);
      r += height;
    }
  }

  // softmax(q k / sqrt(D)) v of one head and row
  void attend_row(const Matrix& query, int64_t length, const Matrix& out) const {
    const int64_t size = width_ / heads_, columns = kernels_.columns;
    const int64_t panels = (length + columns - 1) / columns, value_panels = (size + columns - 1) / columns;
    const int64_t score_stride = panels * columns + kRowGap, sum_stride = value_panels * columns;
    static thread_local std::vector<float> key_buffer, score_buffer, sum_buffer;
    float* keys = scratch(key_buffer, panels * size * columns);
    float* scores = scratch(score_buffer, kernels_.tile_rows * score_stride);
    float* sums = scratch(sum_buffer, kernels_.tile_rows * sum_stride);
    transpose(query.data + width_, query.stride, length, keys);
    const float* values = query.data + 2 * width_;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    const TileFunction* tiles = kernels_.tiles[static_cast<int>(WeightType::kFloat32)];
    each_tile(length, [&](int64_t r, int64_t height) {
      for (int64_t p = 0; p < panels; ++p) {
        tiles[height - 1]({query.row(r), query.stride, keys + p * size * columns, columns, nullptr, size,
                           scores + p * columns, score_stride});
      }
      float factors[kMaxTileRows];
      for (int64_t i = 0; i < height; ++i) factors[i] = kernels_.softmax(scores + i * score_stride, length, scale);
      for (int64_t p = 0; p < value_panels; ++p) {
        tiles[height - 1]({scores, score_stride, values + p * columns, query.stride, nullptr, length,
                           sums + p * columns, sum_stride});
      }
      for (int64_t i = 0; i < height; ++i) kernels_.scale(sums + i * sum_stride, factors[i], size, out.row(r + i));
    });
  }

  // Keys [length, D] as panels [length / columns, D, columns], filled with zeros.
  void transpose(const float* keys, int64_t stride, int64_t length, float* panels) const {
    const int64_t size = width_ / heads_, columns = kernels_.columns;
    for (int64_t start = 0; start < length; start += columns, panels += size * columns) {
      const int64_t count = std::min(length - start, columns);
      for (int64_t d = 0; d < size; ++d) {
        float* to = panels + d * columns;
        for (int64_t j = 0; j < count; ++j) to[j] = keys[(start + j) * stride + d];
        std::fill(to + count, to + columns, 0.0f);
      }
    }
  }

  const Kernels& kernels_;
  int64_t width_, heads_;
};

// The dtypes of packed weights, in the order of WeightType.
constexpr at::ScalarType kStored[] = {at::kFloat, at::kHalf, at::kBFloat16, at::kByte};

Linear find_linear(const Kernels& kernels, const char* name, const at::Tensor& weight, const at::Tensor& bias,
                   int64_t outputs, int64_t depth) {
  const at::ScalarType dtype = weight.scalar_type();
  const at::ScalarType* found = std::find(std::begin(kStored), std::end(kStored), dtype);
  EE_CHECK(found != std::end(kStored), kOp, "expected ", name, " to be float32, float16, bfloat16 or uint8, got ",
           dtype_name(dtype), "; pack it with ops.pack_weights");
  const WeightType type = static_cast<WeightType>(found - std::begin(kStored));
  const int64_t terms = kernels.terms[static_cast<int>(type)], columns = kernels.columns;
  EE_CHECK(terms > 0, kOp, "expected AVX512-VNNI for weights in int8 on a processor with AVX-512; store them in another ",
           "type, or set ATEN_CPU_CAPABILITY=avx2");
  const int64_t panels = (outputs + columns - 1) / columns, steps = (depth + terms - 1) / terms;
  check_tensor(kOp, name, weight, dtype, {panels, steps, columns, terms});
  const bool scaled = type == WeightType::kInt8;
  EE_CHECK(!scaled || depth <= kMostByteTerms, kOp, "expected at most ", kMostByteTerms, " inputs of ", name,
           " for weights in int8, got ", depth, "; store them in another type");
  check_tensor(kOp, name, bias, at::kFloat, {scaled ? 2 : 1, panels * columns});
  const float* vectors = bias.const_data_ptr<float>();
  const float* scales = scaled ? vectors + panels * columns : nullptr;
  const int64_t itemsize = static_cast<int64_t>(weight.itemsize());
  return {weight.const_data_ptr(), vectors, scales, type, itemsize, panels, depth, steps * terms, terms};
}

at::Tensor packed_layer(const at::Tensor& x, const at::Tensor& offsets, at::TensorList weights, at::TensorList biases,
                        at::TensorList norms, at::ArrayRef<double> eps, int64_t heads, std::string_view activation) {
  const Kernels* kernels = native_kernels();
  EE_CHECK(kernels != nullptr, kOp, "expected a processor with AVX2 or AVX-512, which this one has not; use ",
           "backend='torch', or encoder_layer");
  check_tensor(kOp, "x", x, at::kFloat, {kAnySize, kAnySize});
  check_tensor(kOp, "offsets", offsets, at::kInt, {kAnySize});
  EE_CHECK(weights.size() == 4 && biases.size() == 4 && norms.size() == 4 && eps.size() == 2, kOp,
           "expected 4 weights, 4 biases, 4 tensors of norms and 2 eps, got ", weights.size(), ", ", biases.size(), ", ",
           norms.size(), " and ", eps.size());
  const int64_t tokens = x.size(0), width = x.size(1), rows = offsets.size(0) - 1;
  EE_CHECK(width > 0 && heads > 0 && width % heads == 0, kOp, "expected heads to divide ", width, ", got ", heads);
  EE_CHECK(rows >= 0, kOp, "expected offsets [B + 1], got an empty tensor; pass cumulative lengths");
  const int32_t* ends = offsets.const_data_ptr<int32_t>();
  check_offsets(kOp, "offsets", ends, rows, tokens);
  EE_CHECK(ends[0] == 0 && ends[rows] == tokens, kOp, "expected offsets from 0 to ", tokens, ", got ", ends[0], " to ",
           ends[rows], "; every token must belong to a row");
  for (const at::Tensor& norm : norms) check_tensor(kOp, "norms", norm, at::kFloat, {width});
  EE_CHECK(weights[2].dim() == 4, kOp, "expected packed weights, got ", weights[2].dim(), " dimensions");
  const int64_t inner = weights[3].dim() == 4 ? weights[3].size(1) * weights[3].size(3) : 0;
  const Linear qkv = find_linear(*kernels, "qkv", weights[0], biases[0], 3 * width, width);
  const Linear attention_out = find_linear(*kernels, "out", weights[1], biases[1], width, width);
  const Linear in = find_linear(*kernels, "inner", weights[2], biases[2], inner, width);
  const Linear outer = find_linear(*kernels, "outer", weights[3], biases[3], width, inner);
  const Activation function = find_activation(kOp, activation);
  const auto norm = [&](size_t i) { return norms[i].const_data_ptr<float>(); };

  at::Tensor out = at::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const Layer layer(*kernels, width, heads);
  std::vector<int64_t> starts;
  for (int64_t row = 0; row < rows;) {
    const int64_t begin = ends[row];
    starts.assign(1, 0);
    do {
      starts.push_back(ends[++row] - begin);
    } while (row < rows && ends[row + 1] - begin <= kBlockTokens);
    const int64_t count = starts.back(), columns = kernels->columns;
    if (count == 0) continue;
    const auto stride = [&](const Linear& linear) { return linear.panels * columns + kRowGap; };
    static thread_local std::vector<float> buffer;
    const int64_t narrow_stride = stride(attention_out), wide_stride = stride(in);
    // the tiles of attention read whole panels, beyond the last value
    float* memory = scratch(buffer, count * (stride(qkv) + 2 * narrow_stride + wide_stride) + columns);
    const Matrix middle{memory, narrow_stride}, context{memory + count * narrow_stride, narrow_stride};
    const Matrix wide{context.data + count * narrow_stride, wide_stride};
    const Matrix projected{wide.data + count * wide_stride, stride(qkv)};
    const Matrix input{const_cast<float*>(from + begin * width), width}, output{to + begin * width, width};
    layer.multiply(qkv, input, count, projected);
    layer.attend(projected, starts, context);
    layer.multiply(attention_out, context, count, middle);
    layer.add_norm(middle, input.data, width, norm(0), norm(1), static_cast<float>(eps[0]), count, context);
    layer.multiply(in, context, count, wide, function);
    layer.multiply(outer, wide, count, middle);
    layer.add_norm(middle, context.data, narrow_stride, norm(2), norm(3), static_cast<float>(eps[1]), count, output);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(earlyexit_kernels, CPU, library) { library.impl("packed_layer_cpp", &packed_layer); }

}  // namespace earlyexit::cpu
