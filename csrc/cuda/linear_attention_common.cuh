// What the passes of linear attention share: pass descriptors, rows and their factors, tiles. See linear_attention.cuh.
#pragma once
#include "../common/linear_attention_params.h"
#include "tile/plan.cuh"
#include "tile/product.cuh"

namespace effvit {
namespace cuda {
namespace linear_attention_impl {

using namespace tile;

constexpr int kMaxDim = 256;
constexpr int kMaxSplits = 32;
constexpr int kMinTiles = 2;  // of a split

// CTAs a multiprocessor of the fused backward, as many as shared memory lets in or registers without spills.
template <class T>
constexpr int kQueryCtas = kTensorCores<T> ? 3 : 2;
template <class T>
constexpr int kKeyCtas = kTensorCores<T> ? 4 : 2;

// ---- the descriptor of a pass ----

enum class Side : int32_t { kQueries, kKeys };

// The rows of the other side that a row sums over beyond the state: none; those of its own tile that the causal mask
// lets it see; all of them (quadratic).
enum class Others : int32_t { kNone, kOwnTile, kAll };

// What a row is multiplied with: the weight of a key, scale / d of a query, or the gradient of its denominator.
enum class Factor : int32_t { kOne, kWeight, kGradScale, kGradDen };

// The term of rank one, rho_i (z + sum_j gamma_j rank_j): absent, z alone, with rows of its own, or with those of b,
// when it is added to the scores.
enum class RankOne : int32_t { kNone, kVector, kOwnRows, kMerged };

// Where denominators come from: `den` has them; x . z while x passes by; or likewise from rows of their own, z_rows.
enum class Denominator : int32_t { kGiven, kOfX, kOfRows };

// What the state pass sums up to z beside the state: nothing, a's rows while they pass by, or z_rows.
enum class VectorSum : int32_t { kZeros, kOfA, kOfRows };

enum class Epilogue : int32_t {
  kOut,  // y scale / d
  kGradient,  // y phi'(e) factor
  kValueGradient,  // y factor; dweight from y . e
  kRows,  // y . e gives the gradient of the denominator
};

// A row is phi(x) * factor. dim 0: there are none.
struct Rows : Tokens {
  FeatureMap map;
  Factor factor;
};

// One block per sequence, head and, causal, split.
struct States {
  const float* base;  // element (row, column) of a block at row * row_stride + column * col_stride
  int64_t stride, split_stride;  // from head to head, splits counted; from split to split, 0 where all share one
  int32_t row_stride, col_stride;
  bool vec;  // rows may be read 16 bytes at a time
};
struct Vectors {
  const float* base;  // null: zeros
  int64_t stride, split_stride;
};

struct Pass {
  LinearAttentionParams p;
  Side side;  // of the rows that are computed, or summed up
  Others others;
  RankOne rank_one;
  Denominator denominator;
  VectorSum vector_sum;
  Epilogue epilogue;

  Rows x, a, b;  // y_i = x_i S + sum_j (x_i . a_j) b_j; the state pass sums up a^T b
  Rows rank, z_rows;
  Rows e;  // of the epilogue
  Factor rho, gamma, out_factor, z_factor;
  States state;
  Vectors z;

  float* den;  // [B, L, H] phi(q) . z, before eps
  float* grad_den;  // [B, L, H] gradient of the denominator
  float* row_sum;  // [B, rows, H] row_dot's result; the sum over slabs for dweight
  bool row_sum_given;  // that sum starts from what is there
  float* partial;  // state pass: [N, H, splits, slot]
  int64_t slot, slot_z;  // floats of a state and a vector in the workspace; where in a slot the vector is
  void* out;  // [B, rows, H, dim_out], contiguous
  bool out_vec;

  int32_t dim_x, dim_out;
  int32_t blocks, x_shift;  // blocks of columns of x and a, and log2 of a block's pieces
  int32_t slab_cols, slab_shift, slabs;
  bool slab_loop;  // a CTA does all slabs, one after the other, for it sums over them
  int32_t splits;
  int64_t ctas;
  // Byte offsets in shared memory.
  int32_t s_x[2], s_x_lo, s_a[2], s_a_lo, s_b[2], s_b_lo, s_state, s_state_lo, s_p, s_stage, s_vectors, shared_bytes;
  int32_t stage_cols;

