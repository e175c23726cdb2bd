"""rnn_scan: the shared suite; torch.nn.LSTM and torch.nn.GRU; the sLSTM without its stabiliser; states handed on."""

import pytest
import torch

import effvit
from effvit._accuracy import assert_bitwise_equal
from effvit.reference.rnn_scan import CELLS, GATES, STATES
from effvit.reference.rnn_scan import rnn_scan as reference
from effvit.testing import backends
from effvit.testing.rnn_scan import SPEC
from op_suite import OpSuite


class TestRnnScan(OpSuite):
    spec = SPEC

    def test_public_function(self, framework_sample):
        """Its second result are the states after the last token; the cell has a name, by default the schema's first."""
        args, kwargs = framework_sample.build()
        out, trace = self.spec.op()(*args, **kwargs)
        name = CELLS[kwargs["cell"]]
        assert_bitwise_equal(effvit.rnn_scan(*args, cell=name), out)
        found = effvit.rnn_scan(*args, cell=name, return_state=True)
        assert_bitwise_equal(found[0], out)
        assert_bitwise_equal(found[1], trace[:, -1])
        if name == CELLS[0]:
            assert_bitwise_equal(effvit.rnn_scan(*args), out)


def _randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_definition_is_torchs(kind):
    """One head, with torch's parameters: output, states, and all gradients, in float64."""
    torch.manual_seed(0)
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](6, 7, batch_first=True).double()
    gates, states = GATES[kind], STATES[kind]
    tokens, initial = _randn(3, 5, 6).requires_grad_(), _randn(3, states, 1, 7, seed=2).requires_grad_()
    own = initial[:, 0].transpose(0, 1).contiguous()
    own = (own, initial[:, 1].transpose(0, 1).contiguous()) if kind == "lstm" else own
    expected, last = module(tokens, own)
    x = torch.nn.functional.linear(tokens, module.weight_ih_l0, module.bias_ih_l0).view(3, 5, gates, 1, 7)
    out, trace = reference(
        x, module.weight_hh_l0.view(1, gates, 7, 7), module.bias_hh_l0.view(gates, 1, 7), initial, cell=kind
    )
    torch.testing.assert_close(out[:, :, 0], expected, rtol=1e-12, atol=1e-14)
    last = torch.stack(last if kind == "lstm" else (last,), 1)  # [1, S, B, D]
    torch.testing.assert_close(trace[:, -1, :, 0], last[0].transpose(0, 1), rtol=1e-12, atol=1e-14)
    g, parameters = _randn(3, 5, 7, seed=3), (tokens, initial, *module.parameters())
    found = torch.autograd.grad((out[:, :, 0] * g).sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad((expected * g).sum(), parameters), rtol=1e-10, atol=1e-12)


def test_slstm_is_xlstms_without_a_stabiliser():
    """c and n by exp(i) and sigmoid(f), equations 8 to 13 of xLSTM, from a state of nothing; gradients too."""
    x, weight = _randn(2, 6, 4, 3, 5).requires_grad_(), (_randn(3, 4, 5, 5, seed=2) * 0.4).requires_grad_()
    h = c = n = torch.zeros(2, 3, 5, dtype=torch.float64)
    outs = []
    for t in range(6):
        i, f, z, o = (x[:, t, gate] + (weight[:, gate] @ h[..., None])[..., 0] for gate in range(4))
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outs.append(h)
    expected, g = torch.stack(outs, 1), _randn(2, 6, 3, 5, seed=3)
    out, trace = reference(x, weight, cell="slstm")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trace[:, -1, 2] * trace[:, -1, 3].exp(), n, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad((out * g).sum(), (x, weight))
    expected = torch.autograd.grad((expected * g).sum(), (x, weight))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_states_are_handed_on(cell):
    """A sequence in two calls is the sequence in one, bit for bit."""
    x = _randn(2, 6, GATES[cell], 2, 5, dtype=torch.float32)
    weight = _randn(2, GATES[cell], 5, 5, seed=2, dtype=torch.float32) * 0.4
    whole, last = effvit.rnn_scan(x, weight, cell=cell, return_state=True)
    first, state = effvit.rnn_scan(x[:, :4], weight, cell=cell, return_state=True)
    second, end = effvit.rnn_scan(x[:, 4:], weight, None, state, cell=cell, return_state=True)
    assert_bitwise_equal(torch.cat((first, second), 1), whole)
    assert_bitwise_equal(end, last)
    none, unchanged = effvit.rnn_scan(x[:, :0], weight, None, state, cell=cell, return_state=True)
    assert none.shape == (2, 0, 2, 5) and torch.equal(unchanged, state)
    _, start = effvit.rnn_scan(x[:, :0], weight, cell=cell, return_state=True)
    again, _ = effvit.rnn_scan(x, weight, None, start, cell=cell, return_state=True)
    assert_bitwise_equal(again, whole)


def test_heads_do_not_see_each_other():
    x, weight = _randn(2, 4, 4, 3, 5, dtype=torch.float32), _randn(3, 4, 5, 5, dtype=torch.float32) * 0.4
    x[0, 1, 2, 1, 3] = float("nan")
    for backend in backends("rnn_scan"):
        out = backend.forward(x.to(backend.device), weight.to(backend.device), None, None, cell=0)[0].cpu()
        touched = torch.zeros(out.shape, dtype=torch.bool)
        touched[0, 2:, 1], touched[0, 1, 1, 3] = True, True
        assert torch.equal(out.isnan(), touched), backend.name


def test_any_gates_of_the_slstm_stay_finite():
    """Pre-activations of a thousand, in both directions: the exponentials of xLSTM stay in range."""
    x = _randn(1, 30, 4, 1, 16, dtype=torch.float32) * 1000
    weight = _randn(1, 4, 16, 16, dtype=torch.float32) * 0.3
    for backend in backends("rnn_scan"):
        given = [t.to(backend.device) for t in (x, weight)]
        out, trace = backend.forward(*given, None, None, cell=2)
        back = backend.backward(torch.ones_like(out), None, *given, trace, None, None, cell=2)
        assert all(t.isfinite().all() for t in (out, trace, *back)), backend.name
        assert (out.abs() <= 1 + 1e-6).all()
