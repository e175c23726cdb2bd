// Linear attention: the sums over tokens, S and z, their splits added up, and dot products with running sums. See
// linear_attention.cuh.
#pragma once
#include "linear_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace linear_attention_impl {

// Columns of a thread's sums over rows, summed up over the CTA and written. Shared memory of the tiles is free.
template <class T>
EFFVIT_DEVICE void write_column_sums(const Cta<T>& c, float (&sum)[kVec<T>], float* to, int col) {
  const Shared<float> sums(0, kWarps * kTile);
  const int pieces = 1 << c.g.x_shift, at = piece_col<T>(c.g.x_shift);
  prim::sync_threads();  // the tiles' readers, and those of the previous block
  EFFVIT_UNROLL
  for (int e = 0; e < kVec<T>; ++e) {
    for (int m = pieces; m < prim::kWarpSize; m *= 2) sum[e] += prim::shuffle_xor(sum[e], m);
    if (c.lane < pieces) sums.store(prim::warp_id() * kTile + at + e, sum[e]);
  }
  prim::sync_threads();
  const int i = prim::thread_id();
  if (i < c.block_cols && col + i < c.g.dim_x) {
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += sums.load(w * kTile + i);
    prim::store_global(to + col + i, total);
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, kTensorCores<T> ? 4 : 3)
linear_attention_state_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    float* const to = g.partial + (work.block * g.splits + work.split) * g.slot;
    const int first_col = work.slab * g.slab_cols;
    const bool sum_a = work.slab == 0 && g.vector_sum == VectorSum::kOfA;
    float sum[kVec<T>] = {}, low[kVec<T>] = {};

    if (g.has_state()) {
      float state[kTiles][4];
      clear(state);
      const auto load = [&](int64_t first, int block, int a_at, int b_at) {
        load_tile(c.a_tile(a_at), g.a, work, first, work.stop, block * kTile);
        if (block == 0) load_tile(c.b_tile(b_at), g.b, work, first, work.stop, first_col);
        prim::cp_async_commit();
      };
      prim::sync_threads();  // the previous piece of work
      if (work.first < work.stop) load(work.first, 0, 0, 0);
      int64_t first = work.first;
      int block = 0, a_at = 0, b_at = 0;
      EFFVIT_NO_UNROLL
      while (first < work.stop) {
        const WideTile<T> a = c.a_tile(a_at), b = c.b_tile(b_at);
        prim::cp_async_wait<0>();
        if constexpr (Wide<T>::kSplit) prim::sync_threads();  // the readers of lo, of which there is one buffer
        float part[kVec<T>] = {};
        transform_tile(g, a, g.a, work, first, work.stop, block * kTile, sum_a, [&](int row, int, const auto& x) {
          if (!sum_a) return;
          float factor = 1.f;  // a has the weight already
          if (g.z_factor == Factor::kGradDen && first + row < work.stop)
            factor = row_factor(g, Factor::kGradDen, work, first + row);
          EFFVIT_UNROLL
          for (int e = 0; e < kVec<T>; ++e) part[e] += x[e] * factor;
        });
        if (sum_a) {
          EFFVIT_UNROLL
          for (int e = 0; e < kVec<T>; ++e) add_compensated(sum[e], low[e], part[e]);
        }
        if (block == 0) transform_tile(g, b, g.b, work, first, work.stop, first_col);
        prim::sync_threads();  // this tile is complete, and the other buffer's readers are done
        const int next_block = block + 1 == g.blocks ? 0 : block + 1;
        const int64_t next = next_block == 0 ? first + kTile : first;
        a_at = 1 - a_at;
        b_at = next_block == 0 ? 1 - b_at : b_at;
        if (next < work.stop) load(next, next_block, a_at, b_at);
        if (c.warp_row < c.block_cols)
          product<kDepthFirst, kDepthFirst>(state, c.slab_tiles, a.at(0, c.warp_row), b.at(0, 0), kTile,
                                            block * c.slab_tiles);
        first = next;
        block = next_block;
      }
      store_partial(c, to, state, first_col);
    }
    if (work.slab != 0) continue;
    if (sum_a) {
      write_column_sums(c, sum, to + g.slot_z, 0);
      continue;
    }
    EFFVIT_NO_UNROLL
    for (int block = 0; block < g.blocks; ++block) {
      const int col = block * kTile + piece_col<T>(g.x_shift), length = piece_length<T>(g.z_rows.dim - col);
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<T>; ++e) sum[e] = low[e] = 0.f;
      if (g.vector_sum == VectorSum::kOfRows) {
        EFFVIT_NO_UNROLL
        for (int64_t token = work.first + (prim::thread_id() >> g.x_shift); token < work.stop;
             token += kThreads >> g.x_shift) {
          float x[kVec<T>];
          map_piece<T>(load_piece(row_at<T>(g.z_rows, work, token) + col, length, g.z_rows.vec), g.z_rows.map, x);
          scale_piece<T>(x, row_factor(g, g.z_factor, work, token), length);
          EFFVIT_UNROLL
          for (int e = 0; e < kVec<T>; ++e) add_compensated(sum[e], low[e], x[e]);
        }
      }
      write_column_sums(c, sum, to + g.slot_z, block * kTile);
    }
  }
}

