"""gated_linear_attention's samples, bad inputs and error magnitudes."""

import dataclasses

import torch

from effvit.reference.gated_linear_attention import gated_linear_attention as definition
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import changed, in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "gated_linear_attention"
TENSORS = OPS[NAME].names
BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names
FORWARD, REVERSE, BOTH = range(3)
BFLOAT16_FIRST = (torch.bfloat16, torch.float32, torch.float16)
FLOAT16_FIRST = (torch.float16, torch.float32, torch.bfloat16)


# ---- samples -------------------------------------------------------------------------------------------------------


def _packed(q, k, v):
    """Slices of one tensor [B, L, H, 2 K + V]."""
    return torch.cat((q, k, v), dim=-1).split((q.shape[-1], k.shape[-1], v.shape[-1]), dim=-1)


def _head_major(*tensors):
    """Views of [B, H, L, D]."""
    return tuple(in_order(t, (0, 2, 1, 3)) for t in tensors)


def _misaligned(q, k, v):
    return misaligned(q), misaligned(k), misaligned(v)


def _shared_heads(q, k, v):
    """All heads share q and k (Mamba-2's single group): head stride 0."""
    return q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v


def _soft(randn, shape):
    """log sigmoid of random numbers, as GLA has them: from nearly 0 to about -3."""
    return torch.nn.functional.logsigmoid(randn(*shape) + 1)


def _nearly_none(randn, shape):
    return torch.full(shape, -1e-6)


def _zero(randn, shape):
    return torch.zeros(shape)


def _strong(randn, shape):
    return torch.full(shape, -20.0)


def _mixed(randn, shape):
    """0 or about -20, at random; a token in eight in between."""
    x = randn(*shape)
    return torch.where(x > 1.2, -0.3 * x, torch.where(x > 0, 0.0, -20.0 + x))


