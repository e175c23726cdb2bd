// gated_linear_attention on the CPU: backward. Included by gated_linear_attention_kernel.inl.h.
//
// A unit walks one head of a sequence twice: for the states before its chunks, and from the last chunk to the first
// with dS, the gradient of the state behind a chunk. Where there are few heads, it does so with a part of the chunks;
// what every part adds to S and dS is found first, so that each unit can make those at its own ends. States are kept
// transposed, [V, K], and only those of a segment at a time; the ones before each segment are enough to make the rest
// again. With A the scores, decays included, and dA = dO v^T times decays:
//   dv = A^T dO + (k e^(b - b_j)) dS,  dq = dA k + e^(b_i) dO S^T,  dk = dA^T q + e^(b - b_j) v dS^T,
//   dS (before) = e^b dS + (q e^(b_i))^T dO.
// The gradient of a gate is a sum over what lies on both sides of it: pairs of a token from it on and one before it,
// the state before the chunk with later tokens, earlier tokens with the state behind, and both states. Every sum has
// terms of its own: a running sum of q dq - k dk would cancel.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace gated_linear_attention_impl {

// gemm_transposed, its sums from the last row to the first: later tokens decay more towards earlier ones, and what is
// small is added before what is large.
void from_the_last(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb, const float* add,
                   float* c, int64_t ldc) {
  gemm_transposed(m, n, k, a + (k - 1) * lda, -lda, b + (k - 1) * ldb, -ldb, add, c, ldc);
}

struct Backward {
  const Params& p;
  const Geometry g;
  Decays d;
  int64_t state_size;  // floats
  float *q, *k, *v;  // [64, Kp], [64, Kp], [64, Vp]; q times scale
  float *kt, *vt;  // [K, 64], [V, 64]
  float* scores;  // [64 + K, 64]: A, transposed keys at the chunk's end
  float* grad;  // [64 + K, Vp]: dO, dS
  float* dscores;  // [64, 64]: dA; where channels have gates, without decays
  float* pairs;  // [64, 64]: the product of A and dO v^T
  float *dq, *dk, *dv;  // [64, Kp], [64, Kp], [64, Vp]
  float* keys;  // [64, Kp]
  float *near_q, *near_k, *start_q, *keys_t, *dgates, *of_state, *behind;  // where channels have gates
  float *ds, *states, *starts;  // [V, Kp], those of a segment and of all segments' first chunks
  float *gate_q, *gate_k, *dgate;  // [64]
  float *sums_q, *sums_k, *sums_v, *sums_g;  // of two walks, a row for every token where the result is rounded
  double head_sum = 0.0;

  Backward(const Params& params, const Geometry& geometry, Scratch& s) : p(params), g(geometry), d(p, g, s) {
    const int64_t rows = int64_t{kMaxChunk} * g.Kp, values = int64_t{kMaxChunk} * g.Vp, C = kMaxChunk;
    const int64_t of_channels = d.channel ? rows : 0;
    state_size = int64_t{g.V} * g.Kp;
    q = s.take<float>(rows), k = s.take<float>(rows), v = s.take<float>(values);
    kt = s.take<float>(g.K * C), vt = s.take<float>(g.V * C);
    scores = s.take<float>((C + g.K) * C), grad = s.take<float>((C + g.K) * g.Vp);
    dscores = s.take<float>(C * C), pairs = s.take<float>(C * C);
    dq = s.take<float>(rows), dk = s.take<float>(rows), dv = s.take<float>(values);
    keys = s.take<float>(rows);
    near_q = s.take<float>(of_channels), near_k = s.take<float>(of_channels), start_q = s.take<float>(of_channels);
    keys_t = s.take<float>(d.channel ? g.K * C : 0), dgates = s.take<float>(of_channels);
    of_state = s.take<float>(of_channels / kLanes), behind = s.take<float>(g.Kp);
    const int64_t chunks = ceil_div(ceil_div(p.L, int64_t{g.chunk}), g.splits);
    ds = s.take<float>(state_size), states = s.take<float>(state_size * std::min<int64_t>(g.segment, chunks));
    starts = s.take<float>(state_size * std::max<int64_t>(1, ceil_div(chunks, g.segment)));
    gate_q = s.take<float>(C), gate_k = s.take<float>(C), dgate = s.take<float>(C);
    if (g.splits == 1) place_sums(s, p.L);
  }

