"""window_attention's samples, bad inputs and error magnitudes."""

import math

import torch

from effvit.reference.window_attention import LOGIT_SCALE_MAX, axis_layout
from effvit.reference.window_attention import window_attention as definition
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "window_attention"
TENSORS = OPS[NAME].names


def reference_call(*args, **kwargs):
    """The definition, with ints as well as pairs."""
    q, v = args[0], args[2]
    if 0 in q.shape[:4]:  # the definition is about windows; without any the outputs are empty
        return v * 1.0, q.sum(-1).permute(0, 3, 1, 2)
    kwargs = {n: pair(x) if n in ("window", "shift", "dilation", "halo") else x for n, x in kwargs.items()}
    return definition(*args, **kwargs)


def pair(x):
    return (x, x) if isinstance(x, int) else tuple(x)


def _geometry(kwargs):
    names = ("window", "shift", "dilation", "halo")
    return [pair(kwargs.get(n, 1 if n == "dilation" else 0)) for n in names]


def table_shape(h, window, halo=0):
    (wh, ww), (hh, hw) = pair(window), pair(halo)
    return h, 2 * wh - 1 + 2 * hh, 2 * ww - 1 + 2 * hw


# ---- samples -------------------------------------------------------------------------------------------------------


def _dense(shape, e, randn):
    B, H, W, h = shape
    return randn(B, H, W, h, e)


