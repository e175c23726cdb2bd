// window_attention on the CPU: the backward. Included by window_attention_kernel.inl.h.
//
// P is recomputed from q, k and lse. A window that is one tile needs five products per block of query rows; their
// results go to the gradients' own rows as they leave the registers. A window in several tiles takes as many, with dq
// of all its queries in scratch. With a halo, or where that is too large, it takes two passes and seven products: the
// gradients of the queries, then those of the keys, gathered from every window whose halo reaches them.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

template <class T>
struct Backward : Pass {
  BiasGradient table_gradient;
  float *grad_out, *delta, *lse, *inverse, *factor_q, *factor_k, *v = nullptr, *vt = nullptr, *prob, *dlogit, *dk,
                                                                 *dv_sum;
  float *window_dq, *dq;  // of the window where it takes one pass, else of the tile; of the tile
  float *own_k = nullptr, *own_v = nullptr;
  // The operands of the other products in bfloat16. Those with rows in pairs start anew with each block of query rows.
  int block = 0;  // query rows of a block
  int64_t block_pairs = 0;  // and the rows that it takes up there
  BFloat16 *q16_rows = nullptr, *do16 = nullptr, *do16_rows = nullptr, *vt16 = nullptr, *k16_rows = nullptr,
           *ds16 = nullptr, *pt16 = nullptr, *dst16 = nullptr;
  float* logit_factor = nullptr;
  // Of the current head and chunk; null where the argument was not given.
  float *sum_table = nullptr, *sum_pad_k = nullptr, *sum_pad_v = nullptr, *sum_tau = nullptr;

  Backward(const Params& params, const Geometry& geometry, Scratch& scratch) : Pass(params, geometry) {
    const int64_t nq = g.q_tile_max, nk = g.k_tile_max, nk_padded = round_up(g.k_tile_max, kLanes);
    block = kBf16Tiles<T> ? g.limits.block_rows : g.backward_rows;
    block_pairs = round_up(block, kBf16Tiles<T> ? 32 : 2);
    const int64_t heads = Partials(p, g).heads(p);
    allocate<T>(scratch, heads);
    table_gradient.allocate(scratch, p, g, heads);
    for (float** x : {&delta, &lse, &inverse, &factor_q}) *x = scratch.take<float>(nq);
    factor_k = scratch.take<float>(nk);
    grad_out = scratch.take<float>(nq * g.dvp);
    prob = scratch.take<float>(int64_t{kBlockRows} * g.ld);
    dlogit = scratch.take<float>(int64_t{kBlockRows} * g.ld);
    window_dq = scratch.take<float>(g.one_pass ? int64_t{g.y.window} * g.x.window * g.dp : nq * g.dp);
    dq = window_dq;
    dk = scratch.take<float>(nk * g.dp);
    dv_sum = scratch.take<float>(nk * g.dvp);
    if constexpr (kBf16Products<T>) {
      const int64_t nk32 = round_up(g.k_tile_max, 32), in_pairs = ceil_div(nq, block) * block_pairs;
      q16_rows = scratch.take<BFloat16>(in_pairs * g.dp);
      do16 = scratch.take<BFloat16>((nq + kBlockRows) * g.dv32);
      do16_rows = scratch.take<BFloat16>(in_pairs * g.dvp);
      vt16 = scratch.take<BFloat16>(nk32 * g.dv32);
      k16_rows = scratch.take<BFloat16>(nk32 * g.dp);
      for (BFloat16** x : {&ds16, &pt16, &dst16}) *x = scratch.take<BFloat16>(kBlockRows * nk32);
      logit_factor = scratch.take<float>(kBlockRows);
    } else {
      v = scratch.take<float>(nk * g.dvp);
      vt = scratch.take<float>(g.dvp * nk_padded);
    }
    if (!g.single && !g.one_pass) {
      own_k = scratch.take<float>(nq * g.dp);
      own_v = scratch.take<float>(nq * g.dvp);
    }
  }

  // Whether q, k and grad_out are wanted in float32. For products of bfloat16 they are not; some sums want them.
  bool in_float32() const { return !kBf16Products<T> || g.cosine || g.has_pad || !g.single; }

