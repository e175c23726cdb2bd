"""window_attention: schema, validation, fake kernel, autograd, autocast, vmap, sharding, and the public function."""

from __future__ import annotations

import functools

import torch

from ..reference.window_attention import window_attention as _reference
from . import _registry as R

NAME = "window_attention"
_GEOMETRY = (
    "int[2] window, int[2] shift=0, int[2] dilation=1, int[2] halo=0, float? scale=None, float mask_value=-100., "
    "bool roll_before_pad=False"
)
_OPTIONALS = "Tensor? bias_table=None, Tensor? logit_scale=None, Tensor? pad_k=None, Tensor? pad_v=None"
SCHEMA = f"{NAME}(Tensor q, Tensor k, Tensor v, {_OPTIONALS}, *, {_GEOMETRY}) -> (Tensor out, Tensor lse)"
SCHEMA_BACKWARD = (
    f"{NAME}_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONALS}, *, {_GEOMETRY}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias_table, "
    "Tensor dlogit_scale, Tensor dpad_k, Tensor dpad_v)"
)


# ---- validation ----------------------------------------------------------------------------------------------------


def _validate(
    op, q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None,
    *, window, shift=0, dilation=1, halo=0, scale=None, mask_value=-100.0, roll_before_pad=False,
):  # fmt: skip
    """Raise on anything the op does not take; return the geometry with ints as pairs, as torch.ops takes it."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        R.check_tensor(op, name, t)
    if q.dim() != 5:
        raise R.value_error(op, "q", "[B, H, W, h, d]", R.shape(q))
    R.check_float(op, "q", q)
    if k.dim() != 5 or k.shape != q.shape:
        raise R.value_error(op, "k", f"[B, H, W, h, d] like q {R.shape(q)}", R.shape(k))
    if v.dim() != 5 or v.shape[:4] != q.shape[:4]:
        raise R.value_error(op, "v", f"[B, H, W, h, dv] like q {R.shape(q)}", R.shape(v))
    for name, t in (("q", q), ("k", k), ("v", v)):
        R.check_like(op, name, t, "q", q)
        R.check_last_stride(op, name, t)
        if t.shape[-1] < 1:
            raise R.value_error(op, name, "a tensor with a head dim of at least 1", R.shape(t))
    window = R.as_pair(op, "window", window, 1)
    shift = R.as_pair(op, "shift", shift, 0)
    dilation = R.as_pair(op, "dilation", dilation, 1)
    halo = R.as_pair(op, "halo", halo, 0)
    if any(s >= w for s, w in zip(shift, window, strict=True)):
        raise R.value_error(op, "shift", f"in [0, window) for window {window}", shift)
    for w, e, d in zip(window, halo, dilation, strict=True):
        if (w + 2 * e) * d > 1 << 24:
            raise R.value_error(
                op, "dilation", f"such that (window + 2*halo) * dilation is at most {1 << 24}", dilation
            )
    mask_value = R.as_finite(op, "mask_value", mask_value)
    if scale is not None:
        scale = R.as_finite(op, "scale", scale)
        if logit_scale is not None:
            raise R.value_error(op, "scale", "None when logit_scale is given", scale)
    if not isinstance(roll_before_pad, bool):
        raise R.type_error(op, "roll_before_pad", "a bool", type(roll_before_pad).__name__)
    h = q.shape[3]
    if bias_table is not None:
        R.check_tensor(op, "bias_table", bias_table)
        R.check_float(op, "bias_table", bias_table)
        R.check_like(op, "bias_table", bias_table, "q", q, dtype=False)
        sides = [2 * w - 1 + 2 * e for w, e in zip(window, halo, strict=True)]
        R.check_shape(op, "bias_table", bias_table, "[h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w]", [h, *sides])
    if logit_scale is not None:
        R.check_tensor(op, "logit_scale", logit_scale)
        R.check_float(op, "logit_scale", logit_scale)
        R.check_like(op, "logit_scale", logit_scale, "q", q, dtype=False)
        R.check_shape(op, "logit_scale", logit_scale, "[h]", [h])
    if (pad_k is None) != (pad_v is None):
        missing, other = ("pad_k", "pad_v") if pad_k is None else ("pad_v", "pad_k")
        raise R.value_error(op, missing, f"given together with {other}", None)
    for name, pad, e in (("pad_k", pad_k, q.shape[4]), ("pad_v", pad_v, v.shape[4])):
        if pad is not None:
            R.check_tensor(op, name, pad)
            R.check_like(op, name, pad, "q", q)
            R.check_shape(op, name, pad, "[h, d]" if name == "pad_k" else "[h, dv]", [h, e])
    return {
        "window": window, "shift": shift, "dilation": dilation, "halo": halo, "scale": scale,
        "mask_value": mask_value, "roll_before_pad": roll_before_pad,
    }  # fmt: skip


def _validate_forward(*args, **kwargs):
    _validate(NAME, *args, **kwargs)


def _validate_backward(grad_out, grad_lse, q, k, v, out, lse, *optionals, **kwargs):
    op = f"{NAME}_backward"
    _validate(op, q, k, v, *optionals, **kwargs)
    B, H, W, h, _ = q.shape
    for name, t, dims, expected, dtype in (
        ("grad_out", grad_out, "[B, H, W, h, dv]", v.shape, q.dtype),
        ("out", out, "[B, H, W, h, dv]", v.shape, q.dtype),
        ("lse", lse, "[B, h, H, W]", (B, h, H, W), torch.float32),
        ("grad_lse", grad_lse, "[B, h, H, W]", (B, h, H, W), torch.float32),
    ):
        if t is None and name == "grad_lse":
            continue
        R.check_tensor(op, name, t)
        R.check_shape(op, name, t, dims, expected)
        R.check_like(op, name, t, "q", q, dtype=False)
        if t.dtype != dtype:
            raise R.type_error(op, name, f"{dtype}", t.dtype)
        if name in ("out", "lse") and not t.is_contiguous():
            raise R.value_error(op, name, "contiguous as the forward returned it", f"strides {tuple(t.stride())}")
    R.check_last_stride(op, "grad_out", grad_out)


# ---- reference and fake kernels ------------------------------------------------------------------------------------


def _pairs(geometry):
    """The reference takes pairs; a direct torch.ops call has had its ints expanded by the dispatcher already."""
    return {
        name: (value, value) if R.is_int(value) else tuple(value) if name in _PAIRS else value
        for name, value in geometry.items()
    }


_PAIRS = ("window", "shift", "dilation", "halo")


def _upcast(*tensors):
    return tuple(None if t is None else t.float() for t in tensors)


def _reference_forward(q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, **geometry):
    if q[..., 0].numel() == 0:
        return _fake_forward(q, k, v)
    tensors = _upcast(q, k, v, bias_table, logit_scale, pad_k, pad_v)
    out, lse = _reference(*tensors, **_pairs(geometry))
    return out.to(q.dtype).contiguous(), lse.contiguous()


def _reference_backward(
    grad_out, grad_lse, q, k, v, out, lse, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, **geometry
):
    inputs = (q, k, v, bias_table, logit_scale, pad_k, pad_v)
    empty = [q.new_empty(0, dtype=torch.float32) if t is None else torch.zeros_like(t) for t in inputs]
    if q[..., 0].numel() == 0:
        grads = empty
    else:
        with R.autograd_below_autograd():
            leaves = [None if t is None else t.detach().float().requires_grad_() for t in inputs]
            o, s = _reference(*leaves, **_pairs(geometry))
            given = [t for t in leaves if t is not None]
            ds = torch.zeros_like(s) if grad_lse is None else grad_lse
            found = iter(torch.autograd.grad((o, s), given, (grad_out.float(), ds), allow_unused=True))
        grads = [
            zero if t is None else (lambda g, t, zero: zero if g is None else g.to(t.dtype))(next(found), t, zero)
            for t, zero in zip(inputs, empty, strict=True)
        ]
    pads = [g.to(q.dtype) for g in grads[5:]]
    return (*(g.contiguous() for g in grads[:5]), *(g.contiguous() for g in pads))


def _fake_forward(q, k, v, *optionals, **geometry):
    B, H, W, h, _ = q.shape
    return q.new_empty((B, H, W, h, v.shape[4])), q.new_empty((B, h, H, W), dtype=torch.float32)


def _fake_backward(
    grad_out, grad_lse, q, k, v, out, lse, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, **geometry
):
    def like(t, dtype=torch.float32):
        return q.new_empty((0,), dtype=dtype) if t is None else q.new_empty(t.shape, dtype=t.dtype)

    tokens = (q.new_empty(t.shape) for t in (q, k, v))
    return *tokens, like(bias_table), like(logit_scale), like(pad_k, q.dtype), like(pad_v, q.dtype)


R.define_op(NAME, SCHEMA, reference=_reference_forward, validate=_validate_forward, fake=_fake_forward)
R.define_op(
    f"{NAME}_backward", SCHEMA_BACKWARD,
    reference=_reference_backward, validate=_validate_backward, fake=_fake_backward, backward_of=NAME,
)  # fmt: skip


# ---- autograd ------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    out, lse = output
    ctx.save_for_backward(*inputs, out, lse)
    ctx.geometry = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _unit_last_stride(t):
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _backward(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    q, k, v, bias_table, logit_scale, pad_k, pad_v = inputs
    if grad_out is None and grad_lse is None:
        return (None,) * 7
    grad_out = torch.zeros_like(out) if grad_out is None else _unit_last_stride(grad_out)
    dq, dk, dv, *small = torch.ops.effvit.window_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, bias_table, logit_scale, pad_k, pad_v, **ctx.geometry
    )
    small = [None if t is None else g for g, t in zip(small, (bias_table, logit_scale, pad_k, pad_v), strict=True)]
    return (dq, dk, dv, *small)


torch.library.register_autograd(f"effvit::{NAME}", _backward, setup_context=_setup_context, lib=R.LIBRARY)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "effvit::window_attention_backward is not differentiable: for second derivatives differentiate "
        "effvit.reference.window_attention, which is plain PyTorch"
    )


torch.library.register_autograd(f"effvit::{NAME}_backward", _no_double_backward, lib=R.LIBRARY)


# ---- autocast, vmap, sharding --------------------------------------------------------------------------------------


def _autocast(dtype, q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None):
    """The tokens run in the autocast dtype; the table and the temperature are read in their own."""
    tokens = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in (q, k, v, pad_k, pad_v)]
    return (*tokens[:3], bias_table, logit_scale, *tokens[3:])


R.register_autocast(NAME, _autocast)
R.vmap_by_folding(NAME, foldable=(0, 1, 2))


def _register_sharding():
    """DTensor: shard the batch (dim 0) or the heads (dim 3, with table, temperature and pads sharded along)."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def present(placement, t):
        return None if t is None else placement

    @register_sharding(torch.ops.effvit.window_attention.default)
    def forward_rule(q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, **geometry):
        small = (bias_table, logit_scale, pad_k, pad_v)
        return [
            ([r, r_lse], [r, r, r, *(present(s, t) for t in small)])
            for r, r_lse, s in (
                (Replicate(), Replicate(), Replicate()),
                (Shard(0), Shard(0), Replicate()),
                (Shard(3), Shard(1), Shard(0)),
            )
        ]

    @register_sharding(torch.ops.effvit.window_attention_backward.default)
    def backward_rule(
        grad_out, grad_lse, q, k, v, out, lse, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, **geometry
    ):
        small = (bias_table, logit_scale, pad_k, pad_v)
        rules = []
        for r, s, sums in ((Replicate(), Replicate(), Replicate()), (Shard(0), Replicate(), Partial())):
            inputs = [r, present(r, grad_lse), r, r, r, r, r, *(present(s, t) for t in small)]
            rules.append(([r, r, r, *(sums for _ in small)], inputs))
        return rules


