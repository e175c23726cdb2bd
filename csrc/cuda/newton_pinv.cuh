// Newton-Schulz inverses of small matrices, and their gradient: device code and launch, on prim only.
//
// A CTA owns a matrix and takes it through all steps in one launch, in float32. A thread computes 4x4 blocks of each
// product. Matrices of up to 64 rows stay in shared memory; larger ones lie in a slice of the workspace, which the L2
// cache holds, and 64x64 tiles of them pass through shared memory, the next one while a product runs.
//
// A step is T = V P, V = 2V - T V. The gradient is da = -W G W with W = V^T, so that both products read rows.
#pragma once
#include "../common/newton_pinv_params.h"
#include "tile/block.cuh"
#include "tile/plan.cuh"

namespace effvit {
namespace cuda {
namespace newton_pinv_impl {

using tile::block_step, tile::Float4, tile::for_each_block, tile::Shared;
using tile::extent_bytes, tile::grid_size, tile::tensor_bytes;

constexpr int kThreads = 256;
constexpr int kTile = 64;
constexpr int kMicro = 4;  // a thread computes kMicro x kMicro blocks
constexpr int kStride = kTile + 4;  // floats from row to row in shared memory
constexpr int kTileFloats = kTile * kStride;
constexpr int kMaxSize = 256;
constexpr int kLargeCtas = 8;  // target_ctas() / kLargeCtas CTAs with a slice of the workspace each

static_assert(kThreads == (kTile / kMicro) * (kTile / kMicro), "a thread owns one block of a tile");
static_assert(kThreads >= kMaxSize, "one thread sums up each row");
static_assert(kStride * sizeof(float) / 16 % 2 == 1, "row stride must be an odd multiple of 16 bytes");

struct Plan {
  NewtonPinvParams p;
  int32_t m, pad;  // pad: m rounded up to whole blocks; what is beyond m is zero
  int64_t matrices;
  bool in_shared;
  int32_t ctas, slices;  // slices: [pad, pad] matrices of the workspace per CTA
  int32_t shared_bytes;
  float* workspace;  // [ctas, slices, pad, pad]
};

struct Block {
  float v[kMicro][1][kMicro];
};

template <class F>
EFFVIT_DEVICE Block make_block(const F& f) {  // of f(i, j)
  Block x;
  for_each_block<1>([&](int i, int, int j) { x.v[i][0][j] = f(i, j); });
  return x;
}
EFFVIT_DEVICE Block zeros() {
  return make_block([](int, int) { return 0.f; });
}
EFFVIT_DEVICE Block times(const Block& x, float factor) {
  return make_block([&](int i, int j) { return factor * x.v[i][0][j]; });
}
EFFVIT_DEVICE Block newton_step(const Block& v, const Block& tv) {  // 2V - TV
  return make_block([&](int i, int j) { return 2.f * v.v[i][0][j] - tv.v[i][0][j]; });
}
EFFVIT_DEVICE Float4 row_of(const Block& x, int i) {
  return {{x.v[i][0][0], x.v[i][0][1], x.v[i][0][2], x.v[i][0][3]}};
}

// Blocks in shared memory, rows kStride apart, and in the workspace, rows `stride` apart.
EFFVIT_DEVICE Block load_block(const Shared<float>& from, int row, int col) {
  Float4 y[kMicro];
  EFFVIT_UNROLL
  for (int i = 0; i < kMicro; ++i) y[i] = from.load_vec<Float4>((row + i) * kStride + col);
  return make_block([&](int i, int j) { return y[i].v[j]; });
}
EFFVIT_DEVICE void store_block(const Shared<float>& to, int row, int col, const Block& x) {
  EFFVIT_UNROLL
  for (int i = 0; i < kMicro; ++i) to.store_vec((row + i) * kStride + col, row_of(x, i));
}
EFFVIT_DEVICE Block load_block(const float* from, int stride, int row, int col) {
  Float4 y[kMicro];
  EFFVIT_UNROLL
  for (int i = 0; i < kMicro; ++i) y[i] = prim::load_global_vec<Float4>(from + (row + i) * stride + col);
  return make_block([&](int i, int j) { return y[i].v[j]; });
}
EFFVIT_DEVICE void store_block(float* to, int stride, int row, int col, const Block& x) {
  EFFVIT_UNROLL
  for (int i = 0; i < kMicro; ++i) prim::store_global_vec(to + (row + i) * stride + col, row_of(x, i));
}

// The block at (row, col) of a + ridge I; nothing is added beyond m.
EFFVIT_DEVICE Block add_ridge(const Plan& g, Block x, int row, int col) {
  if (row == col) {
    EFFVIT_UNROLL
    for (int i = 0; i < kMicro; ++i)
      if (row + i < g.m) x.v[i][0][i] += g.p.ridge;
  }
  return x;
}

// acc += a[row.., :depth] b[:depth, col..]; depth is a multiple of 4.
EFFVIT_DEVICE void multiply(Block& acc, const Shared<float>& a, int row, const Shared<float>& b, int col, int depth) {
  for (int k = 0; k < depth; k += 4)
    block_step<false>(acc.v, k, a, kStride, row, b, kStride, col, kMicro, kMicro, [](int, float) {});
}

// The largest of x[0] to x[n - 1]; NaN if one is, as in PyTorch.
EFFVIT_DEVICE float largest(const Shared<float>& x, int n) {
  float y = x.load(0);
  EFFVIT_NO_UNROLL
  for (int i = 1; i < n; ++i) {
    const float z = x.load(i);
    y = z > y || z != z ? z : y;
  }
  return y;
}

EFFVIT_DEVICE float initial_scale(const Plan& g, const Shared<float>& row_sums) {
  const float sum = largest(row_sums, g.m);
  return g.p.step / (sum * sum);
}

// A [B, H, m, m] tensor of any dtype, last stride 1, at one matrix.
struct Matrix {
  const void* base;
  int64_t first, stride;  // elements
};
EFFVIT_DEVICE Matrix matrix_at(const Plan& g, const void* base, int64_t stride_b, int64_t stride_h, int64_t stride_i,
                               int64_t index) {
  const int64_t b = index / g.p.H;
  return {base, b * stride_b + (index - b * g.p.H) * stride_h, stride_i};
}
EFFVIT_DEVICE Matrix contiguous_at(const Plan& g, const void* base, int64_t index) {
  return {base, index * g.m * g.m, g.m};
}

// Calls f(row, col, x) for every element of the matrix padded with zeros, neighbouring threads along a row.
template <class F>
EFFVIT_DEVICE void for_each_element(const Plan& g, const Matrix& from, const F& f) {
  for (int i = prim::thread_id(); i < g.pad * g.pad; i += kThreads) {
    const int row = i / g.pad, col = i - row * g.pad;
    const bool inside = row < g.m && col < g.m;
    f(row, col, inside ? load_small(from.base, from.first + row * from.stride + col, g.p.dtype) : 0.f);
  }
}

// The kernels are templates only so that several translation units may hold them.

// ---- matrices in shared memory ----

EFFVIT_DEVICE void load_matrix(const Plan& g, const Shared<float>& to, const Matrix& from, bool transpose) {
  for_each_element(
      g, from, [&](int row, int col, float x) { to.store(transpose ? col * kStride + row : row * kStride + col, x); });
}

EFFVIT_DEVICE void store_matrix(const Plan& g, void* to, int64_t index, const Shared<float>& from) {
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < g.m * g.m; i += kThreads) {
    const int row = i / g.m;
    store_small(to, index * g.m * g.m + i, g.p.dtype, from.load(row * kStride + i - row * g.m));
  }
}

template <class Index>
EFFVIT_KERNEL(kThreads, 3)
newton_pinv_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const int floats = g.pad * kStride, blocks = g.pad / kMicro;
  const Shared<float> p(0, floats), v(4 * floats, floats), t(8 * floats, floats), row_sums(12 * floats, kTile);
  const int row = prim::thread_id() / blocks * kMicro, col = prim::thread_id() % blocks * kMicro;
  const bool active = row < g.pad;

