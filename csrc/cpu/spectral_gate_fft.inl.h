// Fourier transforms of any length of kLanes signals side by side: mixed radix, Stockham's order, so that nothing is
// permuted. An element of a line is a vector of real parts and one of imaginary parts behind it.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace spectral_gate_impl {

constexpr int kElement = 2 * kLanes;  // floats of an element of a line
constexpr int kMaxPasses = 64;
constexpr int kLargestRadix = 13;  // prime factors above it take a sum over all pairs
constexpr double kTau = 6.283185307179586;

struct Complex {
  vf re, im;
};

// A pass turns n = r m points at distance `step` of a line into r transforms of m points each, at r times the distance.
struct PassPlan {
  int64_t r, m, step;
  const float* twiddle;  // [m - 1, r - 1, 2] from p = 1 on: exp(-tau i p k / n), k = 1 ..
  const float* trig;  // cos and sin of tau j / r, [2, (r - 1) / 2] of j = 1 ..; of large primes [2, r]; null below 3
};

// How the transform of a length is made of passes, and the numbers it takes.
struct Axis {
  int64_t n = 1;
  int count = 0;
  PassPlan passes[kMaxPasses];
  int64_t large = 0;  // the largest prime factor above kLargestRadix, or 0

  Axis(int64_t length, Scratch& scratch) : n(length) {
    int64_t left = length;
    const auto take = [&](int64_t r) { passes[count++].r = r, left /= r; };
    int twos = 0;
    for (int64_t rest = length; rest % 2 == 0; rest /= 2) ++twos;
    for (const int64_t r : {7, 5, 3, 11, 13}) {
      while (left % r == 0) take(r);
    }
    for (; twos >= 5 || twos == 3; twos -= 3) take(8);
    for (; twos >= 2; twos -= 2) take(4);
    if (twos) take(2);
    for (int64_t r = 17; left > 1; r += 2) {
      if (r * r > left) r = left;
      while (left % r == 0) take(r), large = std::max(large, r);
    }
    int64_t points = length, step = 1;
    for (int i = 0; i < count; ++i) {
      PassPlan& pass = passes[i];
      pass.m = points / pass.r, pass.step = step;
      const bool wide = pass.r > kLargestRadix;
      const int64_t angles = wide ? pass.r : (pass.r - 1) / 2, first = wide ? 0 : 1;
      float* const twiddle = scratch.take<float>((pass.m - 1) * (pass.r - 1) * 2);
      float* const trig = scratch.take<float>(2 * angles);
      pass.twiddle = twiddle, pass.trig = trig;
      if (trig) {
        for (int64_t j = 0; j < angles; ++j) {
          const double angle = kTau * static_cast<double>(j + first) / static_cast<double>(pass.r);
          trig[j] = static_cast<float>(std::cos(angle)), trig[angles + j] = static_cast<float>(std::sin(angle));
        }
        float* to = twiddle;
        for (int64_t p = 1; p < pass.m; ++p) {
          for (int64_t k = 1; k < pass.r; ++k, to += 2) {
            const double angle = kTau * static_cast<double>(p * k % points) / static_cast<double>(points);
            to[0] = static_cast<float>(std::cos(angle)), to[1] = static_cast<float>(-std::sin(angle));
          }
        }
      }
      points = pass.m, step *= pass.r;
    }
  }
};

EFFVIT_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
EFFVIT_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
EFFVIT_INLINE Complex times_minus_i(Complex a) { return {a.im, -a.re}; }

