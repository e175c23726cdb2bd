// Part of dwconv on the CPU: convolutions from memory to memory, for axes without dilation along the columns.
//
// A tile of columns of a row is summed in registers, tap by tap over all rows of the filter, and leaves from there.
// Where a tile reaches beyond the map, or beyond the columns that are asked for, the loop over what it reads leaves out
// what is not there. bfloat16 rows meet their weights in pairs, in one dot product, where the CPU has such.

constexpr int kNearTaps = 16;  // of a row in one call

// What a tile reads and writes.
template <class T>
struct NearTile {
  const T* x;  // of the first tap and the first column, which need not exist
  int64_t x_row, x_step;
  int64_t row, rows;  // of the filter: the first one that finds an input, and how many do
  int first, last;  // of the columns that are read, from x on: those that exist
  int columns;  // that are written
  const float* w;  // [vectors, kh, kw, kLanes], or pairs of bfloat16 [vectors, ceil(kh / 2), kw, kLanes]
  int64_t w_row, w_vector;
  const float* start;  // a bias for each channel, or null: `sums` are added
  bool finished;  // results go to `out`, otherwise to `sums`
  float* sums;
  int64_t sums_step;
  T* out;
  int64_t out_step;
  int64_t out_row;  // to the next row
  int vectors;
  bool past_caches;
  // What is fetched for later: all of the next tile, or what is new in the next row, of x and of results.
  bool next_tile, next_row, next_out;
};
template <class T>
using NearStencil = void (*)(const NearTile<T>&);

// The next column, each from the last one: multiples of the step would take more registers than there are.
template <class T>
EFFVIT_INLINE const T* step_on(const T* x, int64_t step) {
  x += step;
  asm("" : "+r"(x));
  return x;
}

// f(t, column t) for columns from `skip` on of what a tile reads.
template <int kCount, bool kEdge, class T, class F>
EFFVIT_INLINE void for_columns(const NearTile<T>& a, const T* x, int skip, const F& f) {
#pragma GCC unroll 24
  for (int t = 0; t < kCount; ++t) {
    if (!kEdge || (t + skip >= a.first && t + skip < a.last)) f(t, x);
    x = step_on(x, a.x_step);
  }
}

template <int kTaps, int kColumns>
EFFVIT_INLINE void multiply_add(vf (&acc)[kColumns], const vf (&taps)[kTaps], int t, vf x) {
#pragma GCC unroll 8
  for (int j = 0; j < kTaps; ++j) {
    if (t - j >= 0 && t - j < kColumns) acc[t - j] = fma(x, taps[j], acc[t - j]);
  }
}

// Adds rows of a filter of taps from `skip` on.
template <class T, int kTaps, int kColumns, bool kEdge>
EFFVIT_INLINE void add_rows(vf (&acc)[kColumns], const NearTile<T>& a, const T* x, const float* w, int skip) {
  x += skip * a.x_step, w += skip * kLanes + a.row * a.w_row;
  for (int64_t i = 0; i < a.rows; ++i, x += a.x_row, w += a.w_row) {
    vf taps[kTaps];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) taps[j] = load(w + j * kLanes);
    for_columns<kColumns + kTaps - 1, kEdge>(
        a, x, skip, [&](int t, const T* at) __attribute__((always_inline)) { multiply_add(acc, taps, t, load(at)); });
  }
}

// The same with weights in pairs of rows. Rows whose partner finds no input go alone.
template <int kTaps, int kColumns, bool kEdge>
EFFVIT_INLINE void add_pairs_of_rows(vf (&acc)[kColumns], const NearTile<BFloat16>& a, const BFloat16* x,
                                     const float* w, int skip) {
  x += skip * a.x_step, w += skip * kLanes;
  const int64_t end = a.row + a.rows;
  for (int64_t i = a.row; i < end;) {
    const float* const wi = w + i / 2 * a.w_row;
    vf taps[kTaps];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) taps[j] = load(wi + j * kLanes);
    if (i % 2 == 0 && i + 1 < end) {
      for_columns<kColumns + kTaps - 1, kEdge>(a, x, skip,
                                               [&](int t, const BFloat16* at) __attribute__((always_inline)) {
                                                 const vf pairs = (vf)load_pairs(at, at + a.x_row);
#pragma GCC unroll 8
                                                 for (int j = 0; j < kTaps; ++j) {
                                                   if (t - j >= 0 && t - j < kColumns)
                                                     acc[t - j] = dot_pairs(pairs, taps[j], acc[t - j]);
                                                 }
                                               });
      i += 2, x += 2 * a.x_row;
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) taps[j] = (vf)(i % 2 ? (vi)taps[j] & -65536 : (vi)taps[j] << 16);
      for_columns<kColumns + kTaps - 1, kEdge>(
          a, x, skip,
          [&](int t, const BFloat16* at) __attribute__((always_inline)) { multiply_add(acc, taps, t, load(at)); });
      ++i, x += a.x_row;
    }
  }
}

