// Gram matrix of the Gaussian kernel, forward and backward: device code and launch, on prim only.
//
// Forward: a CTA of four warps computes 64x64 tiles of the result. Half precision: |q|^2 + |k|^2 - 2 q.k with the
// products on the tensor cores and everything else in float32. float32: the sum of squared differences, which costs a
// subtraction per term and has no cancellation.
//
// Backward: with P = grad_out * out, dx_i = -2 gamma (x_i sum_j P_ij - sum_j P_ij y_j), where x, y are q, k or, with P
// transposed, k, q. A CTA owns a tile of x and walks over tiles of y. The gradient of k is cut over the queries into
// at most 32 pieces, whose float32 sums a second kernel adds in a fixed order. Where one tile holds all keys, the CTA
// that walks over the queries computes dq as well, and P is formed once.
//
// Half precision rounds P for the tensor cores. The factor of x_i is the sum of the rounded P: the result is then the
// exact sum of P_ij (x_i - y_j) with slightly different P, and the difference of two large sums costs nothing.
// |P| <= |grad_out|, so it cannot overflow; in float16 it could underflow, so rows are scaled by powers of two.
//
// rbf_gram_common.cuh has what both share, _fwd.cuh and _bwd.cuh the kernels, this file plans and launches.
#pragma once
#include "rbf_gram_bwd.cuh"
#include "rbf_gram_fwd.cuh"

namespace effvit {
namespace cuda {
namespace rbf_gram_impl {

// ---- plan and launch ----

template <class T>
Access matrix_access(const RbfGramParams& p, bool backward) {
  const int64_t size = sizeof(T);
  const bool contiguous = p.grad_out_stride_l == p.M && (p.H == 1 || p.grad_out_stride_h == p.L * p.M) &&
                          (p.B == 1 || p.grad_out_stride_b == p.H * p.L * p.M);
  if (aligned16(p.out, size, {p.M}) &&
      (!backward || aligned16(p.grad_out, size, {p.grad_out_stride_l, p.grad_out_stride_h, p.grad_out_stride_b})))
    return kRowVectors;
  // A tile of 64 rows is a multiple of 16 bytes.
  const int64_t head = p.B * p.H == 1 ? 0 : p.L * p.M;
  if (p.M <= kTile && aligned16(p.out, size, {head}) && (!backward || (contiguous && aligned16(p.grad_out, size, {}))))
    return kFlatVectors;
  return kElements;
}

template <class T>
Plan make_plan(const RbfGramParams& p, bool backward) {
  Plan g = {};
  g.p = p;
  g.q = make_tokens(p.dtype, p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h, p.D);
  g.k = make_tokens(p.dtype, p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h, p.D);
  g.q_tiles = ceil_div(p.L, kTile);
  g.k_tiles = ceil_div(p.M, kTile);
  g.d_pad = round_up(p.D, backward ? Traits<T>::kBackwardPad : Traits<T>::kPad);
  g.col_chunks = static_cast<int32_t>(ceil_div(p.D, kTile));
  g.access = matrix_access<T>(p, backward);
  g.dq_vec = aligned16(p.dq, sizeof(T), {p.D});
  g.dk_vec = aligned16(p.dk, sizeof(T), {p.D});
  g.splits = 1;
  g.split_tiles = g.q_tiles;
  g.units = p.B * p.H * g.q_tiles * (backward ? g.col_chunks : g.k_tiles);
  return g;
}

template <class T>
Plan dk_plan(const RbfGramParams& p, void* workspace) {
  Plan g = make_plan<T>(p, true);
  const int64_t tiles = p.B * p.H * g.k_tiles * g.col_chunks;
  g.split_tiles = ceil_div(g.q_tiles, split_count(prim::target_ctas(), tiles, kMaxSplits));
  g.splits = static_cast<int32_t>(ceil_div(g.q_tiles, g.split_tiles));
  g.units = tiles * g.splits;
  g.partial_stride = round_up(p.D, 2);
  g.partials = static_cast<float*>(workspace);
  return g;
}

template <class T>
size_t workspace_bytes(const RbfGramParams& p) {
  const Plan g = dk_plan<T>(p, nullptr);
  return g.splits == 1 ? 0 : static_cast<size_t>(g.splits * p.B * p.H * p.M * g.partial_stride) * sizeof(float);
}

inline bool is_empty(const RbfGramParams& p) { return p.B * p.H == 0 || p.L == 0 || p.M == 0; }

inline void register_inputs(prim::GlobalRanges& ranges, const RbfGramParams& p) {
  ranges.read(p.q, extent_bytes(p.dtype, {{p.B, p.q_stride_b}, {p.L, p.q_stride_l}, {p.H, p.q_stride_h}, {p.D, 1}}));
  ranges.read(p.k, extent_bytes(p.dtype, {{p.B, p.k_stride_b}, {p.M, p.k_stride_l}, {p.H, p.k_stride_h}, {p.D, 1}}));
}

}  // namespace rbf_gram_impl
}  // namespace cuda

template <class Types = cuda::AllTypes>
cudaError_t launch_rbf_gram_fwd(const RbfGramParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::rbf_gram_impl;
  if (is_empty(p)) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.write_once(p.out, tensor_bytes(p.dtype, p.B * p.H * p.L * p.M));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Plan g = make_plan<T>(p, false);
    const int64_t bytes = 2 * Traits<T>::kBytes + (kTensorCores<T> ? 2 * kTile * 4 : 0);
    return EFFVIT_LAUNCH((rbf_gram_fwd_kernel<T>), grid_size(g.units), kThreads, bytes, stream, g);
  });
  ranges.finish();
  return error;
}

