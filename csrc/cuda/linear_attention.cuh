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
#pragma once
#include "../common/linear_attention_params.h"
#include "common.cuh"

namespace effvit {
namespace cuda {
namespace linear_attention_impl {

using prim::Shared;
using prim::Vec;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / prim::kWarpSize;
constexpr int kTile = 64;  // tokens of a tile, and most columns of an operand in shared memory
constexpr int kTiles = kTile / 8;  // accumulator tiles of 8 columns
constexpr int kMaxDim = 256;
constexpr int kMaxSplits = 32;
constexpr int kMinTiles = 2;  // of a split

static_assert(kTile == 16 * kWarps, "a warp owns 16 rows of a tile");
static_assert(kThreads == 2 * kTile, "two threads sum up each row");

template <class T>
struct Traits {
  static constexpr bool kTensorCores = !std::is_same<T, float>::value;
  static constexpr bool kSplit = std::is_same<T, prim::float16>::value;  // operands are hi + lo
  using Element = std::conditional_t<kTensorCores, prim::bfloat16, float>;  // of an operand
  static constexpr int kVec = 16 / sizeof(T);  // elements of a 16-byte access
  static constexpr int kSkew = kVec;  // rows are an odd multiple of 16 bytes: no bank conflicts
  // CTAs a multiprocessor of the fused backward, as many as shared memory lets in or registers without spills.
  static constexpr int kQueryCtas = kTensorCores ? 3 : 2, kKeyCtas = kTensorCores ? 4 : 2;
  static constexpr bool odd(int cols) { return (cols + kSkew) * sizeof(Element) / 16 % 2 == 1; }
  static_assert(odd(16) && odd(32) && odd(64), "row stride must be an odd multiple of 16 bytes");
  static_assert(sizeof(Element) == sizeof(T), "a tile is transformed where it lies");
};

// ---- the plan of a pass ----

// What a row is multiplied with: the weight of a key, scale / d of a query, or the gradient of its denominator.
enum class Factor : int32_t { kOne, kWeight, kGradScale, kGradDen };

// Rows [B, tokens, H, dim] of a tensor, at all heads; last stride 1. A row is phi(x) * factor.
struct Operand {
  const void* base;
  int64_t stride_b, stride_l, stride_h;
  int32_t dim;
  bool vec;  // 16-byte accesses are aligned
  FeatureMap map;
  Factor factor;
};

enum class Epilogue : int32_t {
  kOut,  // y scale / d
  kGradient,  // y phi'(e) factor
  kValueGradient,  // y factor; dweight from y . e
  kRows,  // y . e gives the gradient of the denominator
};

struct Pass {
  LinearAttentionParams p;
  Operand x, a, b, rank, e;
  bool has_x;  // false: y_i = rho_i (z + sum_j gamma_j rank_j)
  bool has_rank;  // causal: the sum over rho_i gamma_j rank_j
  bool merged;  // rank is b, and the sum part of the other
  bool rows_are_keys, causal, reverse, quadratic;
  bool den_fused;  // the denominators come from x and zden, not from `den`
  Factor rho, gamma;  // kOne, or kGradDen
  bool with_rho;

  // The state and the vectors that go with it, one block per sequence, head and, causal, split.
  const float* state;  // element (row, column) of a block at row * state_row + column * state_col
  const float* zvec;  // [dim_out]; null: zeros
  const float* zden;  // [dim_x]
  int64_t state_stride, zvec_stride, zden_stride;  // from head to head, splits counted
  int64_t state_split, zvec_split;  // from split to split; 0 where all share one
  int32_t state_row, state_col;

  float* den;  // [B, L, H] phi(q) . z, before eps
  float* grad_den;  // [B, L, H] gradient of the denominator
  float* row_sum;  // [B, rows, H] row_dot's result; the sum over slabs for dweight
  bool row_sum_given;  // that sum starts from what is there
  bool has_den;  // fused: the denominators have rows of their own, z_rows
  float* partial;  // state pass: [N, H, splits, slot]
  int64_t slot;  // floats of a state and a vector in the workspace
  int64_t slot_z;  // where in a slot the vector is
  bool want_state;  // state pass: not only the vector
  Operand z_rows;  // state pass: rows that the vector sums up, times z_factor; base null: zeros
  Factor z_factor;
  bool z_from_a;  // they are a's, while these pass by

  Epilogue epilogue;
  void* out;  // [B, rows, H, dim_out], contiguous
  Factor out_factor;
  bool out_vec;

  int32_t dim_x, dim_out;
  int32_t blocks, x_shift;  // blocks of columns of x and a, and log2 of a block's 16-byte pieces
  int32_t slab_cols, slab_shift, slabs;
  bool slab_loop;  // a CTA does all slabs, one after the other, for it sums over them
  bool state_vec;  // the state's rows may be read 16 bytes at a time
  int32_t splits;
  int64_t ctas;
  // Byte offsets in shared memory.
  int32_t s_x[2], s_x_lo, s_a[2], s_a_lo, s_b[2], s_b_lo, s_state, s_state_lo, s_p, s_stage, s_vectors, shared_bytes;
  int32_t stage_stride;
};

// The vectors in shared memory, in floats from s_vectors.
constexpr int kZden = 0, kZvec = kMaxDim, kRowDen = kZvec + kTile, kRho = kRowDen + 2 * kTile, kGamma = kRho + kTile;
constexpr int kRowSum = kGamma + kTile, kVectors = kRowSum + kTile;
// Of a fused pass: z or its gradient, and later the warps' sums of that; then what a row's denominator is divided by.
constexpr int kFusedRow = kWarps * kTile, kFusedVectors = kFusedRow + kTile;

// What a CTA does: tokens [first, stop) of a sequence that begins at `begin`, at one head and slab.
struct Work {
  int64_t batch, begin, first, stop;
  int64_t block;  // sequence * H + head
  int head, slab, split;
  float keys;  // of the sequence
};

// Head fastest: the heads of a token lie side by side in memory.
EFFVIT_DEVICE Work work_at(const Pass& g, int64_t id) {
  const auto& p = g.p;
  Work work;
  work.head = static_cast<int>(id % p.H);
  id /= p.H;
  const int slabs = g.slab_loop ? 1 : g.slabs;
  work.slab = static_cast<int>(id % slabs);
  id /= slabs;
  work.split = static_cast<int>(id % g.splits);
  const int64_t n = id / g.splits;
  work.block = n * p.H + work.head;
  int64_t tokens = g.rows_are_keys ? p.M : p.L;
  work.batch = n;
  work.begin = 0;
  work.keys = static_cast<float>(p.M);
  if (p.cu_seqlens != nullptr) {
    const auto range =
        linear_attention_range(p, n, p.L, prim::load_global(p.cu_seqlens + n), prim::load_global(p.cu_seqlens + n + 1));
    work.batch = range.batch;
    work.begin = range.begin;
    tokens = range.end - range.begin;
    work.keys = static_cast<float>(tokens);
  }
  const int64_t each = ceil_div(ceil_div(tokens, kTile), g.splits) * kTile;
  const int64_t first = work.split * each, stop = first + each;
  work.first = work.begin + (first < tokens ? first : tokens);
  work.stop = work.begin + (stop < tokens ? stop : tokens);
  return work;
}
EFFVIT_DEVICE int64_t tile_count(const Work& work) { return ceil_div(work.stop - work.first, kTile); }

// ---- rows ----

EFFVIT_DEVICE int64_t query_index(const LinearAttentionParams& p, const Work& work, int64_t token) {
  return (work.batch * p.L + token) * p.H + work.head;
}

// The denominator of a query from phi(q) . z. causal: only if the call may be.
EFFVIT_DEVICE float denominator(const LinearAttentionParams& p, const Work& work, int64_t token, float dot,
                                bool causal = true) {
  if (p.normalize == Normalize::kClamp) return dot < p.clamp_min ? p.clamp_min : dot;
  if (p.normalize == Normalize::kSum) return dot + p.eps;
  return dot + p.eps * (p.causal && causal ? static_cast<float>(token - work.begin + 1) : work.keys);
}

EFFVIT_DEVICE float row_factor(const Pass& g, Factor factor, const Work& work, int64_t token) {
  const auto& p = g.p;
  if (factor == Factor::kWeight) {
    if (p.weight == nullptr) return 1.f;
    return load_small(p.weight,
                      work.batch * p.weight_stride_b + token * p.weight_stride_l + work.head * p.weight_stride_h,
                      p.weight_dtype);
  }
  if (factor == Factor::kGradScale) {
    if (p.normalize == Normalize::kNone) return p.scale;
    return p.scale / denominator(p, work, token, prim::load_global(g.den + query_index(p, work, token)));
  }
  if (factor == Factor::kGradDen) {
    return p.normalize == Normalize::kNone ? 0.f : prim::load_global(g.grad_den + query_index(p, work, token));
  }
  return 1.f;
}

// A feature map of kN elements. NaN passes through each of them.
template <int kN>
EFFVIT_DEVICE void apply_map(FeatureMap map, float (&x)[kN]) {
  if (map == FeatureMap::kRelu) {
    EFFVIT_UNROLL
    for (int e = 0; e < kN; ++e) x[e] = x[e] < 0.f ? 0.f : x[e];
  } else if (map != FeatureMap::kNone) {
    EFFVIT_UNROLL
    for (int e = 0; e < kN; ++e) x[e] = map == FeatureMap::kElu1 && x[e] > 0.f ? x[e] + 1.f : prim::exp(x[e]);
  }
}
EFFVIT_DEVICE float map_derivative(FeatureMap map, float x) {
  if (map == FeatureMap::kNone) return 1.f;
  if (map == FeatureMap::kRelu) return x > 0.f ? 1.f : 0.f;
  return map == FeatureMap::kElu1 && x > 0.f ? 1.f : prim::exp(x);
}

// ---- tiles in shared memory ----

template <class T>
struct Tile {
  using Element = typename Traits<T>::Element;
  Shared<Element> hi, lo;
  int stride, shift;  // in elements; log2 of the 16-byte pieces of a row
};

template <class T>
EFFVIT_DEVICE Tile<T> tile_at(int hi, int lo, int rows, int shift) {
  const int stride = (Traits<T>::kVec << shift) + Traits<T>::kSkew;
  Tile<T> tile;
  tile.hi = Shared<typename Traits<T>::Element>(hi, rows * stride);
  if constexpr (Traits<T>::kSplit) tile.lo = Shared<typename Traits<T>::Element>(lo, rows * stride);
  tile.stride = stride;
  tile.shift = shift;
  return tile;
}

// Two numbers as bfloat16 `hi` and, of float16 inputs, `lo`, which holds the rest. hi is finite: where it would be
// infinite or NaN, it is 1 or -1 and lo has the number. So hi hi + hi lo + lo hi is infinite where the product is, for
// lo meets hi only, which is zero only where the number is; an infinite hi would meet lo of numbers that need none.
template <class T>
EFFVIT_DEVICE void split_pair(float low, float high, uint32_t& hi, uint32_t& lo) {
  hi = prim::pack2<prim::bfloat16>(low, high);
  if constexpr (Traits<T>::kSplit) {
    lo = prim::pack2<prim::bfloat16>(low - prim::bit_cast<float>(hi << 16),
                                     high - prim::bit_cast<float>(hi & 0xffff0000u));
    // Adding 1 to an exponent of all ones carries into the bit above.
    const uint32_t special = ((((hi & 0x7f807f80u) + 0x00800080u) & 0x80008000u) >> 15) * 0xffffu;
    lo = (lo & ~special) | (hi & special);
    hi = (hi & ~(special & 0x7fff7fffu)) | (special & 0x3f803f80u);
  }
}

template <class T>
EFFVIT_DEVICE void store_pair(const Tile<T>& to, int i, float low, float high) {
  if constexpr (Traits<T>::kTensorCores) {
    uint32_t hi, rest;
    split_pair<T>(low, high, hi, rest);
    to.hi.store_vec(i, hi);
    if constexpr (Traits<T>::kSplit) to.lo.store_vec(i, rest);
  } else {
    to.hi.store_vec(i, Vec<float, 2>{{low, high}});
  }
}
template <class T>
EFFVIT_DEVICE void store_piece(const Tile<T>& to, int i, const float (&x)[Traits<T>::kVec]) {
  if constexpr (Traits<T>::kTensorCores) {
    Vec<uint32_t, 4> hi, lo;
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) split_pair<T>(x[2 * e], x[2 * e + 1], hi.v[e], lo.v[e]);
    to.hi.store_vec(i, hi);
    if constexpr (Traits<T>::kSplit) to.lo.store_vec(i, lo);
  } else {
    to.hi.store_vec(i, Vec<float, 4>{{x[0], x[1], x[2], x[3]}});
  }
}
template <class T>
EFFVIT_DEVICE float load_element(const Tile<T>& from, int i) {
  float x = prim::to_float(from.hi.load(i));
  if constexpr (Traits<T>::kSplit) x += prim::to_float(from.lo.load(i));
  return x;
}

template <class T>
EFFVIT_DEVICE const T* row_at(const Operand& from, const Work& work, int64_t token) {
  return static_cast<const T*>(from.base) + work.batch * from.stride_b + token * from.stride_l +
         work.head * from.stride_h;
}

// Elements of `from` that a piece at column `col` holds.
template <class T>
EFFVIT_DEVICE int piece_length(const Operand& from, int col) {
  const int n = from.dim - col;
  return n < 0 ? 0 : n > Traits<T>::kVec ? Traits<T>::kVec : n;
}

template <class T>
EFFVIT_DEVICE Vec<T, Traits<T>::kVec> load_raw(const Operand& from, const T* at, int n) {
  using V = Vec<T, Traits<T>::kVec>;
  if (n == Traits<T>::kVec && from.vec) return prim::load_global_vec<V>(at);
  V x;
  EFFVIT_UNROLL
  for (int e = 0; e < Traits<T>::kVec; ++e) x.v[e] = e < n ? prim::load_global(at + e) : prim::from_float<T>(0.f);
  return x;
}

// The rows of a tile that a thread copies and transforms, 16-byte pieces at one column: those of its own warp's 16
// rows, so that a pass whose warps read their own rows only needs no barrier of the CTA.
struct PieceRows {
  int column, first, last, step;  // column in pieces
};
EFFVIT_DEVICE PieceRows piece_rows(int shift) {
  const int lane = prim::lane_id(), first = prim::warp_id() * 16;
  return {lane & ((1 << shift) - 1), first + (lane >> shift), first + 16, prim::kWarpSize >> shift};
}

// Starts to copy columns [col, ...) of 64 tokens; zeros where there is no token or column.
template <class T>
EFFVIT_DEVICE void load_tile(const Tile<T>& to, const Operand& from, const Work& work, int64_t first, int64_t stop,
                             int col) {
  const PieceRows rows = piece_rows(to.shift);
  const int piece = rows.column * Traits<T>::kVec;
  const int length = piece_length<T>(from, col + piece);
  const T* const base = row_at<T>(from, work, first) + col + piece;
  EFFVIT_NO_UNROLL
  for (int row = rows.first; row < rows.last; row += rows.step) {
    const int n = first + row < stop ? length : 0;
    if (n != 0 && from.vec) {
      prim::cp_async16(to.hi, row * to.stride + piece, base + row * from.stride_l, n * static_cast<int>(sizeof(T)));
    } else {
      to.hi.store_vec(row * to.stride + piece, load_raw<T>(from, base + row * from.stride_l, n));
    }
  }
}

// Turns the pieces that this thread copied into the operand phi(x) * factor. piece(row, col, x) sees each of them in
// float32; rows and columns that do not exist are zeros.
template <class T, class F>
EFFVIT_DEVICE void transform_tile(const Pass& g, const Tile<T>& tile, const Operand& from, const Work& work,
                                  int64_t first, int64_t stop, int col, bool visit, const F& piece) {
  constexpr int kVec = Traits<T>::kVec;
  const bool same = !Traits<T>::kSplit && from.map == FeatureMap::kNone &&
                    (from.factor == Factor::kOne || (from.factor == Factor::kWeight && g.p.weight == nullptr));
  if (same && !visit) return;
  const PieceRows rows = piece_rows(tile.shift);
  const int at = rows.column * kVec, length = piece_length<T>(from, col + at);
  EFFVIT_NO_UNROLL
  for (int row = rows.first; row < rows.last; row += rows.step) {
    const bool inside = first + row < stop;
    const auto raw = tile.hi.template load_vec<Vec<T, kVec>>(row * tile.stride + at);
    float x[kVec];
    EFFVIT_UNROLL
    for (int e = 0; e < kVec; ++e) x[e] = prim::to_float(raw.v[e]);
    apply_map(from.map, x);
    const float factor = inside ? row_factor(g, from.factor, work, first + row) : 0.f;
    EFFVIT_UNROLL
    for (int e = 0; e < kVec; ++e) x[e] = inside && e < length ? x[e] * factor : 0.f;
    piece(row, at, x);
    if (!same) store_piece(tile, row * tile.stride + at, x);
  }
}
struct NoPiece {
  template <class X>
  EFFVIT_DEVICE void operator()(int, int, const X&) const {}
};

// ---- matrix products ----

// Where a fragment of A comes from: a tile that is an operand already, or one that is as in memory, of which the
// feature map is taken on the way to the tensor cores. float32's tiles always are operands.
enum class Source { kOperand, kMemory };

// Two elements as they are in memory.
template <class T>
EFFVIT_DEVICE void unpack2(uint32_t raw, float& low, float& high) {
  low = prim::to_float(T{static_cast<uint16_t>(raw)});
  high = prim::to_float(T{static_cast<uint16_t>(raw >> 16)});
}

template <class T, bool kTransposed, Source kSource>
EFFVIT_DEVICE void load_fragment(uint32_t (&hi)[4], uint32_t (&lo)[4], const Tile<T>& a, int i, FeatureMap map) {
  prim::ldmatrix_x4<kTransposed>(hi, a.hi, i);
  if constexpr (kSource == Source::kOperand) {
    if constexpr (Traits<T>::kSplit) prim::ldmatrix_x4<kTransposed>(lo, a.lo, i);
  } else {
    if (!Traits<T>::kSplit && map == FeatureMap::kNone) return;
    float x[8];
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) unpack2<T>(hi[e], x[2 * e], x[2 * e + 1]);
    apply_map(map, x);
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) split_pair<T>(x[2 * e], x[2 * e + 1], hi[e], lo[e]);
  }
}

