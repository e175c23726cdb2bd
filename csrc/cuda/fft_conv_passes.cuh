// Kernels of fft_conv that work on signals and grids in global memory: packing, passes along an axis, and what becomes
// of results. Grids of complex numbers are [rows, NX, NY, n], in place.
//
// A real signal is a complex one of half its length along Z, neighbours being real and imaginary part; where the
// transform's size along Z is odd, one of its own length. A row never meets another one: its rounding errors are
// relative to itself. Rows are those of the batch and the channels of the chunk that is in work: b channels + c.
#pragma once
#include "../common/fft_conv_params.h"
#include "fft_conv_transform.cuh"

namespace effvit {
namespace cuda {
namespace fft_conv_impl {

enum Act : int32_t { kNone, kGelu, kSilu };

struct Problem {
  FftConvParams p;
  Axis axes[3];  // X, Y, Z: as transforms have them
  int32_t grid = 1;  // their sizes' product
  bool halved = true;  // two places along Z are a complex number
  int32_t z_places = 1, size = 1;  // complex numbers along Z that a signal has, and in all
  int64_t per_kernel = 1;  // rows of the batch that share a kernel
  int64_t first_channel = 0, channels = 1;  // of the chunk
  float scale = 1.f;  // 1 / grid: what an inverse transform is divided by
};

EFFVIT_DEVICE int64_t first_index() { return prim::cta_id() * kThreads + prim::thread_id(); }
EFFVIT_DEVICE int64_t all_threads() { return prim::cta_count() * kThreads; }

struct Place {
  int32_t x, y, z;
};
EFFVIT_DEVICE Place place_of(int32_t i, int32_t ny, int32_t nz) {
  const int32_t line = i / nz;
  return {line / ny, line % ny, i - line * nz};
}
EFFVIT_DEVICE Place grid_place(const Problem& g, int32_t i) { return place_of(i, g.axes[1].n, g.axes[2].n); }
EFFVIT_DEVICE Place signal_place(const Problem& g, int32_t i) {
  return place_of(i, static_cast<int32_t>(g.p.Y), g.z_places);
}
EFFVIT_DEVICE int32_t grid_index(const Problem& g, const Place& at) {
  return (at.x * g.axes[1].n + at.y) * g.axes[2].n + at.z;
}
EFFVIT_DEVICE bool inside(const Problem& g, const Place& at) {
  return at.x < g.p.X && at.y < g.p.Y && at.z < g.z_places;
}
// f(place in the map, element) for the one or two elements of a complex number of a signal.
template <class F>
EFFVIT_DEVICE void for_each_part(const Problem& g, const Place& at, const F& f) {
  const int32_t z = g.halved ? 2 * at.z : at.z;
  f(Place{at.x, at.y, z}, 0);
  if (g.halved && z + 1 < g.p.Z) f(Place{at.x, at.y, z + 1}, 1);
}
EFFVIT_DEVICE float part_of(const Complex& x, int part) { return part == 0 ? x.re : x.im; }

struct Row {
  int64_t b, channel;
};
EFFVIT_DEVICE Row row_of(const Problem& g, int64_t row) {
  const int64_t c = tile::take_index(row, g.channels);
  return {row, g.first_channel + c};
}

EFFVIT_DEVICE int64_t map_offset(const FftConvStrides& s, const Row& row, const Place& at) {
  return row.b * s.b + row.channel * s.c + at.x * s.x + at.y * s.y + at.z * s.z;
}
template <class T>
EFFVIT_DEVICE float load_map(const void* map, int64_t offset) {
  return prim::to_float(prim::load_global(static_cast<const T*>(map) + offset));
}
template <class T>
EFFVIT_DEVICE void store_map(void* map, int64_t offset, float x) {
  prim::store_global(static_cast<T*>(map) + offset, prim::from_float<T>(x));
}
// u times its gate.
template <class T>
EFFVIT_DEVICE float load_input(const FftConvParams& p, const Row& row, const Place& at) {
  const float u = load_map<T>(p.u, map_offset(p.u_stride, row, at));
  return p.pregate == nullptr ? u : u * load_map<T>(p.pregate, map_offset(p.pregate_stride, row, at));
}
EFFVIT_DEVICE float skip_of(const FftConvParams& p, int64_t c) {
  return p.d == nullptr ? 0.f : load_small(p.d, c, p.d_dtype);
}

// act(x) and its derivative.
EFFVIT_DEVICE float activation(int32_t act, float x, float& slope) {
  slope = 1.f;
  if (act == kNone) return x;
  if (act == kGelu) {
    float density;
    const float half = math::normal_cdf(x, &density);
    slope = half + x * density;
    return x * half;
  }
  const float s = 1.f / (1.f + prim::exp(-x));
  slope = s * (1.f + x * (1.f - s));
  return x * s;
}

template <class T>
EFFVIT_DEVICE void store_result(const FftConvParams& p, const Row& row, const Place& at, float y, float skip) {
  if (p.d != nullptr) y += skip * load_input<T>(p, row, at);
  float slope, out = activation(p.act, y, slope);
  if (p.postgate != nullptr) out *= load_map<T>(p.postgate, map_offset(p.postgate_stride, row, at));
  store_map<T>(p.out, map_offset(p.out_stride, row, at), out);
}
// The gradient of y + d u', and that of the gate, which is stored. y is of use only where keeps_y is true.
EFFVIT_HD bool keeps_y(const FftConvParams& p) { return p.act != kNone || p.postgate != nullptr; }
template <class T>
EFFVIT_DEVICE float gradient_of_sum(const FftConvParams& p, const Row& row, const Place& at, float y, float skip) {
  const float grad = load_map<T>(p.grad_out, map_offset(p.grad_out_stride, row, at));
  if (!keeps_y(p)) return grad;
  if (p.d != nullptr) y += skip * load_input<T>(p, row, at);
  float slope, result = activation(p.act, y, slope);
  if (p.postgate == nullptr) return grad * slope;
  store_map<T>(p.dpostgate, map_offset(p.out_stride, row, at), grad * result);
  return grad * load_map<T>(p.postgate, map_offset(p.postgate_stride, row, at)) * slope;
}
template <class T>
EFFVIT_DEVICE void store_input_gradient(const FftConvParams& p, const Row& row, const Place& at, float grad) {
  const int64_t to = map_offset(p.out_stride, row, at);
  if (p.pregate == nullptr) {
    store_map<T>(p.du, to, grad);
  } else {
    store_map<T>(p.du, to, grad * load_map<T>(p.pregate, map_offset(p.pregate_stride, row, at)));
    store_map<T>(p.dpregate, to, grad * load_map<T>(p.u, map_offset(p.u_stride, row, at)));
  }
}

// ---- a pass along an axis ----

struct Pass {
  Axis axis;
  LinePlan plan;
  int64_t total = 0;  // lines
  int64_t inner = 1;  // elements from one to the next of a line
  int64_t rest = 1;  // of these: those of the axes after this one
  int32_t length = 1;  // of the blocks that this pass takes apart: n times what later passes do
  Complex* data = nullptr;
  Complex* to = nullptr;  // of a factor that no shared memory holds: where the results go
};

EFFVIT_DEVICE int64_t line_start(const Pass& g, int64_t line, int64_t& i) {
  const int64_t block = line / g.inner;
  i = line - block * g.inner;
  return block * g.plan.n * g.inner + i;
}

// What a line's number q is multiplied with on the way to or from the later passes.
template <bool kInverse>
EFFVIT_DEVICE Complex between(const Pass& g, Complex x, int32_t q, int64_t i) {
  const int64_t j = i / g.rest;
  if (j == 0) return x;
  const int32_t k = frequency_at(g.axis, q, g.plan.first, g.plan.count, g.plan.n);
  return x * root<kInverse>(g.axis, j * k * (g.axis.n / g.length));
}

template <bool kInverse>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_pass_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const int n = g.plan.n;
  for (int64_t first = prim::cta_id() * g.plan.lines; first < g.total; first += prim::cta_count() * g.plan.lines) {
    Lines s(g.plan, 0);
    const int lines = static_cast<int>(least(g.total - first, g.plan.lines));
    // Neighbours in memory: of a line, or of the same place in several.
    const auto each = [&](const auto& f) {
      for (int e = prim::thread_id(); e < lines * n; e += kThreads) {
        const int line = g.inner == 1 ? e / n : e % lines, q = g.inner == 1 ? e - line * n : e / lines;
        int64_t i;
        const int64_t start = line_start(g, first + line, i);
        f(line * g.plan.pitch + padded(q), q, i, g.data + start + q * g.inner);
      }
    };
    each([&](int at, int q, int64_t i, const Complex* from) {
      const Complex x = prim::load_global_vec<Complex>(from);
      s.store(at, kInverse ? between<true>(g, x, q, i) : x);
    });
    prim::sync_threads();
    transform<kInverse>(s, g.axis, g.plan, lines);
    each([&](int at, int q, int64_t i, Complex* to) {
      const Complex x = s.load(at);
      prim::store_global_vec(to, kInverse ? x : between<false>(g, x, q, i));
    });
    prim::sync_threads();  // the readers of the lines
  }
}

// A factor that no shared memory holds: every result from global memory.
template <bool kInverse>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_long_pass_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const int64_t n = g.plan.n, later = g.length / n;
  for (int64_t e = first_index(); e < g.total * n; e += all_threads()) {
    const int64_t block = e / (n * g.inner), inside = e - block * n * g.inner, q = inside / g.inner;
    const int64_t i = inside - q * g.inner, j = i / g.rest;
    const Complex* const from = g.data + block * n * g.inner + i;
    const auto x = [&](int m) { return prim::load_global_vec<Complex>(from + m * g.inner); };
    const int64_t start = kInverse ? 0 : j * q, step = kInverse ? j + q * later : q * later;
    prim::store_global_vec(
        g.to + e, long_sum<kInverse>(g.axis, static_cast<int>(n), start, step, g.length, g.axis.n / g.length, x));
  }
}

// ---- signals ----

template <class T>
EFFVIT_DEVICE Complex load_inputs(const Problem& g, const Row& row, const Place& at) {
  float x[2] = {0.f, 0.f};
  for_each_part(g, at, [&](const Place& place, int part) { x[part] = load_input<T>(g.p, row, place); });
  return {x[0], x[1]};
}
template <class T>
EFFVIT_DEVICE void store_results(const Problem& g, const Row& row, const Place& at, const Complex& y) {
  const float skip = skip_of(g.p, row.channel);
  for_each_part(g, at, [&](const Place& place, int part) { store_result<T>(g.p, row, place, part_of(y, part), skip); });
}
template <class T>
EFFVIT_DEVICE Complex gradients_of_sums(const Problem& g, const Row& row, const Place& at, const Complex& y) {
  float x[2] = {0.f, 0.f};
  const float skip = skip_of(g.p, row.channel);
  for_each_part(g, at, [&](const Place& place, int part) {
    x[part] = gradient_of_sum<T>(g.p, row, place, part_of(y, part), skip);
  });
  return {x[0], x[1]};
}
// grad: of u' but for the skip's part; sum: the gradient of y + d u'.
template <class T>
EFFVIT_DEVICE void store_input_gradients(const Problem& g, const Row& row, const Place& at, Complex grad,
                                         const Complex& sum) {
  const float skip = skip_of(g.p, row.channel);
  grad = grad + Complex{skip * sum.re, skip * sum.im};
  for_each_part(g, at,
                [&](const Place& place, int part) { store_input_gradient<T>(g.p, row, place, part_of(grad, part)); });
}

// The input with zeros behind it.
template <class T>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_pack_kernel(EFFVIT_GRID_CONSTANT Problem g, Complex* to /* [rows, grid] */) {
  for (int64_t e = first_index(); e < g.p.B * g.channels * g.grid; e += all_threads()) {
    const int64_t row = e / g.grid;
    const Place at = grid_place(g, static_cast<int32_t>(e - row * g.grid));
    prim::store_global_vec(to + e, inside(g, at) ? load_inputs<T>(g, row_of(g, row), at) : Complex{0.f, 0.f});
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_out_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* y /* [rows, grid] */) {
  for (int64_t e = first_index(); e < g.p.B * g.channels * g.size; e += all_threads()) {
    const int64_t row = e / g.size;
    const Place at = signal_place(g, static_cast<int32_t>(e - row * g.size));
    const Complex x = prim::load_global_vec<Complex>(y + row * g.grid + grid_index(g, at));
    store_results<T>(g, row_of(g, row), at, x);
  }
}

// The gradient of y + d u', in place of y, and zeros around it; and without these, for the gradients of d and of u.
template <class T>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_bwd_sum_kernel(EFFVIT_GRID_CONSTANT Problem g, Complex* y /* [rows, grid] */,
                        Complex* packed /* [rows, size], or null */) {
  for (int64_t e = first_index(); e < g.p.B * g.channels * g.grid; e += all_threads()) {
    const int64_t row = e / g.grid;
    const Place at = grid_place(g, static_cast<int32_t>(e - row * g.grid));
    Complex grad = {0.f, 0.f};
    if (inside(g, at)) {
      const Complex x = keeps_y(g.p) ? prim::load_global_vec<Complex>(y + e) : grad;
      grad = gradients_of_sums<T>(g, row_of(g, row), at, x);
      if (packed != nullptr)
        prim::store_global_vec(packed + row * g.size + (at.x * g.p.Y + at.y) * g.z_places + at.z, grad);
    }
    prim::store_global_vec(y + e, grad);
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_bwd_input_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* grad /* [rows, grid] */,
                          const Complex* packed /* [rows, size], or null */) {
  for (int64_t e = first_index(); e < g.p.B * g.channels * g.size; e += all_threads()) {
    const int64_t row = e / g.size;
    const Place at = signal_place(g, static_cast<int32_t>(e - row * g.size));
    const Complex x = prim::load_global_vec<Complex>(grad + row * g.grid + grid_index(g, at));
    const Complex sum = packed == nullptr ? Complex{0.f, 0.f} : prim::load_global_vec<Complex>(packed + e);
    store_input_gradients<T>(g, row_of(g, row), at, x, sum);
  }
}

// Sums of u' times the gradient of y + d u': a CTA takes a share of a channel's places.
template <class T>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_bwd_skip_kernel(EFFVIT_GRID_CONSTANT Problem g, const Complex* packed /* [rows, size] */, int64_t splits,
                         float* parts /* [channels, splits] */) {
  const Shared<float> sums(0, kThreads);
  const int64_t places = g.p.B * g.size, share = ceil_div(places, splits);
  for (int64_t unit = prim::cta_id(); unit < g.channels * splits; unit += prim::cta_count()) {
    const int64_t c = unit / splits, first = (unit - c * splits) * share, last = least(first + share, places);
    float sum = 0.f;
    for (int64_t i = first + prim::thread_id(); i < last; i += kThreads) {
      const int64_t b = i / g.size, row = b * g.channels + c;
      const auto within = static_cast<int32_t>(i - b * g.size);
      const Complex x = prim::load_global_vec<Complex>(packed + row * g.size + within);
      const Complex u = load_inputs<T>(g, {b, g.first_channel + c}, signal_place(g, within));
      sum += x.re * u.re + x.im * u.im;
    }
    sums.store(prim::thread_id(), sum);
    prim::sync_threads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (prim::thread_id() < half)
        sums.store(prim::thread_id(), sums.load(prim::thread_id()) + sums.load(prim::thread_id() + half));
      prim::sync_threads();
    }
    if (prim::thread_id() == 0) prim::store_global(parts + unit, sums.load(0));
    prim::sync_threads();  // the reader of the sum
  }
}

template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_skip_sum_kernel(EFFVIT_GRID_CONSTANT Problem g, Index splits, const float* parts) {
  for (Index c = first_index(); c < g.channels; c += all_threads()) {
    float sum = 0.f;
    for (Index s = 0; s < splits; ++s) sum += prim::load_global(parts + c * splits + s);
    store_small(g.p.dd, g.first_channel + c, g.p.d_dtype, sum);
  }
}

}  // namespace fft_conv_impl
}  // namespace cuda
}  // namespace effvit
