// linear_attention on the CPU: shared parts and the forward, on raw pointers, compiled once per ISA. The backward is in
// linear_attention_backward.inl.h.
//
// Tokens lie as [B, L, H, D], so one head's rows are far apart. A unit of work is (sequence, range of tokens, group of
// heads): it walks its tokens in chunks, all heads of the group within a chunk, so that memory is read once and in long
// runs, while the states of the group stay in the L2 cache. A chunk of one head goes through L1 scratch in float32,
// with the feature map and the weight applied on the way, and from there through register-tiled products; for products
// of bfloat16, in bfloat16.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

using Params = LinearAttentionParams;

constexpr int kChunk = 64;  // tokens that go through L1 at once
constexpr int kBlock = 16;  // rows of a triangular product that share their number of columns
constexpr int kMaxSplits = 32;
constexpr int64_t kTargetUnits = 64;
constexpr int64_t kStateFloats = 48 << 10;  // of the states that a unit works on: they stay in L2
constexpr int64_t kChunkBytes = 128 << 10;  // of a chunk's rows, all heads of a unit
constexpr int64_t kStreamBytes = 16 << 20;  // of out: from there on nobody finds it in a cache afterwards
static_assert(kBlock % kLanes == 0 && kChunk % kBlock == 0);
// Of a token's heads in a unit: from there on the next chunk is fetched ahead.
template <class T>
constexpr int64_t kAheadBytes = kBf16Products<T> ? 256 : 512;
template <class T>
constexpr bool kStreams = std::is_same_v<T, float> || (kBf16Products<T> && !kBf16Tiles<T>);

LinearAttentionRange tokens_of(const Params& p, int64_t sequence, int64_t size) {
  if (!p.cu_seqlens) return {sequence, 0, size};
  return linear_attention_range(p, sequence, size, p.cu_seqlens[sequence], p.cu_seqlens[sequence + 1]);
}

// How the work is cut, from the shape alone. Long sequences are cut into ranges of tokens and keep many heads together;
// short ones are not cut, and heads go apart instead.
struct Plan {
  int K, V, Kp, Vp;  // head dims, and rounded up to whole vectors
  int64_t slot;  // floats of one partial state: [Kp, Vp], then z [Kp]
  int64_t splits, groups;  // ranges of tokens in a sequence, groups of heads
  int chunk;
  bool whole;  // a unit does all phases of its sequence and heads
  // The workspace, in floats: partial S of every split, partial dS, then scale/d and r of every token and head.
  int64_t grads_offset = 0, tokens_offset = 0, workspace = 0;

  Plan(const Params& p, bool backward) {
    K = static_cast<int>(p.K), V = static_cast<int>(p.V);
    Kp = round_up(K, kLanes), Vp = round_up(V, kLanes);
    slot = int64_t{Kp} * Vp + Kp;
    chunk = p.causal && K <= 64 && V <= 64 ? kChunk / 2 : kChunk;
    int64_t longest = std::max(p.L, p.M);
    if (p.cu_seqlens) {
      longest = 0;
      for (int64_t n = 0; n < p.N; ++n) {
        const auto range = tokens_of(p, n, p.L);
        longest = std::max(longest, range.end - range.begin);
      }
    }
    const int64_t pairs = p.N * p.H;
    const int64_t fit = std::max<int64_t>(1, kStateFloats / (backward ? 2 : 1) / slot);
    const int64_t together = std::min(p.H, fit);  // heads of a group at most
    // A piece is worth its partial state from some tokens on; a few heads of a short sequence are cut finer.
    const int64_t worth = pairs < 4 ? 32 : 4 * std::max(K, V);
    splits = ceil_div(kTargetUnits, std::max<int64_t>(1, p.N * ceil_div(p.H, together)));
    splits = std::max<int64_t>(1, std::min<int64_t>({splits, longest / worth, kMaxSplits}));
    if (p.quadratic) splits = 1;
    const int64_t heads = std::max<int64_t>(1, std::min(together, pairs * splits / (kTargetUnits / 2)));
    groups = p.quadratic ? p.H : ceil_div(p.H, heads);
    // The chunk at work and the next one are to stay in L2 beside the states.
    const int64_t bytes = chunk * std::min(heads, p.H) * (K + V) * element_bytes(p.dtype);
    if (!p.causal && !p.quadratic && bytes > kChunkBytes) chunk = kChunk / 2;
    whole = splits == 1;
    const int64_t slots = whole ? 0 : p.N * splits * p.H * slot;
    grads_offset = backward && !p.causal ? 0 : slots;
    tokens_offset = grads_offset + (backward ? slots : 0);
    workspace = tokens_offset + (backward && (p.causal || p.quadratic) ? 2 * p.B * p.L * p.H : 0);
  }
  int64_t slot_t() const { return int64_t{Kp} * Vp + Kp; }  // floats of a transposed state: [Vp, Kp], then z [Kp]
};

// One piece of a phase: tokens [begin, end) of a sequence are those of `split`, for heads [h0, h1).
struct Unit {
  int64_t n, split, h0, h1;
  Unit(const Params& p, const Plan& plan, int64_t index) {
    const int64_t group = index % plan.groups;
    split = index / plan.groups % plan.splits;
    n = index / plan.groups / plan.splits;
    h0 = p.H * group / plan.groups, h1 = p.H * (group + 1) / plan.groups;
  }
  LinearAttentionRange tokens(const Params& p, const Plan& plan, int64_t size) const {
    const auto all = tokens_of(p, n, size);
    const int64_t count = all.end - all.begin;
    return {all.batch, all.begin + count * split / plan.splits, all.begin + count * (split + 1) / plan.splits};
  }
};

// Rows of a [B, tokens, H, D] tensor in one batch item.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride_l = 0, stride_h = 0;
  EFFVIT_INLINE T* at(int64_t token, int64_t head) const { return data + token * stride_l + head * stride_h; }
  explicit operator bool() const { return data != nullptr; }
};
template <class T>
Rows<const T> rows(const void* base, int64_t batch, int64_t stride_b, int64_t stride_l, int64_t stride_h) {
  if (!base) return {};
  return {static_cast<const T*>(base) + batch * stride_b, stride_l, stride_h};
}
template <class T>
Rows<T> contiguous_rows(void* base, int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
  if (!base) return {};
  return {static_cast<T*>(base) + batch * tokens * heads * width, heads * width, width};
}

