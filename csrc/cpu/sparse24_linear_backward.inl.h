// sparse24_linear: gradients.
//
// dx = g W is a dense product: a unit is a chunk of rows times a range of K, and decompresses the block of W that it
// needs. Of g^T x only what is kept is computed: channels are the lanes, and the words of a group of x (of pairs of
// rows in bfloat16) are permuted by the positions as in the forward. A unit of it is a range of channels and of K and,
// where these are few, a share of the rows; the sums of the shares are added in order.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace sparse24_linear_impl {

// ---- dx -------------------------------------------------------------------------------------------------------------

struct PlanDx {
  int64_t rows, columns, m, k, depth;

  explicit PlanDx(const Params& p) {
    const bool small = small_tiles();
    rows = even(p.M, ceil_div(p.M, small ? 8 : 256), 1);
    columns = small ? 32 : 256;
    depth = small ? 32 : 256;
    m = ceil_div(p.M, rows);
    k = ceil_div(p.K, columns);
  }
};

// to = `n` channels of g's rows [row, row + rows), zeros up to ld.
template <class T>
void copy_g(Operand<T>* to, int64_t ld, const Params& p, int64_t row, int rows, int64_t first, int n) {
  const T* const g = static_cast<const T*>(p.grad_out);
  for (int r = 0; r < rows; ++r) {
    const T* const from = g + p.grad_out_rows(row + r) + first;
    Operand<T>* const line = to + r * ld;
    if constexpr (kBf16Products<T>) {
      std::memcpy(line, from, static_cast<size_t>(n) * 2);
      std::memset(line + n, 0, static_cast<size_t>(ld - n) * 2);
    } else {
      load_row(line, from, n);
    }
  }
}

template <class T>
class Dx {
 public:
  Dx(const Params& p, const PlanDx& plan, int rows, int columns, Scratch& scratch)
      : p_(p),
        rows_(rows),
        columns_(columns),
        padded_(round_up(columns, 32)),
        depth_(static_cast<int>(std::min(plan.depth, p.N))),
        ld_(round_up(depth_, 32) + 32),
        g_(scratch.take<Operand<T>>((rows + 15) / 16 * 16 * ld_)),
        w_(scratch.take<Operand<T>>(round_up(depth_, 32) * padded_)),
        sum_(scratch.take<float>((rows + 15) / 16 * 16 * padded_)),
        kept_(scratch.take<float>(padded_ + 2 * kLanes)),
        lines_(scratch.take<float>(2 * padded_)) {}

  void run(int64_t row, int64_t column) {
    [[maybe_unused]] ProductScope<T> scope;
    for (int64_t n = 0; n < p_.N; n += depth_) {
      const int depth = static_cast<int>(std::min<int64_t>(depth_, p_.N - n));
      copy_g<T>(g_, ld_, p_, row, rows_, n, depth);
      take_weights(n, depth, column);
      const float* const before = n > 0 ? sum_ : nullptr;
      if constexpr (kBf16Products<T>)
        gemm(rows_, padded_, depth, g_, ld_, w_, before, sum_, padded_);
      else
        gemm(rows_, padded_, depth, g_, ld_, w_, padded_, before, sum_, padded_);
    }
    T* const to = static_cast<T*>(p_.dx) + row * p_.K + column;
    for (int r = 0; r < rows_; ++r) store_row(to + r * p_.K, sum_ + r * padded_, columns_);
  }

 private:
  void take_weights(int64_t n, int depth, int64_t column) {
    if constexpr (kBf16Products<T>) {
      const int whole = round_up(depth, kDepth<T>);
      for (int i = 0; i < whole; i += 2) {
        for (int s = 0; s < 2; ++s) {
          if (i + s < depth)
            expand_line(lines_ + s * padded_, n + i + s, column);
          else
            zero(lines_ + s * padded_, padded_);
        }
        float* const to = reinterpret_cast<float*>(w_) + i / 2 * padded_;
        for (int c = 0; c < padded_; c += kLanes)
          store(to + c, (vf)join_pairs(load(lines_ + c), load(lines_ + padded_ + c)));
      }
    } else {
      for (int i = 0; i < depth; ++i) expand_line(w_ + i * padded_, n + i, column);
    }
  }
  void expand_line(float* to, int64_t n, int64_t column) {
    expand_row<T>(to, kept_, p_, n, column, columns_);
    for (int c = round_up(columns_, kLanes); c < padded_; c += kLanes) store(to + c, vf{});
  }

  const Params& p_;
  const int rows_, columns_, padded_, depth_;
  const int64_t ld_;
  Operand<T>*g_, *w_;
  float *sum_, *kept_, *lines_;
};

