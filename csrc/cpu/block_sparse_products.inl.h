// Products with block-sparse matrices, in tiles of rows by a block: see block_sparse_linear_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace block_sparse_impl {

// A tile of the result is kTile rows by one block, in passes of kVectors vectors: 16 to 24 sums at once where there are
// 32 registers, else 8 to 12. At most kLanes rows, so that one transpose makes a tile of x.
template <int kSize>
constexpr int kVectors = kLanes == 16 ? kSize / 16 : 2;
template <int kSize>
constexpr int kTile = kLanes == 16  ? (kSize == 16 ? 16 : 12)
                      : kLanes == 8 ? 6
                                    : 4;

// What a word of the operands is: a float, a pair of bfloat16, two int16, or four bytes, of x unsigned (x + 128).
enum class Kind { kFloat, kPairs, kHalves, kBytes };
constexpr int elements(Kind kind) { return kind == Kind::kFloat ? 1 : kind == Kind::kBytes ? 4 : 2; }
constexpr bool exact(Kind kind) { return kind == Kind::kHalves || kind == Kind::kBytes; }

// The blocks of one row of blocks of the result: which block of x each is multiplied with, and where it lies.
struct BlockList {
  const int32_t* at;
  const int32_t* place;  // null: one behind the other from `first` on
  int64_t first, count;
  const int32_t* sums;  // [kSize]: of int8, what sums start with; null: 0
};

template <Kind kKind>
using Sums = std::conditional_t<exact(kKind), vi, vf>;

template <Kind kKind>
EFFVIT_INLINE Sums<kKind> multiply_add(vf x, vf w, Sums<kKind> sum) {
  if constexpr (kKind == Kind::kPairs)
    return dot_pairs(x, w, sum);
  else if constexpr (kKind == Kind::kHalves)
    return dot_halves(sum, (vh)x, (vh)w);
  else if constexpr (kKind == Kind::kBytes)
    return dot_bytes(sum, (vi)x, (vi)w);
  else
    return fma(x, w, sum);
}

// acc[kRows][kSize] = the sum over the blocks, in float32 or int32. x is a tile [words][kTile], w are blocks of
// [words of a block][kSize]. Floats are summed in parts of kPart terms, each from zero: one running sum of all of them
// would be less accurate than PyTorch's product.
constexpr int kPart = 128;

template <int kSize, Kind kKind, int kRowsNow>
__attribute__((noinline)) void multiply(const float* x, const float* w, BlockList list, float* acc) {
  constexpr int kWords = kSize / elements(kKind), kRow = kTile<kSize>, kNow = kVectors<kSize>;
  const int64_t step = exact(kKind) ? std::max<int64_t>(list.count, 1) : kPart / kSize;
  for (int column = 0; column < kSize; column += kNow * kLanes) {
    int64_t begin = 0;
    do {
      Sums<kKind> sum[kRowsNow][kNow] = {};
      if constexpr (kKind == Kind::kBytes) {
#pragma GCC unroll 16
        for (int r = 0; r < kRowsNow; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < kNow; ++j) sum[r][j] = load(list.sums + column + j * kLanes);
        }
      }
      const int64_t end = std::min(begin + step, list.count);
      for (int64_t t = begin; t < end; ++t) {
        const float* from = x + int64_t{list.at[t]} * (kWords * kRow);
        const float* b = w + (list.place ? list.place[t] : list.first + t) * (kWords * kSize) + column;
#pragma GCC unroll 4
        for (int s = 0; s < kWords; ++s, from += kRow, b += kSize) {
          vf v[kNow];
#pragma GCC unroll 4
          for (int j = 0; j < kNow; ++j) v[j] = load(b + j * kLanes);
#pragma GCC unroll 16
          for (int r = 0; r < kRowsNow; ++r) {
            const vf a = set1(from[r]);
#pragma GCC unroll 4
            for (int j = 0; j < kNow; ++j) sum[r][j] = multiply_add<kKind>(a, v[j], sum[r][j]);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRowsNow; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kNow; ++j) {
          float* const to = acc + r * kSize + column + j * kLanes;
          if constexpr (!exact(kKind)) {
            if (begin > 0) sum[r][j] += load(to);
          }
          store(to, (vf)sum[r][j]);
        }
      }
      begin = end;
    } while (begin < list.count);
  }
}

