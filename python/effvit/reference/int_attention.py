"""int_attention in readable PyTorch: the definition, a composition of three others. Integers, in int64."""

import torch

from .int8_matmul import int8_matmul
from .shiftmax import saturate, shiftmax


def int_attention(
    q, k, v, bias=None, *, score_multiplier, score_shift, x0, n=15, bits=8, half_bit=True, score_bits=8, multiplier=0,
    shift=0, out_bits=32, out_dtype=torch.int32,
):  # fmt: skip
    """q [B, L, H, K], k [B, M, H, K], v [B, M, H, V], bias [W, H, L, M] -> [B, L, H, V]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = int8_matmul(
        q, k, transpose_b=True, multiplier=score_multiplier, shift=score_shift, bits=score_bits, out_dtype=torch.int32
    )
    if bias is not None:
        scores = saturate(scores.long() + bias.long().repeat(q.shape[0] // bias.shape[0], 1, 1, 1), torch.int32)
    p = shiftmax(scores, x0=x0, n=n, bits=bits, half_bit=half_bit, out_dtype=torch.int32)
    y = int8_matmul(p, v, multiplier=multiplier, shift=shift, bits=out_bits, out_dtype=out_dtype)
    return y.transpose(1, 2).contiguous()
