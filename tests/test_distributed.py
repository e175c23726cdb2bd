"""effvit.distributed, and the operators under DTensor and FSDP2, on gloo processes: equal to one process."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, oracle_of
from effvit.testing.linear_attention import SPEC

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")

# How 41 tokens are split; one rank of four has none.
SPLITS = {2: (29, 12), 4: (9, 0, 31, 1)}
CASES = {
    "sum": {},
    "sum_tiny_eps": {"eps": 1e-15},
    "none": {"normalize": "none", "feature_map": "none", "weight": True},
    "mean": {"normalize": "mean", "feature_map": "elu1", "den": True, "eps": 1e-3},
    "clamp": {"normalize": "clamp", "clamp_min": 90.0, "scale": 1.4},
    "everything": {"feature_map": "exp", "den": True, "weight": True, "scale": 0.5},
    "causal": {"causal": True},
    "causal_none": {"causal": True, "normalize": "none", "weight": True},
    "causal_clamp": {"causal": True, "normalize": "clamp", "clamp_min": 60.0, "den": True},
}


def tokens(den=False, weight=False, dtype=torch.float32):
    """The whole sequences: {argument: tensor}."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 41, 3, 8), "k": (2, 41, 3, 8), "v": (2, 41, 3, 5)}
    shapes |= {"q_den": (2, 41, 3, 8), "k_den": (2, 41, 3, 8)} if den else {}
    shapes |= {"weight": (2, 41, 3)} if weight else {}
    drawn = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    drawn = {n: t.abs() + 0.1 if n in ("q_den", "k_den", "weight") else t for n, t in drawn.items()}
    return {n: t.to(dtype) if n != "weight" else t for n, t in drawn.items()}


def oracle(whole, options, grad_out):
    """One process: the definition in float64, with its error in the tokens' dtype."""
    from effvit.ops.linear_attention import FEATURE_MAPS, NORMALIZERS

    options = dict(options)
    options["feature_map"] = FEATURE_MAPS.index(options.get("feature_map", "relu"))
    options["normalize"] = NORMALIZERS.index(options.get("normalize", "sum"))
    return oracle_of(SPEC, tuple(whole.get(n) for n in SPEC.tensors), options, (grad_out, None, None))


# ---- what runs on every rank ---------------------------------------------------------------------------------------


def gathered(t, dim=1):
    """The parts of all ranks, in order."""
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, t.detach())
    return torch.cat(parts, dim)


def sequence_parallel(mesh, name, dtype=torch.float32, autocast=False, call=None):
    from torch.distributed.tensor.debug import CommDebugMode

    options = dict(CASES[name])
    whole = tokens(options.pop("den", False), options.pop("weight", False), dtype)
    ranks, rank = mesh.size(), mesh.get_rank()
    mine = {n: t.split(SPLITS[ranks], 1)[rank].clone().requires_grad_() for n, t in whole.items()}
    optional = [mine.get(n) for n in ("q_den", "k_den", "weight")]
    call = call or effvit.distributed.sequence_parallel_linear_attention
    with CommDebugMode() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(mine["q"], mine["k"], mine["v"], None, *optional, **options)
    grad_out = torch.randn(2, 41, 3, 5, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    with CommDebugMode() as backward:
        grads = torch.autograd.grad(out, list(mine.values()), grad_out.split(SPLITS[ranks], 1)[rank])
    collective = "all_gather_into_tensor" if options.get("causal") else "all_reduce"
    for mode in (forward, backward):
        counts = {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}
        assert counts == {collective: 1}, counts
    for n, g in zip(mine, grads, strict=True):
        assert g.dtype == mine[n].dtype and g.shape == mine[n].shape
    if autocast:
        assert out.dtype == torch.bfloat16
        whole = {n: t.bfloat16() if n != "weight" else t for n, t in whole.items()}
    expected = oracle(whole, options, grad_out)
    assert_close_to_truth(
        gathered(out), expected.outputs["out"], expected.output_yardsticks["out"],
        magnitude=expected.output_magnitudes["out"], eps=expected.eps, name="out",
    )  # fmt: skip
    expected.check_gradients({n: gathered(g) for n, g in zip(mine, grads, strict=True)})


def sequence_parallel_bfloat16(mesh, name):
    sequence_parallel(mesh, name, torch.bfloat16)


def sequence_parallel_autocast(mesh, name):
    sequence_parallel(mesh, name, autocast=True)


def sequence_parallel_compiled(mesh, name):
    call = effvit.distributed.sequence_parallel_linear_attention
    whole = tokens()
    mine = [t.split(SPLITS[mesh.size()], 1)[mesh.get_rank()].clone() for t in whole.values()]

    def both(call):
        leaves = [t.detach().requires_grad_() for t in mine]
        out = call(*leaves, **CASES[name])
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for result, expected in zip(both(compiled), both(call), strict=True):
        assert_bitwise_equal(result, expected)


def same_of_mixed(eager, tensors, cast):
    """Under autocast tensors of two dtypes: bit for bit what those of one are, `cast` says which; compiled too."""

    def both(call, given):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in given.items()}
        with torch.autocast("cpu", torch.bfloat16):
            out = call(leaves)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), [*leaves.values()])
        assert all(g.dtype == t.dtype for g, t in zip(grads, leaves.values(), strict=True))
        return (out, *grads)

    expected = both(eager, {n: t.bfloat16() if n in cast else t for n, t in tensors.items()})
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for n in cast:
        for dtypes in ({n}, {*cast} - {n}):
            given = {m: t.bfloat16() if m in dtypes else t for m, t in tensors.items()}
            for run in (eager, compiled) if n == cast[0] else (eager,):
                for result, e in zip(both(run, given), expected, strict=True):
                    assert_bitwise_equal(result, e.to(result.dtype))


