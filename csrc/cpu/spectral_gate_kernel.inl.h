// spectral_gate on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// Lanes are channels: kLanes of them at a time, so that nothing is transposed. A map of one sample goes into a plane of
// scratch row by row, two rows as the real and the imaginary part of one line, of which half a spectrum each is kept.
// Then column after column is transformed, gated and transformed back, and the rows return the way they came.
// Of the bins 0 and W/2 the rows take the real part, as torch.fft does.
// Forward: a unit is kLanes channels of a sample. Backward: dx is the same with the conjugate of the weight, and
// dweight = sum over the samples of conj(X) dY, twice that for bins that stand for two. A unit is kLanes channels of a
// run of samples of one weight, whose sum it keeps; sums of several runs are added in a second step.
#pragma once

#include "spectral_gate_fft.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace spectral_gate_impl {

using Params = SpectralGateParams;

constexpr int64_t kUnits = 32;
constexpr int kSamples = 16;  // added up before they meet the sum of all: one long sum loses digits
constexpr int64_t kPartialBytes = 8 << 20;  // what the sums of all runs may take

struct Geometry {
  int64_t blocks;  // of channels
  int64_t runs;  // of the samples of a weight, in backward
  int64_t ld;  // floats of a row of a plane: an odd number of elements, so that columns spread over the cache
  int64_t bins, sum_floats;  // of a weight, and floats of the sum of a block of channels

  explicit Geometry(const Params& p) {
    blocks = ceil_div(p.C, kLanes);
    ld = (p.F | 1) * kElement;
    bins = p.H * p.F;
    sum_floats = bins * kElement;
    const int64_t all = p.G * blocks, fit = kPartialBytes / (all * sum_floats * static_cast<int64_t>(sizeof(float)));
    const int64_t wanted = small_tiles() ? 3 : ceil_div(kUnits, all);
    runs = std::max<int64_t>(1, std::min({p.N, wanted, fit}));
  }
};

// A vector of real parts and one of imaginary parts of `left` complex numbers, zeros behind them.
EFFVIT_INLINE Complex load_complex(const float* p, int left) {
  alignas(64) float some[kElement] = {};
  if (left < kLanes) {
    for (int i = 0; i < 2 * left; ++i) some[i] = p[i];
    p = some;
  }
  const vf a = load(p), b = load(p + kLanes);
#if EFFVIT_LANES == 4
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6), __builtin_shufflevector(a, b, 1, 3, 5, 7)};
#elif EFFVIT_LANES == 8
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)};
#else
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
#endif
}

// What all passes share: the two axes, and memory for lines.
template <class T>
struct Transforms {
  const Params& p;
  const Geometry& g;
  const Axis rows, columns;
  const Lines lines;

  Transforms(const Params& params, const Geometry& geometry, Scratch& scratch)
      : p(params), g(geometry), rows(p.W, scratch), columns(p.H, scratch), lines(rows, columns, scratch) {}

  int left_of(int64_t block) const { return static_cast<int>(std::min<int64_t>(kLanes, p.C - block * kLanes)); }

  // Rows of a map of `left` channels -> plane, twice the half spectrum of each.
  void rows_to_plane(const T* map, int64_t stride_y, int64_t stride_x, int left, float* plane) const {
    const int64_t W = p.W, F = p.F;
    for (int64_t h = 0; h < p.H; h += 2) {
      const bool two = h + 1 < p.H;
      const T *const first = map + h * stride_y, *const second = two ? first + stride_y : nullptr;
      read_rows(first, second, stride_x, left);
      const Line line = transform<false>(rows, lines, {lines.a, kElement});
      const float *forth = line.data, *back = line.data;  // bins k and -k
      float *a = plane + h * g.ld, *b = a + g.ld;
      for (int64_t k = 0; k < F; ++k) {
        const vf re = load(forth), im = load(forth + kLanes), re_back = load(back), im_back = load(back + kLanes);
        store(a, re + re_back), store(a + kLanes, im - im_back);
        if (two) store(b, im + im_back), store(b + kLanes, re_back - re);
        forth += line.ld, back = line.data + (W - 1 - k) * line.ld, a += kElement, b += kElement;
      }
    }
  }

  void read_rows(const T* first, const T* second, int64_t stride, int left) const {
    const int64_t W = p.W;
    float* to = lines.a;
    if (left == kLanes && second) {
      for (int64_t w = 0; w < W; ++w, first += stride, second += stride, to += kElement)
        store(to, load(first)), store(to + kLanes, load(second));
    } else {
      for (int64_t w = 0; w < W; ++w, first += stride, to += kElement) {
        store(to, load_lanes(first, left));
        store(to + kLanes, second ? load_lanes(second + w * stride, left) : vf{});
      }
    }
  }