template <class T, int kColumns, bool kEdge>
EFFVIT_INLINE void leave(const vf (&acc)[kColumns], const NearTile<T>& a, int64_t offset) {
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
    if (kEdge && n >= a.columns) break;
    float* const sums = a.sums + n * a.sums_step + offset;
    const vf total = a.start ? acc[n] : load(sums) + acc[n];  // of many terms the error is smaller so
    if (a.finished) {
      put(a.out + n * a.out_step + offset, total, kLanes, a.past_caches);
    } else {
      store(sums, total);
    }
  }
}

// Into the nearest cache. Rows are what is taken from memory the first time, in an order that no CPU foresees.
template <class T, int kTaps, int kColumns>
EFFVIT_INLINE void fetch(const NearTile<T>& a, int64_t offset, int rows) {
  const T* const x = a.x + offset;
  const T* const out = a.out + offset;
  if (a.next_tile) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
      __builtin_prefetch(x + (kColumns + kTaps - 1 + n) * a.x_step, 0, 3);
      if (!a.past_caches) __builtin_prefetch(out + (kColumns + n) * a.out_step, 1, 3);
    }
  }
  for (int i = 0; a.next_row && i < rows; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n)
      __builtin_prefetch(x + (a.rows + rows - 1 + i) * a.x_row + (kTaps - 1 + n) * a.x_step, 0, 3);
  }
  if (a.next_out) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) __builtin_prefetch(out + a.out_row + n * a.out_step, 1, 3);
  }
}

template <class T, int kTaps, int kColumns, bool kEdge, bool kPairs>
void near_stencil(const NearTile<T>& a) {
  constexpr int kFirst = kTaps > kMostTaps ? (kTaps + 1) / 2 : kTaps;
  for (int v = 0; v < a.vectors; ++v) {
    const int64_t offset = int64_t{v} * kLanes;
    fetch<T, kTaps, kColumns>(a, offset, 1);
    vf acc[kColumns];
    const vf from = a.start ? load(a.start + offset) : vf{};
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) acc[n] = from;
    const float* const w = a.w + v * a.w_vector;
    if constexpr (kPairs) {
      add_pairs_of_rows<kFirst, kColumns, kEdge>(acc, a, a.x + offset, w, 0);
      if constexpr (kTaps > kFirst) add_pairs_of_rows<kTaps - kFirst, kColumns, kEdge>(acc, a, a.x + offset, w, kFirst);
    } else {
      add_rows<T, kFirst, kColumns, kEdge>(acc, a, a.x + offset, w, 0);
      if constexpr (kTaps > kFirst) add_rows<T, kTaps - kFirst, kColumns, kEdge>(acc, a, a.x + offset, w, kFirst);
    }
    leave<T, kColumns, kEdge>(acc, a, offset);
  }
}

// Two rows of results of a 3 x 3 filter: what they read in common is loaded once.
template <class T, int kColumns, bool kEdge>
void near_stencil_3x3(const NearTile<T>& a) {
  for (int v = 0; v < a.vectors; ++v) {
    const int64_t offset = int64_t{v} * kLanes;
    const float* const w = a.w + v * a.w_vector;
    vf acc[2][kColumns], taps[3][3];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) taps[i / 3][i % 3] = load(w + i * kLanes);
    const vf from = load(a.start + offset);
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) acc[0][n] = acc[1][n] = from;
    fetch<T, 3, kColumns>(a, offset, 2);
    const T* x = a.x + offset;
    const auto row = [&](auto index) __attribute__((always_inline)) {
      constexpr int i = decltype(index)::value;
      for_columns<kColumns + 2, kEdge>(a, x + i * a.x_row, 0, [&](int t, const T* at) __attribute__((always_inline)) {
        const vf xt = load(at);
        if constexpr (i < 3) multiply_add(acc[0], taps[i], t, xt);
        if constexpr (i > 0) multiply_add(acc[1], taps[i - 1], t, xt);
      });
    };
    row(std::integral_constant<int, 0>{}), row(std::integral_constant<int, 1>{});
    row(std::integral_constant<int, 2>{}), row(std::integral_constant<int, 3>{});
    leave<T, kColumns, kEdge>(acc[0], a, offset);
    leave<T, kColumns, kEdge>(acc[1], a, a.out_row + offset);
  }
}

