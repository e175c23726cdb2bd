// Shared memory arrays, global loads and stores, cp.async. Under the emulator every access is checked.
#pragma once
#include "threads.cuh"

namespace effvit {
namespace prim {

#if !defined(EFFVIT_EMU)
template <class V>
struct WordOf;
template <>
struct WordOf<std::integral_constant<size_t, 1>> {
  using type = uint8_t;
};
template <>
struct WordOf<std::integral_constant<size_t, 2>> {
  using type = uint16_t;
};
template <>
struct WordOf<std::integral_constant<size_t, 4>> {
  using type = uint32_t;
};
template <>
struct WordOf<std::integral_constant<size_t, 8>> {
  using type = uint2;
};
template <>
struct WordOf<std::integral_constant<size_t, 16>> {
  using type = uint4;
};
template <class V>
using Word = typename WordOf<std::integral_constant<size_t, sizeof(V)>>::type;

EFFVIT_DEVICE uint8_t* shared_base() {
  extern __shared__ __align__(16) uint8_t effvit_shared[];
  return effvit_shared;
}
#endif

// An array of T in the dynamic shared memory of the CTA, `byte_offset` from its start.
template <class T>
class Shared {
 public:
#if defined(EFFVIT_EMU)
  Shared() = default;
  Shared(int byte_offset, int count) : offset_(byte_offset), count_(count) {
    if (byte_offset < 0 || count < 0 ||
        byte_offset + static_cast<int64_t>(count) * static_cast<int>(sizeof(T)) >
            static_cast<int64_t>(emu::g.shared_bytes))
      emu::fail("a shared array of " + std::to_string(count) + " elements exceeds the shared memory of the CTA");
  }
  T load(int i) const { return load_vec<T>(i); }
  void store(int i, T x) const { store_vec(i, x); }
  template <class V>  // sizeof(V) bytes from element i on, aligned to sizeof(V)
  V load_vec(int i) const {
    const uint64_t o = at(i, sizeof(V));
    emu::note_read(o, sizeof(V), sizeof(V));
    V x;
    std::memcpy(&x, emu::g.shared + o, sizeof(V));
    return x;
  }
  template <class V>
  void store_vec(int i, V x) const {
    const uint64_t o = at(i, sizeof(V));
    emu::note_write(o, sizeof(V), sizeof(V));
    std::memcpy(emu::g.shared + o, &x, sizeof(V));
  }
  Shared from(int i) const { return Shared(offset_ + i * static_cast<int>(sizeof(T)), count_ - i); }
  uint64_t address(int i) const { return at(i, 16); }

 private:
  uint64_t at(int i, size_t bytes) const {
    if (i < 0 ||
        i * static_cast<int64_t>(sizeof(T)) + static_cast<int64_t>(bytes) > count_ * static_cast<int64_t>(sizeof(T)))
      emu::fail_shared_bounds(static_cast<uint64_t>(offset_ + i * static_cast<int64_t>(sizeof(T))),
                              static_cast<uint32_t>(bytes));
    return static_cast<uint64_t>(offset_) + static_cast<uint64_t>(i) * sizeof(T);
  }
  int offset_ = 0, count_ = 0;
#else
  Shared() = default;
  EFFVIT_DEVICE Shared(int byte_offset, int) : p_(reinterpret_cast<T*>(shared_base() + byte_offset)) {}
  EFFVIT_DEVICE T load(int i) const { return p_[i]; }
  EFFVIT_DEVICE void store(int i, T x) const { p_[i] = x; }
  template <class V>  // sizeof(V) bytes from element i on, aligned to sizeof(V)
  EFFVIT_DEVICE V load_vec(int i) const {
    return bit_cast<V>(*reinterpret_cast<const Word<V>*>(p_ + i));
  }
  template <class V>
  EFFVIT_DEVICE void store_vec(int i, V x) const {
    *reinterpret_cast<Word<V>*>(p_ + i) = bit_cast<Word<V>>(x);
  }
  EFFVIT_DEVICE Shared from(int i) const {
    Shared s;
    s.p_ = p_ + i;
    return s;
  }
  EFFVIT_DEVICE uint32_t address(int i) const { return static_cast<uint32_t>(__cvta_generic_to_shared(p_ + i)); }

 private:
  T* p_ = nullptr;
#endif
};

#if defined(EFFVIT_EMU)

template <class T>
EFFVIT_DEVICE T load_global(const T* p) {
  emu::check_global(p, sizeof(T), sizeof(T), false);
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}
template <class V, class T>  // sizeof(V) bytes, aligned to sizeof(V)
EFFVIT_DEVICE V load_global_vec(const T* p) {
  emu::check_global(p, sizeof(V), sizeof(V), false);
  V x;
  std::memcpy(&x, p, sizeof(V));
  return x;
}
template <class T>
EFFVIT_DEVICE void store_global(T* p, T x) {
  emu::check_global(p, sizeof(T), sizeof(T), true);
  std::memcpy(p, &x, sizeof(T));
}
template <class V, class T>
EFFVIT_DEVICE void store_global_vec(T* p, V x) {
  emu::check_global(p, sizeof(V), sizeof(V), true);
  std::memcpy(p, &x, sizeof(V));
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros. Both addresses are multiples of 16.
template <class T>
EFFVIT_DEVICE void cp_async16(const Shared<T>& s, int i, const void* global, int bytes) {
  emu::cp_async16(s.address(i), global, static_cast<uint32_t>(bytes));
}
EFFVIT_DEVICE void cp_async_commit() { emu::cp_async_commit(); }
template <int kGroupsLeft>  // makes this thread's copies visible to itself: a barrier must follow before others read
EFFVIT_DEVICE void cp_async_wait() {
  emu::cp_async_wait(kGroupsLeft);
}

#else

template <class T>
EFFVIT_DEVICE T load_global(const T* p) {
  return bit_cast<T>(*reinterpret_cast<const Word<T>*>(p));
}
template <class V, class T>  // sizeof(V) bytes, aligned to sizeof(V)
EFFVIT_DEVICE V load_global_vec(const T* p) {
  return bit_cast<V>(*reinterpret_cast<const Word<V>*>(p));
}
template <class T>
EFFVIT_DEVICE void store_global(T* p, T x) {
  *p = x;
}
template <class V, class T>
EFFVIT_DEVICE void store_global_vec(T* p, V x) {
  if constexpr (sizeof(V) == 16) {  // nvcc makes four stores of an assignment where it has computed the elements
    const auto w = bit_cast<Vec<uint32_t, 4>>(x);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3])
                 : "memory");
  } else {
    *reinterpret_cast<Word<V>*>(p) = bit_cast<Word<V>>(x);
  }
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros. Both addresses are multiples of 16.
template <class T>
EFFVIT_DEVICE void cp_async16(const Shared<T>& s, int i, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s.address(i)), "l"(global), "r"(bytes) : "memory");
}
EFFVIT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>  // makes this thread's copies visible to itself: a barrier must follow before others read
EFFVIT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

#endif

}  // namespace prim
}  // namespace effvit
