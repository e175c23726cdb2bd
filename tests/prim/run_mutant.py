"""Runs one compiled library of tests/test_mutants.py in a process of its own and saves what it computed. No torch.

python run_mutant.py {prim|window} LIBRARY OUT.npz
"""

import ctypes
import sys

import numpy as np

THREADS = 64
PRIM_CASES = {  # name: (input, shape and dtype of the output)
    "reverse": (np.arange(192, dtype=np.float32), (192,), np.float32),
    "reverse_warp": (np.arange(192, dtype=np.float32), (192,), np.float32),
    "any": (np.eye(3, 64, 5, dtype=np.int32), (192,), np.int32),
    "shuffle": (np.arange(64, dtype=np.float32) ** 2, (6, 64), np.float32),
    "ldmatrix": (np.arange(256, dtype=np.uint16), (128,), np.uint32),
    "ldmatrix_trans": (np.arange(256, dtype=np.uint16), (128,), np.uint32),
    "mma_ldmatrix_bf16": (None, (16, 8), np.float32),
    "cp_async": (np.arange(2048, dtype=np.uint32).astype(np.uint8) | 1, (2048,), np.uint8),
}
# B, H, W, h, d, dv, window, shift, dilation, halo; cosine, pads
WINDOW_CASES = [
    ((1, 10, 12, 2, 32, 24, 7, 7, 3, 3, 1, 1, 0, 0), False, True),  # fused, map that the window does not divide
    ((2, 8, 8, 1, 20, 16, 4, 4, 1, 2, 1, 1, 0, 0), True, False),  # four windows a tile, cosine
    ((1, 9, 9, 1, 16, 16, 9, 9, 0, 0, 1, 1, 0, 0), False, False),  # two query and key tiles
    ((1, 8, 10, 1, 16, 32, 4, 5, 1, 0, 1, 1, 2, 1), True, True),  # halo
]


def bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def call(function, *arguments):
    message = ctypes.create_string_buffer(1024)
    function.restype = None
    function(*arguments, message, ctypes.c_int64(len(message)))
    if message.value:
        print(message.value.decode())
        sys.exit(1)


def pointer(x):
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


def nbytes(x):
    return ctypes.c_int64(0 if x is None else x.nbytes)


def run_prim(library):
    for name, (x, shape, dtype) in PRIM_CASES.items():
        y = None
        if x is None:
            x = bf16(np.arange(256) % 13 - 6.0)
            y = bf16(np.arange(128) % 7 - 3.0)
        out = np.zeros(shape, dtype)
        call(
            library.effvit_prim_test, name.encode(), pointer(x), nbytes(x), pointer(y), nbytes(y),
            pointer(out), nbytes(out), ctypes.c_int(0),
        )  # fmt: skip
        yield name, out.astype(np.float64)


def window_inputs(case):
    """q, k, v, table, logit_scale, pad_k, pad_v, grad_out in float32, of values that bfloat16 holds exactly."""
    (B, H, W, h, d, dv, wh, ww, *_, hh, hw), cosine, pads = WINDOW_CASES[case]
    random = np.random.default_rng(case)

    def values(*shape):
        return (bf16(random.standard_normal(shape)).astype(np.uint32) << 16).view(np.float32)

    q, k, v = values(B, H, W, h, d), values(B, H, W, h, d), values(B, H, W, h, dv)
    table = values(h, 2 * wh - 1 + 2 * hh, 2 * ww - 1 + 2 * hw)
    logit_scale = 1.5 + np.arange(h, dtype=np.float32) if cosine else None
    pad_k, pad_v = (values(h, d), values(h, dv)) if pads else (None, None)
    return q, k, v, table, logit_scale, pad_k, pad_v, values(B, H, W, h, dv)


def run_window(library):
    for case, (sizes, cosine, pads) in enumerate(WINDOW_CASES):
        B, H, W, h, d, dv = sizes[:6]
        *inputs, grad_out = window_inputs(case)
        q, k, v, table, logit_scale, pad_k, pad_v = inputs
        half = [None if x is None else bf16(x) for x in (q, k, v, pad_k, pad_v, grad_out)]
        out, lse = np.zeros((B, H, W, h, dv), np.uint16), np.zeros((B, h, H, W), np.float32)
        dqkv, dtable = np.zeros((B, H, W, h * (2 * d + dv)), np.uint16), np.zeros_like(table)
        dlogit = np.zeros(h, np.float32) if cosine else None
        dpad_k, dpad_v = (np.zeros((h, d), np.uint16), np.zeros((h, dv), np.uint16)) if pads else (None, None)
        workspace = np.zeros(1 << 20, np.float32)
        tensors = [
            half[0], half[1], half[2], table, logit_scale, half[3], half[4], out, lse, half[5], dqkv, dtable, dlogit,
            dpad_k, dpad_v,
        ]  # fmt: skip
        addresses = (ctypes.c_void_p * len(tensors))(*[None if t is None else t.ctypes.data for t in tensors])
        call(
            library.run_window_attention, (ctypes.c_int64 * 14)(*sizes), addresses, pointer(workspace),
            nbytes(workspace),
        )  # fmt: skip
        names = ("out", "lse", "dqkv", "dtable", "dlogit", "dpad_k", "dpad_v")
        for name, x in zip(names, (out, lse, dqkv, dtable, dlogit, dpad_k, dpad_v), strict=True):
            if x is not None:
                x = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x
                yield f"{case}_{name}", x.astype(np.float64)


def main():
    what, path, out = sys.argv[1:]
    library = ctypes.CDLL(path)
    results = {}
    for seed in (0, 1, 2):
        library.effvit_emu_set_seed(ctypes.c_uint64(seed))
        for name, x in (run_prim if what == "prim" else run_window)(library):
            results[f"{seed}_{name}"] = x
    np.savez(out, **results)


if __name__ == "__main__":
    main()
