"""effvit.distributed's halo exchange, convolutions and window attention on gloo processes: equal to one process."""

import dataclasses
import math
import random
import sys

import pytest
import torch
from test_distributed import gathered, main, run_ranks

import effvit
from effvit.ops.dwconv import NAMES as ACTIVATIONS
from effvit.reference.fft_conv import MODES
from effvit.reference.window_attention import axis_layout
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, get_spec, oracle_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")

# How 19 or 20 rows are split; one rank of four has none, and some have fewer than a kernel reaches.
UNEVEN = {1: (19,), 2: (13, 6), 4: (5, 0, 13, 1)}
EVEN = {1: (20,), 2: (10, 10), 4: (5, 5, 5, 5)}
B, C, W = 2, 7, 6
EXCHANGES = {
    "neighbours": {"before": 2, "after": 1, "even": True, "asked": True},
    "far": {"before": 9, "after": 16},
    "before": {"before": 3, "after": 0, "dim": -2},
    "after": {"before": 0, "after": 1, "dim": 2},
    "none": {"before": 0, "after": 0},
    "beyond": {"before": 30, "after": 40, "asked": True},
}
CONVS = {
    "causal": {"k": (4,), "causal": True, "bias": True, "asked": True},
    "causal_dilated": {"k": (7,), "causal": True, "dilation": 3, "act": "silu", "gates": True},
    "same_even_kernel": {"k": (4,), "bias": True, "act": "gelu", "even": True},
    "gated": {"k": (9,), "gates": True, "dilation": 2},
    "map": {"k": (3, 3), "bias": True, "act": "gelu", "gates": True},
    "tall_kernel": {"k": (11, 2), "dilation": (2, 1), "even": True},
    "one_row": {"k": (1, 5), "bias": True, "collectives": False},
    "windows": {"k": (3,), "window": 4, "even": True, "bias": True, "asked": True},
    "windows_of_map": {"k": (5, 3), "window": (4, 3), "even": True, "gates": True, "act": "relu"},
    "windows_of_ranks": {"k": (3, 3), "window": (5, 6), "even": True, "collectives": False},
}
ATTENTIONS = {
    "windows_of_ranks": {"window": 5, "even": True, "collectives": False},
    "straddling": {"window": 4, "bias": True, "asked": True},
    "shifted": {"window": 4, "shift": 2, "bias": True, "pads": True},
    "shifted_even": {"window": 4, "shift": (1, 2), "even": True, "scale": 0.7},
    "rolled_before_padding": {"window": 4, "shift": 3, "roll_before_pad": True, "bias": True},
    "halo": {"window": 4, "halo": (5, 1), "bias": True},
    "dilated": {"window": (3, 2), "shift": (2, 1), "dilation": (2, 1), "tau": True, "pads": True},
    "one_window": {"window": 24, "shift": 5, "mask_value": -2.0},
}
FFTS = {
    "causal": {"k": (19,), "d": True, "asked": True},
    "long_kernel": {"k": (50,), "even": True, "act": "silu", "d": True},
    "gated": {"k": (5,), "rev": (8,), "gates": True, "act": "gelu", "d": True, "kernel_scale": 0.5},
    "per_sample": {"k": (6,), "per_sample": True, "mode": "same", "channels_last": True},
    "map": {"k": (25, 3), "mode": ("circular", "same"), "even": True, "channels_last": True},
    "few_channels": {"k": (4,), "mode": "same", "channels": 3, "freq_keep": 6},
    "spectrum": {"spectrum": 40, "d": True},
    "own_channels": {"k": (7,), "d": True, "own": True, "gates": True},
}
CASES = {"dwconv": CONVS, "attention": ATTENTIONS, "fft": FFTS}
SPECS = {"dwconv": "dwconv", "attention": "window_attention", "fft": "fft_conv"}
PUBLIC = (
    "causal", "dilation", "act", "window", "shift", "halo", "scale", "mask_value", "roll_before_pad", "mode",
    "channels_last", "freq_keep", "kernel_scale",
)  # fmt: skip


