// dwconv on the CPU: forward and backward, on raw pointers, compiled once per ISA. A sequence is a map of one row.
//
// A unit is a block of channels of an item: of a band of rows, and of a segment of columns where rows are long. What it
// reads of x, times its gate, goes to scratch in float32 with zeros around its columns. From there tiles of columns are
// convolved in registers, up to 8 taps of a row at once; taps that only find zeros are left out, and so are rows. With
// a dilation d, every d-th column is a map of its own. A row of the convolution leaves through activation and gate.
// Backward computes the convolution again where activation or gate need it. The gradient dz of the convolution goes to
// scratch as x does; its stencil with the flipped weights is the gradient of x, and its products with rows of x are
// that of the weights. Items overlap by the reach of the filter. Sums over the items of a unit are partial ones, added
// at the end. Where maps are read as they are (no gate of x, no state, no activation backward, whole vectors of
// channels), all of this goes from memory to memory, see dwconv_near.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace dwconv_impl {

#include "stencil.inl.h"

#include "dwconv_plan.inl.h"

// Weights of a vector of channels as pairs of bfloat16, of two rows in one word: [ceil(kh / 2), kw, kLanes]. `to` is
// `from` or before it.
template <class T>
void pair_rows(const Plan& g, const float* from, float* to) {
  for (int64_t i = 0; i < g.y.k; i += 2) {
    for (int64_t j = 0; j < g.x.k; ++j, to += kLanes) {
      const float* const w = from + (i * g.x.k + j) * kLanes;
      store(to, (vf)join_pairs(load(w), i + 1 < g.y.k ? load(w + g.x.k * kLanes) : vf{}));
    }
  }
}

// Weights of a block: [vectors, kh, kw, kLanes], backward the same flipped, bias [vectors, kLanes]; zeros beyond C.
template <class T>
void pack_weights(const Params& p, const Plan& g, float* workspace, int64_t begin, int64_t end) {
  const int64_t taps = g.taps;
  for (int64_t block = begin; block < end; ++block) {
    float* const to = workspace + block * g.packed;
    float* const flipped = to + g.width * taps;
    float* const bias = g.backward ? flipped + g.width * taps : flipped;
    zero(bias, g.width);
    const int64_t first = block * g.width, channels = std::min(g.width, p.C - first);
    for (int64_t c = 0; p.bias && c < channels; ++c) bias[c] = load_scalar(p.bias, p.bias_dtype, first + c);
    for (int64_t c = 0; c < g.width; c += kLanes) {
      const T* const from = static_cast<const T*>(p.weight) + (first + c) * taps;
      for (int64_t t = 0; t < taps; t += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, taps - t));
        vf r[kLanes];
        for (int i = 0; i < kLanes; ++i) r[i] = c + i < channels ? load_lanes(from + i * taps + t, n) : vf{};
        transpose_block(r);
        for (int i = 0; i < n; ++i) {
          store(to + (c * taps + (t + i) * kLanes), r[i]);
          if (g.backward) store(flipped + (c * taps + (taps - 1 - t - i) * kLanes), r[i]);
        }
      }
      if constexpr (kBf16Products<T>) {
        if (g.pairs) {
          float* const used = g.backward ? flipped : to;
          pair_rows<T>(g, used + c * taps, used + c / kLanes * g.pair_floats());
        }
      }
    }
  }
}

// ---- stencils ------------------------------------------------------------------------------------------------------

// to[y, n] = start + sum over rows i and kTaps taps j of w[i, j] x[y][i, n + j], of a vector of channels, for kColumns
// columns n and `lines` y. x: y are x_line, i are x_row and columns are x_step apart. start: null is what `to` holds.
using Stencil = void (*)(const float* x, int64_t x_line, int64_t x_row, int64_t x_step, int64_t rows, const float* w,
                         int64_t w_row, const float* start, float* to, int64_t to_line, int64_t to_step, int64_t lines);

template <int kTaps, int kColumns>
void stencil(const float* x, int64_t x_line, int64_t x_row, int64_t x_step, int64_t rows, const float* w, int64_t w_row,
             const float* start, float* to, int64_t to_line, int64_t to_step, int64_t lines) {
  for (int64_t y = 0; y < lines; ++y, x += x_line, to += to_line) {
    vf acc[kColumns];
    if (start) {
      const vf from = load(start);
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) acc[n] = from;
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) acc[n] = load(to + n * to_step);
    }
    stencil_tile<float, kTaps>(acc, x, x_row, x_step, rows, w, w_row);
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) store(to + n * to_step, acc[n]);
  }
}

