// Linear attention: the fused backward of heads with K and V up to 64, neither causal nor quadratic. See
// linear_attention.cuh.
#pragma once
#include "linear_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace linear_attention_impl {

// phi of a fragment of a tile that is as in memory. float32's tiles are operands already.
template <class T>
struct MapFragment {
  FeatureMap map;

  EFFVIT_DEVICE void operator()(uint32_t (&hi)[4], uint32_t (&lo)[4]) const {
    if (!Wide<T>::kSplit && map == FeatureMap::kNone) return;
    float x[8];
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) unpack2<T>(hi[e], x[2 * e], x[2 * e + 1]);
    apply_map(map, x);
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) pack_pair<Wide<T>>(x[2 * e], x[2 * e + 1], hi[e], lo[e]);
  }
};

// phi of two neighbouring elements of a tile, and its derivative, which follows from it.
template <class T>
EFFVIT_DEVICE void load_pair(const WideTile<T>& from, int i, FeatureMap map, float (&phi)[2]) {
  if constexpr (kTensorCores<T>) {
    unpack2<T>(from.hi.template load_vec<uint32_t>(i), phi[0], phi[1]);
    apply_map(map, phi);
  } else {  // the tile is an operand
    const auto pair = from.hi.template load_vec<Vec<float, 2>>(i);
    phi[0] = pair.v[0], phi[1] = pair.v[1];
  }
}
EFFVIT_DEVICE float derivative_of(FeatureMap map, float phi) {
  if (map == FeatureMap::kNone) return 1.f;
  if (map == FeatureMap::kRelu) return phi > 0.f ? 1.f : 0.f;
  return map == FeatureMap::kElu1 && phi >= 1.f ? 1.f : phi;
}

// Two elements of an output, where the tile of an input was.
template <class T>
EFFVIT_DEVICE void store_result(const WideTile<T>& to, int i, float low, float high) {
  if constexpr (kTensorCores<T>) {
    to.hi.store_vec(i, prim::pack2<T>(low, high));
  } else {
    to.hi.store_vec(i, Vec<float, 2>{{low, high}});
  }
}

// Writes this warp's 16 rows of a tile of results to [B, length, H, dim].
template <class T>
EFFVIT_DEVICE void write_tile(const Cta<T>& c, const WideTile<T>& from, const Work& work, int64_t first, int64_t length,
                              void* out, int dim) {
  const int col = piece_col<T>(from.shift), n = piece_length<T>(dim - col);
  if (n == 0) return;
  const int left = static_cast<int>(least(kTile, work.stop - first));
  for_each_piece_row(from.shift, [&](int row) {
    if (row >= left) return;
    T* const to = static_cast<T*>(out) + ((work.batch * length + first + row) * c.g.p.H + work.head) * dim + col;
    store_piece(to, from.hi.template load_vec<Piece<T>>(row * from.stride + col), n, c.g.out_vec);
  });
}

// Starts to copy a tile of each input into buffer `at`.
template <class T>
EFFVIT_DEVICE void load_inputs(const Cta<T>& c, const Work& work, int64_t first, int at) {
  const Pass& g = c.g;
  load_tile(c.x_tile(at), g.x, work, first, work.stop, 0);
  load_tile(c.b_tile(at), g.b, work, first, work.stop, 0);
  if (g.denominator == Denominator::kOfRows) load_tile(c.a_tile(at), g.z_rows, work, first, work.stop, 0);
  prim::cp_async_commit();
}

// Starts to copy the first tile, and loads the state, and z or its gradient.
template <class T>
EFFVIT_DEVICE void start_fused(const Cta<T>& c, const Work& work) {
  prim::sync_threads();  // the previous piece of work
  if (work.first == work.stop) return;
  load_inputs(c, work, work.first, 0);
  load_planes(c, c.state_tile(), c.g.state.base + work.block * c.g.state.stride, 0);
  load_vectors(c, work, 0);
  prim::sync_threads();
}

// Takes phi of the rows that this thread copied where a tile is to be an operand: float32.
template <class T>
EFFVIT_DEVICE void map_rows(const Pass& g, const WideTile<T>& tile, const Rows& from, const Work& work, int64_t first) {
  if constexpr (!kTensorCores<T>) transform_tile(g, tile, from, work, first, work.stop, 0);
}

