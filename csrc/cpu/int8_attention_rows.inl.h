// int8_attention on the CPU: a few queries of a head, as in decoding. Keys and values are read as rows of bytes, int8
// ones where they lie, and lanes are channels.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_attention_impl {

// 2 * kLanes signed bytes.
EFFVIT_INLINE vh load_signed_halves(const int8_t* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vh)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  return (vh)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vh v;
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// Four rows of 4 * kLanes bytes -> words of a byte of each: of vector j, 16 bytes from 16 i on are the words of
// channels 16 i + 4 j to 16 i + 4 j + 3.
EFFVIT_INLINE void interleave(vi (&words)[4], const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d) {
#if defined(EFFVIT_HAS_AVX512)
  const __m512i r0 = _mm512_loadu_si512(a), r1 = _mm512_loadu_si512(b);
  const __m512i r2 = _mm512_loadu_si512(c), r3 = _mm512_loadu_si512(d);
  const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
  words[0] = (vi)_mm512_unpacklo_epi16(low01, low23), words[1] = (vi)_mm512_unpackhi_epi16(low01, low23);
  words[2] = (vi)_mm512_unpacklo_epi16(high01, high23), words[3] = (vi)_mm512_unpackhi_epi16(high01, high23);
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  const auto row = [](const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const __m256i r0 = row(a), r1 = row(b), r2 = row(c), r3 = row(d);
  const __m256i low01 = _mm256_unpacklo_epi8(r0, r1), high01 = _mm256_unpackhi_epi8(r0, r1);
  const __m256i low23 = _mm256_unpacklo_epi8(r2, r3), high23 = _mm256_unpackhi_epi8(r2, r3);
  words[0] = (vi)_mm256_unpacklo_epi16(low01, low23), words[1] = (vi)_mm256_unpackhi_epi16(low01, low23);
  words[2] = (vi)_mm256_unpacklo_epi16(high01, high23), words[3] = (vi)_mm256_unpackhi_epi16(high01, high23);
#else
  const int8_t* const rows[4] = {a, b, c, d};
  for (int j = 0; j < 4; ++j) {
    alignas(64) int8_t bytes[4 * kLanes];
    for (int i = 0; i < 4 * kLanes; ++i) bytes[i] = rows[i % 4][i / 16 * 16 + 4 * j + i % 16 / 4];
    std::memcpy(&words[j], bytes, sizeof(vi));
  }
#endif
}

class RowPass {
  static constexpr int kChunk = 4 * kLanes;  // channels of values

 public:
  RowPass(const Params& p, const Plan& plan, Scratch& scratch)
      : p_(p),
        plan_(plan),
        copies_keys_(plan.int8 && p.K % (2 * kLanes) != 0),
        copies_values_(plan.int8 && p.V % kChunk != 0),
        padded_k_(round_up(static_cast<int>(p.K), kChunk)),
        padded_v_(round_up(static_cast<int>(p.V), kChunk)),
        row_(scratch.take<float>(256)),
        mean_(scratch.take<float>(256)),
        scale_row_(scratch.take<float>(256)),
        bias_(scratch.take<float>(kKeys)),
        queries_(scratch.take<int16_t>(kFewRows * padded_k_)),
        keys_(scratch.take<int8_t>(copies_keys_ ? kKeys * padded_k_ : 0)),
        values_(scratch.take<int8_t>(copies_values_ ? kKeys * padded_v_ : 0)),
        scores_(scratch.take<int32_t>(kKeys)),
        weights_(scratch.take<int32_t>(kKeys / 4)),
        sums_(scratch.take<int32_t>(padded_v_)),
        out_(scratch.take<float>(kFewRows * padded_v_)) {}

  void run(const Head& head, int64_t b, int64_t g) {
    b_ = b, g_ = g;
    const int rows = static_cast<int>(plan_.rows);
    for (int r = 0; r < rows; ++r) take_query(head, r);
    zero(out_, kFewRows * padded_v_);
    for (int64_t block = 0; block < p_.N; ++block) {
      const int n = static_cast<int>(std::min<int64_t>(kKeys, p_.M - block * kKeys));
      take_block(head, block, n);
      for (int r = 0; r < rows; ++r) {
        const int64_t seen = visible_keys(p_, token(r)) - block * kKeys;
        if (seen <= 0) continue;
        const int keys = static_cast<int>(std::min<int64_t>(n, seen));
        scores(r, keys);
        p_.shiftmax ? weights<true>(head, block, r, keys) : weights<false>(head, block, r, keys);
        add_values(head, block, r, keys);
      }
    }
    for (int r = 0; r < rows; ++r) finish(r);
  }

 private:
  int64_t token(int row) const { return row / (p_.H / p_.G); }
  int64_t head_of(int row) const { return g_ * (p_.H / p_.G) + row % (p_.H / p_.G); }

  void take_query(const Head& head, int r) {
    const int K = static_cast<int>(p_.K), padded = round_up(K, kLanes);
    dispatch_dtype(p_.dtype, [&](auto type) {
      load_row(row_,
               static_cast<const decltype(type)*>(p_.q) + b_ * p_.q_stride_b + token(r) * p_.q_stride_l +
                   head_of(r) * p_.q_stride_h,
               K);
    });
    int16_t* const to = queries_ + r * padded_k_;
    scale_[r] = quantise_row(to, row_, padded) * p_.base2_scale;
    std::memset(to + padded, 0, sizeof(int16_t) * static_cast<size_t>(padded_k_ - padded));
    of_mean_[r] = 0.f;
    if (p_.k_mean || plan_.means) {
      load_row(mean_, p_.k_mean ? p_.k_mean + (b_ * p_.G + g_) * K : head.mean(), K);
      of_mean_[r] = p_.scale * dot(row_, mean_, padded);
    }
    maximum_[r] = kLowest, total_[r] = 0.f;
  }

  // Where the block's keys and values are: in rows that may be read in whole vectors.
  void take_block(const Head& head, int64_t block, int n) {
    if (!plan_.int8) {
      key_ = head.keys<int8_t>(block), key_stride_ = plan_.key_stride;
      value_ = head.values(block), value_stride_ = plan_.value_stride;
      return;
    }
    const int64_t first = block * kKeys;
    key_ = static_cast<const int8_t*>(p_.k) + b_ * p_.k_stride_b + first * p_.k_stride_m + g_ * p_.k_stride_h;
    value_ = static_cast<const int8_t*>(p_.v) + b_ * p_.v_stride_b + first * p_.v_stride_m + g_ * p_.v_stride_h;
    key_stride_ = p_.k_stride_m, value_stride_ = p_.v_stride_m;
    if (copies_keys_) copy(keys_, padded_k_, key_, key_stride_, p_.K, n);
    if (copies_values_) copy(values_, padded_v_, value_, value_stride_, p_.V, n);
  }
  static void copy(int8_t* to, int padded, const int8_t*& from, int64_t& stride, int64_t width, int n) {
    for (int j = 0; j < n; ++j) {
      std::memcpy(to + j * padded, from + j * stride, static_cast<size_t>(width));
      std::memset(to + j * padded + width, 0, static_cast<size_t>(padded - width));
    }
    from = to, stride = padded;
  }

  // Of keys that there are not, those of the last.
  void scores(int r, int n) {
    const int16_t* const query = queries_ + r * padded_k_;
    const int K = static_cast<int>(p_.K);
    for (int j = 0; j < n; j += kLanes) {
      vf sums[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int8_t* const key = key_ + std::min(j + i, n - 1) * key_stride_;
        vi acc{};
        for (int c = 0; c < K; c += 2 * kLanes) {
          vh q;
          std::memcpy(&q, query + c, sizeof(q));
          acc = dot_halves(acc, load_signed_halves(key + c), q);
        }
        sums[i] = (vf)acc;
      }
      transpose_block(sums);
      vi total{};
      for (int i = 0; i < kLanes; ++i) total += (vi)sums[i];
      store(scores_ + j, total);
    }
  }

  // A vector of four words' weights: lane i has keys i, i + kLanes, i + 2 kLanes, i + 3 kLanes of 4 kLanes.
  template <bool kShiftmax>
  void weights(const Head& head, int64_t block, int r, int n) {
    const float key_scale = plan_.int8 ? p_.k_scale[(b_ * p_.N + block) * p_.G + g_] : head.key_scale()[block];
    const vf c = set1(scale_[r] * key_scale), limit = set1(kShiftmax ? kShiftmaxLimit : kExp2Limit);
    for (int j = round_up(n, kLanes); j < round_up(n, 4 * kLanes); j += kLanes) store(scores_ + j, vi{});
    vf of_block, distance[4];
    vi top = set1(-0x7fffffff - 1), sum{};
    auto* const sums = reinterpret_cast<float*>(scores_);
    if (p_.bias) {
      dispatch_dtype(p_.bias_dtype, [&](auto type) {
        const auto* const row = static_cast<const decltype(type)*>(p_.bias) + b_ % p_.W * p_.bias_stride_w +
                                head_of(r) * p_.bias_stride_h + token(r) * p_.bias_stride_l;
        load_row(bias_, row + block * kKeys, n, 1.44269504f);
      });
      const vf lowest = set1(-__builtin_inff());
      vf highest = lowest;
      vi wrong{};  // where a score is NaN, which max() loses
      for (int j = 0; j < n; j += kLanes) {
        const vf sum = rounded(to_floats(load(scores_ + j)) * c) + load(bias_ + j);
        store(sums + j, sum);
        const vf y = lanes_below(std::min(kLanes, n - j)) ? sum : lowest;
        highest = max(highest, y), wrong |= y != y;
      }
      float most_of_row = highest[0];
      int32_t any_wrong = wrong[0];
      for (int i = 1; i < kLanes; ++i) most_of_row = std::max(most_of_row, highest[i]), any_wrong |= wrong[i];
      if (any_wrong) most_of_row = __builtin_nanf("");
      of_block = set1(most_of_row);
    } else {
      for (int j = 0; j < n; j += kLanes) {
        top = most(top, lanes_below(std::min(kLanes, n - j)) ? load(scores_ + j) : set1(-0x7fffffff - 1));
      }
      int32_t most_of_row = top[0];
      for (int i = 1; i < kLanes; ++i) most_of_row = std::max(most_of_row, top[i]);
      top = set1(most_of_row);
      of_block = rounded(to_floats(top) * c);
    }
    const vf step = p_.bias ? set1(p_.step) : c * set1(p_.step);
    for (int j = 0; j < n; j += 4 * kLanes) {
      for (int i = 0; i < 4; ++i) {
        const int at = j + i * kLanes;
        const vf d = p_.bias ? rounded(of_block - load(sums + at)) : to_floats(top - load(scores_ + at));
        const int there = std::max(0, std::min(kLanes, n - at));
        distance[i] = lanes_below(there) ? below(d, step, limit) : limit;
      }
      const vi word = weights_of<kShiftmax>(distance[0], distance[1], distance[2], distance[3]);
      store(weights_ + j / 4, word);
      sum = dot_weights(sum, word, set1(0x01010101));
    }
    const Merge m = merge(set1(maximum_[r]), of_block);
    maximum_[r] = m.maximum[0], before_ = m.before[0], of_block_ = m.block[0];
    total_[r] = total_[r] * before_ + static_cast<float>(reduce_add(sum)) * of_block_;
  }

  void add_values(const Head& head, int64_t block, int r, int n) {
    const int V = static_cast<int>(p_.V);
    const float* const scale =
        plan_.int8 ? p_.v_scale + ((b_ * p_.N + block) * p_.G + g_) * V : head.value_scale() + block * V;
    load_row(scale_row_, scale, V);
    for (int c = 0; c < V; c += kChunk) {
      vi acc[4] = {};
      for (int j = 0; j < n; j += 4 * kLanes) {
        for (int i = 0; i < kLanes && j + i < n; ++i) {
          const auto row = [&](int t) { return value_ + std::min(j + i + t * kLanes, n - 1) * value_stride_ + c; };
          vi words[4];
          interleave(words, row(0), row(1), row(2), row(3));
          const vi weight = set1(weights_[j / 4 + i]);
#pragma GCC unroll 4
          for (int t = 0; t < 4; ++t) acc[t] = dot_weights(acc[t], weight, words[t]);
        }
      }
      for (int t = 0; t < 4; ++t) {
        for (int i = 0; i < kLanes / 4; ++i) {
          std::memcpy(sums_ + c + 16 * i + 4 * t, reinterpret_cast<const char*>(&acc[t]) + 16 * i, 16);
        }
      }
    }
    float* const out = out_ + r * padded_v_;
    for (int c = 0; c < V; c += kLanes) {
      const vf sum = to_floats(load(sums_ + c)) * (load(scale_row_ + c) * set1(of_block_));
      store(out + c, fma(load(out + c), set1(before_), sum));
    }
  }

  void finish(int r) {
    const int V = static_cast<int>(p_.V);
    const int64_t t = token(r), h = head_of(r);
    const vf total = set1(total_[r]);
    dispatch_dtype(p_.dtype, [&](auto type) {
      store_row(static_cast<decltype(type)*>(p_.out) + ((b_ * p_.L + t) * p_.H + h) * V, out_ + r * padded_v_, V,
                inverse_of_total(total)[0]);
    });
    p_.lse[(b_ * p_.H + h) * p_.L + t] = lse_of(set1(maximum_[r]), total)[0] + of_mean_[r];
  }

  const Params p_;
  const Plan& plan_;
  const bool copies_keys_, copies_values_;
  const int padded_k_, padded_v_;
  float *const row_, *const mean_, *const scale_row_, *const bias_;
  int16_t* const queries_;  // [query][K]
  int8_t *const keys_, *const values_;  // copies of a block
  int32_t* const scores_;  // [key]; with a bias floats, once it is added
  int32_t* const weights_;
  int32_t* const sums_;  // [channel]
  float* const out_;  // [query][channel]
  const int8_t *key_ = nullptr, *value_ = nullptr;
  int64_t key_stride_ = 0, value_stride_ = 0, b_ = 0, g_ = 0;
  float scale_[kFewRows], of_mean_[kFewRows], maximum_[kFewRows], total_[kFewRows], before_ = 0.f, of_block_ = 0.f;
};

}  // namespace int8_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
