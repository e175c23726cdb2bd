"""fft_conv in readable PyTorch: the definition, and the spectra of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

MODES = ("causal", "same", "circular")
ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "silu": F.silu}


def fft_conv_size(n: int) -> int:
    """The smallest even number from n on whose prime factors are 2, 3, 5 and 7."""
    size = max(n + n % 2, 2)
    while True:
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def transform_sizes(mode: Sequence[int], sizes: Sequence[int], taps: Sequence[int]) -> list[int]:
    """Sizes of the transform per axis: of a circular axis its own, else one that no output wraps around in."""
    return [
        s if MODES[m] == "circular" else fft_conv_size(s + k - 1) for m, s, k in zip(mode, sizes, taps, strict=True)
    ]  # fmt: skip


def _wrapped(k: torch.Tensor, dim: int, size: int, shift: int) -> torch.Tensor:
    """Tap j of an axis goes to place (j - shift) modulo size; taps that meet are added."""
    periods = -(-k.shape[dim] // size)
    padding = [0, 0] * (k.dim() - dim - 1) + [0, periods * size - k.shape[dim]]
    return F.pad(k, padding).unflatten(dim, (periods, size)).sum(dim).roll(-shift, dim)


def _half_transform(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """rfftn along the last three axes, zeros behind x; its own derivative would work in place."""
    return torch.fft.fftn(x, s=sizes, dim=(-3, -2, -1))[..., : sizes[-1] // 2 + 1]


def _real_transform(spectrum: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """irfftn: what is not in the half spectrum is the conjugate of what is, and the real part of both is the same."""
    f = torch.arange(spectrum.shape[-1], device=spectrum.device)
    once = (f == 0) | (2 * f == sizes[-1])
    full = F.pad(spectrum * (2 - once.to(spectrum.real.dtype)), (0, sizes[-1] - spectrum.shape[-1]))
    return torch.fft.ifftn(full, dim=(-3, -2, -1)).real


def kernel_spectrum(
    k: torch.Tensor,
    k_rev: torch.Tensor | None,
    sizes: Sequence[int],
    *,
    mode: Sequence[int],
    keep: Sequence[int],
    scale: float = 1.0,
) -> torch.Tensor:
    """k and k_rev [J, C, KX, KY, KZ], transforms of `sizes` -> complex [J, C, NX, NY, NZ // 2 + 1]."""
    taps = k.shape[-3:]
    for axis, size in enumerate(sizes):
        shift = (taps[axis] - 1) // 2 if MODES[mode[axis]] == "same" else 0
        k = _wrapped(k, 2 + axis, size, shift)
        k_rev = None if k_rev is None else _wrapped(k_rev, 2 + axis, size, 0)
    spectrum = _half_transform(k, sizes)
    if k_rev is not None:
        spectrum = spectrum + _half_transform(k_rev, sizes).conj_physical()
    return kept(spectrum * scale, sizes, keep)


def kept(spectrum: torch.Tensor, sizes: Sequence[int], keep: Sequence[int]) -> torch.Tensor:
    """Zeros where the absolute frequency of an axis is `keep` or more; 0 keeps all."""
    for axis, (size, most) in enumerate(zip(sizes, keep, strict=True)):
        if most:
            i = torch.arange(spectrum.shape[2 + axis], device=spectrum.device)
            inside = torch.minimum(i, size - i) < most
            spectrum = spectrum * inside.view(-1, *[1] * (2 - axis))
    return spectrum


def fft_conv(
    u: torch.Tensor,
    k: torch.Tensor | None = None,
    d: torch.Tensor | None = None,
    pregate: torch.Tensor | None = None,
    postgate: torch.Tensor | None = None,
    k_rev: torch.Tensor | None = None,
    spectrum: torch.Tensor | None = None,
    *,
    mode_x: int = 2,
    mode_y: int = 2,
    mode_z: int = 0,
    act: int = 0,
    keep_x: int = 0,
    keep_y: int = 0,
    keep_z: int = 0,
    kernel_scale: float = 1.0,
) -> torch.Tensor:
    """postgate * act(conv(u * pregate, k) + d * u * pregate): [B, C1, X, Y, Z, C2] -> the same shape.

    The channels are C1 (channels first) or C2 (channels last), the other one is 1. k and k_rev are
    [J, C1*C2, KX, KY, KZ], or in their place spectrum [J, C1*C2, NX, NY, NZ//2 + 1, 2] of float32, real and imaginary
    parts; row b of the batch has kernel b modulo J. Modes and activations count MODES and ACTIVATIONS.
    """
    mode, keep = (mode_x, mode_y, mode_z), (keep_x, keep_y, keep_z)
    shape = u.shape
    wide = torch.promote_types(u.dtype, torch.float32)
    if 0 in shape:
        unused = [t for t in (k, d, pregate, postgate, k_rev, spectrum) if t is not None]  # their gradients are 0
        return u.to(wide) * 1.0 + sum(t.to(wide).sum() for t in unused)

    def channels_first(t):
        return t.to(wide).movedim(-1, 2).flatten(1, 2)  # [B, C, X, Y, Z]

    x = channels_first(u)
    if pregate is not None:
        x = x * channels_first(pregate)
    sizes = list(shape[2:5])
    if spectrum is None:
        taps = [max(a, b) for a, b in zip(k.shape[2:], (k if k_rev is None else k_rev).shape[2:], strict=True)]
        padded = transform_sizes(mode, sizes, taps)
        rev = None if k_rev is None else k_rev.to(wide)
        kernel = kernel_spectrum(k.to(wide), rev, padded, mode=mode, keep=keep, scale=kernel_scale)
    else:
        half = spectrum.shape[4]
        padded = [*spectrum.shape[2:4], sizes[2] if MODES[mode_z] == "circular" else 2 * (half - 1)]
        kernel = kept(torch.view_as_complex(spectrum.to(wide).contiguous()), padded, keep)
    transformed = _half_transform(x, padded).unflatten(0, (-1, kernel.shape[0]))
    y = _real_transform((transformed * kernel).flatten(0, 1), padded)[..., : sizes[0], : sizes[1], : sizes[2]]
    if d is not None:
        y = y + d.to(wide).view(-1, 1, 1, 1) * x
    y = list(ACTIVATIONS.values())[act](y).unflatten(1, (shape[1], shape[5])).movedim(2, -1)
    return y if postgate is None else y * postgate.to(wide)
