"""table_lookup: the shared suite, every byte on every backend, and what the public function adds."""

import numpy as np
import pytest
import torch

import effvit
from effvit.testing import backends
from effvit.testing.table_lookup import SPEC
from op_suite import ForwardSuite


class TestTableLookup(ForwardSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", [b.name for b in backends("table_lookup")])
    def test_every_byte(self, name):
        """NumPy's indexing, of every byte at every place of a vector, of samples and of 10,000 random rows."""
        backend = next(b for b in backends("table_lookup") if b.name == name)
        rng = np.random.default_rng(0)
        calls = [
            (*s.build()[0], s.build()[1]["signed"]) for s in SPEC.samples if not (backend.slow or "empty" in s.tags)
        ]
        for rows, columns in ((4, 300),) if backend.slow else ((256, 256), (256, 391), (10_000, 64)):
            x = (np.arange(columns) + np.arange(rows)[:, None]).astype(np.uint8)
            which = rng.integers(0, 7, rows, dtype=np.uint8)
            tables = rng.integers(0, 256, (7, 256), dtype=np.uint8)
            calls += [(*map(torch.from_numpy, (x, tables, which)), signed) for signed in (False, True)]
        for x, table, which, signed in calls:
            row = 0 if which is None else which.numpy()[..., None]
            index = x.numpy().view(np.int8).astype(int) + 128 if signed else x.numpy()
            expected = table.numpy()[row, index]
            given = [None if t is None else t.to(backend.device) for t in (x, table, which)]
            assert np.array_equal(backend.forward(*given, signed=signed).cpu().numpy(), expected)


@pytest.mark.parametrize("x_dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("table_dtype", [torch.int8, torch.uint8])
def test_bytes_with_and_without_a_sign(x_dtype, table_dtype):
    low = torch.iinfo(x_dtype).min
    x = torch.arange(low, low + 256, dtype=torch.int32).to(x_dtype)
    table = torch.randint(torch.iinfo(table_dtype).min, torch.iinfo(table_dtype).max + 1, (256,)).to(table_dtype)
    y = effvit.table_lookup(x, table)
    assert y.dtype == table_dtype and torch.equal(y, table)
    two = torch.stack((table, table.flip(0)))
    which = torch.tensor([1, 0], dtype=torch.uint8)
    assert torch.equal(effvit.table_lookup(torch.stack((x, x)), two, which), two.flip(0))


def test_wrong_dtypes():
    table = torch.zeros(256, dtype=torch.int8)
    with pytest.raises(TypeError, match="effvit::table_lookup: x must be torch.int8 or torch.uint8, got torch.int32"):
        effvit.table_lookup(torch.zeros(3, dtype=torch.int32), table)
    with pytest.raises(TypeError, match="table must be torch.int8 or torch.uint8, got torch.float32"):
        effvit.table_lookup(torch.zeros(3, dtype=torch.int8), table.float())