// acc[first + n] += A B for 16 rows of A and columns n0 + 8 n of B, n < n_tiles (even), over `depth` (a multiple of
// 16). A is stored [m][k], with kATransposed [k][m]; B is stored [n][k], with kBTransposed [k][n].
template <class T, bool kATransposed, bool kBTransposed, Source kSource = Source::kOperand>
EFFVIT_DEVICE void product(float (&acc)[kTiles][4], int first, int n_tiles, const Tile<T>& a, int m0, const Tile<T>& b,
                           int bk0, int depth, FeatureMap map = FeatureMap::kNone) {
  const int lane = prim::lane_id();
  if constexpr (Traits<T>::kTensorCores) {
    using E = prim::bfloat16;
    const int low = lane % 8, half = lane / 8 % 2 * 8, quarter = lane / 16 * 8;
    EFFVIT_NO_UNROLL
    for (int k = 0; k < depth; k += 16) {
      const int ai =
          kATransposed ? (k + low + quarter) * a.stride + m0 + half : (m0 + low + half) * a.stride + k + quarter;
      uint32_t af[4], al[4];
      load_fragment<T, kATransposed, kSource>(af, al, a, ai, map);
      EFFVIT_UNROLL
      for (int i = 0; i < kTiles; i += 2) {
        const int n = i - first;
        if (n >= 0 && n < n_tiles) {
          const int bi = kBTransposed ? (bk0 + k + low + half) * b.stride + n * 8 + quarter
                                      : (n * 8 + low + quarter) * b.stride + bk0 + k + half;
          uint32_t bf[4];
          prim::ldmatrix_x4<kBTransposed>(bf, b.hi, bi);
          prim::mma_m16n8k16<E>(acc[i], af, bf[0], bf[1]);
          prim::mma_m16n8k16<E>(acc[i + 1], af, bf[2], bf[3]);
          if constexpr (Traits<T>::kSplit) {
            prim::mma_m16n8k16<E>(acc[i], al, bf[0], bf[1]);
            prim::mma_m16n8k16<E>(acc[i + 1], al, bf[2], bf[3]);
            prim::ldmatrix_x4<kBTransposed>(bf, b.lo, bi);
            prim::mma_m16n8k16<E>(acc[i], af, bf[0], bf[1]);
            prim::mma_m16n8k16<E>(acc[i + 1], af, bf[2], bf[3]);
          }
        }
      }
    }
  } else {
    // Sums over the depth start from zero, four products at a time, and are added once: a sum over a long sequence,
    // added up term by term, would lose bits.
    using V4 = Vec<float, 4>;
    using V2 = Vec<float, 2>;
    const int row = m0 + lane / 4, col = lane % 4 * 2;
    EFFVIT_UNROLL
    for (int i = 0; i < kTiles; i += 2) {
      if (i < first || i >= first + n_tiles) continue;
      float sum[2][4] = {};
      EFFVIT_NO_UNROLL
      for (int k = 0; k < depth; k += 4) {
        V4 x[2];
        if constexpr (kATransposed) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            x[0].v[e] = a.hi.load((k + e) * a.stride + row);
            x[1].v[e] = a.hi.load((k + e) * a.stride + row + 8);
          }
        } else {
          x[0] = a.hi.template load_vec<V4>(row * a.stride + k);
          x[1] = a.hi.template load_vec<V4>((row + 8) * a.stride + k);
        }
        EFFVIT_UNROLL
        for (int n = 0; n < 2; ++n) {
          const int at = (i - first + n) * 8 + col;
          V4 y[2];
          if constexpr (kBTransposed) {
            EFFVIT_UNROLL
            for (int e = 0; e < 4; ++e) {
              const V2 pair = b.hi.template load_vec<V2>((bk0 + k + e) * b.stride + at);
              y[0].v[e] = pair.v[0];
              y[1].v[e] = pair.v[1];
            }
          } else {
            y[0] = b.hi.template load_vec<V4>(at * b.stride + bk0 + k);
            y[1] = b.hi.template load_vec<V4>((at + 1) * b.stride + bk0 + k);
          }
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const V4 &u = x[e / 2], &w = y[e % 2];
            sum[n][e] += (u.v[0] * w.v[0] + u.v[1] * w.v[1]) + (u.v[2] * w.v[2] + u.v[3] * w.v[3]);
          }
        }
      }
      EFFVIT_UNROLL
      for (int n = 0; n < 2; ++n) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) acc[i + n][e] += sum[n][e];
      }
    }
  }
}

// acc += P B with this warp's 16 rows of P in the accumulator layout of their own product. B is stored [k][n]. float32
// takes the way through shared memory.
template <class T>
EFFVIT_DEVICE void score_product(float (&acc)[kTiles][4], int n_tiles, const float (&p)[kTiles][4], const Tile<T>& b,
                                 const Tile<T>& scores) {
  const int lane = prim::lane_id();
  if constexpr (Traits<T>::kTensorCores) {
    using E = prim::bfloat16;
    const int low = lane % 8, half = lane / 8 % 2 * 8, quarter = lane / 16 * 8;
    EFFVIT_UNROLL
    for (int k = 0; k < kTiles / 2; ++k) {
      uint32_t af[4], al[4];
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float (&c)[4] = p[2 * k + e / 2];
        split_pair<T>(c[e % 2 * 2], c[e % 2 * 2 + 1], af[e], al[e]);
      }
      EFFVIT_UNROLL
      for (int n = 0; n < kTiles; n += 2) {
        if (n < n_tiles) {
          const int bi = (k * 16 + low + half) * b.stride + n * 8 + quarter;
          uint32_t bf[4];
          prim::ldmatrix_x4<true>(bf, b.hi, bi);
          prim::mma_m16n8k16<E>(acc[n], af, bf[0], bf[1]);
          prim::mma_m16n8k16<E>(acc[n + 1], af, bf[2], bf[3]);
          if constexpr (Traits<T>::kSplit) {
            prim::mma_m16n8k16<E>(acc[n], al, bf[0], bf[1]);
            prim::mma_m16n8k16<E>(acc[n + 1], al, bf[2], bf[3]);
            prim::ldmatrix_x4<true>(bf, b.lo, bi);
            prim::mma_m16n8k16<E>(acc[n], af, bf[0], bf[1]);
            prim::mma_m16n8k16<E>(acc[n + 1], af, bf[2], bf[3]);
          }
        }
      }
    }
  } else {
    const int row = prim::warp_id() * 16 + lane / 4, col = lane % 4 * 2;
    prim::sync_warp();  // the previous product's readers
    EFFVIT_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      store_pair(scores, row * scores.stride + n * 8 + col, p[n][0], p[n][1]);
      store_pair(scores, (row + 8) * scores.stride + n * 8 + col, p[n][2], p[n][3]);
    }
    prim::sync_warp();
    product<T, false, true>(acc, 0, n_tiles, scores, prim::warp_id() * 16, b, 0, kTile);
  }
}

