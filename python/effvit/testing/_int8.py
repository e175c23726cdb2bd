"""What the specs of the int8 products share: calls of any shape and epilogue, magnitudes, bad inputs."""

import dataclasses

import torch

from effvit.ops._int8 import DTYPES, NAMES
from effvit.ops._op import OPS
from effvit.reference.int8_linear import epilogue, integer_product
from effvit.reference.int8_prepack import DENSE, SPARSE24, labelled
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import FLOAT_DTYPES, BadInput, Sample, split_call

NONE, RELU, GELU, SILU = range(4)
INT32, INT8 = 3, 4


def integers(shape, generator, low=-127):
    return torch.randint(low, 128, shape, generator=generator, dtype=torch.int8)


def epilogue_tensors(m, n, k, dtype, generator, *, bias=True, residual=False):
    """Scales that make results of size 1, and the rest in `dtype`."""
    x_scale = 0.5 + torch.rand(m, generator=generator)
    w_scale = (0.5 + torch.rand(n, generator=generator)) / (5000 * max(k, 1) ** 0.5)
    given = [torch.randn(n, generator=generator).to(dtype) if bias else None]
    given.append(torch.randn(m, n, generator=generator).to(dtype) if residual else None)
    if dtype == torch.float64:
        x_scale, w_scale = x_scale.double(), w_scale.double()
    return x_scale, w_scale, *given


def sample(name, m, n, k, weights, *, activation=NONE, out=None, bias=True, residual=False, layout=None, tags=""):
    """A call; `weights(n, k, generator)` -> the tensors between x and x_scale. out: INT8, INT32; None: as asked."""

    def make(dtype, device, generator):
        x = integers((m, k), generator, -128)
        middle = weights(n, k, generator)
        scales = epilogue_tensors(m, n, k, dtype, generator, bias=bias, residual=residual)
        tensors = (x, *middle, *scales)
        if layout is not None:
            tensors = layout(tensors)
        as_asked = DTYPES.index(dtype) if dtype in DTYPES else 0  # float64: of the definition
        options = {"activation": activation, "out_dtype": as_asked if out is None else out}
        if out == INT8:
            options["out_scale"] = 0.02
        return tuple(None if t is None else t.to(device) for t in tensors), options

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES if out is None else FLOAT_DTYPES[:1])


