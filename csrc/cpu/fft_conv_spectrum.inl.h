// fft_conv on the CPU: spectra of kernels, their products with those of maps, and what they are the gradients of.
// Included by fft_conv_kernel.inl.h.
//
// Along z the even places of a real sequence are the real parts of what is transformed, and the odd ones the imaginary
// parts: a transform of half the size. With Ue and Uo the spectra of both, Z = Ue + i Uo at a frequency f, and at its
// negative -f (along all axes) Z = conj(Ue) + i conj(Uo), which gives Ue and Uo from the two; the convolution is
//   Ye = Ke Ue + w Ko Uo,   Yo = Ke Uo + Ko Ue,   w = e^(-2 pi i f_z / M)
// Where the size along z is odd the imaginary parts are zeros, and so are Uo and Ko. Spectra of kernels are kept as
// (Ke, Ko), or Ke alone, of each pair (f, -f), in the order of Geometry::pairs.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fft_conv_impl {

// ---- transforms of planes [NX, NY, M]
// --------------------------------------------------------------------------------

// Of lines beyond `nx` and `ny` all elements are zeros.
inline void transform_plane(const Geometry& g, float* plane, int64_t nx, int64_t ny, float* line) {
  const int64_t row = g.M * kWide, slice = g.y.N * row;
  for (int64_t i = 0; i < nx; ++i) {
    g.tz.lines<false>(plane + i * slice, ny, line);
    g.ty.columns<false>(plane + i * slice, g.M, line);
  }
  g.tx.columns<false>(plane, g.y.N * g.M, line);
}
// Only lines of [x, x + nx) and [y, y + ny) are wanted.
inline void transform_plane_back(const Geometry& g, float* plane, int64_t x, int64_t nx, int64_t y, int64_t ny,
                                 float* line) {
  const int64_t row = g.M * kWide, slice = g.y.N * row;
  g.tx.columns<true>(plane, g.y.N * g.M, line);
  for (int64_t i = x; i < x + nx; ++i) {
    g.ty.columns<true>(plane + i * slice, g.M, line);
    g.tz.lines<true>(plane + i * slice + y * row, ny, line);
  }
}

// ---- pairs
// -----------------------------------------------------------------------------------------------------------

struct Halves {  // spectra of the even and of the odd places
  Complex even, odd;
};
EFFVIT_INLINE Complex conj_product(Complex a, Complex b) {  // conj(a) b
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}
// Twice the halves of what is at f and -f.
EFFVIT_INLINE Halves halves_of(const float* plane, const int32_t* pair) {
  const Complex a = load_complex(plane + int64_t{pair[0]} * kWide), b = load_complex(plane + int64_t{pair[1]} * kWide);
  return {a + conj(b), times_minus_i(a - conj(b))};
}
EFFVIT_INLINE void store_halves(float* plane, const int32_t* pair, Halves h) {
  const Complex turned = times_i(h.odd);
  store_complex(plane + int64_t{pair[0]} * kWide, h.even + turned);
  store_complex(plane + int64_t{pair[1]} * kWide, conj(h.even - turned));
}
template <bool kPacked>
EFFVIT_INLINE Halves load_kernel(const float* k) {
  return {load_complex(k), kPacked ? load_complex(k + kWide) : Complex{}};
}
template <bool kPacked>
EFFVIT_INLINE void store_kernel(float* k, Halves h) {
  store_complex(k, h.even);
  if (kPacked) store_complex(k + kWide, h.odd);
}
// w of the product, from the roots of the size along z.
EFFVIT_INLINE Complex delay(const Geometry& g, int32_t fz) {
  const Complex r = root(g.half_roots + 2 * int64_t{fz});
  return r * r;
}

// plane = plane * kernel, or times its conjugate.
template <bool kPacked, bool kConjugate>
void multiply(const Geometry& g, const float* from, float* plane, const float* kernel) {
  const int32_t* pair = g.pairs;
  for (int64_t t = 0; t < g.pair_count; ++t, pair += 3, kernel += kPacked ? 2 * kWide : kWide) {
    const Halves u = halves_of(from, pair), k = load_kernel<kPacked>(kernel);
    Halves y;
    if (kConjugate) {
      y = {conj_product(k.even, u.even), conj_product(k.even, u.odd)};
      if (kPacked) {
        y.even = y.even + conj_product(k.odd, u.odd);
        y.odd = y.odd + conj_product(delay(g, pair[2]), conj_product(k.odd, u.even));
      }
    } else {
      y = {k.even * u.even, k.even * u.odd};
      if (kPacked) {
        y.even = y.even + delay(g, pair[2]) * (k.odd * u.odd);
        y.odd = y.odd + k.odd * u.even;
      }
    }
    store_halves(plane, pair, y);
  }
}

