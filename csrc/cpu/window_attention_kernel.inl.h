// window_attention on the CPU: what forward and backward share, the forward, and the entry points. On raw pointers,
// compiled once per ISA.
//
// A unit of work is one (window, head). Its tokens are found by index arithmetic and packed into scratch, K transposed
// (that is the layout the row-times-matrix products want). A block of query rows then goes through logits, softmax and
// P·V without leaving the L1 cache. Windows of more than kTileTokens tokens are cut into tiles with an online softmax,
// so the scratch of a thread stays below 2 MiB at any size.
//
// Logits are kept in units of ln 2, so that a probability is one exp2: log2(e) goes into the factor of q, the bias and
// the mask. Gradients of logits are natural.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

using Params = WindowAttentionParams;

constexpr float kNegInf = -__builtin_inff();
constexpr float kLowest = -1e30f;  // start of a running maximum; finite, so that -inf - kLowest is not a NaN
constexpr float kLogitScaleMax = 4.605170185988092f;  // ln 100
constexpr float kNormEps = 1e-12f;
constexpr int kTileTokens = 256;
constexpr int kBlockRows = 64;  // query rows whose logits are held at once, at most
constexpr int kBlockFloats = 5120;  // and as many of their logits as leave half of an L1 cache to the operands
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr double kLog2EWide = 1.4426950408889634;
// Together with the scratch of bfloat16 operands these keep a thread below 2 MiB at any size.
constexpr int64_t kTableCacheBytes = 192 << 10;
constexpr int64_t kExpandedBytes = 64 << 10;
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
  int dk32, dv32;  // and to the depth of a product on tiles
  int ld;  // row stride of a block of logits: an odd number of vectors, with room for one vector of overrun
  int block_rows;  // of logits, in the forward
  int backward_rows;  // and in the backward: whole rows of the window where they are short enough
  bool expanded;  // layout of the bias, see BiasTable
  int bias_row;  // entries from one row of keys to the next, in that layout
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
    ld = ((ceil_div(k_tile_max, kLanes) + 1) | 1) * kLanes;
    block_rows = std::min(kBlockRows, std::max(1, kBlockFloats / ld / kRows) * kRows);
    backward_rows = std::max(1, kBlockRows / p.window_w) * std::min<int>(kBlockRows, p.window_w);
    const int64_t entries = int64_t{p.window_w} * table_h * key_w;
    expanded = entries * 4 <= kExpandedBytes;
    bias_row = expanded ? key_w : table_w;
    single = p.halo_h == 0 && p.halo_w == 0 && q_tile_rows == p.window_h;
    cosine = p.logit_scale != nullptr;
    has_pad = p.pad_k != nullptr;
  }
};

struct Run {
  int column, length, table;  // keys [column, column + length) have entries table, table + 1, ... of the bias
};

// Positions on the map and shift regions of the columns of a window, halo included.
struct Columns {
  int32_t *position = nullptr, *region = nullptr;

  void allocate(Scratch& s, const Geometry& g) {
    position = s.take<int32_t>(g.key_w);
    region = s.take<int32_t>(g.key_w);
  }
  void find(const Geometry& g, int wx, int x0, int x1) {
    for (int x = x0; x < x1; ++x) {
      const int ix = rolled_coordinate(g.x, wx, x);
      position[x + g.x.halo] = map_position(g.x, ix);
      region[x + g.x.halo] = shift_region(g.x, ix);
    }
  }
};

// Queries of one tile: the tokens of the window that are on the map.
struct Queries {
  int n = 0;
  bool mixed = false;  // more than one shift region among the queries
  int64_t* position = nullptr;  // flat index into [B, H, W]
  int64_t* lse_offset = nullptr;  // into lse, of head 0
  int64_t* offset = nullptr;  // into q
  int64_t* grad_offset = nullptr;  // into grad_out
  int64_t* out_offset = nullptr;  // into out, of head 0
  int64_t* dq_offset = nullptr;  // into dqkv, of head 0
  int32_t* table = nullptr;  // offset into the bias
  int32_t* label = nullptr;  // shift region, 0 to 8
  Columns columns;

  void allocate(Scratch& s, const Geometry& g) {
    const int max = g.q_tile_max;
    columns.allocate(s, g);
    position = s.take<int64_t>(max);
    lse_offset = s.take<int64_t>(max);
    offset = s.take<int64_t>(max);
    grad_offset = s.take<int64_t>(max);
    out_offset = s.take<int64_t>(max);
    dq_offset = s.take<int64_t>(max);
    table = s.take<int32_t>(max);
    label = s.take<int32_t>(max);
  }
};

