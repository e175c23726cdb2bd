"""Gated linear attention in Triton: every kind of gate, both directions, forward and every gradient of the contract.

Sequences are cut into chunks of up to CHUNK tokens. `state` computes what each chunk adds to the state, in parallel;
`scan` walks over the chunks of a sequence, element by element of the state, and leaves in every chunk's slot the state
that meets it; `out` adds to q times that state what the tokens of the chunk see of each other. A program of `out` owns
R tokens, fewer where gates differ between channels: there pairs of tokens cannot be a matrix product, and the state
that meets the R tokens is made from the chunk's, by what the tokens between add to it.

Backward: the gradient of the state obeys the same recurrence, walked the other way with q for k and grad_out for v, a
gate acting after its token, not before (DUAL); so `state` and `scan` give it, and `out` gives dv. `grad` has both
states and gives dq, dk and the gates' gradients, whose parts `sum_partials` adds.

Both directions together are two walks; the second one adds to float32 results of the first. No float atomics; nothing
depends on the device. Scratch memory: a state for each chunk, in the backward two.
"""

import torch

from ._common import (
    MAX_GRID,
    SCALE,
    Launch,
    _loop_bound,
    cdiv,
    next_power_of_two,
    run,
    sum_partials,
    tl,
    triton,
    tuned,
)
from ._gated_linear_attention_backward import gated_linear_attention_grad_kernel
from ._gated_linear_attention_tiles import (
    SIZES,
    _add_at,
    _chunk_of,
    _lead,
    _pair_decay,
    _pair_scores,
    _program,
    _slots_of,
    _state_at,
    _store_at,
    _updates,
    _whole,
)
from ._linear_attention_tiles import _dot, _operand, _store_state
from ._tiles import Tokens, _load_rows, _rows_of, tokens

# By element size. float32 is multiplied on the FMA units, with the operands in registers.
CHUNK = {2: 64, 4: 32}
ROWS, GRAD_ROWS = {2: 64, 4: 32}, {2: 64, 4: 16}  # tokens of a program
CHANNEL_ROWS = 16  # where gates differ between channels
BLOCK, GRAD_BLOCK = {2: 64, 4: 32}, 32  # channels, and columns of v, that a program has at a time


