// dwconv_glu on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// A unit is a block of channels of a band of rows. Rows of the map enter a ring of k rows in scratch, in float32 and
// with zeros around them: the stencil has neither borders nor tails, and an element is read from memory once. A row of
// the convolution leaves it through the activation and the gate.
// Backward computes the convolution again, row by row: dv and the gradient dz of the convolution follow from it. dz
// enters a ring of its own, whose stencil with the flipped weights is dx, and is multiplied with the k rows of x around
// it for dweight. Bands overlap by k - 1 rows of dz. Sums over images and bands are partial ones, added at the end.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace dwconv_glu_impl {

#include "stencil.inl.h"

using Params = DwconvGluParams;

constexpr int kChannels = 64, kManyChannels = 128;  // of a block
constexpr int64_t kNearBytes = 40 << 10, kRingBytes = 512 << 10;  // of a ring
constexpr int64_t kUnits = 64;
constexpr int64_t kPastCaches = 16 << 20;  // maps of more bytes are written past them, see rows.inl.h
constexpr int64_t kLine = 64;

struct Plan {
  int k, r, taps;  // size of the stencil, half of it, its weights
  int columns, tiles;  // of the map that a register tile has; tiles of a row
  int64_t width;  // channels of a block, whole vectors
  int64_t row;  // floats of a row of a ring
  int64_t blocks, groups, bands;  // of channels, images and rows
  int64_t packed, sums;  // floats of the weights, and of the sums, of a block

  Plan(const Params& p, bool backward) {
    const bool small = small_tiles();
    k = p.k, r = k / 2, taps = k * k;
    const int64_t by_7 = ceil_div(p.W, 7) * 7, by_8 = ceil_div(p.W, 8) * 8;
    columns = by_7 <= by_8 ? 7 : 8;
    tiles = static_cast<int>(ceil_div(p.W, columns));
    const int64_t channel_bytes = k * (int64_t{tiles} * columns + 2 * r) * int64_t{sizeof(float)};
    int64_t most = kManyChannels * channel_bytes <= kNearBytes ? kManyChannels : kChannels;
    most = small ? kLanes : std::max<int64_t>(kLanes, std::min(most, kRingBytes / channel_bytes / kLanes * kLanes));
    const int64_t even = ceil_div(p.C, ceil_div(p.C, most)), whole = most < 32 ? kLanes : 32;
    width = std::min(ceil_div(even, whole) * whole, ceil_div(p.C, kLanes) * kLanes);
    row = (int64_t{tiles} * columns + 2 * r) * width;
    blocks = ceil_div(p.C, width);
    groups = backward ? std::min(p.B, std::max<int64_t>(1, kUnits / blocks)) : p.B;
    const int64_t least = small ? 2 : backward ? std::max(8, 4 * (k - 1)) : 8;
    bands = std::max<int64_t>(1, std::min(ceil_div(kUnits / 2, groups * blocks), p.H / least));
    packed = width * (2 * taps + 1);
    sums = width * (taps + 1);
  }
  int64_t units() const { return groups * bands * blocks; }
};

// What a unit works on.
struct Unit {
  int64_t block, first_channel, images_begin, images_end, rows_begin, rows_end;
  int channels, vectors, gates;  // gates: how many of its channels have one

  Unit(const Params& p, const Plan& g, int64_t unit) {
    block = unit % g.blocks;
    const int64_t band = unit / g.blocks % g.bands, group = unit / g.blocks / g.bands;
    first_channel = block * g.width;
    channels = static_cast<int>(std::min(g.width, p.C - first_channel));
    vectors = (channels + kLanes - 1) / kLanes;
    gates = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(p.G - first_channel, channels)));
    images_begin = p.B * group / g.groups, images_end = p.B * (group + 1) / g.groups;
    rows_begin = p.H * band / g.bands, rows_end = p.H * (band + 1) / g.bands;
  }
};

// Weights of a block: [vectors, k, k, kLanes], the same flipped, bias [vectors, kLanes]; zeros beyond C.
void pack_weights(const Params& p, const Plan& g, float* workspace, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* const to = workspace + block * g.packed;
    zero(to, g.packed);
    const int64_t first = block * g.width, channels = std::min(g.width, p.C - first);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t vector = c / kLanes, lane = c % kLanes, at = vector * g.taps * kLanes + lane;
      for (int t = 0; t < g.taps; ++t) {
        const float w = load_scalar(p.weight, p.weight_dtype, (first + c) * g.taps + t);
        to[at + t * kLanes] = w;
        to[g.width * g.taps + at + (g.taps - 1 - t) * kLanes] = w;
      }
      if (p.bias) to[2 * g.width * g.taps + c] = load_scalar(p.bias, p.bias_dtype, first + c);
    }
  }
}

