"""Runs an operator on DTensors over two gloo processes: ``python -m effvit.testing._sharding <op> <rank> <store>``.

Every sharding that the spec declares, forward and backward, against the operator on whole tensors. The forward must not
communicate. Exits non-zero on the first difference.
"""

import os
import sys

import torch

from effvit._accuracy import assert_bitwise_equal
from effvit.testing._backends import has_native_kernel
from effvit.testing._oracle import oracle_of, random_output_grads
from effvit.testing._spec import as_tuple, named_tensors


def check(spec, sample, dims, mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    args, kwargs = sample.build()
    defaults = {a.name: a.default_value for a in spec.op().default._schema.arguments if a.kwarg_only}
    whole = {n: torch.cat((t, t.flip(0)), dims[n]) if n in dims else t for n, t in named_tensors(spec, args).items()}
    placed = {
        n: distribute_tensor(t.detach(), mesh, [Shard(dims[n]) if n in dims else Replicate()]).requires_grad_(
            t.is_floating_point()
        )
        for n, t in whole.items()
    }
    args = tuple(whole.get(n) for n in spec.tensors)
    with CommDebugMode() as comm:
        results = as_tuple(spec.op()(*(placed.get(n) for n in spec.tensors), **kwargs))
        spelled_out = as_tuple(spec.op()(*(placed.get(n) for n in spec.tensors), **{**defaults, **kwargs}))
    if comm.get_total_counts():
        raise AssertionError(f"forward must not communicate, got {comm.get_comm_counts()}")
    for name, result, same in zip(spec.outputs, results, spelled_out, strict=True):
        if same.placements != result.placements:
            raise AssertionError(f"{name}: {same.placements} with every option given, else {result.placements}")
        assert_bitwise_equal(same.to_local(), result.to_local(), name=f"{name}, every option given")
    with torch.no_grad():
        expected = as_tuple(spec.op()(*args, **kwargs))
    for name, result, e in zip(spec.outputs, results, expected, strict=True):
        if not isinstance(result, DTensor) or result.placements != (Shard(dims[name]),):
            raise AssertionError(f"{name} must be {Shard(dims[name])}, got {getattr(result, 'placements', result)}")
        if has_native_kernel(spec.name):  # the reference's matrix products may round otherwise at another batch size
            assert_bitwise_equal(result.to_local(), e.chunk(2, dims[name])[mesh.get_rank()], name=name)
    output_grads = random_output_grads(spec, sample, torch.float32, expected) if spec.backward_call else None
    oracle = oracle_of(spec, args, kwargs, output_grads)
    oracle.check_outputs([_whole(r) for r in results])
    if not spec.backward_call:
        return
    placed_grads = [
        distribute_tensor(g, mesh, [Shard(dims[n])]) for n, g in zip(spec.outputs, output_grads, strict=True)
    ]
    inputs = {n: t for n, t in placed.items() if t.is_floating_point()}
    grads = torch.autograd.grad(results, list(inputs.values()), placed_grads)
    oracle.check_gradients({n: g.full_tensor() for n, g in zip(inputs, grads, strict=True)})


def _whole(x):
    """gloo moves no int16."""
    return x.to(torch.int32).full_tensor().to(x.dtype) if x.dtype == torch.int16 else x.full_tensor()


def main(argv):
    import torch.distributed as dist

    from effvit.testing import get_spec

    spec, rank, store = get_spec(argv[0]), int(argv[1]), argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    mesh = dist.init_device_mesh("cpu", (2,))
    for sharding, dims in spec.shardings.items():
        for sample in spec.tagged("framework"):
            try:
                check(spec, sample, dims, mesh)
            except AssertionError as e:
                raise AssertionError(f"{sharding}, {sample.name}: {e}") from None
            print(f"{sharding} {sample.name} ok", flush=True)
    dist.barrier()
    # Tearing gloo down while the other rank does so too now and then ends in std::terminate, inside torch.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
