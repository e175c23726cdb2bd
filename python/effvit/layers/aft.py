"""The attention-free transformer's layers: full, local, simple, and convolutional."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import aft
from ._tokens import as_map, as_tokens, head_dim, same_padding


class AFTSimple(nn.Module):
    """AFT-simple (arXiv:2105.14103): a sigmoid gate on the mean of values weighted by exp(k), per channel.

    x [B, L, dim] -> [B, L, dim] through `hidden_dim` channels (None: dim), for sequences of any length.
    """

    def __init__(self, dim, hidden_dim=None, bias=True, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden_dim = hidden_dim or dim
        self.to_q = nn.Linear(dim, hidden_dim, bias=bias, **factory)
        self.to_k = nn.Linear(dim, hidden_dim, bias=bias, **factory)
        self.to_v = nn.Linear(dim, hidden_dim, bias=bias, **factory)
        self.proj = nn.Linear(hidden_dim, dim, bias=bias, **factory)

    def forward(self, x):
        return self.proj(self._mix(self.to_q(x), self.to_k(x), self.to_v(x)))

    def _mix(self, q, k, v):
        return aft(q, k, v)


class AFTFull(AFTSimple):
    """AFT-full: weights exp(k_j + w_ij) with a learned bias for every pair of up to `seq_len` tokens.

    `factor_dim` is the rank of w = pos_query pos_key^T, 128 in the paper; None: a whole matrix `pos_bias`. Shorter
    sequences take the first rows and columns of w.
    """

    window = 0

    def __init__(self, dim, seq_len, hidden_dim=None, factor_dim=128, bias=True, device=None, dtype=None):
        super().__init__(dim, hidden_dim, bias, device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.seq_len = seq_len
        self.factor_dim = factor_dim
        if factor_dim is None:
            self.pos_bias = nn.Parameter(torch.empty(seq_len, seq_len, **factory))
        else:
            self.pos_query = nn.Parameter(torch.empty(seq_len, factor_dim, **factory))
            self.pos_key = nn.Parameter(torch.empty(seq_len, factor_dim, **factory))
        for name, p in self.named_parameters(recurse=False):
            nn.init.normal_(p, std=0.01) if name.startswith("pos_") else None

    def position_bias(self, L):
        """w [L, L]."""
        if self.factor_dim is None:
            return self.pos_bias[:L, :L]
        return self.pos_query[:L] @ self.pos_key[:L].mT

    def _mix(self, q, k, v):
        L = q.shape[1]
        if L > self.seq_len:
            raise ValueError(
                f"effvit::{type(self).__name__}: x must be [B, L, C] with L up to {self.seq_len}, got {list(q.shape)}"
            )
        return aft(q, k, v, self.position_bias(L), window=self.window)

    def extra_repr(self):
        return f"seq_len={self.seq_len}, factor_dim={self.factor_dim}, window={self.window}"


class AFTLocal(AFTFull):
    """AFT-local: w_ij = 0 where |i - j| >= `window`, in the order of the tokens; these pairs count all the same."""

    def __init__(self, dim, seq_len, window, hidden_dim=None, factor_dim=128, bias=True, device=None, dtype=None):
        super().__init__(dim, seq_len, hidden_dim, factor_dim, bias, device, dtype)
        if window < 1:
            raise ValueError(f"effvit::AFTLocal: window must be at least 1, got {window}")
        self.window = window


class AFTConv(AFTSimple):
    """AFT-conv: w depends on the offset of two tokens of a map and on the head, and is 0 beyond `kernel_size`.

    x [B, H*W, dim], size (H, W) -> [B, H*W, dim]. With the channels of a head sharing its `weight` [heads, s, s]::

        sigmoid(q) * (conv(e v, exp(w) - 1) + sum e v) / (conv(e, exp(w) - 1) + sum e),    e = exp(k - max k)

    The convolution is depthwise and PyTorch's, in float32 for narrower inputs. Where a weight well below 0 meets a key
    far above all others, the sums above cancel: digits are lost from w of about -10 on, all of them from -17 on.
    """

    def __init__(self, dim, num_heads=4, kernel_size=11, hidden_dim=None, bias=True, device=None, dtype=None):
        super().__init__(dim, hidden_dim, bias, device, dtype)
        self.num_heads = num_heads
        self.channels = head_dim(self, hidden_dim or dim, num_heads)
        self.padding = same_padding(self, "kernel_size", kernel_size)
        self.weight = nn.Parameter(torch.empty(num_heads, kernel_size, kernel_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x, size):
        return self.proj(self._on_map(self.to_q(x), self.to_k(x), self.to_v(x), size))

    def _on_map(self, q, k, v, size):
        wide = torch.promote_types(k.dtype, torch.float32)
        device = q.device.type
        off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with off:
            k, v, w = k.to(wide), v.to(wide), self.weight.to(wide)
            e = torch.exp(k - k.amax(1, keepdim=True))
            both = torch.cat((e * v, e), dim=-1)
            kernel = torch.expm1(w).repeat_interleave(self.channels, 0).repeat(2, 1, 1)[:, None]
            near = F.conv2d(as_map(both, size), kernel, padding=self.padding, groups=both.shape[-1])
            numerator, denominator = (as_tokens(near) + both.sum(1, keepdim=True)).chunk(2, dim=-1)
            return (torch.sigmoid(q.to(wide)) * numerator / denominator).to(q.dtype)

    def extra_repr(self):
        return f"num_heads={self.num_heads}"
