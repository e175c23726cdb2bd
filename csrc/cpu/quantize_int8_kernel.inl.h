// quantize_int8 on the CPU: forward, on raw pointers, compiled once per ISA. A row is read twice, the second time from
// the L1 cache. Divisions are IEEE's and roundings exact, so that every ISA returns the same bits.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace quantize_int8_impl {

using Params = QuantizeInt8Params;

constexpr int64_t kUnit = 1 << 15;  // elements of a unit of work, about

// kLanes elements, zeros beyond the first n.
template <class T>
EFFVIT_INLINE vf load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  alignas(64) T some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * sizeof(T));
  return load(some);
}

// Zeros in place of columns that are left out.
EFFVIT_INLINE vf without(vf x, const int8_t* excluded, int64_t n) {
  if (!excluded) return x;
  int32_t out[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) out[i] = excluded[i] ? -1 : 0;
  return (vf)((vi)x & ~load(out));
}

// Largest |x| as bits: of floats without a sign these compare like the numbers, and a NaN is above infinity.
template <class T>
vi absmax(const T* x, const int8_t* excluded, int64_t columns) {
  vi most{};
  for (int64_t i = 0; i < columns; i += kLanes) {
    const vf v = without(load_first(x + i, columns - i), excluded ? excluded + i : nullptr, columns - i);
    const vi bits = (vi)v & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

template <bool kAway>
EFFVIT_INLINE vi rounded(vf y) {
  const vi nearest = round_to_int(y);
  if constexpr (!kAway) return nearest;
  // A tie that went to the even number below: the difference is exact.
  const vf rest = y - to_floats(nearest);
  const vi up = (rest == 0.5f) & (y > 0.f), down = (rest == -0.5f) & (y < 0.f);
  return nearest - up + down;
}

template <bool kAway, class T>
void quantize(int8_t* q, const T* x, const int8_t* excluded, int64_t columns, float scale) {
  const vf divisor = set1(scale);
  for (int64_t i = 0; i < columns; i += kLanes) {
    const int64_t n = columns - i;
    vf y = load_first(x + i, n) / divisor;
    y = (vf)((vi)y & (y == y));  // 0 for NaN; a minimum would make it 127
    y = min(max(y, set1(-127.f)), set1(127.f));
    y = without(y, excluded ? excluded + i : nullptr, n);
    alignas(64) int8_t some[kLanes];
    if (n >= kLanes) {
      store(q + i, rounded<kAway>(y));
    } else {
      store(some, rounded<kAway>(y));
      std::memcpy(q + i, some, static_cast<size_t>(n));
    }
  }
}

int64_t rows_of_unit(const Params& p) { return std::max<int64_t>(1, kUnit / std::max<int64_t>(1, p.columns)); }
int64_t units(const Params& p) { return ceil_div(p.rows, rows_of_unit(p)); }

template <class T>
void rows(const Params& p, int64_t begin, int64_t end) {
  const Params c = p;  // stores may alias anything
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(c.x) + row_start(c, c.x_stride, row);
    float scale;
    if (c.scale) {
      scale = c.scale[row_start(c, c.scale_stride, row)];
    } else {
      const vi most = absmax(x, c.excluded, c.columns);
      int32_t bits = 0;
      for (int i = 0; i < kLanes; ++i) bits = std::max(bits, most[i]);
      std::memcpy(&scale, &bits, 4);
      scale /= 127.f;
      if (scale == 0.f) scale = 1.f;
    }
    c.out_scale[row] = scale;
    int8_t* const q = c.q + row * c.columns;
    if (c.away)
      quantize<true>(q, x, c.excluded, c.columns, scale);
    else
      quantize<false>(q, x, c.excluded, c.columns, scale);
  }
}

void run(const Params& p, float*, int64_t begin, int64_t end) {
  const int64_t unit = rows_of_unit(p);
  dispatch_dtype(p.dtype, [&](auto type) { rows<decltype(type)>(p, begin * unit, std::min(end * unit, p.rows)); });
}

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace quantize_int8_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<QuantizeInt8Params>* EFFVIT_KERNEL_NAME(quantize_int8)() {
  namespace impl = EFFVIT_ISA_NAME::quantize_int8_impl;
  static constexpr Kernel<QuantizeInt8Params> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
