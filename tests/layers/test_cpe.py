"""effvit.layers.PosConv and ConvPosEnc against timm's classes, LePEAttention against CSWin's formula."""

import pytest
import timm.models.davit as timm_davit
import timm.models.twins as timm_twins
import torch
from layer_suite import DTYPES, Record, check, check_everything_else, randomise, tokens

from effvit.layers import ConvPosEnc, LePEAttention, PosConv

H, W, DIM = 4, 6, 8


def call(m, x):
    return m(x, (H, W))


def twins(m, x):
    return timm_twins.PosConv.forward(m, x, (H, W))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_pos_conv_like_timm(stride, dtype):
    m, original = PosConv(DIM, DIM, stride), timm_twins.PosConv(DIM, DIM, stride)
    m.load_state_dict(randomise(original).state_dict(), strict=True)
    check(m.to(dtype), twins, tokens(2, H * W, DIM, dtype=dtype), call=call)
    assert m.no_weight_decay() == original.no_weight_decay()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_tokens_pass(dtype):
    """CPVT's: only patches see the convolution."""
    plain = lambda m, x: torch.cat((x[:, :2], twins(m, x[:, 2:].clone())), dim=1)
    m = randomise(PosConv(DIM, DIM)).to(dtype)
    check(m, plain, tokens(2, H * W + 2, DIM, dtype=dtype), call=call)


def test_pos_conv_with_other_channels_and_modules():
    m = randomise(PosConv(2 * DIM, DIM, 2))  # two input channels for every output channel
    check(m, twins, tokens(2, H * W, 2 * DIM), call=call)
    with pytest.raises(ValueError, match=r"effvit::PosConv: x must be \[B, 24, C\] of a map 4 x 6, got \[2, 25, 16\]"):
        call(m, tokens(2, H * W + 1, 2 * DIM))
    m, seen = randomise(PosConv(DIM, DIM)), []
    m.proj[0].register_forward_hook(lambda *_: seen.append(1))
    check(m, twins, tokens(2, H * W, DIM), call=call)
    m.proj.register_forward_hook(lambda *_: seen.append(2))
    check(m, twins, tokens(2, H * W, DIM), call=call)
    assert {1, 2} <= set(seen)
    with pytest.raises(ValueError, match=r"effvit::PosConv: x must be \[B, 24, C\] of a map 4 x 6, got \[2, 23, 8\]"):
        call(m, tokens(2, H * W - 1, DIM))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [False, True], ids=["none", "gelu"])
@pytest.mark.parametrize("k", [3, 5])
def test_conv_pos_enc_like_timm(k, act, dtype):
    m, original = ConvPosEnc(DIM, k, act), timm_davit.ConvPosEnc(DIM, k, act)
    m.load_state_dict(randomise(original).state_dict(), strict=True)
    check(m.to(dtype), timm_davit.ConvPosEnc.forward, tokens(2, DIM, H, W, dtype=dtype), is_map=True)


