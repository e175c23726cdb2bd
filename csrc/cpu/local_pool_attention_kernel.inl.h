// local_pool_attention on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// A unit is a band of rows of one head. What lies in a vector are positions, not channels: rows of the map, with r =
// window / 2 empty columns at both sides, follow each other in "positions", and q, k, v are [d, positions]. A tap of
// the window is then a shift: scores are products of q with shifted k, vector by vector, and so is the sum of the
// values. Those of pooled tokens are matrix products [P, d] x [d, positions], and the softmax runs down the columns.
// Keys outside of the map have a score of kOutside. Positions go in tiles, whose scores stay in cache; nothing of all
// positions x (window² + P) is written.
// Backward computes the scores again. Gradients of k and v gather from the positions around them: bands overlap by r
// rows, whose softmax is computed twice. Images follow each other in a unit, which owns its part of dpool_bias; sums
// over bands are partial ones, added at the end.
#pragma once

#include "local_pool_attention_tiles.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace local_pool_attention_impl {

// ---- forward -------------------------------------------------------------------------------------------------------

struct Forward : Band {
  float* weight;  // [T, kTile]: of the values around a position
  float* result;  // [d, kTile]

  Forward(const Params& params, const Plan& plan, Scratch& scratch) : Band(params, plan, scratch) {
    weight = scratch.take<float>(int64_t{g.taps} * kTile);
    result = scratch.take<float>(p.d * kTile);
  }

  void tile(int64_t b, int64_t x, int n) {
    scores(x, n);
    softmax(x, n);
    extra_weights(x, n);
    for (int c = 0; c < n; c += kLanes) {
      const vf inverse = load(inverse_sum + c);
      for (int t = 0; t < g.taps; ++t) {
        const vf more = extra ? load(extra + t * kTile + c) : vf{};
        store(weight + t * kTile + c, fma(load(local + t * kTile + c), inverse, more));
      }
    }
    gemm_transposed(static_cast<int>(p.d), n, static_cast<int>(p.P), v_pool, g.ldd, pooled, kTile, nullptr, result,
                    kTile);
    for (int64_t c = 0; c < p.d; ++c) {
      for (int i = 0; i < n; i += kLanes)
        store(result + c * kTile + i, load(result + c * kTile + i) * load(inverse_sum + i));
    }
    const float *w[kMaxTaps], *values[kMaxTaps];
    for (int t = 0; t < g.taps; ++t) w[t] = weight + t * kTile, values[t] = v + x + shift(t);
    add_products(g, p.d, n, w, values, g.ldk, result);
    write(p.out, b, x, std::min<int64_t>(n, positions - x), result);
  }

  void run(int64_t begin, int64_t end) {
    clear();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t band = unit % g.bands, group = unit / g.bands / p.h;
      enter(unit / g.bands % p.h, p.H * band / g.bands, p.H * (band + 1) / g.bands);
      for (int64_t b = p.B * group / g.groups; b < p.B * (group + 1) / g.groups; ++b) {
        load_image(b);
        for (int64_t x = 0; x < positions; x += g.tile) tile(b, x, tile_of(x, positions));
      }
    }
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

struct Backward : Band {
  float* grad;  // [d, positions], and
  float* grad_rows;  // [positions, d]: of the output
  float* ds;  // [T, positions]: gradients of the scores of a position
  float* weights;  // [T, positions]: weights of the values around a position
  float *d_local, *d_pooled;  // [T, kTile], [P, kTile]: gradients of the weights, then of the scores
  float *result, *more;  // [d, kTile]
  float* dpool_bias;  // [P, positions]
  float* dq_scale;  // [positions]
  int64_t own_begin = 0, own_end = 0;  // positions of the rows of this unit; the others are only looked at

  Backward(const Params& params, const Plan& plan, Scratch& scratch) : Band(params, plan, scratch) {
    grad = take_positions(scratch, p.d, g.ldx);
    grad_rows = scratch.take<float>((g.most_positions + kLanes) * g.ldd);
    ds = take_positions(scratch, g.taps, g.ldx);
    weights = take_positions(scratch, g.taps, g.ldx);
    d_local = scratch.take<float>(int64_t{g.taps} * kTile);
    d_pooled = scratch.take<float>(p.P * kTile);
    result = scratch.take<float>(p.d * kTile);
    more = scratch.take<float>(p.d * kTile);
    dpool_bias = p.dpool_bias ? scratch.take<float>(p.P * g.ldx) : nullptr;
    dq_scale = p.dq_scale ? scratch.take<float>(g.ldx) : nullptr;
  }

