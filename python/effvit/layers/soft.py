"""SOFT's softmax-free attention and its normalised variant: Gaussian kernel, Newton pseudo-inverse, linear order."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops._dispatcher import in_forward_mode
from ._ops import newton_pinv, rbf_gram
from ._tokens import _dtype_of_convolution, conv2d, is_hooked, is_slow, same_padding


def is_plain(linear):
    """Whether a projection is its weight and bias and nothing more: no adapter, no hook."""
    return type(linear) is nn.Linear and not is_hooked(linear)


def linear_per_image(x, linear, channels):
    """x [B, in, N] -> [B, out, N] (channels=1) or [B, N, out] (channels=2), contiguous: one GEMM per image."""
    weight = linear.weight.expand(x.shape[0], -1, -1)
    a, b = (weight, x) if channels == 1 else (x.mT, weight.mT)
    if linear.bias is None:
        return torch.bmm(a, b)
    return torch.baddbmm(linear.bias[:, None] if channels == 1 else linear.bias, a, b)


class SharedDepthwiseConv(torch.autograd.Function):
    """Depthwise convolution, stride 1, that keeps the size of its map, with one filter per group of channels.

    x [B, C, H, W], weight [h, 1, k, k], k odd -> [B, C, H, W]; channel c takes filter c // (C / h). As F.conv2d with
    the filters repeated, but for the gradient of the filters: PyTorch's own on the CPU, on maps channels last, adds the
    B*H*W terms of a channel one after another in one float32. At 56x56, batch 8, that is tens of eps off.
    """

    @staticmethod
    def forward(x, weight):
        wide = weight.repeat_interleave(x.shape[1] // weight.shape[0], dim=0)
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, wide, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        filters, _, _, size = weight.shape
        wide = weight.repeat_interleave(x.shape[1] // filters, dim=0)
        padding = [size // 2] * 2
        with torch.autocast("cpu", enabled=False):
            if x.dtype == torch.float64:
                options = (None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1])
                grad_x, grad_wide, _ = torch.ops.aten.convolution_backward(grad, x, wide, *options, [True, True, False])
            else:
                maps = (t.permute(0, 2, 3, 1) for t in (grad, x))
                maps = (t if t.stride(-1) == 1 else t.contiguous() for t in maps)
                gradients = torch.ops.effvit.dwconv_backward(*maps, wide.squeeze(1), before=padding, after=padding)
                grad_x, grad_wide = gradients[0].permute(0, 3, 1, 2), gradients[1].unsqueeze(1)
        return grad_x, grad_wide.unflatten(0, (filters, -1)).sum(1)

    @staticmethod
    def vmap(info, in_dims, x, weight):
        """The mapped dim joins the batch; where it has filters of its own, the channels."""
        x_dim, weight_dim = in_dims
        if weight_dim is None:
            x = x.movedim(x_dim, 0)
            return shared_depthwise_conv(x.flatten(0, 1), weight).unflatten(0, x.shape[:2]), 0
        x = x.unsqueeze(1).expand(-1, info.batch_size, -1, -1, -1) if x_dim is None else x.movedim(x_dim, 1)
        weight = weight.movedim(weight_dim, 0).flatten(0, 1)
        return shared_depthwise_conv(x.flatten(1, 2), weight).unflatten(1, x.shape[1:3]), 1


def shared_depthwise_conv(x, weight):
    """`SharedDepthwiseConv` of x [B, C, H, W] and weight [h, 1, k, k]; in forward mode, PyTorch's convolution."""
    if in_forward_mode():
        return SharedDepthwiseConv.forward(x, weight)
    return SharedDepthwiseConv.apply(x, weight)