template <class Types = cuda::AllTypes>
size_t rbf_gram_bwd_workspace_bytes(const RbfGramParams& p) {
  using namespace cuda;
  using namespace cuda::rbf_gram_impl;
  if (is_empty(p)) return 0;
  size_t bytes = 0;
  (void)dispatch_dtype<Types>(p.dtype, [&](auto type) {
    bytes = workspace_bytes<decltype(type)>(p);
    return cudaSuccess;
  });
  return bytes;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_rbf_gram_bwd(const RbfGramParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::rbf_gram_impl;
  if (is_empty(p)) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.read(p.out, tensor_bytes(p.dtype, p.B * p.H * p.L * p.M));
  ranges.read(
      p.grad_out,
      extent_bytes(p.dtype,
                   {{p.B, p.grad_out_stride_b}, {p.H, p.grad_out_stride_h}, {p.L, p.grad_out_stride_l}, {p.M, 1}}));
  ranges.write(workspace, rbf_gram_bwd_workspace_bytes<Types>(p));
  ranges.write_once(p.dq, tensor_bytes(p.dtype, p.B * p.L * p.H * p.D));
  ranges.write_once(p.dk, tensor_bytes(p.dtype, p.B * p.M * p.H * p.D));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kBytes = BackwardTile<T>::kSharedBytes;
    const Plan dk = dk_plan<T>(p, workspace);
    cudaError_t status;
    if (dk.k_tiles == 1) {
      status = EFFVIT_LAUNCH((rbf_gram_bwd_dk_kernel<T, true>), grid_size(dk.units), kThreads, kBytes, stream, dk);
    } else {
      const Plan dq = make_plan<T>(p, true);
      status = EFFVIT_LAUNCH((rbf_gram_bwd_dq_kernel<T>), grid_size(dq.units), kThreads, kBytes, stream, dq);
      if (status != cudaSuccess) return status;
      status = EFFVIT_LAUNCH((rbf_gram_bwd_dk_kernel<T, false>), grid_size(dk.units), kThreads, kBytes, stream, dk);
    }
    if (status != cudaSuccess || dk.splits == 1) return status;
    const int64_t blocks = ceil_div(p.B * p.M * p.H * p.D, kReduceThreads);
    return EFFVIT_LAUNCH((rbf_gram_bwd_reduce_kernel<int64_t>), grid_size(blocks), kReduceThreads, 0, stream, dk);
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
