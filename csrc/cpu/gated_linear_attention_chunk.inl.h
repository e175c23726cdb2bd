// gated_linear_attention on the CPU: tokens in the order of a walk, the decays within a chunk of them, and scores.
// Included by gated_linear_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace gated_linear_attention_impl {

using Params = GatedLinearAttentionParams;

constexpr int kMaxChunk = 64;  // tokens; the row stride of what has a column per token
constexpr int kBlock = 16;  // tokens whose decays have a common reference, where a token has one gate
constexpr int64_t kStateBytes = 1 << 20;  // of the chunks of a segment, in backward

struct Geometry {
  int K, V, Kp, Vp;  // Kp, Vp: rounded up to whole vectors
  int chunk = kMaxChunk / 2, segment;  // tokens of a chunk; chunks whose states backward holds at a time
  int block;  // tokens on a side of the diagonal blocks of scores: a vector of them where channels have gates
  int64_t v_blocks;  // of forward: a head's values in so many units
  int64_t splits;  // of backward: a walk's chunks in so many units, where there are few heads

  explicit Geometry(const Params& p) {
    K = static_cast<int>(p.K), V = static_cast<int>(p.V), Kp = round_up(K, kLanes), Vp = round_up(V, kLanes);
    block = p.gate == GateKind::kChannel ? kLanes : kBlock;
    if (p.grad_out && p.K * p.V > 64 * 64) chunk = kMaxChunk;  // backward moves the state more often than forward
    const int64_t fit = kStateBytes / (int64_t{V} * Kp * 4), heads = p.N * p.H;
    segment = static_cast<int>(std::max<int64_t>(8, std::min<int64_t>(64, fit)));
    // A value's channels do not meet: each unit computes the scores again.
    v_blocks = heads >= 4 || heads == 0 ? 1 : std::max<int64_t>(1, std::min<int64_t>(4 / heads, V / 32));
    if (small_tiles()) chunk = 2 * kBlock, segment = 2;
    const int64_t most = ceil_div(p.L, int64_t{chunk}) / (small_tiles() ? 1 : 4);
    splits = heads >= 4 || heads == 0 ? 1 : std::max<int64_t>(1, std::min(ceil_div(4, heads), most));
  }
};

// The tokens of one head of a sequence, in the order in which they are walked.
struct Walk {
  int64_t sequence, head, batch, first, step, length;
  bool own;  // a token sees itself
  int64_t token(int64_t s) const { return first + s * step; }
  int64_t place(int64_t s) const { return step > 0 ? s : length - 1 - s; }  // in the sequence
  int64_t begin() const { return step > 0 ? first : first - length + 1; }
};

// Of two walks, the second adds to what the first wrote.
enum class Pass { kOnly, kFirst, kLast };

int walks_of(const Params& p) { return p.direction == GateDirection::kBoth ? 2 : 1; }

template <class F>
void at_walk(const Params& p, int64_t sequence, int64_t head, int index, const F& f) {
  const int32_t* const cu = p.cu_seqlens;
  const GatedRange r = gated_range(p, sequence, cu ? cu[sequence] : 0, cu ? cu[sequence + 1] : 0);
  const bool both = p.direction == GateDirection::kBoth;
  const Pass pass = !both ? Pass::kOnly : index == 0 ? Pass::kFirst : Pass::kLast;
  if (p.direction == GateDirection::kReverse || index == 1) {
    f(Walk{sequence, head, r.batch, r.end - 1, -1, r.end - r.begin, !both}, pass);
  } else {
    f(Walk{sequence, head, r.batch, r.begin, 1, r.end - r.begin, true}, pass);
  }
}

template <class F>
void for_walks(const Params& p, int64_t sequence, int64_t head, const F& f) {
  for (int i = 0; i < walks_of(p); ++i) at_walk(p, sequence, head, i, f);
}

struct Times {
  float factor;
  EFFVIT_INLINE vf operator()(int, vf x) const { return x * set1(factor); }
};

