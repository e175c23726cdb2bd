"""effvit.layers.FlashLSTM, FlashGRU and FlashSLSTM against their equations, torch.nn.LSTM and torch.nn.GRU."""

import copy
import functools

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import FlashGRU, FlashLSTM, FlashSLSTM

L, DIM, HIDDEN = 7, 6, 12
LAYERS = {"lstm": FlashLSTM, "gru": FlashGRU, "slstm": FlashSLSTM}


def steps(m, x, state=None, order="forward"):
    """The equations, token after token and head by head, in float32 for narrower inputs."""
    gates, heads, D = m.recurrent.shape[1], m.num_heads, HIDDEN // m.num_heads
    wide = torch.promote_types(x.dtype, torch.float32)
    pre = m.input(x).to(wide).unflatten(-1, (gates, heads, D))
    n_states = {"lstm": 2, "gru": 1, "slstm": 4}[m.cell]
    if state is None:
        states = [torch.zeros(len(x), heads, D, dtype=wide) for _ in range(n_states)]
    else:
        states = list(state.to(wide).unbind(1))
    R = spread(m, "recurrent", (L, *m.recurrent.shape)).to(wide)
    hs = []
    for t in range(x.shape[1]):
        h = states[0]
        if order == "reversed":
            rec = torch.stack([(h.flip(-1)[:, :, None] * R[t, :, g].flip(-1)).sum(-1) for g in range(gates)], 1)
        else:
            rec = torch.stack([(R[t, :, g] @ h[..., None])[..., 0] for g in range(gates)], 1)
        if m.recurrent_bias is not None:
            rec = rec + m.recurrent_bias.to(wide)
        a, r = pre[:, t].unbind(1), rec.unbind(1)
        if m.cell == "lstm":
            c = (a[1] + r[1]).sigmoid() * states[1] + (a[0] + r[0]).sigmoid() * (a[2] + r[2]).tanh()
            states = [(a[3] + r[3]).sigmoid() * c.tanh(), c]
        elif m.cell == "gru":
            z = (a[1] + r[1]).sigmoid()
            states = [(1 - z) * (a[2] + (a[0] + r[0]).sigmoid() * r[2]).tanh() + z * h]
        else:  # without the stabiliser
            i, f = (a[0] + r[0]).exp(), (a[1] + r[1]).sigmoid()
            old_c, old_n = (s * states[3].exp() for s in states[1:3])
            c, n = f * old_c + i * (a[2] + r[2]).tanh(), f * old_n + i
            states = [(a[3] + r[3]).sigmoid() * c / n, c, n, torch.zeros_like(n)]
        hs.append(states[0])
    return torch.stack(hs, 1).flatten(2).to(x.dtype)


def call(m, x):
    return m(x)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_like_the_equations(kind, heads, dtype):
    m = randomise(LAYERS[kind](DIM, HIDDEN, heads)).to(dtype)
    check(m, steps, tokens(3, L, DIM, dtype=dtype), also=[functools.partial(steps, order="reversed")], call=call)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_bias_and_from_a_state(kind):
    m = randomise(LAYERS[kind](DIM, HIDDEN, 2, bias=False))
    assert m.input.bias is None and m.recurrent_bias is None
    _, state = m(tokens(3, 4, DIM, seed=5))
    state = state.detach()
    formula = functools.partial(steps, state=state)
    also = [lambda m, x: steps(m, x, state=state[: len(x)], order="reversed")]
    plain = lambda m, x: formula(m, x)
    m_call = lambda m, x: m(x, state)[0]
    with torch.no_grad():
        truth = plain(m.double(), tokens(3, L, DIM).double())
        m = m.float()
        yardsticks = [plain(m, tokens(3, L, DIM)), also[0](m, tokens(3, L, DIM))]
        assert_close_to_truth(m_call(m, tokens(3, L, DIM)), truth, yardsticks)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("bias", [True, False])
