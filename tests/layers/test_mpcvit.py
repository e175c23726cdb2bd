"""effvit.layers.MPCViTAttention and XNormAttention against their formulas with every matrix formed."""

import copy
import io

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, check_quantised, randomise, tokens

import effvit.layers._written
from effvit.layers import MPCViTAttention, XNormAttention

N, DIM, HEADS = 37, 24, 4


def qkv_of(m, x):
    return m.qkv(x).reshape(len(x), x.shape[1], 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)


def plain(m, x):
    q, k, v = qkv_of(m, x)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    relu = scores.clamp(min=0)
    relu = relu / (relu.sum(-1, keepdim=True) + 1e-5)
    alpha = m.alpha
    if m.selected is not None:
        alpha = alpha.detach()
    attn = m.attn_drop(alpha * relu + (1 - alpha) * scores / x.shape[1])
    return m.proj((attn @ v).transpose(1, 2).flatten(2))


def xnorm(m, x):
    q, k, v = qkv_of(m, x)
    norm = lambda t: t * m.gamma_xnorm / t.norm(dim=-1, keepdim=True)
    return m.proj((norm(q) @ norm(k.mT @ v)).transpose(1, 2).flatten(2))


def make(**factory):
    return MPCViTAttention(DIM, HEADS, attention_dropout=0.0, projection_dropout=0.0, **factory)


def make_xnorm(**factory):
    return XNormAttention(DIM, HEADS, projection_dropout=0.0, **factory)


def with_alpha(alpha, seed=0):
    m = randomise(make(), seed)
    with torch.no_grad():
        m.alpha.copy_(torch.tensor(alpha).view(1, HEADS, 1, 1))
    return m


SELECTIONS = {
    "ReLU-softmax": (1.0, 1.0, 1.0, 1.0),
    "scaling": (0.0, 0.0, 0.0, 0.0),
    "mixed": (1.0, 0.0, 0.0, 1.0),
    "alternating": (0.0, 1.0, 0.0, 1.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_search_mixes_both(train, dtype):
    m = with_alpha((0.3, 1.0, 0.0, -0.6)).to(dtype).train(train)
    check(m, plain, tokens(3, N, DIM, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selected_heads(alpha, dtype):
    m = with_alpha(alpha).to(dtype).select_heads()
    check(m, plain, tokens(3, N, DIM, dtype=dtype))


@pytest.mark.parametrize("n", [1, 2, 197])
def test_token_counts(n):
    check(with_alpha(SELECTIONS["mixed"]).select_heads(), plain, tokens(2, n, DIM))


def test_scaling_heads_form_no_scores(monkeypatch):
    m = with_alpha(SELECTIONS["scaling"]).select_heads()
    monkeypatch.setattr(m, "scores", None)
    m(tokens(2, N, DIM))


def test_select_heads_wants_a_decision():
    with pytest.raises(ValueError, match=r"alpha must be 0 or 1 for every head, got \[1.0, 0.5"):
        with_alpha((1.0, 0.5, 0.0, 0.0)).select_heads()


def test_loading_drops_the_selection():
    m, other = with_alpha(SELECTIONS["mixed"]).select_heads(), with_alpha(SELECTIONS["scaling"])
    copied = copy.deepcopy(m)
    assert copied.selected == m.selected == (True, False, False, True)
    m.load_state_dict(other.state_dict())
    assert m.selected is None and copied.selected is not None
    x = tokens(2, N, DIM)
    torch.testing.assert_close(m(x), other.select_heads()(x))


def test_selected_alpha_is_frozen():
    m = with_alpha(SELECTIONS["mixed"])
    m(tokens(2, N, DIM)).sum().backward()
    assert m.alpha.grad is not None
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5)
    m.select_heads()
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        m(tokens(2, N, DIM)).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in m.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"qkv.weight", "proj.weight", "proj.bias"}
    m.requires_grad_(True)
    m.attn_drop.p = 0.5  # the other path through alpha
    m(tokens(2, N, DIM)).sum().backward()
    assert m.alpha.grad is None


def averaged(m):
    """As an EMA does: rounding alone takes 1 away from 1."""
    m.alpha.lerp_(torch.ones_like(m.alpha) * 0.99, 0.3)


def decayed(m):
    m.alpha.data.mul_(0.9)


def grown(m):
    m.alpha.add_(1.5)


@pytest.mark.parametrize("move", [averaged, decayed, grown])
@pytest.mark.parametrize("when", ["called", "saved"])
def test_selected_alpha_is_held(when, move):
    m = with_alpha(SELECTIONS["ReLU-softmax"]).select_heads()
    with torch.no_grad():
        move(m)
    assert (m.alpha != 1).all()
    m(tokens(2, N, DIM)) if when == "called" else m.state_dict()
    assert (m.alpha == 1).all()


@pytest.mark.parametrize("free", [True, False], ids=["on the host", "on a device"])
def test_another_selection_is_not_ignored(free, monkeypatch):
    monkeypatch.setattr(effvit.layers._written, "is_free_to_read", lambda t: free)
    m, x = with_alpha(SELECTIONS["mixed"]).select_heads(), tokens(2, N, DIM)
    m(x)
    with torch.no_grad():
        m.alpha.copy_(with_alpha(SELECTIONS["scaling"]).alpha)
    for use in (lambda: m(x), m.state_dict):
        with pytest.raises(
            ValueError, match=r"alpha must be \[1.0, 0.0, 0.0, 1.0\], as when select_heads\(\) was called"
        ):
            use()
    assert m.select_heads().selected == (False,) * HEADS
    m.alpha.requires_grad_(True)
    check(m, plain, x)


def test_alpha_is_not_read_from_its_device(monkeypatch):
    monkeypatch.setattr(effvit.layers._written, "is_free_to_read", lambda t: False)
    m, x, reads = with_alpha(SELECTIONS["mixed"]).select_heads(), tokens(2, N, DIM), []
    right = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t) or right(t))
    for _ in range(3):
        m(x)
    assert len(reads) == 1


