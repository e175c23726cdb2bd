"""SOFT's attention module as in SOFT-Tiny, batch 8 at 224x224: effvit against the same formula in eager PyTorch."""

import copy
import functools

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

from effvit.layers import SoftmaxFreeAttention, SoftmaxFreeNormAttention


class NewtonInverse(torch.autograd.Function):
    """20 eager steps, and the closed form of the gradient, as SOFT's own code has it."""

    @staticmethod
    def forward(ctx, a, steps):
        alpha = 1.8 / a.sum(-1).amax(-1)[..., None, None] ** 2
        p = a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        v = alpha * p
        for _ in range(steps):
            v = 2 * v - v @ p @ v
        ctx.save_for_backward(v)
        return v

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return -(v.mT @ g @ v.mT), None


def gaussian(a, b):
    distance = a.square().sum(-1, keepdim=True) + b.square().sum(-1, keepdim=True).mT - 2 * (a @ b.mT)
    return torch.exp(-distance.clamp(min=0) / 2)


def eager(m, x, H, W):
    """The formula in the memory layout of SOFT's code: [B, heads, N, d], a convolution per value channel."""
    heads, d, k = m.num_head, m.head_dim, m.attn
    q, v = (w(x).reshape(len(x), H * W, heads, d).transpose(1, 2) for w in (m.W_q, m.W_v))
    q = q / d**0.25
    maps = q.reshape(-1, H, W, d).permute(0, 3, 1, 2)
    t = k.Qnorm_act(k.Qlandmark_op(maps).flatten(2).transpose(1, 2).reshape(len(x), heads, -1, d))
    k1 = gaussian(q, t)
    wide = torch.promote_types(t.dtype, torch.float32)  # SOFT inverts in float32 under autocast too
    k2 = gaussian(t.to(wide), t.to(wide))
    inverse = NewtonInverse.apply(k2, k.max_iter)
    if isinstance(m, SoftmaxFreeNormAttention):
        degree = k2.sum(-1, keepdim=True).rsqrt()
        inverse = degree * inverse * degree.mT
    values = (inverse @ (k1.mT @ v).to(wide)).to(v.dtype)
    out = k1 @ values
    maps = v.reshape(len(x), heads, H, W, d).permute(0, 4, 1, 2, 3).reshape(-1, heads, H, W)
    local = F.conv2d(maps, k.conv.weight, padding=k.use_conv // 2, groups=heads)
    out = out + local.reshape(len(x), d, heads, H * W).permute(0, 2, 3, 1)
    return m.ff(out.transpose(1, 2).flatten(2))


def path(call, H, W):
    def make(x, module):
        module = copy.deepcopy(module).to(x.dtype)  # for float64: the same rounded weights
        return lambda: call(module, x, H, W), {"x": [x], "parameters": list(module.parameters())}

    return make


def soft_case(label, kind, batch, side, dim, heads, ratio, conv, tags):
    def inputs(dtype, device):
        module = kind(dim, heads, ratio, conv).to(device, dtype)
        return {"x": torch.randn(batch, side * side, dim).to(device, dtype), "module": module}

    return Case(
        shape=label,
        inputs=inputs,
        effvit=path(lambda m, x, H, W: m(x, H, W), side, side),
        peers={"eager": path(eager, side, side)},
        reference=path(eager, side, side),
        wrt=("x",),
        tags=tags,
    )


def cases():
    # The normalised variant's published inverse is plain PyTorch in both: nothing to compare
    plain, normalised = SoftmaxFreeAttention, functools.partial(SoftmaxFreeNormAttention, inverse="ridge")
    yield soft_case("56x56 dim 64 heads 2 batch 8", plain, 8, 56, 64, 2, 8, 9, ("default",))
    yield soft_case("56x56 heads 2 batch 8, normalised", normalised, 8, 56, 64, 2, 8, 9, ("default",))
    yield soft_case("28x28 dim 128 heads 4 batch 8", plain, 8, 28, 128, 4, 4, 5, ("extended",))
    yield soft_case("14x14 dim 320 heads 10 batch 8", plain, 8, 14, 320, 10, 2, 3, ("extended",))
    yield soft_case("smoke 16x16 dim 16 heads 2 batch 2", plain, 2, 16, 16, 2, 4, 3, ("smoke",))
    yield soft_case("smoke 16x16, normalised", normalised, 2, 16, 16, 2, 4, 3, ("smoke",))


if __name__ == "__main__":
    raise SystemExit(main("soft", cases(), kernel_op="newton_pinv"))
