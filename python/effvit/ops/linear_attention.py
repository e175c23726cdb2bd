"""linear_attention: the declaration, the checks of its options and the public function."""

from __future__ import annotations

import torch

from ..reference.linear_attention import FEATURE_MAPS as _FEATURES
from ..reference.linear_attention import linear_attention as _definition
from ._checks import as_bool, given_together, has_readable_values, index_of, shape, value_error
from ._op import op
from ._transforms import float_

FEATURE_MAPS = ("none", "relu", "elu1", "exp")  # the schema's ints are indices into these
NORMALIZERS = ("none", "sum", "mean", "clamp")
_HEAD_DIM = "have a head dim between 1 and 256"


def _reference(*tensors, feature_map, normalize, **options):
    return _definition(*tensors, feature_map=FEATURE_MAPS[feature_map], normalize=NORMALIZERS[normalize], **options)


def _derive(op, dims, options, tensors):
    """N sequences: the batch, or those of cu_seqlens. The quadratic form has no states: K' = V' = 0."""
    given = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    quadratic = options["quadratic"]
    dims["K'"], dims["V'"] = (0, 0) if quadratic else (dims["K"], dims["V"])
    if tensors["cu_seqlens"] is None:
        dims["N"] = dims["B"]
    if options["causal"] and dims["L"] != dims["M"]:
        raise value_error(op, "k", f"as long as q when causal is True, {dims['L']}", dims["M"])
    for name in ("q_den", "k_den"):
        if name in given and NORMALIZERS[options["normalize"]] == "none":
            raise value_error(op, name, "None when normalize is none", shape(given[name]))
    for name in ("cu_seqlens", "initial_state"):
        if name in given and quadratic:
            raise value_error(op, name, "None when quadratic is True", shape(given[name]))
    given_together(op, tensors, "initial_state", "initial_z")


def _check(op, dims, options, tensors):
    cu_seqlens = tensors["cu_seqlens"]
    if cu_seqlens is None:
        return
    if dims["B"] != 1:
        given = shape(tensors["q"])
        raise ValueError(f"effvit::{op}: q must have a batch size of 1 when cu_seqlens is given, got {given}")
    if dims["L"] != dims["M"]:
        raise value_error(op, "k", f"as long as q when cu_seqlens is given, {dims['L']}", dims["M"])
    _check_offsets(op, cu_seqlens, dims["L"])