// sums += conj(u) dy, four times as large.
template <bool kPacked>
void add_products(const Geometry& g, const float* u_plane, const float* dy_plane, float* sums, bool first) {
  const int32_t* pair = g.pairs;
  for (int64_t t = 0; t < g.pair_count; ++t, pair += 3, sums += kPacked ? 2 * kWide : kWide) {
    const Halves u = halves_of(u_plane, pair), d = halves_of(dy_plane, pair);
    Halves s = first ? Halves{} : load_kernel<kPacked>(sums);
    s.even = s.even + conj_product(u.even, d.even);
    if (kPacked) {
      s.even = s.even + conj_product(u.odd, d.odd);
      s.odd = s.odd + conj_product(u.even, d.odd) + conj_product(delay(g, pair[2]), conj_product(u.odd, d.even));
    }
    store_kernel<kPacked>(sums, s);
  }
}

// Calls f with whether z is packed.
template <class F>
EFFVIT_INLINE void with_packed(const Geometry& g, const F& f) {
  g.packed ? f(std::true_type{}) : f(std::false_type{});
}

// ---- kernels
// ---------------------------------------------------------------------------------------------------------

// Calls f(tap, position) for the taps of a line that are somewhere, in order.
template <class F>
void for_places(const Axis& axis, const Taps& taps, int64_t shift, const F& f) {
  const int64_t n = taps.n[2], step = taps.reverse ? -1 : 1;
  if (axis.fold || n < 4) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = axis.place(taps.lag(i, shift));
      if (place >= 0) f(i, place);
    }
    return;
  }
  int64_t i = 0, end = n;
  while (i < end && axis.place(taps.lag(i, shift)) < 0) ++i;
  while (end > i && axis.place(taps.lag(end - 1, shift)) < 0) --end;
  if (i == end) return;
  for (int64_t at = axis.place(taps.lag(i, shift)); i < end; ++i) {
    f(i, at);
    at += step;
    if (at == axis.N) at = 0;
    if (at < 0) at = axis.N - 1;
  }
}

// Zeros what the kernel does not keep. The halves are scaled in any way.
inline void keep_low(const Params& p, const Geometry& g, float* kernel) {
  for_pairs(g, [&](int64_t t, int64_t, int64_t, int64_t fx, int64_t fy, int64_t fz) {
    const auto inside = [](int64_t f, int64_t n, int64_t keep) { return keep == 0 || std::min(f, n - f) < keep; };
    const bool outer = inside(fx, g.x.N, p.keep_x) && inside(fy, g.y.N, p.keep_y);
    float* const at = kernel + t * g.pair_floats();
    if (!g.packed) {
      if (!outer || !inside(fz, g.z.N, p.keep_z)) store_complex(at, Complex{});
      return;
    }
    // The spectrum at f_z and at f_z + M is even + w odd and even - w odd.
    const Complex w = root(g.half_roots + 2 * fz), even = load_complex(at), odd = w * load_complex(at + kWide);
    const Complex low = outer && inside(fz, g.z.N, p.keep_z) ? even + odd : Complex{};
    const Complex high = outer && inside(fz + g.M, g.z.N, p.keep_z) ? even - odd : Complex{};
    store_complex(at, (low + high) * 0.5f);
    store_complex(at + kWide, conj_product(w, low - high) * 0.5f);
  });
}

// Rows of the spectrum that was given, [NX NY, NZ/2 + 1] elements, to or from vectors.
template <class F>
void spectrum_rows(const Params& p, const Geometry& g, int64_t j, const Row& row, const F& f) {
  const int64_t size = g.x.N * g.y.N * g.half() * 2, at = (j * p.C + row.first) * size;
  for (int64_t i = 0; i < g.x.N * g.y.N; ++i) {
    f(at + i * g.half() * 2, size, i * g.half() * kWide);
  }
}

