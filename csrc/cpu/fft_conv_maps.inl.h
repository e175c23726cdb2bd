// fft_conv on the CPU: lines of maps and kernels along z, from memory into vectors of channels and back. Included by
// fft_conv_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

namespace math {
#define EFFVIT_FN EFFVIT_INLINE
template <class V>
EFFVIT_INLINE V splat(float x) {
  return set1(x);
}
EFFVIT_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
#include "../rows/math.h"
#undef EFFVIT_FN
}  // namespace math

// act(v) and, on demand, its derivative.
template <bool kSlope>
EFFVIT_INLINE vf activation(int act, vf v, vf& slope) {
  if (act == 0) {
    slope = set1(1.f);
    return v;
  }
  if (act == 1) {
    vf density;
    const vf cdf = math::normal_cdf(v, &density);
    if (kSlope) slope = fma(v, density, cdf);
    return v * cdf;
  }
  const vf s = 1.f / (1.f + exp_full(-v));
  if (kSlope) slope = s * fma(v, 1.f - s, set1(1.f));
  return v * s;
}

// kLanes lines of whole vectors, from rows to columns, some vectors of a row at a time: memory is met in longer runs.
// gate: what they are multiplied with, or null.
template <class T>
inline void load_block(const T* from, int64_t stride_c, const T* gate, int64_t gate_stride_c, int64_t count, float* to,
                       int64_t ahead) {
  alignas(64) float rows[kLanes * kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t places = std::min(kChunk, count - start);
    for (int c = 0; c < kLanes; ++c) {
      const T* const row = from + c * stride_c + start;
      const T* const by = gate ? gate + c * gate_stride_c + start : nullptr;
      for (int64_t i = 0; i < places; i += kLanes)
        store(rows + c * kChunk + i, by ? load(row + i) * load(by + i) : load(row + i));
    }
    for (int64_t i = 0; i < places; i += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) r[c] = load(rows + c * kChunk + i);
      transpose_block(r);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + (start + i + j) * ahead, r[j]);
    }
  }
}

// `channels` lines of `count` elements, stride_c apart, elements stride_z apart -> to[i * step * kLanes + channel],
// zeros beyond the channels.
template <class T>
void load_lines(const T* from, int64_t stride_c, int64_t stride_z, int channels, int64_t count, float* to,
                int64_t step) {
  const int64_t ahead = step * kLanes;
  if (stride_c == 1 || channels == 1) {
    if (channels == kLanes) {
      for (int64_t i = 0; i < count; ++i) store(to + i * ahead, load(from + i * stride_z));
    } else {
      for (int64_t i = 0; i < count; ++i) load_row(to + i * ahead, from + i * stride_z, channels);
    }
    return;
  }
  if (stride_z == 1) {
    alignas(64) float rest[kLanes];
    int64_t i = 0;
    if (channels == kLanes) {
      i = count / kLanes * kLanes;
      load_block<T>(from, stride_c, nullptr, 0, i, to, ahead);
    }
    for (; i < count; i += kLanes) {
      const int now = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      vf r[kLanes];
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        if (c >= channels) {
          r[c] = vf{};
        } else if (now == kLanes) {
          r[c] = load(from + c * stride_c + i);
        } else {
          load_row(rest, from + c * stride_c + i, now);
          r[c] = load(rest);
        }
      }
      transpose_block(r);
      for (int j = 0; j < now; ++j) store(to + (i + j) * ahead, r[j]);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    store(to + i * ahead, vf{});
    for (int c = 0; c < channels; ++c) to[i * ahead + c] = to_float(from[c * stride_c + i * stride_z]);
  }
}

// The reverse, of lines that lie vector by vector.
template <class T>
void store_lines(T* to, int64_t stride_c, int64_t stride_z, int channels, int64_t count, const float* from) {
  if (stride_c == 1) {
    if (channels == kLanes) {
      for (int64_t i = 0; i < count; ++i) store(to + i * stride_z, load(from + i * kLanes));
    } else {
      for (int64_t i = 0; i < count; ++i) store_row(to + i * stride_z, from + i * kLanes, channels);
    }
    return;
  }
  alignas(64) float block[kLanes * kLanes];
  int64_t i = 0;  // z is contiguous: every result is
  if (channels == kLanes) {
    for (; i + kLanes <= count; i += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) r[j] = load(from + (i + j) * kLanes);
      transpose_block(r);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) store(to + c * stride_c + i, r[c]);
    }
  }
  for (; i < count; i += kLanes) {
    const int now = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    vf r[kLanes];
    for (int j = 0; j < kLanes; ++j) r[j] = load(from + (i + std::min(j, now - 1)) * kLanes);
    transpose_block(r);
    if (now == kLanes) {
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        if (c < channels) store(to + c * stride_c + i, r[c]);
      }
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) store(block + c * kLanes, r[c]);
      for (int c = 0; c < channels; ++c) store_row(to + c * stride_c + i, block + c * kLanes, now);
    }
  }
}

// A row of the batch and a group of channels.
struct Row {
  const Params& p;
  int64_t b, first;
  int channels;
  float d[kLanes] = {};  // of the channels. Vectors as arguments would need a stack that is aligned for them

  Row(const Params& p, int64_t b, int64_t group)
      : p(p), b(b), first(group * kLanes), channels(static_cast<int>(std::min<int64_t>(kLanes, p.C - group * kLanes))) {
    for (int c = 0; p.d && c < channels; ++c) d[c] = load_scalar(p.d, p.d_dtype, first + c);
  }

