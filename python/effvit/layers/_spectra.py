"""Layers whose kernels do not depend on the data: their spectra may be made once, for inference."""

import torch
from torch import nn

from ._ops import asks_for_derivatives, fft_conv_spectrum


class CachedSpectra(nn.Module):
    """Adds `cache_spectra`. A layer says in `_kernels(size)` what its convolutions have for inputs of this size."""

    _spectra = None  # (size, spectra)

    def _kernels(self, size):
        """[keyword arguments of fft_conv, k, k_rev and kernel_scale, of each convolution]"""
        raise NotImplementedError

    @torch.no_grad()
    def cache_spectra(self, *size):
        """Makes the spectra of the kernels for inputs of `size`, the number of tokens or (H, W); () forgets them.

        They stand in for the kernels in evaluation, where no derivative is asked for and inputs have that size: the
        filters are neither computed nor transformed there. Forgotten by `train()`, `load_state_dict` and where the
        layer is moved or cast; not by a parameter that changes in place.
        """
        self._spectra = None
        if size:
            self._spectra = (size, [fft_conv_spectrum(size=size, **kernel) for kernel in self._kernels(size)])
        return self

    def _convolutions(self, u, *size):
        """Keyword arguments of fft_conv for each convolution of an input u, by their spectra where these are there."""
        if self._spectra is not None and self._spectra[0] == size and not self.training:
            dtype = torch.complex128 if u.dtype == torch.float64 else torch.complex64
            if self._spectra[1][0].dtype == dtype and not asks_for_derivatives(u, *self.parameters()):
                return [{"spectrum": s} for s in self._spectra[1]]
        return self._kernels(size)

    def train(self, mode=True):
        if mode:
            self._spectra = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._spectra = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args):
        self._spectra = None
        super()._load_from_state_dict(*args)