def call(function, options, tensors, group=None, sizes=None):
    """effvit.distributed's function, of tensors by name; outputs as a tuple."""
    public = {n: x for n, x in options.items() if n in PUBLIC}
    if "spectrum" in tensors:
        tensors = tensors | {"spectrum": torch.view_as_complex(tensors["spectrum"])}
    name = {"dwconv": "halo_dwconv", "attention": "halo_window_attention", "fft": "distributed_fft_conv"}[function]
    out = getattr(effvit.distributed, name)(**tensors, group=group, sizes=sizes, **public)
    return out if isinstance(out, tuple) else (out,)


def plain_call(function, options, tensors):
    """effvit's function, on one process."""
    public = {n: x for n, x in options.items() if n in PUBLIC}
    if "spectrum" in tensors:
        tensors = tensors | {"spectrum": torch.view_as_complex(tensors["spectrum"])}
    out = getattr(effvit, SPECS[function])(**tensors, **public)
    return out if isinstance(out, tuple) else (out,)


def tensors_of(function, options, length, dtype):
    """The whole: {argument: tensor}, and the dim that is split of those that are."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator)
    channels, k = options.get("channels", C), options.get("k", (1,))
    if function == "attention":
        h, d = 2, 8
        (wh, ww), (hh, hw) = (
            x if isinstance(x, tuple) else (x, x) for x in (options["window"], options.get("halo", 0))
        )
        drawn = {n: randn(B, length, W, h, d) for n in "qkv"}
        if "bias" in options:
            drawn["bias_table"] = randn(h, 2 * wh - 1 + 2 * hh, 2 * ww - 1 + 2 * hw)
        drawn |= {n: randn(h, d) for n in ("pad_k", "pad_v") if "pads" in options}
        drawn |= {"logit_scale": torch.tensor([0.5, 2.0])} if "tau" in options else {}
        split = dict.fromkeys("qkv", 1)
    else:
        last = function == "dwconv" or options.get("channels_last", False)
        size = (length, W)[: len(k)]
        shape = (B, *size, channels) if last else (B, channels, *size)
        maps = ("pregate", "postgate") if "gates" in options else ()
        main = "x" if function == "dwconv" else "u"
        drawn = {n: randn(*shape) for n in (main, *maps)}
        split = dict.fromkeys(drawn, 1 if last else 2)
        if function == "dwconv":
            drawn |= {"weight": randn(channels, *k) / math.prod(k) ** 0.5}
            drawn |= {"bias": randn(channels)} if "bias" in options else {}
        else:
            batch = (B,) if "per_sample" in options else ()
            drawn |= {"k": randn(*batch, channels, *k) / math.prod(k) ** 0.5} if "k" in options else {}
            drawn |= {"k_rev": randn(channels, *options["rev"])} if "rev" in options else {}
            drawn |= {"d": randn(channels)} if "d" in options else {}
    drawn = {n: t.to(dtype) for n, t in drawn.items()}
    if "spectrum" in options:
        drawn["spectrum"] = randn(channels, options["spectrum"] // 2 + 1, 2)
    return drawn, split


def lifted(function, options, name, t):
    """A tensor of a public function -> the operator's."""
    if function == "dwconv":
        return t.unsqueeze(1) if len(options["k"]) == 1 and name not in ("bias",) else t
    if function == "attention" or name == "d":
        return t
    axes = 1 if "spectrum" in options else len(options["k"])
    if name in ("k", "k_rev"):
        return t.reshape(-1 if "per_sample" in options else 1, C if "channels" not in options else 3, *[1] * (3 - axes),
                         *t.shape[-axes:])  # fmt: skip
    if name == "spectrum":
        return t.reshape(1, C, 1, 1, *t.shape[1:])
    t = t.unsqueeze(1) if options.get("channels_last") else t.unsqueeze(-1)
    for _ in range(3 - axes):
        t = t.unsqueeze(2)
    return t