EFFVIT_DEVICE void clear(float (&acc)[kTiles][4]) {
  EFFVIT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.f;
  }
}

// ---- what a CTA works with ----

template <class T>
struct Cta {
  const Pass& g;
  int lane, warp_row, row, column;  // a lane owns rows `row` and `row + 8` of a tile and columns column + 8 n, + 1
  int block_cols, slab_tiles, tiles_shift;

  EFFVIT_DEVICE explicit Cta(const Pass& pass)
      : g(pass),
        lane(prim::lane_id()),
        warp_row(prim::warp_id() * 16),
        row(warp_row + lane / 4),
        column(lane % 4 * 2),
        block_cols(Traits<T>::kVec << pass.x_shift),
        slab_tiles(pass.slab_cols / 8),
        tiles_shift(pass.slab_cols == 64   ? 3
                    : pass.slab_cols == 32 ? 2
                                           : 1) {}

  EFFVIT_DEVICE Shared<float> vector(int at, int count) const { return Shared<float>(g.s_vectors + 4 * at, count); }
  EFFVIT_DEVICE Shared<float> zden() const { return vector(kZden, kMaxDim); }
  EFFVIT_DEVICE Shared<float> zvec() const { return vector(kZvec, kTile); }
  EFFVIT_DEVICE Shared<float> row_den() const { return vector(kRowDen, 2 * kTile); }
  EFFVIT_DEVICE Shared<float> rho() const { return vector(kRho, kTile); }
  EFFVIT_DEVICE Shared<float> gamma() const { return vector(kGamma, kTile); }
  EFFVIT_DEVICE Shared<float> row_sum() const { return vector(kRowSum, kTile); }
  EFFVIT_DEVICE Shared<float> row_inverse() const { return vector(kFusedRow, kTile); }
  EFFVIT_DEVICE Shared<float> stage() const { return Shared<float>(g.s_stage, kTile * g.stage_stride); }
  EFFVIT_DEVICE Tile<T> x_tile(int i) const {
    return tile_at<T>(i == 0 ? g.s_x[0] : g.s_x[1], g.s_x_lo, kTile, g.x_shift);
  }
  EFFVIT_DEVICE Tile<T> a_tile(int i) const {
    return tile_at<T>(i == 0 ? g.s_a[0] : g.s_a[1], g.s_a_lo, kTile, g.x_shift);
  }
  EFFVIT_DEVICE Tile<T> b_tile(int i) const {
    return tile_at<T>(i == 0 ? g.s_b[0] : g.s_b[1], g.s_b_lo, kTile, g.slab_shift);
  }
  EFFVIT_DEVICE Tile<T> state_tile() const {
    return tile_at<T>(g.s_state, g.s_state_lo, g.blocks * block_cols, g.slab_shift);
  }
};

// A slab of the state as an operand. Neighbouring threads read neighbouring addresses: those of a row's pieces, or of a
// transposed state rows.
template <class T>
EFFVIT_DEVICE void load_planes(const Cta<T>& c, const Tile<T>& to, const float* from, int first_col) {
  constexpr int kVec = Traits<T>::kVec;
  const Pass& g = c.g;
  const int rows = g.blocks * c.block_cols;
  const bool transposed = g.state_col != 1;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < rows << to.shift; i += kThreads) {
    const int row = transposed ? i % rows : i >> to.shift;
    const int piece = (transposed ? i / rows : i & ((1 << to.shift) - 1)) * kVec, col = first_col + piece;
    const float* const at = from + static_cast<int64_t>(row) * g.state_row + static_cast<int64_t>(col) * g.state_col;
    float x[kVec];
    if (g.state_vec && row < g.dim_x && col + kVec <= g.dim_out) {
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; e += 4) {
        const auto four = prim::load_global_vec<Vec<float, 4>>(at + e);
        EFFVIT_UNROLL
        for (int f = 0; f < 4; ++f) x[e + f] = four.v[f];
      }
    } else {
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) {
        const bool inside = row < g.dim_x && col + e < g.dim_out;
        x[e] = inside ? prim::load_global(at + static_cast<int64_t>(e) * g.state_col) : 0.f;
      }
    }
    store_piece(to, row * to.stride + piece, x);
  }
}

// A slab of the state in the accumulator layout, by way of the stage: tile i holds columns (i % slab_tiles) * 8 of
// block i / slab_tiles.
template <class T>
EFFVIT_DEVICE void load_state(const Cta<T>& c, float (&state)[kTiles][4], const float* from, int first_col) {
  const Pass& g = c.g;
  const Shared<float> stage = c.stage();
  EFFVIT_NO_UNROLL
  for (int block = 0; block < g.blocks; ++block) {
    prim::sync_threads();  // the previous readers
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < kTile * g.slab_cols; i += kThreads) {
      const int row = g.state_col == 1 ? i / g.slab_cols : i % kTile;
      const int col = g.state_col == 1 ? i - row * g.slab_cols : i / kTile;
      const bool inside = block * kTile + row < g.dim_x && first_col + col < g.dim_out;
      const float* const at = from + static_cast<int64_t>(block * kTile + row) * g.state_row +
                              static_cast<int64_t>(first_col + col) * g.state_col;
      stage.store(row * g.stage_stride + col, inside ? prim::load_global(at) : 0.f);
    }
    prim::sync_threads();
    EFFVIT_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      if (i >> c.tiles_shift == block) {
        const int at = c.row * g.stage_stride + (i & (c.slab_tiles - 1)) * 8 + c.column;
        const auto low = stage.template load_vec<Vec<float, 2>>(at);
        const auto high = stage.template load_vec<Vec<float, 2>>(at + 8 * g.stage_stride);
        state[i][0] = low.v[0], state[i][1] = low.v[1], state[i][2] = high.v[0], state[i][3] = high.v[1];
      }
    }
  }
}
template <class T>
EFFVIT_DEVICE void store_state(const Cta<T>& c, const Tile<T>& to, const float (&state)[kTiles][4]) {
  if (c.warp_row >= c.block_cols) return;
  EFFVIT_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    const int block = i >> c.tiles_shift, col = (i & (c.slab_tiles - 1)) * 8 + c.column;
    if (block < c.g.blocks) {
      store_pair(to, (block * kTile + c.row) * to.stride + col, state[i][0], state[i][1]);
      store_pair(to, (block * kTile + c.row + 8) * to.stride + col, state[i][2], state[i][3]);
    }
  }
}

// The same slab to the workspace.
template <class T>
EFFVIT_DEVICE void store_partial(const Cta<T>& c, float* to, const float (&state)[kTiles][4], int first_col) {
  if (c.warp_row >= c.block_cols) return;
  EFFVIT_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    const int block = i >> c.tiles_shift, col = first_col + (i & (c.slab_tiles - 1)) * 8 + c.column;
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = block * kTile + c.row + e / 2 * 8;
      if (row < c.g.dim_x && col + e % 2 < c.g.dim_out)
        prim::store_global(to + static_cast<int64_t>(row) * c.g.dim_out + col + e % 2, state[i][e]);
    }
  }
}

// Adds x . zden of the rows of x's own denominators to row_den, from the pieces that pass by.
template <class T>
EFFVIT_DEVICE void add_row_den(const Cta<T>& c, int at, int row, int col, const float (&x)[Traits<T>::kVec]) {
  float dot = 0.f;
  EFFVIT_UNROLL
  for (int e = 0; e < Traits<T>::kVec; ++e) dot += x[e] * c.zden().load(col + e);
  for (int m = (1 << c.g.x_shift) / 2; m > 0; m /= 2) dot += prim::shuffle_xor(dot, m);
  if (col % c.block_cols != 0) return;
  c.row_den().store(at + row, col == 0 ? dot : c.row_den().load(at + row) + dot);
}

// Prepares x in its buffer. With fused denominators these are summed up on the way, from x or from the rows of q_den.
template <class T>
EFFVIT_DEVICE void transform_x(const Cta<T>& c, const Tile<T>& tile, const Work& work, int64_t first, int block,
                               int den_at, bool with_den) {
  const Pass& g = c.g;
  const int col = block * kTile;
  const bool own = with_den && g.p.q_den == nullptr;
  transform_tile<T>(g, tile, g.x, work, first, work.stop, col, own, [&](int row, int at, const auto& x) {
    if (own) add_row_den(c, den_at, row, col + at, x);
  });
  if (!with_den || own) return;
  const Operand& from = g.z_rows;
  const PieceRows rows = piece_rows(tile.shift);
  const int at = rows.column * Traits<T>::kVec, length = piece_length<T>(from, col + at);
  EFFVIT_NO_UNROLL
  for (int row = rows.first; row < rows.last; row += rows.step) {
    const bool inside = first + row < work.stop;
    const auto raw = load_raw<T>(from, row_at<T>(from, work, first + row) + col + at, inside ? length : 0);
    float x[Traits<T>::kVec];
    EFFVIT_UNROLL
    for (int e = 0; e < Traits<T>::kVec; ++e) x[e] = prim::to_float(raw.v[e]);
    apply_map(from.map, x);
    EFFVIT_UNROLL
    for (int e = 0; e < Traits<T>::kVec; ++e) x[e] = inside && e < length ? x[e] : 0.f;
    add_row_den(c, den_at, row, col + at, x);
  }
}

// A piece of the output, of which `n` elements exist.
template <class T>
EFFVIT_DEVICE void store_output(T* to, const Vec<T, Traits<T>::kVec>& x, int n, bool vec) {
  if (n == Traits<T>::kVec && vec) {
    prim::store_global_vec(to, x);
  } else {
    EFFVIT_UNROLL
    for (int e = 0; e < Traits<T>::kVec; ++e) {
      if (e < n) prim::store_global(to + e, x.v[e]);
    }
  }
}

