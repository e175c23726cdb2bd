// window_attention on the CPU: the backward. Included by window_attention_kernel.inl.h, after what it shares with the
// forward.
//
// P is recomputed from q, k and lse. A window that is one tile needs five products per block of query rows; their
// results go to the gradients' own rows as they leave the registers. Windows in several tiles take two passes: the
// gradients of the queries, then those of the keys, gathered from every window whose halo reaches them.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

// Sums that several windows contribute to, per (chunk of windows, head): the table in flipped order, then pad_k, pad_v
// and the temperature.
struct Partials {
  int64_t table, table_stride, pad_k, pad_v, stride;  // offsets and size, in floats
  int64_t chunks, groups;  // of windows, of heads

  Partials(const Params& p, const Geometry& g) {
    table = p.bias_table ? int64_t{g.table_h} * g.table_w : 0;
    table_stride = p.bias_table ? (table + 2 * kLanes - 1) / kLanes * kLanes : 0;  // room for one vector of overrun
    pad_k = g.has_pad ? g.dp : 0;
    pad_v = g.has_pad ? g.dvp : 0;
    stride = table_stride + pad_k + pad_v + (g.cosine ? kLanes : 0);
    const int64_t all = p.B * g.windows;
    const int64_t fit = stride ? std::max<int64_t>(1, kPartialBytes / (4 * stride * p.h)) : 64;
    chunks = std::min<int64_t>({all, fit, 32});
    groups = std::min<int64_t>(p.h, (64 + chunks - 1) / chunks);
  }
  int64_t heads(const Params& p) const { return ceil_div(p.h, groups); }  // of a unit, at most
  float* at(float* base, const Params& p, int64_t chunk, int64_t head) const {
    return base + (chunk * p.h + head) * stride;
  }
};

// The gradient of the bias. Where the layout of BiasTable is expanded it has that layout too, with whole vectors for a
// row of keys: a buffer per head of a unit, added to the reversed table when the unit, or the window, is done.
class BiasGradient {
 public:
  void allocate(Scratch& s, const Params& p, const Geometry& g, int64_t heads) {
    if (!p.bias_table || !g.expanded) return;
    wide_ = round_up(g.key_w, kLanes);
    stride_ = int64_t{g.x.window} * g.table_h * wide_;
    per_window_ = heads * stride_ * 4 > kTableCacheBytes;
    data_ = s.take<float>((per_window_ ? 1 : heads) * stride_);
    expanded_ = true;
  }
  bool per_window() const { return per_window_; }
  // Where head `index` of the unit collects; `table` where the layout is the table's own.
  float* at(int64_t index, float* table) const {
    return expanded_ ? data_ + (per_window_ ? 0 : index) * stride_ : table;
  }
  void clear(int64_t index) {
    if (expanded_) zero(at(index, nullptr), stride_);
  }
  void fold(const Geometry& g, int64_t index, float* table) const {
    if (!expanded_) return;
    const float* from = at(index, nullptr);
    for (int x = 0; x < g.x.window; ++x) {
      for (int y = 0; y < g.table_h; ++y, from += wide_) {
        float* to = table + y * g.table_w + g.x.window - 1 - x;
        for (int i = 0; i < wide_; i += kLanes) store(to + i, load(to + i) + load(from + i));
      }
    }
  }

  // sums += dS of query rows [r, r + rows), which are rows from 0 on of ds.
  void add(const Geometry& g, const Queries& q, const Keys& k, const float* ds, int r, int rows, float* sums) const {
    const int across = g.x.window, width = g.key_w;
    if (expanded_ && k.runs == 1 && k.n % width == 0 && k.run[0].table % width == 0 && rows % across == 0 &&
        q.table[r + rows - 1] - q.table[r] == (across - 1) * g.table_h * width - (rows / across - 1) * width) {
      return add_rectangles(g, q.table[r] / width + k.run[0].table / width, rows / across, k.n / width, ds, sums);
    }
    for (int i = 0; i < rows; ++i, ds += g.ld) {
      for (int s = 0; s < k.runs; ++s) {
        const float* from = ds + k.run[s].column;
        const int entry = q.table[r + i] + k.run[s].table;
        if (!expanded_) {
          add_run(sums + entry, from, k.run[s].length);
          continue;
        }
        int row = entry / width, column = entry - row * width;
        for (int left = k.run[s].length; left > 0; ++row, column = 0) {
          const int length = std::min(left, width - column);
          add_run(sums + row * wide_ + column, from, length);
          from += length;
          left -= length;
        }
      }
    }
  }

 private:
  static void add_run(float* to, const float* from, int n) {
    for (int i = 0; i < n; i += kLanes) {
      store(to + i, load(to + i) + first_lanes(load(from + i), std::min(kLanes, n - i)));
    }
  }

