"""sparse24_formats: inverses, bit for bit what PyTorch's own conversion writes, CUTLASS's tables, and errors."""

import json
from pathlib import Path

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import effvit
from effvit import sparse24_formats
from effvit.testing import assert_bitwise_equal
from effvit.testing._sparse24 import sparse_weight

SM80_DTYPES = [torch.int8, torch.float16, torch.bfloat16]
SHAPES = [(32, 64), (64, 192), (96, 320), (160, 128)]
SM90 = json.loads((Path(__file__).parent / "data" / "sparse24_sm90.json").read_text())
UNALIGNED = [(1, 4), (5, 12), (17, 72), (33, 140), (70, 264), (0, 8), (3, 0)]


def _weight(n, k, dtype, keep=None):
    return sparse_weight(n, k, dtype, torch.Generator().manual_seed(n + k), keep)


@pytest.mark.parametrize("keep", [None, 0, 1, 2])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", SM80_DTYPES)
def test_sm80_is_what_pytorch_writes(dtype, n, k, keep):
    w = _weight(n, k, dtype, keep)
    found = sparse24_formats.pack(*effvit.sparse24_compress(w), format="sm80")
    for f, e in zip(found, sparse_semi_structured_from_dense_cutlass(w), strict=True):
        assert_bitwise_equal(f, e)
    assert_bitwise_equal(sparse_semi_structured_to_dense_cutlass(*found), w)


