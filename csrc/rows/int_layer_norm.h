// int_layer_norm: I-ViT's LayerNorm of integers, by an integer square root.
#if !defined(EFFVIT_ROWS)  // for the bindings
#include "int_rows.h"

namespace effvit::ops {

struct int_layer_norm : OpDefaults {
  static constexpr const char* kForward =
      "int_layer_norm(x: ... C | integer, bias?: C | int32 packed, multiplier?: C | int32 packed, shift?: C | int32 "
      "packed, offset?: C | int32 packed; exact: bool = False, truncate: bool = False, out_dtype: int in 3..6 = 3) -> "
      "out: ... C | out_dtype";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) {
    c.check_together("multiplier", "shift");
    check_integers(c, "multiplier", -0x7fffffff, 0x7fffffff);
    check_integers(c, "shift", 1, 61);
  }

  static IntRowsParams<int_layer_norm> params(const Call& c) {
    auto p = int_rows_of<int_layer_norm>(c, {"bias", "offset", "multiplier", "shift"});
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
  static constexpr bool kAdds = false;
};
#endif
