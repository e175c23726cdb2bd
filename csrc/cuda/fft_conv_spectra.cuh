// Kernels of fft_conv that make the spectra of kernels, multiply with them, and take their gradients apart.
//
// A kernel's grid [J, channels, grid] is its spectrum over the grid's size, zero where frequencies are not kept.
#pragma once
#include "fft_conv_passes.cuh"

namespace effvit {
namespace cuda {
namespace fft_conv_impl {

EFFVIT_DEVICE int32_t wrapped(int64_t i, int32_t n) {
  const int32_t rest = static_cast<int32_t>(i % n);
  return rest < 0 ? rest + n : rest;
}

// Frequencies of a place of the spectrum, and back.
EFFVIT_DEVICE Place frequencies_at(const Problem& g, const Place& at) {
  return {frequency_at(g.axes[0], at.x, 0, g.axes[0].count, g.axes[0].n),
          frequency_at(g.axes[1], at.y, 0, g.axes[1].count, g.axes[1].n),
          frequency_at(g.axes[2], at.z, 0, g.axes[2].count, g.axes[2].n)};
}
EFFVIT_DEVICE int32_t index_of(const Problem& g, const Place& frequency) {
  return grid_index(g, {position_of(g.axes[0], frequency.x), position_of(g.axes[1], frequency.y),
                        position_of(g.axes[2], frequency.z)});
}
EFFVIT_DEVICE Place negated(const Problem& g, const Place& f) {
  return {f.x == 0 ? 0 : g.axes[0].n - f.x, f.y == 0 ? 0 : g.axes[1].n - f.y, f.z == 0 ? 0 : g.axes[2].n - f.z};
}
EFFVIT_DEVICE bool keeps(int32_t f, int32_t n, int64_t keep) { return keep == 0 || min_of(f, n - f) < keep; }
EFFVIT_DEVICE bool keeps(const Problem& g, const Place& f) {
  return keeps(f.x, g.axes[0].n, g.p.keep_x) && keeps(f.y, g.axes[1].n, g.p.keep_y) &&
         keeps(f.z, g.axes[2].n, g.p.keep_z);
}
EFFVIT_HD bool keeps_all(const FftConvParams& p) { return p.keep_x == 0 && p.keep_y == 0 && p.keep_z == 0; }

// The sum of the taps of [KX, KY, KZ] that meet at a place, a tap's place being its index modulo the sizes.
EFFVIT_DEVICE float sum_of_taps(const void* taps, DType type, int64_t first, int64_t KX, int64_t KY, int64_t KZ,
                                const Problem& g, const Place& at) {
  float sum = 0.f;
  for (int64_t x = at.x; x < KX; x += g.axes[0].n) {
    for (int64_t y = at.y; y < KY; y += g.axes[1].n) {
      for (int64_t z = at.z; z < KZ; z += g.axes[2].n) sum += load_small(taps, first + (x * KY + y) * KZ + z, type);
    }
  }
  return sum;
}

// The signal whose transform is the spectrum over the grid's size: taps at their lags.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_taps_kernel(EFFVIT_GRID_CONSTANT Problem g, Complex* to /* [J, channels, grid] */) {
  const FftConvParams& p = g.p;
  for (Index e = first_index(); e < p.J * g.channels * g.grid; e += all_threads()) {
    const Index row = e / g.grid, j = row / g.channels, matrix = j * p.C + g.first_channel + row - j * g.channels;
    const Place at = grid_place(g, static_cast<int32_t>(e - row * g.grid));
    const Place tap = {wrapped(at.x + p.shift_x, g.axes[0].n), wrapped(at.y + p.shift_y, g.axes[1].n),
                       wrapped(at.z + p.shift_z, g.axes[2].n)};
    float sum = sum_of_taps(p.k, p.k_dtype, matrix * p.KX * p.KY * p.KZ, p.KX, p.KY, p.KZ, g, tap);
    if (p.k_rev != nullptr)
      sum += sum_of_taps(p.k_rev, p.k_rev_dtype, matrix * p.RX * p.RY * p.RZ, p.RX, p.RY, p.RZ, g, negated(g, at));
    prim::store_global_vec(to + e, Complex{sum * p.kernel_scale * g.scale, 0.f});
  }
}

// Zeros where a frequency is not kept.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_keep_kernel(EFFVIT_GRID_CONSTANT Problem g, Complex* spectra /* [J, channels, grid] */) {
  for (Index e = first_index(); e < g.p.J * g.channels * g.grid; e += all_threads()) {
    const Place at = grid_place(g, static_cast<int32_t>(e % g.grid));
    if (!keeps(g, frequencies_at(g, at))) prim::store_global_vec(spectra + e, Complex{0.f, 0.f});
  }
}

EFFVIT_DEVICE Complex load_half(const Problem& g, int64_t matrix, const Place& f) {
  const int64_t half = g.axes[2].n / 2 + 1;
  const int64_t i = ((matrix * g.axes[0].n + f.x) * g.axes[1].n + f.y) * half + f.z;
  return {prim::load_global(g.p.spectrum + 2 * i), prim::load_global(g.p.spectrum + 2 * i + 1)};
}

// The spectrum that was given, in the order of transforms. An inverse real transform sees of the planes that are their
// own mirror images along Z the part only that belongs to real kernels.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_spectrum_kernel(EFFVIT_GRID_CONSTANT Problem g, Complex* to /* [J, channels, grid] */) {
  for (Index e = first_index(); e < g.p.J * g.channels * g.grid; e += all_threads()) {
    const Index row = e / g.grid, j = row / g.channels, matrix = j * g.p.C + g.first_channel + row - j * g.channels;
    const Place f = frequencies_at(g, grid_place(g, static_cast<int32_t>(e - row * g.grid)));
    const Place mirror = negated(g, f);
    Complex x = {0.f, 0.f};
    if (keeps(g, f)) {
      if (f.z == mirror.z) {
        const Complex a = load_half(g, matrix, f), b = conjugate(load_half(g, matrix, mirror));
        x = {0.5f * (a.re + b.re), 0.5f * (a.im + b.im)};
      } else {
        x = f.z < mirror.z ? load_half(g, matrix, f) : conjugate(load_half(g, matrix, mirror));
      }
    }
    prim::store_global_vec(to + e, Complex{x.re * g.scale, x.im * g.scale});
  }
}