  void load_queries(int64_t head) {
    const T* base_do = static_cast<const T*>(p.grad_out) + head * p.grad_out_stride_h;
    const int64_t plane = p.H * p.W;
    const int64_t* const grad_offset = queries.grad_offset;
    const auto row_of_do = [&](int i) { return base_do + grad_offset[i]; };
    if (in_float32()) {
      load_query_rows<T>(head);
      load_tokens(grad_out, g.dvp, queries.n, dv, row_of_do, WideFactor());
    }
    for (int i = 0; i < queries.n; ++i) {
      float* row_do = grad_out + int64_t{i} * g.dvp;
      const int64_t at = queries.lse_offset[i] + head * plane;
      lse[i] = static_cast<float>(p.lse[at] * kLog2EWide);
      delta[i] = p.grad_lse ? -p.grad_lse[at] : 0.f;
      if (g.single) continue;  // the rest of delta comes from the row itself
      const T* row_out = static_cast<const T*>(p.out) + queries.out_offset[i] + head * p.dv;
      vf acc{};
      int c = 0;
      for (; c + kLanes <= dv; c += kLanes) acc = fma(load(row_do + c), load(row_out + c), acc);
      delta[i] += reduce_add(acc);
      for (; c < dv; ++c) delta[i] += row_do[c] * to_float(row_out[c]);
    }
    if constexpr (kBf16Products<T>) {  // the same tokens in bfloat16, row-major and with rows in pairs
      const BFloat16* base = static_cast<const BFloat16*>(p.q) + head * p.q_stride_h;
      const float factor = g.cosine ? temperature(p, head) : p.scale;
      const int64_t* const offset = queries.offset;
      copy_rows(q16, g.dk32, queries.n, d, [&](int i) { return base + offset[i]; });
      copy_rows(do16, g.dv32, queries.n, dv, row_of_do);
      for (int i = 0; i < queries.n; ++i) row_scale[i] = g.cosine ? factor / std::max(q_norm[i], kNormEps) : factor;
      for (int r = 0; r < queries.n; r += block) {
        const int rows = std::min(block, queries.n - r);
        pack_rows(q16_rows + row_in_pairs(r) * g.dp, 2 * g.dp, rows, g.dp,
                  [&](int i) { return q16 + int64_t{r + i} * g.dk32; });
        pack_rows(do16_rows + row_in_pairs(r) * g.dvp, 2 * g.dvp, rows, g.dvp,
                  [&](int i) { return do16 + int64_t{r + i} * g.dv32; });
      }
    }
  }
  int64_t row_in_pairs(int r) const { return r / block * block_pairs; }  // of the first row of a block

  void load_keys(int64_t head) {
    const auto value_row = [&](int j) { return value<T>(j, head); };
    if (in_float32()) load_key_rows<T>(head);
    if constexpr (kBf16Products<T>) {
      for (int j = 0; g.cosine && j < keys.padded; ++j) {
        column_scale[j] = j < keys.n ? 1.f / std::max(k_norm[j], kNormEps) : 1.f;
      }
      transpose_16(vt16, dv, g.dv32, value_row);
      copy_rows(row16, g.dk32, keys.n, d, [&](int j) { return key<T>(j, head); });
      const auto key_row = [&](int j) { return row16 + int64_t{j} * g.dk32; };
      pack_transposed(kt16, 2 * keys.padded, keys.n, d, key_row);
      pack_rows(k16_rows, 2 * g.dp, keys.n, g.dp, key_row);
    } else {
      transpose_rows(kt, keys.padded, keys.n, d, [&](int j) { return k + int64_t{j} * g.dp; });
      if constexpr (std::is_same_v<T, float>) {
        if (dv % kLanes == 0) return transpose_rows(vt, keys.padded, keys.n, dv, value_row);
      }
      load_tokens(v, g.dvp, keys.n, dv, value_row, WideFactor());
      transpose_rows(vt, keys.padded, keys.n, dv, [&](int j) { return v + int64_t{j} * g.dvp; });
    }
  }

