// selective_scan2d on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// Lanes are channels: a vector per state and block of kLanes channels. Tokens go in chunks along their direction; what
// does not depend on the state (step sizes, softplus, rows of b and c) is made for a chunk at a time, in float32.
// Forward: a unit is a block of channels of one batch item, its four directions one after the other, each added to out.
// Backward: a step per direction. A unit is a group of blocks of a run of batch items. The states at the start of every
// chunk are computed first and kept; then chunks go backward, their states computed again from there, with
//   dh_i = c_i g_i + e_(i+1) dh_(i+1),   e_i = exp(delta_i a),   h_i = e_i h_(i-1) + delta_i b_i x_i.
// Gradients of b and c are sums over channels: each group of blocks writes its own, a second step adds them. On a large
// map of a small batch that would be too much memory for many groups: then the chunks of a direction go in slabs, two
// steps each, between which the workspace keeps states and adjoints.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace selective_scan2d_impl {

using Params = SelectiveScan2dParams;

constexpr int kDirections = 4;
constexpr int64_t kUnits = 16, kMaxSplits = 32;
constexpr int64_t kPartialBytes = 16 << 20;  // what the groups of all blocks may write at most
constexpr int64_t kReduceTokens = 64;
constexpr int kMaxSlabs = 8;
constexpr int64_t kSlabBatch = 4;  // batches smaller than this go in slabs
constexpr float kLog2e = 1.44269504f;

struct Geometry {
  int64_t L, chunks;
  int64_t splits, groups;  // of the batch, and of the blocks of channels: units of a direction in backward
  int N, ldn;  // states, and rounded up to whole vectors
  int blocks, group_blocks;  // of a group, at most
  int slabs;
  int64_t slab_chunks;  // of a slab but perhaps the last
  int chunk;  // tokens
  int rows;  // of a chunk, one per token and state, rounded up to whole vectors

  explicit Geometry(const Params& p) {
    const bool small = small_tiles();
    L = p.H * p.W;
    N = static_cast<int>(p.N);
    ldn = round_up(N, kLanes);
    blocks = static_cast<int>(ceil_div(p.D, kLanes));
    // About half the root of L: what is kept at the chunks, and what of a chunk, grow alike.
    chunk = small ? 3 : 32;
    while (!small && int64_t{4} * chunk * chunk < L) chunk += 16;
    chunk = static_cast<int>(std::min<int64_t>(chunk, L));
    chunks = ceil_div(L, chunk);
    rows = round_up(chunk * N, kLanes);
    splits = std::min(p.B, kMaxSplits);
    const int64_t row_bytes = p.B * 2 * N * static_cast<int64_t>(sizeof(float));  // of a group, per token
    int64_t wanted = std::min<int64_t>(blocks, small ? blocks : ceil_div(kUnits, splits));
    const bool few = p.B < kSlabBatch && wanted > 1;
    slabs = 1;
    if (small && few) {
      slabs = static_cast<int>(std::min<int64_t>(2, chunks));
    } else if (few && 2 * row_bytes * L > kPartialBytes) {  // not even two groups
      wanted = p.B == 1 && blocks >= 8 ? 4 : 2;  // of neighbouring blocks: a line of each at a time wastes fetches
      slabs = static_cast<int>(std::min<int64_t>({ceil_div(wanted * row_bytes * L, kPartialBytes), chunks, kMaxSlabs}));
    }
    slab_chunks = ceil_div(chunks, slabs);
    const int64_t fit = kPartialBytes / (row_bytes * std::min(L, slab_chunks * chunk));
    groups = std::max<int64_t>(std::min(wanted, fit), 1);
    group_blocks = static_cast<int>(ceil_div(blocks, groups));
    if (slabs == 1) groups = ceil_div(blocks, group_blocks);
    if (groups == 1) slabs = 1, slab_chunks = chunks;
  }

