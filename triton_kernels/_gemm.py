"""What the linear layers share: the size of their tiles and the order in which programs take them."""

from ._common import cdiv, device_function, next_power_of_two, tl, tuned

GROUP = 8  # rows of tiles that programs take together: they share weights in L2
TARGET_PROGRAMS = 128  # about one for each SM


def tile_of(rows, columns, most=128):
    """(BLOCK_M, BLOCK_N): sides of `most`, less where the problem is smaller, the longer one halved while there are
    fewer than TARGET_PROGRAMS tiles, down to 32 (BLOCK_M: 16 where there are no more rows)."""
    limit = tuned(most, small=16)
    m, n = (max(16, min(limit, next_power_of_two(size))) for size in (rows, columns))
    while max(m, n) > 32 and cdiv(rows, m) * cdiv(columns, n) < TARGET_PROGRAMS:
        m, n = (m // 2, n) if m >= n else (m, n // 2)
    return m, n


def depth_of(*strides):
    """BLOCK_K of bytes: 128, or 32 where rows are not aligned to 16 bytes, which takes an address for every byte."""
    return tuned(128 if all(stride % 16 == 0 for stride in strides) else 32, small=32)


def warps_of(m, n):
    return 8 if m * n > 64 * 128 else 4


@device_function
def _tile_at(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(rows, columns) of the program's tile: GROUP rows of tiles column by column, then the next ones."""
    m_tiles = (M + BLOCK_M - 1) // BLOCK_M
    n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    first = program // (GROUP * n_tiles) * GROUP
    rows = tl.minimum(m_tiles - first, GROUP)
    place = program % (GROUP * n_tiles)
    row = (first + place % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, place // rows * BLOCK_N + tl.arange(0, BLOCK_N)


@device_function
def _row_pointers(pointer, row, rows, stride):
    """Where rows start; those beyond the last one repeat it, so that loads need no mask for them."""
    return pointer + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride
