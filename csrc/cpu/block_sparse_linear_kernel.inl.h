// block_sparse_linear on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// Forward: blocks are packed with output channels along lanes, x is packed tile by tile, [K][rows of the tile], and a
// tile of rows by one block of channels is summed in registers over all blocks of its row of blocks. Where there are
// dot products of bfloat16 (kBf16Products), words are pairs; AMX has tiles. Bias, residual and activation follow in a
// tile in the L1 cache. Backward: g, the gradient of the sum, is grad_out or, where there is an activation, made by
// another forward product and kept. dx is the same product with the blocks of each column of blocks. dvalues are
// products of panels of g and x, of the blocks that are there only; rows are split by the shape alone and the parts are
// added in order.
#pragma once

#include "block_sparse_products.inl.h"
#include "int8_epilogue.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace block_sparse_linear_impl {

using namespace block_sparse_impl;
using int8_impl::activate;
using Params = BlockSparseLinearParams;

bool pairs(const Params& p) { return kBf16Products<BFloat16> && p.dtype == DType::kBFloat16; }

bool tiled(const Params& p) { return kBf16Tiles<BFloat16> && pairs(p) && p.M > kFewRows; }

// Calls f with the size of a block and whether words are pairs, as constants.
template <class F>
EFFVIT_INLINE void dispatch(const Params& p, const F& f) {
  const std::integral_constant<int, 16> small;
  const std::integral_constant<int, 32> large;
  if constexpr (kBf16Products<BFloat16>) {
    if (pairs(p)) return p.B == 16 ? f(small, std::true_type{}) : f(large, std::true_type{});
  }
  p.B == 16 ? f(small, std::false_type{}) : f(large, std::false_type{});
}

// What the workspace holds, in floats; what a routine has no use for is empty.
struct Layout {
  int64_t columns_start, column_rows, column_places;  // blocks by columns of blocks
  int64_t forward, backward, g, dvalues, dbias, size;
  int64_t splits;  // of rows, for dvalues and dbias

  Layout(const Params& p, bool gradients) {
    const int64_t blocks = p.Z * p.B * p.B, packed = tiled(p) ? p.Z * (p.B * 16) : pairs(p) ? blocks / 2 : blocks;
    const bool active = gradients && p.activation != Activation::kNone;
    splits = std::min<int64_t>(8, std::max<int64_t>(1, p.M / (small_tiles() ? 8 : 1024)));
    int64_t at = 0;
    const auto take = [&](bool needed, int64_t floats) {
      const int64_t here = at;
      if (needed) at += (floats + 15) / 16 * 16;
      return here;
    };
    columns_start = take(gradients, p.K / p.B + 1);
    column_rows = take(gradients, p.Z);
    column_places = take(gradients, p.Z);
    forward = take(!gradients || active, packed);
    backward = take(gradients, packed);
    g = take(active, pairs(p) ? (p.M * p.N + 1) / 2 : p.M * p.N);
    dvalues = take(gradients, splits * blocks);
    dbias = take(gradients && p.dbias, splits * p.N);
    size = at;
  }
};

int64_t forward_workspace(const Params& p) { return Layout(p, false).size; }
int64_t backward_workspace(const Params& p) { return Layout(p, true).size; }

// ---- packing --------------------------------------------------------------------------------------------------------

template <bool kTransposed>
void pack_blocks(const Params& p, float* to, int64_t begin, int64_t end) {
  const bool tiles = tiled(p);
  dispatch(p, [&](auto size, auto paired) {
    constexpr int kSize = decltype(size)::value;
    constexpr bool kPairs = decltype(paired)::value;
    const auto all = [&](auto type) {
      using T = decltype(type);
      for (int64_t z = begin; z < end; ++z) {
        constexpr int kFloats = kPairs ? kSize * kSize / 2 : kSize * kSize;
        alignas(64) float some[kFloats];
        float* const block = tiles ? some : to + z * kFloats;
        const T* const from = static_cast<const T*>(p.values) + z * p.values_stride_z;
        if constexpr (kTransposed)
          pack_block<T, kPairs, kSize>(block, from, p.values_stride_i);
        else
          copy_block<T, kPairs, kSize>(block, from, p.values_stride_i);
        if (tiles) pack_tiles<kSize>(to + z * kTileWords<kSize>, block, kFloats / kSize);
      }
    };
    if constexpr (kPairs)
      all(BFloat16{});
    else
      dispatch_dtype(p.dtype, all);
  });
}

int64_t pack_units(const Params& p) { return p.Z; }

void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  pack_blocks<true>(p, workspace + Layout(p, false).forward, begin, end);
}