  EFFVIT_NO_UNROLL
  for (Index index = prim::cta_id(); index < g.matrices; index += prim::cta_count()) {
    load_matrix(g, p, matrix_at(g, g.p.a, g.p.a_stride_b, g.p.a_stride_h, g.p.a_stride_i, index), false);
    prim::sync_threads();
    if (prim::thread_id() < g.m) {
      float sum = 0.f;
      for (int k = 0; k < g.pad; k += 4) {
        const auto x = p.load_vec<Float4>(prim::thread_id() * kStride + k);
        sum += x.v[0] + x.v[1] + (x.v[2] + x.v[3]);
      }
      row_sums.store(prim::thread_id(), sum);
    }
    prim::sync_threads();
    Block mine = zeros();  // of V
    if (active) {
      const Block x = add_ridge(g, load_block(p, row, col), row, col);
      mine = times(x, initial_scale(g, row_sums));
      store_block(p, row, col, x);
      store_block(v, row, col, mine);
    }
    prim::sync_threads();
    EFFVIT_NO_UNROLL
    for (int i = 0; i < g.p.iterations; ++i) {
      Block product = zeros();
      if (active) {
        multiply(product, v, row, p, col, g.pad);
        store_block(t, row, col, product);
      }
      prim::sync_threads();
      if (active) {
        product = zeros();
        multiply(product, t, row, v, col, g.pad);
        mine = newton_step(mine, product);
      }
      prim::sync_threads();  // the readers of V
      if (active) store_block(v, row, col, mine);
      prim::sync_threads();
    }
    store_matrix(g, g.p.out, index, v);
  }
}

template <class Index>
EFFVIT_KERNEL(kThreads, 3)
newton_pinv_bwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const int floats = g.pad * kStride, blocks = g.pad / kMicro;
  const Shared<float> w(0, floats), grad(4 * floats, floats), t(8 * floats, floats);
  const int row = prim::thread_id() / blocks * kMicro, col = prim::thread_id() % blocks * kMicro;
  const bool active = row < g.pad;

