// FFT convolution, forward and backward: device code and launch, on prim only.
//
// A real signal is transformed as a complex one of half its length, in float32, and never put in order: spectra of
// signals and of kernels are in the same digit-reversed order, and a product with a kernel's spectrum takes two
// frequencies that are mirror images. One axis whose transform fits into shared memory takes one kernel, forward or
// backward, that reads its inputs once. Everything else, more axes or a longer one, is packed into grids of complex
// numbers in the workspace and goes through passes: an axis is cut into groups of factors that shared memory holds.
// Grids of the workspace are bounded: channels are taken in chunks.
//
// Butterflies of 16 on the FMA units, not products with matrices on the tensor cores: those need three products of
// split bfloat16 numbers for less accuracy, 36 times the operations and the same traffic of shared memory.
//
// Lengths are any. Prime factors above 7 are sums of products, in shared memory or, where that is too small, from
// global memory: right for every length, slow for a large prime number. Padded lengths never have one.
//
// Backward: grad of y + d u' first, for which y is computed again where there is an activation or a gate behind it;
// its spectrum times the transposed kernel gives du', the sum over rows of conj(u's spectrum) times it what gradients
// of kernels are made of.
//
// fft_conv_transform.cuh has transforms in shared memory, _passes.cuh and _spectra.cuh the kernels for any grid,
// _fused.cuh those for one axis; this file plans and launches.
#pragma once
#include "fft_conv_fused.cuh"

namespace effvit {
namespace cuda {
namespace fft_conv_impl {

// ---- plan ----

constexpr int64_t kTargetElements = 4096;  // complex numbers that a CTA has in work, where lines are short
constexpr int64_t kShortestLine = 32;  // a CTA can always hold this many
constexpr int64_t kLongestLine = 16384;
constexpr int64_t kChunkBytes = 64 << 20;  // of a grid of the workspace, where a channel is less
constexpr int64_t kMaxSplits = 32;
inline int64_t chunk_bytes() {
  return least(kChunkBytes, 4096 * prim::max_shared_bytes());
}  // small where tests say so
constexpr int64_t kMostPlaces = int64_t{1} << 30;  // of a transform

// Shared memory for lines, of `sets` buffers each.
inline int64_t line_bytes(int64_t n, int sets) { return sets * 8 * padded(static_cast<int32_t>(n)); }
inline bool line_fits(int64_t n, int sets) {
  return n <= kShortestLine || (n <= kLongestLine && line_bytes(n, sets) <= prim::max_shared_bytes());
}

// `sets`: buffers of complex numbers a line, one more where a factor needs it.
inline LinePlan make_line_plan(const Axis& axis, int first, int count, int sets, int64_t lines, bool channels_last) {
  LinePlan plan;
  plan.first = first, plan.count = count;
  for (int i = first; i < first + count; ++i) {
    plan.n *= axis.factors[i];
    plan.buffers = plan.buffers || !has_butterfly(axis.factors[i]);
  }
  plan.pitch = padded(plan.n - 1) + 1;
  const int64_t bytes = line_bytes(plan.n, sets + (plan.buffers ? 1 : 0));
  const int64_t wanted = most(kTargetElements / plan.n, channels_last ? 8 : 1);
  plan.lines = static_cast<int32_t>(most(1, least(least(wanted, lines), prim::max_shared_bytes() / bytes)));
  return plan;
}
inline int64_t shared_bytes(const LinePlan& plan, int sets) {
  return static_cast<int64_t>(sets + (plan.buffers ? 1 : 0)) * plan.lines * plan.pitch * 8;
}

struct Group {
  int first = 0, count = 0;
  bool direct = false;  // one factor that does not fit
};

// Groups of an axis's factors: two of about the same length where two do, else as many as it takes.
inline int make_groups(const Axis& axis, Group (&groups)[kMaxFactors]) {
  const auto sets_of = [](int32_t f) { return has_butterfly(f) ? 1 : 2; };
  const auto cut = [&](int64_t most_of_one) {
    int count = 0;
    for (int i = 0; i < axis.count;) {
      Group& group = groups[count++];
      group = {i, 0, !line_fits(axis.factors[i], sets_of(axis.factors[i]))};
      int64_t n = 1;
      int sets = 1;
      do {
        n *= axis.factors[i], sets = sets > sets_of(axis.factors[i]) ? sets : sets_of(axis.factors[i]);
        ++i, ++group.count;
      } while (!group.direct && i < axis.count && n * axis.factors[i] <= most_of_one &&
               line_fits(n * axis.factors[i], sets > sets_of(axis.factors[i]) ? sets : sets_of(axis.factors[i])));
    }
    return count;
  };
  const int fewest = cut(axis.n);
  if (fewest != 2) return fewest;
  int64_t root = 1;
  while (root * root < axis.n) ++root;
  for (; root < axis.n; root *= 2) {
    if (cut(root) == 2) return 2;
  }
  return cut(axis.n);
}

struct Plan {
  Problem g;
  bool valid = true, fused = false, direct = false, channels_last = false;
  int64_t chunk = 1;  // channels at a time
  int64_t skip_splits = 1;

