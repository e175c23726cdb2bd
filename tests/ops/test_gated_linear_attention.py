"""gated_linear_attention: the shared suite, and proof of its definition against other forms of the formula."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import effvit
from effvit.ops import gated_linear_attention, gated_linear_attention_step
from effvit.reference import gated_linear_attention as definition
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, backends, oracle_of
from effvit.testing._oracle import random_output_grads
from effvit.testing._spec import as_tuple, named_tensors, with_grad
from effvit.testing.gated_linear_attention import BOTH, FORWARD, REVERSE, SPEC, TENSORS, _mixed, _sample
from op_suite import OpSuite, threads

GATES = ("head", "token", "channel")


class TestGatedLinearAttention(OpSuite):
    spec = SPEC


def _randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _tokens(B, L, H, K, V, dtype=torch.float64):
    return tuple(_randn(B, L, H, d, seed=i, dtype=dtype) for i, d in enumerate((K, K, V), 1))


def _gate(kind, B, L, H, K, dtype=torch.float64):
    """{g_<kind>: random gates}, and the same of every channel, [B, L, H, K]."""
    shape = {"head": (H,), "token": (B, L, H), "channel": (B, L, H, K)}[kind]
    g = (-_randn(*shape, seed=7).abs().to(dtype)).requires_grad_()
    whole = {"head": lambda: g[:, None], "token": lambda: g[..., None], "channel": lambda: g}[kind]()
    return {f"g_{kind}": g}, whole


def check(results, expected):
    for result, e in zip(results, expected, strict=True):
        assert result.shape == e.shape
        assert (result - e).abs().max() <= 64 * torch.finfo(torch.float64).eps * e.abs().max()


# Independent forms in float64.


def by_pairs(q, k, v, g, state, scale):
    """Every pair of tokens with the product of the decays between them: [B, L, H, K] gates, no recurrence."""
    B, L, H, K = q.shape
    b = g.expand(B, L, H, K).cumsum(1)
    decay = (b[:, :, None] - b[:, None]).masked_fill(~torch.ones(L, L).tril().bool()[..., None, None], -torch.inf)
    scores = torch.einsum("bihk,bjhk,bijhk->bhij", q, k, decay.exp())
    out = torch.einsum("bhij,bjhv->bihv", scores, v) + torch.einsum("bihk,bhkv->bihv", q * b.exp(), state)
    last = b[:, -1]
    return scale * out, last.exp()[..., None] * state + torch.einsum(
        "bjhk,bjhv->bhkv", k * (last[:, None] - b).exp(), v
    )


def by_chunks(q, k, v, g, scale, chunk=64):
    """The specification's chunkwise formula; g [B, L, H] or [B, L, H, K]."""
    g = g if g.dim() == 4 else g[..., None].expand_as(k)
    state, outs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for cq, ck, cv, cg in zip(*(x.split(chunk, 1) for x in (q, k, v, g)), strict=True):
        out, state = by_pairs(cq, ck, cv, cg, state, scale)
        outs.append(out)
    return torch.cat(outs, 1), state


@pytest.mark.parametrize("kind", GATES)
def test_definition_is_the_sum_over_pairs(kind):
    """Values and every gradient; in both directions."""
    B, L, H, K, V = 2, 11, 2, 3, 4
    q, k, v = (t.requires_grad_() for t in _tokens(B, L, H, K, V))
    gates, whole = _gate(kind, B, L, H, K)
    state = _randn(B, H, K, V, seed=8).requires_grad_()
    leaves = [q, k, v, *gates.values(), state]
    for direction in (FORWARD, REVERSE):
        flip = (lambda t: t.flip(1)) if direction == REVERSE else (lambda t: t)
        order = whole if kind == "head" else flip(whole)
        out, last = by_pairs(flip(q), flip(k), flip(v), order, state, 0.7)
        expected = (flip(out), last)
        results = definition(q, k, v, **gates, initial_state=state, scale=0.7, direction=direction)
        check(results, expected)
        cotangents = [_randn(*o.shape, seed=9 + i) for i, o in enumerate(expected)]
        check(*(torch.autograd.grad(o, leaves, cotangents) for o in (results, expected)))


