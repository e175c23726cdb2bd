// What the CPU microbenchmarks share: poisoned buffers of float32 or bfloat16, and threads without torch's pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "common/dtype.h"

namespace effvit {
namespace bench {

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A tensor of float32 or bfloat16 in 64-byte aligned memory.
struct Buffer {
  Buffer(int64_t count, DType dtype) : count(count), dtype(dtype) {
    data = std::aligned_alloc(64, (bytes() + 63) / 64 * 64);
    if (!data) std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  size_t bytes() const { return count * element_bytes(dtype); }
  float at(int64_t i) const {
    return dtype == DType::kFloat32 ? static_cast<const float*>(data)[i]
                                    : from_bfloat16(static_cast<const uint16_t*>(data)[i]);
  }
  void fill_normal(unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      const float x = normal(generator);
      if (dtype == DType::kFloat32)
        static_cast<float*>(data)[i] = x;
      else
        static_cast<uint16_t*>(data)[i] = to_bfloat16(x);
    }
  }
  void poison() { std::memset(data, 0xff, bytes()); }  // NaN: an element that a kernel forgets shows
  std::vector<float> values() const {
    std::vector<float> v(count);
    for (int64_t i = 0; i < count; ++i) v[i] = at(i);
    return v;
  }

  int64_t count;
  DType dtype;
  void* data;
};

// Runs body(begin, end) over [0, units) `repeats` times on every thread, with a barrier after each repeat.
template <class Body>
void repeat_parallel(int threads, int64_t units, int repeats, const Body& body) {
  std::atomic<int64_t> arrived{0};
  const auto work = [&](int t) {
    for (int r = 0; r < repeats; ++r) {
      body(units * t / threads, units * (t + 1) / threads);
      arrived.fetch_add(1);
      while (arrived.load() < int64_t{threads} * (r + 1)) std::this_thread::yield();
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& t : others) t.join();
}

}  // namespace bench
}  // namespace effvit
