"""EcoFormerAttention (arXiv:2209.09004): linear attention on sign codes, by hash functions fitted to the data."""

import torch
from torch import nn

import effvit.ops

from ..ops import _checks
from ..reference.kernel_hash import kernel_hash as _definition
from ._ops import linear_attention
from .binary import sign_ste


def code_attention(q, k, v, own_value=True):
    """Attention on codes of -1 and 1, nb each: q, k [B, L, H, nb], v [B, L, H, V] -> [B, L, H, V].

    The similarity of two codes is q k + nb + 1, which is at least 1. own_value: out = (q (k^T v) + (nb + 1) v) / (q sum
    k + L (nb + 1)), as in the authors' code, which adds the token's own v; else the sum of all v in its place, the mean
    that these similarities weigh.
    """
    n, bias = v.shape[1], q.shape[-1] + 1
    if own_value:
        top = linear_attention(q, k, v, feature_map="none", normalize="none") + bias * v
        return top / (torch.einsum("blhf,bhf->blh", q, k.sum(1)) + n * bias)[..., None]
    one = torch.ones_like(q[..., :1])
    q, k = torch.cat((q, one), -1), torch.cat((k, bias * one), -1)
    return linear_attention(q, k, v, feature_map="none", normalize="sum", eps=0.0)


@torch.no_grad()
def similarities(x, top):
    """x [B, L, H, K], normalised -> [B, H, L, L]: 1 for each token's `top` most similar ones, -1 for the least."""
    x = x.transpose(1, 2)
    products = x @ x.transpose(-2, -1)
    s = torch.zeros_like(products)
    s.scatter_(3, products.topk(top, -1).indices, 1.0)
    return s.scatter_(3, products.topk(top, -1, largest=False).indices, -1.0)


def _loss(y, s, bits):
    """-y^T S y / (L bits), averaged: y [B, H, L]."""
    return -(torch.einsum("bhl,bhlm->bhm", y, s) * y).sum(-1).mean() / (y.shape[-1] * bits)


class EcoFormerAttention(nn.Module):
    """Self-attention in linear time: queries and keys are one projection, hashed to `bits` signs a head.

    h = sign(A (exp(-|x - anchor|^2 / 2 sigma) - mean)) of x of norm 1: :func:`effvit.ops.kernel_hash`. Gradients pass
    the sign where its argument is between -1 and 1. `fit` sets anchors, mean and A (buffers) from tokens alone; the
    first call does, and the next one after `update()`, which a training loop calls now and then. `own_value`: see
    `code_attention`. Parameters are named as in the authors' code: to_qk, to_v, proj.

    Fitting, as in the paper (kernel-based supervised hashing): a bit at a time, the relaxed sign 2 sigmoid(y) - 1 is
    fitted by `steps` of SGD with Nesterov momentum to what the bits before left of bits * S, S from `similarities` of
    `top` tokens; it is kept if its signs do better than those before.
    """

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, bits=16, anchors=25, top=10, own_value=True, steps=100, lr=5e-4,
        momentum=0.9,
    ):  # fmt: skip
        super().__init__()
        if dim % num_heads:
            raise _checks.value_error("EcoFormerAttention", "dim", f"a multiple of num_heads = {num_heads}", dim)
        head = dim // num_heads
        self.num_heads, self.top, self.own_value = num_heads, top, own_value
        self.steps, self.lr, self.momentum = steps, lr, momentum
        self.to_qk, self.to_v = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("projection", torch.randn(num_heads, bits, anchors))
        self.register_buffer("mean", torch.zeros(num_heads, anchors))
        self.register_buffer("anchors", torch.zeros(num_heads, anchors, head))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def update(self):
        """Have the next call fit the hash functions again; A starts from what it is."""
        self.fitted.fill_(False)

    def kernel(self, x):
        """exp(-|x - anchor|^2 / 2 sigma): [B, L, H, P]."""
        p = self.anchors.shape[1]
        eye = torch.eye(p, device=x.device).expand(self.num_heads, p, p)
        return self.hashed(x, torch.zeros_like(self.mean), eye)

    def hashed(self, x, mean=None, projection=None):
        """The codes before the sign; the definition itself in float64."""
        mean, projection = (self.mean, self.projection) if mean is None else (mean, projection)
        hash_ = _definition if x.dtype == torch.float64 else effvit.ops.kernel_hash
        return hash_(x, *(t.to(torch.promote_types(x.dtype, torch.float32)) for t in (self.anchors, mean, projection)))

    @torch.no_grad()
    def fit(self, x):
        """x [B, L, H, K]: queries (and keys), normalised. Returns the losses [bits, 2] of A before and after."""
        bits, count = self.projection.shape[1:]
        n = x.shape[1]
        if n < max(count, self.top):
            expected = f"[B, L, H, K] with L at least {max(count, self.top)}, the anchors and the tokens compared"
            raise _checks.value_error("EcoFormerAttention", "x", expected, _checks.shape(x))
        x = x.detach().float()
        place = torch.randperm(n, device=x.device)[:count]
        self.anchors.copy_(x[0, place].transpose(0, 1))
        kernel = self.kernel(x)
        self.mean.copy_(kernel.mean((0, 1)))
        kernel = (kernel - self.mean.float()).transpose(1, 2)  # [B, H, L, P]
        s, losses = similarities(x, self.top) * bits, []

        def signs(a):
            y = torch.einsum("bhlp,hp->bhl", kernel, a)
            return torch.where(y > 0, 1.0, -1.0)

        for bit in range(bits):
            before = self.projection[:, bit].float()
            with torch.enable_grad():
                a = before.clone().requires_grad_()
                optimizer = torch.optim.SGD([a], lr=self.lr, momentum=self.momentum, nesterov=True)
                for _ in range(self.steps):
                    relaxed = 2 * torch.sigmoid(torch.einsum("bhlp,hp->bhl", kernel, a)) - 1
                    loss = _loss(relaxed, s, bits)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            a = a.detach()
            pair = [float(_loss(signs(c), s, bits)) for c in (before, a)]
            best = a if pair[1] < pair[0] else before
            self.projection[:, bit] = best
            y = signs(best)
            s = s - y[..., :, None] * y[..., None, :]
            losses.append((pair[0], min(pair)))
        self.fitted.fill_(True)
        return torch.tensor(losses)

    def codes(self, x):
        """x [B, L, H, K], normalised -> -1 and 1, [B, L, H, bits], differentiable straight through."""
        return sign_ste(self.hashed(x))

    def bits(self, x):
        """The codes as packed bits, uint8 [B, L, H, ceil(bits / 8)]."""
        return effvit.ops.sign_bits(self.hashed(x))[0]

    def forward(self, x: torch.Tensor, *_size) -> torch.Tensor:
        b, n, c = x.shape
        qk = self.to_qk(x).reshape(b, n, self.num_heads, -1)
        v = self.to_v(x).reshape(b, n, self.num_heads, -1)
        qk = qk / qk.norm(dim=-1, keepdim=True)
        if not self.fitted:
            self.fit(qk)
        codes = self.codes(qk)
        return self.proj(code_attention(codes, codes, v, self.own_value).reshape(b, n, c))