def operator_options(function, options):
    """The options of a case as the operator's schema has them."""
    pair = lambda x: [*x] if isinstance(x, tuple) else [x, x]
    if function == "attention":
        given = {n: x for n, x in options.items() if n in PUBLIC}
        return {n: pair(x) if n in ("window", "shift", "dilation", "halo") else x for n, x in given.items()}
    if function == "fft":
        axes = 1 if "spectrum" in options else len(options["k"])
        modes = options.get("mode", "causal")
        modes = ["circular"] * (3 - axes) + ([modes] * axes if isinstance(modes, str) else [*modes])
        acts = ("none", "gelu", "silu")
        given = {f"mode_{a}": MODES.index(m) for a, m in zip("xyz", modes, strict=True)}
        given |= {"act": acts.index(options.get("act", "none")), "kernel_scale": options.get("kernel_scale", 1.0)}
        return given | ({"keep_z": options["freq_keep"]} if "freq_keep" in options else {})
    flat = len(options["k"]) == 1
    kernel = (1, *options["k"]) if flat else options["k"]
    dilation = pair(options.get("dilation", 1))
    dilation = [1, dilation[1]] if flat else dilation
    reach = [d * (n - 1) for d, n in zip(dilation, kernel, strict=True)]
    before = reach if "causal" in options else [r // 2 for r in reach]
    window = pair(options.get("window", 0))
    window = [1, window[1]] if flat and window[1] else window
    return {
        "before": before, "after": [r - b for r, b in zip(reach, before, strict=True)], "dilation": dilation,
        "window": window, "act": ACTIVATIONS.index(options.get("act", "none")),
    }  # fmt: skip


# ---- what runs on every rank ---------------------------------------------------------------------------------------


def sizes_of(mesh, options):
    return (EVEN if "even" in options else UNEVEN)[mesh.size()]


def part(mesh, t, dim, sizes):
    return t.split(sizes, dim)[mesh.get_rank()].clone()


def summed(t):
    """The sum of all ranks' parts of a gradient."""
    total = t.detach().to(torch.promote_types(t.dtype, torch.float32))
    torch.distributed.all_reduce(total)
    return total.to(t.dtype)


def collectives(mode):
    return {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}


def results(mesh, function, name, dtype, autocast):
    """The call on this rank. Tensors, outputs, cotangents, gradients, all of the whole; what is sent is counted."""
    from torch.distributed.tensor.debug import CommDebugMode

    options = CASES[function][name]
    sizes = sizes_of(mesh, options)
    whole, split = tensors_of(function, options, sum(sizes), dtype)
    mine = {n: part(mesh, t, split[n], sizes) if n in split else t.clone() for n, t in whole.items()}
    if "own" in options:
        first, end = effvit.distributed.channels_of_rank(C, mesh)
        mine |= {n: t[first:end].clone() for n, t in mine.items() if n not in split}
    mine = {n: t.requires_grad_() for n, t in mine.items()}
    with CommDebugMode() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outs = call(function, options, mine, mesh, None if "asked" in options else sizes)
    out_dims = (1, 2) if function == "attention" else (next(iter(split.values())),)
    out_shapes = [t.shape[:dim] + (sum(sizes),) + t.shape[dim + 1 :] for t, dim in zip(outs, out_dims, strict=True)]
    generator = torch.Generator().manual_seed(1)
    grad_outs = [torch.randn(s, generator=generator).to(t.dtype) for s, t in zip(out_shapes, outs, strict=True)]
    given = [part(mesh, g, dim, sizes) for g, dim in zip(grad_outs, out_dims, strict=True)]
    with CommDebugMode() as backward:
        grads = torch.autograd.grad(outs, [*mine.values()], given)
    ways = 0 if mesh.size() == 1 or options.get("collectives") is False else 2 if function == "fft" else 1
    expected = {"all_to_all_single": ways} if ways else {}
    assert collectives(backward) == expected, collectives(backward)
    asked = {"all_gather_into_tensor": 1} if "asked" in options and mesh.size() > 1 else {}
    assert collectives(forward) == expected | asked, collectives(forward)
    for n, g in zip(mine, grads, strict=True):
        assert g.dtype == mine[n].dtype and g.shape == mine[n].shape
    outs = [gathered(t, dim) for t, dim in zip(outs, out_dims, strict=True)]
    found = {}
    for n, g in zip(mine, grads, strict=True):
        found[n] = gathered(g, split[n]) if n in split else gathered(g, 0) if "own" in options else summed(g)
    return whole, outs, grad_outs, found


def same(mesh, function_and_name, dtype=torch.float32, autocast=False):
    """Outputs and all gradients are those of one process."""
    function, name = function_and_name.split(".")
    options = CASES[function][name]
    whole, outs, grad_outs, found = results(mesh, function, name, dtype, autocast)
    if mesh.get_rank():  # the same on every rank
        return
    if function == "attention" and not autocast:  # a window sees the same numbers, wherever it is computed
        leaves = {n: t.clone().requires_grad_() for n, t in whole.items()}
        expected = plain_call(function, options, leaves)
        (dq,) = torch.autograd.grad(expected, leaves["q"], grad_outs)
        for f, t, n in zip((*outs, found["q"]), (*expected, dq), ("out", "lse", "gradient of q"), strict=True):
            assert_bitwise_equal(f, t, name=n)
    lift = lambda n, t: lifted(function, options, n, t)
    if autocast:
        assert outs[0].dtype == torch.bfloat16
        whole = {n: t.bfloat16() for n, t in whole.items()}
    spec = get_spec(SPECS[function])
    args = [lift(n, whole[n]) if n in whole else None for n in spec.tensors]
    if function == "attention":
        grads, outs = tuple(grad_outs), tuple(outs)
    else:
        grads, outs = (lift("out", grad_outs[0]),), (lift("out", outs[0]),)
    expected = oracle_of(spec, tuple(args), operator_options(function, options), grads)
    if function == "fft":  # products with gates are rounded before they are convolved: every term is
        wide = [[None if t is None else t.double() for t in tensors] for tensors in (args, grads)]
        eps = torch.finfo(torch.float32).eps
        terms = spec.magnitudes(wide[0], operator_options(function, options), wide[1], eps)
        names = ("output_magnitudes", "gradient_magnitudes")
        expected = dataclasses.replace(expected, **dict(zip(names, terms, strict=True)))
    expected.check_outputs(outs)
    expected.check_gradients({n: lift(n, g) for n, g in found.items()})


def same_bfloat16(mesh, name):
    same(mesh, name, torch.bfloat16)


def same_autocast(mesh, name):
    same(mesh, name, autocast=True)


def alone(mesh, function_and_name):
    """On one rank it is the operator, bit for bit."""
    function, name = function_and_name.split(".")
    options = CASES[function][name]
    whole, outs, _, _ = results(mesh, function, name, torch.float32, False)
    for found, expected in zip(outs, plain_call(function, options, whole), strict=True):
        assert_bitwise_equal(found, expected)


def in_float64(mesh, function_and_name):
    function, name = function_and_name.split(".")
    whole, outs, _, _ = results(mesh, function, name, torch.float64, False)
    expected = plain_call(function, CASES[function][name], whole)[0]
    largest = float(expected.abs().max())
    torch.testing.assert_close(outs[0], expected, rtol=0, atol=64 * torch.finfo(torch.float64).eps * largest)


def again(mesh, function_and_name):
    function, name = function_and_name.split(".")
    first = results(mesh, function, name, torch.float32, False)
    for _ in range(3):
        other = results(mesh, function, name, torch.float32, False)
        for a, b in zip((*first[1], *first[3].values()), (*other[1], *other[3].values()), strict=True):
            assert_bitwise_equal(b, a)


def compiled(mesh, function_and_name):
    function, name = function_and_name.split(".")
    options = CASES[function][name]
    sizes = sizes_of(mesh, options)
    whole, split = tensors_of(function, options, sum(sizes), torch.float32)
    mine = {n: part(mesh, t, split[n], sizes) if n in split else t for n, t in whole.items()}

    def both(call):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in mine.items()}
        outs = call(leaves)
        return (*outs, *torch.autograd.grad(sum(t.square().sum() for t in outs), [*leaves.values()]))

    eager = lambda leaves: call(function, options, leaves, None, sizes)
    traced = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for result, expected in zip(both(traced), both(eager), strict=True):
        assert_bitwise_equal(result, expected)