// sums[i, j] += sum over `tiles` times kColumns columns n of dz[n] x[i][n + j], for rows i and kTaps taps j, of a
// vector of channels.
using Correlate = void (*)(const float* dz, int64_t dz_step, const float* x, int64_t x_row, int64_t x_step,
                           int64_t rows, float* sums, int64_t sums_row, int64_t tiles);

template <int kTaps, int kColumns>
void correlate(const float* dz, int64_t dz_step, const float* x, int64_t x_row, int64_t x_step, int64_t rows,
               float* sums, int64_t sums_row, int64_t tiles) {
  for (int64_t i = 0; i < rows; ++i, x += x_row, sums += sums_row) {
    const float *e = dz, *xi = x;
    vf acc[kTaps];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) acc[j] = vf{};
    for (int64_t tile = 0; tile < tiles; ++tile, e += kColumns * dz_step, xi += kColumns * x_step) {
      vf en[kColumns];
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) en[n] = load(e + n * dz_step);
      correlate_tile(acc, en, xi, x_step);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) store(sums + j * kLanes, load(sums + j * kLanes) + acc[j]);
  }
}

template <int kColumns, int... kTaps>
Stencil stencil_of(int64_t taps, std::integer_sequence<int, kTaps...>) {
  static constexpr Stencil all[] = {stencil<kTaps + 1, kColumns>...};
  return all[taps - 1];
}
template <int kColumns, int... kTaps>
Correlate correlate_of(int64_t taps, std::integer_sequence<int, kTaps...>) {
  static constexpr Correlate all[] = {correlate<kTaps + 1, kColumns>...};
  return all[taps - 1];
}
using AllTaps = std::make_integer_sequence<int, kMostTaps>;
Stencil stencil_of(int64_t taps, int columns) {
  return columns == 7 ? stencil_of<7>(taps, AllTaps{}) : stencil_of<8>(taps, AllTaps{});
}
Correlate correlate_of(int64_t taps, int columns) {
  return columns == 1   ? correlate_of<1>(taps, AllTaps{})
         : columns == 7 ? correlate_of<7>(taps, AllTaps{})
                        : correlate_of<8>(taps, AllTaps{});
}

// Where the results of a convolution go: those of row y and column x, one vector after the other.
struct Target {
  float* data;
  int64_t line, step, plane;
  explicit Target(const Patch& to) : data(to.data), line(to.row), step(kLanes), plane(to.plane) {}
  Target(float* data, int64_t line, int64_t step) : data(data), line(line), step(step), plane(kLanes) {}
};

// Rows and columns of a convolution of `from`. Tiles of columns reach beyond the last one. A tile goes down the rows,
// so that what it reads stays in the nearest cache.
void convolve(const Axis& ay, const Axis& ax, int columns, const Patch& from, Range rows, Range r, const float* w,
              const float* start, const Target& to, int vectors) {
  const int64_t taps = ay.k * ax.k, tile_columns = columns * ax.step;
  for (int v = 0; v < vectors; ++v, w += taps * kLanes, start += kLanes) {
    for (int64_t first_column = r.begin; first_column < std::min(r.end, r.begin + ax.step); ++first_column) {
      for (int64_t first = first_column; first < r.end; first += tile_columns) {
        const Range j = ax.taps(first, std::min(first + tile_columns - ax.step, r.end - 1));
        const int64_t parts = std::max<int64_t>(1, ceil_div(j.size(), kMostTaps));
        for (int64_t k = 0; k < parts; ++k) {
          const Range t = part(j.size(), k, parts);
          const int64_t j0 = j.begin + t.begin;
          for (int64_t y = rows.begin; y < rows.end;) {
            const Range i = ay.taps(y, y);
            int64_t next = y + 1;
            for (; next < rows.end; ++next) {
              const Range other = ay.taps(next, next);
              if (other.begin != i.begin || other.end != i.end) break;
            }
            float* const result = to.data + v * to.plane + (y - rows.begin) * to.line + (first - r.begin) * to.step;
            if (i.empty() || t.empty()) {
              for (int64_t n = 0; k == 0 && n < (next - y) * columns; ++n)
                store(result + n / columns * to.line + n % columns * ax.step * to.step, load(start));
            } else {
              stencil_of(t.size(), columns)(from.at(v, y + i.begin * ay.step - ay.pad, first + j0 * ax.step - ax.pad),
                                            from.row, ay.step * from.row, ax.step * kLanes, i.size(),
                                            w + (i.begin * ax.k + j0) * kLanes, ax.k * kLanes, k == 0 ? start : nullptr,
                                            result, to.line, ax.step * to.step, next - y);
            }
            y = next;
          }
        }
      }
    }
  }
}

