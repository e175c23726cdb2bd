"""effvit.layers.ActivatorGatingUnit and ActivatorBlock against their formulas."""

import math

import pytest
import torch
from layer_suite import DTYPES, Record, check, check_everything_else, randomise, tokens

from effvit.layers import ActivatorBlock, ActivatorGatingUnit

DIM, HIDDEN = 12, 20


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def unit(m, x):
    u, v = gelu(m.proj_1(x)), m.proj_2(x)
    return m.proj_3(u * v if m.norm is None else m.norm(u) * m.norm(v))


def block(m, x):
    x = x + unit(m.actgu, m.norm(x))
    return x if m.ffn is None else x + m.ffn.net[3](gelu(m.ffn.net[0](m.norm(x))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_like_the_formula(norm, dtype):
    check(randomise(ActivatorGatingUnit(DIM, HIDDEN, norm)).to(dtype), unit, tokens(2, 7, DIM, dtype=dtype))
    m = randomise(ActivatorBlock(DIM, HIDDEN, norm=norm, ffn=norm)).to(dtype)
    check(m, block, tokens(2, 7, DIM, dtype=dtype))


def test_autocast():
    check(randomise(ActivatorGatingUnit(DIM, HIDDEN, norm=False)), unit, tokens(2, 7, DIM), autocast=torch.bfloat16)


def test_gate_and_product_are_one_operator():
    with Record() as record:
        ActivatorGatingUnit(DIM, HIDDEN, norm=False)(tokens(2, 7, DIM))
    assert record.names.count("glu") == 1 and "gelu" not in record.names


def test_parameter_names_are_the_originals():
    both = lambda *names: {f"{name}.{p}" for name in names for p in ("weight", "bias")}
    unit = both("proj_1", "proj_2", "proj_3", "norm")
    assert set(ActivatorGatingUnit(DIM, HIDDEN).state_dict()) == unit
    names = both("norm", "ffn.net.0", "ffn.net.3") | {f"actgu.{name}" for name in unit}
    assert set(ActivatorBlock(DIM, HIDDEN, 0.1).state_dict()) == names


@pytest.mark.parametrize("make", [
    lambda **factory: ActivatorGatingUnit(DIM, HIDDEN, norm=False, **factory),
    lambda **factory: ActivatorBlock(DIM, HIDDEN, **factory),
], ids=["unit", "block"])  # fmt: skip
def test_the_rest(make):
    check_everything_else(randomise(make()), make, tokens(2, 7, DIM))
