"""effvit.layers.DualTokenAttention and its parts against plain formulas of DualToken-ViT's branches."""

import functools

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit.layers import DualTokenAttention, PositionAwareTokenModule, TokenToMapAttention

DIM, HEADS, T = 48, 3, (3, 2)
PHI = {
    "relu": torch.relu,
    "elu1": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
}


def attend(m, x, g):
    q = m.q(x).reshape(len(x), x.shape[1], HEADS, -1).transpose(1, 2)
    k, v = m.kv(g).reshape(len(g), g.shape[1], 2, HEADS, -1).permute(2, 0, 3, 1, 4)
    if m.feature_map is None:
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).to(v.dtype)
    else:
        phi = PHI[m.feature_map]
        p = phi(q) @ phi(k).mT
        p = p / (p.sum(-1, keepdim=True) + m.eps)
    return m.proj((p @ v).transpose(1, 2).flatten(2))


def apply(conv, x):
    return conv(x)


def rounded_once(conv, x):
    """Under autocast, the other way to convolve: in float32."""
    with torch.autocast("cpu", enabled=False):
        y = conv(x.float())
    return y.to(torch.get_autocast_dtype("cpu"))


def as_they_are(keys):
    return keys


def reversed_(keys):
    """The same attention, its sums over keys in the other order."""
    return keys.flip(1)


def global_branch(m, x, g, convolve=apply, order=as_they_are):
    y = x.permute(0, 3, 1, 2).contiguous()
    for conv in m.downsample:
        y = convolve(conv, y)
        (h, w), ones = y.shape[2:], torch.ones_like(y[:1, :1])  # means of 2x2, of what there is at an odd edge
        y, ones = (F.pad(t, (0, w % 2, 0, h % 2)).unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)) for t in (y, ones))
        y = y / ones
    if tuple(y.shape[2:]) != m.token_size:
        y = F.adaptive_avg_pool2d(y, m.token_size)
    y = y.flatten(2).transpose(1, 2)
    g = m.alpha * g + (1 - m.alpha) * attend(m.aggregate, y, order(y))
    z = m.mlp.norm(g)
    z = z.transpose(1, 2) if m.mlp.mix else z
    z = m.mlp.fc2(F.gelu(m.mlp.fc1(z)))
    g = g + (z.transpose(1, 2) if m.mlp.mix else z)
    return attend(m.broadcast, x.flatten(1, 2), order(g)).reshape(x.shape), g


def dual(m, x, g, convolve=apply, order=as_they_are):
    e = m.local
    y = e.norm(convolve(e.dw, x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1))
    x = x + e.pw2(F.gelu(e.pw1(y)))
    y, g = global_branch(m.position_aware, x, g, convolve, order)
    return x + y, g


def packed(function, size=(9, 7), count=6):
    """function(m, map, global tokens) as a function of one tensor [B, H*W + T, C], as `check` wants it."""

    def call(m, x):
        out = function(m, x[:, :-count].unflatten(1, size), x[:, -count:])
        return torch.cat([out[0].flatten(1, 2).to(out[1].dtype), out[1]], dim=1)

    return call


def module(m, *args):
    return m(*args)


VARIANTS = {
    "softmax": {},
    "relu": {"feature_map": "relu"},
    "elu1, mixing MLP": {"feature_map": "elu1", "mix_mlp": True, "alpha": 0.3},
    "exp, one step down": {"feature_map": "exp", "num_downsamples": 1, "qkv_bias": True},
    "no step down": {"num_downsamples": 0},
}


def make(dim=DIM, **kwargs):
    return DualTokenAttention(dim, HEADS, token_size=T, **kwargs)


def prepared(m):
    """Outputs near 1, and attention that is neither even nor of a single token."""
    randomise(m, scale=0.12)
    with torch.no_grad():
        for part in m.modules():
            if isinstance(part, TokenToMapAttention):
                part.q.weight.mul_(3)
                part.kv.weight.mul_(2)
    return m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, train, dtype):
    m = prepared(make(**kwargs)).to(dtype).train(train)
    also = [packed(functools.partial(dual, order=reversed_))]
    check(m, packed(dual), tokens(2, 63 + 6, DIM, dtype=dtype), also=also, call=packed(module))