// Adds the products of dz, rows and columns r, with the x that these outputs read, to sums [vectors, kh, kw, kLanes].
void correlate_rows(const Axis& ay, const Axis& ax, int columns, const Patch& dz, const Patch& from, Range rows,
                    Range r, float* sums, int vectors) {
  const int64_t parts = ceil_div(ax.k, kMostTaps);
  // Columns at once, of whose rows of x those of a filter stay in the nearest cache.
  const int64_t near = std::max<int64_t>(2, kNearBytes / (ay.k * kLanes * int64_t{sizeof(float)} * columns)) * columns;
  for (int v = 0; v < vectors; ++v, sums += ay.k * ax.k * kLanes) {
    for (int64_t first_column = r.begin; first_column < std::min(r.end, r.begin + ax.step); ++first_column) {
      for (int64_t k = 0; k < parts; ++k) {
        const Range j = part(ax.k, k, parts), q = ax.outputs({first_column, r.end}, j.begin, j.end - 1);
        const int64_t all = q.empty() ? 0 : ceil_div(q.size(), ax.step);
        for (int64_t done = 0; done < all; done += near) {
          const int64_t n = std::min(near, all - done), tiles = n / columns, rest = n - tiles * columns;
          for (int64_t y = rows.begin; y < rows.end; ++y) {
            const Range i = ay.taps(y, y);
            if (i.empty()) continue;
            float* const to = sums + (i.begin * ax.k + j.begin) * kLanes;
            const auto run = [&](int tile_columns, int64_t begin, int64_t count) {
              const int64_t column = q.begin + (done + begin) * ax.step;
              correlate_of(j.size(), tile_columns)(
                  dz.at(v, y, column), ax.step * kLanes,
                  from.at(v, y + i.begin * ay.step - ay.pad, column + j.begin * ax.step - ax.pad), ay.step * from.row,
                  ax.step * kLanes, i.size(), to, ax.k * kLanes, count);
            };
            if (tiles) run(columns, 0, tiles);
            if (rest) run(1, tiles * columns, rest);  // exactly: what lies beyond may be no number
          }
        }
      }
    }
  }
}

// ---- rows of maps --------------------------------------------------------------------------------------------------

// A row in scratch: of a patch, whose vectors of channels are a plane apart, or of pixels.
struct Lane {
  float* data;
  int64_t plane, step = kLanes;
  EFFVIT_INLINE float* at(int64_t x, int c) const { return data + c / kLanes * plane + x * step; }
};

constexpr int64_t kAhead = 12;

template <class T>
void fill_row(Lane to, RowOf<const T> from, RowOf<const T> gate, int64_t n, int channels) {
  for (int64_t x = 0; x < n; ++x) {
    const T* const pixel = from.data + x * from.stride;
    const T* const factor = gate.data + x * gate.stride;
    for (int c = 0; c < channels; c += kLanes) {
      __builtin_prefetch(to.at(x + kAhead, c), 1, 3);
      __builtin_prefetch(pixel + kAhead * from.stride + c, 0, 3);
      vf u = load_lanes(pixel + c, channels - c);
      if (gate.data) u = u * load_lanes(factor + c, channels - c);
      store(to.at(x, c), u);
    }
  }
}

// out = act(z) * gate
template <class T>
using FinishRow = void (*)(Lane z, RowOf<const T> gate, RowOf<T> out, int64_t n, int channels, bool past_caches);