  Plan(const FftConvParams& p, bool is_backward) {
    g.p = p;
    const int64_t sizes[] = {p.NX, p.NY, p.NZ};
    int64_t grid = 1;
    g.halved = p.NZ % 2 == 0;
    for (int a = 0; a < 3; ++a) {
      valid = valid && sizes[a] < kMostPlaces && grid < kMostPlaces / most(1, sizes[a]);
      if (!valid) return;
      g.axes[a] = make_axis(a == 2 && g.halved ? sizes[a] / 2 : sizes[a]), grid *= g.axes[a].n;
    }
    g.z_places = static_cast<int32_t>(g.halved ? ceil_div(p.Z, 2) : p.Z);
    g.grid = static_cast<int32_t>(grid), g.size = static_cast<int32_t>(p.X * p.Y) * g.z_places;
    g.scale = 1.f / static_cast<float>(grid);
    g.per_kernel = p.B / p.J;
    channels_last = p.u_stride.c == 1 && p.C > 1;
    const Axis& z = g.axes[2];
    const int sets = is_backward ? 3 : 1;
    Group groups[kMaxFactors];
    for (const Axis& axis : g.axes) {
      const int count = make_groups(axis, groups);
      for (int i = 0; i < count; ++i) direct = direct || groups[i].direct;
    }
    bool buffers = false;
    for (int i = 0; i < z.count; ++i) buffers = buffers || !has_butterfly(z.factors[i]);
    fused = p.NX == 1 && p.NY == 1 && line_fits(z.n, sets + (buffers ? 1 : 0));
    // Of the largest buffers that a channel needs: grids, or coefficients, taps, and what the gradient of d is made of.
    const int64_t of_signals = p.B * grid * 8, of_kernels = p.J * grid * 24;
    const int64_t of_sums = is_backward && p.d != nullptr ? p.B * g.size * 8 : 0;
    chunk = g.channels = least(p.C, most(1, chunk_bytes() / most(fused ? of_sums : of_signals, of_kernels)));
    skip_splits = least(kMaxSplits, ceil_div(p.B * static_cast<int64_t>(g.size), 64 * kThreads));
  }