  // Floats of the workspace: sums of the gradients of heads' gates, what the parts of walks add to states, sums of
  // walks.
  static int64_t units_of_head(const Params& p, const Geometry& g) { return g.splits > 1 ? walks_of(p) * g.splits : 1; }
  static int64_t floats_of_heads(const Params& p, const Geometry& g) {
    return p.gate != GateKind::kHead ? 0 : ceil_div(p.N * p.H * units_of_head(p, g), 16) * 16;
  }
  static int64_t floats_of_part(const Geometry& g) { return (2 * int64_t{g.V} + 1) * g.Kp; }
  static int64_t floats_of_parts(const Params& p, const Geometry& g) {
    return g.splits > 1 ? p.N * p.H * walks_of(p) * g.splits * floats_of_part(g) : 0;
  }
  static int64_t floats_of_sums(const Params& p, const Geometry& g) {
    if (g.splits == 1) return 0;
    Scratch count;
    Backward b(p, g, count);
    const int64_t without = count.used();
    b.place_sums(count, p.B * p.H * p.L);
    return (count.used() - without) / static_cast<int64_t>(sizeof(float));
  }
  static int64_t floats(const Params& p, const Geometry& g) {
    return floats_of_heads(p, g) + floats_of_parts(p, g) + floats_of_sums(p, g);
  }

  // Of two walks, rows of `tokens` tokens.
  void place_sums(Scratch& s, int64_t tokens) {
    const bool both = p.direction == GateDirection::kBoth, rounded = both && p.dtype != DType::kFloat32;
    sums_q = s.take<float>(rounded ? tokens * g.Kp : 0), sums_k = s.take<float>(rounded ? tokens * g.Kp : 0);
    sums_v = s.take<float>(rounded ? tokens * g.Vp : 0);
    const bool rounded_gates = both && p.gate_dtype != DType::kFloat32;
    sums_g = s.take<float>(rounded_gates ? tokens * (d.channel ? g.Kp : 1) : 0);
  }