@pytest.mark.parametrize("dtype", SM80_DTYPES)
@pytest.mark.parametrize(("n", "k"), UNALIGNED)
def test_sm80_pads_with_zeros(dtype, n, k):
    w = _weight(n, k, dtype)
    values, metadata = sparse24_formats.pack(*effvit.sparse24_compress(w), format="sm80")
    rows, columns = (16, 64) if dtype == torch.int8 else (32, 32)
    expected = torch.zeros(-(-n // rows) * rows, -(-k // columns) * columns, dtype=dtype)
    assert values.shape == (expected.shape[0], expected.shape[1] // 2)
    expected[:n, :k] = w
    if w.numel():
        assert_bitwise_equal(sparse_semi_structured_to_dense_cutlass(values, metadata), expected)


@pytest.mark.parametrize("case", SM90, ids=[f"{c['dtype']}-{c['tile_k']}" for c in SM90])
def test_sm90_is_where_cutlass_reads(case):
    """The tables that CUTLASS's own layouts printed: every byte of metadata, every value, and what is padding."""
    n, k, tile = case["m"], case["k"], case["tile_k"]
    for dtype in SM80_DTYPES[:1] if case["dtype"] == "int8" else SM80_DTYPES[1:]:
        values, meta = effvit.sparse24_compress(_weight(n, k, dtype))
        found, atoms = sparse24_formats.pack(values, meta, format="sm90" if tile == 128 else f"sm90_k{tile}")
        assert atoms.is_contiguous() and atoms.numel() == case["bytes"]
        offsets, atoms = torch.tensor(case["offsets"]), atoms.flatten()
        assert_bitwise_equal(atoms[offsets], meta)
        atoms[offsets] = 0xEE
        assert (atoms == 0xEE).all()
        places = case["value_offsets"]  # of (0, 0), (0, 1), (1, 0), (3, 5)
        assert found.is_contiguous() and list(found.shape) == case["values"]
        assert_bitwise_equal(found.flatten()[places], values[[0, 0, 1, 3], [0, 1, 0, 5]])
        assert_bitwise_equal(found[:, : k // 2], values)
        assert not found[:, k // 2 :].any()


@pytest.mark.parametrize("keep", [None, 0, 1, 2])
@pytest.mark.parametrize(
    ("format", "dtype", "n", "k"),
    [("cpu", torch.int8, 5, 12), ("cpu", torch.int8, 33, 76), ("cpu", torch.int8, 16, 0), ("sm80", torch.int8, 16, 64),
     *(("sm80", dtype, *shape) for dtype in SM80_DTYPES for shape in SHAPES),
     *(("sm80", dtype, 32, 96) for dtype in SM80_DTYPES[1:]),
     *((f, dtype, *shape) for f in ("sm80", "sm90", "sm90_k64") for dtype in SM80_DTYPES for shape in UNALIGNED),
     *(("sm90_k32", dtype, *shape) for dtype in SM80_DTYPES[1:] for shape in (*UNALIGNED, *SHAPES))],
)  # fmt: skip
def test_unpack_inverts_pack(format, dtype, n, k, keep):
    values, meta = effvit.sparse24_compress(_weight(n, k, dtype, keep))
    packed = sparse24_formats.pack(values, meta, format=format)
    for f, e in zip(sparse24_formats.unpack(packed, (n, k), format=format), (values, meta), strict=True):
        assert_bitwise_equal(f, e)


def test_zeros_that_were_kept_elsewhere():
    """Not what compress writes, and yet a weight: the same one comes back, in the canonical form."""
    values = torch.zeros(16, 32, dtype=torch.int8)
    values[:, ::2] = 5
    meta = torch.full((16, 8), 0b0100_0100, dtype=torch.uint8)
    for format in ("cpu", "sm80", "sm90", "sm90_k64"):
        packed = sparse24_formats.pack(values, meta, format=format)
        back = effvit.sparse24_decompress(*sparse24_formats.unpack(packed, (16, 64), format=format))
        assert_bitwise_equal(back, effvit.sparse24_decompress(values, meta))


def test_a_format_of_ones_own(monkeypatch):
    monkeypatch.setattr(sparse24_formats, "_FORMATS", dict(sparse24_formats._FORMATS))
    sparse24_formats.register_format("pair", lambda v, m: (v, m), lambda packed, n, k: packed)
    assert "pair" in sparse24_formats.formats()
    values, meta = effvit.sparse24_compress(_weight(4, 8, torch.float32))
    found = sparse24_formats.unpack(sparse24_formats.pack(values, meta, format="pair"), (4, 8), format="pair")
    assert found[0] is values and found[1] is meta
    with pytest.raises(ValueError, match="name must be none of cpu, sm80, .*, pair, which are taken, got 'pair'"):
        sparse24_formats.register_format("pair", lambda v, m: (v, m), lambda packed, n, k: packed)
    with pytest.raises(TypeError, match="unpack must be a function, got int"):
        sparse24_formats.register_format("other", lambda v, m: (v, m), 3)


def _good(dtype=torch.int8, n=32, k=64):
    return effvit.sparse24_compress(_weight(n, k, dtype))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "format must be one of cpu, sm80.*got 'sm70'",
         lambda: sparse24_formats.pack(*_good(), format="sm70")),
        (TypeError, "values must be int8, bfloat16 or float16 for sm80, got torch.float32",
         lambda: sparse24_formats.pack(*_good(torch.float32), format="sm80")),
        (TypeError, "values must be bfloat16 or float16 for sm90_k32, got torch.int8",
         lambda: sparse24_formats.pack(*_good(), format="sm90_k32")),
        (ValueError, r"metadata must be \[2, 1, 512\], got \[1, 1, 1024\]",  # the same bytes in another order
         lambda: sparse24_formats.unpack(
             sparse24_formats.pack(*_good(k=128), format="sm90"), (32, 128), format="sm90_k64")),
        (ValueError, "meta must be two positions i0 < i1",
         lambda: sparse24_formats.unpack(
             tuple(t.zero_() for t in sparse24_formats.pack(*_good(), format="sm90")), (32, 64), format="sm90")),
        (TypeError, "values must be int8, bfloat16 or float16 for sm90, got torch.float32",
         lambda: sparse24_formats.unpack(_good(torch.float32), (32, 64), format="sm90")),
        (TypeError, "values must be torch.int8, got torch.float16",
         lambda: sparse24_formats.pack(*_good(torch.float16), format="cpu")),
        (TypeError, "meta must be torch.uint8, got torch.int8",
         lambda: sparse24_formats.pack(_good()[0], _good()[1].view(torch.int8), format="sm80")),
        (ValueError, r"meta must be \[N, ceil\(K / 8\)\] = \[32, 8\]",
         lambda: sparse24_formats.pack(_good()[0], _good()[1][:, :3], format="sm80")),
        (ValueError, r"meta must be \[N, ceil\(K / 8\)\] = \[32, 8\]",
         lambda: sparse24_formats.pack(_good()[0], _good()[1][:16], format="sm80")),
        (ValueError, "meta must be two positions i0 < i1",
         lambda: sparse24_formats.pack(_good()[0], _good()[1] | 15, format="sm80")),
        (TypeError, r"shape must be \(N, K\), got 32",
         lambda: sparse24_formats.unpack(sparse24_formats.pack(*_good(), format="cpu"), 32, format="cpu")),
        (ValueError, r"packed must be \[3, 768\], got \[2, 768\]",
         lambda: sparse24_formats.unpack(sparse24_formats.pack(*_good(), format="cpu"), (48, 64), format="cpu")),
        (TypeError, r"packed must be \(values, metadata\) for sm80, got Tensor",
         lambda: sparse24_formats.unpack(sparse24_formats.pack(*_good(), format="cpu"), (32, 64), format="sm80")),
        (ValueError, r"values must be \[32, 64\], got \[32, 32\]",
         lambda: sparse24_formats.unpack(sparse24_formats.pack(*_good(), format="sm80"), (32, 128), format="sm80")),
        (TypeError, "metadata must be torch.int32, got torch.uint8",
         lambda: sparse24_formats.unpack(_good(), (32, 64), format="sm80")),
    ],
)  # fmt: skip
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()