// The halves of a spectrum as PyTorch has it, in `staged`: of its planes f_z = 0 and NZ/2 a real transform has the part
// that is Hermitian alone.
inline void halves_of_spectrum(const Geometry& g, const float* staged, float* kernel, float scale) {
  for_pairs(g, [&](int64_t t, int64_t, int64_t, int64_t fx, int64_t fy, int64_t fz) {
    const int64_t nx = modulo(-fx, g.x.N), ny = modulo(-fy, g.y.N);
    const auto at = [&](int64_t x, int64_t y, int64_t z) __attribute__((always_inline)) {
      return load_complex(staged + ((x * g.y.N + y) * g.half() + z) * kWide);
    };
    const auto hermitian = [&](int64_t z)
                               __attribute__((always_inline)) { return (at(fx, fy, z) + conj(at(nx, ny, z))) * 0.5f; };
    float* const to = kernel + t * g.pair_floats();
    if (!g.packed) {
      const Complex k = fz == 0 ? hermitian(0) : fz < g.half() ? at(fx, fy, fz) : conj(at(nx, ny, g.z.N - fz));
      store_complex(to, k * scale);
      return;
    }
    const Complex w = root(g.half_roots + 2 * fz);
    const Complex low = fz == 0 ? hermitian(0) : at(fx, fy, fz);
    const Complex high = fz == 0 ? hermitian(g.M) : conj(at(nx, ny, g.M - fz));
    store_complex(to, (low + high) * (0.5f * scale));
    store_complex(to + kWide, conj_product(w, low - high) * (0.5f * scale));
  });
}

// The same of one axis, from memory: in the order of frequencies, which come from both ends of the spectrum.
inline void halves_of_line(const Params& p, const Geometry& g, int64_t j, const Row& row, float* kernel, float scale) {
  constexpr int kSome = kChunk / 2;
  const int64_t size = g.half() * 2;
  const float* const from = p.spectrum + (j * p.C + row.first) * size;
  alignas(64) float low_block[kSome * kWide], high_block[kSome * kWide];
  for (int64_t start = 0; start <= g.M / 2; start += kSome) {
    load_lines(from + 2 * start, size, 1, row.channels, 2 * kSome, low_block, 1);
    load_lines(from + 2 * (g.M - start - kSome + 1), size, 1, row.channels, 2 * kSome, high_block, 1);
    for (int64_t i = 0; i < kSome && start + i <= g.M / 2; ++i) {
      const int64_t f = start + i;
      Complex low = load_complex(low_block + i * kWide),
              high = conj(load_complex(high_block + (kSome - 1 - i) * kWide));
      if (f == 0) low.im = high.im = vf{};
      const Complex even = (low + high) * (0.5f * scale);
      const Complex odd = conj_product(root(g.half_roots + 2 * f), low - high) * (0.5f * scale);
      const int32_t pair = g.pair_of[f];  // of f, or of -f
      float* const to = kernel + (pair / 2) * g.pair_floats();
      store_complex(to, pair % 2 ? conj(even) : even), store_complex(to + kWide, pair % 2 ? conj(odd) : odd);
    }
  }
}

// The gradient of such a spectrum, into `staged`, from four times the sum of conj(u) dy.
inline void spectrum_of_sums(const Params& p, const Geometry& g, const float* sums, float* staged) {
  const float scale = 0.25f / (static_cast<float>(g.x.N * g.y.N) * static_cast<float>(g.z.N));
  for_pairs(g, [&](int64_t t, int64_t, int64_t, int64_t fx, int64_t fy, int64_t fz) {
    const auto inside = [](int64_t f, int64_t n, int64_t keep) { return keep == 0 || std::min(f, n - f) < keep; };
    const bool outer = inside(fx, g.x.N, p.keep_x) && inside(fy, g.y.N, p.keep_y);
    const auto put = [&](int64_t x, int64_t y, int64_t z, Complex s) __attribute__((always_inline)) {
      const bool edge = z == 0 || (g.packed && z == g.M), kept = outer && inside(z, g.z.N, p.keep_z);
      store_complex(staged + ((x * g.y.N + y) * g.half() + z) * kWide,
                    kept ? s * (edge ? scale : 2 * scale) : Complex{});
    };
    const int64_t nx = modulo(-fx, g.x.N), ny = modulo(-fy, g.y.N), nz = modulo(-fz, g.M);
    const float* const at = sums + t * g.pair_floats();
    const Complex even = load_complex(at);
    if (!g.packed) {
      if (fz < g.half()) put(fx, fy, fz, even);
      if (nz < g.half()) put(nx, ny, nz, conj(even));
      return;
    }
    const Complex odd = root(g.half_roots + 2 * fz) * load_complex(at + kWide);
    put(fx, fy, fz, even + odd), put(nx, ny, fz == 0 ? 0 : nz, fz == 0 ? conj(even + odd) : conj(even - odd));
    if (fz == 0) put(fx, fy, g.M, even - odd), put(nx, ny, g.M, conj(even - odd));
  });
}

