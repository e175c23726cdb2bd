// int8_attention on the CPU: quantised rows, and the keys and values of a block in the order of their products.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_attention_impl {

using Params = Int8AttentionParams;
constexpr int kKeys = kAttentionBlock;

// What integers follow from must be rounded as the definition says: no multiply-add of what comes out of this.
EFFVIT_INLINE vf rounded(vf x) {
#if defined(EFFVIT_HAS_AVX512)
  asm("" : "+v"(x));
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

EFFVIT_INLINE vi most(vi a, vi b) { return a > b ? a : b; }

// The largest |x| of lanes of bits of |x|: of floats without a sign these compare like the numbers, NaN above infinity.
EFFVIT_INLINE float largest(vi bits) {
  int32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = std::max(top, bits[i]);
  float x;
  std::memcpy(&x, &top, 4);
  return x;
}
EFFVIT_INLINE vi magnitude(vf x) { return (vi)x & 0x7fffffff; }
EFFVIT_INLINE float inverse_of(float top) { return top >= kAttentionSmallest ? 127.f / top : 0.f; }

// To the nearest step; 0 for NaN.
EFFVIT_INLINE vi steps_of(vf x, vf inverse) {
  const vf y = rounded(x * inverse);
  return round_to_int((vf)((vi)y & (y == y)));
}

// kLanes integers: int16, or bytes, with 128 added where these are unsigned.
EFFVIT_INLINE void store_steps(int16_t* to, vi x) { store(to, x); }
EFFVIT_INLINE void store_steps(int8_t* to, vi x) { store(to, x); }
EFFVIT_INLINE void store_steps(uint8_t* to, vi x) { store(reinterpret_cast<int8_t*>(to), x + 128); }

// x[0..n) in steps of the largest one: to `to`, n a multiple of kLanes; returns what one step is worth.
template <class T>
EFFVIT_INLINE float quantise_row(T* to, const float* x, int n) {
  vi top{};
  for (int i = 0; i < n; i += kLanes) top = most(top, magnitude(load(x + i)));
  const float most_of_row = largest(top);
  const vf inverse = set1(inverse_of(most_of_row));
  for (int i = 0; i < n; i += kLanes) store_steps(to + i, steps_of(load(x + i), inverse));
  return most_of_row / 127.f;
}

// ---- the layout of packed keys and values
// ----------------------------------------------------------------------------

// Operands of the scores: bytes where there are dot products of bytes, else pairs of int16.
using Key = std::conditional_t<kInt8Dot, int8_t, int16_t>;
using Query = std::conditional_t<kInt8Dot, uint8_t, int16_t>;
constexpr int kPerWord = 4 / static_cast<int>(sizeof(Key));  // numbers of a word that is broadcast

// Few rows read keys and values as bytes, row by row: int8 ones where they lie.
constexpr int64_t kFewRows = 3;

struct Plan {
  int64_t rows;  // of queries that share a head of keys
  bool few, int8, means;
  int key_stride, value_stride;  // of a packed key, in numbers; of a packed value, or channels of a block
  int64_t head_floats;  // of a head in the workspace, with what follows
  int64_t mean_at, key_scale_at, value_scale_at, sums_at, keys_at, values_at;

  explicit Plan(const Params& p) {
    rows = p.L * (p.H / p.G);
    few = rows <= kFewRows;
    int8 = p.kv_dtype == DType::kInt8;
    means = !int8 && p.smooth_k && !p.k_mean;
    const int K = static_cast<int>(p.K), V = static_cast<int>(p.V);
    const int step = kInt8Tiles ? 64 : few ? 4 * kLanes : kLanes;
    key_stride = round_up(K, step), value_stride = round_up(V, few ? 4 * kLanes : kLanes);
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      const int64_t from = at;
      at += (floats + 15) / 16 * 16;
      return from;
    };
    const bool packs = !(few && int8);
    mean_at = take(means ? round_up(K, kLanes) : 0);
    key_scale_at = take(int8 ? 0 : p.N), value_scale_at = take(int8 ? 0 : p.N * V);
    sums_at = take(packs && kInt8Dot && !few ? p.N * kKeys : 0);
    const int64_t key_bytes = few ? 1 : sizeof(Key);
    keys_at = take(packs ? p.N * kKeys * key_stride * key_bytes / 4 : 0);
    values_at = take(packs ? p.N * kKeys * value_stride / 4 : 0);
    head_floats = at;
  }
};

