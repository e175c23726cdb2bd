// Positions of 2:4-sparse weights: what every op that takes them checks. No torch.
#pragma once

#include <cstring>

#include "declaration.h"

namespace effvit::ops {

// Bits of kPositions, one for every nibble of `bytes` that is two positions i0 < i1, as i0 | i1 << 2.
constexpr uint64_t kPositions = 0x2222222222222222u;
inline uint64_t positions_in(uint64_t bytes) {
  const uint64_t second = bytes >> 2, above = second & ~bytes;  // bit by bit: of i1 and not of i0
  return (above | (~(second ^ bytes) & above << 1)) & kPositions;
}
inline bool are_positions(uint8_t byte) { return positions_in(0x0101010101010101u * byte) == kPositions; }

inline bool are_positions(const uint8_t* bytes, int64_t count) {
  uint64_t good = kPositions;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {  // without a branch, for vectors
    uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    good &= positions_in(eight);
  }
  for (; i < count; ++i) good &= positions_in(0x0101010101010101u * bytes[i]);
  return good == kPositions;
}

// meta [N, ceil(K / 8)], any strides.
inline void check_positions(const Call& c, const View& meta) {
  const uint8_t* const data = static_cast<const uint8_t*>(meta.data);
  if (meta.contiguous() && are_positions(data, meta.count())) return;
  for (int64_t n = 0; n < meta.size[0]; ++n) {
    for (int64_t k = 0; k < meta.size[1]; ++k) {
      const uint8_t got = data[n * meta.stride[0] + k * meta.stride[1]];
      if (are_positions(got)) continue;
      const char digits[] = {"0123456789abcdef"[got >> 4], "0123456789abcdef"[got & 15], 0};
      fail(c.op(), "meta must be two positions i0 < i1 in every nibble, as i0 | i1 << 2, got 0x", digits, " at [", n,
           ", ", k, "]");
    }
  }
}

}  // namespace effvit::ops