// The spectrum of kernel j: of k and k_rev, or the one that was given; divided so that products of it with twice the
// halves need no more scaling. plane, line, taps: scratch.
inline void make_spectrum(const Params& p, const Geometry& g, int64_t j, const Row& row, float* kernel, float* plane,
                          float* line, float* taps) {
  const float scale = 0.5f / static_cast<float>(g.elements);
  if (p.spectrum && g.pair_of) {
    halves_of_line(p, g, j, row, kernel, scale);
  } else if (p.spectrum) {
    spectrum_rows(p, g, j, row, [&](int64_t at, int64_t size, int64_t to) {
      load_lines(p.spectrum + at, size, 1, row.channels, 2 * g.half(), plane + to, 1);
    });
    halves_of_spectrum(g, plane, kernel, scale);
  } else {
    zero(plane, g.plane_floats());
    for_kernels(p, [&](const Taps& k) {
      k.load_each(j, row, taps, [&](int64_t x, int64_t y) {
        const int64_t px = g.x.place(k.lag(x, p.shift_x)), py = g.y.place(k.lag(y, p.shift_y));
        if (px < 0 || py < 0) return;
        float* const to = plane + (px * g.y.N + py) * g.M * kWide;
        for_places(g.z, k, p.shift_z, [&](int64_t i, int64_t at) {
          float* const place = to + at * g.step() * kLanes;
          store(place, load(place) + load(taps + i * kLanes));
        });
      });
    });
    transform_plane(g, plane, g.x.N, g.y.N, line);
    with_packed(g, [&](auto packed) {
      constexpr bool kPacked = decltype(packed)::value;
      const float half = 0.5f * scale * p.kernel_scale;
      for (int64_t t = 0; t < g.pair_count; ++t) {
        const Halves h = halves_of(plane, g.pairs + 3 * t);
        store_kernel<kPacked>(kernel + t * g.pair_floats(), {h.even * half, h.odd * half});
      }
    });
  }
  if (p.keep_x || p.keep_y || p.keep_z) keep_low(p, g, kernel);
}

// The gradients of kernel j, from four times the sum of conj(u) dy.
inline void store_kernel_gradients(const Params& p, const Geometry& g, int64_t j, const Row& row, float* sums,
                                   float* plane, float* line, float* taps) {
  if (p.dspectrum) {
    spectrum_of_sums(p, g, sums, plane);
    spectrum_rows(p, g, j, row, [&](int64_t at, int64_t size, int64_t from) {
      store_lines(p.dspectrum + at, size, 1, row.channels, 2 * g.half(), plane + from);
    });
    return;
  }
  if (p.keep_x || p.keep_y || p.keep_z) keep_low(p, g, sums);
  with_packed(g, [&](auto packed) {
    constexpr bool kPacked = decltype(packed)::value;
    for (int64_t t = 0; t < g.pair_count; ++t)
      store_halves(plane, g.pairs + 3 * t, load_kernel<kPacked>(sums + t * g.pair_floats()));
  });
  transform_plane_back(g, plane, 0, g.x.N, 0, g.y.N, line);
  const float scale = 0.25f * p.kernel_scale / static_cast<float>(g.elements);
  for_kernels(p, [&](const Taps& k) {
    k.store_each(j, row, taps, [&](int64_t x, int64_t y) {
      zero(taps, k.n[2] * kLanes);
      const int64_t px = g.x.place(k.lag(x, p.shift_x)), py = g.y.place(k.lag(y, p.shift_y));
      if (px < 0 || py < 0) return;
      const float* const from = plane + (px * g.y.N + py) * g.M * kWide;
      for_places(g.z, k, p.shift_z,
                 [&](int64_t i, int64_t at) { store(taps + i * kLanes, load(from + at * g.step() * kLanes) * scale); });
    });
  });
}

}  // namespace fft_conv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
