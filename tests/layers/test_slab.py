"""effvit.layers' SLAB modules against the paper's formulas: SLA, PRepBN, and the fusion of PRepBN."""

import copy

import pytest
import torch
from layer_suite import (
    DTYPES,
    attend,
    check,
    check_everything_else,
    check_forms,
    check_quantised,
    randomise,
    spread,
    tokens,
    with_gradients,
)
from torch import nn

import effvit.layers._written
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import LinearNorm, RepBN, SimplifiedLinearAttention, fold_affine, fuse_prepbn


def plain(m, x, form="pairs"):
    """The attention, and a convolution of every head's map."""
    B, N, C = x.shape
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    q, k = q.relu(), (k + m.positional_encoding).relu()
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2).to(v.dtype) for t in (q, k, v))
    out = attend(q, k, v, lambda s: s + 1e-6, form=form)
    maps = v.transpose(-1, -2).reshape(B * m.num_heads, -1, *m.window_size)
    local = m.dwc(maps).reshape(B, C, N).transpose(1, 2)
    return m.proj(out.transpose(1, 2).flatten(2) + local)


VARIANTS = {"plain": {}, "kernel 3": {"kernel_size": 3}, "one head, no bias": {"num_heads": 1, "qkv_bias": False}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(5, 7), (2, 3), (6, 6)], ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_simplified_linear_attention(kwargs, window, dtype):
    m = randomise(SimplifiedLinearAttention(24, window, **{"num_heads": 3, **kwargs})).to(dtype)
    check_forms(m, plain, tokens(3, window[0] * window[1], 24, dtype=dtype))


def test_autocast():
    m = randomise(SimplifiedLinearAttention(24, (5, 7), 3))
    check_forms(m, plain, tokens(2, 35, 24), autocast=torch.bfloat16)


def test_quantised_projections():
    check_quantised(randomise(SimplifiedLinearAttention(24, (5, 7), 3)), plain, tokens(2, 35, 24))


def test_small_sums_are_not_normalised_to_one():
    """Sums near eps, 1e-6: the attention fades out instead of dividing by almost nothing."""
    m = randomise(SimplifiedLinearAttention(24, (5, 7), 3, qkv_bias=False))
    with torch.no_grad():
        m.positional_encoding.mul_(1e-4)
    check_forms(m, plain, tokens(3, 35, 24) * 1e-4)


def test_maps_and_masks():
    m = randomise(SimplifiedLinearAttention(24, (5, 7), 3, proj_drop=0.3))
    x = tokens(2, 35, 24)
    assert not torch.equal(m(x), m(x))
    m.eval()
    torch.testing.assert_close(m(x.unflatten(1, (5, 7))), m(x).unflatten(1, (5, 7)))
    torch.testing.assert_close(m(x, mask=torch.zeros(1, 35, 35)), m(x))
    with pytest.raises(ValueError, match=r"SimplifiedLinearAttention: x must be \[B, 35, C\] or \[B, 5, 7, C\], got"):
        m(tokens(2, 7, 5, 24))


