"""Random calls of an operator, any options at once, against the float64 reference: a new seed with every commit.

The seed is printed in the header of the run and in every failure; EFFVIT_SEED repeats one.

Thousands of calls meet the tails of rounding errors that a few samples do not: two in a thousand exceed the error rule,
by up to a third, where PyTorch's own error happens to be small. They may be ALLOWANCE times what the rule allows; what
these calls are there to find, a wrong index, sign or mask, is off by orders of magnitude more.
"""

import contextlib
import functools
import os
import random
import subprocess
import zlib
from pathlib import Path

import torch

from effvit.testing import backends, oracle_of, small_tiles
from effvit.testing._oracle import random_output_grads
from effvit.testing._spec import as_tuple, map_tensors

CHUNKS = 8
ALLOWANCE = 4.0
SLOW_FLOPS = 8_000


@functools.cache
def seed():
    given = os.environ.get("EFFVIT_SEED")
    if given:
        return int(given)
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(head, capture_output=True, text=True)
    return zlib.crc32(done.stdout.encode()) if done.returncode == 0 else 0


def backends_in_turn(op):
    """Which backends call i of an operator runs on: the best one always, another compiled one now and then, and some of
    the small ones on an interpreted or emulated one.
    """
    found = [b for b in backends(op) if b.name != "reference"]
    fast = [b for b in found if not b.slow]
    best = [b for b in fast if "emulated" not in b.name][-1:]
    others = [b for b in fast if b not in best]
    slow = [b for b in found if b.slow]

    def of(i):
        chosen = list(best)
        if others and i % 4 == 0:
            chosen.append(others[i // 4 % len(others)])
        if slow and i % 32 == 2:
            chosen.append(slow[i // 32 % len(slow)])
        return chosen

    return of


def check_call(spec, sample, dtype, run_on, small=False):
    """`small`: in the smallest tiles, which are too many for an interpreter: tests/test_small_tiles.py has some."""
    args, kwargs = sample.build(dtype)
    if spec.cost(args, kwargs).flops > SLOW_FLOPS:
        run_on = [b for b in run_on if not b.slow]
    grads = functools.partial(random_output_grads, spec, sample, dtype) if spec.backward_call else None
    oracle = oracle_of(spec, args, kwargs, grads, ALLOWANCE)
    for backend in run_on:
        try:
            with small_tiles() if small and not backend.slow else contextlib.nullcontext():
                _check_backend(spec, oracle, backend)
        except Exception as e:
            shapes = [None if a is None else list(a.shape) for a in args]
            where = f"{backend.name}{', small tiles' * small}, {dtype}"
            raise AssertionError(f"{sample.name} with EFFVIT_SEED={seed()} on {where}: {shapes}, {kwargs}: {e}") from e


def _check_backend(spec, oracle, backend):
    args = map_tensors(lambda t: t.to(backend.device), oracle.args)
    results = as_tuple(backend.forward(*args, **oracle.kwargs))
    oracle.check_outputs(results)
    if spec.backward_call is None:
        return
    grads = map_tensors(lambda t: t.to(backend.device), oracle.output_grads)
    bargs, bkwargs = spec.backward_call(args, oracle.kwargs, results, grads)
    oracle.check_gradients(spec.split_gradients(backend.backward(*bargs, **bkwargs), args, oracle.kwargs))


def run_chunk(spec, chunk):
    """Every CHUNKS-th random call of the operator, from `chunk` on."""
    of = backends_in_turn(spec.name)
    for i in range(chunk, spec.random_calls, CHUNKS):
        choose = random.Random(f"{spec.name} {seed()} {i}")
        sample = spec.random_sample(f"random_{i}", choose)
        dtype = choose.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
        check_call(spec, sample, dtype, of(i // CHUNKS), choose.random() < 0.5)
