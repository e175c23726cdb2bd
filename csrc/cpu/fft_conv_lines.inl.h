// fft_conv on the CPU: what is done with a line of the convolution, and with a line of its gradient. Included by
// fft_conv_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

// Whether the backward needs the convolution itself.
inline bool needs_result(const Params& p) { return p.act != 0 || p.postgate; }

// The same without buffers, where all maps lie alike, of all lanes; how many places are done.
inline int64_t finish_together(const Row& row, int64_t x, int64_t y, int64_t z, int64_t count, const float* from,
                               int64_t step) {
  const Params& p = row.p;
  if (row.channels < kLanes) return 0;
  const vf d = load(row.d);
  const FftConvStrides &us = p.u_stride, &ws = p.pregate_stride, &gs = p.postgate_stride, &os = p.out_stride;
  const bool inside =
      os.c == 1 && (!p.d || us.c == 1) && (!p.d || !p.pregate || ws.c == 1) && (!p.postgate || gs.c == 1);
  const bool along =
      os.z == 1 && (!p.d || us.z == 1) && (!p.d || !p.pregate || ws.z == 1) && (!p.postgate || gs.z == 1);
  if (!inside && !along) return 0;
  const int64_t now = inside ? count : count / kLanes * kLanes;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* const u = p.d ? static_cast<const T*>(p.u) + row.offset(us, x, y, z) : nullptr;
    const T* const w = p.d && p.pregate ? static_cast<const T*>(p.pregate) + row.offset(ws, x, y, z) : nullptr;
    const T* const g = p.postgate ? static_cast<const T*>(p.postgate) + row.offset(gs, x, y, z) : nullptr;
    T* const out = static_cast<T*>(p.out) + row.offset(os, x, y, z);
    const auto finish = [&](vf v, vf skip, int64_t u_at, int64_t w_at, int64_t g_at, int64_t out_at)
                            __attribute__((always_inline)) {
                              vf slope;
                              if (u) v = fma(skip, w ? load(u + u_at) * load(w + w_at) : load(u + u_at), v);
                              v = activation<false>(p.act, v, slope);
                              store(out + out_at, g ? v * load(g + g_at) : v);
                            };
    if (inside) {
      for (int64_t i = 0; i < now; ++i)
        finish(load(from + i * step * kLanes), d, i * us.z, i * ws.z, i * gs.z, i * os.z);
      return;
    }
    // Channel by channel over some vectors of places: memory is met in longer runs.
    alignas(64) float rows[kLanes * kChunk];
    for (int64_t start = 0; start < now; start += kChunk) {
      const int64_t places = std::min(kChunk, now - start);
      for (int64_t i = 0; i < places; i += kLanes) {
        vf r[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) r[j] = load(from + (start + i + j) * step * kLanes);
        transpose_block(r);
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) store(rows + c * kChunk + i, r[c]);
      }
      for (int c = 0; c < kLanes; ++c) {
        const vf skip = set1(row.d[c]);
        for (int64_t i = 0; i < places; i += kLanes) {
          const int64_t at = start + i;
          finish(load(rows + c * kChunk + i), skip, at + c * us.c, at + c * ws.c, at + c * gs.c, at + c * os.c);
        }
      }
    }
  });
  return now;
}

// out from place z on; y: vectors `step` apart.
inline void finish_line(const Row& row, int64_t x, int64_t y, int64_t z, int64_t count, const float* from,
                        int64_t step) {
  const Params& p = row.p;
  const vf d = load(row.d);
  const int64_t done = finish_together(row, x, y, z, count, from, step);
  z += done, count -= done, from += done * step * kLanes;
  alignas(64) float input[kChunk * kLanes], gate[kChunk * kLanes], out[kChunk * kLanes];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t now = std::min(kChunk, count - i);
    if (p.d) row.load_input(x, y, z + i, now, input);
    if (p.postgate) row.load_map(p.postgate, p.postgate_stride, x, y, z + i, now, gate);
    for (int64_t j = 0; j < now; ++j) {
      vf v = load(from + (i + j) * step * kLanes), slope;
      if (p.d) v = fma(d, load(input + j * kLanes), v);
      v = activation<false>(p.act, v, slope);
      if (p.postgate) v = v * load(gate + j * kLanes);
      store(out + j * kLanes, v);
    }
    row.store_map(p.out, x, y, z + i, now, out);
  }
}

// The gradient of y in place of y, vectors `step` apart; dpostgate; adds to that of d, a sum and what
// rounding took off it.
inline void gradient_line(const Row& row, float* dd, int64_t x, int64_t y, int64_t z, int64_t count, float* at,
                          int64_t step) {
  const Params& p = row.p;
  const vf d = load(row.d);
  alignas(64) float input[kChunk * kLanes], gate[kChunk * kLanes], grad[kChunk * kLanes];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t now = std::min(kChunk, count - i);
    row.load_map(p.grad_out, p.grad_out_stride, x, y, z + i, now, grad);
    if (p.d) row.load_input(x, y, z + i, now, input);
    if (p.postgate) row.load_map(p.postgate, p.postgate_stride, x, y, z + i, now, gate);
    vf sum{}, some{};
    for (int64_t j = 0; j < now; ++j) {
      float* const to = at + (i + j) * step * kLanes;
      vf g = load(grad + j * kLanes);
      if (needs_result(p)) {
        vf v = load(to), slope;
        if (p.d) v = fma(d, load(input + j * kLanes), v);
        const vf a = activation<true>(p.act, v, slope);
        if (p.postgate) {
          store(grad + j * kLanes, g * a);
          g = g * load(gate + j * kLanes);
        }
        g = g * slope;
      }
      if (p.d) some = fma(g, load(input + j * kLanes), some);
      if (j % 16 == 15) sum = sum + some, some = vf{};
      store(to, g);
    }
    add_compensated(dd, dd + kLanes, sum + some);
    if (p.postgate) row.store_map(p.dpostgate, x, y, z + i, now, grad);
  }
}

// du and dpregate of whole lines, from the gradient of u' in `from`, which is overwritten.
inline void finish_gradient_line(const Row& row, int64_t x, int64_t y, int64_t z, int64_t count, float* from) {
  const Params& p = row.p;
  if (!p.pregate) return row.store_map(p.du, x, y, z, count, from);
  alignas(64) float input[kChunk * kLanes], gate[kChunk * kLanes];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t now = std::min(kChunk, count - i);
    row.load_map(p.u, p.u_stride, x, y, z + i, now, input);
    row.load_map(p.pregate, p.pregate_stride, x, y, z + i, now, gate);
    for (int64_t j = 0; j < now; ++j) {
      const vf g = load(from + (i + j) * kLanes);
      store(gate + j * kLanes, g * load(gate + j * kLanes));
      store(input + j * kLanes, g * load(input + j * kLanes));
    }
    row.store_map(p.du, x, y, z + i, now, gate);
    row.store_map(p.dpregate, x, y, z + i, now, input);
  }
}

}  // namespace fft_conv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