  int64_t rows() const { return g.p.B * chunk; }
  int64_t kernels() const { return g.p.J * chunk; }
};

inline Fused make_fused(const Plan& plan, bool backward) {
  Fused w;
  const FftConvParams& p = plan.g.p;
  const Axis& z = plan.g.axes[2];
  w.g = plan.g, w.channels_last = plan.channels_last;
  w.plan = make_line_plan(z, 0, z.count, backward ? 3 : 1, plan.chunk, plan.channels_last);
  w.blocks = ceil_div(plan.g.channels, w.plan.lines);
  w.total = w.blocks * p.B;
  if (backward) {
    const int64_t rows = plan.g.per_kernel, blocks = ceil_div(plan.chunk, w.plan.lines);  // the last chunk's is smaller
    w.split_rows = ceil_div(rows, tile::split_count(prim::target_ctas(), blocks * p.J, least(kMaxSplits, rows)));
    w.splits = ceil_div(rows, w.split_rows);
    w.total = w.blocks * p.J * w.splits;
  }
  return w;
}

// Scratch memory.
struct Workspace {
  Complex *roots[3] = {}, *turns[3] = {};
  int32_t* mirror[3] = {};
  Complex *taps = nullptr, *u = nullptr, *y = nullptr, *spare = nullptr, *sums = nullptr, *packed = nullptr;
  Coefficients* kernels = nullptr;
  float* parts = nullptr;  // of the gradient of d
  size_t bytes = 0;

  Workspace(const Plan& plan, void* base, bool backward) {
    const auto take = [&](auto*& to, bool wanted, int64_t count) {
      if (!wanted) return;
      to = reinterpret_cast<std::decay_t<decltype(to)>>(static_cast<char*>(base) + bytes);
      bytes += static_cast<size_t>(ceil_div(count * static_cast<int64_t>(sizeof(*to)), 16) * 16);
    };
    const Problem& g = plan.g;
    for (int a = 0; a < 3; ++a) {
      take(roots[a], true, g.axes[a].n), take(turns[a], true, g.axes[a].n), take(mirror[a], true, g.axes[a].n);
    }
    // Grids of kernels are as large as those of signals where `spare` takes turns with either.
    const int64_t of_rows = plan.rows() * g.grid, of_kernels = plan.direct ? of_rows : plan.kernels() * g.grid;
    take(kernels, true, plan.kernels() * g.grid);
    take(taps, g.p.k != nullptr, of_kernels);
    take(u, !plan.fused, of_rows);
    take(y, !plan.fused && backward, of_rows);
    take(spare, plan.direct, of_rows);
    const int64_t splits = plan.fused && backward ? make_fused(plan, true).splits : 1;
    take(sums, backward, splits * of_kernels);
    take(packed, backward && g.p.d != nullptr, plan.rows() * g.size);
    take(parts, backward && g.p.d != nullptr, plan.chunk * plan.skip_splits);
  }
};

// ---- launches ----

// Remembers the first error; launches nothing after it.
class Launches {
 public:
  template <class F>
  void then(const F& launch) {
    if (error_ == cudaSuccess) error_ = launch();
  }
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_ = cudaSuccess;
};

inline int64_t element_ctas(int64_t elements) { return grid_size(ceil_div(elements, kThreads)); }

struct Run {
  Plan plan;
  Workspace w;
  cudaStream_t stream;
  Launches launches;

  Run(const FftConvParams& p, void* workspace, bool backward, cudaStream_t s)
      : plan(p, backward), w(plan, workspace, backward), stream(s) {
    for (int a = 0; a < 3; ++a) {
      Axis& axis = plan.g.axes[a];
      axis.roots = w.roots[a], axis.mirror = w.mirror[a], axis.turns = w.turns[a];
    }
  }

