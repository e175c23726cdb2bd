// sparse24_linear: the weight in the orders in which the products read it.
//
// A sparse block is of kLanes output channels, which are the lanes: of every group of four along K the kept values
// [2][kLanes], or, where there are products of bfloat16, their pairs [kLanes], and behind all of them the positions,
// [ceil(K / 32)][kLanes] words of eight groups. Channels beyond N have zeros. A dense panel is right() of a product.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace sparse24_linear_impl {

using Params = Sparse24LinearParams;

// Products of a decompressed weight: where vectors have no permutation by a vector, and tiles no sparse product.
template <class T>
constexpr bool kDense = kLanes == 4 || kBf16Tiles<T>;
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
template <class T>
constexpr int kDepth = kBf16Products<T> ? kBf16Depth : 1;  // multiple to which the rows of right() are padded
#else
template <class T>
constexpr int kDepth = 1;
#endif
template <class T>
constexpr int kWordsOfGroup = kBf16Products<T> ? 1 : 2;  // of a channel's values, in a sparse block
template <class T>
constexpr int kElementsOfWord = kBf16Products<T> ? 2 : 1;

// Size of `count` equal parts, in multiples of `step`.
EFFVIT_INLINE int64_t even(int64_t size, int64_t count, int64_t step) {
  return ceil_div(ceil_div(size, count), step) * step;
}

// Calls f with a number between 1 and kMost as a constant.
template <int kMost, class F>
EFFVIT_INLINE void with_constant(int n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// The first bytes at p, at most a vector of them, zeros behind; whatever they hold.
EFFVIT_INLINE vf load_bytes_of(const void* p, int64_t bytes) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_maskz_loadu_epi8(bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1, p);
#else
  alignas(64) int32_t some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(std::min<int64_t>(bytes, sizeof(some))));
  return (vf)load(some);
#endif
}

// The rows of a weight as words: values, or positions, eight groups a word, of which the last may not be whole.
template <class T>
struct ValueWords {
  static constexpr int kElements = kElementsOfWord<T>;
  const T* data;
  int64_t stride_n, stride_k, count, elements;  // words of a row, and what they are made of

  explicit ValueWords(const Params& p)
      : data(static_cast<const T*>(p.values)),
        stride_n(p.values_stride_n),
        stride_k(p.values_stride_k),
        count(p.K / 4 * kWordsOfGroup<T>),
        elements(p.K / 2) {}
  EFFVIT_INLINE static vf words(const T* p) {
    if constexpr (kBf16Products<T>)
      return load(reinterpret_cast<const float*>(p));
    else
      return load(p);
  }
  EFFVIT_INLINE static vf words(const T* p, int64_t left) {
    if constexpr (kBf16Products<T>)
      return load_bytes_of(p, 2 * left);
    else
      return load_lanes(p, static_cast<int>(left));
  }
};
struct PositionWords {
  static constexpr int kElements = 4;
  const uint8_t* data;
  int64_t stride_n, stride_k, count, elements;

  explicit PositionWords(const Params& p)
      : data(p.meta),
        stride_n(p.meta_stride_n),
        stride_k(p.meta_stride_k),
        count(ceil_div(p.K, 32)),
        elements((p.K + 7) / 8) {}
  EFFVIT_INLINE static vf words(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  EFFVIT_INLINE static vf words(const uint8_t* p, int64_t left) { return load_bytes_of(p, left); }
};

// to[i][kLanes] = word i of channels n to n + kLanes.
template <class Words>
EFFVIT_INLINE void transpose_channels(float* to, const Words& w, int64_t n, int64_t N) {
  using E = std::remove_const_t<std::remove_pointer_t<decltype(w.data)>>;
  const int channels = static_cast<int>(std::min<int64_t>(kLanes, N - n));
  const E* const first = w.data + n * w.stride_n;
  const int64_t stride = w.stride_n;
  int64_t t = 0;
  if (w.stride_k == 1 && channels == kLanes) {
    for (; (t + kLanes) * Words::kElements <= w.elements; t += kLanes) {
      const E* from = first + t * Words::kElements;
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i, from += stride) r[i] = w.words(from);
      transpose_block(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (t + i) * kLanes, r[i]);
    }
  }
  for (; t < w.count; t += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes * Words::kElements, w.elements - t * Words::kElements);
    vf r[kLanes] = {};
    for (int i = 0; i < channels; ++i) {
      const E* const from = first + i * stride + t * Words::kElements * w.stride_k;
      if (w.stride_k == 1) {
        r[i] = w.words(from, left);
        continue;
      }
      alignas(64) E some[kLanes * Words::kElements] = {};
      for (int64_t k = 0; k < left; ++k) some[k] = from[k * w.stride_k];
      r[i] = w.words(some);
    }
    transpose_block(r);
    for (int i = 0; i < kLanes && t + i < w.count; ++i) store(to + (t + i) * kLanes, r[i]);
  }
}

