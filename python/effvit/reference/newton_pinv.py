"""newton_pinv in readable PyTorch: the definition."""

import torch


class _Inverse(torch.autograd.Function):
    """v with the derivative of the inverse, dv = -v dp v, of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p, v):
        return v.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return -(v.mT @ grad @ v.mT), None


class _InverseWithTangent(_Inverse):
    """Apart, because torch.compile takes no function that has a jvp."""

    @staticmethod
    def jvp(ctx, tangent, _):
        (v,) = ctx.saved_tensors
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):  # off in here: outer levels lost their tangents
            return -(v @ tangent @ v)


def newton_pinv(a: torch.Tensor, *, iterations: int = 20, ridge: float = 0.01, step: float = 1.8) -> torch.Tensor:
    """[B, H, m, m] -> [B, H, m, m]: the inverse of a + ridge I by `iterations` Newton-Schulz steps.

    In float32 where the input has half precision. The derivative is that of the inverse, dV = -V da V, and not that of
    the steps: they are the same where the iteration has converged.
    """
    p = a.float() if a.dtype in (torch.bfloat16, torch.float16) else a
    with torch.no_grad():
        fixed = p.detach()
        alpha = step / fixed.sum(-1).amax(-1)[..., None, None].square()
        fixed = fixed + ridge * torch.eye(a.shape[-1], dtype=p.dtype, device=p.device)
        v = alpha * fixed
        for _ in range(iterations):
            v = 2 * v - (v @ fixed) @ v
    inverse = _Inverse if torch.compiler.is_compiling() else _InverseWithTangent
    return inverse.apply(p, v).to(a.dtype)