int64_t dx_units(const Params& p) {
  const PlanDx plan(p);
  return plan.m * plan.k;
}

void dx(const Params& p, float*, int64_t begin, int64_t end) {
  const PlanDx plan(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    using Pass = Dx<decltype(type)>;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / plan.k * plan.rows, column = unit % plan.k * plan.columns;
      const int rows = static_cast<int>(std::min(plan.rows, p.M - row));
      const int columns = static_cast<int>(std::min(plan.columns, p.K - column));
      Scratch count;
      Pass(p, plan, rows, columns, count);
      Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
      Pass(p, plan, rows, columns, scratch).run(row, column);
    }
  });
}

// ---- dvalues and dbias ----------------------------------------------------------------------------------------------

struct PlanDw {
  int64_t channels, columns, n, k;
  int64_t shares, rows;  // of the rows

  explicit PlanDw(const Params& p) {
    const bool small = small_tiles();
    channels = small ? 32 : 128;
    columns = small ? 32 : 256;
    n = ceil_div(p.N, channels);
    k = std::max<int64_t>(1, ceil_div(p.K, columns));
    const int64_t most = std::max<int64_t>(1, p.M / (small ? 8 : 512));
    shares = std::min(most, ceil_div(16, n * k));
    rows = even(p.M, shares, 2);
    shares = ceil_div(p.M, rows);
  }
  // What a unit's sums take: of the products, and of g.
  int64_t sums() const { return channels * columns; }
  int64_t words() const { return sums() + channels; }
};

// `columns` of rows [row, row + rows), as words: a step is a row, or, of bfloat16, two. [steps][width], or, where width
// is 0, tile by tile, [tile][steps][kLanes]. Zeros behind them.
template <class T>
EFFVIT_INLINE void take_columns(float* to, int width, const T* base, const RowPlaces& places, int64_t row, int rows,
                                int64_t first, int columns) {
  constexpr int kStep = kElementsOfWord<T>;
  const int steps = (rows + kStep - 1) / kStep, depth = round_up(rows, kDepth<T>) / kStep;
  const int64_t next = width ? kLanes : int64_t{depth} * kLanes;  // vector of the same step
  for (int s = 0; s < depth; ++s) {
    float* line = to + int64_t{s} * (width ? width : kLanes);
    if (s >= steps) {
      for (int c = 0; c < columns; c += kLanes, line += next) store(line, vf{});
      continue;
    }
    const T* const a = base + places(row + s * kStep) + first;
    if constexpr (kBf16Products<T>) {
      const bool two = kStep * s + 1 < rows;
      const T* const b = two ? base + places(row + s * kStep + 1) + first : a;
      int c = 0;
      for (; two && c + kLanes <= columns; c += kLanes, line += next) store(line, (vf)load_pairs(a + c, b + c));
      for (; c < columns; c += kLanes, line += next) {
        const vf low = load_lanes(a + c, columns - c), high = two ? load_lanes(b + c, columns - c) : vf{};
        store(line, (vf)join_pairs(low, high));
      }
    } else {
      for (int c = 0; c < columns; c += kLanes, line += next) store(line, load_lanes(a + c, columns - c));
    }
  }
}

