// Integer row-wise operators, which reduce over a row: a declaration and a functor in rows/<op>.h, everything else is
// here, in rows/int_math.h, cpu/int_rows.inl.h and cuda/int_rows.cuh.
#pragma once
#include <limits>

#include "../common/int_rescale.h"
#include "int_params.h"

namespace effvit {

// -x0 << n, the largest value of the exponential, must fit into int32: every other number is smaller then.
inline void check_shift_exp(const Call& c) {
  const int64_t n = c.integer("n"), x0 = c.option("x0").integers[0], most = int64_t{0x7fffffff} >> n;
  check(-x0 <= most, c.op(), "x0 must be between ", -most, " and -1 with n = ", n, ", got ", x0);
}

// q = p / x for all p <= n x as a product with a rounded up 2^k / x. It is exact while p (magic x - 2^k) < 2^k. In 32
// bits where that goes, which is while x is below some thousands; else by the high half of 64 bits, with k = 30 + bits
// of x: n x^2 < n 4^(bits of x) <= 2^k, as x 2^n < 2^31 and n >= 4.
inline ShiftExp shift_exp_of(const Call& c) {
  ShiftExp e;
  e.n = static_cast<uint32_t>(c.integer("n")), e.x = static_cast<uint32_t>(-c.integer("x0")), e.limit = e.n * e.x;
  e.mask = c.flag("half_bit") ? ~uint32_t{0} : ~uint32_t{1};
  for (int k = 31; k > 0; --k) {
    const uint64_t whole = uint64_t{1} << k, magic = (whole + e.x - 1) / e.x;
    if (magic * e.limit >> 32 || (magic * e.x - whole) * e.limit >= whole) continue;
    e.magic = static_cast<uint32_t>(magic), e.shift = static_cast<uint32_t>(k);
    return e;
  }
  int bits = 0;
  while (e.x >> bits) ++bits;
  const uint64_t whole = uint64_t{1} << (30 + bits);
  e.magic = static_cast<uint32_t>((whole + e.x - 1) / e.x), e.shift = static_cast<uint32_t>(bits - 2), e.wide = true;
  return e;
}

// Ends of what `bits` hold, and the result's dtype.
inline void set_ends(IntRowsData& p, int bits = 32) {
  const Ends ends = ends_of(p.out_dtype, bits);
  p.low = ends.low, p.high = ends.high;
}

// x, `residual` where the op has one, the [C] tensors in this order, out.
template <class Op>
IntRowsParams<Op> int_rows_of(const Call& c, std::initializer_list<Name> vectors = {}) {
  IntRowsParams<Op> p;
  const View &x = c["x"], *residual = c.find("residual"), &out = c["out"];
  p.x = x.data, p.x_dtype = x.dtype, p.out = out.data, p.out_dtype = out.dtype;
  if (residual) p.residual = residual->data, p.residual_dtype = residual->dtype;
  int count = 0;
  for (const Name name : vectors) {
    const View* v = c.find(name);
    p.vectors[count++] = v ? static_cast<const int32_t*>(v->data) : nullptr;
  }
  p.columns = c.dim("C"), p.rows = 1;
  for (int k = 0; k < c.lead_dims; ++k) {
    p.rows *= c.lead[k];
    if (c.lead[k] == 1) continue;
    const int64_t of_x = x.stride[k], of_residual = residual ? residual->stride[k] : 0;
    const int last = p.dims - 1;
    const bool follows =
        p.dims > 0 && p.x_stride[last] == of_x * c.lead[k] && p.residual_stride[last] == of_residual * c.lead[k];
    const int at = follows ? last : p.dims++;
    p.size[at] = (follows ? p.size[at] : 1) * c.lead[k];
    p.x_stride[at] = of_x, p.residual_stride[at] = of_residual;
  }
  set_ends(p);
  return p;
}

}  // namespace effvit
