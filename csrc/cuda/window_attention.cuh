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
#pragma once
#include "../common/window_attention_params.h"
#include "common.cuh"

namespace effvit {
namespace cuda {
namespace window_attention_impl {

using prim::Shared;
using prim::Vec;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / prim::kWarpSize;
constexpr int kTile = 64;  // query rows and key rows of a tile
constexpr int kNTiles = kTile / 8;
constexpr int kStreamCols = 64;  // columns of an operand in shared memory when whole rows do not fit
constexpr int kOutCols = 32;  // columns of a gradient computed at a time where whole rows are written at once
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNormEps = 1e-12f;
constexpr float kLogitScaleMax = 4.605170185988092f;  // ln 100
constexpr int kMaxTableInShared = 32 * 1024;  // bytes; a larger table is read from global memory

// Key metadata: table offset * 32 + (outside the map) * 16 + shift region. Queries have no outside bit.
constexpr int kRegionBits = 15, kInvalid = 15, kOutside = 16, kMetaShift = 5;
constexpr int kNowhere = -2;  // y of a row that holds no token

static_assert(kTile == 16 * kWarps, "a warp owns 16 rows of a tile");
static_assert(kThreads == 2 * kTile, "one thread places each query and key token; two sum up each row");
static_assert(kStreamCols % kOutCols == 0, "streamed columns are whole output blocks");

template <class T>
struct Traits {
  static constexpr bool kTensorCores = !std::is_same<T, float>::value;
  static constexpr int kVec = 16 / sizeof(T);  // elements of a 16-byte access
  static constexpr int kPad = kTensorCores ? 16 : 8;  // head dims are padded with zeros to a multiple
  static constexpr int kStepK = kTensorCores ? 16 : 4;  // depth of one step of a matrix product
  static constexpr int kSkew = kVec;  // rows are an odd multiple of 16 bytes: no bank conflicts
  static constexpr int kScoreStride = kTile + kSkew;
  static_assert(kPad % kVec == 0 && kPad % kStepK == 0, "padded rows hold whole vectors and steps");
  static_assert(kTile % kStepK == 0 && kStreamCols % kPad == 0, "tiles hold whole steps");
  static_assert(kScoreStride * sizeof(T) / 16 % 2 == 1, "row stride must be an odd multiple of 16 bytes");
};

// ---- the plan: everything a kernel needs, computed once on the host ----

enum Pass : int { kForward, kFused, kDq, kDkv, kTable };

struct Plan {
  WindowAttentionParams p;
  WindowAxis axis_y, axis_x;
  int32_t queries, keys, key_w;  // tokens of a window, and of its halo'd keys; width of the latter
  int32_t slot_rows, slots;  // rows of a tile that one window takes; windows of a tile
  int32_t q_tiles, k_tiles;
  int32_t table_w, table_size;
  int64_t windows, windows_per_map, tiles;  // tiles = groups of `slots` windows
  int32_t walks;  // CTAs that share the tiles of one head and tile position
  int32_t cols, col_chunks;  // output columns of a CTA; CTAs that share them
  int32_t d_pad, dv_pad;
  int32_t d_cols, dv_cols;  // columns of an operand in shared memory at a time
  bool resident;  // whole rows are
  bool table_in_shared;
  bool q_vec, k_vec, v_vec, grad_vec, pad_k_vec, pad_v_vec, out_vec, dqkv_vec;  // 16-byte accesses are aligned
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

// Rows of a strided tensor [B, H, W, ., cols], at one head.
template <class T>
struct Rows {
  const T* base;
  int64_t stride_b, stride_y, stride_x;
  int cols;
  bool vec;
  const T* pad;  // row that stands for tokens outside the map, or null
  bool pad_vec;

  EFFVIT_DEVICE const T* at(const Int4& token) const {
    return base + token.v[0] * stride_b + token.v[1] * stride_y + token.v[2] * stride_x;
  }
};

template <class T>
EFFVIT_DEVICE Rows<T> q_rows(const Plan& g, int head) {
  const auto& p = g.p;
  return {static_cast<const T*>(p.q) + head * p.q_stride_h,
          p.q_stride_b,
          p.q_stride_y,
          p.q_stride_x,
          static_cast<int>(p.d),
          g.q_vec,
          nullptr,
          false};
}
template <class T>
EFFVIT_DEVICE Rows<T> k_rows(const Plan& g, int head) {
  const auto& p = g.p;
  const T* pad = p.pad_k == nullptr ? nullptr : static_cast<const T*>(p.pad_k) + head * p.d;
  return {static_cast<const T*>(p.k) + head * p.k_stride_h,
          p.k_stride_b,
          p.k_stride_y,
          p.k_stride_x,
          static_cast<int>(p.d),
          g.k_vec,
          pad,
          g.pad_k_vec};
}
template <class T>
EFFVIT_DEVICE Rows<T> v_rows(const Plan& g, int head) {
  const auto& p = g.p;
  const T* pad = p.pad_v == nullptr ? nullptr : static_cast<const T*>(p.pad_v) + head * p.dv;
  return {static_cast<const T*>(p.v) + head * p.v_stride_h,
          p.v_stride_b,
          p.v_stride_y,
          p.v_stride_x,
          static_cast<int>(p.dv),
          g.v_vec,
          pad,
          g.pad_v_vec};
}
template <class T>
EFFVIT_DEVICE Rows<T> grad_rows(const Plan& g, int head) {
  const auto& p = g.p;
  return {static_cast<const T*>(p.grad_out) + head * p.grad_out_stride_h,
          p.grad_out_stride_b,
          p.grad_out_stride_y,
          p.grad_out_stride_x,
          static_cast<int>(p.dv),
          g.grad_vec,
          nullptr,
          false};
}
template <class T>
EFFVIT_DEVICE Rows<T> out_rows(const Plan& g, int head) {
  const auto& p = g.p;
  const int64_t x = p.h * p.dv;
  return {static_cast<const T*>(p.out) + head * p.dv,
          p.H * p.W * x,
          p.W * x,
          x,
          static_cast<int>(p.dv),
          g.out_vec,
          nullptr,
          false};
}

// Natural-log scale of one head's logits.
EFFVIT_DEVICE float head_scale(const Plan& g, int head) {
  if (g.p.logit_scale == nullptr) return g.p.scale;
  const float tau = load_small(g.p.logit_scale, head, g.p.logit_scale_dtype);
  return prim::exp(tau > kLogitScaleMax ? kLogitScaleMax : tau);
}

// kInShared: whole rows of the operands, and the table, are in shared memory. Else the plan says which are.
template <class T, bool kInShared>
struct Cta {
  const Plan& g;
  int head;
  bool cosine;
  float scale;
  // A lane owns rows `row` and `row + 8` of a tile and columns column + 8 n, + 1 (relative to key_base for scores).
  int lane, warp_row, row, column;
  int key_base;  // first key row of this warp's slot
  Shared<T> q, k, v, grad, p, ds, stage;
  Shared<Int4> q_token, k_token;
  Shared<int> k_meta;
  Shared<float> table, row_lse, row_delta, q_norm, k_norm, row_p, row_ds, column_dot, reduce;

  EFFVIT_DEVICE Cta(const Plan& plan, int head_)
      : g(plan),
        head(head_),
        cosine(plan.p.logit_scale != nullptr),
        scale(head_scale(plan, head_)),
        lane(prim::lane_id()),
        warp_row(prim::warp_id() * 16),
        row(warp_row + lane / 4),
        column(lane % 4 * 2),
        key_base(warp_row / plan.slot_rows * plan.slot_rows),
        q(plan.s_q, kTile * stride_d()),
        k(plan.s_k, kTile * stride_d()),
        v(plan.s_v, kTile * stride_v()),
        grad(plan.s_g, kTile * stride_v()),
        p(plan.s_p, kTile * Traits<T>::kScoreStride),
        ds(plan.s_ds, kTile * Traits<T>::kScoreStride),
        stage(plan.s_stage, kTile * (kOutCols + Traits<T>::kSkew)),
        q_token(plan.s_q_token, kTile),
        k_token(plan.s_k_token, kTile),
        k_meta(plan.s_k_meta, kTile),
        table(plan.s_table, plan.table_in_shared ? plan.table_size : 0),
        row_lse(plan.s_rows, kTile),
        row_delta(plan.s_rows + 4 * kTile, kTile),
        q_norm(plan.s_rows + 8 * kTile, kTile),
        k_norm(plan.s_rows + 12 * kTile, kTile),
        row_p(plan.s_rows + 16 * kTile, kTile),
        row_ds(plan.s_rows + 20 * kTile, kTile),
        column_dot(plan.s_rows + 24 * kTile, kWarps * kTile),
        reduce(plan.s_rows + 24 * kTile + 4 * kWarps * kTile, kWarps) {}

