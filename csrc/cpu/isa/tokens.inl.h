// Tokens in memory. The rows of one head lie apart, at a stride or at offsets of their own; they are read into scratch,
// written as they leave a product, and fetched ahead while products run. Included once per ISA, inside its target
// region.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

// Rows of a [B, tokens, heads, width] tensor in one batch item.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride_l = 0, stride_h = 0;
  EFFVIT_INLINE T* at(int64_t token, int64_t head) const { return data + token * stride_l + head * stride_h; }
  explicit operator bool() const { return data != nullptr; }
};

// ---- reading -------------------------------------------------------------------------------------------------------

// The first `left` elements at p, at most a vector of them, zeros behind.
template <class T>
EFFVIT_INLINE vf load_lanes(const T* p, int left) {
  if (left >= kLanes) return load(p);
  alignas(64) float x[kLanes] = {};
  for (int i = 0; i < left; ++i) x[i] = to_float(p[i]);
  return load(x);
}

// What a row is multiplied with on its way.
struct NoRowFactor {
  EFFVIT_INLINE vf operator()(int, vf x) const { return x; }
};
struct RowFactors {  // null: none
  const float* factor;
  EFFVIT_INLINE vf operator()(int i, vf x) const { return x * set1(factor ? factor[i] : 1.f); }
};
// A factor of more digits than float32 has: its rounding would turn all logits the same way.
struct WideFactor {
  float high = 1.f, low = 0.f;
  WideFactor() = default;
  explicit WideFactor(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - static_cast<double>(high))) {}
  EFFVIT_INLINE vf operator()(int, vf x) const { return fma(x, set1(high), x * set1(low)); }
};

// Calls f with the number of vectors in a row of n elements as a constant, where n is a common head dim; otherwise 0.
template <class F>
EFFVIT_INLINE void dispatch_width(int n, const F& f) {
  if (n == 32) return f(std::integral_constant<int, 32 / kLanes>{});
  if (n == 64) return f(std::integral_constant<int, 64 / kLanes>{});
  f(std::integral_constant<int, 0>{});
}

// dst[i * ld] = row(i) * factor in float32 for n rows of `width` elements, zeros behind them to whole vectors.
template <class Row, class Factor = NoRowFactor>
EFFVIT_INLINE void load_tokens(float* dst, int64_t ld, int n, int width, const Row& row, Factor factor = {}) {
  dispatch_width(width, [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    float* to = dst;
    for (int i = 0; i < n; ++i, to += ld) {
      const auto* const from = row(i);
      if constexpr (kVectors == 0) {
        for (int c = 0; c < width; c += kLanes) store(to + c, factor(i, load_lanes(from + c, width - c)));
      } else {
        vf x[kVectors];
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) x[j] = load(from + j * kLanes);
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) store(to + j * kLanes, factor(i, x[j]));
      }
    }
  });
}

// ---- writing -------------------------------------------------------------------------------------------------------

// The first `left` lanes of x, at most all of them, rounded to T.
template <class T>
EFFVIT_INLINE void store_lanes(T* p, vf x, int left) {
  if (left >= kLanes) return store(p, x);
  alignas(64) float some[kLanes];
  store(some, x);
  for (int i = 0; i < left; ++i) p[i] = from_float<T>(some[i]);
}

// n rows of `width` elements from scratch, times factor[i] where given, to rows `stride` apart.
template <class T>
EFFVIT_INLINE void store_tokens(T* dst, int64_t stride, const float* src, int64_t ld, int n, int width,
                                const float* factor) {
  for (int i = 0; i < n; ++i) store_row(dst + i * stride, src + i * ld, width, factor ? factor[i] : 1.f);
}

// Where the rows of a product go.
struct AtStride {
  int64_t stride;
  bool streamed;  // past the caches, see streams()
  static constexpr bool kStreams = true, holes = false;
  EFFVIT_INLINE int64_t operator()(int r) const { return r * stride; }
};
struct AtOffsets {
  const int64_t* offset;
  bool holes;  // some offsets are below zero: these rows are not written
  static constexpr bool kStreams = false, streamed = false;
  EFFVIT_INLINE int64_t operator()(int r) const { return offset[r]; }
};

