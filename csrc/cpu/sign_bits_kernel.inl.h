// sign_bits on the CPU: forward, on raw pointers, compiled once per ISA. A row is read once.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace sign_bits_impl {

using Params = SignBitsParams;

constexpr int64_t kUnit = 1 << 15;  // elements of a unit of work, about
constexpr int kGroup = 16, kParts = kGroup / kLanes;  // numbers of two bytes of bits

// A bit for every lane, of a mask.
EFFVIT_INLINE unsigned bits_of(vi mask) {
#if defined(EFFVIT_HAS_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(EFFVIT_HAS_AVX2)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(mask[i] & 1) << i;
  return bits;
#endif
}

template <bool kThreshold, class T>
float row_of(const T* x, int64_t columns, float threshold, uint8_t* out) {
  vf sum[kParts] = {};
  vi count{};
  const vf at = set1(threshold);
  const auto group = [&](const T* from, vf& total, unsigned& bits, int shift) __attribute__((always_inline)) {
    const vf v = load(from);
    const vi on = v >= at;
    bits |= bits_of(on) << shift;
    if constexpr (kThreshold) {
      total += (vf)((vi)v & on);
      count -= on;
    } else {
      total += (vf)((vi)v & 0x7fffffff);
    }
  };
  int64_t k = 0;
  for (; k + kGroup <= columns; k += kGroup) {
    unsigned bits = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) group(x + k + j * kLanes, sum[j], bits, j * kLanes);
    const uint8_t two[2] = {static_cast<uint8_t>(bits), static_cast<uint8_t>(bits >> 8)};
    std::memcpy(out + k / 8, two, 2);
  }
  int64_t counted = 0;
  float total = 0.f;
  if (k < columns) {
    unsigned bits = 0;
    alignas(64) T some[kGroup] = {};
    alignas(64) float wide[kGroup];
    std::memcpy(some, x + k, static_cast<size_t>(columns - k) * sizeof(T));
    for (int j = 0; j < kGroup; j += kLanes) store(wide + j, load(some + j));
    for (int i = 0; k + i < columns; ++i) {
      const float v = wide[i];
      const bool on = v >= threshold;
      bits |= static_cast<unsigned>(on) << i;
      total += kThreshold ? (on ? v : 0.f) : __builtin_fabsf(v);
      counted += on;
    }
    out[k / 8] = static_cast<uint8_t>(bits);
    if (columns - k > 8) out[k / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  }
  for (int j = 1; j < kParts; ++j) sum[0] += sum[j];
  for (int i = 0; i < kLanes; ++i) total += sum[0][i], counted += count[i];
  const int64_t of = kThreshold ? counted : columns;
  return total / static_cast<float>(std::max<int64_t>(of, 1));
}

int64_t rows_of_unit(const Params& p) { return std::max<int64_t>(1, kUnit / std::max<int64_t>(1, p.columns)); }
int64_t units(const Params& p) { return ceil_div(p.rows, rows_of_unit(p)); }

template <class T>
void rows(const Params& p, int64_t begin, int64_t end) {
  const Params c = p;  // stores may alias anything
  const int64_t width = ceil_div(c.columns, 8);
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(c.x) + row_start(c, c.x_stride, row);
    uint8_t* const bits = c.bits + row * width;
    c.scale[row] = c.threshold ? row_of<true>(x, c.columns, c.threshold[row_start(c, c.threshold_stride, row)], bits)
                               : row_of<false>(x, c.columns, 0.f, bits);
  }
}

void run(const Params& p, float*, int64_t begin, int64_t end) {
  const int64_t unit = rows_of_unit(p);
  dispatch_dtype(p.dtype, [&](auto type) { rows<decltype(type)>(p, begin * unit, std::min(end * unit, p.rows)); });
}

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace sign_bits_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<SignBitsParams>* EFFVIT_KERNEL_NAME(sign_bits)() {
  namespace impl = EFFVIT_ISA_NAME::sign_bits_impl;
  static constexpr Kernel<SignBitsParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
