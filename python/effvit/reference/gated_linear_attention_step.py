"""One token of gated linear attention in readable PyTorch: the definition."""

from .gated_linear_attention import decays


def gated_linear_attention_step(q, k, v, state, g_head=None, g_token=None, g_channel=None, *, scale=1.0):
    """q, k [B, H, K], v [B, H, V], state [B, H, K, V] -> out [B, H, V], new_state [B, H, K, V].

    g_head [H], g_token [B, H], g_channel [B, H, K], at most one of them.
    """
    decay = decays(q, g_head, g_token, g_channel)
    state = state.to(q.dtype)
    state = (state if decay is None else decay * state) + k[..., None] * v[..., None, :]
    return scale * (q[..., None, :] @ state).squeeze(-2), state
