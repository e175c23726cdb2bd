// sparse24_linear: forward. Output channels are the lanes; the words of a group of x, broadcast, are permuted by the
// positions, so that two multiply-adds (one dot product of pairs of bfloat16) do the work of four (two).
//
// A unit of work is a chunk of rows times a range of channels; it copies the rows once, tile by tile as the product
// reads them. Sums run along K without a split, so a row's result does not depend on what other rows there are.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace sparse24_linear_impl {

// Rows and vectors of a register tile; few rows take wide ones, for enough sums under way.
template <class T>
struct Tile {
  static constexpr bool kPairs = kBf16Products<T>;
  static constexpr int kVectors = 2, kRows = kLanes == 16 ? (kPairs ? 12 : 8) : 4;
  static constexpr int kTallRows = kLanes == 16 ? 16 : 6;  // with one vector: all rows there are read it once
  static constexpr int kManyVectors = 4, kFewRows = kLanes == 16 ? (kPairs ? 5 : 4) : 2;
};
// Groups of a panel that stay in the L1 cache while tiles of rows go by. Each of these parts is summed from zero, and
// the sums are added: one running sum of all of K would be less accurate than PyTorch's product.
inline int64_t groups_at_once() { return small_tiles() ? 16 : 64; }

constexpr int64_t kMostRows = 48;  // of a unit
// Every unit copies its rows of x: units are few channels only where there are few units, and never fewer than these.
constexpr int64_t kColumns = 192, kUnits = 16;

struct Plan {
  int64_t rows, columns, m, n;
  bool shared;  // several units read the same channels: they are packed in the workspace

  explicit Plan(const Params& p) {
    const bool small = small_tiles();
    rows = even(p.M, ceil_div(p.M, small ? 4 : kMostRows), 1);
    m = ceil_div(p.M, rows);
    const int64_t groups = small ? p.N : std::min(ceil_div(p.N, rows < 8 ? 64 : kColumns), ceil_div(kUnits, m));
    columns = even(p.N, groups, 64);
    n = ceil_div(p.N, columns);
    shared = m > 1;
  }
};

// The parts of a packed weight: sparse blocks, or dense panels.
template <class T>
struct Parts {
  static constexpr int kChannels = kDense<T> ? kPanel : kLanes;
  static int64_t words(int64_t K) { return kDense<T> ? panel_words<T>(K) : block_words<T>(K); }
  // Of the scratch that packing one takes.
  static int64_t scratch_words(int64_t K) { return kDense<T> ? kPanel / kLanes * block_words<T>(K) : 0; }
  static void pack(float* to, float* scratch, const Params& p, int64_t n) {
    if constexpr (kDense<T>) {
      for (int c = 0; c < kPanel; c += kLanes) pack_block<T>(scratch + c / kLanes * block_words<T>(p.K), p, n + c);
      expand_panel<T>(to, scratch, p.K);
    } else {
      pack_block<T>(to, p, n);
    }
  }
};

template <class T>
struct Store {
  T* out;  // of the first row and channel
  int64_t ld;
  const float* bias;  // null: none
  int64_t left;  // channels
  EFFVIT_INLINE void operator()(int r, int c, vf x) const {
    if (c >= left) return;
    if (bias) x = x + load(bias + c);
    store_lanes(out + r * ld + c, x, static_cast<int>(std::min<int64_t>(left - c, kLanes)));
  }
};

// The bytes that bring a pair of bfloat16 to the front of a group of four, by the four bits of its positions.
struct PairBytes {
  int32_t of[16] = {};
  constexpr PairBytes() {
    for (int i = 0; i < 16; ++i) {
      const int first = 2 * (i & 3), second = 2 * (i >> 2);
      of[i] = first | (first + 1) << 8 | second << 16 | (second + 1) << 24;
    }
  }
};
alignas(64) constexpr PairBytes kPairBytes;

