// Complex Fourier transforms of fft_conv, a channel per lane: an element is two vectors, the real and the imaginary
// parts of kLanes channels. In place: forward by decimation in frequency, which leaves frequencies in digit-reversed
// order, backward by decimation in time, which starts from there. Sizes with prime factors above kMaxPrime go through a
// convolution with a chirp (Bluestein). Included by fft_conv_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

constexpr int kWide = 2 * kLanes;  // floats of an element
constexpr int kMaxPrime = 31, kMaxLevels = 40;
constexpr double kTurn = 6.283185307179586476925286766559;
constexpr int64_t kNearFloats = (24 << 10) / 4;  // what passes one after the other should find in L1

struct Complex {
  vf re, im;
};
EFFVIT_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
EFFVIT_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
EFFVIT_INLINE Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
EFFVIT_INLINE Complex operator*(Complex a, float f) { return {a.re * f, a.im * f}; }
EFFVIT_INLINE Complex conj(Complex a) { return {a.re, -a.im}; }
EFFVIT_INLINE Complex times_i(Complex a) { return {-a.im, a.re}; }
EFFVIT_INLINE Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
EFFVIT_INLINE Complex swapped(Complex a) { return {a.im, a.re}; }
EFFVIT_INLINE Complex root(const float* w) { return {set1(w[0]), set1(w[1])}; }
EFFVIT_INLINE Complex load_complex(const float* p) { return {load(p), load(p + kLanes)}; }
EFFVIT_INLINE void store_complex(float* p, Complex x) { store(p, x.re), store(p + kLanes, x.im); }

// ---- transforms of a few elements ----------------------------------------------------------------------------------

EFFVIT_INLINE void dft(Complex (&x)[2]) {
  const Complex a = x[0];
  x[0] = a + x[1], x[1] = a - x[1];
}
EFFVIT_INLINE void dft(Complex (&x)[3]) {
  const Complex sum = x[1] + x[2], turned = times_minus_i((x[1] - x[2]) * 0.866025404f), middle = x[0] - sum * 0.5f;
  x[0] = x[0] + sum, x[1] = middle + turned, x[2] = middle - turned;
}
EFFVIT_INLINE void dft4(Complex& x0, Complex& x1, Complex& x2, Complex& x3) {
  const Complex a = x0 + x2, b = x0 - x2, c = x1 + x3, d = times_minus_i(x1 - x3);
  x0 = a + c, x1 = b + d, x2 = a - c, x3 = b - d;
}
EFFVIT_INLINE void dft(Complex (&x)[4]) { dft4(x[0], x[1], x[2], x[3]); }
EFFVIT_INLINE void dft(Complex (&x)[5]) {
  constexpr float c1 = 0.309016994f, c2 = -0.809016994f, s1 = 0.951056516f, s2 = 0.587785252f;
  const Complex t1 = x[1] + x[4], t2 = x[2] + x[3], u1 = x[1] - x[4], u2 = x[2] - x[3];
  const Complex m1 = x[0] + t1 * c1 + t2 * c2, m2 = x[0] + t1 * c2 + t2 * c1;
  const Complex n1 = times_minus_i(u1 * s1 + u2 * s2), n2 = times_minus_i(u1 * s2 - u2 * s1);
  x[0] = x[0] + t1 + t2, x[1] = m1 + n1, x[4] = m1 - n1, x[2] = m2 + n2, x[3] = m2 - n2;
}
EFFVIT_INLINE void dft(Complex (&x)[7]) {
  constexpr float c1 = 0.623489802f, c2 = -0.222520934f, c3 = -0.900968868f;
  constexpr float s1 = 0.781831482f, s2 = 0.974927912f, s3 = 0.433883739f;
  const Complex t1 = x[1] + x[6], t2 = x[2] + x[5], t3 = x[3] + x[4];
  const Complex u1 = x[1] - x[6], u2 = x[2] - x[5], u3 = x[3] - x[4];
  const Complex m1 = x[0] + t1 * c1 + t2 * c2 + t3 * c3, m2 = x[0] + t1 * c2 + t2 * c3 + t3 * c1;
  const Complex m3 = x[0] + t1 * c3 + t2 * c1 + t3 * c2;
  const Complex n1 = times_minus_i(u1 * s1 + u2 * s2 + u3 * s3), n2 = times_minus_i(u1 * s2 - u2 * s3 - u3 * s1);
  const Complex n3 = times_minus_i(u1 * s3 - u2 * s1 + u3 * s2);
  x[0] = x[0] + t1 + t2 + t3;
  x[1] = m1 + n1, x[6] = m1 - n1, x[2] = m2 + n2, x[5] = m2 - n2, x[3] = m3 + n3, x[4] = m3 - n3;
}
EFFVIT_INLINE void dft(Complex (&x)[8]) {
  constexpr float h = 0.707106781f;
  dft4(x[0], x[2], x[4], x[6]), dft4(x[1], x[3], x[5], x[7]);
  const Complex a = x[3], b = x[7];
  const Complex o1 = Complex{a.re + a.im, a.im - a.re} * h, o2 = times_minus_i(x[5]);
  const Complex o3 = Complex{b.im - b.re, -b.re - b.im} * h, o0 = x[1];
  const Complex e0 = x[0], e1 = x[2], e2 = x[4], e3 = x[6];
  x[0] = e0 + o0, x[1] = e1 + o1, x[2] = e2 + o2, x[3] = e3 + o3;
  x[4] = e0 - o0, x[5] = e1 - o1, x[6] = e2 - o2, x[7] = e3 - o3;
}

