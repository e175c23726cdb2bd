// fft_conv of one axis that shared memory holds: forward and backward in one kernel each.
//
// A CTA has a few lines, pairs of rows of the batch. The spectra of kernels are made before, by the kernels for any
// grid, and are read from global memory, [J, C, n].
#pragma once
#include "fft_conv_spectra.cuh"

namespace effvit {
namespace cuda {
namespace fft_conv_impl {

struct Fused {
  Problem g;
  LinePlan plan;
  int64_t total = 0;  // units of work: a pair of rows, or backward a share of them, and plan.lines channels
  const Complex* spectra = nullptr;  // [J, C, n]
  bool channels_last = false;
  int64_t blocks = 1;  // of plan.lines channels

  // Backward only.
  int64_t splits = 1, split_pairs = 1;  // shares of a kernel's pairs, and how many there are in one
  Complex* sums = nullptr;  // [splits, J, C, n]: sums over pairs of conj(u) grad, over n
  Complex* packed = nullptr;  // [J, pairs, C, Z]: gradients of y + d u', or null
};

// f(line, place in it), neighbours being neighbours in a line, or the same place of several.
template <class F>
EFFVIT_DEVICE void for_each_element(int lines, int n, bool along, const F& f) {
  for (int e = prim::thread_id(); e < lines * n; e += kThreads) {
    const int line = along ? e / n : e % lines;
    f(line, along ? e - line * n : e / lines);
  }
}

// Row i of a pair, of a place of the signal.
template <class T, bool kGradient>
EFFVIT_DEVICE Complex load_pair(const FftConvParams& p, const Pair& pair, int32_t z) {
  float x[2] = {0.f, 0.f};
  for (int i = 0; i < pair.count; ++i) {
    const int64_t b = pair.row + i * pair.step;
    x[i] = kGradient ? load_map<T>(p.grad_out, map_offset(p.grad_out_stride, b, pair.channel, {0, 0, z}))
                     : load_input<T>(p, b, pair.channel, {0, 0, z});
  }
  return {x[0], x[1]};
}

// The pair that a line of a unit of work is, the unit having one pair of rows and plan.lines channels.
EFFVIT_DEVICE Pair unit_pair(const Problem& g, int64_t kernel, int64_t q, int64_t channel) {
  return {kernel + 2 * q * g.p.J, kernel, channel, g.p.J, 2 * q + 1 < g.per_kernel ? 2 : 1};
}

template <class T>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_fwd_kernel(EFFVIT_GRID_CONSTANT Fused w) {
  const Problem& g = w.g;
  const int n = w.plan.n, pitch = w.plan.pitch, size = static_cast<int>(g.p.Z);
  for (int64_t unit = prim::cta_id(); unit < w.total; unit += prim::cta_count()) {
    Lines s(w.plan, 0);
    int64_t kernel = unit;
    const int64_t channel = tile::take_index(kernel, w.blocks) * w.plan.lines, q = tile::take_index(kernel, g.pairs);
    const int lines = static_cast<int>(least(g.channels - channel, w.plan.lines));
    const Complex* const spectra = w.spectra + (kernel * g.channels + channel) * n;
    for_each_element(lines, n, !w.channels_last, [&](int line, int z) {
      const Complex x = z < size ? load_pair<T, false>(g.p, unit_pair(g, kernel, q, channel + line), z) : Complex{0, 0};
      s.store(line * pitch + padded(z), x);
    });
    prim::sync_threads();
    transform<false>(s, g.axes[2], w.plan, lines);
    for_each_element(lines, n, true, [&](int line, int i) {
      const int at = line * pitch + padded(i);
      s.store(at, s.load(at) * prim::load_global_vec<Complex>(spectra + line * static_cast<int64_t>(n) + i));
    });
    prim::sync_threads();
    transform<true>(s, g.axes[2], w.plan, lines);
    for_each_element(lines, size, !w.channels_last, [&](int line, int z) {
      const Pair pair = unit_pair(g, kernel, q, channel + line);
      const Complex y = s.load(line * pitch + padded(z));
      const float skip = skip_of(g.p, pair.channel);
      for (int i = 0; i < pair.count; ++i)
        store_result<T>(g.p, pair.row + i * pair.step, pair.channel, {0, 0, z}, i == 0 ? y.re : y.im, skip);
    });
    prim::sync_threads();  // the readers of the lines
  }
}

// Gradients of maps, and the sums that those of kernels are made of. A CTA walks over a share of a kernel's pairs.
template <class T>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_kernel(EFFVIT_GRID_CONSTANT Fused w) {
  const Problem& g = w.g;
  const int n = w.plan.n, pitch = w.plan.pitch, size = static_cast<int>(g.p.Z), set = w.plan.lines * pitch;
  for (int64_t unit = prim::cta_id(); unit < w.total; unit += prim::cta_count()) {
    int64_t rest = unit;
    const int64_t channel = tile::take_index(rest, w.blocks) * w.plan.lines, kernel = tile::take_index(rest, g.p.J);
    const int lines = static_cast<int>(least(g.channels - channel, w.plan.lines));
    const int64_t last = least((rest + 1) * w.split_pairs, g.pairs);
    const Shared<Complex> sums(0, set);
    Lines u, y;
    u.data = Shared<Complex>(set * 8, set), y.data = Shared<Complex>(set * 16, set);
    if (w.plan.buffers) u.other = Shared<Complex>(set * 24, set);  // in turn that of u and of y
    const Complex* const spectra = w.spectra + (kernel * g.channels + channel) * n;
    const auto product = [&](const Lines& from, bool conjugated) {
      for_each_element(lines, n, true, [&](int line, int q) {
        const int at = line * pitch + padded(q);
        const Complex k = prim::load_global_vec<Complex>(spectra + line * static_cast<int64_t>(n) + q);
        y.store(at, from.load(at) * (conjugated ? conjugate(k) : k));
      });
    };
    for_each_element(lines, n, true, [&](int line, int q) {
      sums.template store_vec<Complex>(line * pitch + padded(q), Complex{0.f, 0.f});
    });
    for (int64_t q0 = rest * w.split_pairs; q0 < last; ++q0) {
      const auto pair_at = [&](int line) { return unit_pair(g, kernel, q0, channel + line); };
      for_each_element(lines, n, !w.channels_last, [&](int line, int q) {
        const Complex x = q < size ? load_pair<T, false>(g.p, pair_at(line), q) : Complex{0.f, 0.f};
        u.store(line * pitch + padded(q), x);
      });
      prim::sync_threads();
      transform<false>(u, g.axes[2], w.plan, lines);
      y.other = u.other;
      if (keeps_y(g.p)) {
        product(u, false);
        prim::sync_threads();
        transform<true>(y, g.axes[2], w.plan, lines);
      }
      for_each_element(lines, n, !w.channels_last, [&](int line, int q) {
        const int at = line * pitch + padded(q);
        float grad[2] = {0.f, 0.f};
        if (q < size) {
          const Pair pair = pair_at(line);
          const Complex x = keeps_y(g.p) ? y.load(at) : Complex{0.f, 0.f};
          const float skip = skip_of(g.p, pair.channel);
          for (int i = 0; i < pair.count; ++i)
            grad[i] =
                gradient_of_sum<T>(g.p, pair.row + i * pair.step, pair.channel, {0, 0, q}, i == 0 ? x.re : x.im, skip);
          if (w.packed != nullptr)
            prim::store_global_vec(w.packed + ((kernel * g.pairs + q0) * g.channels + channel + line) * size + q,
                                   Complex{grad[0], grad[1]});
        }
        y.store(at, {grad[0], grad[1]});
      });
      prim::sync_threads();
      transform<false>(y, g.axes[2], w.plan, lines);
      for_each_element(lines, n, true, [&](int line, int q) {
        const int at = line * pitch + padded(q);
        sums.template store_vec<Complex>(at, sums.template load_vec<Complex>(at) + conjugate(u.load(at)) * y.load(at));
      });
      product(y, true);
      prim::sync_threads();
      transform<true>(y, g.axes[2], w.plan, lines);
      u.other = y.other;
      for_each_element(lines, size, !w.channels_last, [&](int line, int q) {
        const Pair pair = pair_at(line);
        Complex x = y.load(line * pitch + padded(q));
        if (w.packed != nullptr) {  // written by another thread, before a barrier
          const float skip = skip_of(g.p, pair.channel);
          const Complex sum = prim::load_global_vec<Complex>(
              w.packed + ((kernel * g.pairs + q0) * g.channels + channel + line) * size + q);
          x = x + Complex{skip * sum.re, skip * sum.im};
        }
        for (int i = 0; i < pair.count; ++i)
          store_input_gradient<T>(g.p, pair.row + i * pair.step, pair.channel, {0, 0, q}, i == 0 ? x.re : x.im);
      });
    }
    for_each_element(lines, n, true, [&](int line, int q) {
      const Complex sum = sums.template load_vec<Complex>(line * pitch + padded(q));
      prim::store_global_vec(w.sums + ((rest * g.p.J + kernel) * g.channels + channel + line) * n + q,
                             Complex{sum.re * g.scale, sum.im * g.scale});
    });
  }
}

// sums[0] = the sum of all splits.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_reduce_kernel(EFFVIT_GRID_CONSTANT Fused w, Index count) {
  for (Index e = first_index(); e < count; e += all_threads()) {
    Complex sum = prim::load_global_vec<Complex>(w.sums + e);
    for (Index s = 1; s < w.splits; ++s) sum = sum + prim::load_global_vec<Complex>(w.sums + s * count + e);
    prim::store_global_vec(w.sums + e, sum);
  }
}

}  // namespace fft_conv_impl
}  // namespace cuda
}  // namespace effvit
