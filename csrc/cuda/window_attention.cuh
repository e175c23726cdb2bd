// Windowed softmax attention, forward and backward: device code and launch, on prim only.
//
// A CTA of four warps owns one head and one 64x64 tile position of the window's score matrix (all of it for windows of
// up to 64 tokens) and walks over many windows. Tokens are gathered straight from the map by index arithmetic and
// results are scattered straight back. A window of up to 16 (32) tokens takes a slot of 16 (32) rows, so four (two)
// share a tile.
//
// Backward of windows of up to 64 tokens without halo: one fused pass. Others: a dq pass, a dk/dv pass in which a key
// tile walks the query windows that reach it, and a table pass. The gradient of the table is the sum of dS over
// windows: a tile position has the same offsets in every window, so dS is summed in registers over the walk and sorted
// into the table once per CTA. Every sum runs in a fixed order: results are deterministic.
//
// exp(x - lse) is exp2((x - lse) * log2(e)), never exp2(x * log2(e) - ...): the difference of two large logits is
// exact.
//
// window_attention_common.cuh has what the passes share, _fwd.cuh and _bwd.cuh the kernels, this file plans and
// launches.
#pragma once
#include "window_attention_bwd.cuh"
#include "window_attention_fwd.cuh"

namespace effvit {
namespace cuda {
namespace window_attention_impl {

// ---- the plan ----

inline bool fits_fused(const Plan& g) { return g.keys <= kTile && g.axis_y.halo == 0 && g.axis_x.halo == 0; }

// Sizes that do not depend on the pass.
template <class T>
Plan base_plan(const WindowAttentionParams& p) {
  Plan g = {};
  const int64_t size = sizeof(T);
  const auto rows = [&](const void* base, int64_t b, int64_t y, int64_t x, int64_t h, int64_t cols,
                        const void* pad = nullptr) {
    return MapRows{base,
                   b,
                   y,
                   x,
                   h,
                   static_cast<int32_t>(cols),
                   base != nullptr && aligned16(base, size, {b, y, x, h}),
                   pad,
                   aligned16(pad, size, {cols})};
  };
  const auto gradient = [&](void* base, int64_t stride_t, int64_t cols) {
    return MapGradient{base, stride_t, static_cast<int32_t>(cols), aligned16(base, size, {stride_t, cols})};
  };
  g.p = p;
  g.q = rows(p.q, p.q_stride_b, p.q_stride_y, p.q_stride_x, p.q_stride_h, p.d);
  g.k = rows(p.k, p.k_stride_b, p.k_stride_y, p.k_stride_x, p.k_stride_h, p.d, p.pad_k);
  g.v = rows(p.v, p.v_stride_b, p.v_stride_y, p.v_stride_x, p.v_stride_h, p.dv, p.pad_v);
  g.grad = rows(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x, p.grad_out_stride_h, p.dv);
  g.out = rows(p.out, p.H * p.W * p.h * p.dv, p.W * p.h * p.dv, p.h * p.dv, p.dv, p.dv);
  g.dq = gradient(p.dq, p.dq_stride_t, p.d);
  g.dk = gradient(p.dk, p.dk_stride_t, p.d);
  g.dv = gradient(p.dvalue, p.dvalue_stride_t, p.dv);
  g.axis_y = make_window_axis(p.H, p.window_h, p.shift_h, p.dilation_h, p.halo_h, p.roll_before_pad);
  g.axis_x = make_window_axis(p.W, p.window_w, p.shift_w, p.dilation_w, p.halo_w, p.roll_before_pad);
  g.queries = p.window_h * p.window_w;
  g.key_w = p.window_w + 2 * p.halo_w;
  g.keys = (p.window_h + 2 * p.halo_h) * g.key_w;
  g.slot_rows = g.keys <= 16 ? 16 : g.keys <= 32 ? 32 : kTile;
  g.slots = kTile / g.slot_rows;
  g.q_tiles = static_cast<int32_t>(ceil_div(g.queries, kTile));
  g.k_tiles = static_cast<int32_t>(ceil_div(g.keys, kTile));
  g.table_w = 2 * p.window_w - 1 + 2 * p.halo_w;
  g.table_size = (2 * p.window_h - 1 + 2 * p.halo_h) * g.table_w;
  g.windows_per_map = static_cast<int64_t>(g.axis_y.windows) * g.axis_x.windows;
  g.windows = p.B * g.windows_per_map;
  g.tiles = ceil_div(g.windows, g.slots);
  g.d_pad = round_up(p.d, Traits<T>::kPad);
  g.dv_pad = round_up(p.dv, Traits<T>::kPad);
  g.table_in_shared = p.bias_table != nullptr && g.table_size * 4 <= kMaxTableInShared;
  return g;
}

// Shared memory of a pass. Whole rows of q, k, v and grad_out stay there if they fit; else pieces of kStreamCols
// columns are loaded when they are needed, q and grad_out (k and v) in one buffer.
template <class T>
void plan_shared(Plan& g, Pass pass, int cols) {
  const int64_t scores = tile_bytes<T>(kTile, kTile);
  for (const bool resident : {true, false}) {
    SharedLayout layout;
    g.resident = resident;
    g.d_cols = resident ? g.d_pad : min_of(g.d_pad, kStreamCols);
    g.dv_cols = pass == kForward ? min_of(g.dv_pad, cols) : resident ? g.dv_pad : min_of(g.dv_pad, kStreamCols);
    const int64_t d_bytes = tile_bytes<T>(kTile, g.d_cols), v_bytes = tile_bytes<T>(kTile, g.dv_cols);
    if (pass == kForward) {
      g.s_q = layout.take(most(d_bytes, tile_bytes<T>(kTile, cols)));
      g.s_k = layout.take(d_bytes);
      g.s_g = g.s_v = layout.take(v_bytes);
      g.s_p = kTensorCores<T> ? 0 : layout.take(scores);
      g.s_ds = g.s_stage = 0;
    } else {
      g.s_q = layout.take(resident ? d_bytes : most(d_bytes, v_bytes));
      g.s_k = layout.take(resident ? d_bytes : most(d_bytes, v_bytes));
      g.s_v = resident ? layout.take(v_bytes) : g.s_k;
      g.s_g = resident ? layout.take(v_bytes) : g.s_q;
      g.s_p = pass == kFused || pass == kDkv ? layout.take(scores) : 0;
      g.s_ds = pass == kTable ? 0 : layout.take(scores);
      g.s_stage = pass == kTable ? 0 : layout.take(tile_bytes<T>(kTile, kOutCols));
    }
    g.s_q_token = layout.take(kTile * 16);
    g.s_k_token = layout.take(kTile * 16);
    g.s_k_meta = layout.take(kTile * 4);
    g.s_rows = layout.take(kRowBytes);
    g.s_pad = layout.take((pass == kFused || pass == kDq) && g.p.pad_k != nullptr ? (g.d_pad + g.dv_pad) * 4 : 0);
    g.s_table = layout.take(g.table_in_shared ? g.table_size * 4 : 0);
    if ((pass == kFused || pass == kTable) && g.p.bias_table != nullptr) layout.at_least(kTile * (kTile + 1) * 4);
    layout.at_least(scores);  // an array that the pass does not use lies at 0
    g.shared_bytes = static_cast<int32_t>(layout.bytes());
    if (layout.bytes() <= prim::max_shared_bytes()) return;
  }
}

template <class T>
Plan pass_plan(const WindowAttentionParams& p, Pass pass, int cols) {
  Plan g = base_plan<T>(p);
  plan_shared<T>(g, pass, cols);
  const bool in_chunks = pass == kForward || pass == kDq || pass == kDkv;
  const int64_t all = pass == kForward ? g.dv_pad : pass == kDq ? g.d_pad : most(g.d_pad, g.dv_pad);
  g.cols = cols;
  g.col_chunks = in_chunks ? static_cast<int32_t>(ceil_div(all, cols)) : 1;
  const int64_t positions = p.h * g.col_chunks * (pass == kFused ? 1 : g.q_tiles) * (pass == kTable ? g.k_tiles : 1);
  g.walks = static_cast<int32_t>(split_count(prim::target_ctas(), positions, g.tiles));
  g.ctas = positions * g.walks;
  g.small_partials = pass == kDq ? g.walks * g.q_tiles : g.walks;
  g.small_stride = static_cast<int32_t>(p.d + p.dv + 2);
  for (int qt = 0; qt < g.q_tiles; ++qt) {
    for (int kt = 0; kt < g.k_tiles; ++kt) {
      int32_t first, count;
      table_range(g, qt, kt, first, count);
      if (count > g.partial_range) g.partial_range = count;
    }
  }
  return g;
}

inline bool in_shared(const Plan& g) { return g.resident && (g.table_in_shared || g.p.bias_table == nullptr); }

// Output columns of a CTA of each pass: the largest width whose accumulators fit the registers, and the only one where
// operands are streamed.
constexpr int max_columns(Pass pass) { return pass == kForward ? 128 : 64; }
constexpr int streamed_columns(Pass pass) { return pass == kDkv ? 32 : 64; }

template <class T>
Plan pass_plan(const WindowAttentionParams& p, Pass pass) {
  const int64_t wanted = pass == kForward ? p.dv : pass == kDkv && p.dv > p.d ? p.dv : p.d;
  const int cols = wanted <= 32 ? 32 : wanted <= 64 ? 64 : max_columns(pass);
  const Plan g = pass_plan<T>(p, pass, cols);
  return in_shared(g) ? g : pass_plan<T>(p, pass, streamed_columns(pass));
}

// Calls f(columns, in_shared) for the kernel that the plan is for.
template <Pass kPass, class F>
cudaError_t dispatch_plan(const Plan& g, const F& f) {
  if (!in_shared(g)) return f(std::integral_constant<int, streamed_columns(kPass)>{}, std::false_type{});
  if (g.cols == 32) return f(std::integral_constant<int, 32>{}, std::true_type{});
  if (g.cols == 64) return f(std::integral_constant<int, 64>{}, std::true_type{});
  return f(std::integral_constant<int, max_columns(kPass)>{}, std::true_type{});
}

// The plans of the two passes that write partial sums, with their places in the workspace.
template <class T>
size_t plan_workspace(const WindowAttentionParams& p, void* workspace, Plan& table, Plan& small) {
  const Plan base = base_plan<T>(p);
  if (fits_fused(base)) {
    table = small = pass_plan<T>(p, kFused);
  } else {
    table = pass_plan<T>(p, kTable);
    small = pass_plan<T>(p, kDq);
  }
  const bool small_used = p.pad_k != nullptr || p.logit_scale != nullptr;
  const int64_t table_floats = p.bias_table == nullptr ? 0
                                                       : p.h * table.walks * table.q_tiles * table.k_tiles *
                                                             static_cast<int64_t>(table.partial_range);
  const int64_t small_floats = small_used ? p.h * static_cast<int64_t>(small.small_partials) * small.small_stride : 0;
  auto* const floats = static_cast<float*>(workspace);
  table.table_partials = small.table_partials = floats;
  table.small_sums = small.small_sums = floats == nullptr ? nullptr : floats + table_floats;
  return static_cast<size_t>(table_floats + small_floats) * sizeof(float);
}

// ---- the memory of a launch ----

inline uint64_t map_bytes(const WindowAttentionParams& p, const void* base, int64_t b, int64_t y, int64_t x, int64_t h,
                          int64_t cols) {
  return base == nullptr ? 0 : extent_bytes(p.dtype, {{p.B, b}, {p.H, y}, {p.W, x}, {p.h, h}, {cols, 1}});
}

inline void register_inputs(prim::GlobalRanges& ranges, const WindowAttentionParams& p) {
  const int64_t table_h = 2 * p.window_h - 1 + 2 * p.halo_h, table_w = 2 * p.window_w - 1 + 2 * p.halo_w;
  ranges.read(p.q, map_bytes(p, p.q, p.q_stride_b, p.q_stride_y, p.q_stride_x, p.q_stride_h, p.d));
  ranges.read(p.k, map_bytes(p, p.k, p.k_stride_b, p.k_stride_y, p.k_stride_x, p.k_stride_h, p.d));
  ranges.read(p.v, map_bytes(p, p.v, p.v_stride_b, p.v_stride_y, p.v_stride_x, p.v_stride_h, p.dv));
  ranges.read(
      p.bias_table,
      extent_bytes(p.bias_dtype, {{p.h, p.bias_stride_h}, {table_h, p.bias_stride_y}, {table_w, p.bias_stride_x}}));
  ranges.read(p.logit_scale, tensor_bytes(p.logit_scale_dtype, p.h));
  ranges.read(p.pad_k, tensor_bytes(p.dtype, p.h * p.d));
  ranges.read(p.pad_v, tensor_bytes(p.dtype, p.h * p.dv));
}

// dq, dk and dvalue, which may lie interleaved in one tensor.
inline void register_gradients(prim::GlobalRanges& ranges, const WindowAttentionParams& p) {
  const int64_t tokens = p.B * p.H * p.W, all = p.h * (2 * p.d + p.dv);
  if (p.dq_stride_t == all && p.dk_stride_t == all && p.dvalue_stride_t == all) {
    ranges.write_once(p.dq, tensor_bytes(p.dtype, tokens * all));
    return;
  }
  ranges.write_once(p.dq, tensor_bytes(p.dtype, tokens * p.h * p.d));
  ranges.write_once(p.dk, tensor_bytes(p.dtype, tokens * p.h * p.d));
  ranges.write_once(p.dvalue, tensor_bytes(p.dtype, tokens * p.h * p.dv));
}

}  // namespace window_attention_impl
}  // namespace cuda

template <class Types = cuda::AllTypes>
cudaError_t launch_window_attention_fwd(const WindowAttentionParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::window_attention_impl;
  const int64_t rows = p.B * p.H * p.W * p.h;
  if (rows == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.write_once(p.out, tensor_bytes(p.dtype, rows * p.dv));
  ranges.write_once(p.lse, tensor_bytes(DType::kFloat32, rows));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Plan g = pass_plan<T>(p, kForward);
    return dispatch_plan<kForward>(g, [&](auto cols, auto shared) {
      return EFFVIT_LAUNCH((window_attention_fwd_kernel<T, decltype(cols)::value, decltype(shared)::value>), g.ctas,
                           kThreads, g.shared_bytes, stream, g);
    });
  });
  ranges.finish();
  return error;
}

