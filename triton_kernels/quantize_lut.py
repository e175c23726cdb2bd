"""quantize_lut in Triton: a binary search among the thresholds, elementwise over rows of any strides."""

import torch

from ._common import run, tl, triton
from ._rows import _row_offsets, launch_rows, rows_of


def code_bits(thresholds):
    """Of the largest code: how many comparisons a search takes."""
    return thresholds.shape[0].bit_length()


@triton.jit
def _load_exactly(x, rows, e, C, ok):
    """As _load_rows; bfloat16 by its bits, as the interpreter's conversion of subnormal numbers is wrong."""
    at = x + _row_offsets(e // C, rows) + e % C
    if x.dtype.element_ty == tl.bfloat16:
        bits = tl.load(at, mask=ok, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _count(x, thresholds, T, BITS: tl.constexpr):
    """How many of the T thresholds are at most x, none for a NaN; from the highest bit of a count to the lowest."""
    found = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(BITS):
        probe = found + (1 << (BITS - 1 - bit))
        ok = probe <= T
        t = tl.load(thresholds + probe - 1, mask=ok, other=0.0)
        found = tl.where(ok & (x >= t), probe, found)
    return found


@triton.jit(do_not_specialize=["T"])
def quantize_lut_fwd_kernel(
    x,  # [..., C], last stride 1
    thresholds,  # [T] float32, ascending
    q,  # [..., C] uint8, contiguous
    elements, C, T, x_rows, BITS: tl.constexpr, DESCENDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < elements
    found = _count(_load_exactly(x, x_rows, e, C, ok), thresholds, T, BITS)
    if DESCENDING:
        found = T - found
    tl.store(q + e, found.to(tl.uint8), mask=ok)


def _plan_forward(x, thresholds, *, descending=False):
    """(q, launches). Works on meta tensors."""
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    args = {
        "x": x, "thresholds": thresholds.contiguous(), "q": q, "T": thresholds.shape[0], "x_rows": rows_of(x),
        "BITS": code_bits(thresholds), "DESCENDING": descending,
    }  # fmt: skip
    return q, launch_rows(quantize_lut_fwd_kernel, x, args)


def forward(x, thresholds, *, descending=False):
    """effvit::quantize_lut. The arguments must have been validated."""
    q, launches = _plan_forward(x, thresholds, descending=descending)
    run(launches, x.device)
    return q


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for count in (15, 16, 255):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            x = torch.empty((8, 6, 197, 197), dtype=dtype, device="meta")
            for launch in _plan_forward(x, torch.empty(count, device="meta"), descending=count == 16)[1]:
                yield launch.aot(f"{count}-{short}")
