"""kernel_hash in readable PyTorch: the definition."""

import torch


def kernel_hash(x, anchors, mean, projection):
    """x [B, L, H, K], anchors [H, P, K], mean [H, P], projection [H, F, P] -> [B, L, H, F].

    A (exp(-|x - anchor|^2 / 2 sigma) - mean), sigma the mean of |x - anchor|^2 over the tokens and anchors of an image
    and a head (1 where that is 0). Distances by |x|^2 - 2 x anchor + |anchor|^2, and the sums,
    in float64: a sign must not depend on the order in which a product of this or that size adds up.
    """
    wide, anchors, mean, projection = (t.double() for t in (x, anchors, mean, projection))
    products = torch.einsum("blhk,hpk->blhp", wide, anchors)
    distance = (wide.square().sum(-1, keepdim=True) - 2 * products + anchors.square().sum(-1)).clamp(min=0)
    sigma = distance.mean((1, 3), keepdim=True)
    sigma = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    kernel = torch.exp((-distance / (2 * sigma)).to(x.dtype))
    return torch.einsum("blhp,hfp->blhf", kernel.double() - mean, projection).to(x.dtype)
