"""Truth, yardstick and magnitudes of a call, computed once and kept while a test module runs through its backends."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from effvit._accuracy import assert_close_to_truth, coarsest_eps
from effvit.testing._spec import as_tuple, map_tensors, named_tensors


@dataclass(frozen=True)
class Oracle:
    """Everything that is known about the right answer of one call."""

    args: tuple
    kwargs: dict
    output_grads: tuple  # one per output, in the dtypes that the op returns
    outputs: dict  # name -> float64
    gradients: dict  # tensor name -> float64
    output_yardsticks: dict
    gradient_yardsticks: dict
    output_magnitudes: dict
    gradient_magnitudes: dict
    eps: float
    allowance: float = 1.0  # of the error rule

    def check_outputs(self, results):
        for name, result in zip(self.outputs, as_tuple(results), strict=True):
            assert_close_to_truth(
                result, self.outputs[name], self.output_yardsticks[name],
                magnitude=self.output_magnitudes.get(name), eps=self.eps, name=name,
                allowance=self.allowance,
            )  # fmt: skip

    def check_gradients(self, gradients):
        missing = set(self.gradients) ^ set(gradients)
        if missing:
            raise AssertionError(f"gradients must be those of {sorted(self.gradients)}, got {sorted(gradients)}")
        for name, result in gradients.items():
            assert_close_to_truth(
                result, self.gradients[name], self.gradient_yardsticks[name],
                magnitude=self.gradient_magnitudes.get(name), eps=self.eps,
                name=f"gradient of {name}", allowance=self.allowance,
            )  # fmt: skip


def _run(spec, args, kwargs, output_grads, dtype=None):
    """Reference forward and backward, everything cast to dtype if given."""

    def cast(t):
        t = t.detach()
        if not t.is_floating_point():
            return t
        return (t if dtype is None else t.to(dtype)).requires_grad_(True)

    args = map_tensors(cast, args)
    outputs = as_tuple(spec.reference(*args, **kwargs))
    inputs = {n: t for n, t in named_tensors(spec, args).items() if t.is_floating_point()}
    gradients = {}
    if output_grads is not None:
        pairs = [(o, g) for o, g in zip(outputs, output_grads, strict=True) if g is not None]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], list(inputs.values()), [g.to(o.dtype) for o, g in pairs], allow_unused=True
        )
        gradients = {
            n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(inputs.items(), grads, strict=True)
        }
    return dict(zip(spec.outputs, [o.detach() for o in outputs], strict=True)), gradients


def oracle_of(spec, args, kwargs, output_grads, allowance=1.0):
    """The right answer for these arguments. output_grads: one per output (None: that output is not used)."""
    eps = coarsest_eps(*args)
    dtype = args[0].dtype
    outputs, gradients = _run(spec, args, kwargs, output_grads, torch.float64)
    output_yardsticks, gradient_yardsticks = _run(spec, args, kwargs, output_grads, dtype)
    magnitudes = ({}, {})
    if spec.magnitudes is not None:
        args64 = map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t, args)
        grads64 = None if output_grads is None else tuple(None if g is None else g.double() for g in output_grads)
        magnitudes = spec.magnitudes(args64, kwargs, grads64, eps)
    return Oracle(
        args, kwargs, output_grads, outputs, gradients, output_yardsticks, gradient_yardsticks, *magnitudes, eps,
        allowance,
    )  # fmt: skip


def random_output_grads(spec, sample, dtype, outputs):
    """Cotangents of the outputs' shapes: a half-precision op may still return float32 statistics."""
    generator = torch.Generator("cpu").manual_seed(len(sample.name) + 1)
    return tuple(
        torch.randn(o.shape, generator=generator, dtype=torch.float32).to(spec.output_dtypes.get(n, dtype))
        for n, o in zip(spec.outputs, outputs, strict=True)
    )


@lru_cache(maxsize=4)
def sample_oracle(spec_name, sample_name, dtype):
    """Oracle of a registered spec's sample. Tests that share a sample run next to each other, so a few entries do."""
    from effvit.testing import get_spec

    spec = get_spec(spec_name)
    sample = spec.sample(sample_name)
    args, kwargs = sample.build(dtype)
    with torch.no_grad():
        outputs = as_tuple(spec.reference(*args, **kwargs))
    grads = random_output_grads(spec, sample, dtype, outputs) if spec.backward_call else None
    return oracle_of(spec, args, kwargs, grads)
