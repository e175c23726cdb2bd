// Depthwise stencils in registers, and what ends them: activation, gate, stores. Included by each op that uses it,
// inside the namespace of its own.

namespace act {
#define EFFVIT_FN EFFVIT_INLINE
template <class V>
EFFVIT_INLINE V splat(float x) {
  return set1(x);
}
EFFVIT_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
#include "../rows/math.h"
#define EFFVIT_ROWS
#include "../rows/glu.h"
#undef EFFVIT_ROWS
#undef EFFVIT_FN
}  // namespace act

constexpr int kNone = act::kVariants, kActivations = kNone + 1;

// ---- stencils ------------------------------------------------------------------------------------------------------

// acc[n] += sum over rows i and taps j < kTaps of w[i, j] x[i * x_row + (n + j) * x_step], a vector of
// channels. w: [.., kLanes], rows of it w_row floats apart.
template <class T, int kTaps, int kColumns>
EFFVIT_INLINE void stencil_tile(vf (&acc)[kColumns], const T* x, int64_t x_row, int64_t x_step, int64_t rows,
                                const float* w, int64_t w_row) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* const xi = x + i * x_row;
    const float* const wi = w + i * w_row;
    vf taps[kTaps];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) taps[j] = load(wi + j * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < kColumns + kTaps - 1; ++t) {
      const vf xt = load(xi + t * x_step);
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) {
        if (t - j >= 0 && t - j < kColumns) acc[t - j] = fma(xt, taps[j], acc[t - j]);
      }
    }
  }
}

// acc[j] += sum over n of dz[n] x[(n + j) * step], a vector of channels.
template <int kTaps, int kColumns>
EFFVIT_INLINE void correlate_tile(vf (&acc)[kTaps], const vf (&dz)[kColumns], const float* x, int64_t step) {
#pragma GCC unroll 16
  for (int t = 0; t < kColumns + kTaps - 1; ++t) {
    const vf xt = load(x + t * step);
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) {
      if (t - j >= 0 && t - j < kColumns) acc[j] = fma(xt, dz[t - j], acc[j]);
    }
  }
}

// ---- activation and gate -------------------------------------------------------------------------------------------

template <int kAct>
EFFVIT_INLINE vf activate(vf z) {
  if constexpr (kAct == kNone) {
    return z;
  } else if constexpr (kAct == act::kGelu) {
    return z * act::normal_cdf_near(z);
  } else {
    return act::activation<kAct, vf>(z, nullptr);
  }
}
template <int kAct>
EFFVIT_INLINE vf activate(vf z, vf* slope) {
  if constexpr (kAct == kNone) {
    *slope = set1(1.f);
    return z;
  } else {
    return act::activation<kAct, vf>(z, slope);
  }
}

template <class T>
EFFVIT_INLINE void put(T* to, vf x, int left, bool past_caches) {
  if constexpr (!std::is_same_v<T, Float16>) {
    if (past_caches) return stream(to, x);
  }
  store_lanes(to, x, left);
}

// A row of a block of channels: pixels so many elements apart.
template <class T>
struct RowOf {
  T* data;
  int64_t stride;
};