def test_is_torchs(kind, bias):
    """Outputs, last states and gradients of a torch.nn.LSTM or GRU: the truth is that in float64."""
    torch.manual_seed(0)
    original = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](DIM, HIDDEN, bias=bias, batch_first=True)
    own = LAYERS[kind].from_torch(original)
    x, g = tokens(3, L, DIM), tokens(3, L, HIDDEN, seed=2)
    results = []
    for m in (own, original, copy.deepcopy(original).double()):
        dtype = next(m.parameters()).dtype
        leaf = x.to(dtype).requires_grad_()
        y, state = m(leaf)
        last = state[:, 0] if m is own else (state[0] if kind == "lstm" else state)[0]
        grads = torch.autograd.grad((y * g.to(dtype)).sum(), (leaf, *m.parameters()))
        results.append([y.detach(), last.detach().view(3, HIDDEN), *grads])
    found, yardstick, truth = results
    for i in (0, 1, 2):  # output, state, gradient of the input
        magnitude = truth[i].abs().amax(-1, keepdim=True).expand_as(truth[i])
        assert_close_to_truth(found[i], truth[i], yardstick[i], magnitude=magnitude)
    names = [n for n, _ in own.named_parameters()]
    theirs = [n for n, _ in original.named_parameters()]
    for name, other in (("input.weight", "weight_ih_l0"), ("recurrent", "weight_hh_l0")):
        t = truth[3 + theirs.index(other)]
        f = found[3 + names.index(name)].view_as(t)
        largest = t.abs().max().expand_as(t)
        assert_close_to_truth(f, t, yardstick[3 + theirs.index(other)], magnitude=largest, name=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_states_are_handed_on(kind):
    m = randomise(LAYERS[kind](DIM, HIDDEN, 2))
    x = tokens(2, L, DIM)
    whole, last = m(x)
    first, state = m(x[:, :3])
    second, end = m(x[:, 3:], state)
    assert state.dtype == torch.float32 and not torch.equal(state, end)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind):
    m = randomise(LAYERS[kind](DIM, HIDDEN, 2))
    also = [functools.partial(steps, order="reversed")]
    check(m, steps, tokens(2, L, DIM), autocast=torch.bfloat16, also=also, call=call)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_rest(kind):
    make = lambda **factory: LAYERS[kind](DIM, HIDDEN, 3, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM), call)


def test_bad_arguments():
    with pytest.raises(ValueError, match="effvit::FlashLSTM: hidden_size must be a multiple of num_heads 5, got 12"):
        FlashLSTM(DIM, HIDDEN, 5)
    with pytest.raises(ValueError, match=r"effvit::FlashGRU: state must be \[2, 1, 1, 12\], got \[2, 2, 1, 12\]"):
        FlashGRU(DIM, HIDDEN)(tokens(2, 3, DIM), torch.zeros(2, 2, 1, 12))
    for bad in (torch.nn.GRU(3, 4, batch_first=True), torch.nn.LSTM(3, 4), torch.nn.LSTM(3, 4, 2, batch_first=True)):
        with pytest.raises(ValueError, match="effvit::FlashLSTM: module must be a torch.nn.LSTM of one layer"):
            FlashLSTM.from_torch(bad)
    with pytest.raises(ValueError, match="module must have proj_size 0, got 2"):
        FlashLSTM.from_torch(torch.nn.LSTM(3, 4, batch_first=True, proj_size=2))


@pytest.mark.parametrize("kind", LAYERS)
def test_no_tokens(kind):
    """The states are those of before, in float64 as in float32."""
    m = LAYERS[kind](DIM, HIDDEN, 3)
    for dtype in (torch.float32, torch.float64):
        y, state = m.to(dtype)(torch.zeros(2, 0, DIM, dtype=dtype))
        assert y.shape == (2, 0, HIDDEN) and state.shape[0] == 2
        again = m(torch.zeros(2, 0, DIM, dtype=dtype), state)[1]
        assert torch.equal(again, state)


def test_initialisation():
    torch.manual_seed(0)
    m = FlashGRU(8, 64, 4)
    for p in m.parameters():
        assert 0.24 < p.abs().max() <= 0.25


def test_bit_for_bit_again():
    m = randomise(FlashSLSTM(DIM, HIDDEN, 2))
    x = tokens(2, L, DIM)
    assert_bitwise_equal(m(x)[0], m(x)[0])