// x: a tile, [K / 4][kR] groups. blocks: the first of kV. Groups [begin, end), begin a multiple of eight; sums,
// [kR][kV] vectors, hold the sums before and, where not all groups are done, those after.
template <class T, int kR, int kV>
inline __attribute__((noinline)) void multiply_tile(const float* x, const float* blocks, int64_t K, int64_t begin,
                                                    int64_t end, float* sums, Store<T> sink) {
  constexpr int kWords = kWordsOfGroup<T>;
  const int64_t stride = block_words<T>(K);
  const float* const positions = blocks + positions_at<T>(K);
  vf acc[kR][kV] = {};
  for (int64_t eight = begin; eight < end; eight += 8) {
    vi at[kV];
#pragma GCC unroll 4
    for (int j = 0; j < kV; ++j) at[j] = (vi)load(positions + j * stride + eight / 8 * kLanes);
    const int64_t last = std::min(eight + 8, end);
    for (int64_t q = eight; q < last; ++q) {
#if defined(EFFVIT_HAS_BF16_PRODUCTS) && !defined(EFFVIT_HAS_TILES)
      if constexpr (kBf16Products<T>) {
        vi by[kV];
        vf value[kV];
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j) {
          by[j] = look_up(load(kPairBytes.of), at[j]);
          at[j] = at[j] >> 4;
          value[j] = load(blocks + j * stride + q * kLanes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kR; ++r) {
          const vi group = broadcast_eight(x + (q * kR + r) * 2);
#pragma GCC unroll 4
          for (int j = 0; j < kV; ++j) acc[r][j] = dot_pairs((vf)shuffle_bytes(group, by[j]), value[j], acc[r][j]);
        }
        continue;
      }
#endif
      vi first[kV], second[kV];
      vf a[kV], b[kV];
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) {
        first[j] = at[j], second[j] = at[j] >> 2, at[j] = at[j] >> 4;
        a[j] = load(blocks + j * stride + q * kWords * kLanes);
        b[j] = load(blocks + j * stride + (q * kWords + 1) * kLanes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
        const vf group = broadcast_four(x + (q * kR + r) * 4);
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j) {
          acc[r][j] = fma(permute_fours(group, first[j]), a[j], acc[r][j]);
          acc[r][j] = fma(permute_fours(group, second[j]), b[j], acc[r][j]);
        }
      }
    }
  }
  if (begin > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) acc[r][j] += load(sums + (r * kV + j) * kLanes);
    }
  }
  if (end < K / 4) {
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) store(sums + (r * kV + j) * kLanes, acc[r][j]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kV; ++j) sink(r, j * kLanes, acc[r][j]);
  }
}

// The same for few rows, of one block of channels straight from the weight: kLanes words of each are transposed in
// registers. `positions`: of the block, transposed; `first`: the first group, a multiple of those of kLanes words.
template <class T, int kR>
EFFVIT_INLINE void add_words(vf (&acc)[kR], const float* x, vf (&words)[kLanes], const float* positions, int64_t first,
                             int groups) {
  constexpr int kWords = kWordsOfGroup<T>, kMost = kLanes / kWords;
#pragma GCC unroll 16
  for (int q = 0; q < kMost; ++q) {
    if (q >= groups) return;
    const int64_t skip = kMost < 8 ? first % 8 : 0;  // else it is 0, and the shift a constant
    const vi at = (vi)load(positions + (first / 8 + q / 8) * kLanes) >> static_cast<int>((skip + q % 8) * 4);
#if defined(EFFVIT_HAS_BF16_PRODUCTS) && !defined(EFFVIT_HAS_TILES)
    if constexpr (kBf16Products<T>) {
      const vi by = look_up(load(kPairBytes.of), at);
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r)
        acc[r] = dot_pairs((vf)shuffle_bytes(broadcast_eight(x + (q * kR + r) * 2), by), words[q], acc[r]);
      continue;
    }
#endif
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const vf group = broadcast_four(x + (q * kR + r) * 4);
      acc[r] = fma(permute_fours(group, at), words[kWords * q], acc[r]);
      acc[r] = fma(permute_fours(group, at >> 2), words[kWords * q + kWords - 1], acc[r]);
    }
  }
}

