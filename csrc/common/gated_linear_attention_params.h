// Sizes and strides of gated_linear_attention, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

// Which dims the gates have: none at all, [H], [B, L, H] or [B, L, H, K].
enum class GateKind : int32_t { kNone = 0, kHead = 1, kToken = 2, kChannel = 3 };
// Values of the schema's ints. Both: the sum of forward and reverse, the own token once.
enum class GateDirection : int32_t { kForward = 0, kReverse = 1, kBoth = 2 };

struct GatedLinearAttentionParams {
  // Inputs. A null pointer means that the argument was not given. All strides are in elements.
  const void* q = nullptr;  // [B, L, H, K], last stride 1
  const void* k = nullptr;  // [B, L, H, K], last stride 1
  const void* v = nullptr;  // [B, L, H, V], last stride 1
  const void* g = nullptr;  // [H] or [B, L, H], any strides, or [B, L, H, K], last stride 1; gate_dtype
  const int32_t* cu_seqlens = nullptr;  // [N + 1], contiguous; then B is 1
  const float* initial_state = nullptr;  // [N, H, K, V], contiguous

  // Outputs of forward. N is B without cu_seqlens.
  void* out = nullptr;  // [B, L, H, V], contiguous
  float* state = nullptr;  // [N, H, K, V], contiguous; null where both directions are summed

  // Backward only. A null gradient is not wanted.
  const void* grad_out = nullptr;  // [B, L, H, V], last stride 1
  const float* grad_state = nullptr;  // [N, H, K, V], contiguous, may be null
  void* dq = nullptr;  // [B, L, H, K], contiguous
  void* dk = nullptr;  // [B, L, H, K], contiguous
  void* dv = nullptr;  // [B, L, H, V], contiguous
  void* dg = nullptr;  // like g, contiguous, gate_dtype; null exactly where g is
  float* dinitial_state = nullptr;  // [N, H, K, V], contiguous; null exactly where initial_state is

  int64_t B = 0, L = 0, H = 0, K = 0, V = 0;
  int64_t N = 0;  // sequences: B, or the segments of cu_seqlens
  int64_t q_stride_b = 0, q_stride_l = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_l = 0, k_stride_h = 0;
  int64_t v_stride_b = 0, v_stride_l = 0, v_stride_h = 0;
  int64_t g_stride_b = 0, g_stride_l = 0, g_stride_h = 0;  // 0 for the dims that g lacks
  int64_t grad_out_stride_b = 0, grad_out_stride_l = 0, grad_out_stride_h = 0;

  float scale = 1.f;
  GateKind gate = GateKind::kNone;
  GateDirection direction = GateDirection::kForward;
  DType dtype = DType::kFloat32;  // q, k, v, out, grad_out and their gradients
  DType gate_dtype = DType::kFloat32;
};

// Tokens [begin, end) of a sequence of batch item `batch`; all of them without cu_seqlens.
struct GatedRange {
  int64_t batch, begin, end;
};

// Offsets outside [0, L] or out of order would be read from a GPU's memory unchecked: they are cut.
EFFVIT_HD GatedRange gated_range(const GatedLinearAttentionParams& p, int64_t sequence, int32_t first, int32_t last) {
  if (p.cu_seqlens == nullptr) return {sequence, 0, p.L};
  const int64_t begin = first < 0 ? 0 : first > p.L ? p.L : first;
  const int64_t end = last < begin ? begin : last > p.L ? p.L : last;
  return {0, begin, end};
}

}  // namespace effvit
