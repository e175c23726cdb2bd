// dwconv on the CPU: forward and backward, on raw pointers, compiled once per ISA. A sequence is a map of one row.
//
// A unit is a block of channels of an item: of a band of rows, and of a segment of columns where rows are long. What it
// reads of x, times its gate, goes to scratch in float32 with zeros around its columns. From there tiles of columns are
// convolved in registers, up to 8 taps of a row at once; taps that only find zeros are left out, and so are rows. With
// a dilation d, every d-th column is a map of its own. A row of the convolution leaves through activation and gate.
// Backward computes the convolution again where activation or gate need it. The gradient dz of the convolution goes to
// scratch as x does; its stencil with the flipped weights is the gradient of x, and its products with rows of x are
// that of the weights. Items overlap by the reach of the filter. Sums over the items of a unit are partial ones, added
// at the end.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace dwconv_impl {

#include "stencil.inl.h"

#include "dwconv_plan.inl.h"

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
    }
  }
}

// ---- stencils ------------------------------------------------------------------------------------------------------

// to[n] = start + sum over rows i and kTaps taps j of w[i, j] x[i][n + j], for `tiles` times kColumns columns n and
// each vector of channels. Columns are steps apart, x rows x_row. start: null is what `to` holds.
using Stencil = void (*)(const float* x, int64_t x_row, int64_t x_step, int64_t rows, const float* w, int64_t w_row,
                         int64_t w_vector, const float* start, float* to, int64_t to_step, int64_t tiles, int vectors);

template <int kTaps, int kColumns>
void stencil(const float* x, int64_t x_row, int64_t x_step, int64_t rows, const float* w, int64_t w_row,
             int64_t w_vector, const float* start, float* to, int64_t to_step, int64_t tiles, int vectors) {
  for (int64_t tile = 0; tile < tiles; ++tile, x += kColumns * x_step, to += kColumns * to_step) {
    for (int c = 0; c < vectors; ++c) {
      float* const result = to + c * kLanes;
      vf acc[kColumns];
      if (start) {
        const vf from = load(start + c * kLanes);
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) acc[n] = from;
      } else {
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) acc[n] = load(result + n * to_step);
      }
      stencil_tile<kTaps>(acc, StridedRows{x, x_row}, 0, rows, c * kLanes, x_step, w + c * w_vector, w_row);
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) store(result + n * to_step, acc[n]);
    }
  }
}

// sums[i, j] += sum over `tiles` times kColumns columns n of dz[n] x[i][n + j], for rows i and kTaps taps j and each
// vector of channels.
using Correlate = void (*)(const float* dz, int64_t dz_step, const float* x, int64_t x_row, int64_t x_step,
                           int64_t rows, float* sums, int64_t sums_row, int64_t sums_vector, int64_t tiles,
                           int vectors);

template <int kTaps, int kColumns>
void correlate(const float* dz, int64_t dz_step, const float* x, int64_t x_row, int64_t x_step, int64_t rows,
               float* sums, int64_t sums_row, int64_t sums_vector, int64_t tiles, int vectors) {
  for (int c = 0; c < vectors; ++c) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* e = dz + c * kLanes;
      const float* xi = x + i * x_row + c * kLanes;
      vf acc[kTaps];
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) acc[j] = vf{};
      for (int64_t tile = 0; tile < tiles; ++tile, e += kColumns * dz_step, xi += kColumns * x_step) {
        vf en[kColumns];
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) en[n] = load(e + n * dz_step);
        correlate_tile(acc, en, xi, x_step);
      }
      float* const to = sums + c * sums_vector + i * sums_row;
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) store(to + j * kLanes, load(to + j * kLanes) + acc[j]);
    }
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