def _misaligned(t, generator):
    """The same values one element past an aligned address, rows one element apart."""
    storage = torch.zeros(t.numel() + t.numel() // t.shape[-1] + 1, dtype=t.dtype, device=t.device)
    strides, step = [1], t.shape[-1] + 1
    for size in reversed(t.shape[1:-1]):
        strides.append(step)
        step *= size
    strides.append(step)
    view = storage.as_strided(t.shape, tuple(reversed(strides)), 1)
    return view.copy_(t)


def _in_order(t, order):
    """The same values, laid out with the dims in `order` outermost first."""
    inverse = [order.index(i) for i in range(t.ndim)]
    return t.permute(order).contiguous().permute(inverse)


def _qkv_views(q, k, v):
    """q, k and v as slices of one qkv projection [B, H, W, 3, h, d]."""
    return torch.stack((q, k, v), dim=3).unbind(3)


def _packed_heads(q, k, v):
    """q, k and v as slices of one tensor [B, H, W, h, 2*d+dv] (SHViT packs them so)."""
    return torch.cat((q, k, v), dim=-1).split((q.shape[-1], k.shape[-1], v.shape[-1]), dim=-1)


def _expanded_batch(q, k, v):
    return q, k[:1].expand_as(k), v[:1].expand_as(v)


def _transposed_batch(q, k, v):
    return _in_order(q, (1, 2, 0, 3, 4)), _in_order(k, (3, 0, 2, 1, 4)), _in_order(v, (2, 1, 3, 0, 4))


def _sliced_map(q, k, v):
    def crop(t):
        big = t.new_zeros(t.shape[0], t.shape[1] + 2, t.shape[2] + 3, *t.shape[3:])
        view = big[:, 1:-1, 2:-1]
        return view.copy_(t)

    return crop(q), crop(k), crop(v)


def _all_misaligned(q, k, v):
    return tuple(_misaligned(t, None) for t in (q, k, v))


def _sample(
    name, B, H, W, h, d, dv=None, *, tags="", bias=True, tau=None, pads=False, bias_layout=None, layout=None,
    values=None, size=1.0, bias_dtype=None, dtypes=FLOAT_DTYPES, **kwargs,
):  # fmt: skip
    dv = d if dv is None else dv

    def make(dtype, device, generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        q, k, v = (_dense((B, H, W, h), e, randn) for e in (d, d, dv))
        q, k = q * size, k * size
        table = randn(*table_shape(h, kwargs["window"], kwargs.get("halo", 0))) if bias else None
        log_scale = None if tau is None else torch.linspace(tau[0], tau[1], h)
        pad_k, pad_v = (randn(h, d) * size, randn(h, dv)) if pads else (None, None)
        if values is not None:
            q, k, v = values(q, k, v)
        q, k, v, pad_k, pad_v = (None if t is None else t.to(device, dtype) for t in (q, k, v, pad_k, pad_v))
        if layout is not None:
            q, k, v = layout(q, k, v)
        table, log_scale = (None if t is None else t.to(device, bias_dtype or dtype) for t in (table, log_scale))
        if table is not None and bias_layout is not None:
            table = bias_layout(table)
        return (q, k, v, table, log_scale, pad_k, pad_v), dict(kwargs)

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _timm_table(table):
    """timm keeps [(2wh-1)(2ww-1), h]; the op gets a permuted view of it."""
    h, y, x = table.shape
    return table.permute(1, 2, 0).reshape(y * x, h).contiguous().view(y, x, h).permute(2, 0, 1)


def _transposed_table(table):
    return table.transpose(1, 2).contiguous().transpose(1, 2)


def _zero_queries(q, k, v):
    q, k = q.clone(), k.clone()
    q[:, 0], k[:, :, 1] = 0.0, 0.0
    return q, k, v


def _tiny_values(q, k, v):
    """Heads of very different size: an error in the small one must not hide behind the large one."""
    factor = torch.logspace(-3, 1, v.shape[3])[:, None]
    return q, k, v * factor


def _large_logits(q, k, v):
    return q * 12, k * 12, v


def _equal_keys(q, k, v):
    return q, torch.zeros_like(k) + k[:, :1, :1], v


# fmt: off
SAMPLES = [
    # Real networks, at scaled-down maps.
    _sample(
        "swin_t_stage1", 1, 28, 28, 3, 32, window=7, tags="vit framework", layout=_qkv_views,
        bias_dtype=torch.float32,
    ),
    _sample(
        "swin_t_stage1_shift", 1, 28, 28, 3, 32, window=7, shift=3, tags="vit", layout=_qkv_views,
        bias_layout=_timm_table,
    ),
    _sample("swin_t_stage3_shift", 2, 14, 14, 12, 32, window=7, shift=3, tags="vit", layout=_qkv_views),
    _sample("swin_t_stage4", 2, 7, 7, 24, 32, window=7, tags="vit", layout=_qkv_views, bias_layout=_timm_table),
    _sample("swin_384_window12", 1, 24, 24, 2, 32, window=12, shift=6, tags="vit", layout=_qkv_views),
    _sample("swin_padded_map", 1, 25, 30, 2, 32, window=7, shift=3, pads=True, tags="vit", layout=_qkv_views),
    _sample("swin_padded_map_timm", 1, 25, 30, 2, 32, window=7, shift=3, pads=True, roll_before_pad=True, tags="vit"),
    _sample("swin_v2_window8", 1, 16, 16, 3, 32, window=8, shift=4, tau=(2.0, 4.5), tags="vit", layout=_qkv_views),
    _sample("swin_v2_window16", 1, 32, 16, 2, 32, window=16, shift=8, tau=(2.3, 2.4), pads=True, tags="vit"),
    _sample("maxvit_block", 1, 28, 28, 2, 32, window=7, tags="vit"),
    _sample("maxvit_grid", 1, 28, 28, 2, 32, window=7, dilation=4, tags="vit"),
    _sample("cswin_stripe_rows", 1, 14, 28, 2, 32, window=(14, 2), bias=False, tags="vit"),
    _sample("cswin_stripe_columns", 1, 14, 28, 2, 32, window=(2, 28), bias=False, tags="vit"),
    _sample("hat_overlapping", 1, 32, 32, 2, 30, window=16, halo=4, pads=True, tags="vit"),
    _sample("lit_hilo_window2", 2, 14, 14, 6, 64, window=2, bias=False, tags="vit"),
    _sample("crossformer_lda", 1, 28, 28, 2, 32, window=7, dilation=(4, 2), tags="vit"),
    _sample("efficientvit_cascaded", 2, 14, 14, 1, 16, 64, window=7, tags="vit"),
    _sample("shvit_dv48", 1, 14, 14, 1, 16, 48, window=14, bias=False, tags="vit", layout=_packed_heads),
    _sample("shvit_dv66", 1, 14, 14, 1, 16, 66, window=7, bias=False, tags="vit", layout=_packed_heads),
    _sample("shvit_dv75", 1, 7, 14, 1, 16, 75, window=7, bias=False, tags="vit"),
    _sample("rmt_rows", 1, 14, 14, 2, 32, window=(1, 14), tags="vit"),
    # Small: every feature at a size that the emulator and the interpreter run too.
    _sample("small_plain", 1, 4, 4, 2, 8, window=4, bias=False, tags="small framework"),
    _sample("small_shift", 2, 6, 6, 2, 8, window=3, shift=1, mask_value=-2.5, tags="small framework"),
    _sample(
        "small_pads", 1, 5, 7, 1, 16, window=(3, 4), shift=(2, 0), pads=True, mask_value=-1.5,
        tags="small framework",
    ),
    _sample(
        "small_pads_timm", 1, 5, 7, 2, 4, window=3, shift=2, pads=True, mask_value=-1.5, roll_before_pad=True,
        tags="small",
    ),
    _sample(
        "small_no_pads_timm", 1, 7, 5, 1, 8, window=4, shift=(1, 3), mask_value=-1.0, roll_before_pad=True,
        tags="small",
    ),
    _sample("small_no_pads", 1, 7, 5, 1, 8, window=4, shift=(1, 3), mask_value=-1.0, tags="small"),
    _sample(
        "small_dilated", 1, 8, 9, 1, 8, 5, window=(2, 3), dilation=(3, 2), shift=1, mask_value=-3.0,
        tags="small",
    ),
    _sample("small_halo", 1, 6, 8, 1, 8, window=(3, 4), halo=(1, 2), shift=(1, 2), mask_value=-2.0, tags="small"),
    _sample("small_halo_pads", 1, 3, 5, 2, 5, window=(2, 3), halo=1, pads=True, tags="small"),
    _sample(
        "small_cosine", 1, 6, 6, 2, 8, 12, window=3, shift=1, tau=(1.0, 2.5), mask_value=-2.0,
        tags="small framework",
    ),
    _sample("small_cosine_clamped", 1, 4, 5, 3, 16, window=3, tau=(4.0, 6.0), pads=True, tags="small"),
    _sample("small_cosine_zero_norm", 1, 4, 4, 1, 8, window=4, tau=(1.0, 1.0), values=_zero_queries, tags="small"),
    _sample("small_window7", 1, 7, 7, 1, 32, window=7, tags="small", layout=_qkv_views, bias_layout=_timm_table),
    _sample("small_tail", 2, 3, 9, 1, 33, 17, window=(3, 9), tags="small"),
    _sample("small_strided", 2, 4, 6, 2, 8, window=(2, 3), tags="small strided", layout=_transposed_batch),
    # A key beside pads that take nearly all: its gradients are subnormal numbers of float16.
    _sample(
        "small_map_1x1_pads", 1, 1, 1, 1, 8, window=5, tau=(3.0, 3.0), pads=True, mask_value=-1e30, tags="small nasty",
        dtypes=(torch.float16, torch.float32, torch.bfloat16),
    ),
    _sample("small_window1", 1, 3, 5, 2, 4, window=1, tags="small"),
    # Tiny: gradcheck of the definition.
    _sample("tiny_shift_pads", 1, 3, 4, 1, 2, 1, window=2, shift=1, pads=True, mask_value=-1.0, tags="tiny small"),
    _sample("tiny_cosine_halo", 1, 3, 2, 1, 2, window=2, halo=1, tau=(0.5, 0.5), pads=True, tags="tiny"),
    _sample(
        "tiny_timm_no_pads", 1, 3, 2, 2, 2, window=2, shift=(1, 0), mask_value=-0.5, roll_before_pad=True,
        tags="tiny",
    ),
    _sample(
        "tiny_dilated", 1, 2, 4, 1, 2, window=(1, 2), dilation=(1, 2), shift=(0, 1), mask_value=-0.5,
        tags="tiny",
    ),
    # Nasty.
    _sample("window_1xn", 1, 9, 13, 2, 8, window=(1, 5), shift=(0, 2), tags="nasty"),
    _sample("window_nx1", 1, 13, 9, 2, 8, window=(5, 1), shift=(4, 0), pads=True, tags="nasty"),
    _sample("window_3x5", 1, 11, 17, 2, 24, window=(3, 5), shift=(2, 4), mask_value=-4.0, tags="nasty"),
    # Rows of a window that fill vectors of 16.
    _sample("window_2x13", 1, 4, 13, 1, 8, window=(2, 13), tags="nasty"),
    _sample("window_3x15", 1, 6, 15, 1, 8, window=(3, 15), bias=False, tags="nasty"),
    _sample("window_4x16", 1, 8, 16, 2, 16, window=(4, 16), tau=(1.0, 2.0), tags="nasty"),
    _sample("window_exceeds_map", 2, 5, 3, 2, 16, window=(8, 9), shift=(3, 8), tags="nasty"),
    _sample(
        "window_exceeds_map_pads_timm", 1, 5, 3, 2, 16, window=8, shift=7, pads=True, roll_before_pad=True,
        tags="nasty",
    ),
    _sample("map_1x1", 3, 1, 1, 2, 8, window=7, shift=3, pads=True, tags="nasty"),
    _sample("indivisible_pads", 1, 13, 10, 2, 16, window=4, shift=(3, 1), pads=True, mask_value=-2.0, tags="nasty"),
    _sample(
        "indivisible_pads_timm", 1, 13, 10, 2, 16, window=4, shift=(3, 1), pads=True, mask_value=-2.0,
        roll_before_pad=True, tags="nasty",
    ),
    _sample(
        "indivisible_timm", 1, 13, 10, 2, 16, window=4, shift=(3, 1), mask_value=-2.0, roll_before_pad=True,
        tags="nasty",
    ),
    _sample("shift_y_only", 1, 12, 8, 2, 16, window=4, shift=(2, 0), mask_value=-2.0, tags="nasty"),
    _sample("shift_x_only", 1, 8, 12, 2, 16, window=4, shift=(0, 3), mask_value=-2.0, tags="nasty"),
    _sample(
        "dilation_shift_indivisible", 1, 17, 13, 1, 8, window=(3, 2), dilation=(2, 3), shift=(2, 1), pads=True,
        mask_value=-1.0, tags="nasty",
    ),
    _sample(
        "dilation_halo_shift", 1, 13, 16, 1, 8, window=(3, 4), dilation=2, halo=(2, 1), shift=(1, 2),
        mask_value=-1.0, tags="nasty",
    ),
    _sample("halo_exceeds_window", 1, 9, 9, 1, 8, window=2, halo=5, tags="nasty"),
    _sample(
        "halo_timm_pads", 1, 10, 9, 2, 8, window=4, halo=2, shift=1, pads=True, roll_before_pad=True,
        mask_value=-1.0, tags="nasty",
    ),
    _sample("d1", 2, 8, 8, 2, 1, window=4, shift=1, tags="nasty"),
    _sample("d7_dv1", 1, 8, 8, 2, 7, 1, window=4, tags="nasty"),
    _sample("d40_dv80", 1, 8, 8, 2, 40, 80, window=4, shift=2, tags="nasty"),
    _sample("d128", 1, 7, 7, 1, 128, window=7, tags="nasty"),
    _sample("d257_dv129", 1, 4, 4, 1, 257, 129, window=4, tags="nasty"),
    _sample("window_32", 1, 32, 32, 1, 16, window=32, tags="nasty"),
    _sample("window_32_shift_pads", 1, 30, 33, 1, 8, window=32, shift=16, pads=True, tags="nasty"),
    _sample(
        "window_20_cosine_pads", 1, 22, 21, 1, 8, window=20, shift=3, tau=(1.0, 1.0), pads=True, mask_value=-2.0,
        tags="nasty",
    ),
    _sample("window_16_d128", 1, 16, 16, 1, 128, window=16, tags="nasty"),
    _sample("window_7_d512", 1, 7, 7, 1, 512, window=7, bias=False, tags="nasty"),
    _sample("window_32_exceeds_map", 1, 6, 33, 1, 8, window=32, tags="nasty"),
    _sample("large_logits", 1, 8, 8, 2, 32, window=4, shift=1, values=_large_logits, tags="nasty"),
    _sample("heads_of_different_size", 1, 8, 8, 4, 16, window=4, values=_tiny_values, tags="nasty"),
    _sample("equal_keys", 1, 8, 8, 1, 16, window=8, bias=False, values=_equal_keys, tags="nasty"),
    _sample(
        "cosine_zero_norm_pads", 1, 7, 7, 2, 16, window=4, tau=(1.0, 3.0), pads=True, values=_zero_queries,
        tags="nasty",
    ),
    _sample("cosine_far_above_clamp", 1, 8, 8, 2, 16, window=4, shift=2, tau=(50.0, 90.0), tags="nasty"),
    _sample("cosine_negative_tau", 1, 8, 8, 2, 16, window=4, tau=(-30.0, -1.0), tags="nasty"),
    _sample("zero_scale", 1, 8, 8, 2, 16, window=4, scale=0.0, tags="nasty"),
    _sample("negative_scale", 1, 8, 8, 2, 16, window=4, scale=-0.7, tags="nasty"),
    _sample("mask_value_200", 1, 8, 8, 2, 16, window=4, shift=2, mask_value=-200.0, tags="nasty"),
    _sample("mask_value_zero", 1, 8, 8, 2, 16, window=4, shift=2, mask_value=0.0, tags="nasty"),
    _sample("mask_value_positive", 1, 8, 8, 2, 16, window=4, shift=2, mask_value=3.0, tags="nasty"),
    _sample(
        "mask_value_huge", 1, 8, 8, 2, 16, window=4, shift=2, mask_value=-1e30, tags="nasty",
        dtypes=FLOAT_DTYPES[:2],
    ),
    # Strides.
    _sample("misaligned", 1, 8, 8, 2, 16, window=4, tags="strided", layout=_all_misaligned),
    _sample("misaligned_whole_rows", 1, 8, 8, 2, 32, window=4, tags="strided", layout=_all_misaligned),
    _sample("transposed_batch", 3, 8, 6, 2, 16, window=4, tags="strided", layout=_transposed_batch),
    _sample("expanded_batch", 3, 8, 8, 2, 16, window=4, shift=2, tags="strided", layout=_expanded_batch),
    _sample(
        "sliced_map", 2, 9, 8, 2, 8, window=4, pads=True, tags="strided", layout=_sliced_map,
        bias_layout=_transposed_table,
    ),
    _sample("mixed_bias_dtype", 1, 8, 8, 2, 16, window=4, tau=(1.0, 2.0), tags="strided", bias_dtype=torch.bfloat16),
    # Empty.
    _sample("empty_batch", 0, 8, 8, 2, 8, window=4, pads=True, tags="empty"),
    _sample("empty_height", 2, 0, 8, 2, 8, window=4, tau=(1.0, 1.0), tags="empty"),
    _sample("empty_width", 2, 8, 0, 2, 8, window=4, shift=1, tags="empty"),
    _sample("empty_heads", 2, 8, 8, 0, 8, window=4, tags="empty"),
    # More windows than a CUDA grid's y dimension.
    _sample("huge_65536_windows", 1, 512, 512, 1, 4, window=2, tags="huge", dtypes=(torch.float32,)),
    _sample("huge_batch_of_windows", 70001, 1, 2, 1, 2, window=(1, 2), tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


def random_sample(name, choose):
    """Any options at once, at a small size; `choose` is a random.Random."""
    wh, ww = (choose.choice((1, 2, 3, 4, 5, 7, 8, 9, 12)) for _ in range(2))
    shifted = choose.random() < 0.75
    window, shift = (wh, ww), ((choose.randrange(wh), choose.randrange(ww)) if shifted else (0, 0))
    dilation = tuple(choose.choice((1, 1, 1, 2, 3)) for _ in range(2))
    halo = tuple(choose.choice((0, 0, 0, 1, 2, 4)) for _ in range(2))
    d, dv = (choose.choice((1, 4, 8, 13, 16, 32, 33, 64, 96, 160, 256)) for _ in range(2))
    return _sample(
        name, choose.choice((1, 1, 1, 2)), choose.randint(1, 17), choose.randint(1, 17), choose.choice((1, 1, 2)), d,
        d if choose.random() < 0.5 else dv,
        bias=choose.random() < 0.6, tau=(0.5, 3.0) if choose.random() < 0.25 else None, pads=choose.random() < 0.4,
        layout=choose.choice((None, _packed_heads, _all_misaligned, _transposed_batch)),
        bias_layout=choose.choice((None, _timm_table, _transposed_table)), window=window, shift=shift,
        dilation=dilation, halo=halo, mask_value=choose.choice((-100.0, -2.0, 1.5)),
        roll_before_pad=choose.random() < 0.5,
    )  # fmt: skip


# ---- error magnitudes ------------------------------------------------------------------------------------------------


class _Windows:
    """Index tensors of a call: which map position every query and key of every window is."""

    def __init__(self, H, W, kwargs):
        geometry = _geometry(kwargs)
        axes = [
            axis_layout(*axis, kwargs.get("roll_before_pad", False)) for axis in zip((H, W), *geometry, strict=True)
        ]
        self.q_pos, self.k_pos = (self._join(axes[0][i], axes[1][i], W) for i in (0, 1))  # [windows, N], [windows, M]
        self.size = H * W

    @staticmethod
    def _join(y, x, W):
        y, x = y[:, None, :, None], x[None, :, None, :]
        return torch.where((y < 0) | (x < 0), -1, y * W + x).reshape(y.shape[0] * x.shape[1], -1)

    def gather(self, t, pos, pad=None):
        """[B, H, W, h, e] -> [B, windows, h, tokens, e]"""
        rows = t.flatten(1, 2)[:, pos.clamp(min=0)]
        rows = torch.where((pos < 0)[None, :, :, None, None], 0.0 if pad is None else pad, rows)
        return rows.transpose(2, 3)

    def scatter(self, t, pos, shape):
        """[B, windows, h, tokens, e] -> ([B, H, W, h, e], [h, e] what fell outside the map)"""
        t = t.transpose(2, 3).flatten(1, 2)  # [B, windows*tokens, h, e]
        pos = pos.flatten()
        total = t.new_zeros(t.shape[0], self.size + 1, *t.shape[2:])
        total.index_add_(1, torch.where(pos < 0, self.size, pos), t)
        return total[:, : self.size].reshape(shape), total[:, self.size].sum(0)


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms behind every component of the outputs and gradients, in float64.

    Logits are float32 in every kernel: their rounding enters the probabilities by eps(float32), not by eps.
    """
    q, k, v, table, log_scale, pad_k, pad_v = (*args, *(None,) * (7 - len(args)))
    B, H, W, h, d = q.shape
    if 0 in (B, H, W, h):
        return {}, {}
    (wh, ww), _, _, (hh, hw) = _geometry(kwargs)
    windows = _Windows(H, W, kwargs)
    with torch.no_grad():
        qw, kw = windows.gather(q, windows.q_pos), windows.gather(k, windows.k_pos, pad_k)
        vw = windows.gather(v, windows.k_pos, pad_v)
        if log_scale is None:
            factor = kwargs.get("scale")
            factor = torch.tensor(d**-0.5 if factor is None else factor, dtype=torch.float64)
        else:
            factor = log_scale.clamp(max=LOGIT_SCALE_MAX).exp()[:, None, None]
            q_norm, k_norm = (t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (qw, kw))
            qw, kw = qw / q_norm, kw / k_norm
        ky, kx = torch.arange(-hh, wh + hh), torch.arange(-hw, ww + hw)
        iy = (torch.arange(wh)[:, None] - ky[None, :] + wh - 1 + hh)[:, None, :, None]
        ix = (torch.arange(ww)[:, None] - kx[None, :] + ww - 1 + hw)[None, :, None, :]
        cells = torch.broadcast_tensors(iy, ix)
        cells = [c.reshape(wh * ww, -1) for c in cells]

        # The probabilities themselves come from the definition: lse of every query, logits again per window.
        lse = reference_call(*args, **kwargs)[1]  # [B, h, H, W]
        bias = 0.0 if table is None else table[:, cells[0], cells[1]]
        dots = qw.abs() @ kw.abs().transpose(-1, -2) * factor.abs()
        s = (qw @ kw.transpose(-1, -2)) * factor + bias
        mask = _mask(H, W, kwargs)
        s = s + mask
        s_size = dots + torch.as_tensor(bias).abs() + mask.abs()
        outside = (windows.k_pos < 0)[None, :, None, None, :] & torch.tensor(pad_k is None)
        dead = (windows.q_pos < 0)[None, :, None, :, None]
        lse_w = windows.gather(lse.permute(0, 2, 3, 1)[..., None], windows.q_pos)
        p = (s - lse_w).exp().masked_fill(outside | dead, 0.0)
        lse_size = lse_w.abs() + (p * s_size).sum(-1, keepdim=True) + 1.0
        p_size = p * (1.0 + torch.finfo(torch.float32).eps / eps * (s_size.clamp(max=1e4) + lse_size))
        least = torch.finfo(torch.float32).tiny / eps  # smaller probabilities are lost
        p_size = (p_size + least).masked_fill(outside | dead, 0.0)

        out_size = p_size @ vw.abs()
        lse_map = windows.scatter(lse_size, windows.q_pos, (B, H, W, h, 1))[0].squeeze(-1).permute(0, 3, 1, 2)
        outputs = {"out": windows.scatter(out_size, windows.q_pos, v.shape)[0], "lse": lse_map}
        if output_grads is None:
            return outputs, {}

        grad_out, grad_lse = output_grads
        grad_out = torch.zeros_like(v) if grad_out is None else grad_out
        do = windows.gather(grad_out, windows.q_pos).abs()
        dl = 0.0
        if grad_lse is not None:
            dl = windows.gather(grad_lse.permute(0, 2, 3, 1)[..., None], windows.q_pos).abs()
        ds = p_size * (do @ vw.abs().transpose(-1, -2) + (do * out_size).sum(-1, keepdim=True) + dl)
        dq = ds @ kw.abs() * factor.abs()
        dk = ds.transpose(-1, -2) @ qw.abs() * factor.abs()
        dv = p_size.transpose(-1, -2) @ do
        dk, dk_pad = windows.scatter(dk, windows.k_pos, k.shape)
        dv, dv_pad = windows.scatter(dv, windows.k_pos, v.shape)
        dq = windows.scatter(dq, windows.q_pos, q.shape)[0]
        gradients = {}
        if log_scale is not None:

            def through_norm(g, x):
                norm = x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                unit = (x / norm).abs()
                return (g + unit * (unit * g).sum(-1, keepdim=True)) / norm

            dq, dk = through_norm(dq, q), through_norm(dk, k)
            if pad_k is not None:
                dk_pad = through_norm(dk_pad, pad_k)
            dtau = (ds * dots).sum((0, 1, 3, 4)) * (log_scale <= LOGIT_SCALE_MAX)
            gradients["logit_scale"] = dtau
        gradients |= {"q": dq, "k": dk, "v": dv}
        if pad_k is not None:
            gradients |= {"pad_k": dk_pad, "pad_v": dv_pad}
        if table is not None:
            flat = torch.zeros(h, table.shape[1] * table.shape[2], dtype=torch.float64)
            flat.index_add_(1, (cells[0] * table.shape[2] + cells[1]).flatten(), ds.sum((0, 1)).flatten(1))
            gradients["bias_table"] = flat.reshape(table.shape)
    return outputs, gradients


def _mask(H, W, kwargs):
    """[windows, 1, N, M] what the shift regions add."""
    geometry = _geometry(kwargs)
    axes = [axis_layout(*axis, kwargs.get("roll_before_pad", False)) for axis in zip((H, W), *geometry, strict=True)]

    def label(i):
        y, x = axes[0][i][:, None, :, None], axes[1][i][None, :, None, :]
        return (y * 3 + x).reshape(y.shape[0] * x.shape[1], -1)

    return (label(2)[:, :, None] != label(3)[:, None, :])[:, None].double() * kwargs.get("mask_value", -100.0)


# ---- the backward op ------------------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call at another batch, height and width."""

    def grow(t):
        B, H, W = t.shape[:3]
        return torch.cat((t, t.flip(0)), 0).repeat(1, 2, 3, 1, 1)[: B + 1, : H + 3, : 2 * W + 1].contiguous()

    return (*(grow(t) for t in args[:3]), *args[3:]), kwargs


def memory_calls(dtype):
    """Large calls: many small windows, and few very large ones."""
    generator = torch.Generator("cpu").manual_seed(0)

    def call(B, H, W, h, d, **kwargs):
        q, k, v = torch.randn(B, H, W, 3, h, d, generator=generator).to(dtype).unbind(3)
        table = torch.randn(table_shape(h, kwargs["window"]), generator=generator)
        return (q, k, v, table, None, None, None), kwargs

    return [
        ("56x56x96_window7", *call(64, 56, 56, 3, 32, window=7, shift=3)),
        ("64x64_window32", *call(2, 64, 64, 2, 32, window=32, shift=16)),
        ("64x64x64_window64", *call(2, 64, 64, 1, 64, window=64)),
        ("64x64x128_window16", *call(1, 64, 64, 2, 128, window=16)),
    ]


# ---- bad inputs -----------------------------------------------------------------------------------------------------


def good_call():
    """A call that works; every bad input is this one with something changed."""
    generator = torch.Generator("cpu").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "q": randn(1, 4, 6, 2, 8), "k": randn(1, 4, 6, 2, 8), "v": randn(1, 4, 6, 2, 5),
        "bias_table": randn(*table_shape(2, (2, 3))), "logit_scale": None,
        "pad_k": randn(2, 8), "pad_v": randn(2, 5), "window": (2, 3), "shift": (1, 1),
    }  # fmt: skip


BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names


def _good_backward():
    call = good_call()
    shape_v = call["v"].shape
    call |= {n: torch.zeros(shape_v) for n in ("grad_out", "out")}
    return call | {n: torch.zeros(1, 2, 4, 6) for n in ("grad_lse", "lse")}


def _bad(name, error, match, *, schema_match=None, torch_ops=True, **changes):
    """changes: argument -> new value, or a function of the old one."""

    def make():
        call = good_call()
        for key, change in changes.items():
            call[key] = change(call.get(key)) if callable(change) else change
        return split_call(call, TENSORS)

    return BadInput(name, make, error, match, schema_match, torch_ops)


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        call = _good_backward()
        for key, change in changes.items():
            call[key] = change(call.get(key)) if callable(change) else change
        return split_call(call, BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op="window_attention_backward")


def _to(what):
    return lambda t: t.to(what)


def _every_other(t):
    return torch.stack((t, t), dim=-1).flatten(-2)[..., ::2]


_TENSOR = r"must be a torch\.Tensor, got "
_FLOAT = r"must be float32, bfloat16 or float16, got "
_TABLE = r"bias_table must be \[h, 2\*wh-1\+2\*halo_h, 2\*ww-1\+2\*halo_w\]"

# fmt: off
BAD_INPUTS = [
    # q
    _bad("q_none", TypeError, f"q {_TENSOR}NoneType", schema_match=r"q must be .*got \[0\]", q=None),
    _bad("q_list", TypeError, f"q {_TENSOR}list", schema_match="argument 'q'", q=lambda t: t.tolist()),
    _bad("q_numpy", TypeError, f"q {_TENSOR}ndarray", schema_match="argument 'q'", q=lambda t: t.numpy()),
    _bad("q_rank_4", ValueError, r"q must be \[B, H, W, h, d\].*got \[4, 6, 2, 8\]", q=lambda t: t[0]),
    _bad("q_rank_6", ValueError, r"q must be \[B, H, W, h, d\].*got \[1, 1, 4, 6, 2, 8\]", q=lambda t: t[None]),
    _bad("q_rank_0", ValueError, r"q must be \[B, H, W, h, d\].*got \[\]", q=lambda t: t.sum()),
    _bad("q_float64", TypeError, f"q {_FLOAT}.*(float64|Double)", **dict.fromkeys("qkv", _to(torch.float64))),
    _bad("q_int32", TypeError, f"q {_FLOAT}.*(int32|Int)", **dict.fromkeys("qkv", _to(torch.int32))),
    _bad("q_int8", TypeError, f"q {_FLOAT}.*(int8|Char)", **dict.fromkeys("qkv", _to(torch.int8))),
    _bad("q_bool", TypeError, f"q {_FLOAT}.*(bool|Bool)", **dict.fromkeys("qkv", _to(torch.bool))),
    _bad("q_complex64", TypeError, f"q {_FLOAT}.*(complex64|ComplexFloat)",
         **dict.fromkeys("qkv", _to(torch.complex64))),
    _bad("q_float8", TypeError, f"q {_FLOAT}.*(float8|Float8)", **dict.fromkeys("qkv", _to(torch.float8_e4m3fn))),
    _bad("q_sparse", TypeError, r"q must be (a )?dense.*got .*[sS]parse", q=lambda t: t.to_sparse()),
    _bad("q_head_dim_0", ValueError, r"q must .*head dim of at least 1, got \[1, 4, 6, 2, 0\]", q=lambda t: t[..., :0],
         k=lambda t: t[..., :0], pad_k=lambda t: t[:, :0]),
    _bad("q_last_stride_2", ValueError, "q must .*last stride.*1.*got", q=_every_other),
    # k
    _bad("k_none", TypeError, f"k {_TENSOR}NoneType", schema_match=r"k must be .*got \[0\]", k=None),
    _bad("k_width", ValueError, r"k must be \[B, H, W, h, d\] like q \[1, 4, 6, 2, 8\], got \[1, 4, 5, 2, 8\]",
         k=lambda t: t[:, :, :5]),
    _bad("k_head_dim", ValueError, r"k must be \[B, H, W, h, d\] like q .*got \[1, 4, 6, 2, 7\]",
         k=lambda t: t[..., :7]),
    _bad("k_heads", ValueError, r"k must be \[B, H, W, h, d\] like q .*got \[1, 4, 6, 1, 8\]",
         k=lambda t: t[..., :1, :]),
    _bad("k_batch", ValueError, r"k must be \[B, H, W, h, d\] like q .*got \[2, ", k=lambda t: torch.cat((t, t))),
    _bad("k_rank", ValueError, r"k must be \[B, H, W, h, d\].*got \[1, 4, 6, 16\]", k=lambda t: t.flatten(3)),
    _bad("k_dtype", TypeError, r"k must be .*[fF]loat.*like q.*got .*(bfloat16|BFloat16)", k=_to(torch.bfloat16)),
    _bad("k_meta", ValueError, r"k must be .*on cpu.*got .*meta", k=_to("meta")),
    _bad("k_last_stride_2", ValueError, "k must .*last stride.*1.*got", k=_every_other),
    # v
    _bad("v_string", TypeError, f"v {_TENSOR}str", schema_match="argument 'v'", v="v"),
    _bad("v_height", ValueError, r"v must be \[B, H, W, h, dv\] like q .*got \[1, 3, 6, 2, 5\]", v=lambda t: t[:, :3]),
    _bad("v_rank", ValueError, r"v must be \[B, H, W, h, dv\].*got \[1, 4, 6, 2\]", v=lambda t: t[..., 0]),
    _bad("v_dtype", TypeError, r"v must be .*[fF]loat.*like q.*got .*(float16|Half)", v=_to(torch.float16)),
    _bad("v_meta", ValueError, r"v must be .*on cpu.*got .*meta", v=_to("meta")),
    _bad("v_last_stride_2", ValueError, "v must .*last stride.*1.*got", v=_every_other),
    _bad("v_head_dim_0", ValueError, r"v must .*head dim of at least 1", v=lambda t: t[..., :0],
         pad_v=lambda t: t[:, :0]),
    # bias_table
    _bad("table_list", TypeError, f"bias_table {_TENSOR}list", schema_match="argument 'bias_table'",
         bias_table=lambda t: t.tolist()),
    _bad("table_heads", ValueError, rf"{_TABLE}.*\[2, 3, 5\], got \[1, 3, 5\]", bias_table=lambda t: t[:1]),
    _bad("table_height", ValueError, rf"{_TABLE}.*\[2, 3, 5\], got \[2, 2, 5\]", bias_table=lambda t: t[:, :2]),
    _bad("table_flat", ValueError, rf"{_TABLE}.*\[2, 3, 5\], got \[2, 15\]", bias_table=lambda t: t.flatten(1)),
    _bad("table_transposed", ValueError, rf"{_TABLE}.*\[2, 3, 5\], got \[2, 5, 3\]", bias_table=lambda t: t.mT),
    _bad("table_without_halo", ValueError, rf"{_TABLE}.*\[2, 5, 9\], got \[2, 3, 5\]", halo=(1, 2)),
    _bad("table_float64", TypeError, f"bias_table {_FLOAT}.*(float64|Double)", bias_table=_to(torch.float64)),
    _bad("table_int64", TypeError, f"bias_table {_FLOAT}.*(int64|Long)", bias_table=_to(torch.int64)),
    _bad("table_meta", ValueError, r"bias_table must be .*on cpu.*got .*meta", bias_table=_to("meta")),
    # logit_scale
    _bad("logit_scale_float", TypeError, f"logit_scale {_TENSOR}float",
         schema_match="argument 'logit_scale'|logit_scale",
         logit_scale=2.0),
    _bad("logit_scale_timm_shape", ValueError, r"logit_scale must be \[h\].*\[2\], got \[2, 1, 1\]",
         logit_scale=torch.zeros(2, 1, 1)),
    _bad("logit_scale_heads", ValueError, r"logit_scale must be \[h\].*\[2\], got \[3\]", logit_scale=torch.zeros(3)),
    _bad("logit_scale_scalar", ValueError, r"logit_scale must be \[h\].*\[2\], got \[\]", logit_scale=torch.zeros(())),
    _bad("logit_scale_int", TypeError, f"logit_scale {_FLOAT}.*(int64|Long)", logit_scale=torch.zeros(2,
         dtype=torch.int64)),
    _bad("logit_scale_float64", TypeError, f"logit_scale {_FLOAT}.*(float64|Double)",
         logit_scale=torch.zeros(2, dtype=torch.float64)),
    _bad("logit_scale_meta", ValueError, r"logit_scale must be .*on cpu.*got .*meta", logit_scale=torch.zeros(2,
         device="meta")),
    _bad("logit_scale_with_scale", ValueError, r"scale must be None .*logit_scale.*got 0\.5",
         logit_scale=torch.zeros(2),
         scale=0.5),
    # pad_k, pad_v
    _bad("pad_k_alone", ValueError, r"pad_v must be given together with pad_k, got None", pad_v=None),
    _bad("pad_v_alone", ValueError, r"pad_k must be given together with pad_v, got None", pad_k=None),
    _bad("pad_k_shape", ValueError, r"pad_k must be \[h, d\].*\[2, 8\], got \[16\]", pad_k=lambda t: t.flatten()),
    _bad("pad_k_heads", ValueError, r"pad_k must be \[h, d\].*\[2, 8\], got \[1, 8\]", pad_k=lambda t: t[:1]),
    _bad("pad_k_dtype", TypeError, r"pad_k must be .*[fF]loat.*like q.*got .*(bfloat16|BFloat16)",
         pad_k=_to(torch.bfloat16)),
    _bad("pad_k_tuple", TypeError, f"pad_k {_TENSOR}tuple", schema_match="argument 'pad_k'", pad_k=(0.0, 0.0)),
    _bad("pad_v_shape", ValueError, r"pad_v must be \[h, dv\].*\[2, 5\], got \[2, 8\]", pad_v=torch.zeros(2, 8)),
    _bad("pad_v_dtype", TypeError, r"pad_v must be .*[fF]loat.*like q.*got .*(float64|Double)",
         pad_v=_to(torch.float64)),
    _bad("pad_v_meta", ValueError, r"pad_v must be .*on cpu.*got .*meta", pad_v=_to("meta")),
    # window
    _bad("window_none", TypeError, r"window must be an int or 2 integers, got None", schema_match="argument 'window'",
         window=None),
    _bad("window_zero", ValueError, r"window must be between 1 and 32768, got \[0, 3\]", window=(0, 3), shift=0),
    _bad("window_negative", ValueError, r"window must be between 1 and 32768, got \[2, -3\]", window=(2, -3), shift=0),
    _bad("window_too_large", ValueError, r"window must be between 1 and 32768, got", window=(1 << 31, 3)),
    _bad("window_beyond_int64", ValueError, r"window must be between 1 and 32768, got",
         schema_match="argument 'window'",
         window=(1 << 70, 3)),
    _bad("window_three", ValueError, r"window must be (an int or )?2 integers, got [\[(]2, 3, 4", window=(2, 3, 4)),
    _bad("window_one", ValueError, r"window must be (an int or )?2 integers, got [\[(]2", torch_ops=False, window=(2,)),
    _bad("window_empty", ValueError, r"window must be (an int or )?2 integers, got [\[(]", window=()),
    _bad("window_float", TypeError, r"window must be an int or 2 integers, got 2\.0",
         schema_match="argument 'window'", window=2.0),
    _bad("window_floats", TypeError, r"window must be an int or 2 integers, got \(2\.0",
         schema_match="argument 'window'",
         window=(2.0, 3.0)),
    _bad("window_bool", TypeError, r"window must be an int or 2 integers, got True", torch_ops=False, window=True,
         shift=0),
    _bad("window_string", TypeError, r"window must be an int or 2 integers, got '23'", schema_match="argument 'window'",
         window="23"),
    # shift, dilation, halo
    _bad("shift_is_window", ValueError, r"shift must be in \[0, window\) for window \[2, 3\], got \[2, 1\]",
         shift=(2, 1)),
    _bad("shift_above_window", ValueError, r"shift must be in \[0, window\) for window \[2, 3\], got \[0, 7\]",
         shift=(0, 7)),
    _bad("shift_negative", ValueError, r"shift must be between 0 and 32768, got \[-1, 0\]", shift=(-1, 0)),
    _bad("shift_three", ValueError, r"shift must be (an int or )?2 integers, got [\[(]1, 1, 1", shift=(1, 1, 1)),
    _bad("shift_none", TypeError, r"shift must be an int or 2 integers, got None", schema_match="argument 'shift'",
         shift=None),
    _bad("dilation_zero", ValueError, r"dilation must be between 1 and 32768, got \[1, 0\]", dilation=(1, 0)),
    _bad("dilation_negative", ValueError, r"dilation must be between 1 and 32768, got \[-2, -2\]", dilation=-2),
    _bad("dilation_float", TypeError, r"dilation must be an int or 2 integers, got 1\.5",
         schema_match="argument 'dilation'",
         dilation=1.5),
    _bad("halo_negative", ValueError, r"halo must be between 0 and 32768, got \[0, -1\]", halo=(0, -1),
         bias_table=None),
    _bad("halo_huge", ValueError, r"halo must be between 0 and 32768, got", halo=1 << 40, bias_table=None),
    _bad("halo_tensors", TypeError, r"halo must be an int or 2 integers, got", schema_match="argument 'halo'",
         halo=(torch.tensor([1, 2]), 0), bias_table=None),
    # scale, mask_value, roll_before_pad
    _bad("scale_nan", ValueError, r"scale must be finite, got nan", scale=math.nan),
    _bad("scale_huge", ValueError, r"scale must be finite in float32, got 1e\+39", scale=1e39),
    _bad("scale_inf", ValueError, r"scale must be finite, got inf", scale=math.inf),
    _bad("scale_string", TypeError, r"scale must be a real number, got str", schema_match="argument 'scale'",
         scale="0.5"),
    _bad("scale_complex", TypeError, r"scale must be a real number, got complex", schema_match="argument 'scale'",
         scale=1j),
    _bad("mask_value_minus_inf", ValueError, r"mask_value must be finite, got -inf", mask_value=-math.inf),
    _bad("mask_value_nan", ValueError, r"mask_value must be finite, got nan", mask_value=math.nan),
    _bad("mask_value_none", TypeError, r"mask_value must be a real number, got NoneType",
         schema_match="argument 'mask_value'",
         mask_value=None),
    _bad("roll_before_pad_string", TypeError, r"roll_before_pad must be a bool, got str",
         schema_match="roll_before_pad",
         roll_before_pad="yes"),
    _bad("roll_before_pad_int", TypeError, r"roll_before_pad must be a bool, got int", torch_ops=False,
         roll_before_pad=1),
    # the backward op
    _bad_backward("grad_out_shape", ValueError,
                  r"grad_out must be \[B, H, W, h, dv\].*\[1, 4, 6, 2, 5\], got \[1, 4, 6, 2, 4\]",
                  grad_out=lambda t: t[..., :4]),
    _bad_backward("grad_out_none", TypeError, r"grad_out must be a torch\.Tensor, got NoneType",
                  schema_match=r"grad_out must be .*got \[0\]", grad_out=None),
    _bad_backward("grad_out_dtype", TypeError, r"grad_out must be .*[fF]loat.*got .*(float16|Half)",
                  grad_out=_to(torch.float16)),
    _bad_backward("grad_out_last_stride", ValueError, r"grad_out must .*last stride.*1.*got", grad_out=_every_other),
    _bad_backward("grad_out_meta", ValueError, r"grad_out must be .*on cpu.*got .*meta", grad_out=_to("meta")),
    _bad_backward("grad_lse_shape", ValueError, r"grad_lse must be \[B, h, H, W\].*\[1, 2, 4, 6\], got \[1, 4, 6, 2\]",
                  grad_lse=lambda t: t.permute(0, 2, 3, 1)),
    _bad_backward("grad_lse_dtype", TypeError, r"grad_lse must be .*[fF]loat.*got .*(bfloat16|BFloat16)",
                  grad_lse=_to(torch.bfloat16)),
    _bad_backward("out_shape", ValueError, r"out must be \[B, H, W, h, dv\].*got \[1, 4, 6, 10\]",
                  out=lambda t: t.flatten(3)),
    _bad_backward("out_not_contiguous", ValueError, r"out must be contiguous", out=lambda t: t.mT.contiguous().mT),
    _bad_backward("lse_shape", ValueError, r"lse must be \[B, h, H, W\].*got \[1, 2, 24\]", lse=lambda t: t.flatten(2)),
    _bad_backward("lse_dtype", TypeError, r"lse must be .*[fF]loat.*got .*(float64|Double)", lse=_to(torch.float64)),
    _bad_backward("lse_not_contiguous", ValueError, r"lse must be contiguous", lse=lambda t: t.mT.contiguous().mT),
    _bad_backward("backward_window_zero", ValueError, r"window must be between 1 and 32768, got \[0, 3\]",
                  window=(0, 3), shift=0),
    _bad_backward("backward_q_shape", ValueError, r"k must be \[B, H, W, h, d\] like q", q=lambda t: t[..., :4]),
    _bad_backward("backward_pad_v_missing", ValueError, r"pad_v must be given together with pad_k, got None",
                  pad_v=None),
]
# fmt: on


SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    definition=reference_call,
    random_sample=random_sample,
    random_calls=2000,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B H W",
    resize=resize,
    memory_calls=memory_calls,
)  # fmt: skip