// dst[i * ld] = token s + i, in float32, zeros behind it to whole vectors, for n tokens of a strided tensor.
void load_rows(float* dst, int64_t ld, DType dtype, const void* base, int64_t offset, int64_t stride_l, const Walk& w,
               int64_t s, int n, int width, float factor = 1.f) {
  dispatch_dtype(dtype, [&](auto type) {
    const auto* const from = static_cast<const decltype(type)*>(base) + offset + w.token(s) * stride_l;
    const int64_t stride = w.step * stride_l;
    load_tokens(dst, ld, n, width, [&](int i) { return from + i * stride; }, Times{factor});
  });
}

// Rows of results, times factor, to tokens s, s + 1, ... of a contiguous [B, L, H, width] tensor. Of two walks the sum
// is rounded once: `sums` has a row of `padded` floats for every token of the sequence, and is not used in float32.
void put_rows(void* data, DType dtype, const Params& p, const Walk& w, int64_t s, int n, int width, const float* rows,
              int64_t ld, float factor, Pass pass, float* sums, int64_t padded, int64_t column = 0, int columns = 0) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr bool kFloat = std::is_same_v<T, float>;
    const int there = columns ? columns : width;
    T* const to = static_cast<T*>(data) + ((w.batch * p.L + w.token(s)) * p.H + w.head) * width + column;
    const int64_t stride = w.step * p.H * width;
    for (int i = 0; i < n; ++i) {
      T* const row = to + i * stride;
      const float* const from = rows + i * ld;
      if (pass == Pass::kOnly || (kFloat && pass == Pass::kFirst)) {
        store_row(row, from, there, factor);
        continue;
      }
      float* const sum = kFloat ? nullptr : sums + w.place(s + i) * padded;
      for (int c = 0; c < there; c += kLanes) {
        const int left = there - c;
        const vf x = load(from + c) * set1(factor);
        if constexpr (kFloat) {
          store_lanes(row + c, load_lanes(row + c, left) + x, left);
        } else if (pass == Pass::kFirst) {
          store(sum + c, x);
        } else {
          store_lanes(row + c, load(sum + c) + x, left);
        }
      }
    }
  });
}

// ---- decays --------------------------------------------------------------------------------------------------------

// Gates below this, -inf too, are all decays of 0. A NaN stays.
constexpr float kLeastGate = -1000.f;
EFFVIT_INLINE float least(float gate) { return gate < kLeastGate ? kLeastGate : gate; }

EFFVIT_INLINE int clamp_lanes(int n) { return n < 0 ? 0 : n > kLanes ? kLanes : n; }

// A sum of gates and what its rounding took off: at -4 half a unit in the last place of the sum is four of its
// exponential.
struct GateSum {
  vf high{}, low{};
  EFFVIT_INLINE void add(vf x) {
    const vf sum = high + x, part = sum - high;
    low += (high - (sum - part)) + (x - part);
    high = sum;
  }
  EFFVIT_INLINE void keep(int n) { high = first_lanes(high, n), low = first_lanes(low, n); }
  EFFVIT_INLINE vf exp() const {
    const vf x = EFFVIT_ISA_NAME::exp(min(set1(88.f), high));  // beyond, exp's bits wrap; a NaN stays
    return fma(x, low, x);
  }
};

// The same of numbers one after the other, in memory: their exponentials by vectors.
struct GateSums {
  alignas(64) float high[kMaxChunk] = {}, low[kMaxChunk] = {};
  EFFVIT_INLINE void put(int i, double sum) {
    high[i] = static_cast<float>(sum);
    low[i] = static_cast<float>(sum - static_cast<double>(high[i]));
  }
  EFFVIT_INLINE void exp(float* to, int n) const {
    for (int i = 0; i < n; i += kLanes) store(to + i, GateSum{load(high + i), load(low + i)}.exp());
  }
};