  EFFVIT_DEVICE bool resident() const { return kInShared || g.resident; }
  EFFVIT_DEVICE int stride_d() const { return g.d_cols + Traits<T>::kSkew; }
  EFFVIT_DEVICE int stride_v() const { return g.dv_cols + Traits<T>::kSkew; }
};
constexpr int kRowBytes = (6 * kTile + kWarps * kTile + kWarps) * 4;

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

EFFVIT_DEVICE float magnitude(float x) { return x < 0.f ? -x : x; }

// Columns [first, first + cols) of 64 rows; zeros beyond the tensor's columns and where there is no token. With `norm`
// every row is multiplied by |norm|, synchronously; else 16-byte copies are left in flight where alignment allows.
template <class T>
EFFVIT_DEVICE void load_rows(const Shared<T>& to, int stride, const Rows<T>& from, const Shared<Int4>& tokens,
                             int first, int cols, bool normalise, const Shared<float>& norm) {
  constexpr int kVec = Traits<T>::kVec;
  using V = Vec<T, kVec>;
  const int chunks = cols / kVec;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < kTile * chunks; i += kThreads) {
    const int row = i / chunks, col = (i - row * chunks) * kVec;
    const Int4 token = tokens.load(row);
    const bool inside = token.v[1] >= 0, padded = token.v[1] == -1 && from.pad != nullptr;
    const T* source = inside ? from.at(token) : padded ? from.pad : from.base;
    int n = inside || padded ? from.cols - first - col : 0;
    n = n < 0 ? 0 : n > kVec ? kVec : n;
    const bool aligned = inside ? from.vec : from.pad_vec;
    source = n == 0 ? from.base : source + first + col;
    if (!normalise && n != 0 && aligned) {
      prim::cp_async16(to, row * stride + col, source, n * static_cast<int>(sizeof(T)));
      continue;
    }
    V x;
    if (n == kVec && aligned) {
      x = prim::load_global_vec<V>(source);
    } else {
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) x.v[e] = e < n ? prim::load_global(source + e) : prim::from_float<T>(0.f);
    }
    if (normalise) {
      const float r = magnitude(norm.load(row));
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) x.v[e] = prim::from_float<T>(prim::to_float(x.v[e]) * r);
    }
    to.store_vec(row * stride + col, x);
  }
}

// Sum over the columns of x y of one token, by two neighbouring threads.
template <class T>
EFFVIT_DEVICE float row_dot(const Rows<T>& x, const Rows<T>& y, const Int4& token) {
  constexpr int kVec = Traits<T>::kVec;
  using V = Vec<T, kVec>;
  const bool inside = token.v[1] >= 0;
  float sum = 0.f;
  if (inside || (token.v[1] == -1 && x.pad != nullptr)) {
    const T *a = inside ? x.at(token) : x.pad, *b = inside ? y.at(token) : y.pad;
    const bool vec = inside ? x.vec && y.vec : x.pad_vec && y.pad_vec;
    EFFVIT_NO_UNROLL
    for (int col = prim::thread_id() % 2 * kVec; col < x.cols; col += 2 * kVec) {
      if (vec && col + kVec <= x.cols) {
        const V u = prim::load_global_vec<V>(a + col), w = prim::load_global_vec<V>(b + col);
        EFFVIT_UNROLL
        for (int e = 0; e < kVec; ++e) sum += prim::to_float(u.v[e]) * prim::to_float(w.v[e]);
      } else {
        for (int e = col; e < x.cols && e < col + kVec; ++e)
          sum += prim::to_float(prim::load_global(a + e)) * prim::to_float(prim::load_global(b + e));
      }
    }
  }
  return prim::warp_sum<2>(sum);
}

// 1 / max(norm, eps) of every row; negative where eps was the larger, for there the norm has no gradient.
template <class T>
EFFVIT_DEVICE void row_norms(const Shared<float>& to, const Rows<T>& rows, const Shared<Int4>& tokens) {
  const int row = prim::thread_id() / 2;
  const float norm = prim::sqrt(row_dot(rows, rows, tokens.load(row)));
  if (prim::thread_id() % 2 == 0) to.store(row, norm < kNormEps ? -1.f / kNormEps : 1.f / norm);
}

// lse and delta = sum(grad_out out) - grad_lse of every query. +inf makes P = 0 where there is no query.
template <class T, bool kInShared>
EFFVIT_DEVICE void row_statistics(const Cta<T, kInShared>& c) {
  const auto& p = c.g.p;
  const int row = prim::thread_id() / 2;
  const Int4 token = c.q_token.load(row);
  const float dot = row_dot(grad_rows<T>(c.g, c.head), out_rows<T>(c.g, c.head), token);
  if (prim::thread_id() % 2 != 0) return;
  float lse = prim::bit_cast<float>(0x7f800000u), delta = 0.f;
  if (token.v[1] >= 0) {
    const int64_t at = ((token.v[0] * p.h + c.head) * p.H + token.v[1]) * p.W + token.v[2];
    lse = prim::load_global(static_cast<const float*>(p.lse) + at);
    delta = dot - (p.grad_lse == nullptr ? 0.f : prim::load_global(p.grad_lse + at));
  }
  c.row_lse.store(row, lse);
  c.row_delta.store(row, delta);
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

enum Operand : int { kQ, kK, kV, kGrad };

template <class T, bool kInShared>
EFFVIT_DEVICE void load_operand(const Cta<T, kInShared>& c, Operand which, int first, int cols, bool unit = false) {
  if (which == kQ) {
    load_rows(c.q, c.stride_d(), q_rows<T>(c.g, c.head), c.q_token, first, cols, unit, c.q_norm);
  } else if (which == kK) {
    load_rows(c.k, c.stride_d(), k_rows<T>(c.g, c.head), c.k_token, first, cols, unit, c.k_norm);
  } else if (which == kV) {
    load_rows(c.v, c.stride_v(), v_rows<T>(c.g, c.head), c.k_token, first, cols, false, c.k_norm);
  } else {
    load_rows(c.grad, c.stride_v(), grad_rows<T>(c.g, c.head), c.q_token, first, cols, false, c.q_norm);
  }
}

template <class T>
static EFFVIT_NOINLINE void load_streamed(const Plan& g, int head, Operand which, int first, int cols, bool unit) {
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
EFFVIT_DEVICE void stream_operand(const Cta<T, kInShared>& c, Operand which, int first, int cols, bool unit = false) {
  if constexpr (!kInShared) {
    if (!c.g.resident) load_streamed<T>(c.g, c.head, which, first, cols, unit);
  }
}

// Normalises the rows of a resident operand where they lie. The scores are computed before, from the rows as they are:
// rounding a unit vector would be multiplied by the scale, up to 100.
template <class T, bool kInShared>
EFFVIT_DEVICE void normalise_rows(const Cta<T, kInShared>& c, const Shared<T>& x, const Shared<float>& norm) {
  constexpr int kVec = Traits<T>::kVec;
  using V = Vec<T, kVec>;
  if (!c.resident()) return;
  const int row = prim::thread_id() / 2;
  const float r = magnitude(norm.load(row));
  EFFVIT_NO_UNROLL
  for (int col = prim::thread_id() % 2 * kVec; col < c.g.d_pad; col += 2 * kVec) {
    V y = x.template load_vec<V>(row * c.stride_d() + col);
    EFFVIT_UNROLL
    for (int e = 0; e < kVec; ++e) y.v[e] = prim::from_float<T>(prim::to_float(y.v[e]) * r);
    x.store_vec(row * c.stride_d() + col, y);
  }
}

// acc += A B for 16 rows of A and n_tiles * 8 columns of B, over `depth` (a multiple of Traits::kStepK).
// A is stored [m][k], with kATransposed [k][m]; B is stored [n][k], with kBTransposed [k][n].
template <class T, int kN, bool kATransposed, bool kBTransposed>
EFFVIT_DEVICE void warp_product(float (&acc)[kN][4], const Shared<T>& a, int a_stride, int m0, int ak0,
                                const Shared<T>& b, int b_stride, int n0, int bk0, int depth, int n_tiles) {
  const int lane = prim::lane_id();
  if constexpr (Traits<T>::kTensorCores) {
    static_assert(kN % 2 == 0, "B is loaded for two n-tiles at a time");
    const int low = lane % 8, half = lane / 8 % 2 * 8, quarter = lane / 16 * 8;
    EFFVIT_NO_UNROLL
    for (int k = 0; k < depth; k += 16) {
      uint32_t af[4];
      if constexpr (kATransposed) {
        prim::ldmatrix_x4<true>(af, a, (ak0 + k + low + quarter) * a_stride + m0 + half);
      } else {
        prim::ldmatrix_x4<false>(af, a, (m0 + low + half) * a_stride + ak0 + k + quarter);
      }
      EFFVIT_UNROLL
      for (int n = 0; n < kN; n += 2) {
        if (n < n_tiles) {
          uint32_t bf[4];
          if constexpr (kBTransposed) {
            prim::ldmatrix_x4<true>(bf, b, (bk0 + k + low + half) * b_stride + n0 + n * 8 + quarter);
          } else {
            prim::ldmatrix_x4<false>(bf, b, (n0 + n * 8 + low + quarter) * b_stride + bk0 + k + half);
          }
          prim::mma_m16n8k16<T>(acc[n], af, bf[0], bf[1]);
          if (n + 1 < n_tiles) prim::mma_m16n8k16<T>(acc[n + 1], af, bf[2], bf[3]);
        }
      }
    }
  } else {
    using V4 = Vec<float, 4>;
    using V2 = Vec<float, 2>;
    const int row = m0 + lane / 4, col = n0 + lane % 4 * 2;
    EFFVIT_NO_UNROLL
    for (int k = 0; k < depth; k += 4) {
      V4 a0, a1;
      if constexpr (kATransposed) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
          a0.v[e] = a.load((ak0 + k + e) * a_stride + row);
          a1.v[e] = a.load((ak0 + k + e) * a_stride + row + 8);
        }
      } else {
        a0 = a.template load_vec<V4>(row * a_stride + ak0 + k);
        a1 = a.template load_vec<V4>((row + 8) * a_stride + ak0 + k);
      }
      EFFVIT_UNROLL
      for (int n = 0; n < kN; ++n) {
        if (n < n_tiles) {
          V4 b0, b1;
          if constexpr (kBTransposed) {
            EFFVIT_UNROLL
            for (int e = 0; e < 4; ++e) {
              const V2 x = b.template load_vec<V2>((bk0 + k + e) * b_stride + col + n * 8);
              b0.v[e] = x.v[0];
              b1.v[e] = x.v[1];
            }
          } else {
            b0 = b.template load_vec<V4>((col + n * 8) * b_stride + bk0 + k);
            b1 = b.template load_vec<V4>((col + n * 8 + 1) * b_stride + bk0 + k);
          }
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            acc[n][0] += a0.v[e] * b0.v[e];
            acc[n][1] += a0.v[e] * b1.v[e];
            acc[n][2] += a1.v[e] * b0.v[e];
            acc[n][3] += a1.v[e] * b1.v[e];
          }
        }
      }
    }
  }
}

