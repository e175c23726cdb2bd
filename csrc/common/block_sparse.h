// What the products with block-sparse weights check alike: the description of where the blocks are.
#pragma once

#include "declaration.h"

namespace effvit {

// B, K and the number of rows of blocks; N from them.
inline void derive_blocks(Call& c) {
  const int64_t block = c.dim("B"), k = c.dim("K");
  check(block == 16 || block == 32, c.op(), "values must be [Z, B, B] with B 16 or 32, got ", Integers(c["values"]));
  check(k % block == 0, c.op(), "x must be [", c.declaration.inputs[c.declaration.first].leading ? "..." : "M",
        ", K] with K a multiple of ", block, " like values ", Integers(c["values"]), ", got ", Integers(c["x"]));
  check(c.dim("R") >= 0, c.op(), "crow must be [N / B + 1], got ", Integers(c["crow"]));
}

// Rows of blocks in order, ascending columns in each, all of them in the weight.
inline void check_places(const Call& c) {
  if (!c.readable) return;
  const int64_t down = c.dim("R"), count = c.dim("Z"), across = c.dim("K") / c.dim("B");
  const int32_t* const crow = static_cast<const int32_t*>(c["crow"].data);
  const int32_t* const columns = static_cast<const int32_t*>(c["columns"].data);
  bool ascending = crow[0] == 0 && crow[down] == count;
  for (int64_t r = 0; r < down; ++r) ascending &= crow[r] <= crow[r + 1];
  if (!ascending) {
    const std::vector<int64_t> given(crow, crow + down + 1);
    fail(c.op(), "crow must be ascending from 0 to ", count, " like columns ", Integers(c["columns"]), ", got ",
         Integers(given.data(), down + 1));
  }
  for (int64_t z = 0; z < count; ++z) {
    check(columns[z] >= 0 && columns[z] < across, c.op(), "columns must be between 0 and ", across - 1, ", got ",
          columns[z], " at [", z, "]");
  }
  for (int64_t r = 0; r < down; ++r) {
    for (int64_t z = crow[r] + 1; z < crow[r + 1]; ++z) {
      check(columns[z - 1] < columns[z], c.op(), "columns must be ascending in each row of blocks, got ",
            columns[z - 1], ", ", columns[z], " at [", z - 1, "]");
    }
  }
}

}  // namespace effvit
