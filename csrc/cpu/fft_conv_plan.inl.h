// fft_conv on the CPU: how a call is computed, directly or by transforms and of which sizes, and how it is cut into
// units. Included by fft_conv_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

using Params = FftConvParams;

constexpr int kTile = 8;  // results of a direct convolution that are in registers together
constexpr int64_t kDirectBlock = 512;  // places of a row that are convolved directly at a time
constexpr int64_t kUnits = 16;
constexpr int64_t kChunk = 64;  // places of a line that go through L1 together

EFFVIT_INLINE int64_t modulo(int64_t a, int64_t n) {
  const int64_t r = a % n;
  return r < 0 ? r + n : r;
}

// Cycles per element of a transform, roughly: every level reads and writes all.
inline double transform_cost(int64_t n) {
  if (largest_prime(n) > kMaxPrime) {
    const int64_t inner = fft_conv_size(2 * n - 1);
    return (2 * transform_cost(inner) + 12) * static_cast<double>(inner) / static_cast<double>(n);
  }
  double cost = 0;
  int twos = 0;
  for (; n % 2 == 0; n /= 2) ++twos;
  cost += twos == 1 ? 6 : twos % 3 == 0 ? 14 * (twos / 3) : twos % 3 == 2 ? 14 * (twos / 3) + 9 : 14 * (twos / 3) + 4;
  for (int64_t prime = 3; n > 1; prime += 2) {
    for (; n % prime == 0; n /= prime) cost += prime == 3 ? 8 : prime == 5 ? 12 : prime == 7 ? 18 : 5. * prime;
  }
  return cost;
}

// The size from n on whose transform costs least.
inline int64_t best_size(int64_t n) {
  int64_t best = 0;
  double least = 0;
  for (const int64_t odd : {1, 3, 5, 7, 9, 15, 21, 25, 27, 35, 45, 49, 63, 75}) {
    int64_t size = odd;
    while (size < n) size *= 2;
    if (best > 0 && static_cast<double>(size) > 1.3 * static_cast<double>(best)) continue;
    const double cost = static_cast<double>(size) * (transform_cost(size) + 10);
    if (best == 0 || cost < least) best = size, least = cost;
  }
  return best;
}

// An axis of the map, of the kernel and of the transform. Positions are those of what is transformed; position 0 holds
// the place `origin` of the map (and of its next block: as much further on as a block is long).
struct Axis {
  int64_t S = 1;  // places of the map
  int64_t N = 1;  // of the transform
  int64_t before = 0, after = 0;  // lags are in [-after, before]
  int64_t fold = 0;  // lags count modulo this; 0: as they are
  int64_t origin = 0, length = 1;  // of a block: results
  int64_t load = 1;  // positions that hold something
  bool circular = false, free = true;  // free: of any size that is large enough

  Axis() = default;
  Axis(int64_t size, int64_t taps, int64_t reverse, int32_t mode, int64_t shift, bool given) {
    S = length = load = size, circular = mode == 2, free = !given;
    before = taps - 1 - shift, after = std::max(shift, reverse - 1);
    if (!free) return;
    if (!circular) {
      before = std::min(before, S - 1), after = std::min(after, S - 1);
    } else if (before + after >= S) {
      fold = S, before = S - 1, after = 0;
    }
  }

  // A transform of all places: by itself where the axis is circular and its size a good one, else padded.
  void take_whole(bool real) {
    origin = 0, length = load = S;
    const bool good = largest_prime(S) <= 7 || S == 1;
    if (circular && good) {
      N = S;
    } else if (circular) {
      take_windows(S, real);
    } else {
      N = padded(S + std::max(before, after), real);
    }
  }
  // Transforms of windows whose results are `results` places.
  void take_windows(int64_t results, bool real) {
    origin = -before, length = results, load = results + before + after;
    N = padded(load, real);
  }
  static int64_t padded(int64_t n, bool real) { return n == 1 ? 1 : real ? 2 * best_size((n + 1) / 2) : best_size(n); }

  int64_t out_at() const { return -origin; }  // position of a block's first result
  // Where a lag's tap is in the transform, or -1 where it meets nothing.
  int64_t place(int64_t lag) const {
    if (free && !circular && (lag > before || lag < -after)) return -1;
    return modulo(fold ? modulo(lag, fold) : lag, N);
  }
  // The same among the taps of a direct convolution, which are [-after, before].
  int64_t slot(int64_t lag) const {
    if (!circular && (lag > before || lag < -after)) return -1;
    return (fold ? modulo(lag, fold) : lag) + after;
  }
  int64_t slots() const { return before + after + 1; }
  // The place of the map that is at a position, or -1.
  int64_t at(int64_t position, int64_t block_at = 0) const {
    const int64_t place = position + origin + block_at;
    if (circular) return modulo(place, S);
    return place < 0 || place >= S ? -1 : place;
  }
  // Taps that a result meets, on average.
  double met() const {
    if (circular) return static_cast<double>(slots());
    const auto side = [&](int64_t n) { return n * (1 - (n + 1) / (2. * S)); };  // sum of 1 - lag/S
    return 1 + side(static_cast<double>(before)) + side(static_cast<double>(after));
  }
};

