"""table_lookup in Triton: a load of the byte, a load of its entry, which the L1 cache holds."""

import torch

from ._common import run as _run
from ._common import tl, triton
from ._rows import _row_offsets, launch_rows, rows_of


@triton.jit
def table_lookup_fwd_kernel(
    x,  # [..., C] uint8, last stride 1
    table,  # [T, 256] uint8
    which,  # [...] uint8, any strides, or None
    out,  # [..., C] uint8, contiguous
    elements, C, T, x_rows, which_rows, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < elements
    row = e // C
    index = tl.load(x + _row_offsets(row, x_rows) + e % C, mask=ok, other=0).to(tl.int32)
    if SIGNED:
        index ^= 128
    if which is not None:
        place = tl.load(which + _row_offsets(row, which_rows), mask=ok, other=0).to(tl.int32)
        index += tl.minimum(place, T - 1) * 256  # a GPU cannot refuse what is beyond, but must not read it
    tl.store(out + e, tl.load(table + index, mask=ok, other=0), mask=ok)


def _plan_forward(x, table, which=None, *, signed=False):
    """(out, launches). Works on meta tensors."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    args = {
        "x": x, "table": table.contiguous(), "which": which, "out": out, "T": table.shape[0], "SIGNED": signed,
        "x_rows": rows_of(x),
        "which_rows": None if which is None else rows_of(which[..., None]),
    }  # fmt: skip
    return out, launch_rows(table_lookup_fwd_kernel, x, args)


def forward(x, table, which=None, *, signed=False):
    """effvit::table_lookup. The arguments must have been validated."""
    out, launches = _plan_forward(x, table, which, signed=signed)
    _run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, shape, tables in (("hidden", (64, 197, 1536), 1), ("blocks", (64, 197, 24, 64), 16)):
        x = torch.empty(shape, dtype=torch.uint8, device="meta")
        table = torch.empty((tables, 256), dtype=torch.uint8, device="meta")
        which = torch.empty(shape[:-1], dtype=torch.uint8, device="meta") if tables > 1 else None
        for launch in _plan_forward(x, table, which, signed=tables > 1)[1]:
            yield launch.aot(name)