def sequence_parallel_mixed(mesh, name):
    options = dict(CASES[name])
    whole = tokens(options.pop("den", False), options.pop("weight", False))
    mine = {n: t.split(SPLITS[mesh.size()], 1)[mesh.get_rank()] for n, t in whole.items()}
    call = effvit.distributed.sequence_parallel_linear_attention
    same_of_mixed(lambda leaves: call(**leaves, **options), mine, [n for n in mine if n != "weight"])


def sequence_parallel_twice(mesh, name):
    """A gradient penalty, summed over the ranks: second derivatives are those of one process."""
    whole, options = tokens(), CASES[name]

    def penalty_gradients(call, tensors, dtype=None):
        leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
        out = call(*leaves, **options)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    mine = [t.split(SPLITS[mesh.size()], 1)[mesh.get_rank()] for t in whole.values()]
    found = penalty_gradients(effvit.distributed.sequence_parallel_linear_attention, mine)

    def definition(q, k, v, **options):
        return effvit.reference.linear_attention(q, k, v, **options)[0]

    truth, plain = (penalty_gradients(definition, whole.values(), t) for t in (torch.float64, torch.float32))
    for n, f, t, y in zip(whole, found, truth, plain, strict=True):
        assert_close_to_truth(gathered(f), t, y, magnitude=t.abs().max().expand_as(t), name=f"gradient of {n}")


def ranks_agree(mesh, name):
    """Every rank gets the same state, so the same queries give the same bits everywhere, again and again."""
    whole = tokens()
    k, v = (whole[n].split(SPLITS[mesh.size()], 1)[mesh.get_rank()] for n in "kv")
    for _ in range(5):
        out = effvit.distributed.sequence_parallel_linear_attention(whole["q"], k, v, mesh)
        everywhere = gathered(out[None], 0)
        for other in everywhere[1:]:
            assert_bitwise_equal(other, everywhere[0])


