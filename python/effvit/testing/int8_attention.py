"""int8_attention's samples, bad inputs and error magnitudes."""

import math

import torch

from effvit.ops.int8_attention import NAMES
from effvit.reference.int8_attention import int8_attention, mean_of_keys, quantise_keys, quantise_values
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call

SHIFTMAX = NAMES.index("shiftmax")


def quantised(k, v):
    """(k int8, v int8, k_scale, v_scale, k_mean) of floats, as a cache has them."""
    mean = mean_of_keys(k.float())
    integers, scales = zip(quantise_keys(k, mean), quantise_values(v), strict=True)
    k8, v8 = (x.flatten(1, 2)[:, : k.shape[1]].to(torch.int8) for x in integers)
    return k8, v8, *(s.contiguous() for s in scales), mean


def fused(q, k, v):
    """Slices of one projection [B, L, 3, H, K]."""
    return torch.stack((q, k, v), 2).unbind(2)


def heads_first(q, k, v):
    return tuple(in_order(t, (0, 2, 1, 3)) for t in (q, k, v))


def _sample(
    name, B, L, H, K, M=None, G=None, V=None, *, tags="", int8=False, mean=False, bias=0, spread=1.0, offset=0.0,
    layout=None, kv=None, dtypes=FLOAT_DTYPES, outlier=None, **options,
):  # fmt: skip
    """bias: its W, 0 for none. mean: given. kv: dtype of float keys and values, else that of q."""
    M, G, V = L if M is None else M, H if G is None else G, K if V is None else V

    def make(dtype, device, generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator)

        q, k, v = spread * randn(B, L, H, K), spread * randn(B, M, G, K) + offset * randn(B, 1, G, K), randn(B, M, G, V)
        if outlier is not None:
            k[..., outlier % K] *= 20
            v[:, outlier % M] *= 50
        q, k, v = q.to(dtype), k.to(kv or dtype), v.to(kv or dtype)
        k_mean = mean_of_keys(k.float()) * 0.9 if mean else None
        tensors = [q, k, v, None, None, k_mean]
        if int8:
            tensors[1:] = quantised(k, v)
        if layout is not None:
            tensors[:3] = layout(*tensors[:3])
        tensors.append(randn(bias, H, L, M).to(dtype) if bias else None)
        return tuple(None if t is None else t.to(device) for t in tensors), options

    return Sample(name, make, frozenset(tags.split()), dtypes)


def random_sample(name, choose):
    """Any options at once."""
    B, G = choose.choice((1, 2, 4)), choose.choice((1, 2))
    L, M = choose.choice((1, 2, 5, 9, 16, 17, 33, 70)), choose.choice((1, 3, 4, 31, 64, 65, 100, 129, 200))
    K, V = (choose.choice((1, 2, 3, 8, 15, 16, 31, 32, 33, 64, 80)) for _ in range(2))
    int8 = choose.random() < 0.3
    causal = L <= M and choose.random() < 0.4
    layouts = (None, heads_first, lambda *qkv: tuple(map(misaligned, qkv)))
    return _sample(
        name, B, L, G * choose.choice((1, 2, 3)), K, M, G, V, int8=int8, causal=causal,
        mean=not int8 and choose.random() < 0.2, bias=choose.choice((0, 0, 1, B)),
        exponential=choose.randrange(2), layout=choose.choice(layouts), spread=choose.choice((0.3, 1.0, 3.0)),
        offset=choose.choice((0.0, 0.0, 4.0)), kv=choose.choice((None, None, None, torch.bfloat16)),
        scale=choose.choice((None, None, 0.3, 2.0)),
    )  # fmt: skip


