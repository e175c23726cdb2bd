// sign_bits: declaration, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "sign_bits_params.h"

namespace effvit::ops {

struct sign_bits : OpDefaults {
  static constexpr const char* kForward =
      "sign_bits(x: ... K, threshold?: ... | float32 strided) -> bits: ... V | uint8, scale: ... | float32";
  static constexpr const char* kEmpty = "...";

  static void derive(Call& c) { c.dim("V") = (c.dim("K") + 7) / 8; }

  static SignBitsParams params(const Call& c) {
    SignBitsParams p;
    const View &x = c["x"], *threshold = c.find("threshold");
    p.x = x.data, p.dtype = x.dtype;
    c.take("bits", p.bits), c.take("scale", p.scale);
    if (threshold) p.threshold = static_cast<const float*>(threshold->data);
    p.columns = c.dim("K"), p.rows = 1;
    for (int k = 0; k < c.lead_dims; ++k) {
      p.rows *= c.lead[k];
      if (c.lead[k] == 1) continue;
      const int64_t of_x = x.stride[k], of_threshold = threshold ? threshold->stride[k] : 0;
      const int last = p.dims - 1;
      const bool follows =
          p.dims > 0 && p.x_stride[last] == of_x * c.lead[k] && p.threshold_stride[last] == of_threshold * c.lead[k];
      const int at = follows ? last : p.dims++;
      p.size[at] = (follows ? p.size[at] : 1) * c.lead[k];
      p.x_stride[at] = of_x, p.threshold_stride[at] = of_threshold;
    }
    return p;
  }
};

}  // namespace effvit::ops
