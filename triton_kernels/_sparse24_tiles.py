"""2:4-sparse int8 weights in registers: dense tiles from the canonical form.

A group of four neighbours along K has two kept values, at positions i0 < i1; a nibble of meta is i0 | i1 << 2.
"""

from ._common import device_function, tl


@device_function
def _load_positions(rows, byte, K8):
    """(i0, i1) of two groups a byte: [rows, 2 * bytes]. `rows` are pointers, [rows, 1]."""
    pair = tl.load(rows + byte[None, :], mask=(byte < K8)[None, :], other=0).to(tl.int32)
    nibble = tl.reshape(tl.join(pair & 15, pair >> 4), [pair.shape[0], 2 * pair.shape[1]])
    return nibble & 3, nibble >> 2


@device_function
def _load_values(rows, index, K2):
    """Kept values, 0 where there are none."""
    return tl.load(rows + index[None, :], mask=(index < K2)[None, :], other=0)


@device_function
def _expand(values, i0, i1):
    """The dense tile [rows, 4 * groups] of kept values [rows, 2 * groups] at positions [rows, groups]."""
    a, b = tl.split(tl.reshape(values, [i0.shape[0], i0.shape[1], 2]))
    # A group is one register, which the compiler then stores whole.
    group = ((a.to(tl.int32) & 255) << (8 * i0)) | ((b.to(tl.int32) & 255) << (8 * i1))
    e0, e1 = group.to(tl.int8), (group >> 8).to(tl.int8)
    e2, e3 = (group >> 16).to(tl.int8), (group >> 24).to(tl.int8)
    return tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), [i0.shape[0], 4 * i0.shape[1]])