template <class T, int kAct>
void finish_row(Lane z, RowOf<const T> gate, RowOf<T> out, int64_t n, int channels, bool past_caches) {
  for (int64_t x = 0; x < n; ++x) {
    T* const to = out.data + x * out.stride;
    const T* const factor = gate.data + x * gate.stride;
    for (int c = 0; c < channels; c += kLanes) {
      vf y = activate<kAct>(load(z.at(x, c)));
      if (gate.data) y = y * load_lanes(factor + c, channels - c);
      put(to + c, y, channels - c, past_caches);
    }
  }
}

// dgate = grad * act(z) of columns `own`, where it is asked for, and dz = grad * gate * act'(z)
template <class T>
using GradientRow = void (*)(Lane z, RowOf<const T> grad, RowOf<const T> gate, RowOf<T> dgate, Range own, Lane dz,
                             int64_t n, int channels);

template <class T, int kAct>
void gradient_row(Lane z, RowOf<const T> grad, RowOf<const T> gate, RowOf<T> dgate, Range own, Lane dz, int64_t n,
                  int channels) {
  for (int64_t x = 0; x < n; ++x) {
    const T* const gradient = grad.data + x * grad.stride;
    for (int c = 0; c < channels; c += kLanes) {
      vf g = load_lanes(gradient + c, channels - c), slope;
      const vf y = activate<kAct>(load(z.at(x, c)), &slope);
      if (gate.data) {
        if (dgate.data && own.has(x)) store_lanes(dgate.data + (x - own.begin) * dgate.stride + c, g * y, channels - c);
        g = g * load_lanes(gate.data + x * gate.stride + c, channels - c);
      }
      store(dz.at(x, c), g * slope);
    }
  }
}

// dx = du * gate, dgate = du * x
template <class T>
void input_row(Lane du, RowOf<const T> x, RowOf<const T> gate, RowOf<T> dx, RowOf<T> dgate, int64_t n, int channels,
               bool past_caches) {
  for (int64_t i = 0; i < n; ++i) {
    T* const to = dx.data + i * dx.stride;
    for (int c = 0; c < channels; c += kLanes) {
      vf d = load(du.at(i, c));
      if (gate.data) {
        const vf value = load_lanes(x.data + i * x.stride + c, channels - c);
        store_lanes(dgate.data + i * dgate.stride + c, d * value, channels - c);
        d = d * load_lanes(gate.data + i * gate.stride + c, channels - c);
      }
      put(to + c, d, channels - c, past_caches);
    }
  }
}

template <class T, int... kAct>
FinishRow<T> finish_row_of(int act, std::integer_sequence<int, kAct...>) {
  static constexpr FinishRow<T> rows[] = {finish_row<T, kAct>...};
  return rows[act];
}
template <class T, int... kAct>
GradientRow<T> gradient_row_of(int act, std::integer_sequence<int, kAct...>) {
  static constexpr GradientRow<T> rows[] = {gradient_row<T, kAct>...};
  return rows[act];
}
using AllActivations = std::make_integer_sequence<int, kActivations>;

// Whether the pixels of a map are whole lines, and so many that nobody finds them in caches.
template <class T>
bool goes_past_caches(const Params& p, const Plan& g, const void* map, int64_t pixels) {
  constexpr int64_t kItem = sizeof(T);
  return !std::is_same_v<T, Float16> && map && pixels * p.C * kItem >= kPastCaches &&
         reinterpret_cast<uintptr_t>(map) % kLine == 0 && p.C * kItem % kLine == 0 && g.width * kItem % kLine == 0;
}

#include "dwconv_near.inl.h"

// ---- passes --------------------------------------------------------------------------------------------------------

template <class T>
struct Pass {
  const Params& p;
  const Plan& g;
  Map<const T> x, pregate, postgate, state, grad;
  Map<T> out, dx, dpregate, dpostgate, dstate;
  int64_t before;  // columns of the state
  float* x_data;
  float* z_data;

