// int8_matmul: declaration, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "int8_matmul_params.h"
#include "int_rescale.h"

namespace effvit {

inline void check_rescale(const Call& c) {
  effvit::check(c.integer("multiplier") == 0 || c.integer("shift") != 0, c.op(),
                "shift must be between 1 and 61 with a multiplier, got 0");
}

// Ends of what `bits` hold in a dtype.
inline void set_ends(Rescale& r, int bits, DType dtype) {
  const Ends ends = ends_of(dtype, bits);
  r.low = ends.low, r.high = ends.high;
}

inline Rescale rescale_of(const Call& c, Name bits) {
  Rescale r;
  r.multiplier = c.integer("multiplier"), r.shift = c.integer("shift");
  set_ends(r, c.integer(bits), static_cast<DType>(c.integer("out_dtype")));
  return r;
}

}  // namespace effvit

namespace effvit::ops {

struct int8_matmul : OpDefaults {
  static constexpr const char* kForward =
      "int8_matmul(a: ... M K | integer, b: ... R C | integer; transpose_b: bool = False, multiplier: int in "
      "0..2147483647 = 0, shift: int in 0..61 = 0, bits: int in 2..32 = 32, out_dtype: int in 3..6 = 3) -> out: ... M "
      "N "
      "| out_dtype";
  static constexpr const char* kEmpty = "M N";

  static void derive(Call& c) {
    constexpr int64_t kMostDepth = 1 << 20;
    const int64_t k = c.dim("K");
    effvit::check(k <= kMostDepth, c.op(), "a must be [..., M, K] with K at most ", kMostDepth, ", got ",
                  Integers(c["a"]));
    for (const char* name : {"a", "b"})
      effvit::check(c[name].dtype != DType::kInt32, c.op(), name, " must be int16, int8 or uint8, got int32");
    const bool transposed = c.flag("transpose_b");
    effvit::check(c.dim(transposed ? "C" : "R") == k, c.op(), "b must be ", transposed ? "[..., N, K]" : "[..., K, N]",
                  " with K = ", k, " like a ", Integers(c["a"]), ", got ", Integers(c["b"]));
    c.dim("N") = c.dim(transposed ? "R" : "C");
  }

  static void check(const Call& c) { check_rescale(c); }

  static Int8MatmulParams params(const Call& c) {
    Int8MatmulParams p;
    const View &a = c["a"], &b = c["b"], &out = c["out"];
    p.a = a.data, p.b = b.data, p.out = out.data;
    p.a_dtype = a.dtype, p.b_dtype = b.dtype, p.out_dtype = out.dtype;
    p.M = c.dim("M"), p.N = c.dim("N"), p.K = c.dim("K");
    p.dims = c.lead_dims;
    for (int k = 0; k < p.dims; ++k) {
      p.batches *= p.size[k] = c.lead[k];
      p.a_stride[k] = a.stride[k], p.b_stride[k] = b.stride[k];
    }
    p.a_row = a.stride[p.dims], p.b_row = b.stride[p.dims];
    p.transpose_b = c.flag("transpose_b");
    p.rescale = rescale_of(c, "bits");
    return p;
  }
};

}  // namespace effvit::ops