  int first_block(int64_t group) const { return static_cast<int>(blocks * group / groups); }
  int tokens_of(int64_t c) const { return static_cast<int>(std::min<int64_t>(chunk, L - c * chunk)); }
  // Sums of a block that leave a unit: gradients of a, of d, and of dt_bias.
  int64_t parameter_rows() const { return N + 2; }
  int64_t parameter_floats() const { return splits * blocks * parameter_rows() * kLanes; }
  int64_t slab_tokens() const { return std::min(L, slab_chunks * chunk); }
  int64_t partial_floats(const Params& p) const { return groups > 1 ? groups * p.B * slab_tokens() * 2 * N : 0; }
  // What is kept from slab to slab for a block of a batch item: states at the starts of all chunks, adjoints.
  int64_t kept_floats() const { return slabs > 1 ? (chunks + 1) * N * kLanes : 0; }
  // Of a direction, counted from its end, where backward begins.
  int64_t first_chunk(int slab) const { return std::max<int64_t>(0, chunks - (slab + 1) * slab_chunks); }
  int64_t last_chunk(int slab) const { return std::max<int64_t>(0, chunks - slab * slab_chunks); }  // behind it
};

struct Place {
  int32_t y, x;
};

// Where `count` tokens of direction s are, from the first-th one on.
EFFVIT_INLINE void find_places(Place* to, const Params& p, int s, int64_t first, int count) {
  const bool columns = s & 1, back = s & 2;
  const int32_t inner = static_cast<int32_t>(columns ? p.H : p.W);
  const int64_t k = back ? p.H * p.W - 1 - first : first;
  int32_t outer = static_cast<int32_t>(k / inner), i = static_cast<int32_t>(k % inner);
  for (int t = 0; t < count; ++t) {
    to[t] = columns ? Place{i, outer} : Place{outer, i};
    if (back) {
      if (--i < 0) i = inner - 1, --outer;
    } else {
      if (++i == inner) i = 0, ++outer;
    }
  }
}

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|, and its derivative. log(1 + e) = 2 atanh(s), s = e / (2 + e) up to
// 1/3: relative to the result it is off by 2^-26 and the rounding. A NaN stays.
template <bool kSlope>
EFFVIT_INLINE vf softplus(vf x, vf& slope) {
  const vf e = exp((vf)((vi)x | static_cast<int32_t>(0x80000000u)));
  const vf s = e / (e + 2.f), z = s * s;
  vf p = set1(0.0769230769f);
  p = fma(p, z, set1(0.0909090909f));
  p = fma(p, z, set1(0.1111111111f));
  p = fma(p, z, set1(0.1428571429f));
  p = fma(p, z, set1(0.2f));
  p = fma(p, z, set1(0.3333333333f));
  p = fma(p, z, set1(1.f));
  if constexpr (kSlope) {
    const vf inverse = 1.f / (e + 1.f);
    slope = x < vf{} ? e * inverse : inverse;
  }
  return fma(s + s, p, max(vf{}, x));
}

// Lane r: the sum of all lanes of the r-th of kLanes rows.
EFFVIT_INLINE vf sum_rows(const float* rows) {
  vf r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = load(rows + i * kLanes);
#pragma GCC unroll 16
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      const vf a = r[i], b = r[i + half];
#if EFFVIT_LANES == 4
      r[i] = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif EFFVIT_LANES == 8
      r[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11) +
             __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      r[i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
             __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
    }
  }
  return r[0];
}

// ---- a chunk of tokens ---------------------------------------------------------------------------------------------

// Everything of a chunk that does not depend on a state, for one block of channels at a time.
template <class T>
struct Chunk {
  const Params& p;
  const Geometry& g;
  int s = 0, count = 0, ahead = 0;
  int64_t batch = 0;
  Place* place;  // of `count` tokens; from the g.chunk-th on those of `ahead` tokens of the next chunk, to be fetched
  float *b, *c;  // [chunk, ldn]
  float *u, *delta, *drive, *slope, *grad;  // [chunk, kLanes]; drive = delta u, slope = d delta / d dt