// The chunk after the one at work is fetched while this one is computed, a few cache lines at a time, in the order of
// memory: the heads of a token lie together, which the hardware prefetchers would follow, but the walk over one head's
// rows is not.
template <class T>
class Ahead {
 public:
  void clear() { count_ = 0; }
  // Rows to be read, or written: nobody else holds a line of theirs, so that reading it makes it writable as well.
  template <class U>
  void add(const Rows<U>& rows, int64_t width) {
    if (!rows) return;
    operands_[count_] = {reinterpret_cast<const char*>(rows.data), rows.stride_l * item(), rows.stride_h * item(),
                         width * item()};
    ++count_;
  }
  // Tokens [begin, end) of heads [h0, h1), in `steps` calls of step().
  void plan(int64_t begin, int64_t end, int64_t h0, int64_t h1, int64_t steps) {
    runs_ = 0;
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) {
      const Operand& o = operands_[i];
      // A few heads of a short sequence are in the cache already, or soon.
      if ((h1 - h0) * o.width < kAheadBytes<T> || end <= begin) {
        runs_ = 0;
        break;
      }
      const bool dense = o.stride_h == o.width;
      Run run{o.data + begin * o.stride_l + h0 * o.stride_h,
              dense ? (h1 - h0) * o.width : o.width,
              o.stride_l,
              o.stride_h,
              end - begin,
              dense ? 1 : h1 - h0};
      if (runs_ > 0 && dense && run_[runs_ - 1].columns == 1 && run_[runs_ - 1].stride == run.stride &&
          run_[runs_ - 1].data + run_[runs_ - 1].bytes == run.data) {
        run_[runs_ - 1].bytes += run.bytes;  // k and v of one projection lie side by side
      } else {
        run_[runs_++] = run;
      }
    }
    for (int i = 0; i < runs_; ++i) {
      Run& run = run_[i];
      if (run.columns == 1 && run.bytes == run.stride) run.bytes *= run.rows, run.rows = 1;
      lines += run.rows * run.columns * ceil_div(run.bytes, 64);
    }
    lines_per_step_ = static_cast<int>(ceil_div(lines, std::max<int64_t>(steps, 1)));
    current_ = 0, row_ = 0, column_ = 0;
    at_ = runs_ ? run_[0].data : nullptr;
    row_end_ = runs_ ? at_ + run_[0].bytes : nullptr;
  }
  // The next lines, for a product that makes so many calls: what is left of a row at once, a piece of the next one by
  // the product.
  EFFVIT_INLINE Fetch step(int calls) {
    if (!at_) return {};
    int left = lines_per_step_;
    while (at_ + 64 * left > row_end_) {
      for (; at_ < row_end_; at_ += 64, --left) __builtin_prefetch(at_, 0, 2);
      if (!next_row() || left <= 0) return {};
    }
    for (; left > calls; at_ += 64, --left) __builtin_prefetch(at_, 0, 2);  // a call fetches one line
    const Fetch fetch{at_, ceil_div(64 * left, calls)};
    at_ += 64 * left;
    return fetch;
  }
  // The lines of so many steps at once, where no product does it.
  void fetch(int steps) {
    for (; steps > 0 && at_; --steps) {
      const Fetch lines = step(lines_per_step_);
      for (int i = 0; lines.data && i < lines_per_step_; ++i) lines(i);
    }
  }

 private:
  struct Operand {
    const char* data;
    int64_t stride_l, stride_h, width;
  };
  struct Run {  // rows x columns pieces of memory
    const char* data;
    int64_t bytes, stride, stride_column, rows, columns;
  };
  static constexpr int64_t item() { return static_cast<int64_t>(sizeof(T)); }
  bool next_row() {
    const Run* run = run_ + current_;
    if (++column_ == run->columns) {
      column_ = 0;
      if (++row_ == run->rows) {
        row_ = 0;
        if (++current_ == runs_) {
          at_ = nullptr;
          return false;
        }
        run = run_ + current_;
      }
    }
    at_ = run->data + row_ * run->stride + column_ * run->stride_column;
    row_end_ = at_ + run->bytes;
    return true;
  }
  Operand operands_[6];
  Run run_[6];
  int count_ = 0, runs_ = 0, current_ = 0, lines_per_step_ = 0;
  int64_t row_ = 0, column_ = 0;
  const char *at_ = nullptr, *row_end_ = nullptr;
};

// Calls f(first token, tokens, head) for the chunks of [begin, end), all heads within a chunk; from the last chunk
// backwards if asked to. f takes about `steps` steps of `ahead`.
template <class T, class F>
EFFVIT_INLINE void walk(Ahead<T>& ahead, int64_t begin, int64_t end, int64_t h0, int64_t h1, int chunk, int steps,
                        bool reverse, const F& f) {
  const int64_t chunks = ceil_div(end - begin, chunk);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t at = begin + (reverse ? chunks - 1 - i : i) * chunk;
    const int n = static_cast<int>(std::min<int64_t>(chunk, end - at));
    const int64_t next = reverse ? at - chunk : at + n;
    ahead.plan(std::max(next, begin), reverse ? (i + 1 < chunks ? at : begin) : std::min(next + chunk, end), h0, h1,
               (h1 - h0) * steps);
    for (int64_t h = h0; h < h1; ++h) f(at, n, h);
  }
}

// ---- feature maps --------------------------------------------------------------------------------------------------

template <FeatureMap F>
EFFVIT_INLINE vf feature(vf x) {
  if constexpr (F == FeatureMap::kRelu) return max(vf{}, x);  // a NaN is the second operand, and stays
  if constexpr (F == FeatureMap::kElu1) return x > vf{} ? x + set1(1.f) : exp_full(x);
  if constexpr (F == FeatureMap::kExp) return exp_full(x);
  return x;
}

// The derivative, from the feature itself: elu(x) + 1 is above 1 exactly where its slope is 1.
template <FeatureMap F>
EFFVIT_INLINE vf feature_slope(vf y) {
  if constexpr (F == FeatureMap::kRelu) return (vf)((vi)set1(1.f) & ~(y <= vf{}));
  if constexpr (F == FeatureMap::kElu1) return min(set1(1.f), y);
  if constexpr (F == FeatureMap::kExp) return y;
  return set1(1.f);
}

template <class F>
EFFVIT_INLINE void dispatch_map(FeatureMap map, const F& f) {
  switch (map) {
    case FeatureMap::kNone:
      return f(std::integral_constant<FeatureMap, FeatureMap::kNone>{});
    case FeatureMap::kRelu:
      return f(std::integral_constant<FeatureMap, FeatureMap::kRelu>{});
    case FeatureMap::kElu1:
      return f(std::integral_constant<FeatureMap, FeatureMap::kElu1>{});
    default:
      return f(std::integral_constant<FeatureMap, FeatureMap::kExp>{});
  }
}

// The first n < kLanes elements at p, zeros behind them.
template <class T>
EFFVIT_INLINE vf load_some(const T* p, int n) {
  alignas(64) float x[kLanes] = {};
  for (int i = 0; i < n; ++i) x[i] = to_float(p[i]);
  return load(x);
}
template <class T>
EFFVIT_INLINE void store_some(T* p, vf v, int n) {
  alignas(64) float x[kLanes];
  store(x, v);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(x[i]);
}

