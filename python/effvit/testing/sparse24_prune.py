"""sparse24_prune's samples, bad inputs and error magnitudes."""

import torch

from effvit.ops._sparse24 import ALGORITHMS
from effvit.reference.sparse24_mask import sparse24_mask
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._sparse24 import transposed
from effvit.testing._spec import BadInput, OpSpec
from effvit.testing.sparse24_mask import TRANSPOSABLE, odd_shapes, resize, weight_sample


class _Prune(torch.autograd.Function):
    """The formulas of the docstring, the gradient with its pull, in any float dtype."""

    @staticmethod
    def forward(ctx, w, algorithm, strength, decay):
        mask = sparse24_mask(w, algorithm=ALGORITHMS[algorithm]).to(w.dtype)
        ctx.save_for_backward(w, mask)
        ctx.strength = strength
        return (mask + decay * (1 - mask)) * w

    @staticmethod
    def backward(ctx, grad):
        w, mask = ctx.saved_tensors
        return grad + ctx.strength * (1 - mask) * w, None, None, None


def _sample(name, n, k, algorithm=0, strength=2e-4, decay=0.0, **rest):
    return weight_sample(name, n, k, {"algorithm": algorithm, "strength": strength, "decay": decay}, **rest)


def random_sample(name, choose):
    return _sample(
        name, 4 * choose.randint(1, 8), 4 * choose.randint(1, 12), choose.randrange(2), choose.choice((0.0, 2e-4, 0.5)),
        choose.choice((0.0, 0.3, 1.0)), ties=choose.random() < 0.5, layout=choose.choice((None, transposed)),
    )  # fmt: skip


def magnitudes(args, kwargs, output_grads, eps):
    w = args[0].abs()
    gradients = {} if output_grads is None else {"w": output_grads[0].abs() + kwargs["strength"] * w}
    return {"out": w}, gradients


def good_call():
    w = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    return {"w": w, "algorithm": 0, "strength": 2e-4, "decay": 0.5}


def _public_kwargs(kwargs):
    return kwargs | ({"algorithm": ALGORITHMS[kwargs["algorithm"]]} if "algorithm" in kwargs else {})


SPEC = OpSpec(
    name="sparse24_prune",
    samples=[
        _sample("deit_s_fc1", 1536, 384, tags="vit"),
        _sample("deit_s_fc2_transposable", 384, 1536, TRANSPOSABLE, strength=0.1, tags="vit"),
        _sample("small", 7, 20, 0, 0.25, tags="small framework"),
        _sample("small_decay", 6, 16, 0, 0.1, 0.5, tags="small framework"),
        _sample("small_transposable", 8, 20, TRANSPOSABLE, 0.25, 0.5, tags="small"),
        _sample("no_pull", 8, 16, strength=0.0, tags="nasty small"),
        _sample("all", 8, 16, decay=1.0, tags="nasty small"),
        _sample("ties", 40, 24, TRANSPOSABLE, strength=1.0, ties=True, tags="nasty small"),
        _sample("one", 1, 4, decay=0.3, tags="nasty small"),
        _sample("transposed", 16, 8, layout=transposed, tags="strided"),
        _sample("empty", 0, 8, tags="empty"),
        _sample("no_depth", 4, 0, tags="nasty empty"),
    ],
    definition=lambda w, algorithm, strength, decay: _Prune.apply(w, algorithm, strength, decay),
    random_sample=random_sample,
    random_calls=80,
    bad_inputs=[
        *declared_bad_inputs("sparse24_prune", good_call),
        *odd_shapes(lambda algorithm: {"algorithm": algorithm} if algorithm else {}),
        BadInput("decay_above_1", lambda: ((torch.zeros(4, 4),), {"decay": 1.5}), ValueError,
                 "decay must be at most 1, got 1.5"),
    ],
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="N",
    resize=resize,
    public_kwargs=_public_kwargs,
)  # fmt: skip