@pytest.mark.parametrize("size", [(12, 8), (1, 5), (4, 3), (17, 10)], ids=str)
@pytest.mark.parametrize("feature_map", [None, "elu1"])
def test_map_sizes(feature_map, size):
    """Maps below the tokens' own size as well: neighbouring tokens then share places."""
    m = prepared(make(feature_map=feature_map, num_downsamples=1))
    also = [packed(functools.partial(dual, order=reversed_), size)]
    check(m, packed(dual, size), tokens(2, size[0] * size[1] + 6, DIM), also=also, call=packed(module, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", [None, *PHI])
def test_token_to_map(feature_map, dtype):
    """Many queries on few keys: the linear form, not that of all pairs. With the residual, as the module is used: the
    attention's gradient alone all but vanishes at some of the 1200 places, which then measure nothing."""
    from effvit.ops.linear_attention import prefers_quadratic

    assert not prefers_quadratic(40 * 30, 49, 16, 16)
    m = prepared(TokenToMapAttention(DIM, HEADS, feature_map=feature_map)).to(dtype)
    call = lambda f: lambda m, x: x[:, 49:] + f(m, x[:, 49:], x[:, :49])
    check(m, call(attend), tokens(1, 40 * 30 + 49, DIM, dtype=dtype), call=call(module))


@pytest.mark.parametrize("kwargs", [{}, {"feature_map": "relu"}], ids=["softmax", "relu"])
def test_autocast(kwargs):
    m = prepared(make(**kwargs))
    also = [packed(functools.partial(dual, convolve=rounded_once))]
    check(m, packed(dual), tokens(2, 69, DIM), also=also, autocast=torch.bfloat16, call=packed(module))


def test_global_tokens_of_one_image_serve_the_batch():
    m, x, g = randomise(make()), tokens(2, 9, 7, DIM), tokens(1, 6, DIM, seed=3)
    for a, b in zip(m(x, g), m(x, g.expand(2, -1, -1)), strict=True):
        torch.testing.assert_close(a, b)


def test_positions_survive():
    """The map's top left corner moves the top left token most: tokens are places, not a bag."""
    m = PositionAwareTokenModule(DIM, HEADS, token_size=(2, 2), num_downsamples=1, alpha=0.5)
    with torch.no_grad():
        m.aggregate.proj.weight.zero_()
        m.aggregate.proj.bias.zero_()
    g = tokens(1, 4, DIM)
    x = tokens(1, 8, 8, DIM)
    torch.testing.assert_close(m(x, g)[1], m.mlp(g / 2))  # nothing aggregated: half of what came
    with torch.no_grad():
        for linear in (m.aggregate.proj, m.aggregate.q):
            linear.weight.copy_(torch.eye(DIM))
        m.aggregate.q.weight.mul_(100)
        m.aggregate.kv.weight.copy_(torch.eye(DIM).repeat(2, 1))
        m.downsample[0].weight.zero_()
        m.downsample[0].weight[:, :, 1, 1] = 1
        m.downsample[0].bias.zero_()
    y = x.clone()
    y[:, :4, :4] += 10
    moved = (m(y, g)[1] - m(x, g)[1]).norm(dim=-1)[0]
    assert moved.argmax() == 0


def test_dropout():
    x, g = tokens(2, 63, DIM), tokens(2, 6, DIM, seed=3)
    for kwargs in ({"attn_drop": 0.5}, {"proj_drop": 0.5}, {"proj_drop": 0.5, "feature_map": "relu"}):
        m = TokenToMapAttention(DIM, HEADS, **kwargs)
        assert not torch.equal(m(x, g), m(x, g))
        m.eval()
        torch.testing.assert_close(m(x, g), attend(m, x, g))


@pytest.mark.parametrize("feature_map", [None, "relu"])
def test_tokens_shared_by_the_batch(feature_map):
    m, x, g = TokenToMapAttention(DIM, HEADS, feature_map=feature_map), tokens(2, 63, DIM), tokens(1, 6, DIM, seed=3)
    torch.testing.assert_close(m(x, g), m(x, g.expand(2, -1, -1).contiguous()))


def test_bad_arguments():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads 5, got 48"):
        TokenToMapAttention(DIM, 5)
    with pytest.raises(ValueError, match="feature_map must be None, 'relu', 'elu1' or 'exp', got 'gelu'"):
        TokenToMapAttention(DIM, HEADS, feature_map="gelu")
    with pytest.raises(ValueError, match="attn_drop must be 0 with a feature_map"):
        TokenToMapAttention(DIM, HEADS, feature_map="relu", attn_drop=0.1)


@pytest.mark.parametrize("kwargs", [{}, {"feature_map": "relu", "mix_mlp": True}], ids=["softmax", "relu"])
def test_the_rest(kwargs):
    make_one = lambda **factory: make(**kwargs, **factory)
    check_everything_else(prepared(make_one()), make_one, tokens(2, 69, DIM), packed(module))
