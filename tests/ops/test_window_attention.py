"""window_attention: the shared suite, and proof of its reference against plainly written Swin, HAT and MaxViT."""

import math

import pytest
import random_calls
import torch
import torch.nn.functional as F

from effvit.testing import assert_bitwise_equal, backends
from effvit.testing.window_attention import SPEC, _qkv_views, _sample, reference_call
from op_suite import OpSuite


class TestWindowAttention(OpSuite):
    spec = SPEC


# Independent formulas, float64, written the way the papers' own code works: on rolled, padded, partitioned copies.


def _randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tokens(B, H, W, h, d, dv):
    return _randn(B, H, W, h, d, seed=1), _randn(B, H, W, h, d, seed=2), _randn(B, H, W, h, dv, seed=3)


def partition(x, wh, ww):
    """[B, H, W, h, e] -> [B, windows, h, N, e]"""
    B, H, W, h, e = x.shape
    x = x.reshape(B, H // wh, wh, W // ww, ww, h, e).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B, (H // wh) * (W // ww), h, wh * ww, e)


def merge(x, H, W, wh, ww):
    """The inverse of partition."""
    B, _, h, _, e = x.shape
    x = x.reshape(B, H // wh, W // ww, h, wh, ww, e).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(B, H, W, h, e)


def swin_bias(table, wh, ww):
    """[h, 2wh-1, 2ww-1] -> [h, N, N] through Swin's relative_position_index."""
    coords = torch.stack(torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0)
    index = (relative[..., 0] + wh - 1) * (2 * ww - 1) + relative[..., 1] + ww - 1
    return table.flatten(1)[:, index]


def swin_mask(Hp, Wp, wh, ww, sh, sw, value):
    """Swin's img_mask of counters, cut by slices."""
    image = torch.zeros(1, Hp, Wp, 1, 1)
    count = 0

    def slices(window, shift):
        return (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else (slice(None),)

    for y in slices(wh, sh):
        for x in slices(ww, sw):
            image[:, y, x] = count
            count += 1
    labels = partition(image, wh, ww).reshape(-1, wh * ww)
    different = labels[:, :, None] != labels[:, None, :]
    return different[:, None].double() * value  # [windows, 1, N, N]


def attend(q, k, v, logits_bias, scale):
    logits = q @ k.transpose(-1, -2) * scale + logits_bias
    return logits.softmax(-1) @ v, logits.logsumexp(-1, keepdim=True)


def swin_block(q, k, v, table, window, shift, pad_k, pad_v, mask_value, pad_first):
    """Attention of a Swin v1 block on explicit copies; pad_first as torchvision, otherwise as timm."""
    _, H, W, h, d = q.shape
    (wh, ww), (sh, sw) = window, shift
    Hp, Wp = -(-H // wh) * wh, -(-W // ww) * ww

    def pad(x, content):
        padded = content.expand(x.shape[0], Hp, Wp, *content.shape).clone()
        padded[:, :H, :W] = x
        return padded

    def there(x, content):
        if pad_first:
            return torch.roll(pad(x, content), (-sh, -sw), (1, 2))
        return pad(torch.roll(x, (-sh, -sw), (1, 2)), content)

    def back(x):
        if pad_first:
            return torch.roll(x, (sh, sw), (1, 2))[:, :H, :W]
        return torch.roll(x[:, :H, :W], (sh, sw), (1, 2))

    windows = [partition(there(x, c), wh, ww) for x, c in ((q, q.new_zeros(h, d)), (k, pad_k), (v, pad_v))]
    bias = swin_bias(table, wh, ww) + swin_mask(Hp, Wp, wh, ww, sh, sw, mask_value)
    out, lse = attend(*windows, bias, d**-0.5)
    return back(merge(out, Hp, Wp, wh, ww)), back(merge(lse, Hp, Wp, wh, ww)).squeeze(-1).permute(0, 3, 1, 2)


def check(results, expected):
    for result, e in zip(results, expected, strict=True):
        assert result.shape == e.shape
        assert (result - e).abs().max() <= 64 * torch.finfo(torch.float64).eps * e.abs().max()


@pytest.mark.parametrize("pad_first", [True, False], ids=["torchvision", "timm"])
@pytest.mark.parametrize(
    "size, window, shift",
    [((14, 14), (7, 7), (0, 0)), ((14, 14), (7, 7), (3, 3)), ((13, 17), (7, 7), (3, 3)), ((9, 11), (3, 4), (2, 1)),
     ((12, 10), (4, 5), (0, 2)), ((10, 12), (4, 5), (3, 0))],
)  # fmt: skip
def test_reference_is_swin(size, window, shift, pad_first):
    q, k, v = _tokens(2, *size, 3, 8, 5)
    table = _randn(3, 2 * window[0] - 1, 2 * window[1] - 1, seed=4)
    pads = _randn(3, 8, seed=5), _randn(3, 5, seed=6)
    for mask_value in (-100.0, -1.5):
        expected = swin_block(q, k, v, table, window, shift, *pads, mask_value, pad_first)
        results = reference_call(
            q, k, v, table, None, *pads, window=window, shift=shift, mask_value=mask_value,
            roll_before_pad=not pad_first,
        )  # fmt: skip
        check(results, expected)


def test_the_two_roll_orders_differ():
    q, k, v = _tokens(1, 13, 17, 1, 4, 4)
    pads = _randn(1, 4, seed=5), _randn(1, 4, seed=6)
    a, b = (
        reference_call(q, k, v, None, None, *pads, window=7, shift=3, roll_before_pad=mode)[0] for mode in (True, False)
    )
    assert (a - b).abs().max() > 0.1


def test_reference_is_timm():
    """timm's own functions around timm's own attention module, outputs and parameter gradients."""
    from effvit.testing import torchvision_schemas

    torchvision_schemas()
    swin = pytest.importorskip("timm.models.swin_transformer", reason="timm is not installed")
    torch.manual_seed(0)
    block = swin.SwinTransformerBlock(24, (13, 18), num_heads=3, window_size=7, shift_size=3).double()
    with torch.no_grad():
        block.attn.qkv.bias.normal_()
        block.attn.relative_position_bias_table.normal_()
    attn, x = block.attn, _randn(2, 13, 18, 24, seed=1)
    expected = block._attn(x)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 8)).unbind(3)
    _, pad_k, pad_v = attn.qkv.bias.unflatten(0, (3, 3, 8)).unbind(0)
    table = attn.relative_position_bias_table.view(13, 13, 3).permute(2, 0, 1)
    out, _ = reference_call(q, k, v, table, None, pad_k, pad_v, window=7, shift=3, roll_before_pad=True)
    result = attn.proj(out.flatten(3))
    check([result], [expected])
    parameters = list(attn.parameters())
    weight = _randn(*result.shape, seed=9)
    grads, expected_grads = (torch.autograd.grad((y * weight).sum(), parameters) for y in (result, expected))
    check(grads, expected_grads)


def test_reference_is_swin_v2():
    q, k, v = _tokens(2, 8, 12, 3, 6, 6)
    table, tau = 16 * torch.sigmoid(_randn(3, 7, 7, seed=4)), torch.tensor([0.3, 2.0, 6.0], dtype=torch.float64)
    windows = [partition(torch.roll(x, (-2, -2), (1, 2)), 4, 4) for x in (q, k, v)]
    cosine = F.cosine_similarity(windows[0][..., :, None, :], windows[1][..., None, :, :], dim=-1, eps=1e-12)
    temperature = torch.clamp(tau, max=math.log(1.0 / 0.01)).exp()[:, None, None]
    logits = cosine * temperature + swin_bias(table, 4, 4) + swin_mask(8, 12, 4, 4, 2, 2, -100.0)
    out = torch.roll(merge(logits.softmax(-1) @ windows[2], 8, 12, 4, 4), (2, 2), (1, 2))
    lse = torch.roll(merge(logits.logsumexp(-1, keepdim=True), 8, 12, 4, 4), (2, 2), (1, 2))
    results = reference_call(q, k, v, table, tau, window=4, shift=2)
    check(results, (out, lse.squeeze(-1).permute(0, 3, 1, 2)))


@pytest.mark.parametrize("pads", [True, False], ids=["zero padded", "excluded"])
def test_reference_is_hat_overlapping(pads):
    """HAT's OCAB: nn.Unfold cuts overlapping key windows out of the zero-padded map."""
    ws, halo, h, d = 4, 2, 2, 6
    B, H, W, wk = 2, 8, 12, ws + 2 * halo
    q, k, v = _tokens(B, H, W, h, d, d)
    table = _randn(h, ws + wk - 1, ws + wk - 1, seed=4)

    def unfold(x):
        maps = x.reshape(B, H, W, h * d).permute(0, 3, 1, 2)
        columns = F.unfold(maps, wk, stride=ws, padding=halo)  # [B, h*d*wk*wk, windows]
        return columns.reshape(B, h, d, wk * wk, -1).permute(0, 4, 1, 3, 2)

    query = torch.stack(torch.meshgrid(torch.arange(ws), torch.arange(ws), indexing="ij")).flatten(1) + halo
    key = torch.stack(torch.meshgrid(torch.arange(wk), torch.arange(wk), indexing="ij")).flatten(1)
    offset = query[:, :, None] - key[:, None, :] + wk - 1 - halo
    bias = table[:, offset[0], offset[1]]
    if not pads:
        inside = unfold(torch.ones_like(k))[:1, :, :1, :, 0]
        bias = bias + torch.where(inside > 0, 0.0, -math.inf)[:, :, :, None, :]
    out, lse = attend(partition(q, ws, ws), unfold(k), unfold(v), bias, d**-0.5)
    zeros = (torch.zeros(h, d, dtype=torch.float64),) * 2 if pads else (None, None)
    results = reference_call(q, k, v, table, None, *zeros, window=ws, halo=halo)
    check(results, (merge(out, H, W, ws, ws), merge(lse, H, W, ws, ws).squeeze(-1).permute(0, 3, 1, 2)))


def test_reference_is_maxvit_grid():
    """MaxViT's grid partition: windows of G x G tokens, H/G apart."""
    B, H, W, h, d, gh, gw = 2, 12, 8, 2, 6, 3, 4
    q, k, v = _tokens(B, H, W, h, d, d)
    table = _randn(h, 2 * gh - 1, 2 * gw - 1, seed=4)

    def grid(x):
        x = x.reshape(B, gh, H // gh, gw, W // gw, h, -1).permute(0, 2, 4, 5, 1, 3, 6)
        return x.reshape(B, (H // gh) * (W // gw), h, gh * gw, -1)

    def ungrid(x):
        x = x.reshape(B, H // gh, W // gw, h, gh, gw, -1).permute(0, 4, 1, 5, 2, 3, 6)
        return x.reshape(B, H, W, h, -1)

    out, lse = attend(grid(q), grid(k), grid(v), swin_bias(table, gh, gw), d**-0.5)
    results = reference_call(q, k, v, table, window=(gh, gw), dilation=(H // gh, W // gw))
    check(results, (ungrid(out), ungrid(lse).squeeze(-1).permute(0, 3, 1, 2)))


def test_reference_window_over_the_map_is_dense_attention():
    q, k, v = _tokens(2, 3, 5, 2, 4, 7)
    rows = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*rows, scale=0.3).transpose(1, 2).reshape(v.shape)
    check(reference_call(q, k, v, window=(3, 5), scale=0.3)[:1], [expected])
    check(reference_call(q, k, v, window=(8, 9), scale=0.3)[:1], [expected])


@pytest.mark.parametrize("d", [32, 160])
@pytest.mark.parametrize("side", range(1, 33))
def test_every_window_with_half_shift(side, d):
    """Tiles of queries and of keys that straddle the seam anywhere: where a window is cut depends on its side."""
    sample = _sample(
        f"side_{side}", 1, side, 2 * side, 1, d, window=side, shift=side // 2, mask_value=-5.0, layout=_qkv_views
    )
    native = [b for b in backends("window_attention") if not b.slow][-1]
    random_calls.check_call(SPEC, sample, torch.float32, [native])


@pytest.mark.parametrize("name", ["small_halo", "small_shift", "small_tail"])
@pytest.mark.parametrize("backend", backends("window_attention"), ids=str)
def test_gradients_side_by_side_are_the_same(backend, name):
    """dq, dk and dv in one tensor, as the gradient of a packed projection, or apart: the same bits."""
    args, kwargs = SPEC.sample(name).build(device=backend.device)
    outputs = backend.forward(*args, **kwargs)
    bargs, bkwargs = SPEC.backward_call(args, kwargs, outputs, tuple(torch.ones_like(o) * 0.3 for o in outputs))
    dq, dk, dv, *others = backend.backward(*bargs, **bkwargs)
    whole, *nothing, _, _, _, _ = packed = backend.backward(*bargs, packed=True, **bkwargs)
    assert_bitwise_equal(whole.squeeze(-2), torch.cat([g.flatten(-2) for g in (dq, dk, dv)], -1))
    assert [t.numel() for t in nothing] == [0, 0]
    for result, expected in zip(packed[3:], others, strict=True):
        assert_bitwise_equal(result, expected)