  Chunk(const Params& params, const Geometry& geometry, Scratch& scratch) : p(params), g(geometry) {
    place = scratch.take<Place>(2 * int64_t{g.chunk});
    b = scratch.take<float>(int64_t{g.chunk} * g.ldn), c = scratch.take<float>(int64_t{g.chunk} * g.ldn);
    for (float** row : {&u, &delta, &drive, &slope, &grad}) *row = scratch.take<float>(int64_t{g.chunk} * kLanes);
  }

  void seek(int64_t item, int direction, int64_t index, int64_t next) {
    batch = item, s = direction, count = g.tokens_of(index);
    find_places(place, p, s, index * g.chunk, count);
    ahead = next >= 0 && next < g.chunks ? g.tokens_of(next) : 0;
    find_places(place + g.chunk, p, s, next * g.chunk, ahead);
  }

  void load_states(float* to, const void* from, int64_t stride_b, int64_t stride_y, int64_t stride_x,
                   int64_t stride_s) const {
    const T* const base = static_cast<const T*>(from) + batch * stride_b + s * stride_s;
    for (int t = 0; t < count; ++t) load_row(to + t * g.ldn, base + place[t].y * stride_y + place[t].x * stride_x, g.N);
  }
  void load_b() { load_states(b, p.b, p.b_stride_b, p.b_stride_y, p.b_stride_x, p.b_stride_s); }
  void load_c() { load_states(c, p.c, p.c_stride_b, p.c_stride_y, p.c_stride_x, p.c_stride_s); }

  int64_t index_of(int t) const { return batch * g.L + place[t].y * p.W + place[t].x; }

  template <bool kSlope>
  void load_channels(int block) {
    const int64_t first = int64_t{block} * kLanes;
    const int left = static_cast<int>(std::min<int64_t>(kLanes, p.D - first));
    const T* const x = static_cast<const T*>(p.x) + batch * p.x_stride_b + first;
    const T* const dt = static_cast<const T*>(p.dt) + batch * p.dt_stride_b + s * p.dt_stride_s + first;
    const vf bias = p.dt_bias ? load_lanes(p.dt_bias + s * p.D + first, left) : vf{};
    const int64_t x_y = p.x_stride_y, x_x = p.x_stride_x, dt_y = p.dt_stride_y, dt_x = p.dt_stride_x;
    const bool curved = p.softplus;
    const Place *const at = place, *const next = place + g.chunk;
    float *const us = u, *const deltas = delta, *const drives = drive;
    [[maybe_unused]] float* const slopes = slope;
    const int n = count, fetched = ahead;
    // A direction walks in strides that no hardware prefetcher follows.
    for (int t = 0; t < fetched; ++t) {
      __builtin_prefetch(x + next[t].y * x_y + next[t].x * x_x);
      __builtin_prefetch(dt + next[t].y * dt_y + next[t].x * dt_x);
    }
    for (int t = 0; t < n; ++t) {
      const vf xs = load_lanes(x + at[t].y * x_y + at[t].x * x_x, left);
      vf step = load_lanes(dt + at[t].y * dt_y + at[t].x * dt_x, left) + bias, derivative = set1(1.f);
      if (curved) step = softplus<kSlope>(step, derivative);
      store(us + t * kLanes, xs);
      store(deltas + t * kLanes, step);
      store(drives + t * kLanes, step * xs);
      if constexpr (kSlope) store(slopes + t * kLanes, derivative);
    }
  }

  void load_gradients(int block) {
    const int64_t first = int64_t{block} * kLanes;
    const int left = static_cast<int>(std::min<int64_t>(kLanes, p.D - first));
    for (int t = 0; t < ahead; ++t) __builtin_prefetch(p.grad_out + index_of(g.chunk + t) * p.D + first);
    for (int t = 0; t < count; ++t) store(grad + t * kLanes, load_lanes(p.grad_out + index_of(t) * p.D + first, left));
  }
};

// a of a block of channels of direction s, times a factor: [N, kLanes], zeros beyond D.
inline void load_rates(float* to, const Params& p, int s, int block, float factor) {
  for (int64_t n = 0; n < p.N; ++n) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t channel = int64_t{block} * kLanes + lane;
      to[n * kLanes + lane] = channel < p.D ? p.a[(s * p.D + channel) * p.N + n] * factor : 0.f;
    }
  }
}