  void tables() {
    Tables t;
    int64_t count = 0;
    for (int a = 0; a < 3; ++a) {
      t.axes[a] = plan.g.axes[a], t.roots[a] = w.roots[a], t.turns[a] = w.turns[a], t.mirror[a] = w.mirror[a];
      count += t.axes[a].n;
    }
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_tables_kernel<int64_t>), element_ctas(count), kThreads, 0, stream, t, count);
    });
  }

  template <bool kInverse>
  void pass(const Axis& axis, const Group& group, int64_t length, int64_t rest, int64_t rows, Complex*& data) {
    Pass g;
    g.axis = axis;
    int64_t n = 1;
    for (int i = group.first; i < group.first + group.count; ++i) n *= axis.factors[i];
    g.length = static_cast<int32_t>(length), g.rest = rest, g.inner = length / n * rest;
    g.total = rows * plan.g.grid / n;
    g.plan = make_line_plan(axis, group.first, group.count, 1, g.total, g.inner > 1);
    g.data = data;
    if (group.direct) {
      g.to = w.spare;
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_long_pass_kernel<kInverse>), element_ctas(rows * plan.g.grid), kThreads, 0,
                             stream, g);
      });
      w.spare = data, data = g.to;
      return;
    }
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_pass_kernel<kInverse>), grid_size(ceil_div(g.total, g.plan.lines)), kThreads,
                           shared_bytes(g.plan, 1), stream, g);
    });
  }

  // Transforms grids in place; where a factor does not fit, `data` and the spare grid take turns.
  template <bool kInverse>
  void transform_grid(Complex*& data, int64_t rows) {
    for (int step = 0; step < 3; ++step) {
      const int a = kInverse ? 2 - step : step;
      const Axis& axis = plan.g.axes[a];
      int64_t rest = 1;
      for (int b = a + 1; b < 3; ++b) rest *= plan.g.axes[b].n;
      Group groups[kMaxFactors];
      int64_t lengths[kMaxFactors];
      const int count = make_groups(axis, groups);
      int64_t length = axis.n;
      for (int i = 0; i < count; ++i) {
        lengths[i] = length;
        for (int f = groups[i].first; f < groups[i].first + groups[i].count; ++f) length /= axis.factors[f];
      }
      for (int i = 0; i < count; ++i) {
        const int at = kInverse ? count - 1 - i : i;
        pass<kInverse>(axis, groups[at], lengths[at], rest, rows, data);
      }
    }
  }

  // The coefficients of this chunk's kernels, over the grid's size.
  void kernels() {
    const Problem& g = plan.g;
    const int64_t rows = g.p.J * g.channels, ctas = element_ctas(rows * g.grid);
    if (g.p.spectrum != nullptr) {
      launches.then(
          [&] { return EFFVIT_LAUNCH((fft_conv_spectrum_kernel<int64_t>), ctas, kThreads, 0, stream, g, w.kernels); });
      return;
    }
    launches.then([&] { return EFFVIT_LAUNCH((fft_conv_taps_kernel<int64_t>), ctas, kThreads, 0, stream, g, w.taps); });
    transform_grid<false>(w.taps, rows);
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_coefficients_kernel<int64_t>), ctas, kThreads, 0, stream, g, w.taps, w.kernels);
    });
  }

  // Gradients of kernels, from the sums over their rows.
  void kernel_gradients() {
    const Problem& g = plan.g;
    const FftConvParams& p = g.p;
    const int64_t rows = p.J * g.channels;
    if (p.spectrum != nullptr) {
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_bwd_spectrum_kernel<int64_t>), element_ctas(p.J * g.channels * g.grid), kThreads,
                             0, stream, g, w.sums);
      });
      return;
    }
    if (!keeps_all(p)) {
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_bwd_keep_kernel<int64_t>), element_ctas(rows * g.grid), kThreads, 0, stream, g,
                             w.sums);
      });
    }
    transform_grid<true>(w.sums, rows);
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_bwd_taps_kernel<false>), element_ctas(rows * p.KX * p.KY * p.KZ), kThreads, 0,
                           stream, g, w.sums);
    });
    if (p.k_rev == nullptr) return;
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_bwd_taps_kernel<true>), element_ctas(rows * p.RX * p.RY * p.RZ), kThreads, 0,
                           stream, g, w.sums);
    });
  }

  template <class T>
  void skip_gradient() {
    const Problem& g = plan.g;
    if (g.p.d == nullptr) return;
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_bwd_skip_kernel<T>), grid_size(g.channels * plan.skip_splits), kThreads,
                           kThreads * 4, stream, g, w.packed, plan.skip_splits, w.parts);
    });
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_bwd_skip_sum_kernel<int64_t>), element_ctas(g.channels), kThreads, 0, stream, g,
                           plan.skip_splits, w.parts);
    });
  }

  // f() for each chunk of channels.
  template <class F>
  void for_each_chunk(const F& f) {
    Problem& g = plan.g;
    for (int64_t c = 0; c < g.p.C; c += plan.chunk) {
      g.first_channel = c, g.channels = least(plan.chunk, g.p.C - c);
      f(g.p.B * g.channels);
    }
  }

  template <class T>
  void pack(Complex* to, int64_t rows) {
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_pack_kernel<T>), element_ctas(rows * plan.g.grid), kThreads, 0, stream, plan.g,
                           to);
    });
  }
  template <bool kTransposed>
  void product(const Complex* from, Complex* to, int64_t rows) {
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_product_kernel<kTransposed>), element_ctas(rows * plan.g.grid), kThreads, 0,
                           stream, plan.g, from, w.kernels, to);
    });
  }

  template <class T>
  void forward() {
    const Problem& g = plan.g;
    for_each_chunk([&](int64_t rows) {
      kernels();
      if (plan.fused) {
        Fused fused = make_fused(plan, false);
        fused.kernels = w.kernels;
        launches.then([&] {
          return EFFVIT_LAUNCH((fft_conv_fwd_kernel<T>), grid_size(fused.total), kThreads, shared_bytes(fused.plan, 1),
                               stream, fused);
        });
        return;
      }
      pack<T>(w.u, rows);
      transform_grid<false>(w.u, rows);
      product<false>(w.u, w.u, rows);
      transform_grid<true>(w.u, rows);
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_out_kernel<T>), element_ctas(rows * g.size), kThreads, 0, stream, g, w.u);
      });
    });
  }

  template <class T>
  void backward_of_lines() {
    const Problem& g = plan.g;
    Fused fused = make_fused(plan, true);
    fused.kernels = w.kernels, fused.sums = w.sums, fused.packed = w.packed;
    launches.then([&] {
      return EFFVIT_LAUNCH((fft_conv_bwd_kernel<T>), grid_size(fused.total), kThreads, shared_bytes(fused.plan, 3),
                           stream, fused);
    });
    const int64_t count = g.p.J * g.channels * g.grid;
    if (fused.splits > 1) {
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_bwd_reduce_kernel<int64_t>), element_ctas(count), kThreads, 0, stream, fused,
                             count);
      });
    }
    kernel_gradients();
    skip_gradient<T>();
  }

  template <class T>
  void backward() {
    const Problem& g = plan.g;
    for_each_chunk([&](int64_t rows) {
      kernels();
      if (plan.fused) {
        backward_of_lines<T>();
        return;
      }
      pack<T>(w.u, rows);
      transform_grid<false>(w.u, rows);
      if (keeps_y(g.p)) {
        product<false>(w.u, w.y, rows);
        transform_grid<true>(w.y, rows);
      }
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_bwd_sum_kernel<T>), element_ctas(rows * g.grid), kThreads, 0, stream, g, w.y,
                             w.packed);
      });
      transform_grid<false>(w.y, rows);
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_bwd_correlate_kernel<int64_t>), element_ctas(g.p.J * g.channels * g.grid),
                             kThreads, 0, stream, g, w.u, w.y, w.sums);
      });
      product<true>(w.y, w.y, rows);
      transform_grid<true>(w.y, rows);
      launches.then([&] {
        return EFFVIT_LAUNCH((fft_conv_bwd_input_kernel<T>), element_ctas(rows * g.size), kThreads, 0, stream, g, w.y,
                             w.packed);
      });
      kernel_gradients();
      skip_gradient<T>();
    });
  }
};

