// window_attention on the CPU: how the work is cut, and which tokens a window has. Included by
// window_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

using Params = WindowAttentionParams;

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr double kLog2EWide = 1.4426950408889634;
constexpr int kBlockRows = 64;  // query rows whose logits are held at once, at most
static_assert(kBlockRows <= 64, "kBf16MaxRows");

// How much is done at once. Together with the scratch of bfloat16 operands this keeps a thread below 2 MiB at any size.
struct Limits {
  int tile_tokens = 256;
  int block_rows = kBlockRows;
  int block_floats = 5120;  // as many logits as leave half of an L1 cache to the operands
  int64_t table_cache_bytes = 192 << 10;
  int64_t expanded_bytes = 64 << 10;
  int64_t partial_bytes = 512 << 10;
  int64_t ahead_bytes = 128 << 10;  // fetched ahead at once; well within any L2
  int single_floats = 32 << 10;  // of an operand of a window that is one tile
  int64_t window_floats = 256 << 10;  // of dq of a window in several tiles, and of the gradient of its bias

  static Limits of_call() {
    return small_tiles() ? Limits{16, 6, 512, 1 << 10, 1 << 10, 2 << 10, 2 << 10, 640, 2 << 10} : Limits{};
  }
};

struct Geometry {
  Limits limits = Limits::of_call();
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
  bool one_pass;  // the backward of a window in several tiles goes through them once
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
    tile_tokens = widest <= 64 ? limits.tile_tokens : std::max(16, limits.tile_tokens * 64 / widest);
    const bool halo = p.halo_h > 0 || p.halo_w > 0;
    const int64_t window_tokens = int64_t{p.window_h} * p.window_w;
    if (!halo && window_tokens <= std::min(limits.tile_tokens, limits.single_floats / widest)) {
      tile_tokens = std::max(tile_tokens, static_cast<int>(window_tokens));
    }
    const int key_h = p.window_h + 2 * p.halo_h;
    q_tile_rows = std::min(p.window_h, std::max(1, tile_tokens / p.window_w));
    k_tile_rows = std::min(key_h, std::max(1, tile_tokens / key_w));
    q_tile_max = q_tile_rows * p.window_w;
    k_tile_max = k_tile_rows * key_w;
    ld = ((ceil_div(k_tile_max, kLanes) + 1) | 1) * kLanes;
    block_rows = std::min(limits.block_rows, std::max(1, limits.block_floats / ld / kRows) * kRows);
    backward_rows = std::max(1, limits.block_rows / p.window_w) * std::min<int>(limits.block_rows, p.window_w);
    const int64_t entries = int64_t{p.window_w} * table_h * key_w;
    expanded = entries * 4 <= limits.expanded_bytes;
    bias_row = expanded ? key_w : table_w;
    single = !halo && q_tile_rows == p.window_h;
    const int64_t gradient = expanded ? int64_t{p.window_w} * table_h * round_up(key_w, kLanes) : 0;
    one_pass = !single && !halo && window_tokens * dp + gradient <= limits.window_floats;
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
  int64_t* lse_offset = nullptr;  // into lse, of head 0
  int64_t* offset = nullptr;  // into q
  int64_t* grad_offset = nullptr;  // into grad_out
  int64_t* out_offset = nullptr;  // into out, of head 0
  int64_t* dq_offset = nullptr;  // into dq, of head 0
  int32_t* table = nullptr;  // offset into the bias
  int32_t* label = nullptr;  // shift region, 0 to 8
  Columns columns;

  void allocate(Scratch& s, const Geometry& g) {
    const int max = g.q_tile_max;
    columns.allocate(s, g);
    for (int64_t** at : {&lse_offset, &offset, &grad_offset, &out_offset, &dq_offset}) *at = s.take<int64_t>(max);
    table = s.take<int32_t>(max);
    label = s.take<int32_t>(max);
  }
};

// Keys of one tile: the tokens on the map, and with pad_k those outside of it too: pads, whose offsets are -1.
struct Keys {
  int n = 0, padded = 0, runs = 0, pads = 0;
  bool mixed = false;  // more than one shift region among the keys
  int64_t* k_offset = nullptr;
  int64_t* v_offset = nullptr;
  int64_t* dk_offset = nullptr;  // of head 0
  int64_t* dv_offset = nullptr;
  int32_t* label = nullptr;
  int32_t* owner = nullptr;  // row-major index in the rectangle that the tile was cut from
  Run* run = nullptr;
  float* mask = nullptr;  // per shift region of a query: what the mask adds to its logits
  Columns columns;

  void allocate(Scratch& s, const Geometry& g) {
    const int max = g.k_tile_max;
    columns.allocate(s, g);
    for (int64_t** offset : {&k_offset, &v_offset, &dk_offset, &dv_offset}) *offset = s.take<int64_t>(max);
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
      q->lse_offset[n] = lse_row + px;
      q->offset[n] = q_row + px * p.q_stride_x;
      q->grad_offset[n] = grad_row + px * p.grad_out_stride_x;
      q->out_offset[n] = (row + px) * p.h * p.dv;
      q->dq_offset[n] = (row + px) * p.dq_stride_t;
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
    const int64_t row = (b * p.H + py) * p.W;
    const int64_t k_row = b * p.k_stride_b + py * p.k_stride_y, v_row = b * p.v_stride_b + py * p.v_stride_y;
    for (int x = x0; x < x1; ++x) {
      const int px = column[x];
      const bool outside = py < 0 || px < 0;
      if (outside && !with_pads) continue;
      k->k_offset[n] = outside ? -1 : k_row + px * p.k_stride_x;
      k->v_offset[n] = outside ? -1 : v_row + px * p.v_stride_x;
      k->dk_offset[n] = outside ? -1 : (row + px) * p.dk_stride_t;
      k->dv_offset[n] = outside ? -1 : (row + px) * p.dvalue_stride_t;
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

// A window of a batch item.
struct Window {
  int64_t b;
  int y, x;
  Window(const Geometry& g, int64_t index) {
    b = index / g.windows;
    const int64_t w = index - b * g.windows;
    y = static_cast<int>(w / g.x.windows);
    x = static_cast<int>(w - int64_t{y} * g.x.windows);
  }
};

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
  // Tokens of a window that is one tile. Two neighbours are kept.
  const Tokens& get(const Params& p, const Geometry& g, int64_t window) {
    Tokens& t = tokens_[window & 1];
    if (t.window != window) {
      const Window at(g, window);
      find_queries(p, g, at.b, at.y, at.x, 0, g.y.window, &t.queries);
      find_keys(p, g, at.b, at.y, at.x, 0, g.y.window, 0, g.x.window, g.has_pad, &t.keys);
      find_mask(p, t.queries, t.keys);
      t.window = window;
    }
    return t;
  }
  Tokens& scratch() { return tokens_[0]; }  // for tiles, which are not prefetched

 private:
  Tokens tokens_[2];
};

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
