// Gated linear attention: gradients of queries, keys and gates, from the states and their gradients. See
// gated_linear_attention.cuh.
#pragma once
#include "gated_linear_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace gated_linear_attention_impl {

// Two phases share the memory: over columns of v, then over pairs of tokens.
template <class T>
struct GradLayout {
  static constexpr int kFloatBytes = kFloatStride * 4;
  static constexpr int kThrough = 0, kTotals = kThrough + kBlockK * 4;
  static constexpr int kOfQueries = kTotals + kSubs * kBlockK * 4, kOfKeys = kOfQueries + kSubs * kBlockK * 4;
  static constexpr int kAcross = kOfKeys + kSubs * kBlockK * 4;  // [kSubs, kSubs, kBlockK]
  static constexpr int kPhase = kAcross + kSubs * kSubs * kBlockK * 4;
  static constexpr int kGradOut = kPhase, kValues = kGradOut + bytes_of<T>(kChunk, kBlockV);
  static constexpr int kState = kValues + bytes_of<T>(kChunk, kBlockV);
  static constexpr int kDState = kState + bytes_of<T>(kBlockK, kBlockV);
  static constexpr int kFirstEnd = kDState + bytes_of<T>(kBlockK, kBlockV);
  static constexpr int kPairs = kPhase, kNear = kPairs + bytes_of<T>(kChunk, kChunk);
  static constexpr int kKeys = kNear + bytes_of<T>(kChunk, kBlockK);
  static constexpr int kDq = kKeys + bytes_of<T>(kKeyRows, kBlockK), kDk = kDq + kChunk * kFloatBytes;
  static constexpr int kDqNear = kDk + kChunk * kFloatBytes, kDkNear = kDqNear + kChunk * kFloatBytes;
  static constexpr int kSecondEnd = kDkNear + kKeyRows * kFloatBytes;
  static constexpr int kBytes = kFirstEnd > kSecondEnd ? kFirstEnd : kSecondEnd;
};

// This warp's 16 rows of a float tile that lanes read by columns, from `row` on.
template <int kN>
EFFVIT_DEVICE void store_floats(const Shared<float>& to, int row, const float (&acc)[kN][4]) {
  for_each_acc<kN>(kN, [&](int n, int e) {
    to.store((row + acc_row() - warp_row() + e / 2 * 8) * kFloatStride + n * 8 + acc_col() + e % 2, acc[n][e]);
  });
}