enum class Write { kWhole, kPartial, kStream };  // whole vectors; with a partial one at the end, or holes; streamed

// The end of a product: row r times factor[r] where given, rounded to T, to its place.
template <class T, Write kWrite, class Place>
struct StoreTokens {
  T* base;
  Place place;
  const float* factor;
  int width;
  EFFVIT_INLINE void operator()(int r, int c, vf x) const {
    const int64_t at = place(r);
    if (kWrite == Write::kPartial && at < 0) return;
    if (factor) x = x * set1(factor[r]);
    if constexpr (kWrite == Write::kStream) {
      stream(base + at + c, x);
    } else if constexpr (kWrite == Write::kWhole) {
      store(base + at + c, x);
    } else {
      store_lanes(base + at + c, x, width - c);
    }
  }
};

template <class T>
constexpr bool kStreams = std::is_same_v<T, float> || (kBf16Products<T> && !kBf16Tiles<T>);

// Rows of A[m, k] B[k, width] to tokens, times factor[r]; `width` is that of whole vectors or below.
template <class T, class A, class B, class Place, class F>
EFFVIT_INLINE void gemm_to_tokens(int m, int width, int k, A a, B b, T* base, Place place, const float* factor,
                                  const F& ahead) {
  const int padded = round_up(width, kLanes);
  if constexpr (kStreams<T> && Place::kStreams) {
    if (place.streamed) {
      return gemm_into(m, padded, k, a, b, StoreTokens<T, Write::kStream, Place>{base, place, factor, width}, ahead);
    }
  }
  if (width == padded && !place.holes) {
    gemm_into(m, padded, k, a, b, StoreTokens<T, Write::kWhole, Place>{base, place, factor, width}, ahead);
  } else {
    gemm_into(m, padded, k, a, b, StoreTokens<T, Write::kPartial, Place>{base, place, factor, width}, ahead);
  }
}

// Whether `bytes` of rows of `width` elements are written past the caches: in whole cache lines, and from so much
// memory on that nobody finds it in one afterwards. Of bfloat16 a line is two vectors, so a product must not leave an
// odd number of them to a block of columns.
template <class T>
bool streams(const void* rows, int64_t width, int64_t bytes, int64_t from) {
  constexpr int64_t kWhole = kLanes * sizeof(float), kLine = kWhole / sizeof(T);
  const bool lines = width % kLine == 0 && (sizeof(T) == 4 || width == kLine || width % (kCols * kLanes) == 0);
  return kStreams<T> && bytes >= from && lines && reinterpret_cast<uintptr_t>(rows) % kWhole == 0;
}

// ---- fetching ahead ------------------------------------------------------------------------------------------------

