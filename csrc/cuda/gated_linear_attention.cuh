// Gated linear attention, every kind of gate, both directions, forward and backward: device code and launch, on prim
// only.
//
// Sequences are cut into chunks of 64 tokens. `state` computes in parallel what each chunk adds to the state, `scan`
// walks over the chunks of a sequence, element by element of the state, and leaves in every chunk's slot the state that
// meets it; `out` adds to q times that state what the chunk's tokens see of each other. A warp has a sub-chunk of 16
// tokens. What these see of earlier sub-chunks is a matrix product, of queries and keys that are both referred to the
// sub-chunk's first token; what they see of each other is summed up pair by pair, a lane having a channel. So every
// exponential is of gates from an earlier to a later token, at most 0. Gates of heads and tokens take the same way.
//
// Backward: the gradient of the state obeys the same recurrence, walked the other way with q for k and grad_out for v,
// a gate acting behind its token (`dual`). So `state` and `scan` give it, and `out` gives dv. `grad` has both states
// and gives dq, dk and the gates' gradients.
//
// Both directions together are two walks; the second one adds to float32 results of the first.
#pragma once
#include "gated_linear_attention_grad.cuh"
#include "gated_linear_attention_output.cuh"
#include "gated_linear_attention_state.cuh"

namespace effvit {
namespace cuda {
namespace gated_linear_attention_impl {

// ---- plan ----

inline bool is_both(const GatedLinearAttentionParams& p) { return p.direction == GateDirection::kBoth; }
inline int64_t count_chunks(const GatedLinearAttentionParams& p) { return ceil_div(p.L, kChunk); }
inline int64_t count_slots(const GatedLinearAttentionParams& p) {
  if (p.N == 0) return 0;  // of offsets there is but the first
  return p.cu_seqlens != nullptr ? p.L / kChunk + p.N : p.N * count_chunks(p);
}
inline int64_t block_count(int64_t dim, int block) { return ceil_div(dim, block); }

// Scratch memory, in floats.
struct Workspace {
  float *states = nullptr, *dstates = nullptr, *decays = nullptr;
  float *out = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr, *dg = nullptr;  // of the first of two walks
  float* parts = nullptr;  // of the gates' gradients
  int64_t part = 0;  // floats of one walk's
  size_t bytes = 0;