def _retention(randn, shape):
    """RetNet's and ViR's: log(1 - 2^(-5-h))."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(shape[-1], dtype=torch.float64)))).float()


def _in_gate_order(g):
    return in_order(g, (0, 2, 1, *range(3, g.dim())))


def _sample(
    name, B, L, H, K, V=None, *, gate="", gates=_soft, initial=False, lens=None, tags="", layout=None, gate_layout=None,
    gate_dtype=torch.float32, dtypes=FLOAT_DTYPES, **kwargs,
):  # fmt: skip
    """gate: "head", "token", "channel", or nothing."""
    V = K if V is None else V
    N = B if lens is None else len(lens)
    shapes = {"head": (H,), "token": (B, L, H), "channel": (B, L, H, K)}

    def make(dtype, device, generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        q, k, v = (t.to(device, dtype) for t in (randn(B, L, H, K), randn(B, L, H, K), randn(B, L, H, V)))
        if layout is not None:
            q, k, v = layout(q, k, v)
        given = dict.fromkeys(shapes)
        wide = dtype == torch.float64
        if gate:
            g = gates(randn, shapes[gate]).to(device, dtype if wide else gate_dtype or dtype)
            given[gate] = g if gate_layout is None else gate_layout(g)
        offsets = None
        if lens is not None:
            offsets = torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32)
        state = randn(N, H, K, V).to(device, dtype if wide else torch.float32) if initial else None
        return (q, k, v, *given.values(), offsets, state), {"scale": K**-0.5, **kwargs}

    return Sample(name, make, frozenset(tags.split()), dtypes)


# fmt: off
SAMPLES = [
    # Small: the emulator and the interpreter run them too. The first are `framework` as well, and short: what is traced
    # is the recurrence.
    _sample("small_channel", 2, 7, 2, 8, 12, gate="channel", initial=True, tags="small framework"),
    _sample("small_token_reverse", 2, 6, 2, 8, gate="token", direction=REVERSE, initial=True, tags="small framework"),
    _sample("small_head_both", 2, 6, 2, 8, gate="head", gates=_retention, direction=BOTH, tags="small framework"),
    _sample("small_none", 1, 20, 2, 16, layout=_packed, tags="small"),
    _sample("small_channel_both", 1, 67, 1, 16, gate="channel", gates=_mixed, direction=BOTH, layout=_misaligned,
            gate_layout=misaligned, dtypes=BFLOAT16_FIRST, tags="small nasty"),
    _sample("small_segments", 1, 41, 1, 8, gate="token", lens=(17, 0, 1, 23), initial=True, layout=_head_major,
            gate_layout=_in_gate_order, tags="small"),
    _sample("small_token_strong", 1, 70, 1, 20, 33, gate="token", gates=_mixed, initial=True, tags="small nasty",
            dtypes=FLOAT16_FIRST),
    # Tiny: gradcheck of the definition.
    _sample("tiny_channel", 1, 3, 2, 2, 1, gate="channel", initial=True, tags="tiny"),
    _sample("tiny_token_both", 1, 4, 1, 2, gate="token", direction=BOTH, tags="tiny"),
    _sample("tiny_segments", 1, 4, 1, 2, gate="head", lens=(1, 0, 3), direction=REVERSE, tags="tiny"),
    # Real networks; fewer heads than they have.
    _sample("gla_196", 1, 196, 2, 32, 64, gate="channel", tags="vit"),
    _sample("vir_s16", 2, 197, 2, 64, gate="head", gates=_retention, layout=_packed, tags="vit"),
    _sample("mamba2_196", 1, 196, 3, 64, 32, gate="token", gate_layout=_in_gate_order, layout=_shared_heads,
            direction=BOTH, tags="vit"),
    # Gates at their ends, against float64; lengths around a chunk.
    _sample("channel_strong", 1, 130, 2, 16, gate="channel", gates=_strong, initial=True, tags="nasty"),
    _sample("channel_nearly_none", 1, 65, 2, 40, 72, gate="channel", gates=_nearly_none, direction=REVERSE,
            initial=True, gate_layout=_in_gate_order, tags="nasty"),
    _sample("token_zero", 1, 64, 1, 100, gate="token", gates=_zero, direction=BOTH, tags="nasty"),
    _sample("one_token", 3, 1, 2, 32, gate="channel", initial=True, tags="nasty"),
    _sample("k1_v256", 1, 63, 1, 1, 256, gate="channel", gate_dtype=None, tags="nasty"),
    _sample("k256_v1", 1, 66, 1, 256, 1, gate="token", gate_dtype=torch.bfloat16, tags="nasty"),
    _sample("long_channel_segments", 1, 700, 1, 8, 4, gate="channel", gates=_mixed, lens=(260, 0, 440),
            direction=REVERSE, initial=True, tags="nasty", dtypes=BFLOAT16_FIRST),
    _sample("long_channel_both", 1, 600, 1, 24, 20, gate="channel", gate_dtype=None, direction=BOTH, tags="nasty",
            dtypes=BFLOAT16_FIRST),
    _sample("long_head_both", 1, 530, 1, 16, gate="head", gates=_retention, direction=BOTH, tags="nasty"),
    # Nothing to do, or nearly.
    _sample("empty_batch", 0, 8, 2, 8, gate="token", initial=True, tags="empty"),
    _sample("empty_heads", 2, 8, 0, 8, gate="head", tags="empty"),
    _sample("empty_tokens", 2, 0, 2, 8, gate="channel", initial=True, tags="empty"),
    _sample("empty_tokens_both", 2, 0, 2, 8, gate="token", direction=BOTH, tags="empty"),
    _sample("no_segments", 1, 0, 2, 8, lens=(), tags="empty"),
    # More sequences and heads than a CUDA grid's y dimension, and many tokens.
    _sample("huge_batch", 70001, 2, 1, 2, gate="token", tags="huge", dtypes=(torch.float32,)),
    _sample("huge_length", 1, 4133, 1, 4, 3, gate="channel", tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


def random_sample(name, choose):
    """Any options at once, at a small size; `choose` is a random.Random."""
    L = choose.choice((1, 2, 7, 16, 17, 31, 33, 63, 65, 70, 130))
    lens = None
    if choose.random() < 0.25:
        cuts = sorted(choose.randint(0, L) for _ in range(choose.randint(0, 3)))
        lens = tuple(b - a for a, b in zip([0, *cuts], [*cuts, L], strict=True))
    K, V = (choose.choice((1, 3, 8, 16, 17, 32, 40, 64)) for _ in range(2))
    gate = choose.choice(("", "head", "token", "token", "channel", "channel"))
    direction = choose.randint(0, 2)
    return _sample(
        name, 1 if lens else choose.randint(1, 2), L, choose.randint(1, 2), K, V, gate=gate, lens=lens,
        gates=choose.choice((_soft, _soft, _mixed, _strong)), initial=direction != BOTH and choose.random() < 0.4,
        direction=direction, layout=choose.choice((None, _head_major, _misaligned, _packed)),
        gate_layout=_in_gate_order if gate in ("token", "channel") and choose.random() < 0.3 else None,
        gate_dtype=choose.choice((torch.float32, None)),
    )  # fmt: skip


# ---- error magnitudes ------------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms behind every component of the outputs and gradients, in float64.

    Outputs and gradients are sums of products with decays, which are positive: the definition itself, applied to
    absolute values, adds up the absolute terms, and its derivative those of the gradients.
    """
    args = (*args, *(None,) * (len(TENSORS) - len(args)))
    given = dict(zip(TENSORS, args, strict=True))
    floats = {n: t for n, t in given.items() if t is not None and t.is_floating_point()}
    is_gate = lambda n: n.startswith("g_")
    with torch.enable_grad():
        leaves = {n: (t.detach() if is_gate(n) else t.detach().abs()).requires_grad_() for n, t in floats.items()}
        options = {**kwargs, "scale": abs(kwargs.get("scale", 1.0))}
        out, state = definition(*({**given, **leaves}[n] for n in TENSORS), **options)
    outputs = {"out": out.detach(), "state": state.detach()}
    if output_grads is None:
        return outputs, {}
    pairs = [(y, g.abs()) for y, g in zip((out, state), output_grads, strict=True) if g is not None]
    pairs = [(y, g) for y, g in pairs if y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return outputs, dict(zip(leaves, found, strict=True))


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call with more batches and tokens."""
    q, k, v, g_head, g_token, g_channel, offsets, state = (*args, *(None,) * (len(TENSORS) - len(args)))

    def grow(t, tokens):
        if t is None:
            return None
        t = torch.cat((t, t.flip(0)), 0)[: t.shape[0] + 1]
        return torch.cat((t, t, t.flip(1)), 1)[:, : 2 * t.shape[1] + 3].contiguous() if tokens else t.contiguous()

    tokens = (grow(t, True) for t in (q, k, v))
    return (*tokens, g_head, grow(g_token, True), grow(g_channel, True), offsets, grow(state, False)), kwargs


def memory_calls(dtype):
    generator = torch.Generator("cpu").manual_seed(0)

    def call(B, L, H, D, gate, direction=FORWARD):
        q, k, v = torch.randn(B, L, 3, H, D, generator=generator).to(dtype).unbind(2)
        g = -torch.rand((B, L, H, D) if gate == "channel" else (B, L, H), generator=generator)
        return (q, k, v, None, *((None, g) if gate == "channel" else (g, None))), {
            "scale": D**-0.5,
            "direction": direction,
        }

    return [
        ("4x3136_h6_d32_token", *call(4, 3136, 6, 32, "token")),
        ("4x3136_h4_d64_channel", *call(4, 3136, 4, 64, "channel")),
        ("4x3136_h6_d32_token_both", *call(4, 3136, 6, 32, "token", BOTH)),
        ("4x3136_h4_d32_channel_both", *call(4, 3136, 4, 32, "channel", BOTH)),
    ]


# ---- bad inputs ----------------------------------------------------------------------------------------------------


def good_call():
    """A call that works; every bad input is this one with something changed."""
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, d, generator=generator) for d in (8, 8, 5))
    return {
        "q": q, "k": k, "v": v, "g_head": None, "g_token": -torch.rand(1, 6, 2, generator=generator), "g_channel": None,
        "cu_seqlens": None, "initial_state": torch.randn(1, 2, 8, 5, generator=generator),
    }  # fmt: skip


def _offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def _bad(name, error, match, *, schema_match=None, torch_ops=True, **changes):
    """changes: argument -> new value, or a function of the old one. The public function has one g in place of three."""

    def make():
        return split_call(changed(good_call(), changes), TENSORS)

    return BadInput(name, make, error, match, schema_match, torch_ops, public=False)


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        call = good_call() | {"grad_out": torch.zeros(1, 6, 2, 5), "grad_state": torch.zeros(1, 2, 8, 5)}
        return split_call(changed(call, changes), BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op=f"{NAME}_backward")


def _declared():
    """What the declaration alone says, of every argument in a call that has it: there is one gate at a time."""
    others = {
        "g_head": {"g_token": None, "g_head": torch.zeros(2)},
        "g_channel": {"g_token": None, "g_channel": torch.zeros(1, 6, 2, 8)},
        "cu_seqlens": {"cu_seqlens": _offsets(0, 6), "initial_state": None},
    }
    arguments = (*TENSORS, "scale", "direction")
    for changes in ({}, *others.values()):
        for bad in declared_bad_inputs(NAME, lambda changes=changes: good_call() | changes):
            of = max((n for n in arguments if bad.name.removeprefix("declared_").startswith(n)), key=len)
            if others.get(of, {}) is changes or (of not in others and not changes):
                yield dataclasses.replace(bad, public=False)


# fmt: off
BAD_INPUTS = [
    *_declared(),
    _bad("two_gates", ValueError, r"g_token must be None when g_head is given, got \[1, 6, 2\]",
         g_head=torch.zeros(2)),
    _bad("channel_and_token", ValueError, r"g_channel must be None when g_token is given, got \[1, 6, 2, 8\]",
         g_channel=torch.zeros(1, 6, 2, 8)),
    _bad("initial_state_both", ValueError, r"initial_state must be None when both directions are summed, got \[1, 2",
         direction=BOTH),
    _bad("q_head_dim_257", ValueError, r"q must .*head dim between 1 and 256, got \[1, 6, 2, 257\]",
         q=torch.zeros(1, 6, 2, 257), k=torch.zeros(1, 6, 2, 257)),
    _bad("v_head_dim_0", ValueError, r"v must .*head dim between 1 and 256, got \[1, 6, 2, 0\]",
         v=torch.zeros(1, 6, 2, 0)),
    _bad("cu_seqlens_batch", ValueError, r"q must have a batch size of 1 when cu_seqlens is given, got \[2, 6, 2, 8\]",
         **{n: (lambda t: torch.cat((t, t))) for n in ("q", "k", "v", "g_token", "initial_state")},
         cu_seqlens=_offsets(0, 3, 6)),
    _bad("cu_seqlens_short", ValueError, r"cu_seqlens must rise from 0 to the length of q, 6, got \[0, 5\]",
         cu_seqlens=_offsets(0, 5)),
    _bad("cu_seqlens_falls", ValueError, r"cu_seqlens must rise from 0 to the length of q, 6, got \[0, 4, 3, 6\]",
         cu_seqlens=_offsets(0, 4, 3, 6), initial_state=torch.zeros(3, 2, 8, 5)),
    _bad("cu_seqlens_starts_late", ValueError, r"cu_seqlens must rise from 0 to the length of q, 6, got \[1, 6\]",
         cu_seqlens=_offsets(1, 6)),
    _bad("initial_state_sequences", ValueError, r"initial_state must be \[N, H, K, V\] = \[2, 2, 8, 5\], got \[1, 2",
         cu_seqlens=_offsets(0, 3, 6)),
    _bad_backward("grad_out_shape", ValueError, r"grad_out must be \[B, L, H, V\] = \[1, 6, 2, 5\], got \[1, 6, 2, 4\]",
                  grad_out=lambda t: t[..., :4]),
    _bad_backward("grad_out_dtype", TypeError, r"grad_out must be .*[fF]loat.*got .*(float16|Half)",
                  grad_out=lambda t: t.half()),
    _bad_backward("grad_state_shape", ValueError, r"grad_state must be \[N, H, K, V\] = \[1, 2, 8, 5\], got "
                  r"\[1, 2, 5, 8\]", grad_state=lambda t: t.mT),
    _bad_backward("grad_state_both", ValueError, r"grad_state must be \[N, H, K, V\] = \[1, 2, 0, 0\], got "
                  r"\[1, 2, 8, 5\]", direction=BOTH, initial_state=None),
    _bad_backward("backward_two_gates", ValueError, "g_token must be None when g_head is given", g_head=torch.zeros(2)),
    _bad_backward("backward_k", ValueError, r"k must be \[B, L, H, K\] like q", k=lambda t: t[:, :5]),
]
# fmt: on


SPEC = OpSpec(
    name=NAME,
    public_kwargs=lambda kwargs: None,  # one gate in place of three: tests/ops/test_gated_linear_attention.py
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=160,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B L N",
    resize=resize,
    memory_calls=memory_calls,
)
