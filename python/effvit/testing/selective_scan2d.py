"""selective_scan2d's samples, bad inputs and error magnitudes."""

import torch
import torch.nn.functional as F

from effvit.reference.selective_scan2d import cross_merge, cross_scan
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import changed, in_order, misaligned, to
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "selective_scan2d"
TENSORS = OPS[NAME].names
BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names

# ---- samples -------------------------------------------------------------------------------------------------------


def _sample(
    name, B, H, W, D, N, *, tags="", skip=True, bias=True, values=None, layout=None, dtypes=FLOAT_DTYPES, **kwargs
):  # fmt: skip
    """Tokens as a normalised layer gives them, decays from nearly none to strong ones within a few tokens."""

    def make(dtype, device, generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator)

        x, dt, b, c = randn(B, H, W, D), randn(B, H, W, 4, D), randn(B, H, W, 4, N), randn(B, H, W, 4, N)
        a = -torch.exp(randn(4, D, N))
        d, dt_bias = 0.5 + randn(4, D), randn(4, D) - 1
        if not kwargs.get("softplus", True):
            dt = dt.abs()
            dt_bias = dt_bias.abs()
        if values is not None:
            dt, a = values(dt, a)
        tokens = [t.to(device, dtype) for t in (x, dt, b, c)]
        if layout is not None:
            tokens = layout(*tokens)
        wide = torch.promote_types(dtype, torch.float32)
        a, d, dt_bias = (t.to(device, wide) for t in (a, d, dt_bias))
        return (*tokens, a, d if skip else None, dt_bias if bias else None), dict(kwargs)

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _one_projection(x, dt, b, c):
    """x half of a projection; dt, b and c side by side in another one, as x_proj makes them."""
    x = torch.cat((x, x), -1)[..., : x.shape[-1]]
    return x, *torch.cat((dt, b, c), -1).split([dt.shape[-1], b.shape[-1], c.shape[-1]], -1)


def _channels_first(x, dt, b, c):
    """Directions outermost; maps with columns before rows, one element past an aligned address."""
    return in_order(x, (0, 2, 1, 3)), in_order(dt, (3, 0, 1, 2, 4)), in_order(b, (3, 0, 2, 1, 4)), misaligned(c)


def _extreme_steps(dt, a):
    """Step sizes from e^-20 to 60 with decays up to 16: states that vanish in one token, or never."""
    return dt * 20, a * 4


def _slow(dt, a):
    """Hardly any decay: sums over the whole map."""
    return dt - 6, a * 0.01


