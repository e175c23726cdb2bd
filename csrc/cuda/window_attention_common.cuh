// What the passes of window attention share: the plan, tokens, loads, scores. See window_attention.cuh.
#pragma once
#include "../common/window_attention_params.h"
#include "tile/plan.cuh"
#include "tile/product.cuh"

namespace effvit {
namespace cuda {
namespace window_attention_impl {

using namespace tile;

constexpr int kStreamCols = 64;  // columns of an operand in shared memory when whole rows do not fit
constexpr int kOutCols = 32;  // columns of a gradient computed at a time where whole rows are written at once
constexpr float kNormEps = 1e-12f;
constexpr float kLogitScaleMax = 4.605170185988092f;  // ln 100
constexpr int kMaxTableInShared = 32 * 1024;  // bytes; a larger table is read from global memory

// Key metadata: table offset * 32 + (outside the map) * 16 + shift region. Queries have no outside bit.
constexpr int kRegionBits = 15, kInvalid = 15, kOutside = 16, kMetaShift = 5;
constexpr int kNowhere = -2;  // y of a row that holds no token

static_assert(kThreads == 2 * kTile, "one thread places each query and key token; two sum up each row");
static_assert(kStreamCols % kOutCols == 0, "streamed columns are whole output blocks");

template <class T>
struct Traits {
  static constexpr int kPad = kTensorCores<T> ? 16 : 8;  // head dims are padded with zeros to a multiple
  static constexpr int kStepK = kTensorCores<T> ? 16 : 4;  // depth of one step of a matrix product
  static_assert(kPad % kVec<T> == 0 && kPad % kStepK == 0, "padded rows hold whole vectors and steps");
  static_assert(kTile % kStepK == 0 && kStreamCols % kPad == 0, "tiles hold whole steps");
  static_assert(conflict_free<T>(kPad), "row stride must be an odd multiple of 16 bytes");
};

EFFVIT_DEVICE float infinity() { return prim::bit_cast<float>(0x7f800000u); }
EFFVIT_DEVICE float magnitude(float x) { return x < 0.f ? -x : x; }

// ---- the plan: everything a kernel needs, computed once on the host ----

enum Pass : int { kForward, kFused, kDq, kDkv, kTable };

// Rows [B, H, W, h, cols] of an input, last stride 1; strides in elements.
struct MapRows {
  const void* base;
  int64_t stride_b, stride_y, stride_x, stride_h;
  int32_t cols;
  bool vec;  // every row is a multiple of 16 bytes
  const void* pad;  // [h, cols]: rows that stand for tokens outside the map, or null
  bool pad_vec;
};
// A gradient: token t (a flat index into [B, H, W]) of head j at base + t * stride_t + j * cols.
struct MapGradient {
  void* base;
  int64_t stride_t;
  int32_t cols;
  bool vec;
};

struct Plan {
  WindowAttentionParams p;
  MapRows q, k, v, grad, out;
  MapGradient dq, dk, dv;
  WindowAxis axis_y, axis_x;
  int32_t queries, keys, key_w;  // tokens of a window, and of its halo'd keys; width of the latter
  int32_t slot_rows, slots;  // rows of a tile that one window takes; windows of a tile
  int32_t q_tiles, k_tiles;
  int32_t table_w, table_size;
  int64_t windows, windows_per_map, tiles;  // tiles = groups of `slots` windows
  int32_t walks;  // CTAs that share the tiles of one head and tile position
  int64_t ctas;
  int32_t cols, col_chunks;  // output columns of a CTA; CTAs that share them
  int32_t d_pad, dv_pad;
  int32_t d_cols, dv_cols;  // columns of an operand in shared memory at a time
  bool resident;  // whole rows are
  bool table_in_shared;
  int32_t partial_range;  // floats of one table partial
  int32_t small_partials, small_stride;  // partial rows per head: d + dv + {sum of dS s outside, sum of dS s}
  float* table_partials;  // [h, walks, q_tiles, k_tiles, partial_range]
  float* small_sums;  // [h, small_partials, small_stride]
  // Byte offsets in shared memory.
  int32_t s_q, s_k, s_v, s_g, s_p, s_ds, s_stage, s_q_token, s_k_token, s_k_meta, s_rows, s_pad, s_table, shared_bytes;
};

EFFVIT_HD int32_t query_table_offset(const Plan& g, int32_t i) {
  const int32_t y = i / g.axis_x.window, x = i - y * g.axis_x.window;
  return (y + g.axis_y.window - 1 + 2 * g.axis_y.halo) * g.table_w + x + g.axis_x.window - 1 + 2 * g.axis_x.halo;
}
EFFVIT_HD int32_t key_table_offset(const Plan& g, int32_t j) {
  const int32_t y = j / g.key_w;
  return y * g.table_w + j - y * g.key_w;
}
// The table entries that pairs of query tile qt and key tile kt can reach: [first, first + count).
EFFVIT_HD void table_range(const Plan& g, int32_t qt, int32_t kt, int32_t& first, int32_t& count) {
  const int32_t q_end = min_of(g.queries, (qt + 1) * kTile), k_end = min_of(g.keys, (kt + 1) * kTile);
  first = query_table_offset(g, qt * kTile) - key_table_offset(g, k_end - 1);
  count = query_table_offset(g, q_end - 1) - key_table_offset(g, kt * kTile) + 1 - first;
}

// ---- what a CTA works with ----

using Int4 = Vec<int, 4>;  // a token: b, y, x, metadata

// The row of a token at one head. Without a pad row a token outside the map has no columns.
template <class T>
EFFVIT_DEVICE Row<T> token_row(const MapRows& from, int head, const Int4& token) {
  if (token.v[1] == -1 && from.pad != nullptr)
    return {static_cast<const T*>(from.pad) + static_cast<int64_t>(head) * from.cols, from.cols, from.pad_vec};
  const T* const base = static_cast<const T*>(from.base) + head * from.stride_h;
  if (token.v[1] < 0) return {base, 0, false};
  return {base + token.v[0] * from.stride_b + token.v[1] * from.stride_y + token.v[2] * from.stride_x, from.cols,
          from.vec};
}

// Natural-log scale of one head's logits.
EFFVIT_DEVICE float head_scale(const Plan& g, int head) {
  if (g.p.logit_scale == nullptr) return g.p.scale;
  const float tau = load_small(g.p.logit_scale, head, g.p.logit_scale_dtype);
  return prim::exp(tau > kLogitScaleMax ? kLogitScaleMax : tau);
}

// What a CTA does: one head, tile position and chunk of columns, and every `walks`th group of windows. The walk is
// slowest and the head fastest, so that concurrent CTAs read the heads of the same windows.
struct Position {
  int head, chunk, q_tile, k_tile, walk;
};
EFFVIT_DEVICE Position cta_position(const Plan& g, int q_tiles, int k_tiles) {
  int64_t i = prim::cta_id();
  const auto take = [&](int64_t n) { return static_cast<int>(take_index(i, n)); };
  Position at;
  at.head = take(g.p.h);
  at.chunk = take(g.col_chunks);
  at.q_tile = take(q_tiles);
  at.k_tile = take(k_tiles);
  at.walk = static_cast<int>(i);
  return at;
}

// Floats of a row's statistics in shared memory, from s_rows on.
enum RowFloats : int { kLse = 0, kDelta = 64, kQNorm = 128, kKNorm = 192, kRowP = 256, kRowDs = 320, kColumnDot = 384 };
constexpr int kReduce = kColumnDot + kWarps * kTile, kRowBytes = (kReduce + kWarps) * 4;
static_assert(kDelta == kTile && kColumnDot == 6 * kTile, "a float a row each");

// kInShared: whole rows of the operands, and the table, are in shared memory. Else the plan says which are.
template <class T, bool kInShared>
struct Cta {
  using Rows = Tile<Native<T>>;
  const Plan& g;
  int head;
  bool cosine;
  float scale;
  int lane, warp_row, row, column;  // the lane's accumulators: see tile.cuh
  int key_base;  // first key row of this warp's slot
  Rows q, k, v, grad, p, ds, stage;
  Shared<Int4> q_token, k_token;
  Shared<int> k_meta;
  Shared<float> table, row_lse, row_delta, q_norm, k_norm, row_p, row_ds, column_dot, reduce;

