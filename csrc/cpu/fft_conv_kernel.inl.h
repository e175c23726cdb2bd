// fft_conv on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// Lanes are channels, so that transforms need no shuffles; maps with channels first are transposed in registers as they
// are read and written. A unit is a kernel (of J), a group of kLanes channels and a part of the batch's rows: the
// spectrum of the kernel is made once, then each row is gated, transformed in place, multiplied, transformed back, and
// leaves through the activation and the gate; long rows with short kernels go in windows that overlap. Few taps are
// convolved directly. Geometry::choose is the rule.
// Backward computes the convolution again where the activation or the gate needs it, and adds up the gradient of the
// kernel's spectrum over the rows, which is transformed back once.
#pragma once

#include "fft_conv_transform.inl.h"

#include "fft_conv_plan.inl.h"

#include "fft_conv_maps.inl.h"

#include "fft_conv_lines.inl.h"
#include "fft_conv_spectrum.inl.h"

#include "fft_conv_direct.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

// What both directions need by transforms.
struct Planes {
  const Params& p;
  const Geometry& g;
  float *plane, *kernel, *line, *taps;
  int64_t row_floats, slice_floats;  // of a plane: a line along z, all lines of an x

  Planes(const Params& p, const Geometry& g, Scratch& s) : p(p), g(g) {
    plane = take_plane(s);
    kernel = s.take<float>(g.splits > 1 ? 0 : g.spectrum_floats());
    line = s.take<float>(g.line_floats()), taps = s.take<float>(most_taps(p) * kLanes);
    row_floats = g.M * kWide, slice_floats = g.y.N * row_floats;
  }
  float* take_plane(Scratch& s) const {
    const int64_t columns = p.spectrum ? std::max(g.M, g.half()) : g.M;
    return s.take<float>(g.x.N * g.y.N * columns * kWide);
  }
  float* at(float* from, int64_t px, int64_t py) const { return from + px * slice_floats + py * row_floats; }

  const float* spectrum(int64_t j, int64_t group) {
    if (g.splits > 1) return g.spectra + (j * g.groups + group) * g.spectrum_floats();
    make_spectrum(p, g, j, Row(p, j, group), kernel, plane, line, taps);
    return kernel;
  }

  // u' of the window whose block starts at z, transformed.
  void load_window(const Row& row, int64_t z) {
    const int64_t step = g.step();
    for (int64_t px = 0; px < g.x.N; ++px) {
      for (int64_t py = 0; py < g.y.N; ++py) {
        float* const to = at(plane, px, py);
        const int64_t x = px < g.x.load ? g.x.at(px) : -1, y = py < g.y.load ? g.y.at(py) : -1;
        if (x < 0 || y < 0) {
          zero(to, row_floats);
          continue;
        }
        if (step > 1) zero(to, row_floats);
        Row::runs(
            g.z, z, g.z.load,
            [&](int64_t i, int64_t place, int64_t count) {
              row.load_input(x, y, place, count, to + i * step * kLanes, step);
            },
            [&](int64_t i, int64_t count) { zero(to + i * step * kLanes, count * step * kLanes); });
        zero(to + g.z.load * step * kLanes, (g.z.N - g.z.load) * step * kLanes);
      }
    }
    transform_plane(g, plane, g.x.load, g.y.load, line);
  }
  template <bool kConjugate>
  void multiply_by(const float* from, float* to, const float* spectrum) const {
    with_packed(g, [&](auto packed) { multiply<decltype(packed)::value, kConjugate>(g, from, to, spectrum); });
  }
  // The results of a block, y within `from`, from place z on: f(x, y, count, line).
  template <class F>
  void for_results(float* from, int64_t z, const F& f) const {
    for (int64_t x = 0; x < p.X; ++x) {
      for (int64_t y = 0; y < p.Y; ++y) {
        float* const to = at(from, x + g.x.out_at(), y + g.y.out_at());
        f(x, y, std::min(g.z.length, p.Z - z), to + g.z.out_at() * g.step() * kLanes);
      }
    }
  }
};

struct TransformForward : Planes {
  TransformForward(const Params& p, const Geometry& g, Scratch& s) : Planes(p, g, s) {}

  void run(int64_t j, int64_t group, int64_t, Range rows) {
    const float* const spectrum = this->spectrum(j, group);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Row row(p, r * p.J + j, group);
      for (int64_t z = 0; z < p.Z; z += g.z.length) {
        load_window(row, z);
        multiply_by<false>(plane, plane, spectrum);
        transform_plane_back(g, plane, g.x.out_at(), p.X, g.y.out_at(), p.Y, line);
        for_results(plane, z, [&](int64_t x, int64_t y, int64_t count, const float* from) {
          finish_line(row, x, y, z, count, from, g.step());
        });
      }
    }
  }
};

