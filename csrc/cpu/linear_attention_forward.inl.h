// linear_attention on the CPU: the forward. Included by linear_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

template <class T>
struct Forward {
  const Params& p;
  const Plan& plan;
  float *qf, *kf, *values, *den, *dots, *factor, *weights, *scores, *kt, *o, *total;
  Ahead ahead;
  OperandsOf<T> operands;
  bool bf16_products;

  // Where the backward only needs the forward's sums, `total` is not.
  Forward(const Params& params, const Plan& cut, Scratch& s, bool sums_only = false)
      : p(params), plan(cut), operands(cut, ceil_div(params.H, cut.groups), s) {
    bf16_products = kBf16Products<T> && !p.causal && !p.quadratic;
    const int64_t n = kChunk;
    kf = s.take<float>(n * plan.Kp);
    values = s.take<float>(n * plan.Vp);
    qf = s.take<float>(n * plan.Kp);
    den = s.take<float>(n * plan.Kp);
    dots = s.take<float>(n);
    factor = s.take<float>(n);
    weights = s.take<float>(n);
    total = sums_only ? nullptr : s.take<float>(plan.whole ? ceil_div(p.H, plan.groups) * plan.slot : plan.slot);
    scores = kt = o = nullptr;
    if (p.causal || p.quadratic) {
      scores = s.take<float>(kBlock * n);
      kt = s.take<float>(n * plan.Kp);
      o = s.take<float>(n * plan.Vp);
    }
  }

  Rows<const T> q_rows(int64_t b) const { return rows<T>(p.q, b, p.q_stride_b, p.q_stride_l, p.q_stride_h); }
  Rows<const T> k_rows(int64_t b) const { return rows<T>(p.k, b, p.k_stride_b, p.k_stride_l, p.k_stride_h); }
  Rows<const T> v_rows(int64_t b) const { return rows<T>(p.v, b, p.v_stride_b, p.v_stride_l, p.v_stride_h); }
  Rows<const T> q_den_rows(int64_t b) const {
    return rows<T>(p.q_den, b, p.q_den_stride_b, p.q_den_stride_l, p.q_den_stride_h);
  }
  Rows<const T> k_den_rows(int64_t b) const {
    return rows<T>(p.k_den, b, p.k_den_stride_b, p.k_den_stride_l, p.k_den_stride_h);
  }

  // Adds the keys of a chunk to a state.
  EFFVIT_INLINE void add_keys(const Rows<const T>& k, const Rows<const T>& v, const Rows<const T>& k_den, int64_t batch,
                              int64_t at, int n, int64_t head, float* slot) {
    const float* w = load_weights(p, batch, at, n, head, weights);
    float* const z = k_den ? nullptr : plan.z_of(slot);
    if (k_den) pack_features(p.feature_map, kf, k_den.at(at, head), k_den.stride_l, n, plan.K, w, plan.z_of(slot));
    if constexpr (kBf16Products<T>) {
      if (bf16_products) {
        pack_feature_pairs(p.feature_map, operands.left_pairs, k.at(at, head), k.stride_l, n, plan.K, w, z);
        operands.load_right(v.at(at, head), v.stride_l, n);
        return operands.add_outer(n, slot, ahead.spread());
      }
    }
    pack_features(p.feature_map, kf, k.at(at, head), k.stride_l, n, plan.K, w, z);
    load_values(v, at, n, head);
    gemm_into(plan.K, plan.Vp, n, TransposedA{kf, plan.Kp}, DenseB{values, plan.Vp}, StoreC{slot, plan.Vp, true},
              ahead.spread());
  }
  EFFVIT_INLINE void load_values(const Rows<const T>& v, int64_t at, int n, int64_t head) {
    const T* const from = v.at(at, head);
    load_tokens(values, plan.Vp, n, plan.V, [&](int i) { return from + i * v.stride_l; });
  }

  // Adds the unit's keys to its states, slot(head).
  void sums(const Unit& unit, const States& slot) {
    const auto range = unit.tokens(p, plan, p.M);
    const auto k = k_rows(range.batch), v = v_rows(range.batch), k_den = k_den_rows(range.batch);
    ahead.clear();
    ahead.add(k, p.K);
    ahead.add(v, p.V);
    ahead.add(k_den, p.K);
    walk(ahead, plan, range.begin, range.end, unit.h0, unit.h1, gemm_steps(plan.K, plan.Vp), false,
         [&](int64_t at, int n, int64_t head) { add_keys(k, v, k_den, range.batch, at, n, head, slot(head)); });
  }

