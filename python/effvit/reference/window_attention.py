"""Windowed softmax attention in readable PyTorch: the definition every kernel is tested against.

Differentiable, any floating-point dtype (computes in the dtype of its inputs), any device. It gathers the windows by
index, so it materialises what the kernels never do; read it for the semantics, not for speed.
"""

import math

import torch

LOGIT_SCALE_MAX = math.log(100.0)  # Swin v2 clamps the learned log-temperature here


def axis_layout(size, window, shift, dilation, halo, roll_before_pad):
    """Index arithmetic of one axis, shared by the reference and the tests.

    Coordinates i run over the *rolled, padded* axis of length Hp = ceil(size / (window*dilation)) * window*dilation.
    Window (b, f) of the axis holds i = b*window*dilation + a*dilation + f for a in [0, window); its keys take
    a in [-halo, window + halo). Windows are ordered b-major.

    Returns ``(query_pos, key_pos, query_region, key_region)``: long tensors [windows, window] and
    [windows, window + 2*halo]. A position is an index into the map, or -1 for a token outside of it.
    """
    extent = window * dilation
    padded = (size + extent - 1) // extent * extent

    def position(i):
        outside = (i < 0) | (i >= padded)
        if roll_before_pad:
            pos = torch.where(i < size, (i + shift) % max(size, 1), -1)
        else:
            pos = (i + shift) % max(padded, 1)
            pos = torch.where(pos < size, pos, -1)
        return torch.where(outside, -1, pos)

    def region(i):
        return (i >= padded - extent).long() + (i >= padded - shift).long() if shift else torch.zeros_like(i)

    start = torch.arange(padded // extent)[:, None] * extent + torch.arange(dilation)[None, :]
    start = start.reshape(-1, 1)
    query = start + torch.arange(window) * dilation
    key = start + torch.arange(-halo, window + halo) * dilation
    return position(query), position(key), region(query), region(key)


def window_attention(
    q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None,
    *, window, shift=(0, 0), dilation=(1, 1), halo=(0, 0), scale=None, mask_value=-100.0, roll_before_pad=False,
):  # fmt: skip
    """q, k [B, H, W, h, d], v [B, H, W, h, dv] -> out [B, H, W, h, dv], lse [B, h, H, W].

    The arguments are those of effvit.ops.window_attention, with pairs where it takes ints too.
    """
    B, H, W, h, d = q.shape
    dv = v.shape[-1]
    dev = q.device
    (wh, ww), (hh, hw) = window, halo
    kh, kw = wh + 2 * hh, ww + 2 * hw
    layouts = [axis_layout(*axis, roll_before_pad) for axis in zip((H, W), window, shift, dilation, halo, strict=True)]

    def flat(y, x):  # [ny, a], [nx, b] -> [ny*nx, a*b] flat map positions, -1 outside
        y, x = y[:, None, :, None], x[None, :, None, :]
        pos = torch.where((y < 0) | (x < 0), -1, y * W + x)
        return pos.reshape(pos.shape[0] * pos.shape[1], -1).to(dev)

    def label(y, x):  # the same for region labels
        lab = y[:, None, :, None] * 3 + x[None, :, None, :]
        return lab.reshape(lab.shape[0] * lab.shape[1], -1).to(dev)

    q_pos, k_pos = (flat(layouts[0][i], layouts[1][i]) for i in (0, 1))  # [nW, N], [nW, M]
    q_lab, k_lab = (label(layouts[0][i], layouts[1][i]) for i in (2, 3))

    def gather(x, pos, pad):  # [B, H, W, h, e] -> [B, nW, tokens, h, e]
        rows = x.reshape(B, H * W, h, x.shape[-1]).index_select(1, pos.clamp(min=0).flatten()).unflatten(1, pos.shape)
        pad = rows.new_zeros(()) if pad is None else pad.to(rows.dtype)
        return torch.where((pos < 0)[None, :, :, None, None], pad, rows)

    qw, kw_, vw = gather(q, q_pos, None), gather(k, k_pos, pad_k), gather(v, k_pos, pad_v)
    if logit_scale is None:
        qw = qw * (d**-0.5 if scale is None else scale)
    else:
        qw, kw_ = (x * x.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt() for x in (qw, kw_))
        qw = qw * logit_scale.clamp(max=LOGIT_SCALE_MAX).exp().to(qw.dtype)[:, None]
    s = torch.einsum("bnihd,bnjhd->bnhij", qw, kw_)  # [B, nW, h, N, M]

    if bias_table is not None:
        qy, qx = torch.arange(wh).repeat_interleave(ww), torch.arange(ww).repeat(wh)
        ky, kx = torch.arange(-hh, wh + hh).repeat_interleave(kw), torch.arange(-hw, ww + hw).repeat(kh)
        iy = (qy[:, None] - ky[None, :] + wh - 1 + hh).to(dev)
        ix = (qx[:, None] - kx[None, :] + ww - 1 + hw).to(dev)
        index = iy * bias_table.shape[2] + ix
        s = s + bias_table.flatten(1).index_select(1, index.flatten()).unflatten(1, index.shape).to(s.dtype)
    s = s + (q_lab[:, :, None] != k_lab[:, None, :])[None, :, None].to(s.dtype) * mask_value
    if pad_k is None:
        s = s.masked_fill((k_pos < 0)[None, :, None, None, :], -math.inf)
        s = s.masked_fill((q_pos < 0)[None, :, None, :, None], 0.0)  # rows nobody reads; keeps them finite
    lse = torch.logsumexp(s, dim=-1)  # [B, nW, h, N]
    o = torch.einsum("bnhij,bnjhd->bnihd", torch.softmax(s, dim=-1), vw)

    q_pos = q_pos.reshape(-1)  # every map position is a query exactly once
    where = torch.zeros(H * W + 1, dtype=torch.long, device=dev)
    where = where.scatter(0, torch.where(q_pos < 0, H * W, q_pos), torch.arange(q_pos.numel(), device=dev))[:-1]
    out = o.reshape(B, -1, h, dv).index_select(1, where).reshape(B, H, W, h, dv)
    lse = lse.transpose(2, 3).reshape(B, -1, h).index_select(1, where).permute(0, 2, 1).reshape(B, h, H, W)
    return out, lse
