// fft_conv on the CPU: convolutions with few taps, or of few places, by multiply-adds. Included by
// fft_conv_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

// A map, or a block of it along z, with the places around it that taps reach: zeros, or the other end of the map.
// Position 0 holds the place -before (of z: of the block); there are kTile more positions along z than taps reach.
struct Window {
  float* data;  // [nx, ny, nz] vectors
  int64_t nx, ny, nz;
  int64_t before_x, before_y, before_z;
  int64_t z = 0;  // where the block starts

  // reverse: of what is convolved with the taps in the order of their lags.
  Window(const Geometry& g, Scratch& scratch, bool reverse = false)
      : nx(g.x.load),
        ny(g.y.load),
        nz(g.z.load + kTile),
        before_x(reverse ? g.x.after : g.x.before),
        before_y(reverse ? g.y.after : g.y.before),
        before_z(reverse ? g.z.after : g.z.before) {
    data = scratch.take<float>(nx * ny * nz * kLanes);
  }
  float* line(int64_t px, int64_t py) const { return data + (px * ny + py) * nz * kLanes; }

  // fill(x, y, z, count, to) makes places of the map.
  template <class F>
  void load(const Geometry& g, const F& fill) {
    Axis x = g.x, y = g.y, along = g.z;
    x.origin = -before_x, y.origin = -before_y, along.origin = -before_z;
    for (int64_t px = 0; px < nx; ++px) {
      for (int64_t py = 0; py < ny; ++py) {
        float* const to = line(px, py);
        const int64_t at_x = x.at(px), at_y = y.at(py);
        if (at_x < 0 || at_y < 0) {
          zero(to, nz * kLanes);
          continue;
        }
        Row::runs(
            along, z, g.z.load,
            [&](int64_t i, int64_t place, int64_t count) { fill(at_x, at_y, place, count, to + i * kLanes); },
            [&](int64_t i, int64_t count) { zero(to + i * kLanes, count * kLanes); });
        zero(to + g.z.load * kLanes, kTile * kLanes);
      }
    }
  }
};

struct Range {
  int64_t begin, end;
};
// Taps, from the position of the first one on, through which `count` results from `at` on meet places of the map.
EFFVIT_INLINE Range taps_met(const Axis& axis, int64_t before, int64_t at, int64_t count) {
  if (axis.circular) return {0, axis.slots()};
  return {std::max<int64_t>(0, before - at - (count - 1)), std::min(axis.slots(), before + axis.S - at)};
}