FLOAT32 = (torch.float32,)
# fmt: off
SAMPLES = [
    # VMamba at 224 x 224, fewer channels: 16 states before its version v05, one since.
    _sample("vmamba_14x14_n16", 1, 14, 14, 40, 16, tags="vit"),
    _sample("vmamba_28x28_n1", 2, 28, 28, 24, 1, tags="vit", dtypes=FLOAT32),
    # Small: the interpreter runs them too.
    _sample("small", 2, 3, 2, 5, 3, tags="small framework"),
    _sample("small_plain", 1, 2, 3, 2, 1, tags="small framework", skip=False, bias=False, softplus=False),
    _sample("small_blocks", 1, 2, 3, 37, 16, tags="small", bias=False),
    _sample("tiny", 1, 1, 2, 1, 2, tags="tiny small"),
    # Nasty.
    _sample("one_token", 3, 1, 1, 17, 4, tags="nasty"),
    _sample("one_row", 1, 1, 37, 16, 5, tags="nasty", skip=False),
    _sample("one_column", 1, 41, 1, 3, 16, tags="nasty"),
    _sample("n64", 1, 5, 7, 9, 64, tags="nasty"),
    _sample("n256", 1, 2, 3, 2, 256, tags="nasty", dtypes=FLOAT32),
    _sample("large_batch", 33, 2, 3, 20, 2, tags="nasty"),
    _sample("extreme_steps", 1, 5, 8, 20, 4, tags="nasty", values=_extreme_steps),
    _sample("slow", 1, 9, 11, 18, 3, tags="nasty", values=_slow),
    # Strides.
    _sample("one_projection", 2, 4, 5, 18, 2, tags="strided", layout=_one_projection),
    _sample("channels_first", 2, 5, 3, 7, 16, tags="strided", layout=_channels_first),
    # Empty.
    _sample("empty_batch", 0, 3, 4, 5, 2, tags="empty"),
    _sample("empty_map", 2, 3, 0, 5, 2, tags="empty"),
    # More than a CUDA grid's y dimension.
    _sample("huge_batch", 70001, 1, 1, 1, 1, tags="huge", dtypes=FLOAT32),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes, layouts and options, small; `choose` is a random.Random."""
    values = choose.choice((None, None, _extreme_steps, _slow))
    softplus = choose.random() < 0.8 or values is not None
    return _sample(
        name, choose.choice((1, 1, 2, 19)), choose.randint(1, 6), choose.randint(1, 6),
        choose.choice((1, 3, 8, 16, 17, 33, 40)), choose.choice((1, 1, 2, 3, 8, 16, 16, 17)),
        skip=choose.random() < 0.7, bias=choose.random() < 0.7, values=values,
        layout=choose.choice((None, _one_projection, _channels_first)), softplus=softplus,
    )  # fmt: skip


# ---- error magnitudes ---------------------------------------------------------------------------------------------


class _Slope(torch.autograd.Function):
    """`value` with the derivative `slope` in t."""

    @staticmethod
    def forward(ctx, t, value, slope):
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms: the scans of |b|, |c| and |x|, with the decays as they are, and their
    derivatives with |a| for a, by autograd.
    """
    x, dt, b, c, a, d, dt_bias = args
    names = [n for n, t in zip(TENSORS, args, strict=True) if t is not None]
    leaves = {n: t.abs().requires_grad_() for n, t in zip(TENSORS, args, strict=True) if t is not None}
    z = dt if dt_bias is None else dt + dt_bias
    softplus = kwargs.get("softplus", True)
    delta = F.softplus(z) if softplus else z
    slope = torch.where(z > 20, 1.0, torch.sigmoid(z)) if softplus else torch.ones_like(z)  # from 20 on PyTorch's is 1
    with torch.enable_grad():
        both = leaves["dt"] if dt_bias is None else leaves["dt"] + leaves["dt_bias"]
        step = cross_scan(_Slope.apply(both, delta.abs(), slope))
        exponent = step.unsqueeze(-1) * leaves["a"]
        decay = (cross_scan(delta).unsqueeze(-1) * a).exp()
        decay = _Slope.apply(exponent, decay, decay)
        u = cross_scan(leaves["x"].unsqueeze(3).expand(-1, -1, -1, 4, -1))
        added = (step * u).unsqueeze(-1) * cross_scan(leaves["b"]).unsqueeze(3)
        states = []
        for e, new in zip(decay.unbind(1), added.unbind(1), strict=True):
            states.append(e * states[-1] + new if states else new)
        H, W = x.shape[1:3]
        h = torch.stack(states, 1) if states else added
        y = (h * cross_scan(leaves["c"]).unsqueeze(3)).sum(-1)
        y = y if d is None else y + leaves["d"] * u
        out = cross_merge(y, H, W)
        if output_grads is None:
            return {"out": out.detach()}, {}
        wanted = [leaves[n] for n in names]
        found = torch.autograd.grad(out, wanted, output_grads[0].abs(), allow_unused=True, materialize_grads=True)
    return {"out": out.detach()}, dict(zip(names, found, strict=True))


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call with a larger batch."""
    tokens = (torch.cat((t, t.flip(0), t[:1])).contiguous() for t in args[:4])
    return (*tokens, *args[4:]), kwargs


def memory_calls(dtype):
    calls = []
    for B, H, D, N in ((8, 56, 96, 16), (1, 112, 64, 1), (64, 14, 192, 16), (1, 320, 32, 32)):
        args, kwargs = _sample("memory", B, H, H, D, N).build(dtype)
        calls.append((f"{B}x{H}x{H}x{D}_n{N}", args, kwargs))
    return calls


def good_call():
    """A call that works; every bad input is this one with something changed."""
    args, _ = _sample("good", 1, 2, 3, 4, 2).build()
    return dict(zip(TENSORS, args, strict=True))


def _bad(name, error, match, **changes):
    """changes: argument -> new value, or a function of the old one."""
    return BadInput(name, lambda: split_call(changed(good_call(), changes), TENSORS), error, match)


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        return split_call(changed(good_call() | {"grad_out": torch.zeros(1, 2, 3, 4)}, changes), BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op=f"{NAME}_backward")


_STATES = "b must have between 1 and 256 states, got "
# fmt: off
BAD_INPUTS = [
    *declared_bad_inputs(NAME, good_call),
    _bad("dt_three_directions", ValueError,
         r"dt must be \[B, H, W, 4, D\] like x \[1, 2, 3, 4\], got \[1, 2, 3, 3, 4\]", dt=lambda t: t[..., :3, :]),
    _bad("a_three_directions", ValueError, r"a must be \[4, D, N\] like .*got \[3, 4, 2\]", a=lambda t: t[:3]),
    _bad("a_of_all_directions", ValueError, r"a must be \[4, D, N\] like .*got \[16, 2\]", a=lambda t: t.flatten(0, 1)),
    _bad("c_states", ValueError, r"c must be \[B, H, W, 4, N\] like .*got \[1, 2, 3, 4, 1\]", c=lambda t: t[..., :1]),
    _bad("no_states", ValueError, rf"{_STATES}\[1, 2, 3, 4, 0\]", **dict.fromkeys("bca", lambda t: t[..., :0])),
    _bad("too_many_states", ValueError, rf"{_STATES}\[1, 2, 3, 4, 257\]",
         **dict.fromkeys("bca", lambda t: torch.zeros(*t.shape[:-1], 257))),
    _bad("d_of_one_direction", ValueError, r"d must be \[4, D\] = \[4, 4\], got \[4\]", d=lambda t: t[0]),
    _bad("dt_bias_channels", ValueError, r"dt_bias must be \[4, D\] = \[4, 4\], got \[4, 3\]",
         dt_bias=lambda t: t[:, :3]),
    # the backward op
    _bad_backward("backward_grad_shape", ValueError, r"grad_out must be \[B, H, W, D\] = \[1, 2, 3, 4\], got "
                  r"\[1, 3, 2, 4\]", grad_out=lambda t: t.transpose(1, 2)),
    _bad_backward("backward_grad_dtype", TypeError, r"grad_out must be (torch\.)?float32, got .*(bfloat16|BFloat16)",
                  grad_out=to(torch.bfloat16)),
    _bad_backward("backward_grad_none", TypeError, r"grad_out must be a torch\.Tensor, got NoneType",
                  schema_match=r"grad_out must be .*got \[0\]", grad_out=None),
    _bad_backward("backward_d", ValueError, r"d must be \[4, D\] = \[4, 4\], got \[4, 2\]", d=lambda t: t[:, :2]),
    _bad_backward("backward_states", ValueError, rf"{_STATES}\[1, 2, 3, 4, 0\]",
                  **dict.fromkeys("bca", lambda t: t[..., :0])),
]
# fmt: on

SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=160,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=resize,
    memory_calls=memory_calls,
    memory_slack_per_thread=10 << 20,  # sums of groups of channels: 16 MiB at most, and the states of every chunk
)