// Writes y, this warp's 16 rows of one slab, as the pass wants it. den_at: where in row_den its denominators are.
template <class T>
EFFVIT_DEVICE void write_rows(const Cta<T>& c, const Work& work, int slab, int64_t first, const float (&acc)[kTiles][4],
                              int den_at) {
  constexpr int kVec = Traits<T>::kVec;
  const Pass& g = c.g;
  const auto& p = g.p;
  const int64_t length = g.rows_are_keys ? p.M : p.L;
  const bool dots = g.epilogue == Epilogue::kRows || (g.epilogue == Epilogue::kValueGradient && p.weight != nullptr);
  prim::sync_warp();  // the previous readers
  EFFVIT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    if (n < c.slab_tiles) {
      c.stage().store_vec(c.row * g.stage_stride + n * 8 + c.column, Vec<float, 2>{{acc[n][0], acc[n][1]}});
      c.stage().store_vec((c.row + 8) * g.stage_stride + n * 8 + c.column, Vec<float, 2>{{acc[n][2], acc[n][3]}});
    }
  }
  prim::sync_warp();
  EFFVIT_NO_UNROLL
  for (int i = c.lane; i < 16 << g.slab_shift; i += prim::kWarpSize) {
    const int row = c.warp_row + (i >> g.slab_shift), piece = (i & ((1 << g.slab_shift) - 1)) * kVec;
    const int col = slab * g.slab_cols + piece;
    const int64_t token = first + row;
    int n = g.dim_out - col;
    n = token >= work.stop || n < 0 ? 0 : n > kVec ? kVec : n;
    float dot = 0.f;
    if (n != 0) {
      float y[kVec];
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; e += 4) {
        const auto v = c.stage().template load_vec<Vec<float, 4>>(row * g.stage_stride + piece + e);
        EFFVIT_UNROLL
        for (int f = 0; f < 4; ++f) y[e + f] = v.v[f];
      }
      if (g.with_rho) {
        const float rho = c.rho().load(row);
        EFFVIT_UNROLL
        for (int e = 0; e < kVec; ++e) y[e] += rho * c.zvec().load(piece + e);
      }
      float factor;
      if (g.epilogue == Epilogue::kOut) {
        factor = p.scale;
        if (p.normalize != Normalize::kNone) {
          const float z =
              g.den_fused ? c.row_den().load(den_at + row) : prim::load_global(g.den + query_index(p, work, token));
          factor /= denominator(p, work, token, z);
        }
      } else {
        factor = row_factor(g, g.out_factor, work, token);
        if (dots || g.e.map != FeatureMap::kNone) {
          const auto e = load_raw<T>(g.e, row_at<T>(g.e, work, token) + col, n);
          EFFVIT_UNROLL
          for (int k = 0; k < kVec; ++k) {
            const float x = prim::to_float(e.v[k]);
            dot += k < n ? y[k] * x : 0.f;
            y[k] *= map_derivative(g.e.map, x);
          }
        }
      }
      if (g.epilogue != Epilogue::kRows) {
        Vec<T, kVec> out;
        EFFVIT_UNROLL
        for (int e = 0; e < kVec; ++e) out.v[e] = prim::from_float<T>(y[e] * factor);
        T* const to = static_cast<T*>(g.out) + ((work.batch * length + token) * p.H + work.head) * g.dim_out + col;
        store_output<T>(to, out, n, g.out_vec);
      }
    }
    if (dots) {
      for (int m = (1 << g.slab_shift) / 2; m > 0; m /= 2) dot += prim::shuffle_xor(dot, m);
      if (piece == 0) c.row_sum().store(row, dot);
    }
  }
  if (!dots) return;
  prim::sync_warp();
  const int row = c.warp_row + c.lane;
  const int64_t token = first + row, element = (work.batch * length + token) * p.H + work.head;
  if (c.lane < 16 && token < work.stop) {  // the owner of a row is the same lane for every slab
    float sum = c.row_sum().load(row);
    if (g.epilogue == Epilogue::kRows) {
      if (slab != 0) sum += prim::load_global(g.grad_den + element);
      if (slab == g.slabs - 1) {
        const float z = g.den_fused ? c.row_den().load(den_at + row) : prim::load_global(g.den + element);
        const float d = denominator(p, work, token, z);
        sum = p.normalize == Normalize::kClamp && z < p.clamp_min ? 0.f : -(sum * (p.scale / d)) / d;
        if (g.den_fused) prim::store_global(g.den + element, z);
      }
      prim::store_global(g.grad_den + element, sum);
    } else {
      if (slab != 0 || g.row_sum_given) sum += prim::load_global(g.row_sum + element);
      if (slab == g.slabs - 1) {
        store_small(p.dweight, element, p.weight_dtype, sum);
      } else {
        prim::store_global(g.row_sum + element, sum);
      }
    }
  }
}

// The factors of a warp's rows of a tile, as queries and as keys. A barrier must follow.
template <class T>
EFFVIT_DEVICE void load_factors(const Cta<T>& c, const Work& work, int64_t first) {
  const Pass& g = c.g;
  const int row = c.warp_row + c.lane % 16;
  const bool inside = first + row < work.stop;
  if (c.lane < 16) {
    if (g.with_rho) c.rho().store(row, inside ? row_factor(g, g.rho, work, first + row) : 0.f);
  } else if (g.has_rank) {
    c.gamma().store(row, inside ? row_factor(g, g.gamma, work, first + row) : 0.f);
  }
}

// zvec of a slab, and all of zden. A barrier must follow.
template <class T>
EFFVIT_DEVICE void load_vectors(const Cta<T>& c, const Work& work, int slab) {
  const Pass& g = c.g;
  const int i = prim::thread_id(), col = slab * g.slab_cols + i;
  if (g.with_rho && i < g.slab_cols) {
    const float* const from = g.zvec + work.block * g.zvec_stride + work.split * g.zvec_split;
    c.zvec().store(i, col < g.dim_out ? prim::load_global(from + col) : 0.f);
  }
  if (g.den_fused) {
    for (int k = i; k < g.blocks * kTile; k += kThreads)
      c.zden().store(k, k < g.dim_x ? prim::load_global(g.zden + work.block * g.zden_stride + k) : 0.f);
  }
}

// ---- the passes ----

// Columns of a thread's sums over rows, summed up over the CTA and written. Shared memory of the tiles is free.
template <class T>
EFFVIT_DEVICE void write_column_sums(const Cta<T>& c, float (&sum)[Traits<T>::kVec], float* to, int col) {
  constexpr int kVec = Traits<T>::kVec;
  const int pieces = 1 << c.g.x_shift, at = (prim::thread_id() & (pieces - 1)) * kVec;
  prim::sync_threads();  // the tiles' readers, and those of the previous block
  EFFVIT_UNROLL
  for (int e = 0; e < kVec; ++e) {
    for (int m = pieces; m < prim::kWarpSize; m *= 2) sum[e] += prim::shuffle_xor(sum[e], m);
    if (c.lane < pieces) c.stage().store(prim::warp_id() * kTile + at + e, sum[e]);
  }
  prim::sync_threads();
  const int i = prim::thread_id();
  if (i < c.block_cols && col + i < c.g.dim_x) {
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += c.stage().load(w * kTile + i);
    prim::store_global(to + col + i, total);
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, Traits<T>::kTensorCores ? 4 : 3)
linear_attention_state_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  constexpr int kVec = Traits<T>::kVec;
  const Cta<T> c(g);
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    float* const to = g.partial + (work.block * g.splits + work.split) * g.slot;
    const int first_col = work.slab * g.slab_cols;
    const bool sum_z = work.slab == 0 && g.z_from_a;
    float sum[kVec];
    EFFVIT_UNROLL
    for (int e = 0; e < kVec; ++e) sum[e] = 0.f;

    if (g.want_state) {
      float state[kTiles][4];
      clear(state);
      const auto load = [&](int64_t first, int block, int a_at, int b_at) {
        load_tile<T>(c.a_tile(a_at), g.a, work, first, work.stop, block * kTile);
        if (block == 0) load_tile<T>(c.b_tile(b_at), g.b, work, first, work.stop, first_col);
        prim::cp_async_commit();
      };
      prim::sync_threads();  // the previous piece of work
      if (work.first < work.stop) load(work.first, 0, 0, 0);
      int64_t first = work.first;
      int block = 0, a_at = 0, b_at = 0;
      EFFVIT_NO_UNROLL
      while (first < work.stop) {
        const Tile<T> a = c.a_tile(a_at), b = c.b_tile(b_at);
        prim::cp_async_wait<0>();
        if constexpr (Traits<T>::kSplit) prim::sync_threads();  // the readers of lo, of which there is one buffer
        transform_tile<T>(g, a, g.a, work, first, work.stop, block * kTile, sum_z, [&](int row, int, const auto& x) {
          if (!sum_z) return;
          float factor = 1.f;  // a has the weight already
          if (g.z_factor == Factor::kGradDen && first + row < work.stop)
            factor = row_factor(g, Factor::kGradDen, work, first + row);
          EFFVIT_UNROLL
          for (int e = 0; e < kVec; ++e) sum[e] += x[e] * factor;
        });
        if (block == 0) transform_tile<T>(g, b, g.b, work, first, work.stop, first_col, false, NoPiece{});
        prim::sync_threads();  // this tile is complete, and the other buffer's readers are done
        const int next_block = block + 1 == g.blocks ? 0 : block + 1;
        const int64_t next = next_block == 0 ? first + kTile : first;
        a_at = 1 - a_at;
        b_at = next_block == 0 ? 1 - b_at : b_at;
        if (next < work.stop) load(next, next_block, a_at, b_at);
        if (c.warp_row < c.block_cols)
          product<T, true, true>(state, block * c.slab_tiles, c.slab_tiles, a, c.warp_row, b, 0, kTile);
        first = next;
        block = next_block;
      }
      store_partial(c, to, state, first_col);
    }
    if (work.slab != 0) continue;
    if (sum_z) {
      write_column_sums(c, sum, to + g.slot_z, 0);
      continue;
    }
    const Operand& from = g.z_rows;
    const int piece = (prim::thread_id() & ((1 << g.x_shift) - 1)) * kVec;
    EFFVIT_NO_UNROLL
    for (int block = 0; block < g.blocks; ++block) {
      const int col = block * kTile + piece, length = piece_length<T>(from, col);
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) sum[e] = 0.f;
      if (from.base != nullptr) {
        EFFVIT_NO_UNROLL
        for (int64_t token = work.first + (prim::thread_id() >> g.x_shift); token < work.stop;
             token += kThreads >> g.x_shift) {
          const auto raw = load_raw<T>(from, row_at<T>(from, work, token) + col, length);
          float x[kVec];
          EFFVIT_UNROLL
          for (int e = 0; e < kVec; ++e) x[e] = prim::to_float(raw.v[e]);
          apply_map(from.map, x);
          const float factor = row_factor(g, g.z_factor, work, token);
          EFFVIT_UNROLL
          for (int e = 0; e < kVec; ++e) sum[e] += e < length ? x[e] * factor : 0.f;
        }
      }
      write_column_sums(c, sum, to + g.slot_z, block * kTile);
    }
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 4)
linear_attention_walk_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const Tile<T> planes = c.state_tile();
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    if (work.first == work.stop) continue;
    const int blocks = g.has_x ? g.blocks : 1;
    const auto load = [&](int64_t first, int block, int x_at) {
      if (g.has_x) load_tile<T>(c.x_tile(x_at), g.x, work, first, work.stop, block * kTile);
      prim::cp_async_commit();
    };
    EFFVIT_NO_UNROLL
    for (int slab = work.slab; slab < g.slabs; slab += g.slab_loop ? 1 : g.slabs) {
      prim::sync_threads();  // the previous slab's readers
      load(work.first, 0, 0);
      float acc[kTiles][4];
      if (g.has_x) {
        load_planes(c, planes, g.state + work.block * g.state_stride, slab * g.slab_cols);
      }
      load_vectors(c, work, slab);
      prim::sync_threads();
      clear(acc);
      int64_t first = work.first;
      int block = 0, x_at = 0, den_at = 0;
      EFFVIT_NO_UNROLL
      while (first < work.stop) {
        const Tile<T> x = c.x_tile(x_at);
        prim::cp_async_wait<0>();
        // From here on a warp touches its own 16 rows only, of x and of the vectors: warps do not wait for each other.
        if (Traits<T>::kSplit || g.with_rho) prim::sync_warp();  // the readers of what has one buffer: lo, and rho
        if (g.has_x) transform_x(c, x, work, first, block, den_at, g.den_fused);
        if (block == 0) load_factors(c, work, first);
        prim::sync_warp();  // these rows are complete, and the other buffer's readers are done
        const int next_block = block + 1 == blocks ? 0 : block + 1;
        const int64_t next = next_block == 0 ? first + kTile : first;
        x_at = 1 - x_at;
        if (next < work.stop) load(next, next_block, x_at);
        if (g.has_x) product<T, false, true>(acc, 0, c.slab_tiles, x, c.warp_row, planes, block * kTile, c.block_cols);
        if (next_block == 0) {
          write_rows(c, work, slab, first, acc, den_at);
          clear(acc);
          den_at = kTile - den_at;  // the next tile's denominators arrive while these are read
        }
        first = next;
        block = next_block;
      }
    }
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 2)
linear_attention_chunk_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const Tile<T> planes = c.state_tile(), x = c.x_tile(0), a = c.a_tile(0), b = c.b_tile(0);
  Tile<T> scores_tile = {};
  if constexpr (!Traits<T>::kTensorCores) scores_tile = tile_at<T>(g.s_p, g.s_p, kTile, 4);
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    if (work.first == work.stop) continue;
    const int64_t others = g.rows_are_keys ? g.p.L : g.p.M, tiles = tile_count(work);
    EFFVIT_NO_UNROLL
    for (int slab = work.slab; slab < g.slabs; slab += g.slab_loop ? 1 : g.slabs) {
      const int first_col = slab * g.slab_cols;
      float state[kTiles][4];
      clear(state);
      prim::sync_threads();  // the previous slab's readers
      if (g.causal && g.has_x) {
        load_state(c, state, g.state + work.block * g.state_stride + work.split * g.state_split, first_col);
        store_state(c, planes, state);
      }
      load_vectors(c, work, slab);
      EFFVIT_NO_UNROLL
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = work.first + (g.reverse ? tiles - 1 - tile : tile) * kTile;
        float acc[kTiles][4], p[kTiles][4];
        clear(acc);
        // Causal: the own tile. Quadratic: all, and one without keys where there is none.
        const int64_t first_other = g.causal ? first : 0, stop_other = g.causal ? work.stop : others;
        const int64_t last_other = g.causal ? first + 1 : others > 1 ? others : 1;
        EFFVIT_NO_UNROLL
        for (int64_t other = first_other; other < last_other && g.has_x; other += kTile) {
          clear(p);
          EFFVIT_NO_UNROLL
          for (int block = 0; block < g.blocks; ++block) {
            const bool load_x = g.blocks > 1 || other == first_other;
            prim::sync_threads();  // the previous tiles' readers
            if (load_x) load_tile<T>(x, g.x, work, first, work.stop, block * kTile);
            load_tile<T>(a, g.a, work, other, stop_other, block * kTile);
            if (block == 0) load_tile<T>(b, g.b, work, other, stop_other, first_col);
            prim::cp_async_commit();
            if (block == 0 && other == first_other) load_factors(c, work, first);
            prim::cp_async_wait<0>();
            if (load_x) transform_x(c, x, work, first, block, 0, g.den_fused && other == first_other);
            transform_tile<T>(g, a, g.a, work, other, stop_other, block * kTile, false, NoPiece{});
            if (block == 0) transform_tile<T>(g, b, g.b, work, other, stop_other, first_col, false, NoPiece{});
            prim::sync_threads();  // the tiles are complete
            product<T, false, false>(p, 0, kTiles, x, c.warp_row, a, 0, c.block_cols);
            if (g.causal) {
              product<T, false, true>(acc, 0, c.slab_tiles, x, c.warp_row, planes, block * kTile, c.block_cols);
              if (c.warp_row < c.block_cols)
                product<T, true, true>(state, block * c.slab_tiles, c.slab_tiles, a, c.warp_row, b, 0, kTile);
            }
          }
          if (g.causal) {
            const float rho[2] = {g.merged ? c.rho().load(c.row) : 0.f, g.merged ? c.rho().load(c.row + 8) : 0.f};
            EFFVIT_UNROLL
            for (int n = 0; n < kTiles; ++n) {
              EFFVIT_UNROLL
              for (int e = 0; e < 4; ++e) {
                const int i = c.row + e / 2 * 8, j = n * 8 + c.column + e % 2;
                if (g.merged) p[n][e] += rho[e / 2] * c.gamma().load(j);
                if (g.reverse ? j < i : j > i) p[n][e] = 0.f;
              }
            }
          }
          score_product(acc, c.slab_tiles, p, b, scores_tile);
        }
        if (g.has_rank && !g.merged) {
          prim::sync_threads();  // the readers of b
          load_tile<T>(b, g.rank, work, first, work.stop, first_col);
          prim::cp_async_commit();
          if (!g.has_x) load_factors(c, work, first);
          prim::cp_async_wait<0>();
          transform_tile<T>(g, b, g.rank, work, first, work.stop, first_col, false, NoPiece{});
          prim::sync_threads();  // the tile is complete
          const float rho[2] = {c.rho().load(c.row), c.rho().load(c.row + 8)};
          EFFVIT_UNROLL
          for (int n = 0; n < kTiles; ++n) {
            EFFVIT_UNROLL
            for (int e = 0; e < 4; ++e) {
              const int i = c.row + e / 2 * 8, j = n * 8 + c.column + e % 2;
              p[n][e] = (g.reverse ? j < i : j > i) ? 0.f : rho[e / 2] * c.gamma().load(j);
            }
          }
          score_product(acc, c.slab_tiles, p, b, scores_tile);
        }
        write_rows(c, work, slab, first, acc, 0);
        if (!g.causal) continue;
        prim::sync_threads();  // the readers of the state and of zvec
        if (g.has_x) store_state(c, planes, state);
        if (g.has_rank && prim::thread_id() < g.slab_cols) {
          float z = c.zvec().load(prim::thread_id());
          EFFVIT_NO_UNROLL
          for (int j = 0; j < kTile; ++j) z += c.gamma().load(j) * load_element(b, j * b.stride + prim::thread_id());
          c.zvec().store(prim::thread_id(), z);
        }
      }
    }
  }
}