// ---- forward --------------------------------------------------------------------------------------------------------

EFFVIT_INLINE vf load_as(const void* p, DType type, int64_t at) {
  switch (type) {
    case DType::kFloat32:
      return load(static_cast<const float*>(p) + at);
    case DType::kBFloat16:
      return load(static_cast<const BFloat16*>(p) + at);
    default:
      return load(static_cast<const Float16*>(p) + at);
  }
}
EFFVIT_INLINE void store_as(void* p, DType type, int64_t at, vf x) {
  switch (type) {
    case DType::kFloat32:
      return store(static_cast<float*>(p) + at, x);
    case DType::kBFloat16:
      return store(static_cast<BFloat16*>(p) + at, x);
    default:
      return store(static_cast<Float16*>(p) + at, x);
  }
}

Source residual_of(const Params& p) { return {p.residual, p.residual_dtype, &p.rows, p.residual_stride}; }

// The sum with bias and residual, of a vector.
EFFVIT_INLINE vf sum_at(const Params& p, const float* acc, vf bias, int64_t residual) {
  const vf y = load(acc) + bias;
  return p.residual ? y + load_as(p.residual, p.residual_dtype, residual) : y;
}
EFFVIT_INLINE vf bias_at(const Params& p, int64_t column) {
  return p.bias ? load_as(p.bias, p.bias_dtype, column) : vf{};
}

// Where sums of a tile go: rows [row, row + rows), columns from `column` on, acc[rows][B].
using Finish = void (*)(const void* context, const float* acc, int64_t row, int rows, int64_t column);

struct Sink {
  Finish finish;
  const void* context;
  EFFVIT_INLINE void columns(int64_t) {}
  EFFVIT_INLINE void operator()(const float* acc, int64_t row, int rows, int64_t column) const {
    finish(context, acc, row, rows, column);
  }
};

template <class T, Activation kAct>
void finish_forward(const void* context, const float* acc, int64_t row, int rows, int64_t column) {
  const Params p = *static_cast<const Params*>(context);
  const Source residual = residual_of(p);
  for (int c = 0; c < p.B; c += kLanes) {
    const vf bias = bias_at(p, column + c);
    for (int r = 0; r < rows; ++r) {
      const int64_t at = p.residual ? residual.offset(row + r) + column + c : 0;
      const vf y = sum_at(p, acc + r * p.B + c, bias, at);
      store(static_cast<T*>(p.out) + (row + r) * p.N + column + c, activate<kAct>(y));
    }
  }
}

template <class F>
EFFVIT_INLINE void dispatch_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    default:
      return f(std::integral_constant<Activation, Activation::kNone>{});
  }
}

// x times the weight's transpose.
Product forward_product(const Params& p, const float* packed) {
  return {{p.x, p.dtype, &p.rows, p.x_stride}, p.M, p.K, p.N / p.B, packed, p.crow, p.columns, nullptr, nullptr};
}
// In the part of the weight that is there: products for one row of the result.
int64_t products(const Params& p) { return p.Z * p.B * p.B; }
// For x of `width`.
Chunks chunks_of(const Params& p, int64_t rows_of_blocks, int64_t width) {
  if (tiled(p)) return {p.M, rows_of_blocks, width / p.B * 16, products(p) / 8, kTileRows};
  return {p.M, rows_of_blocks, width, products(p), p.B == 16 ? kTile<16> : kTile<32>};
}
Chunks forward_chunks(const Params& p) { return chunks_of(p, p.N / p.B, p.K); }

int64_t forward_units(const Params& p) {
  const Chunks chunks = forward_chunks(p);
  return chunks.m * chunks.n;
}

void run(const Params& p, const Product& product, const Chunks& chunks, int64_t begin, int64_t end, Sink sink) {
#if defined(EFFVIT_HAS_TILES)
  if (tiled(p)) {
    p.B == 16 ? run_tiles<BFloat16, 16>(product, chunks, begin, end, sink)
              : run_tiles<BFloat16, 32>(product, chunks, begin, end, sink);
    return;
  }
#endif
  dispatch(p, [&](auto size, auto paired) {
    constexpr Kind kKind = decltype(paired)::value ? Kind::kPairs : Kind::kFloat;
    run_product<size, kKind>(product, chunks, begin, end, sink);
  });
}

void forward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  Finish finish = nullptr;
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_activation(p.activation, [&](auto act) { finish = finish_forward<decltype(type), act>; });
  });
  const Product product = forward_product(p, workspace + Layout(p, false).forward);
  run(p, product, forward_chunks(p), begin, end, {finish, &p});
}

// ---- backward -------------------------------------------------------------------------------------------------------