// to = from times the spectrum of its kernel, or the conjugate of that.
template <bool kConjugate>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_product_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* from /* [rows, grid] */,
                        const Complex* spectra /* [J, channels, grid] */, Complex* to /* [rows, grid] */) {
  for (int64_t e = first_index(); e < g.p.J * g.pairs * g.channels * g.grid; e += all_threads()) {
    const int64_t row = e / g.grid, pair = row / g.channels, kernel = pair / g.pairs * g.channels;
    const Complex k =
        prim::load_global_vec<Complex>(spectra + (kernel + row - pair * g.channels) * g.grid + (e - row * g.grid));
    prim::store_global_vec(to + e, prim::load_global_vec<Complex>(from + e) * (kConjugate ? conjugate(k) : k));
  }
}

// The gradient of a kernel's spectrum but for its mirror image: sum over its rows of conj(u) grad, over the grid's
// size. In an inverse transform the part that does not belong to a real kernel becomes the imaginary part.
template <class Index>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_bwd_correlate_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* u /* [rows, grid] */,
                              const Complex* grad /* [rows, grid] */, Complex* to /* [J, channels, grid] */) {
  const Index count = g.channels * g.grid;
  for (Index e = first_index(); e < g.p.J * count; e += all_threads()) {
    const Index kernel = e / count, first = kernel * g.pairs * count + (e - kernel * count);
    Complex sum = {0.f, 0.f};
    for (Index q = 0; q < g.pairs; ++q)
      sum = sum + conjugate(prim::load_global_vec<Complex>(u + first + q * count)) *
                      prim::load_global_vec<Complex>(grad + first + q * count);
    prim::store_global_vec(to + e, Complex{sum.re * g.scale, sum.im * g.scale});
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
    const Place at = {wrapped(kReverse ? -x : x - p.shift_x, g.axes[0].n),
                      wrapped(kReverse ? -y : y - p.shift_y, g.axes[1].n),
                      wrapped(kReverse ? -z : z - p.shift_z, g.axes[2].n)};
    const float grad = prim::load_global_vec<Complex>(from + row * g.grid + grid_index(g, at)).re * p.kernel_scale;
    store_small(kReverse ? p.dk_rev : p.dk, to, kReverse ? p.k_rev_dtype : p.k_dtype, grad);
  }
}

// The gradient of a spectrum that was given. A frequency that has a mirror image along Z counts for both.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_spectrum_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* from /* [J, channels, grid] */) {
  const Index half = g.axes[2].n / 2 + 1, size = g.axes[0].n * static_cast<Index>(g.axes[1].n) * half;
  for (Index e = first_index(); e < g.p.J * g.channels * size; e += all_threads()) {
    const Index row = e / size, j = row / g.channels, matrix = j * g.p.C + g.first_channel + row - j * g.channels;
    Index rest = e - row * size;
    const Index to = matrix * size + rest;
    const auto z = static_cast<int32_t>(tile::take_index(rest, half));
    const auto y = static_cast<int32_t>(tile::take_index(rest, g.axes[1].n));
    const Place f = {static_cast<int32_t>(rest), y, z}, mirror = negated(g, f);
    Complex x = {0.f, 0.f};
    if (keeps(g, f)) {
      const Complex a = prim::load_global_vec<Complex>(from + row * g.grid + index_of(g, f));
      const Complex b = prim::load_global_vec<Complex>(from + row * g.grid + index_of(g, mirror));
      const float weight = f.z == mirror.z ? 0.5f : 1.f;
      x = {weight * (a.re + b.re), weight * (a.im - b.im)};
    }
    prim::store_global(g.p.dspectrum + 2 * to, x.re);
    prim::store_global(g.p.dspectrum + 2 * to + 1, x.im);
  }
}

}  // namespace fft_conv_impl
}  // namespace cuda
}  // namespace effvit
