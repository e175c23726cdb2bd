// The products of gemm.h, on raw pointers, compiled once per ISA.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace {

struct StoreSum {
  float* data;
  int64_t ld;
  const float* add;
  EFFVIT_INLINE void operator()(int r, int c, vf x) const {
    const int64_t at = r * ld + c;
    store(data + at, add ? load(add + at) + x : x);
  }
};

template <class A, class B>
EFFVIT_INLINE void multiply(int m, int n, int k, A a, B b, const float* add, float* c, int64_t ldc) {
  gemm_into(m, n, k, a, b, StoreSum{c, ldc, add});
}

}  // namespace

void gemm(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb, const float* add, float* c,
          int64_t ldc) {
  multiply(m, n, k, row_major(a, lda), right(b, ldb), add, c, ldc);
}
void gemm_transposed(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb, const float* add,
                     float* c, int64_t ldc) {
  multiply(m, n, k, transposed(a, lda), right(b, ldb), add, c, ldc);
}

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
void gemm(int m, int n, int k, const BFloat16* a, int64_t lda, const BFloat16* b, const float* add, float* c,
          int64_t ldc) {
  multiply(m, n, k, row_major(a, lda), right(b, n), add, c, ldc);
}
void gemm_transposed(int m, int n, int k, const BFloat16* a, const BFloat16* b, const float* add, float* c,
                     int64_t ldc) {
  multiply(m, n, k, transposed(a, m), right(b, n), add, c, ldc);
}
#endif

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
