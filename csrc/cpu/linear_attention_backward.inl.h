// linear_attention on the CPU: the backward. Included by linear_attention_kernel.inl.h, after what it shares with the
// forward.
//
// With u = grad_out * scale / d: pass A walks the queries (dq, and the sums dS = phi(q)^T u and dz = r phi(q_den) with
// r = -(phi(q) . u S^T) / d), pass B the keys (dk, dv, dweight). In the causal form S and z are what precedes a query,
// dS and dz what follows a key: pass A walks forwards and pass B backwards, with the states running along, and within a
// chunk the scores are formed.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

template <class T>
struct Backward {
  const Params& p;
  const Plan& plan;
  // Of a chunk, padded rows of features or values. features_* are those of the denominator where it has its own.
  float *qf, *kf, *den, *u, *v, *scores, *transposed, *product, *value_product, *z_rows;
  float *dots, *factor, *slope, *r, *weights;
  // Of the unit: per head S^T [V, Kp] in pass A and dS^T in pass B, and a whole state.
  float *state_t, *total;
  float* chunk_dz;
  Ahead ahead;
  Forward<T> forward;  // sums of the causal form's prefixes; and the rows of the operands

  Backward(const Params& params, const Plan& cut, Scratch& s) : p(params), plan(cut), forward(params, cut, s, true) {
    const int64_t n = kChunk, heads = ceil_div(p.H, plan.groups);
    qf = s.take<float>(n * plan.Kp);
    kf = s.take<float>(n * plan.Kp);
    den = s.take<float>(n * plan.Kp);
    u = s.take<float>(n * plan.Vp);
    v = s.take<float>(n * plan.Vp);
    product = s.take<float>(n * plan.Kp);
    value_product = scores = transposed = z_rows = nullptr;
    if (p.causal || p.quadratic) {
      value_product = s.take<float>(n * plan.Vp);
      scores = s.take<float>(kBlock * n);
      transposed = s.take<float>(n * std::max(plan.Kp, plan.Vp));
      z_rows = s.take<float>(n * plan.Kp);
    }
    dots = s.take<float>(n);
    factor = s.take<float>(n);
    slope = s.take<float>(n);
    r = s.take<float>(n);
    weights = s.take<float>(n);
    state_t = s.take<float>(heads * plan.slot);
    total = s.take<float>(heads * plan.slot);
    chunk_dz = s.take<float>(plan.Kp);
  }

  Rows<const T> grad_rows(int64_t b) const {
    return rows<T>(p.grad_out, b, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h);
  }
  // scale/d and r of every token and head, which pass A leaves for pass B where it needs them: [2, B, L, H].
  float* factor_at(float* workspace, int64_t b, int64_t token, int64_t head) const {
    return workspace + plan.tokens_offset + (b * p.L + token) * p.H + head;
  }
  int64_t slope_offset() const { return p.B * p.L * p.H; }

  // dst = S^T of a padded state, z behind it. bfloat16 operands have it in a form of their own, with S itself.
  void transpose_state(float* dst, const float* state, [[maybe_unused]] int64_t index) {
    std::memcpy(plan.z_of(dst), state + int64_t{plan.Kp} * plan.Vp, static_cast<size_t>(2 * plan.Kp) * sizeof(float));
    if constexpr (kBf16Products<T>) {
      if (forward.bf16_products) return forward.operands.load_state(state, index, true, true);
    }
    transpose_packed(dst, plan.Kp, state, plan.Kp, plan.V);
  }

  // to[n, Vp] = rows of grad_out or v, times factor[i] where given.
  EFFVIT_INLINE void load_values(float* to, const Rows<const T>& x, int64_t at, int n, int64_t head,
                                 const float* row_factor = nullptr) {
    const T* const from = x.at(at, head);
    load_tokens(to, plan.Vp, n, plan.V, [&](int i) { return from + i * x.stride_l; }, RowFactors{row_factor});
  }

  // Steps of `ahead` in a chunk of pass A, and of pass B.
  int steps_of_queries() const { return gemm_steps(plan.chunk, plan.Kp) + gemm_steps(plan.K, plan.Vp); }
  int steps_of_keys() const { return gemm_steps(plan.chunk, plan.Kp) + gemm_steps(plan.chunk, plan.Vp); }

