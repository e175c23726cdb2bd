"""The search of `effvit.calibrate_ptq`: candidates of every scheme, tables in float64, and the one of least error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from . import ops, quantizers
from .quantizers import ADALOG_R, Quantizer

LOGARITHMIC = ("log2", "log_sqrt2", "adalog")
SHIFTS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)  # of I&S-ViT, about
ALPHAS = (0.3, 0.7, 1.0, 1.2, 1.3, 1.4, 1.45, 1.5, 1.53)
SCALES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
BASES = (6, 9, 12, 15, 18, 22, 26, 31, 37, 45, 55, 74)  # AdaLog's q: 2^(q / 37)
Error = Callable[[Callable[[torch.Tensor], torch.Tensor]], float]  # of a function that quantises


def table(scheme: str, bits: int, options: dict, zero: str) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds, values) in float64: those of :mod:`effvit.quantizers`, up to the rounding of thresholds."""
    n = 2**bits - 1
    if scheme in LOGARITHMIC:
        scale, offset, q = options["scale"], options.get("offset", 0.0), options.get("q", 0)
        step = {"log2": 1.0, "log_sqrt2": 0.5, "adalog": q / ADALOG_R}[scheme]
        k = np.arange(n + 1 if zero == "extra" and bits < 8 else n)
        if scheme == "adalog":
            values = 2.0 ** -(k * q // ADALOG_R) * np.array(quantizers.adalog_table(bits, q))[: len(k)]
        elif scheme == "log2":
            values = 2.0 ** -k.astype(float)
        else:
            values = 2.0 ** -np.ceil(k / 2) * np.where(k % 2, math.sqrt(2.0), 1.0)
        bounds = scale * 2.0 ** (-(k + 0.5) * step)
        return bounds[::-1] - offset, np.concatenate(([0.0], scale * values[::-1])) - offset
    k = np.arange(n + 1)
    if scheme == "shift_uniform_log2":
        eta = options["shift"]
        a, b = math.log2(options["low"] + eta), math.log2(options["high"] + eta)
        d = (b - a) / n
        return 2.0 ** (a + (k[:-1] + 0.5) * d) - eta, 2.0 ** np.rint(a + k * d) - eta
    if scheme == "tan":
        scale, alpha = options["scale"], options["alpha"]
        inverse = lambda y: scale * (1 + np.arctan((2 * y - 1) * math.tan(alpha)) / alpha) / 2
        return inverse((k[:-1] + 0.5) / n), inverse(k / n)
    scale, zero_point = options["scale"], options["zero_point"]
    return scale * (k[:-1] - zero_point + 0.5), scale * (k - zero_point)


def made(scheme: str, bits: int, options: dict, zero: str) -> Quantizer:
    """The exact one."""
    more = {"zero": zero} if scheme in LOGARITHMIC else {}
    return quantizers.SCHEMES[scheme](bits, **options, **more)


def uniform_options(low: float, high: float, bits: int) -> dict:
    """A range, which 0 is in, as scale and zero point."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (2**bits - 1), 1e-12)
    return {"scale": scale, "zero_point": min(max(round(-low / scale), 0), 2**bits - 1)}


def candidates(scheme: str, bits: int, low: float, high: float) -> Iterator[dict]:
    """Options for numbers from low to high."""
    high = max(high, 1e-12)
    if scheme == "uniform":
        for f in np.linspace(1.0, 0.3, 15):
            yield uniform_options(f * low, f * high, bits)
    elif scheme == "shift_uniform_log2":
        least = max(-low, 0.0)
        for shift in SHIFTS:
            for f in (1.0, 0.8, 0.6):
                yield {"shift": shift * (high - low) + least * 1.001, "low": low, "high": low + f * (high - low)}
    elif scheme == "tan":
        for alpha in ALPHAS:
            for f in SCALES[:5]:
                yield {"scale": f * high, "alpha": alpha}
    else:
        offset = {"offset": -low} if low < 0 else {}
        for f in SCALES:
            for q in BASES if scheme == "adalog" else (0,):
                yield {"scale": f * (high - min(low, 0.0))} | ({"q": q} if q else {}) | offset


def finer(scheme: str, options: dict) -> Iterator[dict]:
    """Neighbours of what was best: AdaLog's fast progressive search, in one more round, and the scale of the others."""
    for f in (1.1, 1.05, 0.95, 0.9):
        if scheme in (*LOGARITHMIC, "tan"):
            yield options | {"scale": f * options["scale"]}
        elif scheme == "shift_uniform_log2" and options["low"] >= 0:
            yield options | {"shift": f * f * f * options["shift"]}
    for q in (-3, -2, -1, 1, 2, 3) if scheme == "adalog" else ():
        yield options | {"q": max(options["q"] + q, 1)}


def search(
    schemes: Sequence[str], bits: int, low: float, high: float, error: Error, zero: str, device: torch.device
) -> tuple[Quantizer, float]:
    """(the exact quantiser of least error, that error)."""
    best = None
    for scheme in schemes:
        if low < 0 and scheme == "tan":
            continue
        own = None

        def consider(options, scheme=scheme):
            nonlocal own
            tables = [torch.tensor(np.ascontiguousarray(t), dtype=torch.float32, device=device)
                      for t in table(scheme, bits, options, zero)]  # fmt: skip
            e = error(lambda x: ops.fake_quantize_lut(x, *tables))
            if math.isfinite(e) and (own is None or e < own[0]):
                own = (e, scheme, options)

        for options in candidates(scheme, bits, low, high):
            consider(options)
        if own is not None:
            for options in [*finer(scheme, own[2])]:
                consider(options)
            best = own if best is None or own[0] < best[0] else best
    if best is None:
        only = low < 0 and set(schemes) == {"tan"}
        expected = "numbers from 0 on, which tan takes," if only else f"finite activations for {', '.join(schemes)},"
        raise ValueError(
            f"effvit.calibrate_ptq: calibration must have {expected} got values from {low:.4g} to {high:.4g}"
        )
    e, scheme, options = best
    return made(scheme, bits, options, zero), e


def search_int8(low: float, high: float, error: Error) -> tuple[float, float]:
    """(scale of the symmetric int8 quantiser of least error, that error)."""
    largest = max(abs(low), abs(high), 1e-12)
    found = []
    for f in np.linspace(1.0, 0.5, 11):
        scale = float(np.float32(f * largest / 127))
        t = torch.tensor([scale])
        found.append((error(lambda x, t=t: ops.fake_quantize_int8(x, t.to(x.device))), scale))
    e, scale = min(found)
    return scale, e


@torch.no_grad()
def weight_scales(weight: torch.Tensor, bits: int, method: str) -> torch.Tensor:
    """[N] float32: what one step of each row of [N, K] is worth."""
    w, n = weight.detach().float(), 2 ** (bits - 1) - 1
    largest = w.abs().amax(1).clamp(min=1e-12)
    if method == "max":
        return largest / n
    if method == "percentile":
        return torch.quantile(w.abs(), {8: 1.0, 7: 1.0, 6: 0.9999}.get(bits, 0.995), dim=1).clamp(min=1e-12) / n
    best, least = largest / n, torch.full_like(largest, math.inf)
    for f in np.linspace(1.0, 0.3, 29 if bits < 7 else 8):
        scale = f * largest / n
        steps = (w / scale[:, None]).round().clamp(-n, n)
        e = (steps * scale[:, None] - w).square().sum(1)
        best, least = torch.where(e < least, scale, best), torch.minimum(e, least)
    return best