// acc += P B with P in the accumulator layout of its own product. B is stored [k][n].
template <class T, int kN>
EFFVIT_DEVICE void register_product(float (&acc)[kN][4], const float (&p)[kNTiles][4], const Shared<T>& b, int b_stride,
                                    int bk0, int depth, int n_tiles) {
  const int lane = prim::lane_id(), low = lane % 8, half = lane / 8 % 2 * 8, quarter = lane / 16 * 8;
  EFFVIT_UNROLL
  for (int s = 0; s < kNTiles / 2; ++s) {
    if (s * 16 < depth) {
      const uint32_t af[4] = {prim::pack2<T>(p[2 * s][0], p[2 * s][1]), prim::pack2<T>(p[2 * s][2], p[2 * s][3]),
                              prim::pack2<T>(p[2 * s + 1][0], p[2 * s + 1][1]),
                              prim::pack2<T>(p[2 * s + 1][2], p[2 * s + 1][3])};
      EFFVIT_UNROLL
      for (int n = 0; n < kN; n += 2) {
        if (n < n_tiles) {
          uint32_t bf[4];
          prim::ldmatrix_x4<true>(bf, b, (bk0 + s * 16 + low + half) * b_stride + n * 8 + quarter);
          prim::mma_m16n8k16<T>(acc[n], af, bf[0], bf[1]);
          prim::mma_m16n8k16<T>(acc[n + 1], af, bf[2], bf[3]);
        }
      }
    }
  }
}

template <int kN>
EFFVIT_DEVICE void clear(float (&acc)[kN][4]) {
  EFFVIT_UNROLL
  for (int n = 0; n < kN; ++n) {
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.f;
  }
}

template <class T>
EFFVIT_DEVICE void store_pair(const Shared<T>& to, int i, float low, float high) {
  if constexpr (Traits<T>::kTensorCores) {
    to.store_vec(i, prim::pack2<T>(low, high));
  } else {
    to.store_vec(i, Vec<float, 2>{{low, high}});
  }
}

// Writes this warp's 16 rows of a tile. `to` points at the first column of token (0, 0, 0).
template <class T>
EFFVIT_DEVICE void store_rows(const Plan& g, const Shared<T>& from, int stride, int row0, const Shared<Int4>& tokens,
                              T* to, int64_t row_elements, int cols, bool aligned) {
  constexpr int kVec = Traits<T>::kVec;
  using V = Vec<T, kVec>;
  const int chunks = (cols + kVec - 1) / kVec;
  EFFVIT_NO_UNROLL
  for (int i = prim::lane_id(); i < 16 * chunks; i += prim::kWarpSize) {
    const int row = row0 + i / chunks, col = i % chunks * kVec;
    const Int4 token = tokens.load(row);
    if (token.v[1] < 0) continue;
    T* at = to + ((token.v[0] * g.p.H + token.v[1]) * g.p.W + token.v[2]) * row_elements + col;
    if (aligned && col + kVec <= cols) {
      prim::store_global_vec(at, from.template load_vec<V>(row * stride + col));
    } else {
      for (int e = 0; e < kVec && col + e < cols; ++e) prim::store_global(at + e, from.load(row * stride + col + e));
    }
  }
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
  return region == kInvalid ? prim::bit_cast<float>(0xff800000u) : x;
}

template <class T, bool kInShared>
EFFVIT_DEVICE void query_times_key(const Cta<T, kInShared>& c, float (&s)[kNTiles][4], int n_tiles) {
  clear(s);
  EFFVIT_NO_UNROLL
  for (int first = 0; first < c.g.d_pad; first += c.g.d_cols) {
    const int cols = min_of(c.g.d_cols, c.g.d_pad - first);
    stream_operand(c, kQ, first, cols);
    stream_operand(c, kK, first, cols);
    warp_product<T, kNTiles, false, false>(s, c.q, c.stride_d(), c.warp_row, 0, c.k, c.stride_d(), c.key_base, 0, cols,
                                           n_tiles);
  }
  if (!c.cosine) return;
  const float q_norm[2] = {magnitude(c.q_norm.load(c.row)), magnitude(c.q_norm.load(c.row + 8))};
  EFFVIT_UNROLL
  for (int n = 0; n < kNTiles; ++n) {
    if (n < n_tiles) {
      const auto k_norm = c.k_norm.template load_vec<Vec<float, 2>>(c.key_base + n * 8 + c.column);
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] *= q_norm[e / 2] * magnitude(k_norm.v[e % 2]);
    }
  }
}

// ---- forward ----

// Splits the CTA index: walk slowest, head fastest, so that concurrent CTAs read the heads of the same windows.
struct Position {
  int head, q_tile, k_tile, chunk, walk;
};
EFFVIT_DEVICE Position cta_position(const Plan& g, int q_tiles, int k_tiles) {
  int64_t i = prim::cta_id();
  Position at;
  at.head = static_cast<int>(i % g.p.h);
  i /= g.p.h;
  at.chunk = static_cast<int>(i % g.col_chunks);
  i /= g.col_chunks;
  at.q_tile = static_cast<int>(i % q_tiles);
  i /= q_tiles;
  at.k_tile = static_cast<int>(i % k_tiles);
  at.walk = static_cast<int>(i / k_tiles);
  return at;
}

template <class T, int kCols, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  using Tr = Traits<T>;
  constexpr int kOutTiles = kCols / 8;
  constexpr int kOutStride = kCols + Tr::kSkew;
  const Position at = cta_position(g, g.q_tiles, 1);
  const Cta<T, kInShared> c(g, at.head);
  const Shared<T> out_stage(g.s_q, kTile * kOutStride);  // over q, which is no longer needed
  const int first_col = at.chunk * kCols;
  const int cols = min_of(kCols, g.dv_pad - first_col);
  load_table(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    place_tokens(c, tile, at.q_tile, 0, true);
    prim::sync_threads();
    if (c.cosine) row_norms(c.q_norm, q_rows<T>(g, c.head), c.q_token);

    float o[kOutTiles][4], row_max[2], row_sum[2] = {0.f, 0.f};
    row_max[0] = row_max[1] = prim::bit_cast<float>(0xff800000u);
    clear(o);
    EFFVIT_NO_UNROLL
    for (int kt = 0; kt < g.k_tiles; ++kt) {
      if (kt > 0) {
        prim::sync_threads();
        place_tokens(c, tile, at.q_tile, kt, false);
        prim::sync_threads();
      }
      if (c.cosine) {
        row_norms(c.k_norm, k_rows<T>(g, c.head), c.k_token);
        prim::sync_threads();
      }
      if (c.resident()) {
        if (kt == 0) load_operand(c, kQ, 0, g.d_pad);
        load_operand(c, kK, 0, g.d_pad);
      }
      prim::cp_async_commit();
      load_operand(c, kV, first_col, cols);
      prim::cp_async_commit();
      prim::cp_async_wait<1>();
      prim::sync_threads();

      const int n_tiles = tile_length(g.keys, kt, 8) / 8;
      float s[kNTiles][4];
      query_times_key(c, s, n_tiles);

      const int q_meta[2] = {c.q_token.load(c.row).v[3], c.q_token.load(c.row + 8).v[3]};
      float tile_max[2] = {row_max[0], row_max[1]};
      EFFVIT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        if (n < n_tiles) {
          const auto meta = c.k_meta.template load_vec<Vec<int, 2>>(c.key_base + n * 8 + c.column);
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            s[n][e] = logit(c, s[n][e], q_meta[e / 2], meta.v[e % 2]);
            tile_max[e / 2] = tile_max[e / 2] > s[n][e] ? tile_max[e / 2] : s[n][e];
          }
        } else {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) s[n][e] = prim::bit_cast<float>(0xff800000u);
        }
      }
      float rescale[2], offset[2];
      EFFVIT_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float m = prim::warp_max<4>(tile_max[r]);
        offset[r] = m == prim::bit_cast<float>(0xff800000u) ? 0.f : m;  // no key of this row so far
        rescale[r] = prim::exp2((row_max[r] - offset[r]) * kLog2e);
        row_max[r] = m;
        row_sum[r] *= rescale[r];
      }
      EFFVIT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
          s[n][e] = prim::exp2((s[n][e] - offset[e / 2]) * kLog2e);
          row_sum[e / 2] += s[n][e];
        }
      }
      EFFVIT_UNROLL
      for (int n = 0; n < kOutTiles; ++n) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) o[n][e] *= rescale[e / 2];
      }
      prim::cp_async_wait<0>();
      prim::sync_threads();
      const int depth = tile_length(g.keys, kt, Tr::kStepK);
      if constexpr (Tr::kTensorCores) {
        register_product<T, kOutTiles>(o, s, c.v, c.stride_v(), c.key_base, depth, cols / 8);
      } else {
        EFFVIT_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          if (n < n_tiles) {
            store_pair(c.p, c.row * Tr::kScoreStride + n * 8 + c.column, s[n][0], s[n][1]);
            store_pair(c.p, (c.row + 8) * Tr::kScoreStride + n * 8 + c.column, s[n][2], s[n][3]);
          }
        }
        prim::sync_warp();
        warp_product<T, kOutTiles, false, true>(o, c.p, Tr::kScoreStride, c.warp_row, 0, c.v, c.stride_v(), 0,
                                                c.key_base, depth, cols / 8);
      }
    }

    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float sum = prim::warp_sum<4>(row_sum[r]);
      const float inverse = 1.f / sum;
      const int row = c.row + 8 * r;
      EFFVIT_UNROLL
      for (int n = 0; n < kOutTiles; ++n)
        store_pair(out_stage, row * kOutStride + n * 8 + c.column, o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
      const Int4 token = c.q_token.load(row);
      if (at.chunk == 0 && c.column == 0 && token.v[1] >= 0)
        prim::store_global(g.p.lse + ((token.v[0] * g.p.h + c.head) * g.p.H + token.v[1]) * g.p.W + token.v[2],
                           row_max[r] + prim::log(sum));
    }
    prim::sync_warp();
    store_rows(g, out_stage, kOutStride, c.warp_row, c.q_token, static_cast<T*>(g.p.out) + c.head * g.p.dv + first_col,
               g.p.h * g.p.dv, min_of(kCols, static_cast<int>(g.p.dv) - first_col), g.out_vec);
  }
}