  Pass(const Params& params, const Plan& plan, Scratch& scratch) : p(params), g(plan) {
    const auto read = [](const void* map, int64_t b, int64_t y, int64_t x) {
      return Map<const T>{static_cast<const T*>(map), b, y, x};
    };
    x = read(p.x, p.x_stride_b, p.x_stride_y, p.x_stride_x);
    pregate = read(p.pregate, p.pregate_stride_b, p.pregate_stride_y, p.pregate_stride_x);
    postgate = read(p.postgate, p.postgate_stride_b, p.postgate_stride_y, p.postgate_stride_x);
    state = read(p.state, p.state_stride_b, p.state_stride_y, p.state_stride_x);
    grad = read(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x);
    const auto written = [](void* map, int64_t b, int64_t y, int64_t x) {
      return Map<T>{static_cast<T*>(map), b, y, x};
    };
    out = written(p.out, p.out_stride_b, p.out_stride_y, p.out_stride_x);
    dpostgate = written(p.dpostgate, p.out_stride_b, p.out_stride_y, p.out_stride_x);
    dx = written(p.dx, p.dx_stride_b, p.dx_stride_y, p.dx_stride_x);
    dpregate = written(p.dpregate, p.dx_stride_b, p.dx_stride_y, p.dx_stride_x);
    dstate = written(p.dstate, p.H * p.pad_x * p.C, p.pad_x * p.C, p.C);
    before = p.state ? p.pad_x : 0;
    x_data = scratch.take<float>(g.x_floats);
    z_data = scratch.take<float>(g.z_floats);
  }

  Image input(int64_t image) const { return Image(p, image, p.H, p.W); }
  Image output(int64_t image) const { return Image(p, image, p.P, p.Q); }

  // Columns of a row of a patch by `fill`; the others become zeros.
  template <class Fill>
  void fill(const Patch& to, int64_t y, Range columns, int vectors, const Fill& fill) const {
    const int64_t begin = columns.empty() ? to.x : columns.begin, end = columns.empty() ? to.x : columns.end;
    for (int v = 0; v < vectors; ++v) {
      float *const row = to.at(v, y, to.x), *const first = to.at(v, y, begin), *const last = to.at(v, y, end);
      zero(row, first - row), zero(last, row + to.row - last);
    }
    if (!columns.empty()) fill(Lane{to.at(0, y, begin), to.plane});
  }
  // What an item reads of x, times its gate, and of the state.
  void fill_x(const Patch& to, const Image& at, const Item& item, const Unit& u) const {
    const Range rows = g.x_rows(item), columns = g.x_columns(item);
    const int64_t from_state = std::max<int64_t>(0, std::min(columns.end, before) - columns.begin);
    const int64_t first = columns.begin + from_state - before, rest = columns.size() - from_state;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      fill(to, y, columns, u.vectors, [&](Lane row) {
        if (from_state)
          fill_row<T>(row, at.row(state, y, columns.begin, u.first_channel), {nullptr, 0}, from_state, u.channels);
        fill_row<T>({row.at(from_state, 0), row.plane}, at.row(x, y, first, u.first_channel),
                    at.row(pregate, y, first, u.first_channel), rest, u.channels);
      });
    }
  }
  // Item `i` of a block.
  Item item(int64_t i) const { return g.item(i / g.segments % g.bands, i % g.segments); }
  int64_t image(int64_t i) const { return i / g.segments / g.bands; }
};

template <class T>
struct Forward : Pass<T> {
  using Base = Pass<T>;
  using Base::Base;
  using Base::g, Base::p;

