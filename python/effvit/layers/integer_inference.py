"""Integer-only inference: attention, MLP, blocks, ViT and Swin that hold integers and compute with nothing else.

Between the quantised input and the logits no operator has a floating-point tensor. Modules are made by `deployed()` of
their trained selves in `integer_training`, or by `effvit.to_integer`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

import effvit.ops  # noqa: F401  defines torch.ops.effvit

from ..ops import _checks
from ..ops._integer import DTYPES
from .integer import dtype_of, ends, int_layer_norm, int_linear, patches, saturated


class Integers(nn.Module):
    """A module of integer buffers. `constants` names numbers that operators take as options: they are in one int64
    buffer of the state_dict, and attributes of the module."""

    constants: tuple[str, ...] = ()

    def __init__(self, **values: int):
        super().__init__()
        if self.constants:
            numbers = [int(values[name]) for name in self.constants]
            self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.int64))
            self._read()

    def _read(self):
        if self.constants and not self.numbers.is_meta:
            vars(self).update(zip(self.constants, self.numbers.tolist(), strict=True))

    def hold(self, name: str, t: torch.Tensor | None) -> None:
        """A buffer that never asks for a gradient; None stays None."""
        self.register_buffer(name, None if t is None else t.detach().contiguous())

    def derive(self) -> None:
        """What follows from the buffers is made again."""
        self._read()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.derive()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for name, own in self._buffers.items():  # a copy would cut numbers off
            given = state_dict.get(prefix + name)
            if own is not None and given is not None and given.dtype != own.dtype:
                errors.append(
                    f"effvit::{type(self).__name__}: {prefix}{name} must be {own.dtype}, got {given.dtype}: load it "
                    "into the float model and call effvit.to_integer"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self.derive()


def check_input(owner: nn.Module, name: str, x: torch.Tensor, dtypes, expected: str, shape) -> None:
    """The shape's None is any size."""
    kind = type(owner).__name__
    if not isinstance(x, torch.Tensor) or x.dtype not in dtypes:
        given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise _checks.type_error(kind, name, " or ".join(str(d).removeprefix("torch.") for d in dtypes), given)
    if x.dim() != len(shape) or any(s is not None and s != n for s, n in zip(shape, x.shape, strict=True)):
        raise _checks.value_error(kind, name, expected, list(x.shape))


class IntegerLinear(Integers):
    """int8 [..., K] -> [..., N] in `bits` bits, a residual added in the same pass: `int_linear`.

    Buffers: weight [N, K] int8, bias [N] int32 or None, multiplier, shift [N] int32 (None: sums in int32), and those of
    the residual. On a CPU the kernels read a packed copy, derived from weight.
    """

    constants = ("bits",)

    def __init__(self, weight, bias, constants=None, residual_constants=None, bits: int = 8):
        super().__init__(bits=bits if constants is not None else 32)
        self.out_features, self.in_features = weight.shape
        self.hold("weight", weight)
        self.hold("bias", bias)
        for name, pair in (("", constants), ("residual_", residual_constants)):
            self.hold(name + "multiplier", None if pair is None else pair[0])
            self.hold(name + "shift", None if pair is None else pair[1])
        self.register_buffer("packed", None, persistent=False)
        self.derive()

    def derive(self):
        super().derive()
        on_cpu = self.weight.device.type == "cpu"
        self.packed = torch.ops.effvit.int8_prepack(self.weight) if on_cpu else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rest = () if residual is None else (residual, self.residual_multiplier, self.residual_shift)
        bits = None if self.multiplier is None else self.bits
        return int_linear(x, self._weight, self.multiplier, self.shift, self.bias, *rest, bits=bits)

    @property
    def _weight(self):
        plain = self.packed is None or (self.bias is None and self.multiplier is None)
        return self.weight if plain else self.packed

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class IntegerLayerNorm(Integers):
    """int16 or int8 [..., C] -> [..., C] in `bits` bits: `int_layer_norm`, requantised in the same pass."""

    constants = ("bits",)

    def __init__(self, bias, multiplier, shift, offset=None, bits: int = 8):
        super().__init__(bits=bits)
        self.hold("bias", bias)
        self.hold("multiplier", multiplier)
        self.hold("shift", shift)
        self.hold("offset", torch.zeros_like(multiplier) if offset is None else offset)
        self.derive()

    def derive(self):
        super().derive()
        self.has_offset = not self.offset.is_meta and bool(self.offset.any())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset = self.offset if self.has_offset else None
        y = int_layer_norm(x, self.bias, self.multiplier, self.shift, offset, bits=self.bits)
        return saturated(y, self.bits)