  // What a unit sums, in the workspace.
  struct Sums {
    float *dk_pool, *dv_pool;  // [B, P, ldd]
    float* dtokens;  // [T, ldd]
    float* dq_embed;  // [ldd]
    float *dlocal_bias, *dtoken_bias;  // [T], padded

    Sums(const Params& p, const Plan& g, float* base) {
      dk_pool = base, dv_pool = dk_pool + p.B * p.P * g.ldd;
      dtokens = dv_pool + p.B * p.P * g.ldd;
      dq_embed = dtokens + int64_t{g.taps} * g.ldd;
      dlocal_bias = dq_embed + g.ldd, dtoken_bias = dlocal_bias + g.padded_taps;
    }
  };

  // Weights and their gradients of a tile, and from them what does not look at other positions.
  void tile(int64_t b, int64_t x, int n, int64_t count, bool own, const Sums& sums) {
    const int P = static_cast<int>(p.P), d = static_cast<int>(p.d);
    scores(x, n);
    softmax(x, n);
    extra_weights(x, n);
    const float* values[kMaxTaps];
    for (int t = 0; t < g.taps; ++t) values[t] = v + x + shift(t);
    products(g, p.d, n, grad + x, g.ldx, values, g.ldk, d_local);
    gemm(P, n, d, v_pool, g.ldd, grad + x, g.ldx, nullptr, d_pooled, kTile);
    if (own && (p.dtokens || p.dtoken_bias)) token_gradients(x, n, count, sums);
    for (int c = 0; c < n; c += kLanes) {
      const vf inverse = load(inverse_sum + c);
      vf delta{};
      for (int t = 0; t < g.taps; ++t) {
        const vf a = load(local + t * kTile + c) * inverse;
        store(local + t * kTile + c, a);
        delta = fma(a, load(d_local + t * kTile + c), delta);
        store(weights + t * g.ldx + x + c, extra ? a + load(extra + t * kTile + c) : a);
      }
      for (int i = 0; i < P; ++i) {
        const vf a = load(pooled + i * kTile + c) * inverse;
        store(pooled + i * kTile + c, a);
        delta = fma(a, load(d_pooled + i * kTile + c), delta);
      }
      for (int t = 0; t < g.taps; ++t)
        store(ds + t * g.ldx + x + c, load(local + t * kTile + c) * (load(d_local + t * kTile + c) - delta));
      for (int i = 0; i < P; ++i) {
        float* const at = d_pooled + i * kTile + c;
        store(at, load(pooled + i * kTile + c) * (load(at) - delta));
      }
    }
    if (own) own_gradients(b, x, n, count, sums);
  }

  // Sum of each of the T rows over the first `count` positions of a tile.
  void add_rows(float* to, const float* from, int64_t ld, int64_t count) const {
    for (int t = 0; t < g.taps; ++t) {
      vf sum{};
      for (int64_t c = 0; c < count; c += kLanes)
        sum += first_lanes(load(from + t * ld + c), static_cast<int>(std::min<int64_t>(kLanes, count - c)));
      to[t] += reduce_add(sum);
    }
  }

  // The gradients of the weights are also those of what is added to them.
  void token_gradients(int64_t x, int n, int64_t count, const Sums& sums) {
    if (p.dtoken_bias) add_rows(sums.dtoken_bias, d_local, kTile, count);
    if (!p.dtokens) return;
    gemm(g.taps, g.ldd, static_cast<int>(count), d_local, kTile, q_rows + x * g.ldd, g.ldd, sums.dtokens, sums.dtokens,
         g.ldd);
    gemm(static_cast<int>(p.d), n, g.taps, p.tokens + head * p.d * g.taps, g.taps, d_local, kTile, nullptr, more,
         kTile);
  }

  void own_gradients(int64_t b, int64_t x, int n, int64_t count, const Sums& sums) {
    const int P = static_cast<int>(p.P), d = static_cast<int>(p.d), k = static_cast<int>(count);
    float *const dk_pool = sums.dk_pool + b * p.P * g.ldd, *const dv_pool = sums.dv_pool + b * p.P * g.ldd;
    gemm(P, g.ldd, k, d_pooled, kTile, scaled_rows + x * g.ldd, g.ldd, dk_pool, dk_pool, g.ldd);
    gemm(P, g.ldd, k, pooled, kTile, grad_rows + x * g.ldd, g.ldd, dv_pool, dv_pool, g.ldd);
    if (p.dlocal_bias) add_rows(sums.dlocal_bias, ds + x, g.ldx, count);
    if (dpool_bias) {
      for (int i = 0; i < P; ++i) {
        float* const to = dpool_bias + i * g.ldx + x;
        for (int c = 0; c < n; c += kLanes) store(to + c, load(to + c) + load(d_pooled + i * kTile + c));
      }
    }
    gemm_transposed(d, n, P, k_pool, g.ldd, d_pooled, kTile, nullptr, result, kTile);
    const float *w[kMaxTaps], *keys[kMaxTaps];
    for (int t = 0; t < g.taps; ++t) w[t] = ds + t * g.ldx + x, keys[t] = this->k + x + shift(t);
    add_products(g, p.d, n, w, keys, g.ldk, result);
    unscale(x, n, count, sums);
    write(p.dq, b, x, count, result);
  }