  // Whole rows of queries and of keys: all pairs of a column of queries whose rows are equally far apart are added up
  // in registers. `first` is the row of the table for the first row of each.
  void add_rectangles(const Geometry& g, int first, int query_rows, int key_rows, const float* ds, float* sums) const {
    const int across = g.x.window, width = g.key_w;
    const int64_t ld = g.ld, step = across * ld + width;  // to the next row of both
    for (int x = 0; x < across; ++x) {
      for (int t = 1 - query_rows; t < key_rows; ++t) {
        const int begin = std::max(0, -t), end = std::min(query_rows, key_rows - t);
        const float* from = ds + (begin * across + x) * ld + (begin + t) * width;
        float* to = sums + (int64_t{x} * g.table_h + first + t) * wide_;
        for (int c = 0; c < width; c += kLanes) {
          vf sum{};
          const float* at = from + c;
          for (int i = begin; i < end; ++i, at += step) sum = sum + load(at);
          store(to + c, load(to + c) + first_lanes(sum, std::min(kLanes, width - c)));
        }
      }
    }
  }

  float* data_ = nullptr;
  int64_t stride_ = 0;
  int wide_ = 0;
  bool expanded_ = false, per_window_ = false;
};

template <class T>
struct Backward {
  const Params& p;
  const Geometry& g;
  Windows windows;
  Queries queries;  // of the tile at work
  Keys keys;
  Ahead ahead;
  BiasTable tables;
  BiasGradient table_gradient;
  Additions additions;
  float *q, *q_norm, *grad_out, *delta, *lse, *inverse, *factor_q, *factor_k, *factor_v, *k, *k_norm, *kt, *v, *vt,
      *prob, *dlogit, *dq, *dk, *dv;
  float *own_k, *own_v;
  // The operands of the five products in bfloat16. Those with rows in pairs start anew with each block of query rows.
  int block = 0;  // query rows of a block
  int64_t block_pairs = 0;  // and the rows that it takes up there
  BFloat16 *q16 = nullptr, *q16_rows = nullptr, *do16 = nullptr, *do16_rows = nullptr, *kt16 = nullptr, *vt16 = nullptr,
           *k16_rows = nullptr, *row16 = nullptr, *ds16 = nullptr, *pt16 = nullptr, *dst16 = nullptr;
  float *row_scale = nullptr, *column_scale = nullptr, *logit_factor = nullptr, *bias = nullptr;
  // Of the current head and chunk; null where the argument was not given.
  float *sum_table = nullptr, *sum_pad_k = nullptr, *sum_pad_v = nullptr, *sum_tau = nullptr;

  Backward(const Params& params, const Geometry& geometry, Scratch& scratch) : p(params), g(geometry) {
    const int64_t nq = g.q_tile_max, nk = g.k_tile_max, nk_padded = round_up(g.k_tile_max, kLanes);
    windows.allocate(scratch, g);
    queries = windows.scratch().queries;
    keys = windows.scratch().keys;
    block = kBf16Tiles<T> ? kBlockRows : g.backward_rows;
    block_pairs = kBf16Tiles<T> ? round_up(block, 32) : round_up(block, 2);
    const int64_t heads = Partials(p, g).heads(p);
    tables.allocate(scratch, p, g, heads);
    table_gradient.allocate(scratch, p, g, heads);
    additions.allocate(scratch, g);
    q = scratch.take<float>(nq * g.dp);
    q_norm = scratch.take<float>(nq);
    grad_out = scratch.take<float>(nq * g.dvp);
    delta = scratch.take<float>(nq);
    lse = scratch.take<float>(nq);
    inverse = scratch.take<float>(nq);
    factor_q = scratch.take<float>(nq);
    factor_k = scratch.take<float>(nk);
    factor_v = scratch.take<float>(nk);
    k = scratch.take<float>(nk * g.dp);
    k_norm = scratch.take<float>(nk + 1);
    if constexpr (!kBf16Products<T>) {
      kt = scratch.take<float>(g.dp * nk_padded);
      v = scratch.take<float>(nk * g.dvp);
      vt = scratch.take<float>(g.dvp * nk_padded);
    }
    prob = scratch.take<float>(int64_t{kBlockRows} * g.ld);
    dlogit = scratch.take<float>(int64_t{kBlockRows} * g.ld);
    dq = scratch.take<float>(round_up(g.q_tile_max, kBlockRows) * int64_t{g.dp});
    dk = scratch.take<float>(nk_padded * g.dp);
    dv = scratch.take<float>(nk_padded * g.dvp);
    if constexpr (kBf16Products<T>) {
      const int64_t nq64 = round_up(g.q_tile_max, kBlockRows), nk32 = round_up(g.k_tile_max, 32);
      const int64_t in_pairs = ceil_div(nq, block) * block_pairs;
      q16 = scratch.take<BFloat16>(nq64 * g.dk32);
      q16_rows = scratch.take<BFloat16>(in_pairs * g.dp);
      do16 = scratch.take<BFloat16>(nq64 * g.dv32);
      do16_rows = scratch.take<BFloat16>(in_pairs * g.dvp);
      kt16 = scratch.take<BFloat16>(nk32 * g.dk32);
      vt16 = scratch.take<BFloat16>(nk32 * g.dv32);
      k16_rows = scratch.take<BFloat16>(nk32 * g.dp);
      row16 = scratch.take<BFloat16>(nk32 * std::max(g.dk32, g.dv32));
      ds16 = scratch.take<BFloat16>(kBlockRows * nk32);
      pt16 = scratch.take<BFloat16>(kBlockRows * nk32);
      dst16 = scratch.take<BFloat16>(kBlockRows * nk32);
      row_scale = scratch.take<float>(nq);
      column_scale = scratch.take<float>(nk32);
      if (kBf16Tiles<T>) bias = scratch.take<float>(int64_t{kBlockRows} * g.ld);
      if (!kBf16Tiles<T> && g.cosine) logit_factor = scratch.take<float>(block);
    }
    own_k = own_v = nullptr;
    if (!g.single) {
      own_k = scratch.take<float>(nq * g.dp);
      own_v = scratch.take<float>(nq * g.dvp);
    }
  }