if torch.distributed.is_available():
    _register_sharding()


# ---- the public function -------------------------------------------------------------------------------------------


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor | None = None,
    logit_scale: torch.Tensor | None = None,
    pad_k: torch.Tensor | None = None,
    pad_v: torch.Tensor | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    halo: int | tuple[int, int] = 0,
    scale: float | None = None,
    mask_value: float = -100.0,
    roll_before_pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Windowed softmax attention over a whole feature map, in one pass.

    No rolled, partitioned, padded or masked copy of the map, no N×N bias and no mask tensor exists in memory, forward
    or backward. Covers Swin v1 and v2, MaxViT block and grid attention, CSWin stripes, HAT's overlapping windows,
    DaViT, Twins, SwinIR and CrossFormer.

    Args:
        q, k: queries and keys, [B, H, W, h, d]: batch, height, width, heads, head dim.
        v: values, [B, H, W, h, dv].
            All three float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        bias_table: relative position bias [h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w], added to the logits at
            ``[(y_q - y_k) + wh-1+halo_h, (x_q - x_k) + ww-1+halo_w]``, positions counted in tokens of the window. Any
            strides; float32, bfloat16 or float16.
        logit_scale: log-temperature [h] of cosine attention (Swin v2). When given, q and k are L2-normalised and the
            logits are ``exp(min(logit_scale, ln 100)) * cos(q, k)``; ``scale`` must then be None.
        pad_k, pad_v: [h, d] and [h, dv], what tokens outside the map contain (in timm, torchvision and transformers
            the qkv bias: padded tokens join the softmax there). Without them such tokens are excluded.
        window: window height and width in tokens.
        shift: how far the map is rolled up and left before it is cut into windows, in [0, window). Pairs of tokens from
            different sides of the seam get ``mask_value``.
        dilation: distance between neighbouring tokens of a window (MaxViT's grid: window G, dilation H/G).
        halo: tokens by which the key window exceeds the query window on each side (HAT). No wrap-around.
        scale: factor of the logits, d**-0.5 if None.
        mask_value: added to pairs from different shift regions; finite, as in Swin.
        roll_before_pad: timm rolls the map and then pads it; torchvision and transformers (False) pad, then roll.
            They differ where the window does not divide the map.

    Returns:
        ``out`` [B, H, W, h, dv] in the dtype of q, and ``lse`` [B, h, H, W] float32, the natural log-sum-exp of each
        query's logits. Both are differentiable (once) in every tensor argument.

    Accumulates in float32. Deterministic; results do not depend on the number of threads. Under autocast q, k, v and
    the pads are cast, the table and the temperature are not.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; a number is not a number.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Sources: Swin (arXiv:2103.14030), Swin v2 (2111.09883), MaxViT (2204.01697), CSWin (2107.00652), HAT (2205.04437).
    """
    tensors = (q, k, v, bias_table, logit_scale, pad_k, pad_v)
    geometry = {
        "window": _as_list(window), "shift": _as_list(shift), "dilation": _as_list(dilation), "halo": _as_list(halo),
        "scale": scale, "mask_value": mask_value, "roll_before_pad": roll_before_pad,
    }  # fmt: skip
    call = functools.partial(torch.ops.effvit.window_attention.default, *tensors)
    return R.call_or_explain(NAME, call, functools.partial(_validate, NAME, *tensors), geometry)


def _as_list(x):
    if type(x) is int:
        return [x, x]
    return list(x) if type(x) is tuple and all(type(i) is int for i in x) else x