// ---- passes --------------------------------------------------------------------------------------------------------

// What passes run over: `blocks` transforms one behind the other, each of radix * m rows, `stride` floats apart, of
// which `inner` elements lie side by side and are transformed alike.
struct Rows {
  float* data;
  int64_t blocks, m, stride, inner;
};

// One level of all transforms. The backward one is the forward one of numbers whose parts are swapped: the transform
// with conjugate roots, swapped itself. twiddles: [m, radix - 1, 2].
template <int kRadix, bool kBackward, bool kTwiddles>
inline __attribute__((noinline)) void pass(const Rows r, const float* twiddles) {
  const int64_t step = r.m * r.stride;
  for (int64_t block = 0; block < r.blocks; ++block) {
    for (int64_t j = 0; j < r.m; ++j) {
      const float* const w = twiddles + j * (kRadix - 1) * 2;
      float* at = r.data + (block * kRadix * r.m + j) * r.stride;
      for (int64_t t = 0; t < r.inner; ++t, at += kWide) {
        Complex x[kRadix];
#pragma GCC unroll 8
        for (int q = 0; q < kRadix; ++q) {
          x[q] = load_complex(at + q * step);
          if (kBackward) x[q] = swapped(x[q]);
          if (kBackward && kTwiddles && q > 0) x[q] = x[q] * root(w + 2 * (q - 1));
        }
        dft(x);
#pragma GCC unroll 8
        for (int q = 0; q < kRadix; ++q) {
          if (!kBackward && kTwiddles && q > 0) x[q] = x[q] * root(w + 2 * (q - 1));
          store_complex(at + q * step, kBackward ? swapped(x[q]) : x[q]);
        }
      }
    }
  }
}