// ---- backward ----

// Sums over the keys of this lane's two rows; complete after a sum over the four lanes of a row.
struct RowSums {
  float dot[2] = {0.f, 0.f};  // dS s
  float p_outside[2] = {0.f, 0.f};  // over keys outside the map: P,
  float ds_outside[2] = {0.f, 0.f};  // dS
  float dot_outside[2] = {0.f, 0.f};  // and dS s
};

// Per key of the tile the sum over queries of dS s: one row of column_dot per warp, in which the first four lanes own
// their columns.
template <class T, bool kInShared>
EFFVIT_DEVICE void clear_column_dot(const Cta<T, kInShared>& c) {
  if (!c.cosine) return;
  const int base = prim::warp_id() * kTile;
  c.column_dot.store(base + c.lane, 0.f);
  c.column_dot.store(base + c.lane + prim::kWarpSize, 0.f);
  prim::sync_warp();
}
template <class T, bool kInShared>
EFFVIT_DEVICE void add_column_dot(const Cta<T, kInShared>& c, int n, float even, float odd) {
  const float x[2] = {even, odd};
  const int i = prim::warp_id() * kTile + c.key_base + n * 8 + c.column;
  EFFVIT_UNROLL
  for (int e = 0; e < 2; ++e) {
    float sum = x[e];
    EFFVIT_UNROLL
    for (int m = 4; m < prim::kWarpSize; m *= 2) sum += prim::shuffle_xor(sum, m);
    if (c.lane < 4) c.column_dot.store(i + e, c.column_dot.load(i + e) + sum);
  }
}
template <class T, bool kInShared>
EFFVIT_DEVICE float column_dot(const Cta<T, kInShared>& c, int row) {
  float sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += c.column_dot.load(w * kTile + row);
  return sum;
}

// s = P and dp = dS from the raw products q k and grad_out v.
template <bool kColumnDot, class T, bool kInShared>
EFFVIT_DEVICE void score_gradients(const Cta<T, kInShared>& c, float (&s)[kNTiles][4], float (&dp)[kNTiles][4],
                                   RowSums& sums, int n_tiles) {
  const int q_meta[2] = {c.q_token.load(c.row).v[3], c.q_token.load(c.row + 8).v[3]};
  const float lse[2] = {c.row_lse.load(c.row), c.row_lse.load(c.row + 8)};
  const float delta[2] = {c.row_delta.load(c.row), c.row_delta.load(c.row + 8)};
  const bool pads = c.g.p.pad_k != nullptr;
  EFFVIT_UNROLL
  for (int n = 0; n < kNTiles; ++n) {
    if (n < n_tiles) {
      const auto meta = c.k_meta.template load_vec<Vec<int, 2>>(c.key_base + n * 8 + c.column);
      float dot[4];
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        const float raw = s[n][e];
        const float p = prim::exp2((logit(c, raw, q_meta[r], meta.v[e % 2]) - lse[r]) * kLog2e);
        const float ds = p * (dp[n][e] - delta[r]);
        s[n][e] = p;
        dp[n][e] = ds;
        dot[e] = ds * raw;
        sums.dot[r] += dot[e];
        if (pads && (meta.v[e % 2] & kOutside) != 0) {
          sums.p_outside[r] += p;
          sums.ds_outside[r] += ds;
          sums.dot_outside[r] += dot[e];
        }
      }
      if constexpr (kColumnDot) {
        if (c.cosine) add_column_dot(c, n, dot[0] + dot[2], dot[1] + dot[3]);
      }
    }
  }
}

template <class T, bool kInShared>
EFFVIT_DEVICE void grad_times_value(const Cta<T, kInShared>& c, float (&dp)[kNTiles][4], int n_tiles) {
  clear(dp);
  EFFVIT_NO_UNROLL
  for (int first = 0; first < c.g.dv_pad; first += c.g.dv_cols) {
    const int cols = min_of(c.g.dv_cols, c.g.dv_pad - first);
    stream_operand(c, kGrad, first, cols);
    stream_operand(c, kV, first, cols);
    warp_product<T, kNTiles, false, false>(dp, c.grad, c.stride_v(), c.warp_row, 0, c.v, c.stride_v(), c.key_base, 0,
                                           cols, n_tiles);
  }
}

// This warp's 16 rows of P or dS: also the columns without keys, which are zero, for a product may read them.
template <class T, bool kInShared>
EFFVIT_DEVICE void store_scores(const Cta<T, kInShared>& c, const Shared<T>& to, const float (&x)[kNTiles][4]) {
  EFFVIT_UNROLL
  for (int n = 0; n < kNTiles; ++n) {
    if (n * 8 < c.g.slot_rows) {
      const int i = c.row * Traits<T>::kScoreStride + c.key_base + n * 8 + c.column;
      store_pair(to, i, x[n][0], x[n][1]);
      store_pair(to, i + 8 * Traits<T>::kScoreStride, x[n][2], x[n][3]);
    }
  }
}

// A block of kN * 8 columns of dq, dk or dv, rows of this warp: scaled, for normalised rows projected, and written.
// dx = |norm| scale (acc - unit x * dot) with dot = sum over the other side of dS s, and without dot where norm < 0.
// `unit`: x holds normalised rows.
template <class T, bool kInShared, int kN>
EFFVIT_DEVICE void store_gradient(const Cta<T, kInShared>& c, const float (&acc)[kN][4], float scale, bool normalised,
                                  const float (&norm)[2], const float (&dot)[2], const Shared<T>& x, int x_stride,
                                  int x_col, bool unit, const Shared<Int4>& tokens, int64_t first, int cols) {
  constexpr int kStride = kOutCols + Traits<T>::kSkew;
  static_assert(kN * 8 <= kOutCols, "a block of columns fits the staging buffer");
  prim::sync_warp();  // the previous block's readers
  EFFVIT_UNROLL
  for (int n = 0; n < kN; ++n) {
    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      float y[2];
      const int row = c.row + 8 * r, col = n * 8 + c.column;
      EFFVIT_UNROLL
      for (int e = 0; e < 2; ++e) {
        y[e] = acc[n][2 * r + e] * scale;
        if (normalised && col < cols) {
          const float v = prim::to_float(x.load(row * x_stride + x_col + col + e)) * (unit ? 1.f : norm[r]);
          y[e] = norm[r] < 0.f ? -norm[r] * y[e] : norm[r] * (y[e] - v * dot[r] * scale);
        }
      }
      store_pair(c.stage, row * kStride + col, y[0], y[1]);
    }
  }
  prim::sync_warp();
  store_rows(c.g, c.stage, kStride, c.warp_row, tokens, static_cast<T*>(c.g.p.dqkv) + first,
             c.g.p.h * (2 * c.g.p.d + c.g.p.dv), cols, c.g.dqkv_vec);
}

// Adds the P or dS of keys outside the map times grad_out or q to the CTA's sums; a thread owns its columns.
template <class T>
EFFVIT_DEVICE void add_outside(const Shared<float>& sums, const Shared<float>& weight, const Shared<T>& x, int stride,
                               int cols) {
  for (int col = prim::thread_id(); col < cols; col += kThreads) {
    float sum = sums.load(col);
    EFFVIT_NO_UNROLL
    for (int row = 0; row < kTile; ++row) sum += weight.load(row) * prim::to_float(x.load(row * stride + col));
    sums.store(col, sum);
  }
}

// The gradients of pad_k and pad_v need only, per query, the sums of P and dS over the keys outside the map, for all of
// these have the same content.
template <class T, bool kInShared>
EFFVIT_DEVICE void accumulate_outside(const Cta<T, kInShared>& c, RowSums& sums, float& dot_outside) {
  EFFVIT_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float p = prim::warp_sum<4>(sums.p_outside[r]), ds = prim::warp_sum<4>(sums.ds_outside[r]);
    dot_outside += sums.dot_outside[r];
    if (c.column == 0) {
      c.row_p.store(c.row + 8 * r, p);
      c.row_ds.store(c.row + 8 * r, c.cosine ? ds * magnitude(c.q_norm.load(c.row + 8 * r)) : ds);
    }
  }
  prim::sync_threads();
  const Plan& g = c.g;
  const Shared<float> k_sums(g.s_pad, g.d_pad), v_sums(g.s_pad + 4 * g.d_pad, g.dv_pad);
  EFFVIT_NO_UNROLL
  for (int first = 0; first < g.d_pad; first += g.d_cols) {
    const int cols = min_of(g.d_cols, g.d_pad - first);
    stream_operand(c, kQ, first, cols);
    add_outside(k_sums.from(first), c.row_ds, c.q, c.stride_d(), cols);
  }
  EFFVIT_NO_UNROLL
  for (int first = 0; first < g.dv_pad; first += g.dv_cols) {
    const int cols = min_of(g.dv_cols, g.dv_pad - first);
    stream_operand(c, kGrad, first, cols);
    add_outside(v_sums.from(first), c.row_p, c.grad, c.stride_v(), cols);
  }
}