// dst[i] = phi(src[i]) * weight[i], rows of round_up(width, kLanes) floats with zeros behind the width. Null weight: 1.
// sum, where given, takes the sum of the rows in addition to what it holds.
template <FeatureMap F, class T>
void pack_features(float* dst, const T* src, int64_t stride, int n, int width, const float* weight, float* sum) {
  const int padded = round_up(width, kLanes);
  const auto columns = [&](int c, auto vectors, auto partial) {
    constexpr int kVectors = decltype(vectors)::value;
    vf total[kVectors] = {};
    for (int i = 0; i < n; ++i) {
      const T* from = src + i * stride + c;
      float* to = dst + i * padded + c;
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        vf x;
        if constexpr (decltype(partial)::value) {
          x = first_lanes(feature<F>(load_some(from, width - c)), width - c);
        } else {
          x = feature<F>(load(from + j * kLanes));
        }
        if (weight) x = x * set1(weight[i]);
        store(to + j * kLanes, x);
        total[j] = total[j] + x;
      }
    }
    if (sum) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(sum + c + j * kLanes, load(sum + c + j * kLanes) + total[j]);
    }
  };
  int c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) columns(c, std::integral_constant<int, 4>{}, std::false_type{});
  for (; c + kLanes <= width; c += kLanes) columns(c, std::integral_constant<int, 1>{}, std::false_type{});
  if (c < width) columns(c, std::integral_constant<int, 1>{}, std::true_type{});
}

template <class T>
EFFVIT_INLINE void pack_features(FeatureMap map, float* dst, const T* src, int64_t stride, int n, int width,
                                 const float* weight = nullptr, float* sum = nullptr) {
  dispatch_map(map, [&](auto f) { pack_features<decltype(f)::value>(dst, src, stride, n, width, weight, sum); });
}

// dst[i] = phi(src[i]) as above, dots[i] = phi(src[i]) . z
template <FeatureMap F, class T>
void pack_features_dot(float* dst, const T* src, int64_t stride, int n, int width, const float* z, float* dots) {
  const int padded = round_up(width, kLanes);
  for (int i = 0; i < n; ++i) {
    const T* from = src + i * stride;
    float* to = dst + i * padded;
    vf total{};
    int c = 0;
    for (; c + kLanes <= width; c += kLanes) {
      const vf x = feature<F>(load(from + c));
      store(to + c, x);
      total = fma(x, load(z + c), total);
    }
    if (c < width) {
      const vf x = first_lanes(feature<F>(load_some(from + c, width - c)), width - c);
      store(to + c, x);
      total = fma(x, load(z + c), total);
    }
    dots[i] = reduce_add(total);
  }
}

template <class T>
EFFVIT_INLINE void pack_features_dot(FeatureMap map, float* dst, const T* src, int64_t stride, int n, int width,
                                     const float* z, float* dots) {
  dispatch_map(map, [&](auto f) { pack_features_dot<decltype(f)::value>(dst, src, stride, n, width, z, dots); });
}

#if defined(EFFVIT_HAS_BF16_PRODUCTS) && !defined(EFFVIT_HAS_TILES)
// The operands of products on pairs, straight from the tokens.

// phi(src[i]) * weight[i] in bfloat16 with the rows in pairs, of 2 round_up(width, kLanes) elements with zeros behind
// the width. Null weight: 1. sum, where given, takes the sum of the rows, not rounded, in addition to what it holds.
template <FeatureMap F>
void pack_feature_pairs(BFloat16* dst, const BFloat16* src, int64_t stride, int n, int width, const float* weight,
                        float* sum) {
  const int padded = round_up(width, kLanes);
  for (int c = 0; c < width; c += kLanes) {
    const int left = width - c;
    const auto at = [&](int i) __attribute__((always_inline)) {
      const BFloat16* from = src + i * stride + c;
      vf x = feature<F>(left >= kLanes ? load(from) : load_some(from, left));
      if (left < kLanes) x = first_lanes(x, left);
      return weight ? x * set1(weight[i]) : x;
    };
    vf total{};
    BFloat16* to = dst + 2 * c;
    const auto put = [&](vf even, vf odd) __attribute__((always_inline)) {
      if (sum) total = total + (even + odd);
      const bool exact = !weight && (F == FeatureMap::kNone || F == FeatureMap::kRelu);
      store(reinterpret_cast<Pair*>(to), (vf)(exact ? join_pairs(even, odd) : round_pairs(even, odd)));
      to += 2 * padded;
    };
    int i = 0;
    for (; i + 2 <= n; i += 2) put(at(i), at(i + 1));
    if (i < n) put(at(i), vf{});
    if (sum) store(sum + c, load(sum + c) + total);
  }
}
EFFVIT_INLINE void pack_feature_pairs(FeatureMap map, BFloat16* dst, const BFloat16* src, int64_t stride, int n,
                                      int width, const float* weight = nullptr, float* sum = nullptr) {
  dispatch_map(map, [&](auto f) { pack_feature_pairs<decltype(f)::value>(dst, src, stride, n, width, weight, sum); });
}

// dst[i] = phi(src[i]) * factor[i] in bfloat16, rows of `depth` elements with zeros behind the width; where z is given
// dots[i] = phi(src[i]) . z, not rounded.
template <FeatureMap F>
void pack_feature_rows(BFloat16* dst, int depth, const BFloat16* src, int64_t stride, int n, int width,
                       const float* factor, const float* z, float* dots) {
  for (int i = 0; i < n; ++i) {
    const BFloat16* from = src + i * stride;
    BFloat16* to = dst + int64_t{i} * depth;
    const vf by = set1(factor ? factor[i] : 1.f);
    vf total{};
    int c = 0;
    for (; c + kLanes <= width; c += kLanes) {
      vf x = feature<F>(load(from + c));
      if (z) total = fma(x, load(z + c), total);
      if (factor) x = x * by;
      store(to + c, x);
    }
    if (c < width) {
      vf x = first_lanes(feature<F>(load_some(from + c, width - c)), width - c);
      if (z) total = fma(x, load(z + c), total);
      if (factor) x = x * by;
      store(to + c, x);
      c += kLanes;
    }
    for (; c < depth; c += kLanes) store(to + c, vf{});
    if (z) dots[i] = reduce_add(total);
  }
}
EFFVIT_INLINE void pack_feature_rows(FeatureMap map, BFloat16* dst, int depth, const BFloat16* src, int64_t stride,
                                     int n, int width, const float* factor = nullptr, const float* z = nullptr,
                                     float* dots = nullptr) {
  dispatch_map(
      map, [&](auto f) { pack_feature_rows<decltype(f)::value>(dst, depth, src, stride, n, width, factor, z, dots); });
}
#endif

