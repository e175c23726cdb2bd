// newton_pinv on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// A unit is one matrix. All its steps run on four float32 matrices in scratch (44 KiB at m = 49, 1 MiB at 256), so V is
// read and written in memory once. A step is E = I - V P and V + E V, which is 2V - V P V with smaller roundings: near
// the end E is small, and so is what the second product adds. The same E says when nothing is left to do: see kSmall.
//
// A symmetric matrix, which a Gram matrix is bit by bit, keeps V symmetric: E V is then computed on and above the
// diagonal only. (V P is not: rounding keeps V and P from commuting, and to hide that would let errors grow.) The last
// steps are computed whole nevertheless: see kWholeSteps.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace newton_pinv_impl {

using Params = NewtonPinvParams;

// A step squares E. Once the Frobenius norm of E is below 2^-13, this step leaves 2^-26 and the next one 2^-52, far
// below the rounding of the smallest element of V: after that nothing is left to do. Where an eigenvalue has not been
// reached yet, or is so small that rounding keeps V P from the identity, E stays larger and all steps are made.
constexpr float kSmall = 1.f / (1 << 26);  // of the norm's square

// The rounding R of V P reaches the next V as R V. In a Gram matrix of near tokens V is 1/m on the vector of ones, the
// direction in which most of the result is taken, and up to 1/ridge on all others; R V is then as small on that vector
// as V is. A triangle of R V copied to the other side is not such a product. Between two directions on which V P has
// reached s and t, every further step multiplies an error by 2 - s - t: what the last steps add is what remains.
constexpr int kWholeSteps = 3;

constexpr int kPanelFrom = 96;  // sizes from which the products go by column panels that fit the L1 cache

struct Matrices {
  int m, mp, ld;  // size, rounded up to whole vectors, row stride
  int64_t floats;

  explicit Matrices(int64_t size) : m(static_cast<int>(size)), mp(round_up(m, kLanes)) {
    ld = mp % 64 == 0 ? mp + 16 : mp;  // rows a multiple of 256 bytes apart would share few sets of the cache
    floats = int64_t{m} * ld;
  }
};

// to = add + A B; add may be null.
EFFVIT_INLINE void multiply(const Matrices& s, const float* a, const float* b, const float* add, float* to) {
  const int panel = s.m < kPanelFrom ? s.mp : kCols * kLanes;
  for (int c = 0; c < s.mp; c += panel) {
    gemm(s.m, std::min(panel, s.mp - c), s.m, a, s.ld, b + c, s.ld, add ? add + c : nullptr, to + c, s.ld);
  }
}

// The same where the result is symmetric: the blocks on and above the diagonal at least.
EFFVIT_INLINE void multiply_upper(const Matrices& s, const float* a, const float* b, const float* add, float* to) {
  const bool panels = s.m >= kPanelFrom;
  const int step = panels ? kCols * kLanes : kLanes;
  for (int at = 0; at < s.m; at += step) {  // a panel of columns down to the diagonal, or rows from the diagonal on
    const int r0 = panels ? 0 : at, rows = std::min(at + step, s.m) - r0;
    const int columns = panels ? std::min(step, s.mp - at) : s.mp - at;
    const int64_t row = int64_t{r0} * s.ld, first = row + at;
    gemm(rows, columns, s.m, a + row, s.ld, b + at, s.ld, add + first, to + first, s.ld);
  }
}

// Copies the blocks above the diagonal to below it.
EFFVIT_INLINE void mirror(const Matrices& s, float* x) {
  for (int r0 = 0; r0 < s.m; r0 += kLanes) {
    for (int c0 = r0 + kLanes; c0 < s.m; c0 += kLanes) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(x + int64_t{r0 + i} * s.ld + c0);
      transpose_block(block);
      for (int i = 0; i < std::min(kLanes, s.m - c0); ++i) store(x + int64_t{c0 + i} * s.ld + r0, block[i]);
    }
  }
}

EFFVIT_INLINE bool is_symmetric(const Matrices& s, const float* x) {
  for (int i = 0; i < s.m; ++i) {
    for (int j = 0; j < i; ++j) {
      if (x[int64_t{i} * s.ld + j] != x[int64_t{j} * s.ld + i]) return false;
    }
  }
  return true;
}

template <class T>
EFFVIT_INLINE void load_matrix(float* to, const Matrices& s, const void* base, int64_t offset, int64_t stride) {
  const T* from = static_cast<const T*>(base) + offset;
  for (int i = 0; i < s.m; ++i) load_row(to + int64_t{i} * s.ld, from + i * stride, s.m);
}

