"""gated_linear_attention_step: the shared suite and the public function; that it is the op: the op's own tests."""

import pytest
import torch

from effvit.ops import gated_linear_attention_step
from effvit.testing import assert_bitwise_equal
from effvit.testing.gated_linear_attention_step import SPEC
from op_suite import OpSuite


class TestGatedLinearAttentionStep(OpSuite):
    spec = SPEC


def _call():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, d, generator=draw) for d in (16, 16, 5))
    return {"q": q, "k": k, "v": v, "g": None, "state": torch.randn(2, 3, 16, 5, generator=draw)}


@pytest.mark.parametrize("shape, name", [((3,), "g_head"), ((2, 3), "g_token"), ((2, 3, 16), "g_channel")])
def test_public_function(shape, name):
    call, g = _call(), -torch.rand(shape)
    q, k, v, state = (call[n] for n in ("q", "k", "v", "state"))
    op = torch.ops.effvit.gated_linear_attention_step
    for x, e in zip(gated_linear_attention_step(q, k, v, g, state), op(q, k, v, state, **{name: g}, scale=0.25),
                    strict=True):  # fmt: skip
        assert_bitwise_equal(x, e)
    decay = g.exp()[..., None] if name == "g_channel" else g.exp()[..., None, None]
    new = decay * state
    torch.testing.assert_close(op(q, k, v, state, **{name: g})[1], new + k[..., None] * v[..., None, :])


@pytest.mark.parametrize(
    "error, match, change",
    [
        (ValueError, r"g must be \[H\], \[B, H\] or \[B, H, K\], got \[1, 2, 3, 16\]", {"g": torch.zeros(1, 2, 3, 16)}),
        (ValueError, r"g_token must be \[B, H\] = \[2, 3\], got \[2, 2\]", {"g": torch.zeros(2, 2)}),
        (TypeError, "must be a torch.Tensor, got float", {"g": 0.5}),
        (TypeError, "state must be a torch.Tensor, got NoneType", {"state": None}),
        (TypeError, "scale must be a real number, got str", {"scale": "1"}),
    ],
)
def test_public_function_refuses(error, match, change):
    with pytest.raises(error, match=f"effvit::gated_linear_attention_step: .*{match}"):
        gated_linear_attention_step(**_call() | change)