struct TransformBackward : Planes {
  float *grad, *own_sums, *du;  // du: [X, Y, Z], the gradient of u'

  TransformBackward(const Params& p, const Geometry& g, Scratch& s) : Planes(p, g, s) {
    grad = take_plane(s), du = s.take<float>(p.X * p.Y * p.Z * kLanes);
    own_sums = s.take<float>(g.splits > 1 ? 0 : g.spectrum_floats());
  }

  void run(int64_t j, int64_t group, int64_t unit, Range rows) {
    const float* const spectrum = this->spectrum(j, group);
    float* const sums = g.splits > 1 ? g.sums + unit * g.sum_floats() : own_sums;
    float dd[2 * kLanes] = {};
    bool first = true;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Row row(p, r * p.J + j, group);
      zero(du, p.X * p.Y * p.Z * kLanes);
      for (int64_t z = 0; z < p.Z; z += g.z.length, first = false) {
        load_window(row, z);
        if (needs_result(p)) {
          multiply_by<false>(plane, grad, spectrum);
          transform_plane_back(g, grad, g.x.out_at(), p.X, g.y.out_at(), p.Y, line);
        }
        make_gradient(row, dd, z);
        transform_plane(g, grad, g.x.out_at() + p.X, g.y.out_at() + p.Y, line);
        with_packed(g, [&](auto packed) { add_products<decltype(packed)::value>(g, plane, grad, sums, first); });
        multiply_by<true>(grad, grad, spectrum);
        transform_plane_back(g, grad, 0, g.x.load, 0, g.y.load, line);
        add_to_input(z);
      }
      for (int64_t x = 0; x < p.X; ++x) {
        for (int64_t y = 0; y < p.Y; ++y) finish_gradient_line(row, x, y, 0, p.Z, du_line(x, y));
      }
    }
    if (g.dd) store(g.dd + unit * kLanes, load(dd));
    if (g.splits == 1) store_kernel_gradients(p, g, j, Row(p, j, group), sums, plane, line, taps);
  }

 private:
  float* du_line(int64_t x, int64_t y) const { return du + (x * p.Y + y) * p.Z * kLanes; }

  // From y in `grad` to its gradient, zeros around it; the skip's part of du.
  void make_gradient(const Row& row, float* dd, int64_t z) {
    const int64_t step = g.step(), count = std::min(g.z.length, p.Z - z);
    for (int64_t px = 0; px < g.x.N; ++px) {
      for (int64_t py = 0; py < g.y.N; ++py) {
        float* const to = at(grad, px, py);
        const int64_t x = px - g.x.out_at(), y = py - g.y.out_at();
        if (x < 0 || x >= p.X || y < 0 || y >= p.Y) {
          zero(to, row_floats);
          continue;
        }
        float* const from = to + g.z.out_at() * step * kLanes;
        gradient_line(row, dd, x, y, z, count, from, step);
        zero(to, g.z.out_at() * step * kLanes);
        float* const end = from + count * step * kLanes;
        zero(end, (g.z.N - g.z.out_at() - count) * step * kLanes);
        for (int64_t i = 0; step > 1 && i < count; ++i) store(from + (2 * i + 1) * kLanes, vf{});
        float* const skip = du_line(x, y) + z * kLanes;
        for (int64_t i = 0; p.d && i < count; ++i) {
          float* const place = skip + i * kLanes;
          store(place, fma(load(row.d), load(from + i * step * kLanes), load(place)));
        }
      }
    }
  }
  void add_to_input(int64_t z) {
    const int64_t step = g.step();
    for (int64_t px = 0; px < g.x.load; ++px) {
      for (int64_t py = 0; py < g.y.load; ++py) {
        const int64_t x = g.x.at(px), y = g.y.at(py);
        if (x < 0 || y < 0) continue;
        const float* const from = at(grad, px, py);
        Row::runs(
            g.z, z, g.z.load,
            [&](int64_t i, int64_t place, int64_t count) {
              float* const to = du_line(x, y) + place * kLanes;
              for (int64_t n = 0; n < count; ++n)
                store(to + n * kLanes, load(to + n * kLanes) + load(from + (i + n) * step * kLanes));
            },
            [](int64_t, int64_t) {});
      }
    }
  }
};

// ---- steps
// -----------------------------------------------------------------------------------------------------------

template <bool backward>
int64_t workspace(const Params& p) {
  return Geometry(p, backward).workspace;
}
template <bool backward>
int64_t table_units(const Params& p) {
  return Geometry(p, backward).direct ? 0 : 1;
}
template <bool backward>
void make_tables(const Params& p, float* workspace, int64_t, int64_t) {
  fill_tables(Geometry(p, backward, workspace));
}

