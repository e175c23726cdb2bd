// int_add_layer_norm: a sum of integers in steps of one scale, and I-ViT's LayerNorm of it.
#if !defined(EFFVIT_ROWS)  // for the bindings
#include "int_rows.h"

namespace effvit::ops {

struct int_add_layer_norm : OpDefaults {
  static constexpr const char* kForward =
      "int_add_layer_norm(x: ... C | integer, residual: ... C | integer, x_multiplier: C | int32 packed, x_shift: C | "
      "int32 packed, residual_multiplier: C | int32 packed, residual_shift: C | int32 packed, bias?: C | int32 packed, "
      "multiplier?: C | int32 packed, shift?: C | int32 packed, offset?: C | int32 packed; exact: bool = False, "
      "truncate: bool = False, bits: int in 2..16 = 16, out_dtype: int in 3..6 = 3) -> out: ... C | out_dtype, sum: "
      "... C | int16";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) {
    for (const char* name : {"x_multiplier", "residual_multiplier", "multiplier"}) {
      check_integers(c, name, -0x7fffffff, 0x7fffffff);
    }
    for (const char* name : {"x_shift", "residual_shift", "shift"}) check_integers(c, name, 1, 61);
    c.check_together("multiplier", "shift");
  }

  static IntRowsParams<int_add_layer_norm> params(const Call& c) {
    auto p = int_rows_of<int_add_layer_norm>(c, {"bias", "offset", "multiplier", "shift", "x_multiplier", "x_shift",
                                                 "residual_multiplier", "residual_shift"});
    p.sum = static_cast<int16_t*>(c["sum"].data);
    p.sum_high = (1 << (c.integer("bits") - 1)) - 1, p.sum_low = -p.sum_high - 1;
    p.flags[0] = c.flag("exact"), p.flags[1] = c.flag("truncate"), p.variant = c.given("multiplier");
    return p;
  }
};

}  // namespace effvit::ops

#else  // for the kernels: V is a vector of int32 on a CPU, an int32_t on a GPU

#include "int_norm.h"

enum : int { kVariants = 2 };

template <int kRescales>
struct Forward : LayerNorm<kRescales> {
  static constexpr bool kAdds = true;
};
#endif