// Everything about a call that follows from its shape.
struct Geometry {
  Axis x, y, z;
  bool direct = false;
  bool packed = true;  // even and odd places of z are real and imaginary parts; else parts are imaginary zeros
  int64_t M = 1, elements = 1;  // elements along z, and of a transform
  int64_t blocks = 1;  // along z
  int64_t pair_count = 0;
  int64_t groups, rows, splits;  // of channels, of the batch per kernel, and of these
  // By transforms:
  Transform tx, ty, tz;
  float* half_roots = nullptr;  // [M, 2]: e^(-2 pi i f / NZ) where packed
  int32_t* pairs = nullptr;  // [pair_count, 3]: places of a frequency and of its negative, and its part along z
  int32_t* pair_of = nullptr;  // [M/2 + 1]: twice the pair of a frequency, and 1 if it is the negative there; or null
  // In the workspace, where there are splits:
  float* spectra = nullptr;  // [J, groups, spectrum_floats]
  float* sums = nullptr;  // [J, groups, splits, sum_floats]: of the kernels' gradients
  float* dd = nullptr;  // [J, groups, splits, kLanes]
  int64_t workspace = 0;  // floats

  Geometry(const Params& p, bool backward, float* memory = nullptr) {
    const bool given = p.spectrum || p.keep_x || p.keep_y || p.keep_z;
    x = Axis(p.X, p.KX, p.RX, p.mode_x, p.shift_x, given), y = Axis(p.Y, p.KY, p.RY, p.mode_y, p.shift_y, given);
    z = Axis(p.Z, p.KZ, p.RZ, p.mode_z, p.shift_z, given);
    if (given) {
      x.N = p.NX, y.N = p.NY, z.N = p.NZ;
    } else {
      choose(backward);
    }
    packed = z.N % 2 == 0;
    M = packed ? z.N / 2 : z.N;
    elements = x.N * y.N * M;
    groups = ceil_div(p.C, kLanes), rows = p.B / p.J;
    splits = std::min(ceil_div(kUnits, p.J * groups), ceil_div(rows, small_tiles() ? 1 : 4));
    Scratch s(reinterpret_cast<char*>(memory));
    if (!direct) {
      tx = Transform(x.N, s), ty = Transform(y.N, s), tz = Transform(M, s);
      half_roots = s.take<float>(2 * M);
      const auto own = [](int64_t n) { return n % 2 ? 1 : 2; };  // frequencies that are their own negatives
      pair_count = (elements + own(x.N) * own(y.N) * own(M)) / 2;
      pairs = s.take<int32_t>(3 * pair_count);
      if (one_line(p)) pair_of = s.take<int32_t>(M / 2 + 1);
      if (splits > 1) spectra = s.take<float>(p.J * groups * spectrum_floats());
    }
    if (backward && splits > 1) sums = s.take<float>(p.J * groups * splits * sum_floats());
    if (backward && p.dd) dd = s.take<float>(p.J * groups * splits * kLanes);
    workspace = s.used() / static_cast<int64_t>(sizeof(float));
  }

  // Whether a spectrum that is given is read in the order of its frequencies.
  bool one_line(const Params& p) const { return p.spectrum && x.N * y.N == 1 && packed && M >= kChunk; }
  int64_t units(const Params& p) const { return p.J * groups * splits; }
  int64_t plane_floats() const { return elements * kWide; }
  int64_t line_floats() const { return std::max({tx.line_floats(), ty.line_floats(), tz.line_floats()}); }
  int64_t pair_floats() const { return packed ? 2 * kWide : kWide; }
  int64_t spectrum_floats() const { return pair_count * pair_floats(); }
  int64_t slots() const { return x.slots() * y.slots() * z.slots(); }
  int64_t sum_floats() const { return direct ? slots() * kLanes : spectrum_floats(); }
  // Of a spectrum as PyTorch has it, a vector for each real number.
  int64_t half() const { return z.N / 2 + 1; }
  int64_t step() const { return packed ? 1 : 2; }  // vectors from one place of z to the next

