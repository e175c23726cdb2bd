"""sign_bits in Triton: whether numbers reach a threshold, eight to a byte, and the scale of every row, in one pass."""

import torch

from ._common import SCALE, Launch, _loop_bound, cdiv, next_power_of_two, run, tl, triton, tuned
from ._rows import _row_offsets, rows_of

ELEMENTS = 2048  # of a program
MAX_COLUMNS = 2048


@triton.jit(do_not_specialize=["rows"])
def sign_bits_fwd_kernel(
    x,  # [..., K], last stride 1
    threshold,  # [...] float32, any strides, or None
    bits,  # [..., ceil(K / 8)] uint8, contiguous
    scale,  # [...] float32, contiguous
    rows, K, V, x_rows, threshold_rows, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = row < rows
    source = x + _row_offsets(row, x_rows)[:, None]
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // 8)
    place = tl.arange(0, 8)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    count = tl.zeros([BLOCK_ROWS], tl.float32)
    at = tl.zeros([BLOCK_ROWS], tl.float32)
    if threshold is not None:
        at = tl.load(threshold + _row_offsets(row, threshold_rows), mask=ok, other=0.0)
    for start in range(0, _loop_bound(K), BLOCK_K):
        inside = ok[:, None] & (start + k < K)[None, :]
        block = tl.load(source + start + k[None, :], mask=inside, other=0.0).to(tl.float32)
        on = inside & (block >= at[:, None])
        if threshold is not None:
            total += tl.sum(tl.where(on, block, 0.0), axis=1)
            count += tl.sum(on.to(tl.float32), axis=1)
        else:
            total += tl.sum(tl.abs(block), axis=1)
        eights = tl.reshape(on.to(tl.int32), [BLOCK_ROWS, BLOCK_K // 8, 8])
        packed = tl.sum(eights << place[None, None, :], axis=2)
        target = bits + row[:, None] * V + start // 8 + byte[None, :]
        tl.store(target, packed.to(tl.uint8), mask=ok[:, None] & (start // 8 + byte < V)[None, :])
    if threshold is None:
        count += K
    tl.store(scale + row, tl.div_rn(total, tl.maximum(count, 1.0)), mask=ok)


def _plan_forward(x, threshold=None):
    """((bits, scale), launches). Works on meta tensors."""
    lead, K = x.shape[:-1], x.shape[-1]
    bits = torch.empty((*lead, cdiv(K, 8)), dtype=torch.uint8, device=x.device)
    scale = torch.empty(lead, dtype=torch.float32, device=x.device)
    rows = scale.numel()
    if rows == 0:
        return (bits, scale), []
    block_k = min(next_power_of_two(max(K, 16)), tuned(MAX_COLUMNS, small=16))
    block_rows = min(next_power_of_two(rows), tuned(max(ELEMENTS * SCALE // block_k, 1), small=2))
    args = {
        "x": x, "threshold": threshold, "bits": bits, "scale": scale, "rows": rows, "K": K, "V": bits.shape[-1],
        "x_rows": rows_of(x), "threshold_rows": None if threshold is None else rows_of(threshold[..., None]),
        "BLOCK_ROWS": block_rows, "BLOCK_K": block_k,
    }  # fmt: skip
    return (bits, scale), [Launch(sign_bits_fwd_kernel, cdiv(rows, block_rows), args, num_warps=4, num_stages=1)]


def forward(x, threshold=None):
    """effvit::sign_bits. The arguments must have been validated."""
    results, launches = _plan_forward(x, threshold)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for K, given in ((384, False), (197, True), (8000, False)):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            x = torch.empty((64, 197, K), dtype=dtype, device="meta")
            threshold = torch.empty((64, 197), device="meta") if given else None
            for launch in _plan_forward(x, threshold)[1]:
                yield launch.aot(f"{K}-{'threshold' if given else 'signs'}-{short}")
