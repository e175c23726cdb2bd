"""Which files make up an operator, and which operators do without one: the layout and ABI tests go by it."""

LAYERS = {
    "public function": "python/effvit/ops/{op}.py",
    "reference": "python/effvit/reference/{op}.py",
    "samples": "python/effvit/testing/{op}.py",
    "declaration in C++": "csrc/common/{op}.h",
    "params": "csrc/common/{op}_params.h",
    "cpu kernel": "csrc/cpu/{op}_kernel.inl.h",
    "cuda kernel": "csrc/cuda/{op}.cuh",
    "cuda binding": "csrc/cuda/{op}.cu",
    "triton": "triton_kernels/{op}.py",
    "benchmark": "benchmarks/bench_{op}.py",
}
# Tests beyond the shared suite. An op without this file is in tests/ops/test_declared.py.
OWN_TEST = "tests/ops/test_{op}.py"
# A row-wise op has one file in place of these.
ROWS = "csrc/rows/{op}.h"
ROWS_STAND_FOR = ("declaration in C++", "params", "cpu kernel", "cuda kernel", "cuda binding")
# (op, layer): why the op does without this file.
_NATIVE = ("declaration in C++", "params", "cpu kernel", "cuda kernel", "cuda binding", "triton")
_CUDA = ("cuda kernel", "cuda binding")
_ONCE = "done once, when weights are prepared: its definition runs on every device"
_TRAINING = "a few elementwise passes while a model is trained: its definition runs on every device"
WAIVERS: dict[tuple[str, str], str] = {
    **{
        (op, layer): _ONCE
        for op in ("int8_prepack", "sparse24_compress", "sparse24_decompress", "sparse24_prepack")
        for layer in (*_NATIVE, "benchmark")
    },
    **{(op, layer): _TRAINING for op in ("fake_quantize_int8",) for layer in (*_NATIVE, "benchmark")},
    **{("quantize_int8", layer): "bound by memory: the Triton kernel does" for layer in _CUDA},
}
_TRAINED = "of weights, not of tokens: its definition runs on every device, in a small part of a training step"
WAIVERS |= {
    (op, layer): reason
    for op, reason in (("sparse24_mask", _TRAINED), ("sparse24_prune", _TRAINED))
    for layer in (*_NATIVE, "benchmark")
}
WAIVERS |= {
    (op, layer): "the Triton kernels serve GPUs"
    for op in ("dwconv", "dwconv_glu", "local_pool_attention")
    for layer in _CUDA
}
WAIVERS |= {("sparse24_linear", layer): "the Triton kernels serve GPUs" for layer in _CUDA}
_BLOCKS = "not written: the Triton kernels serve GPUs"
WAIVERS |= {(op, layer): _BLOCKS for op in ("block_sparse_linear", "block_sparse_int8_linear") for layer in _CUDA}
WAIVERS["sparse24_decompress", "reference"] = "in sparse24_compress.py, as the inverse of what is defined there"
WAIVERS |= {("selective_scan2d", layer): "the Triton kernels serve GPUs" for layer in _CUDA}
_HASH = "small products and an exponential, which PyTorch runs: its definition runs on every device"
WAIVERS |= {("kernel_hash", layer): _HASH for layer in (*_NATIVE, "benchmark")}
_BITS = "the Triton kernel serves GPUs"
WAIVERS |= {
    (op, layer): _BITS
    for op in ("binary_linear", "pam_matmul", "pow2_linear", "sign_bits", "table_lookup")
    for layer in _CUDA
}
WAIVERS |= {("gated_linear_attention_step", layer): "bound by memory: the Triton kernel does" for layer in _CUDA}
_SCANS = "not written: the Triton kernels serve GPUs"
WAIVERS |= {(op, layer): _SCANS for op in ("block_relu2_attention", "aft", "rnn_scan") for layer in _CUDA}
WAIVERS |= {("spectral_gate", layer): "the Triton kernels serve GPUs" for layer in _CUDA}
