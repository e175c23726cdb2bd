// window_attention on the CPU: the forward. Included by window_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

constexpr float kNegInf = -__builtin_inff();
constexpr float kLowest = -1e30f;  // start of a running maximum; finite, so that -inf - kLowest is not a NaN

template <class T>
struct Forward : Pass {
  float *s, *o, *top, *sum, *inverse;
  // Values and probabilities, as operands.
  Operand<T>*v, *prob;
  int64_t ld_prob = 0;

  Forward(const Params& params, const Geometry& geometry, Scratch& scratch) : Pass(params, geometry) {
    allocate<T>(scratch, p.h);
    s = scratch.take<float>(int64_t{g.block_rows} * g.ld);
    o = scratch.take<float>(int64_t{g.q_tile_max} * g.dvp);
    top = scratch.take<float>(g.q_tile_max + kLanes);
    sum = scratch.take<float>(g.q_tile_max + kLanes);
    inverse = scratch.take<float>(g.q_tile_max + kLanes);
    v = scratch.take<Operand<T>>(int64_t{round_up(g.k_tile_max, 32)} * g.dvp);
    if constexpr (kBf16Products<T>) {
      prob = scratch.take<BFloat16>(int64_t{g.block_rows + 16} * round_up(g.k_tile_max, 32));
    } else {
      prob = s;
    }
  }

  void load_queries(int64_t head) {
    if constexpr (!kBf16Products<T>) {
      load_query_rows<T>(head);
    } else {
      const T* base = static_cast<const T*>(p.q) + head * p.q_stride_h;
      const float factor = (g.cosine ? temperature(p, head) : p.scale) * kLog2E;
      const int64_t* const offset = queries.offset;
      copy_rows(q16, g.dk32, queries.n, d, [&](int i) { return base + offset[i]; });
      for (int i = 0; i < queries.n; ++i) row_scale[i] = factor;
      for (int i = 0; g.cosine && i < queries.n; ++i) row_scale[i] *= inverse_norm(base + offset[i], q);
    }
  }

  float inverse_norm(const T* row, float* wide) {
    load_row(wide, row, d);
    const float length = __builtin_sqrtf(dot(wide, wide, g.dp));
    return 1.f / (length > kNormEps ? length : kNormEps);
  }

  void load_keys(int64_t head) {
    const auto key_row = [&](int j) { return key<T>(j, head); };
    const auto value_row = [&](int j) { return value<T>(j, head); };
    if constexpr (kBf16Products<T>) {
      for (int j = 0; g.cosine && j < keys.padded; ++j) {
        column_scale[j] = j < keys.n ? inverse_norm(key_row(j), k) : 1.f;
      }
      transpose_16(kt16, d, g.dk32, key_row);
      if (dv % 16 == 0) return pack_rows(v, 2 * g.dvp, keys.n, dv, value_row);
      copy_rows(row16, g.dvp, keys.n, dv, value_row);
      pack_rows(v, 2 * g.dvp, keys.n, g.dvp, [&](int j) { return row16 + int64_t{j} * g.dvp; });
    } else {
      load_tokens(v, g.dvp, keys.n, dv, value_row, WideFactor());
      if constexpr (std::is_same_v<T, float>) {
        if (!g.cosine && keys.pads == 0 && d % kLanes == 0) {
          return transpose_rows(kt, keys.padded, keys.n, d, key_row);
        }
      }
      load_key_rows<T>(head);
      transpose_rows(kt, keys.padded, keys.n, d, [&](int j) { return k + int64_t{j} * g.dp; });
    }
  }

  // Logits of query rows [r, r + rows) -> unnormalised probabilities, at `prob` (s itself, or bfloat16); updates top
  // and sum, and rescales what o holds already (tiles after the first). First all maxima, then all exponentials: the
  // latter then wait for nothing.
  template <int kVectors>
  void softmax(int r, int rows, bool first) {
    const int last = (kVectors ? kVectors : keys.padded / kLanes) * kLanes - kLanes;
    const int64_t ld = g.ld, ld_to = ld_prob;
    const vi there = lanes_below(keys.n - last);
    const vf absent = (vf)(~there & (vi)set1(kNegInf));
    float *row = s, *const highest = inverse;  // free until the sums are known
    for (int i = 0; i < rows; ++i, row += ld) {
      vf m = max(set1(first ? kLowest : top[r + i]), (vf)((vi)load(row + last) & there) + absent);
#pragma GCC unroll 8
      for (int j = 0; j < last; j += kLanes) m = max(m, load(row + j));
      highest[i] = reduce_max(m);
    }
    row = s;
    Operand<T>* to = prob;
    for (int i = 0; i < rows; ++i, row += ld, to += ld_to) {
      const vf shift = set1(highest[i]);
      vf total{};
#pragma GCC unroll 8
      for (int j = 0; j < last; j += kLanes) {
        const vf e = exp2(load(row + j) - shift);
        store(to + j, e);
        total = total + e;
      }
      const vf e = (vf)((vi)exp2(load(row + last) - shift) & there);
      store(to + last, e);
      if (kBf16Tiles<T> && last + kLanes < ld_to) store(to + last + kLanes, vf{});
      accumulate_sum(r + i, highest[i], reduce_add(total + e), first);
    }
  }