// y = the transform of x, R points.
template <int R>
EFFVIT_INLINE void dft(const Complex (&x)[R], Complex (&y)[R], const float* trig) {
  if constexpr (R == 2) {
    y[0] = x[0] + x[1], y[1] = x[0] - x[1];
  } else if constexpr (R == 4) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = times_minus_i(x[1] - x[3]);
    y[0] = a + c, y[1] = b + d, y[2] = a - c, y[3] = b - d;
  } else if constexpr (R == 8) {
    const Complex even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
    Complex a[4], b[4];
    dft(even, a, trig), dft(odd, b, trig);
    constexpr float kHalf = 0.70710678118654752f;
    const Complex turned[4] = {b[0],
                               {(b[1].re + b[1].im) * kHalf, (b[1].im - b[1].re) * kHalf},
                               times_minus_i(b[2]),
                               {(b[3].im - b[3].re) * kHalf, (b[3].re + b[3].im) * -kHalf}};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) y[k] = a[k] + turned[k], y[k + 4] = a[k] - turned[k];
  } else {
    static_assert(R % 2 == 1);
    constexpr int kHalf = R / 2;
    Complex sum[kHalf], difference[kHalf];
    Complex total = x[0];
#pragma GCC unroll 16
    for (int j = 1; j <= kHalf; ++j) {
      sum[j - 1] = x[j] + x[R - j], difference[j - 1] = x[j] - x[R - j];
      total = total + sum[j - 1];
    }
    y[0] = total;
#pragma GCC unroll 16
    for (int k = 1; k <= kHalf; ++k) {
      Complex a = x[0], b{};
#pragma GCC unroll 16
      for (int j = 1; j <= kHalf; ++j) {
        const int turn = j * k % R, at = turn <= kHalf ? turn : R - turn;
        const vf c = set1(trig[at - 1]), s = set1(trig[kHalf + at - 1]);
        const Complex d = difference[j - 1];
        a.re = fma(c, sum[j - 1].re, a.re), a.im = fma(c, sum[j - 1].im, a.im);
        if (turn <= kHalf) {
          b.re = fma(s, d.re, b.re), b.im = fma(s, d.im, b.im);
        } else {
          b.re = b.re - s * d.re, b.im = b.im - s * d.im;
        }
      }
      y[k] = {a.re + b.im, a.im - b.re}, y[R - k] = {a.re - b.im, a.im + b.re};
    }
  }
}

// A line: where its real parts begin, floats between these, and from a real part to the imaginary one. The inverse
// transform is the transform with real and imaginary parts exchanged.
struct Source {
  const float* re;
  int64_t ld, im;
  EFFVIT_INLINE Complex operator[](int64_t i) const { return {load(re + i * ld), load(re + i * ld + im)}; }
};
struct Target {
  float* re;
  int64_t ld, im;
  EFFVIT_INLINE void put(int64_t i, Complex x) const { store(re + i * ld, x.re), store(re + i * ld + im, x.im); }
};

EFFVIT_INLINE Complex twiddled(Complex x, const float* twiddle) {
  const vf c = set1(twiddle[0]), s = set1(twiddle[1]);
  return {fma(x.re, c, -(x.im * s)), fma(x.re, s, x.im * c)};
}

// One transform of R points, `from.ld` and `to.ld` apart.
template <int R, bool kTwiddled>
EFFVIT_INLINE void run_points(Source from, Target to, const float* trig, const float* twiddle) {
  Complex x[R], y[R];
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j, from.re += from.ld) x[j] = from[0];
  dft(x, y, trig);
#pragma GCC unroll 16
  for (int k = 0; k < R; ++k, to.re += to.ld)
    to.put(0, kTwiddled && k > 0 ? twiddled(y[k], twiddle + 2 * (k - 1)) : y[k]);
}

template <int R>
__attribute__((noinline)) void run_radix(const PassPlan& plan, Source from, Target to) {
  const int64_t m = plan.m, step = plan.step, next_from = from.ld, next_to = to.ld;
  const float *const trig = plan.trig, *twiddle = plan.twiddle;
  from.ld *= step * m, to.ld *= step;
  const auto turn = [&](auto twiddled) __attribute__((always_inline)) {
    Source x = from;
    Target y = to;
    for (int64_t q = 0; q < step; ++q, x.re += next_from, y.re += next_to)
      run_points<R, decltype(twiddled)::value>(x, y, trig, twiddle);
  };
  turn(std::false_type{});
  for (int64_t p = 1; p < m; ++p, twiddle += 2 * (R - 1)) {
    from.re += step * next_from, to.re += R * step * next_to;
    turn(std::true_type{});
  }
}

