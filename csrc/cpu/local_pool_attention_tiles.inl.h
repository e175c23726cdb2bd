// local_pool_attention's positions, and what forward and backward do with a tile of them: scores and weights.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace local_pool_attention_impl {

using Params = LocalPoolAttentionParams;

constexpr int kTile = 64;  // positions; rows of a tile are so many floats apart
constexpr int kMaxTaps = 49;
constexpr int64_t kUnits = 16, kForwardUnits = 32;
constexpr float kOutside = -1e30f;  // a score that is 0 after any softmax in which another key takes part

struct Plan {
  int r, taps, padded_taps, ldd, tile;  // ldd: of rows of d channels; tile: positions at once
  int64_t pitch;  // positions of a row of the map
  int64_t bands, groups;  // units of one head: of rows, and in forward of images
  int64_t most_positions, guard;  // guard: zeros at both ends of positions
  int64_t ldx, ldk;  // of [d, positions] and, with r more rows of the map on both sides, of k and v
  int64_t sums;  // floats that a unit of backward sums

  Plan(const Params& p, bool backward) {
    const bool small = small_tiles();
    r = p.window / 2, taps = p.window * p.window, padded_taps = round_up(taps, kLanes);
    ldd = round_up(static_cast<int>(p.d), kLanes);
    tile = small ? kLanes : kTile;
    pitch = p.W + 2 * r;
    const int64_t rows = ceil_div(small ? 24 : backward ? 800 : 512, pitch);
    const int64_t wanted = ceil_div(kUnits, backward ? p.h : p.h * p.B);
    bands = std::max(ceil_div(p.H, rows), std::min(wanted, p.H / (2 * p.window)));
    groups = backward ? 1 : std::min(p.B, ceil_div(kForwardUnits, p.h * bands));
    most_positions = (ceil_div(p.H, bands) + (backward ? 2 * r : 0)) * pitch;
    guard = ceil_div(r * pitch + r, kLanes) * kLanes + kLanes;
    ldx = of_rows(most_positions), ldk = of_rows(most_positions + 2 * r * pitch);
    sums = (2 * p.B * p.P + taps + 1) * ldd + 2 * padded_taps;
  }

 private:
  int64_t of_rows(int64_t n) const {
    const int64_t ld = 2 * guard + ceil_div(n, kLanes) * kLanes + kLanes;
    return ld % 128 == 0 ? ld + 16 : ld;  // rows a multiple of 512 bytes apart would share few sets of the cache
  }
};

// ---- sums over the window ------------------------------------------------------------------------------------------

// to[t, x] = sum over c of q[c, x] keys[t][c, x]; rows of `to` are kTile apart.
template <int kAtOnce>
void products_of(int taps, int64_t d, int n, const float* q, int64_t ldq, const float* const* keys, int64_t ldk,
                 float* to) {
  for (int x = 0; x < n; x += kLanes) {
    for (int first = 0; first < taps; first += kAtOnce) {
      const float* from[kAtOnce];
      vf acc[kAtOnce];
#pragma GCC unroll 9
      for (int t = 0; t < kAtOnce; ++t) from[t] = keys[first + t] + x, acc[t] = vf{};
      for (int64_t c = 0; c < d; ++c) {
        const vf y = load(q + c * ldq + x);
#pragma GCC unroll 9
        for (int t = 0; t < kAtOnce; ++t) acc[t] = fma(y, load(from[t] + c * ldk), acc[t]);
      }
#pragma GCC unroll 9
      for (int t = 0; t < kAtOnce; ++t) store(to + (first + t) * kTile + x, acc[t]);
    }
  }
}

// to[c, x] += sum over t of w[t][x] values[t][c, x]; rows of `to` are kTile apart.
template <int kAtOnce>
void add_products_of(int taps, int64_t d, int n, const float* const* w, const float* const* values, int64_t ldv,
                     float* to) {
  for (int x = 0; x < n; x += kLanes) {
    for (int first = 0; first < taps; first += kAtOnce) {
      const float* from[kAtOnce];
      vf weight[kAtOnce];
#pragma GCC unroll 9
      for (int t = 0; t < kAtOnce; ++t) from[t] = values[first + t] + x, weight[t] = load(w[first + t] + x);
      for (int64_t c = 0; c < d; ++c) {
        vf acc = load(to + c * kTile + x);
#pragma GCC unroll 9
        for (int t = 0; t < kAtOnce; ++t) acc = fma(weight[t], load(from[t] + c * ldv), acc);
        store(to + c * kTile + x, acc);
      }
    }
  }
}