def mixed(mesh, function_and_name):
    """Under autocast maps of two dtypes: bit for bit what maps of one are; compiled too."""
    function, name = function_and_name.split(".")
    options = CASES[function][name]
    sizes = sizes_of(mesh, options)
    whole, split = tensors_of(function, options, sum(sizes), torch.float32)
    mine = {n: part(mesh, t, split[n], sizes) if n in split else t for n, t in whole.items()}
    first = next(iter(split))
    eager = lambda leaves: call(function, options, leaves, None, sizes)

    def both(call, tensors):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        with torch.autocast("cpu", torch.bfloat16):
            outs = call(leaves)
        assert outs[0].dtype == torch.bfloat16
        grads = torch.autograd.grad(sum(t.float().square().sum() for t in outs), [*leaves.values()])
        assert all(g.dtype == t.dtype for g, t in zip(grads, leaves.values(), strict=True))
        return (*outs, *grads)

    expected = both(eager, {n: t.bfloat16() if n in split else t for n, t in mine.items()})
    mine[first] = mine[first].bfloat16()
    for run in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        for result, e in zip(both(run, mine), expected, strict=True):
            assert_bitwise_equal(result, e.to(result.dtype))


def twice(mesh, function_and_name):
    """A gradient penalty, summed over the ranks: second derivatives are those of one process."""
    function, name = function_and_name.split(".")
    options = CASES[function][name]
    sizes = sizes_of(mesh, options)
    whole, split = tensors_of(function, options, sum(sizes), torch.float32)

    def penalty_gradients(call, tensors):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        own = [t for n, t in leaves.items() if n in split]  # of what is whole a rank has only a part of the gradient
        grads = torch.autograd.grad(sum(t.square().sum() for t in call(leaves)), own, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [*leaves.values()])

    mine = {n: part(mesh, t, split[n], sizes) if n in split else t.clone() for n, t in whole.items()}
    found = penalty_gradients(lambda leaves: call(function, options, leaves, mesh, sizes), mine)
    spec = get_spec(SPECS[function])

    def definition(leaves):
        args = [lifted(function, options, n, leaves[n]) if n in leaves else None for n in spec.tensors]
        out = spec.reference(*args, **operator_options(function, options))
        return out if isinstance(out, tuple) else (out,)

    truth = penalty_gradients(definition, {n: t.double() for n, t in whole.items()})
    plain = penalty_gradients(definition, whole)
    for n, f, t, y in zip(whole, found, truth, plain, strict=True):
        f = gathered(f, split[n]) if n in split else summed(f)
        assert_close_to_truth(f, t, y, magnitude=t.abs().max().expand_as(t), name=f"gradient of {n}")