  // The unit's rows of out, from the complete states.
  void outputs(const Unit& unit, const States& slot) {
    const auto range = unit.tokens(p, plan, p.L), keys = tokens_of(p, unit.n, p.M);
    const auto q = q_rows(range.batch), q_den = q_den_rows(range.batch);
    const auto out = contiguous_rows<T>(p.out, range.batch, p.L, p.H, p.V);
    const bool streamed = plan.streams<T>(p.out, p.B * p.L * p.H, p.V);
    ahead.clear();
    ahead.add(q, p.K);
    ahead.add(q_den, p.K);
    if (!streamed) ahead.add(out, p.V);

    if constexpr (kBf16Products<T>) {
      for (int64_t h = unit.h0; h < unit.h1; ++h) operands.load_state(slot(h), h - unit.h0, true, false);
    }
    walk(ahead, plan, range.begin, range.end, unit.h0, unit.h1, gemm_steps(plan.chunk, plan.Vp), false,
         [&](int64_t at, int n, int64_t head) {
           float* const state = slot(head);
           const float* const z = q_den || p.normalize == Normalize::kNone ? nullptr : plan.z_of(state);
           if (q_den) {
             pack_feature_rows(p.feature_map, den, plan.Kp, q_den.at(at, head), q_den.stride_l, n, plan.K, nullptr,
                               plan.z_of(state), dots);
           }
           const auto load_q = [&](auto* to, int ld) {
             pack_feature_rows(p.feature_map, to, ld, q.at(at, head), q.stride_l, n, plan.K, nullptr, z, dots);
             normalizers(p, dots, n, keys.end - keys.begin, 0, factor, nullptr);
           };
           const AtStride place{out.stride_l, streamed};
           if constexpr (kBf16Products<T>) {
             load_q(operands.rows, operands.K32);
             operands.times_state(head - unit.h0, n, out.at(at, head), place, factor, ahead.spread());
           } else {
             load_q(qf, plan.Kp);
             gemm_to_tokens(n, plan.V, plan.K, RowMajorA{qf, plan.Kp}, DenseB{state, plan.Vp}, out.at(at, head), place,
                            factor, ahead.spread());
           }
         });
    if (streamed) stream_fence();
  }

  // dots[i] = phi(q_den_i) . z_i, where z_i runs over the keys up to i; z goes on to the end of the chunk. The chunk's
  // keys are added to each other first: one by one to a large z they would each be rounded at its size.
  EFFVIT_INLINE void running_dots(const float* features_q, const float* features_k, int n, float* z) {
    vf sums[kChunk];
    for (int c = 0; c < plan.Kp; c += kLanes) {
      const vf before = load(z + c);
      vf own{};
      for (int i = 0; i < n; ++i) {
        own = own + load(features_k + i * plan.Kp + c);
        sums[i] = fma(before + own, load(features_q + i * plan.Kp + c), c == 0 ? vf{} : sums[i]);
      }
      add_compensated(z + c, z + plan.Kp + c, own);
    }
    for (int i = 0; i < n; ++i) dots[i] = reduce_add(sums[i]);
  }

  // The unit's rows of out, each from the keys up to its own; the states, of the keys before the unit, run along.
  void causal_outputs(const Unit& unit, const States& slot) {
    const auto range = unit.tokens(p, plan, p.L);
    const int64_t start = tokens_of(p, unit.n, p.L).begin, b = range.batch;
    const auto q = q_rows(b), k = k_rows(b), v = v_rows(b), q_den = q_den_rows(b), k_den = k_den_rows(b);
    const auto out = contiguous_rows<T>(p.out, b, p.L, p.H, p.V);
    ahead.clear();
    ahead.add(q, p.K);
    ahead.add(k, p.K);
    ahead.add(v, p.V);
    walk(ahead, plan, range.begin, range.end, unit.h0, unit.h1,
         gemm_steps(plan.chunk, plan.Vp) + gemm_steps(plan.K, plan.Vp), false, [&](int64_t at, int n, int64_t head) {
           float* const state = slot(head);
           const float* w = load_weights(p, b, at, n, head, weights);
           pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
           pack_features(p.feature_map, kf, k.at(at, head), k.stride_l, n, plan.K, w);
           load_values(v, at, n, head);
           const float *dq = qf, *dk = kf;
           if (q_den) {
             pack_features(p.feature_map, den, q_den.at(at, head), q_den.stride_l, n, plan.K);
             dq = den;
           }
           if (k_den) {
             pack_features(p.feature_map, kt, k_den.at(at, head), k_den.stride_l, n, plan.K, w);
             dk = kt;
           }
           running_dots(dq, dk, n, plan.z_of(state));
           normalizers(p, dots, n, at - start + 1, 1, factor, nullptr);
           gemm_into(n, plan.Vp, plan.K, RowMajorA{qf, plan.Kp}, DenseB{state, plan.Vp}, StoreC{o, plan.Vp, false},
                     ahead.spread());
           transpose_packed(kt, kChunk, kf, n, plan.K);
           add_scores_product(Triangle::kLower, n, n, plan.K, qf, plan.Kp, kt, kChunk, values, plan.Vp, plan.Vp, scores,
                              o, plan.Vp);
           store_tokens(out.at(at, head), out.stride_l, o, plan.Vp, n, plan.V, factor);
           gemm_into(plan.K, plan.Vp, n, TransposedA{kf, plan.Kp}, DenseB{values, plan.Vp},
                     StoreC{state, plan.Vp, true}, ahead.spread());
         });
  }

