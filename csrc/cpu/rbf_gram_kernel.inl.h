// rbf_gram on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// Forward: a unit is a block of queries of one head. The keys are transposed into scratch once per head and thread; the
// product q·k leaves the registers as exp(-gamma (|q|² + |k|² - 2 q·k)), and nothing else is written.
// Backward, with P = grad_out * out: dq = -2 gamma (rowsum(P) q - P k) and dk = -2 gamma (colsum(P) k - Pᵀ q). P is
// formed a block of rows at a time. Keys go in tiles, so the scratch of a thread stays below 2 MiB.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace rbf_gram_impl {

using Params = RbfGramParams;

constexpr int64_t kUnits = 64, kMaxSplits = 32;
constexpr int64_t kPartialBytes = 1 << 20;  // what the splits of all heads may write at most

struct Geometry {
  int max_keys = 256;  // of a tile
  int block_rows = 48;  // queries at once; a multiple of the rows of a register tile
  int64_t unit_rows, min_split_rows = 64;
  int D, Dp;  // head dim, and rounded up to whole vectors
  int ldd;  // row stride of queries and keys
  int tile_keys, tiles;
  int ldk;  // row stride of what has a column per key
  int64_t chunks;  // units of one head in forward
  int64_t splits;  // units of one head in backward

  explicit Geometry(const Params& p) {
    const bool small = small_tiles();
    if (small) max_keys = 24, block_rows = 12, min_split_rows = 8;
    unit_rows = 4 * block_rows;
    D = static_cast<int>(p.D);
    Dp = round_up(D, kLanes);
    ldd = Dp % 128 == 0 ? Dp + 16 : Dp;  // rows a multiple of 512 bytes apart would share few sets of the cache
    tile_keys = static_cast<int>(std::min<int64_t>(p.M, max_keys));
    tiles = static_cast<int>((p.M + max_keys - 1) / max_keys);
    ldk = round_up(tile_keys, kLanes) + 16;
    chunks = (p.L + unit_rows - 1) / unit_rows;
    // As many splits as give every head its share of kUnits, of rows enough to outweigh the sum over the splits.
    const int64_t heads = p.B * p.H, rows = std::max(min_split_rows, small ? 0 : p.M);
    const int64_t fit = kPartialBytes / (heads * p.M * round_up(D, 16) * 4);
    splits = std::max<int64_t>(1, std::min({kMaxSplits, (kUnits + heads - 1) / heads, p.L / rows, fit}));
  }
};

// n rows of a head of q or k, in float32, zeros from D to Dp.
template <class T>
EFFVIT_INLINE void load_rows(float* to, const Geometry& g, const void* base, int64_t offset, int64_t stride, int n) {
  const T* from = static_cast<const T*>(base) + offset;
  load_tokens(to, g.ldd, n, g.D, [&](int i) { return from + i * stride; });
}

EFFVIT_INLINE int keys_of_tile(const Params& p, const Geometry& g, int tile) {
  return static_cast<int>(std::min<int64_t>(g.max_keys, p.M - int64_t{tile} * g.max_keys));
}

template <class T>
EFFVIT_INLINE void load_keys(float* to, const Params& p, const Geometry& g, int64_t head, int tile) {
  const int64_t b = head / p.H, h = head % p.H, j = int64_t{tile} * g.max_keys;
  load_rows<T>(to, g, p.k, b * p.k_stride_b + h * p.k_stride_h + j * p.k_stride_l, p.k_stride_l,
               keys_of_tile(p, g, tile));
}

template <class T>
EFFVIT_INLINE void load_queries(float* to, const Params& p, const Geometry& g, int64_t head, int64_t row, int rows) {
  const int64_t b = head / p.H, h = head % p.H;
  load_rows<T>(to, g, p.q, b * p.q_stride_b + h * p.q_stride_h + row * p.q_stride_l, p.q_stride_l, rows);
}

// ---- forward -------------------------------------------------------------------------------------------------------

// Turns products into elements of the Gram matrix, and writes them.
template <class T>
struct GramSink {
  T* out;  // [rows, M], of the first row and key
  int64_t ld;
  int keys;
  const float* q_norm;
  const float* k_norm;
  float factor;  // -gamma

  EFFVIT_INLINE void operator()(int r, int c, vf product) const {
    const vf distance = fma(product, set1(-2.f), set1(q_norm[r]) + load(k_norm + c));
    const vf x = exp(max(vf{}, distance) * factor);  // in this order max keeps a NaN
    store_lanes(out + r * ld + c, x, keys - c);
  }
};

