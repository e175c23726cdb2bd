"""linear_attention: the shared suite, and proof of its reference against the papers' formulas, plainly written."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit.ops.linear_attention import FEATURE_MAPS, NORMALIZERS, prefers_quadratic
from effvit.reference import linear_attention as definition
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, backends, oracle_of
from effvit.testing._spec import as_tuple, named_tensors, with_grad
from effvit.testing.linear_attention import SPEC, public_call, reference_call
from op_suite import OpSuite


class TestLinearAttention(OpSuite):
    spec = SPEC


def _randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _tokens(B, L, M, H, K, V):
    return _randn(B, L, H, K, seed=1), _randn(B, M, H, K, seed=2), _randn(B, M, H, V, seed=3)


def check(results, expected):
    for result, e in zip(results, expected, strict=True):
        assert result.shape == e.shape
        assert (result - e).abs().max() <= 64 * torch.finfo(torch.float64).eps * e.abs().max()


# Independent formulas in float64.


def loops(q, k, v, q_den, k_den, weight, state, z, feature_map, normalize, eps, clamp_min, scale, causal):
    """One query, one key at a time."""
    phi = {
        "none": lambda x: x, "relu": F.relu, "elu1": lambda x: F.elu(x) + 1, "exp": torch.exp,
    }[feature_map]  # fmt: skip
    (B, L, H, _), M = q.shape, k.shape[1]
    outs = [[[None] * H for _ in range(L)] for _ in range(B)]
    for b, i, h in itertools.product(range(B), range(L), range(H)):
        numerator = phi(q[b, i, h]) @ state[b, h]
        denominator = phi(q_den[b, i, h]) @ z[b, h]
        n = 0
        for j in range(i + 1 if causal else M):
            numerator = numerator + weight[b, j, h] * (phi(q[b, i, h]) @ phi(k[b, j, h])) * v[b, j, h]
            denominator = denominator + weight[b, j, h] * (phi(q_den[b, i, h]) @ phi(k_den[b, j, h]))
            n += 1
        if normalize == "none":
            out = numerator
        elif normalize == "sum":
            out = numerator / (denominator + eps)
        elif normalize == "mean":  # both are means over the keys
            out = (numerator / n) / (denominator / n + eps)
        else:
            out = numerator / torch.clamp(denominator, min=clamp_min)
        outs[b][i][h] = scale * out
    out = torch.stack([torch.stack([torch.stack(row) for row in batch]) for batch in outs])
    state, z = [list(s) for s in state], [list(s) for s in z]
    for b, j, h in itertools.product(range(B), range(M), range(H)):
        state[b][h] = state[b][h] + weight[b, j, h] * torch.outer(phi(k[b, j, h]), v[b, j, h])
        z[b][h] = z[b][h] + weight[b, j, h] * phi(k_den[b, j, h])
    return out, torch.stack([torch.stack(s) for s in state]), torch.stack([torch.stack(s) for s in z])


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_reference_is_the_sum_over_pairs(feature_map, normalize, causal):
    """Values and every gradient."""
    B, L, H, K, V = 2, 5, 2, 3, 4
    M = L if causal else 7
    q, k, v = _tokens(B, L, M, H, K, V)
    q_den, k_den = _randn(B, L, H, K, seed=4).abs(), _randn(B, M, H, K, seed=5).abs()
    weight, state, z = _randn(B, M, H, seed=6).abs(), _randn(B, H, K, V, seed=7), _randn(B, H, K, seed=8).abs()
    options = {"feature_map": feature_map, "normalize": normalize, "eps": 0.1, "clamp_min": 12.0, "scale": 0.7}
    if normalize == "none":
        q_den, k_den = q, k
    leaves = [t.requires_grad_() for t in (q, k, v, q_den, k_den, weight, state, z)]
    expected = loops(*leaves, causal=causal, **options)
    dens = (None, None) if normalize == "none" else (q_den, k_den)
    results = definition(q, k, v, *dens, weight, None, state, z, causal=causal, **options)
    check(results, expected)
    cotangents = [_randn(*o.shape, seed=9 + i) for i, o in enumerate(expected)]
    inputs = [q, k, v, weight, state, z] + [t for t in dens if t is not None]
    grads = [torch.autograd.grad(o, inputs, cotangents) for o in (results, expected)]
    check(*grads)


@pytest.mark.parametrize("eps", [1e-15, 1e-6])
def test_reference_is_efficientvit_and_sana(eps):
    """LiteMLA: a channel of ones after v carries the denominator through the same product."""
    q, k, v = _tokens(2, 30, 30, 3, 8, 8)
    kernel_q, kernel_k, trans_v = (t.permute(0, 2, 3, 1) for t in (q.relu(), k.relu(), v))  # [B, H, D, L]
    padded = F.pad(trans_v, (0, 0, 0, 1), value=1.0)
    out = padded @ kernel_k.transpose(-1, -2) @ kernel_q
    out = (out[:, :, :-1] / (out[:, :, -1:] + eps)).permute(0, 3, 1, 2)
    check(definition(q, k, v, eps=eps)[:1], [out])


@pytest.mark.parametrize("L, M, K, V", [(6, 5, 16, 12), (40, 30, 8, 4)])
def test_reference_is_slab(L, M, K, V):
    """Simplified linear attention with its rule for the order of the two products."""
    q, k, v = _tokens(2, L, M, 2, K, V)
    hq, hk, hv = (t.transpose(1, 2) for t in (q.relu(), k.relu(), v))
    inverse = 1 / (hq @ hk.sum(-2, keepdim=True).transpose(-2, -1) + 1e-6)
    linear_first = L * M * (K + V) > K * V * (L + M)
    assert linear_first == (not prefers_quadratic(L, M, K, V))
    product = hq @ (hk.transpose(-2, -1) @ hv) if linear_first else (hq @ hk.transpose(-2, -1)) @ hv
    check(definition(q, k, v, quadratic=not linear_first)[:1], [(product * inverse).transpose(1, 2)])


def test_reference_is_mlla():
    """Rotated features in the numerator, the mean of the plain ones in the denominator."""
    q, k, v = _tokens(2, 36, 36, 2, 8, 8)
    angles = torch.outer(torch.arange(36.0, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.1, 0.01]).double())
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [L, 1, D/2]

    def rope(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    hq, hk, hv, rq, rk = (t.transpose(1, 2) for t in (fq, fk, v, rope(fq), rope(fk)))
    n = 36
    inverse = 1 / (hq @ hk.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    kv = (rk.transpose(-2, -1) * n**-0.5) @ (hv * n**-0.5)
    expected = (rq @ kv * inverse).transpose(1, 2)
    results = definition(rope(fq), rope(fk), v, fq, fk, feature_map="none", normalize="mean", eps=1e-6)
    check(results[:1], [expected])


def test_reference_is_l2vit_and_vssd():
    q, k, v = _tokens(2, 20, 20, 2, 8, 4)
    hq, hk, hv = (t.transpose(1, 2) for t in (q.relu(), k.relu(), v))
    scores = hq @ hk.transpose(-2, -1)
    sums = scores.sum(-1, keepdim=True)
    assert (sums < 40).any() and (sums > 40).any()
    out = 1.7 * scores @ hv / sums.clamp(min=40)
    check(definition(q, k, v, normalize="clamp", clamp_min=40, scale=1.7)[:1], [out.transpose(1, 2)])
    # VSSD: one state for all tokens, every token weighted by dt * A.
    dt_a = F.softplus(_randn(2, 20, 2, seed=4)) * -torch.rand(2, dtype=torch.float64)
    hidden = torch.einsum("blh,blhn,blhp->bhnp", dt_a, k, v)
    out = torch.einsum("blhn,bhnp->blhp", q, hidden)
    check(definition(q, k, v, weight=dt_a, feature_map="none", normalize="none")[:2], [out, hidden])


# fla's naive functions.


def _fla():
    """The module of the naive functions, loaded from its file: the package itself wants a GPU's Triton."""
    found = importlib.util.find_spec("fla")
    if found is None or importlib.util.find_spec("einops") is None:
        pytest.skip("fla-core or einops is not installed")
    path = Path(found.submodule_search_locations[0]) / "ops" / "linear_attn" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_linear_attn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("normalize", [False, True], ids=["none", "sum"])