// dst[i] = src[i] * factor[i]. Null factor: 1.
template <class T>
EFFVIT_INLINE void pack_rows_scaled(float* dst, const T* src, int64_t stride, int n, int width, const float* factor) {
  const int padded = round_up(width, kLanes);
  for (int i = 0; i < n; ++i) {
    const T* from = src + i * stride;
    float* to = dst + i * padded;
    const vf by = set1(factor ? factor[i] : 1.f);
    int c = 0;
    for (; c + kLanes <= width; c += kLanes) store(to + c, load(from + c) * by);
    if (c < width) store(to + c, load_some(from + c, width - c) * by);
  }
}

// dst[c * ld + i] = src[i * padded + c], for n rows of `width` columns, padded to whole vectors
void transpose_packed(float* dst, int64_t ld, const float* src, int n, int width) {
  const int64_t padded = round_up(width, kLanes);
  transpose_rows(dst, ld, n, width, [&](int i) { return src + i * padded; });
}

// How a row of the result is written: whole vectors only, with a partial one at its end, or whole ones past the caches.
enum class Write { kWhole, kPartial, kStream };

// Epilogue of a product: row r times factor[r], rounded to T, `width` columns. Null factor: 1.
template <class T, Write kWrite>
struct StoreRows {
  T* data;
  int64_t stride;
  int width;
  const float* factor;
  EFFVIT_INLINE void operator()(int r, int c, vf x) const {
    if (factor) x = x * set1(factor[r]);
    T* to = data + r * stride + c;
    if constexpr (kWrite == Write::kStream) {
      stream(to, x);
    } else if (kWrite == Write::kWhole || c + kLanes <= width) {
      store(to, x);
    } else {
      store_some(to, x, width - c);
    }
  }
};

// dst[m, width] = factor * (A[m, k] B[k, width]), rounded to T; `width` is that of whole vectors or below.
template <class T, class A, class B, class F>
EFFVIT_INLINE void gemm_to_rows(int m, int width, int k, A a, B b, T* dst, int64_t stride, const float* factor,
                                bool streamed, const F& ahead) {
  const int padded = round_up(width, kLanes);
  if constexpr (kStreams<T>) {
    if (streamed) return gemm_into(m, padded, k, a, b, StoreRows<T, Write::kStream>{dst, stride, width, factor}, ahead);
  }
  if (width == padded) {
    gemm_into(m, padded, k, a, b, StoreRows<T, Write::kWhole>{dst, stride, width, factor}, ahead);
  } else {
    gemm_into(m, padded, k, a, b, StoreRows<T, Write::kPartial>{dst, stride, width, factor}, ahead);
  }
}

// Whether rows of `width` elements are written past the caches: much memory, in whole cache lines. Of bfloat16 a line
// is two vectors, so a product must not leave an odd number of them to a block of columns.
template <class T>
bool streams(const void* rows, int64_t width, int64_t bytes) {
  constexpr int64_t kWhole = kLanes * sizeof(float), kLine = kWhole / sizeof(T);
  const bool lines = width % kLine == 0 && (sizeof(T) == 4 || width == kLine || width % (kCols * kLanes) == 0);
  return kStreams<T> && bytes >= kStreamBytes && lines && reinterpret_cast<uintptr_t>(rows) % kWhole == 0;
}

template <class T>
EFFVIT_INLINE void store_rows(T* dst, int64_t stride, const float* src, int64_t ld, int n, int width,
                              const float* factor) {
  for (int i = 0; i < n; ++i) store_row(dst + i * stride, src + i * ld, width, factor ? factor[i] : 1.f);
}

// weight[i] of tokens [at, at + n), in float32
EFFVIT_INLINE const float* load_weights(const Params& p, int64_t batch, int64_t at, int n, int64_t head, float* to) {
  if (!p.weight) return nullptr;
  const int64_t first = batch * p.weight_stride_b + at * p.weight_stride_l + head * p.weight_stride_h;
  for (int i = 0; i < n; ++i) to[i] = load_scalar(p.weight, p.weight_dtype, first + i * p.weight_stride_l);
  return to;
}

// From dots = phi(q).z: factor = scale / d, and slope = -1/d, 0 where d does not depend on the dot. `count` is the
// number of keys of the first row; it grows by `step` from row to row. slope may be null. Whole vectors are written.
EFFVIT_INLINE void normalizers(const Params& p, const float* dots, int n, int64_t count, int step, float* factor,
                               float* slope) {
  for (int i = 0; i < n; i += kLanes) {
    vf d = load(dots + i);
    vi varies = lanes_below(p.normalize == Normalize::kNone ? 0 : kLanes);
    switch (p.normalize) {
      case Normalize::kNone:
        d = set1(1.f);
        break;
      case Normalize::kSum:
        d = d + set1(p.eps);
        break;
      case Normalize::kMean:
        for (int j = 0; j < kLanes; ++j) d[j] += static_cast<float>(count + int64_t{i + j} * step) * p.eps;
        break;
      case Normalize::kClamp:
        varies = ~(d < set1(p.clamp_min));
        d = max(set1(p.clamp_min), d);
        break;
    }
    store(factor + i, set1(p.scale) / d);
    if (slope) store(slope + i, (vf)((vi)(set1(-1.f) / d) & varies));
  }
}

// scores[i][j] = 0 for j > i (upper false) or j < i (upper true), for rows [r0, r0 + rows) and columns [c0, c1).
// A masked score is 0, not absent: an infinity or a NaN in a row of values reaches every row of its block of kBlock.
EFFVIT_INLINE void mask_triangle(float* scores, int64_t ld, int r0, int rows, int c0, int c1, bool upper) {
  for (int i = 0; i < rows; ++i) {
    float* row = scores + i * ld - c0;
    if (upper) {
      for (int j = c0; j < std::min(c1, r0 + i); ++j) row[j] = 0.f;
    } else {
      for (int j = std::max(c0, r0 + i + 1); j < c1; ++j) row[j] = 0.f;
    }
  }
}

enum class Triangle { kFull, kLower, kUpper };

// c[m, n] += (a[m, k] bt[k, columns]) masked to a triangle, times d[columns, n]: attention within a pair of chunks.
// bt holds `columns` columns, padded to whole vectors with finite values. scores: kBlock rows of round_up(columns).
void add_scores_product(Triangle triangle, int m, int columns, int k, const float* a, int64_t lda, const float* bt,
                        int64_t ldb, const float* d, int64_t ldd, int n, float* scores, float* c, int64_t ldc) {
  for (int r = 0; r < m; r += kBlock) {
    const int rows = std::min(kBlock, m - r);
    const int first = triangle == Triangle::kUpper ? r : 0;
    const int last = triangle == Triangle::kLower ? std::min(r + rows, columns) : columns;
    const int padded = round_up(last - first, kLanes);
    gemm(rows, padded, k, RowMajorA{a + r * lda, lda}, DenseB{bt + first, ldb}, scores, padded, false);
    if (triangle != Triangle::kFull) {
      mask_triangle(scores, padded, r, rows, first, last, triangle == Triangle::kUpper);
    }
    gemm(rows, n, last - first, RowMajorA{scores, padded}, DenseB{d + first * ldd, ldd}, c + r * ldc, ldc, true);
  }
}

