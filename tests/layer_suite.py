"""What the tests of attention modules share: a module against a plain formula on the same parameters."""

import contextlib
import copy
import functools
import warnings

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth

DTYPES = [torch.float32, torch.bfloat16]


class Record(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def randomise(module, seed=0, scale=0.4):
    """Parameters and running statistics at a scale where every one of them matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * scale)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)
                m.weight.add_(1)
            elif isinstance(m, nn.LayerNorm | nn.RMSNorm) and m.weight is not None:
                m.weight.add_(1)
    return module


def tokens(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(module, x, call):
    """Output, gradients of the input and of every parameter for a fixed cotangent, and floating-point buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(module, x)
    # The cotangent is exact in bfloat16, so that it is the same one in every dtype.
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(y.dtype)
    module.zero_grad()
    (y * weight).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found.update({f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None})
    return found | {name: b.clone() for name, b in module.named_buffers() if b.is_floating_point()}


FORMS = ("pairs", "state", "pairs, keys reversed", "state, keys reversed")


def attend(q, k, v, normaliser, q_den=None, k_den=None, form="pairs"):
    """Attention without softmax of heads [..., L, d], [..., M, d], [..., M, e], by its definition.

    Every query's sum of q_den . k_den over all keys goes through `normaliser` and divides. Written down in one of
    FORMS: with the scores of all pairs in a matrix or from sums over the keys, in their order or in reverse.
    """
    q_den, k_den = q if q_den is None else q_den, k if k_den is None else k_den
    if "reversed" in form:
        k, v, k_den = (t.flip(-2) for t in (k, v, k_den))
    if "pairs" in form:
        sums = (q_den @ k_den.transpose(-1, -2)).sum(-1, keepdim=True)
        return q @ k.transpose(-1, -2) / normaliser(sums) @ v
    return q @ (k.transpose(-1, -2) @ v) / normaliser(q_den @ k_den.sum(-2, keepdim=True).transpose(-1, -2))


@contextlib.contextmanager
def absolute_terms(module, found):
    """While it lasts, found["gradient of <parameter>"] = the sum of the absolute values of the terms of that gradient.

    For linear layers, convolutions and norms: sums over tokens, often of terms much larger than the sum.
    A term is as large as the largest channel of its token's gradient, which is what that gradient's error relates to.
    found["input"]: those of the input's gradient, of all linear layers that read it.
    """
    handles = []
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm)
    for name, m in module.named_modules():
        m.absolute_terms = found, f"gradient of {name}." if name else "gradient of "  # for `spread`
        if not isinstance(m, (nn.Linear, nn.Conv2d, *norms)) or m.weight is None:
            continue
        if isinstance(m, nn.LayerNorm) and len(m.normalized_shape) > 1:  # over a whole map: one term per sample
            continue

        def forward(m, args, y, name=name):
            channels = 1 if isinstance(m, (nn.Conv2d, norms[0])) else y.dim() - 1
            others = [d for d in range(y.dim()) if d != channels]
            x = args[0].detach().abs()
            reads_input = args[0].is_leaf and args[0].requires_grad and not isinstance(args[0], nn.Parameter)
            if isinstance(m, norms):  # the gradient of the weight sums g * normalised
                along = [-1 if d == channels else 1 for d in range(y.dim())]
                shift = 0 if getattr(m, "bias", None) is None else m.bias.detach().view(along)
                x = ((y.detach() - shift) / m.weight.detach().view(along)).abs()

            def backward(g):
                if g.shape[channels] == 0:
                    return
                if reads_input and isinstance(m, nn.Linear):
                    found["input"] = found.get("input", 0.0) + g.abs() @ m.weight.detach().abs()
                g = g.abs().amax(channels, keepdim=True).expand_as(g)
                if isinstance(m, nn.Conv2d):
                    weight = nn.grad.conv2d_weight(x, m.weight.shape, g, m.stride, m.padding, m.dilation, m.groups)
                elif isinstance(m, nn.Linear):
                    weight = g.flatten(0, -2).T @ x.flatten(0, -2)
                else:
                    weight = (g * x).sum(others)
                for parameter, terms in (("weight", weight), ("bias", g.sum(others))):  # of all its calls
                    key = f"gradient of {name}.{parameter}"
                    found[key] = found.get(key, 0.0) + terms

            y.register_hook(backward)

        handles.append(m.register_forward_hook(forward))
    yield found
    for handle in handles:
        handle.remove()
    for m in module.modules():
        del m.absolute_terms


def spread(module, name, shape):
    """Parameter `name` of `module` expanded to `shape`, one term of its gradient per entry: under `absolute_terms`, the
    sum of their absolute values is found as well."""
    p = getattr(module, name)
    y = p.expand(shape)
    if hasattr(module, "absolute_terms"):
        found, prefix = module.absolute_terms
        y.register_hook(lambda g: found.__setitem__(prefix + name, g.abs().sum_to_size(p.shape)))
    return y


def _in_several_orders(plain, is_map):
    """The same formula with its sums over tokens in other orders, as PyTorch is free to choose."""
    orders = [plain, lambda m, x: plain(m, x.flip(0)).flip(0)]
    if is_map:
        orders.append(lambda m, x: plain(m, x.contiguous(memory_format=torch.channels_last)))
    return orders


