// block_relu2_attention on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// Forward: a unit is a block of rows of one group. Keys are transposed into scratch a tile at a time; a score leaves
// the registers as relu(s)², and the block of weights meets the values. Backward: a unit is a whole group. With r =
// relu(q kᵀ / G): dp = g vᵀ, ds = 2 r dp / G; dq = ds k, dk = dsᵀ q and dv = (r²)ᵀ g, tile of keys by tile of keys,
// block of rows by block of rows. Scores are computed once. float32 rows of whole vectors are read, and gradients of
// them written, where they are; others go through scratch.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace block_relu2_attention_impl {

using Params = BlockRelu2AttentionParams;

// Whether products are of bfloat16: block_relu2_attention_bf16.inl.h.
bool in_pairs(const Params& p) { return kBf16Products<BFloat16> && p.dtype == DType::kBFloat16; }

struct Plan {
  int K, V, Kp, Vp;  // columns, and rounded up to whole vectors
  int ldk, ldv;  // row strides in scratch: not a multiple of 512 bytes, or rows would share few sets of the cache
  int64_t group, groups;  // tokens of a group at most, groups of a sequence
  int block_rows = 48, unit_rows;  // rows of a product; of a unit of forward
  int tile_keys, columns = 128;  // keys of a tile; values in scratch at a time
  int ldp;  // row stride of weights
  int64_t blocks;  // units of a group in forward
  float scale;

  Plan(const Params& p, bool backward)
      : K(static_cast<int>(p.K)), V(static_cast<int>(p.V)), scale(1.f / static_cast<float>(p.group)) {
    const bool small = small_tiles();
    Kp = round_up(K, kLanes), Vp = round_up(V, kLanes);
    ldk = Kp % 128 == 0 ? Kp + 16 : Kp, ldv = Vp % 128 == 0 ? Vp + 16 : Vp;
    group = std::min(p.group, p.L);
    groups = ceil_div(p.L, group);
    if (in_pairs(p)) block_rows = 64, columns = 256;
    if (small) block_rows = 6, columns = kLanes;
    unit_rows = 2 * block_rows;
    tile_keys = small ? kLanes : !backward ? 256 : V > 1024 ? 64 : 128;
    tile_keys = static_cast<int>(std::min<int64_t>(tile_keys, group));
    ldp = round_up(tile_keys, kLanes) + 16;
    blocks = ceil_div(group, unit_rows);
  }
  int64_t first_token(int64_t g) const { return g * group; }
  int64_t tokens(const Params& p, int64_t g) const { return std::min(group, p.L - g * group); }
};

// Whether rows of T of these columns may stand in for scratch.
template <class T>
constexpr bool in_place(int columns) {
  return std::is_same_v<T, float> && columns % kLanes == 0;
}

template <class T>
EFFVIT_INLINE const T* row_of(const void* base, int64_t stride_b, int64_t stride_l, int64_t b, int64_t l) {
  return static_cast<const T*>(base) + b * stride_b + l * stride_l;
}

// n rows of `width` elements in scratch, zeros up to whole vectors.
template <class T>
EFFVIT_INLINE void load_rows(float* to, int64_t ld, const T* from, int64_t stride, int n, int width) {
  load_tokens(to, ld, n, width, [&](int i) { return from + i * stride; });
}

// Scores of a block of rows and a tile of keys become r = relu(s / G), or r², zeros where a key comes later.
struct ReluSink {
  float* to;
  int64_t ld;
  float scale;
  bool square, causal;
  int64_t lead;  // how many keys of the tile lie before row 0

  EFFVIT_INLINE void operator()(int r, int c, vf score) const {
    vf x = max(vf{}, score * scale);  // in this order a NaN stays
    if (causal) x = first_lanes(x, static_cast<int>(std::clamp<int64_t>(lead + r + 1 - c, 0, kLanes)));
    store(to + r * ld + c, square ? x * x : x);
  }
};

template <class T>
struct Forward {
  const Params& p;
  const Plan& g;
  float *kt, *q, *prob, *k, *v, *acc;

  Forward(const Params& params, const Plan& plan, Scratch& s) : p(params), g(plan) {
    const int64_t keys = g.tile_keys, rows = g.block_rows;
    kt = s.take<float>(int64_t{g.K} * g.ldp);
    k = s.take<float>(keys * g.ldk);
    q = s.take<float>(rows * g.ldk);
    prob = s.take<float>(rows * g.ldp);
    v = s.take<float>(in_place<T>(g.V) ? 0 : keys * g.columns);
    acc = s.take<float>(in_place<T>(g.V) ? 0 : rows * g.ldv);
  }

