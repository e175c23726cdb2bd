"""Mutants of the gated linear attention kernels."""

import ctypes
import functools

import numpy as np
from mutants import Mutant, bf16, bf16_values, call, check_seeds, from_bf16, nbytes, pointer

HARNESS = "tests/prim/gated_linear_attention_harness.cpp"
COMMON, STATE, OUTPUT, GRAD, LAUNCH = (
    f"csrc/cuda/gated_linear_attention{part}.cuh" for part in ("_common", "_state", "_output", "_grad", "")
)
HEAD, TOKEN, CHANNEL = 1, 2, 3
# B, L, H, K, V, gate, direction; initial_state, lengths of sequences
CASES = [
    ((1, 150, 1, 40, 72, CHANNEL, 0), True, None),  # three chunks, two blocks of channels and of columns of v
    ((2, 70, 1, 12, 8, TOKEN, 2), False, None),  # both directions
    ((1, 64, 2, 8, 20, HEAD, 1), True, None),  # in reverse
    ((1, 100, 1, 8, 8, CHANNEL, 0), True, (30, 0, 70)),  # sequences, one of them empty
]
NAMES = ("out", "state", "dq", "dk", "dv", "dg", "dinitial")

MUTANTS = [
    Mutant("out_barrier", OUTPUT,
           "      prim::sync_threads();  // the tiles are complete\n"
           "      product<kDepthLast, kDepthLast>(p,",
           "      product<kDepthLast, kDepthLast>(p,", "race|uninitialised"),
    Mutant("out_readers", OUTPUT,
           "      prim::sync_threads();  // the tiles' previous readers\n", "", "race"),
    Mutant("grad_sums", GRAD, "    prim::sync_threads();  // sums of other sub-chunks\n", "", "race|uninitialised"),
    Mutant("grad_phase", GRAD, "    prim::sync_threads();  // the first phase's readers\n", "", "race"),
    Mutant("state_totals", STATE, "    prim::sync_threads();  // totals\n", "", "race|uninitialised"),
    Mutant("tail", COMMON, "const bool inside = first + r < work.count && column < from.dim;",
           "const bool inside = first + r <= work.count && column < from.dim;", "outside"),
    Mutant("columns", COMMON, "const bool inside = first + r < work.count && column < from.dim;",
           "const bool inside = first + r < work.count && column <= from.dim;", "outside"),
    Mutant("lost_block", OUTPUT, "first_v + n * 8 + acc_col() + e % 2;\n      if (position",
           "n * 8 + acc_col() + e % 2;\n      if (position", "written twice"),
    Mutant("strict", OUTPUT, "j < i + (g.strict ? 0 : 1)", "j < i + 1"),
    Mutant("dual", COMMON, "const int position = at - (g.dual ? 1 : 0);", "const int position = at;"),
    Mutant("entry", COMMON, "entry = gate_at(g, work, 0, channel);", "entry = 0.f;"),
    Mutant("between", COMMON, "float sum = gates.between(own + 1, sub);", "float sum = 0.f;"),
    Mutant("transposed_sum", COMMON, "return x[0] + prim::shuffle_xor(x[0], kSub);", "return x[0];"),
    Mutant("sequence", COMMON, "slot = range.begin / kChunk + n;", "slot = range.begin / kChunk;",
           "unwritten"),
    Mutant("scan_order", STATE,
           "        const Index at = g.step > 0 ? c + a : s.chunks - 1 - c - a;\n        const bool",
           "        const Index at = c + a;\n        const bool"),
    Mutant("scan_inclusive", STATE,
           "          prim::store_global(g.states + first + at * stride, state);\n"
           "          state = state * decay[a] + added[a];",
           "          state = state * decay[a] + added[a];\n"
           "          prim::store_global(g.states + first + at * stride, state);"),
    Mutant("lost_part", STATE, "for (Index part = 0; part < s.parts; ++part)",
           "for (Index part = 1; part < s.parts; ++part)"),
    Mutant("lost_prior", OUTPUT, "out[n][e] + prior);", "out[n][e]);"),
    Mutant("across", GRAD, "for (int sub = own + 1; sub < kSubs; ++sub) outside +=",
           "for (int sub = own + 2; sub < kSubs; ++sub) outside +="),
    Mutant("through", GRAD, "through.load(lane) * prim::exp(all)", "through.load(lane)"),
    Mutant("gate_of_keys", GRAD, "        dg[r] += sum;\n        sum += k[r] * dk_row[r];",
           "        sum += k[r] * dk_row[r];\n        dg[r] += sum;"),
    Mutant("key_scale", LAUNCH, "(dual ? g.y_scale : g.x_scale) = p.scale;", "g.x_scale = p.scale;"),
]  # fmt: skip


