// window_attention on the CPU: the relative position bias and the mask on their way to the logits, and the gradient of
// the bias on its way back. Included by window_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

// The bias tables of the heads in reversed order, so that entries grow with the key, times log2(e). Of a reversed table
// [table_h, table_w] the query in local column x sees key_w columns, from window_w - 1 - x on. Where these are
// few enough (Geometry::expanded) they are laid out one after the other, [window_w][table_h][key_w]: the biases of one
// query towards all keys of a window then are one run of memory, whatever the window.
class BiasTable {
 public:
  void allocate(Scratch& s, const Params& p, const Geometry& g, int64_t heads) {
    if (!p.bias_table) return;
    entries_ = g.expanded ? int64_t{g.x.window} * g.table_h * g.key_w : int64_t{g.table_h} * g.table_w;
    stride_ = (entries_ + kLanes + 15) / 16 * 16;  // a run's last vector may reach past the end
    slots_ = heads * stride_ * 4 <= g.limits.table_cache_bytes ? heads : 1;
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
template <class A, class B, class Factor, class F>
EFFVIT_INLINE void gemm_to_logits(int m, int n, int k, A a, B b, float* dst, int64_t ld, Factor factor,
                                  const Additions& add, const F& between) {
  if (add.masked) {
    gemm_into(m, n, k, a, b, StoreLogits<true, Factor>{dst, ld, add.bias, add.mask, factor}, between);
  } else {
    gemm_into(m, n, k, a, b, StoreLogits<false, Factor>{dst, ld, add.bias, nullptr, factor}, between);
  }
}

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
    const int64_t fit = stride ? std::max<int64_t>(1, g.limits.partial_bytes / (4 * stride * p.h)) : 64;
    chunks = std::min<int64_t>({all, fit, 32});
    groups = std::min<int64_t>(p.h, (64 + chunks - 1) / chunks);
  }
  int64_t heads(const Params& p) const { return ceil_div(p.h, groups); }  // of a unit, at most
  float* at(float* base, const Params& p, int64_t chunk, int64_t head) const {
    return base + (chunk * p.h + head) * stride;
  }
};

// The gradient of the bias. Where the layout of BiasTable is expanded it has that layout too, with whole vectors for a
// row of keys: a buffer per head of a unit, added to the reversed table when the unit, or the window, is done.
class BiasGradient {
 public:
  void allocate(Scratch& s, const Params& p, const Geometry& g, int64_t heads) {
    if (!p.bias_table || !g.expanded) return;
    wide_ = round_up(g.key_w, kLanes);
    stride_ = int64_t{g.x.window} * g.table_h * wide_;
    per_window_ = heads * stride_ * 4 > g.limits.table_cache_bytes;
    data_ = s.take<float>((per_window_ ? 1 : heads) * stride_);
    expanded_ = true;
  }
  bool per_window() const { return per_window_; }
  // Where head `index` of the unit collects; `table` where the layout is the table's own.
  float* at(int64_t index, float* table) const {
    return expanded_ ? data_ + (per_window_ ? 0 : index) * stride_ : table;
  }
  void clear(int64_t index) {
    if (expanded_) zero(at(index, nullptr), stride_);
  }
  void fold(const Geometry& g, int64_t index, float* table) const {
    if (!expanded_) return;
    const float* from = at(index, nullptr);
    for (int x = 0; x < g.x.window; ++x) {
      for (int y = 0; y < g.table_h; ++y, from += wide_) {
        float* to = table + y * g.table_w + g.x.window - 1 - x;
        for (int i = 0; i < wide_; i += kLanes) store(to + i, load(to + i) + load(from + i));
      }
    }
  }

  // sums += dS of query rows [r, r + rows), which are rows from 0 on of ds.
  void add(const Geometry& g, const Queries& q, const Keys& k, const float* ds, int r, int rows, float* sums) const {
    const int across = g.x.window, width = g.key_w;
    if (expanded_ && k.runs == 1 && k.n % width == 0 && k.run[0].table % width == 0 && rows % across == 0 &&
        q.table[r + rows - 1] - q.table[r] == (across - 1) * g.table_h * width - (rows / across - 1) * width) {
      return add_rectangles(g, q.table[r] / width + k.run[0].table / width, rows / across, k.n / width, ds, sums);
    }
    for (int i = 0; i < rows; ++i, ds += g.ld) {
      for (int s = 0; s < k.runs; ++s) {
        const float* from = ds + k.run[s].column;
        const int entry = q.table[r + i] + k.run[s].table;
        if (!expanded_) {
          add_run(sums + entry, from, k.run[s].length);
          continue;
        }
        int row = entry / width, column = entry - row * width;
        for (int left = k.run[s].length; left > 0; ++row, column = 0) {
          const int length = std::min(left, width - column);
          add_run(sums + row * wide_ + column, from, length);
          from += length;
          left -= length;
        }
      }
    }
  }

 private:
  static void add_run(float* to, const float* from, int n) {
    for (int i = 0; i < n; i += kLanes) {
      store(to + i, load(to + i) + first_lanes(load(from + i), std::min(kLanes, n - i)));
    }
  }

  // Whole rows of queries and of keys: all pairs of a column of queries whose rows are equally far apart are added up
  // in registers. `first` is the row of the table for the first row of each.
  void add_rectangles(const Geometry& g, int first, int query_rows, int key_rows, const float* ds, float* sums) const {
    const int across = g.x.window, width = g.key_w;
    const int64_t ld = g.ld, step = across * ld + width;  // to the next row of both
    for (int x = 0; x < across; ++x) {
      for (int t = 1 - query_rows; t < key_rows; ++t) {
        const int begin = std::max(0, -t), end = std::min(query_rows, key_rows - t);
        const float* from = ds + (begin * across + x) * ld + (begin + t) * width;
        float* to = sums + (int64_t{x} * g.table_h + first + t) * wide_;
        for (int c = 0; c < width; c += kLanes) {
          vf sum{};
          const float* at = from + c;
          for (int i = begin; i < end; ++i, at += step) sum = sum + load(at);
          store(to + c, load(to + c) + first_lanes(sum, std::min(kLanes, width - c)));
        }
      }
    }
  }

  float* data_ = nullptr;
  int64_t stride_ = 0;
  int wide_ = 0;
  bool expanded_ = false, per_window_ = false;
};

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