  void run(int64_t begin, int64_t end) {
    int64_t loaded = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / g.blocks, b = head / g.groups, group = head % g.groups;
      const int64_t n = g.tokens(p, group), start = g.first_token(group);
      const int64_t first = unit % g.blocks * g.unit_rows, last = std::min(first + g.unit_rows, n);
      for (int64_t row = first; row < last; row += g.block_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(g.block_rows, last - row));
        load_rows(q, g.ldk, row_of<T>(p.q, p.q_stride_b, p.q_stride_l, b, start + row), p.q_stride_l, rows, g.K);
        for (int64_t key = 0; key < (p.causal ? row + rows : n); key += g.tile_keys) {
          const int keys = static_cast<int>(std::min<int64_t>(g.tile_keys, n - key));
          if (loaded != (start + key) + b * p.L) {
            load_rows(k, g.ldk, row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, start + key), p.k_stride_l, keys, g.K);
            transpose_rows(kt, g.ldp, keys, g.K, [&](int j) { return k + int64_t{j} * g.ldk; });
            loaded = (start + key) + b * p.L;
          }
          gemm_into(rows, round_up(keys, kLanes), g.K, RowMajorA{q, g.ldk}, DenseB{kt, g.ldp},
                    ReluSink{prob, g.ldp, g.scale, true, p.causal, row - key});
          add_values(b, start + key, start + row, rows, keys, key == 0);
        }
        if (!in_place<T>(g.V)) store_tokens(out(b, start + row), p.V, acc, g.ldv, rows, g.V, nullptr);
      }
    }
  }

  T* out(int64_t b, int64_t l) const { return static_cast<T*>(p.out) + (b * p.L + l) * p.V; }

  // out (+)= prob v
  void add_values(int64_t b, int64_t key, int64_t row, int rows, int keys, bool first) {
    const T* const from = row_of<T>(p.v, p.v_stride_b, p.v_stride_l, b, key);
    if constexpr (std::is_same_v<T, float>) {
      if (in_place<T>(g.V)) {
        float* const to = out(b, row);
        return gemm(rows, g.V, keys, prob, g.ldp, from, p.v_stride_l, first ? nullptr : to, to, p.V);
      }
    }
    for (int c = 0; c < g.V; c += g.columns) {
      const int width = std::min(g.columns, g.V - c);
      load_rows(v, g.columns, from + c, p.v_stride_l, keys, width);
      gemm(rows, round_up(width, kLanes), keys, prob, g.ldp, v, g.columns, first ? nullptr : acc + c, acc + c, g.ldv);
    }
  }
};

// dp = g vᵀ, as it leaves the registers: ds = 2 r dp / G in place of it, r² in place of r.
struct GradientSink {
  float *ds, *r;
  int64_t ld;
  float factor;  // 2 / G

  EFFVIT_INLINE void operator()(int i, int c, vf dp) const {
    const vf x = load(r + i * ld + c);
    store(ds + i * ld + c, x * dp * factor);
    store(r + i * ld + c, x * x);
  }
};

template <class T>
struct Backward {
  const Params& p;
  const Plan& g;
  float *kt, *k, *vt, *q, *go, *r, *ds, *dq, *dk, *dv;