template <class Types = cuda::AllTypes>
size_t window_attention_bwd_workspace_bytes(const WindowAttentionParams& p) {
  using namespace cuda;
  using namespace cuda::window_attention_impl;
  if (p.B * p.H * p.W * p.h == 0) return 0;
  size_t bytes = 0;
  (void)dispatch_dtype<Types>(p.dtype, [&](auto type) {
    Plan table, small;
    bytes = plan_workspace<decltype(type)>(p, nullptr, table, small);
    return cudaSuccess;
  });
  return bytes;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_window_attention_bwd(const WindowAttentionParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::window_attention_impl;
  const int64_t rows = p.B * p.H * p.W * p.h;
  if (rows == 0) return cudaSuccess;
  const bool table_wanted = p.bias_table != nullptr;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.read(p.out, tensor_bytes(p.dtype, rows * p.dv));
  ranges.read(p.lse, tensor_bytes(DType::kFloat32, rows));
  ranges.read(p.grad_lse, tensor_bytes(DType::kFloat32, rows));
  ranges.read(p.grad_out, map_bytes(p, p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x,
                                    p.grad_out_stride_h, p.dv));
  ranges.write(workspace, window_attention_bwd_workspace_bytes<Types>(p));
  register_gradients(ranges, p);
  ranges.write_once(p.dpad_k, tensor_bytes(p.dtype, p.pad_k == nullptr ? 0 : p.h * p.d));
  ranges.write_once(p.dpad_v, tensor_bytes(p.dtype, p.pad_k == nullptr ? 0 : p.h * p.dv));
  ranges.write_once(p.dlogit_scale, tensor_bytes(p.logit_scale_dtype, p.logit_scale == nullptr ? 0 : p.h));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t status = cudaSuccess;
    const auto then = [&](bool wanted, auto launch) {
      if (status == cudaSuccess && wanted) status = launch();
    };
    Plan table, small;
    plan_workspace<T>(p, workspace, table, small);
    ranges.write_once(p.dbias_table, tensor_bytes(p.bias_dtype, table_wanted ? p.h * table.table_size : 0));
    const bool fused = fits_fused(table);
    then(fused, [&] {
      return dispatch_plan<kFused>(table, [&](auto, auto shared) {
        return EFFVIT_LAUNCH((window_attention_bwd_fused_kernel<T, decltype(shared)::value>), table.ctas, kThreads,
                             table.shared_bytes, stream, table);
      });
    });
    then(!fused, [&] {
      return dispatch_plan<kDq>(small, [&](auto cols, auto shared) {
        return EFFVIT_LAUNCH((window_attention_bwd_dq_kernel<T, decltype(cols)::value, decltype(shared)::value>),
                             small.ctas, kThreads, small.shared_bytes, stream, small);
      });
    });
    then(!fused, [&] {
      const Plan g = pass_plan<T>(p, kDkv);
      return dispatch_plan<kDkv>(g, [&](auto cols, auto shared) {
        return EFFVIT_LAUNCH((window_attention_bwd_dkv_kernel<T, decltype(cols)::value, decltype(shared)::value>),
                             g.ctas, kThreads, g.shared_bytes, stream, g);
      });
    });
    then(!fused && table_wanted, [&] {
      return dispatch_plan<kTable>(table, [&](auto, auto shared) {
        return EFFVIT_LAUNCH((window_attention_bwd_table_kernel<T, decltype(shared)::value>), table.ctas, kThreads,
                             table.shared_bytes, stream, table);
      });
    });
    then(table_wanted, [&] {
      return EFFVIT_LAUNCH((window_attention_bwd_reduce_table_kernel<int64_t>),
                           p.h * ceil_div(table.table_size, kReduceEntries), kThreads, kThreads * 4, stream, table);
    });
    then(p.pad_k != nullptr || p.logit_scale != nullptr,
         [&] { return EFFVIT_LAUNCH((window_attention_bwd_reduce_small_kernel<T>), p.h, kThreads, 0, stream, small); });
    return status;
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
