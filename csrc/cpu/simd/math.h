// The functions of rows of table.h as templates on a type of vectors. Included by each instruction set's file, within its
// target region and anonymous namespace; functions of the standard library would be compiled for that target too, for all
// files.

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
  const typename V::R n = V::round(x * V::set(1.44269504f));
  const typename V::R r = V::fma(n, V::set(2.12194440e-4f), V::fma(n, V::set(-0.693359375f), x));
  return polynomial<V>(r, kExpFactors) * V::power_of_two(n);
}

// The tail of the normal distribution is exp(-x^2 / 2) t polynomial(t) with t = 1 / (1 + 0.3 x), fitted to within 2.5e-9.
constexpr float kTailFactors[] = {0.03049602610279916f, -0.1311086489342773f,  0.15152298095207134f,
                                  0.008367239001777707f, 0.08792573291406648f, 0.11519578835169732f,
                                  0.11773535487343327f,  0.11986552917683028f};

// x times the normal distribution function
template <class V>
inline typename V::R gelu(typename V::R x) {
  const typename V::R one = V::set(1.0f);
  const typename V::R t = one / V::fma(V::set(0.3f), V::abs(x), one);
  const typename V::R square = exp_of<V>(x * x * V::set(-0.5f));
  const typename V::R tail = polynomial<V>(t, kTailFactors) * t * square;
  return x * V::where_negative(x, tail, one - tail);
}

// x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
inline typename V::R gelu_tanh(typename V::R x) {
  const typename V::R u = x * V::fma(x * x, V::set(-2 * 0.0356774081f), V::set(-2 * 0.7978845608f));
  return x / (V::set(1.0f) + exp_of<V>(u));
}

// 1 - 2 / (exp(2 x) + 1), and the series near 0, where that form cancels
constexpr float kTanhFactors[] = {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f};

template <class V>
inline typename V::R tanh_of(typename V::R x) {
  const typename V::R one = V::set(1.0f), square = x * x;
  const typename V::R series = x * polynomial<V>(square, kTanhFactors);
  const typename V::R far = one - V::set(2.0f) / (exp_of<V>(x + x) + one);
  return V::where_negative(square - V::set(0.0625f), series, far);
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
    const typename V::R value = V::load(x + i) + V::load(residual + i);
    V::store(x + i, value);
    sums += value;
  }
  float sum = V::sum(sums);
  for (int64_t i = whole; i < width; ++i) sum += x[i] += residual[i];
  const float mean = sum / static_cast<float>(width);

  sums = V::set(0.0f);
  for (int64_t i = 0; i < whole; i += V::width) {
    const typename V::R value = V::load(x + i) - V::set(mean);
    sums = V::fma(value, value, sums);
  }
  float squares = V::sum(sums);
  for (int64_t i = whole; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);

  for (int64_t i = 0; i < whole; i += V::width) {
    const typename V::R value = (V::load(x + i) - V::set(mean)) * V::set(factor);
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
    const typename V::R value = exp_of<V>((V::load(x + i) - most) * V::set(scale));
    V::store(x + i, value);
    sums += value;
  }
  return 1.0f / V::sum(sums);
}

template <class V>
void scale(const float* x, float factor, int64_t count, float* out) {
  const int64_t whole = count / V::width * V::width;
  for (int64_t i = 0; i < whole; i += V::width) V::store(out + i, V::load(x + i) * V::set(factor));
  for (int64_t i = whole; i < count; ++i) out[i] = x[i] * factor;
}
