"""local_pool_attention: the shared suite, and its definition against the attention to all pairs with a mask."""

import pytest
import torch

import effvit
from effvit.reference.local_pool_attention import local_pool_attention as definition
from effvit.testing.local_pool_attention import SPEC
from op_suite import OpSuite


class TestLocalPoolAttention(OpSuite):
    spec = SPEC


def _all_pairs(q, k, v, k_pool, v_pool, local_bias, pool_bias, q_scale, q_embed, tokens, token_bias, *, window):
    """[B, h, N, N + P] scores; the tap of a pair from the difference of their positions."""
    H, W = q.shape[1:3]
    heads = lambda t: t.flatten(1, -3).transpose(1, 2)
    q, k, v, k_pool, v_pool = map(heads, (q, k, v, k_pool, v_pool))
    s = (q + q_embed[:, None]) * q_scale[..., None]
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    dy, dx = (t[None, :] - t[:, None] + window // 2 for t in (y, x))
    near = (dy >= 0) & (dy < window) & (dx >= 0) & (dx < window)
    tap = torch.where(near, dy * window + dx, 0)
    local = (s @ k.mT + local_bias[:, tap]).masked_fill(~near, -torch.inf)
    a, b = torch.cat((local, s @ k_pool.mT + pool_bias), -1).softmax(-1).split((H * W, k_pool.shape[2]), -1)
    extra = q @ tokens + token_bias[:, None]
    a = a + torch.where(near, extra.gather(-1, tap.expand(*a.shape)), 0)
    return (a @ v + b @ v_pool).transpose(1, 2).unflatten(1, (H, W))


@pytest.mark.parametrize("name", ["small", "tiny", "bands"])
def test_definition_is_attention_to_all_pairs(name):
    args, kwargs = SPEC.sample(name).build(torch.float64)
    args = tuple(t.double() for t in args)
    torch.testing.assert_close(definition(*args, **kwargs), _all_pairs(*args, **kwargs), rtol=1e-11, atol=1e-12)


def test_constant_values_come_back():
    """Weights sum to one, at the borders as well, and there are no other keys."""
    args, kwargs = SPEC.sample("small_plain").build()
    q, k, _, k_pool, v_pool = args[:5]
    out = effvit.local_pool_attention(q, k, torch.full_like(q, 3.0), k_pool, torch.full_like(v_pool, 3.0), **kwargs)
    torch.testing.assert_close(out, torch.full_like(q, 3.0))


def test_only_the_window_is_seen():
    """With no pooled tokens a position's value reaches the window around it and nothing else."""
    q, k = torch.randn(2, 1, 6, 7, 1, 4, generator=torch.Generator().manual_seed(0))
    v = torch.zeros(1, 6, 7, 1, 4)
    v[0, 5, 3] = 1.0
    empty = q.new_empty(1, 0, 1, 4)
    seen = effvit.local_pool_attention(q, k, v, empty, empty, window=5)[0, :, :, 0, 0] > 0
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[3:, 1:6] = True
    assert torch.equal(seen, expected)
