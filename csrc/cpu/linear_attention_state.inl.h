// linear_attention on the CPU: states, of a head, of a unit and of all splits. Included by
// linear_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

// A padded state, [K, Vp] and z [Kp], from contiguous tensors [K, V] and [K]; zeros where they are null.
void load_state(const Plan& plan, float* slot, const float* state, const float* z) {
  zero(slot, plan.slot);
  float* const to_z = slot + int64_t{plan.Kp} * plan.Vp;
  if (state) {
    for (int c = 0; c < plan.K; ++c) load_row(slot + int64_t{c} * plan.Vp, state + int64_t{c} * plan.V, plan.V);
  }
  if (z) std::memcpy(to_z, z, static_cast<size_t>(plan.K) * sizeof(float));
}

void store_state(const Plan& plan, const float* slot, float* state, float* z) {
  if (state) {
    for (int c = 0; c < plan.K; ++c) store_row(state + int64_t{c} * plan.V, slot + int64_t{c} * plan.Vp, plan.V);
  }
  if (z) std::memcpy(z, slot + int64_t{plan.Kp} * plan.Vp, static_cast<size_t>(plan.K) * sizeof(float));
}

// One state per head: `first` is that of head h0.
struct States {
  float* first;
  int64_t h0, stride;
  EFFVIT_INLINE float* operator()(int64_t head) const { return first + (head - h0) * stride; }
};

// Partial states in the workspace: [N, splits, H] slots.
States states_of(const Params& p, const Plan& plan, float* base, int64_t n, int64_t split) {
  return {base + (n * plan.splits + split) * p.H * plan.slot, 0, plan.slot};
}

// The slots of one (sequence, head), from the partial sums of its splits to what precedes each of them, in order or
// backwards; or all of it in slot 0, where the form is not causal. `total` starts as what precedes them all, and
// returns with the sum.
template <class Slot>
void sum_slots(const Plan& plan, bool causal, bool backwards, float* total, const Slot& slot) {
  for (int64_t i = 0; i < plan.splits; ++i) {
    float* const here = slot(backwards ? plan.splits - 1 - i : i);
    float *const z = plan.z_of(total), *const z_here = plan.z_of(here);
    for (float *sum = total, *x = here; sum < z; sum += kLanes, x += kLanes) {
      const vf before = load(sum), part = load(x);
      if (causal) store(x, before);
      store(sum, before + part);
    }
    for (int c = 0; c < plan.Kp; c += kLanes) {
      const vf before = load(z + c), lost = load(z + plan.Kp + c), part = load(z_here + c);
      if (causal) store(z_here + c, before), store(z_here + plan.Kp + c, lost);
      add_compensated(z + c, z + plan.Kp + c, part);
    }
  }
  if (!causal) std::memcpy(slot(0), total, static_cast<size_t>(plan.slot) * sizeof(float));
}

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