template <class T, bool kInShared>
EFFVIT_DEVICE void clear_outside(const Cta<T, kInShared>& c) {
  if (c.g.p.pad_k == nullptr) return;
  const Shared<float> sums(c.g.s_pad, c.g.d_pad + c.g.dv_pad);
  // The owner of a column in add_outside must be the one that clears it, for no barrier lies in between.
  for (int first = 0; first < c.g.d_pad; first += c.g.d_cols)
    for (int i = prim::thread_id(); i < min_of(c.g.d_cols, c.g.d_pad - first); i += kThreads)
      sums.store(first + i, 0.f);
  for (int first = 0; first < c.g.dv_pad; first += c.g.dv_cols)
    for (int i = prim::thread_id(); i < min_of(c.g.dv_cols, c.g.dv_pad - first); i += kThreads)
      sums.store(c.g.d_pad + first + i, 0.f);
}

template <class T, bool kInShared>
EFFVIT_DEVICE float cta_sum(const Cta<T, kInShared>& c, float x) {
  x = prim::warp_sum(x);
  prim::sync_threads();
  if (c.lane == 0) c.reduce.store(prim::warp_id(), x);
  prim::sync_threads();
  float sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += c.reduce.load(w);
  return sum;
}

// This CTA's row of partial sums for pad_k, pad_v and logit_scale.
template <class T, bool kInShared>
EFFVIT_DEVICE void store_small_sums(const Cta<T, kInShared>& c, int part, float dot, float dot_outside) {
  const Plan& g = c.g;
  if (g.p.pad_k == nullptr && !c.cosine) return;
  const float sum = cta_sum(c, dot), sum_outside = cta_sum(c, dot_outside);  // their barriers also publish the pad sums
  float* const to = g.small_sums + (static_cast<int64_t>(c.head) * g.small_partials + part) * g.small_stride;
  const int d = static_cast<int>(g.p.d), dv = static_cast<int>(g.p.dv);
  if (g.p.pad_k != nullptr) {
    const Shared<float> sums(g.s_pad, g.d_pad + g.dv_pad);
    for (int i = prim::thread_id(); i < d; i += kThreads) prim::store_global(to + i, sums.load(i));
    for (int i = prim::thread_id(); i < dv; i += kThreads) prim::store_global(to + d + i, sums.load(g.d_pad + i));
  }
  if (prim::thread_id() == 0) {
    prim::store_global(to + d + dv, sum_outside);
    prim::store_global(to + d + dv + 1, sum);
  }
}

// Sorts dS, summed over windows in the accumulator layout, into the table entries this tile position reaches.
template <class T, bool kInShared>
EFFVIT_DEVICE void store_table_partial(const Cta<T, kInShared>& c, const Position& at, const float (&sum)[kNTiles][4]) {
  constexpr int kStride = kTile + 1;
  const Plan& g = c.g;
  const Shared<float> all(0, kTile * kStride);  // over everything else
  prim::sync_threads();
  EFFVIT_UNROLL
  for (int n = 0; n < kNTiles; ++n) {
    if (n * 8 < g.slot_rows) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) all.store((c.row + e / 2 * 8) * kStride + n * 8 + c.column + e % 2, sum[n][e]);
    }
  }
  prim::sync_threads();
  int first, count;
  table_range(g, at.q_tile, at.k_tile, first, count);
  const int halo_y = g.axis_y.halo, halo_x = g.axis_x.halo, window_w = g.axis_x.window;
  const int key_h = g.axis_y.window + 2 * halo_y;
  const int rows = min_of(kTile, g.queries - at.q_tile * kTile);
  float* const to =
      g.table_partials +
      (((static_cast<int64_t>(c.head) * g.walks + at.walk) * g.q_tiles + at.q_tile) * g.k_tiles + at.k_tile) *
          g.partial_range;
  for (int entry = prim::thread_id(); entry < count; entry += kThreads) {
    const int iy = (first + entry) / g.table_w, ix = first + entry - iy * g.table_w;
    const int dy = iy - (g.axis_y.window - 1 + halo_y), dx = ix - (window_w - 1 + halo_x);  // q - k
    float total = 0.f;
    int y = at.q_tile * kTile / window_w, x = at.q_tile * kTile - y * window_w;
    for (int i = 0; i < rows; ++i) {
      const int ky = y - dy + halo_y, kx = x - dx + halo_x;
      const int j = ky * g.key_w + kx - at.k_tile * kTile;
      if (ky >= 0 && ky < key_h && kx >= 0 && kx < g.key_w && j >= 0 && j < kTile) {
        for (int slot = 0; slot < g.slots; ++slot) total += all.load((slot * g.slot_rows + i) * kStride + j);
      }
      if (++x == window_w) x = 0, ++y;
    }
    prim::store_global(to + entry, total);
  }
}

// Windows of up to 64 tokens without halo: all gradients in one pass.
template <class T, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_fused_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  using Tr = Traits<T>;
  constexpr int kBlockTiles = kOutCols / 8;
  const Position at = cta_position(g, 1, 1);
  const Cta<T, kInShared> c(g, at.head);
  const int n_tiles = tile_length(g.keys, 0, 8) / 8, depth = tile_length(g.keys, 0, Tr::kStepK);
  const int64_t d = g.p.d, dv = g.p.dv, dk_first = g.p.h * d + c.head * d, dv_first = 2 * g.p.h * d + c.head * dv;
  const bool pads = g.p.pad_k != nullptr, with_table = g.p.bias_table != nullptr;
  float ds_sum[kNTiles][4], dot = 0.f, dot_outside = 0.f;
  clear(ds_sum);
  load_table(c);
  clear_outside(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    const bool outside = place_tokens(c, tile, 0, 0, true);
    const bool any_outside = prim::sync_threads_or(outside);
    if (c.cosine) {
      row_norms(c.q_norm, q_rows<T>(g, c.head), c.q_token);
      row_norms(c.k_norm, k_rows<T>(g, c.head), c.k_token);
      clear_column_dot(c);
      prim::sync_threads();
    }
    if (c.resident()) {
      load_operand(c, kQ, 0, g.d_pad);
      load_operand(c, kK, 0, g.d_pad);
      load_operand(c, kV, 0, g.dv_pad);
      load_operand(c, kGrad, 0, g.dv_pad);
      prim::cp_async_commit();
    }
    row_statistics(c);
    prim::cp_async_wait<0>();
    prim::sync_threads();

    float s[kNTiles][4], dp[kNTiles][4];
    query_times_key(c, s, n_tiles);
    grad_times_value(c, dp, n_tiles);
    RowSums sums;
    score_gradients<true>(c, s, dp, sums, n_tiles);
    store_scores(c, c.p, s);
    store_scores(c, c.ds, dp);
    if (with_table) {
      EFFVIT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        if (n < n_tiles) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) ds_sum[n][e] += dp[n][e];
        }
      }
    }
    dot += sums.dot[0] + sums.dot[1];
    const float q_dot[2] = {prim::warp_sum<4>(sums.dot[0]), prim::warp_sum<4>(sums.dot[1])};
    if (pads && any_outside) accumulate_outside(c, sums, dot_outside);
    if (c.cosine) {
      prim::sync_threads();  // the readers of the rows as they are
      normalise_rows(c, c.q, c.q_norm);
      normalise_rows(c, c.k, c.k_norm);
    }
    prim::sync_threads();  // P, dS and column_dot of all warps

    constexpr float kNone[2] = {0.f, 0.f};
    EFFVIT_NO_UNROLL
    for (int first = 0; first < g.dv_pad; first += g.dv_cols) {
      const int cols = min_of(g.dv_cols, g.dv_pad - first);
      stream_operand(c, kGrad, first, cols);
      EFFVIT_NO_UNROLL
      for (int col = 0; col < cols; col += kOutCols) {
        float acc[kBlockTiles][4];
        clear(acc);
        warp_product<T, kBlockTiles, true, true>(acc, c.p, Tr::kScoreStride, c.warp_row, c.key_base, c.grad,
                                                 c.stride_v(), col, c.key_base, depth, (cols - col) / 8);
        const int left = min_of(kOutCols, static_cast<int>(dv) - first - col);
        store_gradient(c, acc, 1.f, false, kNone, kNone, c.grad, 0, 0, false, c.k_token, dv_first + first + col, left);
      }
    }
    const float q_norm[2] = {c.cosine ? c.q_norm.load(c.row) : 0.f, c.cosine ? c.q_norm.load(c.row + 8) : 0.f};
    const float k_norm[2] = {c.cosine ? c.k_norm.load(c.row) : 0.f, c.cosine ? c.k_norm.load(c.row + 8) : 0.f};
    const float k_dot[2] = {c.cosine ? column_dot(c, c.row) : 0.f, c.cosine ? column_dot(c, c.row + 8) : 0.f};
    EFFVIT_NO_UNROLL
    for (int first = 0; first < g.d_pad; first += g.d_cols) {
      const int cols = min_of(g.d_cols, g.d_pad - first);
      stream_operand(c, kQ, first, cols, c.cosine);
      stream_operand(c, kK, first, cols, c.cosine);
      EFFVIT_NO_UNROLL
      for (int col = 0; col < cols; col += kOutCols) {
        const int left = min_of(kOutCols, static_cast<int>(d) - first - col);
        float acc[kBlockTiles][4];
        clear(acc);
        warp_product<T, kBlockTiles, true, true>(acc, c.ds, Tr::kScoreStride, c.warp_row, c.key_base, c.q, c.stride_d(),
                                                 col, c.key_base, depth, (cols - col) / 8);
        store_gradient(c, acc, c.scale, c.cosine, k_norm, k_dot, c.k, c.stride_d(), col, true, c.k_token,
                       dk_first + first + col, left);
        clear(acc);
        warp_product<T, kBlockTiles, false, true>(acc, c.ds, Tr::kScoreStride, c.warp_row, c.key_base, c.k,
                                                  c.stride_d(), col, c.key_base, depth, (cols - col) / 8);
        store_gradient(c, acc, c.scale, c.cosine, q_norm, q_dot, c.q, c.stride_d(), col, true, c.q_token,
                       c.head * d + first + col, left);
      }
    }
  }
  store_small_sums(c, at.walk, dot, dot_outside);
  if (with_table) store_table_partial(c, at, ds_sum);
}