def check(module, plain, x, *, yardsticks=(), also=(), autocast=None, is_map=False, call=None):
    """Output, all gradients and buffers of module(x) by the project's rule.

    plain(module, x) computes the same from the module's parameters, in any dtype: the truth in float64, a yardstick in
    the module's dtype. `also` are other ways to write that formula and `yardsticks` further modules of the same
    state_dict, with a forward of their own: more yardsticks. Outputs and input gradients are measured against the
    largest channel of their token, gradients against the sum of their absolute terms where that is larger: those of
    parameters are sums over all tokens, and never measured against less than their largest entry.
    """
    call = call or (lambda m, x: m(x))
    double = copy.deepcopy(module).double()

    def cast(function):
        def run(m, x):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                return function(m, x)

        return run

    got = with_gradients(copy.deepcopy(module), x, cast(call))
    others = []
    for formula in (plain, *also):
        others += [with_gradients(copy.deepcopy(module), x, cast(f)) for f in _in_several_orders(formula, is_map)]
    for m in yardsticks:
        others += [with_gradients(copy.deepcopy(m), x, cast(f)) for f in _in_several_orders(call, is_map)]
    with absolute_terms(double, {}) as terms:
        truth = with_gradients(double, x.double(), plain)
    assert got.keys() == truth.keys()
    eps = torch.finfo(autocast or x.dtype).eps
    for name, t in truth.items():
        if name in ("output", "input"):
            magnitude = t.abs()
            if name in terms and not is_map:
                magnitude = torch.maximum(magnitude, terms[name])
            magnitude = magnitude.amax(1 if is_map else -1, keepdim=True).expand_as(t)
            assert got[name].shape == others[0][name].shape
        else:
            magnitude = t.abs().max().expand_as(t)
            magnitude = torch.maximum(magnitude, terms.get(name, magnitude))
        assert_close_to_truth(got[name], t, [y[name] for y in others], magnitude=magnitude, eps=eps, name=name)
    return got


def check_forms(module, plain, x, **options):
    """check() of a plain(module, x, form) that calls `attend`: its other forms are yardsticks too."""
    return check(module, plain, x, also=[functools.partial(plain, form=form) for form in FORMS[1:]], **options)


def check_everything_else(module, make, x, call=None):
    """float64, empty batch, state_dict round trip, dtype and device arguments, torch.compile, determinism."""
    call = call or (lambda m, x: m(x))
    module = module.eval()
    y = call(module, x)
    other = randomise(make(), seed=9).eval()
    other.load_state_dict(module.state_dict(), strict=True)
    assert_bitwise_equal(call(other, x), y)
    assert call(module, x[:0]).shape == (0, *y.shape[1:])
    torch.testing.assert_close(call(copy.deepcopy(module).double(), x.double()).float(), y)

    meta = make(device="meta", dtype=torch.bfloat16)
    assert meta.state_dict().keys() == module.state_dict().keys()
    for name, p in meta.named_parameters():
        assert p.is_meta and p.dtype == torch.bfloat16, name

    module.train()
    copied = copy.deepcopy(module)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    expected, got = with_gradients(module, x, call), with_gradients(copied, x, lambda m, x: call(compiled, x))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def quantised(module):
    """A copy in evaluation, its linear layers dynamically quantised: their weights and biases are methods there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao.quantization is, as long as it is there
        module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module).eval(), {nn.Linear}, torch.qint8)
    assert not any(type(m) is nn.Linear for m in module.modules())
    return module


@torch.no_grad()
def check_quantised(module, plain, x, *, last="proj", call=None):
    """The layer with quantised projections runs, and equals its formula with the same ones.

    What enters the last projection is compared: there a difference of one rounding may become one of a whole step.
    """
    call = call or (lambda m, x: m(x))
    other, seen = quantised(module), []
    handle = other.get_submodule(last).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    y, expected = call(other, x), plain(other, x)
    handle.remove()
    assert y.shape == expected.shape
    torch.testing.assert_close(seen[0].reshape(seen[1].shape), seen[1])
    assert not torch.equal(y, call(copy.deepcopy(module).eval(), x))


@torch.no_grad()
def check_merged(module, x, *, yardsticks=(), call=None, merge=lambda m: m.reparameterize()):
    """A copy of the module in evaluation after `merge`, and that its outputs are those before, by the project's rule.

    t is the module before in float64, yardsticks are the module before and `yardsticks`, functions as `plain` of check.
    """
    call = call or (lambda m, x: m(x))
    module = copy.deepcopy(module).eval()
    merged = copy.deepcopy(module)
    merge(merged)
    assert not merged.training and merged.state_dict().keys() != module.state_dict().keys()
    truth = call(copy.deepcopy(module).double(), x.double())
    magnitude = truth.abs().amax(1 if truth.dim() == 4 else -1, keepdim=True).expand_as(truth)
    before = [f(module, x) for f in (call, *yardsticks)]
    assert_close_to_truth(call(merged, x), truth, before, magnitude=magnitude)
    state = {name: t.clone() for name, t in merged.state_dict().items()}
    merge(merged)  # a second time: nothing
    assert merged.state_dict().keys() == state.keys()
    for name, t in merged.state_dict().items():
        assert_bitwise_equal(t, state[name])
    return merged