  // ---- pass A: queries ----

  // What pass A needs of the chunk's denominators: features, r's factors. Returns the features of the denominator.
  const float* load_queries(const Rows<const T>& q, const Rows<const T>& q_den, int64_t at, int n, int64_t head) {
    pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
    if (!q_den) return qf;
    pack_features(p.feature_map, den, q_den.at(at, head), q_den.stride_l, n, plan.K);
    return den;
  }

  // From product = u S^T: r, dq and dq_den. z_i is z + i * z_stride.
  template <FeatureMap F>
  void finish_queries(const float* features, int n, const float* z, int64_t z_stride, T* dq, T* dq_den,
                      int64_t stride) {
    for (int i = 0; i < n; ++i) {
      const float *from = product + int64_t{i} * plan.Kp, *y = qf + int64_t{i} * plan.Kp;
      const float *zi = z + i * z_stride, *fi = features + int64_t{i} * plan.Kp;
      r[i] = slope[i] == 0.f ? 0.f : slope[i] * dot(y, from, plan.Kp);
      const vf ri = set1(r[i]);
      T *to = dq + i * stride, *to_den = dq_den + i * stride;
      const bool own = dq_den != nullptr, adds = !own && p.normalize != Normalize::kNone;
      for (int c = 0; c < plan.Kp; c += kLanes) {
        vf x = load(from + c);
        if (adds) x = fma(ri, load(zi + c), x);
        store_lanes(to + c, x * feature_slope<F>(load(y + c)), plan.K - c);
        if (own) store_lanes(to_den + c, ri * load(zi + c) * feature_slope<F>(load(fi + c)), plan.K - c);
      }
    }
  }

  void finish_queries(const float* features, int64_t at, int n, int64_t head, const float* z, const Rows<T>& dq,
                      const Rows<T>& dq_den) {
    dispatch_map(p.feature_map, [&](auto f) {
      finish_queries<decltype(f)::value>(features, n, p.causal ? z_rows : z, p.causal ? plan.Kp : 0, dq.at(at, head),
                                         dq_den ? dq_den.at(at, head) : nullptr, dq.stride_l);
    });
  }

  void add_to_dz(const float* features, int n, float* dz) {
    gemm(1, plan.Kp, n, r, n, features, plan.Kp, nullptr, chunk_dz, plan.Kp);
    for (int c = 0; c < plan.Kp; c += kLanes) add_compensated(dz + c, dz + plan.Kp + c, load(chunk_dz + c));
  }

  // Adds a chunk's u and r to dS and dz.
  EFFVIT_INLINE void add_queries(const float* features, int n, float* slot) {
    if (forward.bf16_products) {
      if constexpr (kBf16Products<T>) forward.operands.add_outer(n, slot, ahead.spread());
    } else {
      gemm_into(plan.K, plan.Vp, n, TransposedA{qf, plan.Kp}, DenseB{u, plan.Vp}, StoreC{slot, plan.Vp, true},
                ahead.spread());
    }
    if (p.normalize != Normalize::kNone) {
      add_to_dz(features, n, plan.z_of(slot));
    }
  }