// dq, and the sums for pad_k, pad_v and logit_scale: a CTA owns a query tile and kCols columns, and walks the keys.
template <class T, int kCols, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_dq_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  using Tr = Traits<T>;
  constexpr int kOutTiles = kCols / 8, kBlockTiles = kOutCols / 8;
  static_assert(kStreamCols % kCols == 0 && kCols % kOutCols == 0, "a chunk of columns lies in one streamed piece");
  const Position at = cta_position(g, g.q_tiles, 1);
  const Cta<T, kInShared> c(g, at.head);
  const bool pads = g.p.pad_k != nullptr && at.chunk == 0;
  const int first_col = at.chunk * kCols, cols = min_of(kCols, g.d_pad - first_col);
  const int piece = c.resident() ? 0 : first_col / kStreamCols * kStreamCols;  // streamed columns that hold the chunk
  const int piece_cols = min_of(g.d_cols, g.d_pad - piece), in_piece = first_col - piece;
  float dot = 0.f, dot_outside = 0.f;
  load_table(c);
  clear_outside(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    place_tokens(c, tile, at.q_tile, 0, true);
    prim::sync_threads();
    if (c.cosine) {
      row_norms(c.q_norm, q_rows<T>(g, c.head), c.q_token);
      prim::sync_threads();
    }
    if (c.resident()) {
      load_operand(c, kQ, 0, g.d_pad);
      load_operand(c, kGrad, 0, g.dv_pad);
    }
    row_statistics(c);
    float dq[kOutTiles][4];
    clear(dq);
    RowSums sums;
    EFFVIT_NO_UNROLL
    for (int kt = 0; kt < g.k_tiles; ++kt) {
      if (kt > 0) {
        prim::sync_threads();
        place_tokens(c, tile, at.q_tile, kt, false);
        prim::sync_threads();
      }
      if (c.cosine) {
        row_norms(c.k_norm, k_rows<T>(g, c.head), c.k_token);
        prim::sync_threads();
      }
      if (c.resident()) {
        load_operand(c, kK, 0, g.d_pad);
        load_operand(c, kV, 0, g.dv_pad);
      }
      prim::cp_async_commit();
      prim::cp_async_wait<0>();
      prim::sync_threads();
      const int n_tiles = tile_length(g.keys, kt, 8) / 8;
      float s[kNTiles][4], dp[kNTiles][4];
      query_times_key(c, s, n_tiles);
      grad_times_value(c, dp, n_tiles);
      score_gradients<false>(c, s, dp, sums, n_tiles);
      store_scores(c, c.ds, dp);
      prim::sync_warp();
      if (c.cosine) {
        prim::sync_threads();  // the readers of the rows as they are
        normalise_rows(c, c.k, c.k_norm);
        prim::sync_threads();
      }
      stream_operand(c, kK, piece, piece_cols, c.cosine);
      warp_product<T, kOutTiles, false, true>(dq, c.ds, Tr::kScoreStride, c.warp_row, c.key_base, c.k, c.stride_d(),
                                              in_piece, c.key_base, tile_length(g.keys, kt, Tr::kStepK), cols / 8);
    }
    dot += sums.dot[0] + sums.dot[1];
    const float q_dot[2] = {prim::warp_sum<4>(sums.dot[0]), prim::warp_sum<4>(sums.dot[1])};
    const float q_norm[2] = {c.cosine ? c.q_norm.load(c.row) : 0.f, c.cosine ? c.q_norm.load(c.row + 8) : 0.f};
    if (c.cosine) stream_operand(c, kQ, piece, piece_cols);
    EFFVIT_UNROLL
    for (int block = 0; block < kCols / kOutCols; ++block) {
      const int left = min_of(kOutCols, static_cast<int>(g.p.d) - first_col - block * kOutCols);
      if (left > 0) {
        float part[kBlockTiles][4];
        EFFVIT_UNROLL
        for (int n = 0; n < kBlockTiles; ++n) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) part[n][e] = dq[block * kBlockTiles + n][e];
        }
        store_gradient(c, part, c.scale, c.cosine, q_norm, q_dot, c.q, c.stride_d(), in_piece + block * kOutCols, false,
                       c.q_token, c.head * g.p.d + first_col + block * kOutCols, left);
      }
    }
    if (pads) {
      prim::sync_threads();  // the previous tile's readers of row_p and row_ds
      accumulate_outside(c, sums, dot_outside);
    }
  }
  if (at.chunk == 0) store_small_sums(c, at.walk * g.q_tiles + at.q_tile, dot, dot_outside);
}

// The keys of a home window's tile as the query window `by`, `bx` blocks further sees them: out of its halo means
// masked.
template <class T, bool kInShared>
EFFVIT_DEVICE void place_reached_keys(const Cta<T, kInShared>& c, int kt, int by, int bx) {
  const Plan& g = c.g;
  const int row = prim::thread_id();
  if (row >= kTile) return;
  const int j = row % g.slot_rows + kt * kTile;
  const Int4 token = c.k_token.load(row);
  int meta = kInvalid;
  if (token.v[1] != kNowhere) {
    const int y = j / g.axis_x.window;
    const int local_y = y - by * g.axis_y.window, local_x = j - y * g.axis_x.window - bx * g.axis_x.window;
    const bool reached = local_y >= -g.axis_y.halo && local_y < g.axis_y.window + g.axis_y.halo &&
                         local_x >= -g.axis_x.halo && local_x < g.axis_x.window + g.axis_x.halo;
    const int offset = (local_y + g.axis_y.halo) * g.table_w + local_x + g.axis_x.halo;
    if (reached) meta = (offset << kMetaShift) | (key_metadata(g, token) & ((1 << kMetaShift) - 1));
  }
  c.k_meta.store(row, meta);
}

// dk and dv: a CTA owns a key tile without halo and kCols columns of each, and walks the query windows that reach it.
template <class T, int kCols, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_dkv_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  using Tr = Traits<T>;
  constexpr int kOutTiles = kCols / 8, kBlockTiles = kOutCols / 8;
  static_assert(kStreamCols % kCols == 0 && kCols % kOutCols == 0, "a chunk of columns lies in one streamed piece");
  const Position at = cta_position(g, 1, g.q_tiles);  // without halo there are as many key tiles as query tiles
  const Cta<T, kInShared> c(g, at.head);
  const int64_t d = g.p.d, dv = g.p.dv;
  const int first_col = at.chunk * kCols, piece = c.resident() ? 0 : first_col / kStreamCols * kStreamCols;
  const int in_piece = first_col - piece;
  const int k_cols = min_of(kCols, g.d_pad - first_col), v_cols = min_of(kCols, g.dv_pad - first_col);
  const int k_piece = min_of(g.d_cols, g.d_pad - piece), v_piece = min_of(g.dv_cols, g.dv_pad - piece);
  const int n_tiles = tile_length(g.queries, at.k_tile, 8) / 8;
  const int reach_y = (g.axis_y.halo + g.axis_y.window - 1) / g.axis_y.window;
  const int reach_x = (g.axis_x.halo + g.axis_x.window - 1) / g.axis_x.window;
  load_table(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    if (prim::thread_id() < kTile) {
      const int row = prim::thread_id();
      c.k_token.store(row, query_token(g, slot_window(c, tile, row), row % g.slot_rows + at.k_tile * kTile));
    }
    clear_column_dot(c);
    prim::sync_threads();
    if (c.cosine) {
      row_norms(c.k_norm, k_rows<T>(g, c.head), c.k_token);
      prim::sync_threads();
    }
    if (c.resident()) {
      load_operand(c, kK, 0, g.d_pad);
      load_operand(c, kV, 0, g.dv_pad);
    }
    float dk[kOutTiles][4], dv_acc[kOutTiles][4];
    clear(dk);
    clear(dv_acc);
    EFFVIT_NO_UNROLL
    for (int by = -reach_y; by <= reach_y; ++by) {
      EFFVIT_NO_UNROLL
      for (int bx = -reach_x; bx <= reach_x; ++bx) {
        EFFVIT_NO_UNROLL
        for (int qt = 0; qt < g.q_tiles; ++qt) {
          prim::sync_threads();  // the previous query tile's readers
          if (qt == 0) place_reached_keys(c, at.k_tile, by, bx);
          if (prim::thread_id() >= kTile) {
            const int row = prim::thread_id() - kTile;
            WindowId w = slot_window(c, tile, row);
            w.y += by * g.axis_y.dilation;
            w.x += bx * g.axis_x.dilation;
            w.valid = w.valid && w.y >= 0 && w.y < g.axis_y.windows && w.x >= 0 && w.x < g.axis_x.windows;
            c.q_token.store(row, query_token(g, w, row % g.slot_rows + qt * kTile));
          }
          prim::sync_threads();
          if (c.cosine) {
            row_norms(c.q_norm, q_rows<T>(g, c.head), c.q_token);
            prim::sync_threads();
          }
          if (c.resident()) {
            load_operand(c, kQ, 0, g.d_pad);
            load_operand(c, kGrad, 0, g.dv_pad);
          }
          prim::cp_async_commit();
          row_statistics(c);
          prim::cp_async_wait<0>();
          prim::sync_threads();
          float s[kNTiles][4], dp[kNTiles][4];
          query_times_key(c, s, n_tiles);
          grad_times_value(c, dp, n_tiles);
          RowSums sums;
          score_gradients<true>(c, s, dp, sums, n_tiles);
          store_scores(c, c.p, s);
          store_scores(c, c.ds, dp);
          if (c.cosine) {
            prim::sync_threads();  // the readers of the rows as they are
            normalise_rows(c, c.q, c.q_norm);
          }
          prim::sync_threads();
          const int depth = tile_length(g.queries, qt, Tr::kStepK);
          if (v_cols > 0) {
            stream_operand(c, kGrad, piece, v_piece);
            warp_product<T, kOutTiles, true, true>(dv_acc, c.p, Tr::kScoreStride, c.warp_row, c.key_base, c.grad,
                                                   c.stride_v(), in_piece, c.key_base, depth, v_cols / 8);
          }
          if (k_cols > 0) {
            stream_operand(c, kQ, piece, k_piece, c.cosine);
            warp_product<T, kOutTiles, true, true>(dk, c.ds, Tr::kScoreStride, c.warp_row, c.key_base, c.q,
                                                   c.stride_d(), in_piece, c.key_base, depth, k_cols / 8);
          }
        }
      }
    }
    const float k_norm[2] = {c.cosine ? c.k_norm.load(c.row) : 0.f, c.cosine ? c.k_norm.load(c.row + 8) : 0.f};
    const float k_dot[2] = {c.cosine ? column_dot(c, c.row) : 0.f, c.cosine ? column_dot(c, c.row + 8) : 0.f};
    constexpr float kNone[2] = {0.f, 0.f};
    if (c.cosine && k_cols > 0) stream_operand(c, kK, piece, k_piece);
    EFFVIT_UNROLL
    for (int block = 0; block < kCols / kOutCols; ++block) {
      const int col = first_col + block * kOutCols;
      float part[kBlockTiles][4];
      EFFVIT_UNROLL
      for (int n = 0; n < kBlockTiles; ++n) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) part[n][e] = dv_acc[block * kBlockTiles + n][e];
      }
      if (col < dv)
        store_gradient(c, part, 1.f, false, kNone, kNone, c.k, 0, 0, false, c.k_token,
                       2 * g.p.h * d + c.head * dv + col, min_of(kOutCols, static_cast<int>(dv) - col));
      EFFVIT_UNROLL
      for (int n = 0; n < kBlockTiles; ++n) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) part[n][e] = dk[block * kBlockTiles + n][e];
      }
      if (col < d)
        store_gradient(c, part, c.scale, c.cosine, k_norm, k_dot, c.k, c.stride_d(), in_piece + block * kOutCols, false,
                       c.k_token, g.p.h * d + c.head * d + col, min_of(kOutCols, static_cast<int>(d) - col));
    }
  }
}

