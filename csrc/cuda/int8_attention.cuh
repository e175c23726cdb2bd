// int8_attention: device code and launches, on prim and tile only.
//
//   sums, means   of float keys, key by key in the definition's order: int8_attention_quantise.cuh
//   quantise      float keys and values, a block of 64 keys a CTA, to the workspace
//   fwd           attention, int8_attention_fwd.cuh: a CTA has 64 rows and walks over blocks of keys, fetched one ahead
//   merge         where there are few rows, the keys are split between CTAs
//
// The rows of a CTA are the queries of all heads that share keys, so that a single query of grouped heads fills a tile.
// Queries are quantised on their way to shared memory; int8 keys and values are read as they lie.
#pragma once
#include "int8_attention_fwd.cuh"
#include "int8_attention_quantise.cuh"

namespace effvit {
namespace cuda {
namespace int8_attention_impl {

// A grid is far below 2^31: a CTA does several units where there are more. In the emulator there soon are.
inline int64_t max_ctas() { return ceil_div(prim::target_ctas() * prim::target_ctas(), 8); }

inline bool is_float(const Int8AttentionParams& p) { return p.kv_dtype != DType::kInt8; }
inline bool wants_mean(const Int8AttentionParams& p) { return is_float(p) && p.smooth_k && p.k_mean == nullptr; }

inline bool aligned4(DType type, const void* base, std::initializer_list<int64_t> strides) {
  const int64_t bytes = 4 * element_bytes(type);
  bool ok = reinterpret_cast<uintptr_t>(base) % static_cast<uintptr_t>(bytes) == 0;
  for (const int64_t s : strides) ok = ok && s % 4 == 0;
  return ok;
}

// Where keys are split depends on the shape and on target_ctas(), a constant, alone: until there are two CTAs on each
// multiprocessor, and each has four blocks left.
inline int64_t split_walk(int64_t blocks, int64_t units) {
  const int64_t target = prim::target_ctas(), least_blocks = ceil_div(target, 264);
  return ceil_div(blocks, split_count(ceil_div(target, 4), units, ceil_div(blocks, least_blocks)));
}

inline Plan make_plan(const Int8AttentionParams& p, void* workspace) {
  Plan g = {};
  g.p = p;
  g.E = p.H / p.G, g.rows = p.L * g.E, g.row_blocks = ceil_div(g.rows, kTile);
  const int64_t pairs = p.B * p.G;
  g.walk = split_walk(p.N, pairs * g.row_blocks), g.splits = ceil_div(p.N, g.walk);
  g.units = pairs * g.splits * g.row_blocks;

  int64_t end = 0;  // bytes
  const auto place = [&](auto*& pointer, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = workspace == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<char*>(workspace) + end);
    end += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
  };
  if (wants_mean(p)) place(g.sums, pairs * p.N * p.K), place(g.own_mean, pairs * p.K);
  g.mean = wants_mean(p) ? g.own_mean : p.k_mean;
  if (is_float(p)) {
    const int32_t k_cols = round_up(p.K, 16), v_cols = round_up(p.V, 16);
    g.v_scale_cols = round_up(p.V, 4);
    const int64_t rows = p.N * kTile;
    place(g.k8, pairs * rows * k_cols), place(g.v8, pairs * rows * v_cols);
    place(g.own_k_scale, pairs * p.N), place(g.own_v_scale, pairs * p.N * g.v_scale_cols);
    g.k = {g.k8, p.G * rows * k_cols, k_cols, rows * k_cols, k_cols, true};
    g.v = {g.v8, p.G * rows * v_cols, v_cols, rows * v_cols, v_cols, true};
    g.k_scale = g.own_k_scale, g.v_scale = g.own_v_scale, g.v_scale_vec = true;
    g.k_vec = aligned4(p.kv_dtype, p.k, {p.k_stride_b, p.k_stride_m, p.k_stride_h});
    g.v_vec = aligned4(p.kv_dtype, p.v, {p.v_stride_b, p.v_stride_m, p.v_stride_h});
  } else {
    g.k = {static_cast<const int8_t*>(p.k),
           p.k_stride_b,
           p.k_stride_m,
           p.k_stride_h,
           static_cast<int32_t>(p.K),
           aligned16(p.k, 1, {p.k_stride_b, p.k_stride_m, p.k_stride_h})};
    g.v = {static_cast<const int8_t*>(p.v),
           p.v_stride_b,
           p.v_stride_m,
           p.v_stride_h,
           static_cast<int32_t>(p.V),
           aligned16(p.v, 1, {p.v_stride_b, p.v_stride_m, p.v_stride_h})};
    g.k_scale = p.k_scale, g.v_scale = p.v_scale, g.v_scale_cols = static_cast<int32_t>(p.V);
    g.v_scale_vec = aligned16(p.v_scale, 4, {p.V});
  }
  g.q_vec = aligned4(p.dtype, p.q, {p.q_stride_b, p.q_stride_l, p.q_stride_h});
  g.mean_vec = p.K % 4 == 0 && reinterpret_cast<uintptr_t>(g.mean) % 16 == 0;
  g.out_vec = p.V % 4 == 0 && aligned4(p.dtype, p.out, {});
  if (g.splits > 1) {
    place(g.partial_out, g.splits * pairs * g.rows * p.V), place(g.partial_stats, 3 * g.splits * pairs * g.rows);
  }
  g.workspace_bytes = static_cast<uint64_t>(end);
  return g;
}

template <class S>
cudaError_t launch_attention(const Plan& g, cudaStream_t stream) {
  if (g.p.bias != nullptr)
    return EFFVIT_LAUNCH((int8_attention_fwd_kernel<S, true>), grid_size(g.units, max_ctas()), kThreads,
                         S::kSharedBytes, stream, g);
  return EFFVIT_LAUNCH((int8_attention_fwd_kernel<S, false>), grid_size(g.units, max_ctas()), kThreads, S::kSharedBytes,
                       stream, g);
}

inline void register_tensors(prim::GlobalRanges& ranges, const Plan& g) {
  const Int8AttentionParams& p = g.p;
  ranges.read(p.q, extent_bytes(p.dtype, {{p.B, p.q_stride_b}, {p.L, p.q_stride_l}, {p.H, p.q_stride_h}, {p.K, 1}}));
  ranges.read(p.k, extent_bytes(p.kv_dtype, {{p.B, p.k_stride_b}, {p.M, p.k_stride_m}, {p.G, p.k_stride_h}, {p.K, 1}}));
  ranges.read(p.v, extent_bytes(p.kv_dtype, {{p.B, p.v_stride_b}, {p.M, p.v_stride_m}, {p.G, p.v_stride_h}, {p.V, 1}}));
  if (p.k_scale) ranges.read(p.k_scale, tensor_bytes(DType::kFloat32, p.B * p.N * p.G));
  if (p.v_scale) ranges.read(p.v_scale, tensor_bytes(DType::kFloat32, p.B * p.N * p.G * p.V));
  if (p.k_mean) ranges.read(p.k_mean, tensor_bytes(DType::kFloat32, p.B * p.G * p.K));
  if (p.bias)
    ranges.read(
        p.bias,
        extent_bytes(p.bias_dtype, {{p.W, p.bias_stride_w}, {p.H, p.bias_stride_h}, {p.L, p.bias_stride_l}, {p.M, 1}}));
  ranges.write_once(p.out, tensor_bytes(p.dtype, p.B * p.L * p.H * p.V));
  ranges.write_once(p.lse, tensor_bytes(DType::kFloat32, p.B * p.H * p.L));
}

}  // namespace int8_attention_impl
}  // namespace cuda