class IntegerRequantise(Integers):
    """[..., C] of steps of one scale in those of another: `requantize`."""

    constants = ("bits",)

    def __init__(self, constants, bits: int = 8):
        super().__init__(bits=bits)
        self.hold("multiplier", constants[0])
        self.hold("shift", constants[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.effvit.requantize(
            x.contiguous(), self.multiplier, self.shift, bits=self.bits, out_dtype=DTYPES[dtype_of(self.bits)]
        )


class Windows:
    """Windows [B * n, wh * ww, C] of maps [B, H, W, C], shifted cyclically and padded with 0 as timm's Swin."""

    def __init__(self, size: tuple[int, int], shift: tuple[int, int]):
        self.size, self.shift = tuple(size), tuple(shift)

    def padded(self, H: int, W: int) -> tuple[int, int]:
        return H + -H % self.size[0], W + -W % self.size[1]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        (wh, ww), (ph, pw) = self.size, self.padded(H, W)
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        if (ph, pw) != (H, W):
            x = torch.constant_pad_nd(x, (0, 0, 0, pw - W, 0, ph - H), 0)
        n = (ph // wh) * (pw // ww)
        return x.reshape(B, ph // wh, wh, pw // ww, ww, C).transpose(2, 3).reshape(B * n, wh * ww, C)

    def join(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        (wh, ww), (ph, pw), C = self.size, self.padded(H, W), x.shape[-1]
        B = x.shape[0] // ((ph // wh) * (pw // ww))
        x = x.reshape(B, ph // wh, pw // ww, wh, ww, C).transpose(2, 3).reshape(B, ph, pw, C)[:, :H, :W]
        return torch.roll(x, self.shift, (1, 2)) if any(self.shift) else x.contiguous()


class IntegerAttention(Integers):
    """Multi-head self-attention: int8 [B, L, C], or a map [B, H, W, C] with windows, plus a residual.

    Projection to queries, keys and values (a scale each), `int_attention`, projection with the residual added in the
    same pass. Layer scale is in the last projection's multipliers; relative position bias and shift mask are one int32
    tensor [windows, heads, L, L] in steps of the scores. q_norm and k_norm: IntegerLayerNorm or None.
    """

    constants = (
        "score_multiplier", "score_shift", "score_bits", "x0", "n", "softmax_bits", "multiplier", "shift", "bits"
    )  # fmt: skip

    def __init__(
        self, num_heads, head_dim, qkv, proj, bias=None, window=None, window_shift=(0, 0), q_norm=None, k_norm=None,
        **numbers,
    ):  # fmt: skip
        super().__init__(**numbers)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv, self.proj, self.q_norm, self.k_norm = qkv, proj, q_norm, k_norm
        self.windows = None if window is None else Windows(window, window_shift)
        self.hold("attention_bias", bias)

    def context(self, x: torch.Tensor) -> torch.Tensor:
        """int8 [B, L, C] -> int8 [B, L, heads * head_dim], before the last projection."""
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, self.head_dim).unbind(2)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        out = torch.ops.effvit.int_attention(
            q, k, v, self.attention_bias, score_multiplier=self.score_multiplier, score_shift=self.score_shift,
            score_bits=self.score_bits, x0=self.x0, n=self.n, bits=self.softmax_bits, multiplier=self.multiplier,
            shift=self.shift, out_bits=self.bits, out_dtype=DTYPES[torch.int8],
        )  # fmt: skip
        return out.view(B, L, self.num_heads * self.head_dim)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.windows is None:
            check_input(self, "x", x, (torch.int8,), "[B, L, C]", (None, None, self.qkv.in_features))
            return self.proj(self.context(x), residual)
        check_input(self, "x", x, (torch.int8,), "[B, H, W, C]", (None, None, None, self.qkv.in_features))
        out = self.windows.join(self.context(self.windows.split(x)), *x.shape[1:3])
        return self.proj(out, residual)

    def extra_repr(self):
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, score_bits={self.score_bits}, n={self.n}"


class IntegerMLP(Integers):
    """fc1, ShiftGELU requantised in the same pass, fc2 with a residual added in the same pass: int8 [..., C] ->."""

    constants = ("x0", "n", "gelu_bits", "multiplier", "shift", "bits")

    def __init__(self, fc1, fc2, **numbers):
        super().__init__(**numbers)
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype != torch.int8 or x.shape[-1] != self.fc1.in_features:
            check_input(
                self, "x", x, (torch.int8,), f"[..., {self.fc1.in_features}]", (*x.shape[:-1], self.fc1.in_features)
            )
        h = torch.ops.effvit.shift_gelu(
            self.fc1(x), x0=self.x0, n=self.n, bits=self.gelu_bits, multiplier=self.multiplier, shift=self.shift,
            out_dtype=DTYPES[dtype_of(self.bits)],
        )  # fmt: skip
        return self.fc2(saturated(h, self.bits), residual)


class IntegerBlock(nn.Module):
    """A transformer block: int16 [B, L, C] or a map [B, H, W, C] -> the same; LayerNorm before attention and MLP."""

    def __init__(self, norm1, attn, norm2, mlp):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(self.norm2(x), x)


class _Model(Integers):
    """What integer-only models share: the scales of input and logits, and what is around the integers.

    A scale is a float64, kept as two integers: mantissa * 2^exponent.
    """

    constants = ("input_mantissa", "input_exponent", "output_mantissa", "output_exponent", "input_bits")

    def __init__(self, image_shape, input_scale: float, output_scale: float, input_bits: int):
        numbers = {"input_bits": input_bits}
        for name, scale in (("input", input_scale), ("output", output_scale)):
            mantissa, exponent = math.frexp(float(scale))
            numbers |= {f"{name}_mantissa": int(mantissa * 2.0**53), f"{name}_exponent": exponent - 53}
        super().__init__(**numbers)
        self.image_shape = tuple(image_shape)

    def check_images(self, x: torch.Tensor) -> None:
        expected = f"[B, {', '.join(map(str, self.image_shape))}], made by quantize_input"
        check_input(self, "x", x, (torch.int8,), expected, (None, *self.image_shape))

    @property
    def input_scale(self) -> float:
        """What a step of the input is worth."""
        return math.ldexp(self.input_mantissa, self.input_exponent)

    @property
    def output_scale(self) -> float:
        """What a step of the logits is worth."""
        return math.ldexp(self.output_mantissa, self.output_exponent)

    def quantize_input(self, images: torch.Tensor) -> torch.Tensor:
        """Float images, normalised as the float model takes them, in int8: [B, C, H, W]."""
        if not images.is_floating_point():
            raise _checks.type_error(type(self).__name__, "images", "floating point", images.dtype)
        return torch.round(images.double() / self.input_scale).clamp(*ends(self.input_bits)).to(torch.int8)

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Float images to float logits: quantised, :meth:`forward`, and multiplied by the scale."""
        return self(self.quantize_input(images)).to(images.dtype) * self.output_scale


class IntegerViT(_Model):
    """A ViT, DeiT or distilled DeiT: int8 images [B, C, H, W] -> int16 logits [B, classes], in steps of output_scale.

    `quantize_input` makes the images, `predict` does both and goes back to floating point.
    """

    def __init__(self, patch_size, image_shape, embed, prefix, position, norm_pre, blocks, pooling, norm, pool,
                 fc_norm, head, head_dist, input_scale, output_scale, input_bits):  # fmt: skip
        super().__init__(image_shape, input_scale, output_scale, input_bits)
        self.patch_size = tuple(patch_size)
        self.pooling = pooling  # (first token, one behind the last or None, how): "token", "mean" or "distilled"
        self.embed, self.norm_pre, self.norm, self.fc_norm = embed, norm_pre, norm, fc_norm
        self.blocks = nn.ModuleList(blocks)
        self.pool = pool
        self.head, self.head_dist = head, head_dist
        self.hold("prefix", prefix)  # [1, tokens, C] int16: class and distillation tokens, with their positions
        self.hold("position", position)  # [1, L, C] int16, of the patches

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """int8 images -> int16 tokens behind the last block."""
        self.check_images(x)
        x = patches(x, self.patch_size).flatten(1, 2)
        B, L, _ = x.shape
        x = self.embed(x, None if self.position is None else self.position.expand(B, L, -1))
        if self.prefix is not None:
            x = torch.cat((self.prefix.expand(B, -1, -1), x), 1)
        x = x if self.norm_pre is None else self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        first, last, how = self.pooling
        x = x[:, first:last]
        x = x if self.norm is None else self.norm(x)
        if how == "mean":
            x = x.sum(1, keepdim=True, dtype=torch.int32)
        x = x if self.pool is None else self.pool(x)
        x = x if self.fc_norm is None else self.fc_norm(x)
        logits = self.head(x[:, 0])
        return logits if how != "distilled" else self.head_dist(x[:, 1], logits)


class IntegerPatchMerging(nn.Module):
    """Swin's: 2 x 2 neighbours side by side, LayerNorm, a projection: int16 [B, H, W, C] -> [B, H / 2, W / 2, 2 C]."""

    def __init__(self, norm, reduction):
        super().__init__()
        self.norm, self.reduction = norm, reduction

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduction(self.norm(merged(x)))


def merged(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] -> [B, H / 2, W / 2, 4 C], padded with 0 to even sizes."""
    if x.shape[1] % 2 or x.shape[2] % 2:
        x = torch.constant_pad_nd(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2), 0)
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)


class IntegerSwin(_Model):
    """A Swin Transformer: int8 images [B, C, H, W] -> int16 logits [B, classes], in steps of output_scale."""

    def __init__(self, patch_size, image_shape, embed, embed_norm, stages, norm, pool, head, input_scale, output_scale,
                 input_bits):  # fmt: skip
        super().__init__(image_shape, input_scale, output_scale, input_bits)
        self.patch_size = tuple(patch_size)
        self.embed, self.embed_norm, self.norm, self.pool, self.head = embed, embed_norm, norm, pool, head
        self.stages = nn.ModuleList(stages)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """int8 images -> int16 map [B, H, W, C] behind the last block."""
        self.check_images(x)
        x = self.embed(patches(x, self.patch_size))
        x = x if self.embed_norm is None else self.embed_norm(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.features(x)).flatten(1, 2)
        return self.head(self.pool(x.sum(1, dtype=torch.int32)))