// ---- the fused backward: K and V up to 64, not causal, not quadratic ----

// phi of two neighbouring elements of a tile, and its derivative, which follows from it.
template <class T>
EFFVIT_DEVICE void load_pair(const Tile<T>& from, int i, FeatureMap map, float (&phi)[2]) {
  if constexpr (Traits<T>::kTensorCores) {
    unpack2<T>(from.hi.template load_vec<uint32_t>(i), phi[0], phi[1]);
    apply_map(map, phi);
  } else {  // the tile is an operand
    const auto pair = from.hi.template load_vec<Vec<float, 2>>(i);
    phi[0] = pair.v[0], phi[1] = pair.v[1];
  }
}
EFFVIT_DEVICE float derivative_of(FeatureMap map, float phi) {
  if (map == FeatureMap::kNone) return 1.f;
  if (map == FeatureMap::kRelu) return phi > 0.f ? 1.f : 0.f;
  return map == FeatureMap::kElu1 && phi >= 1.f ? 1.f : phi;
}

// Two elements of an output, where the tile of an input was.
template <class T>
EFFVIT_DEVICE void store_result(const Tile<T>& to, int i, float low, float high) {
  if constexpr (Traits<T>::kTensorCores) {
    to.hi.store_vec(i, prim::pack2<T>(low, high));
  } else {
    to.hi.store_vec(i, Vec<float, 2>{{low, high}});
  }
}

// Writes this warp's 16 rows of a tile of results to [B, length, H, dim].
template <class T>
EFFVIT_DEVICE void write_tile(const Cta<T>& c, const Tile<T>& from, const Work& work, int64_t first, int64_t length,
                              void* out, int dim) {
  constexpr int kVec = Traits<T>::kVec;
  const PieceRows rows = piece_rows(from.shift);
  const int col = rows.column * kVec, n = dim - col < kVec ? dim - col : kVec;
  if (n <= 0) return;
  EFFVIT_NO_UNROLL
  for (int row = rows.first; row < rows.last && first + row < work.stop; row += rows.step) {
    T* const to = static_cast<T*>(out) + ((work.batch * length + first + row) * c.g.p.H + work.head) * dim + col;
    store_output<T>(to, from.hi.template load_vec<Vec<T, kVec>>(row * from.stride + col), n, c.g.out_vec);
  }
}

// Starts to copy a tile of each input into buffer `at`.
template <class T>
EFFVIT_DEVICE void load_inputs(const Cta<T>& c, const Work& work, int64_t first, int at) {
  const Pass& g = c.g;
  load_tile<T>(c.x_tile(at), g.x, work, first, work.stop, 0);
  load_tile<T>(c.b_tile(at), g.b, work, first, work.stop, 0);
  if (g.has_den) load_tile<T>(c.a_tile(at), g.z_rows, work, first, work.stop, 0);
  prim::cp_async_commit();
}

// Starts to copy the first tile, and loads the state, and z or its gradient.
template <class T>
EFFVIT_DEVICE void start_fused(const Cta<T>& c, const Work& work) {
  prim::sync_threads();  // the previous piece of work
  if (work.first == work.stop) return;
  load_inputs(c, work, work.first, 0);
  load_planes(c, c.state_tile(), c.g.state + work.block * c.g.state_stride, 0);
  load_vectors(c, work, 0);
  prim::sync_threads();
}

// Takes phi of the rows that this thread copied where a tile is to be an operand: float32.
template <class T>
EFFVIT_DEVICE void map_rows(const Pass& g, const Tile<T>& tile, const Operand& from, const Work& work, int64_t first) {
  if constexpr (!Traits<T>::kTensorCores) transform_tile<T>(g, tile, from, work, first, work.stop, 0, false, NoPiece{});
}

// Turns do into u = scale do / d where the thread copied it, and leaves -1 / d, of which the gradient of d is a
// multiple, in `row_of`; 0 where d does not depend on q, or there is no query.
template <class T>
EFFVIT_DEVICE void prepare_queries(const Cta<T>& c, const Tile<T>& den, const Tile<T>& u, const Shared<float>& row_of,
                                   const Work& work, int64_t first) {
  constexpr int kVec = Traits<T>::kVec;
  const Pass& g = c.g;
  const auto& p = g.p;
  const bool normalized = p.normalize != Normalize::kNone;
  const PieceRows rows = piece_rows(u.shift);
  const int col = rows.column * kVec;
  float z[kVec];
  EFFVIT_UNROLL
  for (int e = 0; e < kVec; ++e) z[e] = normalized ? c.zden().load(col + e) : 0.f;
  EFFVIT_NO_UNROLL
  for (int row = rows.first; row < rows.last; row += rows.step) {
    const bool inside = first + row < work.stop;
    float factor = p.scale, inverse = 0.f;
    if (normalized) {
      const auto raw = den.hi.template load_vec<Vec<T, kVec>>(row * den.stride + col);
      float x[kVec], dot = 0.f;
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) x[e] = prim::to_float(raw.v[e]);
      apply_map(g.z_rows.map, x);
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) dot += x[e] * z[e];
      for (int m = (1 << u.shift) / 2; m > 0; m /= 2) dot += prim::shuffle_xor(dot, m);
      if (inside) {
        const float d = denominator(p, work, first + row, dot, false);
        factor = p.scale / d;
        inverse = p.normalize == Normalize::kClamp && dot < p.clamp_min ? 0.f : -1.f / d;
      }
      if (rows.column == 0) row_of.store(row, inverse);
    }
    const auto raw = u.hi.template load_vec<Vec<T, kVec>>(row * u.stride + col);
    float x[kVec];
    EFFVIT_UNROLL
    for (int e = 0; e < kVec; ++e) x[e] = inside ? prim::to_float(raw.v[e]) * factor : 0.f;
    store_piece(u, row * u.stride + col, x);
  }
}

// dq, dq_den and the partial sums of dS and dz, in one pass over q, q_den and do: with t = u S^T, the gradient of the
// denominator is r = -(phi(q) . t) / d, that of phi(q) is t + r z, dS = sum phi(q)^T u and dz = sum r phi(q).
template <class T>
EFFVIT_KERNEL(kThreads, Traits<T>::kQueryCtas)
linear_attention_query_gradient_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const Tile<T> planes = c.state_tile();
  const auto& p = g.p;
  const bool normalized = p.normalize != Normalize::kNone;
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    float state[kTiles][4], dz[kTiles][2] = {};
    clear(state);
    start_fused(c, work);
    int at = 0;
    EFFVIT_NO_UNROLL
    for (int64_t first = work.first; first < work.stop; first += kTile) {
      const Tile<T> x = c.x_tile(at), u = c.b_tile(at), den = g.has_den ? c.a_tile(at) : x;
      prim::cp_async_wait<0>();
      prepare_queries(c, den, u, c.row_inverse(), work, first);
      map_rows(g, x, g.x, work, first);
      if (g.has_den) map_rows(g, den, g.z_rows, work, first);
      prim::sync_threads();  // this tile is complete, and the other buffer's readers are done
      at = 1 - at;
      if (first + kTile < work.stop) load_inputs(c, work, first + kTile, at);
      if (c.warp_row < c.block_cols)
        product<T, true, true, Source::kMemory>(state, 0, c.slab_tiles, x, c.warp_row, u, 0, kTile, g.x.map);
      float acc[kTiles][4];
      clear(acc);
      product<T, false, false>(acc, 0, c.slab_tiles, u, c.warp_row, planes, 0, c.block_cols);
      float dot[2] = {0.f, 0.f}, r[2] = {0.f, 0.f};
      if (normalized) {
        EFFVIT_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          EFFVIT_UNROLL
          for (int half = 0; half < 2 && n < c.slab_tiles; ++half) {
            float phi[2];
            load_pair(x, (c.row + 8 * half) * x.stride + n * 8 + c.column, g.x.map, phi);
            dot[half] += phi[0] * acc[n][2 * half] + phi[1] * acc[n][2 * half + 1];
          }
        }
        EFFVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float inverse = c.row_inverse().load(c.row + 8 * half), sum = prim::warp_sum<4>(dot[half]);
          r[half] = inverse == 0.f ? 0.f : sum * inverse;
        }
      }
      prim::sync_threads();  // the readers of x and of u: the results take x's place, the next tile u's
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        EFFVIT_UNROLL
        for (int n = 0; n < kTiles && n < c.slab_tiles; ++n) {
          const int col = n * 8 + c.column, i = (c.row + 8 * half) * x.stride + col;
          float phi[2], y[2] = {acc[n][2 * half], acc[n][2 * half + 1]};
          load_pair(x, i, g.x.map, phi);
          if (normalized) {
            const auto z = c.zden().template load_vec<Vec<float, 2>>(col);
            float rows[2] = {phi[0], phi[1]}, gradient[2];
            if (g.has_den) load_pair(den, i, g.z_rows.map, rows);
            EFFVIT_UNROLL
            for (int e = 0; e < 2; ++e) {
              // Without a gradient of d nothing is added, an infinite z or phi(q) times zero neither.
              gradient[e] = r[half] == 0.f ? 0.f : r[half] * z.v[e];
              dz[n][e] += r[half] == 0.f ? 0.f : r[half] * rows[e];
              if (!g.has_den) y[e] += gradient[e];
            }
            if (g.has_den)
              store_result(den, i, gradient[0] * derivative_of(g.z_rows.map, rows[0]),
                           gradient[1] * derivative_of(g.z_rows.map, rows[1]));
          }
          store_result(x, i, y[0] * derivative_of(g.x.map, phi[0]), y[1] * derivative_of(g.x.map, phi[1]));
        }
      }
      prim::sync_warp();
      write_tile(c, x, work, first, p.L, p.dq, g.dim_x);
      if (g.has_den) write_tile(c, den, work, first, p.L, p.dq_den, g.dim_x);
    }

    float* const to = g.partial + (work.block * g.splits + work.split) * g.slot;
    store_partial(c, to, state, 0);
    if (!normalized) {
      for (int i = prim::thread_id(); i < g.dim_x; i += kThreads) prim::store_global(to + g.slot_z + i, 0.f);
      continue;
    }
    prim::sync_threads();  // the readers of z
    EFFVIT_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      EFFVIT_UNROLL
      for (int e = 0; e < 2; ++e) {
        for (int m = 4; m < prim::kWarpSize; m *= 2) dz[n][e] += prim::shuffle_xor(dz[n][e], m);
        if (c.lane < 4) c.zden().store(prim::warp_id() * kTile + n * 8 + c.column + e, dz[n][e]);
      }
    }
    prim::sync_threads();
    const int i = prim::thread_id();
    if (i < g.dim_x) {
      float total = 0.f;
      for (int w = 0; w < kWarps; ++w) total += c.zden().load(w * kTile + i);
      prim::store_global(to + g.slot_z + i, total);
    }
  }
}

