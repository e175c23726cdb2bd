// The arguments that the int8 products share: checks, and the filling of their parameters.
#pragma once

#include <cstring>

#include "declaration.h"
#include "int8_linear_params.h"

#define EFFVIT_INT8_EPILOGUE                                                                                     \
  "x_scale: M | float32 strided, w_scale: N | float32 packed, bias?: N | float packed, residual?: M N | float; " \
  "activation: int in 0..3 = 0, out_dtype: int in 0..4 = 0, out_scale: float? > 0 = None) -> out: M N | out_dtype"

namespace effvit {

inline constexpr int64_t kMaxInt8Depth = 131072;  // 128 * 127 * K < 2^31

// Positive and finite, where the values can be read. A row's own scale may be neither finite nor a number: it comes
// from such a row, and so do its results.
inline void check_scales(const Call& c, const char* name, bool of_rows = false) {
  const View& v = c[name];
  if (!c.readable) return;
  const float* const data = static_cast<const float*>(v.data);
  const int64_t n = v.stride[0] == 0 ? std::min<int64_t>(1, v.size[0]) : v.size[0], stride = v.stride[0];
  const bool any = of_rows && stride != 0;
  const auto fits = [=](float x) { return any ? !(x <= 0.f) : (x > 0.f) & (x < __builtin_inff()); };
  bool ok = true;
  for (int64_t i = 0; i < n; ++i) ok &= fits(data[i * stride]);
  for (int64_t i = 0; !ok && i < n; ++i) {
    const float x = data[i * stride];
    check(fits(x), c.op(), name, " must be positive and finite, got ", x, " at [", i, "]");
  }
}

// Of a packed weight: the 64 bytes that end its first block begin with what it is, N and K.
enum class Packed : int32_t { kInt8 = 0x38746e69, kSparse24 = 0x34327073 };
inline void check_label(const Call& c, const char* name, const char* by, Packed kind, int64_t N, int64_t K) {
  const View& v = c[name];
  if (!c.readable || v.size[0] == 0) return;
  int32_t label[3];
  std::memcpy(label, static_cast<const char*>(v.data) + v.size[1] - 64, sizeof(label));
  check(label[0] == static_cast<int32_t>(kind), c.op(), name, " must be packed by ", by,
        ", got something else of that size");
  check(label[1] == N && label[2] == K, c.op(), name, " must be packed by ", by, " from [N, K] = [", N, ", ", K,
        "], got one of [", label[1], ", ", label[2], "]");
}

inline void check_epilogue(const Call& c) {
  static const char* const names[] = {"none", "relu", "gelu", "silu"};
  const DType out = static_cast<DType>(c.integer("out_dtype"));
  const bool scaled = c.option("out_scale").given;
  check(out == DType::kInt8 || !scaled, c.op(), "out_scale must be None where the output is not int8, got ",
        c.option("out_scale").number);
  check(out != DType::kInt8 || scaled, c.op(), "out_scale must be given where the output is int8, got None");
  if (out == DType::kInt32) {
    for (const char* name : {"bias", "residual"}) {
      const View* v = c.find(name);
      if (v) fail(c.op(), name, " must be None where the output is int32, got ", Integers(*v));
    }
    const int activation = c.integer("activation");
    check(activation == 0, c.op(), "activation must be none where the output is int32, got ", names[activation]);
  }
  check_scales(c, "x_scale", true);
  check_scales(c, "w_scale");
}

inline void take_epilogue(const Call& c, Int8Epilogue& p) {
  const View& x_scale = c["x_scale"];
  p.x_scale = static_cast<const float*>(x_scale.data), p.x_scale_stride = x_scale.stride[0];
  c.take("w_scale", p.w_scale), c.take("bias", p.bias), c.take("residual", p.residual, p.residual_stride_m);
  c.take("out", p.out);
  if (const View* v = c.find("bias")) p.bias_dtype = v->dtype;
  if (const View* v = c.find("residual")) p.residual_dtype = v->dtype;
  p.M = c.dim("M"), p.N = c.dim("N");
  p.out_dtype = c["out"].dtype;
  p.activation = static_cast<Activation>(c.integer("activation"));
  if (c.option("out_scale").given) p.out_scale = c.number("out_scale");
}

}  // namespace effvit
