// Whether kernels cut their work into small pieces, so that small tests reach what only large inputs would: streamed
// keys, many tiles and chunks, split sums.
#pragma once

namespace effvit::cpu {

// Read where the geometry of a call is made. It must not change while an operator runs.
bool small_tiles();

}  // namespace effvit::cpu
