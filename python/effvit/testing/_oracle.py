"""Truth, yardstick and magnitudes of a call, computed once and kept while a test module runs through its backends."""

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch

from effvit._accuracy import assert_close_to_truth, assert_rounded_truth, coarsest_eps
from effvit.testing._spec import OpSpec, as_tuple, differentiable_tensors, map_tensors


@dataclass(frozen=True)
class Oracle:
    """Everything that is known about the right answer of one call."""

    spec: OpSpec
    args: tuple
    kwargs: dict
    output_grads: tuple  # one per output, in the dtypes that the op returns
    outputs: dict  # name -> float64
    gradients: dict  # tensor name -> float64
    output_magnitudes: dict
    gradient_magnitudes: dict
    eps: float
    allowance: float = 1.0  # of the error rule

    @cached_property
    def _yardsticks(self):
        return _run(self.spec, self.args, self.kwargs, self.output_grads, coarsest_float(*self.args))[:2]

    @property
    def output_yardsticks(self):
        return self._yardsticks[0]

    @property
    def gradient_yardsticks(self):
        return self._yardsticks[1]

    def check_outputs(self, results):
        for name, result in zip(self.outputs, as_tuple(results), strict=True):
            if not result.is_floating_point():
                assert_rounded_truth(result, self.outputs[name], self.output_magnitudes.get(name), name=name)
                continue
            assert_close_to_truth(
                result, self.outputs[name], lambda name=name: self.output_yardsticks[name],
                magnitude=self.output_magnitudes.get(name), eps=self.eps, name=name,
                allowance=self.allowance,
            )  # fmt: skip

    def check_gradients(self, gradients):
        missing = set(self.gradients) ^ set(gradients)
        if missing:
            raise AssertionError(f"gradients must be those of {sorted(self.gradients)}, got {sorted(gradients)}")
        for name, result in gradients.items():
            assert_close_to_truth(
                result, self.gradients[name], lambda name=name: self.gradient_yardsticks[name],
                magnitude=self.gradient_magnitudes.get(name), eps=self.eps,
                name=f"gradient of {name}", allowance=self.allowance,
            )  # fmt: skip


def coarsest_float(*tensors):
    floats = [t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return max(floats, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _run(spec, args, kwargs, output_grads, dtype):
    """Outputs and gradients of the reference in `dtype`, and the cotangents: given, or a function of the outputs."""

    def cast(t):
        t = t.detach()
        return t.to(dtype).requires_grad_(True) if t.is_floating_point() else t

    args = map_tensors(cast, args)
    outputs = as_tuple(spec.reference(*args, **kwargs))
    inputs = differentiable_tensors(spec, args)
    gradients = {}
    if callable(output_grads):
        output_grads = output_grads(outputs)
    if output_grads is not None:
        pairs = [(o, g) for o, g in zip(outputs, output_grads, strict=True) if g is not None]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], list(inputs.values()), [g.to(o.dtype) for o, g in pairs], allow_unused=True
        )
        gradients = {
            n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(inputs.items(), grads, strict=True)
        }
    return dict(zip(spec.outputs, [o.detach() for o in outputs], strict=True)), gradients, output_grads


def oracle_of(spec, args, kwargs, output_grads, allowance=1.0):
    """The right answer for these arguments. output_grads: one per output (None: that output is not used), or a function
    of the outputs that returns them, or None for no gradients."""
    floats = [d for d in spec.output_dtypes(args, kwargs).values() if d.is_floating_point]
    eps = max(coarsest_eps(*args), *(torch.finfo(d).eps for d in floats), 0.0)
    outputs, gradients, output_grads = _run(spec, args, kwargs, output_grads, torch.float64)
    magnitudes = ({}, {})
    if spec.magnitudes is not None:
        args64 = map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t, args)
        grads64 = None if output_grads is None else tuple(None if g is None else g.double() for g in output_grads)
        magnitudes = spec.magnitudes(args64, kwargs, grads64, eps)
    return Oracle(spec, args, kwargs, output_grads, outputs, gradients, *magnitudes, eps, allowance)


def random_output_grads(spec, sample, dtype, outputs):
    """Cotangents of the outputs' shapes: a half-precision op may still return float32 statistics."""
    generator = torch.Generator("cpu").manual_seed(len(sample.name) + 1)
    declared = {t.name: getattr(torch, t.dtype, dtype) if t.dtype else dtype for t in spec.declared.declaration.outputs}
    return tuple(
        torch.randn(o.shape, generator=generator, dtype=torch.float32).to(declared[n])
        for n, o in zip(spec.outputs, outputs, strict=True)
    )


@lru_cache(maxsize=4)
def sample_oracle(spec_name, sample_name, dtype):
    """Oracle of a registered spec's sample. Tests that share a sample run next to each other, so a few entries do."""
    from effvit.testing import get_spec

    spec = get_spec(spec_name)
    sample = spec.sample(sample_name)
    args, kwargs = sample.build(dtype)
    grads = partial(random_output_grads, spec, sample, dtype) if spec.backward_call else None
    return oracle_of(spec, args, kwargs, grads)
