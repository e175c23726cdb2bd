"""Linear attention in Triton: non-causal, causal and quadratic forms, forward and every gradient of the contract.

Linear form, forward: the sequence of a (sequence, head) is cut into splits; a program sums phi(k)^T w v over a split
(`state` kernel), `scan` adds the splits up in a fixed order, and `fwd` multiplies phi(q) by the state. Causal: `scan`
leaves in every split's slot the state before it, and `fwd` walks the split chunk by chunk with the state in registers.

Backward: `bwd_dq` walks the queries; `state` sums phi(q)^T u (u = grad_out * scale / denominator), from which `scan`
makes dS; `bwd_dkv` walks the keys, in the causal form from the last chunk to the first. A state of FUSED_STATE elements
leaves registers for a second one: there, but for the causal form, `bwd_dq` itself sums phi(q)^T u.
The numerator's gradient is linear in u, so the products take grad_out as it is, and the rows are scaled afterwards.

A head dim that a product sums over is one block, so states of more than STATE_BLOCK elements are cut along the other
head dim, and each block is a program's. Then phi(q) . (u S^T) and the denominator are sums over blocks: `bwd_dq` runs
twice, first to write these sums per token and block, then to write dq; dk and dv come from one launch each.

No float atomics. The number of splits follows from the shapes alone, never from the device, and is at most MAX_SPLITS:
every run gives the same bits on every device. Scratch memory: splits states, and the rows' scale / denominator and
gradient of the denominator where dS, dk and dv need them again.
"""

import torch

from ._common import (
    INTERPRETED,
    MAX_GRID,
    SCALE,
    Launch,
    _loop_bound,
    cdiv,
    device_function,
    next_power_of_two,
    run,
    sum_partials,
    tl,
    triton,
    tuned,
)
from ._linear_attention_backward import (
    linear_attention_bwd_dkv_kernel,
    linear_attention_bwd_dq_kernel,
)
from ._linear_attention_quadratic import (
    linear_attention_quadratic_bwd_dkv_kernel,
    linear_attention_quadratic_bwd_dq_kernel,
    linear_attention_quadratic_fwd_kernel,
)
from ._linear_attention_tiles import (
    _NONE,
    SIZES,
    _add_compensated,
    _contiguous_rows,
    _dot,
    _load_den_features,
    _load_features,
    _load_state,
    _operand,
    _program,
    _split_of,
    _store_out,
    _store_state,
    _zero_outside,
)
from ._tiles import _load_numbers, _load_rows, _rows_of, tokens

MAX_SPLITS = 32
# About this many programs fill any GPU a few times over. Under the interpreter every program costs milliseconds.
TARGET_PROGRAMS = 4 if INTERPRETED else 1024
# Programs that leave a partial state each, which is written and read again, get more tokens, and at least so many.
TARGET_PARTIALS = 4 if INTERPRETED else 512
MIN_SPLIT_TOKENS = 16 if INTERPRETED else 128
# A tile of tokens, with head dims of at least 64; half of it in the causal form, which holds two states and ten tiles.
TILE_BYTES = 8 << 10
# Elements of the block of the state that a program keeps in registers, by element size; half in the causal form.
STATE_BLOCK = {2: 128 * 128, 4: 64 * 64}
FUSED_STATE = 64 * 64


# -------------------------------------------------------------------------------------------------------------- states


