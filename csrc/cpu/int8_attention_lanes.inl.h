// int8_attention on the CPU: blocks of queries, a query to each lane. All that a query sums up stays in its lane:
// scores are [key][query], weights [four keys][query] in words of four, sums [channel][query]; keys and values are
// broadcast.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_attention_impl {

#if EFFVIT_LANES == 16
constexpr int kTileKeys = 8, kTileChannels = 8;  // times two vectors of queries
#else
constexpr int kTileKeys = 4, kTileChannels = 4;
#endif

// kVectors vectors of queries that share a head of keys.
template <int kVectors>
class LanePass {
  static constexpr int kQueries = kVectors * kLanes;

 public:
  LanePass(const Params& p, const Plan& plan, Scratch& scratch)
      : p_(p),
        plan_(plan),
        words_(kInt8Tiles ? plan.key_stride / 4 : static_cast<int>((p.K + kPerWord - 1) / kPerWord)),
        padded_words_(round_up(words_, kLanes)),
        padded_v_(plan.value_stride),
        row_(scratch.take<float>(256)),
        mean_(scratch.take<float>(256)),
        steps_(scratch.take<Query>(kQueries * padded_words_ * kPerWord)),
        queries_(scratch.take<int32_t>(padded_words_ * kQueries)),
        scores_(scratch.take<int32_t>(kKeys * kQueries)),
        weights_(scratch.take<int32_t>(kKeys / 4 * kQueries)),
        sums_(scratch.take<int32_t>(kInt8Tiles ? padded_v_ * kQueries : 0)),
        out_(scratch.take<float>(padded_v_ * kQueries)),
        rows_out_(scratch.take<float>(kQueries * padded_v_)),
        bias_rows_(scratch.take<float>(p.bias ? kQueries * kKeys : 0)),
        bias_(scratch.take<float>(p.bias ? kQueries * kKeys : 0)) {}

  // Rows [first, first + rows) of those that share head g.
  void run(const Head& head, int64_t b, int64_t g, int64_t first, int rows) {
    b_ = b, g_ = g, first_ = first, rows_ = rows;
    take_queries(head);
    zero(out_, padded_v_ * kQueries);
    for (int v = 0; v < kVectors; ++v) maximum_[v] = set1(kLowest), total_[v] = vf{};
    const int64_t groups = p_.H / p_.G;
    const int64_t most = visible_keys(p_, (first + rows - 1) / groups), least = visible_keys(p_, first / groups);
    for (int64_t block = 0; block < p_.N && block * kKeys < most; ++block) {
      const int n = static_cast<int>(std::min<int64_t>(kKeys, p_.M - block * kKeys));
      scores(head, block, n);
      const bool masked = least < block * kKeys + n;
      if (p_.bias) take_bias(block, n);
      if (p_.shiftmax)
        masked ? weights<true, true>(head, block, n) : weights<true, false>(head, block, n);
      else
        masked ? weights<false, true>(head, block, n) : weights<false, false>(head, block, n);
      add_values(head, block, n);
    }
    finish();
  }

 private:
  // Token and head of a row.
  int64_t token(int row) const { return (first_ + row) / (p_.H / p_.G); }
  int64_t head_of(int row) const { return g_ * (p_.H / p_.G) + (first_ + row) % (p_.H / p_.G); }

  void take_queries(const Head& head) {
    const int K = static_cast<int>(p_.K), padded = round_up(K, kLanes);
    const float* mean = nullptr;
    if (p_.k_mean || plan_.means) {
      load_row(mean_, p_.k_mean ? p_.k_mean + (b_ * p_.G + g_) * K : head.mean(), K);
      mean = mean_;
    }
    const int width = padded_words_ * kPerWord;
    for (int r = 0; r < rows_; ++r) {
      dispatch_dtype(p_.dtype, [&](auto type) {
        load_row(row_,
                 static_cast<const decltype(type)*>(p_.q) + b_ * p_.q_stride_b + token(r) * p_.q_stride_l +
                     head_of(r) * p_.q_stride_h,
                 K);
      });
      Query* const to = steps_ + r * width;
      scale_[r] = quantise_row(to, row_, padded) * p_.base2_scale;
      if (width > padded) std::memset(to + padded, 0, sizeof(Query) * static_cast<size_t>(width - padded));
      of_mean_[r] = mean ? p_.scale * dot(row_, mean, padded) : 0.f;
    }
    for (int r = rows_; r < kQueries; ++r) scale_[r] = 0.f, of_mean_[r] = 0.f;
    transpose_rows(reinterpret_cast<float*>(queries_), kQueries, rows_, words_,
                   [&](int r) { return reinterpret_cast<const float*>(steps_ + r * width); });
    for (int r = round_up(rows_, kLanes); r < kQueries; ++r) {
      for (int w = 0; w < words_; ++w) queries_[w * kQueries + r] = 0;
    }
  }

