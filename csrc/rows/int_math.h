// Functions of integer row-wise functors, in the namespace of an instruction set or of the GPU: V is its vector of
// int32, or an int32_t. For vectors the including file defines splat, Unsigned, select, mul_high, divide and rescale.
// No floating point: instructions of it round, and not alike everywhere.

template <class V>
struct UnsignedOf;
template <>
struct UnsignedOf<int32_t> {
  using type = uint32_t;
};
template <class V>
using Unsigned = typename UnsignedOf<V>::type;

// What a pass makes of a row's terms.
enum class Reduce {
  kMax,  // and the smallest one
  kSaturating,  // the sum of unsigned terms, at most 2^31 - 1
  kSum,  // exact
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
EFFVIT_FN uint32_t divide(uint32_t a, uint32_t b) { return a / b; }

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

// The shift exponential of -u: e(u) = (2x - r) 2^(n - q) / 2 with p = 1.4375 u = q x + r, at most n x.
// ShiftExp has x << n < 2^31, so nothing here exceeds 32 bits without a sign.
template <int kWide, class U>
EFFVIT_FN U shift_exp(const ShiftExp& e, U u) {
  u = least(u, splat<U>(e.limit));  // p >= u: what this cuts, the next minimum would
  const U p = least(u + ((u + 1u) >> 1) - ((u + 15u) >> 4), splat<U>(e.limit));
  U q;
  if constexpr (kWide != 0) {
    q = mul_high(p, e.magic) >> e.shift;
  } else {
    q = (p * e.magic) >> e.shift;
  }
  const U r = p - q * e.x;
  return (((2u * e.x - r) & e.mask) << (e.n - q)) >> 1;
}
