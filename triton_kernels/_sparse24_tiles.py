"""2:4-sparse weights in registers: dense tiles from the canonical form, and back.

A group of four neighbours along K has two kept values, at positions i0 < i1; a nibble of meta is i0 | i1 << 2.
"""

from ._common import device_function, tl


@device_function
def _load_positions(rows, byte, K8, stride=1):
    """(i0, i1) of two groups a byte: [rows, 2 * bytes]. `rows` are pointers, [rows, 1]."""
    pair = tl.load(rows + byte[None, :] * stride, mask=(byte < K8)[None, :], other=0).to(tl.int32)
    nibble = tl.reshape(tl.join(pair & 15, pair >> 4), [pair.shape[0], 2 * pair.shape[1]])
    return nibble & 3, nibble >> 2


@device_function
def _load_values(rows, index, K2, stride=1):
    """Kept values, 0 where there are none."""
    return tl.load(rows + index[None, :] * stride, mask=(index < K2)[None, :], other=0)


@device_function
def _expand(values, i0, i1):
    """The dense int8 tile [rows, 4 * groups] of kept values [rows, 2 * groups] at positions [rows, groups]."""
    a, b = tl.split(tl.reshape(values, [i0.shape[0], i0.shape[1], 2]))
    # A group is one register, which the compiler then stores whole.
    group = ((a.to(tl.int32) & 255) << (8 * i0)) | ((b.to(tl.int32) & 255) << (8 * i1))
    e0, e1 = group.to(tl.int8), (group >> 8).to(tl.int8)
    e2, e3 = (group >> 16).to(tl.int8), (group >> 24).to(tl.int8)
    return tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), [i0.shape[0], 4 * i0.shape[1]])


@device_function
def _expand_floats(values, i0, i1):
    """_expand of floats."""
    a, b = tl.split(tl.reshape(values, [i0.shape[0], i0.shape[1], 2]))
    zero = tl.zeros_like(a)
    e0 = tl.where(i0 == 0, a, zero)
    e1 = tl.where(i0 == 1, a, tl.where(i1 == 1, b, zero))
    e2 = tl.where(i0 == 2, a, tl.where(i1 == 2, b, zero))
    e3 = tl.where(i1 == 3, b, zero)
    return tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), [i0.shape[0], 4 * i0.shape[1]])


@device_function
def _pick(dense, i0, i1):
    """What _expand would have taken for the tile [rows, 4 * groups]: [rows, 2 * groups]."""
    pairs = tl.reshape(dense, [i0.shape[0], i0.shape[1], 2, 2])
    even, odd = tl.split(pairs)  # entries 0 and 2, 1 and 3
    e0, e2 = tl.split(even)
    e1, e3 = tl.split(odd)
    first = tl.where(i0 == 0, e0, tl.where(i0 == 1, e1, e2))
    second = tl.where(i1 == 1, e1, tl.where(i1 == 2, e2, e3))
    return tl.reshape(tl.join(first, second), [i0.shape[0], 2 * i0.shape[1]])
