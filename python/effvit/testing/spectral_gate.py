"""spectral_gate's samples, bad inputs and error magnitudes."""

import dataclasses

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import IS_FLOAT, IS_TENSOR, every_other, in_order, misaligned, sliced, to
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "spectral_gate"
TENSORS = OPS[NAME].names
BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names

# ---- samples -------------------------------------------------------------------------------------------------------


def _sample(name, G, N, H, W, C, *, tags="", layout=None, weights=None, values=None, dtypes=FLOAT_DTYPES):
    """G weights, each for N samples. Both parts of every bin of a weight are drawn, also those without effect."""

    def make(dtype, device, generator):
        x = torch.randn(G, N, H, W, C, generator=generator)
        weight = torch.randn(G, H, W // 2 + 1, C, 2, generator=generator)
        if values is not None:
            x, weight = values(x, weight)
        x = x.to(device, dtype)
        weight = weight.to(device, torch.promote_types(dtype, torch.float32))
        return (layout(x) if layout else x, weights(weight) if weights else weight), {}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _columns_first(x):
    return in_order(x, (1, 0, 3, 2, 4))


def _of_wider(x):
    """Some channels of a wider map."""
    return sliced(x, 4)


def _scaled(x, weight):
    """Channels and bins of very different sizes."""
    channels = torch.logspace(-4, 4, x.shape[-1])
    rows = torch.logspace(-3, 3, weight.shape[1])
    return x * channels, weight * rows[:, None, None, None]


def _positive(x, weight):
    """Sums in which nothing cancels."""
    return 1 + 0.05 * x, weight


FLOAT32 = (torch.float32,)
# fmt: off
SAMPLES = [
    # GFNet at 224 x 224: one stage of 14 x 14, or a pyramid from 56 x 56; fewer channels.
    _sample("gfnet_14x14", 1, 2, 14, 14, 40, tags="vit"),
    _sample("gfnet_28x28", 1, 3, 28, 28, 16, tags="vit"),
    _sample("gfnet_56x56", 1, 1, 56, 56, 17, tags="vit", dtypes=FLOAT32),
    _sample("gfnet_24x24", 1, 1, 24, 24, 20, tags="vit", dtypes=(torch.bfloat16,)),
    # Small: the interpreter runs them too.
    _sample("small", 2, 2, 3, 4, 6, tags="small framework"),
    _sample("small_odd", 1, 3, 6, 5, 3, tags="small"),
    _sample("small_blocks", 1, 5, 4, 7, 37, tags="small"),
    _sample("small_one_axis", 3, 1, 1, 19, 8, tags="small nasty"),
    _sample("tiny", 1, 2, 3, 3, 1, tags="tiny small"),
    _sample("tiny_even", 2, 1, 2, 4, 1, tags="tiny small"),
    # Nasty: every radix, primes, one axis, one pixel.
    _sample("one_pixel", 2, 3, 1, 1, 5, tags="nasty"),
    _sample("one_row", 1, 2, 1, 120, 18, tags="nasty"),
    _sample("one_column", 1, 2, 45, 1, 18, tags="nasty"),
    _sample("two", 2, 1, 2, 2, 33, tags="nasty"),
    _sample("primes", 1, 1, 17, 31, 9, tags="nasty"),
    _sample("large_prime", 1, 1, 2, 211, 3, tags="nasty", dtypes=FLOAT32),
    _sample("radix_11_13", 1, 2, 22, 39, 5, tags="nasty"),
    _sample("powers_of_two", 1, 1, 32, 64, 4, tags="nasty", dtypes=FLOAT32),
    _sample("many_factors", 1, 1, 16, 210, 3, tags="nasty", dtypes=FLOAT32),
    _sample("large_batch", 1, 67, 3, 4, 17, tags="nasty"),
    _sample("many_positive", 1, 1500, 2, 3, 16, tags="nasty", values=_positive, dtypes=FLOAT32),
    _sample("weights_each", 33, 1, 4, 5, 3, tags="nasty"),
    _sample("scaled", 1, 4, 8, 9, 16, tags="nasty", values=_scaled, dtypes=FLOAT32),
    # Strides.
    _sample("misaligned", 1, 2, 7, 6, 19, tags="strided", layout=misaligned, weights=every_other),
    _sample("columns_first", 2, 3, 5, 6, 16, tags="strided", layout=_columns_first, weights=misaligned),
    _sample("of_wider", 1, 2, 6, 10, 21, tags="strided", layout=_of_wider),
    # Empty.
    _sample("empty_batch", 1, 0, 3, 4, 5, tags="empty"),
    _sample("empty_map", 2, 3, 4, 0, 5, tags="empty"),
    _sample("empty_channels", 2, 3, 4, 2, 0, tags="empty"),
    # More than a CUDA grid's y dimension.
    _sample("huge_batch", 1, 70001, 1, 2, 1, tags="huge", dtypes=FLOAT32),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes and layouts, small; `choose` is a random.Random."""
    sizes = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 20, 21, 22, 26, 34)
    return _sample(
        name, choose.choice((1, 1, 2, 5)), choose.choice((1, 2, 3, 9)), choose.choice(sizes), choose.choice(sizes),
        choose.choice((1, 3, 8, 16, 17, 33, 40)), layout=choose.choice((None, misaligned, _columns_first, _of_wider)),
        weights=choose.choice((None, None, misaligned, every_other)),
    )  # fmt: skip


# ---- error magnitudes ---------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """Every number of a map is a sum over all bins, and so is its error: the absolute values of these terms, per
    channel. A bin of the weight's gradient is a sum of products over the samples; the error of a bin is a share of the
    spectrum's largest, whatever the bin itself is. All of it is float32's: in half precision results are rounded once.
    """
    x, weight = args
    if x.numel() == 0:
        return {"out": x}, {} if output_grads is None else {"x": x, "weight": torch.zeros_like(weight)}
    H, W = x.shape[2:4]
    gate = torch.view_as_complex(weight.contiguous()).unsqueeze(1)
    twice = x.new_full((W // 2 + 1, 1), 2.0)  # how often a bin of the half spectrum is in the whole one
    twice[0] = 1
    if W % 2 == 0:
        twice[-1] = 1

    def spectrum(t):
        return torch.fft.rfft2(t, dim=(2, 3)).abs()

    inside = min(1.0, torch.finfo(torch.float32).eps / eps)

    def terms(bins):
        return ((bins * gate.abs() * twice).sum((2, 3), keepdim=True) / (H * W)).expand_as(x) * inside

    of_x = spectrum(x)
    found = {"out": terms(of_x)}
    if output_grads is None:
        return found, {}
    of_g = spectrum(output_grads[0])
    largest = of_x.amax((2, 3), keepdim=True) * of_g.amax((2, 3), keepdim=True)
    of_weight = (largest * twice / (H * W)).sum(1).unsqueeze(-1).expand_as(weight)
    return found, {"x": terms(of_g), "weight": of_weight}


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call with more samples of each weight."""
    x, weight = args
    return (torch.cat((x, x.flip(1), x[:, :1]), 1), weight), kwargs


def memory_calls(dtype):
    calls = []
    for N, H, C in ((32, 14, 384), (8, 56, 64), (1, 128, 64)):
        args, kwargs = _sample("memory", 1, N, H, H, C).build(dtype)
        calls.append((f"{N}x{H}x{H}x{C}", args, kwargs))
    return calls


def good_call():
    """A call that works; every bad input is this one with something changed."""
    args, _ = _sample("good", 2, 3, 4, 6, 5).build()
    return dict(zip(TENSORS, args, strict=True))


def _bad(name, error, match, **changes):
    def make():
        call = good_call()
        return split_call(call | {n: change(call[n]) for n, change in changes.items()}, TENSORS)

    return BadInput(name, make, error, match, public=False)


def _bad_public(name, error, match, **changes):
    """Of the public function, whose tensors are without G."""

    def make():
        call = good_call()
        call = {"x": call["x"][0], "weight": call["weight"][0]}
        new = {n: change(call.get(n)) if callable(change) else change for n, change in changes.items()}
        return split_call(call | new, TENSORS)

    return BadInput(name, make, error, match, torch_ops=False)


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        call = good_call()
        call = {"grad_out": torch.zeros_like(call["x"])} | call
        return split_call(call | {n: change(call[n]) for n, change in changes.items()}, BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op=f"{NAME}_backward")


_BINS = r"weight must be \[G, H, W//2 \+ 1, C, 2\] = \[2, 4, 4, 5, 2\], got "
_PUBLIC = (
    r"weight must be \[H, W//2 \+ 1, C, 2\] = \[4, 4, 5, 2\], or complex \[H, W//2 \+ 1, C\], perhaps with B = 3 in "
    r"front, got "
)
# fmt: off
BAD_INPUTS = [
    *(dataclasses.replace(bad, public=False) for bad in declared_bad_inputs(NAME, good_call)),
    _bad("all_bins", ValueError, rf"{_BINS}\[2, 4, 6, 5, 2\]", weight=lambda t: torch.cat((t, t[:, :, :2]), 2)),
    _bad("one_bin_less", ValueError, rf"{_BINS}\[2, 4, 3, 5, 2\]", weight=lambda t: t[:, :, :3]),
    _bad("no_imaginary_part", ValueError, r"weight must be \[G, H, F, C, 2\] like x \[2, 3, 4, 6, 5\], got "
         r"\[2, 4, 4, 5, 1\]", weight=lambda t: t[..., :1]),
    _bad("complex", TypeError, r"weight must be ", weight=lambda t: torch.view_as_complex(t)),
    _bad("weight_bfloat16", TypeError, r"weight must be (torch\.)?float32, got .*(bfloat16|BFloat16)",
         weight=to(torch.bfloat16)),
    # the public function
    _bad_public("public_x_list", TypeError, rf"x {IS_TENSOR}list", x=lambda t: t.tolist()),
    _bad_public("public_x_rank", ValueError, r"x must be \[B, H, W, C\] or \[B, L, C\], got \[3, 4, 6, 5, 1\]",
                x=lambda t: t.unsqueeze(-1)),
    _bad_public("public_x_float64", TypeError, rf"x {IS_FLOAT}.*float64", x=to(torch.float64)),
    _bad_public("public_x_stride", ValueError, r"x must be a tensor whose last stride is 1, got", x=every_other),
    _bad_public("public_weight_none", TypeError, rf"weight {IS_TENSOR}NoneType", weight=None),
    _bad_public("public_weight_float64", TypeError, r"weight must be (torch\.)?float32, got .*float64",
                weight=to(torch.float64)),
    _bad_public("public_weight_integer", TypeError, r"weight must be (torch\.)?float32, got .*int32",
                weight=to(torch.int32)),
    _bad_public("public_weight_bins", ValueError, rf"{_PUBLIC}\[4, 3, 5, 2\]", weight=lambda t: t[:, :3]),
    _bad_public("public_weight_complex_bins", ValueError, rf"{_PUBLIC}\[3, 4, 5\]",
                weight=lambda t: torch.view_as_complex(t)[:3]),
    _bad_public("public_weight_batch", ValueError, rf"{_PUBLIC}\[2, 4, 4, 5, 2\]",
                weight=lambda t: t.expand(2, 4, 4, 5, 2)),
    _bad_public("public_weight_of_one_axis", ValueError, rf"{_PUBLIC}\[4, 5, 2\]", weight=lambda t: t[0]),
    _bad_public("public_one_axis", ValueError, r"weight must be \[L//2 \+ 1, C, 2\] = \[4, 5, 2\], or complex .*, got "
                r"\[4, 4, 5, 2\]", x=lambda t: t[:, 0]),
    _bad_public("norm_other", ValueError, r"norm must be ortho, backward or forward, got none", norm="none"),
    _bad_public("norm_none", TypeError, r"norm must be a string, got NoneType", norm=None),
    # the backward op
    _bad_backward("backward_grad_shape", ValueError, r"grad_out must be \[G, N, H, W, C\] = \[2, 3, 4, 6, 5\], got "
                  r"\[2, 3, 6, 4, 5\]", grad_out=lambda t: t.transpose(2, 3)),
    _bad_backward("backward_grad_dtype", TypeError, r"grad_out must be (torch\.)?float32 like x, got",
                  schema_match=r"grad_out must be", grad_out=to(torch.bfloat16)),
    _bad_backward("backward_grad_none", TypeError, r"grad_out must be a torch\.Tensor, got NoneType",
                  schema_match=r"grad_out must be .*got \[0\]", grad_out=lambda t: None),
    _bad_backward("backward_bins", ValueError, rf"{_BINS}\[2, 4, 3, 5, 2\]", weight=lambda t: t[:, :, :3]),
]
# fmt: on

SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=200,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    public_kwargs=lambda kwargs: None,  # the public function's tensors have other shapes
    dynamic="N",
    resize=resize,
    memory_calls=memory_calls,
    memory_slack_per_thread=10 << 20,  # sums over the batch: 8 MiB at most, and spectra of a vector of channels
)