// Keys of one tile: the tokens on the map, and with pad_k those outside of it too (position -1).
struct Keys {
  int n = 0, padded = 0, runs = 0, pads = 0;
  bool mixed = false;  // more than one shift region among the keys
  int64_t* position = nullptr;  // flat index into [B, H, W], -1 for a pad
  int64_t* k_offset = nullptr;
  int64_t* v_offset = nullptr;
  int64_t* grad_offset = nullptr;  // into dqkv, of head 0 of dk; -1 for a pad
  int32_t* label = nullptr;
  int32_t* owner = nullptr;  // row-major index in the rectangle that the tile was cut from
  Run* run = nullptr;
  float* mask = nullptr;  // per shift region of a query: what the mask adds to its logits
  Columns columns;

  void allocate(Scratch& s, const Geometry& g) {
    const int max = g.k_tile_max;
    columns.allocate(s, g);
    position = s.take<int64_t>(max);
    k_offset = s.take<int64_t>(max);
    v_offset = s.take<int64_t>(max);
    grad_offset = s.take<int64_t>(max);
    label = s.take<int32_t>(max + kLanes);
    owner = s.take<int32_t>(max);
    run = s.take<Run>(max);
    mask = s.take<float>(int64_t{9} * round_up(max, kLanes));
  }
  // Whether any of these keys is masked for any of the queries: unless all of both are of one region.
  bool masked(const Queries& q) const { return mixed || q.mixed || (n > 0 && q.n > 0 && label[0] != q.label[0]); }
};

void find_queries(const Params& p, const Geometry& g, int64_t b, int wy, int wx, int y0, int y1, Queries* q) {
  int n = 0;
  bool mixed = false;
  q->columns.find(g, wx, 0, g.x.window);
  const int32_t *const column = q->columns.position + g.x.halo, *const region = q->columns.region + g.x.halo;
  for (int y = y0; y < y1; ++y) {
    const int iy = rolled_coordinate(g.y, wy, y), py = map_position(g.y, iy);
    if (py < 0) continue;
    const int region_y = 3 * shift_region(g.y, iy);
    const int64_t row = (b * p.H + py) * p.W, lse_row = (b * p.h * p.H + py) * p.W;
    const int64_t q_row = b * p.q_stride_b + py * p.q_stride_y;
    const int64_t grad_row = b * p.grad_out_stride_b + py * p.grad_out_stride_y;
    const int table_row = (g.y.window - 1 - y) * g.bias_row + (g.expanded ? 0 : g.x.window - 1);
    const int table_step = g.expanded ? g.table_h * g.key_w : -1;
    for (int x = 0; x < g.x.window; ++x) {
      const int px = column[x];
      if (px < 0) continue;
      q->position[n] = row + px;
      q->lse_offset[n] = lse_row + px;
      q->offset[n] = q_row + px * p.q_stride_x;
      q->grad_offset[n] = grad_row + px * p.grad_out_stride_x;
      q->out_offset[n] = (row + px) * p.h * p.dv;
      q->dq_offset[n] = (row + px) * p.h * (2 * p.d + p.dv);
      q->table[n] = table_row + x * table_step;
      q->label[n] = region_y + region[x];
      mixed |= q->label[n] != q->label[0];
      ++n;
    }
  }
  q->n = n;
  q->mixed = mixed;
}

// Keys of window (wy, wx) in local rows [y0, y1) and columns [x0, x1), counted from -halo.
void find_keys(const Params& p, const Geometry& g, int64_t b, int wy, int wx, int y0, int y1, int x0, int x1,
               bool with_pads, Keys* k) {
  int n = 0, runs = 0, pads = 0, next = -1;  // next: the entry of the bias that would continue the run
  bool mixed = false;
  k->columns.find(g, wx, x0, x1);
  const int32_t *const column = k->columns.position + g.x.halo, *const region = k->columns.region + g.x.halo;
  for (int y = y0; y < y1; ++y) {
    const int iy = rolled_coordinate(g.y, wy, y), py = map_position(g.y, iy);
    if (py < 0 && !with_pads) continue;
    const int region_y = 3 * shift_region(g.y, iy);
    const int64_t row = (b * p.H + py) * p.W, token = p.h * (2 * p.d + p.dv);
    const int64_t k_row = b * p.k_stride_b + py * p.k_stride_y, v_row = b * p.v_stride_b + py * p.v_stride_y;
    for (int x = x0; x < x1; ++x) {
      const int px = column[x];
      const bool outside = py < 0 || px < 0;
      if (outside && !with_pads) continue;
      k->position[n] = outside ? -1 : row + px;
      k->k_offset[n] = outside ? 0 : k_row + px * p.k_stride_x;
      k->v_offset[n] = outside ? 0 : v_row + px * p.v_stride_x;
      k->grad_offset[n] = outside ? -1 : (row + px) * token + p.h * p.d;
      k->label[n] = region_y + region[x];
      k->owner[n] = (y - y0) * (x1 - x0) + (x - x0);
      mixed |= k->label[n] != k->label[0];
      pads += outside;
      const int table = (y + g.y.halo) * g.bias_row + (x + g.x.halo);
      if (table == next) {
        ++k->run[runs - 1].length;
      } else {
        k->run[runs++] = {n, 1, table};
      }
      next = table + 1;
      ++n;
    }
  }
  k->n = n;
  k->padded = round_up(n, kLanes);
  k->runs = runs;
  k->pads = pads;
  k->mixed = mixed;
  for (int j = n; j < k->padded; ++j) k->label[j] = -1;
}

