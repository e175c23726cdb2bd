"""Layers whose kernels do not depend on the data: their spectra may be made once, for inference."""

import weakref

import torch
from torch import nn

from ._ops import asks_for_derivatives, fft_conv_spectrum


class CachedSpectra(nn.Module):
    """Adds `cache_spectra`. A layer says in `_kernels(size)` what its convolutions have for inputs of this size."""

    _spectra = None  # (size, spectra)
    _made_of = _memory = None  # what `_sources` said when they were made, and what it was about

    def _kernels(self, size):
        """[keyword arguments of fft_conv, k, k_rev and kernel_scale, of each convolution]"""
        raise NotImplementedError

    @torch.no_grad()
    def cache_spectra(self, *size):
        """Makes the spectra of the kernels for inputs of `size`, the number of tokens or (H, W); () forgets them.

        They stand in for the kernels in evaluation, where no derivative is asked for and inputs have that size: the
        filters are neither computed nor transformed there. Call `eval()` first: ValueError in training mode. Forgotten
        by `train()`, `load_state_dict` and where the layer is moved or cast; not used where any parameter or buffer is
        another, or was changed, since. Unseen are changes of numbers through `.data`, and all before a call that
        torch.compile compiles: call `cache_spectra` again after them. Inference tensors as parameters count as changed.
        """
        self._forget()
        if size:
            if any(m.training for m in self.modules()):
                name = type(self).__name__
                raise ValueError(f"effvit::{name}: cache_spectra must be called in evaluation mode, got training mode")
            self._spectra = (size, [fft_conv_spectrum(size=size, **kernel) for kernel in self._kernels(size)])
            self._remember()
        return self

    def _forget(self):
        self._spectra = self._made_of = self._memory = None

    def _remember(self):
        self._made_of = self._sources()
        # memory of the same address is the same memory while it is kept
        self._memory = [t.detach() for t in (*self.parameters(), *self.buffers())]

    def _sources(self):
        """[(a weak reference, what changes with its values) of all parameters and buffers]; None where nothing does."""
        sources = []
        for t in (*self.parameters(), *self.buffers()):
            if t.is_inference():  # without a version
                return None
            place = (t.data_ptr(), t.stride()) if type(t) in (torch.Tensor, nn.Parameter) else None
            sources.append((weakref.ref(t), (t._version, t.dtype, t.device, place)))
        return sources

    def _is_unchanged(self):
        if torch.compiler.is_compiling():
            return True
        before, now = self._made_of, self._sources()
        if before is None or now is None or len(before) != len(now) or any(m.training for m in self.modules()):
            return False
        return all(a() is b() and mark == other for (a, mark), (b, other) in zip(before, now, strict=True))

    def _convolutions(self, u, *size):
        """Keyword arguments of fft_conv for each convolution of an input u, by their spectra where these are there."""
        if self._spectra is not None and self._spectra[0] == size and not self.training:
            dtype = torch.complex128 if u.dtype == torch.float64 else torch.complex64
            derivatives = asks_for_derivatives(u, *self.parameters())
            if self._spectra[1][0].dtype == dtype and not derivatives and self._is_unchanged():
                return [{"spectrum": s} for s in self._spectra[1]]
        return self._kernels(size)

    def train(self, mode=True):
        if mode:
            self._forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args):
        self._forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self):
        """For copies, whose parameters are others: without `_made_of`, and without spectra that are no longer right."""
        state = self.__dict__ | {"_made_of": None, "_memory": None}
        if self._spectra is not None and not self._is_unchanged():
            state["_spectra"] = None
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if self._spectra is not None:
            self._remember()
