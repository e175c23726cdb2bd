// glu: a * act(b).
#if !defined(EFFVIT_ROWS)  // for the bindings
#include "rows.h"

namespace effvit::ops {

struct glu : OpDefaults {
  static constexpr const char* kForward = "glu(a: ... D, b?: ... D; act: int in 0..4 = 0) -> out: ... C";
  static constexpr const char* kBackward =
      "glu_backward(grad_out: ... C, a: ... D, b?: ... D; act: int in 0..4 = 0) -> da: ... D, db?: ... D";
  static constexpr const char* kEmpty = "... D";

  static void derive(Call& c) {
    const bool one = !c.given("b");
    effvit::check(!one || c.dim("D") % 2 == 0, c.op(), "a must be [..., 2*C] when b is not given, got ",
                  Integers(c["a"]));
    c.dim("C") = one ? c.dim("D") / 2 : c.dim("D");
  }

  static RowsParams<glu> params(const Call& c) {
    const int64_t C = c.dim("C");
    const bool one = !c.given("b");
    RowsOf rows(c, C);
    if (const View* grad = c.find("grad_out")) rows.with(*grad);
    rows.with(c["a"]).with(one ? c["a"] : c["b"], one ? C : 0);
    if (const View* out = c.find("out")) rows.with(*out);
    if (const View* da = c.find("da")) rows.with(*da).with(one ? *da : c["db"], one ? C : 0);
    RowsParams<glu> p = rows.params<glu>();
    p.variant = c.integer("act");
    return p;
  }
};

}  // namespace effvit::ops

#else  // for the kernels: V is a vector of floats on a CPU, a float on a GPU

enum : int { kSigmoid, kGelu, kSilu, kRelu, kTanh, kVariants };

// act(b) and, where it is asked for, its derivative.
template <int kAct, class V>
EFFVIT_FN V activation(V b, V* slope) {
  if constexpr (kAct == kRelu) {
    if (slope) *slope = select(b > 0.f, splat<V>(1.f), splat<V>(0.f));
    return max(splat<V>(0.f), b);
  } else if constexpr (kAct == kTanh) {
    const V t = tanh(b);
    if (slope) *slope = 1.f - t * t;
    return t;
  } else if constexpr (kAct == kGelu) {
    V density;
    const V half = normal_cdf(b, &density);
    if (slope) *slope = fma(b, density, half);
    return b * half;
  } else {
    const V s = 1.f / (1.f + exp_full(-b));
    if (slope) *slope = kAct == kSilu ? s * fma(b, 1.f - s, splat<V>(1.f)) : s * (1.f - s);
    return kAct == kSilu ? b * s : s;
  }
}

template <int kAct>
struct Forward {
  static constexpr int kInputs = 2, kOutputs = 1;
  template <class V>
  EFFVIT_FN static void apply(const V (&in)[2], V (&out)[1]) {
    out[0] = in[0] * activation<kAct, V>(in[1], nullptr);
  }
};

template <int kAct>
struct Backward {
  static constexpr int kInputs = 3, kOutputs = 2;  // grad_out, a, b; da, db
  template <class V>
  EFFVIT_FN static void apply(const V (&in)[3], V (&out)[2]) {
    V slope;
    out[0] = in[0] * activation<kAct, V>(in[2], &slope);
    out[1] = in[0] * in[1] * slope;
  }
};
#endif
