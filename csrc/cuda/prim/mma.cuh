// ldmatrix, mma.m16n8k16 and its integer relative. With g = lane / 4 and t = lane % 4 a lane holds of
//   A [16, 16]: a[0] (g, 2t..), a[1] (g + 8, 2t..), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..), two columns each
//   B [16, 8]:  b[0] (2t.., g), b[1] (2t + 8.., g), two rows each
//   C [16, 8]:  c[0], c[1] (g, 2t..), c[2], c[3] (g + 8, 2t..)
// Of int8 the depth is 32, and a register has four numbers where it has two of 16 bits: the same bytes of a row that
// has the depth last. So one ldmatrix loads either.
// Sparse int8: of every four numbers in a row of A two are kept. A's fragments are those of the [16, 32] kept ones, B
// is [64, 8] with b[i] (16 i + 4t.., g), and a lane's metadata say which ones were kept of row g + 8 (t % 2), columns
// 32 (t / 2).. : eight nibbles i0 | i1 << 2 with i0 < i1, the first one lowest.
#pragma once
#include "memory.cuh"

namespace effvit {
namespace prim {

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 and receives of each
// matrix (r[0] to r[3]) the elements (l / 4, 2 (l % 4)) and its right neighbour, or, transposed, those of the
// transpose. int8: pairs of neighbours in a row are the elements, also of the transpose.
template <bool kTranspose, class T>
#if defined(EFFVIT_EMU)
EFFVIT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const Shared<T>& s, int i, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 2, "ldmatrix moves 16-bit elements, or pairs of bytes");
  emu::LdmatrixArgs args{s.address(i), kTranspose, {}};
  emu::collective(emu::Op::kLdmatrix, line, &args, emu::ldmatrix);
  std::memcpy(r, args.result, sizeof(r));
}
#else
EFFVIT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const Shared<T>& s, int i) {
  static_assert(sizeof(T) <= 2, "ldmatrix moves 16-bit elements, or pairs of bytes");
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s.address(i))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s.address(i))
                 : "memory");
  }
}
#endif

// c += a b, float32 accumulation.
template <class T>
#if defined(EFFVIT_EMU)
EFFVIT_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                int line = __builtin_LINE()) {
  const uint32_t b[2] = {b0, b1};
  emu::MmaArgs args{a, b, c};
  emu::collective(emu::Op::kMma, line, &args, std::is_same<T, float16>::value ? emu::mma_f16 : emu::mma_bf16);
}
#else
EFFVIT_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, float16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same<T, bfloat16>::value, "mma of an unknown element type");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
#endif

// c += a b of int8, exact while it fits into int32.
#if defined(EFFVIT_EMU)
EFFVIT_DEVICE void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                int line = __builtin_LINE()) {
  const uint32_t b[2] = {b0, b1};
  emu::MmaInt8Args args{a, b, c};
  emu::collective(emu::Op::kMma, line, &args, emu::mma_s8);
}
#else
EFFVIT_DEVICE void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// c += a b of int8 with 2:4 sparse A.
#if defined(EFFVIT_EMU)
EFFVIT_DEVICE void mma_sp_m16n8k64(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                                   int line = __builtin_LINE()) {
  emu::MmaSparseArgs args{a, b, c, metadata};
  emu::collective(emu::Op::kMma, line, &args, emu::mma_sp_s8);
}
#else
EFFVIT_DEVICE void mma_sp_m16n8k64(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}
#endif

}  // namespace prim
}  // namespace effvit