  // Logits of query rows [r, r + rows) and dP, rows from 0 on in prob and dlogit -> P in place. With all keys at hand
  // the rows are normalised again and the sum of P dP is taken from them, so that neither the rounding of lse nor that
  // of out enters; P then still lacks its factor inverse[i]. A window in several tiles relies on both.
  template <int kVectors>
  void probabilities(int r, int rows) {
    const int last = (kVectors ? kVectors : keys.padded / kLanes) * kLanes - kLanes;
    const int64_t ld = g.ld;
    const vi there = lanes_below(keys.n - last);
    const bool single = g.single;
    float* row = prob;
    const float* drow = dlogit;
    for (int i = r; i < r + rows; ++i, row += ld, drow += ld) {
      const vf log_sum = set1(single && keys.n == 1 ? row[0] : lse[i]);  // one key: P is exactly 1, dS exactly 0
      vf total = (vf)((vi)exp2(load(row + last) - log_sum) & there);
      store(row + last, total);
      vf along = total * load(drow + last);
#pragma GCC unroll 8
      for (int j = 0; j < last; j += kLanes) {
        const vf e = exp2(load(row + j) - log_sum);
        store(row + j, e);
        total = total + e;
        along = fma(e, load(drow + j), along);
      }
      if (!single) continue;
      inverse[i] = 1.f / reduce_add(total);
      delta[i] += reduce_add(along) * inverse[i];
    }
  }
  // dP -> dS, in place.
  template <int kVectors>
  void logit_gradients(int r, int rows) {
    const int padded = kVectors ? kVectors * kLanes : keys.padded;
    const int64_t ld = g.ld;
    const bool single = g.single;
    const float* row = prob;
    float* drow = dlogit;
    for (int i = r; i < r + rows; ++i, row += ld, drow += ld) {
      const vf factor = set1(single ? inverse[i] : 1.f), shift = set1(delta[i]);
#pragma GCC unroll 8
      for (int j = 0; j < padded; j += kLanes) store(drow + j, load(row + j) * factor * (load(drow + j) - shift));
    }
  }

  // logit_gradients, and both in bfloat16: rows of dS, and pairs of rows of P and dS, whose transposes are multiplied
  // with. In cosine attention dS takes the norms on the way, and dk all of the factor of the logits.
  template <int kVectors, bool kCosine>
  void round_operands(int r, int rows) {
    constexpr bool kScaled = kCosine || kBf16Tiles<T>;
    const int padded = kVectors ? kVectors * kLanes : keys.padded, depth = round_up(keys.padded, 32);
    const int64_t ld = g.ld;
    const bool single = g.single, keep = g.has_pad;
    float *row = prob, *drow = dlogit;
    Word *pt = reinterpret_cast<Word*>(pt16), *dst = reinterpret_cast<Word*>(dst16);
    BFloat16* ds = ds16;
    const float* const columns = column_scale;
    for (int i = r; i < r + rows; i += 2, row += 2 * ld, drow += 2 * ld, pt += padded, dst += padded, ds += 2 * depth) {
      const int next = std::min(i + 1, r + rows - 1);
      const vf factor0 = set1(single ? inverse[i] : 1.f), factor1 = set1(single ? inverse[next] : 1.f);
      const vf shift0 = set1(delta[i]), shift1 = set1(delta[next]);
      const vf scale0 = set1(row_scale[i]), scale1 = set1(row_scale[next]);
#pragma GCC unroll 8
      for (int j = 0; j < padded; j += kLanes) {
        const vf p0 = load(row + j) * factor0, p1 = load(row + ld + j) * factor1;
        const vf d0 = p0 * (load(drow + j) - shift0), d1 = p1 * (load(drow + ld + j) - shift1);
        if (keep) {
          store(row + j, p0);
          store(row + ld + j, p1);
        }
        store(drow + j, d0);
        store(drow + ld + j, d1);
        const vf column = kCosine ? load(columns + j) : set1(1.f);
        store(ds + j, kCosine ? d0 * column : d0);
        store(ds + depth + j, kCosine ? d1 * column : d1);
        store(pt + j, (vf)round_pairs(p0, p1));
        store(dst + j, (vf)(kScaled ? round_pairs(d0 * scale0, d1 * scale1) : round_pairs(d0, d1)));
      }
      for (int s = 0; kBf16Tiles<T> && padded < depth && s < 2; ++s) store(ds + s * depth + padded, vf{});
    }
  }

  // Steps of `ahead` for a head.
  int64_t steps() const {
    return std::max(1, 2 * gemm_steps(queries.n, keys.padded) + gemm_steps(queries.n, g.dp) + gemm_steps(keys.n, g.dp) +
                           gemm_steps(keys.n, g.dvp));
  }

