// block_sparse_linear: declarations, limits, and the filling of its parameters.
#pragma once

#include "block_sparse.h"
#include "block_sparse_linear_params.h"

namespace effvit::ops {

struct block_sparse_linear : OpDefaults {
  static constexpr const char* kForward =
      "block_sparse_linear(x: ... K, values: Z B B, crow: R+1 | int32 packed, columns: Z | int32 packed, "
      "bias?: N | float packed, residual?: ... N | float; activation: int in 0..3 = 0) -> out: ... N";
  static constexpr const char* kBackward =
      "block_sparse_linear_backward(grad_out: ... N, x: ... K, values: Z B B, crow: R+1 | int32 packed, "
      "columns: Z | int32 packed, bias?: N | float packed, residual?: ... N | float; activation: int in 0..3 = 0) -> "
      "dx: ... K, dvalues: Z B B, dbias?: N | float, dresidual?: ... N | float";
  static constexpr const char* kEmpty = "... N";

  static void derive(Call& c) {
    derive_blocks(c);
    c.dim("N") = c.dim("R") * c.dim("B");
  }

  static void check(const Call& c) { check_places(c); }

  static BlockSparseLinearParams params(const Call& c) {
    BlockSparseLinearParams p;
    c.take("x", p.x), c.take("values", p.values, p.values_stride_z, p.values_stride_i);
    c.take("crow", p.crow), c.take("columns", p.columns), c.take("bias", p.bias), c.take("residual", p.residual);
    c.take("grad_out", p.grad_out), c.take("dx", p.dx), c.take("dvalues", p.dvalues), c.take("dbias", p.dbias);
    c.take("dresidual", p.dresidual);
    c.take("out", p.out);
    if (const View* v = c.find("bias")) p.bias_dtype = v->dtype;
    if (const View* v = c.find("residual")) p.residual_dtype = v->dtype;
    p.N = c.dim("N"), p.K = c.dim("K"), p.Z = c.dim("Z"), p.B = static_cast<int32_t>(c.dim("B"));
    p.dtype = c["x"].dtype;
    p.activation = static_cast<Activation>(c.integer("activation"));
    take_rows(c, p);
    return p;
  }

 private:
  // Leading dims that lie behind each other in every tensor become one.
  static void take_rows(const Call& c, BlockSparseLinearParams& p) {
    const View* const views[] = {c.find("x"), c.find("residual"), c.find("grad_out")};
    int64_t* const strides[] = {p.x_stride, p.residual_stride, p.grad_out_stride};
    LeadingRows& rows = p.rows;
    p.M = 1;
    for (int k = 0; k < c.lead_dims; ++k) {
      p.M *= c.lead[k];
      if (c.lead[k] == 1) continue;
      bool follows = rows.dims > 0;
      for (int i = 0; i < 3; ++i)
        follows = follows && (!views[i] || strides[i][rows.dims - 1] == views[i]->stride[k] * c.lead[k]);
      const int at = follows ? rows.dims - 1 : rows.dims++;
      rows.size[at] = (follows ? rows.size[at] : 1) * c.lead[k];
      for (int i = 0; i < 3; ++i) {
        if (views[i]) strides[i][at] = views[i]->stride[k];
      }
    }
  }
};

}  // namespace effvit::ops