// ---- states --------------------------------------------------------------------------------------------------------

// A padded state, [K, Vp] and z [Kp], from contiguous tensors [K, V] and [K]; zeros where they are null.
void load_state(const Plan& plan, float* slot, const float* state, const float* z) {
  zero(slot, plan.slot);
  float* const to_z = slot + int64_t{plan.Kp} * plan.Vp;
  if (state) {
    for (int c = 0; c < plan.K; ++c) load_row(slot + int64_t{c} * plan.Vp, state + int64_t{c} * plan.V, plan.V);
  }
  if (z) std::memcpy(to_z, z, static_cast<size_t>(plan.K) * sizeof(float));
}

void store_state(const Plan& plan, const float* slot, float* state, float* z) {
  if (state) {
    for (int c = 0; c < plan.K; ++c) store_row(state + int64_t{c} * plan.V, slot + int64_t{c} * plan.Vp, plan.V);
  }
  if (z) std::memcpy(z, slot + int64_t{plan.Kp} * plan.Vp, static_cast<size_t>(plan.K) * sizeof(float));
}

void add_state(const Plan& plan, float* slot, const float* other) {
  for (int64_t i = 0; i < plan.slot; i += kLanes) store(slot + i, load(slot + i) + load(other + i));
}

// One state per head: `first` is that of head h0.
struct States {
  float* first;
  int64_t h0, stride;
  EFFVIT_INLINE float* operator()(int64_t head) const { return first + (head - h0) * stride; }
};

// Partial states in the workspace: [N, splits, H] slots.
States states_of(const Params& p, const Plan& plan, float* base, int64_t n, int64_t split) {
  return {base + (n * plan.splits + split) * p.H * plan.slot, 0, plan.slot};
}

// The slots of one (sequence, head), from partial sums to what precedes each split: exclusive sums from `first` on, in
// order or backwards. Returns with the total in `total`, which starts as a copy of `first`.
template <class Slot>
void scan_slots(const Plan& plan, bool backwards, float* total, const Slot& slot) {
  for (int64_t i = 0; i < plan.splits; ++i) {
    float* const here = slot(backwards ? plan.splits - 1 - i : i);
    for (int64_t j = 0; j < plan.slot; j += kLanes) {
      const vf sum = load(total + j), x = load(here + j);
      store(here + j, sum);
      store(total + j, sum + x);
    }
  }
}

// ---- bfloat16 products ---------------------------------------------------------------------------------------------

// The operands in bfloat16; and the tile configuration of the thread, while a pass runs.
struct NoBf16Operands {
  NoBf16Operands(const Plan&, int64_t, Scratch&) {}
};
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
struct Bf16Operands {
  const Plan& plan;
  int K32, V32;  // head dims rounded up to the depth of a product on tiles
  // A chunk's rows [64, 32-multiple], those whose transpose is multiplied with ([Kp, 64] for tiles, else in pairs of
  // rows [32, 2 Kp]), one in pairs of rows [32, 2 Vp]; a state's rows.
  BFloat16 *rows, *transposed, *pairs, *state_rows;
  // Per head of the unit: S as a right-hand side, [K32 / 2, 2 Vp], and S^T, [V32 / 2, 2 Kp].
  BFloat16 *states, *states_t;

  Bf16Operands(const Plan& cut, int64_t heads, Scratch& s) : plan(cut) {
    K32 = round_up(plan.K, 32), V32 = round_up(plan.V, 32);
    rows = s.take<BFloat16>(int64_t{kChunk} * std::max(K32, V32));
    transposed = s.take<BFloat16>(int64_t{plan.Kp} * kChunk);
    pairs = s.take<BFloat16>(int64_t{kChunk} * plan.Vp);
    state_rows = s.take<BFloat16>(int64_t{K32} * V32);
    states = s.take<BFloat16>(heads * K32 * plan.Vp);
    states_t = s.take<BFloat16>(heads * V32 * plan.Kp);
  }

  // The slot of a state, rounded, as a right-hand side of products over its rows and over its columns.
  void load_state(const float* slot, int64_t index, bool rows_too, bool columns_too) {
    for (int c = 0; c < K32; ++c) {
      BFloat16* to = state_rows + int64_t{c} * V32;
      const float* from = slot + int64_t{c} * plan.Vp;
      for (int e = 0; e < V32; e += kLanes) {  // the padding of a slot may hold 0 * inf: it stays out of the products
        const int left = std::max(0, std::min(kLanes, plan.V - e));
        store(to + e, c < plan.K && left > 0 ? first_lanes(load(from + e), left) : vf{});
      }
    }
    if (rows_too) {
      pack_rows(state(index), 2 * plan.Vp, K32, plan.Vp, [&](int c) { return state_rows + int64_t{c} * V32; });
    }
    if (columns_too) {
      pack_transposed(state_t(index), 2 * plan.Kp, plan.Kp, V32, [&](int c) { return state_rows + int64_t{c} * V32; });
    }
  }
  BFloat16* state(int64_t index) const { return states + index * K32 * plan.Vp; }
  BFloat16* state_t(int64_t index) const { return states_t + index * V32 * plan.Kp; }

  // rows = src[n, padded], zeros up to `depth` columns
  void load_rows(const float* src, int padded, int depth, int n) {
    for (int i = 0; i < n; ++i) {
      BFloat16* to = rows + int64_t{i} * depth;
      for (int c = 0; c < depth; c += kLanes) store(to + c, c < padded ? load(src + int64_t{i} * padded + c) : vf{});
    }
  }

#if !defined(EFFVIT_HAS_TILES)
  DenseB state_b(int64_t index) const { return pairs_b(state(index), 2 * plan.Vp); }
  DenseB state_t_b(int64_t index) const { return pairs_b(state_t(index), 2 * plan.Kp); }

  // slot += (rows in `transposed`)^T (rows in `pairs`), n rows in pairs.
  template <class F>
  EFFVIT_INLINE void add_outer(int n, float* slot, const F& between) {
    gemm_into(plan.K, plan.Vp, (n + 1) / 2, TransposedPairs(transposed, 2 * plan.Kp), pairs_b(pairs, 2 * plan.Vp),
              StoreC{slot, plan.Vp, true}, between);
  }

