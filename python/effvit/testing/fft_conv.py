"""fft_conv's samples, bad inputs and error magnitudes."""

import dataclasses
import math

import torch

from effvit.reference.fft_conv import ACTIVATIONS, MODES, kernel_spectrum, transform_sizes
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import changed, in_order, misaligned, to
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "fft_conv"
TENSORS = OPS[NAME].names
BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names
ACTS = tuple(ACTIVATIONS)

# ---- samples -------------------------------------------------------------------------------------------------------


def _three(values, absent):
    values = list(values) if isinstance(values, (tuple, list)) else [values]
    return [absent] * (3 - len(values)) + values


def _sample(
    name, B, C, S, K, *, last=False, mode="causal", J=1, d=True, gates="pre post", rev=None, spectrum=None, act="none",
    keep=0, scale=1.0, layout=None, kernel_dtype=None, values=None, tags="", dtypes=FLOAT_DTYPES,
):  # fmt: skip
    """Sizes and taps per axis, an int for one axis. spectrum: sizes of the transform; k is then None."""

    def make(dtype, device, generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator)

        sizes, taps = _three(S, 1), _three(K, 1)
        axes = len(S) if isinstance(S, tuple) else 1
        modes = _three([mode] * axes if isinstance(mode, str) else mode, "circular")
        shape = (B, 1, *sizes, C) if last else (B, C, *sizes, 1)
        maps = {"u": randn(*shape), "pregate": randn(*shape), "postgate": randn(*shape)}
        k = randn(J, C, *taps) / math.sqrt(math.prod(taps))
        k_rev = None if rev is None else randn(J, C, *_three(rev, 1)) / math.sqrt(math.prod(_three(rev, 1)))
        if values is not None:
            maps["u"], k = values(maps["u"], k)
        maps = {n: t.to(device, dtype) for n, t in maps.items()}
        if layout is not None:
            maps = {n: layout(t) for n, t in maps.items()}
        wide = torch.promote_types(dtype, torch.float32)
        own = dtype if kernel_dtype is None or dtype == torch.float64 else kernel_dtype
        tensors = {
            "k": k.to(device, own), "d": randn(C).to(device, own) if d else None,
            "k_rev": None if k_rev is None else k_rev.to(device, own), "spectrum": None,
        }  # fmt: skip
        if spectrum is not None:
            n = _three(spectrum, 1)
            tensors |= {"k": None, "k_rev": None}
            tensors["spectrum"] = randn(J, C, n[0], n[1], n[2] // 2 + 1, 2).to(device, wide)
        for gate in ("pre", "post"):
            maps[f"{gate}gate"] = maps[f"{gate}gate"] if gate in gates.split() else None
        options = {f"mode_{a}": MODES.index(m) for a, m in zip("xyz", modes, strict=True)}
        keeps = _three([keep] * axes if isinstance(keep, int) else keep, 0)
        options |= {f"keep_{a}": n for a, n in zip("xyz", keeps, strict=True)}
        options |= {"act": ACTS.index(act), "kernel_scale": scale}
        return tuple((maps | tensors)[n] for n in TENSORS), options

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _channels_inside(t):
    """Channels first by shape, innermost in memory: the transpose of a map of tokens."""
    return in_order(t, (0, 2, 3, 4, 1, 5))


def _batch_inside(t):
    """Rows of the batch within the rows of the map."""
    return in_order(t, (2, 0, 3, 1, 4, 5))


def _positive(u, k):
    """Sums in which nothing cancels."""
    return 1 + 0.05 * u, k


def _impulse(u, k):
    """One large number among small ones: rounding is relative to what is transformed together."""
    u = u * 1e-3
    u.flatten()[u.numel() // 3] = 100.0
    return u, k


def _decaying(u, k):
    """Kernels as implicit filters are: e^-t, over several orders of magnitude."""
    t = torch.arange(k.shape[-1]) * (8.0 / k.shape[-1])
    return u, k * torch.exp(-t) * math.sqrt(k.shape[-1]) / 4


FLOAT32 = (torch.float32,)
# fmt: off
SAMPLES = [
    # Hyena at 197 tokens and at 1024, Hyena N-D and circular maps of GFNet's sizes.
    _sample("hyena_197", 2, 24, 197, 197, last=True, tags="vit"),
    _sample("hyena_1024", 1, 17, 1024, 1024, values=_decaying, tags="vit"),
    _sample("hyena2d_14x14", 2, 20, (14, 14), (14, 14), last=True, tags="vit", act="gelu"),
    _sample("circular_14x14", 1, 35, (14, 14), (14, 14), last=True, mode="circular", tags="vit", d=False, gates=""),
    _sample("same_28x28_k31", 1, 18, (28, 28), (31, 31), mode="same", tags="vit", gates="post"),
    _sample("mega_300", 2, 16, 300, 300, act="silu", gates="", tags="vit"),
    _sample("global_56x56", 1, 3, (56, 56), (56, 56), last=True, mode="circular", tags="vit", dtypes=FLOAT32),
    # Small: the emulator and the interpreter run them too.
    _sample("small", 2, 3, 12, 5, tags="small framework"),
    _sample("small_2d_last", 2, 5, (3, 4), (2, 3), last=True, mode=("same", "causal"), act="gelu", rev=(2, 2),
            tags="small framework"),
    _sample("small_spectrum", 2, 3, 6, 1, spectrum=12, act="silu", tags="small"),
    _sample("small_spectrum_last", 1, 17, 9, 1, spectrum=20, gates="pre", J=1, last=True, tags="small"),
    _sample("small_per_sample", 2, 3, 7, 7, J=2, last=True, tags="small"),
    _sample("small_circular", 2, 2, 9, 4, mode="circular", d=False, gates="post", tags="small"),
    _sample("small_3d", 1, 2, (3, 2, 4), (2, 2, 3), tags="small", gates=""),
    _sample("small_keep", 2, 3, 8, 8, keep=3, scale=0.5, last=True, tags="small"),
    _sample("tiny", 2, 1, 3, 2, rev=2, act="silu", tags="tiny small"),
    _sample("tiny_spectrum", 1, 2, (2, 3), (1, 1), spectrum=(2, 3), mode="circular", last=True, tags="tiny"),
    # Nasty lengths: primes, one, kernels longer than the input.
    _sample("prime_circular", 2, 18, 131, 131, mode="circular", last=True, tags="nasty"),
    _sample("prime_circular_2d", 1, 5, (13, 17), (13, 17), mode="circular", tags="nasty"),
    _sample("large_prime", 1, 2, 1009, 1009, mode="circular", d=False, gates="", tags="nasty", dtypes=FLOAT32),
    _sample("one", 3, 2, 1, 1, tags="nasty"),
    _sample("one_token_long_kernel", 2, 3, 1, 9, mode="same", last=True, tags="nasty"),
    _sample("long_kernel", 2, 4, 10, 70, mode="causal", tags="nasty"),
    _sample("long_kernel_same", 1, 16, 11, 40, mode="same", last=True, tags="nasty"),
    _sample("long_kernel_circular", 2, 3, 10, 47, mode="circular", rev=23, tags="nasty"),
    _sample("short_kernel", 1, 3, 2111, 4, tags="nasty"),
    _sample("middling_kernel", 1, 3, 3001, 150, last=True, tags="nasty", dtypes=FLOAT32),
    _sample("reverse_longer", 2, 5, 40, 3, rev=90, tags="nasty"),
    _sample("bidirectional", 1, 16, 100, 100, rev=100, last=True, act="gelu", tags="nasty"),
    _sample("rows_of_one", 2, 3, (1, 37), (1, 20), tags="nasty"),
    _sample("columns_of_one", 2, 3, (37, 1), (37, 1), last=True, mode=("same", "circular"), tags="nasty"),
    _sample("cube", 1, 3, (5, 6, 7), (5, 3, 7), last=True, mode=("causal", "same", "circular"), rev=(2, 1, 3),
            act="gelu", tags="nasty"),
    _sample("cube_spectrum", 2, 3, (4, 5, 6), (1, 1, 1), spectrum=(8, 5, 12), mode=("same", "circular", "causal"),
            J=2, tags="nasty"),
    _sample("spectrum_2d", 2, 18, (9, 11), (1, 1), spectrum=(18, 22), last=True, J=2, act="silu", tags="nasty"),
    _sample("spectrum_odd", 1, 3, 15, 1, spectrum=15, mode="circular", tags="nasty", keep=5),
    _sample("keep_2d", 2, 5, (8, 9), (8, 9), keep=(3, 2), last=True, rev=(4, 2), scale=1.5, tags="nasty"),
    _sample("kernels_repeat", 6, 3, 21, 9, J=3, act="gelu", tags="nasty"),
    _sample("many_kernels", 4096, 1, 3, 2, J=4096, values=_positive, tags="nasty", dtypes=FLOAT32),
    _sample("large_batch", 37, 2, 5, 5, last=True, tags="nasty"),
    _sample("impulse", 1, 4, 130, 130, values=_impulse, tags="nasty", act="silu"),
    _sample("float32_kernel", 2, 3, 33, 33, kernel_dtype=torch.float32, rev=5, tags="nasty"),
    _sample("half_kernel", 2, 3, 33, 33, kernel_dtype=torch.float16, last=True, tags="nasty"),
    # Strides.
    _sample("channels_inside", 2, 19, 50, 50, layout=_channels_inside, tags="strided"),
    _sample("batch_inside", 2, 19, (5, 8), (5, 8), layout=_batch_inside, tags="strided"),
    _sample("misaligned", 2, 5, 30, 12, last=True, layout=misaligned, act="gelu", tags="strided"),
    # Empty.
    _sample("empty_batch", 0, 3, 4, 4, tags="empty"),
    _sample("empty_axis", 2, 3, 0, 4, tags="empty"),
    # More than a CUDA grid's y dimension.
    _sample("huge_batch", 70001, 1, 3, 2, tags="huge", dtypes=FLOAT32),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes, layouts and options, small; `choose` is a random.Random."""
    axes = choose.choice((1, 1, 1, 2, 2, 3))
    most = (60, 12, 6)[axes - 1]
    S = tuple(choose.randint(1, most) for _ in range(axes))
    mode = tuple(choose.choice(MODES) for _ in range(axes))
    long = choose.choice((1, 1, 2, 4))
    K = tuple(choose.randint(1, long * most) for _ in range(axes))
    B = choose.choice((1, 1, 2, 4))
    spectrum = None
    if choose.random() < 0.25:
        spectrum = [s if m == "circular" else s + choose.randint(0, 9) for s, m in zip(S, mode, strict=True)]
        if mode[-1] != "circular":
            spectrum[-1] += spectrum[-1] % 2
    return _sample(
        name, B, choose.choice((1, 2, 3, 16, 17, 33)), S, K, last=choose.random() < 0.5, mode=mode,
        J=choose.choice([j for j in (1, 1, 2, 4) if B % j == 0]), d=choose.random() < 0.6,
        gates=choose.choice(("", "pre", "post", "pre post")), act=choose.choice(ACTS), spectrum=spectrum,
        rev=tuple(choose.randint(1, most) for _ in range(axes)) if choose.random() < 0.3 else None,
        keep=tuple(choose.choice((0, 1, 3, 9)) for _ in range(axes)) if choose.random() < 0.3 else 0,
        scale=0.5 if spectrum is None and choose.random() < 0.2 else 1.0,
        layout=choose.choice((None, None, misaligned, _channels_inside, _batch_inside)),
        kernel_dtype=choose.choice((None, *FLOAT_DTYPES)),
    )  # fmt: skip


# ---- error magnitudes ---------------------------------------------------------------------------------------------


def _norm(t):
    """Of each row and channel."""
    return t.flatten(2).norm(dim=2)[..., None, None, None]


def magnitudes(args, kwargs, output_grads, eps):
    """|y| <= ||u'|| ||k||: a transform's rounding is relative to the norm of what it transforms, in every element. From
    there on the sums of the absolute terms. All of it is float32's: in half precision results are rounded once.
    """
    u, k, d, pregate, postgate, k_rev, spectrum = args
    kwargs = OPS[NAME].complete(kwargs)
    if u.numel() == 0:
        gradients = {n: torch.zeros_like(t) for n, t in zip(TENSORS, args, strict=True) if t is not None}
        return {"out": torch.zeros_like(u)}, {} if output_grads is None else gradients
    modes = [kwargs[f"mode_{a}"] for a in "xyz"]
    shape, B, C = u.shape, u.shape[0], u.shape[1] * u.shape[5]

    def first(t):
        return t.movedim(-1, 2).flatten(1, 2)

    def back(t):
        return t.expand(B, C, *shape[2:5]).unflatten(1, (shape[1], shape[5])).movedim(2, -1)

    sizes = list(shape[2:5])
    if spectrum is None:
        taps = [max(a, b) for a, b in zip(k.shape[2:], (k if k_rev is None else k_rev).shape[2:], strict=True)]
        padded = transform_sizes(modes, sizes, taps)
        scale = abs(kwargs["kernel_scale"])
        kernel = kernel_spectrum(k, k_rev, padded, mode=modes, keep=(0, 0, 0)) * scale
    else:
        circular = MODES[modes[2]] == "circular"
        padded = [*spectrum.shape[2:4], sizes[2] if circular else 2 * (spectrum.shape[4] - 1)]
        kernel = torch.view_as_complex(spectrum.contiguous())
    points = math.prod(padded)
    weight = kernel.real.new_full(kernel.shape[-1:], 2.0)  # the other half of the spectrum
    weight[0] = 1.0
    norm = ((kernel.abs().square() * weight).sum((2, 3, 4)) / points).sqrt()  # [J, C]
    if k_rev is not None:  # their spectra may cancel
        norm = torch.maximum(norm, (_norm(k) + _norm(k_rev))[..., 0, 0, 0] * scale)
    norm = norm.repeat(B // norm.shape[0], 1)[..., None, None, None]
    x = first(u).abs() * (1 if pregate is None else first(pregate).abs())
    y = _norm(x) * norm
    skip = 0 if d is None else d.abs().view(-1, 1, 1, 1)
    z = y + skip * x
    post = torch.ones_like(x) if postgate is None else first(postgate).abs()
    inside = min(1.0, torch.finfo(torch.float32).eps / eps)
    outputs = {"out": back(z * post) * inside}
    if output_grads is None:
        return outputs, {}
    g = first(output_grads[0]).abs()
    bent = kwargs["act"] != 0
    dy = g * post * ((1.13 + 0.8 * z) if bent else 1.0)  # the largest |act'| and |act''|
    dx = _norm(dy) * norm + skip * dy
    found = {"u": back(dx * (1 if pregate is None else first(pregate).abs()))}
    if d is not None:
        found["d"] = (dy * x).sum((0, 2, 3, 4))
    if pregate is not None:
        found["pregate"] = back(dx * first(u).abs())
    if postgate is not None:
        found["postgate"] = back(g * z * (1.13 if bent else 1.0))
    J = (k if spectrum is None else spectrum).shape[0]
    if spectrum is None:
        products = (_norm(x) * _norm(dy)).unflatten(0, (-1, J)).sum(0) * scale
        found["k"] = products.expand_as(k)
        if k_rev is not None:
            found["k_rev"] = products.expand_as(k_rev)
    else:
        transforms = [torch.fft.rfftn(t, s=padded, dim=(-3, -2, -1)).abs() for t in (x, dy)]
        a, b = (t + _norm(v) for t, v in zip(transforms, (x, dy), strict=True))
        # |the transform of x| is at most that of |x| at frequency 0
        a, b = torch.maximum(a, x.sum((2, 3, 4), True)), torch.maximum(b, dy.sum((2, 3, 4), True))
        products = (a * b * weight / points).unflatten(0, (-1, J)).sum(0)
        found["spectrum"] = products.unsqueeze(-1).expand_as(spectrum)
    return outputs, {name: m * inside for name, m in found.items()}


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call with a larger batch, which the number of kernels divides."""
    maps = {"u", "pregate", "postgate"}
    larger = (
        torch.cat((t, t.flip(0))).contiguous() if n in maps and t is not None else t
        for n, t in zip(TENSORS, args, strict=True)
    )  # fmt: skip
    return tuple(larger), kwargs


def memory_calls(dtype):
    calls = []
    for B, C, S, last in ((4, 96, 4096, False), (16, 96, (28, 28), True), (1, 64, 65536, True)):
        K = S if isinstance(S, tuple) else min(S, 16384)
        args, kwargs = _sample("memory", B, C, S, K, last=last).build(dtype)
        calls.append((f"{B}x{C}x{S}", args, kwargs))
    return calls


def good_call():
    """A call that works; every bad input is this one with something changed."""
    args, _ = _sample("good", 1, 2, 6, 3, rev=2, last=True).build()
    return dict(zip(TENSORS, args, strict=True))


def good_spectrum_call():
    args, _ = _sample("good", 1, 2, 6, 1, spectrum=6, mode="circular", last=True).build()
    return dict(zip(TENSORS, args, strict=True)) | {"mode_z": 2}


def _declared():
    """What follows from the declaration. Sizes of kernels are free, and k cannot be given with a spectrum."""
    free = {f"declared_{t}_dim_{i}" for t in ("k", "k_rev") for i in (2, 3, 4)}
    spectrum = {b.name: b for b in declared_bad_inputs(NAME, good_spectrum_call) if "_spectrum_" in b.name}
    for bad in declared_bad_inputs(NAME, _all_given):
        if bad.name in free:
            continue
        bad = spectrum.get(bad.name, dataclasses.replace(bad, make=_without_spectrum(bad)))
        yield dataclasses.replace(bad, public=False)


def _all_given():
    return good_call() | {"spectrum": good_spectrum_call()["spectrum"]}


def _without_spectrum(bad):
    def make():
        args, kwargs = bad.make()
        return tuple(None if n == "spectrum" else t for n, t in zip(TENSORS, args, strict=True)), kwargs

    return make


def _bad(name, error, match, call=good_call, schema_match=None, **changes):
    """changes: argument -> new value, or a function of the old one."""
    return BadInput(
        name, lambda: split_call(changed(call(), changes), TENSORS), error, match, schema_match, public=False
    )  # fmt: skip


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        call = changed(good_call() | {"grad_out": torch.zeros(1, 1, 1, 1, 6, 2)}, changes)
        return split_call(call, BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op=f"{NAME}_backward")


def _bad_spectrum(name, match, **changes):
    return _bad(name, ValueError, match, call=good_spectrum_call, **changes)


_SPECTRUM = r"spectrum must be of a transform as large as circular axes are, and no smaller than others, \[1, 1, 6\]"
# fmt: off
BAD_INPUTS = [
    *_declared(),
    _bad("u_two_channel_dims", ValueError,
         r"u must be \[B, C, X, Y, Z, 1\] or \[B, 1, X, Y, Z, C\], got \[1, 2, 1, 1, 6, 2\]",
         u=lambda t: t.expand(1, 2, 1, 1, 6, 2)),
    _bad("k_missing", ValueError, r"k must be given where spectrum is not, got None", k=None, k_rev=None),
    _bad("k_missing_with_rev", ValueError, r"k must be given where spectrum is not, got None", k=None),
    _bad("k_and_spectrum", ValueError, r"k must be None where spectrum is given, got \[1, 2, 1, 1, 3\]", k_rev=None,
         spectrum=lambda _: torch.zeros(1, 2, 1, 1, 6, 2)),
    _bad_spectrum("k_rev_and_spectrum", r"k_rev must be None where spectrum is given, got \[1, 2, 1, 1, 2\]",
                  k_rev=torch.zeros(1, 2, 1, 1, 2)),
    _bad_spectrum("kernel_scale_and_spectrum", r"kernel_scale must be 1.0 where spectrum is given, got 0.5",
                  kernel_scale=0.5),
    _bad("k_batch", ValueError, r"k must be of a batch size that divides 1, got \[3, 2, 1, 1, 3\]", k_rev=None,
         k=lambda t: t.expand(3, 2, 1, 1, 3)),
    _bad("k_no_batch", ValueError, r"k must be of a batch size that divides 1, got \[0, 2, 1, 1, 3\]", k_rev=None,
         k=lambda t: t[:0]),
    _bad("k_no_taps", ValueError, r"k must be of at least one tap per axis, got \[1, 2, 1, 1, 0\]",
         k=lambda t: t[..., :0]),
    _bad("k_rev_no_taps", ValueError, r"k_rev must be of at least one tap per axis, got \[1, 2, 1, 0, 2\]",
         k_rev=lambda t: t[..., :0, :]),
    _bad("k_rev_batch", ValueError, r"k_rev must be \[J, C1\*C2, RX, RY, RZ\] = \[1, 2, .*\], got "
         r"\[2, 2, 1, 1, 2\]", k_rev=lambda t: t.expand(2, 2, 1, 1, 2)),
    _bad_spectrum("spectrum_batch", r"spectrum must be of a batch size that divides 1, got \[2, 2, 1, 1, 4, 2\]",
                  spectrum=lambda t: t.expand(2, -1, -1, -1, -1, -1)),
    _bad_spectrum("spectrum_circular", rf"{_SPECTRUM}, got \[1, 2, 1, 1, 5, 2\]",
                  spectrum=torch.zeros(1, 2, 1, 1, 5, 2)),
    _bad_spectrum("spectrum_small", rf"{_SPECTRUM}, got \[1, 2, 1, 1, 3, 2\]", mode_z=0,
                  spectrum=torch.zeros(1, 2, 1, 1, 3, 2)),
    _bad_spectrum("spectrum_rows", rf"{_SPECTRUM}, got \[1, 2, 2, 1, 4, 2\]",
                  spectrum=torch.zeros(1, 2, 2, 1, 4, 2)),
    _bad_spectrum("spectrum_without_frequencies", rf"{_SPECTRUM}, got \[1, 2, 1, 1, 0, 2\]", mode_z=1,
                  spectrum=torch.zeros(1, 2, 1, 1, 0, 2)),
    # the backward op
    _bad_backward("backward_grad_shape", ValueError, r"grad_out must be \[B, C1, X, Y, Z, C2\] = \[1, 1, 1, 1, 6, 2\],"
                  r" got \[1, 1, 1, 6, 1, 2\]", grad_out=lambda t: t.transpose(3, 4)),
    _bad_backward("backward_grad_dtype", TypeError, r"grad_out must be .*float32 like u, got .*(bfloat16|BFloat16)",
                  grad_out=to(torch.bfloat16)),
    _bad_backward("backward_grad_none", TypeError, r"grad_out must be a torch\.Tensor, got NoneType",
                  schema_match=r"grad_out must be .*got \[0\]", grad_out=None),
    _bad_backward("backward_k_missing", ValueError, r"k must be given where spectrum is not, got None", k=None),
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
    public_kwargs=lambda kwargs: None if kwargs else {},  # one layout in place of six dims: tests/ops/test_fft_conv.py
    dynamic="B",
    resize=resize,
    memory_calls=memory_calls,
    memory_slack_per_thread=20 << 20,  # the planes of a transform of 32768 places, twice, its kernel's, and a row
)