  // From gradients of (q + q_embed) * q_scale to those of q, q_embed and q_scale.
  void unscale(int64_t x, int n, int64_t count, const Sums& sums) {
    if (dq_scale) {
      for (int c = 0; c < n; c += kLanes) {
        vf sum{};
        for (int64_t i = 0; i < p.d; ++i) {
          const vf embed = set1(p.q_embed ? p.q_embed[head * p.d + i] : 0.f);
          sum = fma(load(result + i * kTile + c), load(q + i * g.ldx + x + c) + embed, sum);
        }
        store(dq_scale + x + c, load(dq_scale + x + c) + sum);
      }
    }
    for (int64_t i = 0; i < p.d; ++i) {
      vf sum{};
      for (int c = 0; c < n; c += kLanes) {
        vf y = load(result + i * kTile + c);
        if (p.q_scale) y = y * load(scale + x + c);
        if (count > c) sum += first_lanes(y, static_cast<int>(std::min<int64_t>(kLanes, count - c)));
        if (p.tokens) y += load(more + i * kTile + c);
        store(result + i * kTile + c, y);
      }
      if (p.dq_embed) sums.dq_embed[i] += reduce_add(sum);
    }
  }

  // dk and dv of the rows of this unit, each from the positions whose windows it is in.
  void gather(int64_t b) {
    for (int64_t x = own_begin; x < own_end; x += g.tile) {
      const int n = tile_of(x, own_end);
      const int64_t count = std::min<int64_t>(n, own_end - x);
      const float *w[kMaxTaps], *from[kMaxTaps];
      for (const bool keys : {true, false}) {
        for (int t = 0; t < g.taps; ++t) {
          const int64_t source = x - shift(t) + g.r * g.pitch;
          w[t] = (keys ? ds : weights) + t * g.ldx + source;
          from[t] = (keys ? scaled : grad) + source;
        }
        set_zero(result, p.d * kTile);
        add_products(g, p.d, n, w, from, g.ldx, result);
        write(keys ? p.dk : p.dv, b, x, count, result);
      }
    }
  }

  void run(float* workspace, int64_t begin, int64_t end) {
    clear();
    set_zero(grad_rows, (g.most_positions + kLanes) * g.ldd);
    set_zero(grad - g.guard, p.d * g.ldx);
    set_zero(ds - g.guard, g.taps * g.ldx), set_zero(weights - g.guard, g.taps * g.ldx);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t band = unit % g.bands, first = p.H * band / g.bands, last = p.H * (band + 1) / g.bands;
      enter(unit / g.bands, std::max<int64_t>(0, first - g.r), std::min(p.H, last + g.r));
      own_begin = (first - first_row) * g.pitch, own_end = (last - first_row) * g.pitch;
      float* const base = workspace + unit * g.sums;
      set_zero(base, g.sums);
      const Sums sums(p, g, base);
      if (dpool_bias) set_zero(dpool_bias, p.P * g.ldx);
      if (dq_scale) set_zero(dq_scale, g.ldx);
      for (int64_t b = 0; b < p.B; ++b) {
        load_image(b);
        load_rows({p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x, p.grad_out_stride_h}, b,
                  first_row, rows, grad_rows);
        transpose(grad, g.ldx, grad_rows, positions);
        const int64_t parts[] = {0, own_begin, own_end, positions};
        for (int part = 0; part < 3; ++part) {
          for (int64_t x = parts[part]; x < parts[part + 1]; x += g.tile) {
            const int n = tile_of(x, parts[part + 1]);
            tile(b, x, n, std::min<int64_t>(n, parts[part + 1] - x), part == 1, sums);
          }
        }
        clear_behind(ds, g.taps), clear_behind(weights, g.taps), clear_behind(grad, p.d), clear_behind(scaled, p.d);
        gather(b);
      }
      write_of_positions();
    }
  }