  // P and dS of query rows [r, r + rows) into rows [0, rows) of prob and dlogit; in bfloat16 also the operands of the
  // products that follow. In float32 grad_out takes the factor that P lacks.
  void recompute_rows(int r, int rows, const float* table) {
    if constexpr (kBf16Products<T>) {
      for (int i = 0; i < (g.cosine ? rows : 1); ++i) logit_factor[i] = row_scale[r + i] * kLog2E;
      logits<T>(table, r, rows, prob, logit_factor);
      gemm_into(rows, keys.padded, dv, row_major(do16 + int64_t{r} * g.dv32, g.dv32), right(vt16, keys.padded),
                StoreC{dlogit, g.ld, false}, ahead.bursts());
      if (rows % 2 == 1) {  // the second row of the last pair
        zero(prob + int64_t{rows} * g.ld, keys.padded);
        zero(dlogit + int64_t{rows} * g.ld, keys.padded);
      }
      dispatch_vectors(keys.padded / kLanes, [&](auto n) {
        probabilities<decltype(n)::value>(r, rows);
        if (g.cosine) {
          round_operands<decltype(n)::value, true>(r, rows);
        } else {
          round_operands<decltype(n)::value, false>(r, rows);
        }
      });
    } else {
      logits<T>(table, r, rows, prob, nullptr);
      gemm_into(rows, keys.padded, dv, row_major(grad_out + int64_t{r} * g.dvp, g.dvp), right(vt, keys.padded),
                StoreC{dlogit, g.ld, false}, ahead.bursts());
      dispatch_vectors(keys.padded / kLanes, [&](auto n) {
        probabilities<decltype(n)::value>(r, rows);
        logit_gradients<decltype(n)::value>(r, rows);
      });
      for (int i = r; g.single && i < r + rows; ++i) {
        float* row = grad_out + int64_t{i} * g.dvp;
        const vf factor = set1(inverse[i]);
        for (int c = 0, end = g.dvp; c < end; c += kLanes) store(row + c, load(row + c) * factor);
      }
    }
  }

  // All pads of a tile are one and the same key, so their columns of P and dS are summed before anything else.
  void add_pads(int r, int rows) {
    for (int i = 0; i < rows; ++i) {
      float sum_p = 0.f, sum_ds = 0.f;
      for (int j = 0; j < keys.n; ++j) {
        if (keys.k_offset[j] < 0) {
          sum_p += prob[int64_t{i} * g.ld + j];
          sum_ds += dlogit[int64_t{i} * g.ld + j];
        }
      }
      axpy(sum_pad_v, sum_p, grad_out + int64_t{r + i} * g.dvp, g.dvp);
      axpy(sum_pad_k, sum_ds * kLn2, q + int64_t{r + i} * g.dp, g.dp);
    }
  }

  void add_sums(int r, int rows) {
    if (sum_table) table_gradient.add(g, queries, keys, dlogit, r, rows, sum_table);
    if (keys.pads) add_pads(r, rows);
  }

  // Products whose results go to the gradients as they leave the registers. Without an instruction for it, rounding to
  // 16 bits there would cost more registers than the product leaves.
  bool direct_dq() const { return (std::is_same_v<T, float> || kBf16Products<T>) && g.single && !g.cosine; }
  bool direct_dkv() const { return direct_dq() && queries.n <= block; }

  // Row 0 of the gradients of a head.
  T* dq_of(int64_t head) const { return static_cast<T*>(p.dq) + head * p.d; }
  T* dk_of(int64_t head) const { return static_cast<T*>(p.dk) + head * p.d; }
  T* dv_of(int64_t head) const { return static_cast<T*>(p.dvalue) + head * p.dv; }

