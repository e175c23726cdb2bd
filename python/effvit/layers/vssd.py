"""VSSD's state space duality: the original's mixer and block, non-causal on one linear attention, causal by chunks."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import linear_attention
from ._tokens import as_map, as_tokens, convolve
from .swin_block import DropPath, Mlp
from .window_attention import pair


def ssd_scan(x, a, B, C, chunk_size, initial_state=None):
    """y_i = C_i S_i with S_i = exp(a_i) S_(i-1) + B_i^T x_i, in chunks of tokens: matrix products, differentiable.

    x [batch, L, h, P], a [batch, L, h], B and C [batch, L, g, N], all of one dtype, in which everything is computed;
    head i belongs to group i // (h / g). initial_state [h, N, P] or None for zeros. Returns y [batch, L, h, P].
    """
    L, h = a.shape[1:]
    g = B.shape[2]
    size = min(chunk_size, L)

    def chunks(t, groups):  # -> [batch, chunks, size, g, h / g or 1, ..]; padding neither decays a state nor adds to it
        padding = [0, 0] * (t.dim() - 2) + [0, -L % size]
        return F.pad(t, padding).unflatten(1, (-1, size)).unflatten(3, groups)

    x = chunks(x, (g, -1)).permute(0, 1, 3, 4, 2, 5)  # [batch, chunks, g, h / g, size, P]
    a = chunks(a, (g, -1)).permute(0, 1, 3, 4, 2)
    B, C = (chunks(t, (g, 1)).permute(0, 1, 3, 4, 2, 5) for t in (B, C))
    # a summed over every (j, i]. Differences of a running sum would cancel where decays are strong.
    past = torch.ones(size, size, dtype=torch.bool, device=a.device).tril()
    sums = a.unsqueeze(-1).expand(*a.shape, size).masked_fill(~past.tril(-1), 0).cumsum(-2)
    decay = sums.masked_fill(~past, -torch.inf).exp()  # [.., i, j]
    y = (C @ B.mT * decay) @ x
    added = B.mT @ (decay[..., -1, :].unsqueeze(-1) * x)  # what a chunk adds to the state after it
    from_start = a.cumsum(-1).exp().unsqueeze(-1)
    kept = from_start[..., -1:, :]
    state = torch.zeros_like(added[:, 0])
    if initial_state is not None:
        state = state + initial_state.unflatten(0, (g, -1))
    before = []
    for i in range(added.shape[1]):
        before.append(state)
        state = kept[:, i] * state + added[:, i]
    y = y + from_start * (C @ torch.stack(before, dim=1))
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :L].flatten(2, 3)


class NonCausalSSD(nn.Module):
    """VSSD's mixer (arXiv:2407.18559), a drop-in for `Mamba2` of its code.

    Same arguments, same state_dict, same `forward(u[B, L, d_model], H, W)`. Per head, with A = -exp(A_log) and
    dt = softplus(dt + dt_bias)::

        y_i = sum_j C_i . (dt_j |A| B_j) x_j + D x_i,    out = out_proj(LayerNorm(y) * z)

    The sum runs over all tokens. B and C belong to a group of heads (head i to group i % ngroups, as in the original)
    and are broadcast over them with stride 0. `ssd_positve_dA=False` (the original's spelling) takes A instead of |A|;
    one version of the original has it as its default, so that version's checkpoints need it passed.

    `linear_attn_duality=False` is the causal scan of Mamba2, in the order of the tokens (here head i belongs to group
    i // (nheads / ngroups)), in chunks of `chunk_size` in plain PyTorch, float32 inside::

        y_i = C_i S_i + D x_i,    S_i = exp(dt_i A) S_(i-1) + (dt_i B_i) x_i

    dt is clamped to `dt_limit`; S_0 is the parameter `init_states` with `learnable_init_states=True`, else 0. With
    `bidirection=True` the second half of heads and groups runs from the last token to the first. In the non-causal
    form these do nothing, as in the original (where `init_states` is a parameter all the same), nor does `seq_idx`;
    with the causal scan a `seq_idx` is refused, as is what fails in the original: `bidirection=True` with an odd number
    of heads or groups or with `learnable_init_states=True`.

    `d_conv` must be odd. `use_mem_eff_path`, `layer_idx` and further keyword arguments (the model passes `attn_type`,
    `lepe`, `simple_downsample` and so on) are accepted and do nothing, as in the original.

    Compared with YuHengsss/VSSD, classification/models/mamba2.py, commit 87b753b, and state-spaces/mamba,
    mamba_ssm/ops/triton/ssd_combined.py. Differences: linear_attn_duality is False there by default, though its models
    pass it; all parameters have the `dtype` given, there norm and D do not; `conv_init`, which fails there, works.
    """

    def __init__(
        self, d_model, d_conv=3, conv_init=None, expand=2, headdim=64, ngroups=1, A_init_range=(1, 16),
        dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4, dt_limit=(0.0, float("inf")), learnable_init_states=False,
        activation="silu", bias=False, conv_bias=True, chunk_size=256, use_mem_eff_path=False, layer_idx=None,
        device=None, dtype=None, linear_attn_duality=True, d_state=64, ssd_positve_dA=True,
        bidirection=False, **kwargs,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.d_conv = d_conv
        self.d_inner = int(expand * d_model)
        self.headdim = headdim
        self.d_state = d_state
        self.ngroups = self.d_inner // headdim if ngroups == -1 else ngroups
        self.nheads = self.d_inner // headdim
        self.ssd_positve_dA = ssd_positve_dA
        self.linear_attn_duality = linear_attn_duality
        self.chunk_size = chunk_size
        self.dt_limit = dt_limit
        self.bidirection = bidirection
        halves = bidirection and not linear_attn_duality
        for name, ok, expected, got in (
            ("headdim", self.d_inner % headdim == 0, f"a divisor of expand * d_model = {self.d_inner}", headdim),
            ("ngroups", self.nheads % self.ngroups == 0, f"a divisor of the {self.nheads} heads", self.ngroups),
            ("d_conv", d_conv % 2 == 1, "odd", d_conv),
            ("activation", activation in ("silu", "swish"), "'silu' or 'swish'", activation),
            ("chunk_size", chunk_size >= 1, ">= 1", chunk_size),
            ("headdim", not halves or self.nheads % 2 == 0, "such that heads are even with bidirection", headdim),
            ("ngroups", not halves or self.ngroups % 2 == 0, "even with bidirection", self.ngroups),
            ("learnable_init_states", not (halves and learnable_init_states), "False with bidirection", True),
        ):
            if not ok:
                raise ValueError(f"effvit::NonCausalSSD: {name} must be {expected}, got {got}")
        self.in_proj = nn.Linear(
            d_model, 2 * self.d_inner + 2 * self.ngroups * d_state + self.nheads, bias=bias, **factory
        )
        conv_dim = self.d_inner + 2 * self.ngroups * d_state
        self.conv2d = nn.Conv2d(
            conv_dim, conv_dim, d_conv, padding=(d_conv - 1) // 2, groups=conv_dim, bias=conv_bias, **factory
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv2d.weight, -conv_init, conv_init)
        self.act = nn.SiLU()
        # softplus(dt_bias) is log-uniform in [dt_min, dt_max]: dt + log(1 - e^-dt) is the inverse of softplus
        dt = torch.rand(self.nheads, device=device) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        dt = dt.exp().clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter((dt + torch.log(-torch.expm1(-dt))).to(dtype))
        self.A_log = nn.Parameter(torch.empty(self.nheads, device=device).uniform_(*A_init_range).log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.nheads, **factory))
        self.init_states = None
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(self.nheads, headdim, d_state, **factory))
            self.init_states._no_weight_decay = True
        for p in (self.dt_bias, self.A_log, self.D):
            p._no_weight_decay = True
        self.norm = nn.LayerNorm(self.d_inner, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(self, u, H, W, seq_idx=None):
        """u [B, H*W, d_model] -> [B, H*W, d_model]."""
        if seq_idx is not None and not self.linear_attn_duality:
            raise ValueError("effvit::NonCausalSSD: seq_idx must be None with the causal scan, got one")
        bc = self.ngroups * self.d_state
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * bc, self.nheads], dim=-1)
        # A channels-last view, so that neither the convolution nor what follows copies the map
        xBC = self.act(convolve(self.conv2d, as_map(xBC, (H, W))))
        x, B, C = as_tokens(xBC).split([self.d_inner, bc, bc], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt, A = F.softplus(dt.to(wide) + self.dt_bias.to(wide)), -self.A_log.to(wide).exp()
        if self.linear_attn_duality:
            y = self._mix(x, dt * (-A if self.ssd_positve_dA else A), B, C)
        else:
            y = self._scan(x, dt, A, B, C)
        y = y + x * self.D[:, None]
        return self.out_proj(self.norm(y.flatten(2)) * z)

    def _scan(self, x, dt, A, B, C):
        """x [B, L, h, P], dt [B, L, h], A [h], B and C [B, L, g, N] -> [B, L, h, P] in the dtype of x."""
        device = x.device.type
        off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with off:
            dt = dt.clamp(*self.dt_limit)
            inputs = (x.to(dt.dtype) * dt.unsqueeze(-1), dt * A, B.to(dt.dtype), C.to(dt.dtype))
            if self.bidirection:
                forth, back = zip(*(t.chunk(2, dim=2) for t in inputs), strict=True)
                y = ssd_scan(*forth, self.chunk_size)
                y_back = ssd_scan(*(t.flip(1) for t in back), self.chunk_size).flip(1)
                return torch.cat([y, y_back], dim=2).to(x.dtype)
            state = None if self.init_states is None else self.init_states.to(dt.dtype).mT
            return ssd_scan(*inputs, self.chunk_size, state).to(x.dtype)

    def _mix(self, x, weight, B, C):
        """x [B, L, h, P], weight [B, L, h], B and C [B, L, g, N] -> [B, L, h, P]."""
        g, h = self.ngroups, self.nheads
        if g in (1, h):
            B, C = (t.expand(-1, -1, h, -1) for t in (B, C))
            return linear_attention(C, B, x, weight=weight, feature_map="none", normalize="none")
        # No single head stride repeats groups as 0, 1, .., g-1, 0, 1, ..: one call per group, on its strided heads
        groups = []
        for i in range(g):
            b, c = (t[:, :, i : i + 1].expand(-1, -1, h // g, -1) for t in (B, C))
            groups.append(
                linear_attention(c, b, x[:, :, i::g], weight=weight[..., i::g], feature_map="none", normalize="none")
            )
        return torch.stack(groups, dim=3).flatten(2, 3)

    def extra_repr(self):
        return (
            f"d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}, "
            f"linear_attn_duality={self.linear_attn_duality}"
        )


class StandardAttention(nn.Module):
    """The softmax attention of VSSD's last stage."""

    def __init__(self, dim, heads=8, dim_head=64, dropout=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, H, W):
        """x [B, L, dim] -> [B, L, dim]; H and W are not needed."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.dropout.p if self.training else 0.0
        return self.to_out(F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2))


class VMAMBA2Block(nn.Module):
    """VSSD's block: depthwise position encodings, the mixer and an MLP; arguments and state_dict of the original.

    `input_resolution`, (H, W) or one number, is the map's size where `forward` gets none (there the original fails).
    `qkv_bias` is accepted and does nothing, as in the original. Further keyword arguments go to `NonCausalSSD`, which
    see for the version compared with and for defaults.
    """

    def __init__(
        self, dim, input_resolution, num_heads, mlp_ratio=4.0, qkv_bias=True, drop=0.0, drop_path=0.0,
        act_layer=nn.GELU, norm_layer=nn.LayerNorm, ssd_expansion=2, ssd_ngroups=1, ssd_chunk_size=256,
        linear_attn_duality=True, d_state=64, attn_type="mamba2", device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.input_resolution = pair(input_resolution)
        self.num_heads = num_heads
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm1 = norm_layer(dim, **factory)
        if attn_type == "standard":
            self.attn = StandardAttention(dim, num_heads, dim // num_heads, drop, **factory)
        elif attn_type == "mamba2":
            self.attn = NonCausalSSD(
                dim, expand=ssd_expansion, headdim=dim * ssd_expansion // num_heads, ngroups=ssd_ngroups,
                chunk_size=ssd_chunk_size, linear_attn_duality=linear_attn_duality, d_state=d_state, **factory,
                **kwargs,
            )  # fmt: skip
        else:
            raise ValueError(f"effvit::VMAMBA2Block: attn_type must be 'mamba2' or 'standard', got {attn_type!r}")
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop, **factory)

    def forward(self, x, H=None, W=None):
        """x [B, H*W, dim] -> [B, H*W, dim]."""
        if H is None or W is None:
            H, W = self.input_resolution
        x = x + self._position(self.cpe1, x, H, W)
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        x = x + self._position(self.cpe2, x, H, W)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @staticmethod
    def _position(conv, x, H, W):
        return as_tokens(convolve(conv, as_map(x, (H, W))))
