"""Mutants of the window attention kernels."""

import ctypes
import functools

import numpy as np
from mutants import Mutant, bf16, bf16_values, call, check_seeds, from_bf16, nbytes, pointer

HARNESS = "tests/prim/window_attention_harness.cpp"
COMMON, FORWARD, BACKWARD = (f"csrc/cuda/window_attention_{part}.cuh" for part in ("common", "fwd", "bwd"))
ROWS, PRODUCT = "csrc/cuda/tile/rows.cuh", "csrc/cuda/tile/product.cuh"
# B, H, W, h, d, dv, window, shift, dilation, halo; cosine, pads
CASES = [
    ((1, 10, 12, 2, 32, 24, 7, 7, 3, 3, 1, 1, 0, 0), False, True),  # fused, map that the window does not divide
    ((2, 8, 8, 1, 20, 16, 4, 4, 1, 2, 1, 1, 0, 0), True, False),  # four windows a tile, cosine
    ((1, 9, 9, 1, 16, 16, 9, 9, 0, 0, 1, 1, 0, 0), False, False),  # two query and key tiles
    ((1, 8, 10, 1, 16, 32, 4, 5, 1, 0, 1, 1, 2, 1), True, True),  # halo
]
MUTANTS = [
    Mutant("tile_barrier", BACKWARD, "    prim::sync_threads();  // P, dS and column_dot of all warps\n", "",
           "race|uninitialised"),
    Mutant("reuse_barrier", FORWARD, "    prim::sync_threads();  // the previous tile's readers\n"
           "    place_tokens(c, tile, at.q_tile, 0, true);\n    prim::sync_threads();\n    if (c.cosine) query",
           "    place_tokens(c, tile, at.q_tile, 0, true);\n    prim::sync_threads();\n    if (c.cosine) query",
           "race"),
    Mutant("warp_barrier", BACKWARD, "  prim::sync_warp();\n  store_tokens(c, c.stage", "  store_tokens(c, c.stage",
           "race|uninitialised"),
    Mutant("no_wait", FORWARD,
           "      prim::cp_async_wait<0>();\n      prim::sync_threads();\n      const int depth = tile",
           "      prim::sync_threads();\n      const int depth = tile", "before its wait"),
    Mutant("unmasked_tail", COMMON, "return region == kInvalid ? -infinity() : x;",
           "return x;"),
    Mutant("uninitialised", BACKWARD, "store_acc(to, c.key_base, x, c.g.slot_rows / 8);",
           "store_acc(to, c.key_base, x, c.g.slot_rows / 8 - 1);", "uninitialised"),
    Mutant("row_overrun", ROWS, "    const int row = i / pieces, piece = i - row * pieces;",
           "    const int row = i / pieces + 1, piece = i - row * pieces + pieces;", "outside"),
    Mutant("a_fragment", PRODUCT, "(a.row + k + at.low + at.quarter) * a.tile.stride + a.col + at.half",
           "(a.row + k + at.low + at.half) * a.tile.stride + a.col + at.quarter", ""),
    Mutant("b_fragment", PRODUCT,
           "if (both) prim::mma_m16n8k16<E>(acc[i + 1], hi, bf[2], bf[3]);\n      if constexpr",
           "if (both) prim::mma_m16n8k16<E>(acc[i + 1], hi, bf[0], bf[3]);\n      if constexpr", ""),
    Mutant("sign", BACKWARD, "p * (dp[n][e] - delta[r])", "p * (dp[n][e] + delta[r])", ""),
    Mutant("table_sign", COMMON, "(q_meta >> kMetaShift) - (k_meta >> kMetaShift)",
           "c.g.table_size - 1 - (q_meta >> kMetaShift) + (k_meta >> kMetaShift)", ""),
    Mutant("shifted_bound", COMMON, "if (!w.valid || j >= g.keys)", "if (!w.valid || j >= g.keys - 1)", "unwritten"),
    Mutant("halo_bound", BACKWARD, "local_x < g.axis_x.window + g.axis_x.halo;",
           "local_x <= g.axis_x.window + g.axis_x.halo;",
           "outside the array"),
    Mutant("region", COMMON, "if (region != (q_meta & kRegionBits)) x += ",
           "if (region > (q_meta & kRegionBits)) x += ",
           ""),
    Mutant("no_rescale", FORWARD, "o[n][e] *= rescale[e / 2];", "o[n][e] *= 1.f;", ""),
    Mutant("lost_walk", BACKWARD, "if (with_table) add(ds_sum, dp, n_tiles);",
           "if (with_table) clear(ds_sum), add(ds_sum, dp, n_tiles);", ""),
    Mutant("lost_window", COMMON, "tile * c.g.slots + row / c.g.slot_rows", "tile * c.g.slots", "written twice"),
    Mutant("pad_gradient", BACKWARD, "sums.ds_outside[r] += ds;", "sums.ds_outside[r] += p;", ""),
]  # fmt: skip