  // The other way round, of spectra whose imaginary parts at 0 and W/2 do not count: to a contiguous map.
  void plane_to_rows(const float* plane, T* map, int left) const {
    const int64_t W = p.W, F = p.F, C = p.C;
    for (int64_t h = 0; h < p.H; h += 2) {
      const bool two = h + 1 < p.H;
      const float *a = plane + h * g.ld, *b = two ? a + g.ld : a;
      float *forth = lines.a, *back = lines.a + W * kElement;
      const vf keep = set1(two ? 1.f : 0.f);
      for (int64_t k = 0; k < F; ++k, a += kElement, b += kElement, forth += kElement, back -= kElement) {
        const vf re = load(a), im = load(a + kLanes), re_b = load(b) * keep, im_b = load(b + kLanes) * keep;
        if (k == 0 || 2 * k == W) {
          store(forth, re), store(forth + kLanes, re_b);
        } else {
          store(forth, re - im_b), store(forth + kLanes, im + re_b);
          store(back, re + im_b), store(back + kLanes, re_b - im);
        }
      }
      const Line line = transform<true>(rows, lines, {lines.a, kElement});
      write_row(map + h * W * C, line, left);
      if (two) write_row(map + (h + 1) * W * C, {line.data + kLanes, line.ld}, left);
    }
  }

