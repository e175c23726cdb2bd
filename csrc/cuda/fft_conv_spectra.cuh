// Kernels of fft_conv that make the spectra of kernels, multiply with them, and take their gradients apart.
//
// Where a real signal x is a complex one of half its length M, z = even + i odd elements, its transform is
// Z = E + i O, the transforms of these two, and with Z' the conjugate of Z at the negative frequency E = (Z + Z') / 2,
// i O = (Z - Z') / 2. A convolution with a kernel whose even and odd taps have the transforms He and Ho has the result
// E He + w O Ho + i (E Ho + O He), w = e^(-2 pi i k / M), which is A Z + B Z' with
//   A = He + i Ho (1 - w) / 2,   B = i Ho (1 + w) / 2.
// The transposed map, which is what gradients take, is conj(A) Z + B' Z' with B' the B of the negative frequency. The
// kernel's own spectrum S at k and k + M is He +- t Ho, t = e^(-2 pi i k / 2M). Along X and Y frequencies are negated
// as well. Where Z is not halved, A is the spectrum and B zero.
#pragma once
#include "fft_conv_passes.cuh"

namespace effvit {
namespace cuda {
namespace fft_conv_impl {

EFFVIT_DEVICE int32_t wrapped(int64_t i, int32_t n) {
  const int32_t rest = static_cast<int32_t>(i % n);
  return rest < 0 ? rest + n : rest;
}

// Frequencies of a place of a spectrum.
EFFVIT_DEVICE Place frequencies_at(const Problem& g, const Place& at) {
  return {frequency_at(g.axes[0], at.x, 0, g.axes[0].count, g.axes[0].n),
          frequency_at(g.axes[1], at.y, 0, g.axes[1].count, g.axes[1].n),
          frequency_at(g.axes[2], at.z, 0, g.axes[2].count, g.axes[2].n)};
}
// Of the transform of the whole, whose size along Z is not that of a halved axis.
EFFVIT_DEVICE Place negated(const Problem& g, const Place& f) {
  return {wrapped(-f.x, g.axes[0].n), wrapped(-f.y, g.axes[1].n), wrapped(-f.z, static_cast<int32_t>(g.p.NZ))};
}
EFFVIT_DEVICE bool keeps(int32_t f, int32_t n, int64_t keep) { return keep == 0 || min_of(f, n - f) < keep; }
EFFVIT_DEVICE bool keeps(const Problem& g, const Place& f) {
  return keeps(f.x, g.axes[0].n, g.p.keep_x) && keeps(f.y, g.axes[1].n, g.p.keep_y) &&
         keeps(f.z, static_cast<int32_t>(g.p.NZ), g.p.keep_z);
}
EFFVIT_HD bool keeps_all(const FftConvParams& p) { return p.keep_x == 0 && p.keep_y == 0 && p.keep_z == 0; }

// The sum of the taps of [KX, KY, KZ] that meet at a place, a tap's place being its index modulo the sizes.
EFFVIT_DEVICE float sum_of_taps(const void* taps, DType type, int64_t first, int64_t KX, int64_t KY, int64_t KZ,
                                const FftConvParams& p, const Place& at) {
  float sum = 0.f;
  for (int64_t x = at.x; x < KX; x += p.NX) {
    for (int64_t y = at.y; y < KY; y += p.NY) {
      for (int64_t z = at.z; z < KZ; z += p.NZ) sum += load_small(taps, first + (x * KY + y) * KZ + z, type);
    }
  }
  return sum;
}

// The signal whose transform is the spectrum over the grid's size: taps at their lags.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_taps_kernel(EFFVIT_GRID_CONSTANT Problem g, Complex* to /* [J, channels, grid] */) {
  const FftConvParams& p = g.p;
  const auto NX = static_cast<int32_t>(p.NX), NY = static_cast<int32_t>(p.NY), NZ = static_cast<int32_t>(p.NZ);
  for (Index e = first_index(); e < p.J * g.channels * g.grid; e += all_threads()) {
    const Index row = e / g.grid, j = row / g.channels, matrix = j * p.C + g.first_channel + row - j * g.channels;
    const Place at = grid_place(g, static_cast<int32_t>(e - row * g.grid));
    float sum[2] = {0.f, 0.f};
    EFFVIT_UNROLL
    for (int part = 0; part < 2; ++part) {
      if (part == 1 && !g.halved) continue;
      const int32_t z = g.halved ? 2 * at.z + part : at.z;
      const Place tap = {wrapped(at.x + p.shift_x, NX), wrapped(at.y + p.shift_y, NY), wrapped(z + p.shift_z, NZ)};
      sum[part] = sum_of_taps(p.k, p.k_dtype, matrix * p.KX * p.KY * p.KZ, p.KX, p.KY, p.KZ, p, tap);
      if (p.k_rev != nullptr) {
        const Place back = {wrapped(-at.x, NX), wrapped(-at.y, NY), wrapped(-z, NZ)};
        sum[part] += sum_of_taps(p.k_rev, p.k_rev_dtype, matrix * p.RX * p.RY * p.RZ, p.RX, p.RY, p.RZ, p, back);
      }
    }
    const float scale = p.kernel_scale * g.scale;
    prim::store_global_vec(to + e, Complex{sum[0] * scale, sum[1] * scale});
  }
}

struct alignas(16) Coefficients {
  Complex a, b;
};

EFFVIT_DEVICE Complex times_i(Complex x) { return {-x.im, x.re}; }
EFFVIT_DEVICE Complex half(Complex x) { return {0.5f * x.re, 0.5f * x.im}; }
EFFVIT_DEVICE Complex load_grid(const Complex* x, int64_t i) { return prim::load_global_vec<Complex>(x + i); }

// The index in a grid of the negative of the frequency at a place.
EFFVIT_DEVICE int32_t mirrored(const Problem& g, const Place& at) {
  return grid_index(g, {prim::load_global(g.axes[0].mirror + at.x), prim::load_global(g.axes[1].mirror + at.y),
                        prim::load_global(g.axes[2].mirror + at.z)});
}
EFFVIT_DEVICE Complex turn_at(const Problem& g, int32_t z) {
  return prim::load_global_vec<Complex>(g.axes[2].turns + z);
}

// Transforms of even and of odd elements: from that of the complex signal and its mirror image, and back.
struct Parts {
  Complex even, odd;
};
EFFVIT_DEVICE Parts parts_of(Complex z, Complex mirror) {
  const Complex m = conjugate(mirror), odd = half(z - m);
  return {half(z + m), {odd.im, -odd.re}};
}
EFFVIT_DEVICE Complex joined(const Parts& x) { return x.even + times_i(x.odd); }
EFFVIT_DEVICE Complex joined_mirror(const Parts& x) { return conjugate(x.even) + times_i(conjugate(x.odd)); }

// The full spectrum at frequencies k and k + M of Z, and back; t = e^(-2 pi i k / 2M).
EFFVIT_DEVICE Parts spectrum_of(const Parts& x, Complex t) {
  const Complex odd = x.odd * t;
  return {x.even + odd, x.even - odd};
}
EFFVIT_DEVICE Parts parts_of_spectrum(const Parts& s, Complex t) {
  return {half(s.even + s.odd), half(s.even - s.odd) * conjugate(t)};
}

// Zeros where frequencies f and f + (0, 0, M) are not kept.
EFFVIT_DEVICE Parts kept(const Problem& g, const Place& f, Parts s) {
  if (!keeps(g, f)) s.even = {0.f, 0.f};
  if (!keeps(g, {f.x, f.y, f.z + g.axes[2].n})) s.odd = {0.f, 0.f};
  return s;
}

EFFVIT_DEVICE Coefficients coefficients_of(const Parts& x, Complex t) {
  const Complex w = t * t, odd = half(times_i(x.odd));
  return {x.even + odd * Complex{1.f - w.re, -w.im}, odd * Complex{1.f + w.re, w.im}};
}

// From transforms of taps to coefficients.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_coefficients_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* taps /* [J, channels, grid] */,
                             Coefficients* to /* [J, channels, grid] */) {
  for (Index e = first_index(); e < g.p.J * g.channels * g.grid; e += all_threads()) {
    const Index row = e / g.grid;
    const Place at = grid_place(g, static_cast<int32_t>(e - row * g.grid)), f = frequencies_at(g, at);
    const Complex x = load_grid(taps, e);
    Coefficients c = {x, {0.f, 0.f}};
    if (g.halved) {
      const Complex t = turn_at(g, at.z);
      Parts parts = parts_of(x, load_grid(taps, row * g.grid + mirrored(g, at)));
      if (!keeps_all(g.p)) parts = parts_of_spectrum(kept(g, f, spectrum_of(parts, t)), t);
      c = coefficients_of(parts, t);
    } else if (!keeps(g, f)) {
      c.a = {0.f, 0.f};
    }
    prim::store_global_vec(to + e, c);
  }
}

EFFVIT_DEVICE Complex load_half(const Problem& g, int64_t matrix, const Place& f) {
  const int64_t i = ((matrix * g.p.NX + f.x) * g.p.NY + f.y) * (g.p.NZ / 2 + 1) + f.z;
  return {prim::load_global(g.p.spectrum + 2 * i), prim::load_global(g.p.spectrum + 2 * i + 1)};
}

// The spectrum that was given, at any frequency. An inverse real transform sees of the planes that are their own mirror
// images along Z the part only that belongs to real kernels.
EFFVIT_DEVICE Complex load_spectrum(const Problem& g, int64_t matrix, const Place& f) {
  const Place mirror = negated(g, f);
  if (f.z == mirror.z) return half(load_half(g, matrix, f) + conjugate(load_half(g, matrix, mirror)));
  return f.z < mirror.z ? load_half(g, matrix, f) : conjugate(load_half(g, matrix, mirror));
}

template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_spectrum_kernel(EFFVIT_GRID_CONSTANT Problem g, Coefficients* to /* [J, channels, grid] */) {
  for (Index e = first_index(); e < g.p.J * g.channels * g.grid; e += all_threads()) {
    const Index row = e / g.grid, j = row / g.channels, matrix = j * g.p.C + g.first_channel + row - j * g.channels;
    const Place at = grid_place(g, static_cast<int32_t>(e - row * g.grid)), f = frequencies_at(g, at);
    Parts s = {load_spectrum(g, matrix, f), {0.f, 0.f}};
    Coefficients c = {s.even, {0.f, 0.f}};
    if (g.halved) {
      const Complex t = turn_at(g, at.z);
      s.odd = load_spectrum(g, matrix, {f.x, f.y, f.z + g.axes[2].n});
      c = coefficients_of(parts_of_spectrum(kept(g, f, s), t), t);
    } else if (!keeps(g, f)) {
      c.a = {0.f, 0.f};
    }
    c.a = {c.a.re * g.scale, c.a.im * g.scale}, c.b = {c.b.re * g.scale, c.b.im * g.scale};
    prim::store_global_vec(to + e, c);
  }
}

// Two mirror images, z at a place and `mirror` at the other, times the kernel's coefficients there, or by the
// transposed map.
template <bool kTransposed>
EFFVIT_DEVICE void multiply(Complex& z, Complex& mirror, const Coefficients& k, const Coefficients& k_mirror) {
  const Complex a = z, b = mirror;
  if constexpr (kTransposed) {
    z = conjugate(k.a) * a + k_mirror.b * conjugate(b);
    mirror = conjugate(k_mirror.a) * b + k.b * conjugate(a);
  } else {
    z = k.a * a + k.b * conjugate(b);
    mirror = k_mirror.a * b + k_mirror.b * conjugate(a);
  }
}

// The correlation of u and grad, that is conj(u) grad of the full spectra: of even and odd lags, joined.
EFFVIT_DEVICE void correlate(const Problem& g, int32_t z, Complex u, Complex u_mirror, Complex grad,
                             Complex grad_mirror, Complex& sum, Complex& sum_mirror) {
  if (!g.halved) {
    sum = sum + conjugate(u) * grad, sum_mirror = sum_mirror + conjugate(u_mirror) * grad_mirror;
    return;
  }
  const Complex t = turn_at(g, z);
  const Parts x = parts_of(u, u_mirror), y = parts_of(grad, grad_mirror);
  const Parts r = {conjugate(x.even) * y.even + conjugate(x.odd) * y.odd,
                   conjugate(x.even) * y.odd + conjugate(x.odd * t * t) * y.even};
  sum = sum + joined(r), sum_mirror = sum_mirror + joined_mirror(r);
}

// to = from times the coefficients of its kernel, or by the transposed map. A thread has two mirror images.
template <bool kTransposed>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_product_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* from /* [rows, grid] */,
                        const Coefficients* kernels /* [J, channels, grid] */, Complex* to /* [rows, grid] */) {
  for (int64_t e = first_index(); e < g.p.B * g.channels * g.grid; e += all_threads()) {
    const int64_t row = e / g.grid, b = row / g.channels, first = row * g.grid;
    const auto i = static_cast<int32_t>(e - first);
    const int32_t m = mirrored(g, grid_place(g, i));
    if (m < i) continue;
    const Coefficients* const k = kernels + (b % g.p.J * g.channels + row - b * g.channels) * g.grid;
    Complex x = load_grid(from, first + i), y = load_grid(from, first + m);
    multiply<kTransposed>(x, y, prim::load_global_vec<Coefficients>(k + i), prim::load_global_vec<Coefficients>(k + m));
    prim::store_global_vec(to + first + i, x);
    if (m != i) prim::store_global_vec(to + first + m, y);
  }
}

