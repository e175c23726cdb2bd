"""Compiles every Triton kernel ahead of time for four GPU architectures; needs no GPU.

A module of effvit.triton_kernels takes part by exposing ``aot_signatures()``, which yields (name, kernel, signature,
constexprs, attrs, options) of representative launches. A kernel that none of them launches fails the test.

While working on one op, `python tests/test_triton_aot.py <op> ...` compiles its kernels only and prints the table.
"""

import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("triton", reason="triton is not installed")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # fmt: skip
# Shared memory of one block, in bytes.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
FULL_TARGET = "sm_90"
EVERYTHING = bool(os.environ.get("EFFVIT_TEST_ALL"))
# Spilled bytes that are known, by (target, launch, kernel). Any other spill, and any growth of these, fails.
KNOWN_SPILLS = {
    # 256 x 16 products on the FMA units: a thread holds a row and a column of 256.
    ("sm_80", "d256-causal-fp32", "linear_attention_bwd_dkv_kernel"): 208,
    ("sm_80", "d256-causal-fp32", "linear_attention_bwd_dq_kernel"): 288,
    ("sm_80", "d256-causal-fp32", "linear_attention_fwd_kernel"): 464,
    ("sm_90", "d256-causal-fp32", "linear_attention_bwd_dkv_kernel"): 216,
    ("sm_90", "d256-causal-fp32", "linear_attention_bwd_dq_kernel"): 440,
    ("sm_90", "d256-causal-fp32", "linear_attention_fwd_kernel"): 408,
    ("sm_100", "d256-causal-fp32", "linear_attention_bwd_dkv_kernel"): 264,
    ("sm_100", "d256-causal-fp32", "linear_attention_bwd_dq_kernel"): 400,
    ("sm_100", "d256-causal-fp32", "linear_attention_fwd_kernel"): 376,
    # The rest.
    ("sm_80", "d64-causal-bf16", "linear_attention_bwd_dkv_kernel"): 144,
    ("sm_80", "d64-causal-fp16", "linear_attention_bwd_dkv_kernel"): 312,
    ("sm_80", "d64-quadratic-fp16", "linear_attention_quadratic_fwd_kernel"): 8,
    ("sm_80", "window16-bf16", "window_attention_bwd_dkv_kernel"): 32,
    ("sm_80", "window16-fp16", "window_attention_bwd_dkv_kernel"): 32,
    ("sm_80", "window16-fp32", "window_attention_bwd_dkv_kernel"): 16,
    ("sm_80", "window16-fp32", "window_attention_bwd_dq_kernel"): 32,
    ("sm_80", "window7-shift-fp32", "window_attention_bwd_fused_kernel"): 8,
    ("sm_80", "window7-shift-fp32", "window_attention_fwd_kernel"): 8,
    ("sm_90", "window16-fp32", "window_attention_bwd_dq_kernel"): 32,
    ("sm_90", "window8-halo2-pads-fp32", "window_attention_bwd_dq_kernel"): 24,
    ("sm_90", "window7-cosine-pads-bf16", "window_attention_bwd_fused_kernel"): 200,
    ("sm_90", "window7-cosine-pads-fp32", "window_attention_bwd_fused_kernel"): 1704,
    ("sm_90", "window7-shift-fp32", "window_attention_bwd_fused_kernel"): 64,
    ("sm_90", "window8-halo2-pads-fp32", "window_attention_fwd_kernel"): 40,
    ("sm_100", "d256-weight-bf16", "linear_attention_bwd_dq_kernel"): 8,
    ("sm_100", "d256-causal-bf16", "linear_attention_state_kernel"): 32,
    ("sm_90", "d64-channel-fp32", "gated_linear_attention_out_kernel"): 8,
    ("sm_100", "d64-token-bf16", "gated_linear_attention_state_kernel"): 16,
    # Tiles that no GPU has chosen yet.
    ("sm_100", "full-fp16", "aft_bwd_dbias_kernel"): 8,
    ("sm_80", "full-fp32", "aft_bwd_dbias_kernel"): 8,
    ("sm_90", "full-fp16", "aft_bwd_dbias_kernel"): 24,
    ("sm_90", "full-fp32", "aft_bwd_dbias_kernel"): 16,
    ("sm_90", "local-fp16", "aft_bwd_dbias_kernel"): 24,
    ("sm_90", "local-fp32", "aft_bwd_dbias_kernel"): 16,
    ("sm_100", "full-fp16", "aft_bwd_dkv_kernel"): 216,
    ("sm_100", "full-fp32", "aft_bwd_dkv_kernel"): 224,
    ("sm_80", "full-fp16", "aft_bwd_dkv_kernel"): 256,
    ("sm_80", "full-fp32", "aft_bwd_dkv_kernel"): 160,
    ("sm_90", "full-fp16", "aft_bwd_dkv_kernel"): 176,
    ("sm_90", "full-fp32", "aft_bwd_dkv_kernel"): 104,
    ("sm_90", "local-fp16", "aft_bwd_dkv_kernel"): 176,
    ("sm_90", "local-fp32", "aft_bwd_dkv_kernel"): 104,
    ("sm_100", "full-fp32", "aft_fwd_kernel"): 8,
    ("sm_80", "causal-bf16", "block_relu2_attention_bwd_dqk_kernel"): 64,
    ("sm_80", "causal-fp16", "block_relu2_attention_bwd_dqk_kernel"): 64,
    ("sm_90", "causal-fp32", "block_relu2_attention_bwd_dqk_kernel"): 16,
    ("sm_90", "mossformer-fp32", "block_relu2_attention_bwd_dqk_kernel"): 8,
    ("sm_90", "causal-fp32", "block_relu2_attention_bwd_dv_kernel"): 8,
    ("sm_90", "causal-fp32", "block_relu2_attention_fwd_kernel"): 8,
    ("sm_90", "d48-channel-both-fp32", "gated_linear_attention_grad_kernel"): 8,
    ("sm_90", "d48-channel-both-fp32", "gated_linear_attention_out_kernel"): 8,
    ("sm_100", "transnext-bf16", "local_pool_attention_bwd_bias_kernel"): 48,
    ("sm_80", "transnext-bf16", "local_pool_attention_bwd_bias_kernel"): 48,
    ("sm_90", "transnext-bf16", "local_pool_attention_bwd_bias_kernel"): 56,
    ("sm_100", "transnext-bf16", "local_pool_attention_bwd_kv_kernel"): 80,
    ("sm_80", "transnext-bf16", "local_pool_attention_bwd_kv_kernel"): 184,
    ("sm_90", "transnext-bf16", "local_pool_attention_bwd_kv_kernel"): 96,
    ("sm_80", "transnext-bf16", "local_pool_attention_bwd_pool_kernel"): 408,
    ("sm_90", "transnext-bf16", "local_pool_attention_bwd_pool_kernel"): 304,
    ("sm_100", "transnext-bf16", "local_pool_attention_bwd_q_kernel"): 312,
    ("sm_80", "transnext-bf16", "local_pool_attention_bwd_q_kernel"): 496,
    ("sm_90", "transnext-bf16", "local_pool_attention_bwd_q_kernel"): 384,
    ("sm_80", "transnext-bf16", "local_pool_attention_fwd_kernel"): 88,
    ("sm_90", "transnext-bf16", "local_pool_attention_fwd_kernel"): 72,
    ("sm_80", "lstm-fp32", "rnn_scan_bwd_kernel"): 24,
    ("sm_90", "gru-fp32", "rnn_scan_bwd_weight_kernel"): 16,
    ("sm_90", "lstm-fp32", "rnn_scan_bwd_weight_kernel"): 16,
    ("sm_90", "slstm-fp32", "rnn_scan_bwd_weight_kernel"): 16,
    ("sm_100", "window16-fp32", "window_attention_bwd_dkv_kernel"): 16,
    ("sm_100", "window16-fp32", "window_attention_bwd_dq_kernel"): 40,
    ("sm_100", "window7-shift-fp32", "window_attention_bwd_fused_kernel"): 56,
    # Registers, not bytes.
    ("gfx942", "window16-fp32", "window_attention_bwd_dkv_kernel"): 127,
    ("gfx942", "window16-fp32", "window_attention_bwd_dq_kernel"): 16,
    ("gfx942", "window7-shift-fp32", "window_attention_bwd_fused_kernel"): 35,
    ("gfx942", "window7-shift-fp32", "window_attention_fwd_kernel"): 9,
}


