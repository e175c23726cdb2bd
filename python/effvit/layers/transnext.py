"""TransNeXt's convolutional GLU: the depthwise convolution, the activation and the gate in one pass."""

from torch import nn

from ._ops import dwconv_glu
from ._tokens import as_map, as_tokens, convolve, is_hooked

_ACTIVATIONS = {
    nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.Identity: "none",
}  # fmt: skip


def _name_of(act):
    """What the operator calls this activation; None where it does not know it or calling it does more."""
    if is_hooked(act) or getattr(act, "approximate", "none") != "none":
        return None
    return _ACTIVATIONS.get(type(act))


class DWConv(nn.Module):
    """A depthwise 3 x 3 convolution of tokens; TransNeXt's parameter names."""

    def __init__(self, dim=768, device=None, dtype=None):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x, H, W):
        return as_tokens(convolve(self.dwconv, as_map(x, (H, W))))

    def is_plain(self):
        """Whether nothing but the convolution of this class runs."""
        conv = self.dwconv
        plain = type(self) is DWConv and type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
        return plain and conv.padding == (1, 1) and conv.stride == (1, 1) and not (is_hooked(self) or is_hooked(conv))


class ConvGLU(nn.Module):
    """TransNeXt's convolutional GLU (arXiv:2311.17132), a drop-in for `ConvolutionalGLU` of its code.

    Same arguments, same state_dict, same `forward(x[B, H*W, C], H, W)`::

        x, v = split(fc1(x));    out = fc2(act(dwconv(x)) * v)

    with 2/3 of `hidden_features`, rounded down, on each side. The activation may be any module; GELU (the exact one),
    SiLU, ReLU, Sigmoid, Tanh and Identity run in the pass of the convolution.

    Compared with DaiShiResearch/TransNeXt, classification/transnext_native.py at ff68810.
    """

    def __init__(
        self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        out_features = out_features or in_features
        hidden_features = int(2 * (hidden_features or in_features) / 3)
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, **factory)
        self.dwconv = DWConv(hidden_features, **factory)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x, H, W):
        """x [B, H*W, in_features] -> [B, H*W, out_features]."""
        x, act = self.fc1(x), _name_of(self.act)
        if act is not None and self.dwconv.is_plain():
            conv = self.dwconv.dwconv
            x = dwconv_glu(x.unflatten(1, (H, W)), None, conv.weight, conv.bias, act=act).flatten(1, 2)
        else:
            x, v = x.chunk(2, dim=-1)
            x = self.act(self.dwconv(x, H, W)) * v
        return self.drop(self.fc2(self.drop(x)))
