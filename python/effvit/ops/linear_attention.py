"""linear_attention: schema, validation, fake kernel, autograd, autocast, vmap, sharding, and the public function."""

from __future__ import annotations

import functools

import torch

from ..reference.linear_attention import linear_attention as _reference
from . import _registry as R

NAME = "linear_attention"
FEATURE_MAPS = ("none", "relu", "elu1", "exp")  # the schema's ints are indices into these
NORMALIZERS = ("none", "sum", "mean", "clamp")
MAX_DIM = 256
_OPTIONS = (
    "int feature_map=1, int normalize=1, float eps=1e-06, float clamp_min=0., float scale=1., bool causal=False, "
    "bool quadratic=False"
)
_OPTIONALS = (
    "Tensor? q_den=None, Tensor? k_den=None, Tensor? weight=None, Tensor? cu_seqlens=None, "
    "Tensor? initial_state=None, Tensor? initial_z=None"
)
SCHEMA = f"{NAME}(Tensor q, Tensor k, Tensor v, {_OPTIONALS}, *, {_OPTIONS}) -> (Tensor out, Tensor state, Tensor z)"
SCHEMA_BACKWARD = (
    f"{NAME}_backward(Tensor grad_out, Tensor? grad_state, Tensor? grad_z, Tensor q, Tensor k, Tensor v, Tensor state, "
    f"Tensor z, {_OPTIONALS}, *, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_den, Tensor dk_den, "
    "Tensor dweight, Tensor dinitial_state, Tensor dinitial_z)"
)


# ---- validation ----------------------------------------------------------------------------------------------------


def _check_enum(op, name, x, names):
    if not R.is_int(x):
        raise R.type_error(op, name, "an int", type(x).__name__)
    if not 0 <= x < len(names):
        raise R.value_error(op, name, f"between 0 and {len(names) - 1}", x)


def _check_bool(op, name, x):
    if not isinstance(x, bool):
        raise R.type_error(op, name, "a bool", type(x).__name__)


def _check_float32(op, name, t, q, dims, expected):
    R.check_tensor(op, name, t)
    if t.dtype != torch.float32:
        raise R.type_error(op, name, torch.float32, t.dtype)
    R.check_like(op, name, t, "q", q, dtype=False)
    R.check_shape(op, name, t, dims, expected)


