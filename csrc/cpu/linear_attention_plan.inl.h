// linear_attention on the CPU: how the work is cut, where its rows lie, and the walk over them. Included by
// linear_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

using Params = LinearAttentionParams;

constexpr int kChunk = 64;  // tokens that go through L1 at once, at most
static_assert(kChunk <= 64, "kBf16MaxRows");
constexpr int kMaxSplits = 32;

// How much is done at once.
struct Limits {
  int chunk = kChunk;
  int64_t target_units = 64;
  int64_t state_floats = 48 << 10;  // of the states that a unit works on: they stay in L2
  int64_t chunk_bytes = 128 << 10;  // of a chunk's rows, all heads of a unit
  int64_t stream_bytes = 16 << 20;  // of a gradient or of out that is written past the caches
  int64_t ahead_bytes = 512;  // of a token's heads in a unit: from there on the next chunk is fetched ahead
  int64_t worth = 4;  // tokens that are worth a state of their own, per row or column of it

  explicit Limits(const Params& p) {
    if (p.dtype == DType::kBFloat16 && kBf16Products<BFloat16>) ahead_bytes = 256;
    if (!small_tiles()) return;
    chunk = 24, target_units = 4, state_floats = 2 << 10, chunk_bytes = 2 << 10, stream_bytes = 0, ahead_bytes = 0;
    worth = 0;
  }
};

LinearAttentionRange tokens_of(const Params& p, int64_t sequence, int64_t size) {
  if (!p.cu_seqlens) return {sequence, 0, size};
  return linear_attention_range(p, sequence, size, p.cu_seqlens[sequence], p.cu_seqlens[sequence + 1]);
}

// How the work is cut, from the shape alone. Long sequences are cut into ranges of tokens and keep many heads together;
// short ones are not cut, and heads go apart instead.
struct Plan {
  Limits limits;
  int K, V, Kp, Vp;  // head dims, and rounded up to whole vectors
  int64_t slot;  // floats of one partial state: [Kp, Vp], then z [Kp] and what its additions lost [Kp]
  int64_t splits, groups;  // ranges of tokens in a sequence, groups of heads
  int chunk;
  bool whole;  // a unit does all phases of its sequence and heads
  // The workspace, in floats: partial S of every split, partial dS, then scale/d and r of every token and head.
  int64_t grads_offset = 0, tokens_offset = 0, workspace = 0;

  Plan(const Params& p, bool backward) : limits(p) {
    K = static_cast<int>(p.K), V = static_cast<int>(p.V);
    Kp = round_up(K, kLanes), Vp = round_up(V, kLanes);
    slot = int64_t{Kp} * Vp + 2 * Kp;
    chunk = p.causal && K <= 64 && V <= 64 ? limits.chunk / 2 : limits.chunk;
    int64_t longest = std::max(p.L, p.M);
    if (p.cu_seqlens) {
      longest = 0;
      for (int64_t n = 0; n < p.N; ++n) {
        const auto range = tokens_of(p, n, p.L);
        longest = std::max(longest, range.end - range.begin);
      }
    }
    const int64_t pairs = p.N * p.H;
    const int64_t fit = std::max<int64_t>(1, limits.state_floats / (backward ? 2 : 1) / slot);
    const int64_t together = std::min(p.H, fit);  // heads of a group at most
    // A piece is worth its partial state from some tokens on; a few heads of a short sequence are cut finer.
    const int64_t few = std::max(32, std::min(K, V));
    const int64_t worth = limits.worth == 0 ? 8 : pairs < 4 ? few : limits.worth * std::max(K, V);
    splits = ceil_div(limits.target_units, std::max<int64_t>(1, p.N * ceil_div(p.H, together)));
    splits = std::max<int64_t>(1, std::min<int64_t>({splits, longest / worth, kMaxSplits}));
    if (p.quadratic) splits = 1;
    const int64_t heads = std::max<int64_t>(1, std::min(together, pairs * splits / (limits.target_units / 2)));
    groups = p.quadratic ? p.H : ceil_div(p.H, heads);
    // The chunk at work and the next one are to stay in L2 beside the states.
    const int64_t bytes = chunk * std::min(heads, p.H) * (K + V) * element_bytes(p.dtype);
    if (!p.causal && !p.quadratic && bytes > limits.chunk_bytes) chunk = limits.chunk / 2;
    whole = splits == 1;
    const int64_t slots = whole ? 0 : p.N * splits * p.H * slot;
    grads_offset = backward && !p.causal ? 0 : slots;
    tokens_offset = grads_offset + (backward ? slots : 0);
    workspace = tokens_offset + (backward && (p.causal || p.quadratic) ? 2 * p.B * p.L * p.H : 0);
  }
  // Whether a tensor of so many rows of heads is written past the caches.
  template <class T>
  bool streams(const void* rows, int64_t count, int64_t width) const {
    const int64_t bytes = count * width * static_cast<int64_t>(sizeof(T));
    return EFFVIT_ISA_NAME::streams<T>(rows, width, bytes, limits.stream_bytes);
  }
  float* z_of(float* state) const { return state + int64_t{Kp} * Vp; }  // of a transposed state too
};

// Phases 1 and 3, in either direction, sum up partial states: their units are (sequence, head), not a Unit.
constexpr bool sums_states(int phase) { return phase == 1 || phase == 3; }

// One piece of a phase: tokens [begin, end) of a sequence are those of `split`, for heads [h0, h1).
struct Unit {
  int64_t n, split, h0, h1;
  Unit(const Params& p, const Plan& plan, int64_t index) {
    const int64_t group = index % plan.groups;
    split = index / plan.groups % plan.splits;
    n = index / plan.groups / plan.splits;
    h0 = p.H * group / plan.groups, h1 = p.H * (group + 1) / plan.groups;
  }
  LinearAttentionRange tokens(const Params& p, const Plan& plan, int64_t size) const {
    const auto all = tokens_of(p, n, size);
    const int64_t count = all.end - all.begin;
    return {all.batch, all.begin + count * split / plan.splits, all.begin + count * (split + 1) / plan.splits};
  }
};

// Rows of a [B, tokens, H, D] tensor in one batch item.
template <class T>
Rows<const T> rows(const void* base, int64_t batch, int64_t stride_b, int64_t stride_l, int64_t stride_h) {
  if (!base) return {};
  return {static_cast<const T*>(base) + batch * stride_b, stride_l, stride_h};
}
template <class T>
Rows<T> contiguous_rows(void* base, int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
  if (!base) return {};
  return {static_cast<T*>(base) + batch * tokens * heads * width, heads * width, width};
}

// Calls f(first token, tokens, head) for the chunks of [begin, end), all heads within a chunk; from the last chunk
// backwards if asked to. f takes about `steps` steps of `ahead`.
template <class F>
EFFVIT_INLINE void walk(Ahead& ahead, const Plan& plan, int64_t begin, int64_t end, int64_t h0, int64_t h1, int steps,
                        bool reverse, const F& f) {
  const int chunk = plan.chunk;
  const int64_t chunks = ceil_div(end - begin, chunk);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t at = begin + (reverse ? chunks - 1 - i : i) * chunk;
    const int n = static_cast<int>(std::min<int64_t>(chunk, end - at));
    const int64_t next = reverse ? at - chunk : at + n;
    ahead.plan(std::max(next, begin), reverse ? (i + 1 < chunks ? at : begin) : std::min(next + chunk, end), h0, h1,
               (h1 - h0) * steps, plan.limits.ahead_bytes);
    for (int64_t h = h0; h < h1; ++h) f(at, n, h);
  }
}

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