  EFFVIT_DEVICE Cta(const Plan& plan, int head_)
      : g(plan),
        head(head_),
        cosine(plan.p.logit_scale != nullptr),
        scale(head_scale(plan, head_)),
        lane(prim::lane_id()),
        warp_row(tile::warp_row()),
        row(acc_row()),
        column(acc_col()),
        key_base(warp_row / plan.slot_rows * plan.slot_rows),
        q(plan.s_q, kTile, plan.d_cols),
        k(plan.s_k, kTile, plan.d_cols),
        v(plan.s_v, kTile, plan.dv_cols),
        grad(plan.s_g, kTile, plan.dv_cols),
        p(plan.s_p, kTile, kTile),
        ds(plan.s_ds, kTile, kTile),
        stage(plan.s_stage, kTile, kOutCols),
        q_token(plan.s_q_token, kTile),
        k_token(plan.s_k_token, kTile),
        k_meta(plan.s_k_meta, kTile),
        table(plan.s_table, plan.table_in_shared ? plan.table_size : 0),
        row_lse(floats(kLse, kTile)),
        row_delta(floats(kDelta, kTile)),
        q_norm(floats(kQNorm, kTile)),
        k_norm(floats(kKNorm, kTile)),
        row_p(floats(kRowP, kTile)),
        row_ds(floats(kRowDs, kTile)),
        column_dot(floats(kColumnDot, kWarps * kTile)),
        reduce(floats(kReduce, kWarps)) {}

