"""MPCViT's attention: per head ReLU-softmax or scaling (linear) attention, or a mixture under search; and XNorm."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import apply_state, linear_attention, linear_state
from ._tokens import head_dim
from ._written import LastRead


class MPCViTAttention(nn.Module):
    """MPCViT's heterogeneous attention (arXiv:2211.13955), a drop-in for `Attention` of its code; same state_dict.

    With s = q k^T / sqrt(d) over N tokens, and alpha [1, heads, 1, 1]::

        alpha * relu(s) / (sum_j relu(s)_j + 1e-5) + (1 - alpha) * s / N

    The first is ReLU-softmax attention: the ReLU acts on the scores, so its [N, N] exists. The second is scaling
    attention, linear in N. Search and training run both. Once every alpha is 0 or 1, `select_heads()` makes each head
    run only its own, until `deselect_heads()` or until a state_dict is loaded. In between alpha gets no gradient and
    stays 0 or 1: optimizers, which skip what has no gradient, leave it alone; what an average of weights or a decay
    that asks for no gradient does to it is undone in the next call, or when it is saved. ValueError there where alpha
    has become another selection.

    Active attention dropout acts on the scores: then all heads form them.

    Compared with PKU-SEC-Lab/mpcvit, src/utils/transformers.py at 27db5c4. That file runs selected heads alone: the
    mixture is in its comments, and a head whose alpha is neither 0 nor 1 there attends by raw scores.
    """

    eps = 1e-5

    def __init__(self, dim, num_heads=8, attention_dropout=0.1, projection_dropout=0.1, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = head_dim(self, dim, num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.attn_drop = nn.Dropout(attention_dropout)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(projection_dropout)
        self.alpha = nn.Parameter(torch.ones(1, num_heads, 1, 1, **factory))
        self.selected = None
        self.read = LastRead()  # of alpha, while heads are selected
        self.learned = True  # whether alpha got gradients before they were

    def _load_from_state_dict(self, *args, **kwargs):
        self.deselect_heads()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args, **kwargs):
        self.hold_selection()
        super()._save_to_state_dict(*args, **kwargs)

    def select_heads(self):
        """Heads whose alpha is 1 become ReLU-softmax attention, heads of 0 scaling attention; alpha gets no gradient.

        Returns self. Also after another selection.
        """
        alpha = self.alpha.flatten().tolist()
        if any(a not in (0.0, 1.0) for a in alpha):
            raise ValueError(f"effvit::MPCViTAttention: alpha must be 0 or 1 for every head, got {alpha}")
        self.deselect_heads()
        self.selected = tuple(a == 1.0 for a in alpha)
        self.learned = self.alpha.requires_grad
        self.alpha.requires_grad_(False)
        self.alpha.grad = None  # with one, even of zeros, an optimizer's weight decay would move alpha
        return self

    def deselect_heads(self):
        """Back to the mixture of both; alpha gets gradients if it did before `select_heads()`. Returns self."""
        if self.selected is not None:
            self.selected = None
            self.alpha.requires_grad_(self.learned)
        return self

    def hold_selection(self):
        """While heads are selected: alpha back to 0 and 1 where it has moved; ValueError where it selects others.

        Not inside a compiler or a transform, nor for what has no values. `forward` does not read alpha there either.
        """
        known = self.selected is None or self.read.is_current(self.alpha)
        if known or torch.compiler.is_compiling() or type(self.alpha) is not nn.Parameter or self.alpha.is_meta:
            return
        alpha = self.alpha.flatten().tolist()
        if tuple(a > 0.5 for a in alpha) != self.selected:
            selected = [float(s) for s in self.selected]
            raise ValueError(
                f"effvit::MPCViTAttention: alpha must be {selected}, as when select_heads() was called, got {alpha}: "
                "call it again, or deselect_heads()"
            )
        if any(a not in (0.0, 1.0) for a in alpha):
            with torch.no_grad():
                self.alpha.copy_(self.alpha > 0.5)
        self.read.remember(self.alpha)

    def forward(self, x):
        """x [B, N, dim] -> [B, N, dim]."""
        self.hold_selection()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.attn_drop.training and self.attn_drop.p > 0.0:
            out = self.with_dropout(q, k, v)
        elif self.selected is None:
            alpha = self.alpha.view(self.num_heads, 1)
            out = alpha * self.relu_softmax(q, k, v) + (1 - alpha) * self.scaling(q, k, v)
        elif all(self.selected):
            out = self.relu_softmax(q, k, v)
        elif not any(self.selected):
            out = self.scaling(q, k, v)
        else:
            out = self.each_head(q, k, v)
        return self.proj_drop(self.proj(out.flatten(2)))

    def scores(self, q, k):
        return (q.transpose(1, 2) * self.scale) @ k.permute(0, 2, 3, 1)  # [B, heads, N, N]

    def relu_softmax(self, q, k, v):
        """[B, N, heads, d] each -> the same."""
        return (self.normalised(self.scores(q, k)).to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)

    def normalised(self, scores):
        """relu(s) / (sum relu(s) + eps), the sum in float32: the products with v could exceed float16 before it."""
        relu = F.relu(scores)
        return relu / (relu.sum(-1, keepdim=True, dtype=torch.promote_types(relu.dtype, torch.float32)) + self.eps)

    def scaling(self, q, k, v):
        """[B, N, heads, d] each -> the same."""
        return linear_attention(q, k, v, feature_map="none", normalize="none", scale=self.scale / k.shape[1])

    def each_head(self, q, k, v):
        """Runs of neighbouring heads of one kind, so that each run is a view."""
        outs, start = [], 0
        for end in range(1, self.num_heads + 1):
            if end == self.num_heads or self.selected[end] != self.selected[start]:
                kind = self.relu_softmax if self.selected[start] else self.scaling
                outs.append(kind(*(t[:, :, start:end] for t in (q, k, v))))
                start = end
        return torch.cat(outs, dim=2)

    def with_dropout(self, q, k, v):
        scores = self.scores(q, k)
        alpha = self.alpha if self.selected is None else self.alpha.detach()
        attn = alpha * self.normalised(scores) + (1 - alpha) * (scores / scores.shape[-1])
        return (self.attn_drop(attn).to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)

    def extra_repr(self):
        return f"heads={self.num_heads}, selected={self.selected}"


class XNormAttention(nn.Module):
    """The XNorm variant that MPCViT compares (of UFO-ViT, arXiv:2109.14382): XNorm(q) XNorm(k^T v), linear in N.

    XNorm(x) = gamma x / |x| over the last dim; gamma [1, heads, 1, 1] is `gamma_xnorm`, shared by both. Parameters
    otherwise as `MPCViTAttention`. |x| is at least 1e-12. Compared with what PKU-SEC-Lab/mpcvit at 27db5c4 has of it in
    the comments of src/utils/transformers.py; that never ran in a published model.
    """

    def __init__(self, dim, num_heads=8, projection_dropout=0.1, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        head_dim(self, dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(projection_dropout)
        self.gamma_xnorm = nn.Parameter(torch.randn(1, num_heads, 1, 1, **factory))

    def forward(self, x):
        """x [B, N, dim] -> [B, N, dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        state = linear_state(k, v)  # [B, heads, d, d], float32
        state = F.normalize(state, dim=-1) * self.gamma_xnorm.to(state.dtype)
        # 1e-12 is 0 in float16
        wide = F.normalize(q.to(state.dtype), dim=-1) * self.gamma_xnorm.view(self.num_heads, 1).to(state.dtype)
        out = apply_state(wide.to(q.dtype), state)
        return self.proj_drop(self.proj(out.flatten(2)))