// The rows of `mask` that these queries want. A query's region is 3 * (region of y) + (region of x).
void find_mask(const Params& p, const Queries& q, const Keys& k) {
  if (!k.masked(q)) return;
  const vf value = set1(p.mask_value * kLog2E);
  for (int i = 0, found = 0; i < q.n; ++i) {
    const int label = q.label[i];
    if (found >> label & 1) continue;
    found |= 1 << label;
    float* row = k.mask + int64_t{label} * k.padded;
    for (int j = 0; j < k.padded; j += kLanes) store(row + j, (vf)((vi)(load(k.label + j) != label) & (vi)value));
  }
}

// The bias tables of the heads in reversed order, so that entries grow with the key, times log2(e). Of a reversed table
// [table_h, table_w] the query in local column x sees key_w columns, from window_w - 1 - x on. Where these fit
// kExpandedBytes they are laid out one after the other, [window_w][table_h][key_w]: the biases of one query towards all
// keys of a window then are one run of memory, whatever the window.
class BiasTable {
 public:
  void allocate(Scratch& s, const Params& p, const Geometry& g, int64_t heads) {
    if (!p.bias_table) return;
    entries_ = g.expanded ? int64_t{g.x.window} * g.table_h * g.key_w : int64_t{g.table_h} * g.table_w;
    stride_ = (entries_ + kLanes + 15) / 16 * 16;  // a run's last vector may reach past the end
    slots_ = heads * stride_ * 4 <= kTableCacheBytes ? heads : 1;
    data_ = s.take<float>(slots_ * stride_);
    head_ = s.take<int64_t>(slots_);
    line_ = s.take<float>(g.table_w);
  }
  void reset() {
    for (int64_t i = 0; i < slots_; ++i) head_[i] = -1;
  }
  const float* get(const Params& p, const Geometry& g, int64_t head) {
    if (!p.bias_table) return nullptr;
    const int64_t slot = head % slots_;
    float* t = data_ + slot * stride_;
    if (head_[slot] == head) return t;
    for (int y = 0; y < g.table_h; ++y) {
      const int64_t from = head * p.bias_stride_h + (g.table_h - 1 - y) * p.bias_stride_y;
      for (int x = 0; x < g.table_w; ++x) {
        const float b = load_scalar(p.bias_table, p.bias_dtype, from + (g.table_w - 1 - x) * p.bias_stride_x);
        line_[x] = static_cast<float>(b * kLog2EWide);
      }
      if (!g.expanded) {
        std::memcpy(t + int64_t{y} * g.table_w, line_, static_cast<size_t>(g.table_w) * 4);
        continue;
      }
      for (int x = 0; x < g.x.window; ++x) {
        std::memcpy(t + (int64_t{x} * g.table_h + y) * g.key_w, line_ + g.x.window - 1 - x,
                    static_cast<size_t>(g.key_w) * 4);
      }
    }
    for (int64_t i = entries_; i < stride_; ++i) t[i] = 0.f;
    head_[slot] = head;
    return t;
  }

 private:
  float *data_ = nullptr, *line_ = nullptr;
  int64_t* head_ = nullptr;
  int64_t entries_ = 0, stride_ = 0, slots_ = 0;
};

// What is added to the products of a block of query rows: where each row's biases and mask lie.
struct Additions {
  const float **bias = nullptr, **mask = nullptr;
  float* none = nullptr;  // a row of zeros
  bool masked = false;

  void allocate(Scratch& s, const Geometry& g) {
    bias = s.take<const float*>(kBlockRows);
    mask = s.take<const float*>(kBlockRows);
    none = s.take<float>(g.ld);
  }
  void reset(const Geometry& g) { zero(none, g.ld); }
  // Rows [r, r + rows). Keys that are not one run of the table have their biases copied to `room`.
  void find(const Queries& q, const Keys& k, const float* table, int r, int rows, float* room, int64_t ld) {
    masked = k.masked(q);
    for (int i = 0; i < rows; ++i) {
      bias[i] = table ? table + q.table[r + i] + k.run[0].table : none;
      if (masked) mask[i] = k.mask + int64_t{q.label[r + i]} * k.padded;
    }
    if (!table || k.runs == 1) return;
    for (int i = 0; i < rows; ++i, room += ld) {
      for (int s = 0; s < k.runs; ++s) {
        const Run run = k.run[s];
        const float* from = table + q.table[r + i] + run.table;
        for (int j = 0; j < run.length; j += kLanes) store(room + run.column + j, load(from + j));
      }
      bias[i] = room;
    }
  }
};

