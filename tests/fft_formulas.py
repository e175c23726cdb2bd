"""Long convolutions written down plainly, for the tests of layers: with Toeplitz matrices, and with torch.fft."""

import torch
import torch.nn.functional as F
from layer_suite import spread
from torch import nn


def shared(module, name, shape):
    """layer_suite.spread of a parameter that is used several times: all of its terms are found."""
    p = getattr(module, name)
    y = p.expand(shape)
    if hasattr(module, "absolute_terms"):
        found, prefix = module.absolute_terms

        def add(g):
            found[prefix + name] = found.get(prefix + name, 0) + g.abs().sum_to_size(p.shape)

        y.register_hook(add)
    return y


def wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def taps_at(k, lags):
    """k [.., K] -> [.., *lags.shape]: zero beyond the K taps."""
    K = k.shape[-1]
    return F.pad(k, (0, 1))[..., torch.where((lags >= 0) & (lags < K), lags, K)]


def toeplitz(u, k, d=None, k_rev=None, circular=False, scale=1.0):
    """u [B, L, C], k and k_rev [C, K] or [B, C, K] -> [B, L, C]: every output's sum over all tokens."""
    L = u.shape[1]
    lag = torch.arange(L)[:, None] - torch.arange(L)
    matrix = taps_at(wide(k), lag % L if circular else lag)
    if k_rev is not None:
        matrix = matrix + taps_at(wide(k_rev), -lag)
    y = torch.einsum("cij,bjc->bic" if k.dim() == 2 else "bcij,bjc->bic", matrix * scale, wide(u))
    return (y if d is None else y + wide(d) * wide(u)).to(u.dtype)


def fourier(u, k, d=None, k_rev=None, circular=False, scale=1.0):
    """The same by transforms: circular ones of L tokens, or long enough that nothing wraps around."""
    L = u.shape[1]
    n = L if circular else L + max(k.shape[-1], 0 if k_rev is None else k_rev.shape[-1])
    spectrum = torch.fft.fft(wide(k), n=n)
    if k_rev is not None:
        spectrum = spectrum + torch.fft.fft(wide(k_rev), n=n).conj()
    y = torch.fft.ifft(torch.fft.fft(wide(u).mT, n=n) * spectrum * scale).real[..., :L].mT
    return (y if d is None else y + wide(d) * wide(u)).to(u.dtype)


def toeplitz2d(u, k, d, scale):
    """u [B, H, W, C], k [C, KH, KW] -> [B, H, W, C], causal in rows and columns."""
    rows, columns = (torch.arange(n)[:, None] - torch.arange(n) for n in u.shape[1:3])
    matrix = taps_at(taps_at(wide(k).mT, rows).movedim(1, -1), columns)  # [C, H, H, W, W]
    return (torch.einsum("cipjq,bpqc->bijc", matrix * scale, wide(u)) + wide(d) * wide(u)).to(u.dtype)


def fourier2d(u, k, d, scale):
    size = [a + b for a, b in zip(u.shape[1:3], k.shape[1:], strict=True)]
    spectrum = torch.fft.fft2(wide(k), s=size) * torch.fft.fft2(wide(u).permute(0, 3, 1, 2), s=size)
    y = torch.fft.ifft2(spectrum * scale).real[..., : u.shape[1], : u.shape[2]].permute(0, 2, 3, 1)
    return (y + wide(d) * wide(u)).to(u.dtype)


def sine_mlp(mlp, h, owner=None):
    """Linear layers, and sin(freq h) in between, the freq of `owner` or of the first of them."""
    owner = mlp[1] if owner is None else owner
    for layer in mlp:
        h = layer(h) if isinstance(layer, nn.Linear) else torch.sin(shared(owner, "freq", h.shape) * h)
    return h


def implicit_taps(f, L, mlp="implicit_filter"):
    """The taps [channels, L] of a HyenaFilter: an MLP of the positions, and exponential windows."""
    z = spread(f.pos_emb, "z", f.pos_emb.z.shape)[0, :L]
    h = sine_mlp(getattr(f, mlp), z, f.implicit_filter[1])
    if f.normalized:
        h = h / h.abs().sum(-1)[:, None]
    if f.modulate:
        h = h * ((-f.pos_emb.t[0, :L] * f.modulation.deltas[0].abs()).exp() + f.modulation.shift)
    return h.mT


def positions(seq_len, emb_dim):
    """[seq_len, emb_dim] in float64: t, and real and imaginary part of exp(-i f w)."""
    t = torch.linspace(0, 1, seq_len, dtype=torch.float64)[:, None]
    bands = (emb_dim - 1) // 2
    w = 2 * torch.pi * torch.arange(seq_len, dtype=torch.float64)[:, None] / seq_len
    z = torch.exp(-1j * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64) * w)
    return torch.cat([t, z.real, z.imag], dim=-1)
