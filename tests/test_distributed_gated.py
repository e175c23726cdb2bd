"""effvit.distributed.sequence_parallel_gated_linear_attention on gloo processes: equal to one process."""

import sys

import pytest
import torch
from test_distributed import SPLITS, gathered, main, run_ranks, same_of_mixed

import effvit
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, oracle_of
from effvit.testing.gated_linear_attention import SPEC

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")

L, H, K, V = 41, 3, 8, 5
CASES = {
    "channel": {"gate": (2, L, H, K)},
    "channel_reverse": {"gate": (2, L, H, K), "reverse": True, "scale": 0.7},
    "token": {"gate": (2, L, H)},
    "token_both": {"gate": (2, L, H), "bidirectional": True},
    "head": {"gate": (H,)},
    "head_reverse": {"gate": (H,), "reverse": True},
    "none": {"gate": None},
    "strong": {"gate": (2, L, H, K), "strength": 20.0},
    "weak_both": {"gate": (2, L, H, K), "strength": 1e-3, "bidirectional": True},
}


def options_of(name):
    return {n: x for n, x in CASES[name].items() if n in ("scale", "reverse", "bidirectional")}


def tokens(name, dtype=torch.float32):
    """The whole sequences: {argument: tensor}; gates are float32."""
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(2, L, H, d, generator=generator).to(dtype) for n, d in (("q", K), ("k", K), ("v", V))}
    if CASES[name]["gate"]:
        drawn["g"] = -CASES[name].get("strength", 0.5) * torch.rand(CASES[name]["gate"], generator=generator)
    return drawn


def part(mesh, name, t):
    """This rank's part; gates of heads are whole."""
    if name == "g" and t.dim() == 1:
        return t.clone()
    return t.split(SPLITS[mesh.size()], 1)[mesh.get_rank()].clone()


def definition(q, k, v, g=None, *, scale=None, reverse=False, bidirectional=False):
    """Token after token: what one process computes."""
    scale = K**-0.5 if scale is None else scale
    decay = (
        torch.ones_like(k) if g is None else (g.to(q.dtype).exp()[..., None] if g.dim() < 4 else g.to(q.dtype).exp())
    )
    decay = decay.expand_as(k)
    out = torch.zeros_like(v)
    for backwards in (False, True) if bidirectional else (reverse,):
        state, rows = torch.zeros(2, H, K, V, dtype=q.dtype), [None] * L
        for t in reversed(range(L)) if backwards else range(L):
            state = decay[:, t, :, :, None] * state
            own = k[:, t, :, :, None] * v[:, t, :, None]
            rows[t] = (q[:, t, :, :, None] * (state if bidirectional and backwards else state + own)).sum(2)
            state = state + own
        out = out + torch.stack(rows, 1)
    return scale * out


def oracle(whole, options, grad_out):
    """One process: the definition in float64, with its error in the tokens' dtype."""
    scale, direction = options.get("scale", K**-0.5), 2 if options.get("bidirectional") else int("reverse" in options)
    args = tuple(whole.get(n) for n in SPEC.tensors)
    return oracle_of(SPEC, args, {"scale": scale, "direction": direction}, (grad_out, None))


def whole_of(mesh, name, t):
    if name == "g" and t.dim() == 1:  # every rank has the part of its own tokens
        t = t.detach().clone()
        torch.distributed.all_reduce(t)
        return t
    return gathered(t)