template <class T>
void forward_units_of(const Params& p, int64_t begin, int64_t end) {
  const Geometry g(p);
  const int64_t floats = int64_t{g.ldk} * (g.D + 1) + int64_t{g.tile_keys + g.block_rows} * g.ldd + g.block_rows;
  float* const kt = static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * sizeof(float)));
  float* const k_norm = kt + int64_t{g.ldk} * g.D;
  float* const k = k_norm + g.ldk;
  float* const q = k + int64_t{g.tile_keys} * g.ldd;
  float* const q_norm = q + int64_t{g.block_rows} * g.ldd;

  int64_t loaded = -1;  // which head and tile kt holds
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / g.chunks, first = unit % g.chunks * g.unit_rows,
                  last = std::min(first + g.unit_rows, p.L);
    for (int tile = 0; tile < g.tiles; ++tile) {
      const int keys = keys_of_tile(p, g, tile), padded = round_up(keys, kLanes);
      if (loaded != head * g.tiles + tile) {
        load_keys<T>(k, p, g, head, tile);
        store(k_norm + padded - kLanes, vf{});
        for (int j = 0; j < keys; ++j) k_norm[j] = dot(k + int64_t{j} * g.ldd, k + int64_t{j} * g.ldd, g.Dp);
        transpose_rows(kt, g.ldk, keys, g.D, [&](int j) { return k + int64_t{j} * g.ldd; });
        loaded = head * g.tiles + tile;
      }
      for (int64_t row = first; row < last; row += g.block_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(g.block_rows, last - row));
        load_queries<T>(q, p, g, head, row, rows);
        for (int i = 0; i < rows; ++i) q_norm[i] = dot(q + int64_t{i} * g.ldd, q + int64_t{i} * g.ldd, g.Dp);
        T* const out = static_cast<T*>(p.out) + (head * p.L + row) * p.M + int64_t{tile} * g.max_keys;
        gemm_into(rows, padded, g.D, RowMajorA{q, g.ldd}, DenseB{kt, g.ldk},
                  GramSink<T>{out, p.M, keys, q_norm, k_norm, -p.gamma});
      }
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// P[i] = grad[i] * out[i], zeros up to whole vectors; adds P to column_sum and returns the sum of the row.
template <class T>
EFFVIT_INLINE float load_product(float* to, const T* grad, const T* out, int n, float* column_sum) {
  vf sum{};
  for (int i = 0; i < n; i += kLanes) {
    vf x;
    if (i + kLanes <= n) {
      x = load(grad + i) * load(out + i);
    } else {
      alignas(64) float tail[kLanes] = {};
      for (int t = 0; t < n - i; ++t) tail[t] = to_float(grad[i + t]) * to_float(out[i + t]);
      x = load(tail);
    }
    store(to + i, x);
    store(column_sum + i, load(column_sum + i) + x);
    sum += x;
  }
  return reduce_add(sum);
}

template <class T>
struct Backward {
  const Params& p;
  const Geometry g;
  float *k, *dk, *q, *dq, *prob, *column_sum, *row_sum;