// ---- stencils ------------------------------------------------------------------------------------------------------

// to[x, c] = start[c] + sum over rows i in [first, last) and columns j of w[c, i, j] rows[i][x + j, c]: a row of the
// map, of tiles * kColumns columns. rows: [.., width] from the column -k/2 on; to: [.., width]; start: null is 0.
using Stencil = void (*)(const float* const* rows, int first, int last, const float* w, const float* start, float* to,
                         int tiles, int vectors, int64_t width);

template <int kSize, int kColumns>
void stencil(const float* const* rows, int first, int last, const float* w, const float* start, float* to, int tiles,
             int vectors, int64_t width) {
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t column = int64_t{tile} * kColumns * width;
    for (int c = 0; c < vectors; ++c) {
      const int64_t at = column + c * kLanes;
      const float* const wc = w + int64_t{c} * kSize * kSize * kLanes;
      vf acc[kColumns];
      const vf from = start ? load(start + c * kLanes) : vf{};
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) acc[n] = from;
      for (int i = first; i < last; ++i) {
        const float* const x = rows[i] + at;
        vf wi[kSize];
#pragma GCC unroll 7
        for (int j = 0; j < kSize; ++j) wi[j] = load(wc + (i * kSize + j) * kLanes);
#pragma GCC unroll 14
        for (int t = 0; t < kColumns + kSize - 1; ++t) {
          const vf xt = load(x + t * width);
#pragma GCC unroll 7
          for (int j = 0; j < kSize; ++j) {
            if (t - j >= 0 && t - j < kColumns) acc[t - j] = fma(xt, wi[j], acc[t - j]);
          }
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) store(to + at + n * width, acc[n]);
    }
  }
}

// sums[c, i, j] += sum over x of dz[x, c] rows[i][x + j, c], for i in [first, last); sums[c, taps] += sum of dz[x, c].
// All rows can be read: those outside of the map are zeros.
using Correlate = void (*)(const float* dz, const float* const* rows, int first, int last, float* sums, int tiles,
                           int vectors, int64_t width);

template <int kSize, int kColumns>
void correlate(const float* dz, const float* const* rows, int first, int last, float* sums, int tiles, int vectors,
               int64_t width) {
  constexpr int kAtOnce = kSize == 3 ? 3 : 1;  // rows: enough sums under way to hide the latency of each
  if (kAtOnce > 1) first = 0, last = kSize;
  for (int c = 0; c < vectors; ++c) {
    float* const to = sums + int64_t{c} * (kSize * kSize + 1) * kLanes;
    for (int i = first; i < last; i += kAtOnce) {
      vf acc[kAtOnce][kSize], total{};
#pragma GCC unroll 3
      for (int q = 0; q < kAtOnce; ++q) {
#pragma GCC unroll 7
        for (int j = 0; j < kSize; ++j) acc[q][j] = vf{};
      }
      for (int tile = 0; tile < tiles; ++tile) {
        const int64_t at = int64_t{tile} * kColumns * width + c * kLanes;
        vf e[kColumns];
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) {
          e[n] = load(dz + at + n * width);
          total += e[n];
        }
#pragma GCC unroll 3
        for (int q = 0; q < kAtOnce; ++q) {
          const float* const x = rows[i + q] + at;
#pragma GCC unroll 14
          for (int t = 0; t < kColumns + kSize - 1; ++t) {
            const vf xt = load(x + t * width);
#pragma GCC unroll 7
            for (int j = 0; j < kSize; ++j) {
              if (t - j >= 0 && t - j < kColumns) acc[q][j] = fma(xt, e[t - j], acc[q][j]);
            }
          }
        }
      }
#pragma GCC unroll 3
      for (int q = 0; q < kAtOnce; ++q) {
#pragma GCC unroll 7
        for (int j = 0; j < kSize; ++j) {
          float* const sum = to + ((i + q) * kSize + j) * kLanes;
          store(sum, load(sum) + acc[q][j]);
        }
      }
      if (i == first) store(to + kSize * kSize * kLanes, load(to + kSize * kSize * kLanes) + total);
    }
  }
}

