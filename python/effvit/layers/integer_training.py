"""Attention, MLP, blocks, ViT and Swin trained for integer-only inference; `deployed()` is the module that runs.

Parameters are named as in timm. Forward passes compute the deployed module's integers bit for bit, and gradients go
straight through. Dropout and stochastic depth of the original are left out.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..ops import _checks
from ..ops._integer import LARGEST
from .integer import (
    IntGELU,
    IntLayerNorm,
    IntSoftmax,
    QuantAct,
    Quantised,
    QuantLinear,
    QuantMatMul,
    check_quantised,
    computed,
)
from .integer_inference import (
    IntegerAttention,
    IntegerBlock,
    IntegerLayerNorm,
    IntegerLinear,
    IntegerMLP,
    IntegerPatchMerging,
    IntegerRequantise,
    IntegerSwin,
    IntegerViT,
    Windows,
    merged,
)


@dataclasses.dataclass(frozen=True)
class IntegerBits:
    """Bits of every kind of number in an integer-only model.

    Args:
        weights: 2 to 8.
        activations: what is multiplied by weights, queries, keys and values: 2 to 8.
        residual: what blocks add to, 9 to 16.
        scores: of attention, before Shiftmax: 8 to 16. I-ViT has 8; 16 cost nothing here.
        softmax: of Shiftmax's results, 2 to 16: steps of 2^(1 - bits). Many keys need many: I-ViT's ViT has 16, its
            Swin 8.
        gelu: of ShiftGELU's sigmoid, 2 to 16.
        logits: 9 to 16.
    """

    weights: int = 8
    activations: int = 8
    residual: int = 16
    scores: int = 16
    softmax: int = 16
    gelu: int = 8
    logits: int = 16

    def __post_init__(self):
        limits = {
            "weights": (2, 8), "activations": (2, 8), "residual": (9, 16), "scores": (8, 16), "softmax": (2, 16),
            "gelu": (2, 16), "logits": (9, 16),
        }  # fmt: skip
        for name, ends in limits.items():
            _checks.as_int("IntegerBits", name, getattr(self, name), ends)


class LayerScale(nn.Module):
    """A factor for each channel, which scales of integers take up."""

    def __init__(self, gamma: torch.Tensor):
        super().__init__()
        self.gamma = nn.Parameter(gamma.detach().clone())


def layer_scaled(x: Quantised, ls: LayerScale | None) -> Quantised:
    return x if ls is None else x.scaled(ls.gamma)


def deployed_linear(linear, x_scale, act: QuantAct, ls=None, residual=None, factor=1.0) -> IntegerLinear:
    """QuantLinear and the QuantAct behind it; residual: the scale of what is added."""
    weight, bias, scale = linear.integers(x_scale)
    scale = scale * factor if ls is None else scale * ls.gamma.detach().double()
    rest = None if residual is None else act.constants(residual, len(weight))
    return IntegerLinear(weight, bias, act.constants(scale, len(weight)), rest, act.bits)


def deployed_norm(norm: IntLayerNorm, act: QuantAct) -> IntegerLayerNorm:
    return IntegerLayerNorm(*norm.constants_for(act.scale[0]), act.bits)


def numbers(act: QuantAct, scale: torch.Tensor) -> tuple[int, int]:
    """Multiplier and shift of a whole tensor, from steps of `scale` to those of act."""
    m, c = act.constants(scale, 1)
    if int(m) == 0:
        raise _checks.value_error("QuantAct", "scale", "at least 2^-31 of the result's", float(scale))
    return int(m), int(c)


class QuantAttention(nn.Module):
    """Self-attention of timm's ViT, or of its Swin with a window: what IntegerAttention will compute, before the last
    requantisation. x: Quantised [B, L, C], or [B, H, W, C] with a window.

    table [offsets, heads], index [L, L], mask [windows, L, L] or None: Swin's relative position bias.
    """

    def __init__(self, qkv, proj, num_heads, head_dim, bits, q_norm=None, k_norm=None, window=None, shift=(0, 0),
                 table=None, index=None, mask=None):  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, head_dim**-0.5
        self.qkv = QuantLinear.from_linear(qkv, bits.weights)
        self.qkv_act = QuantAct(bits.activations, groups=3)
        self.q_norm, self.k_norm = (None if m is None else IntLayerNorm.from_norm(m) for m in (q_norm, k_norm))
        self.q_act, self.k_act = (None if m is None else QuantAct(bits.activations) for m in (q_norm, k_norm))
        self.scores = QuantMatMul(transpose_b=True)
        self.scores_act = QuantAct(bits.scores)
        self.softmax = IntSoftmax(bits.softmax)
        self.context = QuantMatMul()
        self.context_act = QuantAct(bits.activations)
        self.proj = QuantLinear.from_linear(proj, bits.weights)
        self.windows = None if window is None else Windows(window, shift)
        self.relative_position_bias_table = None if table is None else nn.Parameter(table.detach().clone())
        self.register_buffer("relative_position_index", index, persistent=False)
        self.register_buffer("attn_mask", mask, persistent=False)

    def integer_bias(self, scale: torch.Tensor) -> torch.Tensor | None:
        """[windows, heads, L, L] int32 in steps of the scores."""
        if self.relative_position_bias_table is None:
            return None
        table = torch.round(self.relative_position_bias_table.detach().double() / scale).clamp(-LARGEST, LARGEST)
        bias = table[self.relative_position_index].permute(2, 0, 1)[None].long()
        if self.attn_mask is not None:
            bias = bias + torch.round(self.attn_mask.double() / scale)[:, None].long()
        return bias.clamp(-LARGEST - 1, LARGEST).to(torch.int32)

    def float_bias(self) -> torch.Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        return bias if self.attn_mask is None else bias + self.attn_mask[:, None]

    def biased(self, x: Quantised) -> Quantised:
        """Scores [B * windows, heads, L, L] plus the bias of their window."""
        if self.relative_position_bias_table is None:
            return x

        def smooth():
            bias = self.float_bias().to(x.dtype)
            return (x.value.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)

        if x.integers is None:
            return Quantised(smooth())
        bias = self.integer_bias(x.scale)
        total = (x.integers.unflatten(0, (-1, len(bias))).long() + bias).clamp(-LARGEST - 1, LARGEST)
        return computed(smooth, total.flatten(0, 1).to(torch.int32), x.scale, x)

    def heads(self, x: Quantised) -> list[Quantised]:
        """Queries, keys and values, [B, L, heads, head_dim] each."""
        groups = x.map(lambda t: t.unflatten(-1, (3, self.num_heads, self.head_dim)))
        return [
            Quantised(
                groups.value[..., i, :, :] if x.integers is None or torch.is_grad_enabled() else None,
                None if x.integers is None else groups.integers[..., i, :, :],
                None if x.integers is None else self.qkv_act.scale[i],
                x.dtype,
            )
            for i in range(3)
        ]

    def forward(self, x: Quantised) -> Quantised:
        check_quantised("QuantAttention", "x", x)
        size = x.shape[1:3]
        if self.windows is not None:
            x = x.map(self.windows.split)
        q, k, v = self.heads(self.qkv_act(self.qkv(x)))
        q = q if self.q_norm is None else self.q_act(q, norm=self.q_norm)
        k = k if self.k_norm is None else self.k_act(k, norm=self.k_norm)
        q, k, v = (t.map(lambda t: t.transpose(1, 2)) for t in (q, k, v))
        scores = self.biased(self.scores_act(self.scores(q, k).scaled(self.scale)))
        out = self.context(self.softmax(scores), v).map(lambda t: t.transpose(1, 2).flatten(2))
        out = self.context_act(out)
        if self.windows is not None:
            out = out.map(lambda t: self.windows.join(t, *size))
        return self.proj(out)

    def deployed(self, x_scale, act: QuantAct, ls=None, residual=None) -> IntegerAttention:
        """act: the QuantAct behind this; residual: the scale of what it adds."""
        q_scale, k_scale, v_scale = self.qkv_act.scale
        q_scale = q_scale if self.q_act is None else self.q_act.scale[0]
        k_scale = k_scale if self.k_act is None else self.k_act.scale[0]
        score_scale = self.scores_act.scale[0]
        score_m, score_c = numbers(self.scores_act, q_scale * k_scale * self.scale)
        m, c = numbers(self.context_act, 2.0 ** (1 - self.softmax.bits) * v_scale)
        options = self.softmax.options(score_scale)
        return IntegerAttention(
            self.num_heads, self.head_dim,
            deployed_linear(self.qkv, x_scale, self.qkv_act),
            deployed_linear(self.proj, self.context_act.scale[0], act, ls, residual),
            bias=self.integer_bias(score_scale),
            window=None if self.windows is None else self.windows.size,
            window_shift=(0, 0) if self.windows is None else self.windows.shift,
            q_norm=None if self.q_norm is None else deployed_norm(self.q_norm, self.q_act),
            k_norm=None if self.k_norm is None else deployed_norm(self.k_norm, self.k_act),
            score_multiplier=score_m, score_shift=score_c, score_bits=self.scores_act.bits, x0=options["x0"],
            n=options["n"], softmax_bits=options["bits"], multiplier=m, shift=c, bits=self.context_act.bits,
        )  # fmt: skip


class QuantMLP(nn.Module):
    """fc1, ShiftGELU, fc2 on a Quantised [..., C]: what IntegerMLP will compute, before the last requantisation."""

    def __init__(self, fc1, fc2, bits, approximate: str = "none"):
        super().__init__()
        self.fc1 = QuantLinear.from_linear(fc1, bits.weights)
        self.fc1_act = QuantAct(bits.activations)
        self.act = IntGELU(bits.gelu, approximate=approximate)
        self.act_act = QuantAct(bits.activations)
        self.fc2 = QuantLinear.from_linear(fc2, bits.weights)

    def forward(self, x: Quantised) -> Quantised:
        return self.fc2(self.act_act(self.act(self.fc1_act(self.fc1(x)))))

    def deployed(self, x_scale, act: QuantAct, ls=None, residual=None) -> IntegerMLP:
        options = self.act.options(self.fc1_act.scale[0])
        m, c = numbers(self.act_act, self.fc1_act.scale[0] * 2.0 ** (1 - self.act.bits))
        return IntegerMLP(
            deployed_linear(self.fc1, x_scale, self.fc1_act),
            deployed_linear(self.fc2, self.act_act.scale[0], act, ls, residual),
            x0=options["x0"], n=options["n"], gelu_bits=options["bits"], multiplier=m, shift=c, bits=self.act_act.bits,
        )  # fmt: skip


class QuantBlock(nn.Module):
    """A transformer block of timm's ViT or Swin on a Quantised residual, which it returns."""

    def __init__(self, norm1, attn, norm2, mlp, bits, ls1=None, ls2=None):
        super().__init__()
        self.norm1, self.norm1_act = norm1, QuantAct(bits.activations)
        self.attn, self.ls1 = attn, None if ls1 is None else LayerScale(ls1)
        self.attn_residual = QuantAct(bits.residual)
        self.norm2, self.norm2_act = norm2, QuantAct(bits.activations)
        self.mlp, self.ls2 = mlp, None if ls2 is None else LayerScale(ls2)
        self.mlp_residual = QuantAct(bits.residual)

    def forward(self, x: Quantised) -> Quantised:
        x = self.attn_residual(layer_scaled(self.attn(self.norm1_act(x, norm=self.norm1)), self.ls1), x)
        return self.mlp_residual(layer_scaled(self.mlp(self.norm2_act(x, norm=self.norm2)), self.ls2), x)

    def deployed(self, x_scale: torch.Tensor) -> tuple[IntegerBlock, torch.Tensor]:
        """(the block for a residual of this scale, the scale of what it returns)"""
        middle, last = self.attn_residual.scale[0], self.mlp_residual.scale[0]
        block = IntegerBlock(
            deployed_norm(self.norm1, self.norm1_act),
            self.attn.deployed(self.norm1_act.scale[0], self.attn_residual, self.ls1, x_scale),
            deployed_norm(self.norm2, self.norm2_act),
            self.mlp.deployed(self.norm2_act.scale[0], self.mlp_residual, self.ls2, middle),
        )
        return block, last