// Channels [n, n + kBlocks * kLanes), all of them there; values have a last stride of 1.
template <class T, int kR, int kBlocks>
inline __attribute__((noinline)) void multiply_few(const float* x, float* positions, const Params& p, int64_t n,
                                                   Store<T> sink) {
  constexpr int kGroups = kLanes / kWordsOfGroup<T>;  // at once
  const ValueWords<T> w(p);
  const PositionWords at(p);
  const int64_t groups = p.K / 4, stride = w.stride_n;
  for (int j = 0; j < kBlocks; ++j) transpose_channels(positions + j * at.count * kLanes, at, n + j * kLanes, p.N);
  vf acc[kBlocks][kR] = {}, before[kBlocks][kR] = {};
  const auto next_part = [&] {
    for (int j = 0; j < kBlocks; ++j) {
      for (int r = 0; r < kR; ++r) before[j][r] = acc[j][r] + before[j][r], acc[j][r] = vf{};
    }
  };
  const int64_t step = groups_at_once();
  int64_t q = 0;
  const T* const first = w.data + n * stride;
  for (; q + kGroups <= groups; q += kGroups) {
    if (q > 0 && q % step == 0) next_part();
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) {
      const T* from = first + j * kLanes * stride + 2 * q;
      vf words[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i, from += stride) words[i] = w.words(from);
      transpose_block(words);
      add_words<T, kR>(acc[j], x + q * kR * 2 * kWordsOfGroup<T>, words, positions + j * at.count * kLanes, q, kGroups);
    }
  }
  if (q > 0 && q < groups && q % step == 0) next_part();
  if (q < groups) {
    for (int j = 0; j < kBlocks; ++j) {
      vf words[kLanes];
      for (int i = 0; i < kLanes; ++i) words[i] = w.words(first + (j * kLanes + i) * stride + 2 * q, 2 * (groups - q));
      transpose_block(words);
      add_words<T, kR>(acc[j], x + q * kR * 2 * kWordsOfGroup<T>, words, positions + j * at.count * kLanes, q,
                       static_cast<int>(groups - q));
    }
  }
  for (int j = 0; j < kBlocks; ++j) {
    for (int r = 0; r < kR; ++r) sink(r, j * kLanes, groups > step ? acc[j][r] + before[j][r] : acc[j][r]);
  }
}

// Rows of a chunk as the products read them.
template <class T>
class RowsOfX {
 public:
  static constexpr int kWords = 2 * kWordsOfGroup<T>;  // of a group
  RowsOfX(Scratch& scratch, int rows, int64_t K) : rows_(rows), K_(K), ld_(width(K)) {
    // Products on tiles read rows up to a multiple of 16.
    x_ = scratch.take<float>(kDense<T> ? (rows + 15) / 16 * 16 * ld_ : rows * K / 4 * kWords);
    row_ = scratch.take<float>((K + 31) / 32 * 32);
  }
  int rows() const { return rows_; }
  int tiles() const { return one() ? 1 : (rows_ + Tile<T>::kRows - 1) / Tile<T>::kRows; }
  bool one() const { return rows_ <= Tile<T>::kTallRows; }
  bool few() const { return rows_ <= Tile<T>::kFewRows; }
  int first(int tile) const { return static_cast<int>(int64_t{rows_} * tile / tiles()); }
  const float* tile(int t) const { return x_ + first(t) * (K_ / 4) * kWords; }

  void take(const Params& p, int64_t row) {
    const T* const x = static_cast<const T*>(p.x);
    if constexpr (kDense<T>) {
      for (int r = 0; r < rows_; ++r) copy(dense() + r * ld_, x + p.x_rows(row + r));
    } else {
      for (int t = 0; t < tiles(); ++t) {
        const int begin = first(t), n = first(t + 1) - begin;
        float* const to = x_ + begin * (K_ / 4) * kWords;
        int r = 0;
        if constexpr (kWords == 2) {
          for (; r + 2 <= n; r += 2)
            spread_two(to + r * kWords, n, x + p.x_rows(row + begin + r), x + p.x_rows(row + begin + r + 1));
        }
        for (; r < n; ++r) spread(to + r * kWords, n, x + p.x_rows(row + begin + r));
      }
    }
  }
  Operand<T>* dense() const { return reinterpret_cast<Operand<T>*>(x_); }
  int64_t ld() const { return ld_; }

