"""dwconv: the shared suite, and its definition against sums written out, PyTorch's modules and calls in parts."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit import _backends
from effvit.reference.dwconv import dwconv as definition
from effvit.testing._depthwise import away_from_kink
from effvit.testing.dwconv import NAMES, SPEC, _terms
from op_suite import OpSuite


class TestDwconv(OpSuite):
    spec = SPEC


def _randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _integers(*shape, seed=0):
    return _randn(*shape, seed=seed, dtype=torch.float32).mul(2).round()


def _written_out(x, w, before, size, dilation):
    """One output after the other, one tap after the other."""
    (B, H, W, C), (_, kh, kw) = x.shape, w.shape
    out = x.new_zeros(B, *size, C)
    for y in range(size[0]):
        for column in range(size[1]):
            for i in range(kh):
                for j in range(kw):
                    at_y, at_x = y + i * dilation[0] - before[0], column + j * dilation[1] - before[1]
                    if 0 <= at_y < H and 0 <= at_x < W:
                        out[:, y, column] += w[:, i, j] * x[:, at_y, at_x]
    return out


@pytest.mark.parametrize("act", NAMES)
def test_definition_is_the_sum_written_out(act):
    x, gate, w, b = _randn(2, 4, 5, 3), _randn(2, 4, 5, 3, seed=1), _randn(3, 2, 3, seed=2), _randn(3, seed=3)
    postgate = _randn(2, 5, 4, 3, seed=4)
    act_of = {
        "sigmoid": lambda z: 1 / (1 + (-z).exp()), "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "silu": lambda z: z / (1 + (-z).exp()), "relu": lambda z: z.clamp(min=0), "tanh": torch.tanh,
        "none": lambda z: z,
    }[act]  # fmt: skip
    options = {"before": (2, 1), "after": (1, 2), "dilation": (2, 2)}
    expected = postgate * act_of(b + _written_out(x * gate, w, (2, 1), (5, 4), (2, 2)))
    torch.testing.assert_close(definition(x, w, b, gate, postgate, act=act, **options), expected)


@pytest.mark.parametrize("k", [(1, 1), (2, 3), (4, 2), (1, 11), (11, 1), (13, 13)])
@pytest.mark.parametrize("padding", ["same", "valid", 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_as_conv2d(k, padding, dilation):
    """Also for even kernels, whose "same" padding is larger at the end; float32, by the kernel that runs here."""
    x, w, b = _randn(2, 27, 26, 5), _randn(5, 1, *k, seed=1), _randn(5, seed=2)
    args = x.permute(0, 3, 1, 2), w, b
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths", UserWarning)
        expected = F.conv2d(*args, padding=padding, dilation=dilation, groups=5).permute(0, 2, 3, 1)
    found = effvit.dwconv(x.float(), w.float(), b.float(), padding=padding, dilation=dilation)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)  # up to 169 terms around 1


@pytest.mark.parametrize("k", [1, 2, 3, 8, 31])
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_as_conv1d(k, padding):
    x, w = _randn(2, 40, 6), _randn(6, 1, k, seed=1)
    expected = F.conv1d(x.mT, w, padding=padding, groups=6).mT
    for weight in (w, w.squeeze(1)):
        found = effvit.dwconv(x.float(), weight.float(), padding=padding)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_causal_is_padding_before_the_sequence():
    x, w = _randn(2, 9, 6), _randn(6, 4, seed=1)
    expected = F.conv1d(F.pad(x.mT, (6, 0)), w[:, None], dilation=2, groups=6).mT
    found = effvit.dwconv(x.float(), w.float(), causal=True, dilation=2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k, dilation", [(4, 1), (3, 3), (1, 1), (9, 1)])
@pytest.mark.parametrize("gated", [False, True])
def test_in_parts_with_a_state(k, dilation, gated):
    """A sequence in parts, of which some are shorter than the state, is the whole. Sums of integers are exact."""
    x, gate, w = (_integers(*s, seed=i) for i, s in enumerate(((2, 20, 6), (2, 20, 6), (6, k))))
    gates = {"pregate": gate, "postgate": gate} if gated else {}
    whole = effvit.dwconv(x, w, causal=True, dilation=dilation, act="relu", **gates)
    state, parts = torch.zeros(2, (k - 1) * dilation, 6), []
    for begin, end in ((0, 7), (7, 8), (8, 8), (8, 10), (10, 20)):
        part = {name: t[:, begin:end] for name, t in gates.items()}
        out, state = effvit.dwconv(x[:, begin:end], w, state=state, causal=True, dilation=dilation, act="relu", **part)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), whole)
    u = x * gate if gated else x
    assert torch.equal(state, F.pad(u.mT, ((k - 1) * dilation, 0)).mT[:, x.shape[1] :])


def test_gradients_flow_through_the_state():
    x, w = _randn(1, 8, 4, dtype=torch.float32).requires_grad_(), _randn(4, 3, seed=1, dtype=torch.float32)
    whole = torch.autograd.grad(effvit.dwconv(x, w, causal=True).square().sum(), x)[0]
    first, state = effvit.dwconv(x[:, :5], w, state=torch.zeros(1, 2, 4), causal=True)
    second, _ = effvit.dwconv(x[:, 5:], w, state=state, causal=True)
    parts = torch.autograd.grad(first.square().sum() + second.square().sum(), x)[0]
    torch.testing.assert_close(parts, whole)


def test_windows_are_maps_of_their_own():
    x, w = _integers(2, 6, 8, 5), _integers(5, 3, 3, seed=1)
    found = effvit.dwconv(x, w, window=(3, 4))
    for y in (0, 3):
        for column in (0, 4):
            window = (slice(None), slice(y, y + 3), slice(column, column + 4))
            assert torch.equal(found[window], effvit.dwconv(x[window], w))
    sequence, taps = x[:, 0], w[:, 0]
    found = effvit.dwconv(sequence, taps, window=4)
    assert torch.equal(found[:, 4:], effvit.dwconv(sequence[:, 4:], taps))


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("dilation", [5, 8, 9, 10, 11, 30, 32768])
def test_taps_further_apart_than_the_map(dilation, axis):
    """At most one tap meets the map from an output; time and memory do not grow with the distance."""
    turned = (lambda t: t) if axis == "columns" else (lambda t: t.transpose(-2, -3) if t.dim() == 4 else t.mT)
    x, w, size = _integers(2, 1, 4, 17), _integers(17, 1, 3, seed=1), 5
    befores = {0, 1, 4, 5, *(dilation * n + i for n in (1, 2) for i in (-5, -4, -3, -1, 0, 2, 4))}
    for before in sorted(befores):
        after = size - 4 - before + 2 * dilation
        if after < 0 or before < 0:
            continue
        leaves = [turned(t).contiguous().requires_grad_() for t in (x, w)]
        names = {"before": before, "after": after, "dilation": dilation}
        options = {
            n: [i, v][:: 1 if axis == "columns" else -1] for (n, v), i in zip(names.items(), (0, 0, 1), strict=True)
        }
        out = torch.ops.effvit.dwconv(*leaves, **options)
        same = [t.clone().requires_grad_() for t in (x, w)]
        expected = _written_out(*same, (0, before), (1, size), (1, dilation)) + 0 * sum(t.sum() for t in same)
        g = _integers(2, 1, size, 17, seed=2)
        assert torch.equal(out, turned(expected))
        found = torch.autograd.grad(out, leaves, turned(g).contiguous())
        for got, want in zip(found, torch.autograd.grad(expected, same, g), strict=True):
            assert torch.equal(got, turned(want))


NEAR_FILTERS = [(3, 3), (1, 4), (5, 2), (7, 7), (9, 1), (4, 12), (2, 17), (19, 33)]


@pytest.mark.parametrize("isa", _backends.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", NEAR_FILTERS)
def test_whole_vectors_of_channels(k, dtype, isa):
    """What the CPU's kernel takes from memory to memory, and what leads away from that, around the widths of its tiles.
    Sums of integers are exact."""
    _backends.set_isa(isa)
    for n, width in enumerate((1, 3, 7, 8, 14, 17, 23, 24)):
        same = {"before": [n // 2 for n in k], "after": [n - 1 - n // 2 for n in k]}
        calls = {
            "moved": {"before": [0, k[1]], "after": [k[0], 1]},
            "dilated rows": {
                "before": [k[0], same["before"][1]],
                "after": [k[0], same["after"][1]],
                "dilation": [2, 1],
            },
            "activation": same | {"act": "relu"},  # and a gate
            "windows": same | {"window": [3, width]},
        }
        other = list(calls)[n % 4]
        for name, options in (("plain", same), (other, calls[other])):
            x, w, b = (_integers(*s, seed=i).to(dtype) for i, s in enumerate(((2, 6, width, 32), (32, *k), (32,))))
            if width % 3 == 0:  # pixels whole pages apart
                x = torch.stack([x] * 64, -2).flatten(-2)[..., :32]
            leaves = [t.requires_grad_() for t in (x, w, b)]
            if name == "activation":
                leaves += [_integers(2, 6, width, 32, seed=4).to(dtype).requires_grad_()]
            exact = [t.detach().double().requires_grad_() for t in leaves]
            args, truths = ([*t[:3], None, *t[3:]] for t in (leaves, exact))  # no pregate, a postgate or none
            expected = definition(*truths, **options)
            act = NAMES.index(options.get("act", "none"))
            out = torch.ops.effvit.dwconv(*args, **options | {"act": act})
            assert torch.equal(out, expected.to(dtype)), (width, name)
            g = _integers(*out.shape, seed=3).to(dtype)
            found = torch.autograd.grad(out, leaves, g)
            for got, want in zip(found, torch.autograd.grad(expected, exact, g.double()), strict=True):
                assert torch.equal(got, want.to(dtype)), (width, name)


@pytest.mark.parametrize("C", [4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_around_the_map_are_not_read(dtype, C):
    """An infinity at a border spreads to its neighbours and no further; nor does it over the end of a row."""
    x, w = torch.ones(1, 6, 6, C, dtype=dtype), torch.ones(C, 3, 3, dtype=dtype)
    x[0, 0, 5, 1] = torch.inf
    out = effvit.dwconv(x, w)
    touched = torch.zeros(1, 6, 6, C, dtype=torch.bool)
    touched[0, :2, 4:, 1] = True
    assert torch.equal(out.isinf(), touched) and not out.isnan().any()


@pytest.mark.parametrize("C", [4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_result_does_not_reach_is_not_in_the_gradient_of_weights(dtype, C):
    """Columns beyond the last output meet some taps only: an infinity there stays with those."""
    x, w = torch.ones(1, 1, 13, C, dtype=dtype), torch.ones(C, 3, dtype=dtype, requires_grad=True)
    x[0, 0, 12, 0] = torch.inf
    effvit.dwconv(x[:, 0], w, padding="valid").sum().backward()
    assert torch.equal(w.grad[0], torch.tensor([11.0, 11.0, torch.inf], dtype=dtype))


def test_an_infinite_weight_meets_no_row_that_is_not_there():
    """Of rows in pairs, too, where the partner is beyond the border."""
    x, w = torch.ones(1, 4, 9, 32, dtype=torch.bfloat16), torch.ones(32, 3, 3, dtype=torch.bfloat16)
    w[:, 0] = torch.inf
    out = effvit.dwconv(x, w)
    assert out[:, 0].isfinite().all() and out[:, 1:].isposinf().all()
    w[:, 0], w[:, 2] = 1, torch.inf
    out = effvit.dwconv(x, w)
    assert out[:, 3].isfinite().all() and out[:, :3].isposinf().all()


def test_of_nothing_comes_nothing():
    """A map lower than the filter by one, which PyTorch refuses: a result without rows, gradients of zeros."""
    x, w = torch.ones(2, 2, 5, 4, requires_grad=True), torch.ones(4, 3, 3, requires_grad=True)
    out = effvit.dwconv(x, w, padding="valid")
    assert out.shape == (2, 0, 3, 4)
    out.sum().backward()
    assert not x.grad.any() and not w.grad.any()


def test_the_definition_of_nothing():
    """In float64 too, with every kind of argument: gradients of zeros for all."""
    x, w, b = _randn(2, 1, 3, 4), _randn(4, 1, 5, seed=1), _randn(4, seed=2)
    tensors = [t.requires_grad_() for t in (x, w, b, _randn(2, 1, 3, 4), _randn(2, 1, 0, 4), _randn(2, 1, 1, 4))]
    out = definition(*tensors, before=(0, 1))
    assert out.shape == (2, 1, 0, 4) and out.dtype == torch.float64
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors, strict=True))


def test_samples_keep_away_from_the_kink_of_relu():
    """Where rounding decides on the slope, samples are drawn again, and gradients have no magnitudes."""
    options = {"before": [0, 0], "after": [0, 0], "dilation": [1, 1], "window": [0, 0], "act": NAMES.index("relu")}
    call = lambda x: (torch.tensor(x).view(1, 1, 2, 1), torch.tensor([[[1.0, -1.0]]]), *[None] * 4)
    draws = iter([[1.0, 1.0], [1.0, 1.0 + 2**-22], [1.0, 0.5]])
    (x, *_), _ = away_from_kink(lambda *_: (call(next(draws)), options), _terms)(torch.float32, "cpu", None)
    assert x.flatten().tolist() == [1.0, 0.5]
    with pytest.raises(AssertionError, match="every draw is too near to relu's kink"):
        away_from_kink(lambda *_: (call([1.0, 1.0]), options), _terms)(torch.float32, "cpu", None)
    wide = lambda args: tuple(None if t is None else t.double() for t in args)
    grads = (torch.ones(1, 1, 1, 1).double(),)
    assert SPEC.magnitudes(wide(call([1.0, 0.5])), options, grads, 1e-7)[1]["weight"].tolist() == [[[1.0, 0.5]]]
    with pytest.raises(AssertionError, match="relu's slope is not known"):
        SPEC.magnitudes(wide(call([1.0, 1.0])), options, grads, 1e-7)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must be \[B, L, C\] or \[B, H, W, C\], got \[3, 4\]"),
        ({"weight": torch.zeros(6, 2, 3)}, ValueError, r"weight must be \[C, k\] or \[C, 1, k\] like x"),
        ({"padding": "full"}, ValueError, "padding must be 'same', 'valid', an int or 2 integers, got 'full'"),
        ({"padding": (1, 1)}, TypeError, "padding must be 'same', 'valid' or an int"),
        ({"padding": -1}, ValueError, "padding must be between 0 and"),
        ({"padding": "valid", "causal": True}, ValueError, "padding must be 'same' where causal is given"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"dilation": (1, 2)}, TypeError, "dilation must be an int"),
        ({"dilation": 0}, ValueError, "dilation must be between 1 and"),
        ({"window": (1, 2)}, TypeError, "window must be an int or None"),
        ({"window": 0}, ValueError, "window must be between 1 and"),
        ({"window": 4, "padding": "valid"}, ValueError, "after must be such that windows keep their size"),
        ({"act": "exp"}, ValueError, "act must be one of sigmoid, gelu"),
        ({"state": torch.zeros(2, 2, 6)}, ValueError, "state must be None unless causal is given"),
        ({"state": torch.zeros(2, 6), "causal": True}, ValueError, "state must be of 3 dims like x"),
        ({"state": torch.zeros(2, 3, 6), "causal": True}, ValueError, r"state must be \[B, H, px, C\]"),
        ({"postgate": torch.zeros(2, 8, 6), "padding": "valid"}, ValueError, r"postgate must be \[B, P, Q, C\]"),
    ],
)
def test_sequences_with_wrong_arguments(change, error, match):
    call = {"x": torch.zeros(2, 8, 6), "weight": torch.zeros(6, 3)} | change
    with pytest.raises(error, match=f"effvit::dwconv: {match}"):
        effvit.dwconv(**call)


def test_causal_maps_have_filters_of_one_row():
    with pytest.raises(ValueError, match=r"effvit::dwconv: weight must be \[C, 1, kw\], of one row, where causal"):
        effvit.dwconv(torch.zeros(2, 4, 8, 6), torch.zeros(6, 3, 3), causal=True)