  // Whether q, k and grad_out are wanted in float32. For products of bfloat16 they are not; some sums want them.
  bool in_float32() const { return !kBf16Products<T> || g.cosine || g.has_pad || !g.single; }

  void load_queries(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const WideFactor factor(double{g.cosine ? temperature(p, head) : p.scale} * kLog2EWide);
    const T* base = static_cast<const T*>(p.q) + head * p.q_stride_h;
    const T* base_do = static_cast<const T*>(p.grad_out) + head * p.grad_out_stride_h;
    const int64_t plane = p.H * p.W;
    const int64_t *const offset = queries.offset, *const grad_offset = queries.grad_offset;
    const bool wide = in_float32();
    if (wide) pack(q, queries.n, d, [&](int i) { return base + offset[i]; }, g.cosine ? WideFactor() : factor);
    for (int i = 0; g.cosine && i < queries.n; ++i) {
      float* row = q + int64_t{i} * g.dp;
      normalize_row(row, g.dp, q_norm + i);
      for (int c = 0; c < g.dp; c += kLanes) store(row + c, factor(load(row + c)));
    }
    if (wide) pack(grad_out, queries.n, width, [&](int i) { return base_do + grad_offset[i]; });
    for (int i = 0; i < queries.n; ++i) {
      float* row_do = grad_out + int64_t{i} * g.dvp;
      const int64_t at = queries.lse_offset[i] + head * plane;
      lse[i] = static_cast<float>(p.lse[at] * kLog2EWide);
      delta[i] = p.grad_lse ? -p.grad_lse[at] : 0.f;
      if (g.single) continue;  // the rest of delta comes from the row itself
      const T* row_out = static_cast<const T*>(p.out) + (queries.position[i] * p.h + head) * p.dv;
      vf acc{};
      int c = 0;
      for (; c + kLanes <= width; c += kLanes) acc = fma(load(row_do + c), load(row_out + c), acc);
      delta[i] += reduce_add(acc);
      for (; c < width; ++c) delta[i] += row_do[c] * to_float(row_out[c]);
    }
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
    if constexpr (kBf16Products<T>) load_queries_16(head);
#endif
  }