  // One (sequence, head) from the scores of all pairs of chunks.
  void quadratic(const Unit& unit) {
    const int64_t b = unit.n, head = unit.h0;
    const auto q = q_rows(b), k = k_rows(b), v = v_rows(b), q_den = q_den_rows(b);
    const auto den_k = p.k_den ? k_den_rows(b) : k;
    const auto out = contiguous_rows<T>(p.out, b, p.L, p.H, p.V);
    const auto keys_of = [&](int64_t at) { return static_cast<int>(std::min<int64_t>(plan.chunk, p.M - at)); };
    float* const z = total;
    zero(z, 2 * plan.Kp);
    if (!p.causal && p.normalize != Normalize::kNone) {
      for (int64_t j = 0; j < p.M; j += plan.chunk) {
        const int n = keys_of(j);
        const float* w = load_weights(p, b, j, n, head, weights);
        pack_features(p.feature_map, kf, den_k.at(j, head), den_k.stride_l, n, plan.K, w, z);
      }
    }
    for (int64_t at = 0; at < p.L; at += plan.chunk) {
      const int n = static_cast<int>(std::min<int64_t>(plan.chunk, p.L - at));
      pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
      const float* features = qf;
      if (q_den) {
        pack_features(p.feature_map, den, q_den.at(at, head), q_den.stride_l, n, plan.K);
        features = den;
      }
      if (p.causal) {
        const float* w = load_weights(p, b, at, n, head, weights);
        pack_features(p.feature_map, kf, den_k.at(at, head), den_k.stride_l, n, plan.K, w);
        running_dots(features, kf, n, z);
      } else {
        for (int i = 0; i < n; ++i) dots[i] = dot(features + i * plan.Kp, z, plan.Kp);
      }
      normalizers(p, dots, n, p.causal ? at + 1 : p.M, p.causal, factor, nullptr);
      zero(o, int64_t{n} * plan.Vp);
      for (int64_t j = 0; j < (p.causal ? at + n : p.M); j += plan.chunk) {
        const int columns = keys_of(j);
        const float* w = load_weights(p, b, j, columns, head, weights);
        pack_features(p.feature_map, kf, k.at(j, head), k.stride_l, columns, plan.K, w);
        load_values(v, j, columns, head);
        transpose_packed(kt, kChunk, kf, columns, plan.K);
        add_scores_product(p.causal && j == at ? Triangle::kLower : Triangle::kFull, n, columns, plan.K, qf, plan.Kp,
                           kt, kChunk, values, plan.Vp, plan.Vp, scores, o, plan.Vp);
      }
      store_tokens(out.at(at, head), out.stride_l, o, plan.Vp, n, plan.V, factor);
    }
  }

  int64_t pair(const Unit& unit, int64_t head) const { return unit.n * p.H + head; }
  const float* initial_state(int64_t pair) const {
    return p.initial_state ? p.initial_state + pair * p.K * p.V : nullptr;
  }
  const float* initial_z(int64_t pair) const { return p.initial_z ? p.initial_z + pair * p.K : nullptr; }

  void run_whole(const Unit& unit) {
    const States slot{total, unit.h0, plan.slot};
    for (int64_t h = unit.h0; h < unit.h1; ++h) {
      load_state(plan, slot(h), initial_state(pair(unit, h)), initial_z(pair(unit, h)));
    }
    if (p.causal) {
      causal_outputs(unit, slot);
    } else {
      sums(unit, slot);
      outputs(unit, slot);
    }
    for (int64_t h = unit.h0; h < unit.h1; ++h) {
      store_state(plan, slot(h), p.state + pair(unit, h) * p.K * p.V, p.z + pair(unit, h) * p.K);
    }
  }

  // Phases: 0 everything of whole sequences, or partial states; 1 states from them; 2 out.
  void run(int phase, float* workspace, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      if (sums_states(phase)) {
        const int64_t n = index / p.H, head = index % p.H;
        load_state(plan, total, initial_state(index), initial_z(index));
        const auto slot = [&](int64_t split) { return states_of(p, plan, workspace, n, split)(head); };
        sum_slots(plan, p.causal, false, total, slot);
        store_state(plan, total, p.state + index * p.K * p.V, p.z + index * p.K);
        continue;
      }
      const Unit unit(p, plan, index);
      const States own = states_of(p, plan, workspace, unit.n, unit.split);
      if (p.quadratic) {
        quadratic(unit);
      } else if (plan.whole) {
        run_whole(unit);
      } else if (phase == 0) {
        for (int64_t h = unit.h0; h < unit.h1; ++h) zero(own(h), plan.slot);
        sums(unit, own);
      } else if (p.causal) {
        causal_outputs(unit, own);
      } else {
        outputs(unit, states_of(p, plan, workspace, unit.n, 0));
      }
    }
  }
};

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