 private:
  // Elements from one row to the next; rows a multiple of 512 bytes apart would share few sets of the cache.
  static int64_t width(int64_t K) {
    const int64_t padded = (K + 31) / 32 * 32;
    return padded % 128 == 0 ? padded + 32 : padded;
  }
  void copy(Operand<T>* to, const T* from) {
    if constexpr (kBf16Products<T>) {
      std::memcpy(to, from, static_cast<size_t>(K_) * 2);
      std::memset(to + K_, 0, static_cast<size_t>(ld_ - K_) * 2);
    } else {
      load_row(to, from, static_cast<int>(K_));
    }
  }
  // The groups of a row, `n` groups apart.
  void spread(float* to, int n, const T* row) {
    const void* from = row;
    if constexpr (!kBf16Products<T> && !std::is_same_v<T, float>) {
      load_row(row_, row, static_cast<int>(K_));
      from = row_;
    }
    const char* const bytes = static_cast<const char*>(from);
    for (int64_t q = 0; q < K_ / 4; ++q) std::memcpy(to + q * n * kWords, bytes + q * kWords * 4, kWords * 4);
  }

  // Of two rows of 8 bytes a group.
  void spread_two(float* to, int n, const T* a, const T* b) {
    int64_t q = 0;
#if defined(EFFVIT_HAS_AVX512)
    for (; q + 2 <= K_ / 4; q += 2) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 4 * q));
      const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 4 * q));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + q * n * 2), _mm_unpacklo_epi64(x, y));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (q + 1) * n * 2), _mm_unpackhi_epi64(x, y));
    }
#endif
    for (; q < K_ / 4; ++q) {
      std::memcpy(to + q * n * 2, a + 4 * q, 8);
      std::memcpy(to + q * n * 2 + 2, b + 4 * q, 8);
    }
  }

  int rows_;
  int64_t K_, ld_;
  float *x_, *row_;
};

template <class T>
class Forward {
 public:
  static constexpr int kTogether = kDense<T> ? 1 : Tile<T>::kManyVectors;  // parts that a unit packs at once
  Forward(const Params& p, const Plan& plan, int rows, Scratch& scratch)
      : p_(p),
        x_(scratch, rows, p.K),
        parts_(scratch.take<float>(plan.shared ? 0 : kTogether * Parts<T>::words(p.K))),
        packing_(scratch.take<float>(plan.shared ? 0 : Parts<T>::scratch_words(p.K))),
        bias_(scratch.take<float>(kTogether * Parts<T>::kChannels + kLanes)),
        sums_(scratch.take<float>(kDense<T> ? 0 : rows * Tile<T>::kManyVectors * kLanes)) {}

  void run(const float* workspace, int64_t row, int64_t begin, int64_t end) {
    [[maybe_unused]] ProductScope<T> scope;
    x_.take(p_, row);
    constexpr int kChannels = Parts<T>::kChannels;
    const int64_t words = Parts<T>::words(p_.K);
    int64_t n = begin;
    if constexpr (!kDense<T>) {
      if (x_.few() && !workspace && p_.values_stride_k == 1) n = run_few(row, begin, end);
    }
    for (; n < end; n += kTogether * kChannels) {
      const int64_t left = std::min<int64_t>(end - n, kTogether * kChannels);
      const int count = static_cast<int>(ceil_div(left, kChannels));
      const float* parts = workspace + n / kChannels * words;
      if (!workspace) {
        for (int i = 0; i < count; ++i) Parts<T>::pack(parts_ + i * words, packing_, p_, n + i * kChannels);
        parts = parts_;
      }
      const Store<T> sink = store(row, n, left);
      if constexpr (kDense<T>) {
        gemm_into(x_.rows(), kPanel, static_cast<int>(p_.K), row_major(x_.dense(), x_.ld()),
                  right(reinterpret_cast<const Operand<T>*>(parts), kPanel), sink);
      } else {
        multiply(parts, count, sink);
      }
    }
  }

 private:
  // To rows from `row` on and `left` channels from n on.
  Store<T> store(int64_t row, int64_t n, int64_t left) {
    for (int i = 0; p_.bias && i < left; ++i) bias_[i] = load_scalar(p_.bias, p_.bias_dtype, n + i);
    return {static_cast<T*>(p_.out) + row * p_.N + n, p_.N, p_.bias ? bias_ : nullptr, left};
  }

