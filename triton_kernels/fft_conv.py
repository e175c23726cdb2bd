"""fft_conv in Triton: forward and backward, of any length, one to three axes.

Signals are float32 grids of real and imaginary parts, each row of the batch in one of its own, or its rounding errors
would be relative to another row. A transform is a pass per factor of each axis: products with the matrix of a short
Fourier transform (tl.dot), whose entries are read from the axis's table of roots of unity, and twiddle factors between.
Factors are 64 at most, except for prime numbers. Nothing is put in order: spectra of kernels, which PyTorch makes, are
brought into the order of the passes.

Backward: the gradient of y + d u' first, for which y is computed again where there is an activation or a gate behind
it; its spectrum times the conjugate of the kernel's gives du', the sum over rows of conj(u's spectrum) times it what
gradients of kernels are made of. Channels are taken in chunks, so that the grids are of a bounded size.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from effvit.reference.fft_conv import MODES, kept, kernel_spectrum, transform_sizes

from ._common import (
    INTERPRETED,
    MAX_GRID,
    SCALE,
    Launch,
    _loop_bound,
    cdiv,
    device_function,
    next_power_of_two,
    run,
    sum_partials,
    tl,
    triton,
    tuned,
)
from .glu import _activation

LONGEST_FACTOR = 64
CHUNK_BYTES = 64 << 20  # of a grid of real parts, where a channel is less
MAX_SPLITS = 64

_SIZES = ["first", "C", "J", "rows", "Y", "Z", "NY", "NZ", "size", "cells", "X", "count"]
_PASS_SIZES = ["lines", "inner", "rest", "n", "length", "axis_n", "q_blocks"]


class Map(NamedTuple):
    """[B, C, X, Y, Z], in whichever order it lies in memory."""

    pointer: Any
    stride_b: Any
    stride_c: Any
    stride_x: Any
    stride_y: Any
    stride_z: Any


class Grid(NamedTuple):
    """Complex numbers [rows, NX, NY, NZ] or [rows, X, Y, Z]: real and imaginary parts, contiguous."""

    re: Any
    im: Any


def _map(x):
    """[B, C1, X, Y, Z, C2], C1 or C2 being 1, as a kernel argument."""
    if x is None:
        return None
    b, c1, *axes, c2 = x.stride()
    return Map(x, b, c1 if x.shape[5] == 1 else c2, *axes)


# ------------------------------------------------------------------------------------------------------------ elements


@device_function
def _place(i, ny, nz):
    line = i // nz
    x = line // ny
    return x, line - x * ny, i - line * nz


@device_function
def _row(row, first, C):
    """Of rows [B, C] of a grid, C being the channels of a chunk: the row of the batch, and the channel."""
    b = row // C
    return b, first + row - b * C


@device_function
def _offset(m, b, c, x, y, z):
    return b * m.stride_b + c * m.stride_c + x * m.stride_x + y * m.stride_y + z * m.stride_z


@device_function
def _load_map(m, b, c, x, y, z, ok):
    return tl.load(m.pointer + _offset(m, b, c, x, y, z), mask=ok, other=0.0).to(tl.float32)


@device_function
def _store_map(m, b, c, x, y, z, ok, value):
    tl.store(m.pointer + _offset(m, b, c, x, y, z), value.to(m.pointer.dtype.element_ty), mask=ok)


@device_function
def _load_input(u, pregate, b, c, x, y, z, ok):
    value = _load_map(u, b, c, x, y, z, ok)
    if pregate is not None:
        value *= _load_map(pregate, b, c, x, y, z, ok)
    return value


@device_function
def _load_skip(d, c, ok):
    return tl.load(d + c, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _activate(z, ACT: tl.constexpr):
    """(act(z), its derivative)"""
    if ACT == 0:
        return z, tl.full(z.shape, 1.0, tl.float32)
    return _activation(z, ACT)


@triton.jit(do_not_specialize=_SIZES)
def fft_conv_pack_kernel(
    u, pregate,  # Maps; pregate or None
    to,  # Grid [rows, cells]
    count, first, C, X, Y, Z, NY, NZ, cells, BLOCK: tl.constexpr,
):  # fmt: skip
    """Signals with zeros behind them."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = e // cells
    x, y, z = _place(e - row * cells, NY, NZ)
    b, c = _row(row, first, C)
    ok = (e < count) & (x < X) & (y < Y) & (z < Z)
    tl.store(to.re + e, _load_input(u, pregate, b, c, x, y, z, ok), mask=e < count)
    tl.store(to.im + e, tl.zeros([BLOCK], tl.float32), mask=e < count)