@pytest.mark.parametrize("kind", [None, *GATES])
def test_bidirectional_counts_the_own_token_once(kind):
    B, L, H, K, V = 2, 13, 2, 4, 5
    q, k, v = _tokens(B, L, H, K, V)
    g = None if kind is None else next(iter(_gate(kind, B, L, H, K)[0].values())).detach().float()
    q, k, v = (t.float() for t in (q, k, v))
    both, ahead, back = (
        gated_linear_attention(q, k, v, g, **option) for option in ({"bidirectional": True}, {}, {"reverse": True})
    )
    own = K**-0.5 * (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(both, ahead + back - own)
    one = gated_linear_attention(*(t[:, :1] for t in (q, k, v)), bidirectional=True)
    torch.testing.assert_close(one, own[:, :1])
    assert (both - (ahead + back)).abs().max() > 0.1


def test_definition_is_linear_attention_without_gates():
    q, k, v = _tokens(2, 150, 3, 8, 5)
    state = _randn(2, 3, 8, 5, seed=4)
    expected = effvit.reference.linear_attention(
        q, k, v, initial_state=state, initial_z=state[..., 0], feature_map="none", normalize="none", causal=True
    )[:2]
    check(definition(q, k, v, initial_state=state), expected)
    zeros = torch.zeros(2, 150, 3, 8, dtype=torch.float64)
    for g in ({"g_channel": zeros}, {"g_token": zeros[..., 0]}, {"g_head": zeros[0, 0, :, 0]}):
        check(definition(q, k, v, initial_state=state, **g), expected)


@functools.cache
def _fla(name):
    """A module of naive functions, loaded from its file: the package itself wants a GPU's Triton."""
    found = importlib.util.find_spec("fla")
    if found is None or importlib.util.find_spec("einops") is None:
        pytest.skip("fla-core or einops is not installed")
    path = Path(found.submodule_search_locations[0]) / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gla", "simple_gla", "retention"])
def test_op_is_flas(name):
    """Its naive functions compute in float32: two implementations, one truth; each within the rule."""
    q, k, v = _tokens(2, 130, 3, 16, 12, dtype=torch.float32)
    state = _randn(2, 3, 16, 12, seed=4, dtype=torch.float32)
    token, channel = (-_randn(*shape, seed=5, dtype=torch.float32).abs() for shape in ((2, 130, 3), (2, 130, 3, 16)))
    if name == "gla":
        g, found = channel, _fla("gla").naive_recurrent_gla(q, k, v, channel, state, True)
    elif name == "simple_gla":
        g, found = token, _fla("simple_gla").naive_recurrent_simple_gla(q, k, v, token, None, state, True)
    else:
        g, state = torch.log1p(-(2.0 ** (-5 - torch.arange(3.0)))), None
        out = _fla("retention").naive_retention(*(t.transpose(1, 2) for t in (q, k, v)))
        found = (out.transpose(1, 2),)
    args = dict.fromkeys(TENSORS) | {"q": q, "k": k, "v": v, "initial_state": state}
    args[{1: "g_head", 3: "g_token", 4: "g_channel"}[g.dim()]] = g
    oracle = oracle_of(SPEC, tuple(args.values()), {"scale": 0.25}, None)
    with torch.no_grad():
        results = gated_linear_attention(q, k, v, g, state, return_state=True)
    for result, theirs, n in zip(results, found, oracle.outputs, strict=False):
        for x in (result, theirs):
            assert_close_to_truth(
                x, oracle.outputs[n], oracle.output_yardsticks[n], magnitude=oracle.output_magnitudes[n]
            )


# Kernels at the ends: gates, lengths.


def _fast():
    return [b for b in backends("gated_linear_attention") if not b.slow]


def _check(sample, dtype):
    """Outputs and gradients of every compiled backend."""
    args, kwargs = sample.build(dtype)
    oracle = oracle_of(SPEC, args, kwargs, functools.partial(random_output_grads, SPEC, sample, dtype))
    for backend in _fast():
        results = as_tuple(backend.forward(*args, **kwargs))
        oracle.check_outputs(results)
        bargs, bkwargs = SPEC.backward_call(args, kwargs, results, oracle.output_grads)
        oracle.check_gradients(SPEC.split_gradients(backend.backward(*bargs, **bkwargs), args, kwargs))


def _constant(x):
    return lambda randn, shape: torch.full(shape, x)


EXTREMES = {
    "0": _constant(0.0),
    "-1e-6": _constant(-1e-6),
    "-20": _constant(-20.0),
    "-1000": _constant(-1000.0),
    "-inf": _constant(float("-inf")),
    "mixed": _mixed,
    "0 or -20": lambda randn, shape: torch.where(randn(*shape) > 0, 0.0, -20.0),
    "0, rarely -12": lambda randn, shape: torch.where(randn(*shape) > 1.5, -12.0, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gates", EXTREMES)
@pytest.mark.parametrize("kind", GATES)
def test_gates_at_their_ends(kind, gates, dtype):
    """Against the recurrence in float64: outputs and gradients, no NaN among them (the rule refuses it)."""
    direction = BOTH if gates in ("-1e-6", "mixed") else FORWARD
    sample = _sample(
        f"{kind} {gates}", 1, 83, 2, 24, 20, gate=kind, gates=EXTREMES[gates], initial=direction == FORWARD,
        direction=direction,
    )  # fmt: skip
    _check(sample, dtype)


@pytest.mark.parametrize("L, direction", [(1, FORWARD), (2, BOTH), (17, REVERSE), (63, BOTH), (64, FORWARD),
                                          (65, REVERSE), (128, BOTH), (130, FORWARD)])  # fmt: skip
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_lengths(kind, L, direction):
    sample = _sample(f"L{L}", 1, L, 1, 8, 4, gate=kind, initial=direction != BOTH, direction=direction)
    _check(sample, torch.float32)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_very_long_sequence(kind):
    """65,536 tokens with gates near 0, so that all of them count. The truth is the chunkwise formula in float64, the
    yardstick the same in float32, and the magnitude the same of absolute values, as in `magnitudes`."""
    L = 65536
    q, k, v = _tokens(1, L, 1, 2, 3, dtype=torch.float32)
    g = -1e-3 * _randn(*((1, L, 1, 2) if kind == "channel" else (1, L, 1)), seed=5).abs().float()

    def run(function, *tensors):
        leaves = [t.requires_grad_() for t in tensors]
        results = function(*leaves)
        return *(t.detach() for t in results), *torch.autograd.grad([t.sum() for t in results], leaves)

    given = [t.clone() for t in (q, k, v, g)]
    found = run(functools.partial(gated_linear_attention, return_state=True), *given)
    plain = functools.partial(by_chunks, scale=2**-0.5)
    yardsticks = run(plain, *(t.clone() for t in (q, k, v, g)))
    truths = run(plain, *(t.double() for t in (q, k, v, g)))
    sizes = run(plain, *(t.double().abs() for t in (q, k, v)), g.double())
    for name, *rest in zip(("out", "state", *"qkvg"), found, truths, yardsticks, sizes, strict=True):
        x, truth, yardstick, size = rest
        assert_close_to_truth(x, truth, yardstick, magnitude=size, name=name)


@pytest.mark.parametrize("name", ["long_channel_both", "long_head_both", "long_channel_segments"])
def test_parts_of_a_walk_in_any_number_of_threads(name):
    """Few heads have their tokens split over units, which meet at the states."""
    sample = SPEC.sample(name)
    for backend in _fast():
        for dtype in sample.dtypes[:2]:
            args, kwargs = sample.build(dtype)
            results = as_tuple(backend.forward(*args, **kwargs))
            grads = random_output_grads(SPEC, sample, dtype, results)
            bargs, bkwargs = SPEC.backward_call(args, kwargs, results, grads)
            with threads(1):
                one = backend.backward(*bargs, **bkwargs)
            for n in (2, 3):
                with threads(n):
                    many = backend.backward(*bargs, **bkwargs)
                for a, b in zip(many, one, strict=True):
                    assert_bitwise_equal(a, b, name=f"{backend.name} with {n} threads")


def test_sequence_in_pieces_equals_one_call():
    q, k, v = _tokens(2, 200, 2, 16, 8, dtype=torch.float32)
    for kind in GATES:
        g = next(iter(_gate(kind, 2, 200, 2, 16, torch.float32)[0].values())).detach()
        args = dict.fromkeys(TENSORS) | {"q": q, "k": k, "v": v, f"g_{kind}": g}
        for reverse in (False, True):
            oracle = oracle_of(SPEC, tuple(args.values()), {"scale": 0.25, "direction": int(reverse)}, None)
            lens, outs, state = (77, 1, 122), [], None
            pieces = list(zip(*(t.split(lens, 1) for t in (q, k, v)), strict=True))
            gates = [g] * 3 if kind == "head" else g.split(lens, 1)
            order = reversed(range(3)) if reverse else range(3)
            for i in order:
                out, state = gated_linear_attention(*pieces[i], gates[i], state, reverse=reverse, return_state=True)
                outs.insert(0 if reverse else len(outs), out)
            oracle.check_outputs((torch.cat(outs, 1), state))


@pytest.mark.parametrize("kind", [None, *GATES])
def test_step_is_the_op(kind):
    """Token by token."""
    q, k, v = _tokens(2, 9, 2, 16, 8, dtype=torch.float32)
    g = None if kind is None else next(iter(_gate(kind, 2, 9, 2, 16, torch.float32)[0].values())).detach()
    state = _randn(2, 2, 16, 8, seed=8, dtype=torch.float32)
    args = dict.fromkeys(TENSORS) | {"q": q, "k": k, "v": v, "initial_state": state}
    if kind:
        args[f"g_{kind}"] = g
    oracle, outs = oracle_of(SPEC, tuple(args.values()), {"scale": 0.25}, None), []
    for t in range(9):
        gate = g if kind in (None, "head") else g[:, t]
        out, state = gated_linear_attention_step(q[:, t], k[:, t], v[:, t], gate, state)
        outs.append(out)
    oracle.check_outputs((torch.stack(outs, 1), state))


@pytest.mark.parametrize("kind", [None, *GATES])
@pytest.mark.parametrize("direction", [FORWARD, REVERSE, BOTH])
def test_segments_equal_separate_calls(kind, direction):
    lens = (0, 70, 0, 1, 64, 9, 0)
    L, N = sum(lens), len(lens)
    q, k, v = _tokens(1, L, 2, 16, 8, dtype=torch.float32)
    g = None if kind is None else next(iter(_gate(kind, 1, L, 2, 16, torch.float32)[0].values())).detach()
    options = {"bidirectional": True} if direction == BOTH else {"reverse": direction == REVERSE, "return_state": True}
    state = None if direction == BOTH else _randn(N, 2, 16, 8, seed=8, dtype=torch.float32)
    results = as_tuple(
        gated_linear_attention(q, k, v, g, state, torch.tensor([0, *lens]).cumsum(0), **options)  # int64
    )
    gates = [g] * N if kind in (None, "head") else g.split(lens, 1)
    states = [None] * N if state is None else state.split(1)
    tokens = zip(*(t.split(lens, 1) for t in (q, k, v)), strict=True)
    parts = [
        as_tuple(gated_linear_attention(*t, x, s, **options)) for t, x, s in zip(tokens, gates, states, strict=True)
    ]
    for result, columns, dim in zip(results, zip(*parts, strict=True), (1, 0), strict=False):
        assert_bitwise_equal(result, torch.cat(columns, dim))


# The public function.


def test_public_function():
    q, k, v = _tokens(2, 9, 2, 16, 8, dtype=torch.float32)
    gates = {kind: next(iter(_gate(kind, 2, 9, 2, 16, torch.float32)[0].values())).detach() for kind in GATES}
    op = torch.ops.effvit.gated_linear_attention
    for kind, g in gates.items():
        expected = op(q, k, v, **{f"g_{kind}": g}, scale=0.25)
        assert_bitwise_equal(gated_linear_attention(q, k, v, g), expected[0])
        for x, e in zip(gated_linear_attention(q, k, v, g, return_state=True), expected, strict=True):
            assert_bitwise_equal(x, e)
        for direction, option in ((REVERSE, "reverse"), (BOTH, "bidirectional")):
            expected = op(q, k, v, **{f"g_{kind}": g}, scale=2.0, direction=direction)[0]
            assert_bitwise_equal(gated_linear_attention(q, k, v, g, scale=2.0, **{option: True}), expected)
    assert_bitwise_equal(gated_linear_attention(q, k, v), op(q, k, v, scale=0.25)[0])


@pytest.mark.parametrize(
    "error, match, change",
    [
        (ValueError, r"g must be \[H\], \[B, L, H\] or \[B, L, H, K\], got \[9, 2\]", {"g": torch.zeros(9, 2)}),
        (ValueError, r"g_token must be \[B, L, H\] = \[2, 9, 2\], got \[2, 9, 3\]", {"g": torch.zeros(2, 9, 3)}),
        (TypeError, "must be a torch.Tensor, got list", {"g": [0.0, 0.0]}),
        (TypeError, "g_head must be float32, bfloat16 or float16, got torch.float64", {"g": torch.zeros(2).double()}),
        (TypeError, "reverse must be a bool, got int", {"reverse": 1}),
        (TypeError, "bidirectional must be a bool, got str", {"bidirectional": "yes"}),
        (TypeError, "return_state must be a bool, got int", {"return_state": 1}),
        (ValueError, "reverse must be False when bidirectional is True", {"reverse": True, "bidirectional": True}),
        (ValueError, "return_state must be False when bidirectional", {"return_state": True, "bidirectional": True}),
        (ValueError, "initial_state must be None when both directions are summed, got",
         {"initial_state": torch.zeros(2, 2, 16, 8), "bidirectional": True}),
        (TypeError, "scale must be a real number, got str", {"scale": "1"}),
        (ValueError, "scale must be finite, got nan", {"scale": float("nan")}),
        (ValueError, "cu_seqlens must rise from 0 to the length of q, 9",
         {"cu_seqlens": torch.tensor([0, 2**32 + 9])}),
        (TypeError, "q must be a torch.Tensor, got NoneType", {"q": None}),
    ],
)  # fmt: skip
def test_public_function_refuses(error, match, change):
    call = dict(zip("qkv", _tokens(2, 9, 2, 16, 8, dtype=torch.float32), strict=True)) | {"g": torch.zeros(2)} | change
    with pytest.raises(error, match=f"effvit::gated_linear_attention: .*{match}"):
        gated_linear_attention(**call)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "state", "initial_state"])
def test_public_functions_refuse_nested_tensors(name):
    q, k, v = _tokens(2, 9, 2, 16, 8, dtype=torch.float32)
    states = torch.zeros(2, 2, 16, 8)
    call = {"q": q, "k": k, "v": v, "g": -torch.rand(2, 9, 2), "initial_state": states}
    step = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "g": -torch.rand(2, 2), "state": states}
    for function, args in ((gated_linear_attention, call), (gated_linear_attention_step, step)):
        if name in args:
            args[name] = torch.nested.nested_tensor([*args[name]], layout=torch.jagged)
            of = {"g": "g_token"}.get(name, name)
            with pytest.raises(TypeError, match=f"effvit::{function.__name__}: {of} must be a dense .*, got nested"):
                function(**args)


