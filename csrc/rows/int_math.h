// Functions of integer row-wise functors, in the namespace of an instruction set or of the GPU: V is its vector of
// int32, or an int32_t. The including file defines splat and exact_root, and for vectors Unsigned, select, mul_high,
// reciprocal, product and what rescales. No floating point here: instructions of it round, and not alike everywhere.

template <class V>
struct UnsignedOf;
template <>
struct UnsignedOf<int32_t> {
  using type = uint32_t;
};
template <class V>
using Unsigned = typename UnsignedOf<V>::type;

// A functor has kPasses reductions of kReductions and then a map, kVectors of the [C] tensors, and says what it needs:
// kKeeps: the last pass's terms; kTabulates: results follow from x and the row's largest one; kIsNorm: it is
// LayerNorm; kAdds: x is a sum first,
// of x and the residual, rescaled by the vectors from kScales on.

// What a pass makes of a row's terms.
enum class Reduce {
  kMax,
  kRange,  // the largest one, and the smallest
  kSaturating,  // the sum of unsigned terms, at most 2^31 - 1
  kSum,  // exact
  kSquares,  // the exact sum of squares below 2^31
};

EFFVIT_FN int32_t select(bool condition, int32_t a, int32_t b) { return condition ? a : b; }
EFFVIT_FN uint32_t select(bool condition, uint32_t a, uint32_t b) { return condition ? a : b; }
template <class V>
EFFVIT_FN V least(V a, V b) {
  return select(a < b, a, b);
}
template <class V>
EFFVIT_FN V most(V a, V b) {
  return select(a > b, a, b);
}
EFFVIT_FN uint32_t mul_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
EFFVIT_FN uint32_t reciprocal(uint32_t s) { return 0x7fffffff / s; }

// t / 2^c to the nearest, ties to even; |t| <= 2^62, 0 <= c <= 61. The offset is an even multiple of 2^c.
EFFVIT_FN int64_t rounded_shift(int64_t t, int32_t c) {
  if (c == 0) return t;
  const uint64_t offset = uint64_t{1} << 62, u = static_cast<uint64_t>(t) + offset;
  const uint64_t q = (u + (uint64_t{1} << (c - 1)) - 1 + (u >> c & 1)) >> c;
  return static_cast<int64_t>(q) - static_cast<int64_t>(offset >> c);
}
// z m / 2^c, rounded, between low and high.
EFFVIT_FN int32_t rescale(int32_t z, int32_t m, int32_t c, int32_t low, int32_t high) {
  const int64_t y = rounded_shift(static_cast<int64_t>(z) * m, c);
  return static_cast<int32_t>(y < low ? low : y > high ? high : y);
}

// The shift of a rescaling, in its bounds: values on a GPU are not checked.
template <class V>
EFFVIT_FN V shift_of(V c) {
  return least(most(c, splat<V>(1u)), splat<V>(61u));
}

// Of all columns by the same; `narrow`: whether |z| is below 2^22.
EFFVIT_FN int32_t rescale_all(const IntRowsData& p, int32_t z, bool) {
  return rescale(z, p.multiplier, p.shift, p.low, p.high);
}
// The sum of two of these, rounded each.
EFFVIT_FN int32_t rescale_sum(int32_t z, int32_t m, int32_t c, int32_t z2, int32_t m2, int32_t c2, int32_t low,
                              int32_t high) {
  const int64_t y = rounded_shift(static_cast<int64_t>(z) * m, c) + rounded_shift(static_cast<int64_t>(z2) * m2, c2);
  return static_cast<int32_t>(y < low ? low : y > high ? high : y);
}
// a b between low and high.
EFFVIT_FN int32_t product(int32_t a, int32_t b, int32_t low, int32_t high) {
  const int64_t y = static_cast<int64_t>(a) * b;
  return static_cast<int32_t>(y < low ? low : y > high ? high : y);
}

template <class V>
EFFVIT_FN V saturating_sum(V a, V b) {
  using U = Unsigned<V>;
  const V sum = (V)((U)a + (U)b), end = (a >> 31) ^ splat<V>(0x7fffffffu);
  return select(((a ^ sum) & (b ^ sum)) < 0, end, sum);  // it has the sign of neither
}

// Where the shift exponential stops to fall, below `top`: as far as int32 goes.
EFFVIT_FN int32_t lowest_of(const ShiftExp& e, int32_t top) {
  const int64_t low = static_cast<int64_t>(top) - e.limit;
  return static_cast<int32_t>(low < -0x80000000ll ? -0x80000000ll : low);
}
// The shift exponential of -n x <= d <= 0: with p = d + d / 2 - d / 16, at least -n x, and -p = q x + r it is
// (2x - r) 2^(n - q) / 2. p <= d, so that whoever cuts d off at -n x changes nothing. ShiftExp has x << n < 2^31, so
// nothing here exceeds 32 bits without a sign; lanes beyond a row may wrap.
template <int kWide, class V>
EFFVIT_FN V shift_exp(const ShiftExp& e, V d) {
  using U = Unsigned<V>;
  const V p = most((V)((U)d + (U)(d >> 1) - (U)(d >> 4)), splat<V>(0u - e.limit));
  U q;
  if constexpr (kWide != 0) {
    q = mul_high(0u - (U)p, e.magic) >> e.shift;
  } else {
    q = ((U)p * (0u - e.magic)) >> e.shift;
  }
  const U a = ((U)p + 2u * e.x) + q * e.x;
  return (V)(((a & e.mask) << (e.n - q)) >> 1u);
}
