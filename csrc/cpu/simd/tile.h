// The tiles and dots of table.h as templates on a type of vectors, V, and a format of weights, F. Included as math.h is,
// after it.

// Bytes of a panel that are prefetched before they are read.
constexpr int64_t kAhead = 4096;

// A tile. A format has the types Weight, Input and Sum; `terms`, whose products with one input `multiply_add` adds to a
// vector of sums; the number of terms of a `block` of sums; and `finish`, which stores the sums of a block.
template <class V, class F, int ROWS>
void tile(const Tile& t) {
  constexpr int kHalf = F::terms * V::width;  // weights of half a step
  const typename F::Input* a = static_cast<const typename F::Input*>(t.a);
  const typename F::Weight* weight = static_cast<const typename F::Weight*>(t.weight);
  // a line of each step of the panel that is read next goes into the second-level cache: where few rows share a panel,
  // reading it from memory takes as long as the sums
  const char* next = t.next ? t.next : static_cast<const char*>(t.weight);
  const int64_t next_step = t.next ? t.weight_stride * static_cast<int64_t>(sizeof(*weight)) : 0;
  for (int64_t start = 0; start < t.depth; start += F::block) {
    const int64_t end = start + F::block < t.depth ? start + F::block : t.depth;
    typename F::Sum sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = F::zero();
    for (int64_t k = start; k < end; k += F::terms) {
      const typename F::Sum w0 = F::load(weight), w1 = F::load(weight + kHalf);
      for (int b = 0; b < 2 * kHalf * static_cast<int>(sizeof(*weight)); b += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(weight) + kAhead + b);
      }
      __builtin_prefetch(next, 0, 2);
      next += next_step;
      weight += t.weight_stride;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const typename F::Sum x = F::input(a + r * t.a_stride + k);
        sums[r][0] = F::multiply_add(sums[r][0], w0, x);
        sums[r][1] = F::multiply_add(sums[r][1], w1, x);
      }
    }
    F::template finish<ROWS>(t, start == 0, sums);
  }
}

// Fills a table with the tiles of 1 to ROWS rows.
template <class V, class F, int ROWS>
void fill_tiles(TileFunction* tiles) {
  tiles[ROWS - 1] = &tile<V, F, ROWS>;
  if constexpr (ROWS > 1) fill_tiles<V, F, ROWS - 1>(tiles);
}

template <class V, class F, int ROWS>
void add_tiles(Format& format) {
  format.terms = F::terms;
  format.input_bytes = sizeof(typename F::Input);
  format.narrow = F::narrow;
  fill_tiles<V, F, ROWS>(format.tiles);
}

// Sums in float32.
template <class V>
struct FloatSums {
  using Sum = typename V::R;
  static constexpr int64_t block = kDepthBlock;
  static Sum zero() { return V::set(0.0f); }

  // The first sums are stored beside the bias, later ones beside those before.
  template <int ROWS>
  static void finish(const Tile& t, bool first, Sum (&sums)[ROWS][2]) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const int64_t column = c * V::width;
      const Sum bias = t.bias ? V::load(t.bias + column) : V::set(0.0f);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        float* out = t.out + r * t.out_stride + column;
        V::store(out, sums[r][c] + (first ? bias : V::load(out)));
      }
    }
  }
};

// Weights that become floats as they are read.
template <class V, class T>
struct Widened : FloatSums<V> {
  using Weight = T;
  using Input = float;
  using Sum = typename V::R;
  static constexpr int terms = 1;
  static constexpr NarrowFunction narrow = nullptr;
  static Sum load(const Weight* x) { return V::load(x); }
  static Sum input(const Input* x) { return V::set(*x); }
  static Sum multiply_add(Sum sum, Sum weight, Sum x) { return V::fma(x, weight, sum); }
};

// Loads the first values of a vector, and zeros behind them.
template <class V, class T>
inline typename V::R first_of(const T* x, int64_t count) {
  T values[V::width] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = x[i];
  return V::load(values);
}

// Bytes x + 128 by the instructions B. The sums of integers are exact, and the product is
// (sum - 128 * row sum) * row scale * column scale.
template <class V, class B>
struct Bytes : B {
  using Weight = uint8_t;
  using Input = typename B::Input;
  using Sum = typename B::Sum;
  static constexpr int terms = sizeof(int32_t) / sizeof(Input);
  static constexpr int64_t block = kMostByteTerms;
  static Sum zero() { return B::set(0); }