EFFVIT_INLINE vf skip_of(const Params& p, int s, int block) {
  if (!p.d) return vf{};
  const int64_t first = int64_t{block} * kLanes;
  return load_lanes(p.d + s * p.D + first, static_cast<int>(std::min<int64_t>(kLanes, p.D - first)));
}

// Calls f with the number of states as a constant, where it is a common one; otherwise 0.
template <class F>
EFFVIT_INLINE void dispatch_states(int n, const F& f) {
  if (n == 1) return f(std::integral_constant<int, 1>{});
  if (n == 16) return f(std::integral_constant<int, 16>{});
  f(std::integral_constant<int, 0>{});
}

enum class Scan { kRead, kAdvance, kKeep };

// Takes the state [N, kLanes] over the chunk. kRead: adds what is read of it to y [chunk, kLanes]; kKeep: keeps every
// e_i and e_i h_(i-1), [chunk, N, kLanes]. `rate` is a times log2(e).
template <Scan kScan, int kN, class T>
void scan(const Chunk<T>& chunk, const float* rate, float* state, float* y, float* decay, float* past) {
  const int count = chunk.count, ldn = chunk.g.ldn, N = kN > 0 ? kN : chunk.g.N;
  const float* b = chunk.b;
  [[maybe_unused]] const float* c = chunk.c;
  const float *const deltas = chunk.delta, *const drives = chunk.drive;
  vf kept[kN > 0 ? kN : 1];
  if constexpr (kN > 0) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) kept[n] = load(state + n * kLanes);
  }
  for (int t = 0; t < count; ++t, b += ldn, c += ldn) {
    const vf delta = load(deltas + t * kLanes), drive = load(drives + t * kLanes);
    [[maybe_unused]] vf even{}, odd{};  // sums of what is read: two, so that neither waits for itself
    if constexpr (kScan == Scan::kRead) even = load(y + t * kLanes);
    const auto step = [&](int n, [[maybe_unused]] vf& sum, vf h) __attribute__((always_inline)) {
      const vf e = exp2(min(set1(126.f), delta * load(rate + n * kLanes)));
      const vf before = e * h;
      h = fma(drive, set1(b[n]), before);
      if constexpr (kScan == Scan::kRead) sum = fma(h, set1(c[n]), sum);
      if constexpr (kScan == Scan::kKeep) {
        store(decay + n * kLanes, e);
        store(past + n * kLanes, before);
      }
      return h;
    };
    if constexpr (kN > 0) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) kept[n] = step(n, n % 2 ? odd : even, kept[n]);
    } else {
      int n = 0;
      for (; n + 2 <= N; n += 2) {
        store(state + n * kLanes, step(n, even, load(state + n * kLanes)));
        store(state + (n + 1) * kLanes, step(n + 1, odd, load(state + (n + 1) * kLanes)));
      }
      if (n < N) store(state + n * kLanes, step(n, even, load(state + n * kLanes)));
    }
    if constexpr (kScan == Scan::kRead) store(y + t * kLanes, even + odd);
    if constexpr (kScan == Scan::kKeep) decay += N * kLanes, past += N * kLanes;
  }
  if constexpr (kN > 0) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) store(state + n * kLanes, kept[n]);
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  const Params& p;
  const Geometry& g;
  Chunk<T> chunk;
  float *rate, *state, *y;

  Forward(const Params& params, const Geometry& geometry, Scratch& scratch)
      : p(params), g(geometry), chunk(params, geometry, scratch) {
    rate = scratch.take<float>(int64_t{g.N} * kLanes);
    state = scratch.take<float>(int64_t{g.N} * kLanes);
    y = scratch.take<float>(int64_t{g.chunk} * kLanes);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int block = static_cast<int>(unit % g.blocks);
      const int64_t first = int64_t{block} * kLanes;
      const int left = static_cast<int>(std::min<int64_t>(kLanes, p.D - first));
      for (int s = 0; s < kDirections; ++s) {
        load_rates(rate, p, s, block, kLog2e);
        zero(state, int64_t{g.N} * kLanes);
        const vf skip = skip_of(p, s, block);
        for (int64_t i = 0; i < g.chunks; ++i) {
          chunk.seek(unit / g.blocks, s, i, i + 1);
          chunk.load_b(), chunk.load_c();
          chunk.template load_channels<false>(block);
          for (int t = 0; t < chunk.count; ++t) store(y + t * kLanes, skip * load(chunk.u + t * kLanes));
          dispatch_states(
              g.N, [&](auto n) { scan<Scan::kRead, decltype(n)::value>(chunk, rate, state, y, nullptr, nullptr); });
          for (int t = 0; t < chunk.count; ++t) {
            float* const to = p.out + chunk.index_of(t) * p.D + first;
            vf sum = load(y + t * kLanes);
            if (s > 0) sum += load_lanes(to, left);
            store_lanes(to, sum, left);
          }
        }
      }
    }
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  const Params& p;
  const Geometry& g;
  const int s;
  Chunk<T> chunk;
  float *a, *rate, *adjoint;  // [group_blocks, N, kLanes]; adjoint: e_(i+1) dh_(i+1)
  float* checkpoints;  // [group_blocks, chunks, N, kLanes], elsewhere where there are slabs
  float *state, *da;  // [N, kLanes]
  float *decay, *past;  // [rows, kLanes]
  float *sum_b, *sum_c;  // [rows], gradients of b and c of a chunk; a row is read up to a whole vector

  Backward(const Params& params, const Geometry& geometry, Scratch& scratch, int direction)
      : p(params), g(geometry), s(direction), chunk(params, geometry, scratch) {
    const int64_t states = int64_t{g.N} * kLanes;
    for (float** table : {&a, &rate, &adjoint}) *table = scratch.take<float>(g.group_blocks * states);
    checkpoints = scratch.take<float>(g.slabs > 1 ? 0 : g.group_blocks * g.chunks * states);
    for (float** vector : {&state, &da}) *vector = scratch.take<float>(states);
    for (float** table : {&decay, &past}) *table = scratch.take<float>(int64_t{g.rows} * kLanes);
    for (float** sums : {&sum_b, &sum_c}) *sums = scratch.take<float>(g.rows + g.ldn);
  }

  // The states at the start of every chunk, for block j of the group.
  void keep_states(int64_t item, int j, int block, float* to) {
    const int64_t states = int64_t{g.N} * kLanes;
    zero(state, states);
    for (int64_t i = 0;; ++i) {
      std::memcpy(to + i * states, state, static_cast<size_t>(states) * sizeof(float));
      if (i + 1 == g.chunks) return;
      chunk.seek(item, s, i, i + 1);
      chunk.load_b();
      chunk.template load_channels<false>(block);
      dispatch_states(g.N, [&](auto n) {
        scan<Scan::kAdvance, decltype(n)::value>(chunk, rate + j * states, state, nullptr, nullptr, nullptr);
      });
    }
  }

  struct Sums {
    vf dd{}, dbias{};
  };

  // The adjoint over the chunk, last token first. e_i and e_i h_(i-1) are replaced by the terms of the gradients of b
  // and c. Returns sums over tokens: the gradients of d and dt_bias.
  template <int kN>
  Sums step_back(const float* rates, float* adjoints, vf skip, int block) {
    const int N = kN > 0 ? kN : g.N, ldn = g.ldn;
    const int64_t first = int64_t{block} * kLanes;
    const int left = static_cast<int>(std::min<int64_t>(kLanes, p.D - first));
    const float *const deltas = chunk.delta, *const drives = chunk.drive, *const us = chunk.u;
    const float *const slopes = chunk.slope, *const grads = chunk.grad;
    float* const das = da;
    vf next[kN > 0 ? kN : 1];
    Sums sums;
    if constexpr (kN > 0) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) next[n] = load(adjoints + n * kLanes);
    }
    for (int t = chunk.count - 1; t >= 0; --t) {
      const vf delta = load(deltas + t * kLanes), drive = load(drives + t * kLanes), grad = load(grads + t * kLanes);
      const float *const b = chunk.b + t * ldn, *const c = chunk.c + t * ldn;
      float *const decays = decay + int64_t{t} * N * kLanes, *const pasts = past + int64_t{t} * N * kLanes;
      vf along_b{}, along_a{};
      const auto step = [&](int n, vf dh) __attribute__((always_inline)) {
        const vf e = load(decays + n * kLanes), before = load(pasts + n * kLanes), bn = set1(b[n]);
        dh = fma(grad, set1(c[n]), dh);
        store(pasts + n * kLanes, grad * fma(drive, bn, before));
        store(decays + n * kLanes, dh * drive);
        along_b = fma(dh, bn, along_b);
        const vf q = dh * before;
        along_a = fma(q, load(rates + n * kLanes), along_a);
        store(das + n * kLanes, fma(delta, q, load(das + n * kLanes)));
        return e * dh;
      };
      if constexpr (kN > 0) {
#pragma GCC unroll 16
        for (int n = 0; n < kN; ++n) next[n] = step(n, next[n]);
      } else {
        for (int n = 0; n < N; ++n) store(adjoints + n * kLanes, step(n, load(adjoints + n * kLanes)));
      }
      const vf u = load(us + t * kLanes), ddt = fma(u, along_b, along_a) * load(slopes + t * kLanes);
      vf dx = fma(delta, along_b, skip * grad);
      const int64_t index = chunk.index_of(t);
      T* const to = static_cast<T*>(p.dx) + index * p.D + first;
      if (s > 0) dx += load_lanes(to, left);
      store_lanes(to, dx, left);
      store_lanes(static_cast<T*>(p.ddt) + (index * kDirections + s) * p.D + first, ddt, left);
      sums.dd = fma(grad, u, sums.dd);
      sums.dbias += ddt;
    }
    if constexpr (kN > 0) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) store(adjoints + n * kLanes, next[n]);
    }
    return sums;
  }

  void block_of_chunk(int64_t index, int j, int block, const float* start, float* adjoints, float* parameters) {
    const int64_t states = int64_t{g.N} * kLanes;
    chunk.template load_channels<true>(block);
    chunk.load_gradients(block);
    std::memcpy(state, start + index * states, static_cast<size_t>(states) * sizeof(float));
    zero(da, states);
    const vf skip = skip_of(p, s, block);
    Sums sums;
    dispatch_states(g.N, [&](auto n) {
      constexpr int kN = decltype(n)::value;
      scan<Scan::kKeep, kN>(chunk, rate + j * states, state, nullptr, decay, past);
      sums = step_back<kN>(a + j * states, adjoints, skip, block);
    });
    for (int64_t i = 0; i < states; i += kLanes) store(parameters + i, load(parameters + i) + load(da + i));
    store(parameters + states, load(parameters + states) + sums.dd);
    store(parameters + states + kLanes, load(parameters + states + kLanes) + sums.dbias);
    for (int r = 0; r < chunk.count * g.N; r += kLanes) {
      store(sum_b + r, load(sum_b + r) + sum_rows(decay + int64_t{r} * kLanes));
      store(sum_c + r, load(sum_c + r) + sum_rows(past + int64_t{r} * kLanes));
    }
  }

  // Gradients of b and c of the chunk: to their places, or, of one group of several, in the order of the direction.
  void write_sums(int64_t item, int64_t group, int64_t index, int64_t first, float* partials) {
    for (int t = 0; t < chunk.count; ++t) {
      const float *const from_b = sum_b + t * g.N, *const from_c = sum_c + t * g.N;
      if (g.groups > 1) {
        float* const to = partials + ((group * p.B + item) * g.slab_tokens() + (index - first) * g.chunk + t) * 2 * g.N;
        std::memcpy(to, from_b, static_cast<size_t>(g.N) * sizeof(float));
        std::memcpy(to + g.N, from_c, static_cast<size_t>(g.N) * sizeof(float));
      } else {
        const int64_t to = (chunk.index_of(t) * kDirections + s) * g.N;
        store_row(static_cast<T*>(p.db) + to, from_b, g.N);
        store_row(static_cast<T*>(p.dc) + to, from_c, g.N);
      }
    }
  }

  void run(float* workspace, int slab, int64_t begin, int64_t end) {
    const int64_t states = int64_t{g.N} * kLanes, block_floats = g.parameter_rows() * kLanes;
    float* const partials = workspace + g.parameter_floats();
    float* const kept = partials + g.partial_floats(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit % g.groups, split = unit / g.groups;
      const int first = g.first_block(group), blocks = g.first_block(group + 1) - first;
      float* const parameters = workspace + (split * g.blocks + first) * block_floats;
      if (slab == 0) zero(parameters, blocks * block_floats);
      for (int j = 0; j < blocks; ++j) {
        load_rates(a + j * states, p, s, first + j, 1.f);
        load_rates(rate + j * states, p, s, first + j, kLog2e);
      }
      for (int64_t item = p.B * split / g.splits; item < p.B * (split + 1) / g.splits; ++item) {
        float* const here = kept + (item * g.blocks + first) * g.kept_floats();
        const auto starts = [&](int j) {
          return g.slabs > 1 ? here + j * g.kept_floats() : checkpoints + j * g.chunks * states;
        };
        const auto adjoints = [&](int j) { return g.slabs > 1 ? starts(j) + g.chunks * states : adjoint + j * states; };
        for (int j = 0; j < blocks && slab == 0; ++j) {
          keep_states(item, j, first + j, starts(j));
          zero(adjoints(j), states);
        }
        for (int64_t index = g.last_chunk(slab) - 1; index >= g.first_chunk(slab); --index) {
          chunk.seek(item, s, index, index - 1);
          chunk.load_b(), chunk.load_c();
          zero(sum_b, g.rows), zero(sum_c, g.rows);
          for (int j = 0; j < blocks; ++j) {
            block_of_chunk(index, j, first + j, starts(j), adjoints(j), parameters + j * block_floats);
          }
          write_sums(item, group, index, g.first_chunk(slab), partials);
        }
      }
    }
  }
};