  EFFVIT_HD bool has_x() const { return x.dim != 0; }  // false: there is only the term of rank one
  EFFVIT_HD bool has_state() const { return a.dim != 0; }  // of the state pass; false: only the vector
  EFFVIT_HD bool causal() const { return others == Others::kOwnTile; }
  EFFVIT_HD bool reverse() const { return side == Side::kKeys; }  // a causal walk of keys begins at the last one
  EFFVIT_HD bool has_rank_rows() const { return rank_one == RankOne::kOwnRows || rank_one == RankOne::kMerged; }
  EFFVIT_HD int64_t length() const { return side == Side::kKeys ? p.M : p.L; }
  EFFVIT_HD int64_t other_length() const { return side == Side::kKeys ? p.L : p.M; }
};

// The vectors in shared memory, in floats from s_vectors.
constexpr int kZden = 0, kZvec = kMaxDim, kRowDen = kZvec + kTile, kRho = kRowDen + 2 * kTile, kGamma = kRho + kTile;
constexpr int kRowSum = kGamma + kTile, kZlow = kRowSum + kTile, kVectors = kZlow + kTile;
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
  work.head = static_cast<int>(take_index(id, p.H));
  work.slab = static_cast<int>(take_index(id, g.slab_loop ? 1 : g.slabs));
  work.split = static_cast<int>(take_index(id, g.splits));
  const int64_t n = id;
  work.block = n * p.H + work.head;
  int64_t tokens = g.length();
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

// sum += x, what rounding takes off kept in `low`: however many terms, the sum is off by the rounding of one. An
// infinite sum stays.
EFFVIT_DEVICE void add_compensated(float& sum, float& low, float x) {
  const float y = x + low, after = sum + y, lost = y - (after - sum);
  low = lost - lost == 0.f ? lost : 0.f;
  sum = after;
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

// A tile whose rows have 1 << shift pieces.
template <class T>
struct WideTile : Tile<Wide<T>> {
  int shift = 0;

  WideTile() = default;
  EFFVIT_DEVICE WideTile(int hi, int lo, int rows, int pieces_shift)
      : Tile<Wide<T>>(hi, lo, rows, kVec<T> << pieces_shift), shift(pieces_shift) {}
};

template <class T>
EFFVIT_DEVICE const T* row_at(const Rows& from, const Work& work, int64_t token) {
  return token_row<T>(from, work.batch, token, work.head);
}

// Starts to copy columns [col, ...) of 64 tokens; zeros where there is no token or column.
template <class T>
EFFVIT_DEVICE void load_tile(const WideTile<T>& to, const Rows& from, const Work& work, int64_t first, int64_t stop,
                             int col) {
  const int piece = piece_col<T>(to.shift), length = piece_length<T>(from.dim - col - piece);
  const T* const base = row_at<T>(from, work, first) + col + piece;
  for_each_piece_row(to.shift, [&](int row) {
    const int n = first + row < stop ? length : 0;
    copy_piece(to.hi, row * to.stride + piece, base + row * from.stride_l, n, from.vec);
  });
}

// phi of a piece; and times a factor where elements exist, zeros beyond.
template <class T>
EFFVIT_DEVICE void map_piece(const Piece<T>& raw, FeatureMap map, float (&x)[kVec<T>]) {
  to_floats<T>(raw, x);
  apply_map(map, x);
}
template <class T>
EFFVIT_DEVICE void scale_piece(float (&x)[kVec<T>], float factor, int length) {
  EFFVIT_UNROLL
  for (int e = 0; e < kVec<T>; ++e) x[e] = e < length ? x[e] * factor : 0.f;
}

struct NoPiece {
  template <class X>
  EFFVIT_DEVICE void operator()(int, int, const X&) const {}
};

// Turns the pieces that this thread copied into the operand phi(x) * factor. piece(row, col, x) sees each of them in
// float32; rows and columns that do not exist are zeros.
template <class T, class F = NoPiece>
EFFVIT_DEVICE void transform_tile(const Pass& g, const WideTile<T>& tile, const Rows& from, const Work& work,
                                  int64_t first, int64_t stop, int col, bool visit = false, const F& piece = {}) {
  const bool same = !Wide<T>::kSplit && from.map == FeatureMap::kNone &&
                    (from.factor == Factor::kOne || (from.factor == Factor::kWeight && g.p.weight == nullptr));
  if (same && !visit) return;
  const int at = piece_col<T>(tile.shift), length = piece_length<T>(from.dim - col - at);
  for_each_piece_row(tile.shift, [&](int row) {
    const bool inside = first + row < stop;
    float x[kVec<T>];
    map_piece<T>(tile.hi.template load_vec<Piece<T>>(row * tile.stride + at), from.map, x);
    scale_piece<T>(x, inside ? row_factor(g, from.factor, work, first + row) : 0.f, inside ? length : 0);
    piece(row, at, x);
    if (!same) store_piece(tile, row * tile.stride + at, x);
  });
}

// ---- what a CTA works with ----

template <class T>
struct Cta {
  const Pass& g;
  int lane, warp_row, row, column;  // the lane's accumulators: see tile.cuh
  int block_cols, slab_tiles, tiles_shift;

  EFFVIT_DEVICE explicit Cta(const Pass& pass)
      : g(pass),
        lane(prim::lane_id()),
        warp_row(tile::warp_row()),
        row(acc_row()),
        column(acc_col()),
        block_cols(kVec<T> << pass.x_shift),
        slab_tiles(pass.slab_cols / 8),
        tiles_shift(pass.slab_cols == 64   ? 3
                    : pass.slab_cols == 32 ? 2
                                           : 1) {}

  EFFVIT_DEVICE Shared<float> vector(int at, int count) const { return Shared<float>(g.s_vectors + 4 * at, count); }
  EFFVIT_DEVICE Shared<float> zden() const { return vector(kZden, kMaxDim); }
  EFFVIT_DEVICE Shared<float> zvec() const { return vector(kZvec, kTile); }
  EFFVIT_DEVICE Shared<float> zlow() const { return vector(kZlow, kTile); }  // what zvec's additions lost
  EFFVIT_DEVICE Shared<float> row_den() const { return vector(kRowDen, 2 * kTile); }
  EFFVIT_DEVICE Shared<float> rho() const { return vector(kRho, kTile); }
  EFFVIT_DEVICE Shared<float> gamma() const { return vector(kGamma, kTile); }
  EFFVIT_DEVICE Shared<float> row_sum() const { return vector(kRowSum, kTile); }
  EFFVIT_DEVICE Shared<float> row_inverse() const { return vector(kFusedRow, kTile); }
  EFFVIT_DEVICE Tile<Native<float>> stage() const { return Tile<Native<float>>(g.s_stage, kTile, g.stage_cols); }
  EFFVIT_DEVICE WideTile<T> x_tile(int i) const {
    return WideTile<T>(i == 0 ? g.s_x[0] : g.s_x[1], g.s_x_lo, kTile, g.x_shift);
  }
  EFFVIT_DEVICE WideTile<T> a_tile(int i) const {
    return WideTile<T>(i == 0 ? g.s_a[0] : g.s_a[1], g.s_a_lo, kTile, g.x_shift);
  }
  EFFVIT_DEVICE WideTile<T> b_tile(int i) const {
    return WideTile<T>(i == 0 ? g.s_b[0] : g.s_b[1], g.s_b_lo, kTile, g.slab_shift);
  }
  EFFVIT_DEVICE WideTile<T> state_tile() const {
    return WideTile<T>(g.s_state, g.s_state_lo, g.blocks * block_cols, g.slab_shift);
  }

  // The state in accumulators: tile i holds columns state_col(i) of the slab, of block state_block(i) of its rows.
  EFFVIT_DEVICE int state_block(int i) const { return i >> tiles_shift; }
  EFFVIT_DEVICE int state_col(int i) const { return (i & (slab_tiles - 1)) * 8 + column; }
};

// A slab of the state as an operand. Neighbouring threads read neighbouring addresses: those of a row's pieces, or of a
// transposed state rows.
template <class T>
EFFVIT_DEVICE void load_planes(const Cta<T>& c, const WideTile<T>& to, const float* from, int first_col) {
  const Pass& g = c.g;
  const int rows = g.blocks * c.block_cols;
  const bool transposed = g.state.col_stride != 1;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < rows << to.shift; i += kThreads) {
    const int row = transposed ? i % rows : i >> to.shift;
    const int piece = (transposed ? i / rows : i & ((1 << to.shift) - 1)) * kVec<T>, col = first_col + piece;
    const float* const at =
        from + static_cast<int64_t>(row) * g.state.row_stride + static_cast<int64_t>(col) * g.state.col_stride;
    float x[kVec<T>];
    if (g.state.vec && row < g.dim_x && col + kVec<T> <= g.dim_out) {
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<T>; e += 4) {
        const auto four = prim::load_global_vec<Vec<float, 4>>(at + e);
        EFFVIT_UNROLL
        for (int f = 0; f < 4; ++f) x[e + f] = four.v[f];
      }
    } else {
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<T>; ++e) {
        const bool inside = row < g.dim_x && col + e < g.dim_out;
        x[e] = inside ? prim::load_global(at + static_cast<int64_t>(e) * g.state.col_stride) : 0.f;
      }
    }
    store_piece(to, row * to.stride + piece, x);
  }
}

// A slab of the state from accumulators to the workspace.
template <class T>
EFFVIT_DEVICE void store_partial(const Cta<T>& c, float* to, const float (&state)[kTiles][4], int first_col) {
  if (c.warp_row >= c.block_cols) return;
  for_each_acc<kTiles>(kTiles, [&](int i, int e) {
    const int row = c.state_block(i) * kTile + c.row + e / 2 * 8, col = first_col + c.state_col(i) + e % 2;
    if (row < c.g.dim_x && col < c.g.dim_out)
      prim::store_global(to + static_cast<int64_t>(row) * c.g.dim_out + col, state[i][e]);
  });
}

// A slab's columns of the vector of the term of rank one, and all of z where it gives denominators. A barrier must
// follow.
template <class T>
EFFVIT_DEVICE void load_vectors(const Cta<T>& c, const Work& work, int slab) {
  const Pass& g = c.g;
  const int i = prim::thread_id(), col = slab * g.slab_cols + i;
  const float* const from = g.z.base + work.block * g.z.stride + work.split * g.z.split_stride;
  if (g.rank_one != RankOne::kNone && i < g.slab_cols) {
    c.zvec().store(i, col < g.dim_out ? prim::load_global(from + col) : 0.f);
    if (g.has_rank_rows()) c.zlow().store(i, 0.f);
  }
  if (g.denominator != Denominator::kGiven) {
    for (int k = i; k < g.blocks * kTile; k += kThreads)
      c.zden().store(k, k < g.dim_x ? prim::load_global(from + k) : 0.f);
  }
}

}  // namespace linear_attention_impl
}  // namespace cuda
}  // namespace effvit
