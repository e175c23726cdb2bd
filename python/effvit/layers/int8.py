"""Linear layers on int8 products: Int8Linear, OutlierLinear (LLM.int8()), and QATLinear, which is trained to be one."""

import torch
import torch.nn.functional as F
from torch import nn

import effvit.ops

from ..ops import _checks, _dispatcher
from ..ops._int8 import DTYPES, NAMES
from ..ops._op import OPS
from ..reference.block_sparse_linear import dense_weight
from ..reference.fake_quantize_int8 import fake_quantize_int8 as _fake_quantize
from ..reference.int8_linear import ACTIVATIONS
from ._ops import _dense, sparse24_prune
from ._written import LastSeen

# ---- the product, and its derivative straight through the rounding ---------------------------------------------------


# The ops are called without the checks of their public functions, which no compiler traces in a backward.


def _quantised(x, input_scale, excluded):
    """x [M, K] in floating point -> (int8 [M, K], scale [M])."""
    return OPS["quantize_int8"](x, None if input_scale is None else input_scale.expand(x.shape[0]), excluded)


def _product(q, scale, weights, w_scale, bias, residual, activation, out_dtype, out_scale):
    """weights: (integers, metadata or None where they are dense, both packed or None), or (values, crow, columns)."""
    weight, meta, packed = weights
    options = {"activation": NAMES.index(activation), "out_dtype": DTYPES.index(out_dtype), "out_scale": out_scale}
    if weight.dim() == 3:
        parts = (weight, meta, packed)
        return OPS["block_sparse_int8_linear"](q, *parts, scale, w_scale, bias, residual, **options)
    if meta is None:
        return OPS["int8_linear"](q, weight if packed is None else packed, scale, w_scale, bias, residual, **options)
    parts = (weight, meta) if packed is None else (packed, None)
    return OPS["sparse24_int8_linear"](q, *parts, scale, w_scale, bias, residual, **options)


def _plain(weight, meta, packed, k):
    if weight.dim() == 3:
        return dense_weight(weight, meta, packed, k)
    return weight if meta is None else OPS["sparse24_decompress"](weight, meta)


