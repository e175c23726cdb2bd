// fft_conv of one axis that shared memory holds: forward and backward in one kernel each.
//
// A CTA has a few lines, channels of one row of the batch. The coefficients of kernels are made before, by the kernels
// for any grid, and are read from global memory, [J, channels, n].
#pragma once
#include "fft_conv_spectra.cuh"

namespace effvit {
namespace cuda {
namespace fft_conv_impl {

struct Fused {
  Problem g;
  LinePlan plan;
  int64_t total = 0;  // units of work: plan.lines channels of a row of the batch, or backward of a share of its rows
  int64_t blocks = 1;  // of plan.lines channels
  const Coefficients* kernels = nullptr;  // [J, channels, n]
  bool channels_last = false;

  // Backward only.
  int64_t splits = 1, split_rows = 1;  // shares of the rows that share a kernel, and how many there are in one
  Complex* sums = nullptr;  // [splits, J, channels, n]: correlations over n
  Complex* packed = nullptr;  // [B, channels, size]: gradients of y + d u', or null
};

// f(line, place in it), neighbours being neighbours in a line, or the same place of several.
template <class F>
EFFVIT_DEVICE void for_each_element(int lines, int n, bool along, const F& f) {
  for (int e = prim::thread_id(); e < lines * n; e += kThreads) {
    const int line = along ? e / n : e % lines;
    f(line, along ? e - line * n : e / lines);
  }
}
// f(line, place, the mirror image's place), once for both.
template <class F>
EFFVIT_DEVICE void for_each_mirrored(const Problem& g, int lines, int n, const F& f) {
  for_each_element(lines, n, true, [&](int line, int i) {
    const int m = prim::load_global(g.axes[2].mirror + i);
    if (m >= i) f(line, i, m);
  });
}

template <bool kTransposed>
EFFVIT_DEVICE void multiply_lines(const Fused& w, const Lines& from, const Lines& to, int lines,
                                  const Coefficients* kernels) {
  const int n = w.plan.n;
  for_each_mirrored(w.g, lines, n, [&](int line, int i, int m) {
    const int at = line * w.plan.pitch + padded(i), other = line * w.plan.pitch + padded(m);
    const Coefficients* const k = kernels + line * static_cast<int64_t>(n);
    Complex x = from.load(at), y = from.load(other);
    multiply<kTransposed>(x, y, prim::load_global_vec<Coefficients>(k + i), prim::load_global_vec<Coefficients>(k + m));
    to.store(at, x);
    if (m != i) to.store(other, y);
  });
}

template <class T>
EFFVIT_DEVICE void load_lines(const Fused& w, const Lines& to, int lines, const Row& first) {
  for_each_element(lines, w.plan.n, !w.channels_last, [&](int line, int i) {
    const Row row = {first.b, first.channel + line};
    to.store(line * w.plan.pitch + padded(i), i < w.g.size ? load_inputs<T>(w.g, row, {0, 0, i}) : Complex{0.f, 0.f});
  });
}

template <class T>
EFFVIT_KERNEL(kThreads, 2)
fft_conv_fwd_kernel(EFFVIT_GRID_CONSTANT Fused w) {
  const Problem& g = w.g;
  for (int64_t unit = prim::cta_id(); unit < w.total; unit += prim::cta_count()) {
    Lines s(w.plan, 0);
    int64_t b = unit;
    const int64_t channel = tile::take_index(b, w.blocks) * w.plan.lines;
    const int lines = static_cast<int>(least(g.channels - channel, w.plan.lines));
    load_lines<T>(w, s, lines, {b, g.first_channel + channel});
    prim::sync_threads();
    transform<false>(s, g.axes[2], w.plan, lines);
    multiply_lines<false>(w, s, s, lines, w.kernels + (b % g.p.J * g.channels + channel) * w.plan.n);
    prim::sync_threads();
    transform<true>(s, g.axes[2], w.plan, lines);
    for_each_element(lines, g.size, !w.channels_last, [&](int line, int i) {
      store_results<T>(g, {b, g.first_channel + channel + line}, {0, 0, i}, s.load(line * w.plan.pitch + padded(i)));
    });
    prim::sync_threads();  // the readers of the lines
  }
}

// Gradients of maps, and the correlations that those of kernels are made of. A CTA walks over a share of the rows that
// share a kernel.
template <class T>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_kernel(EFFVIT_GRID_CONSTANT Fused w) {
  const Problem& g = w.g;
  const int n = w.plan.n, pitch = w.plan.pitch, set = w.plan.lines * pitch;
  for (int64_t unit = prim::cta_id(); unit < w.total; unit += prim::cta_count()) {
    int64_t split = unit;
    const int64_t channel = tile::take_index(split, w.blocks) * w.plan.lines, j = tile::take_index(split, g.p.J);
    const int lines = static_cast<int>(least(g.channels - channel, w.plan.lines));
    const int64_t last = least((split + 1) * w.split_rows, g.per_kernel), kernel = j * g.channels + channel;
    const Coefficients* const kernels = w.kernels + kernel * n;
    const Shared<Complex> sums(0, set);
    Lines u, y;
    u.data = Shared<Complex>(set * 8, set), y.data = Shared<Complex>(set * 16, set);
    if (w.plan.buffers) u.other = Shared<Complex>(set * 24, set);  // in turn that of u and of y
    for_each_element(lines, n, true, [&](int line, int i) {
      sums.template store_vec<Complex>(line * pitch + padded(i), Complex{0.f, 0.f});
    });
    for (int64_t q = split * w.split_rows; q < last; ++q) {
      const int64_t b = j + q * g.p.J;
      Complex* const packed = w.packed == nullptr ? nullptr : w.packed + (b * g.channels + channel) * g.size;
      load_lines<T>(w, u, lines, {b, g.first_channel + channel});
      prim::sync_threads();
      transform<false>(u, g.axes[2], w.plan, lines);
      y.other = u.other;
      if (keeps_y(g.p)) {
        multiply_lines<false>(w, u, y, lines, kernels);
        prim::sync_threads();
        transform<true>(y, g.axes[2], w.plan, lines);
      }
      for_each_element(lines, n, !w.channels_last, [&](int line, int i) {
        const int at = line * pitch + padded(i);
        Complex grad = {0.f, 0.f};
        if (i < g.size) {
          grad = gradients_of_sums<T>(g, {b, g.first_channel + channel + line}, {0, 0, i},
                                      keeps_y(g.p) ? y.load(at) : grad);
          if (packed != nullptr) prim::store_global_vec(packed + line * static_cast<int64_t>(g.size) + i, grad);
        }
        y.store(at, grad);
      });
      prim::sync_threads();
      transform<false>(y, g.axes[2], w.plan, lines);
      for_each_mirrored(g, lines, n, [&](int line, int i, int m) {
        const int at = line * pitch + padded(i), other = line * pitch + padded(m);
        Complex sum = sums.template load_vec<Complex>(at), sum_mirror = sums.template load_vec<Complex>(other);
        correlate(g, i, u.load(at), u.load(other), y.load(at), y.load(other), sum, sum_mirror);
        sums.template store_vec<Complex>(at, sum);
        if (m != i) sums.template store_vec<Complex>(other, sum_mirror);
      });
      multiply_lines<true>(w, y, y, lines, kernels);
      prim::sync_threads();
      transform<true>(y, g.axes[2], w.plan, lines);
      u.other = y.other;
      for_each_element(lines, g.size, !w.channels_last, [&](int line, int i) {
        Complex sum = {0.f, 0.f};  // written by another thread, before a barrier
        if (packed != nullptr) sum = prim::load_global_vec<Complex>(packed + line * static_cast<int64_t>(g.size) + i);
        store_input_gradients<T>(g, {b, g.first_channel + channel + line}, {0, 0, i}, y.load(line * pitch + padded(i)),
                                 sum);
      });
    }
    // Since the last sums were made there have been barriers.
    for_each_element(lines, n, true, [&](int line, int i) {
      const Complex sum = sums.template load_vec<Complex>(line * pitch + padded(i));
      prim::store_global_vec(w.sums + (split * g.p.J * g.channels + kernel + line) * n + i,
                             Complex{sum.re * g.scale, sum.im * g.scale});
    });
  }
}

// sums[0] = the sum of all splits.
template <class Index>
EFFVIT_KERNEL(kThreads, 1)
fft_conv_bwd_reduce_kernel(EFFVIT_GRID_CONSTANT Fused w, Index count) {
  for (Index e = first_index(); e < count; e += all_threads()) {
    Complex sum = load_grid(w.sums, e);
    for (Index s = 1; s < w.splits; ++s) sum = sum + load_grid(w.sums, s * count + e);
    prim::store_global_vec(w.sums + e, sum);
  }
}

}  // namespace fft_conv_impl
}  // namespace cuda
}  // namespace effvit