  EFFVIT_INLINE void accumulate_sum(int i, float highest, float total, bool first) {
    if (first) {
      sum[i] = total;
    } else {
      const vf correction = exp2(set1(top[i] - highest));
      sum[i] = sum[i] * correction[0] + total;
      float* acc = o + int64_t{i} * g.dvp;
      for (int c = 0; c < g.dvp; c += kLanes) store(acc + c, load(acc + c) * correction);
    }
    top[i] = highest;
  }

  void write_rows(int r, int rows, int64_t head) {
    for (int i = r; i < r + rows; ++i) {
      T* dst = static_cast<T*>(p.out) + queries.out_offset[i] + head * p.dv;
      store_row(dst, o + int64_t{i} * g.dvp, dv, 1.f / sum[i]);
    }
  }

  void write_lse(int64_t head) {
    for (int i = queries.n; i < round_up(queries.n, kLanes); ++i) sum[i] = 1.f;
    const int64_t plane = p.H * p.W;
    for (int i = 0; i < queries.n; i += kLanes) {
      alignas(64) float lse[kLanes];
      store(lse, fma(load(top + i), set1(kLn2), log(load(sum + i))));
      for (int j = 0; j < kLanes && i + j < queries.n; ++j) {
        p.lse[queries.lse_offset[i + j] + head * plane] = lse[j];
      }
    }
  }

  // Steps of `ahead` for a head.
  int64_t steps() const { return std::max(1, gemm_steps(queries.n, keys.padded) + gemm_steps(queries.n, g.dvp)); }

  void tile(int64_t head, bool first) {
    load_keys(head);
    const float* table = tables.get(p, g, head);
    ld_prob = kBf16Products<T> ? round_up(keys.padded, 32) : g.ld;
    for (int r = 0; r < queries.n; r += g.block_rows) {
      const int rows = std::min(g.block_rows, queries.n - r);
      logits<T>(table, r, rows, s, kBf16Products<T> ? row_scale + r : nullptr);
      dispatch_vectors(keys.padded / kLanes, [&](auto n) { softmax<decltype(n)::value>(r, rows, first); });
      const auto a = row_major(prob, ld_prob);
      const auto b = right(v, g.dvp);
      if (g.single && (std::is_same_v<T, float> || kBf16Products<T>)) {
        for (int i = 0; i < rows; i += kLanes) store(inverse + i, 1.f / load(sum + r + i));
        gemm_to_tokens(rows, dv, keys.n, a, b, static_cast<T*>(p.out) + head * p.dv,
                       AtOffsets{queries.out_offset + r, false}, inverse, ahead.bursts());
      } else {
        gemm_into(rows, g.dvp, keys.n, a, b, StoreC{o + int64_t{r} * g.dvp, g.dvp, !first}, ahead.bursts());
        if (g.single) write_rows(r, rows, head);
      }
    }
  }

  void run(int64_t begin, int64_t end) {
    tables.reset();
    additions.reset(g);
    [[maybe_unused]] const ProductScope<T> scope;
    const int64_t group = group_of_heads<T>();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t window = unit / p.h, head = unit - window * p.h;
      if (g.single) {
        const Tokens& tokens = windows.get(p, g, window);
        queries = tokens.queries;
        keys = tokens.keys;
        if (unit == begin || head % group == 0) {
          const int64_t last = std::min(head - head % group + group, p.h);
          const Tokens* after = (window + 1) * p.h < end ? &windows.get(p, g, window + 1) : nullptr;
          plan_ahead<T>(tokens, after, last, 0, p.h, (last - head) * steps(), false);
        }
        if (queries.n == 0) continue;
        load_queries(head);
        tile(head, true);
        write_lse(head);
        continue;
      }
      const auto finish = [&] {
        write_rows(0, queries.n, head);
        write_lse(head);
      };
      for_tiles(Window(g, window), [&] { load_queries(head); }, [&](bool first) { tile(head, first); }, finish);
    }
  }
};

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
