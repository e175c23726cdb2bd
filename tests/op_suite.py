"""Every test that an operator owes, written once: tests/ops/test_<op>.py subclasses OpSuite with the op's spec."""

import gc
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import random_calls
import torch
import torch._dynamo.testing
from framework_suite import FrameworkSuite
from transform_suite import TransformSuite

from effvit._accuracy import assert_rounded_truth
from effvit.testing import (
    FLOAT_DTYPES,
    assert_bitwise_equal,
    assert_close_to_truth,
    backends,
    oracle_of,
    sample_oracle,
)
from effvit.testing._backends import has_native_kernel, missing_backends
from effvit.testing._memory import can_measure
from effvit.testing._oracle import random_output_grads
from effvit.testing._spec import as_tuple, differentiable_tensors, map_tensors, named_tensors, with_grad

# Workers share the machine's cores; threads that wait for each other there cost far more than they save.
torch.set_num_threads(1)

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def _dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What takes seconds a sample, and says the same of each: how many samples of an operator `make test` tries it on.
COSTLY = {
    "test_decompositions": 1, "test_linearize": 1, "test_opcheck": 2, "test_compile_dynamic": 2, "test_export": 2,
    "test_nested_vmap": 2, "test_batched_gradients": 2, "test_emulator_in_other_orders": 2,
}  # fmt: skip

# `make test` runs a covering part of samples x dtypes x backends, `make test-all` the whole product.
EVERYTHING = os.environ.get("EFFVIT_TEST_ALL", "0") not in ("", "0")


def _compiled(spec):
    """(the best compiled kernels or, without any, the reference; the other compiled ones)"""
    found = [b for b in backends(spec.name) if not b.slow]
    best = [b for b in found if "emulated" not in b.name][-1]
    return best, [b for b in found[1:] if b is not best]


def _native(spec):
    """What framework tests run on: the best compiled kernels and one other."""
    best, others = _compiled(spec)
    return [best, *(others if EVERYTHING else others[-1:])]


def _dtypes(spec, sample, place, backend):
    """The dtypes in which a backend takes a sample: the best one every dtype, each other one the samples once, with
    dtypes in turn; emulated GPU kernels and interpreted ones take small samples.
    """
    if backend.slow and "small" not in sample.tags:
        return ()
    if backend.name == "reference" and not (FLOAT_DTYPES[0] in sample.dtypes or spec.definition):
        return ()  # it is the truth itself: tests/int_oracle.py is there for it
    best, others = _compiled(spec)
    if backend is best or (EVERYTHING and backend in others) or (EVERYTHING and "framework" in sample.tags):
        return sample.dtypes
    if backend.name == "reference" or (backend.slow and sample.dtypes != FLOAT_DTYPES):
        return sample.dtypes[:1]
    order = backends(spec.name).index(backend)
    return (sample.dtypes[(place + order) % len(sample.dtypes)],)


def _group(spec, sample, dtype):
    """Tests of one call run in one process, next to each other: they share its oracle."""
    return pytest.mark.xdist_group(f"{spec.name}-{sample.name}-{_dtype_name(dtype)}")


def _accuracy_cases(spec):
    """Sample-major; cases that share an oracle run in one process, next to each other."""
    listed = backends(spec.name)
    for place, sample in enumerate(spec.samples):
        chosen = {b.name: _dtypes(spec, sample, place, b) for b in listed}
        for dtype in sample.dtypes:
            group = _group(spec, sample, dtype)
            for backend in listed:
                if dtype in chosen[backend.name]:
                    name = f"{sample.name}-{_dtype_name(dtype)}-{backend.name}"
                    yield pytest.param(sample, dtype, backend, id=name, marks=group)


