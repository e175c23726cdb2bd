// window_attention on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// A unit of work is one (window, head). Its tokens are found by index arithmetic and read where they lie; K is
// transposed into scratch (that is the layout the row-times-matrix products want), and a block of kRows query rows goes
// through logits, softmax and P·V without leaving the L1 cache. Windows of more than kTileTokens tokens are cut into
// tiles with an online softmax, so the scratch of a thread stays below 2 MiB at any size.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

using Params = WindowAttentionParams;
using Kernel = WindowAttentionKernel;

constexpr float kNegInf = -__builtin_inff();
constexpr float kLowest = -1e30f;  // start of a running maximum; finite, so that -inf - kLowest is not a NaN
constexpr float kLogitScaleMax = 4.605170185988092f;  // ln 100
constexpr float kNormEps = 1e-12f;
constexpr int kTileTokens = 256;
constexpr int kSubRows = 64;  // query rows whose P and dS the backward holds at once
#if defined(EFFVIT_HAS_TILES)
template <class T>
constexpr bool kTiles = std::is_same_v<T, BFloat16>;  // products on AMX tiles, of the bfloat16 tokens as they are
#else
template <class T>
constexpr bool kTiles = false;
#endif
template <class T>
constexpr int kBlockRows = kTiles<T> ? 32 : kRows;  // query rows that the forward holds at once
// Together with the tiles' scratch these keep a thread below 2 MiB at any size.
constexpr int64_t kTableCacheBytes = 256 << 10;
constexpr int64_t kPartialBytes = 512 << 10;
constexpr int64_t kAheadBytes = 128 << 10;  // fetched ahead at once; well within any L2

// Natural logarithm of normal positive numbers: exponent plus 2 atanh((m-1)/(m+1)), m in [sqrt(1/2), sqrt(2)).
EFFVIT_INLINE vf log(vf x) {
  const vi bits = float_to_bits(x);
  const vi e = (bits - 0x3f3504f3) >> 23;
  const vf m = bits_to_float(bits - (e << 23));
  const vf s = (m - 1.f) / (m + 1.f), z = s * s;
  vf p = fma(z, set1(0.2222222222f), set1(0.2857142857f));
  p = fma(z, p, set1(0.4f));
  p = fma(z, p, set1(0.6666666667f));
  p = fma(z, p, set1(2.f));
  return fma(__builtin_convertvector(e, vf), set1(0.693147181f), s * p);
}

struct Geometry {
  WindowAxis y, x;
  int key_w;  // keys in a row of the window, halo included
  int table_h, table_w;  // sides of the bias table
  int64_t windows;  // per image
  int tile_tokens;
  int q_tile_rows, k_tile_rows;  // rows of the window (of its keys) in one tile
  int q_tile_max, k_tile_max;  // tokens in one tile at most
  int dp, dvp;  // head dims rounded up to whole vectors
  int dk32, dv32;  // and to the depth of a tile product
  int ld;  // row stride of a logits block: room for one vector of overrun
  bool single;  // a window is one tile, without halo
  bool cosine, has_pad;

  explicit Geometry(const Params& p)
      : y(make_window_axis(p.H, p.window_h, p.shift_h, p.dilation_h, p.halo_h, p.roll_before_pad)),
        x(make_window_axis(p.W, p.window_w, p.shift_w, p.dilation_w, p.halo_w, p.roll_before_pad)) {
    key_w = p.window_w + 2 * p.halo_w;
    table_h = 2 * p.window_h - 1 + 2 * p.halo_h;
    table_w = 2 * p.window_w - 1 + 2 * p.halo_w;
    windows = int64_t{y.windows} * x.windows;
    dp = round_up(static_cast<int>(p.d), kLanes);
    dvp = round_up(static_cast<int>(p.dv), kLanes);
    dk32 = round_up(static_cast<int>(p.d), 32);
    dv32 = round_up(static_cast<int>(p.dv), 32);
    const int widest = dp > dvp ? dp : dvp;
    tile_tokens = widest <= 64 ? kTileTokens : std::max(16, kTileTokens * 64 / widest);
    const int key_h = p.window_h + 2 * p.halo_h;
    q_tile_rows = std::min(p.window_h, std::max(1, tile_tokens / p.window_w));
    k_tile_rows = std::min(key_h, std::max(1, tile_tokens / key_w));
    q_tile_max = q_tile_rows * p.window_w;
    k_tile_max = k_tile_rows * key_w;
    ld = round_up(k_tile_max, kLanes) + kLanes;
    single = p.halo_h == 0 && p.halo_w == 0 && q_tile_rows == p.window_h;
    cosine = p.logit_scale != nullptr;
    has_pad = p.pad_k != nullptr;
  }
};

struct Run {
  int column, length, table;  // keys [column, column + length) lie at table, table + 1, ... of the flipped table
};

// Queries of one tile: the tokens of the window that are on the map.
struct Queries {
  int n = 0;
  int64_t* position = nullptr;  // flat index into [B, H, W]
  int64_t* lse_offset = nullptr;  // into lse, of head 0
  int64_t* offset = nullptr;  // into q
  int64_t* grad_offset = nullptr;
  int32_t* table = nullptr;  // offset into the flipped bias table
  int32_t* label = nullptr;  // shift region

  void allocate(Scratch& s, int max) {
    position = s.take<int64_t>(max);
    lse_offset = s.take<int64_t>(max);
    offset = s.take<int64_t>(max);
    grad_offset = s.take<int64_t>(max);
    table = s.take<int32_t>(max);
    label = s.take<int32_t>(max);
  }
};

// Keys of one tile: the tokens on the map, and with pad_k those outside of it too (position -1).
struct Keys {
  int n = 0, padded = 0, runs = 0, longest_run = 0, pads = 0;
  bool mixed = false;  // more than one shift region among the keys
  int64_t* position = nullptr;  // flat index into [B, H, W], -1 for a pad
  int64_t* k_offset = nullptr;
  int64_t* v_offset = nullptr;
  int32_t* label = nullptr;
  int32_t* owner = nullptr;  // row-major index in the rectangle that the tile was cut from
  int32_t* column = nullptr;  // of the logits, when every run has a vector of its own
  Run* run = nullptr;

  void allocate(Scratch& s, int max) {
    position = s.take<int64_t>(max);
    k_offset = s.take<int64_t>(max);
    v_offset = s.take<int64_t>(max);
    label = s.take<int32_t>(max + kLanes);
    owner = s.take<int32_t>(max);
    column = s.take<int32_t>(max);
    run = s.take<Run>(max);
  }

  // A vector for each run of keys takes no more room than the keys one after the other: a row of the flipped table
  // then is the bias of a vector of logits as it lies there. Windows 7 wide with 8 lanes, say.
  bool a_vector_per_run() const { return !mixed && longest_run <= kLanes && runs * kLanes == padded; }
};

void find_queries(const Params& p, const Geometry& g, int64_t b, int wy, int wx, int y0, int y1, Queries* q) {
  int n = 0;
  for (int y = y0; y < y1; ++y) {
    const int iy = rolled_coordinate(g.y, wy, y), py = map_position(g.y, iy);
    if (py < 0) continue;
    const int region_y = 3 * shift_region(g.y, iy);
    for (int x = 0; x < g.x.window; ++x) {
      const int ix = rolled_coordinate(g.x, wx, x), px = map_position(g.x, ix);
      if (px < 0) continue;
      q->position[n] = (b * p.H + py) * p.W + px;
      q->lse_offset[n] = (b * p.h * p.H + py) * p.W + px;
      q->offset[n] = b * p.q_stride_b + py * p.q_stride_y + px * p.q_stride_x;
      q->grad_offset[n] = b * p.grad_out_stride_b + py * p.grad_out_stride_y + px * p.grad_out_stride_x;
      q->table[n] = (g.y.window - 1 - y) * g.table_w + (g.x.window - 1 - x);
      q->label[n] = region_y + shift_region(g.x, ix);
      ++n;
    }
  }
  q->n = n;
}

