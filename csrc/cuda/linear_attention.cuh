// Linear attention, forward and backward: device code and launch, on prim only.
//
// Everything the operator computes is one of six passes over tiles of 64 tokens by CTAs of four warps:
//
//   state   S = sum_j a_j^T b_j and a weighted sum of rows, over a piece ("split") of a sequence; partial results per
//           split go to the workspace. Forward: a = w phi(k), b = v. Backward (dS): a = phi(q), b = u = scale do / d.
//   reduce  adds the splits in a fixed order, or turns them into the prefixes (backward: suffixes) a causal walk starts
//           from. Split counts depend on the shape alone: results are deterministic.
//   walk    y_i = x_i S + rho_i z: out (x = phi(q)), the gradients of phi(q) (x = u, S^T), of phi(k) (x = v, dS^T) and
//           of v (x = phi(k), dS).
//   chunk   y_i = x_i S + rho_i z + sum_j (x_i . a_j + rho_i gamma_j) b_j: the same with a sum over keys added.
//           Causal, over the keys of the own tile up to i (in reverse, from i on), after which S += a^T b and z +=
//           gamma b. Quadratic, over all keys, without S.
//   query gradient, key gradient: the backward of heads up to 64 x 64, neither causal nor quadratic, fused. The first
//           computes d, r, dq and the partial sums of dS and dz, the second dk, dv and dweight.
//
// A seventh, small one, row_dot, computes the causal denominators phi(q_i) . z_i in float32.
//
// Tensors of tokens that are read or written, the state apart: the forward takes 4 (k, v; q, out) and one for each of
// q_den and k_den. The fused backward takes 7, each once (q, do, dq; k, v, dk, dv), and two for each of q_den and
// k_den; it keeps nothing per token. The other backward takes 12 where S has one slab (gradient of d: q, do; dS: q, do;
// dq: do, q, dq; dk: v, k, dk; dv: k, dv), and keeps d and its gradient, two floats a query and head, and with weights
// one float a key and head.
//
// A CTA of a walk owns all rows of the state and a slab of its columns: 64 columns if it has up to 64 rows, 32 if up to
// 128, else 16. So a slab is 64 x 64 at most, 32 accumulators a thread, and no CTA waits for another's partial sum.
//
// 16-bit elements. Products run on the tensor cores with float32 accumulators. Operands are bfloat16: its range is
// float32's, so neither a state beyond 65504, nor exp(q), nor scale do / d overflows. float16 inputs have three more
// significant bits, so their operands are split into a sum of two bfloat16, hi + lo, which holds 16 bits, and a product
// is hi hi + hi lo + lo hi: three times the tensor operations.
//
// A tile arrives by cp.async as it is in memory. After its own wait, and before the barrier, each thread applies the
// feature map and the factor of the row to the 16-byte pieces that it copied itself: no barrier is needed in between.
// The fused passes keep 16-bit tiles as they are, for the map's derivative, and apply the map to fragments in
// registers; their results leave by way of the tiles whose gradients they are.
//
// linear_attention_common.cuh has what the passes share, _state.cuh, _output.cuh and _fused.cuh the kernels, this file
// describes the passes and launches.
#pragma once
#include "linear_attention_fused.cuh"
#include "linear_attention_output.cuh"
#include "linear_attention_state.cuh"

namespace effvit {
namespace cuda {
namespace linear_attention_impl {

// ---- what kernels find where ----

// Quadratic and causal at once is what the causal passes compute.
inline bool is_quadratic(const LinearAttentionParams& p) { return p.quadratic && !p.causal; }
// The backward is fused where the state fits a CTA's registers and the tiles 99 KiB of shared memory, the least that a
// supported GPU has.
inline bool is_fused(const LinearAttentionParams& p) {
  const bool large = p.dtype == DType::kFloat32 && (p.q_den != nullptr || p.k_den != nullptr);
  const int64_t most = large ? kTile / 2 : kTile;
  return !p.causal && !is_quadratic(p) && p.K <= most && p.V <= most;
}

// The tensors as they are in memory: no map, no factor.
struct Tensors {
  Rows q, k, v, grad, q_den, k_den;