  explicit Backward(const Params& params) : p(params), g(params) {
    const int64_t keys = int64_t{g.tile_keys} * g.ldd, queries = int64_t{g.block_rows} * g.ldd;
    const int64_t floats = 2 * keys + 2 * queries + int64_t{g.block_rows + 1} * g.ldk + g.block_rows;
    k = static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * sizeof(float)));
    dk = k + keys;
    q = dk + keys;
    dq = q + queries;
    prob = dq + queries;
    column_sum = prob + int64_t{g.block_rows} * g.ldk;
    row_sum = column_sum + g.ldk;
  }

  // P of rows [row, row + rows) towards the keys of a tile.
  void load_prob(int64_t head, int64_t row, int rows, int tile, bool first) {
    const int64_t b = head / p.H, h = head % p.H, j = int64_t{tile} * g.max_keys;
    const int keys = keys_of_tile(p, g, tile);
    for (int i = 0; i < rows; ++i) {
      const T* grad = static_cast<const T*>(p.grad_out) + b * p.grad_out_stride_b + h * p.grad_out_stride_h +
                      (row + i) * p.grad_out_stride_l + j;
      const T* out = static_cast<const T*>(p.out) + (head * p.L + row + i) * p.M + j;
      const float sum = load_product(prob + int64_t{i} * g.ldk, grad, out, keys, column_sum);
      row_sum[i] = first ? sum : row_sum[i] + sum;
    }
  }

  // dq (+)= P k
  void add_dq(int rows, int keys, bool first) {
    gemm(rows, g.Dp, keys, prob, g.ldk, k, g.ldd, first ? nullptr : dq, dq, g.ldd);
  }

  void write_dq(int64_t head, int64_t row, int rows) {
    T* const to = static_cast<T*>(p.dq) + ((head / p.H * p.L + row) * p.H + head % p.H) * p.D;
    for (int i = 0; i < rows; ++i) {
      float* const from = dq + int64_t{i} * g.ldd;
      combine(from, row_sum[i], q + int64_t{i} * g.ldd);
      store_row(to + i * p.H * p.D, from, g.D, -2.f * p.gamma);
    }
  }

  // x = sum * y - x
  void combine(float* x, float sum, const float* y) const {
    for (int c = 0; c < g.Dp; c += kLanes) store(x + c, set1(sum) * load(y + c) - load(x + c));
  }

  // dk of a tile of keys from queries [begin, end), and dq with it where the tile holds all keys.
  void tile_of_keys(int64_t head, int64_t begin, int64_t end, int tile, float* partial) {
    const int keys = keys_of_tile(p, g, tile);
    load_keys<T>(k, p, g, head, tile);
    zero(column_sum, round_up(keys, kLanes));
    for (int64_t row = begin; row < end; row += g.block_rows) {
      const int rows = static_cast<int>(std::min<int64_t>(g.block_rows, end - row));
      load_queries<T>(q, p, g, head, row, rows);
      load_prob(head, row, rows, tile, true);
      if (g.tiles == 1) {
        add_dq(rows, keys, true);
        write_dq(head, row, rows);
      }
      gemm_transposed(keys, g.Dp, rows, prob, g.ldk, q, g.ldd, row > begin ? dk : nullptr, dk, g.ldd);
    }
    const int64_t j = int64_t{tile} * g.max_keys;
    T* const to = static_cast<T*>(p.dk) + ((head / p.H * p.M + j) * p.H + head % p.H) * p.D;
    for (int i = 0; i < keys; ++i) {
      float* const from = dk + int64_t{i} * g.ldd;
      combine(from, column_sum[i], k + int64_t{i} * g.ldd);
      if (partial) {
        std::memcpy(partial + (j + i) * g.Dp, from, static_cast<size_t>(g.Dp) * sizeof(float));
      } else {
        store_row(to + i * p.H * p.D, from, g.D, -2.f * p.gamma);
      }
    }
  }

  // dq where the keys are several tiles.
  void rows_of_queries(int64_t head, int64_t begin, int64_t end) {
    zero(column_sum, round_up(g.tile_keys, kLanes));  // not used here, but added to
    for (int64_t row = begin; row < end; row += g.block_rows) {
      const int rows = static_cast<int>(std::min<int64_t>(g.block_rows, end - row));
      load_queries<T>(q, p, g, head, row, rows);
      for (int tile = 0; tile < g.tiles; ++tile) {
        load_keys<T>(k, p, g, head, tile);
        load_prob(head, row, rows, tile, tile == 0);
        add_dq(rows, keys_of_tile(p, g, tile), tile == 0);
      }
      write_dq(head, row, rows);
    }
  }

  void run(float* partials, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / g.splits, split = unit % g.splits;
      const int64_t first = p.L * split / g.splits, last = p.L * (split + 1) / g.splits;
      if (g.tiles > 1) rows_of_queries(head, first, last);
      float* const partial = g.splits > 1 ? partials + unit * p.M * g.Dp : nullptr;
      for (int tile = 0; tile < g.tiles; ++tile) tile_of_keys(head, first, last, tile, partial);
    }
  }
};

template <class T>
void reduce(const Params& p, const Geometry& g, const float* partials) {
  float* const sum = static_cast<float*>(thread_scratch(static_cast<size_t>(g.Dp) * sizeof(float)));
  for (int64_t head = 0; head < p.B * p.H; ++head) {
    for (int64_t j = 0; j < p.M; ++j) {
      zero(sum, g.Dp);
      for (int64_t s = 0; s < g.splits; ++s) axpy(sum, 1.f, partials + ((head * g.splits + s) * p.M + j) * g.Dp, g.Dp);
      store_row(static_cast<T*>(p.dk) + ((head / p.H * p.M + j) * p.H + head % p.H) * p.D, sum, g.D, -2.f * p.gamma);
    }
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) { return p.B * p.H * Geometry(p).chunks; }

void forward(const Params& p, float*, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { forward_units_of<decltype(type)>(p, begin, end); });
}

int64_t backward_units(const Params& p) { return p.B * p.H * Geometry(p).splits; }

int64_t backward_partials(const Params& p) {
  const Geometry g(p);
  return g.splits > 1 ? p.B * p.H * g.splits * p.M * g.Dp : 0;
}

void backward(const Params& p, float* partials, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { Backward<decltype(type)>(p).run(partials, begin, end); });
}

int64_t reduce_units(const Params& p) { return Geometry(p).splits > 1 ? 1 : 0; }

void reduce_partials(const Params& p, float* partials, int64_t, int64_t) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { reduce<decltype(type)>(p, g, partials); });
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {{backward_units, backward}, {reduce_units, reduce_partials}};

}  // namespace rbf_gram_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<RbfGramParams>* EFFVIT_KERNEL_NAME(rbf_gram)() {
  namespace impl = EFFVIT_ISA_NAME::rbf_gram_impl;
  static constexpr Kernel<RbfGramParams> kernel = {routine(impl::kForward),
                                                   routine(impl::kBackward, impl::backward_partials)};
  return &kernel;
}
}  // namespace effvit::cpu