  // state(head) holds S^T and z of all keys, or of those before the unit; sum(head) takes dS and dz.
  void queries(const Unit& unit, float* workspace, const States& state, const States& sum) {
    const auto range = unit.tokens(p, plan, p.L), all = tokens_of(p, unit.n, p.M);
    const int64_t b = range.batch, start = tokens_of(p, unit.n, p.L).begin;
    const auto q = forward.q_rows(b), q_den = forward.q_den_rows(b), grad = grad_rows(b);
    const auto k = forward.k_rows(b), k_den = forward.k_den_rows(b), values = forward.v_rows(b);
    const auto dq = contiguous_rows<T>(p.dq, b, p.L, p.H, p.K), dq_den = contiguous_rows<T>(p.dq_den, b, p.L, p.H, p.K);
    ahead.clear();
    ahead.add(q, p.K);
    ahead.add(grad, p.V);
    if (p.causal) ahead.add(k, p.K);
    if (p.causal) ahead.add(values, p.V);
    ahead.add(dq, p.K);
    walk(ahead, plan, range.begin, range.end, unit.h0, unit.h1, steps_of_queries(), false,
         [&](int64_t at, int n, int64_t head) {
           float *const st = state(head), *const z = plan.z_of(st);
           const float* features = load_queries(q, q_den, at, n, head);
           if (p.causal) {
             const float* w = load_weights(p, b, at, n, head, weights);
             pack_features(p.feature_map, kf, k.at(at, head), k.stride_l, n, plan.K, w);
             const float* features_k = kf;
             if (k_den) {
               pack_features(p.feature_map, z_rows, k_den.at(at, head), k_den.stride_l, n, plan.K, w);
               features_k = z_rows;
             }
             running_z(features_k, n, z);
             for (int i = 0; i < n; ++i) dots[i] = dot(features + i * plan.Kp, z_rows + i * plan.Kp, plan.Kp);
             normalizers(p, dots, n, at - start + 1, 1, factor, slope);
           } else {
             for (int i = 0; i < n; ++i) dots[i] = dot(features + i * plan.Kp, z, plan.Kp);
             normalizers(p, dots, n, all.end - all.begin, 0, factor, slope);
           }
           if (forward.bf16_products) {
             if constexpr (kBf16Products<T>) {
               auto& operands = forward.operands;
               pack_feature_rows(FeatureMap::kNone, operands.rows, operands.V32, grad.at(at, head), grad.stride_l, n,
                                 plan.V, factor);
               operands.times_state_t(head - unit.h0, n, product, ahead.spread());
               operands.load_left(qf, n);
               operands.load_right(n);
             }
           } else {
             load_values(u, grad, at, n, head, factor);
             gemm_into(n, plan.Kp, plan.V, RowMajorA{u, plan.Vp}, DenseB{st, plan.Kp}, StoreC{product, plan.Kp, false},
                       ahead.spread());
           }
           if (p.causal) {
             load_values(v, values, at, n, head);
             transpose_packed(transposed, kChunk, v, n, plan.V);
             add_scores_product(Triangle::kLower, n, n, plan.V, u, plan.Vp, transposed, kChunk, kf, plan.Kp, plan.Kp,
                                scores, product, plan.Kp);
             gemm_transposed(plan.V, plan.Kp, n, v, plan.Vp, kf, plan.Kp, st, st, plan.Kp);
           }
           finish_queries(features, at, n, head, z, dq, dq_den);
           if (!(p.causal && plan.whole)) add_queries(features, n, sum(head));  // pass B sums up by itself
           if (p.causal) save_factors(workspace, b, at, n, head);
         });
  }

  void save_factors(float* workspace, int64_t b, int64_t at, int n, int64_t head) {
    float* to = factor_at(workspace, b, at, head);
    for (int i = 0; i < n; ++i) {
      to[i * p.H] = factor[i];
      to[i * p.H + slope_offset()] = r[i];
    }
  }
  void load_factors(float* workspace, int64_t b, int64_t at, int n, int64_t head) {
    const float* from = factor_at(workspace, b, at, head);
    for (int i = 0; i < n; ++i) {
      factor[i] = from[i * p.H];
      r[i] = from[i * p.H + slope_offset()];
    }
  }

  // z_rows[i] = z + the features up to i (they may lie in z_rows themselves); z goes on to the end of the chunk. The
  // chunk's terms are added to each other first, as in running_dots.
  void running_z(const float* features, int n, float* z) {
    for (int c = 0; c < plan.Kp; c += kLanes) {
      const vf before = load(z + c);
      vf own{};
      for (int i = 0; i < n; ++i) {
        own = own + load(features + i * plan.Kp + c);
        store(z_rows + i * plan.Kp + c, before + own);
      }
      add_compensated(z + c, z + plan.Kp + c, own);
    }
  }

  // ---- pass B: keys ----

