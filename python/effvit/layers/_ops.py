"""The operators as layers call them: what an operator does not take goes to its definition in plain PyTorch."""

from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import effvit.ops
import effvit.reference

from ..ops import _dispatcher
from ..ops.fft_conv import _as_kernel, _as_map
from ..ops.fft_conv import _options as _fft_options
from ..ops.int8_attention import NAMES as _EXPONENTIALS
from ..ops.rnn_scan import last_state
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


def wide(t):
    """A tensor in float32, in float64 if it is: where gates and states are computed."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


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


def gated_linear_attention(
    q, k, v, g=None, initial_state=None, cu_seqlens=None, *, scale=None, reverse=False, bidirectional=False,
    return_state=False,
):  # fmt: skip
    """effvit.gated_linear_attention: `out`, with return_state also the state, in float32 (float64 for float64)."""
    q, k, v, g = _dense(q), _dense(k), _dense(v), None if g is None else _dense(g)
    if _covered(q.dtype, q.shape[-1], v.shape[-1]):
        return effvit.ops.gated_linear_attention(
            q, k, v, g, initial_state, cu_seqlens, scale=scale, reverse=reverse, bidirectional=bidirectional,
            return_state=return_state,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gates = {"g_head": None, "g_token": None, "g_channel": None}
    if g is not None:
        gates[{1: "g_head", 3: "g_token", 4: "g_channel"}[g.dim()]] = g
    out, state = _reference(
        "gated_linear_attention", q, k, v, *gates.values(), cu_seqlens, initial_state, scale=scale,
        direction=2 if bidirectional else int(reverse),
    )  # fmt: skip
    return (out.to(q.dtype), state) if return_state else out.to(q.dtype)


def glu(a, b, act):
    """effvit.glu of two tensors, a * act(b); float64 in plain PyTorch."""
    a, b = _dense(a), _dense(b)
    if _covered(a.dtype, 1):
        return effvit.ops.glu(a, b, act=act)
    return _reference("glu", a, b, act=act).to(a.dtype)


def softmax_attention(q, k, v, **options):
    """F.scaled_dot_product_attention of heads [.., L, d]; its fused kernels have no forward mode."""
    transformed = not torch.compiler.is_compiling() and _dispatcher.in_transform()
    with sdpa_kernel(SDPBackend.MATH) if transformed else nullcontext():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)


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


def selective_scan2d(x, dt, b, c, a, d=None, dt_bias=None):
    """effvit.selective_scan2d; float64 and more than 256 states in plain PyTorch. The result is float32 or wider."""
    x, dt, b, c = map(_dense, (x, dt, b, c))
    if _covered(x.dtype, b.shape[-1]):
        return effvit.ops.selective_scan2d(x, dt, b, c, a, d, dt_bias)
    return _reference("selective_scan2d", x, dt, b, c, a, d, dt_bias)


def spectral_gate(x, weight):
    """effvit.spectral_gate with one weight; float64 in plain PyTorch."""
    x = _dense(x)
    if _covered(x.dtype, 1):
        return effvit.ops.spectral_gate(x, weight)
    return _reference("spectral_gate", x.unsqueeze(0), weight.unsqueeze(0)).squeeze(0)


def _filters(weight):
    """[C, 1, K, K] or [C, K, K] -> [C, K, K]"""
    return weight.squeeze(1) if weight.dim() == 4 else weight


def dwconv_glu(x, v, weight, bias=None, **options):
    """effvit.dwconv_glu; float64 in plain PyTorch."""
    x, v = _dense(x), None if v is None else _dense(v)
    if _covered(x.dtype, 0):
        return effvit.ops.dwconv_glu(x, v, weight, bias, **options)
    return _reference("dwconv_glu", x, v, _filters(weight), bias, **options).to(x.dtype)


def dwconv(x, weight, bias=None, *, padding=None, dilation=(1, 1), window=None, act="none"):
    """effvit.dwconv of a map, with as many zeros (rows, columns) on either side, or what keeps its size; float64 in
    plain PyTorch."""
    x = _dense(x)
    if _covered(x.dtype, 0):
        zeros = "same" if padding is None else padding
        return effvit.ops.dwconv(x, weight, bias, padding=zeros, dilation=dilation, window=window, act=act)
    reach = [(n - 1) * d for n, d in zip(weight.shape[-2:], dilation, strict=True)]
    before = [n // 2 for n in reach] if padding is None else padding
    after = [n - b for n, b in zip(reach, before, strict=True)] if padding is None else padding
    options = {"before": before, "after": after, "dilation": dilation, "window": window or (0, 0)}
    return _reference("dwconv", x, _filters(weight), bias, act=act, **options).to(x.dtype)


def local_pool_attention(q, k, v, k_pool, v_pool, *, window, drop=None, **optional):
    """effvit.local_pool_attention; with dropout and in float64 in plain PyTorch."""
    maps, optional = [_dense(t) for t in (q, k, v, k_pool, v_pool)], {n: _wide(t) for n, t in optional.items()}
    if _covered(q.dtype, q.shape[-1]) and drop is None:
        return effvit.ops.local_pool_attention(*maps, **optional, window=window)
    return _reference("local_pool_attention", *maps, **optional, window=window, drop=drop).to(q.dtype)


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


def block_relu2_attention(q, k, v, *, group, causal=False):
    """effvit.block_relu2_attention; groups of more than 1024 tokens and values of more than 2048 columns in PyTorch."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    if _covered(q.dtype, q.shape[-1]) and group <= 1024 and v.shape[-1] <= 2048:
        return effvit.ops.block_relu2_attention(q, k, v, group=group, causal=causal)
    return _reference("block_relu2_attention", q, k, v, group=group, causal=causal).to(q.dtype)