 private:
  // The rule: what costs least, in cycles per row of the batch and group of channels. A direct convolution takes a
  // multiply-add for each tap that a result meets; transforms are of a whole map, or along the only axis of windows
  // that overlap.
  void choose(bool backward) {
    const double places = static_cast<double>(x.S * y.S * z.S);
    const double tiles = static_cast<double>(ceil_div(z.S, kTile) * kTile) / static_cast<double>(z.S);
    const double by_taps = places * tiles * (1.15 * x.met() * y.met() * z.met() + 4);
    x.take_whole(false), y.take_whole(false), z.take_whole(true);
    double by_transforms = cost(z.N);
    if (x.S * y.S == 1 && x.N * y.N == 1 && z.slots() < z.S) {
      Axis best = z;
      for (int64_t n = 256; n <= 32768; n *= 2) {
        const int64_t results = n - z.before - z.after;
        if (results < n / 4) continue;
        const int64_t count = ceil_div(z.S, results);
        if (count == 1) break;
        Axis windows = z;
        windows.take_windows(ceil_div(z.S, count), true);
        const double now = static_cast<double>(count) * cost(windows.N);
        if (now < by_transforms) by_transforms = now, best = windows, blocks = count;
      }
      z = best;
    }
    direct = by_taps < by_transforms;
    if (small_tiles()) {  // each in turn
      direct = slots() % 3 == 0;
      if (!direct && x.S * y.S == 1 && x.N * y.N == 1) {
        z.take_windows(std::min<int64_t>(z.S, 5), true);
        blocks = ceil_div(z.S, z.length);
      }
    }
    if (direct) {
      for (Axis* axis : {&x, &y, &z}) axis->origin = -axis->before, axis->N = 1, axis->length = axis->S;
      if (!backward && x.S * y.S == 1) z.length = std::min(z.S, small_tiles() ? 5 : kDirectBlock);
      blocks = ceil_div(z.S, z.length);
      for (Axis* axis : {&x, &y, &z}) axis->load = axis->length + axis->before + axis->after;
    }
  }

  // Of a transform both ways, with that size along z, and of what is done with its elements.
  double cost(int64_t nz) const {
    const int64_t m = nz % 2 == 0 ? nz / 2 : nz;
    const double count = static_cast<double>(x.N * y.N * m), bytes = count * 4 * kWide;
    const double levels = (x.N > 1 ? transform_cost(x.N) : 0) + (y.N > 1 ? transform_cost(y.N) : 0) + transform_cost(m);
    const double far = bytes < (384 << 10) ? 1 : bytes < (4 << 20) ? 1.25 : 1.6;  // both it and the kernel's in L2?
    return count * (2 * levels + 30) * far + static_cast<double>(x.S * y.S * z.length) * 6;
  }
};

// Calls f(t, p, q, fx, fy, fz): pair t of a frequency, at p, and of its negative, at q >= p.
template <class F>
void for_pairs(const Geometry& g, const F& f) {
  int64_t t = 0;
  for (int64_t px = 0; px < g.x.N; ++px) {
    const int64_t fx = g.tx.frequency[px], qx = g.tx.place[modulo(-fx, g.x.N)];
    for (int64_t py = 0; py < g.y.N; ++py) {
      const int64_t fy = g.ty.frequency[py], qy = g.ty.place[modulo(-fy, g.y.N)];
      const int64_t at = (px * g.y.N + py) * g.M, other = (qx * g.y.N + qy) * g.M;
      for (int64_t pz = 0; pz < g.M; ++pz) {
        const int64_t fz = g.tz.frequency[pz], p = at + pz, q = other + g.tz.place[fz ? g.M - fz : 0];
        if (p <= q) f(t++, p, q, fx, fy, fz);
      }
    }
  }
}

inline void fill_tables(const Geometry& g) {
  Scratch count;
  count.take<float>(g.line_floats());
  float* const line = static_cast<float*>(thread_scratch(static_cast<size_t>(count.used())));
  g.tx.fill(line), g.ty.fill(line), g.tz.fill(line);
  fill_roots(g.half_roots, g.z.N, g.M);
  for_pairs(g, [&](int64_t t, int64_t p, int64_t q, int64_t, int64_t, int64_t fz) {
    int32_t* const to = g.pairs + 3 * t;
    to[0] = static_cast<int32_t>(p), to[1] = static_cast<int32_t>(q), to[2] = static_cast<int32_t>(fz);
    if (g.pair_of) g.pair_of[std::min(fz, g.M - fz)] = static_cast<int32_t>(2 * t + (fz > g.M - fz));
  });
}

}  // namespace fft_conv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
