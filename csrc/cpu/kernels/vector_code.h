// The kernels of kernels.h as templates on a type of vectors. Included by each instruction set's file, within its target
// region and anonymous namespace; functions of the standard library would be compiled for that target too, for all files.

// c[0] x^(N - 1) + ... + c[N - 1]
template <class V, int N>
inline typename V::R polynomial(typename V::R x, const float (&factors)[N]) {
  typename V::R y = V::set(factors[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) y = V::fma(y, x, V::set(factors[i]));
  return y;
}

constexpr float kExpFactors[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

// exp(x) within 2 units in the last place; NaN stays NaN, and results beyond the range of normal numbers are clamped to it.
template <class V>
inline typename V::R exp_of(typename V::R x) {
  x = V::max(V::set(-87.33f), V::min(V::set(88.0f), x));  // the second operand is returned where one is NaN
  const typename V::R n = V::round(V::mul(x, V::set(1.44269504f)));
  const typename V::R r = V::fma(n, V::set(2.12194440e-4f), V::fma(n, V::set(-0.693359375f), x));
  return V::mul(polynomial<V>(r, kExpFactors), V::power_of_two(n));
}

// The tail of the normal distribution is exp(-x^2 / 2) t polynomial(t) with t = 1 / (1 + 0.3 x), fitted to within 2.5e-9.
constexpr float kTailFactors[] = {0.03049602610279916f, -0.1311086489342773f,  0.15152298095207134f,
                                  0.008367239001777707f, 0.08792573291406648f, 0.11519578835169732f,
                                  0.11773535487343327f,  0.11986552917683028f};

// x times the normal distribution function
template <class V>
inline typename V::R gelu(typename V::R x) {
  const typename V::R one = V::set(1.0f);
  const typename V::R t = V::div(one, V::fma(V::set(0.3f), V::abs(x), one));
  const typename V::R square = exp_of<V>(V::mul(V::mul(x, x), V::set(-0.5f)));
  const typename V::R tail = V::mul(V::mul(polynomial<V>(t, kTailFactors), t), square);
  return V::mul(x, V::where_negative(x, tail, V::sub(one, tail)));
}

// x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
inline typename V::R gelu_tanh(typename V::R x) {
  const typename V::R u = V::mul(x, V::fma(V::mul(x, x), V::set(-2 * 0.0356774081f), V::set(-2 * 0.7978845608f)));
  return V::div(x, V::add(V::set(1.0f), exp_of<V>(u)));
}

// 1 - 2 / (exp(2 x) + 1), and the series near 0, where that form cancels
constexpr float kTanhFactors[] = {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f};

template <class V>
inline typename V::R tanh_of(typename V::R x) {
  const typename V::R one = V::set(1.0f), square = V::mul(x, x);
  const typename V::R series = V::mul(x, polynomial<V>(square, kTanhFactors));
  const typename V::R far = V::sub(one, V::div(V::set(2.0f), V::add(exp_of<V>(V::add(x, x)), one)));
  return V::where_negative(V::sub(square, V::set(0.0625f)), series, far);
}

template <class V, typename V::R (*F)(typename V::R)>
void apply(float* x, int64_t stride, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < count; i += V::width) V::store(x + r * stride + i, F(V::load(x + r * stride + i)));
  }
}

template <class V>
inline typename V::R relu(typename V::R x) {
  return V::max(V::set(0.0f), x);
}

template <class V>
void activate(Activation activation, float* x, int64_t stride, int64_t rows, int64_t count) {
  switch (activation) {
    case Activation::kGelu: return apply<V, gelu<V>>(x, stride, rows, count);
    case Activation::kGeluTanh: return apply<V, gelu_tanh<V>>(x, stride, rows, count);
    case Activation::kRelu: return apply<V, relu<V>>(x, stride, rows, count);
    case Activation::kTanh: return apply<V, tanh_of<V>>(x, stride, rows, count);
    case Activation::kNone: return;
  }
}