// Sums over a kernel's rows of correlations, over the grid's size.
template <class Index>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_bwd_correlate_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* u /* [rows, grid] */,
                              const Complex* grad /* [rows, grid] */, Complex* to /* [J, channels, grid] */) {
  const Index count = g.channels * g.grid;
  for (Index e = first_index(); e < g.p.J * count; e += all_threads()) {
    const Index row = e / g.grid, first = row * g.grid;
    const auto i = static_cast<int32_t>(e - first);
    const Place at = grid_place(g, i);
    const int32_t m = mirrored(g, at);
    if (m < i) continue;
    Complex sum = {0.f, 0.f}, sum_mirror = {0.f, 0.f};
    for (Index q = 0; q < g.per_kernel; ++q) {
      const Index from = first + q * g.p.J * count;
      correlate(g, at.z, load_grid(u, from + i), load_grid(u, from + m), load_grid(grad, from + i),
                load_grid(grad, from + m), sum, sum_mirror);
    }
    prim::store_global_vec(to + first + i, Complex{sum.re * g.scale, sum.im * g.scale});
    if (m != i) prim::store_global_vec(to + first + m, Complex{sum_mirror.re * g.scale, sum_mirror.im * g.scale});
  }
}

// Zeros where frequencies of correlations are not kept.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_keep_kernel(EFFVIT_GRID_CONSTANT Problem g, Complex* sums /* [J, channels, grid] */) {
  for (Index e = first_index(); e < g.p.J * g.channels * g.grid; e += all_threads()) {
    const Index first = e / g.grid * g.grid;
    const auto i = static_cast<int32_t>(e - first);
    const Place at = grid_place(g, i), f = frequencies_at(g, at);
    const int32_t m = mirrored(g, at);
    if (m < i) continue;
    Complex x = load_grid(sums, first + i), y = load_grid(sums, first + m);
    if (g.halved) {
      const Complex t = turn_at(g, at.z);
      const Parts r = parts_of_spectrum(kept(g, f, spectrum_of(parts_of(x, y), t)), t);
      x = joined(r), y = joined_mirror(r);
    } else if (!keeps(g, f)) {
      x = y = {0.f, 0.f};
    }
    prim::store_global_vec(sums + first + i, x);
    if (m != i) prim::store_global_vec(sums + first + m, y);
  }
}