// The same of any odd radix up to kMaxPrime. roots: [radix, 2], cosines and sines of 2 pi i / radix.
template <bool kBackward>
inline __attribute__((noinline)) void pass_any(const Rows r, int radix, const float* roots, const float* twiddles) {
  const int64_t step = r.m * r.stride;
  for (int64_t block = 0; block < r.blocks; ++block) {
    for (int64_t j = 0; j < r.m; ++j) {
      const float* const w = twiddles + j * (radix - 1) * 2;
      float* at = r.data + (block * radix * r.m + j) * r.stride;
      for (int64_t t = 0; t < r.inner; ++t, at += kWide) {
        Complex x[kMaxPrime], y[kMaxPrime];
        for (int q = 0; q < radix; ++q) {
          x[q] = load_complex(at + q * step);
          if (kBackward) x[q] = swapped(x[q]);
          if (kBackward && q > 0) x[q] = x[q] * root(w + 2 * (q - 1));
        }
        const int half = radix / 2;
        y[0] = x[0];
        for (int q = 1; q <= half; ++q) {
          const Complex a = x[q], b = x[radix - q];
          x[q] = a + b, x[radix - q] = a - b;
          y[0] = y[0] + x[q];
        }
        for (int f = 1; f <= half; ++f) {
          Complex even = x[0], odd{};
          for (int q = 1; q <= half; ++q) {
            const float* const c = roots + 2 * (f * q % radix);
            even = even + x[q] * c[0], odd = odd + x[radix - q] * c[1];
          }
          odd = times_minus_i(odd);
          y[f] = even + odd, y[radix - f] = even - odd;
        }
        for (int q = 0; q < radix; ++q) {
          if (!kBackward && q > 0) y[q] = y[q] * root(w + 2 * (q - 1));
          store_complex(at + q * step, kBackward ? swapped(y[q]) : y[q]);
        }
      }
    }
  }
}

// ---- plans ---------------------------------------------------------------------------------------------------------

inline int largest_prime(int64_t n) {
  int64_t largest = 1;
  for (int64_t prime = 2; prime * prime <= n; ++prime) {
    for (; n % prime == 0; n /= prime) largest = prime;
  }
  return static_cast<int>(std::max(largest, n));
}

// to[j] = e^(-2 pi i j / n), j < count: products of two roots in double precision.
inline void fill_roots(float* to, int64_t n, int64_t count) {
  constexpr int64_t kMost = 512;
  double fine[kMost][2];
  int64_t q = 1;
  while (q * q < count && q < kMost) ++q;
  const double unit = -kTurn / static_cast<double>(n);
  for (int64_t j = 0; j < q; ++j) fine[j][0] = std::cos(unit * j), fine[j][1] = std::sin(unit * j);
  for (int64_t i = 0; i < count; i += q) {
    const double c = std::cos(unit * i), s = std::sin(unit * i);
    for (int64_t j = 0; j < q && i + j < count; ++j) {
      to[2 * (i + j)] = static_cast<float>(c * fine[j][0] - s * fine[j][1]);
      to[2 * (i + j) + 1] = static_cast<float>(c * fine[j][1] + s * fine[j][0]);
    }
  }
}

// A size whose prime factors are small. Tables are filled once per call, and found again by everyone who makes the same
// plan on the same memory.
struct Smooth {
  int64_t n = 1;
  int levels = 0;
  int radix[kMaxLevels] = {};
  int64_t m[kMaxLevels] = {};  // of a level: its blocks are of radix * m elements
  float* twiddles[kMaxLevels] = {};  // [m, radix - 1, 2]
  float* roots[kMaxLevels] = {};  // of radices that pass_any takes

  Smooth() = default;
  Smooth(int64_t size, Scratch& scratch) : n(size) {
    int64_t rest = n;
    int twos = 0;
    for (; rest % 2 == 0; rest /= 2) ++twos;
    for (int64_t prime = 3; rest > 1; prime += 2) {
      for (; rest % prime == 0; rest /= prime) radix[levels++] = static_cast<int>(prime);
    }
    const int fours = twos == 1 ? 0 : twos % 3 == 1 ? 2 : twos % 3 == 2 ? 1 : 0;
    if (twos == 1) radix[levels++] = 2;
    for (int i = 0; i < fours; ++i) radix[levels++] = 4;
    for (int i = 0; i < (twos == 1 ? 0 : twos - 2 * fours) / 3; ++i) radix[levels++] = 8;
    int64_t size_of_level = n;
    for (int level = 0; level < levels; ++level) {
      m[level] = size_of_level /= radix[level];
      twiddles[level] = scratch.take<float>(m[level] * (radix[level] - 1) * 2);
      roots[level] = scratch.take<float>(radix[level] * 2);
    }
  }

