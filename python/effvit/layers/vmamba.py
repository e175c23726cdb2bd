"""VMamba's SS2D and block: selective scans of a map in four directions; the original's arguments and state_dict."""

import math
import re

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from ._ops import selective_scan2d
from ._tokens import convolve
from .swin_block import DropPath, Mlp

DIRECTIONS = 4
_FORWARD_TYPE = re.compile(r"(v0|v0seq|v01|v02|v03|v04|v05|v1|v2|v3|v4)((?:_?(?:no32|nozact|noz|oact|onnone|none))*)")


class SS2D(nn.Module):
    """VMamba's mixer (arXiv:2401.10166), a drop-in for `SS2D` of its code: same arguments, same state_dict.

    x [B, H, W, d_model] (`channel_first=True`: [B, d_model, H, W]) -> the same shape. With D = ssm_ratio * d_model
    channels and N = d_state states, for each of the four directions s of :func:`effvit.ops.selective_scan2d`::

        x, z = in_proj(x),    x = act(conv2d(x))
        dt, b, c = x_proj_weight[s] x,    dt = dt_projs_weight[s] dt
        out = out_proj(out_norm(sum_s scan(x, softplus(dt + dt_projs_bias[s]), -exp(A_logs), b, c, Ds)) * act(z))

    Projections are of the map's tokens where they lie; the scans read and write them there. What the original copies
    into four sequences and back never exists.

    `forward_type` is v0, v0seq, v01 to v05, v1, v2, v3 or v4, which are one formula in different kernels there, with
    any of these behind it, as in `v05_noz`: `noz`, no gate z; `nozact`, z without activation; `oact`, a GELU before
    the gate; `onnone` (or `none`), no out_norm; `no32` does nothing. With v0 and v0seq, act_layer, d_conv, conv_bias,
    bias, dt_* and initialize are not looked at, as in the original. Its ablations (one or two directions, other norms,
    xv, m0) are refused. States and the scans' sums are float32 in every dtype, so that v03 and others, which round them
    to half precision there, are at least as precise here.

    Compared with MzeroMiko/VMamba, vmamba.py, commit 10a2e99, and for v1, v4 and tags without an underscore with
    classification/models/vmamba.py, commit 0479f85. `device` and `dtype` are additions.
    """

    def __init__(
        self, d_model=96, d_state=16, ssm_ratio=2.0, dt_rank="auto", act_layer=nn.SiLU, d_conv=3, conv_bias=True,
        dropout=0.0, bias=False, dt_min=0.001, dt_max=0.1, dt_init="random", dt_scale=1.0, dt_init_floor=1e-4,
        initialize="v0", forward_type="v2", channel_first=False, device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        parsed = _FORWARD_TYPE.fullmatch(forward_type)
        tags = set(re.findall("no32|nozact|noz|oact|onnone|none", parsed[2])) if parsed else set()
        if parsed and parsed[1] in ("v0", "v0seq"):
            act_layer, d_conv, conv_bias, bias, initialize = nn.SiLU, 3, True, False, "v0"
            dt_min, dt_max, dt_init, dt_scale, dt_init_floor = 0.001, 0.1, "random", 1.0, 1e-4
        for name, ok, expected, got in (
            ("forward_type", parsed, "v0, v0seq, v01 to v05, v1, v2, v3 or v4, and its tags", repr(forward_type)),
            ("d_conv", d_conv < 2 or d_conv % 2 == 1, "odd, or below 2 for none", d_conv),
            ("d_state", d_state >= 1, ">= 1", d_state),
            ("dt_init", dt_init in ("random", "constant"), "'random' or 'constant'", repr(dt_init)),
            ("initialize", initialize in ("v0", "v1", "v2"), "'v0', 'v1' or 'v2'", repr(initialize)),
        ):
            if not ok:
                raise ValueError(f"effvit::SS2D: {name} must be {expected}, got {got}")
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = int(ssm_ratio * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.d_conv = d_conv
        self.forward_type = forward_type
        self.channel_first = channel_first
        self.disable_z = "noz" in tags
        self.disable_z_act = "nozact" in tags

        d_proj = self.d_inner if self.disable_z else 2 * self.d_inner
        self.in_proj = nn.Linear(d_model, d_proj, bias=bias, **factory)
        self.act = act_layer()
        if d_conv > 1:
            self.conv2d = nn.Conv2d(
                self.d_inner, self.d_inner, d_conv, padding=(d_conv - 1) // 2, groups=self.d_inner, bias=conv_bias,
                **factory,
            )  # fmt: skip
        wide = self.dt_rank + 2 * d_state
        bound = self.d_inner**-0.5  # as nn.Linear draws its weights
        self.x_proj_weight = nn.Parameter(
            torch.empty(DIRECTIONS, wide, self.d_inner, **factory).uniform_(-bound, bound)
        )
        self._init_scan(initialize, dt_init, dt_scale, dt_min, dt_max, dt_init_floor, factory)
        self.out_norm = nn.Identity() if tags & {"none", "onnone"} else nn.LayerNorm(self.d_inner, **factory)
        self.out_act = nn.GELU() if "oact" in tags else nn.Identity()
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()

    def _init_scan(self, initialize, dt_init, dt_scale, dt_min, dt_max, dt_init_floor, factory):
        """dt_projs_weight [4, D, R], dt_projs_bias [4, D], A_logs [4 D, N] and Ds [4 D]."""
        D, R, N = self.d_inner, self.dt_rank, self.d_state
        device, dtype = factory["device"], factory["dtype"]
        if initialize == "v0":
            # softplus(bias) is log-uniform in [dt_min, dt_max]: dt + log(1 - e^-dt) is the inverse of softplus
            std = R**-0.5 * dt_scale
            weight = torch.empty(DIRECTIONS, D, R, device=device)
            weight = weight.fill_(std) if dt_init == "constant" else weight.uniform_(-std, std)
            dt = torch.rand(DIRECTIONS, D, device=device) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
            dt = dt.exp().clamp(min=dt_init_floor)
            bias = dt + torch.log(-torch.expm1(-dt))
            a_logs = torch.arange(1, N + 1, dtype=torch.float32, device=device).log().repeat(DIRECTIONS * D, 1)
        elif initialize == "v1":
            weight = 0.1 * torch.randn(DIRECTIONS, D, R, device=device)
            bias = 0.1 * torch.randn(DIRECTIONS, D, device=device)
            a_logs = torch.randn(DIRECTIONS * D, N, device=device)
        else:
            weight = 0.1 * torch.rand(DIRECTIONS, D, R, device=device)
            bias = 0.1 * torch.rand(DIRECTIONS, D, device=device)
            a_logs = torch.zeros(DIRECTIONS * D, N, device=device)
        self.dt_projs_weight = nn.Parameter(weight.to(dtype))
        self.dt_projs_bias = nn.Parameter(bias.to(dtype))
        self.A_logs = nn.Parameter(a_logs.to(dtype))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * D, **factory))
        if initialize == "v0":
            self.A_logs._no_weight_decay = True
            self.Ds._no_weight_decay = True

    def forward(self, x):
        if self.channel_first:
            return self._mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._mix(x)

    def _mix(self, x):
        """x [B, H, W, d_model] -> [B, H, W, d_model]."""
        x = self.in_proj(x)
        z = None
        if not self.disable_z:
            x, z = x.chunk(2, dim=-1)
            z = z if self.disable_z_act else self.act(z)
        if self.d_conv > 1:
            x = convolve(self.conv2d, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.act(x)
        y = self._scan(x)
        if isinstance(self.out_norm, nn.LayerNorm):  # the scans' sums are float32, which the norm may get as they are
            y = self.out_norm(y.to(self.out_norm.weight.dtype))
        else:
            y = self.out_norm(y)
        y = self.out_act(y.to(x.dtype))
        if z is not None:
            y = y * z
        return self.dropout(self.out_proj(y))

    def _scan(self, x):
        """x [B, H, W, D] -> [B, H, W, D], float32 or wider."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (DIRECTIONS, -1))
        dt, b, c = projected.split(sizes, dim=-1)
        dt = torch.einsum("bhwsr,sdr->bhwsd", dt, self.dt_projs_weight)
        dtype = torch.promote_types(x.dtype, dt.dtype)
        x, dt, b, c = (t.to(dtype) for t in (x, dt, b, c))
        wide = torch.promote_types(dtype, torch.float32)
        a = -self.A_logs.to(wide).exp().unflatten(0, (DIRECTIONS, -1))
        d, bias = self.Ds.to(wide).unflatten(0, (DIRECTIONS, -1)), self.dt_projs_bias.to(wide)
        return selective_scan2d(x, dt, b, c, a, d, bias)

    def extra_repr(self):
        return f"d_state={self.d_state}, dt_rank={self.dt_rank}, forward_type={self.forward_type!r}"


class GatedMlp(nn.Module):
    """fc2(x * act(z)) with x, z = fc1(..): VMamba's gMlp."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, **factory)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x, z = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(x * self.act(z)))


class VSSBlock(nn.Module):
    """VMamba's block: norm, `SS2D` as `op`, norm2, MLP; the original's arguments and state_dict.

    x [B, H, W, hidden_dim] (`channel_first=True`: [B, hidden_dim, H, W]) -> the same shape. Norms see channels last
    in both: with channel_first pass nn.LayerNorm, not a norm of channels-first maps. No branch of scans with
    `ssm_ratio=0`, no MLP with `mlp_ratio=0`; `use_checkpoint` computes the block again in backward. `SS2D` has the
    version compared with; further keyword arguments are accepted and do nothing, as in the original.
    """

    def __init__(
        self, hidden_dim=0, drop_path=0, norm_layer=nn.LayerNorm, channel_first=False, ssm_d_state=16, ssm_ratio=2.0,
        ssm_dt_rank="auto", ssm_act_layer=nn.SiLU, ssm_conv=3, ssm_conv_bias=True, ssm_drop_rate=0.0, ssm_init="v0",
        forward_type="v2", mlp_ratio=4.0, mlp_act_layer=nn.GELU, mlp_drop_rate=0.0, gmlp=False, use_checkpoint=False,
        post_norm=False, device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.ssm_branch = ssm_ratio > 0
        self.mlp_branch = mlp_ratio > 0
        self.use_checkpoint = use_checkpoint
        self.post_norm = post_norm
        self.channel_first = channel_first
        if self.ssm_branch:
            self.norm = norm_layer(hidden_dim, **factory)
            self.op = SS2D(
                hidden_dim, ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate,
                initialize=ssm_init, forward_type=forward_type, **factory,
            )  # fmt: skip
        self.drop_path = DropPath(drop_path)
        if self.mlp_branch:
            self.norm2 = norm_layer(hidden_dim, **factory)
            mlp = GatedMlp if gmlp else Mlp
            self.mlp = mlp(hidden_dim, int(hidden_dim * mlp_ratio), mlp_act_layer, mlp_drop_rate, **factory)

    def _block(self, x):
        branches = [(self.norm, self.op)] if self.ssm_branch else []
        branches += [(self.norm2, self.mlp)] if self.mlp_branch else []
        for norm, op in branches:
            x = x + self.drop_path(norm(op(x)) if self.post_norm else op(norm(x)))
        return x

    def forward(self, x):
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        if self.use_checkpoint and torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(self._block, x, use_reentrant=False)
        else:
            x = self._block(x)
        return x.permute(0, 3, 1, 2) if self.channel_first else x