  void run(float* workspace, int index, int64_t begin, int64_t end) {
    float* const parts = workspace + floats_of_heads(p, g);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t walks = unit / g.splits, split = unit % g.splits;
      head_sum = 0.0;
      if (g.splits == 1) {
        for_walks(p, unit / p.H, unit % p.H, [&](const Walk& w, Pass pass) { walk(w, pass, 0, nullptr); });
        if (p.gate == GateKind::kHead) workspace[unit] = static_cast<float>(head_sum);
        continue;
      }
      at_walk(p, walks / p.H, walks % p.H, index, [&](const Walk& w, Pass pass) {
        Scratch s(reinterpret_cast<char*>(parts + floats_of_parts(p, g)));
        place_sums(s, p.B * p.H * p.L);
        const int64_t row = (w.batch * p.H + w.head) * p.L + w.begin();
        sums_q += row * g.Kp, sums_k += row * g.Kp, sums_v += row * g.Vp, sums_g += row * (d.channel ? g.Kp : 1);
        walk(w, pass, split, parts + (walks * walks_of(p) + index) * g.splits * floats_of_part(g));
      });
      if (p.gate == GateKind::kHead) {
        workspace[(walks * walks_of(p) + index) * g.splits + split] = static_cast<float>(head_sum);
      }
    }
  }

  // The chunks of a split.
  struct Range {
    int64_t begin, end;
  };
  Range range_of(const Walk& w, int64_t split) const {
    const int64_t chunks = ceil_div(w.length, int64_t{g.chunk}), count = ceil_div(chunks, g.splits);
    return {std::min(split * count, chunks), std::min((split + 1) * count, chunks)};
  }

  // Of a part of a walk: the decay from end to end [Kp], what its tokens add to the state behind them, and to the
  // gradient of the state before them, both [V, Kp].
  void run_parts(float* workspace, int64_t begin, int64_t end) {
    float* const parts = workspace + floats_of_heads(p, g);
    const int walks = walks_of(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t split = unit % g.splits, head = unit / g.splits / walks;
      float *const decay = parts + unit * floats_of_part(g), *const state = decay + g.Kp;
      float* const dstate = state + state_size;
      for (int c = 0; c < g.Kp; c += kLanes) store(decay + c, set1(1.f));
      zero(state, 2 * state_size);
      at_walk(p, head / p.H, head % p.H, static_cast<int>(unit / g.splits % walks), [&](const Walk& w, Pass) {
        const Range range = range_of(w, split);
        const bool first = split == 0, last = split + 1 == g.splits;
        d.begin();
        for (int64_t i = range.begin; i < range.end && !last; ++i) {
          advance(w, i, state);
          multiply_rows(decay, decay, d.total, g.Kp);
        }
        for (int64_t i = range.end - 1; i >= range.begin && !first; --i) {
          retreat(w, i, dstate);
          if (last) multiply_rows(decay, decay, d.total, g.Kp);
        }
      });
    }
  }

  // state [V, Kp] from one end of a part to the other, by what it adds.
  void cross(float* state, const float* decay, const float* added) {
    for (int e = 0; e < g.V; ++e) {
      float* const row = state + int64_t{e} * g.Kp;
      for (int c = 0; c < g.Kp; c += kLanes) {
        store(row + c, fma(load(row + c), load(decay + c), load(added + int64_t{e} * g.Kp + c)));
      }
    }
  }

  void walk(const Walk& w, Pass pass, int64_t split, const float* parts) {
    const int64_t at = (w.sequence * p.H + w.head) * p.K * p.V;
    const Range range = range_of(w, split);
    const int64_t chunks = range.end - range.begin, segments = ceil_div(chunks, int64_t{g.segment});
    d.begin();
    read_state(starts, p.initial_state ? p.initial_state + at : nullptr);
    for (int64_t i = 0; i < split; ++i) {
      const float* const part = parts + i * floats_of_part(g);
      cross(starts, part, part + g.Kp);
    }
    for (int64_t segment = 0; segment + 1 < segments; ++segment) {
      float* const to = starts + (segment + 1) * state_size;
      std::memcpy(to, starts + segment * state_size, static_cast<size_t>(state_size) * sizeof(float));
      for (int64_t c = 0; c < g.segment; ++c) advance(w, range.begin + segment * g.segment + c, to);
    }
    read_state(ds, p.grad_state ? p.grad_state + at : nullptr);
    for (int64_t i = g.splits - 1; i > split; --i) {
      const float* const part = parts + i * floats_of_part(g);
      cross(ds, part, part + g.Kp + state_size);
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t first = segment * g.segment, count = std::min<int64_t>(g.segment, chunks - first);
      std::memcpy(states, starts + segment * state_size, static_cast<size_t>(state_size) * sizeof(float));
      for (int64_t c = 1; c < count; ++c) {
        float* const to = states + c * state_size;
        std::memcpy(to, to - state_size, static_cast<size_t>(state_size) * sizeof(float));
        advance(w, range.begin + first + c - 1, to);
      }
      for (int64_t c = count - 1; c >= 0; --c) {
        chunk(w, pass, (range.begin + first + c) * g.chunk, states + c * state_size);
      }
    }
    if (!p.dinitial_state || split > 0) return;
    for (int c = 0; c < g.K; ++c) {
      for (int e = 0; e < g.V; ++e) p.dinitial_state[at + c * p.V + e] = ds[int64_t{e} * g.Kp + c];
    }
  }

  // to [V, Kp] = the transpose of a state [K, V], or zeros.
  void read_state(float* to, const float* from) {
    zero(to, state_size);
    for (int c = 0; from && c < g.K; ++c) {
      for (int e = 0; e < g.V; ++e) to[int64_t{e} * g.Kp + c] = from[c * p.V + e];
    }
  }

  void read_keys(const Walk& w, int64_t s, int n) {
    load_rows(k, g.Kp, p.dtype, p.k, w.batch * p.k_stride_b + w.head * p.k_stride_h, p.k_stride_l, w, s, n, g.K);
    load_rows(v, g.Vp, p.dtype, p.v, w.batch * p.v_stride_b + w.head * p.v_stride_h, p.v_stride_l, w, s, n, g.V);
    d.load_gates(w, s, n);
  }

  void read_queries(const Walk& w, int64_t s, int n) {
    load_rows(q, g.Kp, p.dtype, p.q, w.batch * p.q_stride_b + w.head * p.q_stride_h, p.q_stride_l, w, s, n, g.K,
              p.scale);
    load_rows(grad, g.Vp, p.dtype, p.grad_out, w.batch * p.grad_out_stride_b + w.head * p.grad_out_stride_h,
              p.grad_out_stride_l, w, s, n, g.V);
  }

  int tokens_of(const Walk& w, int64_t s) const { return static_cast<int>(std::min<int64_t>(g.chunk, w.length - s)); }

  // state [V, Kp] from before a chunk to behind it
  void advance(const Walk& w, int64_t chunk, float* state) {
    const int64_t s = chunk * g.chunk;
    const int n = tokens_of(w, s);
    read_keys(w, s, n);
    d.keys_at_end(keys, k, n);
    decay_state(state);
    gemm_transposed(g.V, g.Kp, n, v, g.Vp, keys, g.Kp, state, state, g.Kp);
  }

  // dstate [V, Kp] from behind a chunk to before it
  void retreat(const Walk& w, int64_t chunk, float* dstate) {
    const int64_t s = chunk * g.chunk;
    const int n = tokens_of(w, s);
    read_queries(w, s, n);
    d.load_gates(w, s, n);
    d.queries_at_start(keys, q, n);
    decay_state(dstate);
    from_the_last(g.V, g.Kp, n, grad, g.Vp, keys, g.Kp, dstate, dstate, g.Kp);
  }

  void decay_state(float* state) {
    for (int e = 0; e < g.V; ++e) multiply_rows(state + int64_t{e} * g.Kp, state + int64_t{e} * g.Kp, d.total, g.Kp);
  }

  // behind[c] = e^b sum over values of S dS: both ends of the chunk
  void through(const float* state) {
    for (int c = 0; c < g.Kp; c += kLanes) {
      vf sum{};
      for (int e = 0; e < g.V; ++e)
        sum = fma(load(state + int64_t{e} * g.Kp + c), load(ds + int64_t{e} * g.Kp + c), sum);
      store(behind + c, sum * load(d.total + c));
    }
  }

  void chunk(const Walk& w, Pass pass, int64_t s, const float* state) {
    const int n = tokens_of(w, s);
    read_keys(w, s, n);
    read_queries(w, s, n);
    transpose_rows(kt, kMaxChunk, n, g.K, [&](int j) { return k + int64_t{j} * g.Kp; });
    transpose_rows(vt, kMaxChunk, n, g.V, [&](int j) { return v + int64_t{j} * g.Vp; });
    transpose_rows(grad + int64_t{n} * g.Vp, g.Vp, g.V, g.K, [&](int e) { return ds + int64_t{e} * g.Kp; });
    // dO S^T and v dS^T
    gemm(n, g.Kp, g.V, grad, g.Vp, state, g.Kp, nullptr, dq, g.Kp);
    gemm(n, g.Kp, g.V, v, g.Vp, ds, g.Kp, nullptr, dk, g.Kp);
    if (d.channel) {
      channels(w, n, state);
    } else {
      tokens(w, n, state);
    }
    put_rows(p.dq, p.dtype, p, w, s, n, g.K, dq, g.Kp, p.scale, pass, sums_q, g.Kp);
    put_rows(p.dk, p.dtype, p, w, s, n, g.K, dk, g.Kp, 1.f, pass, sums_k, g.Kp);
    put_rows(p.dv, p.dtype, p, w, s, n, g.V, dv, g.Vp, 1.f, pass, sums_v, g.Vp);
    if (d.channel) {
      put_rows(p.dg, p.gate_dtype, p, w, s, n, g.K, dgates, g.Kp, 1.f, pass, sums_g, g.Kp);
    } else if (p.gate != GateKind::kNone) {
      put_gates(w, s, n, pass);
    }
  }

  // dv = A^T dO + keys dS, of the scores and of the transposed keys behind them
  void values(int n) {
    for (int r = 0; r < n; r += g.block) {
      const int last = std::min(r + g.block, n);
      from_the_last(last - r, g.Vp, n - r + g.K, scores + r * kMaxChunk + r, kMaxChunk, grad + int64_t{r} * g.Vp, g.Vp,
                    nullptr, dv + int64_t{r} * g.Vp, g.Vp);
    }
  }

  // ---- one gate a token --------------------------------------------------------------------------------------------

  void tokens(const Walk& w, int n, const float* state) {
    d.make_ends(n);
    d.make_table(n, w.own);
    scores_of_tokens(d, n, q, kt, scores, kMaxChunk);
    for (int c = 0; c < g.K; ++c) {
      multiply_rows(scores + int64_t{n + c} * kMaxChunk, kt + c * kMaxChunk, d.to_end, round_up(n, kLanes));
    }
    values(n);
    for (int r = 0; r < n; r += kBlock) {
      const int last = std::min(r + kBlock, n), columns = round_up(last, kLanes);
      gemm(last - r, columns, g.V, grad + int64_t{r} * g.Vp, g.Vp, vt, kMaxChunk, nullptr, dscores + r * kMaxChunk,
           kMaxChunk);
      for (int i = r; i < last; ++i) {
        for (int j = 0; j < columns; j += kLanes) {
          const int64_t at = i * kMaxChunk + j;
          const vf decay = load(d.table + at), x = load(dscores + at);
          store(dscores + at, decay == set1(0.f) ? vf{} : x * decay);
          store(pairs + at, decay == set1(0.f) ? vf{} : x * load(scores + at));
        }
      }
    }
    for (int i = 0; i < n; ++i) {
      float *const of_q = dq + int64_t{i} * g.Kp, *const of_k = dk + int64_t{i} * g.Kp;
      multiply_by(of_q, d.from_start[i]);
      multiply_by(of_k, d.to_end[i]);
      gate_q[i] = dot(of_q, q + int64_t{i} * g.Kp, g.Kp);
      gate_k[i] = dot(of_k, k + int64_t{i} * g.Kp, g.Kp);
    }
    for (int r = 0; r < n; r += kBlock) {
      const int last = std::min(r + kBlock, n);
      float *const of_q = dq + int64_t{r} * g.Kp, *const of_k = dk + int64_t{r} * g.Kp;
      gemm(last - r, g.Kp, last, dscores + r * kMaxChunk, kMaxChunk, k, g.Kp, of_q, of_q, g.Kp);
      from_the_last(last - r, g.Kp, n - r, dscores + r * kMaxChunk + r, kMaxChunk, q + int64_t{r} * g.Kp, g.Kp, of_k,
                    of_k, g.Kp);
    }
    if (p.gate != GateKind::kNone) gates_of_tokens(n, state);
    decay_state(ds);
    for (int i = 0; i < n; ++i) {
      for (int e = 0; e < g.Vp; e += kLanes) {
        float* const x = grad + int64_t{i} * g.Vp + e;
        store(x, load(x) * set1(d.from_start[i]));
      }
    }
    from_the_last(g.V, g.Kp, n, grad, g.Vp, q, g.Kp, ds, ds, g.Kp);
  }

  EFFVIT_INLINE void multiply_by(float* x, float factor) const {
    for (int c = 0; c < g.Kp; c += kLanes) store(x + c, load(x + c) * set1(factor));
  }

  void gates_of_tokens(int n, const float* state) {
    through(state);
    vf all{};
    for (int c = 0; c < g.Kp; c += kLanes) all += load(behind + c);
    const float both_states = reduce_add(all);
    // From the last token on: column[j] = sum over tokens i >= t of the pairs (i, j); those with j < t count.
    alignas(64) float column[kMaxChunk] = {};
    float later = both_states;
    for (int t = n - 1; t >= 0; --t) {
      later += gate_q[t];
      vf sum{};
      for (int j = 0; j <= t; j += kLanes) {  // what lies behind the diagonal's block is not there
        const vf x = load(column + j) + load(pairs + t * kMaxChunk + j);
        store(column + j, x);
        sum += first_lanes(x, clamp_lanes(t - j));
      }
      dgate[t] = later + reduce_add(sum);
    }
    float earlier = 0.f;
    for (int t = 0; t < n; ++t) dgate[t] += earlier, earlier += gate_k[t];
  }

  void put_gates(const Walk& w, int64_t s, int n, Pass pass) {
    if (p.gate == GateKind::kHead) {
      for (int i = 0; i < n; ++i) head_sum += dgate[i];
      return;
    }
    for (int i = 0; i < n; ++i) {
      const int64_t at = (w.batch * p.L + w.token(s + i)) * p.H + w.head;
      float x = dgate[i];
      if (p.gate_dtype == DType::kFloat32) {
        float* const to = static_cast<float*>(p.dg) + at;
        *to = pass == Pass::kLast ? *to + x : x;
        continue;
      }
      if (pass == Pass::kFirst) {
        sums_g[w.place(s + i)] = x;
        continue;
      }
      if (pass == Pass::kLast) x += sums_g[w.place(s + i)];
      store_scalar(p.dg, p.gate_dtype, at, x);
    }
  }

  // ---- one gate a channel ------------------------------------------------------------------------------------------

  void channels(const Walk& w, int n, const float* state) {
    const int64_t count = int64_t{n} * g.Kp;
    d.make_channels(n);
    multiply_rows(near_q, q, d.within, count);
    multiply_rows(near_k, k, d.behind, count);
    scores_of_channels(d, n, w.own, q, kt, near_q, near_k, keys_t, scores, kMaxChunk);
    for (int c = 0; c < g.K; ++c) {
      for (int j = 0; j < n; j += kLanes) {
        store(scores + int64_t{n + c} * kMaxChunk + j, load(keys_t + c * kMaxChunk + j));
      }
    }
    for (int r = 0; r < n; r += kLanes) {
      const int last = std::min(r + kLanes, n);
      gemm(last - r, r + kLanes, g.V, grad + int64_t{r} * g.Vp, g.Vp, vt, kMaxChunk, nullptr, dscores + r * kMaxChunk,
           kMaxChunk);
      for (int i = r; i < last; ++i) {
        float *const row = dscores + i * kMaxChunk + r, *const own = pairs + i;
        *own = w.own ? row[i - r] : 0.f;
        store(row, first_lanes(load(row), i - r));  // the own token is no concern of a gate
      }
    }
    values(n);
    through(state);
    queries(n);
    keys_of_channels(n);
    for (int i = 0; i < n; ++i) {  // the own token
      const vf x = set1(pairs[i]);
      for (int c = 0; c < g.Kp; c += kLanes) {
        const int64_t at = int64_t{i} * g.Kp + c;
        store(dq + at, fma(x, load(k + at), load(dq + at)));
        store(dk + at, fma(x, load(q + at), load(dk + at)));
      }
    }
    decay_state(ds);
    from_the_last(g.V, g.Kp, n, grad, g.Vp, start_q, g.Kp, ds, ds, g.Kp);
  }

  // dq, without the own token's part: from dO S^T; start_q = q e^(b_i), keys = k e^(b - b_j), and of_state of every
  // block, the part of the gates before it that its queries and the state before the chunk make.
  void queries(int n) {
    for (int r = 0; r < n; r += kLanes) {
      const int last = std::min(r + kLanes, n), m = last - r;
      const int64_t at = int64_t{r} * g.Kp, end = at + int64_t{m} * g.Kp, block = int64_t{r / kLanes} * g.Kp;
      for (int c = 0; c < g.Kp; c += kLanes) {
        const vf before = load(d.before + block + c);
        vf sum{};
        for (int64_t i = at + c; i < end; i += g.Kp) {
          const vf x = load(dq + i), start = load(near_q + i) * before;
          sum = fma(start, x, sum);
          store(start_q + i, start);
          store(dq + i, x * before);
        }
        store(of_state + block + c, sum);
      }
      if (r > 0) {
        gemm(m, g.Kp, r, dscores + r * kMaxChunk, kMaxChunk, keys, g.Kp, dq + at, dq + at, g.Kp);
        for (int i = 0; i < r; ++i)
          multiply_rows(keys + int64_t{i} * g.Kp, keys + int64_t{i} * g.Kp, d.across + block, g.Kp);
      }
      std::memcpy(keys + at, near_k + at, static_cast<size_t>(m * g.Kp) * sizeof(float));
      multiply_rows(dq + at, dq + at, d.within + at, int64_t{m} * g.Kp);
      near_queries(m, r);
    }
  }

  // dq_i += sum over j < i of a diagonal block: dP_ij k_j e^(b_i - b_j). Up to any key, these sums, times q_i, are what
  // the gate behind it has of token i.
  void near_queries(int m, int r) {
    const int64_t at = int64_t{r} * g.Kp;
    for (int c = 0; c < g.Kp; c += kLanes) {
      vf decayed[kLanes], gates[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) decayed[j] = gates[j] = vf{};
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i >= m) break;
        const int64_t row = at + int64_t{i} * g.Kp + c;
        const float* const factor = dscores + (r + i) * kMaxChunk + r;
        const vf step = load(d.step + row), query = load(q + row);
        vf sum = load(dq + row);
#pragma GCC unroll 16
        for (int j = 0; j < i; ++j) {
          gates[j] = fma(query, sum, gates[j]);
          decayed[j] = decayed[j] * step;
          sum = fma(set1(factor[j]), decayed[j], sum);
        }
        gates[i] = query * sum;
        store(dq + row, sum);
        decayed[i] = load(k + row);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < m) store(dgates + at + int64_t{i} * g.Kp + c, gates[i]);
      }
    }
  }

  // dk, without the own token's part, from v dS^T; and the rest of the gates.
  void keys_of_channels(int n) {
    for (int r = (n - 1) / kLanes * kLanes; r >= 0; r -= kLanes) {
      const int last = std::min(r + kLanes, n), m = last - r;
      later_gates(m, r);
      if (r > 0)
        from_the_last(r, g.Kp, m, dscores + r * kMaxChunk, kMaxChunk, near_q + int64_t{r} * g.Kp, g.Kp, dk, dk, g.Kp);
      near_keys(m, r);
    }
  }

  // Of a block's gates, what keys before them make with tokens behind the block and the state behind the chunk. dk has
  // these for the block's end; it leaves with them for the block's start, or, of the block's own keys, for each.
  // `behind`: what both states make, and later blocks with the state before.
  void later_gates(int m, int r) {
    const int64_t ld = g.Kp, block = int64_t{r / kLanes} * ld;
    for (int c = 0; c < g.Kp; c += kLanes) {
      const vf across = load(d.across + block + c);
      vf sum{};
      for (int s = 0; s < r; s += kLanes) {
        sum = sum * load(d.across + int64_t{s / kLanes} * ld + c);
        for (int64_t j = s * ld + c; j < (s + kLanes) * ld; j += ld) {
          const vf x = load(dk + j);
          sum = fma(load(near_k + j), x, sum);
          store(dk + j, x * across);
        }
      }
      sum = fma(sum, across, load(behind + c));
      for (int64_t t = r * ld + c; t < (r + m) * ld; t += ld) {
        const vf x = load(dk + t);
        store(dgates + t, load(dgates + t) + sum);
        sum = fma(load(near_k + t), x, sum);
        store(dk + t, x * load(d.behind + t));
      }
      store(behind + c, load(behind + c) + load(of_state + block + c));
    }
  }

  // dk_j += sum over i > j of a diagonal block: dP_ij q_i e^(b_i - b_j)
  void near_keys(int m, int r) {
    const int64_t at = int64_t{r} * g.Kp;
    for (int c = 0; c < g.Kp; c += kLanes) {
      vf decayed[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) decayed[i] = vf{};
      vf step{};
#pragma GCC unroll 16
      for (int j = kLanes - 1; j >= 0; --j) {
        if (j >= m) continue;
        const int64_t row = at + int64_t{j} * g.Kp + c;
        vf sum = load(dk + row);
#pragma GCC unroll 16
        for (int i = kLanes - 1; i > j; --i) {
          decayed[i] = decayed[i] * step;
          sum = fma(set1(i < m ? dscores[(r + i) * kMaxChunk + r + j] : 0.f), decayed[i], sum);
        }
        store(dk + row, sum);
        step = load(d.step + row);
        decayed[j] = load(q + row);
      }
    }
  }
};

struct Parts : Backward {
  using Backward::Backward;
  void run(float* workspace, int64_t begin, int64_t end) { run_parts(workspace, begin, end); }
};

}  // namespace gated_linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