// The table's partial sums: a CTA owns a query tile and a key tile.
template <class T, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_table_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Position at = cta_position(g, g.q_tiles, g.k_tiles);
  const Cta<T, kInShared> c(g, at.head);
  const int n_tiles = tile_length(g.keys, at.k_tile, 8) / 8;
  float ds_sum[kNTiles][4];
  clear(ds_sum);
  load_table(c);
  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    place_tokens(c, tile, at.q_tile, at.k_tile, true);
    prim::sync_threads();
    if (c.cosine) {
      row_norms(c.q_norm, q_rows<T>(g, c.head), c.q_token);
      row_norms(c.k_norm, k_rows<T>(g, c.head), c.k_token);
      prim::sync_threads();
    }
    if (c.resident()) {
      load_operand(c, kQ, 0, g.d_pad);
      load_operand(c, kK, 0, g.d_pad);
      load_operand(c, kV, 0, g.dv_pad);
      load_operand(c, kGrad, 0, g.dv_pad);
      prim::cp_async_commit();
    }
    row_statistics(c);
    prim::cp_async_wait<0>();
    prim::sync_threads();
    float s[kNTiles][4], dp[kNTiles][4];
    query_times_key(c, s, n_tiles);
    grad_times_value(c, dp, n_tiles);
    RowSums sums;
    score_gradients<false>(c, s, dp, sums, n_tiles);
    EFFVIT_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      if (n < n_tiles) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) ds_sum[n][e] += dp[n][e];
      }
    }
  }
  store_table_partial(c, at, ds_sum);
}

// dbias_table: 32 entries per CTA; four threads share an entry's partial sums, in a fixed order.
constexpr int kReduceEntries = kThreads / kWarps;
template <class Index>  // a template only so that several translation units may hold it
EFFVIT_KERNEL(kThreads, 2) window_attention_bwd_reduce_table_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Shared<float> sums(0, kThreads);
  const Index ctas_per_head = ceil_div(g.table_size, kReduceEntries);
  const Index head = prim::cta_id() / ctas_per_head;
  const int entry = static_cast<int>(prim::cta_id() - head * ctas_per_head) * kReduceEntries + prim::lane_id();
  float total = 0.f;
  if (entry < g.table_size) {
    EFFVIT_NO_UNROLL
    for (int qt = 0; qt < g.q_tiles; ++qt) {
      EFFVIT_NO_UNROLL
      for (int kt = 0; kt < g.k_tiles; ++kt) {
        int first, count;
        table_range(g, qt, kt, first, count);
        if (entry < first || entry >= first + count) continue;
        for (int walk = prim::warp_id(); walk < g.walks; walk += kWarps)
          total += prim::load_global(static_cast<const float*>(g.table_partials) +
                                     (((head * g.walks + walk) * g.q_tiles + qt) * g.k_tiles + kt) * g.partial_range +
                                     entry - first);
      }
    }
  }
  sums.store(prim::thread_id(), total);
  prim::sync_threads();
  if (prim::warp_id() != 0 || entry >= g.table_size) return;
  total = 0.f;
  for (int w = 0; w < kWarps; ++w) total += sums.load(w * kReduceEntries + prim::lane_id());
  store_small(g.p.dbias_table, head * g.table_size + entry, g.p.bias_dtype, total);
}

// dpad_k, dpad_v and dlogit_scale: a CTA owns a head.
template <class T>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_reduce_small_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const int head = static_cast<int>(prim::cta_id());
  const int d = static_cast<int>(g.p.d), dv = static_cast<int>(g.p.dv);
  const bool cosine = g.p.logit_scale != nullptr;
  const float scale = head_scale(g, head);
  const float* const from = g.small_sums + static_cast<int64_t>(head) * g.small_partials * g.small_stride;
  const auto total = [&](int column) {
    float sum = 0.f;
    for (int part = 0; part < g.small_partials; ++part)
      sum += prim::load_global(from + static_cast<int64_t>(part) * g.small_stride + column);
    return sum;
  };
  if (g.p.pad_k != nullptr) {
    const T* const pad = static_cast<const T*>(g.p.pad_k) + static_cast<int64_t>(head) * d;
    float squares = 0.f;
    for (int i = prim::lane_id(); i < d; i += prim::kWarpSize) {
      const float x = prim::to_float(prim::load_global(pad + i));
      squares += x * x;
    }
    const float norm = prim::sqrt(prim::warp_sum(squares));
    const float dot = total(d + dv);
    for (int i = prim::thread_id(); i < d; i += kThreads) {
      float y = total(i);
      if (cosine) {
        const float unit = prim::to_float(prim::load_global(pad + i)) / norm;
        y = norm < kNormEps ? y / kNormEps : (y - unit * dot) / norm;
      }
      prim::store_global(static_cast<T*>(g.p.dpad_k) + static_cast<int64_t>(head) * d + i,
                         prim::from_float<T>(y * scale));
    }
    for (int i = prim::thread_id(); i < dv; i += kThreads)
      prim::store_global(static_cast<T*>(g.p.dpad_v) + static_cast<int64_t>(head) * dv + i,
                         prim::from_float<T>(total(d + i)));
  }
  if (cosine && prim::thread_id() == 0) {
    const bool clamped = load_small(g.p.logit_scale, head, g.p.logit_scale_dtype) > kLogitScaleMax;
    store_small(g.p.dlogit_scale, head, g.p.logit_scale_dtype, clamped ? 0.f : total(d + dv + 1) * scale);
  }
}

// ---- plan and launch ----

inline bool fits_fused(const Plan& g) { return g.keys <= kTile && g.axis_y.halo == 0 && g.axis_x.halo == 0; }

// Sizes that do not depend on the pass.
template <class T>
Plan base_plan(const WindowAttentionParams& p) {
  Plan g = {};
  g.p = p;
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
  const int64_t size = sizeof(T);
  g.q_vec = aligned16(p.q, size, {p.q_stride_b, p.q_stride_y, p.q_stride_x, p.q_stride_h});
  g.k_vec = aligned16(p.k, size, {p.k_stride_b, p.k_stride_y, p.k_stride_x, p.k_stride_h});
  g.v_vec = aligned16(p.v, size, {p.v_stride_b, p.v_stride_y, p.v_stride_x, p.v_stride_h});
  g.grad_vec =
      p.grad_out != nullptr &&
      aligned16(p.grad_out, size, {p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x, p.grad_out_stride_h});
  g.pad_k_vec = aligned16(p.pad_k, size, {p.d});
  g.pad_v_vec = aligned16(p.pad_v, size, {p.dv});
  g.out_vec = aligned16(p.out, size, {p.dv});
  g.dqkv_vec = aligned16(p.dqkv, size, {p.d, p.dv});
  return g;
}

