// What the passes of gated linear attention share: chunks, gates, columns of tokens, tiles. See
// gated_linear_attention.cuh.
#pragma once
#include "../common/gated_linear_attention_params.h"
#include "tile/plan.cuh"
#include "tile/product.cuh"

namespace effvit {
namespace cuda {
namespace gated_linear_attention_impl {

using namespace tile;

constexpr int kChunk = kTile;  // tokens that a CTA works on
constexpr int kSub = 16;  // of these a warp has so many, a sub-chunk
constexpr int kSubs = kChunk / kSub;
constexpr int kBlockK = prim::kWarpSize;  // channels at a time: a lane has one
constexpr int kBlockV = kTile;  // columns of v at a time
constexpr int kFloatStride = kBlockK + 1;  // of tiles that lanes read by columns
static_assert(kSubs == kWarps, "a warp owns a sub-chunk");

// ---- the descriptor of a pass ----

// The walk over a sequence that gives its state, or (dual) that of the state's gradient, which goes the other way, with
// q for k and grad_out for v, and where a gate acts behind its token, not before.
struct Pass {
  GatedLinearAttentionParams p;
  Tokens x, y, values;  // state: the sum of x^T y. out: x queries, y keys, of values. grad: q, k, v
  Tokens grad_out;  // of grad alone
  float x_scale, y_scale;
  float *states, *dstates;  // [slots, H, K, V]: one for each chunk
  float* decays;  // [slots, H, K]: what a chunk multiplies the state with
  const float* initial;  // [N, H, K, V] or null
  float* total;  // [N, H, K, V] or null
  // Results of all tokens, contiguous, and what is added to them: float32, or null.
  void *to, *to_dk, *to_dg;
  const float *prior, *prior_dk, *prior_dg;
  DType to_type, dg_type;
  int64_t chunks;  // of a sequence, without cu_seqlens
  int64_t slots, ctas;
  int32_t k_blocks, v_blocks;
  int32_t step;  // 1 or -1: from token to token of the walk
  bool dual;
  bool strict;  // a token does not see itself
};

// ---- chunks ----

// Slots count chunks over all sequences. With cu_seqlens, whose values the host does not know, a sequence that begins
// at token t has the slots from t / kChunk + n on: at most one slot a sequence is nobody's.
struct Sequence {
  int64_t batch, begin, end, slot, chunks;
};
EFFVIT_DEVICE Sequence sequence_at(const Pass& g, int64_t n) {
  GatedRange range{n, 0, g.p.L};
  int64_t slot = n * g.chunks;
  if (g.p.cu_seqlens != nullptr) {
    range = gated_range(g.p, n, prim::load_global(g.p.cu_seqlens + n), prim::load_global(g.p.cu_seqlens + n + 1));
    slot = range.begin / kChunk + n;
  }
  return {range.batch, range.begin, range.end, slot, ceil_div(range.end - range.begin, kChunk)};
}

// What a CTA does: `count` tokens of one chunk, at one head. Positions are in the order of the walk.
struct Work {
  int64_t batch, origin, place;  // place: slot * H + head
  int count, head, step;