// Gradients of taps: of k at their lags, of k_rev at the negative ones.
template <bool kReverse>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_taps_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* from /* [J, channels, grid] */) {
  const FftConvParams& p = g.p;
  const int64_t KX = kReverse ? p.RX : p.KX, KY = kReverse ? p.RY : p.KY, KZ = kReverse ? p.RZ : p.KZ;
  const int64_t taps = KX * KY * KZ;
  for (int64_t e = first_index(); e < p.J * g.channels * taps; e += all_threads()) {
    const int64_t row = e / taps, j = row / g.channels, matrix = j * p.C + g.first_channel + row - j * g.channels;
    int64_t tap = e - row * taps;
    const int64_t to = matrix * taps + tap;
    const int64_t z = tile::take_index(tap, KZ), y = tile::take_index(tap, KY), x = tap;
    Place at = {wrapped(kReverse ? -x : x - p.shift_x, g.axes[0].n),
                wrapped(kReverse ? -y : y - p.shift_y, g.axes[1].n),
                wrapped(kReverse ? -z : z - p.shift_z, static_cast<int32_t>(p.NZ))};
    const int part = g.halved ? at.z % 2 : 0;
    if (g.halved) at.z /= 2;
    const float grad = part_of(load_grid(from, row * g.grid + grid_index(g, at)), part) * p.kernel_scale;
    store_small(kReverse ? p.dk_rev : p.dk, to, kReverse ? p.k_rev_dtype : p.k_dtype, grad);
  }
}

