// Part of dwconv on the CPU: its axes, how work is cut up, and rows of maps in scratch.

using Params = DwconvParams;

constexpr int kMostTaps = 8, kMostColumns = 8;  // of a stencil in registers
constexpr int kMostChannels = 64;  // of a block
constexpr int64_t kSegment = 64;  // columns of a long row that are computed together, at least
constexpr int64_t kNearBytes = 20 << 10;  // of a row in scratch that is read by one row alone
constexpr int64_t kPatchBytes = 256 << 10;  // of the rows of a map in scratch
constexpr int kNearChannels = 1024;  // of a block that goes from memory to memory
constexpr int64_t kUnits = 64;
constexpr int64_t kSumBytes = 32 << 20;  // of the partial sums of the weights' gradients
constexpr int64_t kPastCaches = 16 << 20;  // maps of more bytes are written past them, see rows.inl.h
constexpr int64_t kLine = 64;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  bool empty() const { return end <= begin; }
  bool has(int64_t i) const { return i >= begin && i < end; }
};
inline Range hull(Range a, Range b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}
inline Range part(int64_t n, int64_t i, int64_t parts) { return {n * i / parts, n * (i + 1) / parts}; }

// One dim of a convolution: output o is a sum over taps j < k of inputs o + j * step - pad, zeros where there are none.
struct Axis {
  int64_t in, out, k, step, pad;

  int64_t reach() const { return (k - 1) * step; }
  // That of the gradient: outputs become inputs, taps turn round.
  Axis flipped() const { return {out, in, k, step, reach() - pad}; }
  // The inputs that outputs r read.
  Range reads(Range r) const {
    if (r.empty()) return {0, 0};
    const int64_t begin = std::max<int64_t>(0, r.begin - pad), end = std::min(in, r.end - pad + reach());
    return end > begin ? Range{begin, end} : Range{0, 0};
  }
  // The taps that find an input, for outputs from first to last.
  EFFVIT_INLINE Range taps(int64_t first, int64_t last) const {
    const int64_t less = std::max<int64_t>(0, pad - last), more = std::max<int64_t>(0, in + pad - first);
    const int64_t begin = step == 1 ? less : ceil_div(less, step);  // divisions take long here
    const int64_t end = std::min(k, step == 1 ? more : ceil_div(more, step));
    return {begin, std::max(begin, end)};
  }
  // The outputs in r whose taps j find an input, of those that are `step` apart from r.begin on; all from and to such.
  Range outputs(Range r, int64_t first_tap, int64_t last_tap) const {
    const int64_t low = pad - last_tap * step, high = in + pad - first_tap * step;
    const int64_t skip = low > r.begin ? ceil_div(low - r.begin, step) : 0;
    return {r.begin + skip * step, std::min(r.end, high)};
  }
};

// The same with rows and columns exchanged where the filter is a column: tiles then go along it.
inline Params turned(Params p) {
  if (p.kw > 1 || p.kh == 1) return p;
  const auto turn = [](int64_t& y, int64_t& x) { std::swap(y, x); };
  turn(p.windows_y, p.windows_x), turn(p.H, p.W), turn(p.P, p.Q), turn(p.kh, p.kw);
  turn(p.pad_y, p.pad_x), turn(p.step_y, p.step_x), turn(p.x_stride_y, p.x_stride_x);
  turn(p.pregate_stride_y, p.pregate_stride_x), turn(p.postgate_stride_y, p.postgate_stride_x);
  turn(p.grad_out_stride_y, p.grad_out_stride_x), turn(p.out_stride_y, p.out_stride_x);
  turn(p.dx_stride_y, p.dx_stride_x);
  return p;
}

inline Axis rows_of(const Params& p) { return {p.H, p.P, p.kh, p.step_y, p.pad_y}; }
// A state is part of the input.
inline Axis columns_of(const Params& p) {
  if (p.state) return {p.W + p.pad_x, p.Q, p.kw, p.step_x, 0};
  return {p.W, p.Q, p.kw, p.step_x, p.pad_x};
}

// What is computed together: rows and columns of the results, forward `out`, backward those and the gradient of x too.
struct Item {
  Range out_y, out_x, in_y, in_x;  // own ones
  Range dz_y, dz_x;  // backward: of the gradient of the convolution, own ones and what the gradient of x reads
};

// Rows of a map with zeros around their columns, [vectors, rows, columns, kLanes], from row y and column x on.
struct Patch {
  float* data;
  int64_t y, x, row, plane;  // row, plane: floats of one
  EFFVIT_INLINE float* at(int64_t vector, int64_t at_y, int64_t at_x) const {
    return data + vector * plane + (at_y - y) * row + (at_x - x) * kLanes;
  }
};

