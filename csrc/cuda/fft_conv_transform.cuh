// Fourier transforms of fft_conv in shared memory: mixed radices in float32, in place, natural order to digit-reversed
// order and back.
//
// An axis of length N is a list of factors. A forward pass with factor f takes blocks of L = f M elements (L = N at
// first, then M) and replaces x[j + m M] by sum over m of x[j + m M] w_L^((j + m M) q) at j + q M. After all passes,
// position q1 N/f1 + q2 N/(f1 f2) + ... holds frequency q1 + f1 q2 + f1 f2 q3 + ...: a convolution multiplies spectra
// that are all in this order, so nothing is ever put back in order. The inverse takes the passes backwards.
//
// Factors of 2 to 8 and 16 are butterflies in registers, which write where they have read. Others, prime numbers, are
// sums of products from one buffer into another. All roots of unity come from one table of an axis, rounded once.
#pragma once
#include "math.cuh"
#include "tile/plan.cuh"

namespace effvit {
namespace cuda {
namespace fft_conv_impl {

using prim::Shared;
using tile::grid_size;
using tile::least;
using tile::most;

constexpr int kThreads = 256;
constexpr int kMaxFactors = 20;  // of a length below 2^31: 3^19 has most, as there is one of 2, 4 or 8

struct alignas(8) Complex {
  float re, im;
};
EFFVIT_DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
EFFVIT_DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
EFFVIT_DEVICE Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
EFFVIT_DEVICE Complex conjugate(Complex a) { return {a.re, -a.im}; }
// a times -i forward, i inverse.
template <bool kInverse>
EFFVIT_DEVICE Complex quarter_turn(Complex a) {
  return kInverse ? Complex{-a.im, a.re} : Complex{a.im, -a.re};
}

// ---- lengths and factors ----

struct Axis {
  int32_t n = 1, count = 0;  // length, number of factors
  int32_t factors[kMaxFactors] = {};
  const Complex* roots = nullptr;  // [n]: e^(-2 pi i j / n)
  const int32_t* mirror = nullptr;  // [n]: of a position, that of the negative frequency
  const Complex* turns = nullptr;  // [n]: e^(-2 pi i k / 2n) for the frequency k at a position
};

// The frequency at a position, and where a frequency is.
EFFVIT_DEVICE int32_t frequency_at(const Axis& axis, int32_t position, int first, int count, int32_t length) {
  int32_t frequency = 0, scale = 1;
  for (int i = first; i < first + count; ++i) {
    const int32_t f = axis.factors[i];
    length /= f;
    const int32_t q = position / length;
    position -= q * length;
    frequency += q * scale;
    scale *= f;
  }
  return frequency;
}
EFFVIT_DEVICE int32_t position_of(const Axis& axis, int32_t frequency) {
  int32_t position = 0, length = axis.n;
  for (int i = 0; i < axis.count; ++i) {
    const int32_t f = axis.factors[i], rest = frequency / f;
    length /= f;
    position += (frequency - rest * f) * length;
    frequency = rest;
  }
  return position;
}

inline bool has_butterfly(int32_t f) { return f <= 5 || f == 7 || f == 8 || f == 16; }

inline Axis make_axis(int64_t n) {
  Axis axis;
  axis.n = static_cast<int32_t>(n);
  int32_t rest = axis.n;
  for (int32_t f : {16, 8, 4, 2, 3, 5, 7}) {
    for (; rest % f == 0; rest /= f) axis.factors[axis.count++] = f;
  }
  for (int32_t f = 11; rest > 1; f += 2) {
    if (static_cast<int64_t>(f) * f > rest) f = rest;
    for (; rest % f == 0; rest /= f) axis.factors[axis.count++] = f;
  }
  return axis;
}

// ---- butterflies ----

// Cosine of m / r turns; folded where m is known to the compiler.
EFFVIT_HD constexpr float cosine(int r, int m) {
  m %= r;
  if (2 * m > r) m = r - m;
  if (r == 3) return m == 0 ? 1.f : -0.5f;
  if (r == 5) return m == 0 ? 1.f : m == 1 ? 0.309016994f : -0.809016994f;
  if (r == 7) return m == 0 ? 1.f : m == 1 ? 0.623489802f : m == 2 ? -0.222520934f : -0.900968868f;
  m *= 16 / r;
  const bool far = m > 4;
  if (far) m = 8 - m;
  const float c = m == 0 ? 1.f : m == 1 ? 0.923879533f : m == 2 ? 0.707106781f : m == 3 ? 0.382683432f : 0.f;
  return far ? -c : c;
}
EFFVIT_HD constexpr float sine(int r, int m) {
  m %= r;
  const bool negative = 2 * m > r;
  if (negative) m = r - m;
  float s = 0.f;
  if (r == 3) {
    s = m == 0 ? 0.f : 0.866025404f;
  } else if (r == 5) {
    s = m == 0 ? 0.f : m == 1 ? 0.951056516f : 0.587785252f;
  } else if (r == 7) {
    s = m == 0 ? 0.f : m == 1 ? 0.781831482f : m == 2 ? 0.974927912f : 0.433883739f;
  } else {
    s = cosine(16, m * (16 / r) + 12);
  }
  return negative ? -s : s;
}

template <int kR, bool kInverse>
EFFVIT_DEVICE void butterfly(Complex (&x)[kR]);

// kA kB = kR: element n1 kB + n2 goes to k1 + kA k2.
template <int kA, int kB, bool kInverse>
EFFVIT_DEVICE void composite(Complex (&x)[kA * kB]) {
  constexpr int kR = kA * kB;
  Complex y[kA][kB];
  EFFVIT_UNROLL
  for (int n2 = 0; n2 < kB; ++n2) {
    Complex column[kA];
    EFFVIT_UNROLL
    for (int n1 = 0; n1 < kA; ++n1) column[n1] = x[n1 * kB + n2];
    butterfly<kA, kInverse>(column);
    EFFVIT_UNROLL
    for (int k1 = 0; k1 < kA; ++k1) {
      const float c = cosine(kR, k1 * n2), s = kInverse ? sine(kR, k1 * n2) : -sine(kR, k1 * n2);
      y[k1][n2] = k1 * n2 == 0 ? column[k1] : column[k1] * Complex{c, s};
    }
  }
  EFFVIT_UNROLL
  for (int k1 = 0; k1 < kA; ++k1) {
    butterfly<kB, kInverse>(y[k1]);
    EFFVIT_UNROLL
    for (int k2 = 0; k2 < kB; ++k2) x[k1 + kA * k2] = y[k1][k2];
  }
}

// x[k] = sum over m of x[m] e^(-2 pi i k m / kR), conjugated roots where inverse.
template <int kR, bool kInverse>
EFFVIT_DEVICE void butterfly(Complex (&x)[kR]) {
  if constexpr (kR == 2) {
    const Complex a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  } else if constexpr (kR == 4) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = quarter_turn<kInverse>(x[1] - x[3]);
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else if constexpr (kR == 8) {
    composite<2, 4, kInverse>(x);
  } else if constexpr (kR == 16) {
    composite<4, 4, kInverse>(x);
  } else {
    constexpr int kHalf = kR / 2;
    Complex sum[kHalf], difference[kHalf], first = x[0];
    EFFVIT_UNROLL
    for (int m = 0; m < kHalf; ++m) {
      sum[m] = x[m + 1] + x[kR - 1 - m];
      difference[m] = quarter_turn<kInverse>(x[m + 1] - x[kR - 1 - m]);
      x[0] = x[0] + sum[m];
    }
    EFFVIT_UNROLL
    for (int k = 1; k <= kHalf; ++k) {
      Complex even = first, odd = {0.f, 0.f};
      EFFVIT_UNROLL
      for (int m = 0; m < kHalf; ++m) {
        const float c = cosine(kR, k * (m + 1)), s = sine(kR, k * (m + 1));
        even = even + Complex{c * sum[m].re, c * sum[m].im};
        odd = odd + Complex{s * difference[m].re, s * difference[m].im};
      }
      x[k] = even + odd, x[kR - k] = even - odd;
    }
  }
}

// ---- lines in shared memory ----

// Lines of a transform, or of the part of it that some of an axis's factors make.
struct LinePlan {
  int32_t n = 1, first = 0, count = 0;  // length: the product of `count` factors from `first` on
  int32_t pitch = 0;  // complex numbers from line to line
  int32_t lines = 1;  // a CTA's
  bool buffers = false;  // a factor needs a second buffer
};

// 16 complex numbers are all banks: with one more after them neither neighbours nor every 16th element meet in a bank.
EFFVIT_HD constexpr int32_t padded(int32_t i) { return i + (i >> 4); }

// All lines of a CTA, in shared memory; `other` is the second buffer.
struct Lines {
  Shared<Complex> data, other;