// Turns do into u = scale do / d where the thread copied it, and leaves -1 / d, of which the gradient of d is a
// multiple, in `row_of`; 0 where d does not depend on q, or there is no query.
template <class T>
EFFVIT_DEVICE void prepare_queries(const Cta<T>& c, const WideTile<T>& den, const WideTile<T>& u,
                                   const Shared<float>& row_of, const Work& work, int64_t first) {
  const Pass& g = c.g;
  const auto& p = g.p;
  const bool normalized = p.normalize != Normalize::kNone;
  const int col = piece_col<T>(u.shift);
  float z[kVec<T>];
  EFFVIT_UNROLL
  for (int e = 0; e < kVec<T>; ++e) z[e] = normalized ? c.zden().load(col + e) : 0.f;
  for_each_piece_row(u.shift, [&](int row) {
    const bool inside = first + row < work.stop;
    float factor = p.scale, inverse = 0.f, x[kVec<T>];
    if (normalized) {
      to_floats<T>(den.hi.template load_vec<Piece<T>>(row * den.stride + col), x);
      apply_map(g.z_rows.map, x);
      float dot = 0.f;
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<T>; ++e) dot += x[e] * z[e];
      dot = tile::row_sum(dot, u.shift);
      if (inside) {
        const float d = denominator(p, work, first + row, dot, false);
        factor = p.scale / d;
        inverse = p.normalize == Normalize::kClamp && dot < p.clamp_min ? 0.f : -1.f / d;
      }
      if (col == 0) row_of.store(row, inverse);
    }
    to_floats<T>(u.hi.template load_vec<Piece<T>>(row * u.stride + col), x);
    EFFVIT_UNROLL
    for (int e = 0; e < kVec<T>; ++e) x[e] = inside ? x[e] * factor : 0.f;
    store_piece(u, row * u.stride + col, x);
  });
}

// dq, dq_den and the partial sums of dS and dz, in one pass over q, q_den and do: with t = u S^T, the gradient of the
// denominator is r = -(phi(q) . t) / d, that of phi(q) is t + r z, dS = sum phi(q)^T u and dz = sum r phi(q).
template <class T>
EFFVIT_KERNEL(kThreads, kQueryCtas<T>)
linear_attention_query_gradient_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const WideTile<T> planes = c.state_tile();
  const auto& p = g.p;
  const bool normalized = p.normalize != Normalize::kNone, has_den = g.denominator == Denominator::kOfRows;
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    float state[kTiles][4], dz[kTiles][2] = {};
    clear(state);
    start_fused(c, work);
    int at = 0;
    EFFVIT_NO_UNROLL
    for (int64_t first = work.first; first < work.stop; first += kTile) {
      const WideTile<T> x = c.x_tile(at), u = c.b_tile(at), den = has_den ? c.a_tile(at) : x;
      prim::cp_async_wait<0>();
      prepare_queries(c, den, u, c.row_inverse(), work, first);
      map_rows(g, x, g.x, work, first);
      if (has_den) map_rows(g, den, g.z_rows, work, first);
      prim::sync_threads();  // this tile is complete, and the other buffer's readers are done
      at = 1 - at;
      if (first + kTile < work.stop) load_inputs(c, work, first + kTile, at);
      if (c.warp_row < c.block_cols)
        product<kDepthFirst, kDepthFirst>(state, c.slab_tiles, x.at(0, c.warp_row), u.at(0, 0), kTile, 0,
                                          MapFragment<T>{g.x.map});
      float acc[kTiles][4];
      clear(acc);
      product<kDepthLast, kDepthLast>(acc, c.slab_tiles, u.at(c.warp_row, 0), planes.at(0, 0), c.block_cols);
      float dot[2] = {0.f, 0.f}, r[2] = {0.f, 0.f};
      if (normalized) {
        for_each_pair<kTiles>(c.slab_tiles, [&](int n, int half, int row, int col) {
          float phi[2];
          load_pair(x, row * x.stride + col, g.x.map, phi);
          dot[half] += phi[0] * acc[n][2 * half] + phi[1] * acc[n][2 * half + 1];
        });
        EFFVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float inverse = c.row_inverse().load(c.row + 8 * half), sum = prim::warp_sum<4>(dot[half]);
          r[half] = inverse == 0.f ? 0.f : sum * inverse;
        }
      }
      prim::sync_threads();  // the readers of x and of u: the results take x's place, the next tile u's
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        EFFVIT_UNROLL
        for (int n = 0; n < kTiles && n < c.slab_tiles; ++n) {
          const int col = n * 8 + c.column, i = (c.row + 8 * half) * x.stride + col;
          float phi[2], y[2] = {acc[n][2 * half], acc[n][2 * half + 1]};
          load_pair(x, i, g.x.map, phi);
          if (normalized) {
            const auto z = c.zden().template load_vec<Vec<float, 2>>(col);
            float rows[2] = {phi[0], phi[1]}, gradient[2];
            if (has_den) load_pair(den, i, g.z_rows.map, rows);
            EFFVIT_UNROLL
            for (int e = 0; e < 2; ++e) {
              // Without a gradient of d nothing is added, an infinite z or phi(q) times zero neither.
              gradient[e] = r[half] == 0.f ? 0.f : r[half] * z.v[e];
              dz[n][e] += r[half] == 0.f ? 0.f : r[half] * rows[e];
              if (!has_den) y[e] += gradient[e];
            }
            if (has_den)
              store_result(den, i, gradient[0] * derivative_of(g.z_rows.map, rows[0]),
                           gradient[1] * derivative_of(g.z_rows.map, rows[1]));
          }
          store_result(x, i, y[0] * derivative_of(g.x.map, phi[0]), y[1] * derivative_of(g.x.map, phi[1]));
        }
      }
      prim::sync_warp();
      write_tile(c, x, work, first, p.L, p.dq, g.dim_x);
      if (has_den) write_tile(c, den, work, first, p.L, p.dq_den, g.dim_x);
    }

    float* const to = g.partial + (work.block * g.splits + work.split) * g.slot;
    store_partial(c, to, state, 0);
    if (!normalized) {
      for (int i = prim::thread_id(); i < g.dim_x; i += kThreads) prim::store_global(to + g.slot_z + i, 0.f);
      continue;
    }
    prim::sync_threads();  // the readers of z
    EFFVIT_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      EFFVIT_UNROLL
      for (int e = 0; e < 2; ++e) {
        for (int m = 4; m < prim::kWarpSize; m *= 2) dz[n][e] += prim::shuffle_xor(dz[n][e], m);
        if (c.lane < 4) c.zden().store(prim::warp_id() * kTile + n * 8 + c.column + e, dz[n][e]);
      }
    }
    prim::sync_threads();
    const int i = prim::thread_id();
    if (i < g.dim_x) {
      float total = 0.f;
      for (int w = 0; w < kWarps; ++w) total += c.zden().load(w * kTile + i);
      prim::store_global(to + g.slot_z + i, total);
    }
  }
}