  explicit Tensors(const LinearAttentionParams& p) {
    const auto rows = [&](const void* base, int64_t b, int64_t l, int64_t h, int64_t dim) {
      return Rows{make_tokens(p.dtype, base, b, l, h, dim), FeatureMap::kNone, Factor::kOne};
    };
    q = rows(p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h, p.K);
    k = rows(p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h, p.K);
    v = rows(p.v, p.v_stride_b, p.v_stride_l, p.v_stride_h, p.V);
    grad = rows(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h, p.V);
    q_den = p.q_den == nullptr ? q : rows(p.q_den, p.q_den_stride_b, p.q_den_stride_l, p.q_den_stride_h, p.K);
    k_den = p.k_den == nullptr ? k : rows(p.k_den, p.k_den_stride_b, p.k_den_stride_l, p.k_den_stride_h, p.K);
  }
};

inline Rows mapped(Rows x, FeatureMap map, Factor factor = Factor::kOne) {
  x.map = map;
  x.factor = factor;
  return x;
}
inline Rows weighted(Rows x, FeatureMap map) { return mapped(x, map, Factor::kWeight); }

inline int32_t padded_cols(int64_t dim) { return dim <= 16 ? 16 : dim <= 32 ? 32 : kTile; }
inline int32_t slab_columns(int64_t rows, int64_t cols) {
  return min_of(rows <= kTile ? kTile : rows <= 2 * kTile ? kTile / 2 : kTile / 4, padded_cols(cols));
}

// How many CTAs share the tiles of a sequence, a head and a slab: about four a multiprocessor in all.
inline int32_t token_splits(const LinearAttentionParams& p, int64_t tokens, int64_t slabs, int64_t limit,
                            int64_t min_tiles = 1) {
  const int64_t fit = ceil_div(ceil_div(tokens, kTile), min_tiles);
  return static_cast<int32_t>(split_count(ceil_div(prim::target_ctas(), 2), p.N * p.H * slabs, least(limit, fit)));
}
// Of results: a row's CTA does not matter to it, so there may be as many as tiles.
inline int32_t row_splits(const LinearAttentionParams& p, int64_t tokens, int64_t slabs) {
  return token_splits(p, tokens, slabs, ceil_div(tokens, kTile));
}
// Of the sums over `tokens`.
inline int32_t sum_splits(const LinearAttentionParams& p, int64_t tokens) {
  const int64_t slabs = is_quadratic(p) ? 1 : ceil_div(p.V, slab_columns(p.K, p.V));
  return token_splits(p, tokens, slabs, kMaxSplits, kMinTiles);
}

struct Workspace {
  float* sums[2];  // [N, H, splits, slot], by Side: the sums over keys are S and z, those over queries their gradients
  int32_t splits[2];
  float *den, *grad_den, *row_sum;
  int64_t slot, slot_z;
  size_t bytes;