def _has_readable_values(t):
    """Whether a tensor's values are there, on the CPU: not while tracing, not on a GPU, where reading would wait."""
    return (
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def _check_offsets(op, cu_seqlens, L):
    if not _has_readable_values(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    rising = all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
    if offsets[0] != 0 or offsets[-1] != L or not rising:
        raise ValueError(f"effvit::{op}: cu_seqlens must rise from 0 to the length of q, {L}, got {offsets}")


def validate(
    op, q, k, v, q_den=None, k_den=None, weight=None, cu_seqlens=None, initial_state=None, initial_z=None,
    *, feature_map=1, normalize=1, eps=1e-6, clamp_min=0.0, scale=1.0, causal=False, quadratic=False,
):  # fmt: skip
    """Raise on anything the op does not take; return the options as torch.ops takes them."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        R.check_tensor(op, name, t)
    if q.dim() != 4:
        raise R.value_error(op, "q", "[B, L, H, K]", R.shape(q))
    R.check_float(op, "q", q)
    B, L, H, K = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[2:] != q.shape[2:]:
        raise R.value_error(op, "k", f"[B, M, H, K] like q {R.shape(q)}", R.shape(k))
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise R.value_error(op, "v", f"[B, M, H, V] like k {R.shape(k)}", R.shape(v))
    M, V = v.shape[1], v.shape[3]
    for name, t in (("q", q), ("v", v)):
        if not 1 <= t.shape[3] <= MAX_DIM:
            raise ValueError(f"effvit::{op}: {name} must have a head dim between 1 and {MAX_DIM}, got {R.shape(t)}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        R.check_like(op, name, t, "q", q)
        R.check_last_stride(op, name, t)

    _check_enum(op, "feature_map", feature_map, FEATURE_MAPS)
    _check_enum(op, "normalize", normalize, NORMALIZERS)
    eps = R.as_finite(op, "eps", eps)
    clamp_min = R.as_finite(op, "clamp_min", clamp_min)
    scale = R.as_finite(op, "scale", scale)
    _check_bool(op, "causal", causal)
    _check_bool(op, "quadratic", quadratic)
    if causal and L != M:
        raise R.value_error(op, "k", f"as long as q when causal is True, {L}", M)

    for name, t, dims, like in (("q_den", q_den, "[B, L, H, K]", q), ("k_den", k_den, "[B, M, H, K]", k)):
        if t is None:
            continue
        R.check_tensor(op, name, t)
        if NORMALIZERS[normalize] == "none":
            raise R.value_error(op, name, "None when normalize is none", R.shape(t))
        R.check_shape(op, name, t, dims, like.shape)
        R.check_like(op, name, t, "q", q)
        R.check_last_stride(op, name, t)
    if weight is not None:
        R.check_tensor(op, "weight", weight)
        R.check_float(op, "weight", weight)
        R.check_like(op, "weight", weight, "q", q, dtype=False)
        R.check_shape(op, "weight", weight, "[B, M, H]", (B, M, H))

    N = B
    if cu_seqlens is not None:
        R.check_tensor(op, "cu_seqlens", cu_seqlens)
        if quadratic:
            raise R.value_error(op, "cu_seqlens", "None when quadratic is True", R.shape(cu_seqlens))
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise R.value_error(op, "cu_seqlens", "[N + 1]", R.shape(cu_seqlens))
        if cu_seqlens.dtype != torch.int32:
            raise R.type_error(op, "cu_seqlens", torch.int32, cu_seqlens.dtype)
        R.check_like(op, "cu_seqlens", cu_seqlens, "q", q, dtype=False)
        if B != 1:
            raise ValueError(f"effvit::{op}: q must have a batch size of 1 when cu_seqlens is given, got {R.shape(q)}")
        if L != M:
            raise R.value_error(op, "k", f"as long as q when cu_seqlens is given, {L}", M)
        _check_offsets(op, cu_seqlens, L)
        N = cu_seqlens.shape[0] - 1
    if (initial_state is None) != (initial_z is None):
        missing, other = ("initial_state", "initial_z") if initial_state is None else ("initial_z", "initial_state")
        raise R.value_error(op, missing, f"given together with {other}", None)
    if initial_state is not None:
        R.check_tensor(op, "initial_state", initial_state)
        if quadratic:
            raise R.value_error(op, "initial_state", "None when quadratic is True", R.shape(initial_state))
        _check_float32(op, "initial_state", initial_state, q, "[N, H, K, V]", (N, H, K, V))
        _check_float32(op, "initial_z", initial_z, q, "[N, H, K]", (N, H, K))
    return {
        "feature_map": feature_map, "normalize": normalize, "eps": eps, "clamp_min": clamp_min, "scale": scale,
        "causal": causal, "quadratic": quadratic,
    }  # fmt: skip


def _sequences(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _state_shapes(q, v, cu_seqlens, quadratic):
    N, H = _sequences(q, cu_seqlens), q.shape[2]
    K, V = (0, 0) if quadratic else (q.shape[3], v.shape[3])
    return (N, H, K, V), (N, H, K)


def _validate_forward(*args, **kwargs):
    validate(NAME, *args, **kwargs)


def _validate_backward(
    grad_out, grad_state, grad_z, q, k, v, state, z, q_den=None, k_den=None, weight=None, cu_seqlens=None,
    initial_state=None, initial_z=None, **options,
):  # fmt: skip
    op = f"{NAME}_backward"
    validate(op, q, k, v, q_den, k_den, weight, cu_seqlens, initial_state, initial_z, **options)
    R.check_tensor(op, "grad_out", grad_out)
    R.check_shape(op, "grad_out", grad_out, "[B, L, H, V]", (*q.shape[:3], v.shape[3]))
    R.check_like(op, "grad_out", grad_out, "q", q)
    R.check_last_stride(op, "grad_out", grad_out)
    state_shape, z_shape = _state_shapes(q, v, cu_seqlens, options.get("quadratic", False))
    for name, t, dims, expected in (
        ("state", state, "[N, H, K, V]", state_shape),
        ("z", z, "[N, H, K]", z_shape),
        ("grad_state", grad_state, "[N, H, K, V]", state_shape),
        ("grad_z", grad_z, "[N, H, K]", z_shape),
    ):
        if t is None and name.startswith("grad"):
            continue
        _check_float32(op, name, t, q, dims, expected)
        if name in ("state", "z") and not t.is_contiguous():
            raise R.value_error(op, name, "contiguous as the forward returned it", f"strides {tuple(t.stride())}")


# ---- reference and fake kernels ------------------------------------------------------------------------------------


def _by_name(options):
    """The reference takes strings."""
    named = dict(options)
    for name, names, default in (("feature_map", FEATURE_MAPS, 1), ("normalize", NORMALIZERS, 1)):
        named[name] = names[options.get(name, default)]
    return named


def _upcast(t):
    return t.float() if t is not None and t.is_floating_point() else t


def _reference_forward(q, k, v, *optionals, **options):
    out, state, z = _reference(*map(_upcast, (q, k, v, *optionals)), **_by_name(options))
    return out.to(q.dtype).contiguous(), state.contiguous(), z.contiguous()


def _reference_backward(grad_out, grad_state, grad_z, q, k, v, state, z, *optionals, **options):
    inputs = (q, k, v, *optionals, *(None,) * (6 - len(optionals)))
    with R.autograd_below_autograd():
        leaves = [t.detach().float().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
        outputs = _reference(*leaves, **_by_name(options))
        cotangents = (grad_out.float(), grad_state, grad_z)
        pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if g is not None]
        given = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad([o for o, _ in pairs], given, [g for _, g in pairs], allow_unused=True))
    grads = []
    for name, t in zip(_GRADIENTS, inputs, strict=True):
        if name == "cu_seqlens":
            continue
        if t is None:
            grads.append(q.new_empty(0, dtype=_absent_dtype(name, q)))
            continue
        g = next(found)
        grads.append(torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None else g.to(t.dtype))
    return tuple(g.contiguous() for g in grads)


_GRADIENTS = ("q", "k", "v", "q_den", "k_den", "weight", "cu_seqlens", "initial_state", "initial_z")


def _absent_dtype(name, q):
    return q.dtype if name in ("q_den", "k_den") else torch.float32


def _fake_forward(q, k, v, *optionals, **options):
    cu_seqlens = optionals[3] if len(optionals) > 3 else None
    state_shape, z_shape = _state_shapes(q, v, cu_seqlens, options.get("quadratic", False))
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(state_shape, dtype=torch.float32), q.new_empty(z_shape, dtype=torch.float32)


def _fake_backward(grad_out, grad_state, grad_z, q, k, v, state, z, *optionals, **options):
    inputs = (q, k, v, *optionals, *(None,) * (6 - len(optionals)))
    return tuple(
        q.new_empty((0,), dtype=_absent_dtype(name, q)) if t is None else q.new_empty(t.shape, dtype=t.dtype)
        for name, t in zip(_GRADIENTS, inputs, strict=True)
        if name != "cu_seqlens"
    )


R.define_op(NAME, SCHEMA, reference=_reference_forward, validate=_validate_forward, fake=_fake_forward)
R.define_op(
    f"{NAME}_backward", SCHEMA_BACKWARD,
    reference=_reference_backward, validate=_validate_backward, fake=_fake_backward, backward_of=NAME,
)  # fmt: skip


# ---- autograd ------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    out, state, z = output
    ctx.save_for_backward(*inputs, state, z)
    ctx.options = keyword_only_inputs
    ctx.out_shape = out.shape
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_state, grad_z):
    q, k, v, *optionals, state, z = ctx.saved_tensors
    if grad_out is None and grad_state is None and grad_z is None:
        return (None,) * 9
    if grad_out is None:
        grad_out = q.new_zeros(ctx.out_shape)
    elif grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if ctx.options["quadratic"]:
        grad_state = grad_z = None
    dq, dk, dv, *grads = torch.ops.effvit.linear_attention_backward(
        grad_out, grad_state, grad_z, q, k, v, state, z, *optionals, **ctx.options
    )
    grads.insert(3, None)  # cu_seqlens
    return (dq, dk, dv, *(None if t is None else g for g, t in zip(grads, optionals, strict=True)))


torch.library.register_autograd(f"effvit::{NAME}", _backward, setup_context=_setup_context, lib=R.LIBRARY)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "effvit::linear_attention_backward is not differentiable: for second derivatives differentiate "
        "effvit.reference.linear_attention, which is plain PyTorch"
    )


torch.library.register_autograd(f"effvit::{NAME}_backward", _no_double_backward, lib=R.LIBRARY)


# ---- autocast, vmap, sharding --------------------------------------------------------------------------------------


def _autocast(dtype, q, k, v, q_den=None, k_den=None, *rest):
    """The tokens run in the autocast dtype; weights and states are read in their own."""
    tokens = (t if t is None or not t.is_floating_point() else t.to(dtype) for t in (q, k, v, q_den, k_den))
    return (*tokens, *rest)


R.register_autocast(NAME, _autocast)
R.vmap_by_folding(NAME, foldable=(0, 1, 2, 3, 4, 5, 7, 8), unless_given=(6,))  # cu_seqlens takes a batch of one


def _register_sharding():
    """DTensor: shard the batch (dim 0) or the heads (dim 2, dim 1 of states); with cu_seqlens the heads only."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    # placements of tokens (and weights), of states
    everywhere, batch, heads = (Replicate(), Replicate()), (Shard(0), Shard(0)), (Shard(2), Shard(1))

    def present(placement, t):
        return None if t is None else placement

    def inputs(tokens, states, optionals):
        q_den, k_den, weight, cu_seqlens, initial_state, initial_z = (*optionals, *(None,) * (6 - len(optionals)))
        placed = [present(tokens, t) for t in (q_den, k_den, weight)]
        return [
            *placed, present(Replicate(), cu_seqlens), present(states, initial_state), present(states, initial_z),
        ][: len(optionals)]  # fmt: skip

    def placements(optionals):
        return (everywhere, heads) if len(optionals) > 3 and optionals[3] is not None else (everywhere, batch, heads)

    @register_sharding(torch.ops.effvit.linear_attention.default)
    def forward_rule(q, k, v, *optionals, **options):
        return [
            ([tokens, states, states], [tokens, tokens, tokens, *inputs(tokens, states, optionals)])
            for tokens, states in placements(optionals)
        ]

    R.shapes_depend_on(torch.ops.effvit.linear_attention.default, "quadratic")

    @register_sharding(torch.ops.effvit.linear_attention_backward.default)
    def backward_rule(grad_out, grad_state, grad_z, q, k, v, state, z, *optionals, **options):
        rules = []
        for tokens, states in placements(optionals):
            given = inputs(tokens, states, (*optionals, *(None,) * (6 - len(optionals))))
            grads = [Replicate() if p is None else p for p in (*given[:3], *given[4:])]  # of an absent one: [0]
            rules.append((
                [tokens, tokens, tokens, *grads],
                [
                    tokens, present(states, grad_state), present(states, grad_z), tokens, tokens, tokens, states,
                    states, *given[: len(optionals)],
                ],
            ))  # fmt: skip
        return rules


if torch.distributed.is_available():
    _register_sharding()


# ---- the public function -------------------------------------------------------------------------------------------


def prefers_quadratic(L: int, M: int, K: int, V: int) -> bool:
    """Whether the scores of all pairs cost no more than the state: L*M*(K+V) <= K*V*(L+M), SLAB's rule.

    Both forms compute the same numbers. Sizes that are symbolic (dynamic shapes under torch.compile) count as large.
    """
    quadratic = L * M * (K + V) <= K * V * (L + M)
    if type(quadratic) is bool and not torch.compiler.is_compiling():
        return quadratic
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(quadratic)


def index_of(op, name, x, names):
    if not isinstance(x, str):
        raise R.type_error(op, name, f"one of {', '.join(names)}", type(x).__name__)
    if x not in names:
        raise R.value_error(op, name, f"one of {', '.join(names)}", repr(x))
    return names.index(x)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_den: torch.Tensor | None = None,
    k_den: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    initial_z: torch.Tensor | None = None,
    *,
    feature_map: str = "relu",
    normalize: str = "sum",
    eps: float = 1e-6,
    clamp_min: float = 0.0,
    scale: float = 1.0,
    causal: bool = False,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Attention without softmax, in time linear in the number of tokens; not causal unless asked.

    With :math:`w_j` the weight of key j (1 if not given), for every sequence and head::

        S = initial_state + sum_j w_j phi(k_j)^T v_j        [K, V]
        z = initial_z     + sum_j w_j phi(k_den_j)          [K]
        out_i = scale * phi(q_i) S / d_i

    where d_i depends on ``normalize``, with n the number of keys summed (of this call, initial_state aside)::

        "none"   d_i = 1
        "sum"    d_i = phi(q_den_i) . z + eps
        "mean"   d_i = phi(q_den_i) . z + n * eps           (S / n over phi(q_den_i) . z / n + eps)
        "clamp"  d_i = max(phi(q_den_i) . z, clamp_min)

    Feature map, weights, normaliser and scale are fused into two passes over the tokens. Covers EfficientViT's and
    SANA's ReLU attention, SLAB, MLLA, FLatten (its focusing computed outside), L2ViT, the non-causal SSD of VSSD, and
    with ``causal=True`` the recurrent kind.

    Args:
        q: queries [B, L, H, K]: batch, tokens, heads, head dim.
        k: keys [B, M, H, K].
        v: values [B, M, H, V]. K and V between 1 and 256.
        q_den, k_den: [B, L, H, K] and [B, M, H, K], what the denominator is computed from instead of q and k, each on
            its own (MLLA ropes the numerator only). Not with ``normalize="none"``.
            All of these float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        weight: a factor of every key [B, M, H] (VSSD's dt * A); float32, bfloat16 or float16, any strides.
        cu_seqlens: [N + 1], int32 or int64: sequence n holds the tokens from ``cu_seqlens[n]`` to
            ``cu_seqlens[n+1] - 1`` of a batch of one, for q and k alike; from 0 to L, never falling. On a GPU the
            values are not checked (that would wait for the device); offsets outside are cut, and tokens beyond the
            last one give 0.
        initial_state, initial_z: [N, H, K, V] and [N, H, K], float32, what S and z start from; both or neither. N is B
            without cu_seqlens. A sequence may be cut into calls: each starts from what the last one returned.
        feature_map: phi, one of "none", "relu", "elu1" (elu(x) + 1) and "exp".
        normalize: one of "none", "sum", "mean" and "clamp".
        eps, clamp_min, scale: finite numbers. scale does not act on S and z.
        causal: query i sees keys 0 to i only; L must be M. S and z are returned over all keys nevertheless.
        return_state: return S and z as well.

    Returns:
        ``out`` [B, L, H, V] in the dtype of q; with ``return_state`` also ``state`` [N, H, K, V] and ``z`` [N, H, K],
        float32. All are differentiable (once) in every tensor argument but cu_seqlens.

    L = 0 gives the state of the keys alone, M = 0 the output of a given state alone. Without ``return_state``,
    cu_seqlens and initial_state, where L*M*(K+V) <= K*V*(L+M), the scores of all pairs are formed instead of S: fewer
    operations for the same result (SLAB's rule).

    Accumulates in float32. Deterministic; results do not depend on the number of threads. Under autocast q, k, v, q_den
    and k_den are cast, weight and the states are not.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Sources: Katharopoulos et al. (arXiv:2006.16236), EfficientViT (2205.14756), FLatten (2308.00442), SLAB
    (2405.11582), MLLA (2405.16605), VSSD (2407.18559), SANA (2410.10629), L2ViT (2501.16182).
    """
    if isinstance(cu_seqlens, torch.Tensor) and cu_seqlens.dtype == torch.int64:
        if cu_seqlens.dim() == 1 and cu_seqlens.shape[0] and isinstance(q, torch.Tensor) and q.dim() == 4:
            _check_offsets(NAME, cu_seqlens, q.shape[1])  # before they are cut to 32 bits
        cu_seqlens = cu_seqlens.to(torch.int32)
    _check_bool(NAME, "return_state", return_state)
    tensors = (q, k, v, q_den, k_den, weight, cu_seqlens, initial_state, initial_z)

    def call(**options):
        if not return_state and cu_seqlens is None and initial_state is None:
            options["quadratic"] = prefers_quadratic(q.shape[1], k.shape[1], q.shape[3], v.shape[3])
        return torch.ops.effvit.linear_attention.default(*tensors, **options)

    options = {
        "feature_map": index_of(NAME, "feature_map", feature_map, FEATURE_MAPS),
        "normalize": index_of(NAME, "normalize", normalize, NORMALIZERS),
        "eps": eps, "clamp_min": clamp_min, "scale": scale, "causal": causal,
    }  # fmt: skip
    out, state, z = R.call_or_explain(NAME, call, functools.partial(validate, NAME, *tensors), options)
    return (out, state, z) if return_state else out
