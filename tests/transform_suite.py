"""Derivatives of any order and mode, by autograd and by torch.func, of every operator. A part of OpSuite."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from effvit.testing import assert_bitwise_equal, assert_close_to_truth
from effvit.testing._spec import as_tuple


def _leaves(x):
    return torch.utils._pytree.tree_leaves(x)


ORDERS = {
    "forward over reverse": hessian,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
}


class TransformSuite:
    """The tests; ``spec`` is an effvit.testing.OpSpec."""

    spec = None

    def _floats(self, args):
        """Positions of the tensors that can be differentiated."""
        return [i for i, a in enumerate(args) if a is not None and a.is_floating_point()]

    def _of_floats(self, call, args, kwargs, where):
        """call as a function of the tensors at some positions -> the tuple of its outputs."""

        def function(*tensors):
            given = list(args)
            for i, t in zip(where, tensors, strict=True):
                given[i] = t
            return as_tuple(call(*given, **kwargs))

        return function

    def _loss(self, function):
        def loss(*tensors):
            outputs = function(*tensors)
            return sum((o**3 * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)

        return loss

    def _transformed(self, call, transform, args, kwargs, scalar):
        where = self._floats(args)
        function = self._of_floats(call, args, kwargs, where)
        return _leaves(transform(self._loss(function) if scalar else function, [args[i] for i in where]))

    def _check(self, sample, transform, *, dtype=torch.float32, scalar=False, nonzero=True, also=()):
        """transform(function, tensors) of the op beside that of its definition, the truth in float64.

        `also` are other ways to write the transform: more yardsticks.
        """
        args, kwargs = sample.build(dtype)

        def definition(t, transform=transform):
            cast = [a if a is None or not a.is_floating_point() else a.to(t) for a in args]
            return self._transformed(self.spec.reference, transform, cast, kwargs, scalar)

        truth = definition(torch.float64)
        yardsticks = functools.cache(lambda: [definition(dtype, f) for f in (transform, *also)])
        assert not nonzero or any(t.numel() and t.abs().max() > 0 for t in truth)
        found = self._transformed(self.spec.op(), transform, args, kwargs, scalar)
        eps = torch.finfo(dtype).eps
        for i, (x, t) in enumerate(zip(found, truth, strict=True)):
            magnitude = t.abs().max().expand_as(t) if t.numel() else t
            assert_close_to_truth(
                x, t, lambda i=i: [y[i] for y in yardsticks()], magnitude=magnitude, eps=eps, name=f"result {i}"
            )

    def _directions(self, tensors, seed=3):
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors)

    # ---- forward mode -----------------------------------------------------------------------------------------------

    def test_jvp(self, framework_sample):
        for dtype in framework_sample.dtypes[:2]:
            self._check(
                framework_sample, lambda f, t: jvp(f, tuple(t), self._directions(t)), dtype=dtype
            )  # fmt: skip

    def test_jvp_of_one_argument(self, framework_sample):
        """Each argument may have a tangent alone."""
        args, _ = framework_sample.build()
        for j in range(len(self._floats(args))):

            def transform(function, tensors, j=j):
                others = list(tensors)

                def one(x):
                    others[j] = x
                    return function(*others)

                return jvp(one, (tensors[j],), self._directions(tensors)[j : j + 1])[1]

            self._check(framework_sample, transform, nonzero=False)

    def test_forward_ad(self, framework_sample):
        """Without torch.func: the same tangents."""
        args, kwargs = framework_sample.build()
        where = self._floats(args)
        tensors = tuple(args[i] for i in where)
        function, directions = self._of_floats(self.spec.op(), args, kwargs, where), self._directions(tensors)
        expected = jvp(function, tensors, directions)
        with forward_ad.dual_level():
            duals = function(*map(forward_ad.make_dual, tensors, directions))
            found = [forward_ad.unpack_dual(d) for d in duals]
        for i, (f, primal, tangent) in enumerate(zip(found, *expected, strict=True)):
            assert_bitwise_equal(f.primal, primal, name=f"output {i}")
            assert_bitwise_equal(f.tangent, tangent, name=f"tangent {i}")

    def test_linearize(self, framework_sample):
        """A tangent by a graph that was made before."""

        def transform(function, tensors):
            outputs, linear = torch.func.linearize(function, *tensors)
            return outputs, linear(*self._directions(tensors))

        self._check(framework_sample, transform)

    def test_primal_is_the_kernels(self, framework_sample):
        args, kwargs = framework_sample.build()
        where = self._floats(args)
        tensors = tuple(args[i] for i in where)
        found, _ = jvp(self._of_floats(self.spec.op(), args, kwargs, where), tensors, self._directions(tensors))
        for i, (a, b) in enumerate(zip(found, as_tuple(self.spec.op()(*args, **kwargs)), strict=True)):
            assert_bitwise_equal(a, b, name=f"output {i}")

    # ---- reverse mode -----------------------------------------------------------------------------------------------

    def test_func_grad_is_autograds(self, framework_sample):
        """torch.func's gradients are those of the kernels, bit for bit, and so are per-sample gradients."""
        args, kwargs = framework_sample.build()
        where = self._floats(args)
        tensors = tuple(args[i] for i in where)
        function = self._of_floats(self.spec.op(), args, kwargs, where)
        loss, every = self._loss(function), tuple(range(len(where)))

        def by_autograd(tensors):
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(loss(*leaves), leaves)

        expected = by_autograd(tensors)
        outputs, pull = vjp(function, *tensors)
        cotangents = self._directions(outputs)
        leaves = [t.detach().requires_grad_() for t in tensors]
        pulled = torch.autograd.grad(function(*leaves), leaves, cotangents)
        for i, (a, b, c, d) in enumerate(
            zip(grad(loss, every)(*tensors), expected, pull(cotangents), pulled, strict=True)
        ):
            assert_bitwise_equal(a, b, name=f"gradient {i} by grad")
            assert_bitwise_equal(c, d, name=f"gradient {i} by vjp")
        several = [torch.stack((t, t * 0.5, t * 1.25)) for t in tensors]
        found = vmap(grad(loss, every))(*several)
        for j in range(3):
            for i, (a, b) in enumerate(zip(found, by_autograd([t[j] for t in several]), strict=True)):
                if self.spec.backward_call:
                    assert_bitwise_equal(a[j], b, name=f"gradient {i} of sample {j}")
                else:  # by the definition, whose sums PyTorch may group otherwise for several samples
                    torch.testing.assert_close(a[j], b)

    def test_func_grad_under_autocast(self, framework_sample):
        args, kwargs = framework_sample.build()
        where = self._floats(args)
        tensors = tuple(args[i] for i in where)
        loss = self._loss(lambda *t: tuple(o.float() for o in self._of_floats(self.spec.op(), args, kwargs, where)(*t)))
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.autograd.grad(loss(*leaves), leaves)
            found = grad(loss, tuple(range(len(where))))(*tensors)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_bitwise_equal(a, b, name=f"gradient {i}")

    def test_double_backward(self, framework_sample):
        """A gradient penalty: autograd through the gradients of all arguments."""

        def penalty(loss, tensors):
            leaves = [t.detach().requires_grad_() for t in tensors]
            gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

        self._check(framework_sample, penalty, scalar=True)

    def test_first_order_with_create_graph_is_the_kernels(self, framework_sample):
        args, kwargs = framework_sample.build()
        where = self._floats(args)
        loss = self._loss(self._of_floats(self.spec.op(), args, kwargs, where))
        leaves = [args[i].detach().requires_grad_() for i in where]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for i, (a, b) in enumerate(
            zip(torch.autograd.grad(loss(*leaves), leaves, create_graph=True), expected, strict=True)
        ):
            assert_bitwise_equal(a, b, name=f"gradient {i}")

    def test_double_backward_with_saved_tensor_hooks(self, framework_sample):
        def penalty(loss, tensors):
            with torch.autograd.graph.save_on_cpu():
                leaves = [t.detach().requires_grad_() for t in tensors]
                gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
                return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

        self._check(framework_sample, penalty, scalar=True)

    def test_forward_mode_over_autograd(self, framework_sample):
        """Gradients of leaves that have tangents, and tangents of cotangents: all in forward_ad, without torch.func."""

        def transform(function, tensors):
            directions = self._directions(tensors)
            with forward_ad.dual_level():
                leaves = [t.detach().requires_grad_() for t in tensors]
                duals = [forward_ad.make_dual(t, d) for t, d in zip(leaves, directions, strict=True)]
                outputs = function(*duals)
                cotangents = [forward_ad.make_dual(c, c * 0.5) for c in self._directions(outputs, seed=5)]
                found = torch.autograd.grad(outputs, leaves, cotangents)
                plain = torch.autograd.grad(function(*leaves), leaves, cotangents)
                return [tuple(forward_ad.unpack_dual(g)) for g in (*found, *plain)]

        self._check(framework_sample, transform)

    def test_functionalize_with_captured_tensors(self, framework_sample):
        args, kwargs = framework_sample.build()
        first, *rest = args
        call = lambda x: as_tuple(self.spec.op()(x, *rest, **kwargs))
        for i, (a, b) in enumerate(zip(torch.func.functionalize(call)(first), call(first), strict=True)):
            assert_bitwise_equal(a, b, name=f"output {i}")

    # ---- Jacobians and Hessians -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("mode", [jacrev, jacfwd])
    def test_jacobian(self, tiny_sample, mode):
        self._check(tiny_sample, lambda f, t: mode(f, tuple(range(len(t))))(*t))

    @pytest.mark.parametrize("order", list(ORDERS))
    def test_hessian(self, tiny_sample, order):
        """Of one argument at a time; by both modes in every order."""
        args, _ = tiny_sample.build()

        def of(second, j):
            return lambda loss, t: second(lambda x: loss(*t[:j], x, *t[j + 1 :]))(t[j])

        for j in range(len(self._floats(args))):
            also = [of(second, j) for name, second in ORDERS.items() if name != order]
            self._check(tiny_sample, of(ORDERS[order], j), scalar=True, also=also)

    def test_third_derivative(self, tiny_sample):
        """Along a direction twice, then the gradient, in every order."""

        def in_order(*steps):
            def transform(loss, tensors):
                (direction,) = self._directions(tensors[:1])

                def along(f):
                    return lambda x: jvp(f, (x,), (direction,))[1]

                f = lambda x: loss(x, *tensors[1:])
                for step in steps:
                    f = grad(f) if step == "grad" else along(f)
                return f(tensors[0])

            return transform

        orders = [
            in_order(*steps) for steps in (("jvp", "jvp", "grad"), ("jvp", "grad", "jvp"), ("grad", "jvp", "jvp"))
        ]
        for i, transform in enumerate(orders):
            self._check(tiny_sample, transform, scalar=True, also=orders[:i] + orders[i + 1 :])