  EFFVIT_NO_UNROLL
  for (Index index = prim::cta_id(); index < g.matrices; index += prim::cta_count()) {
    prim::sync_threads();  // the previous matrix's readers
    load_matrix(g, w, contiguous_at(g, g.p.out, index), true);
    load_matrix(g, grad,
                matrix_at(g, g.p.grad_out, g.p.grad_out_stride_b, g.p.grad_out_stride_h, g.p.grad_out_stride_i, index),
                false);
    prim::sync_threads();
    Block product = zeros();
    if (active) {
      multiply(product, w, row, grad, col, g.pad);
      store_block(t, row, col, product);
    }
    prim::sync_threads();
    if (active) {
      product = zeros();
      multiply(product, t, row, w, col, g.pad);
      store_block(grad, row, col, times(product, -1.f));
    }
    prim::sync_threads();
    store_matrix(g, g.p.da, index, grad);
  }
}

// ---- matrices in the workspace ----

// finish(row, col, block) for every block of a b. All three are [pad, pad] in the workspace.
template <class F>
EFFVIT_DEVICE void multiply_large(const Plan& g, const float* a, const float* b, const F& finish) {
  const int row = prim::thread_id() / (kTile / kMicro) * kMicro, col = prim::thread_id() % (kTile / kMicro) * kMicro;
  // Two stages of a tile of each operand. What lies beyond the matrix is neither copied nor read.
  const auto load_tile = [&](int stage, bool second, const float* from, int row0, int col0) {
    const Shared<float> to(4 * kTileFloats * (2 * stage + second), kTileFloats);
    const int rows = min_of(kTile, g.pad - row0), vectors = min_of(kTile, g.pad - col0) / 4;
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < rows * (kTile / 4); i += kThreads) {
      const int r = i / (kTile / 4), c = i % (kTile / 4);
      if (c < vectors) prim::cp_async16(to, r * kStride + 4 * c, from + (row0 + r) * g.pad + col0 + 4 * c, 16);
    }
  };
  EFFVIT_NO_UNROLL
  for (int row0 = 0; row0 < g.pad; row0 += kTile) {
    EFFVIT_NO_UNROLL
    for (int col0 = 0; col0 < g.pad; col0 += kTile) {
      Block product = zeros();
      const bool active = row0 + row < g.pad && col0 + col < g.pad;
      load_tile(0, false, a, row0, 0);
      load_tile(0, true, b, 0, col0);
      prim::cp_async_commit();
      int stage = 0;
      EFFVIT_NO_UNROLL
      for (int k0 = 0; k0 < g.pad; k0 += kTile) {
        if (k0 + kTile < g.pad) {
          load_tile(1 - stage, false, a, row0, k0 + kTile);
          load_tile(1 - stage, true, b, k0 + kTile, col0);
          prim::cp_async_commit();
          prim::cp_async_wait<1>();
        } else {
          prim::cp_async_wait<0>();
        }
        prim::sync_threads();
        if (active) {
          const Shared<float> x(8 * kTileFloats * stage, kTileFloats),
              y(8 * kTileFloats * stage + 4 * kTileFloats, kTileFloats);
          multiply(product, x, row, y, col, min_of(kTile, g.pad - k0));
        }
        prim::sync_threads();  // the readers of this stage
        stage = 1 - stage;
      }
      if (active) finish(row0 + row, col0 + col, product);
    }
  }
  prim::sync_threads();
}

