// block_relu2_attention on bfloat16 operands, where the ISA has such products: the same steps as in float32. Weights
// and the gradients of scores are rounded to bfloat16 for the products that follow; sums are float32.
#pragma once

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace block_relu2_attention_impl {

// Weights r² as rows of bfloat16.
struct Relu2Rows {
  BFloat16* to;
  int64_t ld;
  float scale;
  bool causal;
  int64_t lead;  // how many keys of the tile lie before row 0

  EFFVIT_INLINE void operator()(int r, int c, vf score) const {
    vf x = max(vf{}, score * scale);  // in this order a NaN stays
    if (causal) x = first_lanes(x, static_cast<int>(std::clamp<int64_t>(lead + r + 1 - c, 0, kLanes)));
    store(to + r * ld + c, x * x);
  }
};

// What both directions have in scratch of a tile of keys and a block of rows.
struct Operands16 {
  const Params& p;
  const Plan& g;
  const int K32, V32, keys32;  // columns and keys, rounded up to what a product takes
  ProductScope<BFloat16> scope;
  BFloat16 *k, *kt, *q;  // keys [keys, K32], and their transpose in pairs [K32 / 2, 2 keys]; queries [rows, K32]

  Operands16(const Params& params, const Plan& plan, Scratch& s)
      : p(params), g(plan), K32(round_up(plan.K, 32)), V32(round_up(plan.V, 32)), keys32(round_up(plan.tile_keys, 32)) {
    k = s.take<BFloat16>(int64_t{keys32} * K32);
    kt = s.take<BFloat16>(int64_t{keys32} * K32);
    q = s.take<BFloat16>(kBf16MaxRows * int64_t{K32});
  }

  static const BFloat16* row(const void* base, int64_t stride_b, int64_t stride_l, int64_t b, int64_t l) {
    return row_of<BFloat16>(base, stride_b, stride_l, b, l);
  }
  void load_keys(int64_t b, int64_t key, int keys) {
    copy_rows(k, K32, keys, g.K, [&](int j) { return row(p.k, p.k_stride_b, p.k_stride_l, b, key + j); });
    pack_transposed(kt, 2 * round_up(keys, kLanes), keys, K32, [&](int j) { return k + int64_t{j} * K32; });
  }
  void load_queries(int64_t b, int64_t first, int rows) {
    copy_rows(q, K32, rows, g.K, [&](int i) { return row(p.q, p.q_stride_b, p.q_stride_l, b, first + i); });
  }
};

struct Forward16 : Operands16 {
  BFloat16 *v, *tail, *prob;  // values in pairs, chunk by chunk; a chunk with a partial vector; weights
  float* acc;

  Forward16(const Params& params, const Plan& plan, Scratch& s) : Operands16(params, plan, s) {
    v = s.take<BFloat16>(int64_t{keys32} * g.Vp);
    tail = s.take<BFloat16>(g.V < g.Vp ? int64_t{keys32} * g.columns : 0);
    prob = s.take<BFloat16>(kBf16MaxRows * int64_t{keys32});
    acc = s.take<float>(g.block_rows * int64_t{g.ldv});
  }

  void run(int64_t begin, int64_t end) {
    int64_t loaded = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / g.blocks, b = head / g.groups, group = head % g.groups;
      const int64_t n = g.tokens(p, group), start = g.first_token(group);
      const int64_t first = unit % g.blocks * g.unit_rows, last = std::min(first + g.unit_rows, n);
      for (int64_t from = first; from < last; from += g.block_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(g.block_rows, last - from));
        load_queries(b, start + from, rows);
        for (int64_t key = 0; key < (p.causal ? from + rows : n); key += g.tile_keys) {
          const int keys = static_cast<int>(std::min<int64_t>(g.tile_keys, n - key)), padded = round_up(keys, kLanes);
          if (loaded != (start + key) + b * p.L) {
            load_keys(b, start + key, keys);
            load_values(b, start + key, keys);
            loaded = (start + key) + b * p.L;
          }
          gemm_into(rows, padded, g.K, row_major(q, K32), right(kt, padded),
                    Relu2Rows{prob, keys32, g.scale, p.causal, from - key});
          for (int i = 0; padded % 32 && i < rows; ++i) store(prob + int64_t{i} * keys32 + padded, vf{});
          for (int c = 0; c < g.V; c += g.columns) {
            const int width = round_up(std::min(g.columns, g.V - c), kLanes);
            gemm_into(rows, width, keys, row_major(prob, keys32), right(v + int64_t{c} * keys32, width),
                      StoreC{acc + c, g.ldv, key > 0});
          }
        }
        store_tokens(static_cast<BFloat16*>(p.out) + (b * p.L + start + from) * p.V, p.V, acc, g.ldv, rows, g.V,
                     nullptr);
      }
    }
  }

  void load_values(int64_t b, int64_t key, int keys) {
    const BFloat16* const from = row(p.v, p.v_stride_b, p.v_stride_l, b, key);
    for (int c = 0; c < g.V; c += g.columns) {
      const int width = std::min(g.columns, g.V - c), padded = round_up(width, kLanes);
      BFloat16* const to = v + int64_t{c} * keys32;
      if (width == padded) {
        pack_rows(to, 2 * padded, keys, padded, [&](int j) { return from + j * p.v_stride_l + c; });
      } else {
        copy_rows(tail, padded, keys, width, [&](int j) { return from + j * p.v_stride_l + c; });
        pack_rows(to, 2 * padded, keys, padded, [&](int j) { return tail + int64_t{j} * padded; });
      }
    }
  }
};