bool active(const Params& p) { return p.activation != Activation::kNone; }
int32_t* integers(float* workspace, int64_t at) { return reinterpret_cast<int32_t*>(workspace + at); }

// The blocks by columns of blocks.
int64_t sort_units(const Params&) { return 1; }

void sort(const Params& p, float* workspace, int64_t, int64_t) {
  const Layout l(p, true);
  const int64_t down = p.N / p.B, across = p.K / p.B;
  int32_t* const starts = integers(workspace, l.columns_start);
  int32_t* const rows = integers(workspace, l.column_rows);
  int32_t* const places = integers(workspace, l.column_places);
  for (int64_t c = 0; c <= across; ++c) starts[c] = 0;
  for (int64_t z = 0; z < p.Z; ++z) ++starts[p.columns[z] + 1];
  for (int64_t c = 0; c < across; ++c) starts[c + 1] += starts[c];
  for (int64_t r = 0; r < down; ++r) {
    for (int32_t z = p.crow[r]; z < p.crow[r + 1]; ++z) {
      const int32_t at = starts[p.columns[z]]++;
      rows[at] = static_cast<int32_t>(r), places[at] = z;
    }
  }
  for (int64_t c = across; c > 0; --c) starts[c] = starts[c - 1];
  starts[0] = 0;
}

void pack_both(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Layout l(p, true);
  if (active(p)) pack_blocks<true>(p, workspace + l.forward, begin, end);
  pack_blocks<false>(p, workspace + l.backward, begin, end);
}

template <Activation kAct>
EFFVIT_INLINE vf derivative(vf y) {
  if constexpr (kAct == Activation::kRelu) {
    return (vf)((vi)set1(1.f) & (y > vf{}));
  } else if constexpr (kAct == Activation::kGelu) {
    vf density;
    const vf cdf = int8_impl::normal_cdf(y, &density);
    return fma(y, density, cdf);
  } else {
    const vf s = 1.f / (1.f + exp_full(-y));
    return s * fma(y, 1.f - s, set1(1.f));
  }
}

struct GradientContext {
  Params p;
  void* g;
};

// g and dresidual.
template <class T, Activation kAct>
void finish_gradient(const void* context, const float* acc, int64_t row, int rows, int64_t column) {
  const GradientContext& c = *static_cast<const GradientContext*>(context);
  const Params p = c.p;
  Operand<T>* const g = static_cast<Operand<T>*>(c.g);
  const Source residual = residual_of(p), grad = {p.grad_out, p.dtype, &p.rows, p.grad_out_stride};
  for (int i = 0; i < p.B; i += kLanes) {
    const vf bias = bias_at(p, column + i);
    for (int r = 0; r < rows; ++r) {
      const int64_t at = p.residual ? residual.offset(row + r) + column + i : 0;
      const vf y = sum_at(p, acc + r * p.B + i, bias, at);
      const vf x = derivative<kAct>(y) * load(grad.row<T>(row + r) + column + i);
      store(g + (row + r) * p.N + column + i, x);
      if (p.dresidual) store_as(p.dresidual, p.residual_dtype, (row + r) * p.N + column + i, x);
    }
  }
}

int64_t gradient_units(const Params& p) { return active(p) ? forward_units(p) : p.dresidual ? p.M : 0; }

void gradient(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Layout l(p, true);
  if (!active(p)) {  // dresidual is grad_out
    const Source grad = {p.grad_out, p.dtype, &p.rows, p.grad_out_stride};
    dispatch_dtype(p.dtype, [&](auto type) {
      for (int64_t m = begin; m < end; ++m) {
        const auto* const from = grad.row<decltype(type)>(m);
        for (int64_t n = 0; n < p.N; n += kLanes) store_as(p.dresidual, p.residual_dtype, m * p.N + n, load(from + n));
      }
    });
    return;
  }
  Finish finish = nullptr;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    finish = p.activation == Activation::kRelu   ? finish_gradient<T, Activation::kRelu>
             : p.activation == Activation::kGelu ? finish_gradient<T, Activation::kGelu>
                                                 : finish_gradient<T, Activation::kSilu>;
  });
  const GradientContext context = {p, workspace + l.g};
  run(p, forward_product(p, workspace + l.forward), forward_chunks(p), begin, end, {finish, &context});
}

// g [M, N] as products take it.
struct Gradient {
  LeadingRows rows;
  int64_t stride[1];
  Source source;

