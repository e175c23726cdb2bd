"""rbf_gram in readable PyTorch: the definition."""

import torch


def rbf_gram(q: torch.Tensor, k: torch.Tensor, *, gamma: float = 0.5) -> torch.Tensor:
    """exp(-gamma |q_i - k_j|^2): q [B, L, H, D], k [B, M, H, D] -> [B, H, L, M].

    The squared distance is |q_i|^2 + |k_j|^2 - 2 q_i.k_j, in float32 where the inputs have half precision. Rounding
    can take it below 0 for points that coincide; there it is 0.
    """
    dtype = q.dtype
    if dtype in (torch.bfloat16, torch.float16):
        q, k = q.float(), k.float()
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    norms = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
    distance = (norms - 2 * (q @ k.mT)).clamp(min=0)
    return (-gamma * distance).exp().to(dtype)