EFFVIT_DEVICE void store_matrix(const Plan& g, void* to, int64_t index, const float* from) {
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < g.m * g.m; i += kThreads) {
    const int row = i / g.m;
    store_small(to, index * g.m * g.m + i, g.p.dtype, prim::load_global(from + row * g.pad + i - row * g.m));
  }
}

EFFVIT_DEVICE float* workspace_slice(const Plan& g, int slice) {
  return g.workspace + (prim::cta_id() * g.slices + slice) * g.pad * g.pad;
}

template <class Index>
EFFVIT_KERNEL(kThreads, 2)
newton_pinv_fwd_large_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Shared<float> row_sums(0, kMaxSize);  // over the tiles, which are not in use yet
  float* const p = workspace_slice(g, 0);
  float* const t = workspace_slice(g, 1);
  const int blocks = g.pad / kMicro;

  EFFVIT_NO_UNROLL
  for (Index index = prim::cta_id(); index < g.matrices; index += prim::cta_count()) {
    float *v = workspace_slice(g, 2), *next = workspace_slice(g, 3);
    for_each_element(g, matrix_at(g, g.p.a, g.p.a_stride_b, g.p.a_stride_h, g.p.a_stride_i, index),
                     [&](int row, int col, float x) { prim::store_global(p + row * g.pad + col, x); });
    prim::sync_threads();
    if (prim::thread_id() < g.m) {
      float sum = 0.f;
      for (int k = 0; k < g.pad; k += 4) {
        const auto x = prim::load_global_vec<Float4>(p + prim::thread_id() * g.pad + k);
        sum += x.v[0] + x.v[1] + (x.v[2] + x.v[3]);
      }
      row_sums.store(prim::thread_id(), sum);
    }
    prim::sync_threads();
    const float alpha = initial_scale(g, row_sums);
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < blocks * blocks; i += kThreads) {
      const int row = i / blocks * kMicro, col = i % blocks * kMicro;
      const Block x = add_ridge(g, load_block(p, g.pad, row, col), row, col);
      store_block(p, g.pad, row, col, x);
      store_block(v, g.pad, row, col, times(x, alpha));
    }
    prim::sync_threads();
    EFFVIT_NO_UNROLL
    for (int i = 0; i < g.p.iterations; ++i) {
      // One instance of the product for both halves of a step.
      EFFVIT_NO_UNROLL
      for (int half = 0; half < 2; ++half) {
        multiply_large(g, half == 0 ? v : t, half == 0 ? p : v, [&](int row, int col, const Block& x) {
          if (half == 0) {
            store_block(t, g.pad, row, col, x);
          } else {
            store_block(next, g.pad, row, col, newton_step(load_block(v, g.pad, row, col), x));
          }
        });
      }
      float* const swap = v;
      v = next;
      next = swap;
    }
    store_matrix(g, g.p.out, index, v);
    prim::sync_threads();  // the readers of the workspace and of the row sums
  }
}

template <class Index>
EFFVIT_KERNEL(kThreads, 2)
newton_pinv_bwd_large_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  float *const w = workspace_slice(g, 0), *const grad = workspace_slice(g, 1), *const t = workspace_slice(g, 2);

  EFFVIT_NO_UNROLL
  for (Index index = prim::cta_id(); index < g.matrices; index += prim::cta_count()) {
    for_each_element(g, contiguous_at(g, g.p.out, index),
                     [&](int row, int col, float x) { prim::store_global(w + col * g.pad + row, x); });
    for_each_element(
        g, matrix_at(g, g.p.grad_out, g.p.grad_out_stride_b, g.p.grad_out_stride_h, g.p.grad_out_stride_i, index),
        [&](int row, int col, float x) { prim::store_global(grad + row * g.pad + col, x); });
    prim::sync_threads();
    EFFVIT_NO_UNROLL
    for (int half = 0; half < 2; ++half) {
      multiply_large(g, half == 0 ? w : t, half == 0 ? grad : w, [&](int row, int col, const Block& x) {
        store_block(half == 0 ? t : grad, g.pad, row, col, half == 0 ? x : times(x, -1.f));
      });
    }
    store_matrix(g, g.p.da, index, grad);
    prim::sync_threads();  // the readers of the workspace
  }
}