  Gradient(const Params& p, float* workspace, const Layout& l) : stride{p.N} {
    rows.size[0] = p.M, rows.dims = 1;
    const DType kept = pairs(p) ? DType::kBFloat16 : DType::kFloat32;
    source = active(p) ? Source{workspace + l.g, kept, &rows, stride}
                       : Source{p.grad_out, p.dtype, &p.rows, p.grad_out_stride};
  }
};

template <class T>
void finish_dx(const void* context, const float* acc, int64_t row, int rows, int64_t column) {
  const Params& p = *static_cast<const Params*>(context);
  const int64_t K = p.K, B = p.B;
  T* const to = static_cast<T*>(p.dx) + row * K + column;
  for (int r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < B; c += kLanes) store(to + r * K + c, load(acc + r * B + c));
  }
}

Chunks dx_chunks(const Params& p) { return chunks_of(p, p.K / p.B, p.N); }

int64_t dx_units(const Params& p) {
  if (p.K == 0) return 0;
  const Chunks chunks = dx_chunks(p);
  return chunks.m * chunks.n;
}

void dx(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Layout l(p, true);
  const Gradient g(p, workspace, l);
  Finish finish = nullptr;
  dispatch_dtype(p.dtype, [&](auto type) { finish = finish_dx<decltype(type)>; });
  const Product product = {g.source,
                           p.M,
                           p.N,
                           p.K / p.B,
                           workspace + l.backward,
                           integers(workspace, l.columns_start),
                           integers(workspace, l.column_rows),
                           integers(workspace, l.column_places),
                           nullptr};
  run(p, product, dx_chunks(p), begin, end, {finish, &p});
}

// Rows of blocks go in ranges, each with every split of the rows. Every unit makes panels of all of x: what has 12 rows
// of blocks to share them gains from no more.
int64_t ranges(const Params& p) {
  const int64_t down = p.N / p.B;
  return std::min(down, std::min<int64_t>(8, std::max<int64_t>(4, down / 12)));
}

// Rows of a panel: as many as leave those of x in the L2 cache.
constexpr int kMostPanelRows = 256;
int panel_rows(const Params& p, int64_t rows) {
  const int64_t bytes = p.K * (pairs(p) ? 2 : 4);
  int64_t most = std::min<int64_t>(kMostPanelRows, std::max<int64_t>(64, (512 << 10) / std::max<int64_t>(bytes, 1)));
  if (kBf16Tiles<BFloat16> && pairs(p)) most = 64;  // of gemm_transposed
  if (small_tiles()) most = 16;
  return static_cast<int>(ceil_div(ceil_div(rows, ceil_div(rows, most)), 2) * 2);
}

int64_t weight_units(const Params& p) { return p.Z || p.dbias ? ranges(p) * Layout(p, true).splits : 0; }

// to[rows][B], or in pairs of rows: what gemm_transposed takes.
template <class T, bool kPairs>
EFFVIT_INLINE void pack_panel(Operand<T>* to, const T* const* from, int64_t column, int rows, int B) {
  if constexpr (kPairs) {
    pack_rows(to, 2 * B, rows, B, [&](int i) { return from[i] + column; });
  } else {
    for (int i = 0; i < rows; ++i) {
      for (int c = 0; c < B; c += kLanes) store(to + i * B + c, load(from[i] + column + c));
    }
  }
}

// dvalues and dbias of a range of rows of blocks, from rows [first, last).
template <class X, class G, bool kPairs>
void weight_range(const Params& p, const Source& g, int64_t first, int64_t last, int64_t top, int64_t bottom,
                  float* dvalues, float* dbias) {
  const int B = p.B, step = panel_rows(p, last - first);
  const int64_t across = p.K / B, panel = int64_t{round_up(step, kBf16Products<X> ? 32 : 1)} * B;
  Scratch count;
  count.take<Operand<X>>(panel * (across + 1));
  Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
  Operand<X>* const x = scratch.take<Operand<X>>(panel * (across + 1));
  Operand<X>* const gp = x + panel * across;
  [[maybe_unused]] const ProductScope<X> scope;
  const Source source = {p.x, p.dtype, &p.rows, p.x_stride};
  for (int64_t row = first; row < last; row += step) {
    const int rows = static_cast<int>(std::min<int64_t>(step, last - row));
    const X* x_rows[kMostPanelRows];
    const G* g_rows[kMostPanelRows];
    for (int r = 0; r < rows; ++r) x_rows[r] = source.row<X>(row + r), g_rows[r] = g.row<G>(row + r);
    for (int64_t c = 0; c < across; ++c) pack_panel<X, kPairs>(x + c * panel, x_rows, c * B, rows, B);
    for (int64_t b = top; b < bottom; ++b) {
      if (dbias) {
        for (int c = 0; c < B; c += kLanes) {
          vf sum{};
          for (int r = 0; r < rows; ++r) sum += load(g_rows[r] + b * B + c);
          float* const to = dbias + b * B + c;
          store(to, row > first ? load(to) + sum : sum);
        }
      }
      if (p.crow[b] == p.crow[b + 1]) continue;
      pack_panel<G, kPairs>(gp, g_rows, b * B, rows, B);
      for (int64_t z = p.crow[b]; z < p.crow[b + 1]; ++z) {
        float* const to = dvalues + z * B * B;
        const float* const add = row > first ? to : nullptr;
        const Operand<X>* const xp = x + p.columns[z] * panel;
        if constexpr (kBf16Tiles<X>) {
          gemm_transposed(B, B, rows, gp, xp, add, to, B);
        } else {
          constexpr Kind kKind = kPairs ? Kind::kPairs : Kind::kFloat;
          const int words = kPairs ? (rows + 1) / 2 : rows;
          const float *const a = reinterpret_cast<const float*>(gp), *const b_ = reinterpret_cast<const float*>(xp);
          B == 16 ? multiply_panels<16, kKind>(words, a, b_, add, to)
                  : multiply_panels<32, kKind>(words, a, b_, add, to);
        }
      }
    }
  }
}

