"""gated_linear_attention_step's samples, bad inputs and error magnitudes."""

import dataclasses

import torch

from effvit.reference.gated_linear_attention_step import gated_linear_attention_step as definition
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import misaligned, sliced
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "gated_linear_attention_step"
TENSORS = OPS[NAME].names
FLOAT16_FIRST = (torch.float16, torch.float32, torch.bfloat16)


def _sample(name, B, H, K, V, *, gate="", size=1.0, layout=None, tags="", dtypes=FLOAT_DTYPES, gate_dtype=None):
    """gate: "head", "token", "channel", or nothing; `size` multiplies it."""
    shapes = {"head": (H,), "token": (B, H), "channel": (B, H, K)}

    def make(dtype, device, generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        tokens = [randn(*shape).to(device, dtype) for shape in ((B, H, K), (B, H, K), (B, H, V))]
        if layout is not None:
            tokens = [layout(t) for t in tokens]
        wide = dtype == torch.float64
        state = randn(B, H, K, V).to(device, dtype if wide else torch.float32)
        given = dict.fromkeys(shapes)
        if gate:
            g = size * torch.nn.functional.logsigmoid(randn(*shapes[gate]))
            given[gate] = g.to(device, dtype if wide else gate_dtype or torch.float32)
        return (*tokens, state, *given.values()), {"scale": K**-0.5}

    return Sample(name, make, frozenset(tags.split()), dtypes)


# fmt: off
SAMPLES = [
    _sample("small_channel", 2, 3, 8, 12, gate="channel", tags="small framework"),
    _sample("small_token", 2, 2, 16, 8, gate="token", tags="small framework"),
    _sample("small_head", 3, 2, 20, 33, gate="head", layout=misaligned, tags="small strided"),
    _sample("small_none", 1, 2, 5, 7, layout=lambda t: sliced(t, 1), dtypes=FLOAT16_FIRST, tags="small strided"),
    _sample("tiny", 1, 2, 2, 3, gate="channel", tags="tiny"),
    _sample("gla", 4, 4, 64, 128, gate="channel", tags="vit"),
    _sample("mamba2", 3, 8, 64, 64, gate="token", gate_dtype=torch.bfloat16, tags="vit"),
    _sample("strong", 2, 2, 32, 32, gate="channel", size=40.0, tags="nasty"),
    _sample("k1_v256", 1, 2, 1, 256, gate="token", tags="nasty"),
    _sample("k256_v1", 1, 1, 256, 1, gate="channel", tags="nasty"),
    _sample("empty_batch", 0, 2, 8, 8, gate="token", tags="empty"),
    _sample("empty_heads", 2, 0, 8, 8, gate="head", tags="empty"),
    _sample("huge_batch", 70001, 1, 2, 1, gate="token", tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes and gates, small; `choose` is a random.Random."""
    K, V = (choose.choice((1, 3, 8, 16, 17, 32, 40, 64)) for _ in range(2))
    return _sample(
        name, choose.randint(1, 3), choose.randint(1, 3), K, V, gate=choose.choice(("", "head", "token", "channel")),
        size=choose.choice((1.0, 20.0)), layout=choose.choice((None, misaligned)),
    )  # fmt: skip


def magnitudes(args, kwargs, output_grads, eps):
    """The definition of absolute values: decays are positive."""
    is_gate = [n.startswith("g_") for n in TENSORS]
    absolute = [t if t is None or gate else t.abs() for t, gate in zip(args, is_gate, strict=False)]
    out, state = definition(*absolute, **kwargs)
    return {"out": out, "new_state": state}, {}


def resize(args, kwargs):
    """The same call at another batch."""
    q, k, v, state, g_head, g_token, g_channel = (*args, *(None,) * (len(TENSORS) - len(args)))
    grow = lambda t: None if t is None else torch.cat((t, t.flip(0)))[1:].contiguous()
    return (*map(grow, (q, k, v, state)), g_head, grow(g_token), grow(g_channel)), kwargs


def memory_calls(dtype):
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = (torch.randn(256, 8, 64, generator=generator).to(dtype) for _ in range(3))
    state, g = torch.randn(256, 8, 64, 64, generator=generator), -torch.rand(256, 8, 64, generator=generator)
    return [("256_h8_d64", (q, k, v, state, None, None, g), {"scale": 0.125})]


def good_call():
    """A call that works; every bad input is this one with something changed."""
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = (torch.randn(2, 3, d, generator=generator) for d in (8, 8, 5))
    return {
        "q": q, "k": k, "v": v, "state": torch.randn(2, 3, 8, 5, generator=generator), "g_head": None,
        "g_token": -torch.rand(2, 3, generator=generator), "g_channel": None,
    }  # fmt: skip


def _bad(name, error, match, **changes):
    """The public function has one g in place of three."""
    return BadInput(name, lambda: split_call(good_call() | changes, TENSORS), error, match, public=False)


def _declared():
    """What the declaration alone says, of every argument in a call that has it: there is one gate at a time."""
    others = {
        "g_head": {"g_token": None, "g_head": torch.zeros(3)},
        "g_channel": {"g_token": None, "g_channel": torch.zeros(2, 3, 8)},
    }
    arguments = (*TENSORS, "scale")
    for changes in ({}, *others.values()):
        for bad in declared_bad_inputs(NAME, lambda changes=changes: good_call() | changes):
            of = max((n for n in arguments if bad.name.removeprefix("declared_").startswith(n)), key=len)
            if others.get(of, {}) is changes or (of not in others and not changes):
                yield dataclasses.replace(bad, public=False)


# fmt: off
BAD_INPUTS = [
    *_declared(),
    _bad("two_gates", ValueError, r"g_token must be None when g_head is given, got \[2, 3\]", g_head=torch.zeros(3)),
    _bad("q_head_dim_257", ValueError, r"q must .*head dim between 1 and 256, got \[2, 3, 257\]",
         q=torch.zeros(2, 3, 257), k=torch.zeros(2, 3, 257), state=torch.zeros(2, 3, 257, 5)),
    _bad("v_head_dim_0", ValueError, r"v must .*head dim between 1 and 256, got \[2, 3, 0\]",
         v=torch.zeros(2, 3, 0), state=torch.zeros(2, 3, 8, 0)),
    _bad("state_shape", ValueError, r"state must be \[B, H, K, V\] like .*got \[2, 3, 5, 8\]",
         state=torch.zeros(2, 3, 5, 8)),
    _bad("state_dtype", TypeError, "state must be .*float32.*got .*bfloat16|state must be .*Float.*got .*BFloat16",
         state=torch.zeros(2, 3, 8, 5, dtype=torch.bfloat16)),
]
# fmt: on


SPEC = OpSpec(
    name=NAME,
    public_kwargs=lambda kwargs: None,  # one gate in place of three: tests/ops/test_gated_linear_attention_step.py
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=160,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=resize,
    memory_calls=memory_calls,
)