struct Backward16 : Operands16 {
  BFloat16 *v, *vt, *k_pairs, *q_pairs, *go, *go_pairs, *ds_rows, *ds_pairs, *p_pairs;
  float *r, *ds, *dq, *dk, *dv;

  Backward16(const Params& params, const Plan& plan, Scratch& s) : Operands16(params, plan, s) {
    const int64_t rows = kBf16MaxRows;
    v = s.take<BFloat16>(int64_t{keys32} * V32);
    vt = s.take<BFloat16>(int64_t{keys32} * V32);
    k_pairs = s.take<BFloat16>(int64_t{keys32} * g.Kp);
    q_pairs = s.take<BFloat16>(rows * g.Kp);
    go = s.take<BFloat16>(rows * V32);
    go_pairs = s.take<BFloat16>(rows * g.Vp);
    for (BFloat16** x : {&ds_rows, &ds_pairs, &p_pairs}) *x = s.take<BFloat16>(rows * keys32);
    r = s.take<float>(rows * g.ldp);
    ds = s.take<float>(rows * g.ldp);
    dq = s.take<float>(g.group * g.ldk);
    dk = s.take<float>(int64_t{g.tile_keys} * g.ldk);
    dv = s.take<float>(int64_t{g.tile_keys} * g.ldv);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) group_of(unit / g.groups, unit % g.groups);
  }

  void group_of(int64_t b, int64_t group) {
    const int64_t n = g.tokens(p, group), start = g.first_token(group);
    for (int64_t key = 0; key < n; key += g.tile_keys) {
      const int keys = static_cast<int>(std::min<int64_t>(g.tile_keys, n - key));
      load_keys(b, start + key, keys);
      pack_rows(k_pairs, 2 * g.Kp, keys, g.Kp, [&](int j) { return k + int64_t{j} * K32; });
      copy_rows(v, V32, keys, g.V, [&](int j) { return row(p.v, p.v_stride_b, p.v_stride_l, b, start + key + j); });
      pack_transposed(vt, 2 * round_up(keys, kLanes), keys, V32, [&](int j) { return v + int64_t{j} * V32; });
      bool first = true;
      for (int64_t from = p.causal ? key / g.block_rows * g.block_rows : 0; from < n; from += g.block_rows) {
        block(b, start, from, static_cast<int>(std::min<int64_t>(g.block_rows, n - from)), key, keys, first);
        first = false;
      }
      store_tokens(static_cast<BFloat16*>(p.dk) + (b * p.L + start + key) * p.K, p.K, dk, g.ldk, keys, g.K, nullptr);
      store_tokens(static_cast<BFloat16*>(p.dv) + (b * p.L + start + key) * p.V, p.V, dv, g.ldv, keys, g.V, nullptr);
    }
    store_tokens(static_cast<BFloat16*>(p.dq) + (b * p.L + start) * p.K, p.K, dq, g.ldk, static_cast<int>(n), g.K,
                 nullptr);
  }

  void block(int64_t b, int64_t start, int64_t from, int rows, int64_t key, int keys, bool first) {
    const int padded = round_up(keys, kLanes);
    load_queries(b, start + from, rows);
    pack_rows(q_pairs, 2 * g.Kp, rows, g.Kp, [&](int i) { return q + int64_t{i} * K32; });
    copy_rows(go, V32, rows, g.V,
              [&](int i) { return row(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, b, start + from + i); });
    pack_rows(go_pairs, 2 * g.Vp, rows, g.Vp, [&](int i) { return go + int64_t{i} * V32; });
    gemm_into(rows, padded, g.K, row_major(q, K32), right(kt, padded),
              ReluSink{r, g.ldp, g.scale, false, p.causal, from - key});
    gemm_into(rows, padded, g.V, row_major(go, V32), right(vt, padded), GradientSink{ds, r, g.ldp, 2.f * g.scale});
    round_operands(rows, padded);
    gemm_into(rows, g.Kp, keys, row_major(ds_rows, keys32), right(k_pairs, g.Kp),
              StoreC{dq + from * g.ldk, g.ldk, key > 0});
    gemm_into(keys, g.Kp, rows, transposed(ds_pairs, padded), right(q_pairs, g.Kp), StoreC{dk, g.ldk, !first});
    gemm_into(keys, g.Vp, rows, transposed(p_pairs, padded), right(go_pairs, g.Vp), StoreC{dv, g.ldv, !first});
  }

  // ds as rows, and ds and r² with rows in pairs.
  void round_operands(int rows, int padded) {
    if (rows % 2) {
      zero(ds + int64_t{rows} * g.ldp, padded);
      zero(r + int64_t{rows} * g.ldp, padded);
    }
    for (int i = 0; i < rows; i += 2) {
      const float *a = ds + int64_t{i} * g.ldp, *x = r + int64_t{i} * g.ldp;
      BFloat16* const to = ds_rows + int64_t{i} * keys32;
      Word* const ds_to = reinterpret_cast<Word*>(ds_pairs) + int64_t{i / 2} * padded;
      Word* const p_to = reinterpret_cast<Word*>(p_pairs) + int64_t{i / 2} * padded;
      for (int c = 0; c < padded; c += kLanes) {
        const vf even = load(a + c), odd = load(a + g.ldp + c);
        store(to + c, even);
        store(to + keys32 + c, odd);
        store(ds_to + c, (vf)round_pairs(even, odd));
        store(p_to + c, (vf)round_pairs(load(x + c), load(x + g.ldp + c)));
      }
      for (int s = 0; padded % 32 && s < 2; ++s) store(to + s * keys32 + padded, vf{});
    }
  }
};

}  // namespace block_relu2_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
#endif