  static Sum input(const Input* x) {
    int32_t inputs;
    __builtin_memcpy(&inputs, x, sizeof(inputs));
    return B::set(inputs);
  }

  template <int ROWS>
  static void finish(const Tile& t, bool, Sum (&sums)[ROWS][2]) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {  // in two steps, since GCC keeps the sums in memory otherwise
      B::store(t.out + r * t.out_stride, sums[r][0]);
      B::store(t.out + r * t.out_stride + V::width, sums[r][1]);
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int c = 0; c < 2 * V::width; c += V::width) {
        float* out = t.out + r * t.out_stride + c;
        const typename V::R product = B::less(out, 128 * t.row_sums[r]) * V::set(t.row_scales[r]);
        V::store(out, V::fma(product, V::load(t.column_scales + c), V::load(t.bias + c)));
      }
    }
  }

  // Below this, 127 / x is not finite; a row without a larger value is rounded to zeros.
  static constexpr float kLeastInput = 4e-37f;

  static void narrow(const float* x, int64_t count, void* out, float* scale, int32_t* sum) {
    const auto values_at = [&](int64_t i) {
      return count - i >= V::width ? V::load(x + i) : first_of<V>(x + i, count - i);
    };
    Input* to = static_cast<Input*>(out);
    typename V::R most = V::set(0.0f), poison = V::set(0.0f);
    for (int64_t i = 0; i < count; i += V::width) {
      const typename V::R values = values_at(i);
      most = V::max(most, V::abs(values));
      poison = V::fma(values, V::set(0.0f), poison);  // NaN where a value is not finite
    }
    const float largest = V::largest(most) + V::sum(poison);
    *scale = largest / 127.0f;
    *sum = 0;
    if (!(largest > kLeastInput)) {
      __builtin_memset(to, 0, count * sizeof(*to));
      return;
    }
    const typename V::R factor = V::set(127.0f / largest);
    typename V::R sums = V::set(0.0f);  // of whole numbers, exact up to kMostByteTerms of them
    for (int64_t i = 0; i < count; i += V::width) {
      const typename V::R rounded = V::round(values_at(i) * factor);
      sums += rounded;
      B::store_inputs(to + i, rounded);
    }
    *sum = static_cast<int32_t>(V::sum(sums));
  }
};

// ROWS x OUTPUTS sums at a time, each over the lanes of a vector and then of these.
template <class V, class T, int ROWS, int OUTPUTS>
inline void dot_tile(const Dots& d, int64_t row, int64_t output) {
  const T* weight = static_cast<const T*>(d.weight) + output * d.depth;
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
    for (int n = 0; n < OUTPUTS; ++n) w[n] = V::load(weight + n * d.depth + k);
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
        const typename V::R x = first_of<V>(d.x[row + r] + whole, d.depth - whole);
        sums[r][n] = V::fma(x, first_of<V>(weight + n * d.depth + whole, d.depth - whole), sums[r][n]);
      }
      d.out[(row + r) * d.out_stride + output + n] = V::sum(sums[r][n]) + d.bias[output + n];
    }
  }
}

template <class V, class T, int OUTPUTS>
inline void dot_rows(const Dots& d, int64_t output) {
  int64_t r = 0;
  for (; r + V::dot_rows <= d.rows; r += V::dot_rows) dot_tile<V, T, V::dot_rows, OUTPUTS>(d, r, output);
  for (; r < d.rows; ++r) dot_tile<V, T, 1, OUTPUTS>(d, r, output);
}

template <class V, class T>
void dots(const Dots& d) {
  int64_t n = 0;
  for (; n + 4 <= d.outputs; n += 4) dot_rows<V, T, 4>(d, n);
  for (; n < d.outputs; ++n) dot_rows<V, T, 1>(d, n);
}

template <class V, class T, int ROWS>
void add_format(Kernels& kernels, WeightType type) {
  Format& format = kernels.formats[static_cast<int>(type)];
  add_tiles<V, Widened<V, T>, ROWS>(format);
  format.dots = dots<V, T>;
}

template <class V, int ROWS>
Kernels float_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  kernels.tile_rows = ROWS;
  kernels.columns = 2 * V::width;
  kernels.activate = activate<V>;
  kernels.add_norm = add_norm<V>;
  kernels.softmax = softmax<V>;
  kernels.scale = scale<V>;
  add_format<V, float, ROWS>(kernels, WeightType::kFloat32);
  add_format<V, Float16, ROWS>(kernels, WeightType::kFloat16);
  add_format<V, BFloat16, ROWS>(kernels, WeightType::kBFloat16);
  return kernels;
}
