"""int8_attention in readable PyTorch: the definition, down to every rounding that decides an integer.

Integers are the same on every backend: what leads to one is computed in float32 here whatever the dtype of the call,
one IEEE operation at a time (no multiply-add, no reciprocal where a division stands), sums of floats in the order
written. What is computed from them, sums of blocks and `lse`, is rounded as the error rule of the project allows.
"""

import math

import torch

from .shiftmax import shift_exp

BLOCK = 64  # keys that share a scale and a maximum
STEPS = 127  # the largest integer of q, k, v, and of a weight: its block's maximum
SMALLEST = 2.0**-100  # numbers of a row or block whose largest is below are zeros: no reciprocal overflows
LOG2E, LN2 = math.log2(math.e), math.log(2)
EXP2, SHIFTMAX = range(2)

# Scores below their block's maximum, in steps of 2^-13: where weights are 0 from.
FRACTION_BITS = 13
STEPS_OF_ONE = 1 << FRACTION_BITS
LIMIT = {EXP2: 65535, SHIFTMAX: 45589}  # 16 bits without a sign; of log2's, of natural ones: t + t / 2 - t / 16 <= 2^16
POLYNOMIAL = (32512, 22478, 7494, 1273)  # 127 * 2^8 * 2^-f = c0 - f (c1 - f (c2 - f c3)), within 1.4e-4 of it


def _round_half_up(a, bits):
    return (a + (1 << (bits - 1))) >> bits


def exp2_steps(t: torch.Tensor) -> torch.Tensor:
    """127 * 2^(-t / 2^13) rounded, for integers 0 <= t < 2^16: 16-bit arithmetic throughout."""
    q, f = t >> FRACTION_BITS, (t << 2) & 0x7FFF  # f in steps of 2^-15
    c0, c1, c2, c3 = POLYNOMIAL
    e = c2 - _round_half_up(c3 * f, 15)
    e = c1 - _round_half_up(e * f, 15)
    e = c0 - _round_half_up(e * f, 15)
    return (e + (128 << q)) >> (8 + q)


def shiftmax_steps(t: torch.Tensor) -> torch.Tensor:
    """I-ViT's shift exponential of -t / 2^13, 0 <= t <= 45589, in steps of 1/127 of that of 0, rounded."""
    return (STEPS * shift_exp(-t.long(), x0=-STEPS_OF_ONE, n=8) + (1 << 20)) >> 21


def quantise(x: torch.Tensor, dims) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 -> (integers in float32, scale): |x| <= 127 scale, of the largest in `dims`, which are kept."""
    largest = x.abs().amax(dims, keepdim=True)
    most = torch.full_like(largest, STEPS)  # a tensor: for numbers PyTorch multiplies by a reciprocal
    inverse = torch.where(largest >= SMALLEST, most / largest, 0.0)
    steps = (x * inverse).round()
    return torch.where(torch.isnan(steps), 0.0, steps), largest / most


def blocks_of(x: torch.Tensor) -> torch.Tensor:
    """[B, M, ...] -> [B, N, 64, ...], zeros beyond M."""
    missing = -int(x.shape[1]) % BLOCK  # one number for a compiler too: the blocks are part of the program
    padded = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1)
    return padded.unflatten(1, (-1, BLOCK))


def mean_of_keys(k: torch.Tensor) -> torch.Tensor:
    """[B, M, G, K] float32 -> [B, G, K]: the sum of a block key by key, then that of the blocks one by one, over M."""
    blocks = blocks_of(k)
    sums = blocks[:, :, 0]
    for i in range(1, BLOCK):
        sums = sums + blocks[:, :, i]
    total = sums[:, 0]
    for i in range(1, sums.shape[1]):
        total = total + sums[:, i]
    return total / torch.full_like(total, k.shape[1])


def quantise_keys(k: torch.Tensor, mean: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B, M, G, K], mean [B, G, K] -> integers [B, N, 64, G, K] in float32, scale [B, N, G]."""
    x = k.float() if mean is None else k.float() - mean.float()[:, None]
    q, scale = quantise(blocks_of(x), (2, 4))
    return q, scale[:, :, 0, :, 0]