  // transposed = rows of src[n, Kp] in pairs
  void load_transposed(const float* src, int n) {
    const int64_t ld = plan.Kp;
    for (int i = 0; i < n; i += 2) {
      const float* row = src + i * ld;
      for (int c = 0; c < plan.Kp; c += kLanes) {
        const vf odd = i + 1 < n ? load(row + ld + c) : vf{};
        store(reinterpret_cast<Pair*>(transposed + i * ld + 2 * c), (vf)round_pairs(load(row + c), odd));
      }
    }
  }
#else
  void load_rows(const BFloat16* src, int64_t stride, int width, int depth, int n) {
    for (int i = 0; i < n; ++i) {
      BFloat16* to = rows + int64_t{i} * depth;
      std::memcpy(to, src + i * stride, static_cast<size_t>(width) * sizeof(BFloat16));
      std::memset(to + width, 0, static_cast<size_t>(depth - width) * sizeof(BFloat16));
    }
  }

  // slot += features[n, Kp]^T rows[n, V32]; features has room for round_up(n, 32) rows.
  void add_outer(float* features, int n, float* slot) {
    const int depth = round_up(n, kBf16Depth);
    zero(features + int64_t{n} * plan.Kp, int64_t{depth - n} * plan.Kp);
    pack_transposed_a(transposed, features, plan.Kp, depth, plan.Kp);
    pack_rows(pairs, 2 * plan.Vp, n, plan.Vp, [&](int i) { return rows + int64_t{i} * V32; });
    bf16_gemm(plan.Kp, plan.Vp, depth, transposed, depth, pairs, 2 * plan.Vp, slot, plan.Vp, true);
  }

  // c[n, Vp] = rows[n, K32] S, and c[n, Kp] = rows[n, V32] S^T; c has room for round_up(n, 16) rows.
  void times_state(int64_t index, int n, float* c) {
    bf16_gemm(round_up(n, kBf16Rows), plan.Vp, K32, rows, K32, state(index), 2 * plan.Vp, c, plan.Vp, false);
  }
  void times_state_t(int64_t index, int n, float* c) {
    bf16_gemm(round_up(n, kBf16Rows), plan.Kp, V32, rows, V32, state_t(index), 2 * plan.Kp, c, plan.Kp, false);
  }
#endif

