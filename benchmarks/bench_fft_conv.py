"""fft_conv against rfft, a product and irfft in PyTorch with a cached spectrum, and against conv1d for short kernels.

Forward: the kernel's spectrum is made once, before anything is timed, by effvit and by its peers ("cached"), or effvit
gets the kernel and transforms it in every call ("kernel"), which its peers never do. Forward and backward: everyone
gets the kernel. PyTorch's transforms take float32: of half precision the peers convert what they read and write. Of
either layout the peers get both, as they please; `compile` is channels first, the faster one, in which torch.compile
leaves complex numbers to eager PyTorch. `scipy` has scipy.fft's transforms and PyTorch's products.
"""

import functools
import itertools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import scipy_fft
import torch
import torch.nn.functional as F

import effvit.ops
from effvit.reference.fft_conv import MODES
from effvit.testing.fft_conv import SPEC

SHAPES = {  # (B, C, S, K), channels last, mode, gates and skip, tag
    "1-D 4x384x1024": ((4, 384, (1024,), (1024,)), False, "causal", True, "default"),
    "1-D 4x1024x384 last": ((4, 384, (1024,), (1024,)), True, "causal", True, "default"),
    "1-D 8x192x256": ((8, 192, (256,), (256,)), False, "causal", True, "default"),
    "1-D 8x256x192 last": ((8, 192, (256,), (256,)), True, "causal", True, "default"),
    "1-D 1x384x16384": ((1, 384, (16384,), (16384,)), False, "causal", True, "default"),
    "1-D 1x16384x384 last": ((1, 384, (16384,), (16384,)), True, "causal", True, "default"),
    "1-D 1x64x65536": ((1, 64, (65536,), (65536,)), False, "causal", True, "default"),
    "1-D 1x64x65536 K=1024": ((1, 64, (65536,), (1024,)), False, "causal", True, "default"),
    "1-D 4x384x1024 K=16": ((4, 384, (1024,), (16,)), False, "causal", True, "default"),
    "2-D 8x14x14x384 circular": ((8, 384, (14, 14), (14, 14)), True, "circular", False, "default"),
    "2-D 8x28x28x128 circular": ((8, 128, (28, 28), (28, 28)), True, "circular", False, "default"),
    "2-D 8x56x56x64 circular": ((8, 64, (56, 56), (56, 56)), True, "circular", False, "default"),
    "2-D 4x14x14x384 causal": ((4, 384, (14, 14), (14, 14)), True, "causal", True, "default"),
    "1-D 4x197x384 last": ((4, 384, (197,), (197,)), True, "causal", True, "extended"),
    "2-D 4x384x28x28 same": ((4, 384, (28, 28), (31, 31)), False, "same", False, "extended"),
    "smoke 1-D 2x3x40": ((2, 3, (40,), (40,)), False, "causal", True, "smoke"),
    "smoke 2-D 2x5x6x4 last": ((2, 4, (5, 6), (5, 6)), True, "circular", False, "smoke"),
}