@pytest.mark.parametrize("learned", [True, False])
def test_deselecting(learned):
    m, x = with_alpha(SELECTIONS["mixed"]), tokens(2, N, DIM)
    m.alpha.requires_grad_(learned)
    m.select_heads().select_heads()
    assert not m.alpha.requires_grad
    assert m.deselect_heads() is m and m.selected is None and m.alpha.requires_grad == learned
    with torch.no_grad():
        m.alpha.mul_(0.3)
    check(m, plain, x)
    m.alpha.detach().round_()
    m.select_heads().load_state_dict(m.state_dict())
    assert m.alpha.requires_grad == learned


def test_selected_heads_under_functorch():
    m, x = with_alpha(SELECTIONS["mixed"]).select_heads(), tokens(3, 2, N, DIM)
    torch.testing.assert_close(torch.vmap(m)(x), torch.stack([m(t) for t in x]))
    parameters = {name: torch.stack([p.detach()] * 3) for name, p in m.named_parameters()}
    mapped = torch.vmap(lambda p, x: torch.func.functional_call(m, p, (x,)))(parameters, x)
    torch.testing.assert_close(mapped, torch.stack([m(t) for t in x]))


def test_attention_dropout_acts_on_the_scores():
    m = MPCViTAttention(DIM, HEADS, attention_dropout=0.4, projection_dropout=0.0)
    m.load_state_dict(with_alpha((0.3, 1.0, 0.0, 0.6)).state_dict())
    x = tokens(2, N, DIM)
    torch.manual_seed(3)
    a = m(x)
    torch.manual_seed(3)
    torch.testing.assert_close(a, plain(m, x))  # the same draws
    assert not torch.equal(m(x), a)
    m.eval()
    torch.testing.assert_close(m(x), plain(m, x))
    assert MPCViTAttention(DIM).attn_drop.p == MPCViTAttention(DIM).proj_drop.p == 0.1


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_projection_dropout(p):
    m = MPCViTAttention(DIM, HEADS, 0.0, p)
    assert m(tokens(2, N, DIM)).any() == (p == 0.0)


@pytest.mark.parametrize("alpha", [(0.3, 1.0, 0.0, 0.6), SELECTIONS["mixed"]], ids=["search", "selected"])
def test_autocast(alpha):
    m = with_alpha(alpha)
    if 0.3 not in alpha:
        m.select_heads()
    check(m, plain, tokens(2, N, DIM), autocast=torch.bfloat16)


def test_starts_as_relu_softmax_and_is_saved_whole():
    m = make()
    assert m.alpha.shape == (1, HEADS, 1, 1) and (m.alpha == 1).all()
    assert list(m.state_dict()) == ["alpha", "qkv.weight", "proj.weight", "proj.bias"]
    file = io.BytesIO()
    torch.save(m.select_heads(), file)
    file.seek(0)
    assert torch.load(file, weights_only=False).selected == (True,) * HEADS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, N])
def test_xnorm(n, dtype):
    check(randomise(make_xnorm()).to(dtype), xnorm, tokens(3, n, DIM, dtype=dtype))


def test_xnorm_autocast():
    check(randomise(make_xnorm()), xnorm, tokens(3, N, DIM), autocast=torch.bfloat16)


def test_many_and_large_tokens_in_float16():
    m, x = with_alpha(SELECTIONS["ReLU-softmax"]).half().select_heads(), (tokens(1, 2000, DIM) * 20).half()
    truth = plain(copy.deepcopy(m).float(), x.float())
    y = m(x)
    assert y.isfinite().all() and (y - truth).norm() < 5e-3 * truth.norm()
    m.attn_drop.p = 0.1
    assert m(x).isfinite().all()


def test_xnorm_of_a_zero_token_in_float16():
    x = tokens(2, N, DIM).half()
    x[:, 3] = 0
    m = randomise(make_xnorm()).half()
    y = m(x)
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, 3], m.proj.bias.expand(2, -1))


def test_dim_must_be_a_multiple_of_the_heads():
    for module in (MPCViTAttention, XNormAttention):
        with pytest.raises(ValueError, match="dim must be a multiple of num_heads 5, got 24"):
            module(24, 5)


@pytest.mark.parametrize("kind", ["search", "selected", "xnorm"])
def test_quantised_projections(kind):
    m = with_alpha((0.3, 1.0, 0.0, 0.6) if kind == "search" else SELECTIONS["mixed"])
    if kind == "selected":
        m.select_heads()
    m, formula = (randomise(make_xnorm()), xnorm) if kind == "xnorm" else (m, plain)
    check_quantised(m, formula, tokens(2, N, DIM))


@pytest.mark.parametrize("kind", ["search", "selected", "xnorm"])
def test_the_rest(kind):
    if kind == "xnorm":
        check_everything_else(randomise(make_xnorm()), make_xnorm, tokens(2, N, DIM))
        return

    def make_one(**factory):
        m = make(**factory)
        return m.select_heads() if kind == "selected" and not m.alpha.is_meta else m

    def call(m, x):
        if kind == "selected" and m.selected is None:  # dropped by load_state_dict
            m.select_heads()
        return m(x)

    m = with_alpha(SELECTIONS["mixed"])
    check_everything_else(m.select_heads() if kind == "selected" else m, make_one, tokens(2, N, DIM), call)