// Sums over the groups of blocks, of kReduceTokens tokens of direction s from the first-th one of a slab on.
template <class T>
void reduce_tokens(const Params& p, const Geometry& g, int s, int slab, const float* partials, int64_t item,
                   int64_t first) {
  const int64_t start = g.first_chunk(slab) * g.chunk, end = std::min(g.L, g.last_chunk(slab) * g.chunk);
  const int count = static_cast<int>(std::min(kReduceTokens, end - start - first)), width = 2 * g.N;
  float* const sum = static_cast<float*>(thread_scratch(static_cast<size_t>(width + 2 * g.ldn) * sizeof(float)));
  Place place[kReduceTokens];
  if (count <= 0) return;
  find_places(place, p, s, start + first, count);
  for (int t = 0; t < count; ++t) {
    std::memset(sum, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t group = 0; group < g.groups; ++group) {
      const float* const from = partials + ((group * p.B + item) * g.slab_tokens() + first + t) * width;
      for (int i = 0; i < width; ++i) sum[i] += from[i];
    }
    const int64_t to = ((item * g.L + place[t].y * p.W + place[t].x) * kDirections + s) * g.N;
    store_row(static_cast<T*>(p.db) + to, sum, g.N);
    store_row(static_cast<T*>(p.dc) + to, sum + g.N, g.N);
  }
}

