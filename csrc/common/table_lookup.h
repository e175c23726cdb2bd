// table_lookup: declaration, checks, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "table_lookup_params.h"

namespace effvit::ops {

struct table_lookup : OpDefaults {
  static constexpr const char* kForward =
      "table_lookup(x: ... C | uint8, table: T 256 | uint8 packed, which?: ... | uint8 strided; "
      "signed: bool = False) -> out: ... C | uint8";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) {
    const View* which = c.find("which");
    const int64_t tables = c.dim("T");
    if (!which) {
      effvit::check(tables == 1, c.op(), "table must be [T, 256] with T = 1 where which is None, got ",
                    Integers(c["table"]));
      return;
    }
    effvit::check(tables > 0, c.op(), "table must be [T, 256] with T at least 1, got ", Integers(c["table"]));
    if (!c.readable || which->count() == 0 || tables > 255) return;
    int64_t at[6] = {};
    int most = 0;
    for (;;) {
      int64_t offset = 0;
      for (int k = 0; k < which->dim; ++k) offset += at[k] * which->stride[k];
      const int value = static_cast<const uint8_t*>(which->data)[offset];
      most = value > most ? value : most;
      int k = which->dim - 1;
      for (; k >= 0; --k) {
        if (which->stride[k] != 0 && ++at[k] < which->size[k]) break;
        at[k] = 0;
      }
      if (k < 0) break;
    }
    effvit::check(most < tables, c.op(), "which must be below T = ", tables, ", got ", most);
  }

  static TableLookupParams params(const Call& c) {
    TableLookupParams p;
    const View &x = c["x"], *which = c.find("which");
    p.x = static_cast<const uint8_t*>(x.data);
    c.take("table", p.table), c.take("out", p.out);
    if (which) p.which = static_cast<const uint8_t*>(which->data);
    p.columns = c.dim("C"), p.rows = 1, p.is_signed = c.flag("signed");
    for (int k = 0; k < c.lead_dims; ++k) {
      p.rows *= c.lead[k];
      if (c.lead[k] == 1) continue;
      const int64_t of_x = x.stride[k], of_which = which ? which->stride[k] : 0;
      const int last = p.dims - 1;
      const bool follows =
          p.dims > 0 && p.x_stride[last] == of_x * c.lead[k] && p.which_stride[last] == of_which * c.lead[k];
      const int at = follows ? last : p.dims++;
      p.size[at] = (follows ? p.size[at] : 1) * c.lead[k];
      p.x_stride[at] = of_x, p.which_stride[at] = of_which;
    }
    return p;
  }
};

}  // namespace effvit::ops
