// What the operators on tables of levels share: checks of tables, and the filling of their parameters.
#pragma once

#include "declaration.h"
#include "lut_params.h"

namespace effvit {

inline void check_count(const Call& c, const char* name, int64_t most) {
  const int64_t n = c[name].size[0];
  check(n >= 1 && n <= most, c.op(), name, " must have 1 to ", most, " elements, got ", Integers(c[name]));
}

// Thresholds that can be read are numbers in ascending order, equal ones allowed.
inline void check_thresholds(const Call& c) {
  check_count(c, "thresholds", LutParams::kMostCodes - 1);
  if (!c.readable) return;
  const View& v = c["thresholds"];
  const float* const t = static_cast<const float*>(v.data);
  for (int64_t i = 0; i < v.size[0]; ++i)
    check(t[i] == t[i] && (i == 0 || t[i] >= t[i - 1]), c.op(), "thresholds must be in ascending order, got ", t[i],
          " at [", i, "]");
}

template <class Params>
Params lut_params(const Call& c, const View& x, const View& out) {
  Params p;
  p.x = x.data, p.dtype = x.dtype, p.out = out.data, p.out_dtype = out.dtype;
  if (const View* v = c.find("thresholds")) {
    p.thresholds = static_cast<const float*>(v->data), p.codes = static_cast<int32_t>(v->size[0] + 1);
  }
  if (const View* v = c.find("values")) {
    p.values = static_cast<const float*>(v->data), p.codes = static_cast<int32_t>(v->size[0]);
  }
  p.columns = c.dim("C"), p.rows = 1;
  for (int k = 0; k < c.lead_dims; ++k) {
    p.rows *= c.lead[k];
    if (c.lead[k] == 1) continue;
    const bool follows = p.dims > 0 && p.x_stride[p.dims - 1] == x.stride[k] * c.lead[k];
    const int at = follows ? p.dims - 1 : p.dims++;
    p.size[at] = (follows ? p.size[at] : 1) * c.lead[k];
    p.x_stride[at] = x.stride[k];
  }
  // Rows that follow each other without a gap are one row.
  if (p.dims == 1 && p.x_stride[0] == p.columns) p.columns *= p.rows, p.rows = 1, p.dims = 0;
  return p;
}

}  // namespace effvit