def inputs_of(case):
    """q, k, v, grad_out in float32, of values that bfloat16 holds exactly; gates, states, offsets."""
    (B, L, H, K, V, gate, direction), initial, lengths = CASES[case]
    random = np.random.default_rng(case)
    values = functools.partial(bf16_values, random)
    N = B if lengths is None else len(lengths)
    shape = {HEAD: (H,), TOKEN: (B, L, H), CHANNEL: (B, L, H, K)}[gate]
    g = -np.abs(random.standard_normal(shape)).astype(np.float32) * 0.2
    if gate != HEAD:
        g[:, ::23] = -20.0
    offsets = None if lengths is None else np.cumsum((0, *lengths)).astype(np.int32)
    state = random.standard_normal((N, H, K, V)).astype(np.float32) if initial else None
    grad_state = random.standard_normal((N, H, K, V)).astype(np.float32) if direction != 2 else None
    return values(B, L, H, K), values(B, L, H, K), values(B, L, H, V), g, offsets, state, values(B, L, H, V), grad_state


def run(library):
    for case, ((B, L, H, K, V, gate, direction), *_) in enumerate(CASES):
        q, k, v, g, offsets, initial, grad, grad_state = inputs_of(case)
        half = [bf16(x) for x in (q, k, v, grad)]
        out, dq, dk, dv = (np.zeros(x.shape, np.uint16) for x in (grad, q, k, v))
        state = None if grad_state is None else np.zeros_like(grad_state)
        dg, dinitial = np.zeros_like(g), None if initial is None else np.zeros_like(initial)
        workspace = np.zeros(1 << 18, np.float32)
        N = B if offsets is None else len(offsets) - 1
        tensors = [
            *half[:3], g, offsets, initial, out, state, half[3], grad_state, dq, dk, dv, dg, dinitial,
        ]  # fmt: skip
        addresses = (ctypes.c_void_p * len(tensors))(*[None if t is None else t.ctypes.data for t in tensors])
        sizes = (ctypes.c_int64 * 8)(B, L, H, K, V, N, gate, direction)
        call(library.run_gated_linear_attention, sizes, addresses, pointer(workspace), nbytes(workspace))
        for name, x in zip(NAMES, (out, state, dq, dk, dv, dg, dinitial), strict=True):
            if x is not None:
                x = from_bf16(x) if x.dtype == np.uint16 else x
                yield f"{case}_{name}", x.astype(np.float64)


def formula(case, main, small):
    """Outputs and gradients of the reference; main: dtype of the tokens, small: of gates and states."""
    import torch

    from effvit.reference.gated_linear_attention import gated_linear_attention

    (*_, gate, direction), *_ = CASES[case]
    types = (main, main, main, small, torch.int32, small, main, small)
    tensors = [None if x is None else torch.from_numpy(x).to(t) for x, t in zip(inputs_of(case), types, strict=True)]
    q, k, v, g, offsets, initial, grad, grad_state = tensors
    leaves = [t.requires_grad_() for t in (q, k, v, g, initial) if t is not None]
    gates = [g if gate == kind else None for kind in (HEAD, TOKEN, CHANNEL)]
    out, state = gated_linear_attention(q, k, v, *gates, offsets, initial, scale=0.5, direction=direction)
    results, grads = [out], [grad.to(out.dtype)]
    if grad_state is not None:
        results, grads = [out, state], [*grads, grad_state.to(state.dtype)]
    gradients = list(torch.autograd.grad(results, leaves, grads))
    gradients += [None] * (5 - len(gradients))
    return [out.detach(), None if grad_state is None else state.detach(), *gradients]


def check(results):
    import torch

    from effvit.testing import assert_close_to_truth

    check_seeds(results)
    for case in range(len(CASES)):
        truths = formula(case, torch.float64, torch.float64)
        yardsticks = formula(case, torch.bfloat16, torch.float32)
        for name, truth, yardstick in zip(NAMES, truths, yardsticks, strict=True):
            if f"0_{case}_{name}" in results:
                result = torch.from_numpy(results[f"0_{case}_{name}"])
                eps = torch.finfo(torch.bfloat16).eps
                assert_close_to_truth(result, truth, yardstick, eps=eps, name=f"{case}_{name}")
