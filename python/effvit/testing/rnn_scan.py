"""rnn_scan's samples, bad inputs and error magnitudes."""

import torch

from effvit.reference.rnn_scan import CELLS, GATES, STATES
from effvit.reference.rnn_scan import rnn_scan as reference
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "rnn_scan"
LSTM, GRU, SLSTM = range(3)

# ---- samples -------------------------------------------------------------------------------------------------------


def _sample(
    name, B, L, H, D, *, cell=LSTM, bias=False, initial=False, size=1.0, layout=None, tags="", dtypes=FLOAT_DTYPES
):  # fmt: skip
    def make(dtype, device, generator):
        kind = CELLS[cell]
        x = torch.randn(B, L, GATES[kind], H, D, generator=generator) * size
        weight = torch.randn(H, GATES[kind], D, D, generator=generator) * (0.6 * D**-0.5)
        b = torch.randn(GATES[kind], H, D, generator=generator) * 0.5 if bias else None
        state = torch.randn(B, STATES[kind], H, D, generator=generator) * 0.5 if initial else None
        if initial and cell == SLSTM:
            state[:, 2] = state[:, 2].abs() + 0.5
        x, weight, b = (None if t is None else t.to(device, dtype) for t in (x, weight, b))
        state = None if state is None else state.to(device, torch.promote_types(dtype, torch.float32))
        if layout:
            x, weight, b, state = layout(x, weight, b, state)
        return (x, weight, b, state), {"cell": cell}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _strided(x, weight, bias, initial):
    return (
        in_order(x, (1, 3, 0, 2, 4)), in_order(weight, (1, 0, 2, 3)), None if bias is None else misaligned(bias),
        None if initial is None else in_order(initial, (1, 0, 2, 3)),
    )  # fmt: skip


def _misaligned(x, weight, bias, initial):
    return misaligned(x), misaligned(weight), bias, initial


# fmt: off
SAMPLES = [
    _sample("lstm_49", 3, 49, 2, 32, tags="vit"),
    _sample("gru_49", 5, 49, 1, 48, cell=GRU, bias=True, tags="vit"),
    _sample("slstm_49", 2, 49, 3, 24, cell=SLSTM, bias=True, tags="vit"),
    _sample("small_lstm", 2, 4, 2, 5, bias=True, initial=True, tags="small framework"),
    _sample("small_gru", 3, 3, 1, 6, cell=GRU, bias=True, initial=True, tags="small framework"),
    _sample("small_slstm", 2, 3, 2, 4, cell=SLSTM, tags="small framework"),
    _sample("small_slstm_state", 1, 4, 1, 17, cell=SLSTM, bias=True, initial=True, tags="small"),
    _sample("small_lstm_wide", 17, 2, 1, 33, tags="small"),
    _sample("tiny_lstm", 1, 2, 1, 2, bias=True, initial=True, tags="tiny"),
    _sample("tiny_gru", 1, 2, 1, 2, cell=GRU, bias=True, initial=True, tags="tiny"),
    _sample("tiny_slstm", 1, 2, 1, 2, cell=SLSTM, bias=True, initial=True, tags="tiny small"),
    _sample("slstm_far", 2, 20, 1, 16, cell=SLSTM, size=20.0, tags="nasty", dtypes=FLOAT_DTYPES[:1]),
    _sample("lstm_far", 2, 20, 1, 16, size=10.0, tags="nasty", dtypes=FLOAT_DTYPES[:2]),
    _sample("one_channel", 9, 5, 3, 1, cell=GRU, bias=True, tags="nasty"),
    _sample("strided", 3, 6, 2, 12, bias=True, initial=True, layout=_strided, tags="strided small"),
    _sample("misaligned", 2, 5, 2, 9, cell=GRU, layout=_misaligned, tags="strided"),
    _sample("empty_batch", 0, 5, 2, 4, tags="empty"),
    _sample("empty_tokens", 2, 0, 2, 4, cell=GRU, bias=True, initial=True, tags="empty"),
    _sample("huge_batch", 70001, 1, 1, 2, cell=GRU, tags="huge", dtypes=FLOAT_DTYPES[:1]),
]
# fmt: on