def inputs_of(case):
    """q, k, v, table, logit_scale, pad_k, pad_v, grad_out in float32, of values that bfloat16 holds exactly."""
    (B, H, W, h, d, dv, wh, ww, *_, hh, hw), cosine, pads = CASES[case]
    values = functools.partial(bf16_values, np.random.default_rng(case))
    q, k, v = values(B, H, W, h, d), values(B, H, W, h, d), values(B, H, W, h, dv)
    table = values(h, 2 * wh - 1 + 2 * hh, 2 * ww - 1 + 2 * hw)
    logit_scale = 1.5 + np.arange(h, dtype=np.float32) if cosine else None
    pad_k, pad_v = (values(h, d), values(h, dv)) if pads else (None, None)
    return q, k, v, table, logit_scale, pad_k, pad_v, values(B, H, W, h, dv)


def run(library):
    for case, (sizes, cosine, pads) in enumerate(CASES):
        B, H, W, h, d, dv = sizes[:6]
        *inputs, grad_out = inputs_of(case)
        q, k, v, table, logit_scale, pad_k, pad_v = inputs
        half = [None if x is None else bf16(x) for x in (q, k, v, pad_k, pad_v, grad_out)]
        out, lse = np.zeros((B, H, W, h, dv), np.uint16), np.zeros((B, h, H, W), np.float32)
        dqkv, dtable = np.zeros((B, H, W, h * (2 * d + dv)), np.uint16), np.zeros_like(table)
        dlogit = np.zeros(h, np.float32) if cosine else None
        dpad_k, dpad_v = (np.zeros((h, d), np.uint16), np.zeros((h, dv), np.uint16)) if pads else (None, None)
        workspace = np.zeros(1 << 20, np.float32)
        tensors = [
            half[0], half[1], half[2], table, logit_scale, half[3], half[4], out, lse, half[5], dqkv, dtable, dlogit,
            dpad_k, dpad_v,
        ]  # fmt: skip
        addresses = (ctypes.c_void_p * len(tensors))(*[None if t is None else t.ctypes.data for t in tensors])
        call(
            library.run_window_attention, (ctypes.c_int64 * 14)(*sizes), addresses, pointer(workspace),
            nbytes(workspace),
        )  # fmt: skip
        names = ("out", "lse", "dqkv", "dtable", "dlogit", "dpad_k", "dpad_v")
        for name, x in zip(names, (out, lse, dqkv, dtable, dlogit, dpad_k, dpad_v), strict=True):
            if x is not None:
                x = from_bf16(x) if x.dtype == np.uint16 else x
                yield f"{case}_{name}", x.astype(np.float64)


def formula(inputs, grad, options, main, small):
    """Outputs and gradients of the reference; main: dtype of the tokens, small: of the table and of logit_scale."""
    import torch

    from effvit.reference.window_attention import window_attention

    dtypes = (main, main, main, small, small, main, main)
    x = [None if x is None else torch.from_numpy(x).to(t) for x, t in zip(inputs, dtypes, strict=True)]
    leaves = [t.requires_grad_() for t in x if t is not None]
    out, lse = window_attention(*x, **options)
    gradients = iter(torch.autograd.grad(out, leaves, torch.from_numpy(grad).to(main)))
    gradients = [None if t is None else next(gradients) for t in x]
    dqkv = torch.cat([t.flatten(-2) for t in gradients[:3]], -1)
    return [None if t is None else t.detach() for t in (out, lse, dqkv, *gradients[3:])]


def check(results):
    import torch

    from effvit.testing import assert_close_to_truth

    check_seeds(results)
    for case, (sizes, _, _) in enumerate(CASES):
        *inputs, grad = inputs_of(case)
        window, shift, dilation, halo = (sizes[i : i + 2] for i in range(6, 14, 2))
        options = {"window": window, "shift": shift, "dilation": dilation, "halo": halo, "mask_value": -2.0}
        options["scale"] = None if inputs[4] is not None else 0.25

        names = ("out", "lse", "dqkv", "dtable", "dlogit", "dpad_k", "dpad_v")
        truths = formula(inputs, grad, options, torch.float64, torch.float64)
        yardsticks = formula(inputs, grad, options, torch.bfloat16, torch.float32)
        for name, truth, yardstick in zip(names, truths, yardsticks, strict=True):
            if truth is None:
                continue
            first = results[f"0_{case}_{name}"]
            eps = torch.finfo(torch.bfloat16).eps
            assert_close_to_truth(torch.from_numpy(first), truth, yardstick, eps=eps, name=f"{case}_{name}")