  Lines() = default;
  EFFVIT_DEVICE Lines(const LinePlan& plan, int byte_offset) {
    const int count = plan.lines * plan.pitch;
    data = Shared<Complex>(byte_offset, count);
    if (plan.buffers) other = Shared<Complex>(byte_offset + count * 8, count);
  }
  EFFVIT_DEVICE Complex load(int i) const { return data.template load_vec<Complex>(i); }
  EFFVIT_DEVICE void store(int i, Complex x) const { data.template store_vec<Complex>(i, x); }
  EFFVIT_DEVICE void swap() {
    const Shared<Complex> d = data;
    data = other, other = d;
  }
};

template <bool kInverse>
EFFVIT_DEVICE Complex root(const Axis& axis, int64_t i) {
  const Complex w = prim::load_global_vec<Complex>(axis.roots + i);
  return kInverse ? conjugate(w) : w;
}

template <int kR, bool kInverse>
EFFVIT_DEVICE void radix_pass(const Lines& s, const Axis& axis, const LinePlan& plan, int lines, int length) {
  const int M = length / kR, units = plan.n / kR, step = axis.n / length;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < lines * units; i += kThreads) {
    const int line = i / units, unit = i - line * units, block = unit / M, j = unit - block * M;
    const int base = block * length + j, row = line * plan.pitch;
    Complex x[kR];
    EFFVIT_UNROLL
    for (int q = 0; q < kR; ++q) x[q] = s.load(row + padded(base + q * M));
    if (kInverse && j != 0) {
      EFFVIT_UNROLL
      for (int q = 1; q < kR; ++q) x[q] = x[q] * root<true>(axis, q * j * step);
    }
    butterfly<kR, kInverse>(x);
    if (!kInverse && j != 0) {
      EFFVIT_UNROLL
      for (int q = 1; q < kR; ++q) x[q] = x[q] * root<false>(axis, q * j * step);
    }
    EFFVIT_UNROLL
    for (int q = 0; q < kR; ++q) s.store(row + padded(base + q * M), x[q]);
  }
}

// Output q of a factor f: sum over m of x(m) w^(start + m step), exponents modulo `length` of roots `scale` apart. Sums
// of 16 terms are added up, so that long sums lose no more than short ones.
template <bool kInverse, class X>
EFFVIT_DEVICE Complex long_sum(const Axis& axis, int f, int64_t start, int64_t step, int64_t length, int64_t scale,
                               const X& x) {
  Complex sum = {0.f, 0.f};
  int64_t at = start % length;
  step %= length;
  for (int m = 0; m < f; m += 16) {
    Complex part = {0.f, 0.f};
    for (int e = m; e < f && e < m + 16; ++e) {
      part = part + x(e) * root<kInverse>(axis, at * scale);
      at += step;
      if (at >= length) at -= length;
    }
    sum = sum + part;
  }
  return sum;
}

// Any factor f: from s.data into s.other.
template <bool kInverse>
EFFVIT_DEVICE void sum_pass(const Lines& s, const Axis& axis, const LinePlan& plan, int lines, int length, int f) {
  const int M = length / f, step = axis.n / length;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < lines * plan.n; i += kThreads) {
    const int line = i / plan.n, at = i - line * plan.n, block = at / length, inside = at - block * length;
    const int q = inside / M, j = inside - q * M, row = line * plan.pitch, base = block * length + j;
    const auto x = [&](int m) { return s.load(row + padded(base + m * M)); };
    // Forward w_length^((j + m M) q), inverse the conjugate of w_length^((j + q M) m).
    const int64_t start = kInverse ? 0 : static_cast<int64_t>(j) * q;
    const int64_t stride = kInverse ? j + static_cast<int64_t>(q) * M : static_cast<int64_t>(q) * M;
    s.other.template store_vec<Complex>(row + padded(at), long_sum<kInverse>(axis, f, start, stride, length, step, x));
  }
}

// Transforms the first `lines` lines. Barriers: before, once all lines are written, the caller's; one after each pass.
template <bool kInverse>
EFFVIT_DEVICE void transform(Lines& s, const Axis& axis, const LinePlan& plan, int lines) {
  int length = kInverse ? 1 : plan.n;
  EFFVIT_NO_UNROLL
  for (int i = 0; i < plan.count; ++i) {
    const int f = axis.factors[plan.first + (kInverse ? plan.count - 1 - i : i)];
    if (kInverse) length *= f;
    switch (f) {
      case 2:
        radix_pass<2, kInverse>(s, axis, plan, lines, length);
        break;
      case 3:
        radix_pass<3, kInverse>(s, axis, plan, lines, length);
        break;
      case 4:
        radix_pass<4, kInverse>(s, axis, plan, lines, length);
        break;
      case 5:
        radix_pass<5, kInverse>(s, axis, plan, lines, length);
        break;
      case 7:
        radix_pass<7, kInverse>(s, axis, plan, lines, length);
        break;
      case 8:
        radix_pass<8, kInverse>(s, axis, plan, lines, length);
        break;
      case 16:
        radix_pass<16, kInverse>(s, axis, plan, lines, length);
        break;
      default:
        sum_pass<kInverse>(s, axis, plan, lines, length, f);
        s.swap();
    }
    prim::sync_threads();
    if (!kInverse) length /= f;
  }
}

// ---- tables ----

// e^(-2 pi i j / n): from the octant that the angle lies in, by the series of sine and cosine in float64.
EFFVIT_DEVICE Complex root_of_unity(int64_t j, int64_t n) {
  constexpr double kEighth = 0.78539816339744830962;
  const int64_t octant = 8 * j / n;
  const double part = static_cast<double>(8 * j - octant * n) / static_cast<double>(n);
  const bool odd = octant % 2 != 0;
  const double a = (odd ? 1.0 - part : part) * kEighth, z = a * a;
  double c = 0.0, s = 0.0;
  for (int k = 9; k >= 0; --k) {
    c = 1.0 - z / ((2 * k + 1) * (2 * k + 2)) * c;
    s = 1.0 - z / ((2 * k + 2) * (2 * k + 3)) * s;
  }
  s *= a;
  if (odd) s = -s;
  Complex w = {static_cast<float>(c), static_cast<float>(s)};
  for (int64_t turns = (octant + 1) / 2; turns > 0; --turns) w = quarter_turn<true>(w);
  return conjugate(w);
}

// Where the tables of axes are written.
struct Tables {
  Axis axes[3];
  Complex *roots[3] = {}, *turns[3] = {};  // [n]
  int32_t* mirror[3] = {};  // [n]
};

template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_tables_kernel(EFFVIT_GRID_CONSTANT Tables t, Index count) {
  for (Index e = prim::cta_id() * kThreads + prim::thread_id(); e < count; e += prim::cta_count() * kThreads) {
    Index i = e;
    EFFVIT_UNROLL
    for (int a = 0; a < 3; ++a) {
      const Index n = t.axes[a].n;
      if (i >= 0 && i < n) {
        const int32_t frequency = frequency_at(t.axes[a], static_cast<int32_t>(i), 0, t.axes[a].count, t.axes[a].n);
        prim::store_global_vec(t.roots[a] + i, root_of_unity(i, n));
        prim::store_global(t.mirror[a] + i, position_of(t.axes[a], frequency == 0 ? 0 : t.axes[a].n - frequency));
        prim::store_global_vec(t.turns[a] + i, root_of_unity(frequency, 2 * n));
      }
      i -= n;
    }
  }
}

}  // namespace fft_conv_impl
}  // namespace cuda
}  // namespace effvit