// Keys of window (wy, wx) in local rows [y0, y1) and columns [x0, x1), counted from -halo.
void find_keys(const Params& p, const Geometry& g, int64_t b, int wy, int wx, int y0, int y1, int x0, int x1,
               bool with_pads, Keys* k) {
  int n = 0, runs = 0, pads = 0;
  bool mixed = false;
  for (int y = y0; y < y1; ++y) {
    const int iy = rolled_coordinate(g.y, wy, y), py = map_position(g.y, iy);
    if (py < 0 && !with_pads) continue;
    const int region_y = 3 * shift_region(g.y, iy);
    int last = x0 - 2;  // column of the previous key of this row
    for (int x = x0; x < x1; ++x) {
      const int ix = rolled_coordinate(g.x, wx, x), px = map_position(g.x, ix);
      const bool outside = py < 0 || px < 0;
      if (outside && !with_pads) continue;
      k->position[n] = outside ? -1 : (b * p.H + py) * p.W + px;
      k->k_offset[n] = outside ? 0 : b * p.k_stride_b + py * p.k_stride_y + px * p.k_stride_x;
      k->v_offset[n] = outside ? 0 : b * p.v_stride_b + py * p.v_stride_y + px * p.v_stride_x;
      k->label[n] = region_y + shift_region(g.x, ix);
      k->owner[n] = (y - y0) * (x1 - x0) + (x - x0);
      k->column[n] = (x == last + 1 ? (runs - 1) * kLanes + k->run[runs - 1].length : runs * kLanes);
      mixed |= k->label[n] != k->label[0];
      pads += outside;
      if (x == last + 1) {
        ++k->run[runs - 1].length;
      } else {
        k->run[runs++] = {n, 1, (y + g.y.halo) * g.table_w + (x + g.x.halo)};
      }
      last = x;
      ++n;
    }
  }
  k->n = n;
  k->padded = round_up(n, kLanes);
  k->runs = runs;
  k->pads = pads;
  k->mixed = mixed;
  k->longest_run = 0;
  for (int r = 0; r < runs; ++r) k->longest_run = std::max(k->longest_run, k->run[r].length);
  for (int j = n; j < k->padded; ++j) k->label[j] = -1;
}

// The bias tables in reversed order, in float32: offsets then grow with the key, so a run of keys is a run of entries.
class FlippedTable {
 public:
  void allocate(Scratch& s, const Params& p, const Geometry& g) {
    if (!p.bias_table) return;
    entries_ = int64_t{g.table_h} * g.table_w;
    stride_ = (entries_ + kLanes + 15) / 16 * 16;
    cached_ = p.h * stride_ * 4 <= kTableCacheBytes;
    data_ = s.take<float>((cached_ ? p.h : 1) * stride_);
    head_ = s.take<int64_t>(cached_ ? p.h : 1);
  }
  void reset(const Params& p) {
    if (!p.bias_table) return;
    for (int64_t i = 0; i < (cached_ ? p.h : 1); ++i) head_[i] = -1;
  }
  const float* get(const Params& p, const Geometry& g, int64_t head) {
    if (!p.bias_table) return nullptr;
    const int64_t slot = cached_ ? head : 0;
    float* t = data_ + slot * stride_;
    if (head_[slot] != head) {
      for (int y = 0; y < g.table_h; ++y) {
        for (int x = 0; x < g.table_w; ++x) {
          t[entries_ - 1 - (y * g.table_w + x)] = load_scalar(
              p.bias_table, p.bias_dtype, head * p.bias_stride_h + y * p.bias_stride_y + x * p.bias_stride_x);
        }
      }
      for (int64_t i = entries_; i < stride_; ++i) t[i] = 0.f;  // what the last run's vector reads past its end
      head_[slot] = head;
    }
    return t;
  }

 private:
  float* data_ = nullptr;
  int64_t* head_ = nullptr;
  int64_t entries_ = 0, stride_ = 0;
  bool cached_ = false;
};

// s[0..padded) = bias of this query towards every key, mask_value between regions, -inf beyond the last key.
EFFVIT_INLINE void init_logits(float* s, const Keys& keys, const float* table, int label, float mask_value) {
  if (table) {
    const Run* const all = keys.run;
    const int runs = keys.runs;
    if (keys.longest_run <= kLanes) {
      for (int r = 0; r < runs; ++r) store(s + all[r].column, load(table + all[r].table));
    } else {
      for (int r = 0; r < runs; ++r) {
        const Run run = all[r];
        float* dst = s + run.column;
        const float* src = table + run.table;
        for (int i = 0; i < run.length; i += kLanes) store(dst + i, load(src + i));
      }
    }
  } else {
    zero(s, keys.padded);
  }
  if (keys.mixed || keys.label[0] != label) {
    const vf value = set1(mask_value);
    for (int j = 0; j < keys.padded; j += kLanes) {
      const vi other = load(keys.label + j) != label;
      store(s + j, load(s + j) + (vf)(other & (vi)value));
    }
  }
  store(s + keys.n, set1(kNegInf));
}

struct ScatteredA {  // a[r * ld + column[t]]
  const float* data;
  int64_t ld;
  const int32_t* column;
  EFFVIT_INLINE float operator()(int r, int t) const { return data[r * ld + column[t]]; }
  EFFVIT_INLINE ScatteredA rows_from(int r) const { return {data + r * ld, ld, column}; }
};

// MR x NV vectors of logits, of a vector for each run of keys from run `first` on: products, bias, -inf where the run
// has no key. Returns the rows' maxima so far in `highest`.
template <int MR, int NV>
EFFVIT_INLINE void logits_tile(int k, RowMajorA a, DenseB b, const Run* run, const float* const* bias, float* c,
                               int64_t ldc, vf* highest) {
  vf acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = vf{};
  }
  for (int t = 0; t < k; ++t) {
    const float* row = b(t);
    vf bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bv[j] = load(row + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const vf av = set1(a(r, t));
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] = fma(av, bv[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const vi there = lanes_below(run[j].length);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const vf x = bias ? acc[r][j] + load(bias[r] + run[j].table) : acc[r][j];
      const vf logit = (vf)(((vi)x & there) | ((vi)set1(kNegInf) & ~there));
      store(c + r * ldc + j * kLanes, logit);
      highest[r] = max(highest[r], logit);
    }
  }
}