  void load_keys(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const auto key = [&](int j) {
      return row_or_pad<T>(p.k, p.pad_k, keys.k_offset[j], keys.position[j], head, p.k_stride_h, p.d);
    };
    const auto value = [&](int j) {
      return row_or_pad<T>(p.v, p.pad_v, keys.v_offset[j], keys.position[j], head, p.v_stride_h, p.dv);
    };
    if (in_float32()) pack(k, keys.n, d, key);
    for (int j = 0; g.cosine && j < keys.n; ++j) normalize_row(k + int64_t{j} * g.dp, g.dp, k_norm + j);
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
    if constexpr (kBf16Products<T>) return load_keys_16(head);
#endif
    transpose_rows(kt, keys.padded, keys.n, d, [&](int j) { return k + int64_t{j} * g.dp; });
    if constexpr (std::is_same_v<T, float>) {
      if (width % kLanes == 0) return transpose_rows(vt, keys.padded, keys.n, width, value);
    }
    pack(v, keys.n, width, value);
    transpose_rows(vt, keys.padded, keys.n, width, [&](int j) { return v + int64_t{j} * g.dvp; });
  }

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
  // After load_queries: the same tokens in bfloat16, row-major and with rows in pairs.
  void load_queries_16(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const BFloat16* base = static_cast<const BFloat16*>(p.q) + head * p.q_stride_h;
    const BFloat16* base_do = static_cast<const BFloat16*>(p.grad_out) + head * p.grad_out_stride_h;
    const float factor = g.cosine ? temperature(p, head) : p.scale;
    const int64_t *const offset = queries.offset, *const grad_offset = queries.grad_offset;
    copy_rows(q16, g.dk32, queries.n, d, [&](int i) { return base + offset[i]; });
    copy_rows(do16, g.dv32, queries.n, width, [&](int i) { return base_do + grad_offset[i]; });
    for (int i = 0; i < queries.n; ++i) row_scale[i] = g.cosine ? factor / std::max(q_norm[i], kNormEps) : factor;
    for (int r = 0; r < queries.n; r += block) {
      const int rows = std::min(block, queries.n - r);
      pack_rows(q16_rows + row_in_pairs(r) * g.dp, 2 * g.dp, rows, g.dp,
                [&](int i) { return q16 + int64_t{r + i} * g.dk32; });
      pack_rows(do16_rows + row_in_pairs(r) * g.dvp, 2 * g.dvp, rows, g.dvp,
                [&](int i) { return do16 + int64_t{r + i} * g.dv32; });
    }
  }
  int64_t row_in_pairs(int r) const { return r / block * block_pairs; }  // of the first row of a block

  void load_keys_16(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const int64_t ldb = 2 * keys.padded;
    if (g.cosine) {
      for (int j = 0; j < keys.padded; ++j) column_scale[j] = j < keys.n ? 1.f / std::max(k_norm[j], kNormEps) : 1.f;
    }
    copy_rows(row16, g.dk32, keys.n, d, [&](int j) {
      return row_or_pad<BFloat16>(p.k, p.pad_k, keys.k_offset[j], keys.position[j], head, p.k_stride_h, p.d);
    });
    const auto key = [&](int j) { return row16 + int64_t{j} * g.dk32; };
    pack_transposed(kt16, ldb, keys.n, d, key);
    pack_rows(k16_rows, 2 * g.dp, keys.n, g.dp, key);
    copy_rows(row16, g.dv32, keys.n, width, [&](int j) {
      return row_or_pad<BFloat16>(p.v, p.pad_v, keys.v_offset[j], keys.position[j], head, p.v_stride_h, p.dv);
    });
    pack_transposed(vt16, ldb, keys.n, width, [&](int j) { return row16 + int64_t{j} * g.dv32; });
  }

#if defined(EFFVIT_HAS_TILES)
  void recompute_rows_16(int r, int rows, const float* table) {
    const int padded = round_up(rows, kBf16Rows);
    additions.find(queries, keys, table, r, rows, bias, g.ld);
    bf16_gemm(padded, keys.padded, g.dk32, q16 + int64_t{r} * g.dk32, g.dk32, kt16, 2 * keys.padded, prob, g.ld, false);
    bf16_gemm(padded, keys.padded, g.dv32, do16 + int64_t{r} * g.dv32, g.dv32, vt16, 2 * keys.padded, dlogit, g.ld,
              false);
    for (int i = 0; i < rows; ++i) {
      if (i % kRows == 0) prefetch();
      const vf factor = set1(row_scale[r + i] * kLog2E);
      float* row = prob + int64_t{i} * g.ld;
      for (int j = 0; j < keys.padded; j += kLanes) {
        const vf scale = g.cosine ? factor * load(column_scale + j) : factor;
        vf x = fma(load(row + j), scale, load(additions.bias[i] + j));
        if (additions.masked) x = x + load(additions.mask[i] + j);
        store(row + j, x);
      }
      probabilities<0>(row, dlogit + int64_t{i} * g.ld, r + i, 1);
      logit_gradients<0>(row, dlogit + int64_t{i} * g.ld, r + i, 1);
      if (!g.single) continue;
      const vf normalise = set1(inverse[r + i]);
      for (int j = 0; j < keys.padded; j += kLanes) store(row + j, load(row + j) * normalise);
    }
    for (int i = rows; i < round_up(rows, kBf16Depth); ++i) {  // rows of the transposed operands' padding
      zero(prob + int64_t{i} * g.ld, keys.padded);
      zero(dlogit + int64_t{i} * g.ld, keys.padded);
    }
  }