template <class T, int kColumns, bool kEdge, bool kPairs, int... kTaps>
NearStencil<T> near_stencil_of(int taps, std::integer_sequence<int, kTaps...>) {
  static constexpr NearStencil<T> all[] = {near_stencil<T, kTaps + 1, kColumns, kEdge, kPairs>...};
  return all[taps - 1];
}
template <class T, int kColumns, bool kPairs>
NearStencil<T> near_stencil_of(int taps, bool edge) {
  using All = std::make_integer_sequence<int, kNearTaps>;
  return edge ? near_stencil_of<T, kColumns, true, kPairs>(taps, All{})
              : near_stencil_of<T, kColumns, false, kPairs>(taps, All{});
}
template <class T>
NearStencil<T> near_stencil_of(int taps, int columns, bool edge, bool pairs) {
  if constexpr (kBf16Products<T>) {
    if (pairs) return columns == 7 ? near_stencil_of<T, 7, true>(taps, edge) : near_stencil_of<T, 8, true>(taps, edge);
  }
  return columns == 7 ? near_stencil_of<T, 7, false>(taps, edge) : near_stencil_of<T, 8, false>(taps, edge);
}
template <class T>
NearStencil<T> near_stencil_3x3_of(int columns, bool edge) {
  if (columns == 7) return edge ? near_stencil_3x3<T, 7, true> : near_stencil_3x3<T, 7, false>;
  return edge ? near_stencil_3x3<T, 8, true> : near_stencil_3x3<T, 8, false>;
}

// A convolution of rows of one image.
template <class T>
struct Near {
  Axis y, x;
  int columns;  // of a tile
  bool pairs;  // weights are pairs of bfloat16
  bool past_caches;
  const float *weights, *bias;
  RowOf<const T> in;  // row 0
  int64_t in_row;
  RowOf<T> out;  // row 0
  int64_t out_row;
  float* sums;  // [columns of a tile, vectors, kLanes], of unfinished results

  // Rows and columns of results. Where these are not `finished`, finish(row, first column, columns) takes them from
  // `sums`.
  template <class Finish>
  void run(Range rows, Range columns_asked, int vectors, bool finished, const Finish& finish) const {
    const int64_t w_rows = pairs ? (y.k + 1) / 2 : y.k;
    const bool two_rows = kLanes == 16 && y.k == 3 && x.k == 3 && !pairs && finished && y.step == 1;
    for (int64_t row = rows.begin; row < rows.end;) {
      const Range i = y.taps(row, row);
      const bool two = two_rows && row + 1 < rows.end && i.size() == 3 && y.taps(row + 1, row + 1).size() == 3;
      NearTile<T> a;
      a.x_row = y.step * in_row, a.x_step = in.stride;
      a.row = i.begin, a.rows = i.size();
      a.w_row = x.k * kLanes, a.w_vector = w_rows * a.w_row;
      a.sums_step = int64_t{vectors} * kLanes;
      a.out_step = out.stride, a.out_row = out_row;
      a.vectors = vectors;
      a.past_caches = past_caches;
      a.next_tile = rows.size() == 1, a.next_row = row + 1 < rows.end, a.next_out = y.k > 3 && !past_caches;
      const T* const from = in.data + (i.empty() ? 0 : row + i.begin * y.step - y.pad) * in_row;
      for (int64_t q = columns_asked.begin; q < columns_asked.end; q += columns) {
        a.columns = static_cast<int>(std::min<int64_t>(columns, columns_asked.end - q));
        a.out = out.data + row * out_row + q * out.stride;
        const Range j = x.taps(q, q + a.columns - 1);
        const int64_t parts = std::max<int64_t>(1, ceil_div(j.size(), kNearTaps));
        if (i.empty() || j.empty()) a.rows = 0;
        for (int64_t k = 0; k < parts; ++k) {
          const Range t = j.empty() ? Range{0, 1} : part(j.size(), k, parts);
          const int64_t j0 = j.begin + t.begin, at = q + j0 - x.pad;  // the column of the first tap
          const int64_t reads = a.columns + t.size() - 1;
          a.x = from + at * in.stride;
          a.first = static_cast<int>(std::min(reads, std::max<int64_t>(0, -at)));
          a.last = static_cast<int>(std::max<int64_t>(0, std::min(reads, x.in - at)));
          a.w = weights + j0 * kLanes;
          a.start = k == 0 ? bias : nullptr;
          a.sums = sums, a.finished = finished && k + 1 == parts;
          const bool edge = a.columns < columns || a.first > 0 || a.last < reads;
          if constexpr (kLanes == 16) {
            if (two && t.size() == 3) {
              near_stencil_3x3_of<T>(columns, edge)(a);
              continue;
            }
          }
          const NearStencil<T> stencil = near_stencil_of<T>(static_cast<int>(t.size()), columns, edge, pairs);
          stencil(a);
          if (two) a.x += in_row, a.out += out_row, stencil(a);
        }
        if (!finished) finish(row, q, a.columns);
        a.rows = i.size();
      }
      row += two ? 2 : 1;
    }
  }
};