template <int MR>
inline __attribute__((noinline)) void logits_rows(int vectors, int k, RowMajorA a, DenseB b, const Run* run,
                                                  const float* const* bias, float* c, int64_t ldc, float* top) {
  vf highest[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) highest[r] = set1(kLowest);
  for (int blocks = (vectors + kCols - 1) / kCols; blocks > 0; --blocks) {
    const int width = (vectors + blocks - 1) / blocks;
    switch (width) {
      case 1:
        logits_tile<MR, 1>(k, a, b, run, bias, c, ldc, highest);
        break;
      case 2:
        logits_tile<MR, 2>(k, a, b, run, bias, c, ldc, highest);
        break;
      case 3:
        logits_tile<MR, 3>(k, a, b, run, bias, c, ldc, highest);
        break;
      default:
        logits_tile<MR, 4>(k, a, b, run, bias, c, ldc, highest);
        break;
    }
    vectors -= width;
    run += width;
    c += width * kLanes;
    b = b.columns_from(width * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) top[r] = reduce_max(highest[r]);
}

// Rows of x^ = x / max(|x|, eps), in place; the norms go to `norm`.
EFFVIT_INLINE void normalize_row(float* row, int n_padded, float* norm) {
  const float length = __builtin_sqrtf(dot(row, row, n_padded));
  *norm = length;
  const vf inverse = set1(1.f / (length > kNormEps ? length : kNormEps));
  for (int i = 0; i < n_padded; i += kLanes) store(row + i, load(row + i) * inverse);
}

// Gradient of x from the gradient of x^, in place: (g - x^ <x^, g>) / |x|, and g / eps below eps.
EFFVIT_INLINE void normalize_row_backward(float* g, const float* unit, float norm, int n_padded) {
  const float along = norm > kNormEps ? dot(unit, g, n_padded) : 0.f;
  const vf inverse = set1(1.f / (norm > kNormEps ? norm : kNormEps));
  for (int i = 0; i < n_padded; i += kLanes) store(g + i, (load(g + i) - set1(along) * load(unit + i)) * inverse);
}

EFFVIT_INLINE float temperature(const Params& p, int64_t head) {
  const float tau = load_scalar(p.logit_scale, p.logit_scale_dtype, head);
  return std::exp(tau > kLogitScaleMax ? kLogitScaleMax : tau);
}

// Owns the tile configuration of the thread while a pass runs on tiles.
template <class T>
struct Products {
#if defined(EFFVIT_HAS_TILES)
  std::conditional_t<kTiles<T>, TileScope, int> scope{};
#endif
};

// Columns [0, n) of src, zeros up to n_padded.
EFFVIT_INLINE void copy_row(BFloat16* dst, const BFloat16* src, int n, int n_padded) {
  std::memcpy(dst, src, static_cast<size_t>(n) * 2);
  std::memset(dst + n, 0, static_cast<size_t>(n_padded - n) * 2);
}

template <class T>
EFFVIT_INLINE const T* row_or_pad(const void* base, const void* pad, int64_t offset, int64_t position, int64_t head,
                                  int64_t head_stride, int64_t width) {
  return position < 0 ? static_cast<const T*>(pad) + head * width
                      : static_cast<const T*>(base) + offset + head * head_stride;
}

// Token lists of two windows: the one at work and the one after it, whose rows are fetched meanwhile. A window's rows
// lie far apart, which the hardware prefetchers do not follow.
struct Tokens {
  Queries queries;
  Keys keys;
  int64_t window = -1;
};

class Windows {
 public:
  void allocate(Scratch& s, const Geometry& g) {
    for (Tokens& t : tokens_) {
      t.queries.allocate(s, g.q_tile_max);
      t.keys.allocate(s, g.k_tile_max);
    }
  }
  // Tokens of a window that is one tile.
  const Tokens& get(const Params& p, const Geometry& g, int64_t window) {
    Tokens& t = tokens_[window & 1];
    if (t.window != window) {
      const int64_t b = window / g.windows, w = window - b * g.windows;
      const int wy = static_cast<int>(w / g.x.windows), wx = static_cast<int>(w - int64_t{wy} * g.x.windows);
      find_queries(p, g, b, wy, wx, 0, g.y.window, &t.queries);
      find_keys(p, g, b, wy, wx, 0, g.y.window, 0, g.x.window, g.has_pad, &t.keys);
      t.window = window;
    }
    return t;
  }
  Tokens& scratch() { return tokens_[0]; }  // for tiles, which are not prefetched

 private:
  Tokens tokens_[2];
};

// Fetches a token's rows of heads [head, head + heads) into L2.
template <class T>
EFFVIT_INLINE void prefetch_heads(const void* base, int64_t offset, int64_t head, int64_t heads, int64_t head_stride,
                                  int64_t width) {
  const T* row = static_cast<const T*>(base) + offset + head * head_stride;
  const bool dense = head_stride == width;
  for (int64_t i = 0; i < (dense ? 1 : heads); ++i) {
    const char* p = reinterpret_cast<const char*>(row + i * head_stride);
    const int64_t bytes = (dense ? heads : 1) * width * static_cast<int64_t>(sizeof(T));
    for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(p + c, 0, 2);
  }
}

// The (window, group of heads) after the one at work. Its tokens are fetched a few at a time, all heads of a token
// together, so that memory is read in runs of kilobytes: see "Where the time goes" in csrc/README.md.
struct Ahead {
  const Tokens* tokens = nullptr;
  int64_t head = 0, heads = 0;
  int from = 0, to = 0, per_step = 0;

  static int64_t group_of_heads(const Params& p, const Geometry& g, int64_t element_bytes) {
    const int64_t per_head = int64_t{g.k_tile_max} * (2 * p.d + p.dv) * element_bytes;
    return std::min(p.h, std::max<int64_t>(1, kAheadBytes / per_head));
  }
  // Called for the first head of a group: [head, last) at work in window `here`, steps_per_head calls of step() each.
  void plan(const Tokens& here, const Tokens* after, int64_t last, int64_t first_head, int64_t end_head, int64_t group,
            int64_t steps) {
    tokens = last < end_head ? &here : after;
    head = last < end_head ? last : first_head;
    heads = std::min(group, end_head - head);
    from = to = 0;
    per_step = tokens ? static_cast<int>((tokens->keys.n + steps - 1) / std::max<int64_t>(steps, 1)) : 0;
  }
  // Moves on to the next tokens [from, to).
  void step() {
    from = to;
    to = tokens ? std::min(to + per_step, tokens->keys.n) : to;
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  const Params& p;
  const Geometry& g;
  Windows windows;
  Queries queries;  // of the tile at work
  Keys keys;
  Ahead ahead;
  FlippedTable tables;
  float *q, *k, *kt, *v, *s, *o, *top, *sum, *norm;
  // Tiles: bfloat16 queries, transposed keys, values and probabilities, and what the logits are multiplied with.
  BFloat16 *q16 = nullptr, *kt16 = nullptr, *v16 = nullptr, *p16 = nullptr, *row16 = nullptr;
  float *row_scale = nullptr, *column_scale = nullptr, *bias = nullptr;

  Forward(const Params& params, const Geometry& geometry, Scratch& scratch) : p(params), g(geometry) {
    windows.allocate(scratch, g);
    queries = windows.scratch().queries;
    keys = windows.scratch().keys;
    tables.allocate(scratch, p, g);
    q = scratch.take<float>(int64_t{g.q_tile_max} * g.dp);
    k = scratch.take<float>(int64_t{g.k_tile_max} * g.dp);
    if constexpr (!kTiles<T>) {
      kt = scratch.take<float>(int64_t{g.dp} * round_up(g.k_tile_max, kLanes));
      v = scratch.take<float>(int64_t{g.k_tile_max} * g.dvp);
    }
    s = scratch.take<float>(int64_t{std::max(2 * kRows, kBlockRows<T>)} * g.ld);
    o = scratch.take<float>(int64_t{g.single ? kBlockRows<T> : round_up(g.q_tile_max, kBlockRows<T>)} * g.dvp);
    top = scratch.take<float>(g.q_tile_max + kLanes);
    sum = scratch.take<float>(g.q_tile_max + kLanes);
    norm = scratch.take<float>(kLanes);
    if constexpr (kTiles<T>) {
      const int64_t nk = round_up(g.k_tile_max, 32);
      q16 = scratch.take<BFloat16>(int64_t{round_up(g.q_tile_max, 32)} * g.dk32);
      kt16 = scratch.take<BFloat16>(nk * g.dk32);
      v16 = scratch.take<BFloat16>(nk * g.dvp);
      p16 = scratch.take<BFloat16>(32 * nk);
      row16 = scratch.take<BFloat16>(nk * std::max(g.dk32, g.dvp));
      row_scale = scratch.take<float>(g.q_tile_max);
      column_scale = scratch.take<float>(nk);
      bias = scratch.take<float>(int64_t{32} * g.ld);
    }
  }

  void load_queries(int64_t head) {
    const T* base = static_cast<const T*>(p.q) + head * p.q_stride_h;
    const int d = static_cast<int>(p.d);
    const float factor = g.cosine ? temperature(p, head) : p.scale;
    for (int i = 0; i < queries.n; ++i) {
      float* row = q + int64_t{i} * g.dp;
      if (g.cosine) {
        load_row(row, base + queries.offset[i], d);
        normalize_row(row, g.dp, norm);
        for (int c = 0; c < g.dp; c += kLanes) store(row + c, load(row + c) * factor);
      } else {
        load_row(row, base + queries.offset[i], d, factor);
      }
    }
  }

  bool by_runs() const { return g.single && keys.a_vector_per_run(); }

  void load_keys(int64_t head) {
    const int d = static_cast<int>(p.d);
    if constexpr (std::is_same_v<T, float>) {
      if (!g.cosine && keys.pads == 0 && d % kLanes == 0) {
        const float* base = static_cast<const float*>(p.k) + head * p.k_stride_h;
        transpose_keys([&](int j) { return base + keys.k_offset[j]; });
        return;
      }
    }
    for (int j = 0; j < keys.n; ++j) {
      float* row = k + int64_t{j} * g.dp;
      load_row(row, row_or_pad<T>(p.k, p.pad_k, keys.k_offset[j], keys.position[j], head, p.k_stride_h, p.d), d);
      if (g.cosine) normalize_row(row, g.dp, norm);
    }
    transpose_keys([&](int j) { return k + int64_t{j} * g.dp; });
  }

  template <class Row>
  EFFVIT_INLINE void transpose_keys(const Row& row) {
    const int d = static_cast<int>(p.d);
    if (!by_runs()) return transpose_rows(kt, keys.padded, keys.n, d, row);
    for (int r = 0, first = 0; r < keys.runs; first += keys.run[r++].length) {
      transpose_rows(kt + r * kLanes, keys.padded, keys.run[r].length, d, [&](int j) { return row(first + j); });
    }
  }

  void load_values(int64_t head) {
    for (int j = 0; j < keys.n; ++j) {
      load_row(v + int64_t{j} * g.dvp,
               row_or_pad<T>(p.v, p.pad_v, keys.v_offset[j], keys.position[j], head, p.v_stride_h, p.dv),
               static_cast<int>(p.dv));
    }
  }

  void init_rows(float* block, int r, const float* table) {
    for (int i = 0; i < std::min(kRows, queries.n - r); ++i) {
      init_logits(block + i * g.ld, keys, table ? table + queries.table[r + i] : nullptr, queries.label[r + i],
                  p.mask_value);
    }
  }

  // Logits of R queries from r on -> unnormalised probabilities, in place; updates top and sum, and rescales what o
  // holds already (tiles after the first). The rows go side by side: one alone is a chain of dependent instructions.
  template <int R>
  EFFVIT_INLINE void softmax_rows(float* block, int r, bool first) {
    float* row[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) row[i] = block + i * g.ld;
    const int end = keys.padded;
    vf m[R], total[R], shift[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) m[i] = set1(first ? kLowest : top[r + i]);
    for (int j = 0; j < end; j += kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) m[i] = max(m[i], load(row[i] + j));
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      shift[i] = set1(reduce_max(m[i]));
      total[i] = vf{};
    }
    for (int j = 0; j < end; j += kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vf e = exp(load(row[i] + j) - shift[i]);
        store(row[i] + j, e);
        total[i] = total[i] + e;
      }
    }
    for (int i = 0; i < R; ++i) accumulate_sum(r + i, shift[i][0], reduce_add(total[i]), first);
  }

  EFFVIT_INLINE void accumulate_sum(int i, float highest, float total, bool first) {
    if (first) {
      sum[i] = total;
    } else {
      const vf correction = exp(set1(top[i] - highest));
      sum[i] = sum[i] * correction[0] + total;
      float* acc = o + int64_t{i} * g.dvp;
      for (int c = 0; c < g.dvp; c += kLanes) store(acc + c, load(acc + c) * correction);
    }
    top[i] = highest;
  }

  void write_row(int i, const float* row, int64_t head) {
    T* dst = static_cast<T*>(p.out) + (queries.position[i] * p.h + head) * p.dv;
    store_row(dst, row, static_cast<int>(p.dv), 1.f / sum[i]);
  }

  void write_lse(int64_t head) {
    for (int i = queries.n; i < round_up(queries.n, kLanes); ++i) sum[i] = 1.f;
    const int64_t plane = p.H * p.W;
    for (int i = 0; i < queries.n; i += kLanes) {
      alignas(64) float lse[kLanes];
      store(lse, load(top + i) + log(load(sum + i)));
      for (int j = 0; j < kLanes && i + j < queries.n; ++j) {
        p.lse[queries.lse_offset[i + j] + head * plane] = lse[j];
      }
    }
  }

  void prefetch() {
    ahead.step();
    for (int i = ahead.from; i < ahead.to; ++i) {
      const Queries& nq = ahead.tokens->queries;
      const Keys& nk = ahead.tokens->keys;
      if (i < nq.n) {
        prefetch_heads<T>(p.q, nq.offset[i], ahead.head, ahead.heads, p.q_stride_h, p.d);
        prefetch_heads<T>(p.out, nq.position[i] * p.h * p.dv, ahead.head, ahead.heads, p.dv, p.dv);
      }
      prefetch_heads<T>(p.k, nk.k_offset[i], ahead.head, ahead.heads, p.k_stride_h, p.d);
      prefetch_heads<T>(p.v, nk.v_offset[i], ahead.head, ahead.heads, p.v_stride_h, p.dv);
    }
  }

  // R rows from r on, a window that is one tile.
  template <int R>
  void rows_of_runs(int r, const float* table, int64_t head) {
    const float* bias[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) bias[i] = table ? table + queries.table[r + i] : nullptr;
    logits_rows<R>(keys.runs, static_cast<int>(p.d), RowMajorA{q + int64_t{r} * g.dp, g.dp}, DenseB{kt, keys.padded},
                   keys.run, table ? bias : nullptr, s, g.ld, top + r);
    vf total[R], shift[R];
    float* row[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      row[i] = s + i * g.ld;
      shift[i] = set1(top[r + i]);
      total[i] = vf{};
    }
    for (int j = 0, end = keys.padded; j < end; j += kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vf e = exp(load(row[i] + j) - shift[i]);
        store(row[i] + j, e);
        total[i] = total[i] + e;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[r + i] = reduce_add(total[i]);
    gemm(R, g.dvp, keys.n, ScatteredA{s, g.ld, keys.column}, DenseB{v, g.dvp}, o, g.dvp, false);
    for (int i = 0; i < R; ++i) write_row(r + i, o + int64_t{i} * g.dvp, head);
  }

  void rows_of_tile(int64_t head, bool first) {
    const float* table = tables.get(p, g, head);
    const int d = static_cast<int>(p.d);
    if (by_runs()) {
      int r = 0;
      for (; r + kRows <= queries.n; r += kRows) {
        prefetch();
        rows_of_runs<kRows>(r, table, head);
      }
      for (; r < queries.n; ++r) {
        prefetch();
        rows_of_runs<1>(r, table, head);
      }
      return;
    }
    // Two blocks of logits take turns. The bias of a block is written one block ahead: its short unaligned stores would
    // otherwise still be on their way when the product loads them as whole vectors, which cannot be forwarded.
    float* block = s;
    float* ahead = s + int64_t{kRows} * g.ld;
    init_rows(block, 0, table);
    for (int r = 0; r < queries.n; r += kRows) {
      const int rows = std::min(kRows, queries.n - r);
      if (r + kRows < queries.n) init_rows(ahead, r + kRows, table);
      prefetch();
      gemm(rows, keys.padded, d, RowMajorA{q + int64_t{r} * g.dp, g.dp}, DenseB{kt, keys.padded}, block, g.ld, true);
      if (rows == kRows) {
        softmax_rows<kRows>(block, r, first);
      } else {
        for (int i = 0; i < rows; ++i) softmax_rows<1>(block + i * g.ld, r + i, first);
      }
      float* acc = g.single ? o : o + int64_t{r} * g.dvp;
      gemm(rows, g.dvp, keys.n, RowMajorA{block, g.ld}, DenseB{v, g.dvp}, acc, g.dvp, !first);
      if (g.single) {
        for (int i = 0; i < rows; ++i) write_row(r + i, acc + int64_t{i} * g.dvp, head);
      }
      std::swap(block, ahead);
    }
  }

#if defined(EFFVIT_HAS_TILES)
  // The tokens stay bfloat16 as they are; scale, temperature and norms multiply the float32 logits instead.
  void load_queries_16(int64_t head) {
    const BFloat16* base = static_cast<const BFloat16*>(p.q) + head * p.q_stride_h;
    const float factor = g.cosine ? temperature(p, head) : p.scale;
    for (int i = 0; i < queries.n; ++i) {
      copy_row(q16 + int64_t{i} * g.dk32, base + queries.offset[i], static_cast<int>(p.d), g.dk32);
      row_scale[i] = factor;
      if (g.cosine) row_scale[i] *= inverse_norm(base + queries.offset[i], static_cast<int>(p.d), q);
    }
  }

  float inverse_norm(const BFloat16* row, int n, float* wide) {
    load_row(wide, row, n);
    const float length = __builtin_sqrtf(dot(wide, wide, round_up(n, kLanes)));
    return 1.f / (length > kNormEps ? length : kNormEps);
  }

  void load_keys_16(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const auto key = [&](int j) {
      return row_or_pad<BFloat16>(p.k, p.pad_k, keys.k_offset[j], keys.position[j], head, p.k_stride_h, p.d);
    };
    const auto value = [&](int j) {
      return row_or_pad<BFloat16>(p.v, p.pad_v, keys.v_offset[j], keys.position[j], head, p.v_stride_h, p.dv);
    };
    if (g.cosine) {
      for (int j = 0; j < keys.n; ++j) column_scale[j] = inverse_norm(key(j), d, k);
      for (int j = keys.n; j < keys.padded; ++j) column_scale[j] = 1.f;
    }
    const int64_t ldb = 2 * keys.padded;
    if (d % 32 == 0) {
      pack_transposed(kt16, ldb, keys.n, d, key);
    } else {
      for (int j = 0; j < keys.n; ++j) copy_row(row16 + int64_t{j} * g.dk32, key(j), d, g.dk32);
      pack_transposed(kt16, ldb, keys.n, d, [&](int j) { return row16 + int64_t{j} * g.dk32; });
    }
    if (width % 16 == 0) {
      pack_rows(v16, 2 * g.dvp, keys.n, width, value);
    } else {
      for (int j = 0; j < keys.n; ++j) copy_row(row16 + int64_t{j} * g.dvp, value(j), width, g.dvp);
      pack_rows(v16, 2 * g.dvp, keys.n, g.dvp, [&](int j) { return row16 + int64_t{j} * g.dvp; });
    }
  }

  void rows_of_tile_16(int64_t head, bool first) {
    const float* table = tables.get(p, g, head);
    const int depth = round_up(keys.padded, 32);
    for (int r = 0; r < queries.n; r += 32) {
      const int rows = std::min(32, queries.n - r), rows16 = round_up(rows, 16);
      prefetch();
      for (int i = 0; i < rows; ++i) {  // well before they are read as whole vectors, see rows_of_tile
        init_logits(bias + int64_t{i} * g.ld, keys, table ? table + queries.table[r + i] : nullptr,
                    queries.label[r + i], p.mask_value);
      }
      tile_gemm(rows16, keys.padded, g.dk32, q16 + int64_t{r} * g.dk32, g.dk32, kt16, 2 * keys.padded, s, g.ld, false);
      for (int i = 0; i < rows; ++i) {
        float* row = s + int64_t{i} * g.ld;
        const float* row_bias = bias + int64_t{i} * g.ld;
        const vf factor = set1(row_scale[r + i]);
        vf m = set1(first ? kLowest : top[r + i]);
        for (int j = 0; j < keys.padded; j += kLanes) {
          const vf scale = g.cosine ? factor * load(column_scale + j) : factor;
          const vf x = fma(load(row + j), scale, load(row_bias + j));
          store(row + j, x);
          m = max(m, x);
        }
        const float highest = reduce_max(m);
        const vf shift = set1(highest);
        BFloat16* prob = p16 + int64_t{i} * depth;
        vf total{};
        for (int j = 0; j < keys.padded; j += kLanes) {
          const vf e = exp(load(row + j) - shift);
          store(prob + j, e);
          total = total + e;
        }
        if (depth > keys.padded) store(prob + keys.padded, vf{});
        accumulate_sum(r + i, highest, reduce_add(total), first);
      }
      float* acc = g.single ? o : o + int64_t{r} * g.dvp;
      tile_gemm(rows16, g.dvp, depth, p16, depth, v16, 2 * g.dvp, acc, g.dvp, !first);
      if (g.single) {
        for (int i = 0; i < rows; ++i) write_row(r + i, acc + int64_t{i} * g.dvp, head);
      }
    }
  }
#endif

  void start(int64_t head) {
#if defined(EFFVIT_HAS_TILES)
    if constexpr (kTiles<T>) return load_queries_16(head);
#endif
    load_queries(head);
  }

  void tile(int64_t head, bool first) {
#if defined(EFFVIT_HAS_TILES)
    if constexpr (kTiles<T>) {
      load_keys_16(head);
      rows_of_tile_16(head, first);
      return;
    }
#endif
    load_keys(head);
    load_values(head);
    rows_of_tile(head, first);
  }

  void run(int64_t begin, int64_t end) {
    tables.reset(p);
    [[maybe_unused]] const Products<T> products;
    const int64_t group = Ahead::group_of_heads(p, g, sizeof(T));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t window = unit / p.h, head = unit - window * p.h;
      if (g.single) {
        const Tokens& tokens = windows.get(p, g, window);
        queries = tokens.queries;
        keys = tokens.keys;
        if (unit == begin || head % group == 0) {
          const int64_t last = std::min(head - head % group + group, p.h);
          const Tokens* after = (window + 1) * p.h < end ? &windows.get(p, g, window + 1) : nullptr;
          const int64_t blocks = (queries.n + kBlockRows<T> - 1) / kBlockRows<T>;
          ahead.plan(tokens, after, last, 0, p.h, group, (last - head) * blocks);
        }
        if (queries.n == 0) continue;
        start(head);
        tile(head, true);
        write_lse(head);
        continue;
      }
      const int64_t b = window / g.windows, w = window - b * g.windows;
      const int wy = static_cast<int>(w / g.x.windows), wx = static_cast<int>(w - int64_t{wy} * g.x.windows);
      for (int y0 = 0; y0 < g.y.window; y0 += g.q_tile_rows) {
        find_queries(p, g, b, wy, wx, y0, std::min(y0 + g.q_tile_rows, g.y.window), &queries);
        if (queries.n == 0) continue;
        start(head);
        bool first = true;
        const int key_end = g.y.window + g.y.halo;
        for (int ky = -g.y.halo; ky < key_end; ky += g.k_tile_rows) {
          find_keys(p, g, b, wy, wx, ky, std::min(ky + g.k_tile_rows, key_end), -g.x.halo, g.x.window + g.x.halo,
                    g.has_pad, &keys);
          if (keys.n == 0) continue;
          tile(head, first);
          first = false;
        }
        for (int i = 0; i < queries.n; ++i) write_row(i, o + int64_t{i} * g.dvp, head);
        write_lse(head);
      }
    }
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

// Sums that several windows contribute to, per (chunk of windows, head): the table in flipped order, then pad_k, pad_v
// and the temperature.
struct Partials {
  int64_t table, table_stride, pad_k, pad_v, stride;  // offsets and size, in floats
  int64_t chunks, groups;  // of windows, of heads

  Partials(const Params& p, const Geometry& g) {
    table = p.bias_table ? int64_t{g.table_h} * g.table_w : 0;
    table_stride = p.bias_table ? (table + 2 * kLanes - 1) / kLanes * kLanes : 0;  // room for one vector of overrun
    pad_k = g.has_pad ? g.dp : 0;
    pad_v = g.has_pad ? g.dvp : 0;
    stride = table_stride + pad_k + pad_v + (g.cosine ? kLanes : 0);
    const int64_t all = p.B * g.windows;
    const int64_t fit = stride ? std::max<int64_t>(1, kPartialBytes / (4 * stride * p.h)) : 64;
    chunks = std::min<int64_t>({all, fit, 32});
    groups = std::min<int64_t>(p.h, (64 + chunks - 1) / chunks);
  }
  float* at(float* base, const Params& p, int64_t chunk, int64_t head) const {
    return base + (chunk * p.h + head) * stride;
  }
};

template <class T>
struct Backward {
  const Params& p;
  const Geometry& g;
  Windows windows;
  Queries queries;  // of the tile at work
  Keys keys;
  Ahead ahead;
  FlippedTable tables;
  float *q, *q_norm, *grad_out, *delta, *lse, *k, *k_norm, *kt, *v, *vt, *prob, *dlogit, *dq, *dk, *dv;
  float *own_k, *own_v;
  // Tiles: the operands of the five products in bfloat16.
  BFloat16 *q16 = nullptr, *q16_rows = nullptr, *do16 = nullptr, *do16_rows = nullptr, *kt16 = nullptr, *vt16 = nullptr,
           *k16_rows = nullptr, *row16 = nullptr, *ds16 = nullptr, *pt16 = nullptr, *dst16 = nullptr;
  float *row_scale = nullptr, *column_scale = nullptr, *bias = nullptr;
  // Of the current head and chunk; null where the argument was not given.
  float *sum_table = nullptr, *sum_pad_k = nullptr, *sum_pad_v = nullptr, *sum_tau = nullptr;

  Backward(const Params& params, const Geometry& geometry, Scratch& scratch) : p(params), g(geometry) {
    const int64_t nq = g.q_tile_max, nk = g.k_tile_max, nk_padded = round_up(g.k_tile_max, kLanes);
    windows.allocate(scratch, g);
    queries = windows.scratch().queries;
    keys = windows.scratch().keys;
    tables.allocate(scratch, p, g);
    q = scratch.take<float>(nq * g.dp);
    q_norm = scratch.take<float>(nq);
    grad_out = scratch.take<float>(nq * g.dvp);
    delta = scratch.take<float>(nq);
    lse = scratch.take<float>(nq);
    k = scratch.take<float>(nk * g.dp);
    k_norm = scratch.take<float>(nk + 1);
    if constexpr (!kTiles<T>) {
      kt = scratch.take<float>(g.dp * nk_padded);
      v = scratch.take<float>(nk * g.dvp);
      vt = scratch.take<float>(g.dvp * nk_padded);
    }
    prob = scratch.take<float>(int64_t{kSubRows} * g.ld);
    dlogit = scratch.take<float>(int64_t{kSubRows} * g.ld);
    dq = scratch.take<float>(round_up(g.q_tile_max, kSubRows) * int64_t{g.dp});
    dk = scratch.take<float>(nk_padded * g.dp);
    dv = scratch.take<float>(nk_padded * g.dvp);
    if constexpr (kTiles<T>) {
      const int64_t nq64 = round_up(g.q_tile_max, kSubRows), nk32 = round_up(g.k_tile_max, 32);
      q16 = scratch.take<BFloat16>(nq64 * g.dk32);
      q16_rows = scratch.take<BFloat16>(nq64 * g.dp);
      do16 = scratch.take<BFloat16>(nq64 * g.dv32);
      do16_rows = scratch.take<BFloat16>(nq64 * g.dvp);
      kt16 = scratch.take<BFloat16>(nk32 * g.dk32);
      vt16 = scratch.take<BFloat16>(nk32 * g.dv32);
      k16_rows = scratch.take<BFloat16>(nk32 * g.dp);
      row16 = scratch.take<BFloat16>(nk32 * std::max(g.dk32, g.dv32));
      ds16 = scratch.take<BFloat16>(kSubRows * nk32);
      pt16 = scratch.take<BFloat16>(kSubRows * nk32);
      dst16 = scratch.take<BFloat16>(kSubRows * nk32);
      row_scale = scratch.take<float>(nq);
      column_scale = scratch.take<float>(nk32);
      bias = scratch.take<float>(int64_t{kSubRows} * g.ld);
    }
    own_k = own_v = nullptr;
    if (!g.single) {
      own_k = scratch.take<float>(nq * g.dp);
      own_v = scratch.take<float>(nq * g.dvp);
    }
  }

  void load_queries(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const float factor = g.cosine ? temperature(p, head) : p.scale;
    const T* base = static_cast<const T*>(p.q) + head * p.q_stride_h;
    const T* base_do = static_cast<const T*>(p.grad_out) + head * p.grad_out_stride_h;
    const int64_t plane = p.H * p.W;
    for (int i = 0; i < queries.n; ++i) {
      float* row = q + int64_t{i} * g.dp;
      if (g.cosine) {
        load_row(row, base + queries.offset[i], d);
        normalize_row(row, g.dp, q_norm + i);
        for (int c = 0; c < g.dp; c += kLanes) store(row + c, load(row + c) * factor);
      } else {
        load_row(row, base + queries.offset[i], d, factor);
      }
      float* row_do = grad_out + int64_t{i} * g.dvp;
      load_row(row_do, base_do + queries.grad_offset[i], width);
      const int64_t at = queries.lse_offset[i] + head * plane;
      lse[i] = p.lse[at];
      delta[i] = p.grad_lse ? -p.grad_lse[at] : 0.f;
      if (g.single) continue;  // the rest of delta comes from the row itself
      const T* row_out = static_cast<const T*>(p.out) + (queries.position[i] * p.h + head) * p.dv;
      vf acc{};
      int c = 0;
      for (; c + kLanes <= width; c += kLanes) acc = fma(load(row_do + c), load(row_out + c), acc);
      delta[i] += reduce_add(acc);
      for (; c < width; ++c) delta[i] += row_do[c] * to_float(row_out[c]);
    }
#if defined(EFFVIT_HAS_TILES)
    if constexpr (kTiles<T>) load_queries_16(head);
#endif
  }

  void load_keys(int64_t head) {
    for (int j = 0; j < keys.n; ++j) {
      float* row = k + int64_t{j} * g.dp;
      load_row(row, row_or_pad<T>(p.k, p.pad_k, keys.k_offset[j], keys.position[j], head, p.k_stride_h, p.d),
               static_cast<int>(p.d));
      if (g.cosine) normalize_row(row, g.dp, k_norm + j);
      if (kTiles<T>) continue;
      load_row(v + int64_t{j} * g.dvp,
               row_or_pad<T>(p.v, p.pad_v, keys.v_offset[j], keys.position[j], head, p.v_stride_h, p.dv),
               static_cast<int>(p.dv));
    }
#if defined(EFFVIT_HAS_TILES)
    if constexpr (kTiles<T>) return load_keys_16(head);
#endif
    transpose_rows(kt, keys.padded, keys.n, static_cast<int>(p.d), [&](int j) { return k + int64_t{j} * g.dp; });
    transpose_rows(vt, keys.padded, keys.n, static_cast<int>(p.dv), [&](int j) { return v + int64_t{j} * g.dvp; });
  }

#if defined(EFFVIT_HAS_TILES)
  // After load_queries: the same tokens in bfloat16, row-major and with rows in pairs.
  void load_queries_16(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const BFloat16* base = static_cast<const BFloat16*>(p.q) + head * p.q_stride_h;
    const BFloat16* base_do = static_cast<const BFloat16*>(p.grad_out) + head * p.grad_out_stride_h;
    const float factor = g.cosine ? temperature(p, head) : p.scale;
    for (int i = 0; i < queries.n; ++i) {
      copy_row(q16 + int64_t{i} * g.dk32, base + queries.offset[i], d, g.dk32);
      copy_row(do16 + int64_t{i} * g.dv32, base_do + queries.grad_offset[i], width, g.dv32);
      row_scale[i] = g.cosine ? factor / std::max(q_norm[i], kNormEps) : factor;
    }
    for (int r = 0; r < queries.n; r += kSubRows) {  // each block of rows starts on a new pair
      const int rows = std::min(kSubRows, queries.n - r);
      pack_rows(q16_rows + int64_t{r} * g.dp, 2 * g.dp, rows, g.dp,
                [&](int i) { return q16 + int64_t{r + i} * g.dk32; });
      pack_rows(do16_rows + int64_t{r} * g.dvp, 2 * g.dvp, rows, g.dvp,
                [&](int i) { return do16 + int64_t{r + i} * g.dv32; });
    }
  }

  void load_keys_16(int64_t head) {
    const int d = static_cast<int>(p.d), width = static_cast<int>(p.dv);
    const int64_t ldb = 2 * keys.padded;
    if (g.cosine) {
      for (int j = 0; j < keys.padded; ++j) column_scale[j] = j < keys.n ? 1.f / std::max(k_norm[j], kNormEps) : 1.f;
    }
    for (int j = 0; j < keys.n; ++j) {
      copy_row(row16 + int64_t{j} * g.dk32,
               row_or_pad<BFloat16>(p.k, p.pad_k, keys.k_offset[j], keys.position[j], head, p.k_stride_h, p.d), d,
               g.dk32);
    }
    const auto key = [&](int j) { return row16 + int64_t{j} * g.dk32; };
    pack_transposed(kt16, ldb, keys.n, d, key);
    pack_rows(k16_rows, 2 * g.dp, keys.n, g.dp, key);
    for (int j = 0; j < keys.n; ++j) {
      copy_row(row16 + int64_t{j} * g.dv32,
               row_or_pad<BFloat16>(p.v, p.pad_v, keys.v_offset[j], keys.position[j], head, p.v_stride_h, p.dv), width,
               g.dv32);
    }
    pack_transposed(vt16, ldb, keys.n, width, [&](int j) { return row16 + int64_t{j} * g.dv32; });
  }

  void recompute_rows_16(int r, int rows, const float* table) {
    const int rows16 = round_up(rows, 16);
    for (int i = 0; i < rows; ++i) {
      init_logits(bias + int64_t{i} * g.ld, keys, table ? table + queries.table[r + i] : nullptr, queries.label[r + i],
                  p.mask_value);
    }
    tile_gemm(rows16, keys.padded, g.dk32, q16 + int64_t{r} * g.dk32, g.dk32, kt16, 2 * keys.padded, prob, g.ld, false);
    tile_gemm(rows16, keys.padded, g.dv32, do16 + int64_t{r} * g.dv32, g.dv32, vt16, 2 * keys.padded, dlogit, g.ld,
              false);
    for (int i = 0; i < rows; ++i) {
      if (i % kRows == 0) prefetch();
      const vf factor = set1(row_scale[r + i]);
      float* row = prob + int64_t{i} * g.ld;
      const float* row_bias = bias + int64_t{i} * g.ld;
      for (int j = 0; j < keys.padded; j += kLanes) {
        const vf scale = g.cosine ? factor * load(column_scale + j) : factor;
        store(row + j, fma(load(row + j), scale, load(row_bias + j)));
      }
      softmax_backward<1>(row, dlogit + int64_t{i} * g.ld, r + i);
    }
    for (int i = rows; i < round_up(rows, 32); ++i) {  // rows of the transposed operands' padding
      zero(prob + int64_t{i} * g.ld, keys.padded);
      zero(dlogit + int64_t{i} * g.ld, keys.padded);
    }
  }

  // dq rows += dS K; the norms of cosine attention multiply dS on the way to bfloat16.
  void dq_rows_16(int r, int rows, bool accumulate) {
    const int depth = round_up(keys.padded, 32);
    for (int i = 0; i < rows; ++i) {
      const float* row = dlogit + int64_t{i} * g.ld;
      BFloat16* dst = ds16 + int64_t{i} * depth;
      for (int j = 0; j < keys.padded; j += kLanes) {
        store(dst + j, g.cosine ? load(row + j) * load(column_scale + j) : load(row + j));
      }
      if (depth > keys.padded) store(dst + keys.padded, vf{});
    }
    tile_gemm(round_up(rows, 16), g.dp, depth, ds16, depth, k16_rows, 2 * g.dp, dq + int64_t{r} * g.dp, g.dp,
              accumulate);
  }

  // dv += P^T dO, dk += dS^T q.
  void dkv_rows_16(int r, int rows, bool accumulate) {
    const int depth = round_up(rows, 32);
    transpose_to_bfloat16(pt16, depth, prob, g.ld, depth, keys.padded);
    tile_gemm(keys.padded, g.dvp, depth, pt16, depth, do16_rows + int64_t{r} * g.dvp, 2 * g.dvp, dv, g.dvp, accumulate);
    for (int i = 0; i < rows; ++i) {
      float* row = dlogit + int64_t{i} * g.ld;
      for (int j = 0; j < keys.padded; j += kLanes) store(row + j, load(row + j) * row_scale[r + i]);
    }
    transpose_to_bfloat16(dst16, depth, dlogit, g.ld, depth, keys.padded);
    tile_gemm(keys.padded, g.dp, depth, dst16, depth, q16_rows + int64_t{r} * g.dp, 2 * g.dp, dk, g.dp, accumulate);
  }
#endif

  // sum_table[offset of (query, key)] += dS, for one query.
  EFFVIT_INLINE void add_to_table(const float* ds, int table_offset) {
    float* const table = sum_table + table_offset;
    const Run* const runs = keys.run;
    for (int r = 0, end = keys.runs; r < end; ++r) {
      const Run run = runs[r];
      float* dst = table + run.table;
      const float* src = ds + run.column;
      int i = 0;
      for (; i + kLanes <= run.length; i += kLanes) store(dst + i, load(dst + i) + load(src + i));
      if (i < run.length) store(dst + i, load(dst + i) + first_lanes(load(src + i), run.length - i));
    }
  }

  // Logits of R queries from i on and dP -> P and dS, in place. With all keys at hand the rows are normalised again and
  // the sum of P dP is taken from them, so that neither the rounding of lse nor that of out enters; a window in several
  // tiles relies on both.
  template <int R>
  EFFVIT_INLINE void softmax_backward(float* rows, float* drows, int i) {
    float *row[R], *drow[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      row[r] = rows + r * g.ld;
      drow[r] = drows + r * g.ld;
    }
    const int end = keys.padded;
    vf log_sum[R], factor[R], d[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) log_sum[r] = set1(lse[i + r]);
    if (!g.single) {
      for (int r = 0; r < R; ++r) d[r] = set1(delta[i + r]);
      for (int j = 0; j < end; j += kLanes) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vf e = exp(load(row[r] + j) - log_sum[r]);
          store(row[r] + j, e);
          store(drow[r] + j, e * (load(drow[r] + j) - d[r]));
        }
      }
      return;
    }
    vf total[R] = {}, along[R] = {};
    for (int j = 0; j < end; j += kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf e = exp(load(row[r] + j) - log_sum[r]);
        store(row[r] + j, e);
        total[r] = total[r] + e;
        along[r] = fma(e, load(drow[r] + j), along[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float inverse = 1.f / reduce_add(total[r]);
      factor[r] = set1(inverse);
      d[r] = set1(reduce_add(along[r]) * inverse + delta[i + r]);
    }
    for (int j = 0; j < end; j += kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf e = load(row[r] + j) * factor[r];
        store(row[r] + j, e);
        store(drow[r] + j, e * (load(drow[r] + j) - d[r]));
      }
    }
  }

  void prefetch() {
    ahead.step();
    for (int i = ahead.from; i < ahead.to; ++i) {
      const Queries& nq = ahead.tokens->queries;
      const Keys& nk = ahead.tokens->keys;
      if (i < nq.n) {
        prefetch_heads<T>(p.q, nq.offset[i], ahead.head, ahead.heads, p.q_stride_h, p.d);
        prefetch_heads<T>(p.grad_out, nq.grad_offset[i], ahead.head, ahead.heads, p.grad_out_stride_h, p.dv);
      }
      prefetch_heads<T>(p.k, nk.k_offset[i], ahead.head, ahead.heads, p.k_stride_h, p.d);
      prefetch_heads<T>(p.v, nk.v_offset[i], ahead.head, ahead.heads, p.v_stride_h, p.dv);
      if (nk.position[i] < 0) continue;
      const T* gradient = gradient_row(nk.position[i]);
      prefetch_heads<T>(gradient, 0, ahead.head, ahead.heads, p.d, p.d);
      prefetch_heads<T>(gradient, p.h * p.d, ahead.head, ahead.heads, p.d, p.d);
      prefetch_heads<T>(gradient, 2 * p.h * p.d, ahead.head, ahead.heads, p.dv, p.dv);
    }
  }

  // P and dS of query rows [r, r + rows) into rows [0, rows) of prob and dlogit.
  void recompute_rows(int r, int rows, const float* table) {
    for (int i = 0; i < rows; ++i) {
      init_logits(prob + int64_t{i} * g.ld, keys, table ? table + queries.table[r + i] : nullptr, queries.label[r + i],
                  p.mask_value);
    }
    for (int i0 = 0; i0 < rows; i0 += kRows) {
      const int block = std::min(kRows, rows - i0), first = r + i0;
      float *s = prob + int64_t{i0} * g.ld, *ds = dlogit + int64_t{i0} * g.ld;
      prefetch();
      gemm(block, keys.padded, static_cast<int>(p.d), RowMajorA{q + int64_t{first} * g.dp, g.dp},
           DenseB{kt, keys.padded}, s, g.ld, true);
      gemm(block, keys.padded, static_cast<int>(p.dv), RowMajorA{grad_out + int64_t{first} * g.dvp, g.dvp},
           DenseB{vt, keys.padded}, ds, g.ld, false);
      if (block == kRows) {
        softmax_backward<kRows>(s, ds, first);
      } else {
        for (int i = 0; i < block; ++i) softmax_backward<1>(s + i * g.ld, ds + i * g.ld, first + i);
      }
    }
  }

  // All pads of a tile are one and the same key, so their columns of P and dS are summed before anything else.
  void add_pads(int r, int rows) {
    for (int i = 0; i < rows; ++i) {
      float sum_p = 0.f, sum_ds = 0.f;
      for (int j = 0; j < keys.n; ++j) {
        if (keys.position[j] < 0) {
          sum_p += prob[int64_t{i} * g.ld + j];
          sum_ds += dlogit[int64_t{i} * g.ld + j];
        }
      }
      axpy(sum_pad_v, sum_p, grad_out + int64_t{r + i} * g.dvp, g.dvp);
      axpy(sum_pad_k, sum_ds, q + int64_t{r + i} * g.dp, g.dp);
    }
  }

  // One (queries, keys) tile. want_dq covers everything that is summed over queries of a window: dq, table, pads.
  void tile(int64_t head, bool want_dq, bool want_dkv, bool first_dq, bool first_dkv) {
    const float* table = tables.get(p, g, head);
    for (int r = 0; r < queries.n; r += kSubRows) {
      const int rows = std::min(kSubRows, queries.n - r);
      const bool accumulate_dkv = !first_dkv || r > 0;
#if defined(EFFVIT_HAS_TILES)
      if constexpr (kTiles<T>) {
        recompute_rows_16(r, rows, table);
        if (want_dq) {
          dq_rows_16(r, rows, !first_dq);
          add_sums(r, rows);
        }
        if (want_dkv) dkv_rows_16(r, rows, accumulate_dkv);
        continue;
      }
#endif
      recompute_rows(r, rows, table);
      if (want_dq) {
        gemm(rows, g.dp, keys.n, RowMajorA{dlogit, g.ld}, DenseB{k, g.dp}, dq + int64_t{r} * g.dp, g.dp, !first_dq);
        add_sums(r, rows);
      }
      if (want_dkv) {
        gemm(keys.n, g.dvp, rows, TransposedA{prob, g.ld}, DenseB{grad_out + int64_t{r} * g.dvp, g.dvp}, dv, g.dvp,
             accumulate_dkv);
        gemm(keys.n, g.dp, rows, TransposedA{dlogit, g.ld}, DenseB{q + int64_t{r} * g.dp, g.dp}, dk, g.dp,
             accumulate_dkv);
      }
    }
  }

  void add_sums(int r, int rows) {
    if (sum_table) {
      for (int i = 0; i < rows; ++i) add_to_table(dlogit + int64_t{i} * g.ld, queries.table[r + i]);
    }
    if (keys.pads) add_pads(r, rows);
  }

  T* gradient_row(int64_t position) const { return static_cast<T*>(p.dqkv) + position * p.h * (2 * p.d + p.dv); }

  void write_dq(int64_t head) {
    const float factor = g.cosine ? temperature(p, head) : p.scale;
    const bool clamped = g.cosine && load_scalar(p.logit_scale, p.logit_scale_dtype, head) > kLogitScaleMax;
    for (int i = 0; i < queries.n; ++i) {
      float* row = dq + int64_t{i} * g.dp;
      float scale = factor;
      if (g.cosine) {
        float* unit = q + int64_t{i} * g.dp;  // temperature * q^
        if (!clamped) *sum_tau += dot(unit, row, g.dp);
        const vf inverse = set1(1.f / factor), forward = set1(factor);
        for (int c = 0; c < g.dp; c += kLanes) {
          store(row + c, load(row + c) * forward);
          store(unit + c, load(unit + c) * inverse);
        }
        normalize_row_backward(row, unit, q_norm[i], g.dp);
        scale = 1.f;
      }
      store_row(gradient_row(queries.position[i]) + head * p.d, row, static_cast<int>(p.d), scale);
    }
  }

  void write_dkv_row(int64_t position, int64_t head, float* row_k, const float* row_v) {
    T* base = gradient_row(position);
    store_row(base + (p.h + head) * p.d, row_k, static_cast<int>(p.d));
    store_row(base + 2 * p.h * p.d + head * p.dv, row_v, static_cast<int>(p.dv));
  }

  void window_in_one_tile(int64_t head) {
    load_queries(head);
    load_keys(head);
    tile(head, true, true, true, true);
    write_dq(head);
    for (int j = 0; j < keys.n; ++j) {
      if (keys.position[j] < 0) continue;
      float* row = dk + int64_t{j} * g.dp;
      if (g.cosine) normalize_row_backward(row, k + int64_t{j} * g.dp, k_norm[j], g.dp);
      write_dkv_row(keys.position[j], head, row, dv + int64_t{j} * g.dvp);
    }
  }

  // Pass 1 over a window in tiles: dq, the table, the temperature and the pads.
  void queries_of_window(int64_t b, int wy, int wx, int64_t head) {
    const int key_end = g.y.window + g.y.halo;
    for (int y0 = 0; y0 < g.y.window; y0 += g.q_tile_rows) {
      find_queries(p, g, b, wy, wx, y0, std::min(y0 + g.q_tile_rows, g.y.window), &queries);
      if (queries.n == 0) continue;
      load_queries(head);
      bool first = true;
      for (int ky = -g.y.halo; ky < key_end; ky += g.k_tile_rows) {
        find_keys(p, g, b, wy, wx, ky, std::min(ky + g.k_tile_rows, key_end), -g.x.halo, g.x.window + g.x.halo,
                  g.has_pad, &keys);
        if (keys.n == 0) continue;
        load_keys(head);
        tile(head, true, false, first, true);
        first = false;
      }
      write_dq(head);
    }
  }

  // Pass 2: dk and dv of the window's own tokens, gathered from every window whose halo reaches them.
  void keys_of_window(int64_t b, int wy, int wx, int64_t head) {
    const int reach_y = (g.y.halo + g.y.window - 1) / g.y.window, reach_x = (g.x.halo + g.x.window - 1) / g.x.window;
    const int own_rows = std::min(g.q_tile_rows, g.k_tile_rows);
    for (int y0 = 0; y0 < g.y.window; y0 += own_rows) {
      const int y1 = std::min(y0 + own_rows, g.y.window);
      zero(own_k, int64_t{y1 - y0} * g.x.window * g.dp);
      zero(own_v, int64_t{y1 - y0} * g.x.window * g.dvp);
      for (int ny = -reach_y; ny <= reach_y; ++ny) {
        const int oy = wy + ny * g.y.dilation;
        // The tokens' local coordinates in the neighbour's frame, cut to what its halo covers.
        const int ky0 = std::max(y0 - ny * g.y.window, -g.y.halo);
        const int ky1 = std::min(y1 - ny * g.y.window, g.y.window + g.y.halo);
        if (oy < 0 || oy >= g.y.windows || ky0 >= ky1) continue;
        for (int nx = -reach_x; nx <= reach_x; ++nx) {
          const int ox = wx + nx * g.x.dilation;
          const int kx0 = std::max(-nx * g.x.window, -g.x.halo);
          const int kx1 = std::min(g.x.window - nx * g.x.window, g.x.window + g.x.halo);
          if (ox < 0 || ox >= g.x.windows || kx0 >= kx1) continue;
          find_keys(p, g, b, oy, ox, ky0, ky1, kx0, kx1, false, &keys);
          if (keys.n == 0) continue;
          load_keys(head);
          bool first = true;
          for (int qy = 0; qy < g.y.window; qy += g.q_tile_rows) {
            find_queries(p, g, b, oy, ox, qy, std::min(qy + g.q_tile_rows, g.y.window), &queries);
            if (queries.n == 0) continue;
            load_queries(head);
            tile(head, false, true, true, first);
            first = false;
          }
          if (first) continue;
          const int width = kx1 - kx0;
          for (int j = 0; j < keys.n; ++j) {
            const int y = keys.owner[j] / width + ky0 + ny * g.y.window - y0;
            const int x = keys.owner[j] % width + kx0 + nx * g.x.window;
            const int64_t own = int64_t{y} * g.x.window + x;
            axpy(own_k + own * g.dp, 1.f, dk + int64_t{j} * g.dp, g.dp);
            axpy(own_v + own * g.dvp, 1.f, dv + int64_t{j} * g.dvp, g.dvp);
          }
        }
      }
      find_keys(p, g, b, wy, wx, y0, y1, 0, g.x.window, false, &keys);
      for (int j = 0; j < keys.n; ++j) {
        float* row = own_k + int64_t{keys.owner[j]} * g.dp;
        if (g.cosine) {
          load_row(k, static_cast<const T*>(p.k) + keys.k_offset[j] + head * p.k_stride_h, static_cast<int>(p.d));
          normalize_row(k, g.dp, k_norm);
          normalize_row_backward(row, k, k_norm[0], g.dp);
        }
        write_dkv_row(keys.position[j], head, row, own_v + int64_t{keys.owner[j]} * g.dvp);
      }
    }
  }

  void run(float* partials, int64_t begin, int64_t end) {
    tables.reset(p);
    [[maybe_unused]] const Products<T> products;
    const int64_t at_once = Ahead::group_of_heads(p, g, sizeof(T));
    const Partials layout(p, g);
    const int64_t all = p.B * g.windows;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit / layout.groups, group = unit - chunk * layout.groups;
      const int64_t w0 = all * chunk / layout.chunks, w1 = all * (chunk + 1) / layout.chunks;
      const int64_t h0 = p.h * group / layout.groups, h1 = p.h * (group + 1) / layout.groups;
      for (int64_t head = h0; head < h1; ++head) zero(layout.at(partials, p, chunk, head), layout.stride);
      for (int64_t window = w0; window < w1; ++window) {
        const int64_t b = window / g.windows, w = window - b * g.windows;
        const int wy = static_cast<int>(w / g.x.windows), wx = static_cast<int>(w - int64_t{wy} * g.x.windows);
        const Tokens *here = nullptr, *after = nullptr;
        if (g.single) {
          here = &windows.get(p, g, window);
          after = window + 1 < w1 ? &windows.get(p, g, window + 1) : nullptr;
          queries = here->queries;
          keys = here->keys;
          if (queries.n == 0) continue;
        }
        for (int64_t head = h0; head < h1; ++head) {
          float* sums = layout.at(partials, p, chunk, head);
          sum_table = p.bias_table ? sums : nullptr;
          sum_pad_k = sums + layout.table_stride;
          sum_pad_v = sum_pad_k + layout.pad_k;
          sum_tau = sum_pad_v + layout.pad_v;
          if (g.single) {
            if ((head - h0) % at_once == 0) {
              const int64_t last = std::min(head + at_once, h1), blocks = (queries.n + kRows - 1) / kRows;
              ahead.plan(*here, after, last, h0, h1, at_once, (last - head) * blocks);
            }
            window_in_one_tile(head);
          } else {
            queries_of_window(b, wy, wx, head);
            keys_of_window(b, wy, wx, head);
          }
        }
      }
    }
  }
};

