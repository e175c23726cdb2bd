"""DualToken-ViT: local features by convolution, global ones by few position-aware tokens that attend to the map."""

from contextlib import nullcontext

import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops._dispatcher import in_transform
from ._ops import linear_attention
from ._tokens import convolve, head_dim
from .window_attention import pair


class TokenToMapAttention(nn.Module):
    """Attention whose queries are a map's tokens and whose keys and values are few global tokens.

    `feature_map=None` is softmax attention, as in the paper. "relu", "elu1" or "exp" make it linear attention
    phi(q) S / (phi(q) . z + eps): the tokens are summarised once, [d, d] per head, and the map is read once.
    """

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, feature_map=None, eps=1e-6, attn_drop=0.0, proj_drop=0.0,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        head_dim(self, dim, num_heads)
        if feature_map not in (None, "relu", "elu1", "exp"):
            raise ValueError(
                f"effvit::TokenToMapAttention: feature_map must be None, 'relu', 'elu1' or 'exp', got {feature_map!r}"
            )
        if feature_map is not None and attn_drop:
            raise ValueError(
                f"effvit::TokenToMapAttention: attn_drop must be 0 with a feature_map, which forms no attention "
                f"matrix, got {attn_drop}"
            )
        self.num_heads = num_heads
        self.feature_map = feature_map
        self.eps = eps
        self.attn_drop = attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, tokens):
        """x [B, L, dim], tokens [B, T, dim] (or [1, T, dim]) -> [B, L, dim]."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        if self.feature_map is None:
            p = self.attn_drop if self.training else 0.0
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            # PyTorch's fused kernels have no forward mode
            with sdpa_kernel(SDPBackend.MATH) if in_transform() else nullcontext():
                out = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)
        else:
            k, v = (t.expand(x.shape[0], -1, -1, -1) for t in (k, v))
            out = linear_attention(q, k, v, feature_map=self.feature_map, normalize="sum", eps=self.eps)
        return self.proj_drop(self.proj(out.flatten(2)))

    def extra_repr(self):
        return f"heads={self.num_heads}, feature_map={self.feature_map}"


class ConvEncoder(nn.Module):
    """The local branch, a ConvNeXt block: x + pw2(GELU(pw1(LN(dw7(x))))) on x [B, H, W, dim]."""

    def __init__(self, dim, kernel_size=7, expansion=4, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.pw1 = nn.Linear(dim, expansion * dim, **factory)
        self.act = nn.GELU()
        self.pw2 = nn.Linear(expansion * dim, dim, **factory)

    def forward(self, x):
        y = convolve(self.dw, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.pw2(self.act(self.pw1(self.norm(y))))


class TokenMlp(nn.Module):
    """G + MLP(LN(G)) on global tokens [B, T, dim]; with `mix`, the MLP runs over the T tokens instead of channels."""

    def __init__(self, dim, num_tokens, mix=False, expansion=4, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        width = num_tokens if mix else dim
        self.mix = mix
        self.norm = nn.LayerNorm(dim, **factory)
        self.fc1 = nn.Linear(width, width if mix else expansion * width, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width if mix else expansion * width, width, **factory)

    def forward(self, tokens):
        y = self.norm(tokens)
        y = self.fc2(self.act(self.fc1(y.mT if self.mix else y)))
        return tokens + (y.mT if self.mix else y)


class PositionAwareTokenModule(nn.Module):
    """DualToken-ViT's global branch (arXiv:2309.12424): (map, global tokens) -> (global map, new global tokens).

    1. `num_downsamples` times a depthwise 3x3 convolution and 2x2 average pooling; what is left is average-pooled to
       `token_size` where it is of another size;
    2. self-attention among these T = th * tw tokens;
    3. position-aware tokens: alpha * tokens + (1 - alpha) * aggregated, then an MLP (over tokens with `mix_mlp`).
       Each token is one place of the map, so the weighted sum keeps positions;
    4. `TokenToMapAttention` sends them to every place of the map, L = H*W queries on T keys.
    """

    def __init__(
        self, dim, num_heads=8, token_size=7, num_downsamples=2, alpha=0.5, mix_mlp=False, qkv_bias=False,
        feature_map=None, attn_drop=0.0, proj_drop=0.0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.token_size = pair(token_size)
        self.alpha = alpha
        self.downsample = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory) for _ in range(num_downsamples)
        )
        self.aggregate = TokenToMapAttention(dim, num_heads, qkv_bias, None, 0.0, attn_drop, proj_drop, **factory)
        self.mlp = TokenMlp(dim, self.token_size[0] * self.token_size[1], mix_mlp, **factory)
        drop = attn_drop if feature_map is None else 0.0
        self.broadcast = TokenToMapAttention(
            dim, num_heads, qkv_bias, feature_map, attn_drop=drop, proj_drop=proj_drop, **factory
        )

    def forward(self, x, tokens):
        """x [B, H, W, dim], tokens [B, T, dim] (or [1, T, dim]) -> [B, H, W, dim], [B, T, dim]."""
        y = x.permute(0, 3, 1, 2)
        for conv in self.downsample:
            y = F.avg_pool2d(convolve(conv, y), 2, ceil_mode=True)
        if tuple(y.shape[2:]) != self.token_size:
            y = F.adaptive_avg_pool2d(y, self.token_size)
        y = y.flatten(2).mT
        y = self.aggregate(y, y)
        tokens = self.mlp(self.alpha * tokens + (1 - self.alpha) * y)
        return self.broadcast(x.flatten(1, 2), tokens).unflatten(1, x.shape[1:3]), tokens


class DualTokenAttention(nn.Module):
    """The attention part of a Dual Token Block: `ConvEncoder`, `PositionAwareTokenModule`, and the sum of both.

    x [B, H, W, dim], tokens [B, T, dim] -> the same. The authors published no code: names and state_dict are this
    module's own, and what the paper leaves open is stated here and in `PositionAwareTokenModule`.
    """

    def __init__(self, dim, num_heads=8, kernel_size=7, device=None, dtype=None, **kwargs):
        super().__init__()
        self.local = ConvEncoder(dim, kernel_size, device=device, dtype=dtype)
        self.position_aware = PositionAwareTokenModule(dim, num_heads, device=device, dtype=dtype, **kwargs)

    def forward(self, x, tokens):
        x = self.local(x)
        y, tokens = self.position_aware(x, tokens)
        return x + y, tokens