  // dq rows += dS K; the norms of cosine attention multiply dS on the way to bfloat16.
  void dq_rows_16(int r, int rows, bool accumulate) {
    const int depth = round_up(keys.padded, 32);
    for (int i = 0; i < rows; ++i) {
      const float* row = dlogit + int64_t{i} * g.ld;
      BFloat16* dst = ds16 + int64_t{i} * depth;
      for (int j = 0; j < keys.padded; j += kLanes) {
        store(dst + j, g.cosine ? load(row + j) * load(column_scale + j) : load(row + j));
      }
      if (depth > keys.padded) store(dst + keys.padded, vf{});
    }
    bf16_gemm(round_up(rows, kBf16Rows), g.dp, round_up(keys.n, kBf16Depth), ds16, depth, k16_rows, 2 * g.dp,
              dq + int64_t{r} * g.dp, g.dp, accumulate);
  }

  // dv += P^T dO, dk += dS^T q.
  void dkv_rows_16(int r, int rows, bool accumulate) {
    const int depth = round_up(rows, kBf16Depth);
    pack_transposed_a(pt16, prob, g.ld, depth, keys.padded);
    bf16_gemm(keys.padded, g.dvp, depth, pt16, depth, do16_rows + row_in_pairs(r) * g.dvp, 2 * g.dvp, dv, g.dvp,
              accumulate);
    for (int i = 0; i < rows; ++i) {
      float* row = dlogit + int64_t{i} * g.ld;
      for (int j = 0; j < keys.padded; j += kLanes) store(row + j, load(row + j) * row_scale[r + i]);
    }
    pack_transposed_a(dst16, dlogit, g.ld, depth, keys.padded);
    bf16_gemm(keys.padded, g.dp, depth, dst16, depth, q16_rows + row_in_pairs(r) * g.dp, 2 * g.dp, dk, g.dp,
              accumulate);
  }
#else
  // As recompute_rows, on pairs; and from P and dS the left operands of the products that follow.
  void recompute_rows_16(int r, int rows, const float* table) {
    const auto between = [&](int) {
      prefetch();
      return Fetch{};
    };
    additions.find(queries, keys, table, r, rows, prob, g.ld);
    const RowMajorPairs q_rows(q16 + int64_t{r} * g.dk32, g.dk32), do_rows(do16 + int64_t{r} * g.dv32, g.dv32);
    const DenseB transposed_keys = pairs_b(kt16, 2 * keys.padded), values = pairs_b(vt16, 2 * keys.padded);
    const auto logits = [&](auto factor) {
      gemm_to_logits(rows, keys.padded, (static_cast<int>(p.d) + 1) / 2, q_rows, transposed_keys, prob, g.ld, factor,
                     additions, between);
    };
    if (g.cosine) {
      for (int i = 0; i < rows; ++i) logit_factor[i] = row_scale[r + i] * kLog2E;
      logits(OuterFactor{logit_factor, column_scale});
    } else {
      logits(OneFactor{row_scale[r] * kLog2E});
    }
    gemm_into(rows, keys.padded, (static_cast<int>(p.dv) + 1) / 2, do_rows, values, StoreC{dlogit, g.ld, false},
              between);
    if (rows % 2 == 1) {  // the second row of the last pair
      zero(prob + int64_t{rows} * g.ld, keys.padded);
      zero(dlogit + int64_t{rows} * g.ld, keys.padded);
    }
    dispatch_vectors(keys.padded / kLanes, [&](auto n) {
      probabilities<decltype(n)::value>(prob, dlogit, r, rows);
      if (g.cosine) {
        round_operands<decltype(n)::value, true>(r, rows);
      } else {
        round_operands<decltype(n)::value, false>(r, rows);
      }
    });
  }

  // logit_gradients, and both in bfloat16: rows of dS, and pairs of rows of P and dS, whose transposes are multiplied
  // with. In cosine attention dS takes the norms on the way, and dk all of the factor of the logits.
  template <int kVectors, bool kCosine>
  void round_operands(int r, int rows) {
    const int padded = kVectors ? kVectors * kLanes : keys.padded, depth = round_up(keys.padded, 32);
    const int64_t ld = g.ld;
    const bool single = g.single, keep = g.has_pad;
    float *row = prob, *drow = dlogit;
    Pair *pt = reinterpret_cast<Pair*>(pt16), *dst = reinterpret_cast<Pair*>(dst16);
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
        store(dst + j, (vf)(kCosine ? round_pairs(d0 * scale0, d1 * scale1) : round_pairs(d0, d1)));
      }
    }
  }
