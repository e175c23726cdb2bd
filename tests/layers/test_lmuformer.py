"""effvit.layers.LMU against the Legendre memory unit: token after token, and the definition of its matrices."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_close_to_truth
from effvit.layers import LMU, lmuformer
from effvit.layers.lmuformer import impulse_response, legendre_matrices

DIM, N = 8, 9
SIZES = {"num_heads": 2, "seq_len": 12, "theta": 10}


def plain(m, x):
    """The memory as the sum over the tokens before, each with its part of the impulse response; x [B, N, dim]."""
    cell = m.lmu
    u = cell.W_u(x)[..., 0].relu()
    u, H = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (u, cell.H))
    memory = [sum(u[:, s, None] * H[:, t - s] for s in range(t + 1)) for t in range(x.shape[1])]
    h = cell.W_h(torch.cat([torch.stack(memory, dim=1).to(x.dtype), x], dim=-1)).relu()
    h = h if m.use_all_h else h[:, -1:]
    weight = spread(m.proj_conv, "weight", (*h.shape[:2], DIM, DIM, 1))[..., 0]
    y = (weight @ h[..., None])[..., 0] + spread(m.proj_conv, "bias", h.shape)
    return m.proj_bn(y.mT).mT


def call(m, x):
    return m(x.mT).mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_like_the_formula(train, dtype):
    m = randomise(LMU(DIM, **SIZES, use_all_h=train)).to(dtype).train(train)
    check(m, plain, tokens(3, N, DIM, dtype=dtype), call=call)


def test_one_token_after_another(monkeypatch):
    """And in one pass as a matrix product, by FFT, and beyond the length of the buffer."""
    m = randomise(LMU(DIM, **SIZES)).double().eval()
    A, B = legendre_matrices(DIM, 10)  # the buffers are float32
    m.lmu.A, m.lmu.B, m.lmu.H = A, B, impulse_response(A, B, 12)
    x = tokens(2, DIM, 2 * SIZES["seq_len"] + 1, dtype=torch.float64)
    for t in (x[..., :N], x):
        found, _ = m.recurrent(t)
        torch.testing.assert_close(m(t), found)
        monkeypatch.setattr(lmuformer, "TOEPLITZ", 0)
        torch.testing.assert_close(m(t), found)
        monkeypatch.undo()
        first, state = m.recurrent(t[..., :4])
        torch.testing.assert_close(torch.cat([first, m.recurrent(t[..., 4:], state)[0]], -1), found)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_the_state_of_the_recurrence_is_float32(autocast):
    """Rounded to bfloat16 after each of 100 tokens, it would lose two of its three digits."""
    m = randomise(LMU(DIM, **SIZES)).to(torch.float32 if autocast else torch.bfloat16).eval()
    cell = m.lmu
    x = tokens(2, 100, DIM, dtype=next(cell.parameters()).dtype)
    found = torch.zeros(2, DIM)
    truth, plain = found.double(), found.clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for token in x.unbind(1):
            u = cell.W_u(token).relu()  # what the memory is of
            _, found = cell.recurrent(token, found)
            with torch.autocast("cpu", enabled=False):
                truth = truth @ cell.A.double().mT + u.double() @ cell.B.double().mT
                plain = plain @ cell.A.float().mT + u.float() @ cell.B.float().mT
    assert_close_to_truth(found, truth, plain)
    assert m.recurrent(x.mT[..., :1])[1].dtype == torch.float32


def test_matrices():
    """Of the system theta m' = A m + B u: B_d = A^-1 (e^A - 1) B and A_d = e^A, by its eigenvalues."""
    n, theta = 6, 10
    A = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            A[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    B = torch.tensor([[(2 * i + 1) / theta * (-1) ** i] for i in range(n)], dtype=torch.float64)
    values, vectors = torch.linalg.eig(A)
    exact = (vectors @ torch.diag(values.exp()) @ torch.linalg.inv(vectors)).real
    found = legendre_matrices(n, theta)
    assert (found[0] - exact).abs().max() < 1e-12
    assert (found[1] - torch.linalg.solve(A, (exact - torch.eye(n)) @ B)).abs().max() < 1e-12
    power = B = found[1]
    response = impulse_response(*found, 11)
    for t in range(11):
        assert (response[:, t : t + 1] - power).abs().max() < 1e-12
        power = found[0] @ power


def test_a_state_dict_of_the_original_loads():
    m = LMU(DIM, **SIZES)
    names = {f"lmu.{n}" for n in ("A", "B", "H", "W_u.weight", "W_u.bias", "W_h.weight", "W_h.bias")}
    names |= {"proj_conv.weight", "proj_conv.bias", *(f"proj_bn.{n}" for n in m.proj_bn.state_dict())}
    assert set(m.state_dict()) == names
    assert m.lmu.A.shape == (DIM, DIM) and m.lmu.B.shape == (DIM, 1) and m.lmu.H.shape == (DIM, 12)
    m.load_state_dict(m.state_dict() | {"lmu.fft_H": torch.fft.rfft(m.lmu.H, n=24)})


def test_memory_is_float32_under_autocast():
    m = LMU(DIM, **SIZES).lmu
    u = tokens(2, 12, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.memory(u), m.memory(u.clone())) and m.memory(u).dtype == torch.float32
    torch.testing.assert_close(m.memory(u), m.double().memory(u.double()).float())


def test_bad_arguments():
    with pytest.raises(ValueError, match="effvit::LMU: dim must be a multiple of num_heads 8, got 12"):
        LMU(12)


def test_the_rest():
    make = lambda **factory: LMU(DIM, **SIZES, **factory)
    check_everything_else(randomise(make()), make, tokens(2, N, DIM), call)