def sequence_parallel(mesh, name, dtype=torch.float32, autocast=False):
    from torch.distributed.tensor.debug import CommDebugMode

    options, whole = options_of(name), tokens(name, dtype)
    mine = {n: part(mesh, n, t).requires_grad_() for n, t in whole.items()}
    call = effvit.distributed.sequence_parallel_gated_linear_attention
    with CommDebugMode() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(*mine.values(), group=mesh, **options)
    grad_out = torch.randn(2, L, H, V, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    with CommDebugMode() as backward:
        grads = torch.autograd.grad(out, [*mine.values()], part(mesh, "out", grad_out))
    expected = {"all_gather_into_tensor": 2 if options.get("bidirectional") else 1}
    for mode in (forward, backward):
        counts = {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}
        assert counts == expected, counts
    for n, g in zip(mine, grads, strict=True):
        assert g.dtype == mine[n].dtype and g.shape == mine[n].shape
    if autocast:
        assert out.dtype == torch.bfloat16
        whole = {n: t if n == "g" and t.dim() < 4 else t.bfloat16() for n, t in whole.items()}
    found = {"out": gathered(out)} | {n: whole_of(mesh, n, g) for n, g in zip(mine, grads, strict=True)}
    if mesh.get_rank() == 0:  # the same on every rank
        gate = {1: "g_head", 3: "g_token", 4: "g_channel"}
        named = lambda given: {gate[t.dim()] if n == "g" else n: t for n, t in given.items()}
        expected = oracle(named(whole), options, grad_out)
        assert_close_to_truth(
            found.pop("out"), expected.outputs["out"], expected.output_yardsticks["out"],
            magnitude=expected.output_magnitudes["out"], eps=expected.eps, name="out",
        )  # fmt: skip
        expected.check_gradients(named(found))


def sequence_parallel_bfloat16(mesh, name):
    sequence_parallel(mesh, name, torch.bfloat16)


def sequence_parallel_autocast(mesh, name):
    sequence_parallel(mesh, name, autocast=True)


def sequence_parallel_mixed(mesh, name):
    mine = {n: part(mesh, n, t) for n, t in tokens(name).items()}
    call = effvit.distributed.sequence_parallel_gated_linear_attention
    cast = [n for n in mine if n != "g" or mine[n].dim() == 4]
    same_of_mixed(lambda leaves: call(**leaves, **options_of(name)), mine, cast)


def sequence_parallel_compiled(mesh, name):
    call = effvit.distributed.sequence_parallel_gated_linear_attention
    mine = [part(mesh, n, t) for n, t in tokens(name).items()]

    def both(call):
        leaves = [t.detach().requires_grad_() for t in mine]
        out = call(*leaves, **options_of(name))
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for result, expected in zip(both(compiled), both(call), strict=True):
        assert_bitwise_equal(result, expected)


def sequence_parallel_twice(mesh, name):
    """A gradient penalty, summed over the ranks: second derivatives are those of one process."""
    whole, options = tokens(name), options_of(name)

    def penalty_gradients(call, tensors, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
        out = call(*leaves, **options)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    call = effvit.distributed.sequence_parallel_gated_linear_attention
    found = penalty_gradients(call, [part(mesh, n, t) for n, t in whole.items()], torch.float32)
    truth, plain = (penalty_gradients(definition, whole.values(), t) for t in (torch.float64, torch.float32))
    for n, f, t, y in zip(whole, found, truth, plain, strict=True):
        assert_close_to_truth(gathered(f), t, y, magnitude=t.abs().max().expand_as(t), name=f"gradient of {n}")


def again(mesh, name):
    mine = [part(mesh, n, t) for n, t in tokens(name).items()]
    call = effvit.distributed.sequence_parallel_gated_linear_attention
    first = call(*mine, **options_of(name))
    for _ in range(4):
        assert_bitwise_equal(call(*mine, **options_of(name)), first)


# ---- the tests -----------------------------------------------------------------------------------------------------

TWO = ("channel", "token_both", "head", "none", "strong")
FOUR = ("channel_reverse", "token", "head_reverse", "weak_both")


def test_on_two_ranks(tmp_path):
    """Forward and every gradient equal one process, uneven parts, one collective a direction each way; compiled too."""
    assert {*TWO, *FOUR} == set(CASES)
    tests = [f"sequence_parallel:{name}" for name in TWO]
    tests += ["sequence_parallel_bfloat16:channel", "sequence_parallel_bfloat16:token_both"]
    tests += ["sequence_parallel_autocast:token_both", "sequence_parallel_autocast:channel"]
    tests += ["sequence_parallel_compiled:channel"]
    tests += ["sequence_parallel_twice:channel"]
    tests += [f"sequence_parallel_mixed:{name}" for name in ("channel", "token_both", "head")]
    run_ranks(2, tmp_path / "store", *tests, file=__file__)


def test_on_four_ranks(tmp_path):
    """One of them has no tokens."""
    run_ranks(4, tmp_path / "store", *(f"sequence_parallel:{name}" for name in FOUR), "again:weak_both", file=__file__)


def test_bad_calls():
    call = effvit.distributed.sequence_parallel_gated_linear_attention
    q, k, v, g = tokens("channel").values()
    prefix = "effvit::sequence_parallel_gated_linear_attention: "
    for error, match, changes in (
        (ValueError, r"g must be \[H\], \[B, L, H\] or \[B, L, H, K\], got \[2, 41\]", {"g": g[..., 0, 0]}),
        (ValueError, "reverse must be False when bidirectional is True, got True",
         {"reverse": True, "bidirectional": True}),
        (TypeError, "bidirectional must be a bool, got int", {"bidirectional": 1}),
        (ValueError, r"k must be \[B, L, H, K\] like q", {"k": k[:, 1:]}),
        (RuntimeError, "torch.distributed must be initialised, got no process group", {}),
    ):  # fmt: skip
        with pytest.raises(error, match=prefix + match):
            call(**({"q": q, "k": k, "v": v, "g": g} | changes))


if __name__ == "__main__":
    main(globals(), *sys.argv[1:])