template <int kSize, Kind kKind>
EFFVIT_INLINE void multiply_rows(int rows, const float* x, const float* w, const BlockList& list, float* acc) {
  constexpr int kMost = kTile<kSize>;
  if (rows == 1) return multiply<kSize, kKind, 1>(x, w, list, acc);
  if (rows <= 4) return multiply<kSize, kKind, 4>(x, w, list, acc);
  if constexpr (kMost > 8) {
    if (rows <= 8) return multiply<kSize, kKind, 8>(x, w, list, acc);
  }
  multiply<kSize, kKind, kMost>(x, w, list, acc);
}

// Rows [M, width] of a tensor.
struct Source {
  const void* data;
  DType dtype;
  const LeadingRows* rows;
  const int64_t* stride;  // of the dims of `rows`

  EFFVIT_INLINE int64_t offset(int64_t row) const {
    int64_t offset = 0;
    for (int k = rows->dims - 1; k > 0; --k) {
      const int64_t outer = row / rows->size[k];
      offset += (row - outer * rows->size[k]) * stride[k];
      row = outer;
    }
    return offset + row * stride[0];
  }
  template <class T>
  EFFVIT_INLINE const T* row(int64_t i) const {
    return static_cast<const T*>(data) + offset(i);
  }
};

// kLanes words of a row, or the `count` first ones and zeros, as the kind has them.
template <class T, Kind kKind>
EFFVIT_INLINE vf load_words(const T* from, int count) {
  constexpr int kBytes = kKind == Kind::kFloat ? static_cast<int>(sizeof(T)) : kKind == Kind::kHalves ? 2 : 4;
  if constexpr (kKind == Kind::kFloat) {
    return load(from);
  } else {
    alignas(64) char some[kLanes * kBytes] = {};
    const char* bytes = reinterpret_cast<const char*>(from);
    if (count < kLanes) {
      std::memcpy(some, bytes, static_cast<size_t>(count) * kBytes);
      bytes = some;
    }
    if constexpr (kKind == Kind::kHalves) {
      typedef int8_t vb __attribute__((vector_size(2 * EFFVIT_LANES)));
      vb x;
      std::memcpy(&x, bytes, sizeof(x));
      return (vf) __builtin_convertvector(x, vh);
    } else {
      vf x;
      std::memcpy(&x, bytes, sizeof(x));
      return kKind == Kind::kBytes ? (vf)((vi)x ^ static_cast<int32_t>(0x80808080)) : x;
    }
  }
}

// to[words][kRow] = `rows` rows from `first` on, copies of the first one up to kRow; written up to kLanes floats
// beyond. width: a multiple of 16.
template <class T, Kind kKind, int kRow>
void pack_tile(float* to, const Source& source, int64_t first, int rows, int64_t width) {
  const T* from[kLanes];
  for (int r = 0; r < kLanes; ++r) from[r] = source.row<T>(first + (r < rows ? r : 0));
  const int64_t words = width / elements(kKind);
  for (int64_t k = 0; k < words; k += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, words - k));
    vf x[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) x[r] = load_words<T, kKind>(from[r] + k * elements(kKind), count);
    transpose_block(x);
    // In ascending order: what a vector has beyond kRow is overwritten by the next.
    for (int i = 0; i < count; ++i, to += kRow) store(to, x[i]);
  }
}

template <Kind kKind, int kRow>
void pack_tile(float* to, const Source& source, int64_t first, int rows, int64_t width) {
  if constexpr (kKind == Kind::kPairs) {
    pack_tile<BFloat16, kKind, kRow>(to, source, first, rows, width);
  } else if constexpr (exact(kKind)) {
    pack_tile<int8_t, kKind, kRow>(to, source, first, rows, width);
  } else {
    dispatch_dtype(source.dtype,
                   [&](auto type) { pack_tile<decltype(type), kKind, kRow>(to, source, first, rows, width); });
  }
}