// dk, dv, dk_den and dweight, in one pass over k, v and k_den: dv = w phi(k) dS, and the gradient of w phi(k) is
// t + dz with t = v dS^T, its product with phi(k) that of w. A warp has its own 16 rows of all of them.
template <class T>
EFFVIT_KERNEL(kThreads, Traits<T>::kKeyCtas)
linear_attention_key_gradient_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const Tile<T> planes = c.state_tile();
  const auto& p = g.p;
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    if (work.first == work.stop) continue;
    start_fused(c, work);
    int at = 0;
    EFFVIT_NO_UNROLL
    for (int64_t first = work.first; first < work.stop; first += kTile) {
      const Tile<T> x = c.x_tile(at), v = c.b_tile(at), den = g.has_den ? c.a_tile(at) : x;
      prim::cp_async_wait<0>();
      map_rows(g, x, g.x, work, first);
      if (g.has_den) map_rows(g, den, g.z_rows, work, first);
      prim::sync_warp();  // these rows are complete, and the other buffer's readers are done
      at = 1 - at;
      if (first + kTile < work.stop) load_inputs(c, work, first + kTile, at);
      float dv[kTiles][4], dk[kTiles][4], factor[2], dot[2] = {0.f, 0.f};
      clear(dv);
      clear(dk);
      product<T, false, true, Source::kMemory>(dv, 0, c.slab_tiles, x, c.warp_row, planes, 0, c.block_cols, g.x.map);
      product<T, false, false, Source::kMemory>(dk, 0, c.slab_tiles, v, c.warp_row, planes, 0, c.block_cols);
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t token = first + c.row + 8 * half;
        factor[half] = token < work.stop ? row_factor(g, Factor::kWeight, work, token) : 0.f;
      }
      prim::sync_warp();  // the readers of x and v, whose places the results take
      EFFVIT_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        EFFVIT_UNROLL
        for (int half = 0; half < 2 && n < c.slab_tiles; ++half) {
          const int col = n * 8 + c.column, i = (c.row + 8 * half) * x.stride + col;
          const auto z = c.zden().template load_vec<Vec<float, 2>>(col);
          float phi[2], y[2] = {dk[n][2 * half], dk[n][2 * half + 1]};
          load_pair(x, i, g.x.map, phi);
          if (g.has_den) {
            float rows[2];
            load_pair(den, i, g.z_rows.map, rows);
            dot[half] += (phi[0] * y[0] + phi[1] * y[1]) + (rows[0] * z.v[0] + rows[1] * z.v[1]);
            store_result(den, i, z.v[0] * factor[half] * derivative_of(g.z_rows.map, rows[0]),
                         z.v[1] * factor[half] * derivative_of(g.z_rows.map, rows[1]));
          } else {
            y[0] += z.v[0], y[1] += z.v[1];
            dot[half] += phi[0] * y[0] + phi[1] * y[1];
          }
          store_result(x, i, y[0] * factor[half] * derivative_of(g.x.map, phi[0]),
                       y[1] * factor[half] * derivative_of(g.x.map, phi[1]));
          store_result(v, i, dv[n][2 * half] * factor[half], dv[n][2 * half + 1] * factor[half]);
        }
      }
      if (p.weight != nullptr) {
        EFFVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float sum = prim::warp_sum<4>(dot[half]);
          const int64_t token = first + c.row + 8 * half;
          if (c.lane % 4 == 0 && token < work.stop)
            store_small(p.dweight, (work.batch * p.M + token) * p.H + work.head, p.weight_dtype, sum);
        }
      }
      prim::sync_warp();
      write_tile(c, x, work, first, p.M, p.dk, g.dim_x);
      write_tile(c, v, work, first, p.M, p.dv, g.dim_out);
      if (g.has_den) write_tile(c, den, work, first, p.M, p.dk_den, g.dim_x);
    }
  }
}

// Adds the splits of every element of the states and vectors. `prefix`: each split receives the sum of those before it
// (after it, in reverse), with the initial value; else the first one receives the total.
struct Reduction {
  float* partial;  // [blocks, splits, slot]
  int64_t blocks, slot, slot_z;  // a block is a sequence and head
  int64_t state, z;  // floats of the state and of the vector; state is 0 where there is only the vector
  const float *initial_state, *initial_z;  // [blocks, state], [blocks, z] or null
  float *total_state, *total_z;  // likewise
  int32_t splits;
  bool prefix, reverse;
};

template <class Index>
EFFVIT_KERNEL(kThreads, 8)
linear_attention_reduce_kernel(EFFVIT_GRID_CONSTANT Reduction r) {
  const Index each = r.state + r.z, all = r.blocks * each;
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id() * kThreads + prim::thread_id(); i < all; i += prim::cta_count() * kThreads) {
    const Index block = i / each, element = i - block * each;
    const bool is_z = element >= r.state;
    const Index at = is_z ? block * r.z + element - r.state : block * r.state + element;
    const float* const initial = is_z ? r.initial_z : r.initial_state;
    float* const total = is_z ? r.total_z : r.total_state;
    float* const from = r.partial + block * r.splits * r.slot + (is_z ? r.slot_z + element - r.state : element);
    float sum = initial == nullptr ? 0.f : prim::load_global(initial + at);
    for (int k = 0; k < r.splits; ++k) {
      float* const split = from + (r.reverse ? r.splits - 1 - k : k) * r.slot;
      const float part = prim::load_global(split);
      if (r.prefix) prim::store_global(split, sum);
      sum += part;
    }
    if (!r.prefix) prim::store_global(from, sum);
    if (total != nullptr) prim::store_global(total + at, sum);
  }
}

// out_i = x_i . (z + sum_j factor_j b_j), the sum over the rows j up to i (in reverse: from i on) if causal. b's rows
// are those of x, or what the causal mask pairs them with.
template <class T>
EFFVIT_KERNEL(kThreads, 4)
linear_attention_row_dot_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  constexpr int kStride = kTile + 1;
  const Shared<float> terms(0, kTile * kStride), run(4 * kTile * kStride, kMaxDim),
      half_sum(4 * (kTile * kStride + kMaxDim), kTile);
  const int col_in_block = prim::thread_id() % kTile, half = prim::thread_id() / kTile;
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    const int64_t length = g.rows_are_keys ? g.p.M : g.p.L, tiles = tile_count(work);
    prim::sync_threads();  // the previous piece of work
    const float* const z = g.zvec + work.block * g.zvec_stride + work.split * g.zvec_split;
    for (int i = prim::thread_id(); i < g.dim_x; i += kThreads) run.store(i, prim::load_global(z + i));
    EFFVIT_NO_UNROLL
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = work.first + (g.reverse ? tiles - 1 - tile : tile) * kTile;
      const int rows = work.stop - first < kTile ? static_cast<int>(work.stop - first) : kTile;
      const int half_first = min_of(half * (kTile / 2), rows), half_last = min_of((half + 1) * (kTile / 2), rows);
      // Row i in the order of the walk.
      const auto token_at = [&](int i) { return first + (g.reverse ? rows - 1 - i : i); };
      const auto element = [&](const Operand& from, int64_t token, int col) {
        float x[1] = {prim::to_float(prim::load_global(row_at<T>(from, work, token) + col))};
        apply_map(from.map, x);
        return x[0];
      };
      float dot = 0.f;
      EFFVIT_NO_UNROLL
      for (int block = 0; block < g.dim_x; block += kTile) {
        const int col = block + col_in_block;
        const bool inside = col < g.dim_x;
        if (g.causal && half == 0) {
          float sum = 0.f;
          EFFVIT_NO_UNROLL
          for (int i = half_first; i < half_last && inside; ++i)
            sum += row_factor(g, g.b.factor, work, token_at(i)) * element(g.b, token_at(i), col);
          half_sum.store(col_in_block, sum);
        }
        prim::sync_threads();  // half_sum and run, and the readers of terms
        // The sum over this tile is kept apart from the one before it: a long sequence is not added up term by term.
        const float before = inside ? run.load(col) : 0.f;
        float sum = g.causal && half == 1 ? half_sum.load(col_in_block) : 0.f;
        EFFVIT_NO_UNROLL
        for (int i = half_first; i < half_last; ++i) {
          const int64_t token = token_at(i);
          if (g.causal && inside) sum += row_factor(g, g.b.factor, work, token) * element(g.b, token, col);
          terms.store(i * kStride + col_in_block, inside ? element(g.x, token, col) * (before + sum) : 0.f);
        }
        prim::sync_threads();  // terms, and the readers of run
        if (g.causal && half == 1 && inside) run.store(col, before + sum);
        const int row = prim::thread_id() / 2;
        float part = 0.f;
        EFFVIT_NO_UNROLL
        for (int i = 0; i < kTile / 2 && row < rows; ++i)
          part += terms.load(row * kStride + prim::thread_id() % 2 * (kTile / 2) + i);
        dot += prim::warp_sum<2>(part);
      }
      const int row = prim::thread_id() / 2;
      if (prim::thread_id() % 2 == 0 && row < rows)
        prim::store_global(g.row_sum + (work.batch * length + token_at(row)) * g.p.H + work.head, dot);
    }
  }
}

// Zeros for the tokens that belong to no sequence: `words` 16-bit words a token.
template <class Index>
EFFVIT_KERNEL(kThreads, 8)
linear_attention_fill_kernel(EFFVIT_GRID_CONSTANT LinearAttentionParams p, void* to, Index words) {
  const auto offset = [&](int64_t n) {
    const int32_t at = prim::load_global(p.cu_seqlens + n);
    return linear_attention_range(p, 0, p.L, at, at).begin;
  };
  const Index before = offset(0), after = offset(p.N) < before ? before : offset(p.N);
  const Index all = (before + p.L - after) * words;
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id() * kThreads + prim::thread_id(); i < all; i += prim::cta_count() * kThreads) {
    const Index token = i / words < before ? i / words : i / words - before + after;
    prim::store_global(static_cast<prim::bfloat16*>(to) + token * words + i % words, prim::bfloat16{0});
  }
}

// ---- launch ----