  EFFVIT_DEVICE int64_t token(int position) const { return origin + static_cast<int64_t>(position) * step; }
};
EFFVIT_DEVICE Work work_at(const Pass& g, int64_t slot, int64_t head) {
  int64_t n = 0;
  if (g.p.cu_seqlens == nullptr) {
    n = slot / g.chunks;
  } else {
    int64_t stop = g.p.N;  // the last sequence whose slots begin at this one or before
    EFFVIT_NO_UNROLL
    while (stop - n > 1) {
      const int64_t middle = (n + stop) / 2;
      const int32_t at = prim::load_global(g.p.cu_seqlens + middle);
      if (gated_range(g.p, middle, at, at).begin / kChunk + middle > slot) {
        stop = middle;
      } else {
        n = middle;
      }
    }
  }
  const Sequence s = sequence_at(g, n);
  const int64_t first = s.begin + (slot - s.slot) * kChunk;
  Work work;
  work.batch = s.batch;
  work.head = static_cast<int>(head);
  work.place = slot * g.p.H + head;
  work.step = g.step;
  work.count = slot < s.slot ? 0 : static_cast<int>(most(0, least(kChunk, s.end - first)));
  work.origin = g.step > 0 ? first : first + work.count - 1;
  return work;
}

// ---- gates ----

// What the state is multiplied with, as a logarithm, on its way from position at - 1 to `at`. From 0 to the chunk's
// length: at the ends it comes into the chunk, or leaves it.
EFFVIT_DEVICE float gate_at(const Pass& g, const Work& work, int at, int channel) {
  const auto& p = g.p;
  const int position = at - (g.dual ? 1 : 0);
  if (p.gate == GateKind::kNone || position < 0 || position >= work.count || channel >= p.K) return 0.f;
  const int64_t element = work.batch * p.g_stride_b + work.token(position) * p.g_stride_l + work.head * p.g_stride_h;
  return load_small(p.g, element + (p.gate == GateKind::kChannel ? channel : 0), p.gate_dtype);
}

// The gates of a chunk in the channel of this lane. A warp has those that follow its sub-chunk's positions, kSub of
// them, in registers; of the others, sums in shared memory. All are sums of gates over a range, never differences of
// sums: a small gate beside a large one counts.
struct Gates {
  float gate[kSub];  // from a position to the next one
  float entry;  // into the chunk
  Shared<float> totals;  // [kSubs, kBlockK], of sub-chunks

