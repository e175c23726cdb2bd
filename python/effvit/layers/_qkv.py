"""Splitting a packed qkv projection into q, k, v views whose gradients come back without a copy."""

import torch

from ..ops._dispatcher import in_transform


def _views(qkv, num_heads):
    # not unflatten: the TorchScript-based ONNX exporter takes its result's sizes for constants
    return qkv.view(*qkv.shape[:-1], 3, num_heads, qkv.shape[-1] // (3 * num_heads)).unbind(-3)


def packed_buffer(grads):
    """The tensor [B, H, W, 3*h*d] of which `grads` are the three consecutive views [B, H, W, h, d], or None.

    `window_attention_backward` writes dq, dk, dv into one buffer; where the three gradients arrive here untouched,
    that buffer already is the gradient of the packed projection.
    """
    first = grads[0]
    if any(type(g) is not torch.Tensor or g.layout is not torch.strided for g in grads) or first.dim() != 5:
        return None  # FakeTensor, DTensor and other subclasses have no meaningful data_ptr
    B, H, W, h, d = first.shape
    width, item = h * d, first.element_size()
    strides = (H * W * 3 * width, W * 3 * width, 3 * width, d, 1)
    storage = first.untyped_storage().data_ptr()
    for i, g in enumerate(grads):
        same = g.shape == first.shape and g.dtype == first.dtype and g.device == first.device
        if not (same and g.numel() and g.stride() == strides and not g.is_conj() and not g.is_neg()):
            return None
        if g.untyped_storage().data_ptr() != storage or g.data_ptr() != first.data_ptr() + i * width * item:
            return None
    return first.as_strided((B, H, W, 3 * width), (*strides[:3], 1))


class _SplitQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads):
        ctx.set_materialize_grads(False)
        return _views(qkv, num_heads)

    @staticmethod
    def backward(ctx, *grads):
        if not torch.is_grad_enabled() and all(g is not None for g in grads):
            packed = packed_buffer(grads)
            if packed is not None:
                return packed, None
        like = next((g for g in grads if g is not None), None)
        if like is None:
            return None, None
        # Differentiable, so that create_graph=True stays right.
        grads = [torch.zeros_like(like) if g is None else g for g in grads]
        return torch.stack(grads, dim=-3).flatten(-3), None


def split_qkv(qkv, num_heads):
    """qkv [B, H, W, 3*h*d] -> q, k, v, each a view [B, H, W, h, d].

    Inside a compiler, an export, a trace, torch.func or forward-mode AD, and for tensor subclasses, these are plain
    views: there the data pointers that the copy-free backward compares do not exist.
    """
    if (
        torch.compiler.is_compiling()
        or not (torch.is_grad_enabled() and qkv.requires_grad)
        or type(qkv) not in (torch.Tensor, torch.nn.Parameter)
        or torch.jit.is_tracing()
        or in_transform()
    ):
        return _views(qkv, num_heads)
    return _SplitQKV.apply(qkv, num_heads)
