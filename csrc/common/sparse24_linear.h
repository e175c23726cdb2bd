// sparse24_linear: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "sparse24_linear_params.h"
#include "sparse24_meta.h"

namespace effvit::ops {

struct sparse24_linear : OpDefaults {
  static constexpr const char* kForward =
      "sparse24_linear(x: ... K, values: N K2 | strided, meta: N K8 | uint8 strided, bias?: N | float packed) -> "
      "out: ... N";
  static constexpr const char* kBackward =
      "sparse24_linear_backward(grad_out: ... N, x: ... K, values: N K2 | strided, meta: N K8 | uint8 strided, "
      "bias?: N | float packed) -> dx: ... K, dvalues: N K2, dbias?: N | float";
  static constexpr const char* kEmpty = "... N";

  static void derive(Call& c) {
    const int64_t k = 2 * c.dim("K2"), steps = (k + 7) / 8;
    effvit::check(k % 4 == 0, c.op(), "values must be [N, K / 2] with K a multiple of 4, got ", Integers(c["values"]));
    effvit::check(c.dim("K8") == steps, c.op(), "meta must be [N, ceil(K / 8)] = [", c.dim("N"), ", ", steps,
                  "] like values ", Integers(c["values"]), ", got ", Integers(c["meta"]));
    effvit::check(c.dim("K") == k, c.op(), "x must be [..., K] with K = ", k, " like values ", Integers(c["values"]),
                  ", got ", Integers(c["x"]));
  }

  static void check(const Call& c) {
    if (c.readable) check_positions(c, c["meta"]);
  }

  static RowPlaces rows_of(const Call& c, const View& v) {
    RowPlaces rows;
    for (int i = 0; i < c.lead_dims; ++i) {
      if (c.lead[i] == 1) continue;
      const bool follows = rows.dims > 0 && rows.stride[rows.dims - 1] == v.stride[i] * c.lead[i];
      const int at = follows ? rows.dims - 1 : rows.dims++;
      rows.size[at] = (follows ? rows.size[at] : 1) * c.lead[i];
      rows.stride[at] = v.stride[i];
    }
    return rows;
  }

  static Sparse24LinearParams params(const Call& c) {
    Sparse24LinearParams p;
    c.take("x", p.x), c.take("values", p.values, p.values_stride_n, p.values_stride_k);
    c.take("meta", p.meta, p.meta_stride_n, p.meta_stride_k), c.take("bias", p.bias), c.take("out", p.out);
    c.take("grad_out", p.grad_out), c.take("dx", p.dx), c.take("dvalues", p.dvalues), c.take("dbias", p.dbias);
    p.x_rows = rows_of(c, c["x"]);
    if (const View* grad = c.find("grad_out")) p.grad_out_rows = rows_of(c, *grad);
    p.M = 1;
    for (int i = 0; i < c.lead_dims; ++i) p.M *= c.lead[i];
    p.N = c.dim("N"), p.K = c.dim("K");
    p.dtype = c["x"].dtype;
    if (const View* bias = c.find("bias")) p.bias_dtype = bias->dtype;
    return p;
  }
};

}  // namespace effvit::ops