  // A barrier must come before this, after the last readers of totals, and one after it.
  EFFVIT_DEVICE Gates(const Pass& g, const Work& work, int channel, const Shared<float>& shared) : totals(shared) {
    const int first = prim::warp_id() * kSub;
    float total = 0.f;
    EFFVIT_UNROLL
    for (int r = 0; r < kSub; ++r) total += gate[r] = gate_at(g, work, first + r + 1, channel);
    entry = gate_at(g, work, 0, channel);
    totals.store(prim::thread_id(), total);
  }
  EFFVIT_DEVICE float between(int first, int last) const {  // of sub-chunks [first, last)
    float sum = 0.f;
    for (int s = first; s < last; ++s) sum += totals.load(s * kBlockK + prim::lane_id());
    return sum;
  }
  EFFVIT_DEVICE float before() const { return entry + between(0, prim::warp_id()); }
  EFFVIT_DEVICE float behind() const { return between(prim::warp_id() + 1, kSubs); }
};

// ---- tokens ----

// The sub-chunk's elements of one column; zeros where there is none.
template <class T>
EFFVIT_DEVICE void load_column(const Tokens& from, const Work& work, int column, float (&x)[kSub]) {
  const int first = prim::warp_id() * kSub;
  EFFVIT_UNROLL
  for (int r = 0; r < kSub; ++r) {
    const bool inside = first + r < work.count && column < from.dim;
    x[r] = inside ? prim::to_float(
                        prim::load_global(token_row<T>(from, work.batch, work.token(first + r), work.head) + column))
                  : 0.f;
  }
}

// ---- tiles ----

template <class T>
using Element = typename Wide<T>::Element;
template <class T>
constexpr int bytes_of(int rows, int cols) {
  return static_cast<int>(tile_bytes<Element<T>>(rows, cols)) * (Wide<T>::kSplit ? 2 : 1);
}
template <class T>
EFFVIT_DEVICE Tile<Wide<T>> tile_at(int offset, int rows, int cols) {
  return Tile<Wide<T>>(offset, offset + static_cast<int>(tile_bytes<Element<T>>(rows, cols)), rows, cols);
}

template <class F>
EFFVIT_DEVICE void store_one(const Tile<F>& to, int i, float x) {
  if constexpr (kTensorCores<typename F::Element>) {
    uint32_t hi, lo;
    pack_pair<F>(x, 0.f, hi, lo);
    to.hi.store(i, prim::bfloat16{static_cast<uint16_t>(hi)});
    if constexpr (F::kSplit) to.lo.store(i, prim::bfloat16{static_cast<uint16_t>(lo)});
  } else {
    to.hi.store(i, x);
  }
}

// Columns [col, col + kBlockV) of the chunk's tokens; zeros where there is none.
template <class T>
EFFVIT_DEVICE void load_values(const Tile<Wide<T>>& to, const Tokens& from, const Work& work, int col) {
  constexpr int kPieces = kBlockV / kVec<T>;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < kChunk * kPieces; i += kThreads) {
    const int row = i / kPieces, at = i % kPieces * kVec<T>;
    const int n = row < work.count ? piece_length<T>(from.dim - col - at) : 0;
    float x[kVec<T>];
    to_floats<T>(load_piece(token_row<T>(from, work.batch, work.token(row), work.head) + col + at, n, from.vec), x);
    store_piece(to, row * to.stride + at, x);
  }
}

// A block of a state, [kBlockK, kBlockV]; f(row, low, high) sees each pair, a warp a row at a time.
template <class T, class F>
EFFVIT_DEVICE void load_state(const Pass& g, const Tile<Wide<T>>& to, const float* states, const Work& work, int row,
                              int col, const F& f) {
  const int K = static_cast<int>(g.p.K), V = static_cast<int>(g.p.V), at = col + prim::lane_id() * 2;
  const float* const from = states + work.place * K * V + at;
  EFFVIT_NO_UNROLL
  for (int i = prim::warp_id(); i < kBlockK; i += kWarps) {
    Vec<float, 2> pair = {{0.f, 0.f}};
    if (row + i < K && at < V) {
      const float* const place = from + static_cast<int64_t>(row + i) * V;
      if (V % 2 == 0) {
        pair = prim::load_global_vec<Vec<float, 2>>(place);
      } else {
        pair.v[0] = prim::load_global(place);
        if (at + 1 < V) pair.v[1] = prim::load_global(place + 1);
      }
    }
    store_pair(to, i * to.stride + prim::lane_id() * 2, pair.v[0], pair.v[1]);
    f(i, pair.v[0], pair.v[1]);
  }
}

// Tiles of 8 columns, an even number.
EFFVIT_DEVICE int column_tiles(int cols) { return cols >= kBlockV ? kTiles : (cols + 15) / 16 * 2; }

// Keys that lie before a sub-chunk, referred to its first token, which makes them other numbers for each: so many rows,
// those of sub-chunk s from key_row(s) on.
EFFVIT_HD constexpr int key_row(int sub) { return sub * (sub - 1) / 2 * kSub; }
constexpr int kKeyRows = kSubs * (kSubs - 1) / 2 * kSub;

template <class T>
EFFVIT_DEVICE void store_keys(const Tile<Wide<T>>& to, const Gates& gates, const float (&k)[kSub]) {
  const int own = prim::warp_id(), lane = prim::lane_id();
  EFFVIT_NO_UNROLL
  for (int sub = own + 1; sub < kSubs; ++sub) {
    float sum = gates.between(own + 1, sub);
    EFFVIT_UNROLL
    for (int r = kSub - 1; r >= 0; --r) {
      sum += gates.gate[r];
      store_one(to, (key_row(sub) + own * kSub + r) * to.stride + lane, k[r] * prim::exp(sum));
    }
  }
}

// Lane l receives the sum over the lanes of x[l % kSub].
EFFVIT_DEVICE float sum_transposed(float (&x)[kSub]) {
  const int lane = prim::lane_id();
  EFFVIT_UNROLL
  for (int m = kSub / 2; m > 0; m /= 2) {
    const bool upper = (lane & m) != 0;
    EFFVIT_UNROLL
    for (int e = 0; e < kSub / 2; ++e) {
      if (e < m) {
        const float sent = upper ? x[e] : x[e + m];
        x[e] = (upper ? x[e + m] : x[e]) + prim::shuffle_xor(sent, m);
      }
    }
  }
  return x[0] + prim::shuffle_xor(x[0], kSub);
}

EFFVIT_DEVICE void exponentiate(float (&x)[kSub]) {
  EFFVIT_UNROLL
  for (int r = 0; r < kSub; ++r) x[r] = prim::exp(x[r]);
}

}  // namespace gated_linear_attention_impl
}  // namespace cuda
}  // namespace effvit