 private:
  TileScope scope_;
};
template <class T>
using OperandsOf = std::conditional_t<kBf16Products<T>, Bf16Operands, NoBf16Operands>;
#else
template <class T>
using OperandsOf = NoBf16Operands;
#endif

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  const Params& p;
  const Plan& plan;
  float *qf, *kf, *vf_, *den, *dots, *factor, *weights, *scores, *kt, *o, *total;
  Ahead<T> ahead;
  OperandsOf<T> operands;
  bool bf16_products = kBf16Products<T>;

  // Where the backward only needs the forward's sums, `total` is not.
  Forward(const Params& params, const Plan& cut, Scratch& s, bool sums_only = false)
      : p(params), plan(cut), operands(cut, ceil_div(params.H, cut.groups), s) {
    bf16_products = kBf16Products<T> && !p.causal && !p.quadratic;
    const int64_t n = kChunk;
    kf = s.take<float>(n * plan.Kp);
    vf_ = s.take<float>(n * plan.Vp);
    qf = s.take<float>(n * plan.Kp);
    den = s.take<float>(n * plan.Kp);
    dots = s.take<float>(n);
    factor = s.take<float>(n);
    weights = s.take<float>(n);
    total = sums_only ? nullptr : s.take<float>(plan.whole ? ceil_div(p.H, plan.groups) * plan.slot : plan.slot);
    scores = kt = o = nullptr;
    if (p.causal || p.quadratic) {
      scores = s.take<float>(kBlock * n);
      kt = s.take<float>(n * plan.Kp);
    }
    if (p.causal || p.quadratic || kBf16Tiles<T>) o = s.take<float>(n * plan.Vp);
  }

  float* z_of(float* slot) const { return slot + int64_t{plan.Kp} * plan.Vp; }

  Rows<const T> q_rows(int64_t b) const { return rows<T>(p.q, b, p.q_stride_b, p.q_stride_l, p.q_stride_h); }
  Rows<const T> k_rows(int64_t b) const { return rows<T>(p.k, b, p.k_stride_b, p.k_stride_l, p.k_stride_h); }
  Rows<const T> v_rows(int64_t b) const { return rows<T>(p.v, b, p.v_stride_b, p.v_stride_l, p.v_stride_h); }
  Rows<const T> q_den_rows(int64_t b) const {
    return rows<T>(p.q_den, b, p.q_den_stride_b, p.q_den_stride_l, p.q_den_stride_h);
  }
  Rows<const T> k_den_rows(int64_t b) const {
    return rows<T>(p.k_den, b, p.k_den_stride_b, p.k_den_stride_l, p.k_den_stride_h);
  }

  // Adds the keys of a chunk to a state.
  EFFVIT_INLINE void add_keys(const Rows<const T>& k, const Rows<const T>& v, const Rows<const T>& k_den, int64_t batch,
                              int64_t at, int n, int64_t head, float* slot) {
    const float* w = load_weights(p, batch, at, n, head, weights);
    if (k_den) pack_features(p.feature_map, kf, k_den.at(at, head), k_den.stride_l, n, plan.K, w, z_of(slot));
#if defined(EFFVIT_HAS_BF16_PRODUCTS) && !defined(EFFVIT_HAS_TILES)
    if constexpr (kBf16Products<T>) {
      if (bf16_products) {
        pack_feature_pairs(p.feature_map, operands.transposed, k.at(at, head), k.stride_l, n, plan.K, w,
                           k_den ? nullptr : z_of(slot));
        const T* const values = v.at(at, head);
        if (plan.V == plan.Vp) {
          pack_rows(operands.pairs, 2 * plan.Vp, n, plan.Vp, [&](int i) { return values + i * v.stride_l; });
        } else {
          pack_feature_pairs(FeatureMap::kNone, operands.pairs, values, v.stride_l, n, plan.V);
        }
        return operands.add_outer(n, slot, [&](int calls) { return ahead.step(calls); });
      }
    }
#endif
    pack_features(p.feature_map, kf, k.at(at, head), k.stride_l, n, plan.K, w, k_den ? nullptr : z_of(slot));
#if defined(EFFVIT_HAS_TILES)
    if constexpr (kBf16Products<T>) {
      if (bf16_products) {
        operands.load_rows(v.at(at, head), v.stride_l, plan.V, operands.V32, n);
        ahead.fetch(gemm_steps(plan.K, plan.Vp) + 1);
        return operands.add_outer(kf, n, slot);
      }
    }
#endif
    pack_rows_scaled(vf_, v.at(at, head), v.stride_l, n, plan.V, nullptr);
    gemm_into(plan.K, plan.Vp, n, TransposedA{kf, plan.Kp}, DenseB{vf_, plan.Vp}, StoreC{slot, plan.Vp, true},
              [&](int calls) { return ahead.step(calls); });
  }

  // Adds the unit's keys to its states, slot(head).
  void sums(const Unit& unit, const States& slot) {
    const auto range = unit.tokens(p, plan, p.M);
    const auto k = k_rows(range.batch), v = v_rows(range.batch), k_den = k_den_rows(range.batch);
    ahead.clear();
    ahead.add(k, p.K);
    ahead.add(v, p.V);
    ahead.add(k_den, p.K);
    walk(ahead, range.begin, range.end, unit.h0, unit.h1, plan.chunk, gemm_steps(plan.K, plan.Vp), false,
         [&](int64_t at, int n, int64_t head) { add_keys(k, v, k_den, range.batch, at, n, head, slot(head)); });
  }

  // The unit's rows of out, from the complete states.
  void outputs(const Unit& unit, const States& slot) {
    const auto range = unit.tokens(p, plan, p.L), keys = tokens_of(p, unit.n, p.M);
    const auto q = q_rows(range.batch), q_den = q_den_rows(range.batch);
    const auto out = contiguous_rows<T>(p.out, range.batch, p.L, p.H, p.V);
    const bool streamed = streams<T>(p.out, p.V, p.B * p.L * p.H * p.V * static_cast<int64_t>(sizeof(T)));
    ahead.clear();
    ahead.add(q, p.K);
    ahead.add(q_den, p.K);
    if (!streamed) ahead.add(out, p.V);

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
    if constexpr (kBf16Products<T>) {
      for (int64_t h = unit.h0; h < unit.h1; ++h) operands.load_state(slot(h), h - unit.h0, true, false);
    }
#endif
    walk(ahead, range.begin, range.end, unit.h0, unit.h1, plan.chunk, gemm_steps(plan.chunk, plan.Vp), false,
         [&](int64_t at, int n, int64_t head) {
           float* const state = slot(head);
#if defined(EFFVIT_HAS_BF16_PRODUCTS) && !defined(EFFVIT_HAS_TILES)
           if constexpr (kBf16Products<T>) {
             const float* const z = p.normalize == Normalize::kNone ? nullptr : z_of(state);
             if (q_den) {
               pack_features_dot(p.feature_map, den, q_den.at(at, head), q_den.stride_l, n, plan.K, z_of(state), dots);
             }
             pack_feature_rows(p.feature_map, operands.rows, operands.K32, q.at(at, head), q.stride_l, n, plan.K,
                               nullptr, q_den ? nullptr : z, dots);
             normalizers(p, dots, n, keys.end - keys.begin, 0, factor, nullptr);
             gemm_to_rows(n, plan.V, (plan.K + 1) / 2, RowMajorPairs(operands.rows, operands.K32),
                          operands.state_b(head - unit.h0), out.at(at, head), out.stride_l, factor, streamed,
                          [&](int calls) { return ahead.step(calls); });
             return;
           }
#endif
           if (q_den) {
             pack_features_dot(p.feature_map, den, q_den.at(at, head), q_den.stride_l, n, plan.K, z_of(state), dots);
             pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
           } else if (p.normalize == Normalize::kNone) {
             pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
           } else {
             pack_features_dot(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K, z_of(state), dots);
           }
           normalizers(p, dots, n, keys.end - keys.begin, 0, factor, nullptr);
#if defined(EFFVIT_HAS_TILES)
           if constexpr (kBf16Products<T>) {
             operands.load_rows(qf, plan.Kp, operands.K32, n);
             ahead.fetch(gemm_steps(plan.chunk, plan.Vp) + 1);
             operands.times_state(head - unit.h0, n, o);
             store_rows(out.at(at, head), out.stride_l, o, plan.Vp, n, plan.V, factor);
             return;
           }
#endif
           gemm_to_rows(n, plan.V, plan.K, RowMajorA{qf, plan.Kp}, DenseB{state, plan.Vp}, out.at(at, head),
                        out.stride_l, factor, streamed, [&](int calls) { return ahead.step(calls); });
         });
    if (streamed) stream_fence();
  }

  // dots[i] = phi(q_den_i) . z_i, where z_i runs over the keys up to i; z goes on to the end of the chunk.
  EFFVIT_INLINE void running_dots(const float* features_q, const float* features_k, int n, float* z) {
    for (int i = 0; i < n; ++i) {
      vf sum{};
      for (int c = 0; c < plan.Kp; c += kLanes) {
        const vf here = load(z + c) + load(features_k + i * plan.Kp + c);
        store(z + c, here);
        sum = fma(here, load(features_q + i * plan.Kp + c), sum);
      }
      dots[i] = reduce_add(sum);
    }
  }

  // The unit's rows of out, each from the keys up to its own; the states, of the keys before the unit, run along.
  void causal_outputs(const Unit& unit, const States& slot) {
    const auto range = unit.tokens(p, plan, p.L);
    const int64_t start = tokens_of(p, unit.n, p.L).begin, b = range.batch;
    const auto q = q_rows(b), k = k_rows(b), v = v_rows(b), q_den = q_den_rows(b), k_den = k_den_rows(b);
    const auto out = contiguous_rows<T>(p.out, b, p.L, p.H, p.V);
    ahead.clear();
    ahead.add(q, p.K);
    ahead.add(k, p.K);
    ahead.add(v, p.V);
    walk(ahead, range.begin, range.end, unit.h0, unit.h1, plan.chunk,
         gemm_steps(plan.chunk, plan.Vp) + gemm_steps(plan.K, plan.Vp), false, [&](int64_t at, int n, int64_t head) {
           float* const state = slot(head);
           const float* w = load_weights(p, b, at, n, head, weights);
           pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
           pack_features(p.feature_map, kf, k.at(at, head), k.stride_l, n, plan.K, w);
           pack_rows_scaled(vf_, v.at(at, head), v.stride_l, n, plan.V, nullptr);
           const float *dq = qf, *dk = kf;
           if (q_den) {
             pack_features(p.feature_map, den, q_den.at(at, head), q_den.stride_l, n, plan.K);
             dq = den;
           }
           if (k_den) {
             pack_features(p.feature_map, kt, k_den.at(at, head), k_den.stride_l, n, plan.K, w);
             dk = kt;
           }
           running_dots(dq, dk, n, z_of(state));
           normalizers(p, dots, n, at - start + 1, 1, factor, nullptr);
           gemm_into(n, plan.Vp, plan.K, RowMajorA{qf, plan.Kp}, DenseB{state, plan.Vp}, StoreC{o, plan.Vp, false},
                     [&](int calls) { return ahead.step(calls); });
           transpose_packed(kt, kChunk, kf, n, plan.K);
           add_scores_product(Triangle::kLower, n, n, plan.K, qf, plan.Kp, kt, kChunk, vf_, plan.Vp, plan.Vp, scores, o,
                              plan.Vp);
           store_rows(out.at(at, head), out.stride_l, o, plan.Vp, n, plan.V, factor);
           gemm_into(plan.K, plan.Vp, n, TransposedA{kf, plan.Kp}, DenseB{vf_, plan.Vp}, StoreC{state, plan.Vp, true},
                     [&](int calls) { return ahead.step(calls); });
         });
  }

  // One (sequence, head) from the scores of all pairs of chunks.
  void quadratic(const Unit& unit) {
    const int64_t b = unit.n, head = unit.h0;
    const auto q = q_rows(b), k = k_rows(b), v = v_rows(b), q_den = q_den_rows(b);
    const auto den_k = p.k_den ? k_den_rows(b) : k;
    const auto out = contiguous_rows<T>(p.out, b, p.L, p.H, p.V);
    const auto keys_of = [&](int64_t at) { return static_cast<int>(std::min<int64_t>(plan.chunk, p.M - at)); };
    float* const z = total;
    zero(z, plan.Kp);
    if (!p.causal && p.normalize != Normalize::kNone) {
      for (int64_t j = 0; j < p.M; j += plan.chunk) {
        const int n = keys_of(j);
        const float* w = load_weights(p, b, j, n, head, weights);
        pack_features(p.feature_map, kf, den_k.at(j, head), den_k.stride_l, n, plan.K, w, z);
      }
    }
    for (int64_t at = 0; at < p.L; at += plan.chunk) {
      const int n = static_cast<int>(std::min<int64_t>(plan.chunk, p.L - at));
      pack_features(p.feature_map, qf, q.at(at, head), q.stride_l, n, plan.K);
      const float* features = qf;
      if (q_den) {
        pack_features(p.feature_map, den, q_den.at(at, head), q_den.stride_l, n, plan.K);
        features = den;
      }
      if (p.causal) {
        const float* w = load_weights(p, b, at, n, head, weights);
        pack_features(p.feature_map, kf, den_k.at(at, head), den_k.stride_l, n, plan.K, w);
        running_dots(features, kf, n, z);
      } else {
        for (int i = 0; i < n; ++i) dots[i] = dot(features + i * plan.Kp, z, plan.Kp);
      }
      normalizers(p, dots, n, p.causal ? at + 1 : p.M, p.causal, factor, nullptr);
      zero(o, int64_t{n} * plan.Vp);
      for (int64_t j = 0; j < (p.causal ? at + n : p.M); j += plan.chunk) {
        const int columns = keys_of(j);
        const float* w = load_weights(p, b, j, columns, head, weights);
        pack_features(p.feature_map, kf, k.at(j, head), k.stride_l, columns, plan.K, w);
        pack_rows_scaled(vf_, v.at(j, head), v.stride_l, columns, plan.V, nullptr);
        transpose_packed(kt, kChunk, kf, columns, plan.K);
        add_scores_product(p.causal && j == at ? Triangle::kLower : Triangle::kFull, n, columns, plan.K, qf, plan.Kp,
                           kt, kChunk, vf_, plan.Vp, plan.Vp, scores, o, plan.Vp);
      }
      store_rows(out.at(at, head), out.stride_l, o, plan.Vp, n, plan.V, factor);
    }
  }

  int64_t pair(const Unit& unit, int64_t head) const { return unit.n * p.H + head; }
  const float* initial_state(int64_t pair) const {
    return p.initial_state ? p.initial_state + pair * p.K * p.V : nullptr;
  }
  const float* initial_z(int64_t pair) const { return p.initial_z ? p.initial_z + pair * p.K : nullptr; }

  void run_whole(const Unit& unit) {
    const States slot{total, unit.h0, plan.slot};
    for (int64_t h = unit.h0; h < unit.h1; ++h) {
      load_state(plan, slot(h), initial_state(pair(unit, h)), initial_z(pair(unit, h)));
    }
    if (p.causal) {
      causal_outputs(unit, slot);
    } else {
      sums(unit, slot);
      outputs(unit, slot);
    }
    for (int64_t h = unit.h0; h < unit.h1; ++h) {
      store_state(plan, slot(h), p.state + pair(unit, h) * p.K * p.V, p.z + pair(unit, h) * p.K);
    }
  }

  // Phases: 0 everything of whole sequences, or partial states; 1 states from them; 2 out.
  void run(int phase, float* workspace, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      if (phase == 1) {  // a unit is a (sequence, head)
        const int64_t n = index / p.H, head = index % p.H;
        load_state(plan, total, initial_state(index), initial_z(index));
        const auto slot = [&](int64_t split) { return states_of(p, plan, workspace, n, split)(head); };
        if (p.causal) {
          scan_slots(plan, false, total, slot);
        } else {
          for (int64_t split = 0; split < plan.splits; ++split) add_state(plan, total, slot(split));
          std::memcpy(slot(0), total, static_cast<size_t>(plan.slot) * sizeof(float));
        }
        store_state(plan, total, p.state + index * p.K * p.V, p.z + index * p.K);
        continue;
      }
      const Unit unit(p, plan, index);
      const States own = states_of(p, plan, workspace, unit.n, unit.split);
      if (p.quadratic) {
        quadratic(unit);
      } else if (plan.whole) {
        run_whole(unit);
      } else if (phase == 0) {
        for (int64_t h = unit.h0; h < unit.h1; ++h) zero(own(h), plan.slot);
        sums(unit, own);
      } else if (p.causal) {
        causal_outputs(unit, own);
      } else {
        outputs(unit, states_of(p, plan, workspace, unit.n, 0));
      }
    }
  }
};

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