SAMPLES = [
    _sample("deit_s_197", 1, 197, 6, 64, layout=fused, tags="vit"),
    _sample("vit_l_tokens", 1, 577, 2, 64, layout=fused, tags="vit"),
    _sample("swin_window", 4, 49, 3, 32, bias=2, layout=fused, tags="vit"),
    _sample("decode", 2, 1, 8, 64, 300, 2, int8=True, causal=True, tags="vit"),
    _sample("decode_one_head", 1, 1, 3, 64, 200, int8=True, tags="vit"),
    _sample("cross", 1, 20, 4, 40, 333, tags="vit"),
    _sample("small", 2, 5, 2, 8, 70, tags="small framework"),
    _sample("small_int8", 2, 6, 4, 8, 66, 2, 5, int8=True, causal=True, tags="small framework"),
    _sample("small_bias", 2, 5, 2, 8, 20, bias=1, exponential=SHIFTMAX, tags="small"),
    _sample("small_shiftmax", 1, 9, 2, 16, 67, exponential=SHIFTMAX, tags="small"),
    _sample("small_causal", 1, 40, 1, 16, causal=True, tags="small"),
    _sample("small_causal_long", 1, 5, 1, 8, 130, causal=True, tags="small"),
    _sample("small_masked", 4, 3, 1, 8, 17, bias=2, causal=True, tags="small"),
    _sample("small_mean", 2, 3, 2, 8, 17, mean=True, offset=3.0, tags="small"),
    _sample("small_groups", 2, 7, 6, 16, 33, 2, tags="small"),
    _sample("offset", 1, 50, 2, 64, 130, offset=8.0, tags="nasty"),
    _sample("not_smoothed", 1, 50, 2, 64, 130, smooth_k=False, offset=1.0, tags="nasty"),
    _sample("outliers", 1, 33, 2, 32, 100, outlier=7, tags="nasty"),
    _sample("peaked", 1, 33, 2, 32, 200, spread=10.0, tags="nasty"),
    _sample("flat", 1, 33, 2, 32, 200, spread=1e-3, tags="nasty"),
    _sample("one_key", 2, 3, 2, 8, 1, tags="nasty small"),
    _sample("one_channel", 1, 3, 2, 1, 5, tags="nasty small"),
    _sample("wide", 1, 9, 1, 256, 70, tags="nasty"),
    _sample("wide_values", 1, 5, 1, 12, 70, V=200, tags="nasty"),
    *(_sample(f"keys_{m}", 1, 17, 1, 24, m, V=20, tags="small" if m in (2, 63, 65) else "")
      for m in (2, 3, 4, 5, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 192)),
    *(_sample(f"queries_{n}", 1, n, 1, 20, 66, V=33) for n in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48)),
    *(_sample(f"decode_{n}", 1, 1, n, 20, 131, 1, V=33, int8=True) for n in (1, 2, 3, 4, 8)),
    *(_sample(f"depth_{k}", 1, 18, 1, k, 67) for k in (2, 3, 4, 5, 7, 31, 33, 63, 65, 80, 127, 129)),
    _sample("heads_first", 2, 10, 3, 16, 40, layout=heads_first, tags="strided small"),
    _sample("misaligned", 2, 10, 3, 17, 40, layout=lambda *qkv: tuple(map(misaligned, qkv)), tags="strided small"),
    _sample("int8_heads_first", 2, 10, 4, 16, 80, 2, int8=True, layout=heads_first, tags="strided small"),
    _sample("other_dtype", 1, 10, 2, 16, 70, kv=torch.bfloat16, tags="small"),
    _sample("scale", 1, 10, 2, 16, 70, scale=0.7, tags="small"),
    _sample("empty_batch", 0, 10, 2, 16, tags="empty"),
    _sample("empty_queries", 2, 0, 2, 16, 5, tags="empty"),
    _sample("many_heads", 40, 4, 70, 4, 3, tags="huge"),
]  # fmt: skip


def magnitudes(args, kwargs, output_grads, eps):
    """Of out: the weighted values without their signs. Of lse: the largest score, the mean's part, logarithms."""
    q, k, v, k_scale, v_scale, k_mean, bias = args
    out, lse = int8_attention(q, k, v.abs(), k_scale, v_scale, k_mean, bias, **kwargs)
    if k_mean is None and kwargs.get("smooth_k", True) and k.dtype != torch.int8:
        k_mean = mean_of_keys(k.float()).double()
    part = torch.zeros_like(lse)
    if k_mean is not None:
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        rows = q.abs().unflatten(2, (k.shape[2], -1))
        part = scale * torch.einsum("blgek,bgk->bgel", rows, k_mean.abs()).flatten(1, 2)
    return {"out": out, "lse": lse.abs() + 2 * part + math.log(k.shape[1]) + 1}, {}