def standard_samples(weights, k_step=1, n_step=1):
    """Real geometries and the nasty ones; K is a multiple of k_step, N of n_step."""

    def k_of(k):
        return max(k // k_step, 1) * k_step if k else 0

    def n_of(n):
        return max(n // n_step, 1) * n_step if n else 0

    def one(name, m, n, k, **options):
        return sample(name, m, n_of(n), k_of(k), weights, **options)

    def strided(tensors):
        x, *rest = tensors
        wide = torch.zeros(2 * x.shape[0], x.shape[1] + 3, dtype=torch.int8)
        wide[::2, 3:] = x
        *most, residual = rest
        if residual is not None:
            padded = torch.zeros(residual.shape[0], residual.shape[1] + 5, dtype=residual.dtype)
            padded[:, 5:] = residual
            residual = padded[:, 5:]
        return (wide[::2, 3:], *most, residual)

    def expanded(tensors):
        names = list(tensors)
        names[-4], names[-3] = names[-4][:1].expand(len(names[-4])), names[-3][:1].expand(len(names[-3]))
        return tuple(names)

    return [
        one("deit_s_fc1", 197, 1536, 384, activation=GELU, tags="vit"),
        one("deit_s_fc2", 197, 384, 1536, residual=True, tags="vit"),
        one("swin_stage1", 784, 96, 384, activation=GELU, out=INT8, tags="vit"),
        one("one_row", 1, 100, 768, tags="vit"),
        *(one(f"small_{a}", 7, 20, 36, activation=i, residual=i % 2 == 0, tags="small framework")
          for i, a in enumerate(NAMES)),
        *(one(f"small_{a}_int8", 9, 33, 40, activation=i, out=INT8, tags="small") for i, a in enumerate(NAMES)),
        one("small_int32", 5, 18, 68, out=INT32, bias=False, tags="small"),
        *(one(f"rows_{m}", m, 70, 52, tags="small" if m in (1, 3, 13, 17) else "") for m in (*range(1, 18), 31, 33)),
        *(one(f"columns_{n}", 3, n, 20, residual=True, tags="small" if n < 4 else "")
          for n in sorted({n_of(n) for n in (1, 2, 3, 15, 16, 17, 47, 65)})),
        *(one(f"depth_{k}", 4, 19, k, tags="small" if k < 10 else "")
          for k in sorted({k_of(k) for k in (1, 2, 3, 4, 5, 7, 8, 9, 12, 31, 63, 64, 65, 127, 257)})),
        one("deep", 2, 17, 4100, tags="nasty"),
        one("no_bias", 6, 24, 32, bias=False, activation=GELU, tags="small"),
        one("strided", 6, 20, 28, residual=True, layout=strided, tags="strided small"),
        one("one_scale", 6, 20, 28, layout=expanded, tags="strided small"),
        one("tiny", 2, 3, 4, residual=True, activation=SILU, tags="tiny small"),
        one("empty_rows", 0, 8, 12, residual=True, tags="empty"),
        one("empty_columns", 4, 0, 12, tags="empty"),
        one("empty_depth", 4, 20, 0, residual=True, activation=RELU, tags="empty nasty small") if k_step == 1
        else one("two_groups", 4, 20, 8, tags="nasty small"),
        one("tall", 40_000, 3, 8, tags="huge"),
    ]  # fmt: skip


def random_call(weights, k_step=1, n_step=1):
    def random_sample(name, choose):
        m, n = choose.choice((1, 2, 5, 13, 16, 40)), choose.choice((1, 3, 16, 33, 50, 130))
        n = max(n // n_step, 1) * n_step
        k = k_step * choose.randint(1, 200 // k_step)
        out = choose.choice((None, None, None, INT8, INT32))
        plain = out == INT32
        return sample(
            name, m, n, k, weights, activation=NONE if plain else choose.randrange(4), out=out,
            bias=not plain and choose.random() < 0.7, residual=not plain and choose.random() < 0.5,
        )  # fmt: skip

    return random_sample


def unrounded(dense):
    """The spec's definition: dense(*tensors before x_scale) -> (x, weight [N, K])."""

    def definition(*args, activation, out_dtype, out_scale):
        *front, x_scale, w_scale, bias, residual = args
        acc = integer_product(*dense(*front, x_scale, w_scale))
        if out_dtype == INT32:
            return acc
        options = {"activation": NAMES[activation], "out_scale": out_scale}
        return epilogue(acc, x_scale, w_scale, bias, residual, **options)

    return definition


def magnitudes(dense):
    """Terms: the sum, as one; bias; residual. gelu and silu change their argument by a factor up to 1.13."""

    def of(args, kwargs, output_grads, eps):
        *front, x_scale, w_scale, bias, residual = args
        acc = integer_product(*dense(*front, x_scale, w_scale)).abs()
        if kwargs["out_dtype"] == INT32:
            return {"out": acc}, {}
        y = acc * (x_scale[:, None] * w_scale)
        for term in (bias, residual):
            y = y if term is None else y + term.abs()
        y = y * (1.2 if kwargs["activation"] in (GELU, SILU) else 1.0) / (kwargs.get("out_scale") or 1.0)
        return {"out": y}, {}

    return of


def rolled(t, i):
    """Other integers; a packed weight keeps the label that ends its blocks."""
    packed = t.dim() == 2 and t.shape[0] and t.shape[1] >= 64 and labelled(t)[0] in (DENSE, SPARSE24)
    body = t[:, :-64] if packed else t
    body = body.flatten().roll(i).view(body.shape)
    return torch.cat((body, t[:, -64:]), 1) if packed else body


def resize(args, kwargs):
    """Twice the rows and one more."""
    x, *middle, x_scale, w_scale, bias, residual = args
    x, x_scale, residual = (None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in (x, x_scale, residual))
    return (x, *middle, x_scale, w_scale, bias, residual), kwargs


def public_kwargs(kwargs):
    named = dict(kwargs)
    if "activation" in named:
        named["activation"] = NAMES[named["activation"]]
    if "out_dtype" in named:
        named["out_dtype"] = DTYPES[named["out_dtype"]]
    return named


def bad_inputs(name, good_call):
    """Those that follow from the declaration, and scales and options of the epilogue that do not go together."""
    names = OPS[name].names
    for declared in declared_bad_inputs(name, good_call):  # the public function takes x of any rank
        rank = declared.name == "declared_x_rank_above"
        yield dataclasses.replace(declared, public=False) if rank else declared

    def bad(name, argument, match, error=ValueError, **change):
        def make():
            call = dict(good_call())
            for key, x in change.items():
                call[key] = x(call[key]) if callable(x) else x
            return split_call(call, names)

        return BadInput(name, make, error, f"{argument} must be {match}", declared=True)

    def at(value):
        def change(t):
            t = t.clone()
            t[-1] = value
            return t

        return change

    for scale in ("x_scale", "w_scale"):
        for value in (0.0, -0.5, float("nan"), float("inf")):
            if scale == "w_scale" or value <= 0:
                yield bad(f"{scale}_{value}", scale, "positive and finite, got", **{scale: at(value)})
            else:  # a row's own may be that
                one = {scale: lambda t, value=value: t.new_full((1,), value).expand(t.shape)}
                yield bad(f"{scale}_one_{value}", scale, "positive and finite, got", **one)
        yield bad(
            f"{scale}_bfloat16",
            scale,
            "torch.float32, got torch.bfloat16",
            TypeError,
            **{scale: lambda t: t.bfloat16()},
        )
        short = {scale: lambda t: t[:2]}
        yield bad(f"{scale}_short", "x_scale" if scale == "x_scale" else "(weight|values|w_scale)", r"\[", **short)
    yield bad("x_float", "x", "torch.int8, got torch.float32", TypeError, x=lambda t: t.float())
    yield bad("x_uint8", "x", "torch.int8, got torch.uint8", TypeError, x=lambda t: t.view(torch.uint8))
    yield bad("bias_int32", "bias", "float32, bfloat16 or float16", TypeError, bias=lambda t: t.int())
    yield bad("residual_long", "residual", r"\[M, N\]", residual=lambda t: torch.cat((t, t)))
    yield bad("out_scale_missing", "out_scale", "given where the output is int8", out_dtype=INT8)
    yield bad("out_scale_float", "out_scale", "None where the output is not int8", out_scale=0.1)
    yield bad("int32_bias", "bias", "None where the output is int32", out_dtype=INT32, residual=None)
    yield bad("int32_residual", "residual", "None where the output is int32", out_dtype=INT32, bias=None)
    yield bad(
        "int32_relu",
        "activation",
        "none where the output is int32",
        out_dtype=INT32,
        bias=None,
        residual=None,
        activation=RELU,
    )