def exchanged(mesh, name):
    """Slices of the whole with zeros around it, bit for bit, and so are first and second derivatives of integers."""
    from torch.distributed.tensor.debug import CommDebugMode

    options = EXCHANGES[name]
    sizes, rank, dim = sizes_of(mesh, options), mesh.get_rank(), options.get("dim", 1)
    before, after = options["before"], options["after"]
    shape = [B, 3, 4]
    shape[dim] = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    integers = lambda *shape: torch.randint(-4, 5, shape, generator=generator).float()
    x, wide = integers(*shape), list(shape)
    weights = []
    for n in sizes:
        wide[dim] = before + n + after
        weights.append(integers(*wide))

    def slices(x):
        zeros = [list(x.shape), list(x.shape)]
        zeros[0][dim], zeros[1][dim] = before, after
        padded = torch.cat((x.new_zeros(zeros[0]), x, x.new_zeros(zeros[1])), dim)
        return [padded.narrow(dim, sum(sizes[:r]), before + n + after) for r, n in enumerate(sizes)]

    def derivatives(x, parts_of):
        """Of a sum of cubes: its gradient, and the gradient of the gradient's square."""
        x = x.clone().requires_grad_()
        loss = sum((w * t * t).sum() for w, t in parts_of(x))
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return g, torch.autograd.grad(g.square().sum(), x)[0]

    exchange = effvit.distributed.halo_exchange
    given = {"dim": dim, "sizes": None if "asked" in options else sizes}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        own = part(mesh, x, dim, sizes).to(dtype)
        with CommDebugMode() as mode:
            found = exchange(own, before, after, mesh, **given)
        assert_bitwise_equal(found, slices(x)[rank].to(dtype))
    moves = mesh.size() > 1 and before + after > 0
    expected = {"all_to_all_single": 1} if moves else {}
    expected |= {"all_gather_into_tensor": 1} if "asked" in options and mesh.size() > 1 else {}
    assert collectives(mode) == expected, collectives(mode)
    own = part(mesh, x, dim, sizes)
    found = derivatives(own, lambda x: [(weights[rank], exchange(x, before, after, mesh, **given))])
    for f, t in zip(found, derivatives(x, lambda x: zip(weights, slices(x), strict=True)), strict=True):
        assert float(t.detach().abs().max()) < 2**24  # float32 has these integers
        assert_bitwise_equal(gathered(f, dim), t.detach())


