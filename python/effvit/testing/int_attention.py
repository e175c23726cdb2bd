"""int_attention's samples and bad inputs."""

import torch

from effvit.ops._integer import LARGEST, fixed_point
from effvit.testing import _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned, sliced
from effvit.testing._spec import OpSpec, Sample


def _integers(shape, generator, kind):
    """int8: uniform, small (probabilities alike), the ends of the range, or all -128."""
    if kind == "least":
        return torch.full(shape, -128, dtype=torch.int8)
    if kind == "ends":
        return torch.tensor([-128, 127, -127], dtype=torch.int8)[torch.randint(0, 3, shape, generator=generator)]
    largest = 3 if kind == "alike" else 127
    return torch.randint(-largest - 1, largest + 1, shape, generator=generator, dtype=torch.int32).to(torch.int8)


def _bias(shape, generator, kind):
    """A position bias in score steps, a third of it masked; or numbers at the ends of int32."""
    if kind == "range":
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    bias = (torch.randn(shape, generator=generator) * 20).round().to(torch.int32)
    return bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, -(2**31) if kind == "masked" else -3000)


def _fused(B, L, M, H, K, V, generator, kind):
    """q, k, v side by side as a projection makes them."""
    qkv = _integers((B, L, 2 * H * K + H * V), generator, kind).split([H * K, H * K, H * V], -1)
    return tuple(t.unflatten(-1, (H, d)) for t, d in zip(qkv, (K, K, V), strict=True))


def _sample(
    name, B, L, M, H, K, V, *, W=0, kind="uniform", bias_kind="masked", layout=None, tags="", ratio=2e-3, x0=-20, n=15,
    bits=8, half_bit=True, score_bits=8, out_ratio=1 / 60, out_bits=32, out=_integer.INT8,
):  # fmt: skip
    def make(dtype, device, generator):
        if layout == "fused" and L == M:
            tensors = _fused(B, L, M, H, K, V, generator, kind)
        else:
            shapes = (B, L, H, K), (B, M, H, K), (B, M, H, V)
            tensors = tuple(_integers(s, generator, kind) for s in shapes)
            if callable(layout):
                tensors = tuple(map(layout, tensors))
        bias = _bias((W, H, L, M), generator, bias_kind) if W else None
        m, c = fixed_point(ratio)
        m_out, c_out = fixed_point(out_ratio) if out_ratio else (0, 0)
        options = {
            "score_multiplier": m, "score_shift": c, "x0": x0, "n": n, "bits": bits, "half_bit": half_bit,
            "score_bits": score_bits, "multiplier": m_out, "shift": c_out, "out_bits": out_bits, "out_dtype": out,
        }  # fmt: skip
        return tuple(None if t is None else t.to(device) for t in (*tensors, bias)), options

    return Sample(name, make, frozenset(tags.split()), _integer.ANY)


_HEADS_FIRST = lambda t: in_order(t, (0, 2, 1, 3))
LAYOUTS = (None, "fused", _HEADS_FIRST, misaligned, lambda t: sliced(t, 1), lambda t: sliced(t, 3))
_OUT_BITS = {_integer.INT8: 1 / 60, _integer.UINT8: 1 / 60, _integer.INT16: 1.7, _integer.INT32: None}


def random_sample(name, choose):
    B, H = choose.choice(((1, 1), (2, 1), (1, 3), (4, 2), (6, 1)))
    L, M = choose.choice((1, 2, 5, 16, 17, 33, 49)), choose.choice((1, 2, 7, 8, 16, 31, 49, 65, 100))
    K, V = (choose.choice((1, 3, 4, 8, 16, 31, 32, 64, 80)) for _ in range(2))
    layout = choose.choice(LAYOUTS)
    out = choose.choice(sorted(_OUT_BITS))
    ratio = choose.choice((1e-5, 1e-3, 2e-3, 1e-2, 1.0, 2.0**-9, 300.0, 2.0**-31, 2.0**29))
    return _sample(
        name, B, M if layout == "fused" else L, M, H, K, V, W=choose.choice((0, 0, 1, B)),
        kind=choose.choice(("uniform", "uniform", "alike", "ends", "least")), layout=layout,
        bias_kind=choose.choice(("masked", "finite", "range")), ratio=ratio, **_integer.random_shift_exp(choose),
        bits=choose.choice((2, 7, 8, 8, 9, 10, 15, 16)), score_bits=choose.choice((8, 8, 9, 12, 16)), out=out,
        out_ratio=choose.choice((_OUT_BITS[out], None, 1e-4, 3.0, 0.5)), out_bits=choose.choice((32, 32, 8, 4)),
    )  # fmt: skip