def test_reference_is_fla_chunk(normalize):
    q, k, v = _tokens(2, 192, 192, 2, 8, 8)
    if normalize:
        q, k = q.abs(), k.abs()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = _fla().naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=normalize)
    options = {"feature_map": "none", "normalize": "sum" if normalize else "none", "eps": 1e-10, "causal": True}
    result = definition(q, k, v, **options)[0]
    check([result], [out])
    cotangent = _randn(*out.shape, seed=4)
    check(*(torch.autograd.grad(o, leaves, cotangent) for o in (result, out)))


@pytest.mark.parametrize("normalize", [False, True], ids=["none", "sum"])
def test_reference_is_fla_recurrent(normalize):
    """fla computes in float32: its error, and not ours, is what the rule bounds here."""
    q, k, v = _tokens(2, 150, 150, 2, 8, 5)
    if normalize:
        q, k = q.abs(), k.abs()
    q, k, v = (t.float() for t in (q, k, v))
    state, z = _randn(2, 2, 8, 5, seed=4, dtype=torch.float32), _randn(2, 2, 8, seed=5, dtype=torch.float32).abs()
    out, final = _fla().naive_recurrent_linear_attn(
        q, k, v, scale=1.0, initial_state=(state, z[:, None]) if normalize else state, output_final_state=True,
        normalize=normalize,
    )  # fmt: skip
    final = final if normalize else (final,)
    options = {"feature_map": "none", "normalize": "sum" if normalize else "none", "eps": 1e-10, "causal": True}
    calls = (definition(*(t.to(d) for t in (q, k, v)), None, None, None, None, state.to(d), z.to(d), **options)
             for d in (torch.float64, torch.float32))  # fmt: skip
    for found, truth, yardstick in zip((out, *final), *calls, strict=False):
        assert_close_to_truth(found.reshape(truth.shape), truth, yardstick)