class QuantPatchEmbed(nn.Module):
    """Pixels to tokens; norm: Swin's."""

    def __init__(self, proj, norm=None):
        super().__init__()
        self.proj, self.norm = proj, norm


class _Model(nn.Module):
    """What QuantViT and QuantSwin share."""

    def quantised(self, images: torch.Tensor) -> Quantised:
        """The logits with their integers; images in floating point."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float images to float logits, through the integers."""
        return self.quantised(images).value

    def float_(self, yes: bool = True):
        """Compute what the float model does, or (`False`) integers again."""
        self.input_act.quantising = not yes
        return self


class QuantViT(_Model):
    """timm's VisionTransformer, trained for IntegerViT. Made by `effvit.prepare_integer`."""

    def __init__(self, conv, prefix, position, blocks, bits, image_size, no_embed_class=False, pooling=(0, 1, "token"),
                 norm_pre=None, norm=None, fc_norm=None, head=None, head_dist=None):  # fmt: skip
        super().__init__()
        self.input_act = QuantAct(bits.activations)
        self.patch_embed = QuantPatchEmbed(conv)
        for name, token in prefix.items():  # cls_token, dist_token, reg_token
            self.register_parameter(name, nn.Parameter(token.detach().clone()))
        self.prefix_names = tuple(prefix)
        self.pos_embed = None if position is None else nn.Parameter(position.detach().clone())
        self.image_size, self.no_embed_class, self.pooling = tuple(image_size), no_embed_class, pooling
        self.embed_act = QuantAct(bits.residual)
        self.norm_pre, self.norm_pre_act = norm_pre, None if norm_pre is None else QuantAct(bits.residual)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.norm_act = norm, None if norm is None else QuantAct(bits.activations)
        pooled = pooling[2] == "mean" or (norm is None and fc_norm is None)
        self.pool_act = QuantAct(bits.activations if fc_norm is None else bits.residual) if pooled else None
        self.fc_norm, self.fc_norm_act = fc_norm, None if fc_norm is None else QuantAct(bits.activations)
        self.head, self.head_dist, self.logits_act = head, head_dist, QuantAct(bits.logits)

    def embeddings(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(what stands before the patches, what is added to them) in floating point."""
        tokens = [getattr(self, name) for name in self.prefix_names]
        prefix = torch.cat(tokens, 1) if tokens else None
        if prefix is None or self.pos_embed is None or self.no_embed_class:
            return prefix, self.pos_embed
        count = prefix.shape[1]
        return prefix + self.pos_embed[:, :count], self.pos_embed[:, count:]

    def quantised(self, images: torch.Tensor) -> Quantised:
        if tuple(images.shape[2:]) != self.image_size:
            raise _checks.value_error("QuantViT", "images", f"[B, C, {self.image_size}]", list(images.shape))
        x = self.patch_embed.proj(self.input_act(images)).map(lambda t: t.flatten(1, 2))
        prefix, position = self.embeddings()
        x = self.embed_act(x, position, also=() if prefix is None else (prefix,))
        if prefix is not None:
            x = self._joined(prefix, x)
        if self.norm_pre is not None:
            x = self.norm_pre_act(x, norm=self.norm_pre)
        for block in self.blocks:
            x = block(x)
        first, last, how = self.pooling
        x = x.map(lambda t: t[:, first:last])
        if self.norm is not None:
            x = self.norm_act(x, norm=self.norm)
        if how == "mean":
            x = mean(x)
        if self.pool_act is not None:
            x = self.pool_act(x)
        if self.fc_norm is not None:
            x = self.fc_norm_act(x, norm=self.fc_norm)
        logits = self.head(x.map(lambda t: t[:, 0]))
        if how != "distilled":
            return self.logits_act(logits)
        return self.logits_act(self.head_dist(x.map(lambda t: t[:, 1])).scaled(0.5), logits.scaled(0.5))

    def _joined(self, prefix: torch.Tensor, x: Quantised) -> Quantised:
        B = x.shape[0]
        if x.integers is None:
            return Quantised(torch.cat((prefix.to(x.dtype).expand(B, -1, -1), x.value), 1))
        q = self.embed_act.of_parameter(prefix)
        joined = torch.cat((q.integers.expand(B, -1, -1), x.integers), 1)
        return computed(lambda: torch.cat((q.value.to(x.dtype).expand(B, -1, -1), x.value), 1), joined, x.scale, x)

    @torch.no_grad()
    def deployed(self) -> IntegerViT:
        """The integer-only model that computes the same integers."""
        prefix, position = self.embeddings()
        conv, embed = self.patch_embed.proj, self.embed_act
        scale, residual = embed.scale[0], None if position is None else embed.scale[0]
        first = deployed_linear(conv, self.input_act.scale[0], embed, residual=residual)
        norm_pre = norm = fc_norm = pool = None
        if self.norm_pre is not None:
            norm_pre, scale = deployed_norm(self.norm_pre, self.norm_pre_act), self.norm_pre_act.scale[0]
        blocks = []
        for block in self.blocks:
            made, scale = block.deployed(scale)
            blocks.append(made)
        if self.norm is not None:
            norm, scale = deployed_norm(self.norm, self.norm_act), self.norm_act.scale[0]
        if self.pool_act is not None:
            count = first_to_last(self.pooling, self.image_size, conv.kernel_size, prefix)
            scale = scale / count if self.pooling[2] == "mean" else scale
            pool, scale = deployed_requantise(self.pool_act, scale, self.head.in_features), self.pool_act.scale[0]
        if self.fc_norm is not None:
            fc_norm, scale = deployed_norm(self.fc_norm, self.fc_norm_act), self.fc_norm_act.scale[0]
        act, dist = self.logits_act, None
        if self.head_dist is None:
            head = deployed_linear(self.head, scale, act)
        else:
            weight, bias, logits_scale = self.head.integers(scale)
            head = IntegerLinear(weight, bias)
            dist = deployed_linear(self.head_dist, scale, act, residual=logits_scale * 0.5, factor=0.5)
        return IntegerViT(
            conv.kernel_size, (conv.in_channels, *self.image_size), first,
            None if prefix is None else embed.rounded(prefix), None if position is None else embed.rounded(position),
            norm_pre, blocks, self.pooling, norm, pool, fc_norm, head, dist, self.input_act.scale[0],
            act.scale[0], self.input_act.bits,
        )  # fmt: skip


def first_to_last(pooling, image_size, patch_size, prefix) -> int:
    """How many tokens a pooling averages."""
    tokens = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
    tokens += 0 if prefix is None else prefix.shape[1]
    return len(range(tokens)[slice(*pooling[:2])])


def deployed_requantise(act: QuantAct, scale: torch.Tensor, count: int) -> IntegerRequantise:
    return IntegerRequantise(act.constants(scale, count), act.bits)


def mean(x: Quantised) -> Quantised:
    """Over dim 1 of [B, L, C], which stays with size 1: exact sums, the scale divided by L."""
    count = x.shape[1]
    if count > 65535:
        raise _checks.value_error("mean", "x", "at most 65535 tokens", count)
    if x.integers is None:
        return Quantised(x.value.mean(1, keepdim=True))
    total = x.integers.sum(1, keepdim=True, dtype=torch.int32)
    return computed(lambda: x.value.mean(1, keepdim=True), total, x.scale / count, x)


class QuantPatchMerging(nn.Module):
    """Swin's, on a Quantised map [B, H, W, C]."""

    def __init__(self, norm, reduction, bits):
        super().__init__()
        self.norm, self.norm_act = norm, QuantAct(bits.activations)
        self.reduction, self.reduction_act = reduction, QuantAct(bits.residual)

    def forward(self, x: Quantised) -> Quantised:
        check_quantised("QuantPatchMerging", "x", x)
        return self.reduction_act(self.reduction(self.norm_act(x.map(merged), norm=self.norm)))

    def deployed(self) -> tuple[IntegerPatchMerging, torch.Tensor]:
        reduction = deployed_linear(self.reduction, self.norm_act.scale[0], self.reduction_act)
        return IntegerPatchMerging(deployed_norm(self.norm, self.norm_act), reduction), self.reduction_act.scale[0]


class QuantStage(nn.Module):
    """A stage of Swin: perhaps patch merging, then blocks."""

    def __init__(self, downsample, blocks):
        super().__init__()
        self.downsample, self.blocks = downsample, nn.ModuleList(blocks)

    def forward(self, x: Quantised) -> Quantised:
        x = x if self.downsample is None else self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x

    def deployed(self, scale: torch.Tensor) -> tuple[nn.Sequential, torch.Tensor]:
        made = []
        if self.downsample is not None:
            merging, scale = self.downsample.deployed()
            made.append(merging)
        for block in self.blocks:
            other, scale = block.deployed(scale)
            made.append(other)
        return nn.Sequential(*made), scale


class Head(nn.Module):
    def __init__(self, fc):
        super().__init__()
        self.fc = fc


class QuantSwin(_Model):
    """timm's SwinTransformer, trained for IntegerSwin. Made by `effvit.prepare_integer`."""

    def __init__(self, conv, embed_norm, stages, norm, fc, bits, image_size):
        super().__init__()
        self.image_size = tuple(image_size)
        self.input_act = QuantAct(bits.activations)
        self.patch_embed = QuantPatchEmbed(conv, embed_norm)
        self.embed_act = QuantAct(bits.residual)
        self.embed_norm_act = None if embed_norm is None else QuantAct(bits.residual)
        self.layers = nn.ModuleList(stages)
        self.norm, self.norm_act, self.pool_act = norm, QuantAct(bits.activations), QuantAct(bits.activations)
        self.head, self.logits_act = Head(fc), QuantAct(bits.logits)

    def quantised(self, images: torch.Tensor) -> Quantised:
        if tuple(images.shape[2:]) != self.image_size:
            raise _checks.value_error("QuantSwin", "images", f"[B, C, {self.image_size}]", list(images.shape))
        x = self.embed_act(self.patch_embed.proj(self.input_act(images)))
        if self.patch_embed.norm is not None:
            x = self.embed_norm_act(x, norm=self.patch_embed.norm)
        for stage in self.layers:
            x = stage(x)
        x = self.norm_act(x, norm=self.norm).map(lambda t: t.flatten(1, 2))
        x = self.pool_act(mean(x)).map(lambda t: t[:, 0])
        return self.logits_act(self.head.fc(x))

    @torch.no_grad()
    def deployed(self) -> IntegerSwin:
        """The integer-only model that computes the same integers."""
        conv, norm = self.patch_embed.proj, None
        embed, scale = deployed_linear(conv, self.input_act.scale[0], self.embed_act), self.embed_act.scale[0]
        if self.patch_embed.norm is not None:
            norm, scale = deployed_norm(self.patch_embed.norm, self.embed_norm_act), self.embed_norm_act.scale[0]
        stages = []
        for stage in self.layers:
            made, scale = stage.deployed(scale)
            stages.append(made)
        size = [n // k for n, k in zip(self.image_size, conv.kernel_size, strict=True)]
        for stage in self.layers:
            size = size if stage.downsample is None else [(n + 1) // 2 for n in size]
        fc = self.head.fc
        pool = deployed_requantise(self.pool_act, self.norm_act.scale[0] / (size[0] * size[1]), fc.in_features)
        return IntegerSwin(
            conv.kernel_size, (conv.in_channels, *self.image_size), embed, norm, stages,
            deployed_norm(self.norm, self.norm_act), pool,
            deployed_linear(fc, self.pool_act.scale[0], self.logits_act), self.input_act.scale[0],
            self.logits_act.scale[0], self.input_act.bits,
        )  # fmt: skip