// Adds the splits of every element of the states and vectors. `prefix`: each split receives the sum of those before it
// (after it, in reverse), with the initial value; else the first one receives the total.
struct Reduction {
  float* partial;  // [blocks, splits, slot]
  int64_t blocks, slot, slot_z;  // a block is a sequence and head
  int64_t state, z;  // floats of the state and of the vector; state is 0 where there is only the vector
  const float *initial_state, *initial_z;  // [blocks, state], [blocks, z] or null
  float *total_state, *total_z;  // likewise
  int32_t splits;
  bool prefix, reverse;
};

template <class Index>
EFFVIT_KERNEL(kThreads, 8)
linear_attention_reduce_kernel(EFFVIT_GRID_CONSTANT Reduction r) {
  const Index each = r.state + r.z, all = r.blocks * each;
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id() * kThreads + prim::thread_id(); i < all; i += prim::cta_count() * kThreads) {
    const Index block = i / each, element = i - block * each;
    const bool is_z = element >= r.state;
    const Index at = is_z ? block * r.z + element - r.state : block * r.state + element;
    const float* const initial = is_z ? r.initial_z : r.initial_state;
    float* const total = is_z ? r.total_z : r.total_state;
    float* const from = r.partial + block * r.splits * r.slot + (is_z ? r.slot_z + element - r.state : element);
    float sum = initial == nullptr ? 0.f : prim::load_global(initial + at), low = 0.f;
    for (int k = 0; k < r.splits; ++k) {
      float* const split = from + (r.reverse ? r.splits - 1 - k : k) * r.slot;
      const float part = prim::load_global(split);
      if (r.prefix) prim::store_global(split, sum);
      add_compensated(sum, low, part);
    }
    if (!r.prefix) prim::store_global(from, sum);
    if (total != nullptr) prim::store_global(total + at, sum);
  }
}