@triton.jit(do_not_specialize=SIZES)
def gated_linear_attention_state_kernel(
    x,  # Tokens [B, L, H, K]
    y,  # Tokens [B, L, H, V]
    g,  # Tokens [B, L, H, K] or [B, L, H], or None: 0
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    states,  # [slots, H, K, V] float32
    decays,  # CHANNEL: [slots, H, K] float32, else [slots, H]; or None: not wanted
    heads, sequences, L, chunks, search, base, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    STEP: tl.constexpr, OWN: tl.constexpr, CHANNEL: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, and the factor of the state that meets it."""
    DTYPE: tl.constexpr = x.pointer.dtype.element_ty
    ACCURATE: tl.constexpr = DTYPE == tl.float32
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V

    pid = _program(base)
    block_k = pid % BLOCKS_K
    column_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    pid = pid // BLOCKS_K
    block_v = pid % BLOCKS_V
    column_v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    pid = pid // BLOCKS_V
    head = (pid % heads).to(tl.int64)
    slot = (pid // heads).to(tl.int64)
    chunk = _chunk_of(slot, cu_seqlens, sequences, L, chunks, search, STEP, C)
    x = _rows_of(x, chunk.b, head)
    y = _rows_of(y, chunk.b, head)
    g = _rows_of(g, chunk.b, head)
    place = slot * heads + head
    s = _updates(x, y, g, chunk.origin, chunk.count, scale, column_k, column_v, K, V, C, STEP, OWN, CHANNEL, DTYPE)
    _store_state(states, place, column_k, column_v, s, K, V)
    if decays is not None:
        i = tl.arange(0, C)
        factor = _whole(g, chunk.origin + i * STEP, i < chunk.count, column_k, K, CHANNEL, ACCURATE)
        if CHANNEL:
            tl.store(decays + place * K + column_k, factor, mask=(column_k < K) & (block_v == 0))
        else:
            tl.store(decays + place, factor, mask=(block_v == 0) & (block_k == 0))


@triton.jit(do_not_specialize=SIZES)
def gated_linear_attention_scan_kernel(
    states,  # [slots, H, K, V] float32, in place
    decays,  # CHANNEL: [slots, H, K] float32, else [slots, H]; or None: 1
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    initial,  # [N, H, K, V] float32, or None: 0
    total,  # [N, H, K, V] float32, or None: not wanted
    heads, L, chunks, base,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every slot's sum makes way for the state that meets its chunk; total: the state behind the last one."""
    BLOCKS: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    pid = _program(base)
    element = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    ok = element < K * V
    pid = pid // BLOCKS
    head = (pid % heads).to(tl.int64)
    n = (pid // heads).to(tl.int64)
    first, count = _slots_of(cu_seqlens, n, L, chunks, C)
    s = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        s = tl.load(initial + (n * heads + head) * K * V + element, mask=ok, other=0.0)
    for c in range(0, _loop_bound(count)):
        slot = first + c
        if STEP < 0:
            slot = first + count - 1 - c
        place = slot * heads + head
        pointers = states + place * K * V + element
        added = tl.load(pointers, mask=ok, other=0.0)
        tl.debug_barrier()  # in place: other threads may have read what this one overwrites
        tl.store(pointers, s, mask=ok)
        if decays is not None:
            if CHANNEL:
                s = s * tl.load(decays + place * K + element // V, mask=ok, other=0.0)
            else:
                s = s * tl.load(decays + place)
        s += added
    if total is not None:
        tl.store(total + (n * heads + head) * K * V + element, s, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def gated_linear_attention_out_kernel(
    q,  # Tokens [B, L, H, K]
    k,  # Tokens [B, L, H, K]
    v,  # Tokens [B, L, H, V]
    g,  # Tokens [B, L, H, K] or [B, L, H], or None: 0
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    states,  # [slots, H, K, V] float32, the states that meet the chunks
    prior,  # [B, L, H, V] float32, what is added to out, or None
    out,  # [B, L, H, V], contiguous
    heads, sequences, L, chunks, search, base, q_scale, k_scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, DUAL: tl.constexpr, STRICT: tl.constexpr, CHANNEL: tl.constexpr,
):  # fmt: skip
    """A program owns R tokens of a chunk and BLOCK_V columns. DUAL: a gate acts behind its token (see the module), and
    q, k, v are those of the recurrence of the state's gradient. STRICT: a token does not see itself."""
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty
    ACCURATE: tl.constexpr = DTYPE == tl.float32
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    SUBS: tl.constexpr = C // R
    SHIFT: tl.constexpr = 1 if DUAL else 0

    pid = _program(base)
    column_v = pid % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    pid = pid // BLOCKS_V
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    part = pid % SUBS
    slot = (pid // SUBS).to(tl.int64)
    chunk = _chunk_of(slot, cu_seqlens, sequences, L, chunks, search, STEP, C)
    origin, count = chunk.origin, chunk.count
    q = _rows_of(q, chunk.b, head)
    k = _rows_of(k, chunk.b, head)
    v = _rows_of(v, chunk.b, head)
    g = _rows_of(g, chunk.b, head)
    place = slot * heads + head

    r = tl.arange(0, R)
    before = (part * R).to(tl.int32)
    ok = before + r < count
    row = origin + (before + r) * STEP
    met = ok & (r >= SHIFT)  # whose gates, of these tokens, meet a row: up to its own, or up to the one before
    meeting = row - SHIFT * STEP

    scores = tl.zeros([R, R], tl.float32)
    o = tl.zeros([R, BLOCK_V], tl.float32)
    for block_k in range(0, BLOCKS_K):
        column_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
        q_tile = _load_rows(q, row, ok, column_k, K)
        if CHANNEL:
            scores += _pair_scores(q_tile, k, g, origin, before, count, column_k, K, R, STEP, DUAL, ACCURATE)
        else:
            k_operand = _operand(_load_rows(k, row, ok, column_k, K), DTYPE)
            scores = _dot(_operand(q_tile, DTYPE), tl.trans(k_operand), scores, DTYPE)
        s = _state_at(states, place, k, v, g, origin, tl.minimum(before, count), count, k_scale, column_k, column_v, K,
                      V, C, R, STEP, DUAL, CHANNEL, DTYPE)  # fmt: skip
        q_tile = q_tile * q_scale
        if g is not None:
            q_tile = q_tile * _lead(g, meeting, met, column_k, K, CHANNEL, ACCURATE)
        o = _dot(_operand(q_tile, DTYPE), _operand(s, DTYPE), o, DTYPE)
    if g is not None and not CHANNEL:
        scores = scores * _pair_decay(g, meeting, met, R, ACCURATE)
    sees = (r[:, None] > r[None, :]) if STRICT else (r[:, None] >= r[None, :])
    scores = tl.where(sees, scores * (q_scale * k_scale), 0.0)
    v_tile = _load_rows(v, row, ok, column_v, V)
    o = _dot(_operand(scores, DTYPE), _operand(v_tile, DTYPE), o, DTYPE)
    first = (chunk.b * L * heads + head) * V
    o = _add_at(o, prior, first, heads.to(tl.int64) * V, row, ok, column_v, V)
    _store_at(out, first, heads.to(tl.int64) * V, row, ok, column_v, o, V)


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, the arguments that the kernels share, and its launches."""

    def __init__(self, q, k, v, g_head, g_token, g_channel, cu_seqlens, *, scale=1.0, direction=0):
        self.B, self.L, self.H, self.K = q.shape
        self.V = v.shape[3]
        self.varlen = cu_seqlens is not None
        self.N = cu_seqlens.shape[0] - 1 if self.varlen else self.B
        self.q, self.k, self.v, self.scale = tokens(q), tokens(k), tokens(v), float(scale)
        self.device, self.dtype = q.device, q.dtype
        self.steps = {0: (1,), 1: (-1,), 2: (1, -1)}[direction]
        self.gates = next((x for x in (g_head, g_token, g_channel) if x is not None), None)
        self.per_head, self.channel = g_head is not None, g_channel is not None
        g = tokens(self.gates) if not self.per_head else Tokens(g_head, 0, 0, g_head.stride(0))
        size = q.element_size()
        self.chunk = tuned(min(CHUNK[size], max(16, next_power_of_two(self.L))), small=32)
        self.rows, self.grad_rows = (
            min(self.chunk, tuned(CHANNEL_ROWS if self.channel else rows[size], small=16)) for rows in (ROWS, GRAD_ROWS)
        )
        self.block_k, self.block_v = (self.block_of(n, BLOCK[size]) for n in (self.K, self.V))
        chunks = cdiv(self.L, self.chunk)
        self.slots = self.L // self.chunk + self.N if self.varlen else self.N * chunks
        self.shared = {
            "g": g, "cu_seqlens": cu_seqlens.contiguous() if self.varlen else None, "heads": self.H,
            "sequences": self.N, "L": self.L, "chunks": chunks, "search": self.N.bit_length(), "scale": self.scale,
            "K": self.K, "V": self.V, "BLOCK_K": self.block_k, "BLOCK_V": self.block_v, "C": self.chunk,
            "R": self.rows, "CHANNEL": self.channel, "PER_HEAD": self.per_head,
        }  # fmt: skip

    def block_of(self, dim, limit):
        return min(tuned(limit, small=16), max(16, next_power_of_two(dim)))

    def scratch(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def by_token(self, *shape, dtype=torch.float32):
        """A result for every token; tokens that belong to no sequence get zeros."""
        make = torch.zeros if self.varlen else torch.empty
        return make(shape, dtype=dtype, device=self.device)

    def launches(self, kernel, programs, num_warps=4, **extra):
        available = {**self.shared, **extra}
        grid = tuned(MAX_GRID, small=8)
        for base in range(0, programs, grid):
            available["base"] = base if programs > grid else None
            args = {name: available[name] for name in kernel.arg_names}
            yield Launch(kernel, min(programs - base, grid), args, num_warps, 1)

    def blocks(self, *, k=False, v=False):
        return (cdiv(self.K, self.block_k) if k else 1) * (cdiv(self.V, self.block_v) if v else 1)

    def states(self, x, y, scale, step, own, decays, given, initial, total):
        """(states, launches): the states that meet the chunks. `given`: decays are known already."""
        states = self.scratch(self.slots, self.H, self.K, self.V)
        launches = []
        if self.slots:
            launches += self.launches(
                gated_linear_attention_state_kernel, self.slots * self.H * self.blocks(k=True, v=True),
                x=x, y=y, states=states, decays=None if given else decays, scale=scale, STEP=step, OWN=own,
            )  # fmt: skip
        block = tuned(64 * SCALE, small=16)
        programs = self.N * self.H * cdiv(self.K * self.V, block)
        launches += self.launches(
            gated_linear_attention_scan_kernel, programs, 2, states=states, decays=decays, initial=initial,
            total=total, STEP=step, BLOCK=block,
        )  # fmt: skip
        return states, launches

    def decays(self):
        if self.gates is None:
            return None
        return self.scratch(self.slots, self.H, *([self.K] if self.channel else []))

    def grad_sizes(self):
        """(programs of a head, blocks of K, their launch's arguments) of the gradients of q, k and the gates."""
        block_k, block_v = (self.block_of(n, GRAD_BLOCK) for n in (self.K, self.V))
        blocks = cdiv(self.K, block_k)
        sizes = {"BLOCK_K": block_k, "BLOCK_V": block_v, "R": self.grad_rows}
        return self.slots * self.chunk // self.grad_rows * blocks, blocks, sizes

    def out(self, q, k, v, states, prior, out, step, strict, dual):
        programs = self.slots * self.chunk // self.rows * self.H * self.blocks(v=True)
        scales = {"q_scale": 1.0, "k_scale": self.scale} if dual else {"q_scale": self.scale, "k_scale": 1.0}
        return self.launches(
            gated_linear_attention_out_kernel, programs, q=q, k=k, v=v, states=states, prior=prior,
            out=out, STEP=step, STRICT=strict, DUAL=dual, **scales,
        )  # fmt: skip


def _contiguous(x):
    return None if x is None else x.contiguous()


def _plan_forward(
    q, k, v, g_head=None, g_token=None, g_channel=None, cu_seqlens=None, initial_state=None, **options
):  # fmt: skip
    """((out, state), launches). Works on meta tensors."""
    p = _Problem(q, k, v, g_head, g_token, g_channel, cu_seqlens, **options)
    both = len(p.steps) == 2
    out = p.by_token(p.B, p.L, p.H, p.V, dtype=q.dtype)
    state = p.scratch(p.N, p.H, *((0, 0) if both else (p.K, p.V)))
    if p.N * p.H == 0:
        return (out.zero_(), state), []
    prior, launches, decays = None, [], p.decays()
    for step in p.steps:
        last = step == p.steps[-1]
        states, more = p.states(p.k, p.v, 1.0, step, False, decays, False, _contiguous(initial_state),
                                None if both else state)  # fmt: skip
        to = out if last else p.by_token(*out.shape)
        launches += more
        launches += p.out(p.q, p.k, p.v, states, prior, to, step, both and last, False)
        prior = to
    return (out, state), launches


def _plan_backward(
    grad_out, grad_state, q, k, v, g_head=None, g_token=None, g_channel=None, cu_seqlens=None, initial_state=None,
    **options,
):  # fmt: skip
    """((dq, dk, dv, dg_head, dg_token, dg_channel, dinitial_state), launches). Works on meta tensors."""
    p = _Problem(q, k, v, g_head, g_token, g_channel, cu_seqlens, **options)
    both = len(p.steps) == 2
    dq, dk, dv = (p.by_token(*x.shape, dtype=x.dtype) for x in (q, k, v))
    dgates = [p.scratch(0) if x is None else p.by_token(*x.shape, dtype=x.dtype) for x in (g_head, g_token, g_channel)]
    dinitial = p.scratch(0) if initial_state is None else p.scratch(*initial_state.shape)
    results = dq, dk, dv, *dgates, dinitial
    if p.N * p.H == 0:
        for x in results:
            x.zero_()
        return results, []
    grad, launches, decays = tokens(grad_out), [], p.decays()
    dg = dgates[2] if p.channel else dgates[1]
    programs, parts, sizes = p.grad_sizes()
    if p.per_head:
        partial = p.scratch(len(p.steps), programs, p.H)
    elif p.gates is not None and not p.channel and len(p.steps) * parts > 1:
        partial = p.by_token(len(p.steps), parts, p.B, p.L, p.H)
    else:
        partial = None
    priors = {"prior_dq": None, "prior_dk": None, "prior_dg": None}
    prior_dv = None
    for i, step in enumerate(p.steps):
        last = step == p.steps[-1]
        dq_to, dk_to, dv_to = (x if last else p.by_token(*x.shape) for x in (dq, dk, dv))
        dg_to = None
        if p.gates is not None:
            dg_to = partial[i] if partial is not None else dg if last else p.by_token(*dg.shape)
        states, of_states = p.states(p.k, p.v, 1.0, step, False, decays, False, _contiguous(initial_state), None)
        dstates, of_dstates = p.states(
            p.q, grad, p.scale, -step, True, decays, True, None if both else _contiguous(grad_state),
            None if initial_state is None else dinitial,
        )  # fmt: skip
        launches += of_states
        launches += of_dstates
        launches += p.out(p.k, p.q, grad, dstates, prior_dv, dv_to, -step, both and last, True)
        launches += p.launches(
            gated_linear_attention_grad_kernel, programs * p.H, 8, grad_out=grad, q=p.q, k=p.k, v=p.v, states=states,
            dstates=dstates, dq=dq_to, dk=dk_to, dg=dg_to, STEP=step, STRICT=both and last, **sizes, **priors,
        )  # fmt: skip
        prior_dv = dv_to
        priors = {"prior_dq": dq_to, "prior_dk": dk_to, "prior_dg": dg_to if p.channel else None}
    if partial is not None:
        to = dgates[0] if p.per_head else dg
        if partial.numel():
            launches.append(sum_partials(partial, to, partial.numel() // to.numel()))
        else:
            to.zero_()
    return results, launches


def forward(q, *tensors, **options):
    """effvit::gated_linear_attention: (out, state). The arguments must have been validated."""
    results, launches = _plan_forward(q, *tensors, **options)
    run(launches, q.device)
    return results


def backward(grad_out, *tensors, **options):
    """effvit::gated_linear_attention_backward: (dq, dk, dv, dg_head, dg_token, dg_channel, dinitial_state)."""
    results, launches = _plan_backward(grad_out, *tensors, **options)
    run(launches, grad_out.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""

    def case(name, dtype, B, L, H, K, V=None, *, gates="", lens=None, initial=False, **kwargs):
        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        V, N = V or K, B if lens is None else lens
        q, k, v = meta(B, L, H, K), meta(B, L, H, K), meta(B, L, H, V)
        shapes = {"head": (H,), "token": (B, L, H), "channel": (B, L, H, K)}
        optional = (
            *(meta(*shapes[n], dtype=torch.float32) if n == gates else None for n in shapes),
            None if lens is None else meta(lens + 1, dtype=torch.int32),
            meta(N, H, K, V, dtype=torch.float32) if initial else None,
        )  # fmt: skip
        (out, state), launches = _plan_forward(q, k, v, *optional, **kwargs)
        _, backward_launches = _plan_backward(out, state, q, k, v, *optional, **kwargs)
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        for launch in launches + backward_launches:
            yield launch.aot(f"{name}-{short}")

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        yield from case("d64-token", dtype, 2, 4096, 8, 64, gates="token")
        yield from case("d64-channel", dtype, 2, 4096, 8, 64, gates="channel")
    yield from case("d32-head-both", torch.bfloat16, 8, 196, 4, 32, gates="head", direction=2)
    yield from case("d128-none", torch.bfloat16, 8, 784, 4, 128)
    yield from case("d256-channel-everything", torch.bfloat16, 1, 4096, 4, 256, gates="channel", lens=4, initial=True,
                    direction=1)  # fmt: skip
    yield from case("d48-channel-both", torch.float32, 2, 196, 4, 48, gates="channel", direction=2)