def test_conv_pos_enc_keeps_the_dtype_under_autocast():
    """The residual stays in float32, as in timm."""
    m, x = randomise(ConvPosEnc(DIM)), tokens(2, DIM, H, W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert m(x).dtype == timm_davit.ConvPosEnc.forward(m, x).dtype == torch.float32
    check(m, timm_davit.ConvPosEnc.forward, x, is_map=True, autocast=torch.bfloat16)


def test_conv_pos_enc_is_one_pass_and_calls_hooks():
    m, x, seen = randomise(ConvPosEnc(DIM)), tokens(2, DIM, H, W), []
    with Record() as calls:
        m(x)
    assert calls.names.count("dwconv") == 1
    m.act.register_forward_hook(lambda *_: seen.append(1))
    m.proj.register_forward_hook(lambda *_: seen.append(2))
    check(m, timm_davit.ConvPosEnc.forward, x, is_map=True)
    assert {1, 2} <= set(seen)
    with pytest.raises(ValueError, match="effvit::ConvPosEnc: k must be odd, got 2"):
        ConvPosEnc(DIM, 2)


# ---- CSWin ---------------------------------------------------------------------------------------------------------

SIDE = 6


def windows(m):
    """For every window the indices of its tokens, [h, w]."""
    at = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    return [w for rows in at.split(m.H_sp) for w in rows.split(m.W_sp, 1)]


def cswin(m, x):
    """Window by window, head by head; the convolution as a sum of shifted windows."""
    q, k, v = x.chunk(3, dim=-1)
    out = [None] * x.shape[1]
    size = m.dim // m.num_heads
    for at in windows(m):
        h, w = at.shape
        qw, kw, vw = (t[:, at.flatten()] for t in (q, k, v))
        heads = []
        for c in range(0, m.dim, size):
            logits = qw[..., c : c + size] * m.scale @ kw[..., c : c + size].mT
            heads.append(logits.softmax(-1) @ vw[..., c : c + size])
        y = torch.cat(heads, -1) + m.get_v(vw.mT.unflatten(2, (h, w))).flatten(2).mT
        for i, token in enumerate(at.flatten().tolist()):
            out[token] = y[:, i]
    return torch.stack(out, dim=1)


def stripes(m, x):
    return m(x.chunk(3, dim=-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("idx", [-1, 0, 1])
def test_lepe_like_the_formula(idx, dtype):
    m = randomise(LePEAttention(DIM, SIDE, idx, split_size=2, num_heads=2)).to(dtype)
    check(m, cswin, tokens(2, SIDE * SIDE, 3 * DIM, dtype=dtype), call=stripes)


def test_lepe_with_a_scale_hooks_and_packed_input():
    m, x, seen = randomise(LePEAttention(DIM, SIDE, 0, 3, num_heads=2, qk_scale=0.7)), tokens(2, 36, 3 * DIM), []
    with Record() as calls:
        y = stripes(m, x)
    assert {"window_attention", "dwconv"} <= set(calls.names) and not {"convolution", "_softmax"} & set(calls.names)
    torch.testing.assert_close(m(torch.stack(x.chunk(3, dim=-1))), y)
    m.get_v.register_forward_hook(lambda *_: seen.append(1))
    m.attn_drop.register_forward_hook(lambda *_: seen.append(2))
    check(m, cswin, x, call=stripes)
    assert {1, 2} <= set(seen)


def test_autocast():
    m = randomise(LePEAttention(DIM, SIDE, 0, 3, num_heads=2))
    check(m, cswin, tokens(2, SIDE * SIDE, 3 * DIM), call=stripes, autocast=torch.bfloat16)
    check(randomise(PosConv(DIM, DIM)), twins, tokens(2, H * W, DIM), call=call, autocast=torch.bfloat16)


def test_lepe_dropout_is_active_in_training_only():
    m, x = randomise(LePEAttention(DIM, SIDE, 0, 3, num_heads=2, attn_drop=0.5)), tokens(2, 36, 3 * DIM)
    assert not torch.equal(stripes(m, x), stripes(m, x))
    assert torch.equal(stripes(m.eval(), x), stripes(m, x))


def test_lepe_errors():
    for args, message in (
        ((DIM, SIDE, 2), "idx must be -1, 0 or 1, got 2"),
        ((DIM, SIDE, 0, 4), "split_size must be a divisor of the resolution 6, got 4"),
    ):
        with pytest.raises(ValueError, match=f"effvit::LePEAttention: {message}"):
            LePEAttention(*args)
    with pytest.raises(ValueError, match="effvit::LePEAttention: dim must be a multiple of num_heads 3, got 8"):
        LePEAttention(DIM, SIDE, 0, 2, num_heads=3)


@pytest.mark.parametrize("make, shape, call", [
    (lambda **factory: PosConv(DIM, DIM, **factory), (2, H * W, DIM), call),
    (lambda **factory: ConvPosEnc(DIM, **factory), (2, DIM, H, W), None),
    (lambda **factory: LePEAttention(DIM, SIDE, 1, 2, num_heads=2, **factory), (2, SIDE * SIDE, 3 * DIM), stripes),
], ids=["PosConv", "ConvPosEnc", "LePEAttention"])  # fmt: skip
def test_the_rest(make, shape, call):
    check_everything_else(randomise(make()), make, tokens(*shape), call)


def test_parameter_names_are_the_originals():
    assert set(LePEAttention(DIM, SIDE, 0, 2).state_dict()) == {"get_v.weight", "get_v.bias"}
