"""effvit.layers.DCTAttention against DCT-Former's formula, with the transform by FFT."""

import math

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, check_quantised, randomise, tokens

from effvit.layers import DCTAttention
from effvit.layers.dct import dct_matrix

N, DIM = 11, 12


def dct(x):
    """The orthonormal DCT-II along dim 1, by the FFT of the sequence and its mirror image."""
    n, dtype = x.shape[1], x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    spectrum = torch.fft.fft(torch.cat((x, x.flip(1)), 1), dim=1)[:, :n]
    k = torch.arange(n, dtype=x.dtype)[None, :, None]
    y = (spectrum * torch.polar(torch.ones_like(k), -math.pi * k / (2 * n))).real / 2
    return (y * torch.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n))).to(dtype)


def cosines(m, n, dtype):
    """The first m basis vectors [m, n]."""
    k, i = torch.arange(m, dtype=dtype)[:, None], torch.arange(n, dtype=dtype)
    return torch.cos(math.pi / n * k * (i + 0.5)) * torch.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n))


def summed(x):
    """As `dct`, by sums of cosines."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum("bnd,kn->bkd", x.to(wide), cosines(x.shape[1], x.shape[1], wide)).to(x.dtype)


def inverse(x, n):
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum("bkd,kn->bnd", x.to(wide), cosines(x.shape[1], n, wide)).to(x.dtype)


def attend(m, q, k, v):
    out = []
    for c in range(0, q.shape[-1], m.head_dim):
        q_head, k_head, v_head = (t[..., c : c + m.head_dim] for t in (q, k, v))
        out.append((q_head @ k_head.mT / math.sqrt(m.head_dim)).softmax(-1) @ v_head)
    return torch.cat(out, -1)


def plain(m, x, mask=None, dct=dct):
    if m.compress == "x":
        y = dct(x)[:, : m.max_m]
        y = attend(m, m.fc_q(y), m.fc_k(y), m.fc_v(y))
    else:
        q, k, v = m.fc_q(x), m.fc_k(x), m.fc_v(x)
        if mask is not None:
            k, v = k * mask[..., None], v * mask[..., None]
        y = attend(m, *(dct(t)[:, : m.max_m] for t in (q, k, v)))
    return m.fc_o(inverse(y, x.shape[1]))


def other(m, x):
    return plain(m, x, dct=summed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compress", ["x", "qkv"])
@pytest.mark.parametrize("max_m, head_dim", [(4, None), (16, 5)])
def test_like_the_formula(max_m, head_dim, compress, dtype):
    m = randomise(DCTAttention(DIM, 3, max_m, head_dim, compress)).to(dtype)
    check(m, plain, tokens(2, N, DIM, dtype=dtype), also=[other])


def test_a_mask():
    mask = (torch.arange(N) < torch.tensor([[7], [N]])).float()
    m = randomise(DCTAttention(DIM, 3, 4, compress="qkv"))
    check(m, lambda m, x: plain(m, x, mask.to(x.dtype)), tokens(2, N, DIM), call=lambda m, x: m(x, mask))
    with pytest.raises(ValueError, match="effvit::DCTAttention: mask must be None with compress='x', got a tensor"):
        DCTAttention(DIM, 3, 4)(tokens(2, N, DIM), mask)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_matrix_is_the_transform_and_orthonormal(n):
    matrix = dct_matrix(n, n, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix, dct(torch.eye(n, dtype=torch.float64)[None])[0])


def test_dropout_is_active_in_training_only():
    m, x = randomise(DCTAttention(DIM, 3, 4, dropout=0.5)), tokens(2, N, DIM)
    assert not torch.equal(m(x), m(x))
    assert torch.equal(m.eval()(x), m(x))


def test_autocast():
    for compress in ("x", "qkv"):
        m = randomise(DCTAttention(DIM, 3, 4, compress=compress))
        check(m, plain, tokens(2, N, DIM), also=[other], autocast=torch.bfloat16)


def test_errors():
    for options, message in (
        ({"compress": "k"}, "compress must be 'x' or 'qkv', got 'k'"),
        ({"max_m": 0}, "max_m must be at least 1, got 0"),
        ({"compress": "qkv", "dropout": 0.1}, "dropout must be 0 with compress='qkv', got 0.1"),
        ({"n_heads": 5}, "dim must be a multiple of num_heads 5, got 12"),
    ):
        with pytest.raises(ValueError, match=f"effvit::DCTAttention: {message}"):
            DCTAttention(DIM, **{"n_heads": 3, "max_m": 4, **options})


def test_keys_and_quantised_projections():
    m = randomise(DCTAttention(DIM, 3, 4))
    assert set(m.state_dict()) == {f"fc_{n}.{p}" for n in "qkvo" for p in ("weight", "bias")}
    check_quantised(m, plain, tokens(2, N, DIM), last="fc_o")


@pytest.mark.parametrize("compress", ["x", "qkv"])
def test_the_rest(compress):
    make = lambda **factory: DCTAttention(DIM, 3, 4, compress=compress, **factory)
    check_everything_else(randomise(make()), make, tokens(2, N, DIM))


@pytest.mark.parametrize("compress", ["x", "qkv"])
def test_no_tokens(compress):
    assert DCTAttention(DIM, 2, 4, head_dim=5, compress=compress)(torch.zeros(2, 0, DIM)).shape == (2, 0, 10)