def test_compiled_whole_with_dynamic_length():
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for L in (8, 50):
        q, k, v = _tokens(2, L, 2, 16, 8, dtype=torch.float32)
        g = -torch.rand(2, L, 2, 16)
        assert_bitwise_equal(compiled(q, k, v, g), gated_linear_attention(q, k, v, g))


# cu_seqlens, an integer tensor: what the shared suite does with the other arguments.


def test_segments_in_frameworks():
    args, kwargs = SPEC.sample("small_segments").build()
    op = torch.ops.effvit.gated_linear_attention
    torch.library.opcheck(op.default, with_grad(args), kwargs)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return op(*(tensors.get(n) for n in TENSORS), **kwargs)

    program = torch.export.export(Module(), (named_tensors(SPEC, args),), strict=False)
    for result, expected in zip(program.module()(named_tensors(SPEC, args)), op(*args, **kwargs), strict=True):
        assert_bitwise_equal(result, expected)
    with torch.autocast("cpu", torch.bfloat16):
        results = op(*args, **kwargs)
    cast = [a.bfloat16() if n in "qkv" else a for n, a in zip(TENSORS, args, strict=True)]
    for result, expected in zip(results, op(*cast, **kwargs), strict=True):
        assert_bitwise_equal(result, expected)
    q, *rest = args
    many = torch.stack((q, 2 * q))
    for i, result in enumerate(torch.vmap(lambda x: op(x, *rest, **kwargs))(many)):
        assert_bitwise_equal(result, torch.stack([op(x, *rest, **kwargs)[i] for x in many]))


# Values that are not finite.


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_nan_stays_in_its_head_and_behind_its_chunk(kind):
    """A NaN in a value or a key reaches the tokens of its chunk and later ones, of its own head alone."""
    q, k, v = _tokens(1, 150, 2, 16, 8, dtype=torch.float32)
    g = -0.01 * torch.ones(1, 150, 2, 16) if kind == "channel" else -0.01 * torch.ones(1, 150, 2)
    v[0, 97, 0, 1], k[0, 101, 1, 3] = torch.nan, torch.nan
    for backend in _fast():
        args = (q, k, v, None, *((None, g) if kind == "channel" else (g, None)))
        out, state = backend.forward(*(None if t is None else t.to(backend.device) for t in args))
        expected, last = definition(*args)
        for t in (slice(0, 64), slice(101, None)):
            assert torch.equal(out[:, t].isnan(), expected[:, t].isnan())
        assert torch.equal(state.isnan(), last.isnan())