// What the gates of a chunk's tokens 0 .. n-1 do. b_i: the sum of the gates up to token i and with it, b its value for
// the last one. Every exponent is a sum of gates between two tokens, so none is positive, and none is a difference of
// large sums.
struct Decays {
  const Params& p;
  const Geometry& g;
  const bool channel;
  float* total;  // [Kp], e^b: of the state
  // One gate a token.
  float *gate, *from_start, *to_end;  // [64]: g_i, e^(b_i), e^(b - b_i)
  float* table;  // [64, 64], e^(b_i - b_j) for j <= i (j < i unless a token sees itself), zeros in the rest of a block
  // One a channel; r_I: the sum of the gates before block I.
  float* gates;  // [64, Kp]
  float* step;  // [64, Kp], e^(g_i)
  float* within;  // [64, Kp], e^(b_i - r_I) in block I
  float* behind;  // [64, Kp], e^(r_(I+1) - b_j) in block I
  float* before;  // [blocks, Kp], e^(r_I)
  float* across;  // [blocks, Kp], e^(r_(I+1) - r_I)

  Decays(const Params& params, const Geometry& geometry, Scratch& s)
      : p(params), g(geometry), channel(params.gate == GateKind::kChannel) {
    total = s.take<float>(g.Kp);
    const int64_t rows = channel ? int64_t{kMaxChunk} * g.Kp : 0, blocks = channel ? kMaxChunk / kLanes * g.Kp : 0;
    gate = s.take<float>(kMaxChunk), from_start = s.take<float>(kMaxChunk), to_end = s.take<float>(kMaxChunk);
    table = s.take<float>(channel ? 0 : kMaxChunk * kMaxChunk);
    gates = s.take<float>(rows), step = s.take<float>(rows), within = s.take<float>(rows);
    behind = s.take<float>(rows), before = s.take<float>(blocks), across = s.take<float>(blocks);
  }

  void begin() { tokens_ = made_ = 0; }  // another head, or another order

  void load_gates(const Walk& w, int64_t s, int n) {
    const int64_t offset = w.batch * p.g_stride_b + w.head * p.g_stride_h;
    if (channel) {
      load_rows(gates, g.Kp, p.gate_dtype, p.g, offset, p.g_stride_l, w, s, n, g.K);
      for (int64_t i = 0; i < int64_t{n} * g.Kp; i += kLanes) store(gates + i, max(set1(kLeastGate), load(gates + i)));
      return;
    }
    if (p.gate == GateKind::kToken) {
      for (int i = 0; i < n; ++i) {
        gate[i] = least(load_scalar(p.g, p.gate_dtype, offset + w.token(s + i) * p.g_stride_l));
      }
      tokens_ = made_ = 0;
    } else if (tokens_ == 0) {
      const float x = p.gate == GateKind::kHead ? least(load_scalar(p.g, p.gate_dtype, w.head * p.g_stride_h)) : 0.f;
      for (int i = 0; i < kMaxChunk; ++i) gate[i] = x;
    }
  }

  // One gate a token: what leads to the ends of a chunk.
  void make_ends(int n) {
    if (tokens_ == n) return;
    tokens_ = n;
    GateSums from, to;
    double sum = 0.0, back = 0.0;
    for (int i = 0; i < n; ++i) from.put(i, sum += static_cast<double>(gate[i]));
    for (int i = n - 1; i >= 0; --i) to.put(i, back), back += static_cast<double>(gate[i]);
    from.exp(from_start, n), to.exp(to_end, n);
    const vf all = set1(from_start[n - 1]);
    for (int c = 0; c < g.Kp; c += kLanes) store(total + c, all);
  }