// Quadratic and causal at once is what the causal passes compute.
inline bool is_quadratic(const LinearAttentionParams& p) { return p.quadratic && !p.causal; }
// The backward is fused where the state fits a CTA's registers and the tiles 99 KiB of shared memory, the least that a
// supported GPU has.
inline bool is_fused(const LinearAttentionParams& p) {
  const bool large = p.dtype == DType::kFloat32 && (p.q_den != nullptr || p.k_den != nullptr);
  const int64_t most = large ? kTile / 2 : kTile;
  return !p.causal && !is_quadratic(p) && p.K <= most && p.V <= most;
}

struct Operands {
  Operand q, k, v, grad, q_den, k_den;  // as they are in memory: no map, no factor

  explicit Operands(const LinearAttentionParams& p) {
    const auto make = [&](const void* base, int64_t b, int64_t l, int64_t h, int64_t dim) {
      return Operand{base,
                     b,
                     l,
                     h,
                     static_cast<int32_t>(dim),
                     aligned16(base, element_bytes(p.dtype), {b, l, h}),
                     FeatureMap::kNone,
                     Factor::kOne};
    };
    q = make(p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h, p.K);
    k = make(p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h, p.K);
    v = make(p.v, p.v_stride_b, p.v_stride_l, p.v_stride_h, p.V);
    grad = make(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h, p.V);
    q_den = p.q_den == nullptr ? q : make(p.q_den, p.q_den_stride_b, p.q_den_stride_l, p.q_den_stride_h, p.K);
    k_den = p.k_den == nullptr ? k : make(p.k_den, p.k_den_stride_b, p.k_den_stride_l, p.k_den_stride_h, p.K);
  }
};

inline Operand mapped(Operand x, FeatureMap map, Factor factor = Factor::kOne) {
  x.map = map;
  x.factor = factor;
  return x;
}

inline int32_t padded_cols(int64_t dim) { return dim <= 16 ? 16 : dim <= 32 ? 32 : kTile; }
inline int32_t slab_columns(int64_t rows, int64_t cols) {
  return min_of(rows <= kTile ? kTile : rows <= 2 * kTile ? kTile / 2 : kTile / 4, padded_cols(cols));
}

// How many CTAs share the tiles of a sequence, a head and a slab: about four a multiprocessor in all.
inline int32_t split_count(const LinearAttentionParams& p, int64_t tokens, int64_t slabs, int64_t most,
                           int64_t min_tiles) {
  const int64_t tiles = ceil_div(tokens, kTile), ctas = p.N * p.H * slabs;
  int64_t splits = ceil_div(ceil_div(prim::target_ctas(), 2), ctas < 1 ? 1 : ctas);
  splits = splits < most ? splits : most;
  const int64_t fit = ceil_div(tiles, min_tiles);
  splits = splits < fit ? splits : fit;
  return static_cast<int32_t>(splits < 1 ? 1 : splits);
}

// Of the sums over `tokens`.
inline int32_t sum_splits(const LinearAttentionParams& p, int64_t tokens) {
  const int64_t slabs = is_quadratic(p) ? 1 : ceil_div(p.V, slab_columns(p.K, p.V));
  return split_count(p, tokens, slabs, kMaxSplits, kMinTiles);
}

struct Workspace {
  float *state, *grad;  // [N, H, splits, slot]: the sums over keys, and those over queries
  float *den, *grad_den, *row_sum;
  int32_t key_splits, query_splits;
  int64_t slot, slot_z;
  size_t bytes;

  Workspace(const LinearAttentionParams& p, void* memory, bool backward) {
    const bool quadratic = is_quadratic(p), normalized = p.normalize != Normalize::kNone;
    key_splits = sum_splits(p, p.M);
    query_splits = sum_splits(p, p.L);
    slot_z = quadratic ? 0 : ceil_div(p.K * p.V, 4) * 4;
    slot = slot_z + ceil_div(p.K, 4) * 4;
    int64_t at = 0;
    const auto take = [&](bool used, int64_t floats) {
      float* const from = static_cast<float*>(memory) + at;
      if (used) at += ceil_div(floats, 4) * 4;
      return used && memory != nullptr ? from : nullptr;
    };
    const bool sums = !quadratic || normalized;
    state = take(sums && (!backward || p.causal || quadratic), p.N * p.H * key_splits * slot);
    grad = take(sums && backward, p.N * p.H * query_splits * slot);
    const bool rows = backward && !is_fused(p);
    den = take(normalized && (rows || p.causal), p.B * p.L * p.H);
    grad_den = take(normalized && rows, p.B * p.L * p.H);
    row_sum = take(rows && p.weight != nullptr, p.B * p.M * p.H);
    bytes = static_cast<size_t>(at) * sizeof(float);
  }
};

inline Pass make_pass(const LinearAttentionParams& p, const Workspace& w, int64_t dim_x, int64_t dim_out) {
  Pass g = {};
  g.p = p;
  g.den = w.den, g.grad_den = w.grad_den, g.row_sum = w.row_sum;
  g.slot = w.slot, g.slot_z = w.slot_z;
  g.causal = p.causal;
  g.quadratic = is_quadratic(p);
  g.has_x = true;
  g.dim_x = static_cast<int32_t>(dim_x), g.dim_out = static_cast<int32_t>(dim_out);
  g.blocks = static_cast<int32_t>(ceil_div(dim_x, kTile));
  g.slab_cols = slab_columns(dim_x, dim_out);
  g.slabs = static_cast<int32_t>(ceil_div(dim_out, g.slab_cols));
  return g;
}

enum class Kernel { kState, kWalk, kChunk, kFused };

template <class T>
void plan_shared(Pass& g, Kernel kernel) {
  using Tr = Traits<T>;
  const auto log2 = [](int32_t n) {
    int32_t shift = 0;
    while (n > 1) n /= 2, ++shift;
    return shift;
  };
  const int32_t block_cols = kernel == Kernel::kFused ? g.slab_cols : padded_cols(g.dim_x);
  g.x_shift = log2(block_cols / Tr::kVec);
  g.slab_shift = log2(g.slab_cols / Tr::kVec);
  int32_t at = 0;
  const auto take = [&](int32_t rows, int32_t cols) {
    const int32_t offset = at;
    at += rows * (cols + Tr::kSkew) * static_cast<int32_t>(sizeof(T));
    return offset;
  };
  const auto tiles = [&](int32_t (&hi)[2], int32_t& lo, int32_t cols) {
    hi[0] = take(kTile, cols);
    hi[1] = kernel == Kernel::kChunk ? hi[0] : take(kTile, cols);
    if (Tr::kSplit) lo = take(kTile, cols);
  };
  if ((kernel == Kernel::kWalk || kernel == Kernel::kChunk) && g.has_x) {
    tiles(g.s_x, g.s_x_lo, block_cols);
    g.s_state = take(g.blocks * block_cols, g.slab_cols);
    if (Tr::kSplit) g.s_state_lo = take(g.blocks * block_cols, g.slab_cols);
  }
  if ((kernel == Kernel::kState && g.want_state) || (kernel == Kernel::kChunk && g.has_x))
    tiles(g.s_a, g.s_a_lo, block_cols);
  if ((kernel == Kernel::kState && g.want_state) || kernel == Kernel::kChunk) tiles(g.s_b, g.s_b_lo, g.slab_cols);
  if (kernel == Kernel::kFused) {
    const auto pair = [&](int32_t (&hi)[2]) { hi[0] = take(kTile, block_cols), hi[1] = take(kTile, block_cols); };
    pair(g.s_x);
    pair(g.s_b);
    if (Tr::kSplit && !g.rows_are_keys) g.s_b_lo = take(kTile, block_cols);
    if (g.has_den) pair(g.s_a);
    g.s_state = take(block_cols, block_cols);
    if (Tr::kSplit) g.s_state_lo = take(block_cols, block_cols);
    g.s_vectors = at;
    g.shared_bytes = at + kFusedVectors * 4;
    return;
  }
  // The state pass uses the stage when its tiles are no longer needed, and no vectors. The scores of float32 and the
  // stage share their place: a warp has the same rows of both.
  const bool scores = kernel == Kernel::kChunk && !Tr::kTensorCores;
  g.s_p = at;
  g.s_stage = kernel == Kernel::kState ? 0 : at;
  g.stage_stride = kernel == Kernel::kState ? kTile : (scores ? kTile : g.slab_cols) + 4;
  g.s_vectors = kernel == Kernel::kState ? 0 : g.s_stage + kTile * g.stage_stride * 4;
  const int32_t end = kernel == Kernel::kState ? kTile * g.stage_stride * 4 : g.s_vectors + kVectors * 4;
  g.shared_bytes = at > end ? at : end;
  // An array that a pass does not use lies at 0.
  const int32_t most = kTile * (kTile + Tr::kSkew) * static_cast<int32_t>(sizeof(T));
  if (kernel == Kernel::kChunk && g.shared_bytes < most) g.shared_bytes = most;
}

// One dimension, far below 2^31: a CTA does several pieces of work where there are more.
inline int64_t grid_size(int64_t ctas) { return ctas < (int64_t{1} << 24) ? ctas : int64_t{1} << 24; }

inline void count_ctas(Pass& g) { g.ctas = g.p.N * g.p.H * (g.slab_loop ? 1 : g.slabs) * g.splits; }

template <class T>
cudaError_t launch_state(Pass g, cudaStream_t stream) {
  plan_shared<T>(g, Kernel::kState);
  if (!g.want_state) g.slabs = 1;
  count_ctas(g);
  if (g.ctas == 0) return cudaSuccess;
  return EFFVIT_LAUNCH((linear_attention_state_kernel<T>), grid_size(g.ctas), kThreads, g.shared_bytes, stream, g);
}

template <class T>
cudaError_t launch_rows(Pass g, cudaStream_t stream) {
  const int64_t rows = g.rows_are_keys ? g.p.M : g.p.L;
  const bool chunk = g.causal || (g.quadratic && g.has_x);
  if (!g.causal) g.splits = split_count(g.p, rows, g.slab_loop ? 1 : g.slabs, ceil_div(rows, kTile), 1);
  plan_shared<T>(g, chunk ? Kernel::kChunk : Kernel::kWalk);
  count_ctas(g);
  if (g.ctas == 0 || rows == 0) return cudaSuccess;
  if (chunk)
    return EFFVIT_LAUNCH((linear_attention_chunk_kernel<T>), grid_size(g.ctas), kThreads, g.shared_bytes, stream, g);
  return EFFVIT_LAUNCH((linear_attention_walk_kernel<T>), grid_size(g.ctas), kThreads, g.shared_bytes, stream, g);
}

template <class T>
cudaError_t launch_row_dot(Pass g, cudaStream_t stream) {
  const int64_t rows = g.rows_are_keys ? g.p.M : g.p.L;
  g.slabs = 1;
  if (!g.causal) g.splits = split_count(g.p, rows, 1, ceil_div(rows, kTile), 1);
  count_ctas(g);
  if (g.ctas == 0 || rows == 0) return cudaSuccess;
  constexpr int kBytes = 4 * (kTile * (kTile + 1) + kMaxDim + kTile);
  return EFFVIT_LAUNCH((linear_attention_row_dot_kernel<T>), grid_size(g.ctas), kThreads, kBytes, stream, g);
}

inline cudaError_t launch_reduce(const LinearAttentionParams& p, const Workspace& w, bool grad, const float* state,
                                 const float* z, float* total_state, float* total_z, cudaStream_t stream) {
  const int64_t state_floats = is_quadratic(p) ? 0 : p.K * p.V;
  const Reduction r = {grad ? w.grad : w.state,
                       p.N * p.H,
                       w.slot,
                       w.slot_z,
                       state_floats,
                       p.K,
                       state,
                       z,
                       total_state,
                       total_z,
                       grad ? w.query_splits : w.key_splits,
                       p.causal,
                       grad};
  const int64_t ctas = ceil_div(r.blocks * (state_floats + p.K), kThreads);
  if (ctas == 0) return cudaSuccess;
  return EFFVIT_LAUNCH((linear_attention_reduce_kernel<int64_t>), grid_size(ctas), kThreads, 0, stream, r);
}

inline cudaError_t launch_fill(const LinearAttentionParams& p, void* to, int64_t bytes_per_token, cudaStream_t stream) {
  if (p.cu_seqlens == nullptr || to == nullptr || p.L == 0) return cudaSuccess;
  const int64_t ctas = ceil_div(p.L * bytes_per_token, 16 * kThreads);
  return EFFVIT_LAUNCH((linear_attention_fill_kernel<int64_t>), ctas < prim::target_ctas() ? ctas : prim::target_ctas(),
                       kThreads, 0, stream, p, to, bytes_per_token / 2);
}