def configuration(kernel, signature, constexprs, options):
    """What decides about registers and shared memory, next to which features are on: dtype, blocks, flags, warps."""
    dtype = next(t for t in flattened(signature.values()) if t.startswith("*"))
    names = {name: x for (index, *_), x in constexprs.items() for name, x in named(kernel.arg_names[index], x)}
    chosen = {n: x for n, x in names.items() if n.startswith("BLOCK") or isinstance(x, bool)}
    return f"{kernel.__name__} {dtype} {chosen} {options}"


def flattened(types):
    for t in types:
        yield from flattened(t) if isinstance(t, tuple) else (t,)


def named(name, constant):
    """(name, constant) of every member of a named tuple of constants."""
    return constant._asdict().items() if hasattr(constant, "_asdict") else ((name, constant),)


def is_chosen(target, number, is_first, everything):
    """Whether the number-th configuration is compiled for the target: each one for FULL_TARGET and for another in turn,
    the first one of each kernel for all of them."""
    others = [t for t in TARGETS if t != FULL_TARGET]
    return everything or is_first or target in (FULL_TARGET, others[number % len(others)])


def compile_for(targets, only=(), everything=True):
    """Prints one JSON line with the names of all kernels, and one per compilation. The interpreter must be off here.

    everything: every launch for FULL_TARGET, one launch of each configuration for the others.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from effvit.triton_kernels._common import for_warp_size

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    jobs, declared = [], set()
    configurations, launches = {}, set()
    for module in kernel_modules(only):
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ == module.__name__:
                assert name.startswith("_") or name.endswith("_kernel"), (
                    f"{module.__name__}.{name}: a jit function is a kernel (*_kernel) or private to kernels (_*)"
                )
                if name.endswith("_kernel"):
                    declared.add(name)
        for launch in getattr(module, "aot_signatures", list)():
            _, kernel, signature, constexprs, _, options = launch
            is_first = kernel not in configurations
            of_kernel = configurations.setdefault(kernel, {})
            key = configuration(kernel, signature, constexprs, options)
            if key not in of_kernel:
                number = of_kernel[key] = len(of_kernel)
                jobs += [(t, *launch) for t in targets if is_chosen(t, number, is_first, everything)]
            elif everything and FULL_TARGET in targets and str(launch[1:]) not in launches:
                jobs.append((FULL_TARGET, *launch))
            launches.add(str(launch[1:]))
    print(json.dumps({"declared": sorted(declared)}))
    for target, name, kernel, signature, constexprs, attrs, options in jobs:
        source = ASTSource(kernel, signature, constexprs, attrs)
        options = for_warp_size(options, TARGETS[target][2])
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        report = {"target": target, "launch": name, "kernel": kernel.__name__, "shared": compiled.metadata.shared}
        if "cubin" in compiled.asm:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                command = [os.path.join(tools, "cuobjdump"), "--dump-resource-usage", file.name]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            report["binary"] = len(compiled.asm["cubin"])
            report["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
            report["spills"] = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
        else:
            report["binary"] = len(compiled.asm["hsaco"])
            report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", compiled.asm["amdgcn"])[1])
            report["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])[1])
        print(json.dumps(report), flush=True)


def kernel_modules(only=()):
    package = importlib.import_module("effvit.triton_kernels")
    names = only or [m.name for m in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def table(reports):
    header = f"{'target':8s}{'launch':32s}{'kernel':48s}registers spills shared\n"
    rows = (
        f"{r['target']:8s}{r['launch']:32s}{r['kernel']:48s}{r['registers']:9d} {r['spills']:6d} {r['shared']:6d}\n"
        for r in sorted(reports, key=lambda r: (r["kernel"], r["target"], r["launch"]))
    )
    return header + "".join(rows)


# One test per target, in a process of its own: test workers then share the work instead of repeating it.
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels(target):
    """Every kernel compiles, fits the shared memory and spills no register that is not known to be spilled."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--target", target], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"ahead-of-time compilation failed:\n{done.stderr[-6000:]}"
    first, *reports = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    declared = first["declared"]
    print("\n" + table(reports))
    compiled = {r["kernel"] for r in reports if r["target"] == target and r["binary"] > 0}
    assert compiled == set(declared), "no aot_signatures() yields these kernels, or they are not kernels of the package"
    assert not [r for r in reports if r["shared"] > SHARED_LIMIT[target]]
    assert not [r for r in reports if r["spills"] > KNOWN_SPILLS.get((target, r["launch"], r["kernel"]), 0)]


if __name__ == "__main__":
    if sys.argv[1] == "--target":
        compile_for([sys.argv[2]], everything=EVERYTHING)
    else:  # by hand
        os.environ["TRITON_INTERPRET"] = "0"
        with contextlib.redirect_stdout(io.StringIO()) as lines:
            compile_for(TARGETS, sys.argv[1:])
        print(table(json.loads(line) for line in lines.getvalue().splitlines()[1:]))