  Backward(const Params& params, const Plan& plan, Scratch& s) : p(params), g(plan) {
    const int64_t keys = g.tile_keys, rows = g.block_rows;
    kt = s.take<float>(int64_t{g.K} * g.ldp);
    k = s.take<float>(keys * g.ldk);
    vt = s.take<float>(int64_t{g.V} * g.ldp);
    q = s.take<float>(rows * g.ldk);
    go = s.take<float>(rows * g.ldv);
    r = s.take<float>(rows * g.ldp);
    ds = s.take<float>(rows * g.ldp);
    dq = s.take<float>(g.group * g.ldk);
    dk = s.take<float>(keys * g.ldk);
    dv = s.take<float>(in_place<T>(g.V) ? kLanes * g.ldv : keys * g.ldv);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) group_of(unit / g.groups, unit % g.groups);
  }

  void group_of(int64_t b, int64_t group) {
    const int64_t n = g.tokens(p, group), start = g.first_token(group);
    for (int64_t key = 0; key < n; key += g.tile_keys) {
      const int keys = static_cast<int>(std::min<int64_t>(g.tile_keys, n - key));
      load_rows(k, g.ldk, row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, start + key), p.k_stride_l, keys, g.K);
      transpose_rows(kt, g.ldp, keys, g.K, [&](int j) { return k + int64_t{j} * g.ldk; });
      transpose_values(b, start + key, keys);
      bool first = true;
      for (int64_t row = p.causal ? key / g.block_rows * g.block_rows : 0; row < n; row += g.block_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(g.block_rows, n - row));
        block(b, start, row, rows, key, keys, first);
        first = false;
      }
      store_tokens(static_cast<T*>(p.dk) + (b * p.L + start + key) * p.K, p.K, dk, g.ldk, keys, g.K, nullptr);
      if (!in_place<T>(g.V)) store_tokens(dv_of(b, start + key), p.V, dv, g.ldv, keys, g.V, nullptr);
    }
    store_tokens(static_cast<T*>(p.dq) + (b * p.L + start) * p.K, p.K, dq, g.ldk, static_cast<int>(n), g.K, nullptr);
  }

  T* dv_of(int64_t b, int64_t l) const { return static_cast<T*>(p.dv) + (b * p.L + l) * p.V; }

  // vt [V, keys]; rows go through dv's scratch, which is not in use yet, where they are not read in place.
  void transpose_values(int64_t b, int64_t key, int keys) {
    const T* const from = row_of<T>(p.v, p.v_stride_b, p.v_stride_l, b, key);
    if constexpr (std::is_same_v<T, float>) {
      if (in_place<T>(g.V)) {
        return transpose_rows(vt, g.ldp, keys, g.V, [&](int j) { return from + j * p.v_stride_l; });
      }
    }
    load_rows(dv, g.ldv, from, p.v_stride_l, keys, g.V);
    transpose_rows(vt, g.ldp, keys, g.V, [&](int j) { return dv + int64_t{j} * g.ldv; });
  }

  void block(int64_t b, int64_t start, int64_t row, int rows, int64_t key, int keys, bool first) {
    const int padded = round_up(keys, kLanes);
    load_rows(q, g.ldk, row_of<T>(p.q, p.q_stride_b, p.q_stride_l, b, start + row), p.q_stride_l, rows, g.K);
    gemm_into(rows, padded, g.K, RowMajorA{q, g.ldk}, DenseB{kt, g.ldp},
              ReluSink{r, g.ldp, g.scale, false, p.causal, row - key});
    const T* const from = row_of<T>(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, b, start + row);
    const float* grad = go;
    int64_t ld = g.ldv;
    if constexpr (std::is_same_v<T, float>) {
      if (in_place<T>(g.V)) grad = from, ld = p.grad_out_stride_l;
    }
    if (grad == go) load_rows(go, g.ldv, from, p.grad_out_stride_l, rows, g.V);
    gemm_into(rows, padded, g.V, RowMajorA{grad, ld}, DenseB{vt, g.ldp}, GradientSink{ds, r, g.ldp, 2.f * g.scale});
    float* const dq_rows = dq + row * g.ldk;
    gemm(rows, g.Kp, keys, ds, g.ldp, k, g.ldk, key == 0 ? nullptr : dq_rows, dq_rows, g.ldk);
    gemm_transposed(keys, g.Kp, rows, ds, g.ldp, q, g.ldk, first ? nullptr : dk, dk, g.ldk);
    float* to = dv;
    int64_t ld_to = g.ldv;
    if constexpr (std::is_same_v<T, float>) {
      if (in_place<T>(g.V)) to = dv_of(b, start + key), ld_to = p.V;
    }
    gemm_transposed(keys, g.Vp, rows, r, g.ldp, grad, ld, first ? nullptr : to, to, ld_to);
  }
};

}  // namespace block_relu2_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

#include "block_relu2_attention_bf16.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace block_relu2_attention_impl {

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) {
  const Plan g(p, false);
  return p.B * g.groups * g.blocks;
}

void forward(const Params& p, float*, int64_t begin, int64_t end) {
  const Plan g(p, false);
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
  if (in_pairs(p)) return run_pass<Forward16>(p, g, begin, end);
#endif
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Forward<decltype(type)>>(p, g, begin, end); });
}

int64_t backward_units(const Params& p) { return p.B * Plan(p, true).groups; }

void backward(const Params& p, float*, int64_t begin, int64_t end) {
  const Plan g(p, true);
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
  if (in_pairs(p)) return run_pass<Backward16>(p, g, begin, end);
#endif
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Backward<decltype(type)>>(p, g, begin, end); });
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {{backward_units, backward}};

}  // namespace block_relu2_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<BlockRelu2AttentionParams>* EFFVIT_KERNEL_NAME(block_relu2_attention)() {
  namespace impl = EFFVIT_ISA_NAME::block_relu2_attention_impl;
  static constexpr Kernel<BlockRelu2AttentionParams> kernel = {routine(impl::kForward), routine(impl::kBackward)};
  return &kernel;
}
}  // namespace effvit::cpu