// Sums over the runs of the batch: the gradients of a, d and dt_bias of a block of channels.
inline void reduce_parameters(const Params& p, const Geometry& g, int s, const float* parameters, int block) {
  const int64_t block_floats = g.parameter_rows() * kLanes, first = int64_t{block} * kLanes;
  const int left = static_cast<int>(std::min<int64_t>(kLanes, p.D - first));
  for (int n = 0; n < g.N + 2; ++n) {
    vf sum{};
    for (int64_t split = 0; split < g.splits; ++split)
      sum += load(parameters + (split * g.blocks + block) * block_floats + n * kLanes);
    if (n == g.N && p.dd) store_lanes(p.dd + s * p.D + first, sum, left);
    if (n == g.N + 1 && p.ddt_bias) store_lanes(p.ddt_bias + s * p.D + first, sum, left);
    if (n >= g.N) continue;
    alignas(64) float lanes[kLanes];
    store(lanes, sum);
    for (int lane = 0; lane < left; ++lane) p.da[(s * p.D + first + lane) * p.N + n] = lanes[lane];
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) { return p.B * Geometry(p).blocks; }

void forward(const Params& p, float*, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Forward<decltype(type)>>(p, g, begin, end); });
}

void backward_slab(const Params& p, int s, int slab, float* workspace, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    using Pass = Backward<decltype(type)>;
    Scratch count;
    Pass sizes(p, g, count, s);
    Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
    Pass(p, g, scratch, s).run(workspace, slab, begin, end);
  });
}