def aft(q, k, v, bias=None, *, window=0):
    """effvit.aft; float64 in plain PyTorch."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    if _covered(q.dtype, 1):
        return effvit.ops.aft(q, k, v, bias, window=window)
    return _reference("aft", q, k, v, bias, window=window)[0].to(q.dtype)


def rnn_scan(x, weight, bias=None, initial=None, *, cell):
    """effvit.rnn_scan: (h, the states after the last token); heads of more than 1024 channels in plain PyTorch."""
    if _covered(x.dtype, 1) and x.shape[-1] <= 1024:
        initial = None if initial is None else initial.float()
        return effvit.ops.rnn_scan(x, weight, bias, initial, cell=cell, return_state=True)
    out, trace = _reference("rnn_scan", x, weight, bias, initial, cell=cell)
    return out.to(x.dtype), last_state(trace, initial, cell)


def dwconv_tokens(x, weight, bias=None, *, causal=True, dilation=1, act="none"):
    """effvit.dwconv of tokens [B, L, C], each sees those before it, or both sides; float64, and dilations
    beyond those of the operator, in plain PyTorch."""
    x = _dense(x)
    if _covered(x.dtype, 0) and dilation <= 32768:
        return effvit.ops.dwconv(x, weight, bias, causal=causal, dilation=dilation, act=act)
    reach = (weight.shape[-1] - 1) * dilation
    before = reach if causal else reach // 2
    options = {"before": (0, before), "after": (0, reach - before), "dilation": (1, dilation), "act": act}
    return _reference("dwconv", x.unsqueeze(1), weight, bias, **options).squeeze(1).to(x.dtype)


def fft_conv_spectrum(k, size, **options):
    """effvit.fft_conv_spectrum, in any dtype."""
    return effvit.ops.fft_conv_spectrum(k, size, **options)


def fft_conv(
    u, k=None, d=None, *, pregate=None, postgate=None, k_rev=None, spectrum=None, mode="causal", channels_last=False,
    act="none", kernel_scale=1.0,
):  # fmt: skip
    """effvit.fft_conv; float64 in plain PyTorch. Gates are cast to the dtype of u."""
    pregate, postgate = (t if t is None else t.to(u.dtype) for t in (pregate, postgate))
    if channels_last:
        u, pregate, postgate = (t if t is None else _dense(t) for t in (u, pregate, postgate))
    if _covered(u.dtype, 0):
        return effvit.ops.fft_conv(
            u, k, d, pregate=pregate, postgate=postgate, k_rev=k_rev, spectrum=spectrum, mode=mode,
            channels_last=channels_last, act=act, kernel_scale=kernel_scale,
        )  # fmt: skip
    axes = u.dim() - 2
    maps = [_as_map(t, axes, channels_last) for t in (u, pregate, postgate)]
    k, k_rev, spectrum = (_as_kernel("k", t, axes) for t in (k, k_rev, spectrum))
    spectrum = None if spectrum is None else torch.view_as_real(spectrum.resolve_conj())
    options = _fft_options("fft_conv", axes, mode, None) | {"act": ("none", "gelu", "silu").index(act)}
    out = _reference("fft_conv", maps[0], k, d, *maps[1:], k_rev, spectrum, **options, kernel_scale=kernel_scale)
    return out.reshape(u.shape).to(u.dtype)