// A head of keys and values in the workspace.
struct Head {
  const Plan& plan;
  float* base;
  Head(const Plan& plan, const Params& p, float* workspace, int64_t b, int64_t g)
      : plan(plan), base(workspace + (b * p.G + g) * plan.head_floats) {}
  float* mean() const { return base + plan.mean_at; }
  float* key_scale() const { return base + plan.key_scale_at; }
  float* value_scale() const { return base + plan.value_scale_at; }
  int32_t* sums(int64_t block) const { return reinterpret_cast<int32_t*>(base + plan.sums_at) + block * kKeys; }
  template <class T>
  T* keys(int64_t block) const {
    return reinterpret_cast<T*>(base + plan.keys_at) + block * kKeys * plan.key_stride;
  }
  int8_t* values(int64_t block) const {
    return reinterpret_cast<int8_t*>(base + plan.values_at) + block * kKeys * plan.value_stride;
  }
};

int64_t workspace(const Params& p) { return Plan(p).head_floats * p.B * p.G; }

// ---- the mean of keys
// ------------------------------------------------------------------------------------------------

int64_t mean_units(const Params& p) { return Plan(p).means ? p.B * p.G : 0; }

// Rows lie far apart: they are fetched a few ahead.
constexpr int kAheadRows = 8;
template <class T>
EFFVIT_INLINE void fetch_row(const T* row, int n) {
  for (int i = 0; i < n; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + i, 0, 3);
}

// sums[0..kVectors) + x, of n rows one after the other.
template <int kVectors, class T>
EFFVIT_INLINE void sum_rows(float* sums, const T* x, int64_t stride, int n) {
  vf sum[kVectors] = {};
  for (int j = 0; j < n; ++j, x += stride) {
    fetch_row(x + std::min(kAheadRows, n - 1 - j) * stride, kVectors * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[i] = j == 0 ? load(x + i * kLanes) : sum[i] + load(x + i * kLanes);
  }
  for (int i = 0; i < kVectors; ++i) store(sums + i * kLanes, sum[i]);
}

template <class T>
void mean_of_head(const Params& p, float* mean, int64_t b, int64_t g, float* row, float* sum) {
  const T* k = static_cast<const T*>(p.k) + b * p.k_stride_b + g * p.k_stride_h;
  const int K = static_cast<int>(p.K), padded = round_up(K, kLanes);
  const int64_t stride = p.k_stride_m, M = p.M;
  for (int64_t j = 0; j < M; j += kKeys, k += kKeys * stride) {
    const int n = static_cast<int>(std::min<int64_t>(kKeys, M - j));
    int c = 0;
    for (; c + 8 * kLanes <= K; c += 8 * kLanes) sum_rows<8>(sum + c, k + c, stride, n);
    for (; c + kLanes <= K; c += kLanes) sum_rows<1>(sum + c, k + c, stride, n);
    for (int i = 0; c < K && i < n; ++i) {
      load_row(row, k + i * stride + c, K - c);
      store(sum + c, i == 0 ? load(row) : load(sum + c) + load(row));
    }
    for (c = 0; c < padded; c += kLanes) store(mean + c, j == 0 ? load(sum + c) : load(mean + c) + load(sum + c));
  }
  const vf count = set1(static_cast<float>(M));
  for (int c = 0; c < padded; c += kLanes) store(mean + c, load(mean + c) / count);
}

void run_means(const Params& params, float* workspace, int64_t begin, int64_t end) {
  const Params p = params;  // stores may alias anything
  const Plan plan(p);
  auto* const scratch = static_cast<float*>(thread_scratch(2 * 256 * 4));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / p.G, g = unit % p.G;
    float* const mean = Head(plan, p, workspace, b, g).mean();
    dispatch_dtype(p.kv_dtype, [&](auto type) { mean_of_head<decltype(type)>(p, mean, b, g, scratch, scratch + 256); });
  }
}

// ---- packing
// ---------------------------------------------------------------------------------------------------------

int64_t pack_units(const Params& p) {
  const Plan plan(p);
  return plan.few && plan.int8 ? 0 : p.B * p.G * p.N;
}

