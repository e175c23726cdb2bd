// Functions of row-wise functors, in the namespace of an instruction set or of the GPU: V is its vector, or a float.
// The including file defines exp_full, fma, max, min, select and splat; of max and min a NaN as second argument stays.

// Relative error 6e-8: the odd polynomial that is closest relative to tanh below 1/2, exponentials from there on.
template <class V>
EFFVIT_FN V tanh(V x) {
  const V t = min(max(x, -x), splat<V>(10.f)), z = t * t;
  V p = fma(z, splat<V>(-0.00665357f), splat<V>(0.0213017f));
  p = fma(z, p, splat<V>(-0.05389997f));
  p = fma(z, p, splat<V>(0.13332971f));
  p = fma(z, p, splat<V>(-0.33333327f));
  const V near = fma(t * z, p, t), far = 1.f - 2.f / (exp_full(t + t) + 1.f);
  const V y = select(t < 0.5f, near, far);
  return select(x < 0.f, -y, select(x == x, y, x));
}

// Phi(x), the normal distribution function, and its density. The tail is density times a polynomial in
// t = 1 / (1 + 0.3 |x| / sqrt 2), so that it is as accurate relative to itself.
template <class V>
EFFVIT_FN V normal_cdf(V x, V* density) {
  const V s = max(x, -x) * 0.707106781f, t = 1.f / fma(s, splat<V>(0.3f), splat<V>(1.f));
  V p = fma(t, splat<V>(-0.129522786f), splat<V>(0.485562682f));
  p = fma(p, t, splat<V>(-0.512277067f));
  p = fma(p, t, splat<V>(0.547718883f));
  p = fma(p, t, splat<V>(-0.0946499854f));
  p = fma(p, t, splat<V>(0.214925766f));
  p = fma(p, t, splat<V>(0.148339242f));
  p = fma(p, t, splat<V>(0.170715213f));
  p = fma(p, t, splat<V>(0.169188008f));
  const V e = exp_full(x * x * -0.5f);
  *density = e * 0.398942280f;
  const V tail = 0.5f * e * (t * p);
  return select(x < 0.f, tail, 1.f - tail);
}

// Phi(x) alone, to 2e-7 of 1: 1/2 plus an odd rational function that is closest to it up to 5.5, where what is left is
// below half a unit in the last place of 1; 0 below -5.5, or x times it would grow again.
template <class V>
EFFVIT_FN V normal_cdf_near(V argument) {
  const V x = min(max(argument, splat<V>(-5.5f)), splat<V>(5.5f));
  const V t = x * x;
  V p = fma(t, splat<V>(2.27480133e-08f), splat<V>(6.35192146e-06f));
  p = fma(t, p, splat<V>(0.000168825645f));
  p = fma(t, p, splat<V>(0.0046772575f));
  p = fma(t, p, splat<V>(0.0338528566f));
  p = fma(t, p, splat<V>(0.398942232f));
  V q = fma(t, splat<V>(1.19744982e-06f), splat<V>(7.36464644e-05f));
  q = fma(t, q, splat<V>(0.00188444543f));
  q = fma(t, q, splat<V>(0.0286459494f));
  q = fma(t, q, splat<V>(0.251522452f));
  q = fma(t, q, splat<V>(1.f));
  return select(argument < -5.5f, splat<V>(0.f), fma(x, p / q, splat<V>(0.5f)));
}