// Row y of a convolution, columns r of it, from `from`: to[.., width] from column r.begin on. What lies behind r.end,
// up to a tile for every step, is overwritten.
void convolve(const Axis& ay, const Axis& ax, int columns, const Patch& from, int64_t y, Range r, const float* w,
              const float* start, float* to, int vectors) {
  const int64_t width = from.width, taps = ay.k * ax.k, tile_columns = columns * ax.step;
  const Range i = ay.taps(y, y);
  const auto taps_of = [&](int64_t first) {
    return i.empty() ? Range{0, 0} : ax.taps(first, std::min(first + tile_columns - ax.step, r.end - 1));
  };
  for (int64_t first_column = r.begin; first_column < std::min(r.end, r.begin + ax.step); ++first_column) {
    for (int64_t first = first_column; first < r.end;) {
      const Range j = taps_of(first);
      int64_t tiles = 1, next = first + tile_columns;
      for (; next < r.end; next += tile_columns, ++tiles) {
        const Range other = taps_of(next);
        if (other.begin != j.begin || other.end != j.end) break;
      }
      float* const result = to + (first - r.begin) * width;
      const int64_t parts = std::max<int64_t>(1, ceil_div(j.size(), kMostTaps));
      if (j.empty()) {
        for (int64_t n = 0; n < tiles * columns; ++n) {
          for (int c = 0; c < vectors * kLanes; c += kLanes) store(result + n * ax.step * width + c, load(start + c));
        }
      }
      for (int64_t k = 0; k < parts && !j.empty(); ++k) {
        const int64_t j0 = j.begin + part(j.size(), k, parts).begin, n = part(j.size(), k, parts).size();
        const float* const x = from.at(y + i.begin * ay.step - ay.pad, first + j0 * ax.step - ax.pad);
        stencil_of(n, columns)(x, ay.step * from.row, ax.step * width, i.size(), w + (i.begin * ax.k + j0) * kLanes,
                               ax.k * kLanes, taps * kLanes, k == 0 ? start : nullptr, result, ax.step * width, tiles,
                               vectors);
      }
      first = next;
    }
  }
}

// Adds the products of row y of dz, columns r, with the x that these outputs read, to sums [vectors, kh, kw, kLanes].
void correlate_row(const Axis& ay, const Axis& ax, int columns, const Patch& dz, const Patch& from, int64_t y, Range r,
                   float* sums, int vectors) {
  const int64_t width = from.width;
  const Range i = ay.taps(y, y);
  if (i.empty()) return;
  const int64_t parts = ceil_div(ax.k, kMostTaps);
  for (int64_t first_column = r.begin; first_column < std::min(r.end, r.begin + ax.step); ++first_column) {
    for (int64_t k = 0; k < parts; ++k) {
      const Range j = part(ax.k, k, parts), q = ax.outputs({first_column, r.end}, j.begin, j.end - 1);
      if (q.empty()) continue;
      const int64_t n = ceil_div(q.size(), ax.step), tiles = n / columns;
      float* const to = sums + (i.begin * ax.k + j.begin) * kLanes;
      const auto run = [&](int tile_columns, int64_t begin, int64_t tiles_there) {
        if (tiles_there == 0) return;
        const int64_t column = q.begin + begin * ax.step;
        correlate_of(j.size(), tile_columns)(
            dz.at(y, column), ax.step * width,
            from.at(y + i.begin * ay.step - ay.pad, column + j.begin * ax.step - ax.pad), ay.step * from.row,
            ax.step * width, i.size(), to, ax.k * kLanes, ay.k * ax.k * kLanes, tiles_there, vectors);
      };
      run(columns, 0, tiles);
      run(1, tiles * columns, n - tiles * columns);  // exactly: what lies beyond may be no number
    }
  }
}

// ---- rows of maps --------------------------------------------------------------------------------------------------

template <class T>
void fill_row(float* to, int64_t width, RowOf<const T> from, RowOf<const T> gate, int64_t n, int channels) {
  for (int64_t x = 0; x < n; ++x, to += width) {
    const T* const pixel = from.data + x * from.stride;
    if (gate.data) {
      const T* const factor = gate.data + x * gate.stride;
      for (int c = 0; c < channels; c += kLanes)
        store(to + c, load_lanes(pixel + c, channels - c) * load_lanes(factor + c, channels - c));
    } else {
      load_row(to, pixel, channels);
    }
  }
}

// out = act(z) * gate
template <class T>
using FinishRow = void (*)(const float* z, int64_t width, RowOf<const T> gate, RowOf<T> out, int64_t n, int channels,
                           bool past_caches);