struct Plan {
  Axis y, x;
  bool backward, needs_z;  // z: the convolution, computed again
  bool near;  // from memory to memory, without scratch, see dwconv_near.inl.h
  bool pairs;  // its weights are pairs of bfloat16
  int64_t taps, width, blocks;  // width: channels of a block, whole vectors
  int64_t images, bands, segments, items, groups;  // groups: of the items of a block, to add sums in
  int64_t packed, sums;  // floats of the weights of a block, and of a unit's sums
  int64_t x_floats = 0, dz_floats = 0, z_floats = 0;  // of scratch

  Plan(const Params& p, bool is_backward) : y(rows_of(p)), x(columns_of(p)), backward(is_backward) {
    const bool small = small_tiles();
    needs_z = backward && (p.act != kNone || p.postgate);
    taps = p.kh * p.kw;
    images = p.B * p.windows_y * p.windows_x;
    const int64_t budget = kPatchBytes / int64_t{sizeof(float)};
    // Rows of a band: what bands have in common is read twice, and where z is needed, computed twice.
    int64_t least = small      ? 2
                    : y.k == 1 ? 1
                               : std::min(y.out, std::max<int64_t>(8, needs_z ? 3 * y.reach() : y.reach() / 2));
    const auto fits = [&](int64_t channels, int64_t columns) {
      const int64_t lines = std::min(y.in, least + y.reach());
      return lines * (columns + x.reach() + kMostColumns * x.step) * channels <= budget;
    };
    // Pixels that lie whole pages apart meet in few lines of the nearest cache.
    const bool halves = kBf16Products<BFloat16> && p.dtype == DType::kBFloat16;
    const int64_t item = p.dtype == DType::kFloat32 ? 4 : 2, page = backward && !halves ? 2048 : 4096;
    const auto apart = [&](int64_t stride) { return y.k <= 3 || stride * item % page != 0; };
    near = !needs_z && !p.pregate && !p.state && p.C % kLanes == 0 && x.step == 1 && apart(p.x_stride_x) &&
           (!backward || apart(p.grad_out_stride_x));
    pairs = near && halves && y.k > 1 && p.weight_dtype == DType::kBFloat16;
    int64_t segment = x.out;
    const int64_t grain = kMostColumns * x.step;
    const auto cut = [&](int64_t columns) { segment = std::min(x.out, ceil_div(columns, grain) * grain); };
    int64_t most = small ? kLanes : kMostChannels;
    if (near && !small) {
      most = kNearChannels;
      if (x.out > 2 * kSegment) cut(kSegment);
    } else if (small) {
      cut(16);
    } else if (y.k == 1) {  // a row is in the nearest cache as it is computed
      if (x.out > 2 * kSegment) cut(std::max(kSegment, 4 * x.reach()));
      const int64_t near = kNearBytes / int64_t{sizeof(float)};
      while (most > kLanes && (segment + x.reach() + grain) * most > near) most /= 2;
    } else {
      if (x.out > 4 * kSegment) cut(std::max(2 * kSegment, 2 * x.reach()));
      // All rows where they fit, so that no bands overlap, otherwise many channels.
      const int64_t row = (segment + x.reach() + grain) * y.in;
      const bool whole = row * kLanes <= budget;
      while (most > kLanes && (whole ? row * most > budget : !fits(most, segment))) most /= 2;
      if (!fits(most, segment) && x.out > 2 * kSegment) cut(std::max(kSegment, 2 * x.reach()));
    }
    while (!near && !fits(most, segment) && least > std::max<int64_t>(8, y.reach() / 2)) least = least / 2;
    const int64_t even = ceil_div(p.C, ceil_div(p.C, most));
    width = ceil_div(even, kLanes) * kLanes;
    blocks = ceil_div(p.C, width);
    segments = ceil_div(x.out, segment);
    if (segments > 1) segment_ = segment;
    const int64_t columns = segment + x.reach() + grain;
    const int64_t bytes = y.k == 1 ? 2 * kNearBytes : kPatchBytes;
    const int64_t fitting =
        small || near ? least : std::min(y.out, bytes / int64_t{sizeof(float)} / (columns * width) - y.reach());
    bands = std::max<int64_t>(1, ceil_div(y.out, std::max(least, fitting)));
    const int64_t spread = ceil_div(kUnits / 2, images * blocks * segments);
    bands = std::max(bands, std::min(spread, y.out / least));
    items = images * bands * segments;
    packed = width * ((backward ? 2 : 1) * taps + 1);
    sums = width * (taps + 1);
    const int64_t by_memory = kSumBytes / (int64_t{sizeof(float)} * sums * blocks);
    groups = std::max<int64_t>(1, std::min({items, ceil_div(kUnits, blocks), by_memory}));
  }

  // With the sizes of scratch, which only those need who compute.
  Plan with_scratch() const {
    Plan g = *this;
    g.size_scratch();
    return g;
  }