EFFVIT_INLINE void products(const Plan& g, int64_t d, int n, const float* q, int64_t ldq, const float* const* keys,
                            int64_t ldk, float* to) {
  const auto f = g.taps == 9 ? products_of<9> : g.taps == 25 ? products_of<5> : products_of<7>;
  f(g.taps, d, n, q, ldq, keys, ldk, to);
}
EFFVIT_INLINE void add_products(const Plan& g, int64_t d, int n, const float* const* w, const float* const* values,
                                int64_t ldv, float* to) {
  const auto f = g.taps == 9 ? add_products_of<9> : g.taps == 25 ? add_products_of<5> : add_products_of<7>;
  f(g.taps, d, n, w, values, ldv, to);
}

// ---- a band of rows of one head ------------------------------------------------------------------------------------

struct MapOf {  // [B, H, W, h, d], last stride 1
  const void* data;
  int64_t stride_b, stride_y, stride_x, stride_h;
};

struct Band {
  const Params& p;
  const Plan& g;
  const bool changes;  // queries are not what the products take
  float *q, *scaled;  // [d, positions]: as given, and (q + q_embed) * q_scale
  float *k, *v;  // [d, positions], from r rows above on
  float *q_rows, *scaled_rows, *map_rows;  // [positions, ldd]
  float *k_pool, *v_pool;  // [P, ldd]
  float *local, *pooled;  // [T, kTile], [P, kTile]: scores, then weights before the division by their sum
  float* extra;  // [T, kTile]: added to the weights, or null
  float* inverse_sum;  // [kTile]
  float* outside;  // [positions] of k: 0 or kOutside
  float* scale;  // [positions] of q, or null
  float* embed;  // [ldd], or null
  float *pool_bias, *bias_rows;  // [P, positions], or null; [kTile, P]
  float* out_rows;  // [kTile, ldd]
  int64_t head = 0, first_row = 0, rows = 0, positions = 0;

  Band(const Params& params, const Plan& plan, Scratch& scratch)
      : p(params), g(plan), changes(params.q_scale || params.q_embed) {
    const int64_t around = g.most_positions + 2 * g.r * g.pitch;
    q = take_positions(scratch, p.d, g.ldx);
    scaled = changes ? take_positions(scratch, p.d, g.ldx) : q;
    k = take_positions(scratch, p.d, g.ldk), v = take_positions(scratch, p.d, g.ldk);
    q_rows = scratch.take<float>((g.most_positions + kLanes) * g.ldd);
    scaled_rows = changes ? scratch.take<float>((g.most_positions + kLanes) * g.ldd) : q_rows;
    map_rows = scratch.take<float>(around * g.ldd);
    k_pool = scratch.take<float>(p.P * g.ldd), v_pool = scratch.take<float>(p.P * g.ldd);
    local = scratch.take<float>(int64_t{g.taps} * kTile), pooled = scratch.take<float>(p.P * kTile);
    extra = p.tokens || p.token_bias ? scratch.take<float>(int64_t{g.taps} * kTile) : nullptr;
    inverse_sum = scratch.take<float>(kTile);
    outside = take_positions(scratch, 1, g.ldk);
    scale = p.q_scale ? scratch.take<float>(g.ldx) : nullptr;
    embed = p.q_embed ? scratch.take<float>(g.ldd) : nullptr;
    pool_bias = p.pool_bias ? scratch.take<float>(p.P * g.ldx) : nullptr;
    bias_rows = p.pool_bias ? scratch.take<float>(kTile * round_up(static_cast<int>(p.P), kLanes)) : nullptr;
    out_rows = scratch.take<float>(int64_t{kTile} * g.ldd);
  }

  // Rows of positions, from behind the guard of the first.
  float* take_positions(Scratch& scratch, int64_t n, int64_t ld) const {
    float* const base = scratch.take<float>(n * ld);
    return base ? base + g.guard : nullptr;
  }
  int64_t shift(int t) const { return t / p.window * g.pitch + t % p.window - g.r; }  // of a tap, in k and v
  int tile_of(int64_t x, int64_t end) const {
    return static_cast<int>(std::min<int64_t>(g.tile, ceil_div(end - x, kLanes) * kLanes));
  }
  static void set_zero(float* to, int64_t n) { std::memset(to, 0, static_cast<size_t>(n) * sizeof(float)); }
  void clear_behind(float* to, int64_t n) const {
    for (int64_t c = 0; c < n; ++c) set_zero(to + c * g.ldx + positions, g.guard);
  }