void reduce_slab(const Params& p, int s, int slab, float* workspace, int64_t begin, int64_t end) {
  const Geometry g(p);
  const int64_t tiles = ceil_div(g.slab_tokens(), kReduceTokens), blocks = slab + 1 == g.slabs ? g.blocks : 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit < blocks) {
      reduce_parameters(p, g, s, workspace, static_cast<int>(unit));
      continue;
    }
    const int64_t tile = unit - blocks;
    dispatch_dtype(p.dtype, [&](auto type) {
      reduce_tokens<decltype(type)>(p, g, s, slab, workspace + g.parameter_floats(), tile / tiles,
                                    tile % tiles * kReduceTokens);
    });
  }
}

int64_t backward_floats(const Params& p) {
  const Geometry g(p);
  return g.parameter_floats() + g.partial_floats(p) + p.B * g.blocks * g.kept_floats();
}

template <int slab>
int64_t backward_units(const Params& p) {
  const Geometry g(p);
  return slab < g.slabs ? g.splits * g.groups : 0;
}

template <int s, int slab>
void backward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  backward_slab(p, s, slab, workspace, begin, end);
}

// Tokens of a slab; before them, with the last slab, blocks of channels.
template <int slab>
int64_t reduce_units(const Params& p) {
  const Geometry g(p);
  if (slab >= g.slabs) return 0;
  return (slab + 1 == g.slabs ? g.blocks : 0) + (g.groups > 1 ? p.B * ceil_div(g.slab_tokens(), kReduceTokens) : 0);
}