I16_BITS = {"bits": 16, "out_ratio": 2.0**-13}
SAMPLES = [
    _sample("deit_s", 2, 197, 197, 6, 64, 64, layout="fused", tags="vit"),
    _sample("deit_s_16_bits", 1, 197, 197, 6, 64, 64, layout="fused", tags="vit", **I16_BITS),
    _sample("swin_window", 8, 49, 49, 3, 32, 32, W=4, layout="fused", tags="vit"),
    _sample("swin_16_bit_scores", 4, 49, 49, 3, 32, 32, W=2, layout="fused", tags="vit", score_bits=16, ratio=0.05,
            x0=-1500, bits=16, out_ratio=2.0**-13),
    _sample("pooled_keys", 2, 100, 49, 2, 64, 64, tags="vit"),
    _sample("small", 2, 7, 7, 2, 8, 9, tags="small framework"),
    _sample("small_cross", 2, 5, 9, 2, 8, 9, tags="small"),
    _sample("small_bias", 4, 3, 9, 2, 16, 16, W=2, tags="small"),
    _sample("small_16_bits", 2, 20, 20, 2, 16, 8, tags="small framework", layout="fused", **I16_BITS),
    _sample("small_deployed", 1, 9, 17, 1, 20, 33, tags="small", n=16, half_bit=False),
    _sample("small_int32", 2, 5, 18, 2, 33, 16, tags="small", out=_integer.INT32, out_ratio=None),
    _sample("small_int16", 1, 17, 33, 1, 16, 17, tags="small", out=_integer.INT16, out_ratio=1.3),
    _sample("small_uint8", 1, 5, 33, 1, 16, 17, tags="small", out=_integer.UINT8, out_bits=6),
    _sample("small_9_bits", 1, 5, 40, 1, 16, 16, tags="small", bits=9, kind="ends", ratio=1e-3),
    _sample("small_score_bits", 1, 5, 40, 1, 16, 16, tags="small", score_bits=12, ratio=0.05, x0=-900),
    _sample("rescaled_by_one", 1, 5, 18, 1, 16, 16, tags="small", ratio=1.0, score_bits=16, x0=-3000),
    _sample("rescaled_by_much", 1, 5, 18, 1, 3, 16, tags="nasty small", ratio=2.0**29),
    _sample("rescaled_by_little", 1, 5, 18, 1, 16, 16, tags="nasty small", ratio=2.0**-31),
    _sample("ties", 1, 9, 18, 1, 4, 16, tags="nasty small", ratio=2.0**-8, kind="alike", out_ratio=0.5),
    _sample("alike", 1, 5, 40, 1, 16, 16, tags="nasty small", kind="alike"),
    _sample("ends", 1, 9, 40, 1, 16, 16, tags="nasty small", kind="ends"),
    _sample("least", 1, 9, 40, 1, 16, 16, tags="nasty small", kind="least"),
    _sample("bias_range", 2, 9, 18, 1, 16, 16, W=2, bias_kind="range", tags="nasty small"),
    _sample("one_key", 2, 9, 1, 1, 16, 16, W=1, tags="nasty small"),
    _sample("one_query", 2, 1, 30, 2, 16, 16, tags="nasty small"),
    _sample("one_channel", 1, 3, 9, 1, 1, 1, tags="nasty small"),
    _sample("saturated_sum", 1, 9, 64, 1, 16, 16, tags="nasty small", kind="alike", x0=-65535, ratio=1e-6),
    _sample("saturated_sum_16_bits", 1, 9, 64, 1, 16, 16, tags="nasty small", kind="alike", x0=-65535, ratio=1e-6,
            bits=16, out=_integer.INT32, out_ratio=None),
    _sample("saturated_everywhere", 1, 3, 3000, 1, 4, 5, tags="nasty", kind="least", x0=-65535, ratio=1e-6, bits=16,
            out=_integer.INT32, out_ratio=None),
    _sample("saturated_9_bits", 1, 3, 3000, 1, 4, 5, tags="nasty", kind="least", x0=-65535, ratio=1e-6, bits=9,
            out=_integer.INT32, out_ratio=None),
    *(_sample(f"bound_{n}", 1, 4, 30, 1, 16, 16, n=n, x0=-(LARGEST >> n), score_bits=16,
              ratio=1e-3 if n > 20 else 0.3, tags="nasty small", **I16_BITS) for n in (4, 15, 23, 30)),
    *(_sample(f"shape_{L}x{M}x{K}x{V}", 2, L, M, 1, K, V, W=L % 2) for L, M, K, V in (
        (16, 16, 16, 16), (31, 33, 17, 15), (65, 64, 32, 48), (12, 130, 100, 7), (7, 15, 130, 130), (50, 300, 40, 40))),
    _sample("long", 1, 3, 5000, 1, 32, 32, tags="nasty"),
    _sample("longer", 1, 2, 70_001, 1, 8, 8, tags="nasty", bits=16, out_ratio=2.0**-8),
    _sample("wide_heads", 1, 9, 20, 1, 1100, 700, tags="nasty", ratio=1e-4),
    _sample("misaligned", 2, 5, 19, 2, 17, 9, layout=misaligned, tags="strided small"),
    _sample("heads_first", 2, 5, 19, 2, 16, 16, layout=_HEADS_FIRST, tags="strided small"),
    _sample("fused", 2, 18, 18, 2, 32, 32, layout="fused", tags="strided small"),
    _sample("sliced_keys", 2, 5, 19, 2, 16, 16, layout=lambda t: sliced(t, 1), tags="strided small"),
    _sample("expanded", 1, 5, 19, 2, 16, 16, layout=lambda t: t.expand(3, *t.shape[1:]), tags="strided small"),
    _sample("empty_batch", 0, 5, 7, 2, 8, 9, tags="empty", W=3),
    _sample("empty_queries", 2, 0, 7, 2, 8, 9, tags="empty"),
    _sample("empty_values", 2, 5, 7, 2, 8, 0, tags="empty"),
    _sample("many", 3000, 2, 3, 4, 4, 4, tags="huge"),
]  # fmt: skip