template <class V>
void add_norm(float* x, const float* residual, const float* weight, const float* bias, float eps, int64_t width,
              float* out) {
  const int64_t whole = width / V::width * V::width;
  typename V::R sums = V::set(0.0f);
  for (int64_t i = 0; i < whole; i += V::width) {
    const typename V::R value = V::add(V::load(x + i), V::load(residual + i));
    V::store(x + i, value);
    sums = V::add(sums, value);
  }
  float sum = V::sum(sums);
  for (int64_t i = whole; i < width; ++i) sum += x[i] += residual[i];
  const float mean = sum / static_cast<float>(width);

  sums = V::set(0.0f);
  for (int64_t i = 0; i < whole; i += V::width) {
    const typename V::R value = V::sub(V::load(x + i), V::set(mean));
    sums = V::fma(value, value, sums);
  }
  float squares = V::sum(sums);
  for (int64_t i = whole; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);

  for (int64_t i = 0; i < whole; i += V::width) {
    const typename V::R value = V::mul(V::sub(V::load(x + i), V::set(mean)), V::set(factor));
    V::store(out + i, V::fma(value, V::load(weight + i), V::load(bias + i)));
  }
  for (int64_t i = whole; i < width; ++i) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

template <class V>
float softmax(float* x, int64_t count, float scale) {
  const int64_t room = (count + V::width - 1) / V::width * V::width;
  for (int64_t i = count; i < room; ++i) x[i] = -__builtin_inff();
  typename V::R top = V::load(x);
  for (int64_t i = V::width; i < room; i += V::width) top = V::max(top, V::load(x + i));
  const typename V::R most = V::set(V::largest(top));
  typename V::R sums = V::set(0.0f);
  for (int64_t i = 0; i < room; i += V::width) {
    const typename V::R value = exp_of<V>(V::mul(V::sub(V::load(x + i), most), V::set(scale)));
    V::store(x + i, value);
    sums = V::add(sums, value);
  }
  return 1.0f / V::sum(sums);
}

template <class V>
void scale(const float* x, float factor, int64_t count, float* out) {
  const int64_t whole = count / V::width * V::width;
  for (int64_t i = 0; i < whole; i += V::width) V::store(out + i, V::mul(V::load(x + i), V::set(factor)));
  for (int64_t i = whole; i < count; ++i) out[i] = x[i] * factor;
}

// Bytes of a panel that are prefetched before they are read.
constexpr int64_t kAhead = 4096;

// Prefetches a line of each step of the panel that is read next into the second-level cache: where few rows share a panel,
// reading it from memory takes as long as the sums.
struct NextPanel {
  const char* line;
  int64_t step;
  NextPanel(const Tile& t, int64_t itemsize)
      : line(t.next ? t.next : static_cast<const char*>(t.weight)), step(t.next ? t.weight_stride * itemsize : 0) {}
  void prefetch() {
    __builtin_prefetch(line, 0, 2);
    line += step;
  }
};

// Stores the sums of one block of terms: the first ones beside the bias, later ones beside those before.
template <class V, int ROWS>
inline void store_sums(const Tile& t, bool first, typename V::R (&sums)[ROWS][2]) {
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const int64_t column = c * V::width;
    const typename V::R bias = t.bias ? V::load(t.bias + column) : V::set(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      float* out = t.out + r * t.out_stride + column;
      V::store(out, V::add(sums[r][c], first ? bias : V::load(out)));
    }
  }
}

// How a panel's values become floats. `prefetches` are the lines of the cache that one step of a sum reads.
template <class V>
struct Float32 {
  using T = float;
  static constexpr int prefetches = 2 * V::width * sizeof(T) / 64;
  static typename V::R load(const T* x) { return V::load(x); }
};

template <class V>
struct Float16 {
  using T = uint16_t;
  static constexpr int prefetches = 1;
  static typename V::R load(const T* x) { return V::load_float16(x); }
};

template <class V>
struct BFloat16 {
  using T = uint16_t;
  static constexpr int prefetches = 1;
  static typename V::R load(const T* x) { return V::load_bfloat16(x); }
};

template <class V, class W, int ROWS>
void tile(const Tile& t) {
  const float* a = static_cast<const float*>(t.a);
  const typename W::T* weight = static_cast<const typename W::T*>(t.weight);
  NextPanel next(t, sizeof(typename W::T));
  for (int64_t start = 0; start < t.depth; start += kDepthBlock) {
    const int64_t end = start + kDepthBlock < t.depth ? start + kDepthBlock : t.depth;
    typename V::R sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = V::set(0.0f);
    for (int64_t k = start; k < end; ++k) {
      const typename V::R w0 = W::load(weight), w1 = W::load(weight + V::width);
      for (int b = 0; b < W::prefetches; ++b) {
        __builtin_prefetch(reinterpret_cast<const char*>(weight) + kAhead + 64 * b);
      }
      next.prefetch();
      weight += t.weight_stride;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const typename V::R x = V::set(a[r * t.a_stride + k]);
        sums[r][0] = V::fma(x, w0, sums[r][0]);
        sums[r][1] = V::fma(x, w1, sums[r][1]);
      }
    }
    store_sums<V, ROWS>(t, start == 0, sums);
  }
}

