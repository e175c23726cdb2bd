"""The CPU kernels over every sample input under AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`)."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "asan"
SANITIZERS = "address,undefined"

pytestmark = [
    pytest.mark.asan,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("cmake") is None, reason="needs g++ and cmake"),
]


def exercise():
    """Runs in a process of its own, with the sanitized library: every sample, dtype, ISA, forward and backward."""
    from effvit import _backends, _load
    from effvit.ops._op import OPS

    library = _load.LIBRARIES["effvit_cpu"]
    assert library.handle is not None, library.reason
    calls = 0
    for op in (op for op in OPS.values() if op.backward_of is None):
        spec = importlib.import_module(f"effvit.testing.{op.name}").SPEC
        for sample in (s for s in spec.samples if "huge" not in s.tags):
            for dtype in sample.dtypes:
                if dtype not in (torch.float32, torch.bfloat16, torch.float16):
                    continue
                args, kwargs = sample.build(dtype)
                for isa in _backends.isas():
                    _backends.set_isa(isa)
                    print(op.name, sample.name, dtype, isa, file=sys.stderr)  # the last line names what was running
                    with torch.no_grad():
                        outputs = spec.op()(*args, **kwargs)
                        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
                        calls += 1
                        if spec.backward_call:
                            grads = [torch.ones_like(o) for o in outputs]
                            backward_args, backward_kwargs = spec.backward_call(args, kwargs, outputs, grads)
                            spec.backward_op()(*backward_args, **backward_kwargs)
                            calls += 1
    print(f"calls {calls}")


@pytest.fixture(scope="module")
def environment():
    """Environment of a process that loads the sanitized library, which is built here."""
    configure = [
        "cmake", "-S", ROOT, "-B", BUILD, f"-DPython_EXECUTABLE={sys.executable}", f"-DEFFVIT_SANITIZE={SANITIZERS}",
        f"-DEFFVIT_PACKAGE_DIR={BUILD}/package", "-DEFFVIT_BUILD_CUDA=OFF",
        "-DEFFVIT_ISAS=all", *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", BUILD, "--parallel", str(os.cpu_count())]):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    libasan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return {
        **os.environ,
        "LD_PRELOAD": libasan,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python does not free everything at exit
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "EFFVIT_LIB_DIR": str(BUILD / "package" / "lib"),
        "EFFVIT_BACKEND": "cpu",
        "OMP_NUM_THREADS": "2",
    }


def test_samples(environment):
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert int(done.stdout.split()[-1]) > 100, done.stdout
    assert "runtime error" not in done.stderr


@pytest.mark.parametrize(
    "body, message",
    [
        ("x[n] = 1;", "AddressSanitizer: heap-buffer-overflow"),
        ("x[0] = 1 << (n + 28);", "runtime error: shift exponent"),
    ],
)
def test_sanitizers_are_awake(environment, tmp_path, body, message):
    """A library with an error, compiled and loaded like ours, is caught; n is 4 and x has 4 elements."""
    source, library = tmp_path / "wrong.cpp", tmp_path / "libwrong.so"
    source.write_text(f'extern "C" void wrong(int* x, int n) {{ {body} }}\n')
    flags = ["-shared", "-fPIC", "-O1", "-g", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    code = f"import ctypes, torch; ctypes.CDLL({str(library)!r}).wrong(ctypes.c_void_p(x.data_ptr()), 4)"
    code = code.replace("; ctypes.CDLL", "; x = torch.zeros(4, dtype=torch.int32); ctypes.CDLL")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]


if __name__ == "__main__":
    exercise()