  Workspace(const GatedLinearAttentionParams& p, void* base, bool backward) {
    const auto take = [&](float*& to, bool wanted, int64_t floats) {
      if (!wanted) return;
      to = reinterpret_cast<float*>(static_cast<char*>(base) + bytes);
      bytes += static_cast<size_t>(ceil_div(floats, 4) * 16);
    };
    const int64_t slots = count_slots(p), states_size = slots * p.H * p.K * p.V;
    const int64_t of_k = p.B * p.L * p.H * p.K, of_v = p.B * p.L * p.H * p.V;
    const bool both = is_both(p);
    take(states, true, states_size);
    take(decays, true, slots * p.H * p.K);
    take(out, both && !backward, of_v);
    take(dstates, backward, states_size);
    take(dv, both && backward, of_v);
    take(dq, both && backward, of_k);
    take(dk, both && backward, of_k);
    take(dg, both && backward && p.gate == GateKind::kChannel, of_k);
    if (p.gate == GateKind::kHead) part = slots * block_count(p.K, kBlockK) * p.H;
    if (p.gate == GateKind::kToken) part = block_count(p.K, kBlockK) * p.B * p.L * p.H;
    take(parts, backward && part != 0, part * (both ? 2 : 1));
  }
};

struct Inputs {
  Tokens q, k, v, grad_out;
  explicit Inputs(const GatedLinearAttentionParams& p)
      : q(make_tokens(p.dtype, p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h, p.K)),
        k(make_tokens(p.dtype, p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h, p.K)),
        v(make_tokens(p.dtype, p.v, p.v_stride_b, p.v_stride_l, p.v_stride_h, p.V)),
        grad_out(make_tokens(p.dtype, p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h, p.V)) {
  }
};

inline Pass make_pass(const GatedLinearAttentionParams& p, int step, bool dual) {
  Pass g = {};
  g.p = p;
  g.x_scale = g.y_scale = 1.f;
  g.step = dual ? -step : step;
  g.dual = dual;
  g.chunks = count_chunks(p);
  g.slots = count_slots(p);
  g.k_blocks = static_cast<int32_t>(block_count(p.K, kBlockK));
  g.v_blocks = static_cast<int32_t>(block_count(p.V, kBlockV));
  g.to_type = p.dtype;
  return g;
}

// ---- launches ----

// The states that meet the chunks, or, dual, the gradients of those that leave them.
template <class T>
cudaError_t launch_states(const GatedLinearAttentionParams& p, const Workspace& w, int step, bool dual,
                          cudaStream_t stream) {
  const Inputs in(p);
  Pass g = make_pass(p, step, dual);
  g.x = dual ? in.q : in.k, g.y = dual ? in.grad_out : in.v;
  g.x_scale = dual ? p.scale : 1.f;
  g.states = dual ? w.dstates : w.states;
  g.decays = dual ? nullptr : w.decays;
  g.ctas = g.slots * p.H * g.k_blocks * g.v_blocks;
  if (g.ctas != 0) {
    const cudaError_t error = EFFVIT_LAUNCH((gated_linear_attention_state_kernel<T>), grid_size(g.ctas), kThreads,
                                            StateLayout<T>::kBytes, stream, g);
    if (error != cudaSuccess) return error;
  }
  g.decays = w.decays;
  g.initial = dual ? p.grad_state : p.initial_state;
  g.total = dual ? p.dinitial_state : p.state;
  const int64_t elements = p.N * p.H * p.K * p.V;
  if (elements == 0) return cudaSuccess;
  return EFFVIT_LAUNCH((gated_linear_attention_scan_kernel<int64_t>), grid_size(ceil_div(elements, kThreads)), kThreads,
                       0, stream, g);
}

// out, or, dual, dv.
template <class T>
cudaError_t launch_out(const GatedLinearAttentionParams& p, const Workspace& w, int step, bool dual, bool second,
                       void* to, float* first, cudaStream_t stream) {
  const Inputs in(p);
  Pass g = make_pass(p, step, dual);
  g.x = dual ? in.k : in.q, g.y = dual ? in.q : in.k, g.values = dual ? in.grad_out : in.v;
  (dual ? g.y_scale : g.x_scale) = p.scale;
  g.states = dual ? w.dstates : w.states;
  g.strict = second;
  g.to = to;
  if (first != nullptr && second) g.prior = first;
  if (first != nullptr && !second) g.to = first, g.to_type = DType::kFloat32;
  g.ctas = g.slots * p.H * g.v_blocks;
  if (g.ctas == 0) return cudaSuccess;
  return EFFVIT_LAUNCH((gated_linear_attention_out_kernel<T>), grid_size(g.ctas), kThreads, OutputLayout<T>::kBytes,
                       stream, g);
}

template <class T>
cudaError_t launch_grad(const GatedLinearAttentionParams& p, const Workspace& w, int step, bool second,
                        cudaStream_t stream) {
  const Inputs in(p);
  Pass g = make_pass(p, step, false);
  g.x = in.q, g.y = in.k, g.values = in.v, g.grad_out = in.grad_out;
  g.x_scale = p.scale;
  g.states = w.states, g.dstates = w.dstates;
  g.strict = second;
  g.to = p.dq, g.to_dk = p.dk, g.to_dg = p.dg, g.dg_type = p.gate_dtype;
  if (w.dq != nullptr && second) g.prior = w.dq, g.prior_dk = w.dk, g.prior_dg = w.dg;
  if (w.dq != nullptr && !second) {
    g.to = w.dq, g.to_dk = w.dk, g.to_dg = w.dg;
    g.to_type = g.dg_type = DType::kFloat32;
  }
  if (w.parts != nullptr) g.to_dg = w.parts + (second ? w.part : 0);
  g.ctas = g.slots * p.H * g.k_blocks;
  if (g.ctas == 0) return cudaSuccess;
  return EFFVIT_LAUNCH((gated_linear_attention_grad_kernel<T>), grid_size(g.ctas), kThreads, GradLayout<T>::kBytes,
                       stream, g);
}

// The gradients of gates that channels share.
inline cudaError_t launch_gate_sums(const GatedLinearAttentionParams& p, const Workspace& w, cudaStream_t stream) {
  if (p.gate != GateKind::kHead && p.gate != GateKind::kToken) return cudaSuccess;
  Parts s = {};
  s.from = w.parts, s.to = p.dg, s.type = p.gate_dtype;
  s.count = p.gate == GateKind::kHead ? p.H : p.B * p.L * p.H;
  if (s.count == 0) return cudaSuccess;
  s.parts = w.part / s.count * (is_both(p) ? 2 : 1);
  if (p.gate == GateKind::kHead)
    return EFFVIT_LAUNCH((gated_linear_attention_sum_kernel<int64_t>), grid_size(s.count), kThreads, kWarps * 4, stream,
                         s);
  return EFFVIT_LAUNCH((gated_linear_attention_add_kernel<int64_t>), grid_size(ceil_div(s.count, kThreads)), kThreads,
                       0, stream, s);
}

inline cudaError_t launch_fill(const GatedLinearAttentionParams& p, void* to, int64_t bytes_per_token,
                               cudaStream_t stream) {
  if (p.cu_seqlens == nullptr || to == nullptr || p.L == 0) return cudaSuccess;
  const int64_t ctas = ceil_div(p.L * bytes_per_token, 16 * kThreads);
  return EFFVIT_LAUNCH((gated_linear_attention_fill_kernel<int64_t>), grid_size(ctas), kThreads, 0, stream, p, to,
                       bytes_per_token / 2);
}

inline void register_inputs(prim::GlobalRanges& ranges, const GatedLinearAttentionParams& p) {
  const auto rows = [&](int64_t b, int64_t l, int64_t h, int64_t dim) {
    return extent_bytes(p.dtype, {{p.B, b}, {p.L, l}, {p.H, h}, {dim, 1}});
  };
  ranges.read(p.q, rows(p.q_stride_b, p.q_stride_l, p.q_stride_h, p.K));
  ranges.read(p.k, rows(p.k_stride_b, p.k_stride_l, p.k_stride_h, p.K));
  ranges.read(p.v, rows(p.v_stride_b, p.v_stride_l, p.v_stride_h, p.V));
  if (p.grad_out != nullptr)
    ranges.read(p.grad_out, rows(p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h, p.V));
  const bool per_token = p.gate == GateKind::kToken || p.gate == GateKind::kChannel;
  ranges.read(p.g, extent_bytes(p.gate_dtype, {{per_token ? p.B : 1, p.g_stride_b},
                                               {per_token ? p.L : 1, p.g_stride_l},
                                               {p.H, p.g_stride_h},
                                               {p.gate == GateKind::kChannel ? p.K : 1, 1}}));
  ranges.read(p.cu_seqlens, tensor_bytes(DType::kFloat32, p.N + 1));
  const int64_t states = p.N * p.H * p.K * p.V;
  ranges.read(p.initial_state, tensor_bytes(DType::kFloat32, states));
  ranges.read(p.grad_state, tensor_bytes(DType::kFloat32, states));
}

// f(step, second) for each walk.
template <class F>
cudaError_t for_each_walk(const GatedLinearAttentionParams& p, const F& f) {
  if (p.direction != GateDirection::kBoth) return f(p.direction == GateDirection::kReverse ? -1 : 1, false);
  const cudaError_t error = f(1, false);
  return error != cudaSuccess ? error : f(-1, true);
}

}  // namespace gated_linear_attention_impl
}  // namespace cuda

inline size_t gated_linear_attention_fwd_workspace_bytes(const GatedLinearAttentionParams& p) {
  return cuda::gated_linear_attention_impl::Workspace(p, nullptr, false).bytes;
}

inline size_t gated_linear_attention_bwd_workspace_bytes(const GatedLinearAttentionParams& p) {
  return cuda::gated_linear_attention_impl::Workspace(p, nullptr, true).bytes;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_gated_linear_attention_fwd(const GatedLinearAttentionParams& p, void* workspace,
                                              cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::gated_linear_attention_impl;
  const Workspace w(p, workspace, false);
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.write(workspace, w.bytes);
  ranges.write_once(p.out, tensor_bytes(p.dtype, p.B * p.L * p.H * p.V));
  ranges.write_once(p.state, tensor_bytes(DType::kFloat32, p.N * p.H * p.K * p.V));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    const cudaError_t status = for_each_walk(p, [&](int step, bool second) {
      const cudaError_t states = launch_states<T>(p, w, step, false, stream);
      if (states != cudaSuccess) return states;
      return launch_out<T>(p, w, step, false, second, p.out, w.out, stream);
    });
    if (status != cudaSuccess) return status;
    return launch_fill(p, p.out, p.H * p.V * element_bytes(p.dtype), stream);
  });
  ranges.finish();
  return error;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_gated_linear_attention_bwd(const GatedLinearAttentionParams& p, void* workspace,
                                              cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::gated_linear_attention_impl;
  const Workspace w(p, workspace, true);
  const int64_t size = element_bytes(p.dtype), gate_size = element_bytes(p.gate_dtype);
  const int64_t tokens = p.B * p.L * p.H;
  const int64_t gates = p.gate == GateKind::kHead ? p.H : p.gate == GateKind::kToken ? tokens : tokens * p.K;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.write(workspace, w.bytes);
  ranges.write_once(p.dq, static_cast<uint64_t>(tokens * p.K * size));
  ranges.write_once(p.dk, static_cast<uint64_t>(tokens * p.K * size));
  ranges.write_once(p.dv, static_cast<uint64_t>(tokens * p.V * size));
  ranges.write_once(p.dg, static_cast<uint64_t>(p.dg == nullptr ? 0 : gates * gate_size));
  ranges.write_once(p.dinitial_state, tensor_bytes(DType::kFloat32, p.N * p.H * p.K * p.V));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t status = for_each_walk(p, [&](int step, bool second) {
      cudaError_t walk = launch_states<T>(p, w, step, false, stream);
      if (walk == cudaSuccess) walk = launch_states<T>(p, w, step, true, stream);
      if (walk == cudaSuccess) walk = launch_out<T>(p, w, step, true, second, p.dv, w.dv, stream);
      if (walk == cudaSuccess) walk = launch_grad<T>(p, w, step, second, stream);
      return walk;
    });
    const auto then = [&](auto launch) {
      if (status == cudaSuccess) status = launch();
    };
    then([&] { return launch_fill(p, p.dq, p.H * p.K * size, stream); });
    then([&] { return launch_fill(p, p.dk, p.H * p.K * size, stream); });
    then([&] { return launch_fill(p, p.dv, p.H * p.V * size, stream); });
    then([&] { return launch_gate_sums(p, w, stream); });
    const int64_t gate_bytes = p.H * (p.gate == GateKind::kChannel ? p.K : 1) * gate_size;
    if (p.gate == GateKind::kToken || p.gate == GateKind::kChannel)
      then([&] { return launch_fill(p, p.dg, gate_bytes, stream); });
    return status;
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
