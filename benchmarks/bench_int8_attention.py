"""int8_attention against SDPA in the same dtype and in float32, and effvit.window_attention with all tokens as one
window, which is what patched ViTs run: from q, k, v, slices of one projection, to out. Decoding: a query over a cache.
"""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit
from effvit.ops._op import Cost
from effvit.testing.int8_attention import quantised

F = torch.nn.functional
SHAPES = {  # B, L, M, H, G, d, tag
    "DeiT-S 1x197 h6": (1, 197, 197, 6, 6, 64, "default"),
    "DeiT-S 8x197 h6": (8, 197, 197, 6, 6, 64, "default"),
    "ViT-B/384 1x577 h12": (1, 577, 577, 12, 12, 64, "default"),
    "1x784 h6": (1, 784, 784, 6, 6, 64, "default"),
    "1x1024 h6": (1, 1024, 1024, 6, 6, 64, "default"),
    "1x4096 h4": (1, 4096, 4096, 4, 4, 64, "extended"),
    "d 32 8x256 h8": (8, 256, 256, 8, 8, 32, "default"),
    "d 80 1x256 h16": (1, 256, 256, 16, 16, 80, "default"),
    "Swin windows 64x49 h3": (64, 49, 49, 3, 3, 32, "default"),
    "decode 1x1 of 1024 h12": (1, 1, 1024, 12, 12, 64, "default"),
    "decode 1x1 of 8192 h12": (1, 1, 8192, 12, 12, 64, "default"),
    "decode 1x1 of 4096 h16 of 2": (1, 1, 4096, 16, 2, 64, "default"),
    "smoke 2x20 h2": (2, 20, 20, 2, 2, 16, "smoke"),
    "smoke decode": (1, 1, 70, 4, 2, 16, "smoke"),
}
ERROR = 0.1  # of int8 attention, relative; tests/ops/test_int8_attention.py measures it


def inputs(shape):
    B, L, M, H, G, d, _ = shape

    def make(dtype, device):
        if L == M:
            q, k, v = torch.randn(B, L, 3, H, d).to(device, dtype).unbind(2)
        else:
            q, k, v = (torch.randn(B, n, h, d).to(device, dtype) for n, h in ((L, H), (M, G), (M, G)))
        return {"q": q, "k": k, "v": v}

    return make


def heads_first(*tensors):
    return [t.transpose(1, 2) for t in tensors]


def int8(q, k, v):
    if q.shape[1] == k.shape[1]:
        return lambda: effvit.ops.int8_attention(q, k, v)
    cache = quantised(k, v)  # filled before
    return lambda: effvit.ops.int8_attention(q, *cache)


def sdpa(q, k, v):
    grouped = q.shape[2] != k.shape[2]
    return lambda: F.scaled_dot_product_attention(*heads_first(q, k, v), enable_gqa=grouped).transpose(1, 2)


def sdpa_float32(q, k, v):
    return sdpa(*(t.float() for t in (q, k, v)))


def eager(q, k, v):
    def run():
        a, b, c = heads_first(q, k, v)
        b, c = (t.repeat_interleave(a.shape[1] // t.shape[1], 1) for t in (b, c))
        return (torch.softmax(a * a.shape[-1] ** -0.5 @ b.mT, -1) @ c).transpose(1, 2)

    return run


def one_window(q, k, v):
    tensors = [t[:, None] for t in (q, k, v)]
    return lambda: effvit.ops.window_attention(*tensors, window=(1, q.shape[1]))[0][:, 0]


def cases():
    for name, shape in SHAPES.items():
        B, L, M, H, G, d, tag = shape
        peers = {"eager": eager, "sdpa": sdpa, "sdpa float32": sdpa_float32}
        if L == M:
            peers["window_attention"] = one_window
        yield Case(
            shape=name,
            inputs=inputs(shape),
            effvit=int8,
            peers=peers,
            reference=eager,
            cost=lambda direction, dtype, s=shape: Cost(
                4 * s[0] * s[1] * s[2] * s[3] * s[5],
                2 * s[0] * s[1] * s[3] * s[5] * dtype.itemsize
                + 2 * s[0] * s[2] * s[4] * s[5] * (dtype.itemsize if s[1] == s[2] else 1),
            ),
            approximate={"effvit": ERROR},
            unchecked=("sdpa float32",),
            compiled=None,
            products=torch.int8,
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("int8_attention", cases()))
