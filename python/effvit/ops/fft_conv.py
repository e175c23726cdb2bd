"""fft_conv: the declaration and the public functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..reference.fft_conv import ACTIVATIONS, MODES, kernel_spectrum, transform_sizes
from ..reference.fft_conv import fft_conv as _definition
from ._checks import (
    as_finite,
    check_dtype,
    check_last_stride,
    check_tensor,
    index_of,
    is_int,
    shape,
    type_error,
    value_error,
)
from ._op import op

NAMES = tuple(ACTIVATIONS)  # the schema's ints are indices into these and MODES
_CIRCULAR = MODES.index("circular")


_LARGE_ENOUGH = "of a transform as large as circular axes are, and no smaller than others"


def _fits(modes, sizes, bins):
    """Whether a spectrum of so many bins is that of a transform that can be cropped to these sizes."""
    last = sizes[-1] if modes[-1] == _CIRCULAR else 2 * (bins[-1] - 1)
    points = [*bins[:-1], last]
    return bins[-1] == last // 2 + 1 and all(
        n == size if mode == _CIRCULAR else n >= size for mode, size, n in zip(modes, sizes, points, strict=True)
    )


def _derive(op, dims, options, tensors):
    if dims["C1"] != 1 and dims["C2"] != 1:
        raise value_error(op, "u", "[B, C, X, Y, Z, 1] or [B, 1, X, Y, Z, C]", shape(tensors["u"]))


def _check(op, dims, options, tensors):
    k, k_rev, spectrum = tensors["k"], tensors["k_rev"], tensors["spectrum"]
    if spectrum is None and k is None:
        raise value_error(op, "k", "given where spectrum is not", None)
    if spectrum is not None:
        for name, t in (("k", k), ("k_rev", k_rev)):
            if t is not None:
                raise value_error(op, name, "None where spectrum is given", shape(t))
        if options["kernel_scale"] != 1:
            raise value_error(op, "kernel_scale", "1.0 where spectrum is given", options["kernel_scale"])
    J, B = dims["J"], dims["B"]
    name = "k" if spectrum is None else "spectrum"
    if J != 1 and J != B and (J == 0 or B % J):
        raise value_error(op, name, f"of a batch size that divides {B}", shape(tensors[name]))
    modes = [options[f"mode_{axis}"] for axis in "xyz"]
    sizes = [dims[axis] for axis in "XYZ"]
    if spectrum is None:
        for name, axes, t in (("k", "KX KY KZ", k), ("k_rev", "RX RY RZ", k_rev)):
            if t is not None and any(dims[axis] == 0 for axis in axes.split()):
                raise value_error(op, name, "of at least one tap per axis", shape(t))
        taps = [dims[f"K{axis}"] if k_rev is None else max(dims[f"K{axis}"], dims[f"R{axis}"]) for axis in "XYZ"]
        dims["NX"], dims["NY"], dims["NZ"] = transform_sizes(modes, sizes, taps)
        return
    dims["NZ"] = sizes[2] if modes[2] == _CIRCULAR else 2 * (dims["NF"] - 1)
    if not _fits(modes, sizes, [dims["NX"], dims["NY"], dims["NF"]]):
        raise value_error(op, "spectrum", f"{_LARGE_ENOUGH}, {sizes}", shape(spectrum))


def _transform(dims):
    """Operations of a real transform of one channel: half of a complex one's 5 N log2(N)."""
    n = dims["NX"] * dims["NY"] * dims["NZ"]
    return int(2.5 * n * math.log2(max(n, 2)))


def _flops(dims, options):
    """Two transforms and a product of spectra per row and channel, a transform per kernel; backward: a transform of u,
    of the output's gradient and of y, two products, and three transforms back.
    """
    transform, channels = _transform(dims), dims["C1"] * dims["C2"]
    product = 4 * dims["NX"] * dims["NY"] * dims["NZ"]
    rows, kernels = dims["B"] * channels, dims["J"] * channels
    return rows * (2 * transform + product) + kernels * transform, rows * (4 * transform + 3 * product) + 2 * (
        kernels * transform
    )


OP = op(
    "fft_conv",
    "u: B C1 X Y Z C2, k?: J C1*C2 KX KY KZ | float packed, d?: C1*C2 | float packed, pregate?: B C1 X Y Z C2, "
    "postgate?: B C1 X Y Z C2, k_rev?: J C1*C2 RX RY RZ | float packed, "
    "spectrum?: J C1*C2 NX NY NF 2 | float32 packed -> out: B C1 X Y Z C2",
    "mode_x: int in 0..2 = 2, mode_y: int in 0..2 = 2, mode_z: int in 0..2 = 0, act: int in 0..2 = 0, "
    "keep_x: int in 0..2147483647 = 0, keep_y: int in 0..2147483647 = 0, keep_z: int in 0..2147483647 = 0, "
    "kernel_scale: float = 1.0",
    reference=_definition,
    derive=_derive,
    check=_check,
    empty="B C1 X Y Z C2",
    shards=("B",),
    flops=_flops,
)