// What products are multiplied with on their way to logits, where the operands are the tokens as they are.
struct NoFactor {
  EFFVIT_INLINE vf operator()(int, int, vf x, vf bias) const { return x + bias; }
};
struct OneFactor {
  float factor;
  EFFVIT_INLINE vf operator()(int, int, vf x, vf bias) const { return fma(x, set1(factor), bias); }
};
struct OuterFactor {
  const float *row, *column;
  EFFVIT_INLINE vf operator()(int r, int c, vf x, vf bias) const {
    return fma(x, set1(row[r]) * load(column + c), bias);
  }
};

// Logits of a block of rows: products, bias and mask. The bias may lie where the logits go.
template <bool kMasked, class Factor>
struct StoreLogits {
  float* data;
  int64_t ld;
  const float *const *bias, *const *mask;
  Factor factor;
  EFFVIT_INLINE void operator()(int r, int c, vf x) const {
    x = factor(r, c, x, load(bias[r] + c));
    if (kMasked) x = x + load(mask[r] + c);
    store(data + r * ld + c, x);
  }
};

// dst = A[m, k] B[k, n] times the factor, and the additions.
template <class A, class Factor, class F>
EFFVIT_INLINE void gemm_to_logits(int m, int n, int k, A a, DenseB b, float* dst, int64_t ld, Factor factor,
                                  const Additions& add, const F& between) {
  if (add.masked) {
    gemm_into(m, n, k, a, b, StoreLogits<true, Factor>{dst, ld, add.bias, add.mask, factor}, between);
  } else {
    gemm_into(m, n, k, a, b, StoreLogits<false, Factor>{dst, ld, add.bias, nullptr, factor}, between);
  }
}

// Rows of tokens of `width` columns: row r goes to offset[r], times factor[r], rounded to T. kPlain: whole vectors and
// no offset below zero, which is not written.
template <class T, bool kPlain>
struct StoreTokens {
  T* base;
  const int64_t* offset;
  const float* factor;
  int width;
  EFFVIT_INLINE void operator()(int r, int c, vf x) const {
    if (!kPlain && offset[r] < 0) return;
    x = x * set1(factor[r]);
    T* to = base + offset[r] + c;
    if (kPlain || c + kLanes <= width) {
      store(to, x);
    } else {
      alignas(64) float some[kLanes];
      store(some, x);
      for (int i = 0; i < width - c; ++i) to[i] = from_float<T>(some[i]);
    }
  }
};

// Rows of A[m, k] B[k, width] to tokens, times factor. holes: some offsets are below zero.
template <class T, class A, class F>
EFFVIT_INLINE void gemm_to_tokens(int m, int width, int k, A a, DenseB b, T* base, const int64_t* offset,
                                  const float* factor, bool holes, const F& between) {
  const int padded = round_up(width, kLanes);
  if (width == padded && !holes) {
    gemm_into(m, padded, k, a, b, StoreTokens<T, true>{base, offset, factor, width}, between);
  } else {
    gemm_into(m, padded, k, a, b, StoreTokens<T, false>{base, offset, factor, width}, between);
  }
}

// Calls f with the number of vectors in a row of logits as a constant, where it is that of a common window (49 or 64
// tokens); otherwise 0.
template <class F>
EFFVIT_INLINE void dispatch_vectors(int n, const F& f) {
  switch (n) {
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
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
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
  std::conditional_t<kBf16Products<T>, TileScope, int> scope{};
#endif
};

template <class T>
EFFVIT_INLINE const T* row_or_pad(const void* base, const void* pad, int64_t offset, int64_t position, int64_t head,
                                  int64_t head_stride, int64_t width) {
  return position < 0 ? static_cast<const T*>(pad) + head * width
                      : static_cast<const T*>(base) + offset + head * head_stride;
}

// Lanes i < n of x, `other` elsewhere.
EFFVIT_INLINE vf first_lanes_or(vf x, int n, float other) {
  const vi there = lanes_below(n);
  return (vf)(((vi)x & there) | ((vi)set1(other) & ~there));
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
      t.queries.allocate(s, g);
      t.keys.allocate(s, g);
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
      find_mask(p, t.queries, t.keys);
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

// Calls f with the number of vectors in a row of n elements as a constant, where n is a common head dim; otherwise 0.
template <class F>
EFFVIT_INLINE void dispatch_width(int n, const F& f) {
  if (n == 32 && kLanes <= 32) return f(std::integral_constant<int, 32 / kLanes>{});
  if (n == 64) return f(std::integral_constant<int, 64 / kLanes>{});
  f(std::integral_constant<int, 0>{});
}

// A factor of more digits than float32 has: its rounding would turn all logits the same way.
struct WideFactor {
  float high = 1.f, low = 0.f;
  WideFactor() = default;
  explicit WideFactor(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - static_cast<double>(high))) {}
  EFFVIT_INLINE vf operator()(vf x) const { return fma(x, set1(high), x * set1(low)); }
};

// dst[i * round_up(width)] = row(i) * factor in float32, for n rows; padded with zeros.
template <class Row>
EFFVIT_INLINE void pack(float* dst, int n, int width, const Row& row, WideFactor factor = {}) {
  const int64_t padded = round_up(width, kLanes);
  dispatch_width(width, [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    float* to = dst;
    for (int i = 0; i < n; ++i, to += padded) {
      if constexpr (kVectors == 0) {
        load_row(to, row(i), width);
        for (int c = 0; c < padded; c += kLanes) store(to + c, factor(load(to + c)));
      } else {
        const auto* from = row(i);
        vf x[kVectors];
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) x[j] = load(from + j * kLanes);
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) store(to + j * kLanes, factor(x[j]));
      }
    }
  });
}