  Workspace(const LinearAttentionParams& p, void* memory, bool backward) {
    const bool quadratic = is_quadratic(p), normalized = p.normalize != Normalize::kNone;
    slot_z = quadratic ? 0 : ceil_div(p.K * p.V, 4) * 4;
    slot = slot_z + ceil_div(p.K, 4) * 4;
    int64_t at = 0;
    const auto take = [&](bool used, int64_t floats) {
      float* const from = static_cast<float*>(memory) + at;
      if (used) at += ceil_div(floats, 4) * 4;
      return used && memory != nullptr ? from : nullptr;
    };
    for (const Side side : {Side::kKeys, Side::kQueries}) {
      const bool keys = side == Side::kKeys;
      const bool used = (!quadratic || normalized) && (keys ? !backward || p.causal || quadratic : backward);
      splits_of(side) = sum_splits(p, keys ? p.M : p.L);
      sums[static_cast<int>(side)] = take(used, p.N * p.H * splits_of(side) * slot);
    }
    const bool rows = backward && !is_fused(p);
    den = take(normalized && (rows || p.causal), p.B * p.L * p.H);
    grad_den = take(normalized && rows, p.B * p.L * p.H);
    row_sum = take(rows && p.weight != nullptr, p.B * p.M * p.H);
    bytes = static_cast<size_t>(at) * sizeof(float);
  }
  float* sums_over(Side side) const { return sums[static_cast<int>(side)]; }
  int32_t& splits_of(Side side) { return splits[static_cast<int>(side)]; }
  int32_t splits_of(Side side) const { return splits[static_cast<int>(side)]; }
};

// ---- shared memory of a pass ----

enum class Kernel { kState, kWalk, kChunk, kFused };

inline int32_t log2_of(int32_t n) {
  int32_t shift = 0;
  while (n > 1) n /= 2, ++shift;
  return shift;
}

template <class T>
void plan_shared(Pass& g, Kernel kernel) {
  constexpr bool kSplit = Wide<T>::kSplit;
  const bool fused = kernel == Kernel::kFused, chunk = kernel == Kernel::kChunk, state = kernel == Kernel::kState;
  const int32_t block_cols = fused ? g.slab_cols : padded_cols(g.dim_x);
  g.x_shift = log2_of(block_cols / kVec<T>);
  g.slab_shift = log2_of(g.slab_cols / kVec<T>);
  SharedLayout layout;
  const auto tiles = [&](int32_t (&hi)[2], int32_t& lo, int32_t cols, bool split) {
    hi[0] = layout.take(tile_bytes<T>(kTile, cols));
    hi[1] = chunk ? hi[0] : layout.take(tile_bytes<T>(kTile, cols));
    if (split) lo = layout.take(tile_bytes<T>(kTile, cols));
  };
  const auto state_planes = [&] {
    const int64_t bytes = tile_bytes<T>(g.blocks * block_cols, g.slab_cols);
    g.s_state = layout.take(bytes);
    if (kSplit) g.s_state_lo = layout.take(bytes);
  };
  if (fused) {  // tiles stay as they are in memory, but for u
    tiles(g.s_x, g.s_x_lo, block_cols, false);
    tiles(g.s_b, g.s_b_lo, block_cols, kSplit && g.side == Side::kQueries);
    if (g.denominator == Denominator::kOfRows) tiles(g.s_a, g.s_a_lo, block_cols, false);
    state_planes();
    g.s_vectors = layout.take(kFusedVectors * 4);
    g.shared_bytes = static_cast<int32_t>(layout.bytes());
    return;
  }
  if (!state && g.has_x()) {
    tiles(g.s_x, g.s_x_lo, block_cols, kSplit);
    state_planes();
  }
  if ((state && g.has_state()) || (chunk && g.has_x())) tiles(g.s_a, g.s_a_lo, block_cols, kSplit);
  if ((state && g.has_state()) || chunk) tiles(g.s_b, g.s_b_lo, g.slab_cols, kSplit);
  if (state) {  // its column sums use the place of the tiles when these are no longer needed
    layout.at_least(kWarps * kTile * 4);
  } else {
    // The scores of float32 and the stage share their place: a warp has the same rows of both.
    g.stage_cols = chunk && !kTensorCores<T> ? kTile : g.slab_cols;
    g.s_p = g.s_stage = layout.take(tile_bytes<float>(kTile, g.stage_cols));
    g.s_vectors = layout.take(kVectors * 4);
    if (chunk) layout.at_least(tile_bytes<T>(kTile, kTile));  // an array that a pass does not use lies at 0
  }
  g.shared_bytes = static_cast<int32_t>(layout.bytes());
}

// ---- launches ----

// One dimension, far below 2^31: a CTA does several pieces of work where there are more.
inline int64_t bounded_grid(int64_t ctas) { return grid_size(ctas, int64_t{1} << 24); }

inline void count_ctas(Pass& g) { g.ctas = g.p.N * g.p.H * (g.slab_loop ? 1 : g.slabs) * g.splits; }

template <class T>
cudaError_t launch_state(Pass g, cudaStream_t stream) {
  plan_shared<T>(g, Kernel::kState);
  if (!g.has_state()) g.slabs = 1;
  count_ctas(g);
  if (g.ctas == 0) return cudaSuccess;
  return EFFVIT_LAUNCH((linear_attention_state_kernel<T>), bounded_grid(g.ctas), kThreads, g.shared_bytes, stream, g);
}

template <class T>
cudaError_t launch_rows(Pass g, cudaStream_t stream) {
  const bool chunk = g.others != Others::kNone;
  if (!g.causal()) g.splits = row_splits(g.p, g.length(), g.slab_loop ? 1 : g.slabs);
  plan_shared<T>(g, chunk ? Kernel::kChunk : Kernel::kWalk);
  count_ctas(g);
  if (g.ctas == 0 || g.length() == 0) return cudaSuccess;
  if (chunk)
    return EFFVIT_LAUNCH((linear_attention_chunk_kernel<T>), bounded_grid(g.ctas), kThreads, g.shared_bytes, stream, g);
  return EFFVIT_LAUNCH((linear_attention_walk_kernel<T>), bounded_grid(g.ctas), kThreads, g.shared_bytes, stream, g);
}

template <class T>
cudaError_t launch_row_dot(Pass g, cudaStream_t stream) {
  g.slabs = 1;
  if (!g.causal()) g.splits = row_splits(g.p, g.length(), 1);
  count_ctas(g);
  if (g.ctas == 0 || g.length() == 0) return cudaSuccess;
  constexpr int kBytes = 4 * (kTile * (kTile + 1) + 2 * kMaxDim + kTile);
  return EFFVIT_LAUNCH((linear_attention_row_dot_kernel<T>), bounded_grid(g.ctas), kThreads, kBytes, stream, g);
}

// Adds the splits of the sums over one side, with initial values; the totals are wanted where they are not null.
inline cudaError_t launch_reduce(const LinearAttentionParams& p, const Workspace& w, Side summed, const float* state,
                                 const float* z, float* total_state, float* total_z, cudaStream_t stream) {
  Reduction r = {};
  r.partial = w.sums_over(summed);
  r.blocks = p.N * p.H;
  r.slot = w.slot, r.slot_z = w.slot_z;
  r.state = is_quadratic(p) ? 0 : p.K * p.V, r.z = p.K;
  r.initial_state = state, r.initial_z = z;
  r.total_state = total_state, r.total_z = total_z;
  r.splits = w.splits_of(summed);
  r.prefix = p.causal;
  r.reverse = summed == Side::kQueries;
  const int64_t ctas = ceil_div(r.blocks * (r.state + r.z), kThreads);
  if (ctas == 0) return cudaSuccess;
  return EFFVIT_LAUNCH((linear_attention_reduce_kernel<int64_t>), bounded_grid(ctas), kThreads, 0, stream, r);
}

inline cudaError_t launch_fill(const LinearAttentionParams& p, void* to, int64_t bytes_per_token, cudaStream_t stream) {
  if (p.cu_seqlens == nullptr || to == nullptr || p.L == 0) return cudaSuccess;
  const int64_t ctas = ceil_div(p.L * bytes_per_token, 16 * kThreads);
  return EFFVIT_LAUNCH((linear_attention_fill_kernel<int64_t>), grid_size(ctas), kThreads, 0, stream, p, to,
                       bytes_per_token / 2);
}

// ---- the passes, by name ----

inline Pass make_pass(const LinearAttentionParams& p, const Workspace& w, Side side, int64_t dim_x, int64_t dim_out) {
  Pass g = {};
  g.p = p;
  g.side = side;
  g.others = p.causal ? Others::kOwnTile : is_quadratic(p) ? Others::kAll : Others::kNone;
  g.den = w.den, g.grad_den = w.grad_den, g.row_sum = w.row_sum;
  g.slot = w.slot, g.slot_z = w.slot_z;
  g.dim_x = static_cast<int32_t>(dim_x), g.dim_out = static_cast<int32_t>(dim_out);
  g.blocks = static_cast<int32_t>(ceil_div(dim_x, kTile));
  g.slab_cols = slab_columns(dim_x, dim_out);
  g.slabs = static_cast<int32_t>(ceil_div(dim_out, g.slab_cols));
  return g;
}

inline void set_out(Pass& g, void* out) {
  g.out = out;
  g.out_vec = aligned16(out, element_bytes(g.p.dtype), {g.dim_out});
}

// Where a pass finds z (summed over keys), or its gradient (over queries).
inline void set_vector(Pass& g, const Workspace& w, Side summed) {
  const auto& p = g.p;
  if (summed == Side::kQueries || p.causal || is_quadratic(p)) {
    const float* const parts = w.sums_over(summed);
    const float* const base = parts == nullptr ? nullptr : parts + w.slot_z;
    g.z = {base, w.splits_of(summed) * w.slot, p.causal ? w.slot : 0};
  } else {
    g.z = {p.z, p.K, 0};
  }
  if (p.causal) g.splits = w.splits_of(Side::kQueries);
}
// Where it finds S, or its gradient.
inline void set_state(Pass& g, const Workspace& w, Side summed, bool transposed) {
  const auto& p = g.p;
  States& s = g.state;
  if (summed == Side::kQueries || p.causal) {
    s.base = w.sums_over(summed);
    s.stride = w.splits_of(summed) * w.slot;
    s.split_stride = p.causal ? w.slot : 0;
  } else {
    s.base = p.state;
    s.stride = p.K * p.V;
  }
  s.row_stride = static_cast<int32_t>(transposed ? 1 : p.V);
  s.col_stride = static_cast<int32_t>(transposed ? p.V : 1);
  s.vec = s.col_stride == 1 && s.row_stride % 4 == 0 && aligned16(s.base, 4, {s.stride, s.split_stride});
}

// The sums over keys: S and z, in total or as prefixes.
template <class T>
cudaError_t launch_key_sums(const LinearAttentionParams& p, const Workspace& w, float* state, float* z,
                            cudaStream_t stream) {
  const Tensors t(p);
  Pass g = make_pass(p, w, Side::kKeys, p.K, p.V);
  if (!is_quadratic(p)) g.a = weighted(t.k, p.feature_map);
  g.b = t.v;
  g.z_rows = mapped(t.k_den, p.feature_map);
  g.z_factor = Factor::kWeight;
  g.vector_sum = g.has_state() && g.blocks == 1 && p.k_den == nullptr ? VectorSum::kOfA : VectorSum::kOfRows;
  g.partial = w.sums_over(Side::kKeys);
  g.splits = w.splits_of(Side::kKeys);
  const cudaError_t error = launch_state<T>(g, stream);
  if (error != cudaSuccess) return error;
  return launch_reduce(p, w, Side::kKeys, p.initial_state, p.initial_z, state, z, stream);
}

// The sums over queries: the gradients of S and z, in total or as suffixes.
template <class T>
cudaError_t launch_query_sums(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Tensors t(p);
  Pass g = make_pass(p, w, Side::kQueries, p.K, p.V);
  if (!is_quadratic(p)) g.a = mapped(t.q, p.feature_map);
  g.b = mapped(t.grad, FeatureMap::kNone, Factor::kGradScale);
  g.z_rows = mapped(t.q_den, p.feature_map);
  g.z_factor = Factor::kGradDen;
  g.vector_sum = p.normalize == Normalize::kNone                        ? VectorSum::kZeros
                 : g.has_state() && g.blocks == 1 && p.q_den == nullptr ? VectorSum::kOfA
                                                                        : VectorSum::kOfRows;
  g.partial = w.sums_over(Side::kQueries);
  g.splits = w.splits_of(Side::kQueries);
  const cudaError_t error = launch_state<T>(g, stream);
  if (error != cudaSuccess) return error;
  return launch_reduce(p, w, Side::kQueries, p.grad_state, p.grad_z, p.dinitial_state, p.dinitial_z, stream);
}

// Causal denominators.
template <class T>
cudaError_t launch_denominators(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Tensors t(p);
  Pass g = make_pass(p, w, Side::kQueries, p.K, 1);
  set_vector(g, w, Side::kKeys);
  g.x = mapped(t.q_den, p.feature_map);
  g.b = weighted(t.k_den, p.feature_map);
  g.row_sum = w.den;
  return launch_row_dot<T>(g, stream);
}

// phi(q) S and what becomes of it: the output, or the gradient of the denominators.
template <class T>
cudaError_t launch_queries(const LinearAttentionParams& p, const Workspace& w, Epilogue epilogue, cudaStream_t stream) {
  const Tensors t(p);
  Pass g = make_pass(p, w, Side::kQueries, p.K, p.V);
  set_vector(g, w, Side::kKeys);
  set_state(g, w, Side::kKeys, false);
  if (p.normalize != Normalize::kNone && !p.causal)
    g.denominator = p.q_den == nullptr ? Denominator::kOfX : Denominator::kOfRows;
  g.z_rows = mapped(t.q_den, p.feature_map);
  g.x = mapped(t.q, p.feature_map);
  g.a = weighted(t.k, p.feature_map);
  g.b = t.v;
  g.e = t.grad;
  g.epilogue = epilogue;
  g.slab_loop = epilogue == Epilogue::kRows && g.slabs > 1;
  set_out(g, p.out);
  return launch_rows<T>(g, stream);
}

// The gradients of rows: dq, dk, and with `den` dq_den, dk_den, which have the term of rank one only.
template <class T>
cudaError_t launch_gradient(const LinearAttentionParams& p, const Workspace& w, Side side, bool den, void* out,
                            cudaStream_t stream) {
  const Tensors t(p);
  const bool keys = side == Side::kKeys, normalized = p.normalize != Normalize::kNone;
  const Rows query = mapped(t.q, p.feature_map), key = weighted(t.k, p.feature_map);
  const Rows u = mapped(t.grad, FeatureMap::kNone, Factor::kGradScale);
  const bool own_den = (keys ? p.k_den : p.q_den) != nullptr, other_den = (keys ? p.q_den : p.k_den) != nullptr;
  const Side summed = keys ? Side::kQueries : Side::kKeys;
  Pass g = make_pass(p, w, side, den ? 1 : p.V, p.K);
  set_vector(g, w, summed);
  set_state(g, w, summed, true);
  if (!den) {
    g.x = keys ? t.v : u;
    g.a = keys ? u : t.v;
  } else if (!p.causal) {
    g.others = Others::kNone;
  }
  g.b = keys ? query : key;
  // The vector under a key's gradient is there without a normaliser, too: it starts from grad_z.
  if ((den || !own_den) && (normalized || (keys && !is_quadratic(p)))) {
    const bool rows = p.causal && normalized;
    g.rank_one = !rows ? RankOne::kVector : den || other_den ? RankOne::kOwnRows : RankOne::kMerged;
  }
  g.rho = keys ? Factor::kOne : Factor::kGradDen;
  g.gamma = keys ? Factor::kGradDen : Factor::kOne;
  g.rank = keys ? mapped(t.q_den, p.feature_map) : weighted(t.k_den, p.feature_map);
  g.epilogue = Epilogue::kGradient;
  g.e = mapped(den ? (keys ? t.k_den : t.q_den) : (keys ? t.k : t.q), p.feature_map);
  g.out_factor = keys ? Factor::kWeight : Factor::kOne;
  set_out(g, out);
  return launch_rows<T>(g, stream);
}

template <class T>
cudaError_t launch_value_gradient(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Tensors t(p);
  Pass g = make_pass(p, w, Side::kKeys, p.K, p.V);
  set_vector(g, w, Side::kQueries);
  set_state(g, w, Side::kQueries, false);
  if (p.weight != nullptr && g.z.base != nullptr) {
    Pass dot = g;
    dot.x = mapped(t.k_den, p.feature_map);
    dot.b = mapped(t.q_den, p.feature_map, Factor::kGradDen);
    const cudaError_t error = launch_row_dot<T>(dot, stream);
    if (error != cudaSuccess) return error;
    g.row_sum_given = true;
  }
  g.x = mapped(t.k, p.feature_map);
  g.a = mapped(t.q, p.feature_map);
  g.b = mapped(t.grad, FeatureMap::kNone, Factor::kGradScale);
  g.e = t.v;
  g.epilogue = Epilogue::kValueGradient;
  g.out_factor = Factor::kWeight;
  g.slab_loop = p.weight != nullptr && g.slabs > 1;
  set_out(g, p.dv);
  return launch_rows<T>(g, stream);
}

// A pass of the fused backward.
template <class T>
Pass fused_pass(const LinearAttentionParams& p, const Workspace& w, Side side) {
  const Tensors t(p);
  const bool keys = side == Side::kKeys;
  const Side summed = keys ? Side::kQueries : Side::kKeys;
  Pass g = make_pass(p, w, side, p.K, p.V);
  set_vector(g, w, summed);
  set_state(g, w, summed, false);
  g.denominator = (keys ? p.k_den : p.q_den) == nullptr ? Denominator::kOfX : Denominator::kOfRows;
  g.x = mapped(keys ? t.k : t.q, p.feature_map);
  g.b = keys ? t.v : t.grad;
  g.z_rows = mapped(keys ? t.k_den : t.q_den, p.feature_map);
  g.partial = w.sums_over(Side::kQueries);
  g.slab_cols = padded_cols(most(p.K, p.V));
  g.slabs = 1;
  const int64_t size = element_bytes(p.dtype);
  g.out_vec = aligned16(keys ? p.dk : p.dq, size, {p.K}) && aligned16(keys ? p.dk_den : p.dq_den, size, {p.K}) &&
              (!keys || aligned16(p.dv, size, {p.V}));
  g.splits = keys ? row_splits(p, p.M, 1) : w.splits_of(Side::kQueries);
  plan_shared<T>(g, Kernel::kFused);
  count_ctas(g);
  return g;
}

template <class T>
cudaError_t launch_fused_backward(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Pass queries = fused_pass<T>(p, w, Side::kQueries), keys = fused_pass<T>(p, w, Side::kKeys);
  if (queries.ctas == 0) return cudaSuccess;
  cudaError_t status = EFFVIT_LAUNCH((linear_attention_query_gradient_kernel<T>), bounded_grid(queries.ctas), kThreads,
                                     queries.shared_bytes, stream, queries);
  if (status != cudaSuccess) return status;
  status = launch_reduce(p, w, Side::kQueries, p.grad_state, p.grad_z, p.dinitial_state, p.dinitial_z, stream);
  if (status != cudaSuccess || p.M == 0) return status;
  return EFFVIT_LAUNCH((linear_attention_key_gradient_kernel<T>), bounded_grid(keys.ctas), kThreads, keys.shared_bytes,
                       stream, keys);
}

// ---- the memory of a launch ----

inline uint64_t rows_bytes(const LinearAttentionParams& p, int64_t tokens, int64_t b, int64_t l, int64_t h,
                           int64_t dim) {
  return extent_bytes(p.dtype, {{p.B, b}, {tokens, l}, {p.H, h}, {dim, 1}});
}

inline void register_inputs(prim::GlobalRanges& ranges, const LinearAttentionParams& p) {
  ranges.read(p.q, rows_bytes(p, p.L, p.q_stride_b, p.q_stride_l, p.q_stride_h, p.K));
  ranges.read(p.k, rows_bytes(p, p.M, p.k_stride_b, p.k_stride_l, p.k_stride_h, p.K));
  ranges.read(p.v, rows_bytes(p, p.M, p.v_stride_b, p.v_stride_l, p.v_stride_h, p.V));
  ranges.read(p.q_den, rows_bytes(p, p.L, p.q_den_stride_b, p.q_den_stride_l, p.q_den_stride_h, p.K));
  ranges.read(p.k_den, rows_bytes(p, p.M, p.k_den_stride_b, p.k_den_stride_l, p.k_den_stride_h, p.K));
  ranges.read(p.weight, extent_bytes(p.weight_dtype,
                                     {{p.B, p.weight_stride_b}, {p.M, p.weight_stride_l}, {p.H, p.weight_stride_h}}));
  ranges.read(p.cu_seqlens, tensor_bytes(DType::kFloat32, p.N + 1));
  ranges.read(p.initial_state, tensor_bytes(DType::kFloat32, p.N * p.H * p.K * p.V));
  ranges.read(p.initial_z, tensor_bytes(DType::kFloat32, p.N * p.H * p.K));
}

}  // namespace linear_attention_impl
}  // namespace cuda
inline size_t linear_attention_fwd_workspace_bytes(const LinearAttentionParams& p) {
  return cuda::linear_attention_impl::Workspace(p, nullptr, false).bytes;
}

inline size_t linear_attention_bwd_workspace_bytes(const LinearAttentionParams& p) {
  return cuda::linear_attention_impl::Workspace(p, nullptr, true).bytes;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_linear_attention_fwd(const LinearAttentionParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::linear_attention_impl;
  const Workspace w(p, workspace, false);
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  const int64_t size = element_bytes(p.dtype);
  ranges.write(workspace, w.bytes);
  ranges.write_once(p.out, static_cast<uint64_t>(p.B * p.L * p.H * p.V * size));
  ranges.write_once(p.state, static_cast<uint64_t>(p.N * p.H * p.K * p.V * 4));
  ranges.write_once(p.z, static_cast<uint64_t>(p.N * p.H * p.K * 4));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t status = cudaSuccess;
    if (w.sums_over(Side::kKeys) != nullptr) status = launch_key_sums<T>(p, w, p.state, p.z, stream);
    if (status == cudaSuccess && w.den != nullptr) status = launch_denominators<T>(p, w, stream);
    if (status == cudaSuccess) status = launch_queries<T>(p, w, Epilogue::kOut, stream);
    if (status == cudaSuccess) status = launch_fill(p, p.out, p.H * p.V * size, stream);
    return status;
  });
  ranges.finish();
  return error;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_linear_attention_bwd(const LinearAttentionParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::linear_attention_impl;
  const Workspace w(p, workspace, true);
  const bool normalized = p.normalize != Normalize::kNone;
  const int64_t size = element_bytes(p.dtype), states = p.N * p.H * p.K * p.V * 4, vectors = p.N * p.H * p.K * 4;
  const int64_t query_bytes = p.H * p.K * size, value_bytes = p.H * p.V * size;
  const int64_t weight_bytes = p.H * element_bytes(p.weight_dtype);
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.read(p.grad_out, rows_bytes(p, p.L, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h, p.V));
  ranges.read(p.state, static_cast<uint64_t>(states));
  ranges.read(p.z, static_cast<uint64_t>(vectors));
  ranges.read(p.grad_state, static_cast<uint64_t>(states));
  ranges.read(p.grad_z, static_cast<uint64_t>(vectors));
  ranges.write(workspace, w.bytes);
  ranges.write_once(p.dq, static_cast<uint64_t>(p.B * p.L * query_bytes));
  ranges.write_once(p.dk, static_cast<uint64_t>(p.B * p.M * query_bytes));
  ranges.write_once(p.dv, static_cast<uint64_t>(p.B * p.M * value_bytes));
  ranges.write_once(p.dq_den, static_cast<uint64_t>(p.B * p.L * query_bytes));
  ranges.write_once(p.dk_den, static_cast<uint64_t>(p.B * p.M * query_bytes));
  ranges.write_once(p.dweight, static_cast<uint64_t>(p.B * p.M * weight_bytes));
  ranges.write_once(p.dinitial_state, static_cast<uint64_t>(states));
  ranges.write_once(p.dinitial_z, static_cast<uint64_t>(vectors));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t status = cudaSuccess;
    const auto then = [&](bool wanted, auto launch) {
      if (status == cudaSuccess && wanted) status = launch();
    };
    const bool fused = is_fused(p);
    then(fused, [&] { return launch_fused_backward<T>(p, w, stream); });
    then(!fused && w.sums_over(Side::kKeys) != nullptr,
         [&] { return launch_key_sums<T>(p, w, nullptr, nullptr, stream); });
    then(normalized && p.causal, [&] { return launch_denominators<T>(p, w, stream); });
    then(!fused && normalized, [&] { return launch_queries<T>(p, w, Epilogue::kRows, stream); });
    then(!fused && w.sums_over(Side::kQueries) != nullptr, [&] { return launch_query_sums<T>(p, w, stream); });
    then(!fused, [&] { return launch_gradient<T>(p, w, Side::kQueries, false, p.dq, stream); });
    then(!fused, [&] { return launch_gradient<T>(p, w, Side::kKeys, false, p.dk, stream); });
    then(!fused && p.q_den != nullptr,
         [&] { return launch_gradient<T>(p, w, Side::kQueries, true, p.dq_den, stream); });
    then(!fused && p.k_den != nullptr, [&] { return launch_gradient<T>(p, w, Side::kKeys, true, p.dk_den, stream); });
    then(!fused, [&] { return launch_value_gradient<T>(p, w, stream); });
    for (void* const to : {p.dq, p.dk, p.dq_den, p.dk_den})
      then(true, [&] { return launch_fill(p, to, query_bytes, stream); });
    then(true, [&] { return launch_fill(p, p.dv, value_bytes, stream); });
    then(true, [&] { return launch_fill(p, p.dweight, weight_bytes, stream); });
    return status;
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