// sums[group][2][kLanes] (+)= of g [steps][kLanes] and a tile of x, [steps][kLanes / 4 groups]; position: the first
// group's in the lowest bits.
template <class T>
EFFVIT_INLINE void add_kept(float* sums, const float* g, const float* x, int steps, vi position, bool first_time) {
  constexpr int kGroups = kLanes / 4;
  vf acc[kGroups][2];
  vi at[kGroups], second[kGroups];
#pragma GCC unroll 4
  for (int q = 0; q < kGroups; ++q) {
    acc[q][0] = acc[q][1] = vf{};
    at[q] = position >> (4 * q), second[q] = position >> (4 * q + 2);
  }
  for (int s = 0; s < steps; ++s) {
    const vf channels = load(g + s * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < kGroups; ++q) {
      const vf group = broadcast_four(x + s * kLanes + 4 * q);
#if defined(EFFVIT_HAS_BF16_PRODUCTS) && !defined(EFFVIT_HAS_TILES)
      if constexpr (kBf16Products<T>) {
        acc[q][0] = dot_pairs(permute_fours(group, at[q]), channels, acc[q][0]);
        acc[q][1] = dot_pairs(permute_fours(group, second[q]), channels, acc[q][1]);
        continue;
      }
#endif
      acc[q][0] = fma(permute_fours(group, at[q]), channels, acc[q][0]);
      acc[q][1] = fma(permute_fours(group, second[q]), channels, acc[q][1]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kGroups; ++q) {
    for (int i = 0; i < 2; ++i) {
      float* const to = sums + (2 * q + i) * kLanes;
      store(to, first_time ? acc[q][i] : load(to) + acc[q][i]);
    }
  }
}

// The sums of a unit: where kDense, [channels][columns]; else [tiles of kLanes columns][vectors of channels][groups][2]
// [kLanes]; behind them the sums of g.
template <class T>
class Dw {
 public:
  static constexpr int kRows = 2 * 64;  // of bfloat16 at once; as many steps in float32
  static_assert(kRows / 2 <= 64);
  Dw(const Params& p, const PlanDw& plan, Scratch& scratch)
      : p_(p),
        plan_(plan),
        g_(scratch.take<float>(kSteps * plan.channels)),
        x_(scratch.take<float>(kSteps * plan.columns)),
        positions_(scratch.take<float>(kDense<T> ? 0 : plan.channels * (plan.columns / 32))),
        own_(scratch.take<float>(plan.words())) {}

  float* own() const { return own_; }

  void add(float* sums, int64_t begin, int64_t end, int64_t n, int64_t k) {
    [[maybe_unused]] ProductScope<T> scope;
    const int channels = static_cast<int>(std::min(plan_.channels, p_.N - n));
    const int columns = static_cast<int>(std::min(plan_.columns, p_.K - k));
    if (kDense<T>)
      zero(sums, plan_.words());
    else
      zero(sums + plan_.sums(), plan_.channels);
    take_positions(n, k, channels);
    constexpr int kAtOnce = kBf16Tiles<T> ? kRows / 2 : kSteps * kElementsOfWord<T>;
    for (int64_t row = begin; row < end; row += kAtOnce) {
      const int rows = static_cast<int>(std::min<int64_t>(kAtOnce, end - row));
      const int steps = round_up(rows, kDepth<T>) / kElementsOfWord<T>;
      const int g_width = kDense<T> ? round_up(channels, kLanes) : 0;
      take_columns(g_, g_width, static_cast<const T*>(p_.grad_out), p_.grad_out_rows, row, rows, n, channels);
      if (k == 0 && p_.dbias) add_g(sums + plan_.sums(), steps, channels);
      if (columns == 0) continue;
      const int x_width = kDense<T> ? round_up(columns, kLanes) : 0;
      take_columns(x_, x_width, static_cast<const T*>(p_.x), p_.x_rows, row, rows, k, columns);
      if constexpr (kDense<T>)
        multiply(sums, rows, channels, g_width, x_width);
      else
        multiply_kept(sums, steps, channels, columns, row == begin);
    }
  }

  void finish(const float* sums, int64_t n, int64_t k) {
    const int channels = static_cast<int>(std::min(plan_.channels, p_.N - n));
    const int64_t columns = std::min(plan_.columns, p_.K - k), width = p_.K / 2;
    for (int i = 0; k == 0 && p_.dbias && i < channels; ++i)
      store_scalar(p_.dbias, p_.bias_dtype, n + i, sums[plan_.sums() + i]);
    T* const to = static_cast<T*>(p_.dvalues) + n * width + k / 2;
    if constexpr (kDense<T>) {
      for (int i = 0; i < channels; ++i) {
        const uint8_t* const meta = p_.meta + (n + i) * p_.meta_stride_n;
        for (int64_t q = 0; q < columns / 4; ++q) {
          const int nibble = meta[(k / 8 + q / 2) * p_.meta_stride_k] >> (q % 2 * 4);
          const float* const group = sums + i * plan_.columns + 4 * q;
          to[i * width + 2 * q] = from_float<T>(group[nibble & 3]);
          to[i * width + 2 * q + 1] = from_float<T>(group[nibble >> 2 & 3]);
        }
      }
    } else {
      const int64_t vectors = plan_.channels / kLanes, of_tile = vectors * kLanes / 2 * kLanes;
      for (int j = 0; j < channels; j += kLanes) {
        for (int64_t v = 0; v < columns / 2; v += kLanes) {  // the values of two tiles
          vf r[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            const int64_t tile = 2 * v / kLanes + 2 * i / kLanes;
            r[i] = load(sums + tile * of_tile + (j / kLanes * (kLanes / 2) + i % (kLanes / 2)) * kLanes);
          }
          transpose_block(r);
          const int left = static_cast<int>(std::min<int64_t>(columns / 2 - v, kLanes));
          for (int i = 0; i < kLanes && j + i < channels; ++i) store_lanes(to + (j + i) * width + v, r[i], left);
        }
      }
    }
  }

 private:
  static constexpr int kSteps = kRows;

  void add_g(float* sums, int steps, int channels) {
    const int64_t next = kDense<T> ? round_up(channels, kLanes) : kLanes;
    for (int c = 0; c < channels; c += kLanes) {
      const float* const from = g_ + (kDense<T> ? c : int64_t{c} * steps);
      vf sum{};
      for (int s = 0; s < steps; ++s) {
        const vf g = load(from + s * next);
        if constexpr (kBf16Products<T>)
          sum += (vf)((vi)g << 16) + (vf)((vi)g & (vi{} - 65536));
        else
          sum += g;
      }
      store(sums + c, load(sums + c) + sum);
    }
  }

  void multiply(float* sums, int rows, int channels, int g_width, int x_width) {
    const auto* const g = reinterpret_cast<const Operand<T>*>(g_);
    const auto* const x = reinterpret_cast<const Operand<T>*>(x_);
    if constexpr (kBf16Products<T>)
      gemm_transposed(g_width, x_width, rows, g, x, sums, sums, plan_.columns);
    else
      gemm_transposed(channels, x_width, rows, g, g_width, x, x_width, sums, sums, plan_.columns);
  }

  void multiply_kept(float* sums, int steps, int channels, int columns, bool first_time) {
    constexpr int kFloats = kLanes / 2 * kLanes;
    const int64_t words = plan_.columns / 32;
    for (int c = 0; c < columns; c += kLanes) {
      for (int j = 0; j < channels; j += kLanes) {
        const vi at = (vi)load(positions_ + (j / kLanes * words + c / 32) * kLanes) >> (c % 32);
        add_kept<T>(sums + (c / kLanes * (plan_.channels / kLanes) + j / kLanes) * kFloats, g_ + j * steps,
                    x_ + c * steps, steps, at, first_time);
      }
    }
  }

  // Positions of the unit's columns, [channels / kLanes][columns / 32][kLanes] words.
  void take_positions(int64_t n, int64_t k, int channels) {
    if constexpr (!kDense<T>) {
      PositionWords w(p_);
      w.data += k / 8 * w.stride_k;
      w.elements = std::min(w.elements - k / 8, plan_.columns / 8);
      w.count = std::min(w.count - k / 32, plan_.columns / 32);
      for (int j = 0; j < channels; j += kLanes)
        transpose_channels(positions_ + j * (plan_.columns / 32), w, n + j, p_.N);
    }
  }

  const Params& p_;
  const PlanDw& plan_;
  float *g_, *x_, *positions_, *own_;
};

int64_t dw_units(const Params& p) {
  const PlanDw plan(p);
  return plan.n * plan.k * plan.shares;
}

int64_t backward_workspace(const Params& p) {
  const PlanDw plan(p);
  return plan.shares > 1 ? dw_units(p) * plan.words() : 0;
}

template <class F>
void with_dw(const Params& p, const PlanDw& plan, const F& f) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using Pass = Dw<decltype(type)>;
    Scratch count;
    Pass(p, plan, count);
    Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
    f(Pass(p, plan, scratch));
  });
}