// The sums over keys: S and z, in total or as prefixes.
template <class T>
cudaError_t launch_key_sums(const LinearAttentionParams& p, const Workspace& w, float* state, float* z,
                            cudaStream_t stream) {
  const Operands t(p);
  Pass g = make_pass(p, w, p.K, p.V);
  g.rows_are_keys = true;
  g.a = mapped(t.k, p.feature_map, Factor::kWeight);
  g.b = t.v;
  g.z_rows = mapped(t.k_den, p.feature_map);
  g.z_factor = Factor::kWeight;
  g.want_state = !g.quadratic;
  g.z_from_a = g.want_state && g.blocks == 1 && p.k_den == nullptr;
  g.partial = w.state;
  g.splits = w.key_splits;
  const cudaError_t error = launch_state<T>(g, stream);
  if (error != cudaSuccess) return error;
  return launch_reduce(p, w, false, p.initial_state, p.initial_z, state, z, stream);
}

// Where a pass finds z, or its gradient.
inline void set_vector(Pass& g, const Workspace& w, bool grad) {
  const auto& p = g.p;
  if (grad || p.causal || g.quadratic) {
    const int32_t splits = grad ? w.query_splits : w.key_splits;
    const float* const parts = grad ? w.grad : w.state;
    g.zvec = parts == nullptr ? nullptr : parts + w.slot_z;
    g.zvec_stride = splits * w.slot;
    g.zvec_split = p.causal ? w.slot : 0;
  } else {
    g.zvec = p.z;
    g.zvec_stride = p.K;
  }
  if (p.causal) g.splits = w.query_splits;
}
// Where it finds S, or its gradient.
inline void set_state(Pass& g, const Workspace& w, bool grad, bool transposed) {
  const auto& p = g.p;
  if (grad || p.causal) {
    g.state = grad ? w.grad : w.state;
    g.state_stride = (grad ? w.query_splits : w.key_splits) * w.slot;
    g.state_split = p.causal ? w.slot : 0;
  } else {
    g.state = p.state;
    g.state_stride = p.K * p.V;
  }
  g.state_row = static_cast<int32_t>(transposed ? 1 : p.V);
  g.state_col = static_cast<int32_t>(transposed ? p.V : 1);
  g.state_vec = g.state_col == 1 && g.state_row % 4 == 0 && aligned16(g.state, 4, {g.state_stride, g.state_split});
}

template <class T>
cudaError_t launch_denominators(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Operands t(p);
  Pass g = make_pass(p, w, p.K, 1);
  set_vector(g, w, false);
  g.x = mapped(t.q_den, p.feature_map);
  g.b = mapped(t.k_den, p.feature_map, Factor::kWeight);
  g.row_sum = w.den;
  return launch_row_dot<T>(g, stream);
}

// phi(q) S and what becomes of it: the output, or the gradient of the denominators.
template <class T>
cudaError_t launch_queries(const LinearAttentionParams& p, const Workspace& w, Epilogue epilogue, cudaStream_t stream) {
  const Operands t(p);
  Pass g = make_pass(p, w, p.K, p.V);
  set_vector(g, w, false);
  set_state(g, w, false, false);
  g.zden = g.zvec, g.zden_stride = g.zvec_stride;
  g.den_fused = p.normalize != Normalize::kNone && !p.causal;
  g.z_rows = mapped(t.q_den, p.feature_map);
  g.x = mapped(t.q, p.feature_map);
  g.a = mapped(t.k, p.feature_map, Factor::kWeight);
  g.b = t.v;
  g.e = t.grad;
  g.epilogue = epilogue;
  g.slab_loop = epilogue == Epilogue::kRows && g.slabs > 1;
  g.out = p.out;
  g.out_vec = aligned16(p.out, element_bytes(p.dtype), {p.V});
  return launch_rows<T>(g, stream);
}

// The gradients of rows: dq, dk (with x), dq_den, dk_den (without).
template <class T>
cudaError_t launch_gradient(const LinearAttentionParams& p, const Workspace& w, bool keys, bool den, void* out,
                            cudaStream_t stream) {
  const Operands t(p);
  const bool normalized = p.normalize != Normalize::kNone, quadratic = is_quadratic(p);
  Pass g = make_pass(p, w, den ? 1 : p.V, p.K);
  g.rows_are_keys = g.reverse = keys;
  g.has_x = !den;
  set_vector(g, w, keys);
  set_state(g, w, keys, true);
  const Operand query = mapped(t.q, p.feature_map), key = mapped(t.k, p.feature_map, Factor::kWeight);
  const Operand u = mapped(t.grad, FeatureMap::kNone, Factor::kGradScale);
  const void* const own_den = keys ? p.k_den : p.q_den;
  const void* const other_den = keys ? p.q_den : p.k_den;
  g.x = keys ? t.v : u;
  g.a = keys ? u : t.v;
  g.b = keys ? query : key;
  // The vector under a key's gradient is there without a normaliser, too: it starts from grad_z.
  g.with_rho = (den || own_den == nullptr) && (normalized || (keys && !quadratic));
  g.rho = keys ? Factor::kOne : Factor::kGradDen;
  g.gamma = keys ? Factor::kGradDen : Factor::kOne;
  g.rank = keys ? mapped(t.q_den, p.feature_map) : mapped(t.k_den, p.feature_map, Factor::kWeight);
  g.has_rank = p.causal && g.with_rho && normalized;
  g.merged = g.has_rank && !den && other_den == nullptr;
  g.epilogue = Epilogue::kGradient;
  g.e = mapped(den ? (keys ? t.k_den : t.q_den) : (keys ? t.k : t.q), p.feature_map);
  g.out = out;
  g.out_vec = aligned16(out, element_bytes(p.dtype), {p.K});
  g.out_factor = keys ? Factor::kWeight : Factor::kOne;
  return launch_rows<T>(g, stream);
}

template <class T>
cudaError_t launch_value_gradient(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Operands t(p);
  Pass g = make_pass(p, w, p.K, p.V);
  g.rows_are_keys = g.reverse = true;
  set_vector(g, w, true);
  set_state(g, w, true, false);
  if (p.weight != nullptr && g.zvec != nullptr) {
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
  g.out = p.dv;
  g.out_vec = aligned16(p.dv, element_bytes(p.dtype), {p.V});
  return launch_rows<T>(g, stream);
}

// The sums over queries: the gradients of S and z, in total or as suffixes.
template <class T>
cudaError_t launch_query_sums(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Operands t(p);
  const bool normalized = p.normalize != Normalize::kNone;
  Pass g = make_pass(p, w, p.K, p.V);
  g.a = mapped(t.q, p.feature_map);
  g.b = mapped(t.grad, FeatureMap::kNone, Factor::kGradScale);
  g.z_rows = mapped(t.q_den, p.feature_map);
  if (!normalized) g.z_rows.base = nullptr;
  g.z_factor = Factor::kGradDen;
  g.want_state = !g.quadratic;
  g.z_from_a = g.want_state && g.blocks == 1 && p.q_den == nullptr && normalized;
  g.partial = w.grad;
  g.splits = w.query_splits;
  const cudaError_t error = launch_state<T>(g, stream);
  if (error != cudaSuccess) return error;
  return launch_reduce(p, w, true, p.grad_state, p.grad_z, p.dinitial_state, p.dinitial_z, stream);
}

template <class T>
cudaError_t launch_fused_backward(const LinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  const Operands t(p);
  const auto plan = [&](bool keys) {
    Pass g = make_pass(p, w, p.K, p.V);
    g.rows_are_keys = keys;
    set_vector(g, w, keys);
    set_state(g, w, keys, false);
    g.zden = g.zvec, g.zden_stride = g.zvec_stride;
    g.den_fused = true;
    g.x = mapped(keys ? t.k : t.q, p.feature_map);
    g.b = keys ? t.v : t.grad;
    g.z_rows = mapped(keys ? t.k_den : t.q_den, p.feature_map);
    g.has_den = (keys ? p.k_den : p.q_den) != nullptr;
    g.partial = w.grad;
    g.slab_cols = padded_cols(p.K < p.V ? p.V : p.K);
    g.slabs = 1;
    const bool q_vec = aligned16(keys ? p.dk : p.dq, element_bytes(p.dtype), {p.K});
    const bool den_vec = aligned16(keys ? p.dk_den : p.dq_den, element_bytes(p.dtype), {p.K});
    const bool v_vec = !keys || aligned16(p.dv, element_bytes(p.dtype), {p.V});
    g.out_vec = q_vec && den_vec && v_vec;
    g.splits = keys ? split_count(p, p.M, 1, ceil_div(p.M, kTile), 1) : w.query_splits;
    plan_shared<T>(g, Kernel::kFused);
    count_ctas(g);
    return g;
  };
  const Pass queries = plan(false), keys = plan(true);
  if (queries.ctas == 0) return cudaSuccess;
  cudaError_t status = EFFVIT_LAUNCH((linear_attention_query_gradient_kernel<T>), grid_size(queries.ctas), kThreads,
                                     queries.shared_bytes, stream, queries);
  if (status != cudaSuccess) return status;
  status = launch_reduce(p, w, true, p.grad_state, p.grad_z, p.dinitial_state, p.dinitial_z, stream);
  if (status != cudaSuccess || p.M == 0) return status;
  return EFFVIT_LAUNCH((linear_attention_key_gradient_kernel<T>), grid_size(keys.ctas), kThreads, keys.shared_bytes,
                       stream, keys);
}

// Bytes from the first to the last element of [B, tokens, H, dim].
inline uint64_t extent_bytes(const LinearAttentionParams& p, int64_t tokens, int64_t b, int64_t l, int64_t h,
                             int64_t dim, DType type) {
  if (p.B * tokens * p.H == 0) return 0;
  return static_cast<uint64_t>(((p.B - 1) * b + (tokens - 1) * l + (p.H - 1) * h + dim) * element_bytes(type));
}

inline void register_inputs(prim::GlobalRanges& ranges, const LinearAttentionParams& p) {
  ranges.read(p.q, extent_bytes(p, p.L, p.q_stride_b, p.q_stride_l, p.q_stride_h, p.K, p.dtype));
  ranges.read(p.k, extent_bytes(p, p.M, p.k_stride_b, p.k_stride_l, p.k_stride_h, p.K, p.dtype));
  ranges.read(p.v, extent_bytes(p, p.M, p.v_stride_b, p.v_stride_l, p.v_stride_h, p.V, p.dtype));
  ranges.read(p.q_den, extent_bytes(p, p.L, p.q_den_stride_b, p.q_den_stride_l, p.q_den_stride_h, p.K, p.dtype));
  ranges.read(p.k_den, extent_bytes(p, p.M, p.k_den_stride_b, p.k_den_stride_l, p.k_den_stride_h, p.K, p.dtype));
  ranges.read(p.weight,
              extent_bytes(p, p.M, p.weight_stride_b, p.weight_stride_l, p.weight_stride_h, 1, p.weight_dtype));
  ranges.read(p.cu_seqlens, static_cast<uint64_t>((p.N + 1) * 4));
  ranges.read(p.initial_state, static_cast<uint64_t>(p.N * p.H * p.K * p.V * 4));
  ranges.read(p.initial_z, static_cast<uint64_t>(p.N * p.H * p.K * 4));
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
    if (w.state != nullptr) status = launch_key_sums<T>(p, w, p.state, p.z, stream);
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
  ranges.read(p.grad_out,
              extent_bytes(p, p.L, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h, p.V, p.dtype));
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
    then(!fused && w.state != nullptr, [&] { return launch_key_sums<T>(p, w, nullptr, nullptr, stream); });
    then(normalized && p.causal, [&] { return launch_denominators<T>(p, w, stream); });
    then(!fused && normalized, [&] { return launch_queries<T>(p, w, Epilogue::kRows, stream); });
    then(!fused && w.grad != nullptr, [&] { return launch_query_sums<T>(p, w, stream); });
    then(!fused, [&] { return launch_gradient<T>(p, w, false, false, p.dq, stream); });
    then(!fused, [&] { return launch_gradient<T>(p, w, true, false, p.dk, stream); });
    then(!fused && p.q_den != nullptr, [&] { return launch_gradient<T>(p, w, false, true, p.dq_den, stream); });
    then(!fused && p.k_den != nullptr, [&] { return launch_gradient<T>(p, w, true, true, p.dk_den, stream); });
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