class SoftmaxFreeAttentionKernel(nn.Module):
    """The attention of SOFT (arXiv:2110.11945) without its projections; arguments and state_dict of the original.

    With q = Q / d^(1/4), landmarks t = GELU(LayerNorm(conv(q))) (kernel and stride `ratio`) and k(a, b) =
    exp(-|a - b|^2 / 2)::

        out = k(q, t) pinv(k(t, t)) k(t, q) V + depthwise conv of V

    evaluated from the right, so that nothing larger than k(q, t) [N, m] exists. pinv is `max_iter` Newton steps on
    k(t, t) + 0.01 I (`effvit.newton_pinv`), in float32 whatever the dtype: a ridge of 0.01 does not survive bfloat16.
    Its backward is the closed form of the inverse, as in the original.

    `ratio=1`: out = k(t, t) V + conv, t from a linear layer; the tokens may start with a class token, whose value is
    added in the place of the convolution. A map that `ratio` does not divide gives floor(H/ratio) x floor(W/ratio)
    landmarks. `kernel_method` is accepted and does nothing.

    Compared with fudan-zvg/SOFT, models/softmax_free_transformer.py and SOFT/kernel/inverse.py at d3febc3. There the
    kernel matrices are also of the input's dtype, and `ratio=1` fails (it reads an attribute that is never set).
    """

    def __init__(self, dim, num_heads, ratio, use_conv, max_iter=20, kernel_method="cuda", device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.head_dim = dim // num_heads
        self.num_head = num_heads
        self.ratio = ratio
        self.max_iter = max_iter
        d = self.head_dim
        if ratio == 1:
            self.Qlandmark_op = nn.Linear(d, d, bias=False, **factory)
        else:
            self.Qlandmark_op = nn.Conv2d(d, d, ratio, stride=ratio, bias=False, **factory)
        self.Qnorm_act = nn.Sequential(nn.LayerNorm(d, **factory), nn.GELU())
        self.use_conv = use_conv
        if use_conv:
            padding = same_padding(self, "use_conv", use_conv)
            self.conv = nn.Conv2d(
                num_heads, num_heads, use_conv, padding=padding, bias=False, groups=num_heads, **factory
            )

    def forward(self, Q, V, H, W):
        """Q, V [B, h, N, d] -> [B, h, N, d], N = H*W (with ratio 1 also H*W + 1)."""
        name, tokens = f"effvit::{type(self).__name__}", Q.shape[2]
        if tokens != H * W and (self.ratio > 1 or tokens != H * W + 1):
            raise ValueError(f"{name}: Q must have H*W = {H * W} tokens, got {tokens}")
        if H < self.ratio or W < self.ratio:
            raise ValueError(f"{name}: H and W must be >= ratio {self.ratio}, got {H} and {W}")
        q = Q.transpose(1, 2) * self.head_dim**-0.25  # [B, N, h, d]: as projections are laid out
        t = self.landmarks(q, H, W)
        if self.ratio == 1:
            kernel = rbf_gram(t, t)
            out = kernel.to(V.dtype) @ V
        else:
            kernel = rbf_gram(q, t.to(q.dtype))
            inverse = self.pseudo_inverse(t)
            # autocast off: it would round the inverse to the low precision that it was computed above
            with torch.autocast(q.device.type, enabled=False):
                summary = kernel.mT @ V.to(kernel.dtype)
                summary = (inverse @ summary.to(inverse.dtype)).to(kernel.dtype)
                # The result in the layout of V, so that nothing is transposed on the way to the projection
                out = kernel @ summary if V.stride(-1) == 1 else (summary.mT @ kernel.mT).mT
        if self.use_conv:
            out = out + self.convolve(V, H, W)
        return out

    def landmarks(self, q, H, W):
        """q [B, N, h, d] -> [B, m, h, d]."""
        if self.ratio == 1:
            return self.Qnorm_act(self.Qlandmark_op(q))
        r = self.ratio
        h, w = H // r, W // r
        # A convolution whose stride is its kernel is one GEMM on patches, [B, h, w, heads, r*r*d] x [r*r*d, d]
        patches = q.unflatten(1, (H, W))[:, : h * r, : w * r].unflatten(2, (w, r)).unflatten(1, (h, r))
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(-3)
        weight = self.Qlandmark_op.weight.permute(0, 2, 3, 1).flatten(1)
        return self.Qnorm_act(F.linear(patches, weight)).flatten(1, 2)

    def pseudo_inverse(self, t):
        """t [B, m, h, d] -> [B, h, m, m], float32 (float64 for float64)."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        with torch.autocast(t.device.type, enabled=False):
            return self.invert(rbf_gram(t, t))

    def invert(self, kernel):
        return newton_pinv(kernel, iterations=self.max_iter)

    def convolve(self, V, H, W):
        """V [B, h, N, d] -> the same: one filter per head, on maps in the layout of V, channels first or last."""
        first = V.shape[2] - H * W
        maps = V[:, :, first:].mT.flatten(1, 2).unflatten(2, (H, W))
        dtype = _dtype_of_convolution(maps)
        in_float32 = maps.device.type == "cpu" and (dtype == torch.float32 or is_slow(maps))
        if in_float32 and torch.is_grad_enabled() and not torch.jit.is_tracing():
            out = shared_depthwise_conv(maps.float(), self.conv.weight.float()).to(dtype)
        else:
            weight = self.conv.weight.repeat_interleave(self.head_dim, dim=0)
            out = conv2d(maps, weight, None, padding=self.use_conv // 2, groups=weight.shape[0])
        out = out.flatten(2).unflatten(1, (self.num_head, self.head_dim)).mT
        return torch.cat([V[:, :, :first].to(out.dtype), out], dim=2) if first else out

    def extra_repr(self):
        return f"heads={self.num_head}, ratio={self.ratio}, max_iter={self.max_iter}"


def batch_newton_pinv(kernel, iterations):
    """The normalised variant's pseudo-inverse: kernel [B, h, m, m] -> the same, by V <- 2V - V K V from V = alpha K.

    alpha is one for the whole batch, 2 / (largest row sum)^2, and is halved, at most 10 times, while any column of
    |I - K V| sums up to more than 1.01. No ridge; the gradient is that of all steps, alpha included. kernel is a
    symmetric matrix of no negative entries; its diagonal is taken to be 1.
    """
    # A diagonal off by a rounding error is as bad as another matrix: where K is nearly I, every step doubles it
    kernel = kernel.diagonal_scatter(torch.ones_like(kernel[..., 0]), 0, -2, -1)
    shape, sums = kernel.shape, kernel.sum(-1)
    largest = torch.cat([sums.flatten(), sums.new_ones(1)]).max()  # no sum is below 1, and an empty batch has none
    alpha = 2 / largest.square()
    with torch.no_grad():
        # Columns of |I - alpha K K| from the column sums and the diagonal of K K: neither the product nor a value on
        # the host is needed
        columns, diagonal = (kernel @ sums.unsqueeze(-1)).flatten(), kernel.square().sum(-1).flatten()
        tried = alpha * 0.5 ** torch.arange(10, device=kernel.device, dtype=kernel.dtype).unsqueeze(-1)
        norms = tried * (columns - diagonal) + (1 - tried * diagonal).abs()
        norms = torch.cat([norms, norms.new_zeros(10, 1)], dim=1).amax(-1)
        halvings = (norms > 1.01).cumprod(0).sum()
    kernel = kernel.flatten(0, 1)
    inverse = alpha * 0.5**halvings * kernel
    for _ in range(iterations):
        inverse = torch.baddbmm(inverse, inverse @ kernel, inverse, beta=2, alpha=-1)
    return inverse.view(shape)


class SoftmaxFreeNormAttentionKernel(SoftmaxFreeAttentionKernel):
    """The normalised variant (arXiv:2207.03341): D^-1/2 pinv(K) D^-1/2 in place of pinv(K), D the row sums of K.

    K = k(t, t). `inverse` chooses its pseudo-inverse:

    - "published": what the code of this variant computes and its checkpoints were trained with
      (`batch_newton_pinv`): `max_iter` steps on K itself, without a ridge, their first one scaled by the largest row
      sum of the *whole batch*, so that an image's result depends on the others in its batch. The gradient goes through
      every step, which keeps 2 `max_iter` matrices [B, h, m, m]. It amplifies rounding errors where K is nearly
      singular, and is far from an inverse where the landmarks are far apart: it turns the identity into 0.
    - "ridge": the pseudo-inverse of `SoftmaxFreeAttentionKernel`, of K + 0.01 I, scaled per matrix, with the
      closed-form gradient. Better conditioned, one fused operator, and another function: outputs differ by percents.

    Compared with fudan-zvg/SOFT, models/softmax_free_transformer.py at d3febc3, whose class cannot be constructed
    as it is there (it calls super() by a name that does not exist) and inverts in the dtype of autocast.
    """

    def __init__(
        self, dim, num_heads, ratio, use_conv, max_iter=20, kernel_method="cuda", inverse="published", device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__(dim, num_heads, ratio, use_conv, max_iter, kernel_method, device, dtype)
        if inverse not in ("published", "ridge"):
            raise ValueError(f"effvit::{type(self).__name__}: inverse must be 'published' or 'ridge', got {inverse!r}")
        self.inverse = inverse

    def invert(self, kernel):
        d = kernel.sum(-1, keepdim=True).rsqrt()
        pinv = batch_newton_pinv(kernel, self.max_iter) if self.inverse == "published" else super().invert(kernel)
        return d * pinv * d.mT

    def extra_repr(self):
        return f"{super().extra_repr()}, inverse={self.inverse}"


class SoftmaxFreeAttention(nn.Module):
    """SOFT's attention module, a drop-in for the original: same arguments, state_dict and `forward(X, H, W)`.

    Compared with fudan-zvg/SOFT, models/softmax_free_transformer.py at d3febc3; `SoftmaxFreeAttentionKernel` says where
    it differs. `options` are further arguments of the kernel.

    Under torch.compile with dynamic H and W, inference compiles; training fails in inductor up to PyTorch 2.13 ("cannot
    determine truth value of Relational", pytorch/pytorch#185510), as it does for every convolution of a map that is a
    view of tokens. With `torch._inductor.config.layout_optimization = False` it compiles.
    """

    kernel = SoftmaxFreeAttentionKernel

    def __init__(
        self, dim, num_heads, ratio, conv_size, max_iter=20, kernel_method="cuda", device=None, dtype=None, **options
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.head_dim = dim // num_heads
        self.num_head = num_heads
        inner = self.head_dim * num_heads
        self.W_q = nn.Linear(dim, inner, **factory)
        self.W_v = nn.Linear(dim, inner, **factory)
        self.attn = self.kernel(dim, num_heads, ratio, conv_size, max_iter, kernel_method, **options, **factory)
        self.ff = nn.Linear(inner, dim, **factory)

    def forward(self, X, H, W):
        """X [B, N, dim] -> [B, N, dim], N = H*W."""
        Q = self.W_q(X).unflatten(-1, (self.num_head, self.head_dim)).transpose(1, 2)
        if torch.is_grad_enabled() or not (is_plain(self.W_v) and is_plain(self.ff)):
            V = self.W_v(X).unflatten(-1, (self.num_head, self.head_dim)).transpose(1, 2)
            return self.ff(self.attn(Q, V, H, W).transpose(1, 2).flatten(2))
        # Values channels first, [B, h, d, N]: the wide depthwise convolution is faster there, its backward far slower
        V = linear_per_image(X.mT, self.W_v, channels=1).unflatten(1, (self.num_head, self.head_dim)).mT
        return linear_per_image(self.attn(Q, V, H, W).mT.flatten(1, 2), self.ff, channels=2)


class SoftmaxFreeNormAttention(SoftmaxFreeAttention):
    """SoftmaxFreeAttention with the normalised kernel, the published function unless `inverse="ridge"`.

    See `SoftmaxFreeNormAttentionKernel` for both, and for the code that it was compared with.
    """

    kernel = SoftmaxFreeNormAttentionKernel

    def __init__(
        self, dim, num_heads, ratio, conv_size, max_iter=20, kernel_method="cuda", inverse="published", device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__(dim, num_heads, ratio, conv_size, max_iter, kernel_method, device, dtype, inverse=inverse)