// Chunks of rows and of rows of blocks of the result, from shapes alone.
struct Chunks {
  static constexpr int64_t kMostRows = 96, kMostBytes = 384 << 10, kProducts = 1 << 23;
  int64_t rows, down, m, n;

  // products: how many there are for one row of the result.
  Chunks(int64_t M, int64_t rows_of_blocks, int64_t width, int64_t products, int tile) {
    const bool small = small_tiles();
    const int64_t fit = std::max<int64_t>(1, kMostBytes / (4 * tile * std::max<int64_t>(width, 1))) * tile;
    const int64_t most = small ? tile : std::min(kMostRows, fit);
    const int64_t chunks = ceil_div(M, most);
    rows = ceil_div(ceil_div(M, chunks), tile) * tile;
    const int64_t pieces = small ? rows_of_blocks : std::max<int64_t>(1, rows * products / kProducts);
    down = ceil_div(rows_of_blocks, std::min(rows_of_blocks, pieces));
    m = ceil_div(M, rows), n = ceil_div(rows_of_blocks, down);
  }
};

struct Product {
  Source x;
  int64_t M, width;  // of x
  int64_t rows_of_blocks;  // of the result
  const float* w;  // packed blocks
  const int32_t* starts;  // [rows of blocks + 1] into `at` and `place`
  const int32_t* at;
  const int32_t* place;  // null: as they lie
  const int32_t* sums;  // [rows of blocks * kSize]; null: 0
};

// sink.columns(column) before the tiles of a row of blocks; sink(acc[rows][kSize], row, rows, column) for each.
template <int kSize, Kind kKind, class Sink>
void run_product(const Product& p, const Chunks& chunks, int64_t begin, int64_t end, Sink& sink) {
  constexpr int kRow = kTile<kSize>;
  const int64_t words = p.width / elements(kKind), tile_floats = words * kRow;
  const int64_t floats = chunks.rows / kRow * tile_floats + 2 * kLanes;
  float* const x = static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * 4));
  alignas(64) float acc[kRow * kSize];
  int64_t loaded = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit / chunks.n, first = chunk * chunks.rows, last = std::min(first + chunks.rows, p.M);
    if (chunk != loaded) {
      for (int64_t row = first, t = 0; row < last; row += kRow, ++t) {
        const int rows = static_cast<int>(std::min<int64_t>(kRow, last - row));
        pack_tile<kKind, kRow>(x + t * tile_floats, p.x, row, rows, p.width);
      }
      loaded = chunk;
    }
    const int64_t top = unit % chunks.n * chunks.down, bottom = std::min(top + chunks.down, p.rows_of_blocks);
    for (int64_t b = top; b < bottom; ++b) {
      const int64_t start = p.starts[b];
      const BlockList list = {p.at + start, p.place ? p.place + start : nullptr, start, p.starts[b + 1] - start,
                              p.sums ? p.sums + b * kSize : nullptr};
      sink.columns(b * kSize);
      for (int64_t row = first, t = 0; row < last; row += kRow, ++t) {
        const int rows = static_cast<int>(std::min<int64_t>(kRow, last - row));
        multiply_rows<kSize, kKind>(rows, x + t * tile_floats, p.w, list, acc);
        sink(acc, row, rows, b * kSize);
      }
    }
  }
}