// Fills a row of the table with the tiles of 1 to ROWS rows.
template <class V, class W, int ROWS>
void fill_tiles(TileFunction* tiles) {
  tiles[ROWS - 1] = &tile<V, W, ROWS>;
  if constexpr (ROWS > 1) fill_tiles<V, W, ROWS - 1>(tiles);
}

// Loads the first values of a vector, and zeros behind them.
template <class V, class W>
inline typename V::R first_of(const typename W::T* x, int64_t count) {
  typename W::T values[V::width] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = x[i];
  return W::load(values);
}

// ROWS x OUTPUTS sums at a time, each over the lanes of a vector and then of these.
template <class V, class W, int ROWS, int OUTPUTS>
inline void dot_tile(const Dots& d, int64_t row, int64_t output) {
  const typename W::T* weight = static_cast<const typename W::T*>(d.weight) + output * d.depth;
  const int64_t whole = d.depth / V::width * V::width;
  typename V::R sums[ROWS][OUTPUTS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; ++n) sums[r][n] = V::set(0.0f);
  }
  for (int64_t k = 0; k < whole; k += V::width) {
    typename V::R w[OUTPUTS];
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; ++n) w[n] = W::load(weight + n * d.depth + k);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const typename V::R x = V::load(d.x[row + r] + k);
#pragma GCC unroll 4
      for (int n = 0; n < OUTPUTS; ++n) sums[r][n] = V::fma(x, w[n], sums[r][n]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int n = 0; n < OUTPUTS; ++n) {
      if (whole < d.depth) {
        const typename V::R x = first_of<V, Float32<V>>(d.x[row + r] + whole, d.depth - whole);
        sums[r][n] = V::fma(x, first_of<V, W>(weight + n * d.depth + whole, d.depth - whole), sums[r][n]);
      }
      d.out[(row + r) * d.out_stride + output + n] = V::sum(sums[r][n]) + d.bias[output + n];
    }
  }
}

template <class V, class W, int OUTPUTS>
inline void dot_rows(const Dots& d, int64_t output) {
  int64_t r = 0;
  for (; r + V::dot_rows <= d.rows; r += V::dot_rows) dot_tile<V, W, V::dot_rows, OUTPUTS>(d, r, output);
  for (; r < d.rows; ++r) dot_tile<V, W, 1, OUTPUTS>(d, r, output);
}

template <class V, class W>
void dots(const Dots& d) {
  int64_t n = 0;
  for (; n + 4 <= d.outputs; n += 4) dot_rows<V, W, 4>(d, n);
  for (; n < d.outputs; ++n) dot_rows<V, W, 1>(d, n);
}

constexpr WeightType kFloats[] = {WeightType::kFloat32, WeightType::kFloat16, WeightType::kBFloat16};

template <class V, int ROWS>
Kernels common_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  kernels.tile_rows = ROWS;
  kernels.columns = 2 * V::width;
  for (const WeightType type : kFloats) {
    kernels.terms[static_cast<int>(type)] = 1;
    kernels.input_bytes[static_cast<int>(type)] = sizeof(float);
  }
  kernels.activate = activate<V>;
  kernels.add_norm = add_norm<V>;
  kernels.softmax = softmax<V>;
  kernels.scale = scale<V>;
  fill_tiles<V, Float32<V>, ROWS>(kernels.tiles[0]);
  fill_tiles<V, Float16<V>, ROWS>(kernels.tiles[1]);
  fill_tiles<V, BFloat16<V>, ROWS>(kernels.tiles[2]);
  kernels.dots[0] = dots<V, Float32<V>>;
  kernels.dots[1] = dots<V, Float16<V>>;
  kernels.dots[2] = dots<V, BFloat16<V>>;
  return kernels;
}
