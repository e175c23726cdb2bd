"""effvit.layers.MultiHeadEMA against MEGA's recurrence, token after token, and as a convolution."""

import functools

import pytest
import torch
import torch.nn.functional as F
from fft_formulas import fourier, toeplitz, wide
from gated_formulas import silu
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import MultiHeadEMA

L, DIM = 11, 6


def coefficients(m):
    p = wide(m.delta).squeeze(-1).sigmoid()
    return p, 1 - p * wide(m.alpha).squeeze(-1).sigmoid(), wide(m.beta).squeeze(-1), wide(m.gamma) / m.ndim**0.5


def averages(m, x, half=slice(None)):
    """sum_n gamma h_n / sqrt(ndim) after every token of x [B, L, C], and the last h."""
    p, q, beta, gamma = (t[half] for t in coefficients(m))
    h = torch.zeros(len(x), DIM, m.ndim, dtype=wide(x).dtype)
    outs = []
    for token in wide(x).unbind(1):
        h = q * h + p * beta * token[..., None]
        outs.append((gamma * h).sum(-1))
    return torch.stack(outs, dim=1), h


def recurrence(m, x):
    y, _ = averages(m, x, slice(DIM))
    if m.bidirectional:
        y = y + averages(m, x.flip(1), slice(DIM, None))[0].flip(1)
    return silu(y + wide(x) * wide(spread(m, "omega", x.shape))).to(x.dtype)


def convolution(m, x, convolve=toeplitz):
    p, q, beta, gamma = coefficients(m)
    taps = x.shape[1] if m.truncation is None else min(x.shape[1], m.truncation)
    k = sum((gamma * p * beta)[:, n, None] * q[:, n, None] ** torch.arange(taps) for n in range(m.ndim))
    y = convolve(wide(x), k[:DIM], spread(m, "omega", x.shape), k[DIM:] if m.bidirectional else None)
    return silu(y).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize("ndim", [1, 4])
def test_like_the_recurrence(ndim, bidirectional, dtype):
    m = randomise(MultiHeadEMA(DIM, ndim, bidirectional), scale=1.0).to(dtype)
    also = [convolution, functools.partial(convolution, convolve=fourier)]
    check(m, recurrence, tokens(2, L, DIM, dtype=dtype), also=also)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])
def test_truncation(bidirectional, dtype):
    m = randomise(MultiHeadEMA(DIM, 3, bidirectional, truncation=4), scale=1.0).to(dtype)
    check(m, convolution, tokens(2, L, DIM, dtype=dtype), also=[functools.partial(convolution, convolve=fourier)])