  void run(const float* packed, int64_t begin, int64_t end) {
    const auto finish = finish_row_of<T>(p.act, AllActivations{});
    const bool past_caches = goes_past_caches<T>(p, g, p.out, g.images * p.P * p.Q);
    const int columns = g.columns_for(g.x.out);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit u(p, g, unit);
      const float* const weights = packed + u.block * g.packed;
      const float* const bias = weights + g.width * g.taps;
      const Item item = this->item(u.items_begin);
      const Image in = this->input(this->image(u.items_begin)), out = this->output(this->image(u.items_begin));
      if (g.near) {
        run_near(item, in, out, u, weights, bias, past_caches);
        continue;
      }
      const Patch patch = g.x_patch(item, this->x_data);
      this->fill_x(patch, in, item, u);
      // Whole tiles of whole vectors leave from the registers where nothing is left to be done.
      const bool plain = std::is_same_v<T, float> && p.act == kNone && !p.postgate && g.x.step == 1 &&
                         u.channels % kLanes == 0 && !past_caches;
      const int64_t first = item.out_x.begin, n = item.out_x.size(), direct = plain ? n / columns * columns : 0;
      if constexpr (std::is_same_v<T, float>) {
        if (direct) {
          float* const to = out.row(this->out, item.out_y.begin, first, u.first_channel).data;
          convolve(g.y, g.x, columns, patch, item.out_y, {first, first + direct}, weights, bias,
                   Target(to, p.out_stride_y, p.out_stride_x), u.vectors);
        }
      }
      if (direct == n) continue;
      const Range rest = {first + direct, item.out_x.end};
      const Patch z = g.z_patch(item.out_y, rest, this->z_data);
      convolve(g.y, g.x, columns, patch, item.out_y, rest, weights, bias, Target(z), u.vectors);
      for (int64_t y = item.out_y.begin; y < item.out_y.end; ++y) {
        finish({z.at(0, y, rest.begin), z.plane}, out.row(this->postgate, y, rest.begin, u.first_channel),
               out.row(this->out, y, rest.begin, u.first_channel), n - direct, u.channels, past_caches);
      }
    }
    if (past_caches) stream_fence();
  }

  // From memory to memory.
  void run_near(const Item& item, const Image& in, const Image& out, const Unit& u, const float* weights,
                const float* bias, bool past_caches) {
    const auto finish = finish_row_of<T>(p.act, AllActivations{});
    const RowOf<T> to = out.row(this->out, 0, 0, u.first_channel);
    const Near<T> near = {g.y,
                          g.x,
                          g.columns_for(g.x.out),
                          g.pairs,
                          past_caches,
                          weights,
                          bias,
                          in.row(this->x, 0, 0, u.first_channel),
                          p.x_stride_y,
                          to,
                          p.out_stride_y,
                          this->z_data};
    near.run(item.out_y, item.out_x, u.vectors, p.act == kNone && !p.postgate, [&](int64_t y, int64_t x, int columns) {
      finish({this->z_data, kLanes, int64_t{u.vectors} * kLanes}, out.row(this->postgate, y, x, u.first_channel),
             out.row(this->out, y, x, u.first_channel), columns, u.channels, past_caches);
    });
  }
};

template <class T>
struct Backward : Pass<T> {
  using Base = Pass<T>;
  using Base::before, Base::g, Base::p, Base::z_data;

  float* dz_data;
  float* none;  // a bias of zeros

  Backward(const Params& params, const Plan& plan, Scratch& scratch) : Base(params, plan, scratch) {
    dz_data = scratch.take<float>(g.dz_floats);
    none = scratch.take<float>(g.width);
  }

  // The gradient of the convolution that an item needs, and the part of the gate's gradient that is the item's own.
  void fill_dz(const Patch& to, const Patch& x, const Image& at, const Item& item, const Unit& u, const float* weights,
               const float* bias) const {
    const auto gradient = gradient_row_of<T>(p.act, AllActivations{});
    const Range r = item.dz_x, own = {item.out_x.begin - r.begin, item.out_x.end - r.begin};
    const Patch z = g.z_patch(item.dz_y, r, z_data);
    if (g.needs_z) convolve(g.y, g.x, g.columns_for(g.x.out), x, item.dz_y, r, weights, bias, Target(z), u.vectors);
    for (int64_t y = item.dz_y.begin; y < item.dz_y.end; ++y) {
      const auto grad = at.row(this->grad, y, r.begin, u.first_channel);
      this->fill(to, y, r, u.vectors, [&](Lane row) {
        if (!g.needs_z) return fill_row<T>(row, grad, {nullptr, 0}, r.size(), u.channels);
        RowOf<T> dgate = at.row(this->dpostgate, y, item.out_x.begin, u.first_channel);
        if (!item.out_y.has(y)) dgate.data = nullptr;
        gradient({z.at(0, y, r.begin), z.plane}, grad, at.row(this->postgate, y, r.begin, u.first_channel), dgate, own,
                 row, r.size(), u.channels);
      });
    }
  }