// Calls f with the types of x and g, and whether their panels are pairs.
template <class F>
EFFVIT_INLINE void dispatch_types(const Params& p, const F& f) {
  const std::false_type words;
  if (p.dtype == DType::kFloat32) {
    f(float{}, float{}, words);
  } else if (p.dtype == DType::kFloat16) {
    active(p) ? f(Float16{}, float{}, words) : f(Float16{}, Float16{}, words);
  } else if constexpr (kBf16Products<BFloat16>) {
    f(BFloat16{}, BFloat16{}, std::true_type{});
  } else {
    active(p) ? f(BFloat16{}, float{}, words) : f(BFloat16{}, BFloat16{}, words);
  }
}

// Whether dvalues are written where they belong at once.
bool direct(const Params& p, const Layout& l) { return l.splits == 1 && p.dtype == DType::kFloat32; }

void weights(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Layout l(p, true);
  const Gradient g(p, workspace, l);
  const int64_t down = p.N / p.B, n = ranges(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t split = unit / n, range = unit % n;
    const int64_t first = p.M * split / l.splits, last = p.M * (split + 1) / l.splits;
    const int64_t top = down * range / n, bottom = down * (range + 1) / n;
    float* const dvalues =
        direct(p, l) ? static_cast<float*>(p.dvalues) : workspace + l.dvalues + split * p.Z * p.B * p.B;
    float* const dbias = p.dbias ? workspace + l.dbias + split * p.N : nullptr;
    dispatch_types(p, [&](auto x_type, auto g_type, auto paired) {
      weight_range<decltype(x_type), decltype(g_type), decltype(paired)::value>(p, g.source, first, last, top, bottom,
                                                                                dvalues, dbias);
    });
  }
}

// Blocks, then the bias.
int64_t reduce_units(const Params& p) { return (direct(p, Layout(p, true)) ? 0 : p.Z) + (p.dbias ? 1 : 0); }

void reduce(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Layout l(p, true);
  const int64_t size = p.B * p.B, blocks = direct(p, l) ? 0 : p.Z;
  const auto add = [&](void* to, DType type, int64_t at, const float* parts, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; i += kLanes) {
      vf sum = load(parts + i);
      for (int64_t s = 1; s < l.splits; ++s) sum += load(parts + s * stride + i);
      store_as(to, type, at + i, sum);
    }
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit < blocks)
      add(p.dvalues, p.dtype, unit * size, workspace + l.dvalues + unit * size, size, p.Z * size);
    else
      add(p.dbias, p.bias_dtype, 0, workspace + l.dbias, p.N, p.N);
  }
}

constexpr Step<Params> kForward[] = {{pack_units, pack}, {forward_units, forward}};
constexpr Step<Params> kBackward[] = {{sort_units, sort}, {pack_units, pack_both}, {gradient_units, gradient},
                                      {dx_units, dx},     {weight_units, weights}, {reduce_units, reduce}};

}  // namespace block_sparse_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<BlockSparseLinearParams>* EFFVIT_KERNEL_NAME(block_sparse_linear)() {
  namespace impl = EFFVIT_ISA_NAME::block_sparse_linear_impl;
  static constexpr Kernel<BlockSparseLinearParams> kernel = {routine(impl::kForward, impl::forward_workspace),
                                                             routine(impl::kBackward, impl::backward_workspace)};
  return &kernel;
}
}  // namespace effvit::cpu