template <class T, int kAct>
void finish_row(const float* z, int64_t width, RowOf<const T> gate, RowOf<T> out, int64_t n, int channels,
                bool past_caches) {
  for (int64_t x = 0; x < n; ++x) {
    const float* const from = z + x * width;
    T* const to = out.data + x * out.stride;
    if (gate.data) {
      const T* const factor = gate.data + x * gate.stride;
      for (int c = 0; c < channels; c += kLanes) {
        const vf y = activate<kAct>(load(from + c)) * load_lanes(factor + c, channels - c);
        put(to + c, y, channels - c, past_caches);
      }
    } else {
      for (int c = 0; c < channels; c += kLanes) put(to + c, activate<kAct>(load(from + c)), channels - c, past_caches);
    }
  }
}

// dgate = grad * act(z) of columns `own`, where it is asked for, and dz = grad * gate * act'(z)
template <class T>
using GradientRow = void (*)(const float* z, int64_t width, RowOf<const T> grad, RowOf<const T> gate, RowOf<T> dgate,
                             Range own, float* dz, int64_t n, int channels);

template <class T, int kAct>
void gradient_row(const float* z, int64_t width, RowOf<const T> grad, RowOf<const T> gate, RowOf<T> dgate, Range own,
                  float* dz, int64_t n, int channels) {
  for (int64_t x = 0; x < n; ++x) {
    const float* const from = z + x * width;
    const T* const gradient = grad.data + x * grad.stride;
    float* const to = dz + x * width;
    for (int c = 0; c < channels; c += kLanes) {
      vf g = load_lanes(gradient + c, channels - c), slope;
      const vf y = activate<kAct>(load(from + c), &slope);
      if (gate.data) {
        if (dgate.data && own.has(x)) store_lanes(dgate.data + (x - own.begin) * dgate.stride + c, g * y, channels - c);
        g = g * load_lanes(gate.data + x * gate.stride + c, channels - c);
      }
      store(to + c, g * slope);
    }
  }
}