  // One (queries, keys) tile. want_dq covers everything that is summed over queries of a window: dq, table, pads.
  void tile(int64_t head, bool want_dq, bool want_dkv, bool first_dq, bool first_dkv) {
    const float* table = tables.get(p, g, head);
    for (int r = 0; r < queries.n; r += block) {
      const int rows = std::min(block, queries.n - r);
      const bool accumulate_dkv = !first_dkv || r > 0;
      // dq = dS k, dv = P^T dO, dk = dS^T q
      const auto products = [&](auto ds, auto keys_b, auto pt, auto do_b, auto dst, auto q_b) {
        if (want_dq) {
          if (direct_dq()) {
            gemm_to_tokens(rows, d, keys.n, ds, keys_b, dq_of(head), AtOffsets{queries.dq_offset + r, false}, factor_q,
                           ahead.bursts());
          } else {
            gemm_into(rows, g.dp, keys.n, ds, keys_b, StoreC{dq + int64_t{r} * g.dp, g.dp, !first_dq}, ahead.bursts());
          }
          add_sums(r, rows);
        }
        if (!want_dkv) return;
        if (direct_dkv()) {
          const bool holes = keys.pads > 0;
          gemm_to_tokens(keys.n, dv, rows, pt, do_b, dv_of(head), AtOffsets{keys.dv_offset, holes}, nullptr,
                         ahead.bursts());
          gemm_to_tokens(keys.n, d, rows, dst, q_b, dk_of(head), AtOffsets{keys.dk_offset, holes}, factor_k,
                         ahead.bursts());
        } else {
          gemm_into(keys.n, g.dvp, rows, pt, do_b, StoreC{dv_sum, g.dvp, accumulate_dkv}, ahead.bursts());
          gemm_into(keys.n, g.dp, rows, dst, q_b, StoreC{dk, g.dp, accumulate_dkv}, ahead.bursts());
        }
      };
      recompute_rows(r, rows, table);
      if constexpr (kBf16Products<T>) {
        const int64_t at = row_in_pairs(r);
        products(row_major(ds16, round_up(keys.padded, 32)), right(k16_rows, g.dp), transposed(pt16, keys.padded),
                 right(do16_rows + at * g.dvp, g.dvp), transposed(dst16, keys.padded),
                 right(q16_rows + at * g.dp, g.dp));
      } else {
        products(row_major(dlogit, g.ld), right(k, g.dp), transposed(prob, g.ld),
                 right(grad_out + int64_t{r} * g.dvp, g.dvp), transposed(dlogit, g.ld),
                 right(q + int64_t{r} * g.dp, g.dp));
      }
    }
  }

  void write_dq(int64_t head) {
    const float factor = g.cosine ? temperature(p, head) : p.scale;
    const bool clamped = g.cosine && load_scalar(p.logit_scale, p.logit_scale_dtype, head) > kLogitScaleMax;
    for (int i = 0; i < queries.n; ++i) {
      float* row = dq + int64_t{i} * g.dp;
      float scale = factor;
      if (g.cosine) {
        float* unit = q + int64_t{i} * g.dp;  // log2(e) * temperature * q^
        if (!clamped) *sum_tau += dot(unit, row, g.dp) * kLn2;
        const vf reciprocal = set1(1.f / (factor * kLog2E)), forward = set1(factor);
        for (int c = 0; c < g.dp; c += kLanes) {
          store(row + c, load(row + c) * forward);
          store(unit + c, load(unit + c) * reciprocal);
        }
        normalize_row_backward(row, unit, q_norm[i], g.dp);
        scale = 1.f;
      }
      store_row(dq_of(head) + queries.dq_offset[i], row, d, scale);
    }
  }

  // What a row of dS^T q lacks: the q that dS is multiplied with has its factor log2(e), but in bfloat16 it is as it
  // was, and dS takes the factors (on pairs only those that differ from row to row).
  float key_factor() const {
    if constexpr (!kBf16Products<T>) return kLn2;
    return kBf16Tiles<T> || g.cosine ? 1.f : p.scale;
  }

  // row_k: the gradient of k, or of k^.
  // Key j of the tile. row_k: the gradient of k, or of k^.
  void write_dkv(int j, int64_t head, float* row_k, const float* unit_k, float norm, const float* row_v) {
    if (keys.dk_offset[j] < 0) return;
    if (g.cosine) normalize_row_backward(row_k, unit_k, norm, g.dp);
    store_row(dk_of(head) + keys.dk_offset[j], row_k, d, key_factor());
    store_row(dv_of(head) + keys.dv_offset[j], row_v, dv);
  }

  void write_keys(int64_t head) {
    for (int j = 0; j < keys.n; ++j) {
      const int64_t at = int64_t{j} * g.dp;
      write_dkv(j, head, dk + at, k + at, k_norm[j], dv_sum + int64_t{j} * g.dvp);
    }
  }

  void window_in_one_tile(int64_t head) {
    load_queries(head);
    load_keys(head);
    tile(head, true, true, true, true);
    if (!direct_dq()) write_dq(head);
    if (!direct_dkv()) write_keys(head);
  }