def test_both_directions_as_published():
    """One kernel of 2 L - 1 taps, of which both have the middle one, and zeros before the tokens."""
    m, x = randomise(MultiHeadEMA(DIM, 2, bidirectional=True), scale=1.0).double(), tokens(2, DIM, L).double()
    first, second = m.kernel(L).chunk(2)
    k = F.pad(first, (L - 1, 0)) + F.pad(second.flip(-1), (0, L - 1))
    n = 2 * (2 * L - 1)
    y = torch.fft.irfft(torch.fft.rfft(F.pad(x, (L - 1, 0)), n=n) * torch.fft.rfft(k, n=n), n=n)
    y = F.silu(y[..., 2 * L - 2 : 3 * L - 2] + x * m.omega[:, None])
    torch.testing.assert_close(m(x.mT).mT, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_enters_no_average(dtype):
    """Nor does it change what comes out at other tokens; at its own the skip stays."""
    mask = torch.zeros(2, L)
    mask[0, 7:] = mask[1, :2] = 1
    m = randomise(MultiHeadEMA(DIM, 2, bidirectional=True), scale=1.0).to(dtype)

    def masked(m, x):
        u = x * (1 - mask.to(x.dtype))[..., None]
        y = averages(m, u, slice(DIM))[0] + averages(m, u.flip(1), slice(DIM, None))[0].flip(1)
        return silu(y + wide(x) * wide(spread(m, "omega", x.shape))).to(x.dtype)

    check(m, masked, tokens(2, L, DIM, dtype=dtype), call=lambda m, x: m(x, padding_mask=mask))


def test_autocast():
    m = randomise(MultiHeadEMA(DIM, 3, bidirectional=True), scale=1.0)
    check(m, recurrence, tokens(2, L, DIM), also=[convolution], autocast=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_parts_and_token_after_token(dtype):
    """Outputs and states, by the error rule: what is given for all tokens at once is the truth's."""
    m, x = randomise(MultiHeadEMA(DIM, 3), scale=1.0).to(dtype), tokens(2, L, DIM, dtype=dtype)
    double = MultiHeadEMA(DIM, 3, dtype=torch.float64)
    double.load_state_dict(m.state_dict())
    with torch.no_grad():
        truth, (_, state_truth) = recurrence(double, x.double()), averages(double, x.double())
        _, state_yardstick = averages(m, x)

        def right(outs, state):
            assert_close_to_truth(torch.cat(outs, dim=1), truth, recurrence(m, x))
            assert state.dtype == torch.float32
            assert_close_to_truth(state, state_truth, state_yardstick, eps=torch.finfo(torch.float32).eps)

        out, state = m(x, return_state=True)
        right([out], state)
        outs, state = [], None
        for part in x.split((4, 1, 6), dim=1):
            out, state = m(part, state=state, return_state=True)
            outs.append(out)
        right(outs, state)
        outs, state = [], None
        for token in x.unbind(1):
            out, state = m.step(token, state)
            outs.append(out[:, None])
        right(outs, state)


def test_what_forgets_at_once():
    """q is 0 in float32: no NaN, and the same as token after token."""
    m, x = randomise(MultiHeadEMA(DIM, 2), scale=1.0), tokens(2, L, DIM)
    with torch.no_grad():
        m.delta[0], m.alpha[0] = 20.0, 20.0
        m.delta[1], m.alpha[1] = 60.0, 60.0
    out, state = m(x, return_state=True)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    steps, after = [], None
    for token in x.unbind(1):
        y, after = m.step(token, after)
        steps.append(y)
    torch.testing.assert_close(out, torch.stack(steps, dim=1))
    torch.testing.assert_close(state, after)


def test_one_dtype_under_autocast():
    """That of autocast, whatever is asked for; the same numbers but for one rounding. States stay in float32."""
    m, x = randomise(MultiHeadEMA(DIM, 2), scale=1.0), tokens(2, L, DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = m(x)
        masked = m(x, padding_mask=torch.zeros(2, L))
        first, state = m(x[:, :4], return_state=True)
        second, state = m(x[:, 4:], state=state, return_state=True)
        steps, after = [], None
        for token in x.unbind(1):
            y, after = m.step(token, after)
            steps.append(y)
    assert state.dtype == after.dtype == torch.float32
    torch.testing.assert_close(state, after)
    for y in (masked, torch.cat((first, second), dim=1), torch.stack(steps, dim=1)):
        torch.testing.assert_close(y, plain)
        assert y.dtype == torch.bfloat16


def test_no_tokens():
    m, x, state = MultiHeadEMA(DIM, 2), torch.zeros(2, 0, DIM), torch.randn(2, DIM, 2)
    assert m(x).shape == m(x, padding_mask=torch.zeros(2, 0)).shape == (2, 0, DIM)
    assert_bitwise_equal(m(x, state=state, return_state=True)[1], state)
    assert_bitwise_equal(m(x, return_state=True)[1], torch.zeros(2, DIM, 2))


def test_a_state_needs_a_recurrence():
    x, state = tokens(1, L, DIM), torch.zeros(1, DIM, 2)
    for kwargs, what in (({"bidirectional": True}, "bidirectional"), ({"truncation": 4}, "truncation")):
        m = MultiHeadEMA(DIM, **kwargs)
        for call in (lambda m: m(x, state=state), lambda m: m(x, return_state=True), lambda m: m.step(x[:, 0])):
            with pytest.raises(ValueError, match=f"effvit::MultiHeadEMA: state must be None with {what}"):
                call(m)


def test_bad_arguments():
    for kwargs, message in (
        ({"ndim": 0}, "ndim must be >= 1, got 0"),
        ({"truncation": 0}, "truncation must be .* got 0"),
    ):
        with pytest.raises(ValueError, match=f"effvit::MultiHeadEMA: {message}"):
            MultiHeadEMA(DIM, **kwargs)


def test_keys():
    """Those of the original's state_dict."""
    m = MultiHeadEMA(DIM, 3, bidirectional=True)
    shapes = {n: tuple(p.shape) for n, p in m.state_dict().items()}
    three = (2 * DIM, 3, 1)
    assert shapes == {"delta": three, "alpha": three, "beta": three, "gamma": (2 * DIM, 3), "omega": (DIM,)}
    assert (m.beta[:, 1] < -0.8).all() and (m.beta[:, ::2] > 0.8).all()


def test_the_rest():
    make = lambda **factory: MultiHeadEMA(DIM, 3, bidirectional=True, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))
