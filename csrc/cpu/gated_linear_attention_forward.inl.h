// gated_linear_attention on the CPU: forward. Included by gated_linear_attention_kernel.inl.h.
//
// A unit walks one head of a sequence, in chunks; S is the state [K, V] before a chunk. With the rows of [q e^b | A], A
// the scores within the chunk, on the left, and S over v on the right, a block of outputs is one product.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace gated_linear_attention_impl {

struct Forward {
  const Params& p;
  const Geometry g;
  Decays d;
  int Vb, Vbp;  // values of a block of them, the last one perhaps fewer
  int64_t ldl;
  float *q, *k, *kt;  // [64, Kp], [64, Kp], [K, 64]
  float *near_q, *near_k, *keys_t;  // where channels have gates
  float* left;  // [64, ldl]: q e^b, scores
  float* right;  // [K + 64, Vbp]: S, v
  float* out;  // [64, Vbp]
  float* sums;  // of two walks, [L, Vbp] where the output is rounded

  Forward(const Params& params, const Geometry& geometry, Scratch& s) : p(params), g(geometry), d(p, g, s) {
    Vb = static_cast<int>(ceil_div(ceil_div(g.V, g.v_blocks), 16) * 16);
    Vb = std::min(Vb, g.V), Vbp = round_up(Vb, kLanes);
    ldl = round_up(g.K, 16) + kMaxChunk + 16;  // not a multiple of a page's fraction
    const int64_t rows = int64_t{kMaxChunk} * g.Kp, columns = int64_t{g.K} * kMaxChunk;
    q = s.take<float>(rows), k = s.take<float>(rows), kt = s.take<float>(columns);
    near_q = s.take<float>(d.channel ? rows : 0), near_k = s.take<float>(d.channel ? rows : 0);
    keys_t = s.take<float>(d.channel ? columns : 0);
    left = s.take<float>(kMaxChunk * ldl), right = s.take<float>(int64_t{g.K + kMaxChunk} * Vbp);
    out = s.take<float>(int64_t{kMaxChunk} * Vbp);
    const bool rounded = p.direction == GateDirection::kBoth && p.dtype != DType::kFloat32;
    sums = s.take<float>(rounded ? p.L * Vbp : 0);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / g.v_blocks, first = unit % g.v_blocks * Vb;
      const int width = static_cast<int>(std::min<int64_t>(Vb, g.V - first));
      if (width <= 0) continue;
      for_walks(p, head / p.H, head % p.H, [&](const Walk& w, Pass pass) { walk(w, pass, first, width); });
    }
  }

  void walk(const Walk& w, Pass pass, int64_t first, int width) {
    const int64_t at = (w.sequence * p.H + w.head) * p.K * p.V + first;
    for (int c = 0; c < g.K; ++c) {
      float* const row = right + int64_t{c} * Vbp;
      zero(row, Vbp);
      if (p.initial_state) load_row(row, p.initial_state + at + c * p.V, width);
    }
    d.begin();
    for (int64_t s = 0; s < w.length; s += g.chunk) {
      const int n = static_cast<int>(std::min<int64_t>(g.chunk, w.length - s));
      read(w, s, n, first, width);
      const float* const keys = d.channel ? channels(w, n) : tokens(w, n);
      for (int r = 0; r < n; r += g.block) {
        const int last = std::min(r + g.block, n);
        gemm(last - r, Vbp, g.K + last, left + r * ldl, ldl, right, Vbp, nullptr, out + int64_t{r} * Vbp, Vbp);
      }
      put_rows(p.out, p.dtype, p, w, s, n, g.V, out, Vbp, 1.f, pass, sums, Vbp, first, width);
      if (p.state || s + n < w.length) update(n, keys);
    }
    if (!p.state) return;
    for (int c = 0; c < g.K; ++c) store_row(p.state + at + c * p.V, right + int64_t{c} * Vbp, width);
  }

  void read(const Walk& w, int64_t s, int n, int64_t first, int width) {
    load_rows(q, g.Kp, p.dtype, p.q, w.batch * p.q_stride_b + w.head * p.q_stride_h, p.q_stride_l, w, s, n, g.K,
              p.scale);
    load_rows(k, g.Kp, p.dtype, p.k, w.batch * p.k_stride_b + w.head * p.k_stride_h, p.k_stride_l, w, s, n, g.K);
    load_rows(right + int64_t{g.K} * Vbp, Vbp, p.dtype, p.v, w.batch * p.v_stride_b + w.head * p.v_stride_h + first,
              p.v_stride_l, w, s, n, width);
    d.load_gates(w, s, n);
    transpose_rows(kt, kMaxChunk, n, g.K, [&](int j) { return k + int64_t{j} * g.Kp; });
  }

  // Fills `left`; returns the transposed keys that the state takes.
  const float* tokens(const Walk& w, int n) {
    d.make_ends(n);
    d.make_table(n, w.own);
    for (int i = 0; i < n; ++i) load_row(left + i * ldl, q + int64_t{i} * g.Kp, g.K, d.from_start[i]);
    scores_of_tokens(d, n, q, kt, left + g.K, ldl);
    for (int c = 0; c < g.K; ++c) {
      float* const row = kt + c * kMaxChunk;
      multiply_rows(row, row, d.to_end, round_up(n, kLanes));
    }
    return kt;
  }

  const float* channels(const Walk& w, int n) {
    d.make_channels(n);
    multiply_rows(near_q, q, d.within, int64_t{n} * g.Kp);
    multiply_rows(near_k, k, d.behind, int64_t{n} * g.Kp);
    for (int i = 0; i < n; ++i) {
      const float *const from = near_q + int64_t{i} * g.Kp, *const before = d.before + int64_t{i / kLanes} * g.Kp;
      for (int c = 0; c < g.Kp; c += kLanes) store(left + i * ldl + c, load(from + c) * load(before + c));
    }
    scores_of_channels(d, n, w.own, q, kt, near_q, near_k, keys_t, left + g.K, ldl);
    return keys_t;
  }

  // S = e^b S + keys^T v
  void update(int n, const float* keys) {
    for (int c = 0; c < g.K; ++c) {
      float* const row = right + int64_t{c} * Vbp;
      const vf decay = set1(d.total[c]);
      for (int e = 0; e < Vbp; e += kLanes) store(row + e, load(row + e) * decay);
    }
    gemm(g.K, Vbp, n, keys, kMaxChunk, right + int64_t{g.K} * Vbp, Vbp, right, right, Vbp);
  }
};

}  // namespace gated_linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
