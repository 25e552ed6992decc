// One post-norm encoder layer on packed tokens, by the vector kernels of csrc/cpu/simd:
//
//     y = norm(x + out(attend(query x, key x, value x)));  norm(y + outer(activation(inner y)))
//
// Rows are computed in blocks of whole rows, whose intermediate results fit into the cache. The work of each step is
// divided among the threads of torch; no sum depends on the division.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../bindings.h"
#include "names.h"

namespace earlyexit::cpu {
namespace {

constexpr const char* kOp = "PackedLayer";
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
  const Format* format;
  int64_t itemsize, panels;
  int64_t inputs;  // values of a row
  int64_t depth;   // terms of a sum: the inputs, and zeros up to a multiple of the format's `terms`
};

class Steps {
 public:
  Steps(const Kernels& kernels, int64_t width, int64_t heads) : kernels_(kernels), width_(width), heads_(heads) {}

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
    const int64_t itemsize = linear.format->input_bytes;
    if (linear.format->narrow == nullptr) return {reinterpret_cast<const char*>(x.data), x.stride, itemsize};
    static thread_local std::vector<char> buffer;
    static thread_local std::vector<float> scale_buffer;
    static thread_local std::vector<int32_t> sum_buffer;
    const int64_t stride = linear.depth + kLineBytes / itemsize, gap = linear.depth - linear.inputs;
    char* values = scratch(buffer, rows * stride * itemsize);
    float* scales = scratch(scale_buffer, rows);
    int32_t* sums = scratch(sum_buffer, rows);
    for (int64_t r = 0; r < rows; ++r) {
      char* to = values + r * stride * itemsize;
      linear.format->narrow(x.row(r), linear.inputs, to, scales + r, sums + r);
      std::fill_n(to + linear.inputs * itemsize, gap * itemsize, char{0});
    }
    return {values, stride, itemsize, scales, sums};
  }