  // A window in several tiles, all of its gradients: every tile of keys with every tile of queries.
  void window_in_one_pass(const Window& w, int64_t head) {
    const auto for_queries = [&](const auto& f) {
      for (int y0 = 0; y0 < g.y.window; y0 += g.q_tile_rows) {
        find_queries(p, g, w.b, w.y, w.x, y0, std::min(y0 + g.q_tile_rows, g.y.window), &queries);
        if (queries.n == 0) continue;
        dq = window_dq + int64_t{y0} * g.x.window * g.dp;
        f();
      }
    };
    bool first_keys = true;
    for (int y0 = 0; y0 < g.y.window; y0 += g.k_tile_rows) {
      find_keys(p, g, w.b, w.y, w.x, y0, std::min(y0 + g.k_tile_rows, g.y.window), 0, g.x.window, g.has_pad, &keys);
      if (keys.n == 0) continue;
      load_keys(head);
      bool first_queries = true;
      for_queries([&] {
        find_mask(p, queries, keys);
        load_queries(head);
        tile(head, true, true, first_keys, first_queries);
        first_queries = false;
      });
      if (!first_queries) write_keys(head);
      first_keys = false;
    }
    if (first_keys) return;
    for_queries([&] {
      if (g.cosine) load_queries(head);
      write_dq(head);
    });
  }

  // Pass 1 over a window in tiles: dq, the table, the temperature and the pads.
  void queries_of_window(const Window& w, int64_t head) {
    const auto towards_keys = [&](bool first) {
      load_keys(head);
      tile(head, true, false, first, true);
    };
    for_tiles(w, [&] { load_queries(head); }, towards_keys, [&] { write_dq(head); });
  }

  // Pass 2: dk and dv of the window's own tokens, gathered from every window whose halo reaches them.
  void keys_of_window(const Window& w, int64_t head) {
    const int reach_y = (g.y.halo + g.y.window - 1) / g.y.window, reach_x = (g.x.halo + g.x.window - 1) / g.x.window;
    const int own_rows = std::min(g.q_tile_rows, g.k_tile_rows);
    for (int y0 = 0; y0 < g.y.window; y0 += own_rows) {
      const int y1 = std::min(y0 + own_rows, g.y.window);
      zero(own_k, int64_t{y1 - y0} * g.x.window * g.dp);
      zero(own_v, int64_t{y1 - y0} * g.x.window * g.dvp);
      for (int ny = -reach_y; ny <= reach_y; ++ny) {
        const int oy = w.y + ny * g.y.dilation;
        // The tokens' local coordinates in the neighbour's frame, cut to what its halo covers.
        const int ky0 = std::max(y0 - ny * g.y.window, -g.y.halo);
        const int ky1 = std::min(y1 - ny * g.y.window, g.y.window + g.y.halo);
        if (oy < 0 || oy >= g.y.windows || ky0 >= ky1) continue;
        for (int nx = -reach_x; nx <= reach_x; ++nx) {
          const int ox = w.x + nx * g.x.dilation;
          const int kx0 = std::max(-nx * g.x.window, -g.x.halo);
          const int kx1 = std::min(g.x.window - nx * g.x.window, g.x.window + g.x.halo);
          if (ox < 0 || ox >= g.x.windows || kx0 >= kx1) continue;
          find_keys(p, g, w.b, oy, ox, ky0, ky1, kx0, kx1, false, &keys);
          if (keys.n == 0) continue;
          load_keys(head);
          bool first = true;
          for (int qy = 0; qy < g.y.window; qy += g.q_tile_rows) {
            find_queries(p, g, w.b, oy, ox, qy, std::min(qy + g.q_tile_rows, g.y.window), &queries);
            if (queries.n == 0) continue;
            find_mask(p, queries, keys);
            load_queries(head);
            tile(head, false, true, true, first);
            first = false;
          }
          if (first) continue;
          const int width = kx1 - kx0;
          for (int j = 0; j < keys.n; ++j) {
            const int y = keys.owner[j] / width + ky0 + ny * g.y.window - y0;
            const int x = keys.owner[j] % width + kx0 + nx * g.x.window;
            const int64_t own = int64_t{y} * g.x.window + x;
            axpy(own_k + own * g.dp, 1.f, dk + int64_t{j} * g.dp, g.dp);
            axpy(own_v + own * g.dvp, 1.f, dv_sum + int64_t{j} * g.dvp, g.dvp);
          }
        }
      }
      find_keys(p, g, w.b, w.y, w.x, y0, y1, 0, g.x.window, false, &keys);
      for (int j = 0; j < keys.n; ++j) {
        float* row = own_k + int64_t{keys.owner[j]} * g.dp;
        if (g.cosine) {
          load_row(k, static_cast<const T*>(p.k) + keys.k_offset[j] + head * p.k_stride_h, d);
          normalize_row(k, g.dp, k_norm);
        }
        write_dkv(j, head, row, k, k_norm[0], own_v + int64_t{keys.owner[j]} * g.dvp);
      }
    }
  }