// dk, dv, dk_den and dweight, in one pass over k, v and k_den: dv = w phi(k) dS, and the gradient of w phi(k) is
// t + dz with t = v dS^T, its product with phi(k) that of w. A warp has its own 16 rows of all of them.
template <class T>
EFFVIT_KERNEL(kThreads, kKeyCtas<T>)
linear_attention_key_gradient_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const WideTile<T> planes = c.state_tile();
  const auto& p = g.p;
  const bool has_den = g.denominator == Denominator::kOfRows;
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    if (work.first == work.stop) continue;
    start_fused(c, work);
    int at = 0;
    EFFVIT_NO_UNROLL
    for (int64_t first = work.first; first < work.stop; first += kTile) {
      const WideTile<T> x = c.x_tile(at), v = c.b_tile(at), den = has_den ? c.a_tile(at) : x;
      prim::cp_async_wait<0>();
      map_rows(g, x, g.x, work, first);
      if (has_den) map_rows(g, den, g.z_rows, work, first);
      prim::sync_warp();  // these rows are complete, and the other buffer's readers are done
      at = 1 - at;
      if (first + kTile < work.stop) load_inputs(c, work, first + kTile, at);
      float dv[kTiles][4], dk[kTiles][4], factor[2], dot[2] = {0.f, 0.f};
      clear(dv);
      clear(dk);
      product<kDepthLast, kDepthFirst>(dv, c.slab_tiles, x.at(c.warp_row, 0), planes.at(0, 0), c.block_cols, 0,
                                       MapFragment<T>{g.x.map});
      product<kDepthLast, kDepthLast>(dk, c.slab_tiles, v.at(c.warp_row, 0), planes.at(0, 0), c.block_cols, 0,
                                      MapFragment<T>{FeatureMap::kNone});
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t token = first + c.row + 8 * half;
        factor[half] = token < work.stop ? row_factor(g, Factor::kWeight, work, token) : 0.f;
      }
      prim::sync_warp();  // the readers of x and v, whose places the results take
      for_each_pair<kTiles>(c.slab_tiles, [&](int n, int half, int row, int col) {
        const int i = row * x.stride + col;
        const auto z = c.zden().template load_vec<Vec<float, 2>>(col);
        float phi[2], y[2] = {dk[n][2 * half], dk[n][2 * half + 1]};
        load_pair(x, i, g.x.map, phi);
        if (has_den) {
          float rows[2];
          load_pair(den, i, g.z_rows.map, rows);
          dot[half] += (phi[0] * y[0] + phi[1] * y[1]) + (rows[0] * z.v[0] + rows[1] * z.v[1]);
          store_result(den, i, z.v[0] * factor[half] * derivative_of(g.z_rows.map, rows[0]),
                       z.v[1] * factor[half] * derivative_of(g.z_rows.map, rows[1]));
        } else {
          y[0] += z.v[0], y[1] += z.v[1];
          dot[half] += phi[0] * y[0] + phi[1] * y[1];
        }
        store_result(x, i, y[0] * factor[half] * derivative_of(g.x.map, phi[0]),
                     y[1] * factor[half] * derivative_of(g.x.map, phi[1]));
        store_result(v, i, dv[n][2 * half] * factor[half], dv[n][2 * half + 1] * factor[half]);
      });
      if (p.weight != nullptr) {
        EFFVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float sum = prim::warp_sum<4>(dot[half]);
          const int64_t token = first + c.row + 8 * half;
          if (c.lane % 4 == 0 && token < work.stop)
            store_small(p.dweight, (work.batch * p.M + token) * p.H + work.head, p.weight_dtype, sum);
        }
      }
      prim::sync_warp();
      write_tile(c, x, work, first, p.M, p.dk, g.dim_x);
      write_tile(c, v, work, first, p.M, p.dv, g.dim_out);
      if (has_den) write_tile(c, den, work, first, p.M, p.dk_den, g.dim_x);
    }
  }
}

}  // namespace linear_attention_impl
}  // namespace cuda
}  // namespace effvit
