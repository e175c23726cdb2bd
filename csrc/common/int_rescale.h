// What the integer-only operators share in C++: checks of integers that stand for scales, and the ends of results.
#pragma once

#include "declaration.h"

namespace effvit {

// Values of a contiguous int32 tensor, where they can be read without waiting.
inline void check_integers(const Call& c, const char* name, int64_t low, int64_t high) {
  const View* v = c.find(name);
  if (!v || !c.readable) return;
  const int32_t* const data = static_cast<const int32_t*>(v->data);
  const int64_t n = v->count();
  const int32_t least = static_cast<int32_t>(low), most = static_cast<int32_t>(high);
  int32_t wrong = 0;  // no branch: in vectors
  for (int64_t i = 0; i < n; ++i) wrong |= static_cast<int32_t>(data[i] < least) | static_cast<int32_t>(data[i] > most);
  for (int64_t i = 0; wrong && i < n; ++i) {
    check(data[i] >= least && data[i] <= most, c.op(), name, " must be between ", low, " and ", high, ", got ", data[i],
          " at [", i, "]");
  }
}

// A multiplier and a shift.
inline void check_rescaling(const Call& c, const char* multiplier, const char* shift) {
  check_integers(c, multiplier, -0x7fffffff, 0x7fffffff);
  check_integers(c, shift, 1, 61);
}

// The ends of what `bits` and a dtype hold.
struct Ends {
  int32_t low, high;
};
inline Ends ends_of(DType dtype, int bits = 32) {
  const int most = 8 * static_cast<int>(element_bytes(dtype)), n = std::min(bits, most);
  if (dtype == DType::kUInt8) return {0, (1 << n) - 1};
  const int64_t half = int64_t{1} << (n - 1);
  return {static_cast<int32_t>(-half), static_cast<int32_t>(half - 1)};
}

}  // namespace effvit