inline uint64_t map_bytes(const FftConvParams& p, const FftConvStrides& s) {
  return tile::extent_bytes(p.dtype, {{p.B, s.b}, {p.C, s.c}, {p.X, s.x}, {p.Y, s.y}, {p.Z, s.z}});
}
inline int64_t half_spectrum(const FftConvParams& p) { return p.J * p.C * p.NX * p.NY * (p.NZ / 2 + 1) * 2; }

inline void register_inputs(prim::GlobalRanges& ranges, const FftConvParams& p, void* workspace, size_t bytes) {
  ranges.read(p.u, map_bytes(p, p.u_stride));
  ranges.read(p.pregate, map_bytes(p, p.pregate_stride));
  ranges.read(p.postgate, map_bytes(p, p.postgate_stride));
  ranges.read(p.k, tile::tensor_bytes(p.k_dtype, p.J * p.C * p.KX * p.KY * p.KZ));
  ranges.read(p.k_rev, tile::tensor_bytes(p.k_rev_dtype, p.J * p.C * p.RX * p.RY * p.RZ));
  ranges.read(p.d, tile::tensor_bytes(p.d_dtype, p.C));
  ranges.read(p.spectrum, tile::tensor_bytes(DType::kFloat32, half_spectrum(p)));
  ranges.write(workspace, bytes);
}