def random_sample(name, choose):
    """Any cell, sizes and layouts, small; `choose` is a random.Random."""
    return _sample(
        name, choose.choice((1, 2, 5, 9)), choose.choice((1, 2, 5, 8)), choose.randint(1, 3),
        choose.choice((1, 3, 8, 16, 17, 33)), cell=choose.randrange(3), bias=choose.random() < 0.6,
        initial=choose.random() < 0.5, layout=choose.choice((None, _strided, _misaligned)),
    )  # fmt: skip


# ---- error magnitudes ----------------------------------------------------------------------------------------------


def _largest(t, *dims):
    return t.abs().amax(dims, keepdim=True).expand_as(t) if t.numel() else t


# Of one step: pre-activations `pre` (of the GRU's n gate, the part of x and that of h), the sums of the absolute values
# of their terms `of`, the states before and after it, and the magnitudes of those before -> magnitudes of the states. A
# gate passes on what its pre-activation carries, times its slope.


def _lstm(pre, of, old, new, size):
    i, f, o = (torch.sigmoid(pre[gate]) for gate in (0, 1, 3))
    n, y = torch.tanh(pre[2]).abs(), torch.tanh(new[1]).abs()
    c = f * size[1] + f * (1 - f) * old[1].abs() * of[1] + i * n + i * (1 - i) * n * of[0] + i * (1 - n * n) * of[2]
    return o * y + o * (1 - o) * y * of[3] + o * (1 - y * y) * c, c


def _gru(pre, of, old, new, size):
    r, z, rec = torch.sigmoid(pre[0]), torch.sigmoid(pre[1]), pre[3].abs()
    n = torch.tanh(pre[2] + r * pre[3]).abs()
    n_size = n + (1 - n * n) * (of[2] + r * of[3] + r * (1 - r) * rec * of[0])
    return ((1 - z) * n_size + z * size[0] + z * (1 - z) * (n + old[0].abs()) * of[1],)


def _slstm(pre, of, old, new, size):
    f, n, o = torch.sigmoid(pre[1]), torch.tanh(pre[2]).abs(), torch.sigmoid(pre[3])
    kept = torch.nn.functional.logsigmoid(pre[1])
    of_kept = (1 - f) * of[1] - kept + size[3]
    kept, m = kept + old[3], new[3]
    m_size = torch.where(kept > pre[0], of_kept, of[0])
    i, forget = torch.exp(pre[0] - m), torch.exp(kept - m)
    i_size, forget_size = i * (1 + of[0] + m_size), torch.where(forget > 0, forget * (1 + of_kept + m_size), 0.0)
    c = forget * size[1] + forget_size * old[1].abs() + i_size * n + i * (1 - n * n) * of[2]
    d = forget * size[2] + forget_size * old[2] + i_size
    ratio = new[1].abs() / new[2]
    return (o + o * (1 - o) * of[3]) * ratio + o * (c + ratio * d) / new[2], c, d, m_size


_STEPS = (_lstm, _gru, _slstm)


def _state_sizes(x, weight, bias, initial, trace, cell):
    """Magnitudes of all states, [B, L, S, H, D]. States enter the next pre-activations with their true values."""
    (B, L, _, H, D), S = x.shape, trace.shape[2]
    first = initial
    if initial is None:
        first = x.new_zeros(B, S, H, D)
        if CELLS[cell] == "slstm":
            first[:, 3] = -torch.inf
    states = torch.cat((first[:, None], trace), 1)
    h = states[:, :L, 0]
    rec, of_rec = (torch.einsum("bthi,hgoi->btgho", a, w) for a, w in ((h, weight), (h.abs(), weight.abs())))
    if bias is not None:
        rec, of_rec = rec + bias, of_rec + bias.abs()
    pre, of = x + rec, x.abs() + of_rec
    if CELLS[cell] == "gru":
        pre = torch.cat((pre[:, :, :2], x[:, :, 2:], rec[:, :, 2:]), 2)
        of = torch.cat((of[:, :, :2], x[:, :, 2:].abs(), of_rec[:, :, 2:]), 2)
    size, sizes = first.abs().nan_to_num(posinf=0.0).unbind(1), []
    for t in range(L):
        of_step = (pre[:, t].unbind(1), of[:, t].unbind(1), states[:, t].unbind(1), states[:, t + 1].unbind(1))
        size = _STEPS[cell](*of_step, size)
        sizes.append(torch.stack(size, 1))
    return torch.stack(sizes, 1) if sizes else trace.abs()


