"""Mamba-2: the mixer of state space duality (SSD) on gated linear attention, causal or in both directions."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import gated_linear_attention, glu, wide
from ._tokens import convolve_tokens


class GatedRMSNorm(nn.Module):
    """Mamba-2's norm: RMS over groups of channels, gated by silu(z) before (by default) or after it."""

    def __init__(self, dim, eps=1e-5, norm_before_gate=False, group_size=None, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.group_size = dim if group_size is None else group_size
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x, z):
        """x and z [B, L, dim] -> [B, L, dim]."""
        if not self.norm_before_gate:
            x = glu(x, z, "silu")
        groups = wide(x).unflatten(-1, (-1, self.group_size))
        y = F.rms_norm(groups, (self.group_size,), None, self.eps).flatten(-2) * wide(self.weight)
        x = y.to(x.dtype)
        return glu(x, z, "silu") if self.norm_before_gate else x

    def extra_repr(self):
        return f"{self.weight.shape[0]}, group_size={self.group_size}, norm_before_gate={self.norm_before_gate}"


class Mamba2(nn.Module):
    """Mamba-2's mixer (arXiv:2405.21060): the arguments and the state_dict of the original.

    With z, x, B, C and dt from one projection, x, B and C through a causal depthwise convolution and silu,
    A = -exp(A_log) and dt = softplus(dt + dt_bias)::

        S_t = exp(dt_t A) S_(t-1) + B_t^T (dt_t x_t),    y_t = C_t S_t + D x_t,    out = out_proj(RMSNorm(y * silu(z)))

    which is effvit.gated_linear_attention with C, B and dt x as queries, keys and values and a gate for every token and
    head. B and C of a group serve heads in a row, broadcast with stride 0. dt is computed in float32 and clamped to
    `dt_limit`.

    u [B, L, d_model] -> the same shape; or [B * L, d_model] with `seqlen` = L. With `return_state` also the state after
    the last token [B, heads, d_state, headdim], float32, which `initial_state` takes up (the convolution sees zeros
    before the tokens it is given). `bidirectional=True` adds the recurrence from the last token to the first, each
    token's own term once, and has no state; the convolution then looks to both sides, which needs an odd `d_conv`.

    Compared with state-spaces/mamba, mamba_ssm/modules/mamba2.py at e9594ce. Differences: `seq_idx`, `cu_seqlens`,
    `inference_params` and `process_group` are refused; all parameters have the `dtype` given, there D has float32.
    `chunk_size`, `use_mem_eff_path`, `layer_idx` and `sequence_parallel` do nothing.
    """

    def __init__(
        self, d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, d_ssm=None, ngroups=1,
        A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False, dt_min=0.001, dt_max=0.1,
        dt_init_floor=1e-4, dt_limit=(0.0, float("inf")), bias=False, conv_bias=True, chunk_size=256,
        use_mem_eff_path=True, layer_idx=None, process_group=None, sequence_parallel=True, bidirectional=False,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim = headdim
        self.ngroups = ngroups
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim = D_has_hdim
        self.dt_limit = dt_limit
        self.bidirectional = bidirectional
        for name, ok, expected, got in (
            ("process_group", process_group is None, "None", process_group),
            ("d_ssm", 0 < self.d_ssm <= self.d_inner, f"between 1 and expand * d_model = {self.d_inner}", d_ssm),
            ("headdim", self.d_ssm % headdim == 0, f"a divisor of {self.d_ssm} channels", headdim),
            ("ngroups", ngroups >= 1 and self.nheads % ngroups == 0, f"a divisor of the {self.nheads} heads", ngroups),
            ("d_conv", d_conv % 2 == 1 or not bidirectional, "odd with bidirectional", d_conv),
        ):
            if not ok:
                raise ValueError(f"effvit::Mamba2: {name} must be {expected}, got {got}")
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1, bias=conv_bias, **factory
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        # softplus(dt_bias) is log-uniform in [dt_min, dt_max]: dt + log(1 - e^-dt) is the inverse of softplus
        dt = torch.rand(self.nheads, device=device) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        dt = dt.exp().clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter((dt + torch.log(-torch.expm1(-dt))).to(dtype))
        self.A_log = nn.Parameter(torch.empty(self.nheads, device=device).uniform_(*A_init_range).log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, **factory))
        for p in (self.dt_bias, self.A_log, self.D):
            p._no_weight_decay = True
        self.norm = None
        if rmsnorm:
            self.norm = GatedRMSNorm(self.d_ssm, 1e-5, norm_before_gate, self.d_ssm // ngroups, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None, *, initial_state=None,
        return_state=False,
    ):  # fmt: skip
        for name, given in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens), ("inference_params", inference_params)):
            if given is not None:
                raise ValueError(f"effvit::Mamba2: {name} must be None, got {type(given).__name__}")
        d_mlp, bc = self.d_inner - self.d_ssm, self.ngroups * self.d_state
        zxbcdt = self.in_proj(u)
        if seqlen is not None:
            zxbcdt = zxbcdt.unflatten(0, (-1, seqlen))
        z0, x0, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, self.d_ssm, self.d_ssm + 2 * bc, self.nheads], dim=-1)
        xBC = F.silu(convolve_tokens(self.conv1d, xBC, causal=not self.bidirectional))
        x, B, C = xBC.split([self.d_ssm, bc, bc], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        dt = F.softplus(wide(dt) + wide(self.dt_bias))
        if self.dt_limit != (0.0, float("inf")):
            dt = dt.clamp(*self.dt_limit)
        values = (x * dt.unsqueeze(-1)).to(x.dtype)
        y, state = self._scan(C, B, values, dt * -wide(self.A_log).exp(), initial_state, return_state)
        D = self.D.view(self.nheads, -1)  # [heads, headdim or 1]
        y = (y + x * D).flatten(2)
        y = glu(y, z, "silu") if self.norm is None else self.norm(y, z)
        if d_mlp:
            y = torch.cat([glu(x0, z0, "silu").to(y.dtype), y], dim=-1)
        y = self.out_proj(y if seqlen is None else y.flatten(0, 1))
        return (y, state) if return_state else y

    def _scan(self, C, B, values, g, initial_state, return_state):
        """C and B [B, L, groups, N], values [B, L, h, P], g [B, L, h] -> y [B, L, h, P] and the state or None."""
        groups, heads = self.ngroups, self.nheads
        options = {"scale": 1.0, "bidirectional": self.bidirectional, "return_state": return_state}
        if groups in (1, heads):
            parts = [(C.expand(-1, -1, heads, -1), B.expand(-1, -1, heads, -1), values, g, initial_state)]
        else:  # no head stride repeats each group several times: one call per group, on its heads
            size = heads // groups
            states = [None] * groups if initial_state is None else initial_state.split(size, 1)
            parts = [
                (c.expand(-1, -1, size, -1), b.expand(-1, -1, size, -1), v, gate, state)
                for c, b, v, gate, state in zip(
                    C.split(1, 2), B.split(1, 2), values.split(size, 2), g.split(size, 2), states, strict=True
                )
            ]
        found = [gated_linear_attention(*part, **options) for part in parts]
        if not return_state:
            return (found[0] if len(found) == 1 else torch.cat(found, dim=2)), None
        ys, states = zip(*found, strict=True)
        return torch.cat(ys, dim=2), torch.cat(states, dim=1)

    def extra_repr(self):
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}, "
            f"bidirectional={self.bidirectional}"
        )