  // dpool_bias and dq_scale of the rows of this unit.
  void write_of_positions() {
    const int P = static_cast<int>(p.P), ldp = round_up(P, kLanes);
    for (int64_t x = own_begin; x < own_end; x += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, own_end - x));
      if (dpool_bias)
        transpose_rows(bias_rows, ldp, P, count, [&](int i) { return dpool_bias + int64_t{i} * g.ldx + x; });
      for (int i = 0; i < count; ++i) {
        const int64_t y = first_row + (x + i) / g.pitch, column = (x + i) % g.pitch - g.r;
        if (column < 0 || column >= p.W) continue;
        const int64_t pixel = (head * p.H + y) * p.W + column;
        if (dq_scale) p.dq_scale[pixel] = dq_scale[x + i];
        if (dpool_bias) store_row(p.dpool_bias + pixel * p.P, bias_rows + int64_t{i} * ldp, P);
      }
    }
  }
};

// Sums over the bands of one head of one image; of the first image also what has no batch.
void reduce_head(const Params& p, const Plan& g, const float* workspace, int64_t b, int64_t head, float* sum) {
  const float* const first = workspace + head * g.bands * g.sums;
  const auto over_bands = [&](auto member, int64_t offset) {
    const int n = g.ldd;
    zero(sum, n);
    for (int64_t band = 0; band < g.bands; ++band) {
      const Backward::Sums sums(p, g, const_cast<float*>(first) + band * g.sums);
      axpy(sum, 1.f, sums.*member + offset, n);
    }
  };
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < p.P; ++i) {
      const int64_t at = ((b * p.P + i) * p.h + head) * p.d;
      over_bands(&Backward::Sums::dk_pool, (b * p.P + i) * g.ldd);
      store_row(static_cast<T*>(p.dk_pool) + at, sum, static_cast<int>(p.d));
      over_bands(&Backward::Sums::dv_pool, (b * p.P + i) * g.ldd);
      store_row(static_cast<T*>(p.dv_pool) + at, sum, static_cast<int>(p.d));
    }
  });
  if (b > 0) return;
  if (p.dq_embed) {
    over_bands(&Backward::Sums::dq_embed, 0);
    store_row(p.dq_embed + head * p.d, sum, static_cast<int>(p.d));
  }
  for (int t = 0; t < g.taps && p.dtokens; ++t) {
    over_bands(&Backward::Sums::dtokens, int64_t{t} * g.ldd);
    for (int64_t c = 0; c < p.d; ++c) p.dtokens[(head * p.d + c) * g.taps + t] = sum[c];
  }
  for (int t = 0; t < g.taps; ++t) {
    float local = 0.f, token = 0.f;
    for (int64_t band = 0; band < g.bands; ++band) {
      const Backward::Sums sums(p, g, const_cast<float*>(first) + band * g.sums);
      local += sums.dlocal_bias[t], token += sums.dtoken_bias[t];
    }
    if (p.dlocal_bias) p.dlocal_bias[head * g.taps + t] = local;
    if (p.dtoken_bias) p.dtoken_bias[head * g.taps + t] = token;
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) {
  const Plan g(p, false);
  return g.groups * p.h * g.bands;
}
void forward(const Params& p, float*, int64_t begin, int64_t end) { run_pass<Forward>(p, Plan(p, false), begin, end); }

int64_t backward_units(const Params& p) { return p.h * Plan(p, true).bands; }
int64_t backward_floats(const Params& p) {
  const Plan g(p, true);
  return p.h * g.bands * g.sums;
}
void backward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  run_pass<Backward>(p, Plan(p, true), workspace, begin, end);
}

int64_t reduce_units(const Params& p) { return p.B * p.h; }
void reduce(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p, true);
  float* const sum = static_cast<float*>(thread_scratch(static_cast<size_t>(g.ldd) * sizeof(float)));
  for (int64_t i = begin; i < end; ++i) reduce_head(p, g, workspace, i / p.h, i % p.h, sum);
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {{backward_units, backward}, {reduce_units, reduce}};

}  // namespace local_pool_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<LocalPoolAttentionParams>* EFFVIT_KERNEL_NAME(local_pool_attention)() {
  namespace impl = EFFVIT_ISA_NAME::local_pool_attention_impl;
  static constexpr Kernel<LocalPoolAttentionParams> kernel = {routine(impl::kForward),
                                                              routine(impl::kBackward, impl::backward_floats)};
  return &kernel;
}
}  // namespace effvit::cpu