template <class T>
void reduce(const Params& p, const Geometry& g, const float* partials) {
  const Partials layout(p, g);
  const int64_t floats = layout.stride + g.dp + kLanes;
  float* const sum = static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * sizeof(float)));
  float *unit = sum + layout.stride, *norm = unit + g.dp;
  for (int64_t head = 0; head < p.h; ++head) {
    zero(sum, layout.stride);
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
      const float* part = partials + (chunk * p.h + head) * layout.stride;
      for (int64_t i = 0; i < layout.stride; i += kLanes) store(sum + i, load(sum + i) + load(part + i));
    }
    for (int64_t i = 0; i < layout.table; ++i) {
      store_scalar(p.dbias_table, p.bias_dtype, head * layout.table + i, sum[layout.table - 1 - i]);
    }
    float* pad_k = sum + layout.table_stride;
    if (g.has_pad) {
      if (g.cosine) {
        load_row(unit, static_cast<const T*>(p.pad_k) + head * p.d, static_cast<int>(p.d));
        normalize_row(unit, g.dp, norm);
        normalize_row_backward(pad_k, unit, *norm, g.dp);
      }
      store_row(static_cast<T*>(p.dpad_k) + head * p.d, pad_k, static_cast<int>(p.d));
      store_row(static_cast<T*>(p.dpad_v) + head * p.dv, pad_k + layout.pad_k, static_cast<int>(p.dv));
    }
    if (g.cosine) store_scalar(p.dlogit_scale, p.logit_scale_dtype, head, pad_k[layout.pad_k + layout.pad_v]);
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) {
  const Geometry g(p);
  return p.B * g.windows * p.h;
}

void forward(const Params& p, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Forward<decltype(type)>>(p, g, begin, end); });
}

int64_t backward_units(const Params& p) {
  const Geometry g(p);
  const Partials layout(p, g);
  return layout.chunks * layout.groups;
}

int64_t backward_partials(const Params& p) {
  const Geometry g(p);
  const Partials layout(p, g);
  return layout.chunks * p.h * layout.stride;
}

void backward(const Params& p, float* partials, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Backward<decltype(type)>>(p, g, partials, begin, end); });
}

void backward_reduce(const Params& p, const float* partials) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { reduce<decltype(type)>(p, g, partials); });
}

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const WindowAttentionKernel* EFFVIT_KERNEL_NAME(window_attention)() {
  namespace impl = EFFVIT_ISA_NAME::window_attention_impl;
  static const WindowAttentionKernel kernel = {impl::forward_units,     impl::forward,  impl::backward_units,
                                               impl::backward_partials, impl::backward, impl::backward_reduce};
  return &kernel;
}
}  // namespace effvit::cpu