// to[kSize][kSize] = add + the product of g [words][kSize], transposed, and x [words][kSize].
template <int kSize, Kind kKind>
__attribute__((noinline)) void multiply_panels(int words, const float* g, const float* x, const float* add, float* to) {
  constexpr int kNow = kVectors<kSize>, kRowsNow = kLanes == 16 ? 16 / kNow : 4;
  for (int column = 0; column < kSize; column += kNow * kLanes) {
    for (int row = 0; row < kSize; row += kRowsNow) {
      vf sum[kRowsNow][kNow] = {};
      const float *a = g + row, *b = x + column;
      for (int s = 0; s < words; ++s, a += kSize, b += kSize) {
        vf v[kNow];
#pragma GCC unroll 4
        for (int j = 0; j < kNow; ++j) v[j] = load(b + j * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRowsNow; ++r) {
          const vf one = set1(a[r]);
#pragma GCC unroll 4
          for (int j = 0; j < kNow; ++j) sum[r][j] = multiply_add<kKind>(one, v[j], sum[r][j]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRowsNow; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kNow; ++j) {
          const int at = (row + r) * kSize + column + j * kLanes;
          store(to + at, add ? load(add + at) + sum[r][j] : sum[r][j]);
        }
      }
    }
  }
}

// ---- on AMX ---------------------------------------------------------------------------------------------------------
// Of few rows the tiles would be empty: these are for products of more than kFewRows, of T: int8_t or BFloat16. A block
// is kSize / 16 tiles beside each other, 1 KiB each, with zeros below its last words; x is [blocks along K][rows][64
// bytes], with zeros behind the bytes of a block. So half of a tile's work is for nothing where a block is half as deep
// as a tile (32 int8, 16 bfloat16), and three quarters of it at 16 int8.

constexpr int64_t kFewRows = 8;
constexpr int kTileRows = 32;
template <int kSize>
constexpr int kTileWords = kSize / 16 * 256;  // of a block

// From [words][kSize] to tiles.
template <int kSize>
EFFVIT_INLINE void pack_tiles(float* to, const float* block, int words) {
  std::memset(to, 0, kTileWords<kSize> * sizeof(float));
  for (int s = 0; s < words; ++s) {
    for (int j = 0; j < kSize / 16; ++j) std::memcpy(to + 256 * j + 16 * s, block + s * kSize + 16 * j, 64);
  }
}

#if defined(EFFVIT_HAS_TILES)
#if defined(EFFVIT_HAS_EMULATED_TILES)
#define EFFVIT_TILE_DOT_SIGNED(c, a, b) emulated_dot_signed(c, a, b)
inline void emulated_dot_signed(int c, int a, int b) {
  TileState& s = tile_state();
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      int32_t sum = load_word(s.rows[c][m] + 4 * n);
      for (int k = 0; k < 64; ++k)
        sum += static_cast<int8_t>(s.rows[a][m][k]) * static_cast<int8_t>(s.rows[b][k / 4][4 * n + k % 4]);
      std::memcpy(s.rows[c][m] + 4 * n, &sum, 4);
    }
  }
}
#else
#define EFFVIT_TILE_DOT_SIGNED(c, a, b) _tile_dpbssd(c, a, b)
#endif

// c += a b of T.
#define EFFVIT_TILE_DOT_OF(c, a, b)        \
  if constexpr (std::is_same_v<T, int8_t>) \
    EFFVIT_TILE_DOT_SIGNED(c, a, b);       \
  else                                     \
    EFFVIT_TILE_DOT(c, a, b)

// acc[kM * 16][kSize]. x: [blocks along K][rows][64 bytes], `rows` of them to a block.
template <class T, int kSize, int kM>
void multiply_tiles_of(const char* x, int64_t rows, const float* w, const BlockList& list, float* acc) {
  before_tile_loads();
  EFFVIT_TILE_ZERO(0);
  EFFVIT_TILE_ZERO(1);
  EFFVIT_TILE_ZERO(2);
  EFFVIT_TILE_ZERO(3);
  for (int64_t t = 0; t < list.count; ++t) {
    const char* const from = x + list.at[t] * rows * 64;
    const float* const b = w + (list.place ? list.place[t] : list.first + t) * kTileWords<kSize>;
    EFFVIT_TILE_LOAD(4, from, 64);
    EFFVIT_TILE_LOAD(6, b, 64);
    if constexpr (kSize == 32) EFFVIT_TILE_LOAD(7, b + 256, 64);
    if constexpr (kM == 2) EFFVIT_TILE_LOAD(5, from + 1024, 64);
    EFFVIT_TILE_DOT_OF(0, 4, 6);
    if constexpr (kSize == 32) {
      EFFVIT_TILE_DOT_OF(1, 4, 7);
    }
    if constexpr (kM == 2) {
      EFFVIT_TILE_DOT_OF(2, 5, 6);
    }
    if constexpr (kM == 2 && kSize == 32) {
      EFFVIT_TILE_DOT_OF(3, 5, 7);
    }
  }
  constexpr int kBytes = 4 * kSize;
  EFFVIT_TILE_STORE(0, acc, kBytes);
  if constexpr (kSize == 32) EFFVIT_TILE_STORE(1, acc + 16, kBytes);
  if constexpr (kM == 2) EFFVIT_TILE_STORE(2, acc + 16 * kSize, kBytes);
  if constexpr (kM == 2 && kSize == 32) EFFVIT_TILE_STORE(3, acc + 16 * kSize + 16, kBytes);
}

