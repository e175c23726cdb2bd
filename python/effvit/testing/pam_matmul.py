"""pam_matmul's samples and bad inputs."""

import dataclasses

import torch

from effvit.reference.pam_matmul import pam
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import OpSpec, Sample


def _sample(name, m, n, k, *, zeros=0.0, size=1.0, layout=None, tags=""):
    """zeros: how many of x and of the weight are 0; size: of float32 samples, also as an exponent that varies."""

    def make(dtype, device, generator):
        def numbers(rows):
            t = torch.randn(rows, k, generator=generator)
            if size != 1.0:
                t = t * torch.exp2(torch.randn(rows, k, generator=generator) * size).clamp(2.0**-100, 2.0**100)
            if zeros:
                t = torch.where(torch.rand(rows, k, generator=generator) < zeros, 0.0, t)
            return t.to(dtype)

        tensors = numbers(m), numbers(n)
        if layout is not None:
            tensors = tuple(map(layout, tensors))
        return tuple(t.to(device) for t in tensors), {}

    dtypes = (torch.float32,) if size != 1.0 else (torch.float32, torch.bfloat16, torch.float16)
    return Sample(name, make, frozenset(tags.split()), dtypes)


def _strided(t):
    wide = torch.zeros(2 * t.shape[0], t.shape[1] + 3, dtype=t.dtype)
    wide[::2, 3:] = t
    return wide[::2, 3:]


def random_sample(name, choose):
    return _sample(
        name, choose.choice((1, 2, 5, 7, 13, 40)), choose.choice((1, 3, 16, 17, 33)), choose.randint(1, 150),
        zeros=choose.choice((0.0, 0.0, 0.5)), layout=choose.choice((None, None, _strided)),
    )  # fmt: skip


SAMPLES = [
    _sample("deit_s_proj", 50, 384, 384, tags="vit"),
    _sample("one_row", 1, 100, 768, tags="vit"),
    _sample("after_relu", 20, 50, 200, zeros=0.5, tags="vit"),
    _sample("small", 7, 20, 36, tags="small framework"),
    _sample("small_zeros", 5, 18, 20, zeros=0.3, tags="small framework"),
    _sample("all_zeros", 5, 18, 20, zeros=1.0, tags="nasty small"),
    _sample("wide_range", 9, 20, 30, size=8.0, tags="nasty small"),
    _sample("wide_range_zeros", 9, 20, 30, size=6.0, zeros=0.2, tags="nasty"),
    *(_sample(f"rows_{m}", m, 33, 20, tags="small" if m == 3 else "") for m in (*range(1, 9), 12, 13, 33, 65)),
    *(_sample(f"columns_{n}", 3, n, 20, tags="small" if n < 3 else "") for n in (1, 2, 7, 8, 15, 16, 17, 33, 65)),
    *(_sample(f"depth_{k}", 4, 19, k, tags="small" if k < 5 else "") for k in (1, 2, 3, 15, 63, 64, 65, 127, 128, 300)),
    _sample("deep", 2, 5, 4100, tags="nasty"),
    _sample("strided", 6, 20, 28, layout=_strided, tags="strided small"),
    _sample("tiny", 2, 3, 4, tags="tiny small"),
    _sample("empty_rows", 0, 8, 12, tags="empty"),
    _sample("empty_columns", 4, 0, 12, tags="empty"),
    _sample("empty_depth", 4, 20, 0, tags="empty nasty small"),
    _sample("tall", 40_000, 3, 8, tags="huge"),
]  # fmt: skip


def magnitudes(args, kwargs, output_grads, eps):
    x, weight = args
    parts = [pam(part[:, None].abs(), weight[None].abs()).sum(-1) for part in x.split(512)]
    return {"out": torch.cat(parts) if parts else x.new_zeros(0, weight.shape[0])}, {}


def good_call():
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(6, 12, generator=generator), "weight": torch.randn(5, 12, generator=generator)}


def _bad_inputs():
    for bad in declared_bad_inputs("pam_matmul", good_call):  # the public function takes x of any rank
        rank = bad.name == "declared_x_rank_above"
        yield dataclasses.replace(bad, public=False) if rank else bad


SPEC = OpSpec(
    name="pam_matmul",
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=160,
    bad_inputs=list(_bad_inputs()),
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="M",
    resize=lambda args, kwargs: ((torch.cat((args[0], args[0].flip(0), args[0][:1])), args[1]), kwargs),
    memory_calls=lambda dtype: [("20000x768x96", (torch.randn(20_000, 96).to(dtype), torch.randn(768, 96).to(dtype)),
                                 {})],
)  # fmt: skip