// The rows that come next are fetched into L2 while others are computed, in the order of memory and a few cache lines
// at a time: the heads of a token lie together, which the hardware prefetchers would follow, but the walk over one
// head's rows is not.
class Ahead {
 public:
  void clear() { count_ = runs_ = 0, at_ = nullptr; }
  // Rows to be read, or written: nobody else holds a line of theirs, so that reading it makes it writable as well. Rows
  // with offsets are `rows` of those, of which the ones below zero are left out.
  template <class U>
  void add(const Rows<U>& rows, int64_t width) {
    if (rows) put<U>({address(rows.data), nullptr, rows.stride_l, rows.stride_h, width, 0});
  }
  template <class U>
  void add(const void* base, const int64_t* offset, int64_t rows, int64_t stride_h, int64_t width) {
    put<U>({address(base), offset, static_cast<int64_t>(sizeof(U)), stride_h, width, rows});
  }
  // Tokens [begin, end) of heads [h0, h1), in `steps` steps; nothing where a token has fewer bytes than `least`: a few
  // heads of a short sequence are in the cache already, or soon.
  void plan(int64_t begin, int64_t end, int64_t h0, int64_t h1, int64_t steps, int64_t least) {
    runs_ = 0;
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) {
      const Strided& o = operands_[i];
      if ((h1 - h0) * o.width < least || (!o.offset && end <= begin)) {
        runs_ = 0;
        break;
      }
      const bool dense = o.stride_h == o.width;
      Run run{o.data + (o.offset ? 0 : begin * o.stride) + h0 * o.stride_h,
              o.offset,
              dense ? (h1 - h0) * o.width : o.width,
              o.stride,
              o.stride_h,
              o.offset ? o.rows : end - begin,
              dense ? 1 : h1 - h0};
      Run* const last = runs_ > 0 ? run_ + runs_ - 1 : nullptr;
      if (last && dense && !o.offset && !last->offset && last->columns == 1 && last->stride == run.stride &&
          last->data + last->bytes == run.data) {
        last->bytes += run.bytes;  // k and v of one projection lie side by side
      } else if (run.rows > 0) {
        run_[runs_++] = run;
      }
    }
    for (int i = 0; i < runs_; ++i) {
      Run& run = run_[i];
      if (!run.offset && run.columns == 1 && run.bytes == run.stride) run.bytes *= run.rows, run.rows = 1;
      lines += run.rows * run.columns * ceil_div(run.bytes, 64);
    }
    lines_per_step_ = static_cast<int>(ceil_div(lines, std::max<int64_t>(steps, 1)));
    current_ = 0, row_ = 0, column_ = 0, at_ = nullptr;
    if (runs_) begin_row();
  }
  // The next lines, for a product that makes so many calls: what is left of a row at once, a piece of the next one by
  // the product.
  EFFVIT_INLINE Fetch step(int calls) {
    if (!at_) return {};
    int left = lines_per_step_;
    while (at_ + 64 * left > row_end_) {
      for (; at_ < row_end_; at_ += 64, --left) __builtin_prefetch(at_, 0, 2);
      if (!next_row() || left <= 0) return {};
    }
    for (; left > calls; at_ += 64, --left) __builtin_prefetch(at_, 0, 2);  // a call fetches one line
    const Fetch fetch{at_, ceil_div(64 * left, calls)};
    at_ += 64 * left;
    return fetch;
  }
  // The lines of a step at once. Inlined by force: GCC takes a function that only prefetches for one without effects,
  // and drops the calls.
  EFFVIT_INLINE void burst() {
    for (int left = lines_per_step_; left > 0 && at_;) {
      for (; left > 0 && at_ < row_end_; at_ += 64, --left) __builtin_prefetch(at_, 0, 2);
      if (at_ >= row_end_) next_row();
    }
  }

  // What a product asks meanwhile (gemm_into): the lines of a step spread over its calls, or at once.
  EFFVIT_INLINE auto spread() {
    return [this](int calls) __attribute__((always_inline)) { return step(calls); };
  }
  EFFVIT_INLINE auto bursts() {
    return [this](int) __attribute__((always_inline)) {
      burst();
      return Fetch{};
    };
  }

 private:
  struct Strided {  // sizes in bytes, once put() was here
    const char* data;
    const int64_t* offset;
    int64_t stride, stride_h, width, rows;
  };
  struct Run {  // rows x columns pieces of memory, rows at multiples of the stride: 0, 1, ... or the offsets
    const char* data;
    const int64_t* offset;
    int64_t bytes, stride, stride_column, rows, columns;
  };
  static const char* address(const void* p) { return static_cast<const char*>(p); }
  template <class U>
  void put(Strided o) {
    constexpr int64_t kItem = sizeof(U);
    if (!o.offset) o.stride *= kItem;
    o.stride_h *= kItem, o.width *= kItem;
    operands_[count_++] = o;
  }
  bool next_row() {
    const Run* const run = run_ + current_;
    if (++column_ == run->columns) {
      column_ = 0;
      if (++row_ == run->rows) {
        row_ = 0;
        if (++current_ == runs_) {
          at_ = nullptr;
          return false;
        }
      }
    }
    begin_row();
    return true;
  }
  void begin_row() {
    const Run& run = run_[current_];
    const int64_t row = run.offset ? run.offset[row_] : row_;
    at_ = run.data + row * run.stride + column_ * run.stride_column;
    row_end_ = at_ + (row < 0 ? 0 : run.bytes);
  }
  static constexpr int kMaxOperands = 7;
  Strided operands_[kMaxOperands];
  Run run_[kMaxOperands];
  int count_ = 0, runs_ = 0, current_ = 0, lines_per_step_ = 0;
  int64_t row_ = 0, column_ = 0;
  const char *at_ = nullptr, *row_end_ = nullptr;
};

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
