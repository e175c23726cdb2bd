"""spectral_gate in Triton: forward and backward, as products with the matrices of the two Fourier transforms.

Channels are the columns of every product. Rows of the map are transformed by a real matrix, [2F, W] one way and
[W, 2F] the other; columns by a cosine and a sine matrix, the weight on their way out. Spectra are float32, [G, N, H, F,
2, C]: two of them in the forward. The backward transforms x as well, and one program goes through all samples of a
weight in their order: it adds up the gradient of the weight and multiplies the spectrum of grad_out. Any size is taken;
the work per number grows with H + W.
"""

import functools
import math

import torch

from ._common import MAX_GRID, Launch, _loop_bound, cdiv, device_function, next_power_of_two, run, tl, triton, tuned
from ._tiles import _share_of

BLOCK_J = 16  # terms of a product at once: in float32, without tensor cores, a thread holds as many of rows and columns

_SIZES = ["N", "H", "F", "C", "rows", "inner", "row_blocks", "c_blocks", "units", "walk", "bins"]


@device_function
def _tile(unit, row_blocks, c_blocks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of a piece of work, and the number of its problem."""
    column = (unit % c_blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    unit = unit // c_blocks
    row = (unit % row_blocks).to(tl.int32) * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, column, unit // row_blocks


@device_function
def _load(pointer, row, stride, rows, column, columns):
    """A tile in float32: `row` of a matrix of `rows`, columns `column` of `columns`, zeros beyond."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@device_function
def _load_weight(weight, bin, column, C, scale, mask):
    """(real, imaginary) parts of bins of weights [.., C, 2], times `scale`; bin is int64."""
    place = weight + bin[:, None] * (2 * C) + 2 * column[None, :]
    return tl.load(place, mask=mask, other=0.0) * scale, tl.load(place + 1, mask=mask, other=0.0) * scale


@triton.jit(do_not_specialize=_SIZES)
def spectral_gate_rows_kernel(
    matrix,  # [rows, inner] float32
    x,  # [G, N, H, inner, C], last stride 1
    out,  # [G, N, H, rows, C], contiguous
    x_stride_g, x_stride_n, x_stride_y, x_stride_x,
    N, H, C, rows, inner, row_blocks, c_blocks, units, walk,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), tl.int64)
    for step in range(0, _loop_bound(count)):
        row, column, line = _tile(first + step, row_blocks, c_blocks, BLOCK_R, BLOCK_C)
        y = line % H
        n = (line // H) % N
        source = x + line // H // N * x_stride_g + n * x_stride_n + y * x_stride_y
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in range(0, _loop_bound(inner), BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            left = _load(matrix, row, inner, rows, j, inner)
            acc = tl.dot(left, _load(source, j, x_stride_x, inner, column, C), acc, input_precision="ieee")
        offset = (line * rows * C) + row.to(tl.int64)[:, None] * C + column[None, :]
        mask = (row < rows)[:, None] & (column < C)[None, :]
        tl.store(out + offset, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def spectral_gate_columns_kernel(
    cosine,  # [H, H] float32
    sine,  # [H, H] float32
    x,  # [G, N, H, F, 2, C] float32
    weight,  # [G, H, F, C, 2], contiguous; None: no gate
    out,  # [G, N, H, F, 2, C] float32
    scale, N, H, F, C, row_blocks, c_blocks, units, walk,
    INVERSE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), tl.int64)
    for step in range(0, _loop_bound(count)):
        row, column, unit = _tile(first + step, row_blocks, c_blocks, BLOCK_R, BLOCK_C)
        f = unit % F
        sample = unit // F
        stride = (F * 2 * C).to(tl.int64)
        here = sample * H * stride + f * (2 * C)
        # Real and imaginary parts of both sides: [cosine x, sine x] of each part of x.
        re = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        im = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in range(0, _loop_bound(H), BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            c = _load(cosine, row, H, H, j, H)
            s = _load(sine, row, H, H, j, H)
            if INVERSE:
                s = -s
            x_re = _load(x + here, j, stride, H, column, C)
            x_im = _load(x + here + C, j, stride, H, column, C)
            re = tl.dot(c, x_re, re, input_precision="ieee")
            re = tl.dot(s, x_im, re, input_precision="ieee")
            im = tl.dot(c, x_im, im, input_precision="ieee")
            im = tl.dot(-s, x_re, im, input_precision="ieee")
        mask = (row < H)[:, None] & (column < C)[None, :]
        if weight is not None:
            bin = (sample // N * H + row.to(tl.int64)) * F + f
            w_re, w_im = _load_weight(weight, bin, column, C, scale, mask)
            gated = re * w_re - im * w_im
            im = re * w_im + im * w_re
            re = gated
        offset = here + row.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(out + offset, re, mask=mask)
        tl.store(out + offset + C, im, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def spectral_gate_dweight_kernel(
    x,  # [G, N, H, F, 2, C] float32, the spectrum of x
    y,  # [G, N, H, F, 2, C] float32, that of grad_out; multiplied with the conjugate of the weight, and scale
    weight,  # [G, H, F, C, 2], contiguous
    dweight,  # [G, H, F, C, 2], contiguous
    scale, N, F, C, row_blocks, c_blocks, units, walk, bins,
    EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), tl.int64)
    for step in range(0, _loop_bound(count)):
        row, column, item = _tile(first + step, row_blocks, c_blocks, BLOCK_R, BLOCK_C)
        mask = (row < bins)[:, None] & (column < C)[None, :]
        bin = item * bins + row.to(tl.int64)
        w_re, w_im = _load_weight(weight, bin, column, C, scale, mask)
        total_re = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        total_im = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        part_re = total_re  # of up to 16 samples: one long sum loses digits
        part_im = total_im
        for n in range(0, _loop_bound(N)):
            offset = ((item * N + n) * bins + row.to(tl.int64))[:, None] * (2 * C) + column[None, :]
            x_re = tl.load(x + offset, mask=mask, other=0.0)
            x_im = tl.load(x + offset + C, mask=mask, other=0.0)
            y_re = tl.load(y + offset, mask=mask, other=0.0)
            y_im = tl.load(y + offset + C, mask=mask, other=0.0)
            part_re += x_re * y_re + x_im * y_im
            part_im += x_re * y_im - x_im * y_re
            if n % 16 == 15:
                total_re += part_re
                total_im += part_im
                part_re = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
                part_im = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            tl.store(y + offset, y_re * w_re + y_im * w_im, mask=mask)
            tl.store(y + offset + C, y_im * w_re - y_re * w_im, mask=mask)
        total_re += part_re
        total_im += part_im
        f = row % F
        once = f == 0  # bins that stand for one: all others have a mirror image
        if EVEN:
            once = once | (f == F - 1)
        factor = tl.where(once, scale, 2 * scale)[:, None]
        place = dweight + bin[:, None] * (2 * C) + 2 * column[None, :]
        tl.store(place, total_re * factor, mask=mask)
        tl.store(place + 1, total_im * factor, mask=mask)


# ------------------------------------------------------------------------------------------------------------ launchers


def _angles(rows, columns, n, device):
    """tau * (i * j mod n) / n for i < rows, j < columns, in float64, and i * j mod n."""
    turns = torch.outer(torch.arange(rows, device=device), torch.arange(columns, device=device)) % n
    return turns.double() * (2 * math.pi / n), turns


def _make_matrices(H, W, device):
    """Of rows [2F, W] and back [W, 2F], of columns the cosines and sines [H, H]."""
    F = W // 2 + 1
    angle, turns = _angles(F, W, W, device)
    sine = torch.where(turns * 2 % W == 0, 0.0, angle.sin())  # exactly: these parts do not count
    forth = torch.stack((angle.cos(), -sine), 1).flatten(0, 1)
    twice = torch.full((F, 1), 2.0, dtype=torch.float64, device=device)
    twice[0] = 1
    if W % 2 == 0:
        twice[-1] = 1
    back = torch.stack((angle.cos() * twice, -sine * twice), 1).flatten(0, 1).T
    columns, _ = _angles(H, H, H, device)
    return tuple(t.float().contiguous() for t in (forth, back, columns.cos(), columns.sin()))


_LARGEST_KEPT = 1024  # of an axis: 16 MiB of matrices
_kept = functools.lru_cache(maxsize=32)(_make_matrices)


def _matrices(H, W, device):
    """Kept for the next call, unless they are large, or a graph is recorded, whose memory is its own."""
    once = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    once = once or device.type == "meta" or max(H, W) > _LARGEST_KEPT
    return (_make_matrices if once else _kept)(H, W, device)


class _Problem:
    """The sizes of a call, its matrices, and launches of the kernels."""

    def __init__(self, x, weight):
        self.G, self.N, self.H, self.W, self.C = x.shape
        self.F = weight.shape[2]
        self.device = x.device
        self.forth, self.back, self.cosine, self.sine = _matrices(self.H, self.W, x.device)
        self.scale = 1.0 / (self.H * self.W)
        self.shared = {"N": self.N, "H": self.H, "F": self.F, "C": self.C, "scale": self.scale}

    def spectrum(self):
        return torch.empty((self.G, self.N, self.H, self.F, 2, self.C), dtype=torch.float32, device=self.device)

    def launch(self, kernel, outer, rows, most, num_stages=2, **extra):
        """Of `outer` problems of `rows` rows and all channels, in tiles of `most` rows and channels."""
        block_r, block_c = (
            max(16, min(tuned(m, small=16), next_power_of_two(n))) for m, n in zip(most, (rows, self.C), strict=True)
        )
        row_blocks, c_blocks = cdiv(rows, block_r), cdiv(self.C, block_c)
        units = outer * row_blocks * c_blocks
        walk = cdiv(units, tuned(MAX_GRID, small=8))
        available = {
            **self.shared, **extra, "BLOCK_R": block_r, "BLOCK_C": block_c, "row_blocks": row_blocks,
            "c_blocks": c_blocks, "units": units, "walk": walk, "rows": rows,
        }  # fmt: skip
        args = {name: available[name] for name in kernel.arg_names}
        return Launch(kernel, cdiv(units, walk), args, num_stages=num_stages)

    def rows_of(self, matrix, x, out):
        """The rows of a map x [G, N, H, inner, C] times the matrix: to its spectrum, or back."""
        inner = matrix.shape[1]
        strides = dict(zip(("x_stride_g", "x_stride_n", "x_stride_y", "x_stride_x"), x.stride(), strict=False))
        return self.launch(
            spectral_gate_rows_kernel, self.G * self.N * self.H, matrix.shape[0], (32, 64), matrix=matrix, x=x, out=out,
            inner=inner, BLOCK_J=BLOCK_J, **strides,
        )  # fmt: skip

    def columns_of(self, x, out, inverse, weight=None):
        return self.launch(
            spectral_gate_columns_kernel, self.G * self.N * self.F, self.H, (16, 32), cosine=self.cosine,
            sine=self.sine, x=x, out=out, weight=weight, INVERSE=inverse, BLOCK_J=BLOCK_J, num_stages=1,
        )  # fmt: skip

    def dweight(self, x, y, weight, dweight):
        bins = self.H * self.F
        return self.launch(
            spectral_gate_dweight_kernel, self.G, bins, (16, 32), x=x, y=y, weight=weight, dweight=dweight, bins=bins,
            EVEN=self.W % 2 == 0,
        )  # fmt: skip

    def as_lines(self, spectrum):
        return spectrum.view(self.G, self.N, self.H, 2 * self.F, self.C)


def _plan_forward(x, weight):
    """(out, launches). Works on meta tensors."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, []
    p, weight = _Problem(x, weight), weight.contiguous()
    first, second = p.spectrum(), p.spectrum()
    return out, [
        p.rows_of(p.forth, x, p.as_lines(first)),
        p.columns_of(first, second, False, weight),
        p.columns_of(second, first, True),
        p.rows_of(p.back, p.as_lines(first), out),
    ]


def _plan_backward(grad_out, x, weight):
    """((dx, dweight), launches). Works on meta tensors."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    if dx.numel() == 0:
        return (dx.zero_(), dweight.zero_()), []
    p, weight = _Problem(x, weight), weight.contiguous()
    lines, of_x, of_grad = p.spectrum(), p.spectrum(), p.spectrum()
    return (dx, dweight), [
        p.rows_of(p.forth, x, p.as_lines(lines)),
        p.columns_of(lines, of_x, False),
        p.rows_of(p.forth, grad_out, p.as_lines(lines)),
        p.columns_of(lines, of_grad, False),
        p.dweight(of_x, of_grad, weight, dweight),
        p.columns_of(of_grad, lines, True),
        p.rows_of(p.back, p.as_lines(lines), dx),
    ]


def forward(x, weight):
    """effvit::spectral_gate. The arguments must have been validated."""
    out, launches = _plan_forward(x, weight)
    run(launches, x.device)
    return out


def backward(grad_out, x, weight):
    """effvit::spectral_gate_backward: (dx, dweight)."""
    results, launches = _plan_backward(grad_out, x, weight)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (N, H, W, C) in {
        "14x14": (64, 14, 14, 384),
        "56x56": (64, 56, 56, 64),
        "one-axis": (8, 1, 197, 100),
    }.items():
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
            x = torch.empty((1, N, H, W, C), dtype=dtype, device="meta")
            weight = torch.empty((1, H, W // 2 + 1, C, 2), device="meta")
            out, launches = _plan_forward(x, weight)
            _, backward_launches = _plan_backward(out, x, weight)
            for launch in launches + backward_launches:
                yield launch.aot(f"{name}-{short}")
