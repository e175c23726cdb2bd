// Matrix products that ops call instead of compiling their own: one copy per ISA, from gemm_kernel.inl.h. An op whose
// results must change as they leave the registers (gemm_into in isa/vec.inl.h, gemm_to_tokens in isa/tokens.inl.h)
// compiles its own, and is larger for it.
#pragma once
#include <cstdint>

namespace effvit::cpu::EFFVIT_ISA_NAME {

struct BFloat16;

// C[m, n] = A[m, k] B[k, n] + add. Rows of C are ldc floats apart, those of `add` too; `add` is C itself, another
// matrix, or null for zeros, and is added last. n is a multiple of kLanes, and no operand overlaps C.
// gemm: rows of A are lda apart. gemm_transposed: A is the transpose of [k, m] rows, lda apart.
void gemm(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb, const float* add, float* c,
          int64_t ldc);
void gemm_transposed(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb, const float* add,
                     float* c, int64_t ldc);

// The same of bfloat16, where the ISA has such products (kBf16Products): operands are packed as isa/bf16.inl.h says,
// and a ProductScope is alive. A of gemm_transposed, and B, are dense rows in pairs, of m and n elements.
void gemm(int m, int n, int k, const BFloat16* a, int64_t lda, const BFloat16* b, const float* add, float* c,
          int64_t ldc);
void gemm_transposed(int m, int n, int k, const BFloat16* a, const BFloat16* b, const float* add, float* c,
                     int64_t ldc);

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
