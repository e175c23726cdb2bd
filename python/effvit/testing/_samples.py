"""Memory layouts of sample tensors, and the vocabulary of bad inputs: what the specs of several operators use."""

import torch

# What messages say in place of the dots: `<name> must be ...`.
IS_TENSOR = r"must be a torch\.Tensor, got "
IS_FLOAT = r"must be float32, bfloat16 or float16, got "
IS_FLOAT32 = r"must be (torch\.)?(float32|Float), got "


def misaligned(t):
    """The same values one element past an aligned address, rows one element apart."""
    rows, width = t.numel() // max(t.shape[-1], 1), t.shape[-1]
    storage = torch.zeros(rows * (width + 1) + 1, dtype=t.dtype, device=t.device)
    return storage[1:].view(*t.shape[:-1], width + 1)[..., :width].copy_(t)


def in_order(t, order):
    """The same values, laid out with the dims in `order` outermost first."""
    inverse = [order.index(i) for i in range(t.ndim)]
    return t.permute(order).contiguous().permute(inverse)


def sliced(t, dim):
    """The same values as a slice along a dim of something larger."""
    shape = list(t.shape)
    shape[dim] += 3
    return t.new_zeros(shape).narrow(dim, 2, t.shape[dim]).copy_(t)


def every_other(t):
    """The same values with a last stride of 2."""
    return torch.stack((t, t), dim=-1).flatten(-2)[..., ::2]


def to(what):
    return lambda t: t.to(what)


def changed(call, changes):
    """A call (a dict of arguments) with some replaced: by a value, or by a function of the old one."""
    return call | {name: change(call.get(name)) if callable(change) else change for name, change in changes.items()}
