// fft_conv on the CPU: what is done with a line of the convolution, and with a line of its gradient. Included by
// fft_conv_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

// Whether the backward needs the convolution itself.
inline bool needs_result(const Params& p) { return p.act != 0 || p.postgate; }

inline vf load_skip(const Params& p, const Row& row) {
  alignas(64) float d[kLanes] = {};
  for (int c = 0; p.d && c < row.channels; ++c) d[c] = load_scalar(p.d, p.d_dtype, row.first + c);
  return load(d);
}

// out from place z on; y: vectors `step` apart.
inline void finish_line(const Row& row, vf d, int64_t x, int64_t y, int64_t z, int64_t count, const float* from,
                        int64_t step) {
  const Params& p = row.p;
  if (!p.d && !p.act && !p.postgate && step == 1) return row.store_map(p.out, x, y, z, count, from);
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

// The gradient of y in place of y, vectors `step` apart; dpostgate; adds to that of d.
inline void gradient_line(const Row& row, vf d, vf& dd, int64_t x, int64_t y, int64_t z, int64_t count, float* at,
                          int64_t step) {
  const Params& p = row.p;
  alignas(64) float input[kChunk * kLanes], gate[kChunk * kLanes], grad[kChunk * kLanes];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t now = std::min(kChunk, count - i);
    row.load_map(p.grad_out, p.grad_out_stride, x, y, z + i, now, grad);
    if (p.d) row.load_input(x, y, z + i, now, input);
    if (p.postgate) row.load_map(p.postgate, p.postgate_stride, x, y, z + i, now, gate);
    vf sum{};
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
      if (p.d) sum = fma(g, load(input + j * kLanes), sum);
      store(to, g);
    }
    dd = dd + sum;
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