def contiguous(mesh, _):
    """The result is, whatever the strides of x, with and without a halo."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for halo in (0, 1):
        found = effvit.distributed.halo_exchange(x, halo, halo, mesh, dim=2, sizes=[4] * mesh.size())
        assert found.is_contiguous(), found.stride()
        assert_bitwise_equal(found[:, :, halo : halo + 4], x)


def refused(mesh, _):
    """What only a group can say; before anything is sent, so on all ranks."""
    x, w, q = torch.randn(1, 3, 4), torch.randn(4, 3), torch.randn(1, 3, 4, 1, 8)
    ranks, rank = mesh.size(), mesh.get_rank()
    wrong, right = [3] * ranks, [3] * ranks
    wrong[rank] = 4
    d = effvit.distributed
    for function, args in (
        (d.halo_exchange, (x, 1, 1)), (d.halo_dwconv, (x, w)), (d.halo_window_attention, (q, q, q)),
        (d.distributed_fft_conv, (x.mT.contiguous(), w)),
    ):  # fmt: skip
        options = {"window": 2} if function is d.halo_window_attention else {}
        prefix = rf"effvit::{function.__name__}: sizes must be "
        with pytest.raises(ValueError, match=rf"{prefix}{ranks} lengths, one of each rank, got {ranks + 1}"):
            function(*args, group=mesh, sizes=[3] * (ranks + 1), **options)
        with pytest.raises(ValueError, match=rf"{prefix}3 at {rank}, the length of this rank's part, got 4"):
            function(*args, group=mesh, sizes=wrong, **options)
        with pytest.raises(TypeError, match=f"effvit::{function.__name__}: group must be a ProcessGroup"):
            function(*args, group="gloo", sizes=right, **options)
    match = rf"effvit::halo_dwconv: window must be such that it divides \[{3 * ranks}\], all .* got \[4\]"
    with pytest.raises(ValueError, match=match):
        d.halo_dwconv(x, w, group=mesh, sizes=right, window=4)
    u = x.mT.contiguous()  # 4 channels
    for match, changes in (
        (r"k must be of the 4 channels of u, or of this rank's \d, got \[3, 3\]", {"k": w[:3]}),
        (r"d must be of the 4 channels of u, or of this rank's \d, got \[5\]", {"d": torch.randn(5)}),
        (r"k must be given where spectrum is not, got None", {"k": None}),
        (r"pregate must be \[1, 4, 3\] like u, got \[1, 4, 2\]", {"pregate": u[..., :2]}),
        (r"mode must be one of causal, same, circular, got 'valid'", {"mode": "valid"}),
    ):
        with pytest.raises(ValueError, match=f"effvit::distributed_fft_conv: {match}"):
            d.distributed_fft_conv(**({"u": u, "k": w, "group": mesh, "sizes": right} | changes))
    first, end = d.channels_of_rank(7, mesh)
    spans = [None] * ranks
    torch.distributed.all_gather_object(spans, (first, end))
    assert spans[0][0] == 0 and spans[-1][1] == 7
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))


# ---- the tests -----------------------------------------------------------------------------------------------------

EXCHANGED = [f"exchanged:{name}" for name in EXCHANGES]
SAME = [f"same:{function}.{name}" for function, cases in CASES.items() for name in cases]


def test_on_one_rank(tmp_path):
    alone = [test.replace("same", "alone", 1) for test in SAME]
    run_ranks(1, tmp_path / "store", *EXCHANGED, *alone, "contiguous:", "refused:", file=__file__)


def test_on_two_ranks(tmp_path):
    """Forward and every gradient equal one process, even and uneven parts; what is sent is counted."""
    half = [f"same_{kind}:{name}" for kind, name in (
        ("bfloat16", "dwconv.gated"), ("bfloat16", "dwconv.causal_dilated"), ("bfloat16", "attention.shifted"),
        ("bfloat16", "fft.gated"), ("autocast", "dwconv.map"), ("autocast", "attention.straddling"),
        ("autocast", "fft.causal"),
    )]  # fmt: skip
    traced = [
        f"compiled:{name}" for name in ("dwconv.gated", "dwconv.causal_dilated", "attention.shifted", "fft.gated")
    ]
    autocast = [f"mixed:{name}" for name in ("dwconv.map", "dwconv.causal_dilated", "attention.halo", "fft.gated")]
    second = [f"twice:{name}" for name in ("dwconv.map", "dwconv.causal_dilated", "fft.gated", "attention.straddling")]
    run_ranks(
        2,
        tmp_path / "store",
        *EXCHANGED,
        *SAME,
        *half,
        *traced,
        *second,
        *autocast,
        "contiguous:",
        "in_float64:fft.gated",
        "refused:",
        file=__file__,
    )


def test_on_four_ranks(tmp_path):
    """One of them has no rows, another one row."""
    half = ["same_bfloat16:dwconv.causal_dilated", "same_bfloat16:attention.halo", "same_bfloat16:fft.few_channels"]
    repeated = ["again:dwconv.causal_dilated", "again:attention.shifted", "again:fft.gated"]
    run_ranks(4, tmp_path / "store", *EXCHANGED, *SAME, *half, *repeated, file=__file__)


def test_rows_that_windows_need():
    """Random geometries: every row of a rank is in the same window, with the same keys and masks, as in the whole."""
    from effvit.distributed._windows import window_rows

    def seen(rows, *geometry):
        """{row: (its place in its window, the window's keys in order, which of them are masked)}"""
        q_pos, k_pos, q_lab, k_lab = (t.tolist() for t in axis_layout(len(rows), *geometry))
        keys = [[rows[p] if p >= 0 else -1 for p in window] for window in k_pos]
        return {
            rows[p]: (place, keys[i], [label == other for other in k_lab[i]])
            for i, window in enumerate(q_pos) for place, (p, label) in enumerate(zip(window, q_lab[i], strict=True))
            if p >= 0
        }  # fmt: skip

    choose, smaller = random.Random(0), 0
    for _ in range(400):
        sizes = tuple(choose.choice((0, 1, choose.randint(0, 12))) for _ in range(choose.randint(1, 4)))
        window = choose.randint(1, 6)
        shift, dilation, halo = choose.choice((0, choose.randrange(window))), choose.randint(1, 3), choose.randint(0, 7)
        geometry = window, shift, dilation, choose.choice((0, halo)), choose.random() < 0.5
        whole = seen(range(sum(sizes)), *geometry) if sum(sizes) else {}
        first = 0
        for size, (rows, own_shift) in zip(sizes, window_rows(sizes, *geometry), strict=True):
            mine = seen(rows, window, own_shift, *geometry[2:]) if rows else {}
            for row in range(first, first + size):
                assert mine[row] == whole[row], (sizes, geometry, row)
            first += size
            smaller += 0 < len(rows) < sum(sizes)
    assert smaller > 100


def test_rows_sent_together_are_of_one_dtype():
    from effvit.distributed._ranks import gather_rows, scatter_rows

    x = torch.randn(1, 3, 4)
    for exchange in (gather_rows, scatter_rows):
        with pytest.raises(TypeError, match=r"rows sent together must be torch.float32, got torch.bfloat16"):
            exchange((x, x.bfloat16()), (3,), (((0, 3),),), 1, None)


def test_bad_calls():
    d, x, w = effvit.distributed, torch.randn(2, 9, 4), torch.randn(4, 3)
    q = torch.randn(1, 8, 8, 1, 4)
    for function, good, cases in (
        (d.halo_exchange, {"x": x, "before": 1, "after": 1}, (
            (TypeError, "x must be a torch.Tensor, got list", {"x": [1.0]}),
            (TypeError, "x must be of a floating-point dtype, got torch.int64", {"x": x.long()}),
            (TypeError, "before must be an int, got 1.5", {"before": 1.5}),
            (ValueError, "after must be between 0 and .*, got -1", {"after": -1}),
            (ValueError, r"dim must be a dim of x \[2, 9, 4\], got 3", {"dim": 3}),
            (TypeError, "sizes must be a list of ints, got 9", {"sizes": 9}),
            (ValueError, r"sizes must be a list of lengths, at least 0, got \[9, -1\]", {"sizes": [9, -1]}),
        )),
        (d.halo_dwconv, {"x": x, "weight": w}, (
            (ValueError, r"x must be \[B, L, C\] or \[B, H, W, C\], got \[9, 4\]", {"x": x[0]}),
            (ValueError, r"weight must be \[C, k\] or \[C, 1, k\] like x .*, got \[4\]", {"weight": w[:, 0]}),
            (ValueError, r"postgate must be \[2, 9, 4\] like x, got \[2, 8, 4\]", {"postgate": x[:, 1:]}),
            (TypeError, "pregate must be torch.float32 like x, got torch.float64", {"pregate": x.double()}),
            (TypeError, "causal must be a bool, got int", {"causal": 1}),
            (TypeError, r"dilation must be an int, got \(1, 2\)", {"dilation": (1, 2)}),
            (TypeError, "window must be an int or None, got '2'", {"window": "2"}),
            (ValueError, "act must be one of .*, got 'elu'", {"act": "elu"}),
            (ValueError, r"weight must be \[C, 1, kw\], of one row", {
                "x": x[:, None], "weight": torch.randn(4, 2, 3), "causal": True,
            }),
        )),
        (d.halo_window_attention, {"q": q, "k": q, "v": q, "window": 4}, (
            (ValueError, r"k must be \[B, H, W, h, d\] like q", {"k": q[:, 1:]}),
            (ValueError, r"shift must be in \[0, window\)", {"shift": 4}),
            (TypeError, "window must be an int or 2 integers, got '4'", {"window": "4"}),
            (ValueError, "pad_v must be given together with pad_k, got None", {"pad_k": torch.randn(1, 4)}),
        )),
        (d.distributed_fft_conv, {"u": x, "k": torch.randn(9, 3)}, (
            (ValueError, r"u must be \[B, C, \*S\] with one to three axes, got \[9, 4\]", {"u": x[0]}),
            (TypeError, "channels_last must be a bool, got int", {"channels_last": 1}),
            (TypeError, "k must be a torch.Tensor, got list", {"k": [1.0]}),
            (TypeError, "postgate must be torch.float32 like u, got torch.float64", {"postgate": x.double()}),
            (ValueError, r"postgate must be \[2, 9, 4\] like u, got \[2, 9, 3\]", {"postgate": x[..., 1:]}),
        )),
    ):  # fmt: skip
        missing = (RuntimeError, "torch.distributed must be initialised, got no process group", {})
        for error, match, changes in (*cases, missing):
            with pytest.raises(error, match=f"effvit::{function.__name__}: {match}"):
                function(**(good | changes))
    with pytest.raises(TypeError, match="effvit::channels_of_rank: channels must be an int, got 1.5"):
        d.channels_of_rank(1.5)


if __name__ == "__main__":
    main(globals(), *sys.argv[1:])