  int64_t offset(const FftConvStrides& s, int64_t x, int64_t y, int64_t z) const {
    return b * s.b + first * s.c + x * s.x + y * s.y + z * s.z;
  }
  void load_map(const void* map, const FftConvStrides& s, int64_t x, int64_t y, int64_t z, int64_t count, float* to,
                int64_t step = 1) const {
    dispatch_dtype(p.dtype, [&](auto t) {
      load_lines(static_cast<const decltype(t)*>(map) + offset(s, x, y, z), s.c, s.z, channels, count, to, step);
    });
  }
  void store_map(void* map, int64_t x, int64_t y, int64_t z, int64_t count, const float* from) const {
    const FftConvStrides& s = p.out_stride;
    dispatch_dtype(p.dtype, [&](auto t) {
      store_lines(static_cast<decltype(t)*>(map) + offset(s, x, y, z), s.c, s.z, channels, count, from);
    });
  }
  // u' from place z on.
  void load_input(int64_t x, int64_t y, int64_t z, int64_t count, float* to, int64_t step = 1) const {
    if (p.pregate && channels == kLanes && gate_together(x, y, z, count, to, step)) return;
    load_map(p.u, p.u_stride, x, y, z, count, to, step);
    if (!p.pregate) return;
    alignas(64) float gate[kChunk * kLanes];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t now = std::min(kChunk, count - i);
      load_map(p.pregate, p.pregate_stride, x, y, z + i, now, gate);
      for (int64_t j = 0; j < now; ++j) {
        float* const at = to + (i + j) * step * kLanes;
        store(at, load(at) * load(gate + j * kLanes));
      }
    }
  }
  // u' where u and the gate lie alike, without a stop in between: whole vectors of places where these are contiguous.
  bool gate_together(int64_t x, int64_t y, int64_t& z, int64_t& count, float*& to, int64_t step) const {
    const FftConvStrides &a = p.u_stride, &b = p.pregate_stride;
    const bool inside = a.c == 1 && b.c == 1;
    if (!inside && (a.z != 1 || b.z != 1)) return false;
    const int64_t now = inside ? count : count / kLanes * kLanes, ahead = step * kLanes;
    dispatch_dtype(p.dtype, [&](auto t) {
      const auto* const u = static_cast<const decltype(t)*>(p.u) + offset(a, x, y, z);
      const auto* const gate = static_cast<const decltype(t)*>(p.pregate) + offset(b, x, y, z);
      if (inside) {
        for (int64_t i = 0; i < now; ++i) store(to + i * ahead, load(u + i * a.z) * load(gate + i * b.z));
      } else {
        load_block(u, a.c, gate, b.c, now, to, ahead);
      }
    });
    z += now, count -= now, to += now * ahead;
    return count == 0;
  }
  // Calls f(position, place, count) for the runs of the first `load` positions of an axis that hold places of the map,
  // and empty(position, count) for the others of these.
  template <class F, class E>
  static void runs(const Axis& axis, int64_t block_at, int64_t load, const F& f, const E& empty) {
    for (int64_t i = 0; i < load;) {
      const int64_t place = axis.at(i, block_at);
      int64_t count = load - i;
      if (place < 0) {
        const int64_t start = i + axis.origin + block_at;
        if (start < 0) count = std::min(count, -start);
        empty(i, count);
      } else {
        count = std::min(count, axis.S - place);
        f(i, place, count);
      }
      i += count;
    }
  }
};

// k or k_rev, [J, C, n[0], n[1], n[2]], or its gradient.
struct Taps {
  const void* data;
  void* gradient;
  DType type;
  int64_t n[3];
  bool reverse;

  int64_t count() const { return n[0] * n[1] * n[2]; }
  int64_t lag(int64_t tap, int64_t shift) const { return reverse ? -tap : tap - shift; }
  // Calls f(x, y) for each line of n[2] taps, as vectors in `line`.
  template <class F>
  void load_each(int64_t j, const Row& row, float* line, const F& f) const {
    for (int64_t i = 0; i < n[0] * n[1]; ++i) {
      dispatch_dtype(type, [&](auto t) {
        const auto* from = static_cast<const decltype(t)*>(data) + (j * row.p.C + row.first) * count() + i * n[2];
        load_lines(from, count(), 1, row.channels, n[2], line, 1);
      });
      f(i / n[1], i % n[1]);
    }
  }
  // Stores the line of the gradient after each call.
  template <class F>
  void store_each(int64_t j, const Row& row, float* line, const F& f) const {
    for (int64_t i = 0; i < n[0] * n[1]; ++i) {
      f(i / n[1], i % n[1]);
      dispatch_dtype(type, [&](auto t) {
        auto* to = static_cast<decltype(t)*>(gradient) + (j * row.p.C + row.first) * count() + i * n[2];
        store_lines(to, count(), 1, row.channels, n[2], line);
      });
    }
  }
};

// Calls f(taps) for the kernels that are given.
template <class F>
void for_kernels(const Params& p, const F& f) {
  if (p.k) f(Taps{p.k, p.dk, p.k_dtype, {p.KX, p.KY, p.KZ}, false});
  if (p.k_rev) f(Taps{p.k_rev, p.dk_rev, p.k_rev_dtype, {p.RX, p.RY, p.RZ}, true});
}
inline int64_t most_taps(const Params& p) { return std::max(p.KZ, p.RZ); }

}  // namespace fft_conv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