def test_parameter_names_are_the_originals():
    attention = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "dwc.weight", "dwc.bias", "positional_encoding"}
    assert set(SimplifiedLinearAttention(24, (4, 4), 3).state_dict()) == attention
    bn = {f"bn.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(RepBN(24).state_dict()) == {"alpha"} | bn
    norms = {"norm1.weight", "norm1.bias"} | {f"norm2.{n}" for n in {"alpha"} | bn}
    assert set(LinearNorm(24).state_dict()) == {"warm", "iter", "total_step"} | norms


def test_the_rest():
    make = lambda **factory: SimplifiedLinearAttention(24, (5, 7), 3, **factory)
    check_everything_else(randomise(make()), make, tokens(2, 35, 24))
    make = lambda **factory: LinearNorm(24, **factory)
    check_everything_else(randomise(make()), make, tokens(2, 35, 24))


# ---- PRepBN ------------------------------------------------------------------------------------------------------


def batch_norm(bn, x, training):
    """BatchNorm of tokens [B, N, C] by its formula; no running statistics."""
    mean, var = (bn.running_mean, bn.running_var)
    if training:
        mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    return (x - mean) / (var + bn.eps).sqrt() * spread(bn, "weight", x.shape) + spread(bn, "bias", x.shape)


def plain_rep_bn(m, x):
    if m.training:
        m.bn(x.flatten(0, 1))  # for the running statistics
    return batch_norm(m.bn, x, m.training) + spread(m, "alpha", x.shape) * x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_rep_bn(train, dtype):
    check(randomise(RepBN(24)).train(train).to(dtype), plain_rep_bn, tokens(3, 35, 24, dtype=dtype))


def test_rep_bn_takes_any_number_of_dimensions():
    m, x = randomise(RepBN(6)), tokens(4, 3, 5, 6)
    expected = copy.deepcopy(m)(x.flatten(1, 2)).view(x.shape)
    assert_bitwise_equal(m(x), expected)
    assert_bitwise_equal(m.eval()(x[0, 0]), m(x)[0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("done", [0, 3, 8, 11])
def test_linear_norm_at_every_stage(done, dtype):
    """lambda is 1, 5/8, 0 and 0 after `done` of 8 steps."""
    m = randomise(LinearNorm(24, step=8)).to(dtype)
    m.iter.fill_(max(8 - done, 0))
    weight = max(8 - done, 0) / 8

    def formula(m, x):
        return weight * m.norm1(x) + (1 - weight) * plain_rep_bn(m.norm2, x)

    check(m, formula, tokens(3, 35, 24, dtype=dtype))
    check(m.eval(), lambda m, x: plain_rep_bn(m.norm2, x), tokens(3, 35, 24, dtype=dtype))


def test_linear_norm_schedule():
    m, x = LinearNorm(4, step=4, warm=2, r0=0.5), tokens(3, 5, 4)
    a, b = m.norm1(x), copy.deepcopy(m.norm2)(x)
    for weight, warm, left, seen in (
        (1.0, 1, 4, 0), (1.0, 0, 4, 0), (0.5, 0, 3, 1), (0.375, 0, 2, 2), (0.25, 0, 1, 3), (0.125, 0, 0, 4),
        (0.0, 0, 0, 5), (0.0, 0, 0, 6),
    ):  # fmt: skip
        torch.testing.assert_close(m(x), weight * a + (1 - weight) * b)
        assert (m.warm.item(), m.iter.item(), m.total_step.item()) == (warm, left, 4)
        assert m.norm2.bn.num_batches_tracked.item() == seen  # warm calls leave norm2 alone
    before = {name: b.clone() for name, b in m.named_buffers()}
    m.eval()(x)
    for name, b in m.named_buffers():
        assert_bitwise_equal(b, before[name], name=name)


def test_linear_norm_continues_from_a_checkpoint():
    x = tokens(3, 5, 4)
    for warm in (0, 3):
        m = randomise(LinearNorm(4, step=8, warm=warm))
        for _ in range(2):
            m(x)
        other = LinearNorm(4, step=100)
        other.load_state_dict(m.state_dict(), strict=True)
        for _ in range(4):
            assert_bitwise_equal(other(x), m(x))


def filled(m):
    m.warm.fill_(2)


def copied(m):
    m.warm.copy_(torch.tensor(2))


def replaced(m):
    m.warm = torch.tensor(2)


def loaded(m):
    m.load_state_dict({**m.state_dict(), "warm": torch.tensor(2)})


def averaged(m):
    """As an EMA of the model updates its buffers, through the tensors of its state_dict."""
    m.state_dict()["warm"].mul_(0).add_(2)


@pytest.mark.parametrize("free", [True, False], ids=["on the host", "on a device"])
@pytest.mark.parametrize("set_warm", [filled, copied, replaced, loaded, averaged])
def test_linear_norm_follows_its_buffer(set_warm, free, monkeypatch):
    monkeypatch.setattr(effvit.layers._written, "is_free_to_read", lambda t: free)
    m, x = randomise(LinearNorm(4, step=4)), tokens(3, 5, 4)
    m(x)
    set_warm(m)
    for warm in (1, 0):
        assert_bitwise_equal(m(x), m.norm1(x))
        assert (m.warm.item(), m.iter.item(), m.norm2.bn.num_batches_tracked.item()) == (warm, 3, 1)
    assert not torch.equal(m(x), m.norm1(x)) and (m.warm.item(), m.iter.item()) == (0, 2)
    m.warm.fill_(5)
    assert_bitwise_equal(copy.deepcopy(m)(x), m.norm1(x))
    m.warm.fill_(0)
    assert not torch.equal(m(x), m.norm1(x)) and m.iter.item() == 1


def test_linear_norm_does_not_read_from_its_device(monkeypatch):
    monkeypatch.setattr(effvit.layers._written, "is_free_to_read", lambda t: False)
    m, x, reads = LinearNorm(4, step=4, warm=1), tokens(3, 5, 4), []
    right = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: reads.append(m.iter.item()) or right(t))
    for _ in range(5):
        m(x)
    assert reads == [4, 4]  # the warm call, and the one after it
    m.warm.fill_(0)
    m(x)
    assert len(reads) == 3


def test_compiled_linear_norm_is_one_graph_at_every_stage():
    m, x = randomise(LinearNorm(4, step=4, warm=2)), tokens(3, 5, 4)
    other = copy.deepcopy(m)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for call_number in range(7):
        if call_number == 5:
            m.warm.fill_(1), other.warm.fill_(1)
        expected, got = with_gradients(m, x, lambda m, x: m(x)), with_gradients(other, x, lambda m, x: compiled(x))
        for name, value in got.items():
            torch.testing.assert_close(value, expected.get(name, torch.zeros_like(value)), msg=name)
        for name, value in m.named_buffers():
            torch.testing.assert_close(other.get_buffer(name), value, msg=name)


def test_linear_norm_takes_other_norms():
    class Double(nn.Module):
        def __init__(self, dim):
            super().__init__()

        def forward(self, x):
            return 2 * x

    m, x = LinearNorm(4, norm1=Double, norm2=lambda dim: nn.Identity(), step=2), tokens(2, 3, 4)
    torch.testing.assert_close(m(x), 2 * x)
    torch.testing.assert_close(m(x), 1.5 * x)
    torch.testing.assert_close(m(x), x)


# ---- fusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("make", [RepBN, LinearNorm])
def test_fused_norm_is_exact(make, dtype):
    m = randomise(make(24)).eval().to(dtype)
    x = tokens(3, 35, 24, dtype=dtype)
    fused = m.fuse()
    assert {p.dtype for p in fused.parameters()} == {dtype}
    truth = copy.deepcopy(m).double()(x.double())
    if dtype == torch.float64:
        torch.testing.assert_close(fused(x), truth, rtol=1e-14, atol=1e-14)
    else:
        assert_close_to_truth(fused(x), truth, m(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_folding_into_the_next_linear_is_exact(bias, dtype):
    norm, linear = randomise(RepBN(24)).eval().to(dtype), randomise(nn.Linear(24, 10, bias=bias), seed=3).to(dtype)
    x = tokens(3, 35, 24, dtype=dtype)
    before = copy.deepcopy(linear.state_dict())
    folded = fold_affine(norm.fuse(), linear)
    assert all(torch.equal(t, before[name]) for name, t in linear.state_dict().items())
    assert folded.weight.dtype == dtype and folded.bias is not None
    truth = copy.deepcopy(linear).double()(copy.deepcopy(norm).double()(x.double()))
    if dtype == torch.float64:
        torch.testing.assert_close(folded(x), truth, rtol=1e-13, atol=1e-13)
    else:
        assert_close_to_truth(folded(x), truth, linear(norm(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = LinearNorm(24)
        self.attn = SimplifiedLinearAttention(24, (5, 7), 3)
        self.tail = nn.Sequential(RepBN(24), nn.LayerNorm(24))

    def forward(self, x):
        return self.tail(x + self.attn(self.norm1(x)))


def test_a_model_is_fused_in_place():
    model, x = randomise(Block()), tokens(3, 35, 24)
    with pytest.raises(ValueError, match="module must be in evaluation, got training=True"):
        fuse_prepbn(model)
    before = model.eval()(x)
    truth = copy.deepcopy(model).double()(x.double())
    assert fuse_prepbn(model) == ["norm1", "tail.0"]
    assert not any(isinstance(m, LinearNorm | RepBN) for m in model.modules())
    assert not any(m.training for m in model.modules())
    assert_close_to_truth(model(x), truth, before)
    assert fuse_prepbn(model) == []
    model.attn.qkv, model.norm1 = fold_affine(model.norm1, model.attn.qkv), nn.Identity()
    assert_close_to_truth(model(x), truth, before)


def test_a_norm_under_two_names_is_replaced_under_both():
    norm = randomise(LinearNorm(24))
    model = nn.ModuleDict({"a": norm, "b": nn.ModuleDict({"c": norm}), "d": norm}).eval()
    assert fuse_prepbn(model) == ["a", "d", "b.c"]
    assert model["a"] is model["d"] is model["b"]["c"] and not model["a"].training


class Theirs:
    """SLAB's own classes: the same names and attributes, another forward."""

    class RepBN(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(1))
            self.bn = nn.BatchNorm1d(channels)

        def forward(self, x):
            x = x.transpose(1, 2)
            return (self.bn(x) + self.alpha * x).transpose(1, 2)

    class LinearNorm(nn.Module):
        def __init__(self, dim, norm1, norm2):
            super().__init__()
            self.norm1, self.norm2 = norm1(dim), norm2(dim)

        def forward(self, x):
            return self.norm2(x)


def test_a_model_of_the_originals_classes_is_fused():
    norms = [Theirs.LinearNorm(24, nn.LayerNorm, Theirs.RepBN), Theirs.RepBN(24)]
    model, x = randomise(nn.Sequential(*norms, Theirs.LinearNorm(24, nn.LayerNorm, nn.LayerNorm))), tokens(3, 35, 24)
    before, truth = model.eval()(x), copy.deepcopy(model).double()(x.double())
    assert fuse_prepbn(model) == ["0", "1"]
    assert_close_to_truth(model(x), truth, before)
    with pytest.raises(ValueError, match="module must contain LinearNorm or RepBN, got one itself"):
        fuse_prepbn(norms[1])


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_batch_norm_that_cannot_be_fused_says_why(options):
    model = nn.Sequential(RepBN(24), Theirs.RepBN(24)).eval()
    model[1].bn = nn.BatchNorm1d(24, **options).eval()
    with pytest.raises(ValueError, match="RepBN must have alpha .* with weight, bias and running statistics, got"):
        fuse_prepbn(model)
    assert isinstance(model[0], RepBN)


def test_what_cannot_be_fused_raises():
    for norm in (RepBN(24).eval(), LinearNorm(24).eval()):
        with pytest.raises(ValueError, match="module must contain LinearNorm or RepBN, got one itself"):
            fuse_prepbn(norm)
    model = Block().eval()
    model.norm1.train()
    with pytest.raises(ValueError, match="module must be in evaluation"):
        fuse_prepbn(model)
    with pytest.raises(ValueError, match="LinearNorm: norm2 must be a RepBN to be fused, got LayerNorm"):
        LinearNorm(24, norm2=nn.LayerNorm).fuse()


def test_linear_norm_of_no_steps():
    m, x = randomise(LinearNorm(4, step=0)), tokens(2, 3, 4)
    torch.testing.assert_close(m(x), m.norm2(x))