struct Stencils {
  Stencil stencil;
  Correlate correlate;
};
template <int kColumns>
Stencils stencils_of(int k) {
  switch (k) {
    case 3:
      return {stencil<3, kColumns>, correlate<3, kColumns>};
    case 5:
      return {stencil<5, kColumns>, correlate<5, kColumns>};
    default:
      return {stencil<7, kColumns>, correlate<7, kColumns>};
  }
}
Stencils stencils_of(const Plan& g) { return g.columns == 7 ? stencils_of<7>(g.k) : stencils_of<8>(g.k); }

// ---- activation and gate -------------------------------------------------------------------------------------------

// Whether the pixels of a map, `stride` elements apart, are whole lines, and so many that nobody finds them in caches.
template <class T>
bool goes_past_caches(const Params& p, const Plan& g, const void* map, int64_t stride) {
  constexpr int64_t kItem = sizeof(T);
  return !std::is_same_v<T, Float16> && map && p.B * p.H * p.W * p.C * kItem >= kPastCaches &&
         reinterpret_cast<uintptr_t>(map) % kLine == 0 && stride * kItem % kLine == 0 && p.C * kItem % kLine == 0 &&
         g.width * kItem % kLine == 0 && p.G % kLanes == 0;
}

// out = act(z) * v
template <class T>
using GateRow = void (*)(const float* z, int64_t width, RowOf<const T> v, RowOf<T> out, int64_t W, int channels,
                         int gates, bool past_caches);

template <class T, int kAct>
void gate_row(const float* z, int64_t width, RowOf<const T> v, RowOf<T> out, int64_t W, int channels, int gates,
              bool past_caches) {
  for (int64_t x = 0; x < W; ++x) {
    const float* const from = z + x * width;
    const T* const gate = v.data + x * v.stride;
    T* const to = out.data + x * out.stride;
    int c = 0;
    for (; c + kLanes <= gates; c += kLanes)
      put(to + c, activate<kAct>(load(from + c)) * load(gate + c), kLanes, past_caches);
    for (; c < channels; c += kLanes) {
      vf y = activate<kAct>(load(from + c));
      if (c < gates) y = y * first_lanes_or(load_lanes(gate + c, gates - c), gates - c, 1.f);
      put(to + c, y, channels - c, past_caches);
    }
  }
}

// dv = grad * act(z), where it is asked for, and dz = grad * v * act'(z)
template <class T>
using GradientRow = void (*)(const float* z, int64_t width, RowOf<const T> grad, RowOf<const T> v, RowOf<T> dv,
                             float* dz, int64_t W, int channels, int gates, bool past_caches);

template <class T, int kAct>
void gradient_row(const float* z, int64_t width, RowOf<const T> grad, RowOf<const T> v, RowOf<T> dv, float* dz,
                  int64_t W, int channels, int gates, bool past_caches) {
  for (int64_t x = 0; x < W; ++x) {
    const float* const from = z + x * width;
    const T* const gradient = grad.data + x * grad.stride;
    const T* const gate = v.data + x * v.stride;
    T* const to = dv.data + x * dv.stride;
    for (int c = 0; c < channels; c += kLanes) {
      vf g = load_lanes(gradient + c, channels - c), slope;
      const vf y = activate<kAct>(load(from + c), &slope);
      if (c < gates) {
        if (dv.data) put(to + c, g * y, gates - c, past_caches);
        const vf factor = load_lanes(gate + c, gates - c);
        g = g * (gates - c >= kLanes ? factor : first_lanes_or(factor, gates - c, 1.f));
      }
      store(dz + x * width + c, g * slope);
    }
  }
}

template <class T, int... kAct>
GateRow<T> gate_row_of(int act, std::integer_sequence<int, kAct...>) {
  static constexpr GateRow<T> rows[] = {gate_row<T, kAct>...};
  return rows[act];
}
template <class T, int... kAct>
GradientRow<T> gradient_row_of(int act, std::integer_sequence<int, kAct...>) {
  static constexpr GradientRow<T> rows[] = {gradient_row<T, kAct>...};
  return rows[act];
}

// ---- passes --------------------------------------------------------------------------------------------------------

// The last k rows of a map, with zeros around them.
struct Ring {
  const Plan& g;
  float* data;