  // The scores of a block, of up to round_up(n, kTileKeys) keys.
  void scores(const Head& head, int64_t block, int n) {
    const Key* const keys = head.keys<Key>(block);
#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
    for (int j = 0; j < n; j += 32) {
      if (n - j > 16)
        tiles<2>(scores_ + j * kQueries, keys + j * plan_.key_stride, plan_.key_stride, queries_, words_ / 16);
      else
        tiles<1>(scores_ + j * kQueries, keys + j * plan_.key_stride, plan_.key_stride, queries_, words_ / 16);
    }
    const int32_t* const sums = head.sums(block);
    for (int j = 0; j < n; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        int32_t* const s = scores_ + j * kQueries + v * kLanes;
        store(s, load(s) + sums[j]);
      }
    }
#else
    const int stride = plan_.key_stride, words = words_;
    const int32_t* const queries = queries_;
    for (int j = 0; j < n; j += kTileKeys) {
      vi acc[kTileKeys][kVectors];
      for (int i = 0; i < kTileKeys; ++i) {
        const vi from = kInt8Dot ? set1(head.sums(block)[j + i]) : vi{};
        for (int v = 0; v < kVectors; ++v) acc[i][v] = from;
      }
      const Key* const key = keys + j * stride;
      for (int w = 0; w < words; ++w) {
        vi query[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) query[v] = load(queries + w * kQueries + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTileKeys; ++i) {
          const vi word = set1(load_word(key + i * stride + w * kPerWord));
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) acc[i][v] = dot_scores(acc[i][v], query[v], word);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileKeys; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store(scores_ + (j + i) * kQueries + v * kLanes, acc[i][v]);
      }
    }
#endif
  }

  // The block's bias in base 2, [key][query].
  void take_bias(int64_t block, int n) {
    const float log2e = 1.44269504f;
    for (int r = 0; r < rows_; ++r) {
      dispatch_dtype(p_.bias_dtype, [&](auto type) {
        const auto* const row = static_cast<const decltype(type)*>(p_.bias) + b_ % p_.W * p_.bias_stride_w +
                                head_of(r) * p_.bias_stride_h + token(r) * p_.bias_stride_l;
        load_row(bias_rows_ + r * kKeys, row + block * kKeys, n, log2e);
      });
    }
    transpose_rows(bias_, kQueries, rows_, n, [&](int r) { return bias_rows_ + r * kKeys; });
  }

  // Weights of the block, their sums, and what becomes of the sums before.
  template <bool kShiftmax, bool kMasked>
  void weights(const Head& head, int64_t block, int n) {
    const float key_scale = plan_.int8 ? p_.k_scale[(b_ * p_.N + block) * p_.G + g_] : head.key_scale()[block];
    const vf limit = set1(kShiftmax ? kShiftmaxLimit : kExp2Limit);
    const int groups = (n + 3) / 4;
    for (int v = 0; v < kVectors; ++v) {
      const int32_t* const scores = scores_ + v * kLanes;
      const float* const bias = p_.bias ? bias_ + v * kLanes : nullptr;
      const vf c = load(scale_ + v * kLanes) * set1(key_scale);
      vi seen{};  // how many keys of the block a query sees
      if constexpr (kMasked) {
        for (int i = 0; i < kLanes; ++i) {
          const int row = std::min(v * kLanes + i, rows_ - 1);
          const int64_t keys = visible_keys(p_, token(row)) - block * kKeys;
          seen[i] = static_cast<int32_t>(std::max<int64_t>(0, std::min<int64_t>(n, keys)));
        }
      }
      vf of_block, step;
      vi word_sum{};
      int32_t* const to = weights_ + v * kLanes;
      if (!bias) {
        vi top = set1(-0x7fffffff - 1);
        for (int j = 0; j < n; ++j) {
          vi s = load(scores + j * kQueries);
          if constexpr (kMasked) s = seen > j ? s : set1(-0x7fffffff - 1);
          top = most(top, s);
        }
        of_block = rounded(to_floats(top) * c);
        if constexpr (kMasked) {
          of_block = seen > 0 ? of_block : set1(kLowest);
          top = seen > 0 ? top : vi{};
        }
        step = c * set1(p_.step);
        for (int g = 0; g < groups; ++g) {
          const int32_t* const s = scores + 4 * g * kQueries;
          vf y[4];
          for (int i = 0; i < 4; ++i) {
            y[i] = below(to_floats(top - load(s + i * kQueries)), step, limit);
            if constexpr (kMasked) y[i] = seen > 4 * g + i ? y[i] : limit;
          }
          word_sum = put_weights<kShiftmax>(to + g * kQueries, y, n - 4 * g, word_sum);
        }
      } else {
        auto* const sums = reinterpret_cast<float*>(scores_) + v * kLanes;
        const vf lowest = set1(-__builtin_inff());
        vf top = lowest;
        vi wrong{};  // where a score is NaN, which max() loses
        for (int j = 0; j < n; ++j) {
          vf s = rounded(to_floats(load(scores + j * kQueries)) * c) + load(bias + j * kQueries);
          if constexpr (kMasked) s = seen > j ? s : lowest;
          store(sums + j * kQueries, s);
          top = max(top, s), wrong |= s != s;
        }
        for (int j = n; j < 4 * groups; ++j) store(sums + j * kQueries, lowest);
        top = wrong ? set1(__builtin_nanf("")) : top;
        of_block = top, step = set1(p_.step);
        for (int g = 0; g < groups; ++g) {
          vf y[4];
          for (int i = 0; i < 4; ++i) {
            y[i] = below(rounded(top - load(sums + (4 * g + i) * kQueries)), step, limit);
          }
          word_sum = put_weights<kShiftmax>(to + g * kQueries, y, n - 4 * g, word_sum);
        }
      }
      if constexpr (kInt8Tiles) {
        for (int g = groups; g < kKeys / 4; ++g) store(to + g * kQueries, vi{});
      }
      const Merge m = merge(maximum_[v], of_block);
      maximum_[v] = m.maximum, before_[v] = m.before, of_block_[v] = m.block;
      total_[v] = fma(total_[v], m.before, to_floats(word_sum) * m.block);
    }
  }

  // A word of weights for each query, `left` keys of it in the block; returns their sum added to `sum`.
  template <bool kShiftmax>
  EFFVIT_INLINE static vi put_weights(int32_t* to, const vf (&y)[4], int left, vi sum) {
    vi word = weights_of<kShiftmax>(y[0], y[1], y[2], y[3]);
    if (left < 4) word &= static_cast<int32_t>((1u << (8 * left)) - 1);
    store(to, word);
    return dot_weights(sum, word, set1(0x01010101));
  }

  void add_values(const Head& head, int64_t block, int n) {
    const int8_t* const values = head.values(block);
    const float* const scale =
        plan_.int8 ? p_.v_scale + ((b_ * p_.N + block) * p_.G + g_) * p_.V : head.value_scale() + block * p_.V;
    const int V = static_cast<int>(p_.V);
    [[maybe_unused]] const int groups = (n + 3) / 4;
    const int32_t* const weights = weights_;
    float* const out = out_;
    const auto add = [&](int channel, int v, vi sum) __attribute__((always_inline)) {
      float* const to = out + channel * kQueries + v * kLanes;
      store(to, fma(load(to), before_[v], to_floats(sum) * (of_block_[v] * set1(scale[std::min(channel, V - 1)]))));
    };
#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
    for (int c = 0; c < padded_v_; c += 32) {
      if (padded_v_ - c > 16)
        tiles<2>(sums_ + c * kQueries, values + c * kKeys, kKeys, weights, 1);
      else
        tiles<1>(sums_ + c * kQueries, values + c * kKeys, kKeys, weights, 1);
    }
    for (int c = 0; c < V; ++c) {
      for (int v = 0; v < kVectors; ++v) add(c, v, load(sums_ + c * kQueries + v * kLanes));
    }
#else
    for (int c = 0; c < V; c += kTileChannels) {
      vi acc[kTileChannels][kVectors] = {};
      const int8_t* const value = values + c * kKeys;
      for (int g = 0; g < groups; ++g) {
        vi weight[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + g * kQueries + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTileChannels; ++i) {
          const vi word = set1(load_word(value + i * kKeys + 4 * g));
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) acc[i][v] = dot_weights(acc[i][v], weight[v], word);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileChannels; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) add(c + i, v, acc[i][v]);
      }
    }
