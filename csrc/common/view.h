// A tensor as kernels see it, and the error that names it. No torch.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "dtype.h"

namespace effvit {

struct View {
  void* data = nullptr;  // may be null where there are no elements
  int64_t size[6] = {}, stride[6] = {};  // strides in elements
  int32_t dim = -1;  // -1: not given
  DType dtype = DType::kFloat32;

  bool given() const { return dim >= 0; }
  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < dim && i < 6; ++i) n *= size[i];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = dim - 1; i >= 0; --i) {
      if (size[i] != 1 && stride[i] != expected) return count() == 0;
      expected *= size[i];
    }
    return true;
  }
};

// ---- errors: `effvit::<op>: <argument> must be <expected>, got <given>` ---------------------------------------------

// Integers that a message shows in brackets.
struct Integers {
  const int64_t* data;
  int64_t count;
  Integers(const int64_t* data, int64_t count) : data(data), count(count) {}
  explicit Integers(const View& v) : data(v.size), count(v.dim) {}
};

inline std::ostream& operator<<(std::ostream& os, const Integers& v) {
  os << '[';
  for (int64_t i = 0; i < v.count; ++i) os << (i ? ", " : "") << v.data[i];
  return os << ']';
}

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream os;
  os << "effvit::" << op << ": ";
  (os << ... << args);
  throw std::runtime_error(os.str());
}

// The message is put together where it is needed only: arguments should cost nothing.
template <class... Args>
inline void check(bool ok, const char* op, const Args&... args) {
  if (!ok) fail(op, args...);
}

}  // namespace effvit
