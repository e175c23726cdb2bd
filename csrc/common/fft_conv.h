// fft_conv: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "fft_conv_params.h"

namespace effvit::ops {

#define EFFVIT_OPTIONALS                                                                                           \
  "k?: J C1*C2 KX KY KZ | float packed, d?: C1*C2 | float packed, pregate?: B C1 X Y Z C2, postgate?: B C1 X Y Z " \
  "C2, k_rev?: J C1*C2 RX RY RZ | float packed, spectrum?: J C1*C2 NX NY NF 2 | float32 packed; "                  \
  "mode_x: int in 0..2 = 2, mode_y: int in 0..2 = 2, mode_z: int in 0..2 = 0, act: int in 0..2 = 0, "              \
  "keep_x: int in 0..2147483647 = 0, keep_y: int in 0..2147483647 = 0, keep_z: int in 0..2147483647 = 0, "         \
  "kernel_scale: float = 1.0"

struct fft_conv : OpDefaults {
  static constexpr const char* kForward = "fft_conv(u: B C1 X Y Z C2, " EFFVIT_OPTIONALS ") -> out: B C1 X Y Z C2";
  static constexpr const char* kBackward =
      "fft_conv_backward(grad_out: B C1 X Y Z C2, u: B C1 X Y Z C2, " EFFVIT_OPTIONALS
      ") -> du: B C1 X Y Z C2, dk?: J C1*C2 KX KY KZ | float, dd?: C1*C2 | float, dpregate?: B C1 X Y Z C2, "
      "dpostgate?: B C1 X Y Z C2, dk_rev?: J C1*C2 RX RY RZ | float, dspectrum?: J C1*C2 NX NY NF 2 | float32";
  static constexpr const char* kEmpty = "B C1 X Y Z C2";
  static constexpr int32_t kSame = 1, kCircular = 2;

  static void derive(Call& c) {
    effvit::check(c.dim("C1") == 1 || c.dim("C2") == 1, c.op(),
                  "u must be [B, C, X, Y, Z, 1] or [B, 1, X, Y, Z, C], got ", Integers(c["u"]));
  }

  static void check(const Call& c) {
    const char* const op = c.op();
    const View *k = c.find("k"), *k_rev = c.find("k_rev"), *spectrum = c.find("spectrum");
    effvit::check(k || spectrum, op, "k must be given where spectrum is not, got None");
    if (spectrum) {
      if (k) fail(op, "k must be None where spectrum is given, got ", Integers(*k));
      if (k_rev) fail(op, "k_rev must be None where spectrum is given, got ", Integers(*k_rev));
      effvit::check(c.number("kernel_scale") == 1.f, op, "kernel_scale must be 1.0 where spectrum is given, got ",
                    c.number("kernel_scale"));
    }
    const int64_t J = c.dim("J"), B = c.dim("B");
    effvit::check(J == 1 || J == B || (J > 0 && B % J == 0), op, k ? "k" : "spectrum",
                  " must be of a batch size that divides ", B, ", got ", Integers(k ? *k : *spectrum));
    for (const View* taps : {k, k_rev}) {
      effvit::check(!taps || (taps->size[2] > 0 && taps->size[3] > 0 && taps->size[4] > 0), op,
                    taps == k ? "k" : "k_rev", " must be of at least one tap per axis, got ",
                    taps ? Integers(*taps) : Integers(nullptr, 0));
    }
    if (!spectrum) return;
    const int64_t sizes[] = {c.dim("X"), c.dim("Y"), c.dim("Z")}, NZ = size_z(c);
    const auto fits = [](int32_t mode, int64_t n, int64_t size) { return mode == kCircular ? n == size : n >= size; };
    effvit::check(fits(c.integer("mode_x"), c.dim("NX"), sizes[0]) &&
                      fits(c.integer("mode_y"), c.dim("NY"), sizes[1]) && fits(c.integer("mode_z"), NZ, sizes[2]) &&
                      c.dim("NF") == NZ / 2 + 1,
                  op, "spectrum must be of a transform as large as circular axes are, and no smaller than others, ",
                  Integers(sizes, 3), ", got ", Integers(*spectrum));
  }

