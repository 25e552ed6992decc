// The kernels of weights in int8 as templates on a type of instructions for bytes, B, which has its type of vectors, B::V.
// Included as vector_code.h is, after it.

// Panels hold B::terms terms of each column side by side, as bytes x + 128; a step adds their products to the sums. The
// sums of integers are exact, and (sum - 128 * row sum) * row scale * column scale is the product.
template <class B, int ROWS>
void byte_tile(const Tile& t) {
  using V = typename B::V;
  constexpr int kHalf = B::terms * V::width;  // bytes of half a step
  const typename B::Input* a = static_cast<const typename B::Input*>(t.a);
  const uint8_t* weight = static_cast<const uint8_t*>(t.weight);
  NextPanel next(t, sizeof(uint8_t));
  typename B::I sums[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = B::set(0);
  for (int64_t k = 0; k < t.depth; k += B::terms) {
    const typename B::I w0 = B::load(weight), w1 = B::load(weight + kHalf);
    for (int b = 0; b < 2 * kHalf; b += 64) __builtin_prefetch(weight + kAhead + b);
    next.prefetch();
    weight += t.weight_stride;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      int32_t inputs;
      static_assert(sizeof(inputs) == B::terms * sizeof(*a));
      __builtin_memcpy(&inputs, a + r * t.a_stride + k, sizeof(inputs));
      const typename B::I x = B::set(inputs);
      sums[r][0] = B::add_products(sums[r][0], w0, x);
      sums[r][1] = B::add_products(sums[r][1], w1, x);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {  // in two steps, since GCC keeps the sums in memory otherwise
    B::store(t.out + r * t.out_stride, sums[r][0]);
    B::store(t.out + r * t.out_stride + V::width, sums[r][1]);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < 2 * V::width; c += V::width) {
      float* out = t.out + r * t.out_stride + c;
      const typename V::R product = V::mul(B::less(out, 128 * t.row_sums[r]), V::set(t.row_scales[r]));
      V::store(out, V::fma(product, V::load(t.column_scales + c), V::load(t.bias + c)));
    }
  }
}

template <class B, int ROWS>
void fill_byte_tiles(TileFunction* tiles) {
  tiles[ROWS - 1] = &byte_tile<B, ROWS>;
  if constexpr (ROWS > 1) fill_byte_tiles<B, ROWS - 1>(tiles);
}

template <class V>
inline typename V::R values_at(const float* x, int64_t count) {
  return count >= V::width ? V::load(x) : first_of<V, Float32<V>>(x, count);
}

// Below this, 127 / x is not finite; a row without a larger value is rounded to zeros.
constexpr float kLeastInput = 4e-37f;

template <class B>
void to_bytes(const float* x, int64_t count, void* out, float* scale, int32_t* sum) {
  using V = typename B::V;
  typename B::Input* to = static_cast<typename B::Input*>(out);
  typename V::R most = V::set(0.0f), poison = V::set(0.0f);
  for (int64_t i = 0; i < count; i += V::width) {
    const typename V::R values = values_at<V>(x + i, count - i);
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
    const typename V::R rounded = V::round(V::mul(values_at<V>(x + i, count - i), factor));
    sums = V::add(sums, rounded);
    B::store_inputs(to + i, rounded);
  }
  *sum = static_cast<int32_t>(V::sum(sums));
}

template <class B, int ROWS>
void add_byte_kernels(Kernels& kernels) {
  constexpr int kType = static_cast<int>(WeightType::kInt8);
  kernels.terms[kType] = B::terms;
  kernels.input_bytes[kType] = sizeof(typename B::Input);
  kernels.narrow[kType] = to_bytes<B>;
  fill_byte_tiles<B, ROWS>(kernels.tiles[kType]);
}