void dw(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const PlanDw plan(p);
  with_dw(p, plan, [&](auto pass) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / plan.shares, share = unit % plan.shares;
      const int64_t n = block / plan.k * plan.channels, k = block % plan.k * plan.columns;
      float* const sums = plan.shares > 1 ? workspace + unit * plan.words() : pass.own();
      pass.add(sums, share * plan.rows, std::min((share + 1) * plan.rows, p.M), n, k);
      if (plan.shares == 1) pass.finish(sums, n, k);
    }
  });
}

int64_t reduce_units(const Params& p) {
  const PlanDw plan(p);
  return plan.shares > 1 ? plan.n * plan.k : 0;
}

void reduce(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const PlanDw plan(p);
  with_dw(p, plan, [&](auto pass) {
    for (int64_t block = begin; block < end; ++block) {
      float* const sums = workspace + block * plan.shares * plan.words();
      for (int64_t share = 1; share < plan.shares; ++share) {
        const float* const other = sums + share * plan.words();
        for (int64_t i = 0; i < plan.words(); i += kLanes) store(sums + i, load(sums + i) + load(other + i));
      }
      pass.finish(sums, block / plan.k * plan.channels, block % plan.k * plan.columns);
    }
  });
}

constexpr Step<Params> kBackward[] = {{dx_units, dx}, {dw_units, dw}, {reduce_units, reduce}};

}  // namespace sparse24_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