@device_function
def _write_result(u, pregate, postgate, d, out, value, b, c, x, y, z, ok, ACT: tl.constexpr):
    if d is not None:
        value += _load_skip(d, c, ok) * _load_input(u, pregate, b, c, x, y, z, ok)
    value, _ = _activate(value, ACT)
    if postgate is not None:
        value *= _load_map(postgate, b, c, x, y, z, ok)
    _store_map(out, b, c, x, y, z, ok, value)


@triton.jit(do_not_specialize=_SIZES)
def fft_conv_out_kernel(
    signal,  # Grid [rows, cells]
    u, pregate, postgate, out,  # Maps; gates or None
    d,  # [C] or None
    count, first, C, Y, Z, NY, NZ, size, cells, ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = e // size
    x, y, z = _place(e - row * size, Y, Z)
    b, c = _row(row, first, C)
    ok = e < count
    at = row * cells + (x * NY + y) * NZ + z
    value = tl.load(signal.re + at, mask=ok, other=0.0)
    _write_result(u, pregate, postgate, d, out, value, b, c, x, y, z, ok, ACT)


@device_function
def _gradient_of_sum(u, pregate, postgate, grad, dpostgate, d, value, b, c, x, y, z, ok, ACT: tl.constexpr):
    """The gradient of y + d u'; writes that of the gate."""
    g = _load_map(grad, b, c, x, y, z, ok)
    if postgate is not None or ACT != 0:
        if d is not None:
            value += _load_skip(d, c, ok) * _load_input(u, pregate, b, c, x, y, z, ok)
        value, slope = _activate(value, ACT)
        if postgate is not None:
            _store_map(dpostgate, b, c, x, y, z, ok, g * value)
            g *= _load_map(postgate, b, c, x, y, z, ok)
        g = tl.where(ok, g * slope, 0.0)
    return g


@triton.jit(do_not_specialize=_SIZES)
def fft_conv_bwd_sum_kernel(
    signal,  # Grid [rows, cells]: y, and what takes its place
    packed,  # [rows, size] float32 or None: the same without what is behind it
    u, pregate, postgate, grad, dpostgate,  # Maps; gates or None
    d,  # [C] or None
    count, first, C, X, Y, Z, NY, NZ, size, cells, ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of y + d u', with zeros behind it."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = e // cells
    x, y, z = _place(e - row * cells, NY, NZ)
    b, c = _row(row, first, C)
    ok = (e < count) & (x < X) & (y < Y) & (z < Z)
    re = tl.load(signal.re + e, mask=ok, other=0.0)
    re = _gradient_of_sum(u, pregate, postgate, grad, dpostgate, d, re, b, c, x, y, z, ok, ACT)
    tl.store(signal.re + e, re, mask=e < count)
    tl.store(signal.im + e, tl.zeros([BLOCK], tl.float32), mask=e < count)
    if packed is not None:
        tl.store(packed + row * size + (x * Y + y) * Z + z, re, mask=ok)


@device_function
def _write_gradient(u, pregate, du, dpregate, value, b, c, x, y, z, ok):
    if pregate is None:
        _store_map(du, b, c, x, y, z, ok, value)
    else:
        _store_map(du, b, c, x, y, z, ok, value * _load_map(pregate, b, c, x, y, z, ok))
        _store_map(dpregate, b, c, x, y, z, ok, value * _load_map(u, b, c, x, y, z, ok))


@triton.jit(do_not_specialize=_SIZES)
def fft_conv_bwd_input_kernel(
    signal,  # Grid [rows, cells]: the gradient of u', but for the skip's part
    packed,  # [rows, size] float32 or None: the gradient of y + d u'
    u, pregate, du, dpregate,  # Maps; gates or None
    d,  # [C] or None
    count, first, C, Y, Z, NY, NZ, size, cells, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = e // size
    x, y, z = _place(e - row * size, Y, Z)
    b, c = _row(row, first, C)
    ok = e < count
    at = row * cells + (x * NY + y) * NZ + z
    re = tl.load(signal.re + at, mask=ok, other=0.0)
    if packed is not None:
        re += _load_skip(d, c, ok) * tl.load(packed + e, mask=ok, other=0.0)
    _write_gradient(u, pregate, du, dpregate, re, b, c, x, y, z, ok)


@triton.jit(do_not_specialize=[*_SIZES, "splits", "share"])
def fft_conv_bwd_skip_kernel(
    packed,  # [rows, size] float32: the gradient of y + d u'
    u, pregate,  # Maps; pregate or None
    parts,  # [splits, C] float32
    count, first, C, Y, Z, size, splits, share, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of u' times that gradient: a program has a share of a channel's places."""
    unit = tl.program_id(0).to(tl.int64)
    split = unit // C
    channel = unit - split * C
    start = split * share
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, _loop_bound(share), BLOCK):
        e = start + i + tl.arange(0, BLOCK)
        ok = (i + tl.arange(0, BLOCK) < share) & (e < count)
        row = e // size * C + channel
        inside = e - e // size * size
        x, y, z = _place(inside, Y, Z)
        b, c = _row(row, first, C)
        value = tl.load(packed + row * size + inside, mask=ok, other=0.0)
        total += value * _load_input(u, pregate, b, c, x, y, z, ok)
    tl.store(parts + unit, tl.sum(total, axis=0))


# ---------------------------------------------------------------------------------------------------------- transforms


@triton.jit(do_not_specialize=_PASS_SIZES)
def fft_conv_pass_kernel(
    source, to,  # Grids [rows, cells]
    roots,  # [axis_n, 2]: e^(-2 pi i j / axis_n)
    lines, inner, rest, n, length, axis_n, q_blocks,
    INVERSE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Of blocks of `length` = n M elements: sum over m of x[j + m M] w^((j + m M) q) goes to j + q M; inverse: back.

    Elements of a line are `inner` apart, of which `rest` are those of later axes.
    """
    unit = tl.program_id(0).to(INDEX)
    block = unit // q_blocks
    q = (unit - block * q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    line = block * BLOCK_L + tl.arange(0, BLOCK_L)
    i = line % inner
    start = line // inner * n * inner + i
    j = i // rest
    ok = line < lines
    step = axis_n // length
    sign = -1.0 if INVERSE else 1.0
    re = tl.zeros([BLOCK_Q, BLOCK_L], tl.float32)
    im = tl.zeros([BLOCK_Q, BLOCK_L], tl.float32)
    for first in range(0, _loop_bound(n), BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)).to(INDEX)
        inside = (m < n)[:, None] & ok[None, :]
        at = start[None, :] + m[:, None] * inner
        x = tl.load(source.re + at, mask=inside, other=0.0)
        y = tl.load(source.im + at, mask=inside, other=0.0)
        if INVERSE:
            twiddle = 2 * step * m[:, None] * j[None, :]
            a = tl.load(roots + twiddle, mask=inside, other=0.0)
            b = -tl.load(roots + twiddle + 1, mask=inside, other=0.0)
            x, y = x * a - y * b, x * b + y * a
        entry = 2 * (axis_n // n) * (q[:, None] * m[None, :] % n)
        valid = (q < n)[:, None] & (m < n)[None, :]
        a = tl.load(roots + entry, mask=valid, other=0.0)
        b = sign * tl.load(roots + entry + 1, mask=valid, other=0.0)
        # Sums of a block are added up: a long sum loses no more than a short one.
        re += tl.dot(a, x, input_precision="ieee") - tl.dot(b, y, input_precision="ieee")
        im += tl.dot(a, y, input_precision="ieee") + tl.dot(b, x, input_precision="ieee")
    inside = (q < n)[:, None] & ok[None, :]
    if not INVERSE:
        twiddle = 2 * step * q[:, None] * j[None, :]
        a = tl.load(roots + twiddle, mask=inside, other=0.0)
        b = tl.load(roots + twiddle + 1, mask=inside, other=0.0)
        re, im = re * a - im * b, re * b + im * a
    at = start[None, :] + q[:, None] * inner
    tl.store(to.re + at, re, mask=inside)
    tl.store(to.im + at, im, mask=inside)


@triton.jit(do_not_specialize=["count", "C", "J", "cells"])
def fft_conv_product_kernel(
    source, to,  # Grids [rows, cells]
    spectra,  # [J, C, cells, 2] float32
    count, C, J, cells, CONJUGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """to = source times its kernel's spectrum, or the conjugate of that."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < count
    row = e // cells
    b = row // C
    at = 2 * ((b % J * C + row - b * C) * cells + e - row * cells)
    a = tl.load(spectra + at, mask=ok, other=0.0)
    b = tl.load(spectra + at + 1, mask=ok, other=0.0)
    if CONJUGATE:
        b = -b
    x = tl.load(source.re + e, mask=ok, other=0.0)
    y = tl.load(source.im + e, mask=ok, other=0.0)
    tl.store(to.re + e, x * a - y * b, mask=ok)
    tl.store(to.im + e, x * b + y * a, mask=ok)


@triton.jit(do_not_specialize=["count", "rows"])
def fft_conv_bwd_correlate_kernel(
    u, grad,  # Grids [rows, J, C, cells]
    sums,  # [J, C, cells, 2] float32
    count, rows, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over a kernel's rows of conj(u) grad."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < count
    re = tl.zeros([BLOCK], tl.float32)
    im = tl.zeros([BLOCK], tl.float32)
    for q in range(0, _loop_bound(rows)):
        at = e + tl.full([BLOCK], q, tl.int64) * count
        a = tl.load(u.re + at, mask=ok, other=0.0)
        b = tl.load(u.im + at, mask=ok, other=0.0)
        x = tl.load(grad.re + at, mask=ok, other=0.0)
        y = tl.load(grad.im + at, mask=ok, other=0.0)
        re += a * x + b * y
        im += a * y - b * x
    tl.store(sums + 2 * e, re, mask=ok)
    tl.store(sums + 2 * e + 1, im, mask=ok)


# ------------------------------------------------------------------------------------------------------------ launchers


def _factors(n):
    """Factors of a length: two of about the same size or more, none above LONGEST_FACTOR but prime numbers."""
    longest, primes, rest = tuned(LONGEST_FACTOR, small=8), [], n
    for p in range(2, math.isqrt(n) + 1):
        while rest % p == 0:
            primes.append(p)
            rest //= p
    primes += [rest] * (rest > 1)
    passes = 1
    while longest**passes < n:
        passes += 1
    factors = []
    for p in sorted(primes, reverse=True):
        # The smallest factor that it still fits into, as long as there are fewer than it takes.
        fitting = [i for i, f in enumerate(factors) if f * p <= longest]
        if len(factors) < passes or not fitting:
            factors.append(p)
        else:
            factors[min(fitting, key=factors.__getitem__)] *= p
    return factors


def _make_roots(n, device):
    angle = torch.arange(n, dtype=torch.float64, device=device) * (-2 * math.pi / n)
    return torch.stack((angle.cos(), angle.sin()), -1).float()


_kept = functools.lru_cache(maxsize=64)(_make_roots)


def _roots(n, device):
    """Kept for the next call, unless a graph is recorded, whose memory is its own."""
    recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (_make_roots if recorded else _kept)(n, device)


def _frequencies(n, device):
    """The frequency at each position of a transformed axis."""
    frequency, length, scale = torch.zeros(n, dtype=torch.int64, device=device), n, 1
    position = torch.arange(n, device=device)
    for f in _factors(n):
        length //= f
        frequency += position // length * scale
        position = position % length
        scale *= f
    return frequency


class _Problem:
    """Sizes, tensors and launches of a call."""

    def __init__(self, u, k, d, pregate, postgate, k_rev, spectrum, grad_out=None, **options):
        self.tensors = {"u": u, "pregate": pregate, "postgate": postgate, "grad": grad_out}
        self.k, self.k_rev, self.spectrum, self.d, self.device = k, k_rev, spectrum, d, u.device
        self.B, self.X, self.Y, self.Z = u.shape[0], *u.shape[2:5]
        self.C = u.shape[1] * u.shape[5]
        self.act, self.scale = options.pop("act", 0), options.pop("kernel_scale", 1.0)
        self.mode = [options.get(f"mode_{a}", m) for a, m in zip("xyz", (2, 2, 0), strict=True)]
        self.keep = [options.get(f"keep_{a}", 0) for a in "xyz"]
        sizes = self.sizes = [self.X, self.Y, self.Z]
        if spectrum is None:
            taps = [max(a, b) for a, b in zip(k.shape[2:], (k if k_rev is None else k_rev).shape[2:], strict=True)]
            self.N = transform_sizes(self.mode, sizes, taps)
        else:
            last = self.Z if MODES[self.mode[2]] == "circular" else 2 * (spectrum.shape[4] - 1)
            self.N = [*spectrum.shape[2:4], last]
        self.J = (k if spectrum is None else spectrum).shape[0]
        self.grid, self.size = math.prod(self.N), math.prod(sizes)
        self.keeps_y = postgate is not None or self.act != 0
        self.maps = {n: _map(t) for n, t in self.tensors.items()}
        self.chunk = min(self.C, max(1, tuned(CHUNK_BYTES // max(self.B * self.grid * 4, 1), small=2)))
        self.launches = []

    def result(self, name, like):
        """A contiguous output like a map, or the empty tensor that stands for none."""
        out = torch.empty(0 if like is None else like.shape, dtype=self.tensors["u"].dtype, device=self.device)
        self.maps[name] = None if like is None else _map(out)
        return out

    def new_grid(self, size):
        shape = (2, self.B * self.chunk, size)
        return Grid(*torch.empty(shape, dtype=torch.float32, device=self.device).unbind())

    def launch(self, kernel, count, block=None, num_warps=4, **arguments):
        block = block or tuned(256 * SCALE, small=64)
        shared = {
            "first": self.first, "C": self.channels, "J": self.J, "rows": self.B // self.J,
            "X": self.X, "Y": self.Y, "Z": self.Z, "NY": self.N[1], "NZ": self.N[2], "size": self.size,
            "cells": self.grid, "count": count, "ACT": self.act, "d": self.d, "BLOCK": block,
        }  # fmt: skip
        known = self.maps | shared | arguments
        programs = arguments.get("programs", cdiv(count, block))
        self.launches.append(Launch(kernel, programs, {n: known[n] for n in kernel.arg_names}, num_warps, 1))

    def transform(self, data, other, inverse):
        """(where the transform of `data` is, the other grid)"""
        rows = self.B * self.channels
        passes = []
        for axis, n in enumerate(self.N):
            rest, length = math.prod(self.N[axis + 1 :]), n
            for f in _factors(n):
                passes.append((n, f, length, rest))
                length //= f
        for n, f, length, rest in reversed(passes) if inverse else passes:
            lines = rows * self.grid // f
            block_q = min(max(16, next_power_of_two(f)), tuned(32, small=16))
            block_l = tuned(32 * (8 if INTERPRETED else 1), small=16)
            wide = 2 * (rows * self.grid + block_l * f) > MAX_GRID or 2 * f * f > MAX_GRID
            q_blocks = cdiv(f, block_q)
            arguments = {
                "source": data, "to": other, "roots": _roots(n, self.device), "lines": lines,
                "inner": length // f * rest, "rest": rest, "n": f, "length": length, "axis_n": n,
                "q_blocks": q_blocks, "INVERSE": inverse, "INDEX": tl.int64 if wide else tl.int32,
                "BLOCK_Q": block_q, "BLOCK_M": 16, "BLOCK_L": block_l,
            }  # fmt: skip
            self.launches.append(Launch(fft_conv_pass_kernel, cdiv(lines, block_l) * q_blocks, arguments, 4, 1))
            data, other = other, data
        return data, other

    def of_chunk(self, t):
        return None if t is None else t[:, self.first : self.first + self.channels]

    def indices(self, mirrored=False):
        """Frequencies of the grid's positions, per axis, or their negatives."""
        found = [_frequencies(n, self.device) for n in self.N]
        return [(n - f) % n for n, f in zip(self.N, found, strict=True)] if mirrored else found

    def spectra(self):
        """Spectra of the chunk's kernels in the order of transforms, over the grid's size: [J, C, grid, 2]."""
        if self.spectrum is None:
            k, k_rev = (None if t is None else t.float() for t in (self.of_chunk(self.k), self.of_chunk(self.k_rev)))
            half = kernel_spectrum(k, k_rev, self.N, mode=self.mode, keep=self.keep, scale=self.scale)
        else:
            half = kept(torch.view_as_complex(self.of_chunk(self.spectrum).contiguous()), self.N, self.keep)
        x, y, z = self.indices()
        mirrored_x, mirrored_y, mirrored_z = self.indices(mirrored=True)
        nearest = torch.minimum(z, mirrored_z)
        own = half[:, :, x[:, None, None], y[:, None], nearest]
        mirrored = half[:, :, mirrored_x[:, None, None], mirrored_y[:, None], nearest].conj()
        # Planes that are their own mirror images: the part that belongs to real kernels.
        full = torch.where(z == mirrored_z, 0.5 * (own + mirrored), torch.where(z < mirrored_z, own, mirrored))
        return torch.view_as_real((full / self.grid).flatten(2)).contiguous()

    def kernel_gradients(self, sums, to):
        """From sums [J, C, grid, 2] to the chunk's part of dk, dk_rev or dspectrum."""
        total = torch.view_as_complex(sums).unflatten(2, self.N)
        for axis in range(3):
            total = total.index_select(2 + axis, self.indices()[axis].argsort())  # in order of frequencies
        half = self.N[2] // 2 + 1
        mirrored = total.conj()
        for axis, n in enumerate(self.N):
            mirrored = mirrored.index_select(2 + axis, -torch.arange(n, device=self.device) % n)
        mean = kept((total + mirrored)[..., :half] * 0.5, self.N, self.keep)
        if self.spectrum is not None:
            z = torch.arange(half, device=self.device)
            weight = torch.where((z == 0) | (2 * z == self.N[2]), 1.0, 2.0) / self.grid
            self.of_chunk(to["spectrum"]).copy_(torch.view_as_real(mean * weight))
            return
        taps = torch.fft.irfftn(mean, s=self.N, dim=(-3, -2, -1)) * self.scale
        for name, sign in (("k", 1), ("k_rev", -1)):
            if to[name] is None:
                continue
            found = taps
            for axis, n in enumerate(self.N):
                K = to[name].shape[2 + axis]
                shift = (K - 1) // 2 if name == "k" and MODES[self.mode[axis]] == "same" else 0
                lag = sign * (torch.arange(K, device=self.device) - shift)
                found = found.index_select(2 + axis, lag % n)
            self.of_chunk(to[name]).copy_(found)

    def run(self):
        run(self.launches, self.device)
        self.launches = []

    def chunks(self):
        for first in range(0, self.C, self.chunk):
            self.first, self.channels = first, min(self.chunk, self.C - first)
            yield self.B * self.channels


def _forward(p, execute):
    """out. execute(problem) runs the launches that there are, or only takes them."""
    out = p.result("out", p.tensors["u"])
    if out.numel() == 0:
        return out
    a, b = p.new_grid(p.grid), p.new_grid(p.grid)
    for rows in p.chunks():
        p.launch(fft_conv_pack_kernel, rows * p.grid, to=a)
        x, other = p.transform(a, b, inverse=False)
        p.launch(
            fft_conv_product_kernel, rows * p.grid, source=x, to=x, spectra=p.spectra(), CONJUGATE=False,
        )  # fmt: skip
        y, _ = p.transform(x, other, inverse=True)
        p.launch(fft_conv_out_kernel, rows * p.size, signal=y)
        execute(p)
    return out


def _backward(p, execute):
    """du, dk, dd, dpregate, dpostgate, dk_rev, dspectrum."""
    u, pregate, postgate, d = p.tensors["u"], p.tensors["pregate"], p.tensors["postgate"], p.d
    du, dpregate, dpostgate = (
        p.result(n, t) for n, t in (("du", u), ("dpregate", pregate), ("dpostgate", postgate))
    )  # fmt: skip

    def empty_like(t, dtype=torch.float32):
        return torch.empty(0 if t is None else t.shape, dtype=dtype if t is None else t.dtype, device=p.device)

    given = {"k": p.k, "k_rev": p.k_rev, "spectrum": p.spectrum}
    kernels = {n: empty_like(t) for n, t in given.items()}
    dd = empty_like(d)
    results = du, kernels["k"], dd, dpregate, dpostgate, kernels["k_rev"], kernels["spectrum"]
    if u.numel() == 0:
        return tuple(t.zero_() for t in results)
    to = {n: None if given[n] is None else t for n, t in kernels.items()}
    a, b, c = (p.new_grid(p.grid) for _ in range(3))
    packed = None if d is None else torch.empty((p.B * p.chunk, p.size), dtype=torch.float32, device=p.device)
    for rows in p.chunks():
        grid, spectra = rows * p.grid, p.spectra()
        p.launch(fft_conv_pack_kernel, grid, to=a)
        x, y = p.transform(a, b, inverse=False)
        other = c
        if p.keeps_y:
            p.launch(fft_conv_product_kernel, grid, source=x, to=y, spectra=spectra, CONJUGATE=False)
            y, other = p.transform(y, other, inverse=True)
        if p.keeps_y or d is not None:
            p.launch(fft_conv_bwd_sum_kernel, grid, signal=y, packed=packed)
        else:
            p.launch(fft_conv_pack_kernel, grid, to=y, u=p.maps["grad"], pregate=None)
        y, other = p.transform(y, other, inverse=False)
        sums = torch.empty((p.J, p.channels, p.grid, 2), dtype=torch.float32, device=p.device)
        p.launch(fft_conv_bwd_correlate_kernel, sums.numel() // 2, u=x, grad=y, sums=sums)
        p.launch(fft_conv_product_kernel, grid, source=y, to=y, spectra=spectra, CONJUGATE=True)
        y, _ = p.transform(y, other, inverse=True)
        p.launch(fft_conv_bwd_input_kernel, rows * p.size, signal=y, packed=packed)
        if d is not None:
            places = p.B * p.size
            splits = min(MAX_SPLITS, cdiv(places, tuned(4096 * SCALE, small=64)))
            parts = torch.empty((splits, p.channels), dtype=torch.float32, device=p.device)
            p.launch(
                fft_conv_bwd_skip_kernel, places, programs=splits * p.channels, splits=splits,
                share=cdiv(places, splits), parts=parts, packed=packed,
            )  # fmt: skip
            p.launches.append(sum_partials(parts, dd[p.first : p.first + p.channels], splits))
        execute(p)
        p.kernel_gradients(sums, to)
    return results


def forward(u, k=None, d=None, pregate=None, postgate=None, k_rev=None, spectrum=None, **options):
    """effvit::fft_conv. The arguments must have been validated."""
    return _forward(_Problem(u, k, d, pregate, postgate, k_rev, spectrum, **options), _Problem.run)


def backward(grad_out, u, k=None, d=None, pregate=None, postgate=None, k_rev=None, spectrum=None, **options):
    """effvit::fft_conv_backward: du, dk, dd, dpregate, dpostgate, dk_rev, dspectrum."""
    return _backward(_Problem(u, k, d, pregate, postgate, k_rev, spectrum, grad_out, **options), _Problem.run)


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    taken = []

    def take(p):
        taken.extend(p.launches)
        p.launches = []

    for name, dtype, shape, taps, act in (
        ("hyena1024-bf16", torch.bfloat16, (4, 1, 1, 1, 1024, 64), (1, 1, 1024), 0),
        ("map14-fp16", torch.float16, (4, 64, 1, 14, 14, 1), (1, 14, 14), 1),
        ("mega4096-fp32", torch.float32, (2, 1, 1, 1, 4096, 64), (1, 1, 4096), 2),
    ):
        u = torch.empty(shape, dtype=dtype, device="meta")
        k = torch.empty((1, 64, *taps), dtype=torch.float32, device="meta")
        d = torch.empty(64, dtype=torch.float32, device="meta")
        _forward(_Problem(u, k, d, u, u, None, None, act=act), take)
        _backward(_Problem(u, k, d, u, u, None, None, u, act=act), take)
        seen = set()
        for launch in taken:
            key = launch.kernel, *(v for n, v in launch.args.items() if n.isupper())
            if key not in seen:
                yield launch.aot(name)
            seen.add(key)
        taken.clear()