def fft_conv(
    u: torch.Tensor,
    k: torch.Tensor | None = None,
    d: torch.Tensor | None = None,
    *,
    pregate: torch.Tensor | None = None,
    postgate: torch.Tensor | None = None,
    k_rev: torch.Tensor | None = None,
    spectrum: torch.Tensor | None = None,
    mode: str | Sequence[str] = "causal",
    channels_last: bool = False,
    act: str = "none",
    freq_keep: int | Sequence[int] | None = None,
    kernel_scale: float = 1.0,
) -> torch.Tensor:
    r"""Gated long convolution of each channel with a kernel of its own: ``postgate * act(k * u' + d u')``.

    ``u' = pregate * u``, and ``*`` is the true convolution ``y[i] = sum_j k[j] u'[i - j]`` along one to three axes, as
    Hyena (arXiv:2302.10866), FlashFFTConv (arXiv:2311.05908), SGConv, MEGA and Orchid have it: kernels of any length,
    shorter or longer than the input, which may have any length too. By Fourier transforms, or directly where that is
    faster.

    Args:
        u: [B, C, \*S], or [B, \*S, C] with `channels_last`; S has one to three axes of any length. float32, bfloat16 or
            float16; of channels last the last stride is 1, strides are else any.
        k: [C, \*K], or [B, C, \*K], a kernel for each row of the batch, or [J, C, \*K] where J divides B: row b has
            kernel b modulo J. None: `spectrum` is given. float32, bfloat16 or float16, whatever u is; any strides.
        d: [C] in one of these dtypes, the skip. None: 0.
        pregate, postgate: of u's shape and dtype. None: 1.
        k_rev: like k, of any length: taps at negative lags, ``y[i] += sum_j k_rev[j] u'[i + j]``; lag 0 is in both.
        spectrum: complex64 [C, \*N_half] or [B, C, \*N_half], the kernel's transform, in place of k and k_rev: from
            :func:`fft_conv_spectrum`, or any other. ``y = irfftn(rfftn(u', N) spectrum, N)``, cropped to S. The last
            axis's N is S where that is circular, else the even ``2 (N_half - 1)``. A kernel much shorter than u is
            faster as k: it needs no transform of the whole.
        mode: per axis, or one for all: "causal": zeros before the start, y as long as u; "same": the middle, from
            ``(K - 1) // 2`` on, as scipy.signal.convolve has it; "circular": indices modulo S.
        act: "none", "gelu" (the exact one) or "silu".
        freq_keep: per axis, or one for all: the kernel's spectrum is zero where the absolute frequency, counted from 0,
            is this or more; of the transform that :func:`fft_conv_spectrum` says. None: all are kept.
        kernel_scale: k and k_rev are multiplied with it. 1.0 where `spectrum` is given.

    Returns:
        The shape and dtype of u, contiguous; differentiable, in every tensor. The backward keeps the inputs alone.
        Computed in float32; gradients of kernels are sums over the batch in float32. Deterministic; results do not
        depend on the number of threads. float64 is computed by the definition in PyTorch. Under autocast u and the
        gates are cast. On the CPU a thread takes memory for a transform of a vector of channels (4, 8 or 16, even where
        there are fewer), in the backward for several.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.
    """
    name = OP.name
    tensors = {"k": k, "d": d, "pregate": pregate, "postgate": postgate, "k_rev": k_rev, "spectrum": spectrum}
    for argument, t in ({"u": u} | tensors).items():
        if t is not None or argument == "u":
            check_tensor(name, argument, t)
    axes = _axes_of(u, channels_last)
    for argument in ("pregate", "postgate"):
        t = tensors[argument]
        if t is not None and t.shape != u.shape:
            raise value_error(name, argument, f"{shape(u)} like u", shape(t))
    wide = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    if spectrum is not None and spectrum.dtype != wide:
        raise type_error(name, "spectrum", str(wide), spectrum.dtype)
    maps = [_as_map(t, axes, channels_last) for t in (u, pregate, postgate)]
    kernels = [_as_kernel(argument, tensors[argument], axes) for argument in ("k", "k_rev", "spectrum")]
    if kernels[2] is not None:
        kernels[2] = torch.view_as_real(kernels[2].resolve_conj())
    options = _options(name, axes, mode, freq_keep)
    options |= {"act": index_of(name, "act", act, NAMES), "kernel_scale": kernel_scale}
    arguments = (maps[0], kernels[0], d, *maps[1:], *kernels[1:])
    if torch.compiler.is_compiling():  # nothing that a traced call raises can be caught
        return _call(arguments, options).reshape(u.shape)
    try:
        return _call(arguments, options).reshape(u.shape)
    except ValueError as error:
        failure = error
    _explain({"u": u} | tensors, [options[f"mode_{a}"] for a in "xyz"[3 - axes :]], channels_last)
    raise failure