// A CTA owns the tokens of a chunk and kBlockK channels of dq, dk and the gates' gradients; here x, y are q, k.
//
// The gradient of a gate sums over pairs (i, j), i at the gate's position or behind it, j before it: the weight of the
// pair, grad_out_i . v_j, times q_i k_j and the decay from j to i. Either may lie beyond the chunk, where the states
// stand for them. Every sum below has terms of its own: as a running sum of q dq - k dk, it would cancel.
template <class T>
EFFVIT_KERNEL(kThreads, 2)
gated_linear_attention_grad_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  using Layout = GradLayout<T>;
  const auto grad_out = tile_at<T>(Layout::kGradOut, kChunk, kBlockV);
  const auto values = tile_at<T>(Layout::kValues, kChunk, kBlockV);
  const auto state = tile_at<T>(Layout::kState, kBlockK, kBlockV);
  const auto dstate = tile_at<T>(Layout::kDState, kBlockK, kBlockV);
  const auto pairs = tile_at<T>(Layout::kPairs, kChunk, kChunk), near = tile_at<T>(Layout::kNear, kChunk, kBlockK);
  const auto keys = tile_at<T>(Layout::kKeys, kKeyRows, kBlockK);
  const Shared<float> through(Layout::kThrough, kBlockK), totals(Layout::kTotals, kSubs * kBlockK);
  const Shared<float> of_queries(Layout::kOfQueries, kSubs * kBlockK), of_keys(Layout::kOfKeys, kSubs * kBlockK);
  const Shared<float> across(Layout::kAcross, kSubs * kSubs * kBlockK);
  const Shared<float> dq_far(Layout::kDq, kChunk * kFloatStride), dk_far(Layout::kDk, kChunk * kFloatStride);
  const Shared<float> dq_near(Layout::kDqNear, kChunk * kFloatStride);
  const Shared<float> dk_near(Layout::kDkNear, kKeyRows * kFloatStride);
  const int own = prim::warp_id(), lane = prim::lane_id(), first = own * kSub;
  const int K = static_cast<int>(g.p.K);
  const bool wants_gates = g.to_dg != nullptr;
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    int64_t index = id;
    const int block_k = static_cast<int>(take_index(index, g.k_blocks));
    const int64_t head = take_index(index, g.p.H), slot = index;
    const Work work = work_at(g, slot, head);
    const int channel = block_k * kBlockK + lane;
    const int64_t partial = (slot * g.k_blocks + block_k) * g.p.H + head;  // of a gate of the head
    if (work.count == 0) {
      if (wants_gates && g.p.gate == GateKind::kHead && prim::thread_id() == 0)
        prim::store_global(static_cast<float*>(g.to_dg) + partial, 0.f);
      continue;
    }

    float weight[kTiles][4], dq[kBlockK / 8][4], dk[kBlockK / 8][4];
    clear(weight);
    clear(dq);
    clear(dk);
    EFFVIT_NO_UNROLL
    for (int block = 0; block < g.v_blocks; ++block) {
      prim::sync_threads();  // the tiles' previous readers
      load_values<T>(grad_out, g.grad_out, work, block * kBlockV);
      load_values<T>(values, g.values, work, block * kBlockV);
      load_state<T>(g, state, g.states, work, block_k * kBlockK, block * kBlockV, [](int, float, float) {});
      const float* const other = g.states + work.place * K * g.p.V + block * kBlockV + lane * 2;
      load_state<T>(g, dstate, g.dstates, work, block_k * kBlockK, block * kBlockV,
                    [&](int row, float low, float high) {
                      if (!wants_gates) return;
                      const float* const pair = other + (block_k * kBlockK + row) * g.p.V;
                      const int left = static_cast<int>(g.p.V) - block * kBlockV - lane * 2;
                      const bool inside = block_k * kBlockK + row < K;
                      float sum = inside && left > 0 ? low * prim::load_global(pair) : 0.f;
                      if (inside && left > 1) sum += high * prim::load_global(pair + 1);
                      sum = prim::warp_sum(sum);
                      if (lane == 0) through.store(row, block == 0 ? sum : through.load(row) + sum);
                    });
      prim::sync_threads();  // the tiles are complete
      product<kDepthLast, kDepthLast>(weight, (own + 1) * kSub / 8, grad_out.at(warp_row(), 0), values.at(0, 0),
                                      kBlockV);
      product<kDepthLast, kDepthLast>(dq, kBlockK / 8, grad_out.at(warp_row(), 0), state.at(0, 0), kBlockV);
      product<kDepthLast, kDepthLast>(dk, kBlockK / 8, values.at(warp_row(), 0), dstate.at(0, 0), kBlockV);
    }

    prim::sync_threads();  // the first phase's readers
    for_each_pair<kTiles>(kTiles, [&](int n, int half, int i, int j) {
      const int stop = i + (g.strict ? 0 : 1);
      store_pair(pairs, i * pairs.stride + j, j < stop ? weight[n][2 * half] * g.x_scale : 0.f,
                 j + 1 < stop ? weight[n][2 * half + 1] * g.x_scale : 0.f);
    });
    store_floats(dq_far, first, dq);
    store_floats(dk_far, first, dk);
    Gates gates(g, work, channel, totals);
    float q[kSub], k[kSub];
    load_column<T>(g.x, work, channel, q);
    load_column<T>(g.y, work, channel, k);
    prim::sync_threads();  // totals
    {
      float sum = 0.f;
      EFFVIT_UNROLL
      for (int r = 0; r < kSub; ++r) {
        store_one(near, (first + r) * near.stride + lane, q[r] * prim::exp(sum));
        sum += gates.gate[r];
      }
      store_keys<T>(keys, gates, k);
    }
    prim::sync_threads();  // the tiles are complete

    // Between sub-chunks, up to the decay within one's own.
    clear(dq);
    product<kDepthLast, kDepthFirst>(dq, kBlockK / 8, pairs.at(warp_row(), 0), keys.at(key_row(own), 0), first);
    store_floats(dq_near, first, dq);
    EFFVIT_NO_UNROLL
    for (int sub = own + 1; sub < kSubs; ++sub) {
      clear(dk);
      product<kDepthFirst, kDepthFirst>(dk, kBlockK / 8, pairs.at(sub * kSub, first), near.at(sub * kSub, 0), kSub);
      store_floats(dk_near, key_row(sub) + first, dk);
    }
    prim::sync_warp();  // these rows are complete

    float dq_row[kSub], dk_row[kSub];
    {
      const float before = gates.before(), behind = gates.behind();
      float sum = 0.f, queries = 0.f, all_keys = 0.f;
      EFFVIT_UNROLL
      for (int r = 0; r < kSub; ++r) {
        const float far = dq_far.load((first + r) * kFloatStride + lane) * g.x_scale * prim::exp(before + sum);
        queries += q[r] * far;
        dq_row[r] = far + dq_near.load((first + r) * kFloatStride + lane) * prim::exp(sum);
        sum += gates.gate[r];
      }
      sum = 0.f;
      EFFVIT_UNROLL
      for (int r = kSub - 1; r >= 0; --r) {
        sum += gates.gate[r];
        dk_row[r] = dk_far.load((first + r) * kFloatStride + lane) * prim::exp(behind + sum);
        all_keys += k[r] * dk_row[r];
      }
      of_queries.store(own * kBlockK + lane, queries);
      of_keys.store(own * kBlockK + lane, all_keys);
      EFFVIT_NO_UNROLL
      for (int sub = own + 1; sub < kSubs; ++sub) {
        float of_pairs = 0.f;
        sum = gates.between(own + 1, sub);
        EFFVIT_UNROLL
        for (int r = kSub - 1; r >= 0; --r) {
          sum += gates.gate[r];
          const float term = dk_near.load((key_row(sub) + first + r) * kFloatStride + lane) * prim::exp(sum);
          dk_row[r] += term;
          of_pairs += k[r] * term;
        }
        across.store((sub * kSubs + own) * kBlockK + lane, of_pairs);
      }
    }
    prim::sync_threads();  // sums of other sub-chunks

    float dg[kSub];
    {
      const float all = gates.entry + gates.between(0, kSubs);
      float outside = wants_gates ? through.load(lane) * prim::exp(all) : 0.f;
      for (int s = own + 1; s < kSubs; ++s) outside += of_queries.load(s * kBlockK + lane);
      for (int s = 0; s < own; ++s) {
        outside += of_keys.load(s * kBlockK + lane);
        for (int sub = own + 1; sub < kSubs; ++sub) outside += across.load((sub * kSubs + s) * kBlockK + lane);
      }
      float sum = outside;
      EFFVIT_UNROLL
      for (int r = kSub - 1; r >= 0; --r) dg[r] = sum += q[r] * dq_row[r];
      sum = 0.f;
      EFFVIT_UNROLL
      for (int r = 0; r < kSub; ++r) {
        dg[r] += sum;
        sum += k[r] * dk_row[r];
      }
    }

    // Within the sub-chunk.
    exponentiate(gates.gate);
    EFFVIT_UNROLL
    for (int j = 0; j < kSub; ++j) {
      float term[kSub], decay = 1.f;
      EFFVIT_UNROLL
      for (int i = 0; i < kSub; ++i) {
        if (i < j) continue;
        const float pair = load_element(pairs, (first + i) * pairs.stride + first + j) * decay;
        dq_row[i] += pair * k[j];
        term[i] = pair * q[i];
        dk_row[j] += term[i];
        decay *= gates.gate[i];
      }
      float sum = 0.f;
      EFFVIT_UNROLL
      for (int i = kSub - 1; i > j; --i) {
        sum += term[i] * k[j];
        dg[i] += sum;
      }
    }

    EFFVIT_UNROLL
    for (int r = 0; r < kSub; ++r) {
      if (first + r < work.count && channel < K) {
        const int64_t row = (work.batch * g.p.L + work.token(first + r)) * g.p.H + work.head;
        const int64_t element = row * K + channel;
        const float prior_dq = g.prior == nullptr ? 0.f : prim::load_global(g.prior + element);
        const float prior_dk = g.prior_dk == nullptr ? 0.f : prim::load_global(g.prior_dk + element);
        store_small(g.to, element, g.to_type, dq_row[r] + prior_dq);
        store_small(g.to_dk, element, g.to_type, dk_row[r] + prior_dk);
        if (wants_gates && g.p.gate == GateKind::kChannel) {
          const float prior_dg = g.prior_dg == nullptr ? 0.f : prim::load_global(g.prior_dg + element);
          store_small(g.to_dg, element, g.dg_type, dg[r] + prior_dg);
        }
      }
    }
    if (!wants_gates || g.p.gate == GateKind::kChannel) continue;
    float of_row = sum_transposed(dg);  // of row lane % kSub, over channels
    const int position = first + lane % kSub;
    const bool inside = lane < kSub && position < work.count;
    if (g.p.gate == GateKind::kToken) {
      const int64_t row = (work.batch * g.p.L + work.token(position)) * g.p.H + work.head;
      if (inside) prim::store_global(static_cast<float*>(g.to_dg) + block_k * (g.p.B * g.p.L * g.p.H) + row, of_row);
      continue;
    }
    of_row = prim::warp_sum(inside ? of_row : 0.f);
    prim::sync_threads();  // the readers of of_queries
    if (lane == 0) of_queries.store(own, of_row);
    prim::sync_threads();
    if (prim::thread_id() == 0) {
      float total = 0.f;
      for (int w = 0; w < kWarps; ++w) total += of_queries.load(w);
      prim::store_global(static_cast<float*>(g.to_dg) + partial, total);
    }
  }
}

}  // namespace gated_linear_attention_impl
}  // namespace cuda
}  // namespace effvit
