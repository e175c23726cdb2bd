// window_attention on the CPU: what the forward and the backward pass share: operands of the logits, the walk over
// tiles, fetching ahead. Included by window_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

constexpr float kLogitScaleMax = 4.605170185988092f;  // ln 100
constexpr float kNormEps = 1e-12f;

// Calls f with the number of vectors in a row of logits as a constant, where it is that of a common window (49 or 64
// tokens); otherwise 0.
template <class F>
EFFVIT_INLINE void dispatch_vectors(int n, const F& f) {
  switch (n) {
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// Rows of x^ = x / max(|x|, eps), in place; the norms go to `norm`.
EFFVIT_INLINE void normalize_row(float* row, int n_padded, float* norm) {
  const float length = __builtin_sqrtf(dot(row, row, n_padded));
  *norm = length;
  const vf inverse = set1(1.f / (length > kNormEps ? length : kNormEps));
  for (int i = 0; i < n_padded; i += kLanes) store(row + i, load(row + i) * inverse);
}

// Gradient of x from the gradient of x^, in place: (g - x^ <x^, g>) / |x|, and g / eps below eps.
EFFVIT_INLINE void normalize_row_backward(float* g, const float* unit, float norm, int n_padded) {
  const float along = norm > kNormEps ? dot(unit, g, n_padded) : 0.f;
  const vf inverse = set1(1.f / (norm > kNormEps ? norm : kNormEps));
  for (int i = 0; i < n_padded; i += kLanes) store(g + i, (load(g + i) - set1(along) * load(unit + i)) * inverse);
}

EFFVIT_INLINE float temperature(const Params& p, int64_t head) {
  const float tau = load_scalar(p.logit_scale, p.logit_scale_dtype, head);
  return std::exp(tau > kLogitScaleMax ? kLogitScaleMax : tau);
}

struct Pass {
  const Params& p;
  const Geometry& g;
  const int d, dv;
  Windows windows;
  Queries queries;  // of the tile at work
  Keys keys;
  Ahead ahead;
  BiasTable tables;
  Additions additions;
  // The operands of the logits, in float32. With products of bfloat16 these have the tokens as they are, and the
  // logits take the factors: kt16 is the transpose of the keys, row16 holds rows on their way there.
  float *q = nullptr, *k = nullptr, *kt = nullptr;
  BFloat16 *q16 = nullptr, *kt16 = nullptr, *row16 = nullptr;
  float *q_norm = nullptr, *k_norm = nullptr, *row_scale = nullptr, *column_scale = nullptr;

  Pass(const Params& params, const Geometry& geometry)
      : p(params), g(geometry), d(static_cast<int>(params.d)), dv(static_cast<int>(params.dv)) {}

  template <class T>
  void allocate(Scratch& s, int64_t heads) {
    const int64_t nq = g.q_tile_max, nk = g.k_tile_max, nk32 = round_up(g.k_tile_max, 32);
    windows.allocate(s, g);
    queries = windows.scratch().queries;
    keys = windows.scratch().keys;
    tables.allocate(s, p, g, heads);
    additions.allocate(s, g);
    q = s.take<float>(nq * g.dp);
    k = s.take<float>(nk * g.dp);
    q_norm = s.take<float>(nq);
    k_norm = s.take<float>(nk + 1);
    if constexpr (kBf16Products<T>) {
      q16 = s.take<BFloat16>((nq + kBlockRows) * g.dk32);  // a product on tiles reads whole tiles of rows
      kt16 = s.take<BFloat16>(nk32 * g.dk32);
      row16 = s.take<BFloat16>(nk32 * std::max(g.dk32, g.dv32));
      row_scale = s.take<float>(nq);
      column_scale = s.take<float>(nk32);
    } else {
      kt = s.take<float>(g.dp * round_up(g.k_tile_max, kLanes));
    }
  }

  // Row j of the keys, or of their values: a pad's where there is no token.
  template <class T>
  EFFVIT_INLINE const T* key(int j, int64_t head) const {
    const int64_t at = keys.k_offset[j];
    return at < 0 ? static_cast<const T*>(p.pad_k) + head * p.d : static_cast<const T*>(p.k) + at + head * p.k_stride_h;
  }
  template <class T>
  EFFVIT_INLINE const T* value(int j, int64_t head) const {
    const int64_t at = keys.v_offset[j];
    return at < 0 ? static_cast<const T*>(p.pad_v) + head * p.dv
                  : static_cast<const T*>(p.v) + at + head * p.v_stride_h;
  }

  // q in float32: with the factor of the logits, in cosine attention on the normalised rows.
  template <class T>
  void load_query_rows(int64_t head) {
    const T* base = static_cast<const T*>(p.q) + head * p.q_stride_h;
    const WideFactor factor(double{g.cosine ? temperature(p, head) : p.scale} * kLog2EWide);
    const int64_t* const offset = queries.offset;
    load_tokens(q, g.dp, queries.n, d, [&](int i) { return base + offset[i]; }, g.cosine ? WideFactor() : factor);
    for (int i = 0; g.cosine && i < queries.n; ++i) {
      float* row = q + int64_t{i} * g.dp;
      normalize_row(row, g.dp, q_norm + i);
      for (int c = 0; c < g.dp; c += kLanes) store(row + c, factor(i, load(row + c)));
    }
  }
  // k in float32, normalised in cosine attention.
  template <class T>
  void load_key_rows(int64_t head) {
    load_tokens(k, g.dp, keys.n, d, [&](int j) { return key<T>(j, head); }, WideFactor());
    for (int j = 0; g.cosine && j < keys.n; ++j) normalize_row(k + int64_t{j} * g.dp, g.dp, k_norm + j);
  }

  // Keys or their values as the right operand of products over `width`, from row(j).
  template <class Row>
  EFFVIT_INLINE void transpose_16(BFloat16* to, int width, int width32, const Row& row) {
    if (width % 32 == 0) return pack_transposed(to, 2 * keys.padded, keys.n, width, row);
    copy_rows(row16, width32, keys.n, width, row);
    pack_transposed(to, 2 * keys.padded, keys.n, width, [&](int j) { return row16 + int64_t{j} * width32; });
  }

  // Logits of query rows [r, r + rows), at `to`. factor: of the rows, where the operands lack it; one for all but in
  // cosine attention.
  template <class T>
  EFFVIT_INLINE void logits(const float* table, int r, int rows, float* to, const float* factor) {
    additions.find(queries, keys, table, r, rows, to, g.ld);
    if constexpr (kBf16Products<T>) {
      const auto rows_of_q = row_major(q16 + int64_t{r} * g.dk32, g.dk32);
      const auto all_keys = right(kt16, keys.padded);
      if (g.cosine) {
        const OuterFactor outer{factor, column_scale};
        gemm_to_logits(rows, keys.padded, d, rows_of_q, all_keys, to, g.ld, outer, additions, ahead.bursts());
      } else {
        gemm_to_logits(rows, keys.padded, d, rows_of_q, all_keys, to, g.ld, OneFactor{factor[0]}, additions,
                       ahead.bursts());
      }
    } else {
      gemm_to_logits(rows, keys.padded, d, row_major(q + int64_t{r} * g.dp, g.dp), right(kt, keys.padded), to, g.ld,
                     NoFactor{}, additions, ahead.bursts());
    }
  }

  // How many heads are fetched ahead at once.
  template <class T>
  int64_t group_of_heads() const {
    const int64_t per_head = int64_t{g.k_tile_max} * (2 * p.d + p.dv) * static_cast<int64_t>(sizeof(T));
    return std::min(p.h, std::max<int64_t>(1, g.limits.ahead_bytes / per_head));
  }
  // What comes after heads [.., last) of window `here`: its next heads up to `end`, or those from `first` of the next
  // window, as far as there is one. Of each token the rows of all heads of a group are fetched, so that memory is read
  // in long runs: see "Where the time goes" in csrc/README.md.
  template <class T>
  void plan_ahead(const Tokens& here, const Tokens* after, int64_t last, int64_t first, int64_t end, int64_t steps,
                  bool backward) {
    ahead.clear();
    const Tokens* const next = last < end ? &here : after;
    if (!next) return;
    const int64_t head = last < end ? last : first;
    const Queries& nq = next->queries;
    const Keys& nk = next->keys;
    ahead.add<T>(p.k, nk.k_offset, nk.n, p.k_stride_h, p.d);
    ahead.add<T>(p.v, nk.v_offset, nk.n, p.v_stride_h, p.dv);
    ahead.add<T>(p.q, nq.offset, nq.n, p.q_stride_h, p.d);
    if (backward) {
      ahead.add<T>(p.grad_out, nq.grad_offset, nq.n, p.grad_out_stride_h, p.dv);
      ahead.add<T>(p.dq, nq.dq_offset, nq.n, p.d, p.d);
      ahead.add<T>(p.dk, nk.dk_offset, nk.n, p.d, p.d);
      ahead.add<T>(p.dvalue, nk.dv_offset, nk.n, p.dv, p.dv);
    } else {
      ahead.add<T>(p.out, nq.out_offset, nq.n, p.dv, p.dv);
    }
    ahead.plan(0, 0, head, std::min(head + group_of_heads<T>(), end), steps, 0);
  }

  // Of a window in several tiles: start() once per tile of queries, tile(first) for each tile of keys that they see,
  // finish() after the last.
  template <class Start, class Tile, class Finish>
  void for_tiles(const Window& w, const Start& start, const Tile& tile, const Finish& finish) {
    const int key_end = g.y.window + g.y.halo;
    for (int y0 = 0; y0 < g.y.window; y0 += g.q_tile_rows) {
      find_queries(p, g, w.b, w.y, w.x, y0, std::min(y0 + g.q_tile_rows, g.y.window), &queries);
      if (queries.n == 0) continue;
      start();
      bool first = true;
      for (int ky = -g.y.halo; ky < key_end; ky += g.k_tile_rows) {
        find_keys(p, g, w.b, w.y, w.x, ky, std::min(ky + g.k_tile_rows, key_end), -g.x.halo, g.x.window + g.x.halo,
                  g.has_pad, &keys);
        if (keys.n == 0) continue;
        find_mask(p, queries, keys);
        tile(first);
        first = false;
      }
      finish();
    }
  }
};

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