  int64_t pair_floats() const { return (y.k + 1) / 2 * x.k * kLanes; }  // of a vector of channels
  int64_t units() const { return blocks * (backward ? groups : items); }

  Item item(int64_t band, int64_t segment) const {
    Item i;
    i.out_y = part(y.out, band, bands), i.in_y = part(y.in, band, bands);
    i.out_x = cut(x.out, segment), i.in_x = cut(x.in, segment);
    i.dz_y = backward ? hull(i.out_y, y.flipped().reads(i.in_y)) : i.out_y;
    i.dz_x = backward ? hull(i.out_x, x.flipped().reads(i.in_x)) : i.out_x;
    return i;
  }
  // The rows of x that an item reads, and where they are in scratch.
  Range x_rows(const Item& i) const { return y.reads(needs_z ? i.dz_y : i.out_y); }
  Range x_columns(const Item& i) const { return x.reads(needs_z ? i.dz_x : i.out_x); }
  Patch x_patch(const Item& i, float* data) const { return patch(data, x_rows(i), x, needs_z ? i.dz_x : i.out_x, {}); }
  Patch dz_patch(const Item& i, float* data) const { return patch(data, i.dz_y, x.flipped(), i.in_x, i.dz_x); }

  // Of results, tiles that reach beyond them included.
  Patch z_patch(Range rows, Range columns, float* data) const {
    return patch(data, rows, Range{columns.begin, columns.end + kMostColumns * x.step});
  }

  // How many columns a register tile of a row of n has.
  int columns_for(int64_t n) const {
    const int64_t by_7 = ceil_div(n, 7 * x.step) * 7, by_8 = ceil_div(n, 8 * x.step) * 8;
    return segments == 1 && by_7 <= by_8 ? 7 : 8;
  }

 private:
  int64_t segment_ = 0;  // columns of one, where there are more

  Range cut(int64_t n, int64_t i) const {
    if (segments == 1) return {0, n};
    const int64_t begin = std::min(n, segment_ * i);
    return {begin, i + 1 == segments ? n : std::min(n, begin + segment_)};
  }
  // For an axis whose outputs are r, tiles that reach beyond them included, and for columns `more`.
  Patch patch(float* data, Range rows, const Axis& axis, Range r, Range more) const {
    const Range all = hull({r.begin - axis.pad, r.end - axis.pad + axis.reach() + kMostColumns * axis.step}, more);
    return patch(data, rows, all);
  }
  // An odd number of vectors apart, rows do not meet in the same lines of a cache.
  static Patch patch(float* data, Range rows, Range columns) {
    const int64_t row = (columns.size() | 1) * kLanes;
    return {data, rows.begin, columns.begin, row, std::max<int64_t>(1, rows.size()) * row};
  }
  void size_scratch() {
    if (near) z_floats = kMostColumns * width;
    if (near) return;
    const int64_t vectors = width / kLanes;
    for (int64_t band = 0; band < bands; ++band) {
      for (int64_t segment = 0; segment < segments; ++segment) {
        const Item i = item(band, segment);
        x_floats = std::max(x_floats, vectors * x_patch(i, nullptr).plane);
        if (backward) dz_floats = std::max(dz_floats, vectors * dz_patch(i, nullptr).plane);
        z_floats = std::max(z_floats, vectors * z_patch(i.dz_y, i.dz_x, nullptr).plane);
        if (backward) z_floats = std::max(z_floats, vectors * z_patch(i.in_y, i.in_x, nullptr).plane);
      }
    }
  }
};

// What a unit works on.
struct Unit {
  int64_t block, first_channel, items_begin, items_end;
  int channels, vectors;

  Unit(const Params& p, const Plan& g, int64_t unit) {
    block = unit % g.blocks;
    first_channel = block * g.width;
    channels = static_cast<int>(std::min(g.width, p.C - first_channel));
    vectors = (channels + kLanes - 1) / kLanes;
    const int64_t group = unit / g.blocks;
    const Range items = g.backward ? part(g.items, group, g.groups) : Range{group, group + 1};
    items_begin = items.begin, items_end = items.end;
  }
};

// A map of T with windows in it.
template <class T>
struct Map {
  T* data;
  int64_t stride_b, stride_y, stride_x;

  explicit operator bool() const { return data != nullptr; }
};

// An image: a window of one, H x W.
struct Image {
  int64_t b, first_y, first_x;

  Image(const Params& p, int64_t image, int64_t H, int64_t W) {
    b = image / (p.windows_y * p.windows_x);
    first_y = image / p.windows_x % p.windows_y * H, first_x = image % p.windows_x * W;
  }
  template <class T>
  RowOf<T> row(const Map<T>& m, int64_t y, int64_t x, int64_t channel) const {
    if (!m.data) return {nullptr, 0};
    return {m.data + b * m.stride_b + (first_y + y) * m.stride_y + (first_x + x) * m.stride_x + channel, m.stride_x};
  }
};
