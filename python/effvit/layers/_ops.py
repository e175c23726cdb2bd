"""The operators as layers call them: what an operator does not take goes to its definition in plain PyTorch."""

from contextlib import nullcontext

import torch

import effvit.ops
import effvit.reference

from ..ops import _dispatcher
from ..ops.int8_attention import NAMES as _EXPONENTIALS
from ..reference import int8_attention as _int8_attention
from ..reference.block_sparse_linear import block_sparse_linear as _block_sparse_definition
from ..reference.sparse24_compress import sparse24_decompress
from ..reference.sparse24_mask import sparse24_mask as _mask_definition
from ..reference.sparse24_prune import sparse24_prune as _prune_definition
from ..reference.sparse24_prune import sparse24_prune_backward


def _dense(t):
    """A convolution may return any memory format: the operators want a last stride of 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def as_parameter(t):
    """A parameter, or, as one, a copy of what a parametrisation makes (that of effvit.sparsify_); None stays None."""
    return t if t is None or isinstance(t, torch.nn.Parameter) else torch.nn.Parameter(t.detach().clone())


def _covered(dtype, *head_dims):
    """The operators take float32 and below, and head dims up to 256."""
    return dtype != torch.float64 and max(head_dims) <= 256


def asks_for_derivatives(*tensors):
    """Whether autograd records, or a transform of torch.func or forward mode is open: the formula of a layer runs."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return recorded or (not torch.compiler.is_compiling() and _dispatcher.in_transform())


def _wide(t):
    is_float = isinstance(t, torch.Tensor) and t.is_floating_point()
    return t.to(torch.promote_types(t.dtype, torch.float32)) if is_float else t


def _reference(name, *tensors, **options):
    """A definition computes in the dtype of its inputs: 16-bit ones in float32 here, as in the operators."""
    options = {key: _wide(t) for key, t in options.items()}
    device = tensors[0].device.type
    off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with off:
        return getattr(effvit.reference, name)(*map(_wide, tensors), **options)


def linear_attention(q, k, v, **options):
    """effvit.linear_attention, of which only `out` is returned."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    if _covered(q.dtype, q.shape[-1], v.shape[-1]):
        return effvit.ops.linear_attention(q, k, v, **options)
    return _reference("linear_attention", q, k, v, **options)[0].to(q.dtype)


def linear_state(k, v):
    """sum_j k_j^T v_j: k [B, M, H, K], v [B, M, H, V] -> [B, H, K, V] in float32 (float64 for float64)."""
    k, v = _dense(k), _dense(v)
    options = {"feature_map": "none", "normalize": "none"}
    if _covered(k.dtype, k.shape[-1], v.shape[-1]):
        return effvit.ops.linear_attention(k[:, :0], k, v, return_state=True, **options)[1]
    return _reference("linear_attention", k[:, :0], k, v, **options)[1]


def apply_state(q, state):
    """q_i state: q [B, L, H, K], state [B, H, K, V] as `linear_state` returns it -> [B, L, H, V] in the dtype of q."""
    q = _dense(q)
    B, _, H, K = q.shape
    V = state.shape[-1]
    return linear_attention(
        q, q[:, :0], q.new_empty(B, 0, H, V), initial_state=state, initial_z=state.new_zeros(B, H, K),
        feature_map="none", normalize="none",
    )  # fmt: skip


def int8_attention(q, k, v, *, exponential="exp2", **options):
    """effvit.int8_attention; where it does not apply its definition, whose derivative is that of float attention."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    if _covered(q.dtype, q.shape[-1], v.shape[-1]):
        return effvit.ops.int8_attention(q, k, v, exponential=exponential, **options)
    options["exponential"] = _EXPONENTIALS.index(exponential)
    exact = _int8_attention.int8_attention(q, k, v, **options)[0]
    smooth = _int8_attention.float_attention(q, k, v, **options)[0]
    return smooth + (exact - smooth).detach()


def rbf_gram(q, k):
    """effvit.rbf_gram with gamma 1/2."""
    q, k = _dense(q), _dense(k)
    if _covered(q.dtype, q.shape[-1]):
        return effvit.ops.rbf_gram(q, k)
    return _reference("rbf_gram", q, k).to(q.dtype)


def newton_pinv(a, *, iterations):
    """effvit.newton_pinv; beyond 256 x 256 in plain PyTorch, with the same closed-form gradient."""
    a = _dense(a)
    if _covered(a.dtype, a.shape[-1]):
        return effvit.ops.newton_pinv(a, iterations=iterations)
    return _reference("newton_pinv", a, iterations=iterations).to(a.dtype)


def block_sparse_linear(x, values, crow, columns, bias=None, activation="none"):
    """effvit.block_sparse_linear; float64 in plain PyTorch."""
    x = _dense(x)
    if x.dtype != torch.float64:
        return effvit.ops.block_sparse_linear(x, values, crow, columns, bias, activation=activation)
    return _block_sparse_definition(x, values, crow, columns, bias, activation=activation)


def sparse24_linear(x, values, meta, bias=None):
    """effvit.sparse24_linear; float64 in plain PyTorch."""
    x = _dense(x)
    if x.dtype != torch.float64:
        return effvit.ops.sparse24_linear(x, values, meta, bias)
    return torch.nn.functional.linear(x, sparse24_decompress(values, meta), bias)


class _Prune(torch.autograd.Function):
    """The definition of sparse24_prune with its own gradient, for float64."""

    @staticmethod
    def forward(ctx, w, algorithm, strength, decay):
        ctx.save_for_backward(w)
        ctx.options = {"algorithm": algorithm, "strength": strength}
        return _prune_definition(w, algorithm=algorithm, decay=decay)

    @staticmethod
    def backward(ctx, g):
        return sparse24_prune_backward(g, *ctx.saved_tensors, **ctx.options), None, None, None


def sparse24_prune(w, *, algorithm, strength, decay=0.0):
    """effvit.sparse24_prune; float64 in plain PyTorch."""
    if w.dtype != torch.float64:
        return effvit.ops.sparse24_prune(w, algorithm=algorithm, strength=strength, decay=decay)
    return _Prune.apply(w, algorithm, strength, decay)


def sparse24_mask(w, *, algorithm):
    """effvit.sparse24_mask; float64 in plain PyTorch."""
    if w.dtype != torch.float64:
        return effvit.ops.sparse24_mask(w, algorithm=algorithm)
    return _mask_definition(w, algorithm=algorithm)