  static FftConvParams params(const Call& c) {
    FftConvParams p;
    const bool first = c.dim("C2") == 1;
    p.B = c.dim("B"), p.C = c.dim("C1") * c.dim("C2"), p.X = c.dim("X"), p.Y = c.dim("Y"), p.Z = c.dim("Z");
    take_map(c, "u", first, p.u, p.u_stride), take_map(c, "pregate", first, p.pregate, p.pregate_stride);
    take_map(c, "postgate", first, p.postgate, p.postgate_stride);
    take_map(c, "grad_out", first, p.grad_out, p.grad_out_stride);
    FftConvStrides& s = p.out_stride;
    s.z = first ? 1 : p.C, s.y = s.z * p.Z, s.x = s.y * p.Y;
    s.c = first ? s.x * p.X : 1, s.b = p.C * p.X * p.Y * p.Z;
    c.take("out", p.out), c.take("du", p.du), c.take("dpregate", p.dpregate), c.take("dpostgate", p.dpostgate);
    c.take("k", p.k), c.take("k_rev", p.k_rev), c.take("d", p.d), c.take("spectrum", p.spectrum);
    c.take("dk", p.dk), c.take("dk_rev", p.dk_rev), c.take("dd", p.dd), c.take("dspectrum", p.dspectrum);
    p.J = c.dim("J"), p.dtype = c["u"].dtype;
    p.mode_x = c.integer("mode_x"), p.mode_y = c.integer("mode_y"), p.mode_z = c.integer("mode_z");
    if (const View* k = c.find("k")) {
      p.k_dtype = k->dtype, p.KX = k->size[2], p.KY = k->size[3], p.KZ = k->size[4];
      const auto shift = [](int32_t mode, int64_t taps) { return mode == kSame ? (taps - 1) / 2 : 0; };
      p.shift_x = shift(p.mode_x, p.KX), p.shift_y = shift(p.mode_y, p.KY), p.shift_z = shift(p.mode_z, p.KZ);
    }
    if (const View* k = c.find("k_rev"))
      p.k_rev_dtype = k->dtype, p.RX = k->size[2], p.RY = k->size[3], p.RZ = k->size[4];
    if (const View* d = c.find("d")) p.d_dtype = d->dtype;
    if (p.spectrum) {
      p.NX = c.dim("NX"), p.NY = c.dim("NY"), p.NZ = size_z(c);
    } else {
      const auto size = [](int32_t mode, int64_t s, int64_t k, int64_t r) {
        return mode == kCircular ? s : fft_conv_size(s + (k > r ? k : r) - 1);
      };
      p.NX = size(p.mode_x, p.X, p.KX, p.RX), p.NY = size(p.mode_y, p.Y, p.KY, p.RY);
      p.NZ = size(p.mode_z, p.Z, p.KZ, p.RZ);
    }
    p.keep_x = c.integer("keep_x"), p.keep_y = c.integer("keep_y"), p.keep_z = c.integer("keep_z");
    p.act = c.integer("act"), p.kernel_scale = c.number("kernel_scale");
    return p;
  }

 private:
  // Of the spectrum that was given: of a circular axis its own, else an even number.
  static int64_t size_z(const Call& c) { return c.integer("mode_z") == kCircular ? c.dim("Z") : 2 * (c.dim("NF") - 1); }

  // [B, C, X, Y, Z, 1] or [B, 1, X, Y, Z, C].
  static void take_map(const Call& c, Name name, bool first, const void*& data, FftConvStrides& s) {
    int64_t c1 = 0, c2 = 0;
    if (const View* v = c.find(name)) c2 = v->stride[5];
    c.take(name, data, s.b, c1, s.x, s.y, s.z);
    s.c = first ? c1 : c2;
  }
};

#undef EFFVIT_OPTIONALS

}  // namespace effvit::ops