// out_i = x_i . (z + sum_j factor_j b_j), the sum over the rows j up to i (in reverse: from i on) if causal. b's rows
// are those of x, or what the causal mask pairs them with.
template <class T>
EFFVIT_KERNEL(kThreads, 4)
linear_attention_row_dot_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  constexpr int kStride = kTile + 1;
  const Shared<float> terms(0, kTile * kStride), run(4 * kTile * kStride, kMaxDim),
      run_low(4 * (kTile * kStride + kMaxDim), kMaxDim), half_sum(4 * (kTile * kStride + 2 * kMaxDim), kTile);
  const int col_in_block = prim::thread_id() % kTile, half = prim::thread_id() / kTile;
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    const int64_t tiles = tile_count(work);
    prim::sync_threads();  // the previous piece of work
    const float* const z = g.z.base + work.block * g.z.stride + work.split * g.z.split_stride;
    for (int i = prim::thread_id(); i < g.dim_x; i += kThreads) {
      run.store(i, prim::load_global(z + i));
      run_low.store(i, 0.f);
    }
    EFFVIT_NO_UNROLL
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = work.first + (g.reverse() ? tiles - 1 - tile : tile) * kTile;
      const int rows = work.stop - first < kTile ? static_cast<int>(work.stop - first) : kTile;
      const int half_first = min_of(half * (kTile / 2), rows), half_last = min_of((half + 1) * (kTile / 2), rows);
      // Row i in the order of the walk.
      const auto token_at = [&](int i) { return first + (g.reverse() ? rows - 1 - i : i); };
      const auto element = [&](const Rows& from, int64_t token, int col) {
        float x[1] = {prim::to_float(prim::load_global(row_at<T>(from, work, token) + col))};
        apply_map(from.map, x);
        return x[0];
      };
      float dot = 0.f;
      EFFVIT_NO_UNROLL
      for (int block = 0; block < g.dim_x; block += kTile) {
        const int col = block + col_in_block;
        const bool inside = col < g.dim_x;
        if (g.causal() && half == 0) {
          float sum = 0.f;
          EFFVIT_NO_UNROLL
          for (int i = half_first; i < half_last && inside; ++i)
            sum += row_factor(g, g.b.factor, work, token_at(i)) * element(g.b, token_at(i), col);
          half_sum.store(col_in_block, sum);
        }
        prim::sync_threads();  // half_sum and run, and the readers of terms
        // The sum over this tile is kept apart from the one before it: a long sequence is not added up term by term.
        const float before = inside ? run.load(col) : 0.f;
        float sum = g.causal() && half == 1 ? half_sum.load(col_in_block) : 0.f;
        EFFVIT_NO_UNROLL
        for (int i = half_first; i < half_last; ++i) {
          const int64_t token = token_at(i);
          if (g.causal() && inside) sum += row_factor(g, g.b.factor, work, token) * element(g.b, token, col);
          terms.store(i * kStride + col_in_block, inside ? element(g.x, token, col) * (before + sum) : 0.f);
        }
        prim::sync_threads();  // terms, and the readers of run
        if (g.causal() && half == 1 && inside) {
          float total = before, low = run_low.load(col);
          add_compensated(total, low, sum);
          run.store(col, total);
          run_low.store(col, low);
        }
        const int row = prim::thread_id() / 2;
        float part = 0.f;
        EFFVIT_NO_UNROLL
        for (int i = 0; i < kTile / 2 && row < rows; ++i)
          part += terms.load(row * kStride + prim::thread_id() % 2 * (kTile / 2) + i);
        dot += prim::warp_sum<2>(part);
      }
      const int row = prim::thread_id() / 2;
      if (prim::thread_id() % 2 == 0 && row < rows)
        prim::store_global(g.row_sum + (work.batch * g.length() + token_at(row)) * g.p.H + work.head, dot);
    }
  }
}

// Zeros for the tokens that belong to no sequence: `words` 16-bit words a token.
template <class Index>
EFFVIT_KERNEL(kThreads, 8)
linear_attention_fill_kernel(EFFVIT_GRID_CONSTANT LinearAttentionParams p, void* to, Index words) {
  const auto offset = [&](int64_t n) {
    const int32_t at = prim::load_global(p.cu_seqlens + n);
    return linear_attention_range(p, 0, p.L, at, at).begin;
  };
  const Index before = offset(0), after = offset(p.N) < before ? before : offset(p.N);
  const Index all = (before + p.L - after) * words;
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id() * kThreads + prim::thread_id(); i < all; i += prim::cta_count() * kThreads) {
    const Index token = i / words < before ? i / words : i / words - before + after;
    prim::store_global(static_cast<prim::bfloat16*>(to) + token * words + i % words, prim::bfloat16{0});
  }
}

}  // namespace linear_attention_impl
}  // namespace cuda
}  // namespace effvit