def fft_conv_spectrum(
    k: torch.Tensor,
    size: int | Sequence[int],
    *,
    k_rev: torch.Tensor | None = None,
    mode: str | Sequence[str] = "causal",
    freq_keep: int | Sequence[int] | None = None,
    kernel_scale: float = 1.0,
) -> torch.Tensor:
    r"""The spectrum of kernels, made once for many calls of :func:`fft_conv`, as inference has it.

    Args:
        k, k_rev: [C, \*K] or [B, C, \*K], float32, bfloat16, float16 or float64.
        size: the sizes S of the inputs to come; an int for one axis.
        mode, freq_keep, kernel_scale: as :func:`fft_conv` has them; it gets the same `mode`.

    Returns:
        complex64 (of float64: complex128) [C, \*N_half] or [B, C, \*N_half], as torch.fft.rfftn has it, without
        normalisation. N is S on circular axes, elsewhere the smallest even number from ``S + max(K, K_rev) - 1`` on
        whose prime factors are at most 7; N_half is N, but ``N // 2 + 1`` on the last axis. Differentiable. Kernels are
        rolled so that the output is cropped from index 0: by ``-((K - 1) // 2)`` on axes of mode "same".

    Raises:
        TypeError, ValueError: as :func:`fft_conv`.
    """
    name = "fft_conv_spectrum"
    sizes = [size] if is_int(size) else list(size) if isinstance(size, (tuple, list, torch.Size)) else [size]
    if not all(map(is_int, sizes)):
        raise type_error(name, "size", "an int or integers", repr(size))
    axes = len(sizes)
    if not 1 <= axes <= 3 or min(sizes) < 1:
        raise value_error(name, "size", "one to three positive integers", repr(size))
    for argument, t in (("k", k), ("k_rev", k_rev)):
        if t is None and argument == "k_rev":
            continue
        check_tensor(name, argument, t)
        check_dtype(name, argument, t, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
        if t.dim() not in (axes + 1, axes + 2) or 0 in t.shape[-axes:]:
            raise value_error(name, argument, f"[C, *K] or [B, C, *K] of {_count(axes)}", shape(t))
    if k_rev is not None:
        if k_rev.shape[:-axes] != k.shape[:-axes]:
            raise value_error(name, "k_rev", f"of the batch and channels of k {shape(k)}", shape(k_rev))
        if k_rev.device != k.device:
            raise value_error(name, "k_rev", f"on {k.device} like k", k_rev.device)
    options = _options(name, axes, mode, freq_keep)
    scale = as_finite(name, "kernel_scale", kernel_scale)
    modes, keep = ([options[f"{option}_{axis}"] for axis in "xyz"] for option in ("mode", "keep"))
    wide = torch.promote_types(k.dtype, torch.float32 if k_rev is None else k_rev.dtype)
    wide = torch.promote_types(wide, torch.float32)
    kernels = [None if t is None else _as_kernel("k", t, axes).to(wide) for t in (k, k_rev)]
    taps = [max(t.shape[2 + i] for t in kernels if t is not None) for i in range(3)]
    padded = transform_sizes(modes, [1] * (3 - axes) + sizes, taps)
    spectrum = kernel_spectrum(*kernels, padded, mode=modes, keep=keep, scale=scale)
    return spectrum.reshape(*k.shape[:-axes], *spectrum.shape[-axes:])


# ---- arguments -----------------------------------------------------------------------------------------------------


def _call(arguments, options):
    if arguments[0].dtype != torch.float64:
        return OP(*arguments, **options)
    options = options | {"kernel_scale": as_finite(OP.name, "kernel_scale", options["kernel_scale"])}
    return _definition(*_checked64(arguments, options), **options).contiguous()


def _explain(given, modes, channels_last):
    """What the op says of its six dims, in those of the public function; nothing, where it says something else."""
    name, u = OP.name, given["u"]
    axes, batch = u.dim() - 2, u.shape[0]
    channels, sizes = (u.shape[-1], u.shape[1:-1]) if channels_last else (u.shape[1], u.shape[2:])
    present = {n: t for n, t in given.items() if t is not None}
    kernels = {n: present[n] for n in ("k", "k_rev", "spectrum") if n in present}
    for argument in ("u", "pregate", "postgate") if channels_last else ():
        if argument in present:
            check_last_stride(name, argument, present[argument])
    for argument, t in kernels.items():
        if argument != "spectrum" and "spectrum" in kernels:
            raise value_error(name, argument, "None where spectrum is given", shape(t))
        if argument == "k_rev" and "k" in kernels and t.shape[:-axes] != kernels["k"].shape[:-axes]:
            raise value_error(name, argument, f"of the batch and channels of k {shape(kernels['k'])}", shape(t))
        J, what = 1 if t.dim() == axes + 1 else t.shape[0], "N_half" if argument == "spectrum" else "K"
        if t.shape[-axes - 1] != channels or (J not in (1, batch) and (J == 0 or batch % J)):
            expected = f"[{channels}, *{what}], or [J, {channels}, *{what}] where J divides {batch}, like u {shape(u)}"
            raise value_error(name, argument, expected, shape(t))
        if argument == "spectrum" and not _fits(modes, sizes, t.shape[-axes:]):
            raise value_error(name, argument, f"{_LARGE_ENOUGH}, {list(sizes)}", shape(t))
        if 0 in t.shape[-axes:]:
            raise value_error(name, argument, "of at least one tap per axis", shape(t))
    if "d" in present and present["d"].shape != (channels,):
        raise value_error(name, "d", f"[C] = [{channels}]", shape(present["d"]))


def _count(axes) -> str:
    return "one axis" if axes == 1 else f"{axes} axes"


def _axes_of(u, channels_last) -> int:
    if not isinstance(channels_last, bool):
        raise type_error(OP.name, "channels_last", "a bool", type(channels_last).__name__)
    if not 3 <= u.dim() <= 5:
        expected = "[B, *S, C]" if channels_last else "[B, C, *S]"
        raise value_error(OP.name, "u", f"{expected} with one to three axes", shape(u))
    return u.dim() - 2


def _as_map(t, axes, channels_last):
    """[B, C, *S] or [B, *S, C] -> [B, C1, X, Y, Z, C2], a view."""
    if t is None:
        return None
    t = t.unsqueeze(1) if channels_last else t.unsqueeze(-1)
    for _ in range(3 - axes):
        t = t.unsqueeze(2)
    return t


def _as_kernel(name, t, axes):
    """[C, *K] or [B, C, *K] -> [J, C, KX, KY, KZ]."""
    if t is None:
        return None
    if t.dim() not in (axes + 1, axes + 2):
        what = "N_half" if name == "spectrum" else "K"
        raise value_error(OP.name, name, f"[C, *{what}] or [B, C, *{what}] of {_count(axes)}", shape(t))
    t = t.unsqueeze(0) if t.dim() == axes + 1 else t
    for _ in range(3 - axes):
        t = t.unsqueeze(2)
    return t


def _per_axis(op, name, x, axes, expected):
    values = [x] * axes if not isinstance(x, (tuple, list)) else list(x)
    if len(values) != axes:
        raise value_error(op, name, f"{expected}, or one per axis ({axes})", repr(x))
    return values


def _options(op, axes, mode, freq_keep) -> dict:
    """The schema's modes and frequencies; an axis that is not there is a circular one of size 1."""
    modes = [index_of(op, "mode", m, MODES) for m in _per_axis(op, "mode", mode, axes, "a mode")]
    keep = [0] * axes
    if freq_keep is not None:
        keep = _per_axis(op, "freq_keep", freq_keep, axes, "an int")
        for n in keep:
            if not is_int(n):
                raise type_error(op, "freq_keep", "an int or one per axis", repr(freq_keep))
            if not 1 <= n < 2**31:
                raise value_error(op, "freq_keep", "between 1 and 2147483647", repr(freq_keep))
    absent = 3 - axes
    modes, keep = [_CIRCULAR] * absent + modes, [0] * absent + keep
    return {f"mode_{a}": m for a, m in zip("xyz", modes, strict=True)} | {
        f"keep_{a}": int(n) for a, n in zip("xyz", keep, strict=True)
    }


def _checked64(arguments, options):
    """The op's own checks on tensors of the same shapes, in dtypes that it takes."""
    given = dict(zip(OP.names, arguments, strict=True))
    u = given.pop("u")
    for name, t in given.items():
        if t is None or name == "spectrum":
            continue
        if name.endswith("gate") and t.dtype != u.dtype:
            raise type_error(OP.name, name, f"{u.dtype} like u", t.dtype)
        check_dtype(OP.name, name, t, (torch.float64, torch.float32, torch.bfloat16, torch.float16))
        if t.device != u.device:
            raise value_error(OP.name, name, f"on {u.device} like u", t.device)

    def narrow(t):
        return None if t is None else t.to("meta", torch.float32)

    OP.validate(*map(narrow, arguments), **options)
    return arguments