  // From product = v dS^T (+ the chunk's own): dk, dk_den and dweight. dz_j is dz + j * dz_stride.
  template <FeatureMap F>
  void finish_keys(const float* features, const float* w, int n, const float* dz, int64_t dz_stride, T* dk, T* dk_den,
                   int64_t stride, int64_t weight_at) {
    const bool own = dk_den != nullptr, adds = !own;
    for (int j = 0; j < n; ++j) {
      const float *from = product + int64_t{j} * plan.Kp, *y = kf + int64_t{j} * plan.Kp;
      const float *zj = dz + j * dz_stride, *fj = features + int64_t{j} * plan.Kp;
      const vf wj = set1(w ? w[j] : 1.f);
      T *to = dk + j * stride, *to_den = dk_den + j * stride;
      vf along{};
      for (int c = 0; c < plan.Kp; c += kLanes) {
        vf x = load(from + c);
        const vf yc = load(y + c), zc = load(zj + c);
        if (adds) x = x + zc;
        along = fma(x, yc, along);
        store_lanes(to + c, wj * x * feature_slope<F>(yc), plan.K - c);
        if (own) {
          const vf fc = load(fj + c);
          along = fma(zc, fc, along);
          store_lanes(to_den + c, wj * zc * feature_slope<F>(fc), plan.K - c);
        }
      }
      if (p.dweight) store_scalar(p.dweight, p.weight_dtype, weight_at + j * p.H, reduce_add(along));
    }
  }

  void finish_keys(const Rows<const T>& k_den, int64_t b, int64_t at, int n, int64_t head, const float* w,
                   const float* dz, const Rows<T>& dk, const Rows<T>& dk_den) {
    if (k_den) pack_features(p.feature_map, den, k_den.at(at, head), k_den.stride_l, n, plan.K);
    dispatch_map(p.feature_map, [&](auto f) {
      finish_keys<decltype(f)::value>(k_den ? den : kf, w, n, p.causal ? z_rows : dz, p.causal ? plan.Kp : 0,
                                      dk.at(at, head), dk_den ? dk_den.at(at, head) : nullptr, dk.stride_l,
                                      (b * p.M + at) * p.H + head);
    });
  }

  // state(head) holds dS and dz of all queries, or of those after the unit; state_t(head) dS^T.
  void keys(const Unit& unit, float* workspace, const States& state) {
    const auto range = unit.tokens(p, plan, p.M);
    const int64_t b = range.batch;
    const auto k = forward.k_rows(b), k_den = forward.k_den_rows(b), values = forward.v_rows(b);
    const auto q = forward.q_rows(b), q_den = forward.q_den_rows(b), grad = grad_rows(b);
    const auto dk = contiguous_rows<T>(p.dk, b, p.M, p.H, p.K), dk_den = contiguous_rows<T>(p.dk_den, b, p.M, p.H, p.K);
    const auto dv = contiguous_rows<T>(p.dv, b, p.M, p.H, p.V);
    const bool streamed = plan.streams<T>(p.dv, p.B * p.M * p.H, p.V);
    ahead.clear();
    ahead.add(k, p.K);
    ahead.add(values, p.V);
    if (p.causal) ahead.add(q, p.K);
    if (p.causal) ahead.add(grad, p.V);
    ahead.add(dk, p.K);
    if (!streamed) ahead.add(dv, p.V);
    for (int64_t h = unit.h0; h < unit.h1; ++h) transpose_state(transposed_states(unit)(h), state(h), h - unit.h0);
    walk(ahead, plan, range.begin, range.end, unit.h0, unit.h1, steps_of_keys(), p.causal,
         [&](int64_t at, int n, int64_t head) {
           float *const s = state(head), *const st = transposed_states(unit)(head), *dz = plan.z_of(s);
           const float* w = load_weights(p, b, at, n, head, weights);
           pack_features(p.feature_map, kf, k.at(at, head), k.stride_l, n, plan.K);
           const AtStride place{dv.stride_l, streamed};
           if (forward.bf16_products) {
             if constexpr (kBf16Products<T>) {
               auto& operands = forward.operands;
               pack_feature_rows(FeatureMap::kNone, operands.rows, operands.V32, values.at(at, head), values.stride_l,
                                 n, plan.V);
               operands.times_state_t(head - unit.h0, n, product, ahead.spread());
               pack_feature_rows(FeatureMap::kNone, operands.rows, operands.K32, kf, plan.Kp, n, plan.Kp);
               operands.times_state(head - unit.h0, n, dv.at(at, head), place, w, ahead.spread());
             }
           } else {
             load_values(v, values, at, n, head);
             gemm_into(n, plan.Kp, plan.V, RowMajorA{v, plan.Vp}, DenseB{st, plan.Kp}, StoreC{product, plan.Kp, false},
                       ahead.spread());
           }
           if (p.causal) {
             load_factors(workspace, b, at, n, head);
             pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
             load_values(u, grad, at, n, head, factor);
             gemm_into(n, plan.Vp, plan.K, RowMajorA{kf, plan.Kp}, DenseB{s, plan.Vp},
                       StoreC{value_product, plan.Vp, false}, ahead.spread());
             add_own_queries(n, n, Triangle::kUpper);
             store_tokens(dv.at(at, head), dv.stride_l, value_product, plan.Vp, n, plan.V, w);
             const float* features_q = qf;
             if (q_den && p.normalize != Normalize::kNone) {
               pack_features(p.feature_map, z_rows, q_den.at(at, head), q_den.stride_l, n, plan.K);
               features_q = z_rows;
             }
             gemm_transposed(plan.K, plan.Vp, n, qf, plan.Kp, u, plan.Vp, s, s, plan.Vp);
             running_dz(features_q, n, dz);
             transpose_packed(st, plan.Kp, s, plan.Kp, plan.V);
           } else if (!forward.bf16_products) {
             gemm_to_tokens(n, plan.V, plan.K, RowMajorA{kf, plan.Kp}, DenseB{s, plan.Vp}, dv.at(at, head), place, w,
                            ahead.spread());
           }
           finish_keys(k_den, b, at, n, head, w, dz, dk, dk_den);
         });
    if (streamed) stream_fence();
  }