# What the definition promises about itself.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_quadratic_form_equals_linear_form(normalize, causal):
    q, k, v = _tokens(2, 33, 33, 2, 6, 4)
    weight = _randn(2, 33, 2, seed=4).abs()
    k_den = None if normalize == "none" else _randn(2, 33, 2, 6, seed=5)
    leaves = [t.requires_grad_() for t in (q, k, v, weight) + (() if k_den is None else (k_den,))]
    options = {"feature_map": "elu1", "normalize": normalize, "eps": 0.1, "clamp_min": 30.0, "causal": causal}
    results = [definition(q, k, v, None, k_den, weight, quadratic=form, **options) for form in (True, False)]
    assert results[0][1].shape == (2, 2, 0, 0) and results[0][2].shape == (2, 2, 0)
    check([results[0][0]], [results[1][0]])
    cotangent = _randn(*v.shape, seed=6)
    check(*(torch.autograd.grad(r[0], leaves, cotangent) for r in results))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_segments_equal_separate_calls(normalize, causal):
    lens = (40, 0, 1, 150, 9)
    q, k, v = _tokens(1, 200, 200, 2, 6, 4)
    weight, state, z = _randn(1, 200, 2, seed=4).abs(), _randn(5, 2, 6, 4, seed=5), _randn(5, 2, 6, seed=6).abs()
    options = {"feature_map": "elu1", "normalize": normalize, "clamp_min": 100.0, "eps": 0.01, "causal": causal}
    offsets = torch.tensor([0, *lens]).cumsum(0).int()
    results = definition(q, k, v, None, None, weight, offsets, state, z, **options)
    parts = zip(*(t.split(lens, dim=1) for t in (q, k, v, weight)), state.split(1), z.split(1), strict=True)
    separate = [definition(a, b, c, None, None, w, None, s, y, **options) for a, b, c, w, s, y in parts]
    outs, states, zs = zip(*separate, strict=True)
    check(results, [torch.cat(outs, 1), torch.cat(states), torch.cat(zs)])


@pytest.mark.parametrize("normalize", ["none", "sum", "clamp"])
def test_sequence_in_pieces_equals_one_call(normalize):
    """Causal: each piece starts from the state of the last. Not causal: a call without queries, one without keys."""
    q, k, v = _tokens(2, 300, 300, 2, 6, 4)
    options = {"normalize": normalize, "clamp_min": 100.0}
    whole = definition(q, k, v, causal=True, **options)
    state = z = None
    outs = []
    for a, b, c in zip(*(t.split((77, 1, 222), dim=1) for t in (q, k, v)), strict=True):
        out, state, z = definition(a, b, c, None, None, None, None, state, z, causal=True, **options)
        outs.append(out)
    check([torch.cat(outs, 1), state, z], whole)

    whole = definition(q, k, v, **options)
    check(whole[1:], (state, z))
    _, state, z = definition(q[:, :0], k, v, **options)
    out, *last = definition(q, k[:, :0], v[:, :0], None, None, None, None, state, z, **options)
    check([out, *last], whole)