  // Once, before all: columns outside of the map stay zeros.
  void clear() {
    set_zero(q - g.guard, p.d * g.ldx), set_zero(scaled - g.guard, p.d * g.ldx);
    set_zero(k - g.guard, p.d * g.ldk), set_zero(v - g.guard, p.d * g.ldk);
    set_zero(q_rows, (g.most_positions + kLanes) * g.ldd), set_zero(scaled_rows, (g.most_positions + kLanes) * g.ldd);
    set_zero(map_rows, (g.most_positions + 2 * g.r * g.pitch) * g.ldd);
  }

  // What all images share of rows [first, end) of a head.
  void enter(int64_t of_head, int64_t first, int64_t end) {
    head = of_head, first_row = first, rows = end - first, positions = rows * g.pitch;
    for (int64_t i = -g.guard; i < g.ldk - g.guard; ++i) outside[i] = kOutside;
    for (int64_t i = 0; i < rows + 2 * g.r; ++i) {
      const int64_t y = first + i - g.r;
      if (y >= 0 && y < p.H) set_zero(outside + i * g.pitch + g.r, p.W);
    }
    if (embed) load_row(embed, p.q_embed + head * p.d, static_cast<int>(p.d));
    if (scale) {
      set_zero(scale, g.ldx);
      for (int64_t i = 0; i < rows; ++i) {
        const float* const from = p.q_scale + (head * p.H + first + i) * p.W;
        std::memcpy(scale + i * g.pitch + g.r, from, static_cast<size_t>(p.W) * sizeof(float));
      }
    }
    if (!pool_bias) return;
    const int P = static_cast<int>(p.P), ldp = round_up(P, kLanes);
    for (int64_t x = 0; x < positions; x += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, positions - x));
      for (int i = 0; i < count; ++i) {
        const int64_t y = first + (x + i) / g.pitch, column = (x + i) % g.pitch - g.r;
        if (column >= 0 && column < p.W)
          load_row(bias_rows + int64_t{i} * ldp, p.pool_bias + ((head * p.H + y) * p.W + column) * p.P, P);
        else
          set_zero(bias_rows + int64_t{i} * ldp, ldp);
      }
      transpose_rows(pool_bias + x, g.ldx, count, P, [&](int i) { return bias_rows + int64_t{i} * ldp; });
    }
  }

  // `count` rows of the map from `first` on, as rows of d channels, zeros outside of the map.
  void load_rows(const MapOf& map, int64_t b, int64_t first, int64_t count, float* to) const {
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < count; ++i) {
        float* const row = to + (i * g.pitch + g.r) * g.ldd;
        if (first + i < 0 || first + i >= p.H) {
          set_zero(row, p.W * g.ldd);
          continue;
        }
        const T* const from =
            static_cast<const T*>(map.data) + b * map.stride_b + (first + i) * map.stride_y + head * map.stride_h;
        load_tokens(row, g.ldd, static_cast<int>(p.W), static_cast<int>(p.d),
                    [&](int x) { return from + x * map.stride_x; });
      }
    });
  }
  void transpose(float* to, int64_t ld, const float* from, int64_t n) const {
    transpose_rows(to, ld, static_cast<int>(n), static_cast<int>(p.d),
                   [&](int i) { return from + int64_t{i} * g.ldd; });
  }
  void load_pooled(const void* data, int64_t stride_b, int64_t stride_p, int64_t stride_h, int64_t b, float* to) const {
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      const T* const from = static_cast<const T*>(data) + b * stride_b + head * stride_h;
      load_tokens(to, g.ldd, static_cast<int>(p.P), static_cast<int>(p.d), [&](int i) { return from + i * stride_p; });
    });
  }

  void load_image(int64_t b) {
    const int64_t around = rows + 2 * g.r;
    load_rows({p.k, p.k_stride_b, p.k_stride_y, p.k_stride_x, p.k_stride_h}, b, first_row - g.r, around, map_rows);
    transpose(k, g.ldk, map_rows, around * g.pitch);
    load_rows({p.v, p.v_stride_b, p.v_stride_y, p.v_stride_x, p.v_stride_h}, b, first_row - g.r, around, map_rows);
    transpose(v, g.ldk, map_rows, around * g.pitch);
    load_pooled(p.k_pool, p.k_pool_stride_b, p.k_pool_stride_p, p.k_pool_stride_h, b, k_pool);
    load_pooled(p.v_pool, p.v_pool_stride_b, p.v_pool_stride_p, p.v_pool_stride_h, b, v_pool);
    load_rows({p.q, p.q_stride_b, p.q_stride_y, p.q_stride_x, p.q_stride_h}, b, first_row, rows, q_rows);
    if (!changes || p.tokens || p.dq_scale) transpose(q, g.ldx, q_rows, positions);
    if (!changes) return;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t x = i * g.pitch + g.r; x < i * g.pitch + g.r + p.W; ++x) {
        const vf factor = set1(scale ? scale[x] : 1.f);
        for (int c = 0; c < g.ldd; c += kLanes) {
          const vf y = load(q_rows + x * g.ldd + c);
          store(scaled_rows + x * g.ldd + c, (embed ? y + load(embed + c) : y) * factor);
        }
      }
    }
    transpose(scaled, g.ldx, scaled_rows, positions);
  }

  // ---- a tile of n positions from x on

  void scores(int64_t x, int n) {
    const float* keys[kMaxTaps];
    for (int t = 0; t < g.taps; ++t) keys[t] = k + x + shift(t);
    products(g, p.d, n, scaled + x, g.ldx, keys, g.ldk, local);
    gemm(static_cast<int>(p.P), n, static_cast<int>(p.d), k_pool, g.ldd, scaled + x, g.ldx, nullptr, pooled, kTile);
  }

  // Biases, and from scores to weights that inverse_sum is yet to multiply.
  void softmax(int64_t x, int n) {
    const float* const local_bias = p.local_bias ? p.local_bias + head * g.taps : nullptr;
    const int P = static_cast<int>(p.P);
    for (int c = 0; c < n; c += kLanes) {
      vf largest = set1(2.f * kOutside);
      for (int t = 0; t < g.taps; ++t) {
        float* const at = local + t * kTile + c;
        const vf s = load(at) + set1(local_bias ? local_bias[t] : 0.f) + load(outside + x + shift(t) + c);
        store(at, s);
        largest = max(largest, s);
      }
      for (int i = 0; i < P; ++i) {
        float* const at = pooled + i * kTile + c;
        vf s = load(at);
        if (pool_bias) store(at, s = s + load(pool_bias + i * g.ldx + x + c));
        largest = max(largest, s);
      }
      vf sum{};
      for (int t = 0; t < g.taps; ++t) {
        float* const at = local + t * kTile + c;
        const vf e = exp(load(at) - largest);
        store(at, e);
        sum += e;
      }
      for (int i = 0; i < P; ++i) {
        float* const at = pooled + i * kTile + c;
        const vf e = exp(load(at) - largest);
        store(at, e);
        sum += e;
      }
      store(inverse_sum + c, 1.f / sum);
    }
  }

  // q tokens + token_bias, which is added to the weights around a position.
  void extra_weights(int64_t x, int n) {
    if (!extra) return;
    if (p.tokens) {
      gemm_transposed(g.taps, n, static_cast<int>(p.d), p.tokens + head * p.d * g.taps, g.taps, q + x, g.ldx, nullptr,
                      extra, kTile);
    } else {
      set_zero(extra, int64_t{g.taps} * kTile);
    }
    for (int t = 0; t < g.taps && p.token_bias; ++t) {
      const vf bias = set1(p.token_bias[head * g.taps + t]);
      for (int c = 0; c < n; c += kLanes) store(extra + t * kTile + c, load(extra + t * kTile + c) + bias);
    }
  }

  // [d, kTile] -> positions [x, x + count) of a contiguous [B, H, W, h, d].
  void write(void* to, int64_t b, int64_t x, int64_t count, const float* from) const {
    transpose_rows(out_rows, g.ldd, static_cast<int>(p.d), static_cast<int>(count),
                   [&](int c) { return from + int64_t{c} * kTile; });
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t y = first_row + (x + i) / g.pitch, column = (x + i) % g.pitch - g.r;
        if (column < 0 || column >= p.W) continue;
        store_row(static_cast<T*>(to) + (((b * p.H + y) * p.W + column) * p.h + head) * p.d, out_rows + i * g.ldd,
                  static_cast<int>(p.d));
      }
    });
  }
};

}  // namespace local_pool_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