  Ring(const Plan& plan, Scratch& scratch) : g(plan), data(scratch.take<float>((plan.k + 1) * plan.row)) {}
  void clear() { zero(data, (g.k + 1) * g.row); }
  float* at(int64_t y) const { return data + y % g.k * g.row + g.r * g.width; }  // the first column of row y
  // The rows that the stencil at row y reads, zeros for those outside, and which of them are in the map of H rows.
  void around(int64_t y, int64_t H, const float** rows, int* first, int* last) const {
    for (int i = 0; i < g.k; ++i) {
      const int64_t row = y + i - g.r;
      rows[i] = row < 0 || row >= H ? data + g.k * g.row : at(row) - g.r * g.width;
    }
    *first = static_cast<int>(std::max<int64_t>(0, g.r - y));
    *last = static_cast<int>(std::min<int64_t>(g.k, H + g.r - y));
  }
  template <class T>
  void fill(int64_t y, RowOf<const T> from, int64_t W, int channels) const {
    float* const to = at(y);
    for (int64_t x = 0; x < W; ++x) load_row(to + x * g.width, from.data + x * from.stride, channels);
  }
};

template <class T>
struct Pass {
  const Params& p;
  const Plan& g;
  const Stencils stencils;
  Ring ring;
  float* z;
  const float* rows[7];
  int first_row = 0, last_row = 0;

  Pass(const Params& params, const Plan& plan, Scratch& scratch)
      : p(params),
        g(plan),
        stencils(stencils_of(plan)),
        ring(plan, scratch),
        z(scratch.take<float>(int64_t{plan.tiles} * plan.columns * plan.width)) {}

  static RowOf<const T> row(const void* map, int64_t stride_b, int64_t stride_y, int64_t stride_x, int64_t b, int64_t y,
                            int64_t channel) {
    if (!map) return {nullptr, 0};
    return {static_cast<const T*>(map) + b * stride_b + y * stride_y + channel, stride_x};
  }
  RowOf<const T> x_row(int64_t b, int64_t y, const Unit& u) const {
    return row(p.x, p.x_stride_b, p.x_stride_y, p.x_stride_x, b, y, u.first_channel);
  }
  RowOf<const T> v_row(int64_t b, int64_t y, const Unit& u) const {
    return row(p.v, p.v_stride_b, p.v_stride_y, p.v_stride_x, b, y, u.first_channel);
  }
  RowOf<T> row_of_result(void* map, int64_t stride, int64_t b, int64_t y, const Unit& u) const {
    if (!map) return {nullptr, 0};
    return {static_cast<T*>(map) + (b * p.H + y) * p.W * stride + u.first_channel, stride};
  }
  // z of row y, whose rows of x are in the ring.
  void convolve(int64_t y, const float* weights, const Unit& u) {
    ring.around(y, p.H, rows, &first_row, &last_row);
    stencils.stencil(rows, first_row, last_row, weights, weights + 2 * g.width * g.taps, z, g.tiles, u.vectors,
                     g.width);
  }
};

template <class T>
struct Forward : Pass<T> {
  using Base = Pass<T>;
  using Base::Base;
  using Base::g, Base::p, Base::ring, Base::z;

  void run(const float* packed, int64_t begin, int64_t end) {
    const auto gate = gate_row_of<T>(p.act, std::make_integer_sequence<int, kActivations>());
    const bool past_caches = goes_past_caches<T>(p, g, p.out, p.C);
    ring.clear();
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit u(p, g, unit);
      const float* const weights = packed + u.block * g.packed;
      for (int64_t b = u.images_begin; b < u.images_end; ++b) {
        int64_t next = std::max<int64_t>(0, u.rows_begin - g.r);  // the row of x that the ring gets next
        for (int64_t y = u.rows_begin; y < u.rows_end; ++y) {
          for (; next < std::min(p.H, y + g.r + 1); ++next) ring.fill(next, this->x_row(b, next, u), p.W, u.channels);
          this->convolve(y, weights, u);
          gate(z, g.width, this->v_row(b, y, u), this->row_of_result(p.out, p.C, b, y, u), p.W, u.channels, u.gates,
               past_caches);
        }
      }
    }
    if (past_caches) stream_fence();
  }
};

template <class T>
struct Backward : Pass<T> {
  using Base = Pass<T>;
  using Base::first_row, Base::g, Base::last_row, Base::p, Base::ring, Base::rows, Base::stencils, Base::z;

  Ring dz;
  bool dx_past_caches, dv_past_caches;

  Backward(const Params& params, const Plan& plan, Scratch& scratch) : Base(params, plan, scratch), dz(plan, scratch) {
    dx_past_caches = goes_past_caches<T>(p, g, p.dx, p.dx_stride);
    dv_past_caches = goes_past_caches<T>(p, g, p.dv, p.dv_stride);
  }