def good_call():
    args, kwargs = _sample("good", 4, 5, 7, 2, 8, 9, W=4).build()
    return dict(zip(("q", "k", "v", "bias"), args, strict=True)) | kwargs


def public_kwargs(kwargs):
    given = dict(kwargs)
    if "half_bit" in given:
        given["deployed"] = not given.pop("half_bit")
    if "out_dtype" in given:
        given["out_dtype"] = _integer.dtype_of(given["out_dtype"])
    return given


def memory_calls(dtype):
    (*tensors, _), kwargs = _sample("memory", 1, 4000, 4000, 2, 64, 64, layout="fused").build()
    return [("4000x4000", (*tensors, None), kwargs)]


def _bad(name, argument, match, error=ValueError, **change):
    return _integer.bad("int_attention", good_call, name, argument, match, error, **change)


SPEC = OpSpec(
    name="int_attention",
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=64,
    bad_inputs=[
        *_integer.without_half_bit(declared_bad_inputs("int_attention", good_call)),
        *_integer.bad_shift_exp("int_attention", good_call),
        _bad("no_shift", "shift", "between 1 and 61 with a multiplier, got 0", shift=0),
        _bad("bias_of_other_batch", "bias", r"\[W, H, L, M\] with W a divisor of B = 4, got \[3, 2, 5, 7\]",
             bias=torch.zeros(3, 2, 5, 7, dtype=torch.int32)),
        _bad("bias_of_nothing", "bias", r"\[W, H, L, M\] with W a divisor of B = 4, got \[0, 2, 5, 7\]",
             bias=torch.zeros(0, 2, 5, 7, dtype=torch.int32)),
        _bad("bias_int64", "bias", "torch.int32|int32", TypeError, bias=torch.zeros(2, 2, 5, 7, dtype=torch.int64)),
        _bad("no_channels", "q", r"\[B, L, H, K\] with K from 1 to 65536", q=torch.zeros(4, 5, 2, 0, dtype=torch.int8),
             k=torch.zeros(4, 7, 2, 0, dtype=torch.int8)),
        _bad("no_keys", "k", r"\[B, M, H, K\] with M from 1", k=torch.zeros(4, 0, 2, 8, dtype=torch.int8),
             v=torch.zeros(4, 0, 2, 9, dtype=torch.int8), bias=None),
    ],
    good_call=good_call,
    dynamic="B L M",
    resize=lambda args, kwargs: (_resize(args), kwargs),
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip


def _resize(args):
    """Twice as many samples, three queries and keys more."""
    q, k, v, bias = (None if t is None else torch.cat((t, t.flip(0))) for t in args)
    q, k, v = (torch.cat((t, t[:, :3]), 1) for t in (q, k, v))
    if bias is not None:
        bias = torch.cat((bias, bias[:, :, :3]), 2)
        bias = torch.cat((bias, bias[..., :3]), 3)
    return q, k, v, bias