@triton.jit(do_not_specialize=SIZES)
def linear_attention_state_kernel(
    x,  # Tokens [B, M, H, K]
    y,  # Tokens [B, M, H, V]
    x_den,  # Tokens [B, M, H, K], or None: x
    y_weight,  # Tokens [B, M, H], or None: 1
    z_weight,  # Tokens [B, M, H], or None: 1
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    partial_state,  # [splits, N, H, K, V] float32
    partial_z,  # [splits, N, H, K] float32, or None
    heads, sequences, M, splits, base,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per split: sum of phi(x)^T (y_weight y), and of z_weight phi(x_den). A program owns a block of the state."""
    DTYPE: tl.constexpr = x.pointer.dtype.element_ty
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V

    pid = _program(base)
    column_k = pid % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    pid = pid // BLOCKS_K
    block_v = pid % BLOCKS_V
    column_v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    part = _split_of(pid // BLOCKS_V, heads, splits, cu_seqlens, M, BLOCK)
    head, b, first, stop = part.head, part.b, part.first, part.stop
    x = _rows_of(x, b, head)
    y = _rows_of(y, b, head)
    x_den = _rows_of(x_den, b, head)
    y_weight = _rows_of(y_weight, b, head)
    z_weight = _rows_of(z_weight, b, head)

    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    z_low = tl.zeros([BLOCK_K], tl.float32)
    for step in range(0, _loop_bound(part.blocks)):
        row = first + step * BLOCK + tl.arange(0, BLOCK)
        ok = row < stop
        phi = _load_features(x, row, ok, column_k, K, FEATURE)
        y_tile = _load_rows(y, row, ok, column_v, V)
        if y_weight is not None:
            y_tile = y_tile * _load_numbers(y_weight, row, ok)[:, None]
        state = _dot(tl.trans(_operand(phi, DTYPE)), _operand(y_tile, DTYPE), state, DTYPE)
        if partial_z is not None:
            phi = _load_den_features(phi, x_den, row, ok, column_k, K, FEATURE)
            if z_weight is not None:
                phi = phi * _load_numbers(z_weight, row, ok)[:, None]
            z, z_low = _add_compensated(z, z_low, tl.sum(phi, axis=0))

    slot = (part.split * sequences + part.sequence) * heads + head
    _store_state(partial_state, slot, column_k, column_v, state, K, V)
    if partial_z is not None:
        tl.store(partial_z + slot * K + column_k, z, mask=(column_k < K) & (block_v == 0))


@device_function
def _scan_columns(
    partial, initial, total, first, count, splits,
    PREFIX: tl.constexpr, REVERSE: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = first + tl.arange(0, BLOCK)
    ok = column < count
    # Row 0 is the initial value and row i the i-th split, so that a sum up to row i is what comes before split i.
    row = tl.arange(0, BLOCK_SPLITS)
    split = row - 1
    if REVERSE:
        split = splits - row
    mask = ((row > 0) & (row <= splits))[:, None] & ok[None, :]
    x = tl.load(partial + split.to(tl.int64)[:, None] * count + column[None, :], mask=mask, other=0.0)
    if initial is not None:
        start = tl.load(initial + column, mask=ok, other=0.0)
        x = tl.where((row == 0)[:, None], start[None, :], x)
    if PREFIX:
        before = tl.cumsum(x, axis=0)
        split = row
        if REVERSE:
            split = splits - 1 - row
        tl.debug_barrier()  # the slots are overwritten in place, by other threads than have read them
        pointers = partial + split.to(tl.int64)[:, None] * count + column[None, :]
        tl.store(pointers, before, mask=(row < splits)[:, None] & ok[None, :])
    if total is not None:
        tl.store(total + column, tl.sum(x, axis=0), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def linear_attention_scan_kernel(
    partial_state,  # [splits, count_state] float32
    partial_z,  # [splits, count_z] float32, or None
    initial_state,  # [count_state] float32, or None: 0
    initial_z,  # [count_z] float32, or None: 0
    state,  # [count_state] float32, or None: not wanted
    z,  # [count_z] float32, or None: not wanted
    count_state, count_z, splits, base,
    PREFIX: tl.constexpr, REVERSE: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """state and z: initial value plus all splits. PREFIX: each split's slot gets what comes before it (REVERSE: after
    it), initial value included."""
    pid = _program(base).to(tl.int64)
    programs = (count_state + (BLOCK - 1)) // BLOCK
    if pid < programs:
        _scan_columns(partial_state, initial_state, state, pid * BLOCK, count_state, splits, PREFIX, REVERSE,
                      BLOCK_SPLITS, BLOCK)  # fmt: skip
    else:
        if partial_z is not None:
            _scan_columns(partial_z, initial_z, z, (pid - programs) * BLOCK, count_z, splits, PREFIX, REVERSE,
                          BLOCK_SPLITS, BLOCK)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def linear_attention_fwd_kernel(
    q,  # Tokens [B, L, H, K]
    k,  # Tokens [B, L, H, K]; causal only, like v, k_den and weight
    v,  # Tokens [B, L, H, V]
    q_den,  # Tokens [B, L, H, K], or None: q
    k_den,  # Tokens [B, L, H, K], or None: k
    weight,  # Tokens [B, L, H], or None: 1
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    state,  # [N, H, K, V] float32; causal: [splits, N, H, K, V], before each split
    z,  # [N, H, K] float32; causal: [splits, N, H, K]
    out,  # [B, L, H, V], contiguous
    heads, sequences, L, M, splits, base,
    eps, clamp_min, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns the queries of a split and BLOCK_V columns of out; BLOCK_K holds all of K."""
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty
    RELOAD: tl.constexpr = DTYPE == tl.float32
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V

    pid = _program(base)
    column_k = tl.arange(0, BLOCK_K)
    column_v = pid % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    part = _split_of(pid // BLOCKS_V, heads, splits, cu_seqlens, L, BLOCK)
    head, b, first, stop = part.head, part.b, part.first, part.stop
    slot = part.sequence * heads + head
    keys = M
    if cu_seqlens is not None:
        keys = part.end - part.begin
    q = _rows_of(q, b, head)
    k = _rows_of(k, b, head)
    v = _rows_of(v, b, head)
    q_den = _rows_of(q_den, b, head)
    k_den = _rows_of(k_den, b, head)
    weight = _rows_of(weight, b, head)
    out_rows = _contiguous_rows(out, b, L, heads, head, V)
    if CAUSAL:
        slot += part.split * sequences * heads
        keep = tl.arange(0, BLOCK)[:, None] >= tl.arange(0, BLOCK)[None, :]

    s = _load_state(state, slot, column_k, column_v, K, V)
    s_operand = _operand(s, DTYPE)
    if NORMALIZE != _NONE:
        z_row = tl.load(z + slot * K + column_k, mask=column_k < K, other=0.0)
        z_low = tl.zeros([BLOCK_K], tl.float32)

    for step in range(0, _loop_bound(part.blocks)):
        row = first + step * BLOCK + tl.arange(0, BLOCK)
        ok = row < stop
        phi_q = _load_features(q, row, ok, column_k, K, FEATURE)
        q_operand = _operand(phi_q, DTYPE)
        if RELOAD and not CAUSAL:
            s = _load_state(state, slot, column_k, column_v, K, V)
        if RELOAD or CAUSAL:
            s_operand = _operand(s, DTYPE)
        o = _dot(q_operand, s_operand, None, DTYPE)
        d = None
        if NORMALIZE != _NONE:
            phi_qd = _load_den_features(phi_q, q_den, row, ok, column_k, K, FEATURE)
            d = tl.sum(phi_qd * z_row[None, :], axis=1)
        if CAUSAL:
            phi_k = _load_features(k, row, ok, column_k, K, FEATURE)
            k_operand = _operand(phi_k, DTYPE)
            v_tile = _load_rows(v, row, ok, column_v, V)
            a = tl.where(keep, _dot(q_operand, tl.trans(k_operand), None, DTYPE), 0.0)
            if weight is not None:
                w = _load_numbers(weight, row, ok)
                a = a * w[None, :]
            o = _dot(_operand(a, DTYPE), _operand(v_tile, DTYPE), o, DTYPE)
            if NORMALIZE != _NONE:
                phi_kd = _load_den_features(phi_k, k_den, row, ok, column_k, K, FEATURE)
                if q_den is not None or k_den is not None:
                    a = _dot(_operand(phi_qd, DTYPE), tl.trans(_operand(phi_kd, DTYPE)), None, DTYPE)
                    a = tl.where(keep, a, 0.0)
                    if weight is not None:
                        a = a * w[None, :]
                d += tl.sum(a, axis=1)
                if weight is not None:
                    phi_kd = phi_kd * w[:, None]
                z_row, z_low = _add_compensated(z_row, z_low, tl.sum(phi_kd, axis=0))
            if weight is not None:
                v_tile = v_tile * w[:, None]
            s = _dot(tl.trans(k_operand), _operand(v_tile, DTYPE), s, DTYPE)
        count = row + 1 - part.begin if CAUSAL else keys
        _store_out(out_rows, row, ok, column_v, o, d, count, eps, clamp_min, scale, V, NORMALIZE)
    if cu_seqlens is not None:
        share = part.sequence * splits + part.split
        _zero_outside(out_rows, cu_seqlens, sequences, share, sequences * splits, L, column_v, V, BLOCK)


# ------------------------------------------------------------------------------------------------------------ launchers

QUADRATIC_KERNELS = (
    linear_attention_quadratic_fwd_kernel, linear_attention_quadratic_bwd_dq_kernel,
    linear_attention_quadratic_bwd_dkv_kernel,
)  # fmt: skip


class _Problem:
    """The sizes of a call, the arguments that the kernels share, block sizes and splits."""

    def __init__(
        self, q, k, v, q_den, k_den, weight, cu_seqlens, *,
        feature_map=1, normalize=1, eps=1e-6, clamp_min=0.0, scale=1.0, causal=False, quadratic=False,
    ):  # fmt: skip
        self.B, self.L, self.H, self.K = q.shape
        self.M, self.V = v.shape[1], v.shape[3]
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.heads = self.N * self.H
        self.device, self.element_size = q.device, q.element_size()
        self.causal, self.quadratic, self.normalized = causal, quadratic, normalize != 0
        self.has_weight, self.varlen = weight is not None, cu_seqlens is not None
        self.block_k = max(16, next_power_of_two(self.K))
        self.block_v = max(16, next_power_of_two(self.V))
        self.state_block = tuned(STATE_BLOCK[self.element_size] // (2 if causal else 1), small=16 * 16)
        # Several tiles even of a short sequence, so that its programs are several.
        rows = TILE_BYTES // (max(self.block_k, self.block_v, 64) * self.element_size)
        if causal and not quadratic:
            rows //= 2
        self.block = tuned(max(16, min(rows, next_power_of_two(cdiv(max(self.L, self.M), 4)))), small=16)
        self.shared = {
            "q": tokens(q), "k": tokens(k), "v": tokens(v),
            "q_den": tokens(q_den), "k_den": tokens(k_den), "weight": tokens(weight),
            "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
            "heads": self.H, "sequences": self.N, "L": self.L, "M": self.M,
            "eps": float(eps), "clamp_min": float(clamp_min), "scale": float(scale), "K": self.K, "V": self.V,
            "FEATURE": feature_map, "NORMALIZE": normalize, "CAUSAL": causal,
        }  # fmt: skip

    def scratch(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def splits(self, tokens, blocks, *, partials):
        """Splits of every sequence: enough programs, `blocks` of them per split, with or without partial states. The
        lengths of cu_seqlens' sequences are not known here: one of them may have all the tokens."""
        if partials:
            wanted, limit = cdiv(TARGET_PARTIALS, self.heads * blocks), min(MAX_SPLITS, tokens // MIN_SPLIT_TOKENS)
        else:
            wanted, limit = cdiv(TARGET_PROGRAMS, self.heads * blocks), cdiv(tokens, self.block)
        return max(1, tuned(min(wanted, limit), small=min(MAX_SPLITS, cdiv(tokens, 2 * self.block))))

    def launches(self, kernel, programs, area, rows=None, **extra):
        """The launch of `kernel` with the shared arguments it names, and `extra`; several where the grid is full."""
        available = {**self.shared, "BLOCK": self.block if rows is None else rows, **extra}
        whole = available.get("BLOCK_K") == self.block_k
        num_warps, num_stages = _compile_options(kernel, area, self.causal, whole, self.element_size)
        grid = tuned(MAX_GRID, small=8)
        for base in range(0, programs, grid):
            available["base"] = base if programs > grid else None
            args = {name: available[name] for name in kernel.arg_names}
            yield Launch(kernel, min(programs - base, grid), args, num_warps, num_stages)

    def blocks_of(self, whole, cut):
        """Size of the blocks that the head dim `cut` is walked in where `whole` is one block."""
        return min(cut, max(16, self.state_block // whole))

    def states(self, x, y, x_den, y_weight, z_weight, splits, partial_state, partial_z):
        """Launches that write the partial states of every split."""
        block_v = self.blocks_of(self.block_k, self.block_v)
        names = {"x": x, "y": y, "x_den": x_den, "y_weight": y_weight, "z_weight": z_weight}
        names = {name: tokens(tensor) for name, tensor in names.items()}
        blocks = cdiv(self.K, self.block_k) * cdiv(self.V, block_v)
        return self.launches(
            linear_attention_state_kernel, self.heads * splits * blocks, self.block_k * block_v, **names,
            splits=splits, partial_state=partial_state, partial_z=partial_z, M=x.shape[1],
            BLOCK_K=self.block_k, BLOCK_V=block_v,
        )  # fmt: skip

    def scan(self, partial_state, partial_z, initial_state, initial_z, state, z, splits, *, prefix, reverse=False):
        count_state = self.heads * self.K * self.V
        count_z = 0 if partial_z is None else self.heads * self.K
        block = tuned(64 * SCALE, small=16)
        return self.launches(
            linear_attention_scan_kernel, cdiv(count_state, block) + cdiv(count_z, block), 0, block,
            partial_state=partial_state, partial_z=partial_z, initial_state=initial_state, initial_z=initial_z,
            state=state, z=z, count_state=count_state, count_z=count_z, splits=splits, PREFIX=prefix, REVERSE=reverse,
            BLOCK_SPLITS=next_power_of_two(splits + 1),
        )  # fmt: skip


def _compile_options(kernel, area, causal, whole, element_size):
    """(num_warps, num_stages), by what ahead-of-time compilation reports as spills; area: of the block of the state,
    whole: whether it holds all of K."""
    if kernel is linear_attention_scan_kernel:
        return 4, 1
    if element_size == 4:  # on the FMA units, with the operands in registers
        return 8 if whole or causal or kernel is not linear_attention_bwd_dq_kernel else 16, 1
    if kernel in QUADRATIC_KERNELS:
        return 4 if area <= 64 * 64 else 8, 1
    backward = kernel in (linear_attention_bwd_dq_kernel, linear_attention_bwd_dkv_kernel)
    few = area <= 64 * 64 and not causal and kernel is not linear_attention_bwd_dq_kernel
    return 4 if few else 8, 1 if causal and (backward or area > 64 * 64) else 2


def _contiguous(x):
    return None if x is None else x.contiguous()


def _plan_forward(
    q, k, v, q_den=None, k_den=None, weight=None, cu_seqlens=None, initial_state=None, initial_z=None, **options
):
    """((out, state, z), launches). Works on meta tensors."""
    p = _Problem(q, k, v, q_den, k_den, weight, cu_seqlens, **options)
    out = torch.empty((p.B, p.L, p.H, p.V), dtype=q.dtype, device=q.device)
    K, V = (0, 0) if p.quadratic else (p.K, p.V)
    state, z = p.scratch(p.N, p.H, K, V), p.scratch(p.N, p.H, K)
    if p.heads == 0:
        return (out.zero_(), state, z), []
    block_v = p.blocks_of(p.block_k, p.block_v)
    blocks = {"BLOCK_K": p.block_k, "BLOCK_V": block_v}
    blocks_v, area = cdiv(p.V, block_v), p.block_k * block_v
    launches = []
    if p.quadratic:
        programs = p.heads * cdiv(p.L, p.block) * blocks_v
        launches += p.launches(linear_attention_quadratic_fwd_kernel, programs, area, out=out, **blocks)
        return (out, state, z), launches

    splits = p.splits(p.M, blocks_v, partials=True)
    direct = splits == 1 and not p.causal and initial_state is None
    partials = (state, z) if direct else (p.scratch(splits, p.N, p.H, K, V), p.scratch(splits, p.N, p.H, K))
    launches += p.states(k, v, k_den, weight, weight, splits, *partials)
    if not direct:
        launches += p.scan(*partials, _contiguous(initial_state), _contiguous(initial_z), state, z, splits,
                           prefix=p.causal)  # fmt: skip
    if p.L > 0:
        states = partials if p.causal else (state, z)
        if not p.causal:
            splits = p.splits(p.L, blocks_v, partials=False)
        launches += p.launches(linear_attention_fwd_kernel, p.heads * splits * blocks_v, area, out=out,
                               state=states[0], z=states[1], splits=splits, **blocks)  # fmt: skip
    return (out, state, z), launches


def _plan_backward(
    grad_out, grad_state, grad_z, q, k, v, state, z, q_den=None, k_den=None, weight=None, cu_seqlens=None,
    initial_state=None, initial_z=None, **options
):  # fmt: skip
    """((dq, dk, dv, dq_den, dk_den, dweight, dinitial_state, dinitial_z), launches). Works on meta tensors."""
    p = _Problem(q, k, v, q_den, k_den, weight, cu_seqlens, **options)
    causal, normalized = p.causal, p.normalized

    def gradient(x):
        return q.new_empty(0 if x is None else x.shape, dtype=q.dtype if x is None else x.dtype)

    dq, dk, dv, dq_den, dk_den = (gradient(x) for x in (q, k, v, q_den, k_den))
    dweight = gradient(weight) if p.has_weight else p.scratch(0)
    dinitial_state, dinitial_z = (
        p.scratch(0) if x is None else p.scratch(*x.shape) for x in (initial_state, initial_z)
    )
    gradients = dq, dk, dv, dq_den, dk_den, dweight, dinitial_state, dinitial_z
    if p.heads == 0:
        for x in gradients:
            x.zero_()
        return gradients, []

    p.shared["grad_out"] = tokens(grad_out)
    dq_args = {"dq": dq, "dq_den": None if q_den is None else dq_den}
    dk_args = {"dk": dk, "dk_den": None if k_den is None else dk_den, "dweight": dweight if p.has_weight else None}
    launches = []
    if p.quadratic:
        # Whole K and V: fewer rows.
        rows = tuned(min(p.block, max(16, 4096 // max(p.block_k, p.block_v))), small=16)
        p.shared["row_scale"] = p.scratch(p.B, p.H, p.L)
        p.shared["row_grad"] = p.scratch(p.B, p.H, p.L) if normalized else None
        blocks, area = {"BLOCK_K": p.block_k, "BLOCK_V": p.block_v}, p.block_k * p.block_v
        launches += p.launches(linear_attention_quadratic_bwd_dq_kernel, p.heads * cdiv(p.L, rows), area, rows,
                               **dq_args, **blocks)  # fmt: skip
        launches += p.launches(linear_attention_quadratic_bwd_dkv_kernel, p.heads * cdiv(p.M, rows), area, rows,
                               **dk_args, dv=dv, **blocks)  # fmt: skip
        return gradients, launches

    block_k = p.blocks_of(p.block_v, p.block_k)
    block_v = p.blocks_of(p.block_k, p.block_v)
    blocks_k, blocks_v = cdiv(p.K, block_k), cdiv(p.V, block_v)
    whole = block_k == p.block_k
    fused = whole and not causal and block_k * p.block_v <= tuned(FUSED_STATE, small=16 * 16)
    splits = p.splits(max(p.L, p.M), blocks_k, partials=True)
    states = state.contiguous(), z.contiguous()
    if causal:
        states = p.scratch(splits, p.N, p.H, p.K, p.V), p.scratch(splits, p.N, p.H, p.K)
        launches += p.states(k, v, k_den, weight, weight, splits, *states)
        launches += p.scan(*states, _contiguous(initial_state), _contiguous(initial_z), None, None, splits,
                           prefix=True)  # fmt: skip

    # dS and dz: the sums of the queries' splits, and the gradients of the returned states.
    grad_state, grad_z = _contiguous(grad_state), _contiguous(grad_z)
    direct = splits == 1 and not causal and grad_state is None and grad_z is None
    dstate = dinitial_state if initial_state is not None else None if causal else p.scratch(p.N, p.H, p.K, p.V)
    dz = dinitial_z if initial_state is not None else None if causal else p.scratch(p.N, p.H, p.K)
    partials = dstate, dz if normalized else None
    if not direct:
        partials = p.scratch(splits, p.N, p.H, p.K, p.V), p.scratch(splits, p.N, p.H, p.K) if normalized else None
    sums = p.scratch(2, blocks_k, p.B, p.H, p.L) if normalized and not whole else None
    if not fused:
        row_scale = p.scratch(p.B, p.H, p.L)
        row_grad = p.scratch(p.B, p.H, p.L) if normalized else None
    else:
        row_scale = row_grad = None
    for only_sums in (True, False) if sums is not None else (False,):
        launches += p.launches(
            linear_attention_bwd_dq_kernel, p.heads * splits * blocks_k, block_k * p.block_v, **dq_args,
            state=states[0], z=states[1], partial_dstate=partials[0] if fused else None,
            partial_dz=partials[1] if fused else None, row_scale=row_scale, row_grad=row_grad, row_sums=sums,
            splits=splits, SUMS=only_sums, BLOCK_K=block_k, BLOCK_V=p.block_v,
        )  # fmt: skip
    if not fused:
        by_token = [None if x is None else x.transpose(1, 2) for x in (row_scale, row_grad)]
        launches += p.states(q, grad_out, q_den, *by_token, splits, *partials)
    if not normalized and not causal:
        dz = grad_z
    if not direct:
        launches += p.scan(partials[0], partials[1], grad_state, grad_z, dstate, dz if normalized else None, splits,
                           prefix=causal, reverse=True)  # fmt: skip
    if not normalized and initial_state is not None:
        dinitial_z.copy_(grad_z) if grad_z is not None else dinitial_z.zero_()
    if p.M == 0:
        return gradients, launches
    if causal:
        dstate, dz = partials
        if not normalized and grad_z is not None:
            dz = grad_z.expand(splits, p.N, p.H, p.K).contiguous()
    else:
        splits = p.splits(p.M, max(blocks_k, blocks_v), partials=False)
    shared = {"dstate": dstate, "dz": dz, "row_scale": row_scale, "row_grad": row_grad, "splits": splits}
    programs = p.heads * splits
    if whole:
        launches += p.launches(linear_attention_bwd_dkv_kernel, programs, p.block_k * p.block_v, **shared, **dk_args,
                               dv=dv, BLOCK_K=p.block_k, BLOCK_V=p.block_v)  # fmt: skip
        return gradients, launches
    nothing = dict.fromkeys(dk_args)
    if p.has_weight:
        dk_args["dweight"] = p.scratch(blocks_k, p.B, p.M, p.H)
    launches += p.launches(linear_attention_bwd_dkv_kernel, programs * blocks_k, block_k * p.block_v, **shared,
                           **dk_args, dv=None, BLOCK_K=block_k, BLOCK_V=p.block_v)  # fmt: skip
    launches += p.launches(linear_attention_bwd_dkv_kernel, programs * blocks_v, p.block_k * block_v, **shared,
                           **nothing, dv=dv, BLOCK_K=p.block_k, BLOCK_V=block_v)  # fmt: skip
    if p.has_weight:
        launches.append(sum_partials(dk_args["dweight"], dweight, blocks_k))
    return gradients, launches


def forward(q, *tensors, **options):
    """effvit::linear_attention: (out, state, z). The arguments must have been validated."""
    results, launches = _plan_forward(q, *tensors, **options)
    run(launches, q.device)
    return results


def backward(grad_out, *tensors, **options):
    """effvit::linear_attention_backward: (dq, dk, dv, dq_den, dk_den, dweight, dinitial_state, dinitial_z)."""
    results, launches = _plan_backward(grad_out, *tensors, **options)
    run(launches, grad_out.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""

    def case(name, dtype, B, L, H, K, V=None, *, den=False, weight=False, lens=None, initial=False, **kwargs):
        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        V, N = V or K, B if lens is None else lens
        q, k, v = meta(B, L, H, K), meta(B, L, H, K), meta(B, L, H, V)
        optional = (
            meta(B, L, H, K) if den else None, meta(B, L, H, K) if den else None, meta(B, L, H) if weight else None,
            None if lens is None else meta(lens + 1, dtype=torch.int32),
            meta(N, H, K, V, dtype=torch.float32) if initial else None,
            meta(N, H, K, dtype=torch.float32) if initial else None,
        )  # fmt: skip
        (out, state, z), launches = _plan_forward(q, k, v, *optional, **kwargs)
        _, backward_launches = _plan_backward(out, None, None, q, k, v, state, z, *optional, **kwargs)
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        for launch in launches + backward_launches:
            yield launch.aot(f"{name}-{short}")

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        yield from case("d64", dtype, 2, 4096, 16, 64)
        yield from case("d64-causal", dtype, 2, 4096, 16, 64, causal=True)
        yield from case("d64-quadratic", dtype, 64, 49, 3, 64, quadratic=True)
    for dtype in (torch.bfloat16, torch.float32):
        yield from case("d32-elu1-everything", dtype, 1, 3136, 4, 32, den=True, weight=True, lens=4, initial=True,
                        feature_map=2, normalize=2)  # fmt: skip
        yield from case("d256-weight", dtype, 1, 4096, 4, 256, weight=True)
    yield from case("d32-exp-causal-everything", torch.bfloat16, 2, 784, 4, 32, den=True, weight=True, initial=True,
                    causal=True, feature_map=3, normalize=3)  # fmt: skip
    yield from case("d128", torch.bfloat16, 1, 4096, 8, 128)
    for dtype in (torch.bfloat16, torch.float32):
        yield from case("d256-causal", dtype, 1, 4096, 4, 256, causal=True)
