"""Declarations: what they say, what they refuse; and torch's private interfaces, each on the torch at hand."""

import pytest
import torch

from effvit.ops import _dispatcher
from effvit.ops._declaration import backward_of, declare, join, solve, split, value
from effvit.ops._op import OPS

TEXT = "q: B L H D, k: B M H D, w?: H 2*r-1 | float strided -> out: B H L M, lse: B H L | float32"
OPTIONS = "window: int[2](r, s) in 1..9, gamma: float > 0 = 0.5, causal: bool = False"


def test_schema_and_text():
    d = declare("f", TEXT, OPTIONS)
    assert d.schema == (
        "f(Tensor q, Tensor k, Tensor? w=None, *, int[2] window, float gamma=0.5, bool causal=False) -> "
        "(Tensor out, Tensor lse)"
    )
    assert declare("f", d.text.split("(", 1)[1].split(";")[0] + " ->" + d.text.split("->")[1], OPTIONS) == d
    assert [t.name for t in d.main] == ["q", "k"] and d.first.name == "q"


def test_backward_of():
    d = backward_of(declare("f", TEXT, OPTIONS), ("out",))
    assert [t.text for t in d.tensors] == [
        "grad_out: B H L M", "grad_lse?: B H L | float32 packed", "q: B L H D", "k: B M H D", "out: B H L M | whole",
        "w?: H 2*r-1 | float strided",
    ]  # fmt: skip
    assert [t.text for t in d.outputs] == ["dq: B L H D", "dk: B M H D", "dw?: H 2*r-1 | float"]


def test_values_of_dims():
    dims = {"r": 4, "K'": 0, "...": (2, 3)}
    assert value("2*r-1", dims) == 7 and value("K'", dims) == 0 and value("5", dims) == 5
    assert solve("N+1", 6, dims) and dims["N"] == 5 and not solve("N+1", 7, dims)
    assert split(("...", "C"), (2, 3, 8)) == [("...", (2, 3)), ("C", 8)] and split(("B", "C"), (2,)) is None
    assert join(("...", "r"), dims) == [2, 3, 4]


@pytest.mark.parametrize(
    "text", ["q -> out: B", "q: B | float int32 -> out: B", "q: B -> out: B, x", "q: B | strided packed -> out: B"]
)
def test_malformed(text):
    with pytest.raises(ValueError, match="must"):
        declare("f", text)
    with pytest.raises(ValueError, match="must"):
        declare("f", "q: B -> out: B", "x: complex")


def test_an_expression_is_not_a_program():
    with pytest.raises(ValueError, match="a dim must be"):
        value("__import__('os')", {})


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_its_declarations_schema(name):
    assert str(OPS[name].overload._schema) == str(torch._C.parse_schema(f"effvit::{OPS[name].schema}"))


def test_autograd_below_autograd():
    """Inside a kernel the dispatcher has left autograd; there gradients can be recorded again."""
    found = []
    library = torch.library.Library("effvit_test", "DEF")
    library.define("kernel(Tensor x) -> Tensor")

    def kernel(x):
        with _dispatcher.autograd_below_autograd():
            leaf = x.detach().requires_grad_()
            found.append(torch.autograd.grad((leaf * leaf).sum(), leaf)[0])
        return x.clone()

    library.impl("kernel", kernel, "CompositeExplicitAutograd")
    torch.ops.effvit_test.kernel(torch.tensor([3.0]))
    assert found[0].item() == 6.0


def test_sees_conjugates():
    """In a dispatch mode torch leaves conjugate views unresolved inside of a kernel."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    library = torch.library.Library("effvit_test", "FRAGMENT")
    library.define("conjugates(Tensor x) -> Tensor")
    library.impl("conjugates", _dispatcher.sees_conjugates(lambda x: x.conj() + 0), "CompositeExplicitAutograd")
    x = torch.tensor([1 + 2j])
    with Mode():
        found = torch.ops.effvit_test.conjugates(x)
    assert found.item() == torch.ops.effvit_test.conjugates(x).item() == 1 - 2j