// Shared memory of a pass. Whole rows of q, k, v and grad_out stay there if they fit; else pieces of kStreamCols
// columns are loaded when they are needed, q and grad_out (k and v) in one buffer.
template <class T>
void plan_shared(Plan& g, Pass pass, int cols) {
  using Tr = Traits<T>;
  for (const bool resident : {true, false}) {
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t offset = at;
      at += ceil_div(bytes, 16) * 16;
      return static_cast<int32_t>(offset);
    };
    const auto rows = [](int64_t columns) {
      return static_cast<int64_t>(kTile) * (columns + Tr::kSkew) * static_cast<int64_t>(sizeof(T));
    };
    g.resident = resident;
    g.d_cols = resident ? g.d_pad : min_of(g.d_pad, kStreamCols);
    g.dv_cols = pass == kForward ? min_of(g.dv_pad, cols) : resident ? g.dv_pad : min_of(g.dv_pad, kStreamCols);
    const int64_t d_bytes = rows(g.d_cols), v_bytes = rows(g.dv_cols);
    const int64_t scores = rows(kTile);
    if (pass == kForward) {
      g.s_q = take(d_bytes > rows(cols) ? d_bytes : rows(cols));
      g.s_k = take(d_bytes);
      g.s_v = take(v_bytes);
      g.s_g = g.s_v;
      g.s_p = Tr::kTensorCores ? 0 : take(scores);
      g.s_ds = g.s_stage = 0;
    } else {
      const bool alias = !resident;
      g.s_q = take(alias && v_bytes > d_bytes ? v_bytes : d_bytes);
      g.s_k = take(alias && v_bytes > d_bytes ? v_bytes : d_bytes);
      g.s_v = alias ? g.s_k : take(v_bytes);
      g.s_g = alias ? g.s_q : take(v_bytes);
      g.s_p = pass == kFused || pass == kDkv ? take(scores) : 0;
      g.s_ds = pass == kTable ? 0 : take(scores);
      g.s_stage = pass == kTable ? 0 : take(rows(kOutCols));
    }
    g.s_q_token = take(kTile * 16);
    g.s_k_token = take(kTile * 16);
    g.s_k_meta = take(kTile * 4);
    g.s_rows = take(kRowBytes);
    g.s_pad = take((pass == kFused || pass == kDq) && g.p.pad_k != nullptr ? (g.d_pad + g.dv_pad) * 4 : 0);
    g.s_table = take(g.table_in_shared ? g.table_size * 4 : 0);
    if ((pass == kFused || pass == kTable) && g.p.bias_table != nullptr && at < kTile * (kTile + 1) * 4)
      at = kTile * (kTile + 1) * 4;
    if (at < scores) at = scores;  // an array that the pass does not use lies at 0
    g.shared_bytes = static_cast<int32_t>(at);
    if (at <= prim::max_shared_bytes()) return;
  }
}

// CTAs per head and tile position: as many as there are tiles, up to a fixed total over the launch.
inline int32_t plan_walks(const Plan& g, int64_t positions) {
  const int64_t wanted = ceil_div(prim::target_ctas(), g.p.h * positions);
  return static_cast<int32_t>(g.tiles < wanted ? g.tiles : wanted);
}

template <class T>
Plan pass_plan(const WindowAttentionParams& p, Pass pass, int cols) {
  Plan g = base_plan<T>(p);
  plan_shared<T>(g, pass, cols);
  g.cols = cols;
  g.col_chunks = 1;
  int64_t positions = 1;
  if (pass == kForward) {
    g.col_chunks = static_cast<int32_t>(ceil_div(g.dv_pad, cols));
    positions = static_cast<int64_t>(g.q_tiles) * g.col_chunks;
  } else if (pass == kDq) {
    g.col_chunks = static_cast<int32_t>(ceil_div(g.d_pad, cols));
    positions = static_cast<int64_t>(g.q_tiles) * g.col_chunks;
  } else if (pass == kDkv) {
    g.col_chunks = static_cast<int32_t>(ceil_div(g.d_pad > g.dv_pad ? g.d_pad : g.dv_pad, cols));
    positions = static_cast<int64_t>(g.q_tiles) * g.col_chunks;
  } else if (pass == kTable) {
    positions = static_cast<int64_t>(g.q_tiles) * g.k_tiles;
  }
  g.walks = plan_walks(g, positions);
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

inline int64_t grid_size(const Plan& g, int64_t positions) { return g.p.h * positions * g.walks; }

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

// Elements from the first to the last one of [B, H, W, h, cols] with last stride 1.
inline uint64_t extent_bytes(const WindowAttentionParams& p, int64_t b, int64_t y, int64_t x, int64_t h, int64_t cols) {
  const int64_t last = (p.B - 1) * b + (p.H - 1) * y + (p.W - 1) * x + (p.h - 1) * h + cols;
  return static_cast<uint64_t>(last * element_bytes(p.dtype));
}

inline void register_inputs(prim::GlobalRanges& ranges, const WindowAttentionParams& p) {
  ranges.read(p.q, extent_bytes(p, p.q_stride_b, p.q_stride_y, p.q_stride_x, p.q_stride_h, p.d));
  ranges.read(p.k, extent_bytes(p, p.k_stride_b, p.k_stride_y, p.k_stride_x, p.k_stride_h, p.d));
  ranges.read(p.v, extent_bytes(p, p.v_stride_b, p.v_stride_y, p.v_stride_x, p.v_stride_h, p.dv));
  const int64_t table_h = 2 * p.window_h - 1 + 2 * p.halo_h, table_w = 2 * p.window_w - 1 + 2 * p.halo_w;
  const int64_t last = (p.h - 1) * p.bias_stride_h + (table_h - 1) * p.bias_stride_y + (table_w - 1) * p.bias_stride_x;
  ranges.read(p.bias_table, static_cast<uint64_t>((last + 1) * element_bytes(p.bias_dtype)));
  ranges.read(p.logit_scale, static_cast<uint64_t>(p.h * element_bytes(p.logit_scale_dtype)));
  ranges.read(p.pad_k, static_cast<uint64_t>(p.h * p.d * element_bytes(p.dtype)));
  ranges.read(p.pad_v, static_cast<uint64_t>(p.h * p.dv * element_bytes(p.dtype)));
}

}  // namespace window_attention_impl
}  // namespace cuda

template <class Types = cuda::AllTypes>
cudaError_t launch_window_attention_fwd(const WindowAttentionParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::window_attention_impl;
  if (p.B * p.H * p.W * p.h == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  const int64_t tokens = p.B * p.H * p.W * p.h;
  ranges.write_once(p.out, static_cast<uint64_t>(tokens * p.dv * element_bytes(p.dtype)));
  ranges.write_once(p.lse, static_cast<uint64_t>(tokens * 4));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Plan g = pass_plan<T>(p, kForward);
    return dispatch_plan<kForward>(g, [&](auto cols, auto shared) {
      return EFFVIT_LAUNCH((window_attention_fwd_kernel<T, decltype(cols)::value, decltype(shared)::value>),
                           grid_size(g, int64_t{g.q_tiles} * g.col_chunks), kThreads, g.shared_bytes, stream, g);
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
  if (p.B * p.H * p.W * p.h == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  const int64_t tokens = p.B * p.H * p.W * p.h, size = element_bytes(p.dtype);
  ranges.read(p.out, static_cast<uint64_t>(tokens * p.dv * size));
  ranges.read(p.lse, static_cast<uint64_t>(tokens * 4));
  ranges.read(p.grad_lse, static_cast<uint64_t>(tokens * 4));
  ranges.read(p.grad_out, extent_bytes(p, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x,
                                       p.grad_out_stride_h, p.dv));
  ranges.write_once(p.dqkv, static_cast<uint64_t>(tokens * (2 * p.d + p.dv) * size));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    Plan table, small;
    const size_t bytes = plan_workspace<T>(p, workspace, table, small);
    ranges.write(workspace, bytes);
    cudaError_t status = cudaSuccess;
    if (fits_fused(table)) {
      status = dispatch_plan<kFused>(table, [&](auto, auto shared) {
        return EFFVIT_LAUNCH((window_attention_bwd_fused_kernel<T, decltype(shared)::value>), grid_size(table, 1),
                             kThreads, table.shared_bytes, stream, table);
      });
    } else {
      status = dispatch_plan<kDq>(small, [&](auto cols, auto shared) {
        return EFFVIT_LAUNCH((window_attention_bwd_dq_kernel<T, decltype(cols)::value, decltype(shared)::value>),
                             grid_size(small, int64_t{small.q_tiles} * small.col_chunks), kThreads, small.shared_bytes,
                             stream, small);
      });
      if (status != cudaSuccess) return status;
      const Plan g = pass_plan<T>(p, kDkv);
      status = dispatch_plan<kDkv>(g, [&](auto cols, auto shared) {
        return EFFVIT_LAUNCH((window_attention_bwd_dkv_kernel<T, decltype(cols)::value, decltype(shared)::value>),
                             grid_size(g, int64_t{g.q_tiles} * g.col_chunks), kThreads, g.shared_bytes, stream, g);
      });
      if (status != cudaSuccess) return status;
      if (p.bias_table != nullptr) {
        status = dispatch_plan<kTable>(table, [&](auto, auto shared) {
          return EFFVIT_LAUNCH((window_attention_bwd_table_kernel<T, decltype(shared)::value>),
                               grid_size(table, int64_t{table.q_tiles} * table.k_tiles), kThreads, table.shared_bytes,
                               stream, table);
        });
      }
    }
    if (status != cudaSuccess) return status;
    if (p.bias_table != nullptr) {
      ranges.write_once(p.dbias_table, static_cast<uint64_t>(p.h * table.table_size * element_bytes(p.bias_dtype)));
      status = EFFVIT_LAUNCH((window_attention_bwd_reduce_table_kernel<int64_t>),
                             p.h * ceil_div(table.table_size, kReduceEntries), kThreads, kThreads * 4, stream, table);
      if (status != cudaSuccess) return status;
    }
    if (p.pad_k != nullptr || p.logit_scale != nullptr) {
      if (p.pad_k != nullptr) {
        ranges.write_once(p.dpad_k, static_cast<uint64_t>(p.h * p.d * size));
        ranges.write_once(p.dpad_v, static_cast<uint64_t>(p.h * p.dv * size));
      }
      if (p.logit_scale != nullptr)
        ranges.write_once(p.dlogit_scale, static_cast<uint64_t>(p.h * element_bytes(p.logit_scale_dtype)));
      status = EFFVIT_LAUNCH((window_attention_bwd_reduce_small_kernel<T>), p.h, kThreads, 0, stream, small);
    }
    return status;
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