  void fill() const {
    for (int level = 0; level < levels; ++level) {
      const int r = radix[level];
      const int64_t size = m[level] * r;
      fill_roots(roots[level], r, r);
      for (int i = 0; i < r; ++i) roots[level][2 * i + 1] = -roots[level][2 * i + 1];
      for (int q = 1; q < r; ++q) {  // w^(j q), in double precision and afresh every so often
        const double turn = -kTurn * q / static_cast<double>(size), step_c = std::cos(turn), step_s = std::sin(turn);
        double c = 1, s = 0;
        for (int64_t j = 0; j < m[level]; ++j) {
          if (j % 64 == 0) c = std::cos(turn * static_cast<double>(j)), s = std::sin(turn * static_cast<double>(j));
          float* const w = twiddles[level] + (j * (r - 1) + q - 1) * 2;
          w[0] = static_cast<float>(c), w[1] = static_cast<float>(s);
          const double next = c * step_c - s * step_s;
          s = c * step_s + s * step_c, c = next;
        }
      }
    }
  }

  // The frequency that is at a place after the forward transform.
  int64_t frequency(int64_t place) const {
    int64_t f = 0, factor = 1;
    for (int level = 0; level < levels; ++level) {
      f += place / m[level] * factor, place %= m[level];
      factor *= radix[level];
    }
    return f;
  }

  template <bool kBackward>
  void run_level(int level, Rows r) const {
    r.m = m[level];
    const float* const w = twiddles[level];
    const bool plain = r.m == 1;
    const auto call = [&](auto size) __attribute__((always_inline)) {
      constexpr int kRadix = decltype(size)::value;
      plain ? pass<kRadix, kBackward, false>(r, w) : pass<kRadix, kBackward, true>(r, w);
    };
    switch (radix[level]) {
      case 2:
        return call(std::integral_constant<int, 2>{});
      case 3:
        return call(std::integral_constant<int, 3>{});
      case 4:
        return call(std::integral_constant<int, 4>{});
      case 5:
        return call(std::integral_constant<int, 5>{});
      case 7:
        return call(std::integral_constant<int, 7>{});
      case 8:
        return call(std::integral_constant<int, 8>{});
      default:
        return pass_any<kBackward>(r, radix[level], roots[level], w);
    }
  }

  // `count` transforms one behind the other, from a level on: deep first, so that what a transform's parts are is in a
  // near cache from one level to the next.
  template <bool kBackward>
  void run_lines(float* data, int64_t count, int level = 0) const {
    if (level == levels) return;
    const int64_t size = m[level] * radix[level], floats = size * kWide;
    if (floats > kNearFloats && m[level] > 1) {
      for (int64_t i = 0; i < count; ++i, data += floats) {
        if (kBackward) run_lines<kBackward>(data, radix[level], level + 1);
        run_level<kBackward>(level, {data, 1, 0, kWide, 1});
        if (!kBackward) run_lines<kBackward>(data, radix[level], level + 1);
      }
      return;
    }
    const int64_t together = std::max<int64_t>(1, kNearFloats / floats);
    for (int64_t i = 0; i < count; i += together) {
      const int64_t lines = std::min(together, count - i);
      for (int l = level; l < levels; ++l) {
        const int now = kBackward ? levels - 1 - (l - level) : l;
        run_level<kBackward>(now, {data + i * floats, lines * (size / (m[now] * radix[now])), 0, kWide, 1});
      }
    }
  }

  // Transforms along the rows of [n, width]: some columns at a time, through all levels.
  template <bool kBackward>
  void run_columns(float* data, int64_t width) const {
    const int64_t chunk = std::max<int64_t>(1, kNearFloats / (n * kWide));
    for (int64_t t = 0; t < width; t += chunk) {
      for (int l = 0; l < levels; ++l) {
        const int level = kBackward ? levels - 1 - l : l;
        const int64_t blocks = n / (m[level] * radix[level]);
        run_level<kBackward>(level, {data + t * kWide, blocks, 0, width * kWide, std::min(chunk, width - t)});
      }
    }
  }
};

