"""What PyTorch asks of an operator: opcheck, fake kernels, autocast, vmap, compilers, autograd. A part of OpSuite."""

import inspect

import pytest
import torch
import torch._dynamo.testing

import effvit
from effvit.ops._op import OPS
from effvit.testing import assert_bitwise_equal, assert_same_layout, oracle_of
from effvit.testing._oracle import random_output_grads
from effvit.testing._spec import as_tuple, differentiable_tensors, map_tensors, named_tensors, with_grad


def _has_cxx():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        return False
    return True


class FrameworkSuite:
    """The tests; ``spec`` is an effvit.testing.OpSpec."""

    spec = None

    def other_values(self, x, n):
        """Other values that the first tensor of a call may have."""
        return x * n if x.is_floating_point() else x ^ n

    # ---- what the dispatcher asks for -------------------------------------------------------------------------------

    def test_opcheck(self, framework_sample, opcheck):
        args, kwargs = framework_sample.build()
        dtypes = self.spec.output_dtypes(args, kwargs).values()
        if opcheck == "test_aot_dispatch_dynamic" and not all(d.is_floating_point for d in dtypes):
            pytest.skip("opcheck cannot differentiate beside an integer output")
        torch.library.opcheck(self.spec.op().default, with_grad(args), kwargs, test_utils=opcheck)

    def test_opcheck_backward(self):
        spec = self.spec
        if spec.backward_call is None:
            pytest.skip(f"{spec.name} has no gradient")
        args, kwargs = spec.tagged("framework")[0].build()
        with torch.no_grad():
            outputs = as_tuple(spec.op()(*args, **kwargs))
        bargs, bkwargs = spec.backward_call(args, kwargs, outputs, tuple(torch.randn_like(o) for o in outputs))
        torch.library.opcheck(spec.backward_op().default, bargs, bkwargs, test_utils=("test_schema", "test_faketensor"))

    def test_public_function(self, framework_sample):
        """It passes on all that it is given; what it leaves out has the schema's default."""
        spec = self.spec
        args, kwargs = framework_sample.build()
        public_kwargs = spec.public_kwargs(kwargs)
        if public_kwargs is None:
            pytest.skip("the public function has no such call")
        with torch.no_grad():
            expected = as_tuple(spec.op()(*args, **kwargs))
            results = as_tuple(spec.public()(*args, **public_kwargs))
        for name, result, e in zip(spec.outputs, results, expected, strict=True):
            assert_bitwise_equal(result, e, name=name)
        parameters = inspect.signature(spec.public()).parameters
        defaults = {a.name: a.default_value for a in spec.op().default._schema.arguments if a.has_default_value()}
        for name, default in spec.public_kwargs(defaults).items():
            if name not in defaults:
                continue
            public = parameters[name].default
            same = [public, public] if isinstance(default, list) and isinstance(public, int) else public
            assert same == default, f"{name} defaults to {public}, in the schema to {default}"

    def test_fake_and_meta(self, any_sample):
        if "huge" in any_sample.tags:
            pytest.skip("the same shapes at another size")
        from torch._subclasses.fake_tensor import FakeTensorMode

        args, kwargs = any_sample.build()
        with torch.no_grad():
            expected = as_tuple(self.spec.op()(*args, **kwargs))
            on_meta = as_tuple(self.spec.op()(*map_tensors(lambda t: t.to("meta"), args), **kwargs))
            with FakeTensorMode() as mode:
                fake_args = map_tensors(mode.from_tensor, args)
                fake = as_tuple(self.spec.op()(*fake_args, **kwargs))
        for name, real, m, f in zip(self.spec.outputs, expected, on_meta, fake, strict=True):
            assert m.device.type == "meta" and f.device == real.device
            assert_same_layout(m, real, name=name)
            assert_same_layout(f, real, name=name)

    def test_fake_ignores_strides(self, framework_sample):
        """A compiler traces an op on the strides that it plans for a tensor, and calls it with those of the program."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        spec = self.spec
        args, kwargs = framework_sample.build()
        with torch.no_grad():
            outputs = as_tuple(spec.op()(*args, **kwargs))
            calls = [(spec.op(), args, kwargs)]
            if spec.backward_call:
                cotangents = tuple(torch.randn_like(o) for o in outputs)
                calls.append((spec.backward_op(), *spec.backward_call(args, kwargs, outputs, cotangents)))
            for op, call_args, call_kwargs in calls:
                expected = as_tuple(op(*call_args, **call_kwargs))
                planned = map_tensors(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t, call_args)
                with FakeTensorMode() as mode:
                    fake = as_tuple(op(*map_tensors(mode.from_tensor, planned), **call_kwargs))
                for i, (f, e) in enumerate(zip(fake, expected, strict=True)):
                    assert_same_layout(f, e, name=f"result {i} of {op}")

    def test_autocast(self, framework_sample):
        spec = self.spec
        args, kwargs = framework_sample.build()
        leaves = with_grad(args)
        with torch.autocast("cpu", torch.bfloat16):
            results = as_tuple(spec.op()(*leaves, **kwargs))
        cast = tuple(
            a.to(torch.bfloat16) if a is not None and n in spec.autocast_tensors else a
            for n, a in zip(spec.tensors, args, strict=False)
        )
        with torch.no_grad():
            expected = as_tuple(spec.op()(*cast, **kwargs))
        for name, result, e in zip(spec.outputs, results, expected, strict=True):
            assert result.dtype == spec.output_dtypes(cast, kwargs)[name]
            assert_bitwise_equal(result, e, name=name)
        if spec.backward_call:
            inputs = differentiable_tensors(spec, leaves)
            sums = [r.float().sum() for r in results]
            grads = torch.autograd.grad(sums, list(inputs.values()), retain_graph=True)
            with torch.autocast("cpu", torch.bfloat16):
                within = torch.autograd.grad(sums, list(inputs.values()))
            for (name, leaf), g, w in zip(inputs.items(), grads, within, strict=True):
                assert g.dtype == leaf.dtype and torch.isfinite(g).all(), name
                assert_bitwise_equal(w, g, name=f"gradient of {name}, within autocast")
        # float64 is not a dtype that autocast touches, so it is refused as it is without; float16 autocast works.
        double = map_tensors(lambda t: t.double() if t.is_floating_point() else t, args)
        for enabled in (False, True) if any(t.is_floating_point() for t in named_tensors(spec, args).values()) else ():
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), pytest.raises(TypeError, match="float64"):
                spec.declared(*double, **kwargs)
        with torch.autocast("cpu", torch.float16), torch.no_grad():
            result = as_tuple(spec.op()(*args, **kwargs))[0]
        if spec.autocast_tensors:
            cast = tuple(a if a is None or a.dtype != torch.bfloat16 else a.to(torch.float16) for a in cast)
        assert result.dtype == next(iter(spec.output_dtypes(cast, kwargs).values()))

    def _stacked(self, args, names, n=3):
        """n calls' worth of the named arguments, stacked."""
        generator = torch.Generator().manual_seed(7)

        def stack(name, a):
            if name in self.spec.ordered:
                return torch.stack([a + 0.5 * i for i in range(n)])
            if not a.is_floating_point():
                return torch.stack([self.spec.rolled(a, i) for i in range(n)])
            if (a > 0).all():  # scales, say
                return torch.stack([a * (0.5 + torch.rand(a.shape, generator=generator)) for _ in range(n)])
            return torch.stack([a + 0.5 * torch.randn(a.shape, generator=generator) for _ in range(n)])

        return tuple(
            stack(name, a) if a is not None and name in names else a
            for name, a in zip(self.spec.tensors, args, strict=False)
        )

    def _check_vmap(self, args, kwargs, mapped):
        named = zip(self.spec.tensors, args, strict=False)
        in_dims = tuple(0 if a is not None and n in mapped else None for n, a in named)
        stacked = self._stacked(args, mapped)
        count = next(a.shape[0] for a, d in zip(stacked, in_dims, strict=True) if d == 0)

        def call(*a):
            return as_tuple(self.spec.op()(*a, **kwargs))

        def row(i):
            return tuple(a if d is None else a[i] for a, d in zip(stacked, in_dims, strict=True))

        expected = [call(*row(i)) for i in range(count)]
        for dim in (0, 1, -1):
            moved = tuple(a if d is None else a.movedim(0, dim) for a, d in zip(stacked, in_dims, strict=True))
            results = torch.vmap(call, in_dims=tuple(None if d is None else dim for d in in_dims))(*moved)
            for i, name in enumerate(self.spec.outputs):
                assert_bitwise_equal(results[i], torch.stack([e[i] for e in expected]), name=name)

    def test_vmap(self, framework_sample):
        args, kwargs = framework_sample.build()
        given = set(named_tensors(self.spec, args))
        leading = [n for n in self.spec.dynamic_dims if n in given]
        if leading:
            self._check_vmap(args, kwargs, set(leading))
            self._check_vmap(args, kwargs, set(leading[:1]))
        self._check_vmap(args, kwargs, given)
        for name in given - set(leading):
            self._check_vmap(args, kwargs, {name})

    def test_vmap_over_nothing(self, framework_sample):
        """A mapped dim of size 0 gives results of that size."""
        args, kwargs = framework_sample.build()
        expected = as_tuple(self.spec.op()(*args, **kwargs))
        none = map_tensors(lambda t: t.new_empty(0, *t.shape), args)
        in_dims = tuple(None if a is None else 0 for a in args)
        found = torch.vmap(lambda *a: as_tuple(self.spec.op()(*a, **kwargs)), in_dims)(*none)
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == e.dtype and f.shape == (0, *e.shape)

    def test_nested_vmap(self, framework_sample):
        args, kwargs = framework_sample.build()
        first, *rest = args
        other = self.other_values
        outer = torch.stack([torch.stack([other(first, 1 + i + 2 * j) for i in range(2)]) for j in range(2)])

        def call(x):
            return as_tuple(self.spec.op()(x, *rest, **kwargs))

        order = (2, 0, 1, *range(3, outer.ndim))
        results = torch.vmap(torch.vmap(call, in_dims=1), in_dims=1)(outer.permute(order).contiguous())
        for j in range(2):
            for i in range(2):
                for name, result, expected in zip(self.spec.outputs, results, call(outer[j, i]), strict=True):
                    assert_bitwise_equal(result[j, i], expected, name=name)

    def test_batched_gradients(self, framework_sample):
        """vmap of the backward: several cotangents at once, as a vectorised Jacobian asks."""
        spec = self.spec
        if spec.backward_call is None:
            pytest.skip(f"{spec.name} has no gradient")
        args, kwargs = framework_sample.build()
        leaves = with_grad(args)
        inputs = list(differentiable_tensors(spec, leaves).values())
        outputs = as_tuple(spec.op()(*leaves, **kwargs))
        one = random_output_grads(spec, framework_sample, torch.float32, outputs)
        many = [torch.stack((g, -0.5 * g, g.flip(0))) for g in one]
        found = torch.autograd.grad(outputs, inputs, many, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            expected = torch.autograd.grad(outputs, inputs, [g[i] for g in many], retain_graph=True)
            for name, f, e in zip(differentiable_tensors(spec, args), found, expected, strict=True):
                assert_bitwise_equal(f[i], e, name=f"gradient of {name}")

    # ---- compilers --------------------------------------------------------------------------------------------------

    def _loss_and_grads(self, function, args):
        leaves = with_grad(args)
        outputs = as_tuple(function(*leaves))
        if not self.spec.backward_call:
            return outputs, ()
        inputs = list(differentiable_tensors(self.spec, leaves).values())
        return outputs, torch.autograd.grad([(o.float() * o.float()).sum() for o in outputs], inputs)

    def _check_compiled(self, sample, backend):
        spec = self.spec
        args, kwargs = sample.build()
        args = map_tensors(lambda t: t.contiguous(), args)
        larger, _ = spec.resize(args, kwargs)
        frames = torch._dynamo.testing.CompileCounterWithBackend(backend)

        def function(*a):
            return spec.op()(self.other_values(a[0], 3), *a[1:], **kwargs)  # something to fuse

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=frames)
        for call_args in (args, larger):
            leaves = with_grad(call_args)
            for name, leaf in named_tensors(spec, leaves).items():
                for dim in spec.dynamic_dims.get(name, ()):
                    if leaf.shape[dim] > 1:
                        torch._dynamo.mark_dynamic(leaf, dim)
            results = as_tuple(compiled(*leaves))
            expected = as_tuple(function(*with_grad(call_args)))
            for name, result, e in zip(spec.outputs, results, expected, strict=True):
                assert_bitwise_equal(result, e, name=name)
            if spec.backward_call:
                _, e_grads = self._loss_and_grads(function, call_args)
                inputs = list(differentiable_tensors(spec, leaves).values())
                grads = torch.autograd.grad([(o.float() * o.float()).sum() for o in results], inputs)
                for i, (g, e) in enumerate(zip(grads, e_grads, strict=True)):
                    assert_bitwise_equal(g, e, name=f"gradient {i}")
        return frames.frame_count

    def test_compile_dynamic(self, framework_sample):
        args, _ = framework_sample.build()
        if not self.spec.dynamic_dims:
            assert self._check_compiled(framework_sample, "aot_eager") <= 2  # a program for each size
            return
        frames = self._check_compiled(framework_sample, "aot_eager")
        leading = next(iter(self.spec.dynamic_dims))
        dims = self.spec.dynamic_dims[leading]
        marked_all = all(args[self.spec.tensors.index(leading)].shape[d] > 1 for d in dims)
        assert frames == 1 if marked_all else frames <= 2  # a size of 1 is specialised by torch.compile itself

    def test_compile_inductor(self):
        if not _has_cxx():
            pytest.skip("torch.compile's inductor needs a C++ compiler")
        dims = self.spec.dynamic_dims.get(self.spec.tensors[0], ())
        sample = next(
            s for s in self.spec.tagged("framework") if min((s.build()[0][0].shape[d] for d in dims), default=2) > 1
        )
        assert self._check_compiled(sample, "inductor") == (1 if dims else 2)

    def _exported(self, op, args, kwargs, symbolic=(0, 1, 2, 3)):
        """(program of {name: tensor}, its symbolic dims)"""
        spec, declared = self.spec, OPS[op.__name__.split(".")[0]]

        class Module(torch.nn.Module):
            def forward(self, tensors):
                return op(*(tensors.get(n) for n in declared.names), **kwargs)

        tensors = {n: t for n, t in declared.given(args).items() if t is not None}
        shared, shapes = {}, {}
        for name in tensors:
            dims = [d for d in spec.dynamic_dims.get(name, ()) if d in symbolic and tensors[name].shape[d] > 1]
            shapes[name] = {d: shared.setdefault(d, torch.export.Dim(f"dim{d}", min=2, max=4096)) for d in dims}
        program = torch.export.export(Module(), (tensors,), dynamic_shapes=(shapes,), strict=False)
        assert any(node.target is op.default for node in program.graph.nodes)
        return program, tensors, set(shared)

    def _of_both_sizes(self, args, kwargs, dynamic):
        """The call, and the same call at another size of the symbolic dims."""
        yield args
        if not self.spec.dynamic_dims:
            return
        larger, _ = self.spec.resize(args, kwargs)
        cut = []
        for n, a, b in zip(self.spec.tensors, larger, args, strict=False):
            for d in self.spec.dynamic_dims.get(n, ()) if a is not None else ():
                a = a if d in dynamic else a.index_select(d, torch.arange(b.shape[d]) % a.shape[d])
            cut.append(a)
        yield tuple(cut)

    def test_export(self, framework_sample):
        spec = self.spec
        args, kwargs = framework_sample.build()
        args = map_tensors(lambda t: t.contiguous(), args)
        program, _, dynamic = self._exported(spec.op(), args, kwargs)
        for call_args in self._of_both_sizes(args, kwargs, dynamic):
            results = as_tuple(program.module()(named_tensors(spec, call_args)))
            expected = as_tuple(spec.op()(*call_args, **kwargs))
            for name, result, e in zip(spec.outputs, results, expected, strict=True):
                assert_bitwise_equal(result, e, name=name)

    def test_decompositions(self, framework_sample):
        """Core ATen operators only, which compute the same, forward and backward, at every batch size."""
        spec = self.spec
        args, kwargs = framework_sample.build()
        args = map_tensors(lambda t: t.contiguous(), args)
        if any(t.dtype == torch.int32 for t in named_tensors(spec, args).values()):
            pytest.skip("lengths that are data do not lower")

        def lowered(program):
            program = program.run_decompositions(effvit.decompositions())
            calls = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
            assert calls and all(c.namespace == "aten" for c in calls), {str(c) for c in calls}
            return program.module()

        program, _, dynamic = self._exported(spec.op(), args, kwargs, symbolic=(0,))
        module = lowered(program)
        for call_args in self._of_both_sizes(args, kwargs, dynamic):
            oracle = oracle_of(spec, call_args, kwargs, None)
            oracle.check_outputs(module(named_tensors(spec, call_args)))
        if spec.backward_call is None:
            return
        with torch.no_grad():
            outputs = as_tuple(spec.op()(*args, **kwargs))
            grads = random_output_grads(spec, framework_sample, torch.float32, outputs)
            bargs, bkwargs = spec.backward_call(args, kwargs, outputs, grads)
            program, tensors, _ = self._exported(spec.backward_op(), bargs, bkwargs, symbolic=())
            found = spec.split_gradients(lowered(program)(tensors), args, kwargs)
        oracle_of(spec, args, kwargs, grads).check_gradients(found)

    def test_jit_trace(self, framework_sample):
        """A trace holds the operator; sizes, which are tensors while tracing, may be options."""
        spec = self.spec
        args, kwargs = framework_sample.build()
        where = [i for i, a in enumerate(args) if a is not None]

        def call(*tensors):
            given = [None] * len(args)
            for i, t in zip(where, tensors, strict=True):
                given[i] = t
            return as_tuple(spec.declared(*given, **kwargs))

        traced = torch.jit.trace(call, tuple(args[i] for i in where), check_trace=False)
        assert f"effvit::{spec.name}" in str(traced.graph)
        larger, _ = spec.resize(args, kwargs)
        for call_args in (args, larger):
            expected = as_tuple(spec.op()(*call_args, **kwargs))
            for name, t, e in zip(spec.outputs, traced(*(call_args[i] for i in where)), expected, strict=True):
                assert_bitwise_equal(t, e, name=name)

    def test_flop_counter(self, framework_sample):
        from torch.utils.flop_counter import FlopCounterMode

        spec = self.spec
        args, kwargs = framework_sample.build()
        with FlopCounterMode(display=False) as forward:
            outputs = as_tuple(spec.op()(*with_grad(args), **kwargs))
        assert forward.get_total_flops() == spec.cost(args, kwargs).flops > 0
        if spec.backward_call:
            with FlopCounterMode(display=False) as backward:
                torch.autograd.backward(outputs, tuple(torch.ones_like(o) for o in outputs))
            assert backward.get_total_flops() == spec.cost(args, kwargs, backward=True).flops > 0

    def test_checkpoint(self, framework_sample):
        spec = self.spec
        if spec.backward_call is None:
            pytest.skip(f"{spec.name} has no gradient")
        args, kwargs = framework_sample.build()

        def call(*a):
            return spec.op()(*map_tensors(lambda t: t * 1.25 if t.is_floating_point() else t, a), **kwargs)

        def checkpointed(*a):
            return torch.utils.checkpoint.checkpoint(call, *a, use_reentrant=False)

        outputs, grads = self._loss_and_grads(checkpointed, args)
        e_outputs, e_grads = self._loss_and_grads(call, args)
        for i, (result, expected) in enumerate(zip((*outputs, *grads), (*e_outputs, *e_grads), strict=True)):
            assert_bitwise_equal(result, expected, name=f"value {i}")

    def test_autograd_equals_backward_op(self, framework_sample):
        """The gradients that users get are the backward op's, in the arguments' dtypes and shapes."""
        spec = self.spec
        if spec.backward_call is None:
            pytest.skip(f"{spec.name} has no gradient")
        args, kwargs = framework_sample.build()
        leaves = with_grad(args)
        outputs = as_tuple(spec.op()(*leaves, **kwargs))
        grads = random_output_grads(spec, framework_sample, torch.float32, outputs)
        inputs = differentiable_tensors(spec, leaves)
        found = dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), grads), strict=True))
        with torch.no_grad():
            bargs, bkwargs = spec.backward_call(args, kwargs, tuple(o.detach() for o in outputs), grads)
            expected = spec.split_gradients(spec.backward_op()(*bargs, **bkwargs), args, kwargs)
        for name, g in found.items():
            assert_bitwise_equal(g, expected[name], name=f"gradient of {name}")

    def test_gradients_only_where_asked(self, framework_sample):
        """Any one argument may require grad alone, and results do not change."""
        spec = self.spec
        if spec.backward_call is None:
            pytest.skip(f"{spec.name} has no gradient")
        args, kwargs = framework_sample.build()
        _, all_grads = self._loss_and_grads(lambda *a: spec.op()(*a, **kwargs), args)
        for g, name in zip(all_grads, differentiable_tensors(spec, args), strict=True):
            one = tuple(
                a.detach().requires_grad_(n == name) if a is not None else None
                for n, a in zip(spec.tensors, args, strict=False)
            )
            outputs = as_tuple(spec.op()(*one, **kwargs))
            (found,) = torch.autograd.grad(
                [(o.float() * o.float()).sum() for o in outputs], [one[spec.tensors.index(name)]]
            )
            assert_bitwise_equal(found, g, name=f"gradient of {name}")