template <int s, int slab>
void reduce(const Params& p, float* workspace, int64_t begin, int64_t end) {
  reduce_slab(p, s, slab, workspace, begin, end);
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};

// Direction after direction, slab after slab, the two steps of each.
template <int i>
constexpr Step<Params> step_of() {
  constexpr int s = i / (2 * kMaxSlabs), slab = i / 2 % kMaxSlabs;
  if constexpr (i % 2 == 0) {
    return {backward_units<slab>, backward<s, slab>};
  } else {
    return {reduce_units<slab>, reduce<s, slab>};
  }
}
template <class Indices>
struct Steps;
template <int... i>
struct Steps<std::integer_sequence<int, i...>> {
  static constexpr Step<Params> kList[] = {step_of<i>()...};
};
using Backwards = Steps<std::make_integer_sequence<int, 2 * kMaxSlabs * kDirections>>;

}  // namespace selective_scan2d_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<SelectiveScan2dParams>* EFFVIT_KERNEL_NAME(selective_scan2d)() {
  namespace impl = EFFVIT_ISA_NAME::selective_scan2d_impl;
  static constexpr Kernel<SelectiveScan2dParams> kernel = {routine(impl::kForward),
                                                           routine(impl::Backwards::kList, impl::backward_floats)};
  return &kernel;
}
}  // namespace effvit::cpu
