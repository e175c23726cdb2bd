// quantize_int8: declaration, checks, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "quantize_int8_params.h"

namespace effvit::ops {

struct quantize_int8 : OpDefaults {
  static constexpr const char* kForward =
      "quantize_int8(x: ... K, scale?: ... | float32 strided, excluded?: K | int8 packed; round: int in 0..1 = 0) -> "
      "q: ... K | int8, out_scale: ... | float32";
  static constexpr const char* kEmpty = "...";

  static void check(const Call& c) {
    const View* scale = c.find("scale");
    if (!scale || !c.readable || scale->count() == 0) return;
    int64_t at[6] = {};
    for (;;) {
      int64_t offset = 0;
      for (int k = 0; k < scale->dim; ++k) offset += at[k] * scale->stride[k];
      const float x = static_cast<const float*>(scale->data)[offset];
      effvit::check(x > 0.f && x < __builtin_inff(), c.op(), "scale must be positive and finite, got ", x, " at ",
                    Integers(at, scale->dim));
      int k = scale->dim - 1;
      for (; k >= 0; --k) {
        if (scale->stride[k] != 0 && ++at[k] < scale->size[k]) break;
        at[k] = 0;
      }
      if (k < 0) return;
    }
  }

  static QuantizeInt8Params params(const Call& c) {
    QuantizeInt8Params p;
    const View &x = c["x"], *scale = c.find("scale");
    p.x = x.data, p.dtype = x.dtype;
    c.take("excluded", p.excluded), c.take("q", p.q), c.take("out_scale", p.out_scale);
    if (scale) p.scale = static_cast<const float*>(scale->data);
    p.columns = c.dim("K"), p.rows = 1;
    for (int k = 0; k < c.lead_dims; ++k) {
      p.rows *= c.lead[k];
      if (c.lead[k] == 1) continue;
      const int64_t of_x = x.stride[k], of_scale = scale ? scale->stride[k] : 0;
      const int last = p.dims - 1;
      const bool follows =
          p.dims > 0 && p.x_stride[last] == of_x * c.lead[k] && p.scale_stride[last] == of_scale * c.lead[k];
      const int at = follows ? last : p.dims++;
      p.size[at] = (follows ? p.size[at] : 1) * c.lead[k];
      p.x_stride[at] = of_x, p.scale_stride[at] = of_scale;
    }
    p.away = c.integer("round") == 1;
    return p;
  }
};

}  // namespace effvit::ops