def _check_offsets(op, cu_seqlens, L):
    if not has_readable_values(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    rising = all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
    if offsets[0] != 0 or offsets[-1] != L or not rising:
        raise ValueError(f"effvit::{op}: cu_seqlens must rise from 0 to the length of q, {L}, got {offsets}")


def _flops(dims, options):
    """Matrix products. Linear form: state and output, in the backward two products per side. Quadratic: two; five."""
    L, M, K, V = (dims[n] for n in "LMKV")
    heads = 2 * dims["B"] * dims["H"]
    if options["quadratic"]:
        return heads * L * M * (K + V), heads * L * M * (3 * K + 2 * V)
    return heads * K * V * (L + M), 2 * heads * K * V * (L + M)


# ---- forward mode ----------------------------------------------------------------------------------------------------


def _moved_features(options, x, dx, weight=None, dweight=None):
    """The tangent of w phi(x); None where nothing moves."""
    name, moved = FEATURE_MAPS[options["feature_map"]], dx
    if dx is not None and name == "relu":
        moved = torch.ops.aten.threshold_backward(dx, x, 0)  # dx where x > 0, in one pass
    elif dx is not None and name != "none":
        moved = dx * (x if name == "exp" else x.clamp(max=0)).exp()
    if weight is not None and moved is not None:
        moved = weight[..., None] * moved
    if dweight is not None:
        moved = dweight[..., None] * _features(options, x) + (0.0 if moved is None else moved)
    return moved


def _features(options, x, weight=None):
    value = _FEATURES[FEATURE_MAPS[options["feature_map"]]](x)
    return value if weight is None else weight[..., None] * value


def _tangent(op, primals, tangents, results, options):
    """Forward mode by the op's own kernels: the product rule of out * d = scale * phi(q) S."""
    p, t = ({n: None if x is None else float_(x) for n, x in given.items()} for given in (primals, tangents))
    by_states = not options["causal"] and p["cu_seqlens"] is None
    rule = _quotients_by_states if by_states else _quotients_by_pairs
    dnum, dden, dstate, dz = rule(op, p, t, results, options)
    dout = dnum if options["scale"] == 1.0 else options["scale"] * dnum
    dout = dout if dden is None else torch.addcmul(dout, results[0].float(), dden, value=-1)
    return tuple(
        torch.zeros_like(x) if dx is None or not x.numel() else dx.reshape(x.shape).to(x.dtype)
        for x, dx in zip(results, (dout, dstate, dz), strict=True)
    )


def _quotients_by_states(op, p, t, results, options):
    """Tangents of phi(q) S over d, of d over d (None without one), of S and of z.

    States move by calls without queries; queries meet them, and those of before, in calls without keys. z is a column
    beside S where the denominator has the numerator's features.
    """
    q, k, v, weight = (p[n] for n in ("q", "k", "v", "weight"))
    normalize, V = NORMALIZERS[options["normalize"]], v.shape[3]

    def states(k, v, k_den=None, weight=None, feature_map=0):
        return op.overload(q[:, :0], k, v, None, k_den, weight, feature_map=feature_map)[1:]

    own = options["feature_map"]
    state, z = states(k, v, p["k_den"], weight, own) if options["quadratic"] else results[1:]
    dstate, dz = torch.zeros_like(state), torch.zeros_like(z)
    dk = _moved_features(options, k, t["k"], weight, t["weight"])
    if dk is not None:
        dstate, dz_of_k = states(dk, v)
        dz = dz_of_k if p["k_den"] is None else dz
    if t["v"] is not None:
        dstate = dstate + states(k, t["v"], None, weight, own)[0]
    if p["k_den"] is not None:
        dk_den = _moved_features(options, p["k_den"], t["k_den"], weight, t["weight"])
        dz = dz if dk_den is None else states(dk_den, v[..., :1])[1]
    dstate = dstate if t["initial_state"] is None else dstate + t["initial_state"]
    dz = dz if t["initial_z"] is None else dz + t["initial_z"]

    form = {n: options[n] for n in ("normalize", "eps", "clamp_min")}
    if normalize == "mean":
        form |= {"normalize": NORMALIZERS.index("sum"), "eps": options["eps"] * k.shape[1]}

    def quotient(q, q_den, state, feature_map, form=form):
        no_values = state.new_empty(q.shape[0], 0, q.shape[2], state.shape[3])
        return op.overload(
            q, k[:, :0], no_values, q_den, None, None, None, state, z, feature_map=feature_map, **form
        )[0]  # fmt: skip

    q_den = q if p["q_den"] is None else p["q_den"]
    value = None if normalize == "none" else _features(options, q_den)

    def moved(q, dq, state, dstate):
        """Of phi(q) state over d."""
        total = quotient(q, None if value is None or q is q_den else q_den, dstate, own)
        return total if dq is None else total + quotient(dq, value, state, 0)

    column, dcolumn = z[..., None], dz[..., None]
    dq = _moved_features(options, q, t["q"])
    if normalize == "none":
        return moved(q, dq, state, dstate), None, dstate, dz
    if q_den is q and V < 256:
        wide = moved(q, dq, torch.cat([state, column], -1), torch.cat([dstate, dcolumn], -1))
        dnum, dden = wide[..., :V], wide[..., V:]
    else:
        dnum = moved(q, dq, state, dstate)
        dden = moved(q_den, dq if q_den is q else _moved_features(options, q_den, t["q_den"]), column, dcolumn)
    if normalize == "clamp":
        dden = torch.where(quotient(q_den, None, column, own, {"normalize": 0}) < options["clamp_min"], 0.0, dden)
    return dnum, dden, dstate, dz


def _quotients_by_pairs(op, p, t, results, options):
    """The same where every query has a sum of its own: three calls without a normaliser, each with one factor moved."""
    form = {"causal": options["causal"], "quadratic": options["quadratic"], "feature_map": 0, "normalize": 0}
    weight = p["weight"], t["weight"]

    def attend(q, k, v, initial):
        z = None if initial is None else initial.new_zeros(initial.shape[:-1])
        return op.overload(q, k, v, None, None, None, p["cu_seqlens"], initial, z, **form)[:2]

    def moved(q, k, v, dv, initial, dinitial):
        (q, dq), (k, dk), terms = q, k, []
        if dq is not None:
            terms.append((attend(dq, k, v, initial)[0], 0.0))
        if dk is not None or dinitial is not None:
            terms.append(attend(q, torch.zeros_like(k) if dk is None else dk, v, dinitial))
        if dv is not None:
            terms.append(attend(q, k, dv, None))
        if not terms:
            return torch.zeros_like(v), None
        out, state = (sum(column) for column in zip(*terms, strict=True))
        return out, None if isinstance(state, float) else state

    def column(x):
        return None if x is None else x[..., None]

    def both(name, weight=(None, None)):
        return _features(options, p[name], weight[0]), _moved_features(options, p[name], t[name], *weight)

    q, k = both("q"), both("k", weight)
    dnum, dstate = moved(q, k, p["v"], t["v"], p["initial_state"], t["initial_state"])
    q_den = q if p["q_den"] is None else both("q_den")
    k_den = k if p["k_den"] is None else both("k_den", weight)
    ones, sums = torch.ones_like(p["v"][..., :1]), column(p["initial_z"])
    dden, dz = moved(q_den, k_den, ones, None, sums, column(t["initial_z"]))
    normalize = NORMALIZERS[options["normalize"]]
    if normalize == "none":
        return dnum, None, dstate, dz
    if normalize == "clamp":
        dden = torch.where(attend(q_den[0], k_den[0], ones, sums)[0] < options["clamp_min"], 0.0, dden)
    inverse = _one_over_denominator(op, p, options)
    return dnum * inverse, dden * inverse, dstate, dz


def _one_over_denominator(op, p, options):
    """The op on values of 0, and a state whose product with phi(q) is 1."""
    q, k, v = p["q"], p["k"], p["v"]
    N, K = (q.shape[0] if p["cu_seqlens"] is None else p["cu_seqlens"].shape[0] - 1), q.shape[3]
    unit = (torch.arange(K, device=q.device) == 0).to(q.dtype)
    like_one = unit if FEATURE_MAPS[options["feature_map"]] in ("none", "relu") else q.new_zeros(K)
    state = unit[:, None].expand(N, q.shape[2], K, 1)
    z = q.new_zeros(N, q.shape[2], K) if p["initial_z"] is None else p["initial_z"]
    q_den, k_den = (p[d] if p[d] is not None else p[n] for d, n in (("q_den", "q"), ("k_den", "k")))
    return op.overload(
        like_one.expand(q.shape), k, torch.zeros_like(v[..., :1]), q_den, k_den, p["weight"], p["cu_seqlens"], state, z,
        **{**options, "scale": 1.0, "quadratic": False},
    )[0]  # fmt: skip


OP = op(
    "linear_attention",
    """q: B L H K, k: B M H K, v: B M H V, q_den?: B L H K, k_den?: B M H K, weight?: B M H | float strided,
    cu_seqlens?: N+1 | int32 packed, initial_state?: N H K V | float32 packed, initial_z?: N H K | float32 packed
    -> out: B L H V, state: N H K' V' | float32, z: N H K' | float32""",
    """feature_map: int in 0..3 = 1, normalize: int in 0..3 = 1, eps: float = 1e-06, clamp_min: float = 0.,
    scale: float = 1., causal: bool = False, quadratic: bool = False""",
    reference=_reference,
    saves="state z",
    limits={"q.K": (1, 256, _HEAD_DIM), "v.V": (1, 256, _HEAD_DIM)},
    derive=_derive,
    check=_check,
    empty="B H",
    batch="B N",
    alone="cu_seqlens",
    shards=("B N", "H"),
    shape_options=("quadratic",),
    flops=_flops,
    tangent=_tangent,
)


def prefers_quadratic(L: int, M: int, K: int, V: int) -> bool:
    """Whether the scores of all pairs cost no more than the state: L*M*(K+V) <= K*V*(L+M), SLAB's rule.

    Both forms compute the same numbers. Sizes that are symbolic (dynamic shapes under torch.compile, torch.jit.trace)
    count as large.
    """
    if torch.jit.is_tracing():
        return False
    quadratic = L * M * (K + V) <= K * V * (L + M)
    if type(quadratic) is bool and not torch.compiler.is_compiling():
        return quadratic
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(quadratic)


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
        float32. All are differentiable in every tensor argument but cu_seqlens.

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
        if cu_seqlens.dim() == 1 and cu_seqlens.shape[0] and _are_tokens(q):
            _check_offsets(OP.name, cu_seqlens, q.shape[1])  # before they are cut to 32 bits
        cu_seqlens = cu_seqlens.clamp(0, 2**31 - 1).to(torch.int32)
    as_bool(OP.name, "return_state", return_state)
    options = {
        "feature_map": index_of(OP.name, "feature_map", feature_map, FEATURE_MAPS),
        "normalize": index_of(OP.name, "normalize", normalize, NORMALIZERS),
        "eps": eps, "clamp_min": clamp_min, "scale": scale, "causal": causal,
    }  # fmt: skip
    if not return_state and cu_seqlens is None and initial_state is None and _are_tokens(q, k, v):
        options["quadratic"] = prefers_quadratic(q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    out, state, z = OP(q, k, v, q_den, k_den, weight, cu_seqlens, initial_state, initial_z, **options)
    return (out, state, z) if return_state else out


def _are_tokens(*tensors):
    return all(isinstance(t, torch.Tensor) and not t.is_nested and t.dim() == 4 for t in tensors)
