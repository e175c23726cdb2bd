"""The operators as layers call them: what an operator does not take goes to its definition in plain PyTorch."""

import torch

import effvit.ops
import effvit.reference


def _dense(t):
    """A convolution may return any memory format: the operators want a last stride of 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _namespace(dtype, *head_dims):
    """The operators take float32 and below, and head dims up to 256."""
    return effvit.reference if dtype == torch.float64 or max(head_dims) > 256 else effvit.ops


def linear_attention(q, k, v, **options):
    """effvit.linear_attention, of which only `out` is returned."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    namespace = _namespace(q.dtype, q.shape[-1], v.shape[-1])
    out = namespace.linear_attention(q, k, v, **options)
    return out[0] if namespace is effvit.reference else out


def linear_state(k, v):
    """sum_j k_j^T v_j: k [B, M, H, K], v [B, M, H, V] -> [B, H, K, V] in float32 (float64 for float64)."""
    k, v = _dense(k), _dense(v)
    namespace = _namespace(k.dtype, k.shape[-1], v.shape[-1])
    options = {} if namespace is effvit.reference else {"return_state": True}
    state = namespace.linear_attention(k[:, :0], k, v, feature_map="none", normalize="none", **options)[1]
    return state.to(torch.promote_types(state.dtype, torch.float32))


def apply_state(q, state):
    """q_i state: q [B, L, H, K], state [B, H, K, V] as `linear_state` returns it -> [B, L, H, V] in the dtype of q."""
    q = _dense(q)
    B, _, H, K = q.shape
    V = state.shape[-1]
    namespace = _namespace(q.dtype, K, V)
    out = namespace.linear_attention(
        q, q[:, :0], q.new_empty(B, 0, H, V), initial_state=state, initial_z=state.new_zeros(B, H, K),
        feature_map="none", normalize="none",
    )  # fmt: skip
    return out[0] if namespace is effvit.reference else out


def rbf_gram(q, k):
    """effvit.rbf_gram with gamma 1/2."""
    return _namespace(q.dtype, q.shape[-1]).rbf_gram(_dense(q), _dense(k))


def newton_pinv(a, *, iterations):
    """effvit.newton_pinv; beyond 256 x 256 in plain PyTorch, with the same closed-form gradient."""
    return _namespace(a.dtype, a.shape[-1]).newton_pinv(_dense(a), iterations=iterations)