// As run_product; w are tiles.
template <class T, int kSize, class Sink>
void run_tiles(const Product& p, const Chunks& chunks, int64_t begin, int64_t end, Sink& sink) {
  constexpr int kBytes = kSize * static_cast<int>(sizeof(T));
  const int64_t blocks = p.width / kSize;
  char* const x = static_cast<char*>(thread_scratch(static_cast<size_t>(chunks.rows * blocks * 64)));
  alignas(64) float acc[kTileRows * kSize];
  [[maybe_unused]] const TileScope scope;
  int64_t loaded = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit / chunks.n, first = chunk * chunks.rows, last = std::min(first + chunks.rows, p.M);
    if (chunk != loaded) {
      if (kBytes < 64 || last - first < chunks.rows) std::memset(x, 0, static_cast<size_t>(chunks.rows * blocks * 64));
      for (int64_t row = first; row < last; ++row) {
        const char* const from = reinterpret_cast<const char*>(p.x.row<T>(row));
        char* const to = x + (row - first) * 64;
        for (int64_t c = 0; c < blocks; ++c) std::memcpy(to + c * chunks.rows * 64, from + c * kBytes, kBytes);
      }
      loaded = chunk;
    }
    const int64_t top = unit % chunks.n * chunks.down, bottom = std::min(top + chunks.down, p.rows_of_blocks);
    for (int64_t b = top; b < bottom; ++b) {
      const int64_t start = p.starts[b];
      const BlockList list = {p.at + start, p.place ? p.place + start : nullptr, start, p.starts[b + 1] - start,
                              nullptr};
      sink.columns(b * kSize);
      for (int64_t row = first; row < last; row += kTileRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kTileRows, last - row));
        const char* const from = x + (row - first) * 64;
        if (rows > 16)
          multiply_tiles_of<T, kSize, 2>(from, chunks.rows, p.w, list, acc);
        else
          multiply_tiles_of<T, kSize, 1>(from, chunks.rows, p.w, list, acc);
        sink(acc, row, rows, b * kSize);
      }
    }
  }
}
#endif

// ---- packing --------------------------------------------------------------------------------------------------------

// A block of values as the product with the weight's transpose wants it: [words along j][i].
template <class T, bool kPairs, int kSize>
void pack_block(float* to, const T* values, int64_t stride) {
  for (int i = 0; i < kSize; i += kLanes) {
    const int words = kPairs ? kSize / 2 : kSize;
    for (int j = 0; j < words; j += kLanes) {
      vf x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const T* const from = values + (i + r) * stride;
        if constexpr (!kPairs) {
          x[r] = load(from + j);
        } else {
          alignas(64) float some[kLanes] = {};
          std::memcpy(some, from + 2 * j, static_cast<size_t>(std::min(kLanes, words - j)) * 4);
          x[r] = load(some);
        }
      }
      transpose_block(x);
      for (int s = 0; s < std::min(kLanes, words - j); ++s) store(to + (j + s) * kSize + i, x[s]);
    }
  }
}

// Likewise for the product with the weight itself: [words along i][j].
template <class T, bool kPairs, int kSize>
void copy_block(float* to, const T* values, int64_t stride) {
  if constexpr (kPairs) {
    for (int i = 0; i < kSize; i += 2) {
      for (int j = 0; j < kSize; j += kLanes) {
        const vi pairs = join_pairs(load(values + i * stride + j), load(values + (i + 1) * stride + j));
        store(to + i / 2 * kSize + j, (vf)pairs);
      }
    }
  } else {
    for (int i = 0; i < kSize; ++i) {
      for (int j = 0; j < kSize; j += kLanes) store(to + i * kSize + j, load(values + i * stride + j));
    }
  }
}

}  // namespace block_sparse_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