  // dx of row y, whose rows of dz are in their ring.
  void write_dx(int64_t b, int64_t y, const float* flipped, const Unit& u) {
    dz.around(y, p.H, rows, &first_row, &last_row);
    stencils.stencil(rows, first_row, last_row, flipped, nullptr, z, g.tiles, u.vectors, g.width);
    const RowOf<T> to = this->row_of_result(p.dx, p.dx_stride, b, y, u);
    for (int64_t x = 0; x < p.W; ++x) {
      T* const pixel = to.data + x * to.stride;
      for (int c = 0; c < u.channels; c += kLanes)
        put(pixel + c, load(z + x * g.width + c), u.channels - c, dx_past_caches);
    }
  }

  void run(const float* packed, float* partials, int64_t begin, int64_t end) {
    const auto gradients = gradient_row_of<T>(p.act, std::make_integer_sequence<int, kActivations>());
    ring.clear(), dz.clear();
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit u(p, g, unit);
      const float* const weights = packed + u.block * g.packed;
      const float* const flipped = weights + g.width * g.taps;
      float* const sums = partials + unit * g.sums;
      zero(sums, g.sums);
      const int64_t above = std::max<int64_t>(0, u.rows_begin - g.r), below = std::min(p.H, u.rows_end + g.r);
      for (int64_t b = u.images_begin; b < u.images_end; ++b) {
        int64_t next = std::max<int64_t>(0, above - g.r);
        for (int64_t y = above; y < below; ++y) {
          for (; next < std::min(p.H, y + g.r + 1); ++next) ring.fill(next, this->x_row(b, next, u), p.W, u.channels);
          this->convolve(y, weights, u);
          const bool own = y >= u.rows_begin && y < u.rows_end;
          const auto grad = this->row(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x, b, y,
                                      u.first_channel);
          const RowOf<T> dv = own ? this->row_of_result(p.dv, p.dv_stride, b, y, u) : RowOf<T>{nullptr, 0};
          gradients(z, g.width, grad, this->v_row(b, y, u), dv, dz.at(y), p.W, u.channels, u.gates, dv_past_caches);
          if (own) stencils.correlate(dz.at(y), rows, first_row, last_row, sums, g.tiles, u.vectors, g.width);
          if (y - g.r >= u.rows_begin) write_dx(b, y - g.r, flipped, u);
        }
        for (int64_t y = std::max(u.rows_begin, below - g.r); y < u.rows_end; ++y) write_dx(b, y, flipped, u);
      }
    }
    if (dx_past_caches || dv_past_caches) stream_fence();
  }
};

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_pack_units(const Params& p) { return Plan(p, false).blocks; }
void forward_pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  pack_weights(p, Plan(p, false), workspace, begin, end);
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
int64_t backward_pack_units(const Params& p) { return Plan(p, true).blocks; }
void backward_pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  pack_weights(p, Plan(p, true), workspace, begin, end);
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
    for (int64_t unit = 1; unit < g.groups * g.bands; ++unit)
      axpy(sums, 1.f, sums + unit * g.blocks * g.sums, static_cast<int>(g.sums));
    const int64_t first = block * g.width, channels = std::min(g.width, p.C - first);
    for (int64_t c = 0; c < channels; ++c) {
      const float* const from = sums + c / kLanes * (g.taps + 1) * kLanes + c % kLanes;
      for (int t = 0; t < g.taps; ++t)
        store_scalar(p.dweight, p.weight_dtype, (first + c) * g.taps + t, from[t * kLanes]);
      if (p.dbias) store_scalar(p.dbias, p.bias_dtype, first + c, from[g.taps * kLanes]);
    }
  }
}

constexpr Step<Params> kForward[] = {{forward_pack_units, forward_pack}, {forward_units, forward}};
constexpr Step<Params> kBackward[] = {
    {backward_pack_units, backward_pack}, {backward_units, backward}, {reduce_units, reduce}};

}  // namespace dwconv_glu_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<DwconvGluParams>* EFFVIT_KERNEL_NAME(dwconv_glu)() {
  namespace impl = EFFVIT_ISA_NAME::dwconv_glu_impl;
  static constexpr Kernel<DwconvGluParams> kernel = {routine(impl::kForward, impl::forward_floats),
                                                     routine(impl::kBackward, impl::backward_floats)};
  return &kernel;
}
}  // namespace effvit::cpu