// to[i] = sum of taps[e] window[at + e], of n results from z on within the window's block. to: room for whole tiles.
inline void convolve_line(const Geometry& g, const Window& w, const float* taps, int64_t x, int64_t y, int64_t n,
                          float* to) {
  const Range rx = taps_met(g.x, w.before_x, x, 1), ry = taps_met(g.y, w.before_y, y, 1);
  const int64_t hy = g.y.slots(), hz = g.z.slots();
  for (int64_t i = 0; i < n; i += kTile) {
    const Range rz = taps_met(g.z, w.before_z, w.z + i, kTile);
    vf acc[kTile] = {};
    for (int64_t ex = rx.begin; ex < rx.end; ++ex) {
      for (int64_t ey = ry.begin; ey < ry.end; ++ey) {
        const float* from = w.line(x + ex, y + ey) + (i + rz.begin) * kLanes;
        const float* tap = taps + ((ex * hy + ey) * hz + rz.begin) * kLanes;
        for (int64_t e = rz.begin; e < rz.end; ++e, from += kLanes, tap += kLanes) {
          const vf c = load(tap);
#pragma GCC unroll 8
          for (int t = 0; t < kTile; ++t) acc[t] = fma(c, load(from + t * kLanes), acc[t]);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTile; ++t) store(to + (i + t) * kLanes, acc[t]);
  }
}

// sums[e] += sum of dy[i] window[i + e], of a line of n results from z on; lows: what rounding took off the sums.
inline void correlate_line(const Geometry& g, const Window& w, const float* dy, int64_t x, int64_t y, int64_t z,
                           int64_t n, float* sums, float* lows) {
  const Range rx = taps_met(g.x, w.before_x, x, 1), ry = taps_met(g.y, w.before_y, y, 1);
  const Range rz = taps_met(g.z, w.before_z, z, n);
  const int64_t hy = g.y.slots(), hz = g.z.slots();
  for (int64_t ex = rx.begin; ex < rx.end; ++ex) {
    for (int64_t ey = ry.begin; ey < ry.end; ++ey) {
      for (int64_t e = rz.begin; e < rz.end; e += kTile) {
        const float* from = w.line(x + ex, y + ey) + (z + e) * kLanes;
        vf acc[kTile] = {};
        for (int64_t i = 0; i < n; ++i, from += kLanes) {
          const vf g_i = load(dy + i * kLanes);
#pragma GCC unroll 8
          for (int t = 0; t < kTile; ++t) acc[t] = fma(g_i, load(from + t * kLanes), acc[t]);
        }
        const int64_t at = ((ex * hy + ey) * hz + e) * kLanes;
        const int64_t now = std::min<int64_t>(kTile, hz - e);
        for (int64_t t = 0; t < now; ++t) add_compensated(sums + at + t * kLanes, lows + at + t * kLanes, acc[t]);
      }
    }
  }
}

// The taps of kernel j in the order in which results meet them, the largest lag first, and in that of their lags.
inline void make_taps(const Params& p, const Geometry& g, int64_t j, const Row& row, float* falling, float* rising,
                      float* line) {
  const int64_t hx = g.x.slots(), hy = g.y.slots(), hz = g.z.slots();
  zero(rising, g.slots() * kLanes);
  for_kernels(p, [&](const Taps& k) {
    k.load_each(j, row, line, [&](int64_t x, int64_t y) {
      const int64_t sx = g.x.slot(k.lag(x, p.shift_x)), sy = g.y.slot(k.lag(y, p.shift_y));
      for (int64_t i = 0; i < k.n[2]; ++i) {
        const int64_t sz = g.z.slot(k.lag(i, p.shift_z));
        if (sx < 0 || sy < 0 || sz < 0) continue;
        float* const to = rising + ((sx * hy + sy) * hz + sz) * kLanes;
        store(to, fma(set1(p.kernel_scale), load(line + i * kLanes), load(to)));
      }
    });
  });
  const int64_t n = hx * hy * hz;
  for (int64_t i = 0; i < n; ++i) store(falling + (n - 1 - i) * kLanes, load(rising + i * kLanes));
}

// The gradients of kernel j; sums: in falling order of lags.
inline void store_tap_gradients(const Params& p, const Geometry& g, int64_t j, const Row& row, const float* sums,
                                float* line) {
  const int64_t hy = g.y.slots(), hz = g.z.slots(), n = g.slots();
  for_kernels(p, [&](const Taps& k) {
    k.store_each(j, row, line, [&](int64_t x, int64_t y) {
      const int64_t sx = g.x.slot(k.lag(x, p.shift_x)), sy = g.y.slot(k.lag(y, p.shift_y));
      for (int64_t i = 0; i < k.n[2]; ++i) {
        const int64_t sz = g.z.slot(k.lag(i, p.shift_z));
        const bool met = sx >= 0 && sy >= 0 && sz >= 0;
        const float* const from = sums + (n - 1 - ((sx * hy + sy) * hz + sz)) * kLanes;
        store(line + i * kLanes, met ? load(from) * p.kernel_scale : vf{});
      }
    });
  });
}

struct DirectForward {
  const Params& p;
  const Geometry& g;
  Window window;
  float *falling, *rising, *line;

  DirectForward(const Params& p, const Geometry& g, Scratch& s) : p(p), g(g), window(g, s) {
    falling = s.take<float>(g.slots() * kLanes), rising = s.take<float>(g.slots() * kLanes);
    line = s.take<float>(std::max(most_taps(p), g.z.length + kTile) * kLanes);
  }

  void run(int64_t j, int64_t group, int64_t, Range rows) {
    make_taps(p, g, j, Row(p, j, group), falling, rising, line);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Row row(p, r * p.J + j, group);
      for (window.z = 0; window.z < p.Z; window.z += g.z.length) {
        window.load(
            g, [&](int64_t x, int64_t y, int64_t z, int64_t count, float* to) { row.load_input(x, y, z, count, to); });
        const int64_t n = std::min(g.z.length, p.Z - window.z);
        for (int64_t x = 0; x < p.X; ++x) {
          for (int64_t y = 0; y < p.Y; ++y) {
            convolve_line(g, window, falling, x, y, n, line);
            finish_line(row, x, y, window.z, n, line, 1);
          }
        }
      }
    }
  }
};

struct DirectBackward {
  const Params& p;
  const Geometry& g;
  Window window, grad;
  float *falling, *rising, *line, *dy, *own_sums, *lows;

  DirectBackward(const Params& p, const Geometry& g, Scratch& s) : p(p), g(g), window(g, s), grad(g, s, true) {
    falling = s.take<float>(g.slots() * kLanes), rising = s.take<float>(g.slots() * kLanes);
    line = s.take<float>(std::max(most_taps(p), g.z.length + kTile) * kLanes);
    dy = s.take<float>(p.X * p.Y * p.Z * kLanes);
    own_sums = s.take<float>(g.splits > 1 ? 0 : g.slots() * kLanes), lows = s.take<float>(g.slots() * kLanes);
  }

  void run(int64_t j, int64_t group, int64_t unit, Range rows) {
    float* const sums = g.splits > 1 ? g.sums + unit * g.sum_floats() : own_sums;
    const Row all(p, j, group);
    make_taps(p, g, j, all, falling, rising, line);
    zero(sums, g.slots() * kLanes), zero(lows, g.slots() * kLanes);
    float dd[2 * kLanes] = {};
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Row row(p, r * p.J + j, group);
      window.load(
          g, [&](int64_t x, int64_t y, int64_t z, int64_t count, float* to) { row.load_input(x, y, z, count, to); });
      for (int64_t x = 0; x < p.X; ++x) {
        for (int64_t y = 0; y < p.Y; ++y) {
          float* const to = dy + (x * p.Y + y) * p.Z * kLanes;
          if (needs_result(p)) {
            convolve_line(g, window, falling, x, y, p.Z, line);
            std::memcpy(to, line, static_cast<size_t>(p.Z * kLanes) * sizeof(float));
          }
          gradient_line(row, dd, x, y, 0, p.Z, to, 1);
          for (int64_t z = 0; z < p.Z; z += kChunk)
            correlate_line(g, window, to + z * kLanes, x, y, z, std::min(kChunk, p.Z - z), sums, lows);
        }
      }
      grad.load(g, [&](int64_t x, int64_t y, int64_t z, int64_t count, float* to) {
        std::memcpy(to, dy + ((x * p.Y + y) * p.Z + z) * kLanes, static_cast<size_t>(count * kLanes) * sizeof(float));
      });
      for (int64_t x = 0; x < p.X; ++x) {
        for (int64_t y = 0; y < p.Y; ++y) {
          convolve_line(g, grad, rising, x, y, p.Z, line);
          const float* const own = dy + (x * p.Y + y) * p.Z * kLanes;
          for (int64_t i = 0; p.d && i < p.Z; ++i)
            store(line + i * kLanes, fma(load(row.d), load(own + i * kLanes), load(line + i * kLanes)));
          finish_gradient_line(row, x, y, 0, p.Z, line);
        }
      }
    }
    if (g.dd) store(g.dd + unit * kLanes, load(dd));
    if (g.splits == 1) store_tap_gradients(p, g, j, all, sums, line);
  }
};

}  // namespace fft_conv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