// The gradient of a spectrum that was given. A frequency that has a mirror image along Z counts for both.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_spectrum_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* from /* [J, channels, grid] */) {
  const Index last = g.p.NZ / 2 + 1, size = g.p.NX * g.p.NY * last;
  for (Index e = first_index(); e < g.p.J * g.channels * size; e += all_threads()) {
    const Index row = e / size, j = row / g.channels, matrix = j * g.p.C + g.first_channel + row - j * g.channels;
    Index rest = e - row * size;
    const Index to = matrix * size + rest;
    const auto z = static_cast<int32_t>(tile::take_index(rest, last));
    const auto y = static_cast<int32_t>(tile::take_index(rest, g.p.NY));
    const Place f = {static_cast<int32_t>(rest), y, z};
    const bool beyond = z == g.axes[2].n;  // the last frequency of a halved axis
    const Place at = {position_of(g.axes[0], f.x), position_of(g.axes[1], f.y),
                      beyond ? 0 : position_of(g.axes[2], f.z)};
    Complex x = {0.f, 0.f};
    if (keeps(g, f)) {
      const Complex a = load_grid(from, row * g.grid + grid_index(g, at));
      const Complex b = load_grid(from, row * g.grid + mirrored(g, at));
      float weight = negated(g, f).z == z ? 1.f : 2.f;
      if (g.halved) {
        const Parts s = spectrum_of(parts_of(a, b), turn_at(g, at.z));
        x = beyond ? s.odd : s.even;
        weight *= 0.5f;  // sums are over half the size of the transform
      } else {
        x = half(a + conjugate(b));
      }
      x = {weight * x.re, weight * x.im};
    }
    prim::store_global(g.p.dspectrum + 2 * to, x.re);
    prim::store_global(g.p.dspectrum + 2 * to + 1, x.im);
  }
}

}  // namespace fft_conv_impl
}  // namespace cuda
}  // namespace effvit