class Attention(torch.nn.Module):
    """A small layer around the operator; nothing in it knows of ranks."""

    def __init__(self, dim=32, head_dim=8):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (torch.nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        return self.proj(effvit.linear_attention(q, k, v, normalize="mean").flatten(-2))


def layer_and_batch(tokens=50):
    torch.manual_seed(0)
    return Attention(), torch.randn(4, tokens, 32)


def train(layer, x):
    """(output, {parameter: gradient}) of the mean loss."""
    out = layer(x)
    out.square().mean().backward()
    return out, {n: p.grad for n, p in layer.named_parameters()}


def plainly(x, parameters):
    """The same layer in float64 (or in another dtype), from its parameters."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    q, k, v = (F.linear(x, leaves[f"{n}.weight"], leaves[f"{n}.bias"]).unflatten(-1, (-1, 8)) for n in "qkv")
    out = effvit.reference.linear_attention(q, k, v, normalize="mean")[0].flatten(-2)
    out = F.linear(out, leaves["proj.weight"], leaves["proj.bias"])
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in leaves.items()}


def magnitudes(x, parameters):
    """Sums of the absolute terms of every parameter's gradient, in float64."""
    q, k, v = (F.linear(x, parameters[f"{n}.weight"], parameters[f"{n}.bias"]).unflatten(-1, (-1, 8)) for n in "qkv")
    out = effvit.reference.linear_attention(q, k, v, normalize="mean")[0].flatten(-2)
    grad = F.linear(out, parameters["proj.weight"], parameters["proj.bias"]).abs() * 2 / out.numel()
    grad_out = (grad @ parameters["proj.weight"].abs()).unflatten(-1, (-1, 8))
    eps = torch.finfo(torch.float32).eps
    _, sizes = SPEC.magnitudes((q, k, v), {"normalize": 2}, (grad_out, None, None), eps)
    pairs = {n: (sizes[n].flatten(-2), x.abs()) for n in "qkv"} | {"proj": (grad, out.abs())}
    weights = {f"{n}.weight": torch.einsum("bli,blj->ij", g, y) for n, (g, y) in pairs.items()}
    return weights | {f"{n}.bias": g.sum((0, 1)) for n, (g, _) in pairs.items()}


def check_training(x, parameters, out, grads):
    wide = x.double(), {n: p.double() for n, p in parameters.items()}
    (truth, truths), (yardstick, yardsticks) = plainly(*wide), plainly(x, parameters)
    assert_close_to_truth(out, truth, yardstick, name="out")
    sizes = magnitudes(*wide)
    assert set(grads) == set(truths) == set(sizes)
    for n, g in grads.items():
        assert_close_to_truth(g, truths[n], yardsticks[n], magnitude=sizes[n], name=f"gradient of {n}")


def fsdp2(mesh, name):
    from torch.distributed.fsdp import fully_shard

    layer, x = layer_and_batch()
    parameters = {n: p.detach().clone() for n, p in layer.named_parameters()}
    fully_shard(layer, mesh=mesh)
    out, grads = train(layer, x.chunk(mesh.size())[mesh.get_rank()])
    check_training(x, parameters, gathered(out, 0), {n: g.full_tensor() for n, g in grads.items()})


def tensor_parallel(mesh, name):
    """Heads over the ranks: the operator runs on DTensors, and between the linear layers nothing is communicated."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    layer, x = layer_and_batch()
    parameters = {n: p.detach().clone() for n, p in layer.named_parameters()}
    plan = {n: ColwiseParallel(use_local_output=False) for n in "qkv"} | {"proj": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)
    with CommDebugMode() as comm:
        out, grads = train(layer, x)
    assert sum(comm.get_comm_counts().values()) == 1, comm.get_comm_counts()  # proj's sum
    full = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    check_training(x, parameters, out, full)


def data_parallel_dtensor(mesh, name):
    """A batch in shards and replicated parameters, both DTensors. Short and long sequences take different forms."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    for length in (50, 6):  # linear form, quadratic form
        layer, x = layer_and_batch(length)
        parameters = {n: p.detach().clone() for n, p in layer.named_parameters()}
        layer = distribute_module(layer, mesh)
        out, grads = train(layer, distribute_tensor(x, mesh, [Shard(0)]))
        assert out.placements == (Shard(0),)
        check_training(x, parameters, out.full_tensor(), {n: g.full_tensor() for n, g in grads.items()})


def both_forms(mesh, name):
    """DTensor caches what it knows of a call: one with quadratic=True must not answer for one without."""
    from torch.distributed.tensor import Shard, distribute_tensor

    q = distribute_tensor(torch.randn(2 * mesh.size(), 6, 2, 8), mesh, [Shard(0)])
    for quadratic in (True, False, True):
        out, state, z = torch.ops.effvit.linear_attention(q, q, q, quadratic=quadratic)
        sizes = (0, 0) if quadratic else (8, 8)
        assert state.shape == (2 * mesh.size(), 2, *sizes), state.shape
        assert state.to_local().shape == (2, 2, *sizes) and z.shape[2] == sizes[0]
        assert state.full_tensor().shape == state.shape and out.shape == q.shape


def segments_by_heads(mesh, name):
    """cu_seqlens: heads may be sharded, the batch of one may not."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sample = SPEC.sample("small_segments")
    args, kwargs = sample.build()
    heads = SPEC.shardings["H"]
    placed = [
        None if t is None else distribute_tensor(t, mesh, [Shard(heads[n]) if n in heads else Replicate()])
        for n, t in zip(SPEC.tensors, args, strict=True)
    ]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in placed]
    results = torch.ops.effvit.linear_attention(*leaves, **kwargs)
    assert results[0].placements == (Shard(2),) and results[1].placements == (Shard(1),)
    cotangents = [torch.randn(r.shape, generator=torch.Generator().manual_seed(i)) for i, r in enumerate(results)]
    expected = oracle_of(SPEC, args, kwargs, tuple(cotangents))
    expected.check_outputs([r.full_tensor() for r in results])
    inputs = {n: t for n, t in zip(SPEC.tensors, leaves, strict=True) if t is not None and t.requires_grad}
    placed = [distribute_tensor(g, mesh, [Shard(heads[n])]) for n, g in zip(SPEC.outputs, cotangents, strict=True)]
    grads = torch.autograd.grad(results, list(inputs.values()), placed)
    expected.check_gradients({n: g.full_tensor() for n, g in zip(inputs, grads, strict=True)})


def main(functions, rank, ranks, store, *tests):
    """Runs functions of a file's globals on this rank."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=FutureWarning, module="effvit")
    dist.init_process_group("gloo", rank=int(rank), world_size=int(ranks), store=dist.FileStore(store, int(ranks)))
    mesh = dist.init_device_mesh("cpu", (int(ranks),))
    for test in tests:
        function, name = test.split(":")
        try:
            functions[function](mesh, name)
        except AssertionError as e:
            raise AssertionError(f"{test}: {e}") from None
        print(f"{test} ok", flush=True)
    dist.barrier()
    os._exit(0)  # tearing gloo down while another rank does so too now and then ends in std::terminate, inside torch


# ---- the tests -----------------------------------------------------------------------------------------------------


def run_ranks(ranks, store, *tests, file=__file__):
    """Runs functions of a file on some processes; fails with their output."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    processes = [
        subprocess.Popen(
            [sys.executable, file, str(rank), str(ranks), str(store), *tests],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        logs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(log[-3000:] for log in logs)
    for log in logs:
        assert [line for line in log.splitlines() if line.endswith(" ok")] == [f"{t} ok" for t in tests]


EACH = [f"sequence_parallel:{name}" for name in CASES]
TWICE = [f"sequence_parallel_twice:{name}" for name in ("sum", "causal")]
HALF = [
    f"sequence_parallel_{dtype}:{name}"
    for dtype in ("bfloat16", "autocast")
    for name in ("sum", "everything", "mean", "causal")
]


def test_sequence_parallel_on_two_ranks(tmp_path):
    """Forward and every gradient equal one process, uneven parts, one collective each way; compiled too."""
    compiled = [f"sequence_parallel_compiled:{name}" for name in ("sum", "causal")]
    mixed = [f"sequence_parallel_mixed:{name}" for name in ("everything", "causal")]
    run_ranks(2, tmp_path / "store", *EACH, *HALF, *compiled, *TWICE, *mixed)


def test_sequence_parallel_on_four_ranks(tmp_path):
    """One of them has no tokens."""
    run_ranks(4, tmp_path / "store", *EACH, "ranks_agree:")


def test_layer_runs_unchanged(tmp_path):
    """Under FSDP2, with tensor-parallel heads, and on DTensors of the batch; the operator with every kind of call."""
    layers = ("fsdp2:", "tensor_parallel:", "data_parallel_dtensor:")
    run_ranks(2, tmp_path / "store", *layers, "both_forms:", "segments_by_heads:")


def test_bad_calls():
    call = effvit.distributed.sequence_parallel_linear_attention
    q, k, v = tokens().values()
    prefix = "effvit::sequence_parallel_linear_attention: "
    for error, match, changes in (
        (ValueError, "normalize must be none, sum or clamp when causal is True, got mean",
         {"causal": True, "normalize": "mean"}),
        (ValueError, "k must be as long as q when causal is True, 41, got 40",
         {"causal": True, "k": k[:, 1:], "v": v[:, 1:]}),
        (TypeError, "causal must be a bool, got int", {"causal": 1}),
        (ValueError, "normalize must be one of none, sum, mean, clamp, got 'max'", {"normalize": "max"}),
        (ValueError, r"v must be \[B, M, H, V\] like k", {"v": v[:, 1:]}),
        (ValueError, r"k_den must be None when normalize is none", {"k_den": k, "normalize": "none"}),
        (RuntimeError, "torch.distributed must be initialised, got no process group", {}),
    ):  # fmt: skip
        with pytest.raises(error, match=prefix + match):
            call(**({"q": q, "k": k, "v": v} | changes))


if __name__ == "__main__":
    main(globals(), *sys.argv[1:])