  States transposed_states(const Unit& unit) const { return {state_t, unit.h0, plan.slot}; }

  // Within a pair of chunks, m keys by n queries: product += (v u^T) phi(q), value_product += (phi(k) phi(q)^T) u.
  void add_own_queries(int m, int n, Triangle triangle) {
    transpose_packed(transposed, kChunk, u, n, plan.V);
    add_scores_product(triangle, m, n, plan.V, v, plan.Vp, transposed, kChunk, qf, plan.Kp, plan.Kp, scores, product,
                       plan.Kp);
    transpose_packed(transposed, kChunk, qf, n, plan.K);
    add_scores_product(triangle, m, n, plan.K, kf, plan.Kp, transposed, kChunk, u, plan.Vp, plan.Vp, scores,
                       value_product, plan.Vp);
  }

  // z_rows[j] = dz + r_i features[i] over i >= j; dz goes on to the start of the chunk.
  void running_dz(const float* features, int n, float* dz) {
    const bool adds = p.normalize != Normalize::kNone;
    for (int c = 0; c < plan.Kp; c += kLanes) {
      const vf before = load(dz + c);
      vf own{};
      for (int i = n - 1; i >= 0; --i) {
        if (adds) own = fma(set1(r[i]), load(features + i * plan.Kp + c), own);
        store(z_rows + i * plan.Kp + c, before + own);
      }
      add_compensated(dz + c, dz + plan.Kp + c, own);
    }
  }

  // ---- the quadratic form: one (sequence, head) from the scores of all pairs of chunks ----