  // The first tiles prefetch the next panel, if the thread has one; a single tile reads it as fast as memory gives it.
  void multiply_panel(const Linear& linear, int64_t panel, bool has_next, const Inputs& inputs, int64_t rows,
                      const Matrix& out, Activation activation) const {
    const int64_t columns = kernels_.columns;
    const int64_t step_bytes = columns * linear.format->terms * linear.itemsize;
    const int64_t panel_bytes = linear.depth * columns * linear.itemsize;
    const char* weight = static_cast<const char*>(linear.weight) + panel * panel_bytes;
    const char* next = has_next && rows > kernels_.tile_rows ? weight + panel_bytes : nullptr;
    const char* next_end = next + (next == nullptr ? 0 : step_bytes);
    const float* bias = linear.bias + panel * columns;
    each_tile(rows, [&](int64_t r, int64_t height) {
      const void* from = inputs.data + r * inputs.stride * inputs.itemsize;
      Tile tile{from, inputs.stride, weight, columns * linear.format->terms, bias, linear.depth, out.row(r), out.stride};
      if (next < next_end) {
        tile.next = next;
        next += kLineBytes;
      }
      if (linear.scales != nullptr) {
        tile.column_scales = linear.scales + panel * columns;
        tile.row_scales = inputs.scales + r;
        tile.row_sums = inputs.sums + r;
      }
      linear.format->tiles[height - 1](tile);
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
    const TileFunction* tiles = kernels_.format(WeightType::kFloat32).tiles;
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

Linear find_linear(const Kernels& kernels, const char* name, const at::Tensor& weight, const at::Tensor& bias,
                   int64_t outputs, int64_t inputs) {
  const at::ScalarType dtype = weight.scalar_type();
  const std::optional<WeightType> type = find_type(dtype);
  EE_CHECK(type, kOp, "expected ", name, " to be float32, float16, bfloat16 or uint8, got ", dtype_name(dtype),
           "; pack it with pack_weights");
  const Format& format = kernels.format(*type);
  EE_CHECK(format.terms > 0, kOp, "expected AVX512-VNNI for weights in int8 on a processor with AVX-512; store them in ",
           "another type, or set ATEN_CPU_CAPABILITY=avx2");
  const int64_t columns = kernels.columns, panels = (outputs + columns - 1) / columns;
  const int64_t steps = (inputs + format.terms - 1) / format.terms;
  check_tensor(kOp, name, weight, dtype, {panels, steps, columns, format.terms});
  const bool scaled = type == WeightType::kInt8;
  EE_CHECK(!scaled || inputs <= kMostByteTerms, kOp, "expected at most ", kMostByteTerms, " inputs of ", name,
           " for weights in int8, got ", inputs, "; store them in another type");
  check_tensor(kOp, name, bias, at::kFloat, {scaled ? 2 : 1, panels * columns});
  const float* vectors = bias.const_data_ptr<float>();
  const int64_t itemsize = static_cast<int64_t>(weight.itemsize());
  return {weight.const_data_ptr(), vectors, scaled ? vectors + panels * columns : nullptr, &format, itemsize, panels,
          inputs, steps * format.terms};
}

// A layer with its packed weights. Calls do not change it, so threads may share it.
class PackedLayer {
 public:
  // weights and biases: of qkv, out, inner and outer, as earlyexit_kernels/cpu/panels.py packs them. norms: weight and
  // bias of the first and the second norm, which are read at each call.
  PackedLayer(std::vector<at::Tensor> weights, std::vector<at::Tensor> biases, std::vector<at::Tensor> norms,
              const std::vector<double>& eps, int64_t heads, const std::string& activation)
      : kernels_(native_kernels()), weights_(std::move(weights)), biases_(std::move(biases)), norms_(std::move(norms)) {
    EE_CHECK(kernels_ != nullptr, kOp, "expected a processor with AVX2 or AVX-512, which this one has not");
    EE_CHECK(weights_.size() == 4 && biases_.size() == 4 && norms_.size() == 4 && eps.size() == 2, kOp,
             "expected 4 weights, 4 biases, 4 tensors of norms and 2 eps, got ", weights_.size(), ", ", biases_.size(),
             ", ", norms_.size(), " and ", eps.size());
    width_ = norms_[0].numel();
    heads_ = heads;
    EE_CHECK(width_ > 0 && heads > 0 && width_ % heads == 0, kOp, "expected heads to divide ", width_, ", got ", heads);
    for (const at::Tensor& norm : norms_) check_tensor(kOp, "norms", norm, at::kFloat, {width_});
    const int64_t inner = weights_[3].dim() == 4 ? weights_[3].size(1) * weights_[3].size(3) : 0;
    qkv_ = find_linear(*kernels_, "qkv", weights_[0], biases_[0], 3 * width_, width_);
    out_ = find_linear(*kernels_, "out", weights_[1], biases_[1], width_, width_);
    inner_ = find_linear(*kernels_, "inner", weights_[2], biases_[2], inner, width_);
    outer_ = find_linear(*kernels_, "outer", weights_[3], biases_[3], width_, inner);
    activation_ = find_activation(kOp, activation);
    first_eps_ = static_cast<float>(eps[0]);
    second_eps_ = static_cast<float>(eps[1]);
  }

  // x: tokens [..., H]; those of row i begin at offsets[i].
  at::Tensor operator()(const at::Tensor& x, const at::Tensor& offsets) const {
    EE_CHECK(x.scalar_type() == at::kFloat && x.dim() > 0 && x.size(-1) == width_, kOp, "expected x to be float32 [*, ",
             width_, "], got ", dtype_name(x.scalar_type()), " ", x.sizes());
    check_tensor(kOp, "offsets", offsets, at::kInt, {kAnySize});
    const int64_t tokens = x.numel() / width_, rows = offsets.size(0) - 1;
    EE_CHECK(rows >= 0, kOp, "expected offsets [B + 1], got an empty tensor; pass cumulative lengths");
    const int32_t* ends = offsets.const_data_ptr<int32_t>();
    check_offsets(kOp, "offsets", ends, rows, tokens);
    EE_CHECK(ends[0] == 0 && ends[rows] == tokens, kOp, "expected offsets from 0 to ", tokens, ", got ", ends[0],
             " to ", ends[rows], "; every token must belong to a row");
    const at::Tensor input = x.contiguous();
    at::Tensor out = at::empty_like(input);
    const float* from = input.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    std::vector<int64_t> starts;
    for (int64_t row = 0; row < rows;) {
      const int64_t begin = ends[row];
      starts.assign(1, 0);
      do {
        starts.push_back(ends[++row] - begin);
      } while (row < rows && ends[row + 1] - begin <= kBlockTokens);
      if (starts.back() > 0) run_block(starts, from + begin * width_, to + begin * width_);
    }
    return out;
  }

 private:
  void run_block(const std::vector<int64_t>& starts, const float* from, float* to) const {
    const int64_t count = starts.back(), columns = kernels_->columns;
    const auto stride = [&](const Linear& linear) { return linear.panels * columns + kRowGap; };
    const auto norm = [&](size_t i) { return norms_[i].const_data_ptr<float>(); };
    static thread_local std::vector<float> buffer;
    const int64_t narrow_stride = stride(out_), wide_stride = stride(inner_);
    // the tiles of attention read whole panels, beyond the last value
    float* memory = scratch(buffer, count * (stride(qkv_) + 2 * narrow_stride + wide_stride) + columns);
    const Matrix middle{memory, narrow_stride}, context{memory + count * narrow_stride, narrow_stride};
    const Matrix wide{context.data + count * narrow_stride, wide_stride};
    const Matrix projected{wide.data + count * wide_stride, stride(qkv_)};
    const Matrix input{const_cast<float*>(from), width_}, output{to, width_};
    const Steps steps(*kernels_, width_, heads_);
    steps.multiply(qkv_, input, count, projected);
    steps.attend(projected, starts, context);
    steps.multiply(out_, context, count, middle);
    steps.add_norm(middle, input.data, width_, norm(0), norm(1), first_eps_, count, context);
    steps.multiply(inner_, context, count, wide, activation_);
    steps.multiply(outer_, wide, count, middle);
    steps.add_norm(middle, context.data, narrow_stride, norm(2), norm(3), second_eps_, count, output);
  }

  const Kernels* kernels_;
  std::vector<at::Tensor> weights_, biases_, norms_;
  int64_t width_, heads_;
  Linear qkv_, out_, inner_, outer_;
  Activation activation_;
  float first_eps_, second_eps_;
};

}  // namespace

void bind_packed_layer(pybind11::module_& module) {
  using Tensors = std::vector<at::Tensor>;
  bind_class<PackedLayer, Tensors, Tensors, Tensors, std::vector<double>, int64_t, std::string>(module, kOp);
}

}  // namespace earlyexit::cpu
