"""spectral_gate in readable PyTorch: the definition, and its gradient as PyTorch has it."""

import torch


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def spectral_gate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """irfft2(rfft2(x) * W): x [G, N, H, W, C], weight [G, H, W//2 + 1, C, 2] (real, imaginary) -> [G, N, H, W, C].

    irfft2 takes no imaginary part of the bins 0 and W/2 of the last axis, once the other is transformed back.
    """
    if x.numel() == 0:  # torch.fft refuses axes without elements
        return x * weight.sum().to(x.dtype)
    gate = torch.view_as_complex(_wide(weight).contiguous()).unsqueeze(1)
    spectrum = torch.fft.rfft2(_wide(x), dim=(2, 3)) * gate
    return torch.fft.irfft2(spectrum, s=x.shape[2:4], dim=(2, 3)).to(x.dtype)


def spectral_gate_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight): the gate with the conjugate of the weight, and sum_n conj(X) dY, where a bin between 0 and W/2
    counts twice, for itself and its mirror image.
    """
    dx = spectral_gate(grad_out, torch.stack((weight[..., 0], -weight[..., 1]), -1))
    H, W = x.shape[2:4]
    of_x, of_grad = (torch.fft.rfft2(_wide(t), dim=(2, 3)) for t in (x, grad_out))
    f = torch.arange(W // 2 + 1, device=x.device)
    twice = torch.where((f == 0) | (2 * f == W), 1.0 / (H * W), 2.0 / (H * W)).to(_wide(x).dtype)
    return dx, torch.view_as_real((of_x.conj() * of_grad).sum(1) * twice[:, None])