// Sums of keys times -128, which is what adding 128 to the queries adds.
EFFVIT_INLINE void sum_key(int32_t* sums, int j, const int8_t* key, int n) { sums[j] = -128 * sum_bytes(key, n); }
EFFVIT_INLINE void sum_key(int32_t*, int, const int16_t*, int) {}

// n keys of a block, quantised together, to rows of T with zeros beyond K; the last is repeated up to `most` rows.
template <class T>
float pack_keys(T* to, int stride, const float* x, int padded, int n, int most_rows) {
  vi top{};
  for (int i = 0; i < n * padded; i += kLanes) top = most(top, magnitude(load(x + i)));
  const float most_of_block = largest(top);
  const vf inverse = set1(inverse_of(most_of_block));
  for (int j = 0; j < n; ++j) {
    T* const row = to + j * stride;
    for (int c = 0; c < padded; c += kLanes) store_steps(row + c, steps_of(load(x + j * padded + c), inverse));
    std::memset(row + padded, 0, sizeof(T) * static_cast<size_t>(stride - padded));
  }
  for (int j = n; j < most_rows; ++j) std::memcpy(to + j * stride, to + (n - 1) * stride, sizeof(T) * stride);
  return most_of_block / 127.f;
}

// Words of four keys each, of kLanes channels, to rows of channels: [channel][64 keys].
EFFVIT_INLINE void store_channels(int8_t* to, vf (&words)[kLanes]) {
  transpose_block(words);
  for (int c = 0; c < kLanes; ++c) store(reinterpret_cast<float*>(to + c * kKeys), words[c]);
}

// n values of a block, rows of `padded` floats, quantised by channel: [channel][64 keys], zeros beyond n.
void pack_channels(int8_t* to, float* scale, int V, const float* x, int padded, int n) {
  for (int c = 0; c < padded; c += kLanes) {
    vi top{};
    for (int j = 0; j < n; ++j) top = most(top, magnitude(load(x + j * padded + c)));
    float inverse[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      float largest_of_channel;
      std::memcpy(&largest_of_channel, reinterpret_cast<const char*>(&top) + 4 * i, 4);
      inverse[i] = inverse_of(largest_of_channel);
      if (c + i < V) scale[c + i] = largest_of_channel / 127.f;
    }
    const vf factor = load(inverse);
    for (int j = 0; j < kKeys; j += 4 * kLanes) {
      vf words[kLanes];
      for (int g = 0; g < kLanes; ++g) {
        vi word{};
        for (int i = 0; i < 4; ++i) {
          const int key = j + 4 * g + i;
          if (key < n) word |= (steps_of(load(x + key * padded + c), factor) & 255) << (8 * i);
        }
        words[g] = (vf)word;
      }
      store_channels(to + c * kKeys + j, words);
    }
  }
}

// The same, row by row.
void pack_rows(int8_t* to, int stride, float* scale, int V, const float* x, int padded, int n) {
  for (int c = 0; c < padded; c += kLanes) {
    vi top{};
    for (int j = 0; j < n; ++j) top = most(top, magnitude(load(x + j * padded + c)));
    float inverse[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      float largest_of_channel;
      std::memcpy(&largest_of_channel, reinterpret_cast<const char*>(&top) + 4 * i, 4);
      inverse[i] = inverse_of(largest_of_channel);
      if (c + i < V) scale[c + i] = largest_of_channel / 127.f;
    }
    const vf factor = load(inverse);
    for (int j = 0; j < n; ++j) store(to + j * stride + c, steps_of(load(x + j * padded + c), factor));
  }
  for (int j = 0; j < n; ++j) std::memset(to + j * stride + padded, 0, static_cast<size_t>(stride - padded));
}