def _slope(z, activation):
    """The derivative of an activation."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5


class _StraightThrough(torch.autograd.Function):
    """The quantised layer, with the derivative of the float layer that it rounds."""

    @staticmethod
    def forward(
        x, bias, residual, weight, meta, packed, w_scale, input_scale, excluded, activation, out_dtype, out_scale
    ):  # fmt: skip
        q, scale = _quantised(x, input_scale, excluded)
        return _product(
            q, scale, (weight, meta, packed), w_scale, bias, residual, activation, out_dtype, out_scale
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:9])
        ctx.activation, ctx.last = inputs[9], inputs[9:]

    @staticmethod
    def backward(ctx, g):
        x, bias, residual, weight, meta, packed, w_scale, input_scale, excluded = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # to be differentiated again
            inputs = [
                t if needed else None for t, needed in zip((x, bias, residual), ctx.needs_input_grad, strict=False)
            ]
            found = iter(
                torch.autograd.grad(
                    _formula(*ctx.saved_tensors, *ctx.last), [t for t in inputs if t is not None], g, create_graph=True
                )
            )
            return (*(None if t is None else next(found) for t in inputs), *(None,) * 9)
        g = g.float()
        if ctx.activation != "none":
            q, scale = _quantised(x, input_scale, excluded)
            before = _product(
                q, scale, (weight, meta, packed), w_scale, bias, residual, "none", torch.float32, None
            )  # fmt: skip
            g = g * _slope(before, ctx.activation)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (g * w_scale) @ _plain(weight, meta, packed, x.shape[-1]).float()
            if input_scale is not None:
                dx = torch.where(x.abs() <= 127 * input_scale, dx, 0.0)
            if excluded is not None:
                dx = torch.where(excluded != 0, 0.0, dx)
            dx = dx.to(x.dtype)
        if bias is not None and ctx.needs_input_grad[1]:
            dbias = g.sum(0).to(bias.dtype)
        dresidual = None if residual is None else g.to(residual.dtype)
        return (dx, dbias, dresidual, *(None,) * 9)


def _formula(x, bias, residual, weight, meta, packed, w_scale, input_scale, excluded, activation, out_dtype, out_scale):
    """The same in floating point, differentiable by every transform of torch.func; not by way of int8."""
    if excluded is not None:
        x = torch.where(excluded != 0, 0.0, x)
    x = effvit.ops.fake_quantize_int8(x, input_scale)
    y = F.linear(x.float(), _plain(weight, meta, packed, x.shape[-1]).float() * w_scale[:, None])
    for t in (bias, residual):
        y = y if t is None else y + t
    return ACTIVATIONS[activation](y).to(out_dtype)


def quantised_product(*arguments):
    """Int8 products as a layer calls them, by what differentiates here."""
    if torch.jit.is_tracing() or arguments[-1] is not None:  # a trace cannot save a function; int8 has no gradient
        return _StraightThrough.forward(*arguments)
    if not torch.compiler.is_compiling() and _dispatcher.in_transform():
        return _formula(*arguments)
    return (_StraightThrough.apply if torch.is_grad_enabled() else _StraightThrough.forward)(*arguments)


def _in_steps(y, scale):
    """What an int8 result holds, with the gradient straight through."""
    steps = (y / scale).clamp(-128, 127)
    return (steps + (steps.round() - steps).detach()) * scale


# ---- layers ----------------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Module):
    """What the int8 layers share: scales, bias, activation, requantisation, and the packed copy that a CPU reads.

    A subclass has its integers in the buffers `integers` names, the first of which is [out_features, ...].
    """

    integers = ("weight",)
    scales = ("weight_scale", "input_scale", "output_scale", "smooth")

    def __init__(self, in_features, out_features, bias, activation, static, smooth, int8_output, device, dtype):
        super().__init__()
        _checks.index_of(type(self).__name__, "activation", activation, tuple(ACTIVATIONS))
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.dtype = torch.get_default_dtype() if dtype is None else dtype  # of the output, where the input has none

        def ones(n):
            return torch.ones(n, dtype=torch.float32, device=device)

        bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None
        self.register_parameter("bias", bias)
        self.hold("weight_scale", ones(out_features))
        self.hold("input_scale", ones(1) if static else None)
        self.hold("output_scale", ones(1) if int8_output else None)
        self.hold("smooth", ones(in_features) if smooth else None)
        self.out_scale = None
        self.seen = LastSeen()  # what packed and out_scale were made from

    def hold(self, name, t, persistent=True):
        """A buffer, where there is a tensor; else an attribute: torch.export miscounts buffers that are None."""
        vars(self).pop(name, None)
        self._buffers.pop(name, None)
        if t is None:
            vars(self)[name] = None
        else:
            self.register_buffer(name, t, persistent)

    # ---- what follows from the state

    def pack(self):
        """The integers as the CPU's kernels read them."""
        raise NotImplementedError

    def plain_weight(self):
        """The integers as a dense int8 [out_features, in_features]."""
        raise NotImplementedError

    def _sources(self):
        return [getattr(self, name) for name in (*self.integers, "output_scale")]

    def prepare(self):
        """Derive the packed weight and the output scale again; done wherever the state changes by PyTorch's means."""
        first = getattr(self, self.integers[0])
        with torch.no_grad():
            self.hold("packed", self.pack() if first.device.type == "cpu" else None, persistent=False)
        scale = self.output_scale
        if scale is not None and not scale.is_meta and type(scale) is torch.Tensor:
            self.out_scale = float(scale)
        self.seen.remember(self._sources())
        return self

    def _apply(self, fn, recurse=True):
        kept = {name: t for name in self.scales if (t := getattr(self, name)) is not None}
        had_values = not self.weight_scale.is_meta
        self.hold("packed", None)  # made again for the new device
        super()._apply(fn, recurse)
        for name, t in kept.items():  # scales stay in float32, whatever the model is cast to
            if getattr(self, name).dtype != torch.float32:
                setattr(self, name, t.to(getattr(self, name).device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_scale.device)).dtype
        if had_values:
            return self.prepare()
        self.seen = LastSeen()  # memory that something will be loaded into: until then there is nothing to pack
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        for name in self.integers:  # a copy into the buffer would cut floats to integers
            given = state_dict.get(prefix + name)
            own = getattr(self, name)
            if given is not None and given.dtype != own.dtype:
                error_msgs.append(
                    f"effvit::{type(self).__name__}: {prefix}{name} must be {own.dtype}, got {given.dtype}: load it "
                    "into the float model and call effvit.quantize_"
                )
                return
        for name in self.scales:
            try:
                _checks.check_scales(type(self).__name__, {prefix + name: state_dict.get(prefix + name)}, prefix + name)
            except ValueError as e:
                error_msgs.append(str(e))
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        self.dtype = self.dtype if self.bias is None else self.bias.dtype
        self.prepare()

    # ---- the call

    def _asks_for_a_gradient(self, x):
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return False
        recorded = torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
        return recorded or (not torch.compiler.is_compiling() and _dispatcher.in_forward_mode())

    def _output_dtype(self, x):
        """Of a floating-point result."""
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.dtype if x.dtype == torch.int8 else x.dtype

    def _check_input(self, x):
        name = type(self).__name__
        if x.shape[-1:] != (self.in_features,):
            raise _checks.value_error(name, "x", f"[..., {self.in_features}]", _checks.shape(x))
        if not (x.is_floating_point() or (x.dtype == torch.int8 and self.input_scale is not None)):
            expected = "floating point" if self.input_scale is None else "floating point or int8"
            raise _checks.type_error(name, "x", expected, x.dtype)

    def weights(self):
        """(integers, metadata or None, packed or None), the last made again where something wrote to the others."""
        if not torch.compiler.is_compiling() and not self.seen.is_current(self._sources()):
            self.prepare()
        parts = [getattr(self, name) for name in self.integers]
        exporting = torch.compiler.is_compiling() or torch.jit.is_tracing()
        packed = None if exporting and torch.onnx.is_in_onnx_export() else self.packed  # there it would be unpacked
        return parts[0], parts[1] if len(parts) > 1 else None, packed

    def outliers(self, x):
        """(columns to leave out as int8 [K], their product [M, N]), or Nones, for x [M, K] in floating point."""
        return None, None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x; int8 where the layer has an output scale.

        Where a gradient is asked for, which int8 cannot have, these are the same values in floating point.
        """
        x = input  # nn.Linear's name for it
        self._check_input(x)
        dtype, weights = self._output_dtype(x), self.weights()
        to_int8 = self.output_scale is not None
        as_float = to_int8 and self._asks_for_a_gradient(x)
        bias = self.bias if self.bias is None or self.bias.dtype != torch.float64 else self.bias.float()
        if as_float or dtype == torch.float64:  # the kernels end at float32
            last = (self.activation, torch.float32, None)
        else:
            last = (self.activation, torch.int8 if to_int8 else dtype, self.out_scale)
        rows = _dense(x.reshape(-1, self.in_features))
        if rows.dtype == torch.int8:
            scale = self.input_scale.expand(rows.shape[0])
            y = _product(rows, scale, weights, self.weight_scale, bias, None, *last)
        else:
            rows = rows.float() if rows.dtype == torch.float64 else rows
            rows = rows if self.smooth is None else (rows * self.smooth).to(rows.dtype)
            excluded, residual = self.outliers(rows)
            y = quantised_product(
                rows, bias, residual, *weights, self.weight_scale, self.input_scale, excluded, *last
            )  # fmt: skip
        y = _in_steps(y, self.output_scale) if as_float else y
        y = y.view(*x.shape[:-1], self.out_features)
        return y if y.dtype == torch.int8 else y.to(dtype)

    # ---- construction

    def fuse(self, activation, output_scale=None):
        """Take over an activation that follows, and the quantisation after that. Returns self."""
        _checks.index_of(type(self).__name__, "activation", activation, tuple(ACTIVATIONS))
        if output_scale is not None:
            output_scale = output_scale.detach().float().reshape(1).clone()
            _checks.check_scales(type(self).__name__, {"output_scale": output_scale}, "output_scale")
            self.hold("output_scale", output_scale)
        self.activation = activation
        return self.prepare()

    def options(self) -> dict:
        """The constructor's arguments for a layer that takes this one's state_dict; plain Python values."""
        return {
            "in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None,
            "activation": self.activation, "static": self.input_scale is not None, "smooth": self.smooth is not None,
            "int8_output": self.output_scale is not None,
        }  # fmt: skip

    def fill(self, weight, q, w_scale, bias, input_scale, output_scale, smooth):
        """The state from tensors of any kind; smooth: the factor of the weights."""
        with torch.no_grad():
            for name, t in (*q.items(), ("weight_scale", w_scale)):
                self.hold(name, t)
            for name, value in (("input_scale", input_scale), ("output_scale", output_scale)):
                if value is not None:
                    value = torch.as_tensor(value, dtype=torch.float32, device=weight.device).detach().reshape(1)
                    _checks.check_scales(type(self).__name__, {name: value}, name)
                    self.hold(name, value.clone())
            if smooth is not None:
                self.hold("smooth", smooth.float().reciprocal())
        self.bias = bias
        return self.prepare()

    @classmethod
    def empty_like(cls, linear, activation, input_scale, output_scale, smooth, **options):
        """A layer to fill from `linear`, nothing of it allocated."""
        return cls(
            linear.in_features, linear.out_features, bias=False, activation=activation, static=input_scale is not None,
            smooth=smooth is not None, int8_output=output_scale is not None, device="meta", dtype=linear.weight.dtype,
            **options,
        )  # fmt: skip

    def extra_repr(self):
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts += [f"activation={self.activation}"] if self.activation != "none" else []
        parts += ["static" if self.input_scale is not None else "dynamic"]
        parts += [name for name in ("smooth", "output_scale") if getattr(self, name) is not None]
        return ", ".join(parts)


def quantised_weight(owner, weight):
    """[N, K] in floating point -> (int8 [N, K], scale [N]), symmetric per row."""
    weight = weight.detach().float()
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise _checks.value_error(owner, "weight", "finite", "NaN or infinity")
    return effvit.ops.quantize_int8(weight.contiguous())


def checked_columns(columns, k):
    """Indices of columns as int64 [*] in their order."""
    t = torch.as_tensor(columns)
    if t.numel() and (t.dim() != 1 or t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool):
        expected = "a one-dimensional sequence of integers"
        raise _checks.type_error("OutlierLinear", "columns", expected, f"{t.dtype} {_checks.shape(t)}")
    t = t.to(torch.int64).sort().values
    if len(t) and not 0 <= int(t[0]) <= int(t[-1]) < k:
        raise _checks.value_error("OutlierLinear", "columns", f"from 0 to {k - 1}", t.tolist())
    if bool((t[1:] == t[:-1]).any()):
        raise _checks.value_error("OutlierLinear", "columns", "each given once", t.tolist())
    return t


def check_smooth(owner, smooth, weight):
    if smooth is not None and smooth.shape != weight.shape[1:]:
        raise _checks.value_error(owner, "smooth", f"[{weight.shape[1]}] like in_features", _checks.shape(smooth))
    _checks.check_scales(owner, {"smooth": smooth}, "smooth")


def scaled(weight, smooth):
    return weight if smooth is None else weight * smooth.to(weight.dtype)


class Int8Linear(QuantisedLinear):
    """nn.Linear on int8 weights and activations: act(x Wᵀ + bias), by :func:`effvit.ops.int8_linear`.

    Weights have one scale an output channel. Activations have one a token, found in every call, or with `static` one
    for all, `input_scale`, found by calibration. `smooth` [in_features] multiplies x before that (SmoothQuant; the
    weights hold its reciprocal). With `int8_output` the result is int8 in steps of `output_scale`: what a following
    static layer takes as it is. Where a gradient is asked for, the same values come in floating point.

    The output has the dtype of x, or autocast's. The gradient goes straight through the rounding, to x and to bias, as
    that of a float layer of the same weights. Training the weights is `QATLinear`'s.

    The state_dict holds weight int8 [N, K], scales float32, bias, and nothing that depends on the machine; the scales
    stay in float32 whatever the model is cast to. On a CPU a second copy of the weight, in the kernels' order, is
    derived from it and is not saved.
    """

    def __init__(
        self, in_features, out_features, bias=True, activation="none", static=False, smooth=False, int8_output=False,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, activation, static, smooth, int8_output, device, dtype)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.prepare()

    def pack(self):
        return effvit.ops.int8_prepack(self.weight)

    def plain_weight(self):
        return self.weight

    @classmethod
    def from_linear(cls, linear, *, activation="none", input_scale=None, output_scale=None, smooth=None, folded=False):
        """The int8 layer of an nn.Linear; it shares the bias.

        Args:
            activation: "none", "relu", "gelu" or "silu", applied to the result.
            input_scale: what one step of the activations is worth, a number; None: found in every call.
            output_scale: what one step of an int8 result is worth; None: the result is floating point.
            smooth: [in_features], what the weights are multiplied by and the activations divided by.
            folded: the activations come divided by `smooth`.
        """
        check_smooth(cls.__name__, smooth, linear.weight)
        q, scale = quantised_weight(cls.__name__, scaled(linear.weight, smooth))
        inside = None if folded else smooth
        layer = cls.empty_like(linear, activation, input_scale, output_scale, inside)
        return layer.fill(linear.weight, {"weight": q}, scale, linear.bias, input_scale, output_scale, inside)


class OutlierLinear(QuantisedLinear):
    """LLM.int8() (arXiv:2208.07339): columns of x with an entry of at least `threshold` stay in floating point.

    out = act(int8 part + bias + x[:, o] W[:, o]ᵀ): the columns o count neither for the scales of the tokens nor in the
    int8 product. W is `weight_float`, the original weight, or with `keep_weight=False`, which saves its memory, the
    int8 one. The columns are those of this call's x, unless calibration fixed them (`columns`, int64): finding them
    waits for the device, and under torch.compile the whole float product is computed instead, with zeros for the other
    columns.
    """

    def __init__(
        self, in_features, out_features, bias=True, threshold=6.0, activation="none", keep_weight=True, columns=None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, activation, False, False, False, device, dtype)
        self.threshold = _checks.as_positive("OutlierLinear", "threshold", threshold)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        weight_float = torch.zeros(out_features, in_features, dtype=self.dtype, device=device) if keep_weight else None
        self.hold("weight_float", weight_float)
        fixed = None if columns is None else torch.zeros(columns, dtype=torch.int64, device=device)
        self.hold("columns", fixed)  # columns: their number
        self.prepare()

    def pack(self):
        return effvit.ops.int8_prepack(self.weight)

    def plain_weight(self):
        return self.weight

    def options(self):
        kept = ("in_features", "out_features", "bias", "activation")
        columns = None if self.columns is None else self.columns.numel()
        return {k: v for k, v in super().options().items() if k in kept} | {
            "threshold": self.threshold, "keep_weight": self.weight_float is not None, "columns": columns,
        }  # fmt: skip

    def float_weight(self, columns=None):
        """W in float32, all or some of its columns."""
        if self.weight_float is not None:
            w = self.weight_float if columns is None else self.weight_float[:, columns]
            return w.float()
        w = self.weight if columns is None else self.weight[:, columns]
        return w.float() * self.weight_scale[:, None]

    def outliers(self, x):
        wide = x.float()
        if self.columns is not None:
            columns = self.columns
            excluded = torch.zeros(self.in_features, dtype=torch.int8, device=x.device).index_fill(0, columns, 1)
        else:
            found = (x.detach().abs() >= self.threshold).any(0)
            excluded = found.to(torch.int8)
            if x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing() or _dispatcher.in_transform():
                return excluded, F.linear(torch.where(found, wide, 0.0), self.float_weight())
            columns = found.nonzero()[:, 0]
        if columns.numel() == 0:
            return None, None
        return excluded, F.linear(wide[:, columns], self.float_weight(columns))

    @classmethod
    def from_linear(cls, linear, *, threshold=6.0, activation="none", keep_weight=True, columns=None):
        """The layer of an nn.Linear, whose bias it shares; columns: indices of those to leave out always."""
        q, scale = quantised_weight(cls.__name__, linear.weight)
        columns = None if columns is None else checked_columns(columns, linear.in_features)
        count = None if columns is None else columns.numel()
        layer = cls(
            linear.in_features, linear.out_features, False, threshold, activation, keep_weight, count, device="meta",
            dtype=linear.weight.dtype,
        )  # fmt: skip
        tensors = {"weight": q}
        if keep_weight:
            tensors["weight_float"] = linear.weight.detach().clone()
        if columns is not None:
            tensors["columns"] = columns.to(linear.weight.device)
        return layer.fill(linear.weight, tensors, scale, linear.bias, None, None, None)

    def extra_repr(self):
        columns = "dynamic" if self.columns is None else self.columns.numel()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"threshold={self.threshold}, columns={columns}, keep_weight={self.weight_float is not None}"
        )


class QATLinear(nn.Module):
    """A float layer that computes what its quantised self will: quantisation-aware training, straight through.

    `linear` is the layer that it trains. Its weights and x are rounded as `Int8Linear` rounds them, by
    :func:`effvit.ops.fake_quantize_int8`. Where `kind` is "sparse24_int8" the weights are 2:4 sparse: by the
    parametrisation of `effvit.sparsify_` if linear has it, else by :func:`effvit.ops.sparse24_prune` with `algorithm`
    and `strength`. Kind "block_sparse_int8" takes the blocks of that parametrisation. `deployed()` is the `Int8Linear`,
    `Sparse24Int8Linear` or `BlockSparseInt8Linear`. `input_scale` [1] makes it static; it,
    `smooth` and `folded` are as in `Int8Linear.from_linear`.
    """

    def __init__(
        self, linear, kind="int8", activation="none", input_scale=None, smooth=None, folded=False,
        algorithm="magnitude", strength=2e-4,
    ):  # fmt: skip
        super().__init__()
        from ..sparsify import BlockMask, mask_of

        if kind not in ("int8", "sparse24_int8", "block_sparse_int8"):
            raise _checks.value_error("QATLinear", "kind", "int8, sparse24_int8 or block_sparse_int8", repr(kind))
        if kind == "block_sparse_int8" and not isinstance(mask_of(linear), BlockMask):
            raise _checks.value_error("QATLinear", "linear", "one that effvit.sparsify_ has cut into blocks", "dense")
        _checks.index_of("QATLinear", "activation", activation, tuple(ACTIVATIONS))
        self.linear = linear
        self.kind = kind
        self.activation = activation
        self.folded = folded
        self.algorithm = algorithm
        self.strength = strength
        device = linear.weight.device
        if input_scale is not None:
            input_scale = torch.as_tensor(input_scale, dtype=torch.float32, device=device).detach().reshape(1).clone()
        _checks.check_scales("QATLinear", {"input_scale": input_scale}, "input_scale")
        check_smooth("QATLinear", smooth, linear.weight)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("smooth", None if smooth is None else smooth.detach().float().clone())

    @property
    def in_features(self):
        return self.linear.in_features

    @property
    def out_features(self):
        return self.linear.out_features

    def weight(self):
        """What is rounded: [out_features, in_features] in floating point."""
        from ..sparsify import Sparse24Mask, mask_of

        w = self.linear.weight
        if self.kind == "sparse24_int8" and not isinstance(mask_of(self.linear), Sparse24Mask):
            w = sparse24_prune(w, algorithm=self.algorithm, strength=self.strength)
        return scaled(w, self.smooth)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, w = input, self.weight()
        if self.smooth is not None and not self.folded:
            x = x / self.smooth.to(x.dtype)
        return ACTIVATIONS[self.activation](
            F.linear(self.rounded(x, self.input_scale), self.rounded(w), self.linear.bias)
        )

    @staticmethod
    def rounded(x, scale=None):
        if x.dtype == torch.float64:  # the kernels end at float32
            return _fake_quantize(x, scale if scale is None else scale.expand(x.shape[:-1]))
        scale = scale if scale is None else scale.float()
        return effvit.ops.fake_quantize_int8(_dense(x), scale)

    @torch.no_grad()
    def deployed(self):
        """The quantised layer that this one has been trained to be; it shares the bias."""
        from .block_sparse import BlockSparseInt8Linear
        from .sparse24 import Sparse24Int8Linear

        options = {"activation": self.activation, "input_scale": self.input_scale, "smooth": self.smooth}
        if self.kind == "int8":
            return Int8Linear.from_linear(self.linear, folded=self.folded, **options)
        if self.kind == "block_sparse_int8":
            return BlockSparseInt8Linear.from_linear(self.linear, folded=self.folded, **options)
        return Sparse24Int8Linear.from_linear(
            self.linear, algorithm=self.algorithm, folded=self.folded, **options
        )  # fmt: skip

    def extra_repr(self):
        return f"kind={self.kind}, activation={self.activation}, {'dynamic' if self.input_scale is None else 'static'}"