  void quadratic(const Unit& unit, float* workspace) {
    const int64_t b = unit.n, head = unit.h0;
    const auto q = forward.q_rows(b), q_den = forward.q_den_rows(b), grad = grad_rows(b);
    const auto k = forward.k_rows(b), k_den = forward.k_den_rows(b), values = forward.v_rows(b);
    const auto den_k = k_den ? k_den : k, den_q = q_den ? q_den : q;
    const auto dq = contiguous_rows<T>(p.dq, b, p.L, p.H, p.K), dq_den = contiguous_rows<T>(p.dq_den, b, p.L, p.H, p.K);
    const auto dk = contiguous_rows<T>(p.dk, b, p.M, p.H, p.K), dk_den = contiguous_rows<T>(p.dk_den, b, p.M, p.H, p.K);
    const auto dv = contiguous_rows<T>(p.dv, b, p.M, p.H, p.V);
    const int chunk = plan.chunk;
    const bool normalized = p.normalize != Normalize::kNone;
    const auto size_of = [&](int64_t at, int64_t all) { return static_cast<int>(std::min<int64_t>(chunk, all - at)); };
    float *const z = state_t, *const dz = total;
    zero(z, 2 * plan.Kp);
    zero(dz, 2 * plan.Kp);
    if (!p.causal && normalized) {
      for (int64_t j = 0; j < p.M; j += chunk) {
        const int n = size_of(j, p.M);
        const float* w = load_weights(p, b, j, n, head, weights);
        pack_features(p.feature_map, kf, den_k.at(j, head), den_k.stride_l, n, plan.K, w, z);
      }
    }
    for (int64_t at = 0; at < p.L; at += chunk) {
      const int n = size_of(at, p.L);
      const float* features = load_queries(q, q_den, at, n, head);
      if (p.causal) {
        const float* w = load_weights(p, b, at, n, head, weights);
        pack_features(p.feature_map, kf, den_k.at(at, head), den_k.stride_l, n, plan.K, w);
        running_z(kf, n, z);
        for (int i = 0; i < n; ++i) dots[i] = dot(features + i * plan.Kp, z_rows + i * plan.Kp, plan.Kp);
        normalizers(p, dots, n, at + 1, 1, factor, slope);
      } else {
        for (int i = 0; i < n; ++i) dots[i] = dot(features + i * plan.Kp, z, plan.Kp);
        normalizers(p, dots, n, p.M, 0, factor, slope);
        if (p.M == 0) std::fill(slope, slope + n, 0.f);  // no scores: nothing depends on q_den, even where d is 0
      }
      load_values(u, grad, at, n, head, factor);
      zero(product, int64_t{n} * plan.Kp);
      for (int64_t j = 0; j < (p.causal ? at + n : p.M); j += chunk) {
        const int columns = size_of(j, p.M);
        const float* w = load_weights(p, b, j, columns, head, weights);
        pack_features(p.feature_map, kf, k.at(j, head), k.stride_l, columns, plan.K, w);
        load_values(v, values, j, columns, head);
        transpose_packed(transposed, kChunk, v, columns, plan.V);
        add_scores_product(p.causal && j == at ? Triangle::kLower : Triangle::kFull, n, columns, plan.V, u, plan.Vp,
                           transposed, kChunk, kf, plan.Kp, plan.Kp, scores, product, plan.Kp);
      }
      finish_queries(features, at, n, head, z, dq, dq_den);
      if (!p.causal && normalized) {
        add_to_dz(features, n, dz);
      }
      save_factors(workspace, b, at, n, head);
    }
    for (int64_t i = ceil_div(p.M, chunk) - 1; i >= 0; --i) {
      const int64_t at = i * chunk;
      const int n = size_of(at, p.M);
      const float* w = load_weights(p, b, at, n, head, weights);
      pack_features(p.feature_map, kf, k.at(at, head), k.stride_l, n, plan.K);
      load_values(v, values, at, n, head);
      zero(product, int64_t{n} * plan.Kp);
      zero(value_product, int64_t{n} * plan.Vp);
      for (int64_t l = p.causal ? at : 0; l < p.L; l += chunk) {
        const int columns = size_of(l, p.L);
        load_factors(workspace, b, l, columns, head);
        pack_features(p.feature_map, qf, q.at(l, head), q.stride_l, columns, plan.K);
        load_values(u, grad, l, columns, head, factor);
        add_own_queries(n, columns, p.causal && l == at ? Triangle::kUpper : Triangle::kFull);
      }
      if (p.causal) {
        load_factors(workspace, b, at, n, head);
        pack_features(p.feature_map, qf, den_q.at(at, head), den_q.stride_l, n, plan.K);
        running_dz(qf, n, dz);
      }
      store_tokens(dv.at(at, head), dv.stride_l, value_product, plan.Vp, n, plan.V, w);
      finish_keys(k_den, b, at, n, head, w, dz, dk, dk_den);
    }
  }

