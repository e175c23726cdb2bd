"""Linear attention in readable PyTorch: the definition every kernel is tested against.

Differentiable, any floating-point dtype (computes in the dtype of its inputs), any device.
"""

import torch

FEATURE_MAPS = {
    "none": lambda x: x,
    "relu": torch.relu,
    # elu(x) + 1, without the cancellation of expm1(x) + 1; the clamp keeps the unused branch's gradient finite
    "elu1": lambda x: torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))),
    "exp": torch.exp,
}
NORMALIZERS = ("none", "sum", "mean", "clamp")
CHUNK = 128  # queries of the causal form whose scores exist at a time


def linear_attention(
    q, k, v, q_den=None, k_den=None, weight=None, cu_seqlens=None, initial_state=None, initial_z=None,
    *, feature_map="relu", normalize="sum", eps=1e-6, clamp_min=0.0, scale=1.0, causal=False, quadratic=False,
):  # fmt: skip
    """q [B, L, H, K], k [B, M, H, K], v [B, M, H, V] -> out [B, L, H, V], state [N, H, K, V], z [N, H, K].

    The arguments are those of effvit.linear_attention. `quadratic` computes the same `out` from the scores of all
    pairs, and returns state [N, H, 0, 0] and z [N, H, 0].
    """
    options = {
        "feature_map": feature_map, "normalize": normalize, "eps": eps, "clamp_min": clamp_min, "scale": scale,
        "causal": causal,
    }  # fmt: skip
    if cu_seqlens is not None:
        tokens = (q, k, v, q_den, k_den, weight)
        return _by_segment(tokens, cu_seqlens.tolist(), initial_state, initial_z, options)

    phi = FEATURE_MAPS[feature_map]
    (B, L, H, K), M, V = q.shape, k.shape[1], v.shape[3]
    q, q_den = phi(q), phi(q if q_den is None else q_den)
    k, k_den = phi(k), phi(k if k_den is None else k_den)
    if weight is not None:
        k, k_den = (x * weight.to(x.dtype)[..., None] for x in (k, k_den))
    if initial_state is None:
        initial_state, initial_z = q.new_zeros(B, H, K, V), q.new_zeros(B, H, K)
    state = initial_state.to(q.dtype) + torch.einsum("bmhk,bmhv->bhkv", k, v)
    z = initial_z.to(q.dtype) + k_den.sum(1)

    if quadratic:
        scores, scores_den = _scores(q, k, causal), _scores(q_den, k_den, causal)
        numerator = torch.einsum("bhlm,bmhv->blhv", scores, v)
        denominator = scores_den.sum(-1).transpose(1, 2)
        state, z = state[:, :, :0, :0], z[:, :, :0]
    elif causal:
        numerator, denominator = _causal(q, k, v, q_den, k_den, initial_state.to(q.dtype), initial_z.to(q.dtype))
    else:
        numerator = torch.einsum("blhk,bhkv->blhv", q, state)
        denominator = torch.einsum("blhk,bhk->blh", q_den, z)

    if normalize == "sum":
        denominator = denominator + eps
    elif normalize == "mean":  # phi(q) (S / n) / (phi(q) . (z / n) + eps), n keys
        count = torch.arange(1, L + 1, device=q.device, dtype=q.dtype)[:, None] if causal else M
        denominator = denominator + count * eps
    elif normalize == "clamp":
        denominator = denominator.clamp(min=clamp_min)
    out = scale * numerator
    return out if normalize == "none" else out / denominator[..., None], state, z


def _scores(q, k, causal):  # [B, H, L, M]
    scores = torch.einsum("blhk,bmhk->bhlm", q, k)
    return scores.tril() if causal else scores


def _causal(q, k, v, q_den, k_den, state, z):
    """Query i sees keys 0..i: the state of the chunks before its own, and the scores within its own."""
    numerators, denominators = [v[:, :0]], [q_den[:, :0, :, 0]]
    for chunk in zip(*(x.split(CHUNK, dim=1) for x in (q, k, v, q_den, k_den)), strict=True):
        cq, ck, cv, cq_den, ck_den = chunk
        inside = torch.einsum("bhlm,bmhv->blhv", _scores(cq, ck, True), cv)
        inside_den = _scores(cq_den, ck_den, True).sum(-1).transpose(1, 2)
        numerators.append(torch.einsum("blhk,bhkv->blhv", cq, state) + inside)
        denominators.append(torch.einsum("blhk,bhk->blh", cq_den, z) + inside_den)
        state = state + torch.einsum("bmhk,bmhv->bhkv", ck, cv)
        z = z + ck_den.sum(1)
    return torch.cat(numerators, 1), torch.cat(denominators, 1)


def _by_segment(tokens, offsets, initial_state, initial_z, options):
    """Segment n holds tokens offsets[n] to offsets[n+1] - 1 of a batch of one; tokens after the last one give zeros."""
    q, k, v = tokens[:3]
    none = k[0, :0]  # of no segment: [0, H, K]; part of the graph, like the rest
    outs, states, zs = [q[:, :0, :, :1] * v[:, :0]], [none[..., None] * v[0, :0, :, None]], [none]
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        segment = (None if t is None else t[:, begin:end] for t in tokens)
        initial = (None if t is None else t[n : n + 1] for t in (initial_state, initial_z))
        out, state, z = linear_attention(*segment, None, *initial, **options)
        outs.append(out)
        states.append(state)
        zs.append(z)
    outs.append(v.new_zeros(1, q.shape[1] - offsets[-1], *v.shape[2:]))
    return torch.cat(outs, 1), torch.cat(states), torch.cat(zs)