#endif
  }

#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
  // c [16 kM][kQueries] = a b over `steps` of 64: a signed, its rows a_stride bytes apart; b words of unsigned bytes.
  template <int kM>
  static void tiles(int32_t* c, const int8_t* a, int64_t a_stride, const int32_t* b, int steps) {
    constexpr int kBytes = 4 * kQueries;
    before_tile_loads();
    EFFVIT_TILE_ZERO(0);
    EFFVIT_TILE_ZERO(1);
    EFFVIT_TILE_ZERO(2);
    EFFVIT_TILE_ZERO(3);
    for (int s = 0; s < steps; ++s) {
      EFFVIT_TILE_LOAD(4, a + 64 * s, a_stride);
      EFFVIT_TILE_LOAD(6, b + 16 * s * kQueries, kBytes);
      if constexpr (kVectors == 2) EFFVIT_TILE_LOAD(7, b + 16 * s * kQueries + 16, kBytes);
      if constexpr (kM == 2) EFFVIT_TILE_LOAD(5, a + 16 * a_stride + 64 * s, a_stride);
      EFFVIT_TILE_DOT_BYTES(0, 4, 6);
      if constexpr (kVectors == 2) EFFVIT_TILE_DOT_BYTES(1, 4, 7);
      if constexpr (kM == 2) EFFVIT_TILE_DOT_BYTES(2, 5, 6);
      if constexpr (kM * kVectors == 4) EFFVIT_TILE_DOT_BYTES(3, 5, 7);
    }
    EFFVIT_TILE_STORE(0, c, kBytes);
    if constexpr (kVectors == 2) EFFVIT_TILE_STORE(1, c + 16, kBytes);
    if constexpr (kM == 2) EFFVIT_TILE_STORE(2, c + 16 * kQueries, kBytes);
    if constexpr (kM * kVectors == 4) EFFVIT_TILE_STORE(3, c + 16 * kQueries + 16, kBytes);
  }