  // ---- phases ----

  const float* grad_state(int64_t pair) const { return p.grad_state ? p.grad_state + pair * p.K * p.V : nullptr; }
  const float* grad_z(int64_t pair) const { return p.grad_z ? p.grad_z + pair * p.K : nullptr; }
  void store_initial(const float* slot, int64_t pair) const {
    store_state(plan, slot, p.dinitial_state ? p.dinitial_state + pair * p.K * p.V : nullptr,
                p.dinitial_z ? p.dinitial_z + pair * p.K : nullptr);
  }

  // S^T and z of the unit's heads: of all keys, or for a whole causal sequence of none but the initial state.
  void load_states(const Unit& unit, float* scratch) {
    for (int64_t h = unit.h0; h < unit.h1; ++h) {
      const int64_t pair = forward.pair(unit, h);
      if (p.causal) {
        load_state(plan, scratch, forward.initial_state(pair), forward.initial_z(pair));
      } else {
        load_state(plan, scratch, p.state + pair * p.K * p.V, p.z + pair * p.K);
      }
      transpose_state(transposed_states(unit)(h), scratch, h - unit.h0);
    }
  }

  void run_whole(const Unit& unit, float* workspace) {
    const States sum{total, unit.h0, plan.slot};
    load_states(unit, total);
    for (int64_t h = unit.h0; h < unit.h1; ++h) {
      const int64_t pair = forward.pair(unit, h);
      load_state(plan, sum(h), p.causal ? nullptr : grad_state(pair), p.causal ? nullptr : grad_z(pair));
    }
    queries(unit, workspace, transposed_states(unit), sum);
    for (int64_t h = unit.h0; h < unit.h1; ++h) {
      const int64_t pair = forward.pair(unit, h);
      if (p.causal) load_state(plan, sum(h), grad_state(pair), grad_z(pair));
    }
    keys(unit, workspace, sum);
    for (int64_t h = unit.h0; h < unit.h1; ++h) store_initial(sum(h), forward.pair(unit, h));
  }

  // Phases: 0 everything of whole sequences, or the causal form's partial S; 1 their prefixes; 2 pass A; 3 dS from its
  // partial sums; 4 pass B.
  void run(int phase, float* workspace, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      if (sums_states(phase)) {
        const int64_t n = index / p.H, head = index % p.H;
        float* const base = workspace + (phase == 1 ? 0 : plan.grads_offset);
        const auto slot = [&](int64_t split) { return states_of(p, plan, base, n, split)(head); };
        if (phase == 1) {
          load_state(plan, total, forward.initial_state(index), forward.initial_z(index));
          sum_slots(plan, true, false, total, slot);
          continue;
        }
        load_state(plan, total, grad_state(index), grad_z(index));
        sum_slots(plan, p.causal, p.causal, total, slot);
        store_initial(total, index);
        continue;
      }
      const Unit unit(p, plan, index);
      const States own = states_of(p, plan, workspace, unit.n, unit.split);
      float* const grads = workspace + plan.grads_offset;
      const States own_grad = states_of(p, plan, grads, unit.n, unit.split);
      if (p.quadratic) {
        quadratic(unit, workspace);
      } else if (plan.whole) {
        run_whole(unit, workspace);
      } else if (phase == 0) {
        for (int64_t h = unit.h0; h < unit.h1; ++h) zero(own(h), plan.slot);
        forward.sums(unit, own);
      } else if (phase == 2) {
        if (p.causal) {
          for (int64_t h = unit.h0; h < unit.h1; ++h) transpose_state(transposed_states(unit)(h), own(h), h - unit.h0);
        } else {
          load_states(unit, total);
        }
        for (int64_t h = unit.h0; h < unit.h1; ++h) zero(own_grad(h), plan.slot);
        queries(unit, workspace, transposed_states(unit), own_grad);
      } else if (p.causal) {
        keys(unit, workspace, own_grad);
      } else {
        keys(unit, workspace, states_of(p, plan, grads, unit.n, 0));
      }
    }
  }
};

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