// Adds the identity to -x in place and returns the square of the Frobenius norm; 0 beyond the last column.
EFFVIT_INLINE float identity_minus(const Matrices& s, float* x) {
  vf sum{};
  for (int i = 0; i < s.m; ++i) {
    float* const row = x + int64_t{i} * s.ld;
    row[i] -= 1.f;
    for (int c = 0; c < s.mp; c += kLanes) {
      const vf e = -load(row + c);
      store(row + c, e);
      sum = fma(e, e, sum);
    }
  }
  return reduce_add(sum);
}

template <class T>
void forward_units(const Params& p, int64_t begin, int64_t end) {
  const Matrices s(p.m);
  float* const matrix = static_cast<float*>(thread_scratch(static_cast<size_t>(4 * s.floats) * sizeof(float)));
  float *const e = matrix + s.floats, *v = e + s.floats, *next = v + s.floats;
  for (int64_t unit = begin; unit < end; ++unit) {
    load_matrix<T>(matrix, s, p.a, unit / p.H * p.a_stride_b + unit % p.H * p.a_stride_h, p.a_stride_i);
    float largest = -__builtin_inff();
    for (int i = 0; i < s.m; ++i) {
      vf lanes{};
      for (int c = 0; c < s.mp; c += kLanes) lanes += load(matrix + int64_t{i} * s.ld + c);
      const float sum = reduce_add(lanes);
      if (sum > largest || sum != sum) largest = sum;  // a NaN stays
      matrix[int64_t{i} * s.ld + i] += p.ridge;
    }
    const bool symmetric = is_symmetric(s, matrix);
    const float alpha = p.step / (largest * largest);
    for (int i = 0; i < s.m; ++i) {
      const int64_t row = int64_t{i} * s.ld;
      for (int c = 0; c < s.mp; c += kLanes) store(v + row + c, load(matrix + row + c) * alpha);
    }
    for (int step = 0, last = p.iterations; step < last; ++step) {
      multiply(s, v, matrix, nullptr, e);
      if (identity_minus(s, e) < kSmall) last = std::min(last, step + 2);
      if (symmetric && last - step > kWholeSteps) {
        multiply_upper(s, e, v, v, next);
        mirror(s, next);
      } else {
        multiply(s, e, v, v, next);
      }
      std::swap(v, next);
    }
    T* const out = static_cast<T*>(p.out) + unit * p.m * p.m;
    for (int i = 0; i < s.m; ++i) store_row(out + int64_t{i} * s.m, v + int64_t{i} * s.ld, s.m);
  }
}

// da = -Vᵀ G Vᵀ
template <class T>
void backward_units(const Params& p, int64_t begin, int64_t end) {
  const Matrices s(p.m);
  float* const vt = static_cast<float*>(thread_scratch(static_cast<size_t>(3 * s.floats) * sizeof(float)));
  float *const g = vt + s.floats, *const v = g + s.floats;
  for (int64_t unit = begin; unit < end; ++unit) {
    load_matrix<T>(v, s, p.out, unit * p.m * p.m, p.m);
    transpose_rows(vt, s.ld, s.m, s.m, [&](int i) { return v + int64_t{i} * s.ld; });
    load_matrix<T>(g, s, p.grad_out, unit / p.H * p.grad_out_stride_b + unit % p.H * p.grad_out_stride_h,
                   p.grad_out_stride_i);
    float* const product = v;
    multiply(s, vt, g, nullptr, product);
    multiply(s, product, vt, nullptr, g);
    T* const da = static_cast<T*>(p.da) + unit * p.m * p.m;
    for (int i = 0; i < s.m; ++i) store_row(da + int64_t{i} * s.m, g + int64_t{i} * s.ld, s.m, -1.f);
  }
}

int64_t units(const Params& p) { return p.B * p.H; }

void forward(const Params& p, float*, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { forward_units<decltype(type)>(p, begin, end); });
}

void backward(const Params& p, float*, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { backward_units<decltype(type)>(p, begin, end); });
}

constexpr Step<Params> kForward[] = {{units, forward}}, kBackward[] = {{units, backward}};

}  // namespace newton_pinv_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<NewtonPinvParams>* EFFVIT_KERNEL_NAME(newton_pinv)() {
  namespace impl = EFFVIT_ISA_NAME::newton_pinv_impl;
  static constexpr Kernel<NewtonPinvParams> kernel = {routine(impl::kForward), routine(impl::kBackward)};
  return &kernel;
}
}  // namespace effvit::cpu