def test_last_causal_query_sees_every_key():
    q, k, v = _tokens(2, 150, 150, 2, 6, 4)
    for normalize in NORMALIZERS:
        pair = [definition(q, k, v, normalize=normalize, eps=0.1, causal=c)[0][:, -1] for c in (True, False)]
        check(pair[:1], pair[1:])


# The public function.


@pytest.mark.parametrize("name", ["small_sum", "small_everything", "small_causal", "small_q_den", "slab_swin_window",
                                  "small_segments", "small_no_keys", "small_state_only", "empty_heads"])  # fmt: skip
def test_public_function(name):
    """Whichever form it chooses, its output is right; with return_state it is the linear form's."""
    args, kwargs = SPEC.sample(name).build()
    kwargs = {n: x for n, x in kwargs.items() if n != "quadratic"}
    oracle = oracle_of(SPEC, args, kwargs, None)
    with torch.no_grad():
        oracle.check_outputs(public_call(*args, return_state=True, **kwargs))
        out = public_call(*args, **kwargs)
    assert_close_to_truth(
        out, oracle.outputs["out"], oracle.output_yardsticks["out"], magnitude=oracle.output_magnitudes["out"]
    )


def _form_of(call):
    """Whether the operator that a call runs is told to be quadratic."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Spy(TorchDispatchMode):
        forms = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.effvit.linear_attention.default:
                self.forms.append((kwargs or {}).get("quadratic", False))
            return func(*args, **(kwargs or {}))

    with Spy() as spy, torch.no_grad():
        call()
    (form,) = spy.forms
    spy.forms.clear()
    return form


def test_rule_of_the_two_forms():
    assert prefers_quadratic(32, 32, 32, 32) and not prefers_quadratic(33, 33, 32, 32)
    q = torch.randn(1, 32, 2, 32)
    assert _form_of(lambda: effvit.linear_attention(q, q, q)) is True
    assert _form_of(lambda: effvit.linear_attention(q, q, q, causal=True)) is True
    assert _form_of(lambda: effvit.linear_attention(q, q, q, return_state=True)) is False
    offsets = torch.tensor([0, 32])
    assert _form_of(lambda: effvit.linear_attention(q, q, q, cu_seqlens=offsets)) is False
    state, z = torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32)
    assert _form_of(lambda: effvit.linear_attention(q, q, q, initial_state=state, initial_z=z)) is False
    assert _form_of(lambda: effvit.linear_attention(*(torch.randn(1, 33, 2, 32),) * 3)) is False


@pytest.mark.parametrize("dynamic", [False, True])
def test_rule_under_compile(dynamic):
    """Static sizes choose as without compiler; symbolic ones take the linear form, and one graph serves them all."""
    graphs = []

    def record(graph, inputs):
        graphs.append([n.kwargs.get("quadratic") for n in graph.graph.nodes if "effvit.linear" in str(n.target)])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(effvit.linear_attention, fullgraph=True, backend=record, dynamic=dynamic)
    for L in (8, 50):
        q, k, v = (torch.randn(2, L, 2, 16) for _ in range(3))
        expected = effvit.linear_attention(q, k, v)
        assert_close_to_truth(compiled(q, k, v), definition(*(t.double() for t in (q, k, v)))[0], expected)
    assert graphs == ([[False]] if dynamic else [[True], [False]])


def test_int64_offsets():
    args, kwargs = SPEC.sample("small_segments").build()
    wide = [a.long() if n == "cu_seqlens" else a for n, a in zip(SPEC.tensors, args, strict=True)]
    assert_bitwise_equal(public_call(*wide, **kwargs), public_call(*args, **kwargs))


# cu_seqlens, an integer tensor: what the shared suite does with the other arguments.

SEGMENTS = ["small_segments", "small_segments_everything", "small_segments_causal"]


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_opcheck(name):
    args, kwargs = SPEC.sample(name).build()
    torch.library.opcheck(torch.ops.effvit.linear_attention.default, with_grad(args), kwargs)


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_compile_and_export(name):
    args, kwargs = SPEC.sample(name).build()
    op = torch.ops.effvit.linear_attention

    def run(call, args):
        leaves = with_grad(args)
        outputs = as_tuple(call(*leaves))
        inputs = [t for t in leaves if t is not None and t.requires_grad]
        return (*outputs, *torch.autograd.grad([(o * o).sum() for o in outputs], inputs))

    def call(*a):
        return op(*a, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for call_args in (args, SPEC.resize(args, kwargs)[0]):
        for result, expected in zip(run(compiled, call_args), run(call, call_args), strict=True):
            assert_bitwise_equal(result, expected)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return op(*(tensors.get(n) for n in SPEC.tensors), **kwargs)

    tensors = named_tensors(SPEC, args)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {n: {1: length} if n in ("q", "k", "v", "q_den", "k_den", "weight") else {} for n in tensors}
    program = torch.export.export(Module(), (tensors,), dynamic_shapes=(shapes,), strict=False)
    larger = SPEC.resize(args, kwargs)[0]
    for result, expected in zip(program.module()(named_tensors(SPEC, larger)), call(*larger), strict=True):
        assert_bitwise_equal(result, expected)


def test_segments_vmap():
    """Mapped calls, with the same offsets or their own."""
    args, kwargs = SPEC.sample("small_segments").build()
    q, k, v, _, _, _, offsets, _, _ = args
    many = torch.stack((q, 2 * q, q.flip(1)))
    other = torch.stack((offsets, torch.tensor([0, 5, 5, 30, 41], dtype=torch.int32), offsets))

    def call(q, offsets):
        return torch.ops.effvit.linear_attention(q, k, v, None, None, None, offsets, **kwargs)

    for in_dims, rows in (((0, None), [offsets] * 3), ((0, 0), list(other))):
        results = torch.vmap(call, in_dims=in_dims)(many, offsets if in_dims[1] is None else other)
        expected = [call(a, b) for a, b in zip(many, rows, strict=True)]
        for i, result in enumerate(results):
            assert_bitwise_equal(result, torch.stack([e[i] for e in expected]))


def test_segments_autocast():
    args, kwargs = SPEC.sample("small_segments_everything").build()
    with torch.autocast("cpu", torch.bfloat16):
        results = torch.ops.effvit.linear_attention(*args, **kwargs)
    cast = [
        a.to(torch.bfloat16) if n in SPEC.autocast_tensors and a is not None else a
        for n, a in zip(SPEC.tensors, args, strict=True)
    ]
    for result, expected in zip(results, torch.ops.effvit.linear_attention(*cast, **kwargs), strict=True):
        assert_bitwise_equal(result, expected)


# Values that are not finite.


@pytest.mark.parametrize("backend", backends("linear_attention"), ids=repr)
@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_and_overflow_propagate(backend, causal, quadratic):
    """NaN in, NaN out, where PyTorch says so; exp of a large value is infinite, not a saturated number."""
    q, k, v = (_randn(1, 20, 2, 8, seed=i, dtype=torch.float32) for i in (1, 2, 3))
    q[0, 3, 0, 2], k[0, 11, 1, 5], v[0, 15, 0, 1] = torch.nan, torch.nan, torch.nan
    for feature_map in range(4):
        options = {"feature_map": feature_map, "causal": causal, "quadratic": quadratic}
        found = backend.forward(*(t.to(backend.device) for t in (q, k, v)), **options)
        for result, expected in zip(found, reference_call(q, k, v, **options), strict=True):
            assert torch.equal(result.isnan().cpu(), expected.isnan()), FEATURE_MAPS[feature_map]
    k = _randn(1, 20, 2, 8, seed=2, dtype=torch.float32)
    q, v = k + 0.5, torch.ones(1, 20, 2, 8)
    k[0, 7, 1, 4] = 90.0
    options = {"feature_map": 3, "normalize": 0, "causal": causal, "quadratic": quadratic}
    found = backend.forward(*(t.to(backend.device) for t in (q, k, v)), **options)
    for result, expected in zip(found, reference_call(q, k, v, **options), strict=True):
        assert torch.equal(result.isinf().cpu(), expected.isinf()) and not result.isnan().any()
    assert found[0].isinf().any()


@pytest.mark.parametrize("causal", [False, True])
def test_tangent_of_what_does_not_reach_the_output(causal):
    """initial_z without a normaliser: z moves, the output does not."""
    q, k, v = torch.randn(3, 1, 4, 2, 3)
    state, z, dz = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3), torch.randn(1, 2, 3)

    def call(z):
        return effvit.linear_attention(
            q, k, v, initial_state=state, initial_z=z, normalize="none", causal=causal, return_state=True
        )

    out, dstate, moved = torch.func.jvp(call, (z,), (dz,))[1]
    assert not out.any() and not dstate.any()
    assert_bitwise_equal(moved, dz)
