"""spectral_gate against torch.fft.rfft2 and irfft2, of maps with channels last and with channels first in memory.

torch.fft has no half precision on the CPU: there the peers convert to float32 and back, as GFNet does.
"""

import functools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.testing.spectral_gate import SPEC

SHAPES = {  # (B, H, W, C), tag: GFNet at 224 x 224 and 384 x 384 pixels, one stage or the pyramid of GFNet-H
    "8x14x14x384": ((8, 14, 14, 384), "default"),
    "8x24x24x384": ((8, 24, 24, 384), "default"),
    "8x56x56x64": ((8, 56, 56, 64), "default"),
    "8x28x28x128": ((8, 28, 28, 128), "default"),
    "8x14x14x256": ((8, 14, 14, 256), "default"),
    "8x7x7x512": ((8, 7, 7, 512), "default"),
    "1x14x14x384": ((1, 14, 14, 384), "default"),
    "64x14x14x384": ((64, 14, 14, 384), "extended"),
    "1x512x512x32": ((1, 512, 512, 32), "extended"),
    "8x31x37x64": ((8, 31, 37, 64), "extended"),
    "8x1024x256": ((8, 1024, 256), "extended"),
    "smoke 2x5x6x8": ((2, 5, 6, 8), "smoke"),
}


def by_torch(x, weight):
    axes = tuple(range(1, x.dim() - 1))
    wide = x if x.dtype == torch.float64 else x.float()
    spectrum = torch.fft.rfftn(wide, dim=axes, norm="ortho") * torch.view_as_complex(weight)
    return torch.fft.irfftn(spectrum, s=x.shape[1:-1], dim=axes, norm="ortho").to(x.dtype)


def channels_first(x, weight):
    """The same shapes, with channels first in memory: what a network of such maps has."""

    def laid_out(t, channels, place):
        order = [i for i in range(t.dim()) if i != channels]
        order.insert(place, channels)
        moved = t.detach().permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])
        return moved.requires_grad_(t.requires_grad)

    x, weight = laid_out(x, x.dim() - 1, 1), laid_out(weight, weight.dim() - 2, 0)
    return functools.partial(by_torch, x, weight), {"x": [x], "weight": [weight]}


def cases():
    for name, (shape, tag) in SHAPES.items():
        *size, C = shape[1:]
        bins = (*size[:-1], size[-1] // 2 + 1, C, 2)

        def inputs(dtype, device, shape=shape, bins=bins):
            return {"x": torch.randn(shape).to(device, dtype), "weight": 0.02 * torch.randn(bins, device=device)}

        def price(direction, dtype, shape=shape, bins=bins):
            height = (1,) * (4 - len(shape))
            x = torch.empty((1, shape[0], *height, *shape[1:]), dtype=dtype, device="meta")
            args = x, torch.empty((1, *height, *bins), device="meta")
            calls = [SPEC.cost(args, {}, b) for b in (False, True)][: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        def magnitudes(inputs, grad_out, eps, shape=shape, bins=bins):
            height = (1,) * (4 - len(shape))
            lifted = lambda t: t.detach().reshape(1, shape[0], *height, *shape[1:])
            args = lifted(inputs["x"]), inputs["weight"].detach().reshape(1, *height, *bins)
            outputs, gradients = SPEC.magnitudes(args, {}, None if grad_out is None else (lifted(grad_out),), eps)
            found = {"out": outputs["out"].reshape(shape)}
            if gradients:
                found |= {"dx": gradients["x"].reshape(shape), "dweight": gradients["weight"].reshape(bins)}
            return found

        yield Case(
            shape=name,
            inputs=inputs,
            effvit=lambda **t: functools.partial(effvit.ops.spectral_gate, **t),
            peers={"eager": lambda **t: functools.partial(by_torch, **t), "channels first": channels_first},
            reference=lambda **t: functools.partial(by_torch, **t),
            compiled=None,
            cost=price,
            magnitudes=magnitudes,
            wrt=("x", "weight"),
            memory=tag == "smoke" or name == "8x56x56x64",
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("spectral_gate", cases()))