// A prime radix of any size: sums over all pairs, of x[j] + x[r-j] with cosines and x[j] - x[r-j] with sines.
__attribute__((noinline)) inline void run_prime(const PassPlan& plan, Source from, Target to, float* pairs) {
  constexpr int kBlock = kLanes == 16 ? 4 : 2;
  constexpr int64_t kTerms = 32;  // added up before the rest: the error of one long sum would grow with it
  const int64_t r = plan.r, m = plan.m, step = plan.step, half = r / 2;
  const float *const cosine = plan.trig, *const sine = plan.trig + r;
  const Source pair{pairs, kElement, kLanes};
  const Target make_pair{pairs, kElement, kLanes};
  for (int64_t p = 0; p < m; ++p) {
    const float* const twiddle = plan.twiddle + 2 * (p - 1) * (r - 1) - 2;  // of k at 2 k
    for (int64_t q = 0; q < step; ++q) {
      const Complex first = from[q + step * p];
      Complex total = first, some{};
      for (int64_t j = 1; j <= half; ++j) {
        const Complex a = from[q + step * (p + m * j)], b = from[q + step * (p + m * (r - j))];
        make_pair.put(2 * j - 2, a + b), make_pair.put(2 * j - 1, a - b);
        some = some + (a + b);
        if (j % kTerms == 0) total = total + some, some = Complex{};
      }
      to.put(q + step * r * p, total + some);
      for (int64_t k = 1; k <= half; k += kBlock) {
        Complex a[kBlock], b[kBlock] = {};
        int64_t turn[kBlock];
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) a[i] = first, turn[i] = 0;
        for (int64_t begin = 0; begin < half; begin += kTerms) {
          Complex cosines[kBlock] = {}, sines[kBlock] = {};
          const int64_t end = std::min(begin + kTerms, half);
          for (int64_t j = begin; j < end; ++j) {
            const Complex sum = pair[2 * j], difference = pair[2 * j + 1];
#pragma GCC unroll 4
            for (int i = 0; i < kBlock; ++i) {
              turn[i] += k + i;
              if (turn[i] >= r) turn[i] -= r;
              const vf c = set1(cosine[turn[i]]), s = set1(sine[turn[i]]);
              cosines[i].re = fma(c, sum.re, cosines[i].re), cosines[i].im = fma(c, sum.im, cosines[i].im);
              sines[i].re = fma(s, difference.re, sines[i].re), sines[i].im = fma(s, difference.im, sines[i].im);
            }
          }
#pragma GCC unroll 4
          for (int i = 0; i < kBlock; ++i) a[i] = a[i] + cosines[i], b[i] = b[i] + sines[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) {
          const int64_t at = k + i;
          if (at > half) break;
          Complex y{a[i].re + b[i].im, a[i].im - b[i].re}, z{a[i].re - b[i].im, a[i].im + b[i].re};
          if (p > 0) y = twiddled(y, twiddle + 2 * at), z = twiddled(z, twiddle + 2 * (r - at));
          to.put(q + step * (r * p + at), y), to.put(q + step * (r * p + r - at), z);
        }
      }
    }
  }
}

// Memory that transforms along one axis or the other take: two lines, and the pairs of a large prime.
struct Lines {
  float *a, *b, *pairs;

  Lines(const Axis& one, const Axis& other, Scratch& scratch) {
    const int64_t n = std::max(one.n, other.n);
    a = scratch.take<float>(n * kElement), b = scratch.take<float>(n * kElement);
    pairs = scratch.take<float>(std::max(one.large, other.large) * kElement);
  }
};

struct Line {
  float* data;
  int64_t ld;
};

// The transform of a line, or its inverse without the factor 1/n, and where it then is: in lines.a or b, or, if given,
// at `to`, which is neither of these. Without a pass, for n = 1, it stays where it was.
template <bool kInverse>
inline Line transform(const Axis& axis, const Lines& lines, Line from, Line to = {nullptr, 0}) {
  constexpr int kRe = kInverse ? kLanes : 0, kIm = kInverse ? -kLanes : kLanes;
  for (int i = 0; i < axis.count; ++i) {
    const PassPlan& pass = axis.passes[i];
    const bool last = i + 1 == axis.count && to.data;
    const Line next = last ? to : Line{from.data == lines.a ? lines.b : lines.a, kElement};
    const Source source{from.data + kRe, from.ld, kIm};
    const Target target{next.data + kRe, next.ld, kIm};
    switch (pass.r) {
      case 2:
        run_radix<2>(pass, source, target);
        break;
      case 3:
        run_radix<3>(pass, source, target);
        break;
      case 4:
        run_radix<4>(pass, source, target);
        break;
      case 5:
        run_radix<5>(pass, source, target);
        break;
      case 7:
        run_radix<7>(pass, source, target);
        break;
      case 8:
        run_radix<8>(pass, source, target);
        break;
      case 11:
        run_radix<11>(pass, source, target);
        break;
      case 13:
        run_radix<13>(pass, source, target);
        break;
      default:
        run_prime(pass, source, target, lines.pairs);
    }
    from = next;
  }
  return from;
}

}  // namespace spectral_gate_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