// Any size.
struct Transform {
  int64_t n = 1;
  bool chirped = false;
  Smooth smooth;  // of n elements, or of the convolution with a chirp
  float* chirp = nullptr;  // [n, 2]: e^(-pi i j^2 / n)
  float* chirp_spectrum = nullptr;  // [smooth.n, 2], in its order, divided by smooth.n
  int32_t* frequency = nullptr;  // [n]: at a place of the result
  int32_t* place = nullptr;  // [n]: of a frequency

  Transform() = default;
  Transform(int64_t size, Scratch& tables) : n(size), chirped(largest_prime(size) > kMaxPrime) {
    smooth = Smooth(chirped ? fft_conv_size(2 * n - 1) : n, tables);
    if (chirped) chirp = tables.take<float>(2 * n), chirp_spectrum = tables.take<float>(2 * smooth.n);
    frequency = tables.take<int32_t>(n), place = tables.take<int32_t>(n);
  }

  int64_t line_floats() const { return chirped ? smooth.n * kWide : 0; }

  // line: line_floats().
  void fill(float* line) const {
    smooth.fill();
    for (int64_t i = 0; i < n; ++i) {
      frequency[i] = static_cast<int32_t>(chirped ? i : smooth.frequency(i));
      place[frequency[i]] = static_cast<int32_t>(i);
    }
    if (!chirped) return;
    for (int64_t j = 0; j < n; ++j) {
      const double angle = kTurn / 2 * static_cast<double>(j * j % (2 * n)) / static_cast<double>(n);
      chirp[2 * j] = static_cast<float>(std::cos(angle)), chirp[2 * j + 1] = static_cast<float>(-std::sin(angle));
    }
    zero(line, smooth.n * kWide);
    for (int64_t j = 0; j < n; ++j) {
      const Complex w = conj(root(chirp + 2 * j));
      store_complex(line + j * kWide, w);
      if (j > 0) store_complex(line + (smooth.n - j) * kWide, w);
    }
    smooth.run_lines<false>(line, 1);
    const float scale = 1.f / static_cast<float>(smooth.n);
    for (int64_t j = 0; j < smooth.n; ++j) {
      chirp_spectrum[2 * j] = line[j * kWide] * scale, chirp_spectrum[2 * j + 1] = line[j * kWide + kLanes] * scale;
    }
  }

  // Rows of a transform, `stride` floats apart.
  template <bool kBackward>
  void run_chirped(float* data, int64_t stride, float* line) const {
    for (int64_t j = 0; j < n; ++j) {
      const Complex x = load_complex(data + j * stride);
      store_complex(line + j * kWide, (kBackward ? swapped(x) : x) * root(chirp + 2 * j));
    }
    zero(line + n * kWide, (smooth.n - n) * kWide);
    smooth.run_lines<false>(line, 1);
    for (int64_t j = 0; j < smooth.n; ++j) {
      store_complex(line + j * kWide, load_complex(line + j * kWide) * root(chirp_spectrum + 2 * j));
    }
    smooth.run_lines<true>(line, 1);
    for (int64_t j = 0; j < n; ++j) {
      const Complex x = load_complex(line + j * kWide) * root(chirp + 2 * j);
      store_complex(data + j * stride, kBackward ? swapped(x) : x);
    }
  }

  // Without normalisation, either way. line: line_floats().
  template <bool kBackward>
  void lines(float* data, int64_t count, float* line) const {
    if (n == 1) return;
    if (!chirped) return smooth.run_lines<kBackward>(data, count);
    for (int64_t i = 0; i < count; ++i) run_chirped<kBackward>(data + i * n * kWide, kWide, line);
  }
  template <bool kBackward>
  void columns(float* data, int64_t width, float* line) const {
    if (n == 1) return;
    if (!chirped) return smooth.run_columns<kBackward>(data, width);
    for (int64_t i = 0; i < width; ++i) run_chirped<kBackward>(data + i * kWide, width * kWide, line);
  }
};

}  // namespace fft_conv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