// ---- gradients of filters ------------------------------------------------------------------------------------------

// sums[r, j] += sum over columns n, and for pairs over two rows, of dz[n] x[r][n + j]
template <class T>
struct NearSums {
  const T* dz;
  int64_t dz_step, dz_line;  // to the next row: of pairs
  const T* x;  // of the first tap and the first column, which need not exist
  int64_t x_step, x_row, x_line;  // to what the next row of the filter reads, and the next row of dz
  int first, last, columns;  // as of a NearTile, for a single tile
  int64_t tiles;
  float* sums;
  int64_t sums_row;
};
template <class T>
using NearCorrelate = void (*)(const NearSums<T>&);

template <bool kPairs, class T>
EFFVIT_INLINE vf load_one_or_pair(const T* at, int64_t line) {
  if constexpr (kPairs) {
    return (vf)load_pairs(at, at + line);
  } else {
    return load(at);
  }
}
template <bool kPairs>
EFFVIT_INLINE vf multiply_one_or_pair(vf a, vf b, vf acc) {
  if constexpr (kPairs) {
    return dot_pairs(a, b, acc);
  } else {
    return fma(a, b, acc);
  }
}

template <class T, int kTaps, int kRows, int kColumns, bool kEdge, bool kPairs>
void near_correlate(const NearSums<T>& a) {
  vf acc[kRows][kTaps];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kTaps; ++i) acc[i / kTaps][i % kTaps] = vf{};
  const T *dz = a.dz, *x = a.x;
  if constexpr (kEdge) {  // a product with what does not exist is left out: zeros would not do where others are
                          // infinite
    for (int n = 0; n < a.columns; ++n, dz += a.dz_step, x += a.x_step) {
      const vf e = load_one_or_pair<kPairs>(dz, a.dz_line);
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) {
        if (n + j < a.first || n + j >= a.last) continue;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const T* const at = x + j * a.x_step + r * a.x_row;
          acc[r][j] = multiply_one_or_pair<kPairs>(e, load_one_or_pair<kPairs>(at, a.x_line), acc[r][j]);
        }
      }
    }
  } else {
    for (int64_t tile = 0; tile < a.tiles; ++tile, x += kColumns * a.x_step) {
      vf e[kColumns];
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n, dz = step_on(dz, a.dz_step)) e[n] = load_one_or_pair<kPairs>(dz, a.dz_line);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const T* xt = x + r * a.x_row;
#pragma GCC unroll 16
        for (int t = 0; t < kColumns + kTaps - 1; ++t, xt = step_on(xt, a.x_step)) {
          const vf value = load_one_or_pair<kPairs>(xt, a.x_line);
#pragma GCC unroll 8
          for (int j = 0; j < kTaps; ++j) {
            if (t - j >= 0 && t - j < kColumns) acc[r][j] = multiply_one_or_pair<kPairs>(e[t - j], value, acc[r][j]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) {
      float* const to = a.sums + r * a.sums_row + j * kLanes;
      store(to, load(to) + acc[r][j]);
    }
  }
}

constexpr int kFewTaps = 4, kRowsOfFewTaps = 3;  // so many rows at once, for sums that do not wait for each other

template <class T, int kRows, int kColumns, bool kEdge, bool kPairs, int... kTaps>
NearCorrelate<T> near_correlate_of(int taps, std::integer_sequence<int, kTaps...>) {
  static constexpr NearCorrelate<T> all[] = {near_correlate<T, kTaps + 1, kRows, kColumns, kEdge, kPairs>...};
  return all[taps - 1];
}
template <class T, int kColumns, bool kEdge, bool kPairs>
NearCorrelate<T> near_correlate_of(int taps, int rows) {
  if (rows == 1)
    return near_correlate_of<T, 1, kColumns, kEdge, kPairs>(taps, std::make_integer_sequence<int, kMostTaps>{});
  return near_correlate_of<T, kRowsOfFewTaps, kColumns, kEdge, kPairs>(taps,
                                                                       std::make_integer_sequence<int, kFewTaps>{});
}
template <class T, bool kPairs>
NearCorrelate<T> near_correlate_of(int taps, int rows, int columns, bool edge) {
  if (edge) return near_correlate_of<T, 1, true, kPairs>(taps, rows);
  return columns == 7 ? near_correlate_of<T, 7, false, kPairs>(taps, rows)
                      : near_correlate_of<T, 8, false, kPairs>(taps, rows);
}

// Rows and columns of results of one image, whose gradients are dz.
template <class T>
struct NearGradient {
  Axis y, x;
  int columns;  // of a tile
  RowOf<const T> dz;  // row 0
  int64_t dz_row;
  RowOf<const T> in;  // row 0
  int64_t in_row;

  // Adds the filter's to sums [vectors, kh, kw, kLanes]. Row by row, as memory is read fastest.
  void add_weights(Range rows, Range columns_asked, int vectors, float* sums) const {
    for (int64_t row = rows.begin; row < rows.end;) {
      const Range i = y.taps(row, row), next = y.taps(row + 1, row + 1);
      const bool two = kBf16Products<T> && row + 1 < rows.end && next.begin == i.begin && next.end == i.end;
      for (int v = 0; v < vectors && !i.empty(); ++v)
        add_row(row, i, two, columns_asked, v * kLanes, sums + v * y.k * x.k * kLanes);
      row += two ? 2 : 1;
    }
  }

  // Adds the bias's to sums [vectors, kLanes].
  void add_bias(Range rows, Range columns_asked, int vectors, float* sums) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for (int v = 0; v < vectors; ++v) {
        const T* from = dz.data + row * dz_row + columns_asked.begin * dz.stride + v * kLanes;
        vf total{};
        for (int64_t n = columns_asked.begin; n < columns_asked.end; ++n, from += dz.stride) total += load(from);
        store(sums + v * kLanes, load(sums + v * kLanes) + total);
      }
    }
  }

 private:
  // For rows i of the filter, a vector of channels, and one row of results or two.
  void add_row(int64_t row, Range i, bool two, Range columns_asked, int channel, float* sums) const {
    const int64_t parts = ceil_div(x.k, kMostTaps);
    NearSums<T> a;
    a.dz_step = dz.stride, a.dz_line = dz_row;
    a.x_step = in.stride, a.x_row = y.step * in_row, a.x_line = in_row, a.sums_row = x.k * kLanes;
    const T* const grad = dz.data + row * dz_row + channel;
    for (int64_t k = 0; k < parts; ++k) {
      const Range j = part(x.k, k, parts);
      const int taps = static_cast<int>(j.size());
      for (int64_t first_row = i.begin; first_row < i.end;) {
        const int at_once = taps <= kFewTaps && i.end - first_row >= kRowsOfFewTaps ? kRowsOfFewTaps : 1;
        const T* const from = in.data + (row + first_row * y.step - y.pad) * in_row + channel;
        a.sums = sums + (first_row * x.k + j.begin) * kLanes;
        for (int64_t q = columns_asked.begin; q < columns_asked.end; q += a.tiles * columns) {
          const int64_t left = columns_asked.end - q, at = q + j.begin - x.pad;
          a.columns = static_cast<int>(std::min<int64_t>(columns, left));
          const int64_t reads = a.columns + taps - 1;
          a.dz = grad + q * dz.stride, a.x = from + at * in.stride;
          a.first = static_cast<int>(std::min(reads, std::max<int64_t>(0, -at)));
          a.last = static_cast<int>(std::max<int64_t>(0, std::min(reads, x.in - at)));
          const bool edge = a.columns < columns || a.first > 0 || a.last < reads;
          a.tiles = edge ? 1 : std::min(left / columns, (x.in - at - reads) / columns + 1);
          if constexpr (kBf16Products<T>) {
            if (two) {
              near_correlate_of<T, true>(taps, at_once, columns, edge)(a);
              continue;
            }
          }
          near_correlate_of<T, false>(taps, at_once, columns, edge)(a);
        }
        first_row += at_once;
      }
    }
  }
};
