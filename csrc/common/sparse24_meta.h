// Positions of 2:4-sparse weights: what every op that takes them checks. No torch.
#pragma once

#include <cstring>

#include "declaration.h"

namespace effvit::ops {

// Whether all nibbles of eight bytes are two positions i0 < i1, as i0 | i1 << 2.
inline bool are_positions(uint64_t bytes) {
  constexpr uint64_t kHigh = 0x2222222222222222u;  // where comparing two bits ends up
  const uint64_t above = (bytes >> 2) & ~bytes, equal = ~((bytes >> 2) ^ bytes);
  return ((above | (equal & above << 1)) & kHigh) == kHigh;
}

// meta [N, ceil(K / 8)], any strides.
inline void check_positions(const Call& c, const View& meta) {
  const uint8_t* const data = static_cast<const uint8_t*>(meta.data);
  const int64_t width = meta.size[1];
  for (int64_t n = 0; n < meta.size[0]; ++n) {
    const uint8_t* const row = data + n * meta.stride[0];
    bool good = true;
    int64_t k = 0;
    if (meta.stride[1] == 1) {
      for (; k + 8 <= width; k += 8) {
        uint64_t bytes;
        std::memcpy(&bytes, row + k, 8);
        good &= are_positions(bytes);
      }
    }
    for (; k < width; ++k) good &= are_positions(0x0101010101010101u * row[k * meta.stride[1]]);
    if (good) continue;
    for (k = 0; are_positions(0x0101010101010101u * row[k * meta.stride[1]]);) ++k;
    const int got = row[k * meta.stride[1]];
    const char digits[] = {"0123456789abcdef"[got >> 4], "0123456789abcdef"[got & 15], 0};
    fail(c.op(), "meta must be two positions i0 < i1 in every nibble, as i0 | i1 << 2, got 0x", digits, " at [", n,
         ", ", k, "]");
  }
}

}  // namespace effvit::ops
