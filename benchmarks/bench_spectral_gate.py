"""spectral_gate against torch.fft.rfft2 and irfft2, of maps with channels last and with channels first in memory.

torch.fft has no half precision on the CPU: there the peers convert to float32 and back, as GFNet does. `compile` is
channels first, the faster one, in which torch.compile leaves complex numbers to eager PyTorch. `scipy` has scipy.fft's
transforms and PyTorch's product.
"""

import functools
import itertools

from harness import DIRECTIONS, Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import scipy_fft
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


def in_memory(t, channels, place):
    """The same shape, with the dim of channels at another place in memory: what a network of such maps has."""
    order = [i for i in range(t.dim()) if i != channels]
    order.insert(place, channels)
    moved = t.detach().permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])
    return moved.requires_grad_(t.requires_grad)


def by_fft(first, x, weight, fft=torch.fft):
    """first: with channels first in memory, transformed along the last axes."""
    if first:
        x, weight = in_memory(x, x.dim() - 1, 1), in_memory(weight, weight.dim() - 2, 0)
    axes = tuple(range(2, x.dim()) if first else range(1, x.dim() - 1))

    def fn():
        # Transformed along dims that do not lie last in memory, they have a wrong gradient by inductor of torch 2.13.
        maps, gate = (x.movedim(-1, 1), weight.movedim(-2, 0)) if first else (x, weight)
        wide = maps if maps.dtype == torch.float64 else maps.float()
        spectrum = fft.rfftn(wide, dim=axes, norm="ortho") * torch.view_as_complex(gate)
        size = [wide.shape[axis] for axis in axes]
        y = fft.irfftn(spectrum, s=size, dim=axes, norm="ortho").to(x.dtype)
        return y.movedim(1, -1) if first else y

    return fn, {"x": [x], "weight": [weight]}


def peers_of(direction, dtype):
    peers = {"eager": functools.partial(by_fft, False), "channels first": functools.partial(by_fft, True)}
    if scipy_fft.serves(direction, dtype):
        peers["scipy"] = functools.partial(by_fft, False, fft=scipy_fft)
        peers["scipy channels first"] = functools.partial(by_fft, True, fft=scipy_fft)
    return peers


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

        for direction, dtypes in itertools.product(DIRECTIONS, (("float32",), ("bfloat16", "float16"))):
            yield Case(
                shape=name,
                inputs=inputs,
                effvit=lambda **t: functools.partial(effvit.ops.spectral_gate, **t),
                peers=peers_of(direction, dtypes[0]),
                reference=functools.partial(by_fft, False),
                compiled="channels first",
                cost=price,
                magnitudes=magnitudes,
                wrt=("x", "weight"),
                memory=tag == "smoke" or name == "8x56x56x64",
                directions=(direction,),
                dtypes=dtypes,
                tags=(tag,),
            )


if __name__ == "__main__":
    raise SystemExit(main("spectral_gate", cases()))
