"""block_sparse_int8_linear's samples and bad inputs."""

import torch

from effvit.ops.block_sparse_int8_linear import OP
from effvit.reference.block_sparse_linear import dense_weight
from effvit.testing import _int8
from effvit.testing._spec import BadInput, OpSpec, split_call
from effvit.testing.block_sparse_linear import structure


def weights(block, density=0.5):
    """n, k, generator -> (values, crow, columns); at least one block where there may be any."""

    def make(n, k, generator):
        crow, columns = structure(n // block, k // block, density, generator)
        if density and n and k and not len(columns):
            crow, columns = torch.ones_like(crow), torch.zeros(1, dtype=torch.int32)
            crow[0] = 0
        return _int8.integers((len(columns), block, block), generator, -128), crow, columns

    return make


def _either(n, k, generator):
    """Blocks of 32 where they fit."""
    return weights(32 if n % 32 == 0 and k % 32 == 0 else 16)(n, k, generator)


def _dense(x, values, crow, columns, x_scale, w_scale):
    return x, dense_weight(values, crow, columns, x.shape[1])


def _worst(tensors):
    """The largest sums that there are."""
    x, values, *rest = tensors
    return (torch.full_like(x, -128), torch.full_like(values, 127), *rest)


SAMPLES = [
    *_int8.standard_samples(_either, 16, 16),
    *(_int8.sample(f"{name}_{block}", 9, 64, 96, weights(block, density), activation=_int8.SILU, residual=True,
                   tags="nasty" + " small" * (block == 16) + " empty" * (density == 0))
      for block in (16, 32) for name, density in (("no_blocks", 0.0), ("dense", 1.0), ("sparse", 0.2))),
    *(_int8.sample(f"rows_{m}_32", m, 64, 96, weights(32), out=_int8.INT32, bias=False) for m in (1, 4, 8, 12, 13)),
    *(_int8.sample(f"worst_{block}", 5, block, 131072, weights(block, 1.0), out=_int8.INT32, bias=False, layout=_worst,
                   tags="nasty") for block in (16, 32)),
    _int8.sample("worst_wide", 60, 64, 4096, weights(32), out=_int8.INT32, bias=False, layout=_worst, tags="nasty"),
]  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    x, values = _int8.integers((6, 48), generator), _int8.integers((3, 16, 16), generator)
    x_scale, w_scale, bias, residual = _int8.epilogue_tensors(6, 32, 48, torch.float32, generator, residual=True)
    return {
        "x": x, "values": values, "crow": torch.tensor([0, 2, 3], dtype=torch.int32),
        "columns": torch.tensor([0, 2, 1], dtype=torch.int32), "x_scale": x_scale, "w_scale": w_scale, "bias": bias,
        "residual": residual, "activation": _int8.GELU, "out_dtype": 0, "out_scale": None,
    }  # fmt: skip


def _bad(name, argument, match, error=ValueError, **change):
    change = {n: torch.tensor(t, dtype=torch.int32) if isinstance(t, list) else t for n, t in change.items()}

    def make():
        return split_call({**good_call(), **change}, OP.names)

    return BadInput(name, make, error, f"{argument} must be {match}", declared=True)


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.int8)


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 20_000, 768, 96
    scales = _int8.epilogue_tensors(m, n, k, dtype, generator)
    out = _int8.DTYPES.index(dtype)
    call = (_int8.integers((m, k), generator), *weights(32)(n, k, generator), *scales)
    return [("20000x768x96", call, {"activation": 2, "out_dtype": out})]


SPEC = OpSpec(
    name="block_sparse_int8_linear",
    samples=SAMPLES,
    definition=_int8.unrounded(_dense),
    random_sample=_int8.random_call(_either, 16, 16),
    random_calls=160,
    bad_inputs=[
        *_int8.bad_inputs("block_sparse_int8_linear", good_call),
        _bad("x_width", "x", r"\[M, K\] with K a multiple of 16 like values \[3, 16, 16\]", x=_zeros(6, 40)),
        _bad("values_8", "values", r"\[Z, B, B\] with B 16 or 32, got \[3, 8, 8\]", values=_zeros(3, 8, 8)),
        _bad("values_float", "values", "torch.int8, got torch.float32", TypeError, values=torch.zeros(3, 16, 16)),
        _bad("crow_empty", "crow", r"\[N / B \+ 1\], got \[0\]", crow=[]),
        _bad("crow_short", "w_scale", r"\[N\] = \[16\] like crow and values, got \[32\]", crow=[0, 3]),
        _bad("crow_end", "crow", r"ascending from 0 to 3 .*got \[0, 2, 2\]", crow=[0, 2, 2]),
        _bad("columns_beyond", "columns", r"between 0 and 2, got 3 at \[1\]", columns=[0, 3, 1]),
        _bad("columns_back", "columns", r"ascending in each row of blocks, got 2, 0 at \[0\]", columns=[2, 0, 1]),
        _bad("too_deep", "x", r"\[M, K\] with K at most 131072", x=_zeros(6, 131088)),
    ],
    good_call=good_call,
    magnitudes=_int8.magnitudes(_dense),
    dynamic="M",
    resize=_int8.resize,
    public_kwargs=_int8.public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip
