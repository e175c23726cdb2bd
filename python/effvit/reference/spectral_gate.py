"""spectral_gate in readable PyTorch: the definition."""

import torch


def spectral_gate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """irfft2(rfft2(x) * W): x [G, N, H, W, C], weight [G, H, W//2 + 1, C, 2] (real, imaginary) -> [G, N, H, W, C].

    irfft2 takes no imaginary part of the bins 0 and W/2 of the last axis, once the other is transformed back.
    """
    if x.numel() == 0:  # torch.fft refuses axes without elements
        return x * weight.sum().to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = torch.view_as_complex(weight.to(wide).contiguous()).unsqueeze(1)
    spectrum = torch.fft.rfft2(x.to(wide), dim=(2, 3)) * gate
    return torch.fft.irfft2(spectrum, s=x.shape[2:4], dim=(2, 3)).to(x.dtype)