def magnitudes(args, kwargs, output_grads, eps):
    """Of states, sums of the absolute values of their terms. Errors of gradients grow along the recurrence, and are
    differences of terms as large as any of their token: measured against the largest of it, over the batch, as a head
    may have one channel. Gradients of weights and bias are sums over tokens: of the absolute values of the gradients of
    pre-activations, times those of the state before."""
    x, weight, bias, initial = args
    leaves = [None if t is None else t.detach().requires_grad_() for t in args]
    out, trace = reference(*leaves, **kwargs)
    sizes = _state_sizes(*args, trace.detach(), kwargs["cell"])
    outputs = {"out": sizes[:, :, 0], "trace": sizes}
    if output_grads is None:
        return outputs, {}
    pairs = [(o, g) for o, g in zip((out, trace), output_grads, strict=True) if g is not None]
    given = [t for t in leaves if t is not None]
    results, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(results, given, grads, materialize_grads=True)
    found = dict(zip((n for n, t in zip(OPS[NAME].names, args, strict=True) if t is not None), found, strict=True))
    dx, h = _largest(found["x"], 2, 4), trace.detach()[:, :, 0].abs()
    start = torch.zeros_like(x[:, :1, 0]) if initial is None else initial[:, None, 0].abs()
    before = torch.cat((start, h), 1)[:, : x.shape[1]]
    gradients = {"x": _largest(found["x"], 0, 2, 3, 4), "weight": torch.einsum("btgho,bthi->hgoi", dx, before)}
    if bias is not None:
        gradients["bias"] = dx.sum((0, 1))
    if initial is not None:
        gradients["initial"] = _largest(found["initial"], 0, 1, 2, 3)
    return outputs, gradients


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def good_call():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 4, 2, 5), "weight": (2, 4, 5, 5), "bias": (4, 2, 5), "initial": (2, 2, 2, 5)}
    return {name: torch.randn(s, generator=generator) * 0.5 for name, s in shapes.items()} | {"cell": LSTM}


def _bad(name, match, **changes):
    def make():
        call = good_call()
        return split_call(call | {n: change(call[n]) for n, change in changes.items()}, OPS[NAME].names)

    return BadInput(name, make, ValueError, match, declared=True)


def _wide(t):
    return t.new_zeros(*t.shape[:-1], 1025)


BAD_INPUTS = [
    *declared_bad_inputs(NAME, good_call),
    _bad("gates", r"x must be \[B, L, 3, H, D\] for the cell gru, got", cell=lambda _: GRU),
    _bad("gates_of_lstm", r"x must be \[B, L, 4, H, D\] for the cell lstm, got", x=lambda t: t[:, :, :3],
         weight=lambda t: t[:, :3].contiguous()),
    _bad("no_columns", "x must have a head dim between 1 and 1024", x=lambda t: t[..., :0],
         weight=lambda t: t[..., :0, :0], bias=lambda t: t[..., :0], initial=lambda t: t[..., :0]),
    _bad("wide", "x must have a head dim between 1 and 1024", x=_wide, weight=lambda t: t.new_zeros(2, 4, 1025, 1025),
         bias=_wide, initial=_wide),
]  # fmt: skip


def resize(args, kwargs):
    x, weight, bias, initial = args
    x, initial = (None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in (x, initial))
    return (x, weight, bias, initial), kwargs


def public_kwargs(kwargs):
    return {"cell": CELLS[kwargs["cell"]]} if kwargs else {}


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)

    def call(B, L, H, D, cell):
        gates = GATES[CELLS[cell]]
        x = torch.randn(B, L, gates, H, D, generator=generator).to(dtype)
        return (x, (torch.randn(H, gates, D, D, generator=generator) * 0.1).to(dtype), None, None), {"cell": cell}

    return [("8x1024x4x64", *call(8, 1024, 4, 64, LSTM)), ("16x784x2x32 slstm", *call(16, 784, 2, 32, SLSTM)),
            ("12288x2x1x64", *call(12288, 2, 1, 64, LSTM))]  # fmt: skip


SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