#endif

  void finish() {
    const int V = static_cast<int>(p_.V);
    alignas(64) float lse[kQueries];
    for (int v = 0; v < kVectors; ++v) {
      const vf inverse = inverse_of_total(total_[v]);
      for (int c = 0; c < V; ++c) {
        float* const to = out_ + c * kQueries + v * kLanes;
        store(to, load(to) * inverse);
      }
      store(lse + v * kLanes, lse_of(maximum_[v], total_[v]) + load(of_mean_ + v * kLanes));
    }
    transpose_rows(rows_out_, padded_v_, V, kQueries, [&](int c) { return out_ + c * kQueries; });
    for (int r = 0; r < rows_; ++r) {
      const int64_t t = token(r), h = head_of(r);
      dispatch_dtype(p_.dtype, [&](auto type) {
        store_row(static_cast<decltype(type)*>(p_.out) + ((b_ * p_.L + t) * p_.H + h) * V, rows_out_ + r * padded_v_,
                  V);
      });
      p_.lse[(b_ * p_.H + h) * p_.L + t] = lse[r];
    }
  }

  const Params p_;
  const Plan& plan_;
  const int words_, padded_words_, padded_v_;  // words of four keys' numbers
  float *const row_, *const mean_;
  Query* const steps_;  // [query][words]
  int32_t* const queries_;  // [words][query]
  int32_t* const scores_;  // [key][query]; with a bias floats, once it is added
  int32_t* const weights_;  // [four keys][query]
  int32_t* const sums_;  // [channel][query]
  float* const out_;  // [channel][query]
  float* const rows_out_;  // [query][channel]
  float *const bias_rows_, *const bias_;
  alignas(64) float scale_[kQueries], of_mean_[kQueries];
  vf maximum_[kVectors], total_[kVectors], before_[kVectors], of_block_[kVectors];
  int64_t b_ = 0, g_ = 0, first_ = 0;
  int rows_ = 0;
};

}  // namespace int8_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