template <class T>
void pack_floats(const Params& p, const Head& head, int64_t b, int64_t g, int64_t block, float* x) {
  const Plan& plan = head.plan;
  const int64_t first = block * kKeys;
  const int n = static_cast<int>(std::min<int64_t>(kKeys, p.M - first));
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V);
  const int padded_k = round_up(K, kLanes), padded_v = round_up(V, kLanes);
  const float* mean = plan.means ? head.mean() : nullptr;
  alignas(64) float given[256] = {};
  if (p.k_mean) {
    std::memcpy(given, p.k_mean + (b * p.G + g) * K, sizeof(float) * static_cast<size_t>(K));
    mean = given;
  }
  const T* const k = static_cast<const T*>(p.k) + b * p.k_stride_b + first * p.k_stride_m + g * p.k_stride_h;
  for (int j = 0; j < n; ++j) {
    float* const row = x + j * padded_k;
    fetch_row(k + std::min(j + kAheadRows, n - 1) * p.k_stride_m, K);
    load_row(row, k + j * p.k_stride_m, K);
    if (!mean) continue;
    for (int c = 0; c < padded_k; c += kLanes) store(row + c, load(row + c) - load(mean + c));
  }
  if (plan.few) {
    head.key_scale()[block] = pack_keys(head.keys<int8_t>(block), plan.key_stride, x, padded_k, n, n);
  } else {
    Key* const keys = head.keys<Key>(block);
    const int rows = round_up(n, 16);
    head.key_scale()[block] = pack_keys(keys, plan.key_stride, x, padded_k, n, rows);
    for (int j = 0; j < (kInt8Dot ? rows : 0); ++j) {
      sum_key(head.sums(block), j, keys + j * plan.key_stride, plan.key_stride);
    }
  }
  const T* const v = static_cast<const T*>(p.v) + b * p.v_stride_b + first * p.v_stride_m + g * p.v_stride_h;
  for (int j = 0; j < n; ++j) {
    fetch_row(v + std::min(j + kAheadRows, n - 1) * p.v_stride_m, V);
    load_row(x + j * padded_v, v + j * p.v_stride_m, V);
  }
  float* const scale = head.value_scale() + block * V;
  if (plan.few)
    pack_rows(head.values(block), plan.value_stride, scale, V, x, padded_v, n);
  else
    pack_channels(head.values(block), scale, V, x, padded_v, n);
}

// Integers as they are, in the order of the products.
void pack_integers(const Params& p, const Head& head, int64_t b, int64_t g, int64_t block) {
  const int64_t first = block * kKeys;
  const int n = static_cast<int>(std::min<int64_t>(kKeys, p.M - first)), rows = round_up(n, 16);
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), stride = head.plan.key_stride;
  const auto* const k = static_cast<const int8_t*>(p.k) + b * p.k_stride_b + first * p.k_stride_m + g * p.k_stride_h;
  Key* const keys = head.keys<Key>(block);
  for (int j = 0; j < rows; ++j) {
    const int8_t* const from = k + std::min(j, n - 1) * p.k_stride_m;
    Key* const to = keys + j * stride;
    for (int c = 0; c < K; ++c) to[c] = from[c];
    std::memset(to + K, 0, sizeof(Key) * static_cast<size_t>(stride - K));
    if constexpr (kInt8Dot) sum_key(head.sums(block), j, to, stride);
  }
  const auto* const v = static_cast<const int8_t*>(p.v) + b * p.v_stride_b + first * p.v_stride_m + g * p.v_stride_h;
  int8_t* const values = head.values(block);
  for (int c = 0; c < head.plan.value_stride; c += kLanes) {
    const int width = std::min(kLanes, V - c);
    for (int j = 0; j < kKeys; j += 4 * kLanes) {
      alignas(64) int32_t words[kLanes][kLanes] = {};  // [group of four keys][channel]
      for (int i = 0; i < 4 * kLanes && j + i < n; ++i) {
        const int8_t* const from = v + (j + i) * p.v_stride_m + c;
        auto* const to = reinterpret_cast<int8_t*>(words[i / 4]) + i % 4;
        for (int l = 0; l < width; ++l) to[4 * l] = from[l];
      }
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = (vf)load(words[i]);
      store_channels(values + c * kKeys + j, r);
    }
  }
}

void run_pack(const Params& params, float* workspace, int64_t begin, int64_t end) {
  const Params p = params;  // stores may alias anything
  const Plan plan(p);
  const int64_t width = round_up(static_cast<int>(std::max(p.K, p.V)), kLanes);
  auto* const x = static_cast<float*>(thread_scratch(static_cast<size_t>(4 * kKeys * width)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % p.N, g = unit / p.N % p.G, b = unit / p.N / p.G;
    const Head head(plan, p, workspace, b, g);
    if (plan.int8) {
      pack_integers(p, head, b, g, block);
    } else {
      dispatch_dtype(p.kv_dtype, [&](auto type) { pack_floats<decltype(type)>(p, head, b, g, block, x); });
    }
  }
}

}  // namespace int8_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