  void run(float* partials, int64_t begin, int64_t end) {
    tables.reset();
    additions.reset(g);
    for (int i = 0; i < g.q_tile_max; ++i) factor_q[i] = p.scale;
    for (int j = 0; j < g.k_tile_max; ++j) factor_k[j] = key_factor();
    [[maybe_unused]] const ProductScope<T> scope;
    const int64_t at_once = group_of_heads<T>();
    const Partials layout(p, g);
    const int64_t all = p.B * g.windows;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit / layout.groups, group = unit - chunk * layout.groups;
      const int64_t w0 = all * chunk / layout.chunks, w1 = all * (chunk + 1) / layout.chunks;
      const int64_t h0 = p.h * group / layout.groups, h1 = p.h * (group + 1) / layout.groups;
      for (int64_t head = h0; head < h1; ++head) {
        zero(layout.at(partials, p, chunk, head), layout.stride);
        table_gradient.clear(head - h0);
      }
      for (int64_t window = w0; window < w1; ++window) {
        const Window at(g, window);
        const Tokens *here = nullptr, *after = nullptr;
        if (g.single) {
          here = &windows.get(p, g, window);
          after = window + 1 < w1 ? &windows.get(p, g, window + 1) : nullptr;
          queries = here->queries;
          keys = here->keys;
          if (queries.n == 0) continue;
        }
        for (int64_t head = h0; head < h1; ++head) {
          float* sums = layout.at(partials, p, chunk, head);
          sum_table = p.bias_table ? table_gradient.at(head - h0, sums) : nullptr;
          if (table_gradient.per_window()) table_gradient.clear(0);
          sum_pad_k = sums + layout.table_stride;
          sum_pad_v = sum_pad_k + layout.pad_k;
          sum_tau = sum_pad_v + layout.pad_v;
          if (g.one_pass) {
            window_in_one_pass(at, head);
          } else if (g.single) {
            if ((head - h0) % at_once == 0) {
              const int64_t last = std::min(head + at_once, h1);
              plan_ahead<T>(*here, after, last, h0, h1, (last - head) * steps(), true);
            }
            window_in_one_tile(head);
          } else {
            queries_of_window(at, head);
            keys_of_window(at, head);
          }
          if (table_gradient.per_window()) table_gradient.fold(g, 0, sums);
        }
      }
      for (int64_t head = h0; head < h1 && !table_gradient.per_window(); ++head) {
        table_gradient.fold(g, head - h0, layout.at(partials, p, chunk, head));
      }
    }
  }
};

template <class T>
void reduce(const Params& p, const Geometry& g, const float* partials) {
  const Partials layout(p, g);
  const int64_t floats = layout.stride + g.dp + kLanes;
  float* const sum = static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * sizeof(float)));
  float *unit = sum + layout.stride, *norm = unit + g.dp;
  for (int64_t head = 0; head < p.h; ++head) {
    zero(sum, layout.stride);
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
      const float* part = partials + (chunk * p.h + head) * layout.stride;
      for (int64_t i = 0; i < layout.stride; i += kLanes) store(sum + i, load(sum + i) + load(part + i));
    }
    for (int64_t i = 0; i < layout.table; ++i) {
      store_scalar(p.dbias_table, p.bias_dtype, head * layout.table + i, sum[layout.table - 1 - i]);
    }
    float* pad_k = sum + layout.table_stride;
    if (g.has_pad) {
      if (g.cosine) {
        load_row(unit, static_cast<const T*>(p.pad_k) + head * p.d, static_cast<int>(p.d));
        normalize_row(unit, g.dp, norm);
        normalize_row_backward(pad_k, unit, *norm, g.dp);
      }
      store_row(static_cast<T*>(p.dpad_k) + head * p.d, pad_k, static_cast<int>(p.d));
      store_row(static_cast<T*>(p.dpad_v) + head * p.dv, pad_k + layout.pad_k, static_cast<int>(p.dv));
    }
    if (g.cosine) store_scalar(p.dlogit_scale, p.logit_scale_dtype, head, pad_k[layout.pad_k + layout.pad_v]);
  }
}

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