// The (window, group of heads) after the one at work. Its tokens are fetched in turn, of each token the rows of all
// heads, so that memory is read in long runs: see docs/notes.md. A pass calls step() between
// the row tiles of its products, so that few lines are on their way at once.
struct Ahead {
  const Tokens* tokens = nullptr;
  int64_t head = 0, heads = 0;
  int at = 0, items = 0;
  uint32_t rate = 0, due = 0;  // items per step, and items not yet fetched, in units of 2^-16

  static int64_t group_of_heads(const Params& p, const Geometry& g, int64_t element_bytes) {
    const int64_t per_head = int64_t{g.k_tile_max} * (2 * p.d + p.dv) * element_bytes;
    return std::min(p.h, std::max<int64_t>(1, kAheadBytes / per_head));
  }
  // Called for the first head of a group: [head, last) at work in window `here`, `steps` calls of step() to come. A
  // token is fetched in as many items.
  void plan(const Tokens& here, const Tokens* after, int64_t last, int64_t first_head, int64_t end_head, int64_t group,
            int64_t steps, int items_of_token) {
    tokens = last < end_head ? &here : after;
    head = last < end_head ? last : first_head;
    heads = std::min(group, end_head - head);
    at = 0;
    items = tokens ? tokens->keys.n * items_of_token : 0;
    due = 0;
    rate = static_cast<uint32_t>(ceil_div(int64_t{items} << 16, std::max<int64_t>(steps, 1)));
  }
  // Calls fetch(item) for the next few.
  template <class Fetch>
  EFFVIT_INLINE void step(const Fetch& fetch) {
    due += rate;
    for (; due >= 1 << 16 && at < items; due -= 1 << 16) fetch(at++);
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
  BiasTable tables;
  Additions additions;
  float *q, *k, *kt, *v, *s, *o, *top, *sum, *inverse, *norm;
  // Products of bfloat16: queries, transposed keys, values and probabilities, and what the logits are multiplied with.
  BFloat16 *q16 = nullptr, *kt16 = nullptr, *v16 = nullptr, *p16 = nullptr, *row16 = nullptr;
  float *row_scale = nullptr, *column_scale = nullptr, *bias = nullptr;

  Forward(const Params& params, const Geometry& geometry, Scratch& scratch) : p(params), g(geometry) {
    windows.allocate(scratch, g);
    queries = windows.scratch().queries;
    keys = windows.scratch().keys;
    tables.allocate(scratch, p, g, p.h);
    additions.allocate(scratch, g);
    q = scratch.take<float>(int64_t{g.q_tile_max} * g.dp);
    k = scratch.take<float>(int64_t{g.k_tile_max} * g.dp);
    if constexpr (!kBf16Products<T>) {
      kt = scratch.take<float>(int64_t{g.dp} * round_up(g.k_tile_max, kLanes));
      v = scratch.take<float>(int64_t{g.k_tile_max} * g.dvp);
    }
    const int rows = kBf16Tiles<T> ? 32 : g.block_rows;
    s = scratch.take<float>(int64_t{rows} * g.ld);
    o = scratch.take<float>((kBf16Tiles<T> && g.single ? 32 : round_up(g.q_tile_max, 32)) * int64_t{g.dvp});
    top = scratch.take<float>(g.q_tile_max + kLanes);
    sum = scratch.take<float>(g.q_tile_max + kLanes);
    inverse = scratch.take<float>(g.q_tile_max + kLanes);
    norm = scratch.take<float>(kLanes);
    if constexpr (kBf16Products<T>) {
      const int64_t nk = round_up(g.k_tile_max, 32);
      q16 = scratch.take<BFloat16>(int64_t{round_up(g.q_tile_max, 32)} * g.dk32);
      kt16 = scratch.take<BFloat16>(nk * g.dk32);
      v16 = scratch.take<BFloat16>(nk * g.dvp);
      p16 = scratch.take<BFloat16>(rows * nk);
      row16 = scratch.take<BFloat16>(nk * std::max(g.dk32, g.dvp));
      row_scale = scratch.take<float>(g.q_tile_max);
      column_scale = scratch.take<float>(nk);
      if (kBf16Tiles<T>) bias = scratch.take<float>(rows * g.ld);
    }
  }

  void load_queries(int64_t head) {
    const T* base = static_cast<const T*>(p.q) + head * p.q_stride_h;
    const int d = static_cast<int>(p.d);
    const WideFactor factor(double{g.cosine ? temperature(p, head) : p.scale} * kLog2EWide);
    const int64_t* const offset = queries.offset;
    pack(q, queries.n, d, [&](int i) { return base + offset[i]; }, g.cosine ? WideFactor() : factor);
    for (int i = 0; g.cosine && i < queries.n; ++i) {
      float* row = q + int64_t{i} * g.dp;
      normalize_row(row, g.dp, norm);
      for (int c = 0; c < g.dp; c += kLanes) store(row + c, factor(load(row + c)));
    }
  }

  void load_keys(int64_t head) {
    const int d = static_cast<int>(p.d);
    if constexpr (std::is_same_v<T, float>) {
      if (!g.cosine && keys.pads == 0 && d % kLanes == 0) {
        const float* base = static_cast<const float*>(p.k) + head * p.k_stride_h;
        transpose_rows(kt, keys.padded, keys.n, d, [&](int j) { return base + keys.k_offset[j]; });
        return;
      }
    }
    pack(k, keys.n, d, [&](int j) {
      return row_or_pad<T>(p.k, p.pad_k, keys.k_offset[j], keys.position[j], head, p.k_stride_h, p.d);
    });
    for (int j = 0; g.cosine && j < keys.n; ++j) normalize_row(k + int64_t{j} * g.dp, g.dp, norm);
    transpose_rows(kt, keys.padded, keys.n, d, [&](int j) { return k + int64_t{j} * g.dp; });
  }

  void load_values(int64_t head) {
    pack(v, keys.n, static_cast<int>(p.dv), [&](int j) {
      return row_or_pad<T>(p.v, p.pad_v, keys.v_offset[j], keys.position[j], head, p.v_stride_h, p.dv);
    });
  }

  // Logits of query rows [r, r + rows) -> unnormalised probabilities, at `to` (s itself, or bfloat16); updates top and
  // sum, and rescales what o holds already (tiles after the first). First all maxima, then all exponentials: the latter
  // then wait for nothing.
  template <int kVectors, class P>
  void softmax(int r, int rows, bool first, P* to, int64_t ld_to) {
    const int last = (kVectors ? kVectors : keys.padded / kLanes) * kLanes - kLanes;
    const int64_t ld = g.ld;
    const vi there = lanes_below(keys.n - last);
    const vf absent = (vf)(~there & (vi)set1(kNegInf));
    float *row = s, *const highest = inverse;  // free until the sums are known
    for (int i = 0; i < rows; ++i, row += ld) {
      vf m = max(set1(first ? kLowest : top[r + i]), (vf)((vi)load(row + last) & there) + absent);
#pragma GCC unroll 8
      for (int j = 0; j < last; j += kLanes) m = max(m, load(row + j));
      highest[i] = reduce_max(m);
    }
    row = s;
    for (int i = 0; i < rows; ++i, row += ld, to += ld_to) {
      const vf shift = set1(highest[i]);
      vf total{};
#pragma GCC unroll 8
      for (int j = 0; j < last; j += kLanes) {
        const vf e = exp2(load(row + j) - shift);
        store(to + j, e);
        total = total + e;
      }
      const vf e = (vf)((vi)exp2(load(row + last) - shift) & there);
      store(to + last, e);
      accumulate_sum(r + i, highest[i], reduce_add(total + e), first);
    }
  }

  EFFVIT_INLINE void accumulate_sum(int i, float highest, float total, bool first) {
    if (first) {
      sum[i] = total;
    } else {
      const vf correction = exp2(set1(top[i] - highest));
      sum[i] = sum[i] * correction[0] + total;
      float* acc = o + int64_t{i} * g.dvp;
      for (int c = 0; c < g.dvp; c += kLanes) store(acc + c, load(acc + c) * correction);
    }
    top[i] = highest;
  }

  void write_row(int i, const float* row, int64_t head) {
    T* dst = static_cast<T*>(p.out) + queries.out_offset[i] + head * p.dv;
    store_row(dst, row, static_cast<int>(p.dv), 1.f / sum[i]);
  }

  void write_lse(int64_t head) {
    for (int i = queries.n; i < round_up(queries.n, kLanes); ++i) sum[i] = 1.f;
    const int64_t plane = p.H * p.W;
    for (int i = 0; i < queries.n; i += kLanes) {
      alignas(64) float lse[kLanes];
      store(lse, fma(load(top + i), set1(kLn2), log(load(sum + i))));
      for (int j = 0; j < kLanes && i + j < queries.n; ++j) {
        p.lse[queries.lse_offset[i + j] + head * plane] = lse[j];
      }
    }
  }

  // Inlined by force: GCC takes a function that only prefetches for one without effects, and drops the calls.
  void prefetch() {
    ahead.step([&](int i) __attribute__((always_inline)) {
      const Queries& nq = ahead.tokens->queries;
      const Keys& nk = ahead.tokens->keys;
      prefetch_heads<T>(p.k, nk.k_offset[i], ahead.head, ahead.heads, p.k_stride_h, p.d);
      prefetch_heads<T>(p.v, nk.v_offset[i], ahead.head, ahead.heads, p.v_stride_h, p.dv);
      if (i >= nq.n) return;
      prefetch_heads<T>(p.q, nq.offset[i], ahead.head, ahead.heads, p.q_stride_h, p.d);
      prefetch_heads<T>(p.out, nq.out_offset[i], ahead.head, ahead.heads, p.dv, p.dv);
    });
  }
  // Calls of prefetch() for a head.
  int64_t steps() const {
    if (kBf16Tiles<T>) return std::max(1, queries.n / kRows);
    return std::max(1, gemm_steps(queries.n, keys.padded) + gemm_steps(queries.n, g.dvp));
  }

  void rows_of_tile(int64_t head, bool first) {
    const float* table = tables.get(p, g, head);
    const auto between = [&](int) {
      prefetch();
      return Fetch{};
    };
    for (int r = 0; r < queries.n; r += g.block_rows) {
      const int rows = std::min(g.block_rows, queries.n - r);
      additions.find(queries, keys, table, r, rows, s, g.ld);
      gemm_to_logits(rows, keys.padded, static_cast<int>(p.d), RowMajorA{q + int64_t{r} * g.dp, g.dp},
                     DenseB{kt, keys.padded}, s, g.ld, NoFactor{}, additions, between);
      dispatch_vectors(keys.padded / kLanes, [&](auto n) { softmax<decltype(n)::value>(r, rows, first, s, g.ld); });
      const RowMajorA prob{s, g.ld};
      if (g.single && std::is_same_v<T, float>) {
        for (int i = 0; i < rows; i += kLanes) store(inverse + i, 1.f / load(sum + r + i));
        gemm_to_tokens(rows, static_cast<int>(p.dv), keys.n, prob, DenseB{v, g.dvp},
                       static_cast<T*>(p.out) + head * p.dv, queries.out_offset + r, inverse, false, between);
      } else {
        float* const acc = o + int64_t{r} * g.dvp;
        gemm_into(rows, g.dvp, keys.n, prob, DenseB{v, g.dvp}, StoreC{acc, g.dvp, !first}, between);
        for (int i = 0; g.single && i < rows; ++i) write_row(r + i, acc + int64_t{i} * g.dvp, head);
      }
    }
  }

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
  // The tokens stay bfloat16 as they are; scale, temperature and norms multiply the float32 logits instead.
  void load_queries_16(int64_t head) {
    const BFloat16* base = static_cast<const BFloat16*>(p.q) + head * p.q_stride_h;
    const float factor = (g.cosine ? temperature(p, head) : p.scale) * kLog2E;
    const int64_t* const offset = queries.offset;
    copy_rows(q16, g.dk32, queries.n, static_cast<int>(p.d), [&](int i) { return base + offset[i]; });
    for (int i = 0; i < queries.n; ++i) row_scale[i] = factor;
    for (int i = 0; g.cosine && i < queries.n; ++i) {
      row_scale[i] *= inverse_norm(base + offset[i], static_cast<int>(p.d), q);
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
      copy_rows(row16, g.dk32, keys.n, d, key);
      pack_transposed(kt16, ldb, keys.n, d, [&](int j) { return row16 + int64_t{j} * g.dk32; });
    }
    if (width % 16 == 0) {
      pack_rows(v16, 2 * g.dvp, keys.n, width, value);
    } else {
      copy_rows(row16, g.dvp, keys.n, width, value);
      pack_rows(v16, 2 * g.dvp, keys.n, g.dvp, [&](int j) { return row16 + int64_t{j} * g.dvp; });
    }
  }

#if defined(EFFVIT_HAS_TILES)
  void rows_of_tile_16(int64_t head, bool first) {
    const float* table = tables.get(p, g, head);
    const int depth = round_up(keys.padded, 32);
    for (int r = 0; r < queries.n; r += 32) {
      const int rows = std::min(32, queries.n - r), padded = round_up(rows, kBf16Rows);
      additions.find(queries, keys, table, r, rows, bias, g.ld);
      bf16_gemm(padded, keys.padded, g.dk32, q16 + int64_t{r} * g.dk32, g.dk32, kt16, 2 * keys.padded, s, g.ld, false);
      for (int i = 0; i < rows; ++i) {
        if (i % kRows == 0) prefetch();
        float* row = s + int64_t{i} * g.ld;
        const vf factor = set1(row_scale[r + i]);
        vf m = set1(first ? kLowest : top[r + i]);
        for (int j = 0; j < keys.padded; j += kLanes) {
          const vf scale = g.cosine ? factor * load(column_scale + j) : factor;
          vf x = fma(load(row + j), scale, load(additions.bias[i] + j));
          if (additions.masked) x = x + load(additions.mask[i] + j);
          if (j + kLanes > keys.n) x = first_lanes_or(x, keys.n - j, kNegInf);
          store(row + j, x);
          m = max(m, x);
        }
        const float highest = reduce_max(m);
        const vf shift = set1(highest);
        BFloat16* prob = p16 + int64_t{i} * depth;
        vf total{};
        for (int j = 0; j < keys.padded; j += kLanes) {
          const vf e = exp2(load(row + j) - shift);
          store(prob + j, e);
          total = total + e;
        }
        if (depth > keys.padded) store(prob + keys.padded, vf{});
        accumulate_sum(r + i, highest, reduce_add(total), first);
      }
      float* acc = g.single ? o : o + int64_t{r} * g.dvp;
      bf16_gemm(padded, g.dvp, round_up(keys.n, kBf16Depth), p16, depth, v16, 2 * g.dvp, acc, g.dvp, !first);
      if (g.single) {
        for (int i = 0; i < rows; ++i) write_row(r + i, acc + int64_t{i} * g.dvp, head);
      }
    }
  }
#else
  // As rows_of_tile, on pairs.
  void rows_of_tile_16(int64_t head, bool first) {
    const float* table = tables.get(p, g, head);
    const auto between = [&](int) {
      prefetch();
      return Fetch{};
    };
    const int depth = round_up(keys.padded, 32), pairs = (keys.n + 1) / 2;
    const DenseB transposed_keys = pairs_b(kt16, 2 * keys.padded), values = pairs_b(v16, 2 * g.dvp);
    const RowMajorPairs prob(p16, depth);
    for (int r = 0; r < queries.n; r += g.block_rows) {
      const int rows = std::min(g.block_rows, queries.n - r);
      additions.find(queries, keys, table, r, rows, s, g.ld);
      const RowMajorPairs q_rows(q16 + int64_t{r} * g.dk32, g.dk32);
      const auto logits = [&](auto factor) {
        gemm_to_logits(rows, keys.padded, (static_cast<int>(p.d) + 1) / 2, q_rows, transposed_keys, s, g.ld, factor,
                       additions, between);
      };
      if (g.cosine) {
        logits(OuterFactor{row_scale + r, column_scale});
      } else {
        logits(OneFactor{row_scale[r]});
      }
      dispatch_vectors(keys.padded / kLanes, [&](auto n) { softmax<decltype(n)::value>(r, rows, first, p16, depth); });
      if (g.single) {
        for (int i = 0; i < rows; i += kLanes) store(inverse + i, 1.f / load(sum + r + i));
        gemm_to_tokens(rows, static_cast<int>(p.dv), pairs, prob, values, static_cast<BFloat16*>(p.out) + head * p.dv,
                       queries.out_offset + r, inverse, false, between);
      } else {
        gemm_into(rows, g.dvp, pairs, prob, values, StoreC{o + int64_t{r} * g.dvp, g.dvp, !first}, between);
      }
    }
  }
#endif
#endif

  void start(int64_t head) {
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
    if constexpr (kBf16Products<T>) return load_queries_16(head);
#endif
    load_queries(head);
  }

  void tile(int64_t head, bool first) {
#if defined(EFFVIT_HAS_BF16_PRODUCTS)
    if constexpr (kBf16Products<T>) {
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
    tables.reset();
    additions.reset(g);
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
          ahead.plan(tokens, after, last, 0, p.h, group, (last - head) * steps(), 1);
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
          find_mask(p, queries, keys);
          tile(head, first);
          first = false;
        }
        for (int i = 0; i < queries.n; ++i) write_row(i, o + int64_t{i} * g.dvp, head);
        write_lse(head);
      }
    }
  }
};

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

#include "window_attention_backward.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) {
  const Geometry g(p);
  return p.B * g.windows * p.h;
}

void forward(const Params& p, float*, int64_t begin, int64_t end) {
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

int64_t reduce_units(const Params&) { return 1; }

void reduce_partials(const Params& p, float* partials, int64_t, int64_t) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { reduce<decltype(type)>(p, g, partials); });
}

constexpr Pass<Params> kForward[] = {{forward_units, forward}};
constexpr Pass<Params> kBackward[] = {{backward_units, backward}, {reduce_units, reduce_partials}};

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<WindowAttentionParams>* EFFVIT_KERNEL_NAME(window_attention)() {
  namespace impl = EFFVIT_ISA_NAME::window_attention_impl;
  static constexpr Kernel<WindowAttentionParams> kernel = {routine(impl::kForward),
                                                           routine(impl::kBackward, impl::backward_partials)};
  return &kernel;
}
}  // namespace effvit::cpu