#endif
#endif

  // Logits of query rows [r, r + rows) and dP, rows from 0 on in prob and dlogit -> P in place. With all keys at hand
  // the rows are normalised again and the sum of P dP is taken from them, so that neither the rounding of lse nor that
  // of out enters; P then still lacks its factor inverse[i]. A window in several tiles relies on both.
  template <int kVectors>
  void probabilities(float* prob, const float* dlogit, int r, int rows) {
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
  void logit_gradients(const float* prob, float* dlogit, int r, int rows) {
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

  // Inlined by force, as in the forward.
  void prefetch() {
    ahead.step([&](int item) __attribute__((always_inline)) {
      const Queries& nq = ahead.tokens->queries;
      const Keys& nk = ahead.tokens->keys;
      const int64_t head = ahead.head, heads = ahead.heads;
      const int i = item >> 1;
      if ((item & 1) == 0) {
        prefetch_heads<T>(p.k, nk.k_offset[i], head, heads, p.k_stride_h, p.d);
        prefetch_heads<T>(p.v, nk.v_offset[i], head, heads, p.v_stride_h, p.dv);
        if (i >= nq.n) return;
        prefetch_heads<T>(p.q, nq.offset[i], head, heads, p.q_stride_h, p.d);
        prefetch_heads<T>(p.grad_out, nq.grad_offset[i], head, heads, p.grad_out_stride_h, p.dv);
      } else if (nk.position[i] >= 0) {
        const T* row = gradient_row(nk.position[i]);
        prefetch_heads<T>(row, 0, head, heads, p.d, p.d);
        prefetch_heads<T>(row, p.h * p.d, head, heads, p.d, p.d);
        prefetch_heads<T>(row, 2 * p.h * p.d, head, heads, p.dv, p.dv);
      }
    });
  }
  // Calls of prefetch() for a head.
  int64_t steps() const {
    if (kBf16Tiles<T>) return std::max(1, queries.n / kRows);
    return std::max(1, 2 * gemm_steps(queries.n, keys.padded) + gemm_steps(queries.n, g.dp) + gemm_steps(keys.n, g.dp) +
                           gemm_steps(keys.n, g.dvp));
  }

  // P and dS of query rows [r, r + rows) into rows [0, rows) of prob and dlogit. grad_out takes the factor that P
  // lacks.
  void recompute_rows(int r, int rows, const float* table) {
    const auto between = [&](int) {
      prefetch();
      return Fetch{};
    };
    additions.find(queries, keys, table, r, rows, prob, g.ld);
    gemm_to_logits(rows, keys.padded, static_cast<int>(p.d), RowMajorA{q + int64_t{r} * g.dp, g.dp},
                   DenseB{kt, keys.padded}, prob, g.ld, NoFactor{}, additions, between);
    gemm_into(rows, keys.padded, static_cast<int>(p.dv), RowMajorA{grad_out + int64_t{r} * g.dvp, g.dvp},
              DenseB{vt, keys.padded}, StoreC{dlogit, g.ld, false}, between);
    dispatch_vectors(keys.padded / kLanes, [&](auto n) {
      probabilities<decltype(n)::value>(prob, dlogit, r, rows);
      logit_gradients<decltype(n)::value>(prob, dlogit, r, rows);
    });
    if (!g.single) return;
    for (int i = r; i < r + rows; ++i) {
      float* row = grad_out + int64_t{i} * g.dvp;
      const vf factor = set1(inverse[i]);
      for (int c = 0, end = g.dvp; c < end; c += kLanes) store(row + c, load(row + c) * factor);
    }
  }

  // All pads of a tile are one and the same key, so their columns of P and dS are summed before anything else.
  void add_pads(int r, int rows) {
    for (int i = 0; i < rows; ++i) {
      float sum_p = 0.f, sum_ds = 0.f;
      for (int j = 0; j < keys.n; ++j) {
        if (keys.position[j] < 0) {
          sum_p += prob[int64_t{i} * g.ld + j];
          sum_ds += dlogit[int64_t{i} * g.ld + j];
        }
      }
      axpy(sum_pad_v, sum_p, grad_out + int64_t{r + i} * g.dvp, g.dvp);
      axpy(sum_pad_k, sum_ds * kLn2, q + int64_t{r + i} * g.dp, g.dp);
    }
  }

  // Products whose results go to the gradients as they leave the registers. Without an instruction for it, rounding to
  // 16 bits there would cost more registers than the product leaves.
  bool direct_dq() const {
    return (std::is_same_v<T, float> || (kBf16Products<T> && !kBf16Tiles<T>)) && g.single && !g.cosine;
  }
  bool direct_dkv() const { return direct_dq() && queries.n <= block; }

  // One (queries, keys) tile. want_dq covers everything that is summed over queries of a window: dq, table, pads.
  void tile(int64_t head, bool want_dq, bool want_dkv, bool first_dq, bool first_dkv) {
    const float* table = tables.get(p, g, head);
    const auto between = [&](int) {
      prefetch();
      return Fetch{};
    };
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    T* const gradient = static_cast<T*>(p.dqkv);
    for (int r = 0; r < queries.n; r += block) {
      const int rows = std::min(block, queries.n - r);
      const bool accumulate_dkv = !first_dkv || r > 0;
#if defined(EFFVIT_HAS_TILES)
      if constexpr (kBf16Tiles<T>) {
        recompute_rows_16(r, rows, table);
        if (want_dq) {
          dq_rows_16(r, rows, !first_dq);
          add_sums(r, rows);
        }
        if (want_dkv) dkv_rows_16(r, rows, accumulate_dkv);
        continue;
      }
#endif
      // dq = dS k, dv = P^T dO, dk = dS^T q
      const auto products = [&](int depth_dq, auto a_q, DenseB b_q, int depth_dkv, auto a_v, DenseB b_v, auto a_k,
                                DenseB b_k) {
        if (want_dq) {
          if (direct_dq()) {
            gemm_to_tokens(rows, d, depth_dq, a_q, b_q, gradient + head * p.d, queries.dq_offset + r, factor_q, false,
                           between);
          } else {
            gemm_into(rows, g.dp, depth_dq, a_q, b_q, StoreC{dq + int64_t{r} * g.dp, g.dp, !first_dq}, between);
          }
          add_sums(r, rows);
        }
        if (!want_dkv) return;
        if (direct_dkv()) {
          const bool holes = keys.pads > 0;
          T* const to_v = gradient + p.h * p.d + head * p.dv;
          gemm_to_tokens(keys.n, width, depth_dkv, a_v, b_v, to_v, keys.grad_offset, factor_v, holes, between);
          gemm_to_tokens(keys.n, d, depth_dkv, a_k, b_k, gradient + head * p.d, keys.grad_offset, factor_k, holes,
                         between);
        } else {
          gemm_into(keys.n, g.dvp, depth_dkv, a_v, b_v, StoreC{dv, g.dvp, accumulate_dkv}, between);
          gemm_into(keys.n, g.dp, depth_dkv, a_k, b_k, StoreC{dk, g.dp, accumulate_dkv}, between);
        }
      };
#if defined(EFFVIT_HAS_BF16_PRODUCTS) && !defined(EFFVIT_HAS_TILES)
      if constexpr (kBf16Products<T>) {
        recompute_rows_16(r, rows, table);
        const int64_t at = row_in_pairs(r), padded = 2 * keys.padded;
        products((keys.n + 1) / 2, RowMajorPairs(ds16, round_up(keys.padded, 32)), pairs_b(k16_rows, 2 * g.dp),
                 (rows + 1) / 2, TransposedPairs(pt16, padded), pairs_b(do16_rows + at * g.dvp, 2 * g.dvp),
                 TransposedPairs(dst16, padded), pairs_b(q16_rows + at * g.dp, 2 * g.dp));
        continue;
      }
#endif
      recompute_rows(r, rows, table);
      products(keys.n, RowMajorA{dlogit, g.ld}, DenseB{k, g.dp}, rows, TransposedA{prob, g.ld},
               DenseB{grad_out + int64_t{r} * g.dvp, g.dvp}, TransposedA{dlogit, g.ld},
               DenseB{q + int64_t{r} * g.dp, g.dp});
    }
  }

  void add_sums(int r, int rows) {
    if (sum_table) table_gradient.add(g, queries, keys, dlogit, r, rows, sum_table);
    if (keys.pads) add_pads(r, rows);
  }

  T* gradient_row(int64_t position) const { return static_cast<T*>(p.dqkv) + position * p.h * (2 * p.d + p.dv); }

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
      store_row(gradient_row(queries.position[i]) + head * p.d, row, static_cast<int>(p.d), scale);
    }
  }

  // What a row of dS^T q lacks: the q that dS is multiplied with has its factor log2(e), but in bfloat16 it is as it
  // was, and dS takes the factors (on pairs only those that differ from row to row).
  float key_factor() const {
    if constexpr (!kBf16Products<T>) return kLn2;
    return kBf16Tiles<T> || g.cosine ? 1.f : p.scale;
  }

  // row_k: the gradient of k, or of k^.
  void write_dkv(int64_t position, int64_t head, float* row_k, const float* unit_k, float norm, const float* row_v) {
    if (position < 0) return;
    T* base = gradient_row(position);
    if (g.cosine) normalize_row_backward(row_k, unit_k, norm, g.dp);
    store_row(base + (p.h + head) * p.d, row_k, static_cast<int>(p.d), key_factor());
    store_row(base + 2 * p.h * p.d + head * p.dv, row_v, static_cast<int>(p.dv));
  }

  void window_in_one_tile(int64_t head) {
    load_queries(head);
    load_keys(head);
    tile(head, true, true, true, true);
    if (!direct_dq()) write_dq(head);
    if (direct_dkv()) return;
    for (int j = 0; j < keys.n; ++j) {
      const int64_t at = int64_t{j} * g.dp;
      write_dkv(keys.position[j], head, dk + at, k + at, k_norm[j], dv + int64_t{j} * g.dvp);
    }
  }

  // Pass 1 over a window in tiles: dq, the table, the temperature and the pads.
  void queries_of_window(int64_t b, int wy, int wx, int64_t head) {
    const int key_end = g.y.window + g.y.halo;
    for (int y0 = 0; y0 < g.y.window; y0 += g.q_tile_rows) {
      find_queries(p, g, b, wy, wx, y0, std::min(y0 + g.q_tile_rows, g.y.window), &queries);
      if (queries.n == 0) continue;
      load_queries(head);
      bool first = true;
      for (int ky = -g.y.halo; ky < key_end; ky += g.k_tile_rows) {
        find_keys(p, g, b, wy, wx, ky, std::min(ky + g.k_tile_rows, key_end), -g.x.halo, g.x.window + g.x.halo,
                  g.has_pad, &keys);
        if (keys.n == 0) continue;
        find_mask(p, queries, keys);
        load_keys(head);
        tile(head, true, false, first, true);
        first = false;
      }
      write_dq(head);
    }
  }

  // Pass 2: dk and dv of the window's own tokens, gathered from every window whose halo reaches them.
  void keys_of_window(int64_t b, int wy, int wx, int64_t head) {
    const int reach_y = (g.y.halo + g.y.window - 1) / g.y.window, reach_x = (g.x.halo + g.x.window - 1) / g.x.window;
    const int own_rows = std::min(g.q_tile_rows, g.k_tile_rows);
    for (int y0 = 0; y0 < g.y.window; y0 += own_rows) {
      const int y1 = std::min(y0 + own_rows, g.y.window);
      zero(own_k, int64_t{y1 - y0} * g.x.window * g.dp);
      zero(own_v, int64_t{y1 - y0} * g.x.window * g.dvp);
      for (int ny = -reach_y; ny <= reach_y; ++ny) {
        const int oy = wy + ny * g.y.dilation;
        // The tokens' local coordinates in the neighbour's frame, cut to what its halo covers.
        const int ky0 = std::max(y0 - ny * g.y.window, -g.y.halo);
        const int ky1 = std::min(y1 - ny * g.y.window, g.y.window + g.y.halo);
        if (oy < 0 || oy >= g.y.windows || ky0 >= ky1) continue;
        for (int nx = -reach_x; nx <= reach_x; ++nx) {
          const int ox = wx + nx * g.x.dilation;
          const int kx0 = std::max(-nx * g.x.window, -g.x.halo);
          const int kx1 = std::min(g.x.window - nx * g.x.window, g.x.window + g.x.halo);
          if (ox < 0 || ox >= g.x.windows || kx0 >= kx1) continue;
          find_keys(p, g, b, oy, ox, ky0, ky1, kx0, kx1, false, &keys);
          if (keys.n == 0) continue;
          load_keys(head);
          bool first = true;
          for (int qy = 0; qy < g.y.window; qy += g.q_tile_rows) {
            find_queries(p, g, b, oy, ox, qy, std::min(qy + g.q_tile_rows, g.y.window), &queries);
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
            axpy(own_v + own * g.dvp, 1.f, dv + int64_t{j} * g.dvp, g.dvp);
          }
        }
      }
      find_keys(p, g, b, wy, wx, y0, y1, 0, g.x.window, false, &keys);
      for (int j = 0; j < keys.n; ++j) {
        float* row = own_k + int64_t{keys.owner[j]} * g.dp;
        if (g.cosine) {
          load_row(k, static_cast<const T*>(p.k) + keys.k_offset[j] + head * p.k_stride_h, static_cast<int>(p.d));
          normalize_row(k, g.dp, k_norm);
        }
        write_dkv(keys.position[j], head, row, k, k_norm[0], own_v + int64_t{keys.owner[j]} * g.dvp);
      }
    }
  }

  void run(float* partials, int64_t begin, int64_t end) {
    tables.reset();
    additions.reset(g);
    for (int i = 0; i < g.q_tile_max; ++i) factor_q[i] = p.scale;
    for (int j = 0; j < g.k_tile_max; ++j) factor_k[j] = key_factor(), factor_v[j] = 1.f;
    [[maybe_unused]] const Products<T> products;
    const int64_t at_once = Ahead::group_of_heads(p, g, sizeof(T));
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
        const int64_t b = window / g.windows, w = window - b * g.windows;
        const int wy = static_cast<int>(w / g.x.windows), wx = static_cast<int>(w - int64_t{wy} * g.x.windows);
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
          if (g.single) {
            if ((head - h0) % at_once == 0) {
              const int64_t last = std::min(head + at_once, h1);
              ahead.plan(*here, after, last, h0, h1, at_once, (last - head) * steps(), 2);
            }
            window_in_one_tile(head);
          } else {
            queries_of_window(b, wy, wx, head);
            keys_of_window(b, wy, wx, head);
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