  // Columns r of row y of the gradient of x, in z, to where they belong.
  void write_dx(const Patch& z, int64_t y, const Image& at, Range r, const Unit& u, bool past_caches) const {
    const int64_t begin = r.begin, channel = u.first_channel;
    const int64_t to_state = std::max<int64_t>(0, std::min(r.end, before) - begin);
    const Lane row = {z.at(0, y, begin), z.plane};
    if (to_state)
      input_row<T>(row, {nullptr, 0}, {nullptr, 0}, at.row(this->dstate, y, begin, channel), {nullptr, 0}, to_state,
                   u.channels, false);
    const int64_t x = begin + to_state - before;
    input_row<T>({row.at(to_state, 0), z.plane}, at.row(this->x, y, x, channel), at.row(this->pregate, y, x, channel),
                 at.row(this->dx, y, x, channel), at.row(this->dpregate, y, x, channel), r.size() - to_state,
                 u.channels, past_caches);
  }

  // As in forward, whole tiles leave from the registers where nothing is left to be done.
  void gradient_of_x(const Patch& dz, const Image& in, const Item& item, const Unit& u, const float* flipped,
                     bool past_caches) const {
    const Axis y = g.y.flipped(), x = g.x.flipped();
    const int columns = g.columns_for(g.x.in);
    const bool plain =
        std::is_same_v<T, float> && !p.pregate && !p.state && x.step == 1 && u.channels % kLanes == 0 && !past_caches;
    const int64_t first = item.in_x.begin, n = item.in_x.size(), direct = plain ? n / columns * columns : 0;
    if constexpr (std::is_same_v<T, float>) {
      if (direct) {
        float* const to = in.row(this->dx, item.in_y.begin, first, u.first_channel).data;
        convolve(y, x, columns, dz, item.in_y, {first, first + direct}, flipped, none,
                 Target(to, p.dx_stride_y, p.dx_stride_x), u.vectors);
      }
    }
    if (direct == n) return;
    const Range rest = {first + direct, item.in_x.end};
    const Patch du = g.z_patch(item.in_y, rest, z_data);
    convolve(y, x, columns, dz, item.in_y, rest, flipped, none, Target(du), u.vectors);
    for (int64_t row = item.in_y.begin; row < item.in_y.end; ++row) write_dx(du, row, in, rest, u, past_caches);
  }

  void run(const float* packed, float* partials, int64_t begin, int64_t end) {
    zero(none, g.width);
    const bool past_caches = goes_past_caches<T>(p, g, p.dx, g.images * p.H * p.W);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit u(p, g, unit);
      const float* const weights = packed + u.block * g.packed;
      const float* const flipped = weights + g.width * g.taps;
      float* const sums = partials + unit * g.sums;
      zero(sums, g.sums);
      for (int64_t i = u.items_begin; i < u.items_end; ++i) {
        const Item item = this->item(i);
        const Image in = this->input(this->image(i)), out = this->output(this->image(i));
        if (g.near) {
          run_near(item, in, out, u, flipped, sums, past_caches);
          continue;
        }
        const Patch x = g.x_patch(item, this->x_data), dz = g.dz_patch(item, dz_data);
        this->fill_x(x, in, item, u);
        fill_dz(dz, x, out, item, u, weights, flipped + g.width * g.taps);
        correlate_rows(g.y, g.x, g.columns_for(g.x.out), dz, x, item.out_y, item.out_x, sums, u.vectors);
        if (p.dbias) add_columns(sums + g.width * g.taps, dz, item.out_y, item.out_x, u.vectors);
        gradient_of_x(dz, in, item, u, flipped, past_caches);
      }
    }
    if (past_caches) stream_fence();
  }

  void run_near(const Item& item, const Image& in, const Image& out, const Unit& u, const float* flipped, float* sums,
                bool past_caches) const {
    const RowOf<const T> grad = out.row(this->grad, 0, 0, u.first_channel);
    const NearGradient<T> gradient = {
        g.y,         g.x, g.columns_for(g.x.out), grad, p.grad_out_stride_y, in.row(this->x, 0, 0, u.first_channel),
        p.x_stride_y};
    gradient.add_weights(item.out_y, item.out_x, u.vectors, sums);
    if (p.dbias) gradient.add_bias(item.out_y, item.out_x, u.vectors, sums + g.width * g.taps);
    const Near<T> near = {g.y.flipped(),
                          g.x.flipped(),
                          g.columns_for(g.x.in),
                          g.pairs,
                          past_caches,
                          flipped,
                          none,
                          grad,
                          p.grad_out_stride_y,
                          in.row(this->dx, 0, 0, u.first_channel),
                          p.dx_stride_y,
                          z_data};
    near.run(item.in_y, item.in_x, u.vectors, true, [](int64_t, int64_t, int) {});
  }

  static void add_columns(float* sums, const Patch& dz, Range rows, Range r, int vectors) {
    for (int v = 0; v < vectors; ++v, sums += kLanes) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        const float* from = dz.at(v, y, r.begin);
        vf total{};
        for (int64_t x = r.begin; x < r.end; ++x, from += kLanes) total += load(from);
        store(sums, load(sums) + total);
      }
    }
  }
};

