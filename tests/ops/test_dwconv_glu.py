"""dwconv_glu: the shared suite, and its definition against shifted sums and TransNeXt's and HorNet's own order."""

import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit.reference.dwconv_glu import dwconv_glu as definition
from effvit.testing import backends
from effvit.testing.dwconv_glu import NAMES, SPEC
from op_suite import OpSuite


class TestDwconvGlu(OpSuite):
    spec = SPEC


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _shifted_sum(x, w, b):
    """The convolution, one shifted map after the other."""
    H, W, r = *x.shape[1:3], w.shape[-1] // 2
    padded = F.pad(x, (0, 0, r, r, r, r))
    shifts = [(i, j) for i in range(2 * r + 1) for j in range(2 * r + 1)]
    return b + sum(padded[:, i : i + H, j : j + W] * w[:, i, j] for i, j in shifts)


@pytest.mark.parametrize("act", NAMES)
def test_definition_is_a_sum_of_shifted_maps(act):
    x, v, w, b = _randn(2, 4, 5, 6), _randn(2, 4, 5, 6, seed=1), _randn(6, 5, 5, seed=2), _randn(6, seed=3)
    act_of = {
        "sigmoid": lambda z: 1 / (1 + (-z).exp()), "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "silu": lambda z: z / (1 + (-z).exp()), "relu": lambda z: z.clamp(min=0), "tanh": torch.tanh,
        "none": lambda z: z,
    }[act]  # fmt: skip
    torch.testing.assert_close(definition(x, v, w, b, act=act), act_of(_shifted_sum(x, w, b)) * v)


def test_where_the_gates_are():
    """Halves of one projection in both orders, and gates of some channels."""
    x, v, w = _randn(1, 3, 4, 6).float(), _randn(1, 3, 4, 2, seed=1).float(), _randn(6, 3, 3, seed=2).float()
    expected = effvit.dwconv_glu(x, None, w, act="none")
    expected = torch.cat((expected[..., :2] * v, expected[..., 2:]), -1)
    for found in (
        effvit.dwconv_glu(x, v, w[:, None], act="none"),
        effvit.dwconv_glu(torch.cat((x, v), -1), None, w, act="none"),
        effvit.dwconv_glu(torch.cat((v, x), -1), None, w, act="none", gate_first=True),
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", backends("dwconv_glu"), ids=lambda b: b.name)
@pytest.mark.parametrize("k", [3, 5, 7])
def test_zeros_around_the_map_are_not_read(k, backend):
    """An infinity at a border spreads to its neighbours and no further."""
    x, v, w = (torch.ones(s, device=backend.device) for s in ((1, 8, 9, 4), (1, 8, 9, 4), (4, k, k)))
    x[0, 0, 8, 1] = torch.inf
    out = backend.forward(x, v, w, None, act=NAMES.index("none"), gate_first=False).cpu()
    touched = torch.zeros(1, 8, 9, 4, dtype=torch.bool)
    touched[0, : k // 2 + 1, 8 - k // 2 :, 1] = True
    assert torch.equal(out.isinf(), touched) and not out.isnan().any()