  void write_row(T* to, Line from, int left) const {
    const int64_t W = p.W, C = p.C, ld = from.ld;
    const float* x = from.data;
    if (left == kLanes) {
      for (int64_t w = 0; w < W; ++w, to += C, x += ld) store(to, load(x));
    } else {
      for (int64_t w = 0; w < W; ++w, to += C, x += ld) store_lanes(to, load(x), left);
    }
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  const Params& p;
  const Geometry& g;
  const Transforms<T> transforms;
  float* const plane;  // [H, ld]

  Forward(const Params& params, const Geometry& geometry, Scratch& scratch)
      : p(params), g(geometry), transforms(params, geometry, scratch), plane(scratch.take<float>(p.H * g.ld)) {}

  void gate(const float* weight, int left) const {
    const int64_t H = p.H, row = p.F * p.C * 2;
    const vf scale = set1(static_cast<float>(0.5 / (static_cast<double>(p.H) * static_cast<double>(p.W))));
    for (int64_t f = 0; f < p.F; ++f, weight += p.C * 2) {
      const Line column{plane + f * kElement, g.ld};
      const Line line = transform<false>(transforms.columns, transforms.lines, column);
      float* x = line.data;
      const float* w = weight;
      for (int64_t h = 0; h < H; ++h, x += line.ld, w += row) {
        const Complex u = load_complex(w, left);
        const vf re = load(x), im = load(x + kLanes), u_re = u.re * scale, u_im = u.im * scale;
        store(x, fma(re, u_re, -(im * u_im))), store(x + kLanes, fma(re, u_im, im * u_re));
      }
      transform<true>(transforms.columns, transforms.lines, line, column);
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % g.blocks, sample = unit / g.blocks, item = sample / p.N, first = block * kLanes;
      const int left = transforms.left_of(block);
      const T* const x = static_cast<const T*>(p.x) + item * p.x_stride_g + sample % p.N * p.x_stride_n + first;
      transforms.rows_to_plane(x, p.x_stride_y, p.x_stride_x, left, plane);
      gate(p.weight + (item * g.bins * p.C + first) * 2, left);
      transforms.plane_to_rows(plane, static_cast<T*>(p.out) + sample * p.H * p.W * p.C + first, left);
    }
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

// Sums [F, H, kElement] of a block of channels -> dweight, as the last step takes them.
inline void write_sums(const Params& p, const float* sum, int64_t item, int64_t block) {
  const int64_t F = p.F, first = block * kLanes, count = 2 * std::min<int64_t>(kLanes, p.C - first);
  const double scale = 0.25 / (static_cast<double>(p.H) * static_cast<double>(p.W));  // X and dY are twice too large
  for (int64_t f = 0; f < F; ++f) {
    const float factor = static_cast<float>(f == 0 || 2 * f == p.W ? scale : 2 * scale);
    for (int64_t h = 0; h < p.H; ++h, sum += kElement) {
      float* const to = p.dweight + (((item * p.H + h) * F + f) * p.C + first) * 2;
      for (int64_t i = 0; i < count; ++i) to[i] = sum[i / 2 + i % 2 * kLanes] * factor;
    }
  }
}

template <class T>
struct Backward {
  const Params& p;
  const Geometry& g;
  const Transforms<T> transforms;
  const Lines others;  // so that columns of both maps are there at once
  float *const plane, *const plane_x;  // [H, ld]
  float* const sum;  // [F, H, kElement], of at most kSamples
  float* const total;  // the same, of a run that has more

  Backward(const Params& params, const Geometry& geometry, Scratch& scratch)
      : p(params),
        g(geometry),
        transforms(params, geometry, scratch),
        others(transforms.rows, transforms.columns, scratch),
        plane(scratch.take<float>(p.H * g.ld)),
        plane_x(scratch.take<float>(p.H * g.ld)),
        sum(scratch.take<float>(g.sum_floats)),
        total(scratch.take<float>(g.sum_floats)) {}

  void gate(const float* weight, int left) const {
    const int64_t H = p.H, row = p.F * p.C * 2;
    const vf scale = set1(static_cast<float>(0.5 / (static_cast<double>(p.H) * static_cast<double>(p.W))));
    float* total = sum;
    for (int64_t f = 0; f < p.F; ++f, weight += p.C * 2) {
      const Line column{plane + f * kElement, g.ld};
      const Line of_x = transform<false>(transforms.columns, others, {plane_x + f * kElement, g.ld});
      const Line line = transform<false>(transforms.columns, transforms.lines, column);
      float* y = line.data;
      const float *x = of_x.data, *w = weight;
      for (int64_t h = 0; h < H; ++h, x += of_x.ld, y += line.ld, w += row, total += kElement) {
        const Complex u = load_complex(w, left);
        const vf re = load(y), im = load(y + kLanes), x_re = load(x), x_im = load(x + kLanes);
        const vf u_re = u.re * scale, u_im = u.im * scale;
        store(total, load(total) + fma(x_re, re, x_im * im));
        store(total + kLanes, load(total + kLanes) + fma(x_re, im, -(x_im * re)));
        store(y, fma(re, u_re, im * u_im)), store(y + kLanes, fma(im, u_re, -(re * u_im)));
      }
      transform<true>(transforms.columns, transforms.lines, line, column);
    }
  }

  void run(float* partial, int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % g.blocks, run = unit / g.blocks % g.runs, item = unit / g.blocks / g.runs;
      const int64_t first = block * kLanes, last = p.N * (run + 1) / g.runs;
      const int left = transforms.left_of(block);
      zero(sum, g.sum_floats);
      zero(total, g.sum_floats);
      int samples = 0;
      for (int64_t n = p.N * run / g.runs; n < last; ++n) {
        if (samples++ == kSamples) {
          for (int64_t i = 0; i < g.sum_floats; i += kLanes) store(total + i, load(total + i) + load(sum + i));
          zero(sum, g.sum_floats);
          samples = 1;
        }
        const T* const x = static_cast<const T*>(p.x) + item * p.x_stride_g + n * p.x_stride_n + first;
        const T* const grad =
            static_cast<const T*>(p.grad_out) + item * p.grad_out_stride_g + n * p.grad_out_stride_n + first;
        transforms.rows_to_plane(x, p.x_stride_y, p.x_stride_x, left, plane_x);
        transforms.rows_to_plane(grad, p.grad_out_stride_y, p.grad_out_stride_x, left, plane);
        gate(p.weight + (item * g.bins * p.C + first) * 2, left);
        transforms.plane_to_rows(plane, static_cast<T*>(p.dx) + (item * p.N + n) * p.H * p.W * p.C + first, left);
      }
      for (int64_t i = 0; i < g.sum_floats; i += kLanes) store(sum + i, load(total + i) + load(sum + i));
      if (g.runs > 1) {
        std::memcpy(partial + unit * g.sum_floats, sum, static_cast<size_t>(g.sum_floats) * sizeof(float));
      } else {
        write_sums(p, sum, item, block);
      }
    }
  }
};

// Adds up the runs; a unit is a block of channels of a weight.
void add_runs(const Params& p, float* partial, int64_t begin, int64_t end) {
  const Geometry g(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % g.blocks, item = unit / g.blocks;
    float* const sum = partial + (item * g.runs * g.blocks + block) * g.sum_floats;
    for (int64_t run = 1; run < g.runs; ++run) {
      const float* const other = sum + run * g.blocks * g.sum_floats;
      for (int64_t i = 0; i < g.sum_floats; i += kLanes) store(sum + i, load(sum + i) + load(other + i));
    }
    write_sums(p, sum, item, block);
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) { return p.G * p.N * Geometry(p).blocks; }

void forward(const Params& p, float*, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Forward<decltype(type)>>(p, g, begin, end); });
}

int64_t backward_units(const Params& p) {
  const Geometry g(p);
  return p.G * g.runs * g.blocks;
}

int64_t backward_partials(const Params& p) {
  const Geometry g(p);
  return g.runs > 1 ? p.G * g.runs * g.blocks * g.sum_floats : 0;
}

void backward(const Params& p, float* partial, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Backward<decltype(type)>>(p, g, partial, begin, end); });
}

int64_t add_units(const Params& p) {
  const Geometry g(p);
  return g.runs > 1 ? p.G * g.blocks : 0;
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {{backward_units, backward}, {add_units, add_runs}};

}  // namespace spectral_gate_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<SpectralGateParams>* EFFVIT_KERNEL_NAME(spectral_gate)() {
  namespace impl = EFFVIT_ISA_NAME::spectral_gate_impl;
  static constexpr Kernel<SpectralGateParams> kernel = {routine(impl::kForward),
                                                        routine(impl::kBackward, impl::backward_partials)};
  return &kernel;
}
}  // namespace effvit::cpu
