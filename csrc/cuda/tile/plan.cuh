// The host's part of a kernel: places in shared memory, splits of the work, extents of tensors. And, for host and
// device, how a CTA's number is taken apart.
//
// How work is split depends on shapes and on target_ctas(), a constant, alone: partial sums are grouped alike on every
// GPU.
#pragma once
#include "rows.cuh"

namespace effvit {
namespace cuda {
namespace tile {

// i modulo n, and i divided by n: indices leave a CTA's number fastest first.
EFFVIT_HD int64_t take_index(int64_t& i, int64_t n) {
  const int64_t rest = i / n, index = i - rest * n;
  i = rest;
  return index;
}
EFFVIT_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
EFFVIT_HD int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Into how many pieces each of `units` things is split so that there are `target` CTAs: at most `limit`, at least one.
inline int64_t split_count(int64_t target, int64_t units, int64_t limit) {
  return most(1, least(ceil_div(target, most(1, units)), limit));
}

// A grid is one-dimensional: its CTAs walk over the units.
inline int64_t grid_size(int64_t units, int64_t limit = prim::target_ctas()) { return least(units, limit); }

// Hands out shared memory in multiples of 16 bytes.
class SharedLayout {
 public:
  int32_t take(int64_t bytes) {
    const int64_t offset = end_;
    end_ += ceil_div(bytes, 16) * 16;
    return static_cast<int32_t>(offset);
  }
  void at_least(int64_t bytes) { end_ = most(end_, bytes); }
  int64_t bytes() const { return end_; }

 private:
  int64_t end_ = 0;
};

inline Tokens make_tokens(DType type, const void* base, int64_t stride_b, int64_t stride_l, int64_t stride_h,
                          int64_t dim) {
  const bool vec = aligned16(base, element_bytes(type), {stride_b, stride_l, stride_h});
  return {base, stride_b, stride_l, stride_h, static_cast<int32_t>(dim), vec};
}

struct Dim {
  int64_t size, stride;  // stride in elements
};

// Bytes from the first to the last element of a strided tensor; of which the last dimension is contiguous, say {D, 1}.
inline uint64_t extent_bytes(DType type, std::initializer_list<Dim> dims) {
  int64_t last = 0;
  for (const Dim& dim : dims) {
    if (dim.size == 0) return 0;
    last += (dim.size - 1) * dim.stride;
  }
  return static_cast<uint64_t>((last + 1) * element_bytes(type));
}
inline uint64_t tensor_bytes(DType type, int64_t elements) {
  return static_cast<uint64_t>(elements * element_bytes(type));
}

}  // namespace tile
}  // namespace cuda
}  // namespace effvit