  // And what leads from one token to another.
  void make_table(int n, bool own) {
    if (made_ >= n) return;
    if (p.gate != GateKind::kToken) n = g.chunk;
    made_ = n;
    alignas(64) float row_factor[kMaxChunk], behind_block[kMaxChunk], column_factor[kMaxChunk];
    GateSums row, behind;
    for (int r = 0; r < n; r += kBlock) {
      const int last = std::min(r + kBlock, n);
      double sum = 0.0, back = 0.0;
      for (int i = r; i < last; ++i) row.put(i, sum += static_cast<double>(gate[i]));
      for (int i = last - 1; i >= r; --i) behind.put(i, back), back += static_cast<double>(gate[i]);
    }
    row.exp(row_factor, n), behind.exp(behind_block, n);
    for (int r = 0; r < n; r += kBlock) {
      const int m = std::min(kBlock, n - r);
      GateSum sums[kBlock / kLanes] = {};
      for (int i = 0; i < m; ++i) {
        float* const to = table + (r + i) * kMaxChunk;
        for (int j = 0; j < r; j += kLanes) store(to + j, set1(row_factor[r + i]) * load(column_factor + j));
        for (int u = 0; u < kBlock / kLanes; ++u) {
          const int below = i - u * kLanes;
          sums[u].add(set1(gate[r + i]));
          sums[u].keep(clamp_lanes(below));
          store(to + r + u * kLanes, first_lanes(sums[u].exp(), clamp_lanes(below + own)));
        }
      }
      const vf across_block = set1(row_factor[r + m - 1]);
      for (int j = 0; j < r; j += kLanes) store(column_factor + j, load(column_factor + j) * across_block);
      for (int j = r; j < r + m; j += kLanes) store(column_factor + j, load(behind_block + j));
    }
  }

  // One gate a channel.
  void make_channels(int n) {
    const int64_t ld = g.Kp;
    for (int c = 0; c < g.Kp; c += kLanes) {
      GateSum all;
      for (int r = 0; r < n; r += kLanes) {
        const int last = std::min(r + kLanes, n), block = r / kLanes;
        store(before + block * ld + c, all.exp());
        GateSum sum, back;
        for (int i = r; i < last; ++i) {
          const vf x = load(gates + i * ld + c);
          sum.add(x);
          store(step + i * ld + c, exp(x));
          store(within + i * ld + c, sum.exp());
        }
        for (int i = last - 1; i >= r; --i) {
          store(behind + i * ld + c, back.exp());
          back.add(load(gates + i * ld + c));
        }
        store(across + block * ld + c, sum.exp());
        all.add(sum.high);
        all.low += sum.low;
      }
      store(total + c, all.exp());
    }
  }

  // queries[i] = q_i e^(b_i), and total: what the gradient of a state takes from a chunk.
  void queries_at_start(float* queries, const float* q, int n) {
    const int64_t ld = g.Kp;
    if (!channel) {
      make_ends(n);
      for (int i = 0; i < n; ++i) {
        for (int c = 0; c < g.Kp; c += kLanes) store(queries + i * ld + c, load(q + i * ld + c) * set1(from_start[i]));
      }
      return;
    }
    for (int c = 0; c < g.Kp; c += kLanes) {
      GateSum sum;
      for (int i = 0; i < n; ++i) {
        sum.add(load(gates + i * ld + c));
        store(queries + i * ld + c, load(q + i * ld + c) * sum.exp());
      }
      store(total + c, sum.exp());
    }
  }

  // keys[i] = k_i e^(b - b_i), and total: what a state takes from a chunk.
  void keys_at_end(float* keys, const float* k, int n) {
    const int64_t ld = g.Kp;
    if (!channel) {
      make_ends(n);
      for (int i = 0; i < n; ++i) {
        for (int c = 0; c < g.Kp; c += kLanes) store(keys + i * ld + c, load(k + i * ld + c) * set1(to_end[i]));
      }
      return;
    }
    for (int c = 0; c < g.Kp; c += kLanes) {
      GateSum back;
      for (int i = n - 1; i >= 0; --i) {
        store(keys + i * ld + c, load(k + i * ld + c) * back.exp());
        back.add(load(gates + i * ld + c));
      }
      store(total + c, back.exp());
    }
  }

 private:
  int tokens_ = 0, made_ = 0;  // tokens of which the ends are made, rows of the table
};