// ---- plan and launch ----

inline Plan make_plan(const NewtonPinvParams& p, bool backward, void* workspace) {
  Plan g = {};
  g.p = p;
  g.m = static_cast<int32_t>(p.m);
  g.pad = round_up(p.m, kMicro);
  g.matrices = p.B * p.H;
  g.in_shared = p.m <= kTile;
  int64_t ctas = prim::target_ctas();
  if (g.in_shared) {
    g.shared_bytes = (3 * g.pad * kStride + kTile) * 4;
  } else {
    g.shared_bytes = 4 * kTileFloats * 4;
    g.slices = backward ? 3 : 4;
    ctas = ceil_div(ctas, kLargeCtas);
  }
  g.ctas = static_cast<int32_t>(grid_size(g.matrices, ctas));
  g.workspace = static_cast<float*>(workspace);
  return g;
}

inline size_t workspace_bytes(const NewtonPinvParams& p, bool backward) {
  const Plan g = make_plan(p, backward, nullptr);
  return static_cast<size_t>(g.ctas) * g.slices * g.pad * g.pad * sizeof(float);
}

}  // namespace newton_pinv_impl
}  // namespace cuda

inline size_t newton_pinv_fwd_workspace_bytes(const NewtonPinvParams& p) {
  return cuda::newton_pinv_impl::workspace_bytes(p, false);
}
inline size_t newton_pinv_bwd_workspace_bytes(const NewtonPinvParams& p) {
  return cuda::newton_pinv_impl::workspace_bytes(p, true);
}

inline cudaError_t launch_newton_pinv_fwd(const NewtonPinvParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::newton_pinv_impl;
  if (p.B * p.H == 0) return cudaSuccess;
  const Plan g = make_plan(p, false, workspace);
  prim::GlobalRanges ranges;
  ranges.read(p.a, extent_bytes(p.dtype, {{p.B, p.a_stride_b}, {p.H, p.a_stride_h}, {p.m, p.a_stride_i}, {p.m, 1}}));
  ranges.write(workspace, newton_pinv_fwd_workspace_bytes(p));
  ranges.write_once(p.out, tensor_bytes(p.dtype, g.matrices * p.m * p.m));
  const cudaError_t error =
      g.in_shared ? EFFVIT_LAUNCH((newton_pinv_fwd_kernel<int64_t>), g.ctas, kThreads, g.shared_bytes, stream, g)
                  : EFFVIT_LAUNCH((newton_pinv_fwd_large_kernel<int64_t>), g.ctas, kThreads, g.shared_bytes, stream, g);
  ranges.finish();
  return error;
}

inline cudaError_t launch_newton_pinv_bwd(const NewtonPinvParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::newton_pinv_impl;
  if (p.B * p.H == 0) return cudaSuccess;
  const Plan g = make_plan(p, true, workspace);
  const uint64_t bytes = tensor_bytes(p.dtype, g.matrices * p.m * p.m);
  prim::GlobalRanges ranges;
  ranges.read(p.out, bytes);
  ranges.read(
      p.grad_out,
      extent_bytes(p.dtype,
                   {{p.B, p.grad_out_stride_b}, {p.H, p.grad_out_stride_h}, {p.m, p.grad_out_stride_i}, {p.m, 1}}));
  ranges.write(workspace, newton_pinv_bwd_workspace_bytes(p));
  ranges.write_once(p.da, bytes);
  const cudaError_t error =
      g.in_shared ? EFFVIT_LAUNCH((newton_pinv_bwd_kernel<int64_t>), g.ctas, kThreads, g.shared_bytes, stream, g)
                  : EFFVIT_LAUNCH((newton_pinv_bwd_large_kernel<int64_t>), g.ctas, kThreads, g.shared_bytes, stream, g);
  ranges.finish();
  return error;
}

}  // namespace effvit