// ---- entry points --------------------------------------------------------------------------------------------------

template <bool backward>
int64_t pack_units(const Params& params) {
  return Plan(turned(params), backward).blocks;
}
template <bool backward>
void pack(const Params& params, float* workspace, int64_t begin, int64_t end) {
  const Params p = turned(params);
  const Plan g(p, backward);
  dispatch_dtype(p.weight_dtype, [&](auto type) { pack_weights<decltype(type)>(p, g, workspace, begin, end); });
}

int64_t forward_floats(const Params& params) {
  const Params p = turned(params);
  const Plan g(p, false);
  return g.blocks * g.packed;
}
int64_t forward_units(const Params& params) { return Plan(turned(params), false).units(); }
void forward(const Params& params, float* workspace, int64_t begin, int64_t end) {
  const Params p = turned(params);
  const Plan g = Plan(p, false).with_scratch();
  dispatch_dtype(p.dtype, [&](auto type) {
    run_pass<Forward<decltype(type)>>(p, g, static_cast<const float*>(workspace), begin, end);
  });
}

int64_t backward_floats(const Params& params) {
  const Params p = turned(params);
  const Plan g(p, true);
  return g.blocks * g.packed + g.units() * g.sums;
}
int64_t backward_units(const Params& params) { return Plan(turned(params), true).units(); }
void backward(const Params& params, float* workspace, int64_t begin, int64_t end) {
  const Params p = turned(params);
  const Plan g = Plan(p, true).with_scratch();
  float* const partials = workspace + g.blocks * g.packed;
  dispatch_dtype(p.dtype, [&](auto type) {
    run_pass<Backward<decltype(type)>>(p, g, static_cast<const float*>(workspace), partials, begin, end);
  });
}

// Adds the sums of all units of a block into the first one's, and writes them.
int64_t reduce_units(const Params& params) { return Plan(turned(params), true).blocks; }
void reduce(const Params& params, float* workspace, int64_t begin, int64_t end) {
  const Params p = turned(params);
  const Plan g(p, true);
  for (int64_t block = begin; block < end; ++block) {
    float* const sums = workspace + g.blocks * g.packed + block * g.sums;
    for (int64_t group = 1; group < g.groups; ++group) {
      const float* const more = sums + group * g.blocks * g.sums;
      for (int64_t i = 0; i < g.sums; i += kLanes) store(sums + i, load(sums + i) + load(more + i));
    }
    const int64_t first = block * g.width, channels = std::min(g.width, p.C - first);
    for (int64_t c = 0; c < channels; ++c) {
      const float* const from = sums + c / kLanes * g.taps * kLanes + c % kLanes;
      for (int64_t t = 0; t < g.taps; ++t)
        store_scalar(p.dweight, p.weight_dtype, (first + c) * g.taps + t, from[t * kLanes]);
      if (p.dbias) store_scalar(p.dbias, p.bias_dtype, first + c, sums[g.width * g.taps + c]);
    }
  }
}

constexpr Step<Params> kForward[] = {{pack_units<false>, pack<false>}, {forward_units, forward}};
constexpr Step<Params> kBackward[] = {
    {pack_units<true>, pack<true>}, {backward_units, backward}, {reduce_units, reduce}};

}  // namespace dwconv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<DwconvParams>* EFFVIT_KERNEL_NAME(dwconv)() {
  namespace impl = EFFVIT_ISA_NAME::dwconv_impl;
  static constexpr Kernel<DwconvParams> kernel = {routine(impl::kForward, impl::forward_floats),
                                                  routine(impl::kBackward, impl::backward_floats)};
  return &kernel;
}
}  // namespace effvit::cpu