inline bool is_empty(const FftConvParams& p) { return p.B * p.C * p.X * p.Y * p.Z == 0; }
inline size_t workspace_bytes(const FftConvParams& p, bool backward) {
  if (is_empty(p)) return 0;
  const Plan plan(p, backward);
  return plan.valid ? Workspace(plan, nullptr, backward).bytes : 0;
}

}  // namespace fft_conv_impl
}  // namespace cuda

inline size_t fft_conv_fwd_workspace_bytes(const FftConvParams& p) {
  return cuda::fft_conv_impl::workspace_bytes(p, false);
}
inline size_t fft_conv_bwd_workspace_bytes(const FftConvParams& p) {
  return cuda::fft_conv_impl::workspace_bytes(p, true);
}

template <class Types = cuda::AllTypes>
cudaError_t launch_fft_conv_fwd(const FftConvParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::fft_conv_impl;
  if (is_empty(p)) return cudaSuccess;
  if (!Plan(p, false).valid) return static_cast<cudaError_t>(1);  // cudaErrorInvalidValue: a transform of 2^30 places
  Run run(p, workspace, false, stream);
  prim::GlobalRanges ranges;
  register_inputs(ranges, p, workspace, run.w.bytes);
  ranges.write_once(p.out, tile::tensor_bytes(p.dtype, p.B * p.C * p.X * p.Y * p.Z));
  run.tables();
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    run.forward<decltype(type)>();
    return run.launches.error();
  });
  ranges.finish();
  return error;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_fft_conv_bwd(const FftConvParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::fft_conv_impl;
  if (is_empty(p)) return cudaSuccess;
  if (!Plan(p, true).valid) return static_cast<cudaError_t>(1);
  Run run(p, workspace, true, stream);
  const uint64_t map = tile::tensor_bytes(p.dtype, p.B * p.C * p.X * p.Y * p.Z);
  prim::GlobalRanges ranges;
  register_inputs(ranges, p, workspace, run.w.bytes);
  ranges.read(p.grad_out, map_bytes(p, p.grad_out_stride));
  ranges.write_once(p.du, map);
  ranges.write_once(p.pregate == nullptr ? nullptr : p.dpregate, map);
  ranges.write_once(p.postgate == nullptr ? nullptr : p.dpostgate, map);
  ranges.write_once(p.dk, tile::tensor_bytes(p.k_dtype, p.J * p.C * p.KX * p.KY * p.KZ));
  ranges.write_once(p.dk_rev, tile::tensor_bytes(p.k_rev_dtype, p.J * p.C * p.RX * p.RY * p.RZ));
  ranges.write_once(p.dd, tile::tensor_bytes(p.d_dtype, p.C));
  ranges.write_once(p.dspectrum, tile::tensor_bytes(DType::kFloat32, half_spectrum(p)));
  run.tables();
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    run.backward<decltype(type)>();
    return run.launches.error();
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