// Words of a sparse block, and where its positions start.
template <class T>
EFFVIT_INLINE int64_t positions_at(int64_t K) {
  return K / 4 * kWordsOfGroup<T> * kLanes;
}
template <class T>
EFFVIT_INLINE int64_t block_words(int64_t K) {
  return positions_at<T>(K) + ceil_div(K, 32) * kLanes;
}

template <class T>
void pack_block(float* to, const Params& p, int64_t n) {
  transpose_channels(to, ValueWords<T>(p), n, p.N);
  transpose_channels(to + positions_at<T>(p.K), PositionWords(p), n, p.N);
}

// ---- decompressed ---------------------------------------------------------------------------------------------------

constexpr int kPanel = kLanes == 4 ? 16 : 32;  // channels of a dense panel

template <class T>
EFFVIT_INLINE int64_t panel_words(int64_t K) {
  return ceil_div(K, kDepth<T>) * kDepth<T> / kElementsOfWord<T> * kPanel;
}

// A dense panel from its sparse blocks, which lie behind each other.
template <class T>
void expand_panel(float* to, const float* blocks, int64_t K) {
  const int64_t words = panel_words<T>(K);
  zero(to + K / kElementsOfWord<T> * kPanel, words - K / kElementsOfWord<T> * kPanel);
  for (int c = 0; c < kPanel; c += kLanes, blocks += block_words<T>(K)) {
    const int32_t* const positions = reinterpret_cast<const int32_t*>(blocks + positions_at<T>(K));
    for (int64_t q = 0; q < K / 4; ++q) {
      const vi nibble = load(positions + q / 8 * kLanes) >> static_cast<int>(q % 8 * 4);
      const vi first = nibble & 3, second = (nibble >> 2) & 3;
      if constexpr (kBf16Products<T>) {
        const vi pair = (vi)load(blocks + q * kLanes);
        const vi a = (pair & 0xffff) << ((first & 1) << 4), b = (vi)((vu)pair >> 16) << ((second & 1) << 4);
        float* const at = to + 2 * q * kPanel + c;
        store(at, (vf)((a & (first < 2)) | (b & (second < 2))));
        store(at + kPanel, (vf)((a & (first > 1)) | (b & (second > 1))));
      } else {
        const vf a = load(blocks + 2 * q * kLanes), b = load(blocks + (2 * q + 1) * kLanes);
        for (int i = 0; i < 4; ++i) {
          store(to + (4 * q + i) * kPanel + c, (vf)(((vi)a & (first == i)) | ((vi)b & (second == i))));
        }
      }
    }
  }
}

// Which entries of two groups are kept, by the byte of their positions.
struct KeptMasks {
  uint8_t of[256] = {};
  constexpr KeptMasks() {
    for (int m = 0; m < 256; ++m)
      of[m] = static_cast<uint8_t>(1 << (m & 3) | 1 << (m >> 2 & 3) | 16 << (m >> 4 & 3) | 16 << (m >> 6));
  }
};

// to[0..columns) = columns from `first` on, a multiple of 32, of channel n, decompressed; zeros up to whole vectors.
// `kept` is scratch of columns / 2 floats and a vector more.
template <class T>
EFFVIT_INLINE void expand_row(float* to, float* kept, const Params& p, int64_t n, int64_t first, int columns) {
  static constexpr KeptMasks kKept;
  const T* const values = static_cast<const T*>(p.values) + n * p.values_stride_n + first / 2 * p.values_stride_k;
  const int64_t stride = p.meta_stride_k;
  const uint8_t* const meta = p.meta + n * p.meta_stride_n + first / 8 * stride;
  int c = 0;
#if defined(EFFVIT_HAS_AVX512)
  const auto mask = [&](int at) __attribute__((always_inline)) {
    const uint32_t low = kKept.of[meta[at / 8 * stride]];
    return at + 8 < columns ? low | kKept.of[meta[(at / 8 + 1) * stride]] << 8 : low;
  };
  if (p.values_stride_k == 1) {
    for (; c + 32 <= columns; c += 16) store(to + c, expand(load(values + c / 2), mask(c)));  // of 16 values, 8
  }
#endif
  for (int i = c / 2; i < columns / 2; ++i) kept[i] = to_float(values[i * p.values_stride_k]);
#if defined(EFFVIT_HAS_AVX512)
  store(kept + columns / 2, vf{});  // what the other half of the last byte would take
  for (; c < columns; c += 16) store(to + c, expand(load(kept + c / 2), mask(c)));
#else
  for (; c < columns; c += kLanes) store(to + c, vf{});
  for (int q = 0; q < columns / 4; ++q) {
    const int nibble = meta[q / 2 * stride] >> (q % 2 * 4);
    to[4 * q + (nibble & 3)] = kept[2 * q];
    to[4 * q + (nibble >> 2 & 3)] = kept[2 * q + 1];
  }
#endif
}

}  // namespace sparse24_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
