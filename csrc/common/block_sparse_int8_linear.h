// block_sparse_int8_linear: declaration, limits, and the filling of its parameters.
#pragma once

#include "block_sparse.h"
#include "block_sparse_int8_linear_params.h"
#include "int8_epilogue.h"

namespace effvit::ops {

struct block_sparse_int8_linear : OpDefaults {
  static constexpr const char* kForward =
      "block_sparse_int8_linear(x: M K | int8, values: Z B B | int8, crow: R+1 | int32 packed, "
      "columns: Z | int32 packed, " EFFVIT_INT8_EPILOGUE;
  static constexpr const char* kEmpty = "M N";

  static void derive(Call& c) {
    effvit::check(c.dim("K") <= kMaxInt8Depth, c.op(), "x must be [M, K] with K at most ", kMaxInt8Depth,
                  ", or the int32 sums could overflow, got ", Integers(c["x"]));
    derive_blocks(c);
    const int64_t n = c.dim("R") * c.dim("B");
    effvit::check(c.dim("N") == n, c.op(), "w_scale must be [N] = [", n, "] like crow and values, got ",
                  Integers(c["w_scale"]));
  }

  static void check(const Call& c) {
    check_epilogue(c);
    check_places(c);
  }

  static BlockSparseInt8LinearParams params(const Call& c) {
    BlockSparseInt8LinearParams p;
    take_epilogue(c, p);
    c.take("x", p.x, p.x_stride_m), c.take("values", p.values, p.values_stride_z, p.values_stride_i);
    c.take("crow", p.crow), c.take("columns", p.columns);
    p.K = c.dim("K"), p.Z = c.dim("Z"), p.B = static_cast<int32_t>(c.dim("B"));
    return p;
  }
};

}  // namespace effvit::ops