// dx = du * gate, dgate = du * x
template <class T>
void input_row(const float* du, int64_t width, RowOf<const T> x, RowOf<const T> gate, RowOf<T> dx, RowOf<T> dgate,
               int64_t n, int channels, bool past_caches) {
  for (int64_t i = 0; i < n; ++i) {
    const float* const from = du + i * width;
    T* const to = dx.data + i * dx.stride;
    for (int c = 0; c < channels; c += kLanes) {
      vf d = load(from + c);
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

// ---- passes --------------------------------------------------------------------------------------------------------

template <class T>
struct Pass {
  const Params& p;
  const Plan& g;
  Map<const T> x, pregate, postgate, state, grad;
  Map<T> out, dx, dpregate, dpostgate, dstate;
  int64_t before;  // columns of the state
  float* x_data;
  float* z;

  Pass(const Params& params, const Plan& plan, Scratch& scratch) : p(params), g(plan) {
    const auto read = [](const void* map, int64_t b, int64_t y, int64_t x) {
      return Map<const T>{static_cast<const T*>(map), b, y, x};
    };
    x = read(p.x, p.x_stride_b, p.x_stride_y, p.x_stride_x);
    pregate = read(p.pregate, p.pregate_stride_b, p.pregate_stride_y, p.pregate_stride_x);
    postgate = read(p.postgate, p.postgate_stride_b, p.postgate_stride_y, p.postgate_stride_x);
    state = read(p.state, p.state_stride_b, p.state_stride_y, p.state_stride_x);
    grad = read(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x);
    const auto written = [&](void* map, int64_t H, int64_t W) {
      return Map<T>{static_cast<T*>(map), H * W * p.C, W * p.C, p.C};
    };
    const int64_t H = p.windows_y * p.H, W = p.windows_x * p.W, P = p.windows_y * p.P, Q = p.windows_x * p.Q;
    out = written(p.out, P, Q), dpostgate = written(p.dpostgate, P, Q);
    dx = written(p.dx, H, W), dpregate = written(p.dpregate, H, W), dstate = written(p.dstate, p.H, p.pad_x);
    before = p.state ? p.pad_x : 0;
    x_data = scratch.take<float>(g.x_floats);
    z = scratch.take<float>(g.z_floats);
  }

  Image input(int64_t image) const { return Image(p, image, p.H, p.W); }
  Image output(int64_t image) const { return Image(p, image, p.P, p.Q); }

  // Columns [begin, end) of a row of a patch from `begin` on; the patch's other columns become zeros.
  template <class Fill>
  void fill(const Patch& to, int64_t y, Range columns, const Fill& fill) const {
    float* const row = to.at(y, to.x);
    if (columns.empty()) return zero(row, to.row);
    float* const first = to.at(y, columns.begin);
    float* const last = to.at(y, columns.end);
    zero(row, first - row), zero(last, row + to.row - last);
    fill(first);
  }
  // What an item reads of x, times its gate, and of the state.
  void fill_x(const Patch& to, int64_t image, const Item& item, const Unit& u) const {
    const Range rows = g.x_rows(item), columns = g.x_columns(item);
    const Image at = input(image);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      fill(to, y, columns, [&](float* data) {
        const int64_t from_state = std::max<int64_t>(0, std::min(columns.end, before) - columns.begin);
        const int64_t begin = columns.begin + from_state - before;
        if (from_state)
          fill_row<T>(data, g.width, at.row(state, y, columns.begin, u.first_channel), {nullptr, 0}, from_state,
                      u.channels);
        fill_row<T>(data + from_state * g.width, g.width, at.row(x, y, begin, u.first_channel),
                    at.row(pregate, y, begin, u.first_channel), columns.end - before - begin, u.channels);
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
  using Base::g, Base::p, Base::z;

  void run(const float* packed, int64_t begin, int64_t end) {
    const auto finish = finish_row_of<T>(p.act, AllActivations{});
    const bool past_caches = goes_past_caches<T>(p, g, p.out, g.images * p.P * p.Q);
    const int columns = g.columns_for(g.x.out);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit u(p, g, unit);
      const float* const weights = packed + u.block * g.packed;
      const float* const bias = weights + g.width * g.taps;
      const Item item = this->item(u.items_begin);
      const int64_t image = this->image(u.items_begin);
      const Patch patch = g.x_patch(item, this->x_data);
      this->fill_x(patch, image, item, u);
      const Image at = this->output(image);
      for (int64_t y = item.out_y.begin; y < item.out_y.end; ++y) {
        convolve(g.y, g.x, columns, patch, y, item.out_x, weights, bias, z, u.vectors);
        finish(z, g.width, at.row(this->postgate, y, item.out_x.begin, u.first_channel),
               at.row(this->out, y, item.out_x.begin, u.first_channel), item.out_x.size(), u.channels, past_caches);
      }
    }
    if (past_caches) stream_fence();
  }
};

template <class T>
struct Backward : Pass<T> {
  using Base = Pass<T>;
  using Base::before, Base::g, Base::p, Base::z;

  float* dz_data;
  const float* none;  // a bias of zeros

  Backward(const Params& params, const Plan& plan, Scratch& scratch) : Base(params, plan, scratch) {
    dz_data = scratch.take<float>(g.dz_floats);
    none = scratch.take<float>(g.width);
  }

  // Row y of dz, all columns that the item needs, with the part of the gate's gradient that is the item's own.
  void fill_dz(const Patch& to, const Patch& x, int columns, int64_t y, const Image& at, const Item& item,
               const Unit& u, const float* weights, const float* bias) const {
    const Range r = item.dz_x;
    const auto grad = at.row(this->grad, y, r.begin, u.first_channel);
    if (g.needs_z) convolve(g.y, g.x, columns, x, y, r, weights, bias, z, u.vectors);
    this->fill(to, y, r, [&](float* data) {
      if (!g.needs_z) return fill_row<T>(data, g.width, grad, {nullptr, 0}, r.size(), u.channels);
      RowOf<T> dgate = at.row(this->dpostgate, y, item.out_x.begin, u.first_channel);
      if (!item.out_y.has(y)) dgate.data = nullptr;
      const Range own = {item.out_x.begin - r.begin, item.out_x.end - r.begin};
      gradient_row_of<T>(p.act, AllActivations{})(z, g.width, grad, at.row(this->postgate, y, r.begin, u.first_channel),
                                                  dgate, own, data, r.size(), u.channels);
    });
  }

  // Row y of the gradient of x, in z, to where it belongs.
  void write_dx(int64_t y, const Image& at, const Item& item, const Unit& u, bool past_caches) const {
    const int64_t begin = item.in_x.begin, channel = u.first_channel;
    const int64_t to_state = std::max<int64_t>(0, std::min(item.in_x.end, before) - begin);
    if (to_state)
      input_row<T>(z, g.width, {nullptr, 0}, {nullptr, 0}, at.row(this->dstate, y, begin, channel), {nullptr, 0},
                   to_state, u.channels, false);
    const int64_t x = begin + to_state - before;
    input_row<T>(z + to_state * g.width, g.width, at.row(this->x, y, x, channel), at.row(this->pregate, y, x, channel),
                 at.row(this->dx, y, x, channel), at.row(this->dpregate, y, x, channel), item.in_x.size() - to_state,
                 u.channels, past_caches);
  }

  void run(const float* packed, float* partials, int64_t begin, int64_t end) {
    zero(const_cast<float*>(none), g.width);
    const bool past_caches = goes_past_caches<T>(p, g, p.dx, g.images * p.H * p.W);
    const Axis flipped_y = g.y.flipped(), flipped_x = g.x.flipped();
    const int columns = g.columns_for(g.x.out), flipped_columns = g.columns_for(g.x.in);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit u(p, g, unit);
      const float* const weights = packed + u.block * g.packed;
      const float* const flipped = weights + g.width * g.taps;
      float* const sums = partials + unit * g.sums;
      zero(sums, g.sums);
      for (int64_t i = u.items_begin; i < u.items_end; ++i) {
        const Item item = this->item(i);
        const Image in = this->input(this->image(i)), out = this->output(this->image(i));
        const Patch x = g.x_patch(item, this->x_data), dz = g.dz_patch(item, dz_data);
        this->fill_x(x, this->image(i), item, u);
        for (int64_t y = item.dz_y.begin; y < item.dz_y.end; ++y) {
          fill_dz(dz, x, columns, y, out, item, u, weights, flipped + g.width * g.taps);
          if (!item.out_y.has(y)) continue;
          correlate_row(g.y, g.x, columns, dz, x, y, item.out_x, sums, u.vectors);
          if (p.dbias) add_columns(sums + g.width * g.taps, dz, y, item.out_x, u.vectors);
        }
        for (int64_t y = item.in_y.begin; y < item.in_y.end; ++y) {
          convolve(flipped_y, flipped_x, flipped_columns, dz, y, item.in_x, flipped, none, z, u.vectors);
          write_dx(y, in, item, u, past_caches);
        }
      }
    }
    if (past_caches) stream_fence();
  }

  static void add_columns(float* sums, const Patch& dz, int64_t y, Range r, int vectors) {
    for (int c = 0; c < vectors * kLanes; c += kLanes) {
      const float* from = dz.at(y, r.begin) + c;
      vf total{};
      for (int64_t x = r.begin; x < r.end; ++x, from += dz.width) total += load(from);
      store(sums + c, load(sums + c) + total);
    }
  }
};

// ---- entry points --------------------------------------------------------------------------------------------------

template <bool backward>
int64_t pack_units(const Params& p) {
  return Plan(p, backward).blocks;
}
template <bool backward>
void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p, backward);
  dispatch_dtype(p.weight_dtype, [&](auto type) { pack_weights<decltype(type)>(p, g, workspace, begin, end); });
}

int64_t forward_floats(const Params& p) {
  const Plan g(p, false);
  return g.blocks * g.packed;
}
int64_t forward_units(const Params& p) { return Plan(p, false).units(); }
void forward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p, false);
  dispatch_dtype(p.dtype, [&](auto type) {
    run_pass<Forward<decltype(type)>>(p, g, static_cast<const float*>(workspace), begin, end);
  });
}

int64_t backward_floats(const Params& p) {
  const Plan g(p, true);
  return g.blocks * g.packed + g.units() * g.sums;
}
int64_t backward_units(const Params& p) { return Plan(p, true).units(); }
void backward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p, true);
  float* const partials = workspace + g.blocks * g.packed;
  dispatch_dtype(p.dtype, [&](auto type) {
    run_pass<Backward<decltype(type)>>(p, g, static_cast<const float*>(workspace), partials, begin, end);
  });
}

// Adds the sums of all units of a block into the first one's, and writes them.
int64_t reduce_units(const Params& p) { return Plan(p, true).blocks; }
void reduce(const Params& p, float* workspace, int64_t begin, int64_t end) {
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