def by_rfft(last, S, K, mode, cached, fft=torch.fft):
    """(channels first, channels last) with transforms along the last axes or the middle ones; both are prepared."""
    N = tuple(s if mode == "circular" else s + k for s, k in zip(S, K, strict=True))
    start = [(k - 1) // 2 if mode == "same" else 0 for k in K]

    def make(inside, u, k, d=None, pregate=None, postgate=None):
        axes = tuple(range(1, 1 + len(S)) if inside else range(2, 2 + len(S)))

        def arranged(t):
            if t is None or inside == last:
                return t
            return t.movedim(1, -1).contiguous() if inside else t.movedim(-1, 1).contiguous()

        crop = tuple(slice(a, a + s) for a, s in zip(start, S, strict=True))
        crop = (slice(None), *crop) if inside else (slice(None), slice(None), *crop)
        skip = None if d is None else d.float() if inside else d.float().view(-1, *[1] * len(S))

        def spectrum():
            transformed = fft.rfftn(k.float(), s=N, dim=tuple(range(1, 1 + len(S))))
            return transformed.movedim(0, -1).contiguous() if inside else transformed

        made = spectrum().detach() if cached else None
        tensors = [arranged(t) for t in (u, pregate, postgate)] if cached else None

        def fn():
            x, before, after = tensors or map(arranged, (u, pregate, postgate))
            dtype, x = x.dtype, x.float()
            x = x if before is None else x * before.float()
            product = fft.rfftn(x, s=N, dim=axes) * (spectrum() if made is None else made)
            y = fft.irfftn(product, s=N, dim=axes)[crop]
            y = y if skip is None else y + skip * x
            y = (y if after is None else y * after.float()).to(dtype)
            return y if inside == last else y.movedim(-1, 1) if inside else y.movedim(1, -1)

        return fn

    return functools.partial(make, False), functools.partial(make, True)


def peers_of(last, S, K, mode, gated, direction, dtype):
    libraries = {"eager": torch.fft} | ({"scipy": scipy_fft} if scipy_fft.serves(direction, dtype) else {})
    peers = {}
    for name, fft in libraries.items():
        first, inside = by_rfft(last, S, K, mode, direction == "forward", fft)
        peers |= {name: first, "channels inside" if name == "eager" else f"{name} channels inside": inside}
    if gated and len(K) == 1 and K[0] <= 64:
        peers["conv1d"] = by_conv1d(last, K[0])
    return peers


def by_conv1d(last, K):
    def make(u, k, d, pregate, postgate):
        weight = k.flip(-1).unsqueeze(1)

        def fn():
            x = u * pregate
            x = x.transpose(1, 2) if last else x
            y = F.conv1d(F.pad(x, (K - 1, 0)), weight, groups=x.shape[1]) + d.unsqueeze(-1) * x
            return (y.transpose(1, 2) if last else y) * postgate

        return fn

    return make


def by_effvit(last, S, mode, cached):
    def make(u, k, d=None, pregate=None, postgate=None):
        options = {"mode": mode, "channels_last": last, "pregate": pregate, "postgate": postgate}
        if cached:
            options["spectrum"] = effvit.ops.fft_conv_spectrum(k.detach(), S, mode=mode)
        return functools.partial(effvit.ops.fft_conv, u, None if cached else k, d, **options)

    return make


def definition(last, mode):
    def make(u, k, d=None, pregate=None, postgate=None):
        options = {"mode": mode, "channels_last": last, "pregate": pregate, "postgate": postgate}
        return functools.partial(effvit.ops.fft_conv, u, k, d, **options)  # float64: the definition

    return make


def cases():
    for name, ((B, C, S, K), last, mode, gated, tag) in SHAPES.items():
        shape = (B, *S, C) if last else (B, C, *S)

        def inputs(dtype, device, shape=shape, C=C, K=K, gated=gated):
            maps = ("u", "pregate", "postgate") if gated else ("u",)
            drawn = {n: torch.randn(shape).to(device, dtype) for n in maps}
            scale = torch.Size(K).numel() ** -0.5
            drawn["k"] = (torch.randn(C, *K) * scale).to(device, dtype)
            if gated:
                drawn["d"] = torch.randn(C).to(device, dtype)
            return drawn

        def lifted(name, t, B=B, C=C, S=S, last=last):
            """An argument of the public function as the operator has it."""
            ones = (1,) * (3 - len(S))
            if name == "d":
                return t
            if name == "k":
                return t.reshape(1, C, *ones, *t.shape[1:])
            return t.reshape((B, 1, *ones, *S, C) if last else (B, C, *ones, *S, 1))

        options = {f"mode_{a}": MODES.index(mode) for a in "xyz"[3 - len(S) :]}
        names = ("u", "k", "d", "pregate", "postgate") if gated else ("u", "k")

        def price(direction, dtype, shape=shape, C=C, K=K, lifted=lifted, options=options, names=names):
            shapes = {"k": (C, *K), "d": (C,)}
            args = [lifted(n, torch.empty(shapes.get(n, shape), dtype=dtype, device="meta")) for n in names]
            calls = [SPEC.cost(args, options, b) for b in (False, True)][: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        def magnitudes(inputs, grad_out, eps, lifted=lifted, options=options):
            given = [lifted(n, inputs[n].detach()) if n in inputs else None for n in SPEC.tensors]
            grads = None if grad_out is None else (lifted("out", grad_out),)
            outputs, gradients = SPEC.magnitudes(given, options, grads, eps)
            found = {"out": outputs["out"].reshape(inputs["u"].shape)}
            return found | {f"d{n}": t.reshape(inputs[n].shape) for n, t in gradients.items()}

        # How effvit gets the kernel, the direction, the dtypes.
        kinds = (("cached", "forward"), ("kernel", "forward"), ("kernel", "forward+backward"))
        for (how, direction), dtypes in itertools.product(kinds, (("float32",), ("bfloat16", "float16"))):
            yield Case(
                shape=f"{name} {how}",
                inputs=inputs,
                effvit=by_effvit(last, S, mode, how == "cached"),
                peers=peers_of(last, S, K, mode, gated, direction, dtypes[0]),
                reference=definition(last, mode),
                cost=price,
                magnitudes=magnitudes,
                wrt=names,
                memory=how == "cached" and name in ("1-D 4x384x1024", "smoke 1-D 2x3x40"),
                directions=(direction,),
                dtypes=dtypes,
                tags=(tag,),
            )


if __name__ == "__main__":
    raise SystemExit(main("fft_conv", cases()))