def quantise_values(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v [B, M, G, V] -> integers [B, N, 64, G, V] in float32, scale [B, N, G, V]."""
    q, scale = quantise(blocks_of(v.float()), 2)
    return q, scale[:, :, 0]


def visible_keys(L: int, M: int, causal: bool, device) -> torch.Tensor:
    """[L, N, 64]: which keys a query sees; causal: those up to its own place, the last query at the last key."""
    keys = torch.arange(-(-M // BLOCK) * BLOCK, device=device)
    last = torch.arange(L, device=device) + (M - L) if causal else torch.full((L,), M - 1, device=device)
    return (keys <= last[:, None]).unflatten(1, (-1, BLOCK)) & (keys < M).unflatten(0, (-1, BLOCK))


def weights(q, k8, k_scale, bias, scale, causal, M, exponential):
    """The integers: p [B, G, E, L, N, 64] in 0..127, in float32, and their blocks' maxima in base 2 [B, G, E, L, N]."""
    B, L, H, _ = q.shape
    G = int(k8.shape[3])
    q8, q_scale = quantise(q.float(), -1)
    q8 = q8.unflatten(2, (G, H // G))
    acc = torch.einsum("blgek,bnjgk->bgelnj", q8, k8)  # exact: integers below 2^24
    visible = visible_keys(L, M, causal, q.device)
    # Python's numbers are rounded to float32 before they are multiplied with.
    q_scale = (q_scale * (scale * LOG2E)).unflatten(2, (G, H // G))[..., 0]
    c = q_scale.permute(0, 2, 3, 1)[..., None] * k_scale.float().permute(0, 2, 1)[:, :, None, None]  # [B, G, E, L, N]
    step = STEPS_OF_ONE * (1.0 if exponential == EXP2 else LN2)
    if bias is None:
        top = acc.masked_fill(~visible, -math.inf).amax(-1)
        seen = torch.where(visible.any(-1), top, 0.0)
        maxima = torch.where(visible.any(-1), seen * c, -math.inf)
        t = (seen[..., None] - acc) * (c * step)[..., None]
    else:
        W = bias.shape[0]
        b = bias.float() * LOG2E
        b = blocks_of(b.permute(0, 3, 1, 2)).permute(0, 3, 4, 1, 2)  # [W, H, L, N, 64]
        b = b.unflatten(1, (G, H // G)).repeat(B // W, 1, 1, 1, 1, 1)
        y = (acc * c[..., None] + b).masked_fill(~visible, -math.inf)
        maxima = y.amax(-1)
        t = (torch.where(maxima == -math.inf, 0.0, maxima)[..., None] - y) * step
    limit = LIMIT[exponential]
    t = torch.where(t <= limit, t, float(limit)).round().int()  # a NaN is at the limit; the maxima keep it
    p = (exp2_steps if exponential == EXP2 else shiftmax_steps)(t).float()
    return p.masked_fill(~visible, 0.0), maxima


def int8_attention(
    q, k, v, k_scale=None, v_scale=None, k_mean=None, bias=None,
    *, scale=None, causal=False, smooth_k=True, exponential=EXP2,
):  # fmt: skip
    """q [B, L, H, K], k [B, M, G, K], v [B, M, G, V] -> out [B, L, H, V], lse [B, H, L].

    The arguments are those of effvit.ops.int8_attention; exponential is an index: EXP2 or SHIFTMAX.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    M = int(k.shape[1])
    if k.dtype == torch.int8:
        k8, v8 = blocks_of(k.float()), blocks_of(v.float())
    else:
        if k_mean is None and smooth_k:
            k_mean = mean_of_keys(k.float())
        (k8, k_scale), (v8, v_scale) = quantise_keys(k, k_mean), quantise_values(v)
    p, maxima = weights(q, k8, k_scale, bias, scale, causal, M, exponential)
    sums = torch.einsum("bgelnj,bnjgv->bgelnv", p, v8).to(dtype)  # exact: integers below 2^21
    totals, maxima = p.sum(-1).to(dtype), maxima.to(dtype)
    top = maxima.amax(-1, keepdim=True)
    w = torch.exp2(maxima - torch.where(top == -math.inf, 0.0, top))
    v_scale = v_scale.to(dtype).permute(0, 2, 1, 3)[:, :, None, None]  # [B, G, 1, 1, N, V]
    out, total = 0.0, 0.0
    for n in range(maxima.shape[-1]):
        out = out + w[..., n, None] * sums[..., n, :] * v_scale[..., n, :]
        total = total + w[..., n] * totals[..., n]
    none = total == 0  # a query that sees no key: zeros, and no weight
    out = torch.where(none[..., None], 0.0, out / torch.where(none, 1.0, total)[..., None])
    lse = (top[..., 0] + torch.log2(total / STEPS)) * LN2
    if k_mean is not None:
        rows = q.to(dtype).unflatten(2, (k.shape[2], -1))
        part = (rows * k_mean.to(dtype)[:, None, :, None]).contiguous().sum(-1)
        lse = lse + scale * part.permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.flatten(1, 2)


def float_attention(
    q, k, v, k_scale=None, v_scale=None, k_mean=None, bias=None,
    *, scale=None, causal=False, smooth_k=True, exponential=EXP2,
):  # fmt: skip
    """What int8_attention approximates, of its arguments: out [B, L, H, V], lse [B, H, L]. Its derivative stands for
    that of int8_attention.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    L, M, repeats = q.shape[1], int(k.shape[1]), int(q.shape[2]) // int(k.shape[2])
    if k.dtype == torch.int8:
        k = k.to(q.dtype) * k_scale.to(q.dtype).repeat_interleave(BLOCK, 1)[:, :M, :, None]
        k = k if k_mean is None else k + k_mean.to(q.dtype)[:, None]
        v = v.to(q.dtype) * v_scale.to(q.dtype).repeat_interleave(BLOCK, 1)[:, :M]
    k, v = (x.to(q.dtype).repeat_interleave(repeats, 2) for x in (k, v))
    s = torch.einsum("blhk,bmhk->bhlm", q * scale, k)
    if bias is not None:
        s = s + bias.to(s.dtype).repeat(s.shape[0] // bias.shape[0], 1, 1, 1)
    seen = visible_keys(L, M, causal, q.device).flatten(1)[:, :M]
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    return torch.einsum("bhlm,bmhv->blhv", p, v), lse
