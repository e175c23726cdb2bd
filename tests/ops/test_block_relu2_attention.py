"""block_relu2_attention: the shared suite, and its definition against MossFormer's padded groups and GAU's formula."""

import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit.reference.block_relu2_attention import block_relu2_attention as reference
from effvit.testing import backends
from effvit.testing.block_relu2_attention import SPEC
from op_suite import OpSuite


class TestBlockRelu2Attention(OpSuite):
    spec = SPEC


def _tokens(B, L, K, V):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, L, n, generator=generator, dtype=torch.float64) for n in (K, K, V))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L, group", [(12, 4), (13, 5), (3, 8)])
def test_definition_is_mossformers(L, group, causal):
    """Sequences padded with zeros to whole groups, similarities divided by the group's size, token after token."""
    q, k, v = _tokens(2, L, 6, 5)
    padded = [F.pad(t, (0, 0, 0, -L % group)).unflatten(1, (-1, group)) for t in (q, k, v)]
    weights = F.relu(torch.einsum("bgid,bgjd->bgij", *padded[:2]) / group) ** 2
    if causal:
        weights = weights.masked_fill(torch.ones(group, group, dtype=torch.bool).triu(1), 0)
    expected = torch.einsum("bgij,bgjd->bgid", weights, padded[2]).flatten(1, 2)[:, :L]
    found = reference(q, k, v, group=group, causal=causal)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_one_group_is_gaus_quadratic_attention():
    q, k, v = (t.float() for t in _tokens(2, 9, 6, 5))
    expected = F.relu(q @ k.mT / 9) ** 2 @ v
    torch.testing.assert_close(effvit.block_relu2_attention(q, k, v, group=9), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_groups_do_not_see_each_other(causal):
    q, k, v = (t.float() for t in _tokens(1, 10, 6, 5))
    clean = effvit.block_relu2_attention(q, k, v, group=4, causal=causal)
    k[0, 5], v[0, 5] = float("nan"), float("nan")
    for backend in backends("block_relu2_attention"):
        given = [t.to(backend.device) for t in (q, k, v)]
        out = backend.forward(*given, group=4, causal=causal).cpu()
        assert out[0, 5 if causal else 4 : 8].isnan().all(), backend.name
        torch.testing.assert_close(out[:, :4], clean[:, :4])
        torch.testing.assert_close(out[:, 8:], clean[:, 8:])