// ---- scores --------------------------------------------------------------------------------------------------------

// to[i] = sum over channels of q_ic k_jc e^(b_ic - b_jc), lanes are keys j <= i (j < i unless kOwn), zero behind: a
// block on the diagonal. Channel by channel, a vector of keys decays from token to token.
template <bool kOwn>
void diagonal_scores(int m, int K, const float* q, const float* step, int64_t ld, const float* kt, float* to,
                     int64_t ld_to) {
  alignas(64) int32_t lane[kLanes][kLanes] = {};
  for (int i = 0; i < kLanes; ++i) lane[i][i] = -1;
  vf sum[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum[i] = vf{};
  for (int c = 0; c < K; ++c) {
    const vi keys = (vi)load(kt + c * kMaxChunk);
    vf decayed{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const vf key = (vf)(keys & load(lane[i])), factor = set1(step[i * ld + c]), query = set1(q[i * ld + c]);
      if constexpr (kOwn) {
        decayed = fma(decayed, factor, key);
        sum[i] = fma(query, decayed, sum[i]);
      } else {
        decayed = decayed * factor;
        sum[i] = fma(query, decayed, sum[i]);
        decayed = decayed + key;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i < m) store(to + i * ld_to, sum[i]);
  }
}

// A chunk's scores, times decays, [n, n] below the diagonal and zeros up to the end of a diagonal block. q [n, Kp],
// kt [K, 64] keys transposed.
void scores_of_tokens(const Decays& d, int n, const float* q, const float* kt, float* to, int64_t ld) {
  const Geometry& g = d.g;
  for (int r = 0; r < n; r += kBlock) {
    const int last = std::min(r + kBlock, n), columns = round_up(last, kLanes);
    gemm(last - r, columns, g.K, q + int64_t{r} * g.Kp, g.Kp, kt, kMaxChunk, nullptr, to + r * ld, ld);
    for (int i = r; i < last; ++i) {
      for (int j = 0; j < columns; j += kLanes) {
        const vf decay = load(d.table + i * kMaxChunk + j);  // 0: unseen, a NaN there stays out
        store(to + i * ld + j, decay == set1(0.f) ? vf{} : load(to + i * ld + j) * decay);
      }
    }
  }
}

// The same where channels have gates. near_q[i] = q_i e^(b_i - r_I), near_k[j] = k_j e^(r_(I+1) - b_j), [n, Kp]. Keys
// are taken from block to block: keys_t [K, 64] ends as the transpose of k_j e^(b - b_j).
void scores_of_channels(const Decays& d, int n, bool own, const float* q, const float* kt, const float* near_q,
                        const float* near_k, float* keys_t, float* to, int64_t ld) {
  const Geometry& g = d.g;
  for (int r = 0; r < n; r += kLanes) {
    const int m = std::min(kLanes, n - r);
    const int64_t at = int64_t{r} * g.Kp;
    if (r > 0) gemm(m, r, g.K, near_q + at, g.Kp, keys_t, kMaxChunk, nullptr, to + r * ld, ld);
    const auto diagonal = own ? diagonal_scores<true> : diagonal_scores<false>;
    diagonal(m, g.K, q + at, d.step + at, g.Kp, kt + r, to + r * ld + r, ld);
    const float* const across = d.across + int64_t{r / kLanes} * g.Kp;
    for (int c = 0; c < g.K && r > 0; ++c) {
      float* const row = keys_t + c * kMaxChunk;
      const vf factor = set1(across[c]);
      for (int j = 0; j < r; j += kLanes) store(row + j, load(row + j) * factor);
    }
    transpose_rows(keys_t + r, kMaxChunk, m, g.K, [&](int j) { return near_k + at + int64_t{j} * g.Kp; });
  }
}

// x[i] *= y[i], rows of n tokens.
EFFVIT_INLINE void multiply_rows(float* to, const float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(x + i) * load(y + i));
}

}  // namespace gated_linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