inline size_t int8_attention_fwd_workspace_bytes(const Int8AttentionParams& p) {
  if (p.B * p.L * p.H == 0) return 0;
  return cuda::int8_attention_impl::make_plan(p, nullptr).workspace_bytes;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_int8_attention_fwd(const Int8AttentionParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::int8_attention_impl;
  if (p.B * p.L * p.H == 0) return cudaSuccess;
  const Plan g = make_plan(p, workspace);
  prim::GlobalRanges ranges;
  register_tensors(ranges, g);
  ranges.write(workspace, g.workspace_bytes);
  cudaError_t error = cudaSuccess;
  const auto then = [&](bool wanted, auto launch) {
    if (error == cudaSuccess && wanted) error = launch();
  };
  const int64_t sum_units = p.B * p.N * ceil_div(p.G * p.K, kThreads);
  then(wants_mean(p), [&] {
    return dispatch_dtype<Types>(p.kv_dtype, [&](auto type) {
      return EFFVIT_LAUNCH((int8_attention_sums_kernel<decltype(type)>), grid_size(sum_units, max_ctas()), kThreads, 0,
                           stream, g);
    });
  });
  then(wants_mean(p), [&] {
    const int64_t ctas = ceil_div(p.B * p.G * p.K, kThreads);
    return EFFVIT_LAUNCH((int8_attention_means_kernel<int64_t>), grid_size(ctas, max_ctas()), kThreads, 0, stream, g);
  });
  then(is_float(p), [&] {
    return dispatch_dtype<Types>(p.kv_dtype, [&](auto type) {
      return EFFVIT_LAUNCH((int8_attention_quantise_kernel<decltype(type)>), grid_size(p.B * p.G * p.N, max_ctas()),
                           kThreads, 4 * (kWarps + kRowsAtOnce * kMaxDim), stream, g);
    });
  });
  then(true, [&] {
    const int64_t dim = most(p.K, p.V);
    return dim <= Dims64::kDim    ? launch_attention<Dims64>(g, stream)
           : dim <= Dims128::kDim ? launch_attention<Dims128>(g, stream)
                                  : launch_attention<Dims256>(g, stream);
  });
  then(g.splits > 1, [&] {
    const int64_t ctas = ceil_div(p.B * p.G * g.rows * p.V, kThreads);
    return EFFVIT_LAUNCH((int8_attention_merge_kernel<int64_t>), grid_size(ctas, max_ctas()), kThreads, 0, stream, g);
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