  // Whole pairs of blocks; returns the first channel that is left.
  int64_t run_few(int64_t row, int64_t n, int64_t end) {
    for (; n + 2 * kLanes <= end; n += 2 * kLanes) {
      const Store<T> sink = store(row, n, 2 * kLanes);
      with_constant<Tile<T>::kFewRows>(x_.rows(),
                                       [&](auto rows) { multiply_few<T, rows, 2>(x_.tile(0), parts_, p_, n, sink); });
    }
    return n;
  }

  void multiply(const float* parts, int count, const Store<T>& sink) {
    for (int i = 0; i < count;) {
      const float* const blocks = parts + i * Parts<T>::words(p_.K);
      const Store<T> at{sink.out + i * kLanes, sink.ld, sink.bias ? sink.bias + i * kLanes : nullptr,
                        sink.left - i * kLanes};
      if (x_.few() && count - i >= Tile<T>::kManyVectors) {
        panel<Tile<T>::kFewRows, Tile<T>::kManyVectors>(blocks, at);
        i += Tile<T>::kManyVectors;
      } else if ((x_.few() || !x_.one()) && count - i >= Tile<T>::kVectors) {
        panel<Tile<T>::kRows, Tile<T>::kVectors>(blocks, at);
        i += Tile<T>::kVectors;
      } else {
        panel<Tile<T>::kTallRows, 1>(blocks, at);
        ++i;
      }
    }
  }

  // All rows, at most kMost a tile, times kV blocks.
  template <int kMost, int kV>
  void panel(const float* blocks, const Store<T>& sink) {
    const int64_t groups = p_.K / 4, step = groups_at_once();
    int64_t begin = 0;
    do {
      const int64_t end = std::min(begin + step, groups);
      for (int t = 0; t < x_.tiles(); ++t) {
        const int row = x_.first(t), rows = x_.first(t + 1) - row;
        float* const sums = sums_ + row * kV * kLanes;
        const Store<T> at{sink.out + row * sink.ld, sink.ld, sink.bias, sink.left};
        with_constant<kMost>(rows,
                             [&](auto n) { multiply_tile<T, n, kV>(x_.tile(t), blocks, p_.K, begin, end, sums, at); });
      }
      begin = end;
    } while (begin < groups);
  }

  const Params& p_;
  RowsOfX<T> x_;
  float *parts_, *packing_, *bias_, *sums_;
};

template <class F>
EFFVIT_INLINE int64_t of_dtype(const Params& p, const F& f) {
  int64_t result = 0;
  dispatch_dtype(p.dtype, [&](auto type) { result = f(type); });
  return result;
}

int64_t pack_units(const Params& p) {
  if (!Plan(p).shared) return 0;
  return of_dtype(p, [&](auto type) { return ceil_div(p.N, Parts<decltype(type)>::kChannels); });
}

int64_t forward_workspace(const Params& p) {
  return pack_units(p) * of_dtype(p, [&](auto type) { return Parts<decltype(type)>::words(p.K); });
}

void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using P = Parts<decltype(type)>;
    float* const scratch = static_cast<float*>(thread_scratch(static_cast<size_t>(P::scratch_words(p.K) + 16) * 4));
    for (int64_t i = begin; i < end; ++i) P::pack(workspace + i * P::words(p.K), scratch, p, i * P::kChannels);
  });
}

int64_t forward_units(const Params& p) {
  const Plan plan(p);
  return plan.m * plan.n;
}

void forward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan plan(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / plan.n * plan.rows, column = unit % plan.n * plan.columns;
      const int rows = static_cast<int>(std::min(plan.rows, p.M - row));
      using Pass = Forward<decltype(type)>;
      Scratch count;
      Pass(p, plan, rows, count);
      Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
      Pass(p, plan, rows, scratch)
          .run(plan.shared ? workspace : nullptr, row, column, std::min(column + plan.columns, p.N));
    }
  });
}

constexpr Step<Params> kForward[] = {{pack_units, pack}, {forward_units, forward}};

}  // namespace sparse24_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