class ForwardSuite(FrameworkSuite):
    """The tests of an op without derivatives: of integers. ``spec`` is an effvit.testing.OpSpec."""

    spec = None

    def pytest_generate_tests(self, metafunc):
        spec, names = self.spec, set(metafunc.fixturenames)
        if {"sample", "dtype", "backend"} <= names:
            metafunc.parametrize("sample, dtype, backend", list(_accuracy_cases(spec)))
        elif {"native", "framework_sample"} <= names:
            cases = [(s, b) for s in spec.tagged("framework") for b in _native(spec)]
            cases = [pytest.param(*c, id=f"{c[0].name}-{c[1].name}") for c in cases]
            metafunc.parametrize("framework_sample, native", cases)
        elif "framework_sample" in names:
            samples = spec.tagged("framework")
            if not EVERYTHING:
                samples = samples[: COSTLY.get(metafunc.function.__name__)]
            metafunc.parametrize("framework_sample", samples, ids=[s.name for s in samples])
        elif "tiny_sample" in names:
            samples = spec.tagged("tiny")
            metafunc.parametrize("tiny_sample", samples, ids=[s.name for s in samples])
        elif "any_sample" in names:
            chosen = spec.samples
            if metafunc.function.__name__ == "test_magnitude_bounds_truth" and spec.magnitudes is None:
                chosen = []  # errors are measured against the truth
            cases = [pytest.param(s, id=s.name, marks=_group(spec, s, torch.float32)) for s in chosen]
            metafunc.parametrize("any_sample", cases)
        elif "bad" in names:
            metafunc.parametrize("bad", spec.bad_inputs, ids=[b.name for b in spec.bad_inputs])
        if "chunk" in names:
            metafunc.parametrize("chunk", range(random_calls.CHUNKS))
        if "opcheck" in names:
            metafunc.parametrize("opcheck", OPCHECKS)
        if "route" in names:
            metafunc.parametrize("route", ["effvit.ops", "torch.ops"])

    # ---- results ----------------------------------------------------------------------------------------------------

    def test_results(self, sample, dtype, backend):
        """Outputs and gradients against the float64 reference."""
        spec = self.spec
        oracle = sample_oracle(spec.name, sample.name, dtype)
        args = map_tensors(lambda t: t.to(backend.device), oracle.args)
        results = as_tuple(backend.forward(*args, **oracle.kwargs))
        dtypes = spec.output_dtypes(args, oracle.kwargs)
        for name, result in zip(spec.outputs, results, strict=True):
            assert result.dtype == dtypes[name], f"{name} must be {dtypes[name]}, got {result.dtype}"
            assert result.is_contiguous(), f"{name} must be contiguous, got strides {result.stride()}"
        oracle.check_outputs(results)
        if spec.backward_call is None:
            return
        grads = map_tensors(lambda t: t.to(backend.device), oracle.output_grads)
        bargs, bkwargs = spec.backward_call(args, oracle.kwargs, results, grads)
        oracle.check_gradients(spec.split_gradients(backend.backward(*bargs, **bkwargs), args, oracle.kwargs))

    def test_random_calls(self, chunk):
        """Any options at once: what nobody thought of."""
        random_calls.run_chunk(self.spec, chunk)

    def test_backward_of_one_output(self, framework_sample, native):
        """Gradients with the other outputs unused: their cotangents arrive as None or zeros."""
        spec = self.spec
        args, kwargs = framework_sample.build()
        with torch.no_grad():
            outputs = as_tuple(spec.op()(*args, **kwargs))
        all_grads = random_output_grads(spec, framework_sample, torch.float32, outputs)
        for used in range(len(outputs)):
            if not outputs[used].is_floating_point():
                continue
            oracle = oracle_of(spec, args, kwargs, tuple(g if i == used else None for i, g in enumerate(all_grads)))
            leaves = with_grad(map_tensors(lambda t: t.to(native.device), args))
            inputs, grad = differentiable_tensors(spec, leaves), all_grads[used].to(native.device)
            with native.selected():
                result = as_tuple(spec.op()(*leaves, **kwargs))[used]
                found = torch.autograd.grad(result, list(inputs.values()), grad, materialize_grads=True)
            oracle.check_gradients(dict(zip(inputs, found, strict=True)))

    def test_emulator_in_other_orders(self, framework_sample):
        """Threads, warps and CTAs in other orders give the same bits: where a barrier is missing they do not."""
        from effvit.testing import emulator

        spec = self.spec
        found = [b for b in backends(spec.name) if b.name == "emu"]
        if not found or "small" not in framework_sample.tags:
            pytest.skip("only small samples are emulated" if found else "no emulator library with this op")
        args, kwargs = framework_sample.build()

        def run(seed):
            with emulator.seeded(seed):
                outputs = as_tuple(found[0].forward(*args, **kwargs))
                if spec.backward_call is None:
                    return outputs
                grads = random_output_grads(spec, framework_sample, torch.float32, outputs)
                bargs, bkwargs = spec.backward_call(args, kwargs, outputs, grads)
                return *outputs, *as_tuple(found[0].backward(*bargs, **bkwargs))

        natural = run(0)
        for seed in (1, 2):
            for i, (result, expected) in enumerate(zip(run(seed), natural, strict=True)):
                assert_bitwise_equal(result, expected, name=f"result {i} with seed {seed}")

    def test_magnitude_bounds_truth(self, any_sample):
        """What errors are measured against is finite and at least as large as the truth, or, where tensors are in half
        precision, than float32's part of it: results are rounded to half once, sums are not.
        """
        oracle = sample_oracle(self.spec.name, any_sample.name, torch.float32)
        pairs = [(oracle.outputs, oracle.output_magnitudes), (oracle.gradients, oracle.gradient_magnitudes)]
        share = min(1.0, torch.finfo(torch.float32).eps / oracle.eps)
        for truths, magnitudes in pairs:
            for name, m in magnitudes.items():
                assert torch.isfinite(m).all(), name
                assert (truths[name].abs() * share <= m * (1 + 1e-9) + 1e-300).all(), name

    def test_reference_gradcheck(self, tiny_sample):
        args, kwargs = tiny_sample.build(torch.float64)
        leaves = with_grad(args)
        inputs = list(differentiable_tensors(self.spec, leaves).values())

        def call(*tensors):
            given = iter(tensors)
            floats = (next(given) if a is not None and a.is_floating_point() else a for a in leaves)
            return self.spec.reference(*floats, **kwargs)

        assert torch.autograd.gradcheck(call, inputs)

    def test_every_backend_is_here_or_excused(self):
        """A missing implementation is a visible skip, never a silent one."""
        missing = missing_backends(self.spec.name)
        broken = {name: reason for name, reason in missing.items() if reason.startswith("broken")}
        assert not broken, broken
        if missing:
            pytest.skip("; ".join(f"{name}: {reason}" for name, reason in missing.items()))

    def test_cost(self, any_sample):
        args, kwargs = any_sample.build()
        cost = self.spec.cost(args, kwargs)
        empty = "empty" in any_sample.tags
        assert cost.flops > 0 or empty
        outputs = as_tuple(self.spec.reference(*args, **kwargs))
        once = [*named_tensors(self.spec, args).values(), *outputs]
        most = sum(t.numel() * t.element_size() for t in once)
        assert 0 <= cost.bytes <= most and (cost.bytes >= most // 2 or empty)

    # ---- determinism ------------------------------------------------------------------------------------------------

    def _everything(self, backend, sample, dtype):
        spec = self.spec
        oracle = sample_oracle(spec.name, sample.name, dtype)
        args = map_tensors(lambda t: t.to(backend.device), oracle.args)
        outputs = as_tuple(backend.forward(*args, **oracle.kwargs))
        if spec.backward_call is None:
            return outputs
        grads = map_tensors(lambda t: t.to(backend.device), oracle.output_grads)
        bargs, bkwargs = spec.backward_call(args, oracle.kwargs, outputs, grads)
        return (*outputs, *as_tuple(backend.backward(*bargs, **bkwargs)))

    def test_repeats_are_equal(self, framework_sample, native):
        if "small" not in framework_sample.tags:
            pytest.skip("small samples do; test_threads_are_equal takes the large one")
        for dtype in framework_sample.dtypes:
            first = self._everything(native, framework_sample, dtype)
            for _ in range(20):
                for i, (a, b) in enumerate(zip(self._everything(native, framework_sample, dtype), first, strict=True)):
                    assert_bitwise_equal(a, b, name=f"value {i}")

    def test_threads_are_equal(self, framework_sample, native):
        for dtype in framework_sample.dtypes:
            with threads(1):
                one = self._everything(native, framework_sample, dtype)
            for n in (2, 3):
                with threads(n):
                    many = self._everything(native, framework_sample, dtype)
                for i, (a, b) in enumerate(zip(many, one, strict=True)):
                    assert_bitwise_equal(a, b, name=f"value {i} with {n} threads")

    def test_concurrent_callers_are_equal(self, framework_sample, native):
        from concurrent.futures import ThreadPoolExecutor

        expected = self._everything(native, framework_sample, torch.float32)
        with native.selected(), ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(self._everything, native, framework_sample, torch.float32) for _ in range(8)]
            for run in runs:
                for i, (a, b) in enumerate(zip(run.result(), expected, strict=True)):
                    assert_bitwise_equal(a, b, name=f"value {i}")

    def test_inputs_are_not_written(self, framework_sample, native):
        spec = self.spec
        args, kwargs = framework_sample.build(device=native.device)
        copies = map_tensors(torch.clone, args)
        outputs = as_tuple(native.forward(*args, **kwargs))
        if spec.backward_call:
            grads = tuple(torch.ones_like(o) for o in outputs)
            saved = tuple(o.clone() for o in (*outputs, *grads))
            bargs, bkwargs = spec.backward_call(args, kwargs, outputs, grads)
            native.backward(*bargs, **bkwargs)
            for i, (a, b) in enumerate(zip((*outputs, *grads), saved, strict=True)):
                assert_bitwise_equal(a, b, name=f"output or cotangent {i}")
        for name, a, b in zip(spec.tensors, args, copies, strict=False):
            if a is not None:
                assert_bitwise_equal(a, b, name=name)

    # ---- bad input --------------------------------------------------------------------------------------------------

    def _function(self, bad, route):
        if route == "effvit.ops":
            return self.spec.public()
        return getattr(torch.ops.effvit, bad.op or self.spec.name)

    def test_bad_input(self, bad, route):
        if route == "effvit.ops" and not bad.public:
            pytest.skip("no public function, or one that takes more")
        if route == "torch.ops" and not bad.torch_ops:
            pytest.skip("torch's schema check converts the value before anybody sees it")
        errors = bad.error if isinstance(bad.error, tuple) else (bad.error,)
        match = f"effvit::{bad.op or self.spec.name}: {bad.match}"
        if route == "torch.ops":
            errors = (*errors, RuntimeError)
            if bad.schema_match is not None:
                match = f"(?:{match})|(?:{self.spec.name}.*{bad.schema_match})"
        args, kwargs = bad.make()
        if bad.declared and route == "effvit.ops":
            if self.spec.public_kwargs is not dict and kwargs != self.spec.good_input()[1]:
                pytest.skip("the public function's options are others")
            kwargs = self.spec.public_kwargs(kwargs)
        with pytest.raises(errors) as raised:
            self._function(bad, route)(*args, **kwargs)
        message = str(raised.value)
        assert re.search(match, message, re.DOTALL), f"message must match {match!r}, got {message!r}"
        good_args, good_kwargs = self.spec.good_input()
        for result in as_tuple(self.spec.op()(*good_args, **good_kwargs)):
            assert torch.isfinite(result).all()

    def test_bad_input_list_is_long(self):
        assert len(self.spec.bad_inputs) >= 4 * len(self.spec.op().default._schema.arguments)
        assert len({b.name for b in self.spec.bad_inputs}) == len(self.spec.bad_inputs)
        named = " ".join(b.match for b in self.spec.bad_inputs)
        for argument in self.spec.op().default._schema.arguments:
            assert re.search(rf"\b{argument.name}\b", named), f"no bad input for {argument.name}"

    def test_bad_input_under_autograd_and_fake(self):
        """The same refusal whichever way the dispatcher takes."""
        calls = [
            b for b in self.spec.bad_inputs if b.torch_ops and b.op is None and (b.schema_match is None or b.declared)
        ]
        seen = [b for b in calls if isinstance(b.make()[0][0], torch.Tensor) and not b.name.endswith("last_stride")]
        # Any shape may be right, any strides are to a fake kernel, but one dtype is always wrong.
        bad = next(b for b in seen if b.error is ValueError or b.name == f"declared_{self.spec.tensors[0]}_float64")
        args, kwargs = bad.make()
        errors = (TypeError, ValueError, RuntimeError)
        for variant in (with_grad(args), map_tensors(lambda t: t.to("meta"), args)):
            with pytest.raises(errors, match=bad.match):
                self.spec.op()(*variant, **kwargs)

    # ---- sharding ---------------------------------------------------------------------------------------------------

    def test_sharding(self, tmp_path):
        """DTensor over two processes, forward and backward, for every sharding of the spec."""
        if not torch.distributed.is_available():
            pytest.skip("torch.distributed is not built in")
        if not self.spec.shardings:
            pytest.skip(f"{self.spec.name} declares no sharding")
        command = [sys.executable, "-m", "effvit.testing._sharding", self.spec.name]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(tmp_path / "store")],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        try:
            logs = [rank.communicate(timeout=120)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(logs)[-4000:]
        cases = len(self.spec.shardings) * len(self.spec.tagged("framework"))
        assert logs[0].count(" ok\n") == cases

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _measure(self, *command, **environment):
        if not has_native_kernel(self.spec.name):
            pytest.skip("the reference materialises its windows; this is a promise of the compiled kernels")
        reason = can_measure()
        if reason:
            pytest.skip(reason)
        result = subprocess.run(
            [sys.executable, "-m", "effvit.testing._memory", self.spec.name, *command],
            capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    def test_peak_memory(self):
        """Outputs + a fixed scratch per thread, at any size."""
        # A fixed threshold, so that big blocks are always mapped fresh and returned at once.
        report = self._measure("peak", "2", "float32", "bfloat16", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="2")
        assert report["rows"]
        for row in report["rows"]:
            assert row["peak"] >= row["outputs"] * 0.9, f"the measurement missed the outputs: {row}"
            assert row["peak"] <= row["allowed"], row

    def test_no_leak(self):
        found = self._measure("leak")["leaks"]
        planted = found.pop("planted")
        assert planted >= 60, f"the measurement must see a planted leak of 64 bytes per call, saw {planted}"
        for what, size in found.items():
            assert size < 8, f"{what}: {size} bytes per call are not returned"

    def test_no_reference_cycle(self):
        """Saved tensors die with the outputs: no cycle keeps activations until the garbage collector runs."""
        import weakref

        spec = self.spec
        args, kwargs = spec.tagged("framework")[0].build()
        leaves = with_grad(args)
        gc.collect()
        gc.disable()
        try:
            outputs = as_tuple(spec.op()(*leaves, **kwargs))
            watch = [weakref.ref(o) for o in outputs]
            if outputs[0].requires_grad:
                outputs[0].sum().backward()
            del outputs
            assert all(w() is None for w in watch)
        finally:
            gc.enable()

    # ---- the rule itself --------------------------------------------------------------------------------------------

    def test_suite_sees_planted_errors(self):
        """Every output and every gradient, wrong in one element, is refused."""
        spec = self.spec
        sample = spec.tagged("framework")[0]
        for dtype in sample.dtypes:
            oracle = sample_oracle(spec.name, sample.name, dtype)
            dtypes = spec.output_dtypes(oracle.args, oracle.kwargs)
            integers = {n: d for n, d in dtypes.items() if not d.is_floating_point}
            rows = [(oracle.outputs, oracle.output_yardsticks, oracle.output_magnitudes)]
            rows.append((oracle.gradients, oracle.gradient_yardsticks, oracle.gradient_magnitudes))
            for truths, yardsticks, magnitudes in rows:
                for name, truth in truths.items():
                    if name in integers:
                        info, truth = torch.iinfo(integers[name]), truth.double()
                        assert_rounded_truth(truth.round().clamp(info.min, info.max).to(integers[name]), truth)
                        with pytest.raises(AssertionError, match="wrong"):
                            wrong = truth.round().clamp(info.min, info.max - 1)
                            wrong.view(-1)[truth.numel() // 2] += 1
                            assert_rounded_truth(wrong.to(integers[name]), truth)
                        continue
                    assert_close_to_truth(
                        truth.to(dtype), truth, yardsticks[name], magnitude=magnitudes.get(name), eps=oracle.eps
                    )
                    wrong = truth.clone(memory_format=torch.contiguous_format)
                    wrong.view(-1)[truth.numel() // 2] += 0.5 * float(truth.abs().max())
                    with pytest.raises(AssertionError, match="error"):
                        assert_close_to_truth(
                            wrong.to(dtype), truth, yardsticks[name], magnitude=magnitudes.get(name), eps=oracle.eps
                        )


class OpSuite(ForwardSuite, TransformSuite):
    """All tests of an operator."""