// A thread's pass over units, with scratch that is counted first.
template <class Pass, class F>
void with_pass(const Params& p, const Geometry& g, const F& f) {
  Scratch count;
  Pass sizes(p, g, count);
  Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
  Pass pass(p, g, scratch);
  f(pass);
}

// The spectra of all kernels, where several units share one.
template <bool backward>
int64_t spectrum_units(const Params& p) {
  const Geometry g(p, backward);
  return g.direct || g.splits == 1 ? 0 : p.J * g.groups;
}
template <bool backward>
void make_spectra(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Geometry g(p, backward, workspace);
  with_pass<Planes>(p, g, [&](Planes& pass) {
    for (int64_t i = begin; i < end; ++i) {
      make_spectrum(p, g, i / g.groups, Row(p, i / g.groups, i % g.groups), g.spectra + i * g.spectrum_floats(),
                    pass.plane, pass.line, pass.taps);
    }
  });
}

template <bool backward>
int64_t main_units(const Params& p) {
  return Geometry(p, backward).units(p);
}
template <bool backward>
void run_units(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Geometry g(p, backward, workspace);
  const auto all = [&](auto& pass) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t split = unit % g.splits, i = unit / g.splits;
      pass.run(i / g.groups, i % g.groups, unit, {g.rows * split / g.splits, g.rows * (split + 1) / g.splits});
    }
  };
  if (g.direct) {
    with_pass<std::conditional_t<backward, DirectBackward, DirectForward>>(p, g, all);
  } else {
    with_pass<std::conditional_t<backward, TransformBackward, TransformForward>>(p, g, all);
  }
}

// Gradients of kernels, where several units have parts of them: added in their order.
int64_t sum_units(const Params& p) {
  const Geometry g(p, true);
  return g.splits == 1 ? 0 : p.J * g.groups;
}
void add_sums(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Geometry g(p, true, workspace);
  const auto sums_of = [&](int64_t i) {
    float* const sums = g.sums + i * g.splits * g.sum_floats();
    for (int64_t s = 1; s < g.splits; ++s) {
      const float* const other = sums + s * g.sum_floats();
      for (int64_t n = 0; n < g.sum_floats(); n += kLanes) store(sums + n, load(sums + n) + load(other + n));
    }
    return sums;
  };
  if (g.direct) {
    Scratch count;
    count.take<float>(most_taps(p) * kLanes);
    float* const line = static_cast<float*>(thread_scratch(static_cast<size_t>(count.used())));
    for (int64_t i = begin; i < end; ++i)
      store_tap_gradients(p, g, i / g.groups, Row(p, i / g.groups, i % g.groups), sums_of(i), line);
    return;
  }
  with_pass<Planes>(p, g, [&](Planes& pass) {
    for (int64_t i = begin; i < end; ++i) {
      store_kernel_gradients(p, g, i / g.groups, Row(p, i / g.groups, i % g.groups), sums_of(i), pass.plane, pass.line,
                             pass.taps);
    }
  });
}

int64_t skip_units(const Params& p) { return p.dd ? 1 : 0; }
void add_skips(const Params& p, float* workspace, int64_t, int64_t) {
  const Geometry g(p, true, workspace);
  for (int64_t c = 0; c < p.C; ++c) {
    double sum = 0;  // of as many terms as there are rows
    for (int64_t j = 0; j < p.J; ++j) {
      for (int64_t s = 0; s < g.splits; ++s)
        sum += g.dd[((j * g.groups + c / kLanes) * g.splits + s) * kLanes + c % kLanes];
    }
    store_scalar(p.dd, p.d_dtype, c, static_cast<float>(sum));
  }
}

constexpr Step<Params> kForward[] = {
    {&table_units<false>, &make_tables<false>},
    {&spectrum_units<false>, &make_spectra<false>},
    {&main_units<false>, &run_units<false>},
};
constexpr Step<Params> kBackward[] = {
    {&table_units<true>, &make_tables<true>},
    {&spectrum_units<true>, &make_spectra<true>},
    {&main_units<true>, &run_units<true>},
    {&sum_units, &add_sums},
    {&skip_units, &add_skips},
};

}  // namespace fft_conv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<FftConvParams>* EFFVIT_KERNEL_NAME(fft_conv)() {
  namespace impl = EFFVIT_ISA_NAME::fft_conv_impl;
  static constexpr Kernel<FftConvParams> kernel = {routine(impl::kForward, impl::workspace<false>),
                                                   routine(impl::kBackward, impl::workspace<true>)};
  return &kernel;
}
}  // namespace effvit::cpu
