"""I-ViT's layers in plain NumPy, written from the papers' formulas: what QuantAct and its kin must compute.

Integers are int64, scales float64; the operators' own formulas are those of `int_oracle`. Nothing here comes from
effvit.
"""

import math

import int_oracle
import numpy as np

LARGEST = 2**31 - 1


def scale_of(low, high, bits):
    return max(abs(low), abs(high)) / (2 ** (bits - 1) - 1)


def fixed_point(ratio):
    """(m, c) of one ratio, its mantissa with 31 bits."""
    mantissa, exponent = math.frexp(ratio)
    m = math.floor(mantissa * 2**31 + 0.5)
    return (m, 31 - exponent) if abs(m) < 2**31 else (m // 2, 30 - exponent)


def fixed_points(ratios, count):
    pairs = [fixed_point(float(r)) for r in np.broadcast_to(ratios, (count,))]
    return np.array([m for m, _ in pairs]), np.array([c for _, c in pairs])


def requantised(z, scale, out_scale, bits, residual=None, residual_scale=None):
    """QuantAct: integers of `scale` in steps of out_scale."""
    columns = z.shape[-1]
    y = int_oracle.rescaled(z, *fixed_points(np.asarray(scale) / out_scale, columns))
    if residual is not None:
        y = y + int_oracle.rescaled(residual, *fixed_points(np.asarray(residual_scale) / out_scale, columns))
    return np.clip(y, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def linear(x, x_scale, weight, bias, bits=8):
    """(int32 sums, scale [N])"""
    w_scale = np.abs(weight).max(1) / (2 ** (bits - 1) - 1)
    q = np.rint(weight / w_scale[:, None]).astype(np.int64)
    scale = w_scale * x_scale
    return x @ q.T + np.rint(bias / scale).astype(np.int64), scale


def layer_norm(x, weight, bias):
    scale = weight * np.sqrt(len(weight)) / 2.0**30
    integers = np.floor(bias / scale).astype(np.int64)
    return int_oracle.int_layer_norm(x, integers, None, None, None, False, False, np.int64), scale


def softmax(x, scale, n, bits):
    return int_oracle.shiftmax(x, math.floor(-1 / scale), n, bits, True, np.int64), 2.0 ** (1 - bits)


def gelu(x, scale, n, bits):
    y = int_oracle.shift_gelu(x, math.floor(-1 / (1.702 * scale)), n, bits, True, True, 0, 31, np.int32)
    return y.astype(np.int64), scale * 2.0 ** (1 - bits)


def attention(x, x_scale, p, scales, heads, bits, n):
    """x int64 [B, L, C] -> (sums, scale); p: parameters; scales: of qkv (3), scores and context."""
    B, L, C = x.shape
    d = C // heads
    z, scale = linear(x, x_scale, p["qkv.weight"], p["qkv.bias"])
    q, k, v = (
        requantised(z[..., i * C : (i + 1) * C], scale[i * C : (i + 1) * C], scales["qkv"][i], 8)
        .reshape(B, L, heads, d)
        .transpose(0, 2, 1, 3)
        for i in range(3)
    )
    scores = requantised(
        q @ k.transpose(0, 1, 3, 2), scales["qkv"][0] * scales["qkv"][1] * d**-0.5, scales["scores"], bits["scores"]
    )
    y, step = softmax(scores, scales["scores"], n, bits["softmax"])
    out = (y @ v).transpose(0, 2, 1, 3).reshape(B, L, C)
    out = requantised(out, step * scales["qkv"][2], scales["context"], 8)
    return linear(out, scales["context"], p["proj.weight"], p["proj.bias"])


def mlp(x, x_scale, p, scales, bits, n):
    h = requantised(*linear(x, x_scale, p["fc1.weight"], p["fc1.bias"]), scales["fc1"], 8)
    h = requantised(*gelu(h, scales["fc1"], n, bits["gelu"]), scales["act"], 8)
    return linear(h, scales["act"], p["fc2.weight"], p["fc2.bias"])


def block(x, x_scale, p, scales, heads, bits, n):
    """x int64 [B, L, C] of the residual -> the same in steps of scales["mlp_residual"]."""

    def of(prefix):
        return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}

    y = requantised(*layer_norm(x, p["norm1.weight"], p["norm1.bias"]), scales["norm1"], 8)
    y, scale = attention(y, scales["norm1"], of("attn."), scales, heads, bits, n[0])
    x = requantised(y, scale, scales["attn_residual"], 16, x, x_scale)
    y = requantised(*layer_norm(x, p["norm2.weight"], p["norm2.bias"]), scales["norm2"], 8)
    y, scale = mlp(y, scales["norm2"], of("mlp."), scales, bits, n[1])
    return requantised(y, scale, scales["mlp_residual"], 16, x, scales["attn_residual"])
