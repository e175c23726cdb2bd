"""binary_linear in Triton: bits become bytes of -1, 0 and 1 in registers, whose products tensor cores sum exactly.

int8 tensor cores are faster than a popcount for every 32 products on ordinary ones, and read an eighth of the memory of
an int8 layer here. The one-bit instructions of older GPUs are emulated from sm_90 on.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, run, tl, triton, tuned
from ._gemm import GROUP, _row_pointers, _tile_at, tile_of, warps_of
from ._int8_epilogue import _finish, epilogue, sample_epilogues


@device_function
def _expanded(bytes_, inside, UNIPOLAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK, BLOCK_K / 8] bytes -> int8 [BLOCK, BLOCK_K]: 0 where a bit is not `inside`."""
    place = tl.arange(0, 8)
    eights = (bytes_.to(tl.int32)[:, :, None] >> place[None, None, :]) & 1
    bit = tl.reshape(eights, [BLOCK, BLOCK_K])
    value = bit if UNIPOLAR else 2 * bit - 1
    return tl.where(inside, value, 0).to(tl.int8)


@triton.jit(do_not_specialize=["M"])
def binary_linear_fwd_kernel(
    x,  # [M, V] uint8, last stride 1
    weight,  # [N, V] uint8, last stride 1
    e,  # Epilogue
    M, N, K, V,
    x_stride_m, weight_stride_n,
    UNIPOLAR: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // 8)
    x_tiles = _row_pointers(x, row, M, x_stride_m) + byte[None, :]
    w_tiles = _row_pointers(weight, column, N, weight_stride_n) + byte[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, _loop_bound(V), BLOCK_K // 8):
        ok = (byte < V - start)[None, :]
        inside = (k < K - start * 8)[None, :]
        x_tile = _expanded(tl.load(x_tiles + start, mask=ok, other=0), inside, UNIPOLAR, BLOCK_M, BLOCK_K)
        w_tile = _expanded(tl.load(w_tiles + start, mask=ok, other=0), inside, False, BLOCK_N, BLOCK_K)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    _finish(acc, e, row, column, M, N, ACT)


def _plan_forward(
    x, weight, x_scale, w_scale, bias=None, residual=None, *, depth, unipolar=False, activation=0, out_dtype=0,
    out_scale=None,
):  # fmt: skip
    """(out, launches). Works on meta tensors."""
    (M, V), N = x.shape, weight.shape[0]
    e = epilogue(x, x_scale, w_scale, bias, residual, out_dtype, out_scale)
    if e.out.numel() == 0:
        return e.out, []
    m, n = tile_of(M, N)
    args = {
        "x": x, "weight": weight, "e": e, "M": M, "N": N, "K": depth, "V": V, "x_stride_m": x.stride(0),
        "weight_stride_n": weight.stride(0), "UNIPOLAR": unipolar, "ACT": activation,
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": tuned(128, small=32), "GROUP": GROUP,
    }  # fmt: skip
    return e.out, [Launch(binary_linear_fwd_kernel, cdiv(M, m) * cdiv(N, n), args, warps_of(m, n), num_stages=3)]


def forward(x, weight, x_scale, w_scale, bias=None, residual=None, **options):
    """effvit::binary_linear. The arguments must have been validated."""
    out, launches = _plan_forward(x, weight, x_scale, w_scale, bias, residual, **options)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (M, N, K) in {"vit": (12608, 1536, 384), "image": (197, 384, 1536), "row": (1, 768, 768),
                            "odd": (3137, 100, 33)}.items():  # fmt: skip
        x, weight = (torch.empty((rows, cdiv(K, 8)), dtype=torch.uint8, device="meta") for rows in (M, N))
        for short, arguments in sample_epilogues(M, N):
            for launch in _plan_forward(x, weight, depth=K, unipolar=name == "odd", **arguments)[1]:
                yield launch.aot(f"{name}-{short}")
