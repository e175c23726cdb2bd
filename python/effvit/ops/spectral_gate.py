"""spectral_gate: the declaration and the public function."""

from __future__ import annotations

import math

import torch

from ..reference.spectral_gate import spectral_gate as _definition
from ..reference.spectral_gate import spectral_gate_backward as _backward
from ._checks import check_tensor, shape, type_error, value_error
from ._op import op

NORMS = ("ortho", "backward", "forward")


def _derive(op, dims, options, tensors):
    if dims["F"] != dims["W"] // 2 + 1:
        expected = f"[G, H, W//2 + 1, C, 2] = {[dims['G'], dims['H'], dims['W'] // 2 + 1, dims['C'], 2]}"
        raise value_error(op, "weight", expected, shape(tensors["weight"]))


def _flops(dims, options):
    """2.5 n log2 n for a transform of n real numbers, two of them, three backward; a product of complex numbers: 6."""
    n, maps = dims["H"] * dims["W"], dims["G"] * dims["N"] * dims["C"]
    transform, bins = int(2.5 * n * math.log2(max(n, 2))), dims["H"] * dims["F"]
    return maps * (2 * transform + 6 * bins), maps * (3 * transform + 14 * bins)


OP = op(
    "spectral_gate",
    "x: G N H W C, weight: G H F C 2 | float32 packed -> out: G N H W C",
    reference=_definition,
    backward=_backward,
    derive=_derive,
    empty="G N H W C",
    batch="G",
    shards=("G", "N", "C"),
    autocast=False,  # torch.fft computes in the dtype that it is given
    flops=_flops,
)


def spectral_gate(x: torch.Tensor, weight: torch.Tensor, *, norm: str = "ortho") -> torch.Tensor:
    """``irfft2(rfft2(x) * W)``, the global filter of GFNet (arXiv:2107.00645), channels last, in one pass.

    A circular convolution of every channel with a kernel as large as the map, given by its spectrum. No spectrum is
    kept: the backward transforms x again.

    Args:
        x: [B, H, W, C], or [B, L, C] for a transform of one axis; float32, bfloat16 or float16, any strides with a last
            stride of 1. Any sizes, odd ones and primes too; a prime factor p above 13 takes time in proportion to p.
        weight: [H, W//2 + 1, C, 2], the real and the imaginary part, or [H, W//2 + 1, C] complex; of one axis without
            the first dim. With B in front, every sample has its own. Any strides; float32, or converted to it.
            As in torch.fft, the imaginary part of bins 0 and W/2 of the last axis has no effect once the other axis is
            transformed back.
        norm: "ortho", "backward" or "forward", as torch.fft has it. Both transforms have the same one, so that the
            result does not depend on it.

    Returns:
        The shape and dtype of x, contiguous. Differentiable. Computed in float32; deterministic, and independent of the
        number of threads. On the CPU a thread takes memory for the spectrum of a vector of channels (4, 8 or 16), in
        the backward for four, which also has 8 MiB for sums over the batch; in Triton there are two spectra of the
        whole batch in float32, or three, and matrices of H x H and W x W. Under autocast nothing is cast.

    Raises:
        TypeError: an argument is not a dense tensor or has the wrong dtype; norm is not a string.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.
    """
    name = "spectral_gate"
    check_tensor(name, "x", x)
    check_tensor(name, "weight", weight)
    if type(norm) is not str:
        raise type_error(name, "norm", "a string", type(norm).__name__)
    if norm not in NORMS:
        raise value_error(name, "norm", "ortho, backward or forward", norm)
    if x.dim() not in (3, 4):
        raise value_error(name, "x", "[B, H, W, C] or [B, L, C]", shape(x))
    given = weight
    if weight.is_complex():
        weight = torch.view_as_real(weight.to(torch.complex64).resolve_conj())
    elif weight.dtype in (torch.bfloat16, torch.float16):
        weight = weight.float()
    batch, *size, channels = x.shape
    expected = [*size[:-1], size[-1] // 2 + 1, channels, 2]
    each = weight.dim() == x.dim() + 1  # a weight for every sample
    if list(weight.shape) != [batch] * each + expected:
        dims = "H, W//2 + 1" if len(size) == 2 else "L//2 + 1"
        wanted = f"[{dims}, C, 2] = {expected}, or complex [{dims}, C], perhaps with B = {batch} in front"
        raise value_error(name, "weight", wanted, shape(given))
    if len(size) == 1:
        x, weight = x.unsqueeze(1), weight.unsqueeze(1 if each else 0)
    out = OP(x.unsqueeze(1), weight).squeeze(1) if each else OP(x.unsqueeze(0), weight.unsqueeze(0)).squeeze(0)
    return out.squeeze(1) if len(size) == 1 else out