  EFFVIT_DEVICE Shared<float> floats(int first, int count) const { return Shared<float>(g.s_rows + 4 * first, count); }
  EFFVIT_DEVICE bool resident() const { return kInShared || g.resident; }
};

// ---- tokens ----

struct WindowId {
  int b, y, x;
  bool valid;
};

EFFVIT_DEVICE WindowId window_id(const Plan& g, int64_t window) {
  const int64_t b = window / g.windows_per_map;
  const int r = static_cast<int>(window - b * g.windows_per_map);
  const int y = r / g.axis_x.windows;
  return {static_cast<int>(b), y, r - y * g.axis_x.windows, window < g.windows};
}

EFFVIT_DEVICE Int4 token_at(const Plan& g, const WindowId& w, int local_y, int local_x, int table_offset) {
  const int i = rolled_coordinate(g.axis_y, w.y, local_y), j = rolled_coordinate(g.axis_x, w.x, local_x);
  const int y = map_position(g.axis_y, i), x = map_position(g.axis_x, j);
  const bool outside = y < 0 || x < 0;
  const int region = shift_region(g.axis_y, i) * 3 + shift_region(g.axis_x, j);
  return {{w.b, outside ? -1 : y, x, (table_offset << kMetaShift) | (outside ? kOutside : 0) | region}};
}

EFFVIT_DEVICE Int4 query_token(const Plan& g, const WindowId& w, int i) {
  if (!w.valid || i >= g.queries) return {{0, kNowhere, 0, (query_table_offset(g, 0) << kMetaShift) | kInvalid}};
  const int y = i / g.axis_x.window;
  return token_at(g, w, y, i - y * g.axis_x.window, query_table_offset(g, i));
}

EFFVIT_DEVICE Int4 key_token(const Plan& g, const WindowId& w, int j) {
  if (!w.valid || j >= g.keys) return {{0, kNowhere, 0, kInvalid}};
  const int y = j / g.key_w;
  return token_at(g, w, y - g.axis_y.halo, j - y * g.key_w - g.axis_x.halo, key_table_offset(g, j));
}

// Without pad_k a token outside the map is not a key.
EFFVIT_DEVICE int key_metadata(const Plan& g, const Int4& token) {
  return (token.v[3] & kOutside) != 0 && g.p.pad_k == nullptr ? kInvalid : token.v[3];
}

template <class T, bool kInShared>
EFFVIT_DEVICE WindowId slot_window(const Cta<T, kInShared>& c, int64_t tile, int row) {
  return window_id(c.g, tile * c.g.slots + row / c.g.slot_rows);
}

// The first 64 threads place the queries, the others the keys. Returns whether this thread placed a key outside the
// map.
template <class T, bool kInShared>
EFFVIT_DEVICE bool place_tokens(const Cta<T, kInShared>& c, int64_t tile, int qt, int kt, bool with_queries) {
  const int thread = prim::thread_id(), row = thread % kTile;
  const WindowId w = slot_window(c, tile, row);
  const int i = row % c.g.slot_rows;
  if (thread < kTile) {
    if (with_queries) c.q_token.store(row, query_token(c.g, w, i + qt * kTile));
    return false;
  }
  const Int4 token = key_token(c.g, w, i + kt * kTile);
  c.k_token.store(row, token);
  c.k_meta.store(row, key_metadata(c.g, token));
  return (token.v[3] & kOutside) != 0 && token.v[1] != kNowhere;
}

// ---- loads ----

// Columns [first, first + cols) of 64 rows; zeros where there is no token. With `unit` every row is multiplied by
// |norm|, synchronously; else copies are left in flight.
template <class T, bool kInShared>
EFFVIT_DEVICE void load_tokens(const Cta<T, kInShared>& c, const Tile<Native<T>>& to, const MapRows& from,
                               const Shared<Int4>& tokens, int first, int cols, bool unit, const Shared<float>& norm) {
  const auto row_at = [&](int row) {
    const Row<T> x = token_row<T>(from, c.head, tokens.load(row));
    return Row<T>{x.at + first, x.cols - first, x.vec};
  };
  if (!unit) {
    load_rows(to, cols, row_at);
    return;
  }
  for_each_piece<T>(cols / kVec<T>, [&](int row, int col) {
    const Row<T> from_row = row_at(row);
    Piece<T> x = load_piece(from_row.at + col, piece_length<T>(from_row.cols - col), from_row.vec);
    const float r = magnitude(norm.load(row));
    EFFVIT_UNROLL
    for (int e = 0; e < kVec<T>; ++e) x.v[e] = prim::from_float<T>(prim::to_float(x.v[e]) * r);
    to.hi.store_vec(row * to.stride + col, x);
  });
}

// Sum over the columns of x y of one token, by two neighbouring threads.
template <class T>
EFFVIT_DEVICE float row_dot(const Row<T>& x, const Row<T>& y) {
  float sum = 0.f;
  EFFVIT_NO_UNROLL
  for (int col = prim::thread_id() % 2 * kVec<T>; col < x.cols; col += 2 * kVec<T>) {
    if (x.vec && y.vec && col + kVec<T> <= x.cols) {
      const auto u = prim::load_global_vec<Piece<T>>(x.at + col), w = prim::load_global_vec<Piece<T>>(y.at + col);
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<T>; ++e) sum += prim::to_float(u.v[e]) * prim::to_float(w.v[e]);
    } else {
      for (int e = col; e < x.cols && e < col + kVec<T>; ++e)
        sum += prim::to_float(prim::load_global(x.at + e)) * prim::to_float(prim::load_global(y.at + e));
    }
  }
  return prim::warp_sum<2>(sum);
}

// 1 / max(norm, eps) of every row; negative where eps was the larger, for there the norm has no gradient.
template <class T, bool kInShared>
EFFVIT_DEVICE void row_norms(const Cta<T, kInShared>& c, const Shared<float>& to, const MapRows& rows,
                             const Shared<Int4>& tokens) {
  const int row = prim::thread_id() / 2;
  const Row<T> x = token_row<T>(rows, c.head, tokens.load(row));
  const float norm = prim::sqrt(row_dot(x, x));
  if (prim::thread_id() % 2 == 0) to.store(row, norm < kNormEps ? -1.f / kNormEps : 1.f / norm);
}
template <class T, bool kInShared>
EFFVIT_DEVICE void query_norms(const Cta<T, kInShared>& c) {
  row_norms(c, c.q_norm, c.g.q, c.q_token);
}
template <class T, bool kInShared>
EFFVIT_DEVICE void key_norms(const Cta<T, kInShared>& c) {
  row_norms(c, c.k_norm, c.g.k, c.k_token);
}

static EFFVIT_NOINLINE float table_entry(const Plan& g, int head, int i) {
  const int y = i / g.table_w;
  return load_small(g.p.bias_table,
                    head * g.p.bias_stride_h + y * g.p.bias_stride_y + (i - y * g.table_w) * g.p.bias_stride_x,
                    g.p.bias_dtype);
}

template <class T, bool kInShared>
EFFVIT_DEVICE void load_table(const Cta<T, kInShared>& c) {
  if (!c.g.table_in_shared) return;
  for (int i = prim::thread_id(); i < c.g.table_size; i += kThreads) c.table.store(i, table_entry(c.g, c.head, i));
}

// ---- operands of the matrix products ----

enum Which : int { kQ, kK, kV, kGrad };

template <class T, bool kInShared>
EFFVIT_DEVICE void load_operand(const Cta<T, kInShared>& c, Which which, int first, int cols, bool unit = false) {
  if (which == kQ) {
    load_tokens(c, c.q, c.g.q, c.q_token, first, cols, unit, c.q_norm);
  } else if (which == kK) {
    load_tokens(c, c.k, c.g.k, c.k_token, first, cols, unit, c.k_norm);
  } else if (which == kV) {
    load_tokens(c, c.v, c.g.v, c.k_token, first, cols, false, c.k_norm);
  } else {
    load_tokens(c, c.grad, c.g.grad, c.q_token, first, cols, false, c.q_norm);
  }
}
template <class T, bool kInShared>
EFFVIT_DEVICE void load_queries(const Cta<T, kInShared>& c) {  // and what goes with them, all columns
  load_operand(c, kQ, 0, c.g.d_pad);
  load_operand(c, kGrad, 0, c.g.dv_pad);
}
template <class T, bool kInShared>
EFFVIT_DEVICE void load_keys(const Cta<T, kInShared>& c) {
  load_operand(c, kK, 0, c.g.d_pad);
  load_operand(c, kV, 0, c.g.dv_pad);
}

template <class T>
static EFFVIT_NOINLINE void load_streamed(const Plan& g, int head, Which which, int first, int cols, bool unit) {
  const Cta<T, false> c(g, head);
  prim::sync_threads();  // the buffer's previous readers
  load_operand(c, which, first, cols, unit);
  prim::cp_async_commit();
  prim::cp_async_wait<0>();
  prim::sync_threads();
}

// Makes columns [first, first + cols) of an operand start at column 0 of its buffer, unless all of it is resident.
// With `unit` the rows are normalised.
template <class T, bool kInShared>
EFFVIT_DEVICE void stream_operand(const Cta<T, kInShared>& c, Which which, int first, int cols, bool unit = false) {
  if constexpr (!kInShared) {
    if (!c.g.resident) load_streamed<T>(c.g, c.head, which, first, cols, unit);
  }
}
// f(first, cols) for the pieces of `all` columns that are in shared memory together.
template <class F>
EFFVIT_DEVICE void for_each_streamed(int all, int step, const F& f) {
  EFFVIT_NO_UNROLL
  for (int first = 0; first < all; first += step) f(first, min_of(step, all - first));
}

// ---- scores ----

// Keys of key tile kt, rounded up to n-tiles or to steps of a product.
EFFVIT_DEVICE int tile_length(int tokens, int tile, int multiple) {
  return round_up(min_of(kTile, tokens - tile * kTile), multiple);
}

template <class T, bool kInShared>
EFFVIT_DEVICE float logit(const Cta<T, kInShared>& c, float raw, int q_meta, int k_meta) {
  const int region = k_meta & kRegionBits;
  float x = raw * c.scale;
  if (c.g.p.bias_table != nullptr) {
    const int i = (q_meta >> kMetaShift) - (k_meta >> kMetaShift);
    x += kInShared || c.g.table_in_shared ? c.table.load(i) : table_entry(c.g, c.head, i);
  }
  if (region != (q_meta & kRegionBits)) x += c.g.p.mask_value;
  return region == kInvalid ? -infinity() : x;
}

template <class T, bool kInShared>
EFFVIT_DEVICE void query_times_key(const Cta<T, kInShared>& c, float (&s)[kTiles][4], int n_tiles) {
  clear(s);
  for_each_streamed(c.g.d_pad, c.g.d_cols, [&](int first, int cols) {
    stream_operand(c, kQ, first, cols);
    stream_operand(c, kK, first, cols);
    product<kDepthLast, kDepthLast>(s, n_tiles, c.q.at(c.warp_row, 0), c.k.at(c.key_base, 0), cols);
  });
  if (!c.cosine) return;
  const float q_norm[2] = {magnitude(c.q_norm.load(c.row)), magnitude(c.q_norm.load(c.row + 8))};
  EFFVIT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    if (n < n_tiles) {
      const auto k_norm = c.k_norm.template load_vec<Vec<float, 2>>(c.key_base + n * 8 + c.column);
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] *= q_norm[e / 2] * magnitude(k_norm.v[e % 2]);
    }
  }
}

// Where head `head` of a token is in [B, h, H, W].
EFFVIT_DEVICE int64_t lse_index(const Plan& g, int head, const Int4& token) {
  return ((token.v[0] * g.p.h + head) * g.p.H + token.v[1]) * g.p.W + token.v[2];
}

// Writes this warp's 16 rows of a tile, columns [col, col + cols) of a gradient-like tensor.
template <class T, bool kInShared>
EFFVIT_DEVICE void store_tokens(const Cta<T, kInShared>& c, const Tile<Native<T>>& from, const Shared<Int4>& tokens,
                                const MapGradient& to, int col, int cols) {
  T* const base = static_cast<T*>(to.base) + static_cast<int64_t>(c.head) * to.cols + col;
  store_rows(from, min_of(cols, to.cols - col), to.vec, [&](int row) {
    const Int4 token = tokens.load(row);
    const int64_t t = (token.v[0] * c.g.p.H + token.v[1]) * c.g.p.W + token.v[2];
    return token.v[1] < 0 ? nullptr : base + t * to.stride_t;
  });
}

}  // namespace window_attention_impl
}  // namespace cuda
}  // namespace effvit