def resize(args, kwargs):
    """Twice the batch and one more; a bias for one sample serves all."""
    return (*(None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in args[:6]), args[6]), kwargs


def good_call():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=generator) for n in (3, 70, 70))
    k8, v8, k_scale, v_scale, k_mean = quantised(k, v)
    return {
        "q": q, "k": k8, "v": v8, "k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean,
        "bias": torch.randn(2, 2, 3, 70, generator=generator), "exponential": 0,
    }  # fmt: skip


def _bad(name, match, error=ValueError, *, schema_match=None, **changes):
    def make():
        call = good_call()
        for key, change in changes.items():
            call[key] = change(call.get(key)) if callable(change) else change
        return split_call(call, ("q", "k", "v", "k_scale", "v_scale", "k_mean", "bias"))

    return BadInput(name, make, error, match, schema_match, declared=True)


def _negative(t):
    t = t.clone()
    t[1, 0, 1] = -0.5
    return t


_FLOATS = {"k": lambda t: t.float(), "v": lambda t: t.float()}
BAD_INPUTS = [
    *declared_bad_inputs("int8_attention", good_call),
    _bad("k_scale_missing", "k_scale must be given where k and v are int8, got None", k_scale=None),
    _bad("v_scale_missing", "v_scale must be given where k and v are int8, got None", v_scale=None),
    _bad("k_scale_with_floats", "k_scale must be None where k and v are not int8", **_FLOATS),
    _bad("v_scale_with_floats", "v_scale must be None where k and v are not int8", k_scale=None, **_FLOATS),
    _bad("k_scale_negative", r"k_scale must be at least 0, got -0\.5 at \[1, 0, 1\]", k_scale=_negative),
    _bad("k_scale_rows", r"k_scale must be \[B, N, G\] = \[2, 2, 2\]", k_scale=lambda t: t[:, :1]),
    _bad("v_scale_channels", r"v_scale must be \[B, N, G, V\] = \[2, 2, 2, 8\]", v_scale=lambda t: t[..., :1]),
    _bad("v_float", r"v must be .*(int8|Int8|Char) like k", TypeError, v=lambda t: t.float()),
    _bad("k_float", r"v must be .*(float32|Float) like k", TypeError, k=lambda t: t.float()),
    _bad("q_int8", "q must be float32, bfloat16 or float16", TypeError, q=lambda t: t.to(torch.int8)),
    _bad("k_uint8", "k must be float32, bfloat16, float16 or int8", TypeError, k=lambda t: t.to(torch.uint8)),
    _bad("k_heads", r"k must be of heads that divide those of q, 2", k=lambda t: torch.cat((t, t[:, :, :1]), 2),
         v=lambda t: torch.cat((t, t[:, :, :1]), 2)),
    _bad("no_keys", "k must have at least one key", k=lambda t: t[:, :0], v=lambda t: t[:, :0]),
    _bad("k_wide", "q must have a head dim between 1 and 256", q=lambda t: t.repeat(1, 1, 1, 33),
         k=lambda t: t.repeat(1, 1, 1, 33)),
    _bad("v_wide", "v must have a head dim between 1 and 256", v=lambda t: t.repeat(1, 1, 1, 33)),
    _bad("k_mean_without_smooth_k", "k_mean must be None without smooth_k", k_scale=None, v_scale=None, smooth_k=False,
         **_FLOATS),
    _bad("bias_batch", r"bias must be \[W, H, L, M\] with W a divisor of B = 2", bias=lambda t: t.repeat(3, 1, 1, 1)),
    _bad("bias_heads", r"bias must be \[W, H, L, M\]", bias=lambda t: t[:, :1]),
    _bad("scale_zero", "scale must be positive, got 0", scale=0.0),
]  # fmt: skip


def public_kwargs(kwargs):
    named = {**kwargs, "return_lse": True}
    if "exponential" in named:
        named["exponential"] = NAMES[named["exponential"]]
    return named


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 8, 64, generator=generator).to(dtype) for _ in range(3))
    return [("4096x8x64", (q, k, v), {})]


SPEC = OpSpec(
    name="int8_attention",
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=240,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
    memory_slack_per_thread=4 << 20,  # keys and values as int8 and int16, of two threads: 6.3 MB of that call
)