#include "linear_attention_backward.inl.h"

// ---- entry points --------------------------------------------------------------------------------------------------

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

template <bool backward>
int64_t workspace(const Params& p) {
  return Plan(p, backward).workspace;
}

template <bool backward, int phase>
int64_t units(const Params& p) {
  const Plan plan(p, backward);
  const int64_t all = p.N * plan.groups * plan.splits;
  if (plan.whole) return phase == 0 ? all : 0;
  if (backward && phase < 2 && !p.causal) return 0;
  return phase % 2 == 1 ? p.N * p.H : all;
}

template <bool backward, int phase>
void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan plan(p, backward);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (backward) {
      run_pass<Backward<T>>(p, plan, phase, workspace, begin, end);
    } else {
      run_pass<Forward<T>>(p, plan, phase, workspace, begin, end);
    }
  });
}

template <bool backward, int phase>
constexpr Pass<Params> pass() {
  return {units<backward, phase>, run<backward, phase>};
}
constexpr Pass<Params> kForward[] = {pass<false, 0>(), pass<false, 1>(), pass<false, 2>()};
constexpr Pass<Params> kBackward[] = {pass<true, 0>(), pass<true, 1>(), pass<true, 2>(), pass<true, 3>(),
                                      pass<true, 4>()};

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<LinearAttentionParams>* EFFVIT_KERNEL_NAME(linear_attention)() {
  namespace impl = EFFVIT_ISA_NAME::linear_attention_impl;
  static constexpr Kernel<LinearAttentionParams> kernel = {routine(impl::kForward, impl::workspace<false>),
                                                           routine(impl::kBackward, impl::workspace<true>)};
  return &kernel;
}
}  // namespace effvit::cpu
