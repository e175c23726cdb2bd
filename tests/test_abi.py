"""What the operator libraries import and export: the stable C ABI, the schemas' signatures, ISA code kept apart."""

import ctypes
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

from effvit import _load
from effvit.ops._op import OPS
from layout import WAIVERS

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils (nm, readelf, objdump)")

# Everything an operator library may ask of the process it is loaded into.
STABLE_ABI = re.compile(r"(aoti_torch_|torch_)[a-z0-9_]+$")
TOOLCHAIN = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$|_ITM_|__gmon_start__|__cxa_finalize")
NEEDED = re.compile(r"lib(torch_cpu|torch_cuda|stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so(\.\d+)?$|ld-linux.*\.so\.\d$")
# GLIBCXX symbols that std::string and friends instantiate in the library, and the linker's own.
EXPORTED = re.compile(r"effvit_[a-z0-9_]+$|__bss_start$|_edata$|_end$")
SPELLING = {
    "Tensor": "Tensor", "Optional[Tensor]": "Tensor?", "int": "int", "Optional[int]": "int?", "float": "float",
    "Optional[float]": "float?", "bool": "bool", "List[int]": "int[]",
}  # fmt: skip


def library(name):
    path = _load.library_path(name)
    if path is None:
        pytest.skip(f"{name} is {_load.build_status(name)}")
    return path


def output(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIBRARIES = ["effvit_cpu", "effvit_cuda", "effvit_emu"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_undefined_symbols(name):
    lines = output("nm", "-D", "--undefined-only", library(name)).split("\n")
    symbols = [line.split()[-1] for line in lines if line.strip()]
    assert symbols
    assert [s for s in symbols if not STABLE_ABI.match(s) and not TOOLCHAIN.match(s)] == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_exported_symbols(name):
    lines = output("nm", "-D", "--defined-only", library(name)).splitlines()
    symbols = [line.split()[-1].split("@")[0] for line in lines if line.split()[-2] not in "uVW"]
    assert {"effvit_abi_signatures", "effvit_declarations"} <= set(symbols)
    assert [s for s in symbols if not EXPORTED.match(s)] == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_path_of_the_building_machine(name):
    dynamic = output("readelf", "-d", library(name))
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libc.so.6" in needed and [n for n in needed if not NEEDED.match(n)] == []
    assert torch.__path__[0].encode() not in library(name).read_bytes()


def spelt(argument_type):
    return SPELLING[str(argument_type.annotation_str if hasattr(argument_type, "annotation_str") else argument_type)]


def schema_signature(op):
    schema = getattr(torch.ops.effvit, op).default._schema
    returns = [spelt(r.type) for r in schema.returns]
    returned = returns[0] if len(returns) == 1 else f"({', '.join(returns)})"
    return f"{op}({', '.join(spelt(a.type) for a in schema.arguments)}) -> {returned}"


def expected_signatures(name):
    """Of the ops that the library must hold: all but those whose binding is waived."""
    layer = "cpu kernel" if name == "effvit_cpu" else "cuda binding"
    return sorted(schema_signature(n) for n, op in OPS.items() if (op.backward_of or n, layer) not in WAIVERS)


def signatures(handle):
    handle.effvit_abi_signatures.restype = ctypes.c_char_p
    return sorted(handle.effvit_abi_signatures().decode().splitlines())


@pytest.mark.parametrize("name", ["effvit_cpu", "effvit_emu"])
def test_signatures_match_schemas(name):
    """torch does not compare them: a schema `int` against a C++ `double` hands over garbage."""
    if name == "effvit_emu":
        from effvit.testing import emulator

        emulator.load()
    assert signatures(ctypes.CDLL(str(library(name)))) == expected_signatures(name)


@pytest.mark.parametrize("name", LIBRARIES)
def test_declarations_are_those_of_python(name):
    """Checks in C++ and in Python follow from the same text."""
    if name == "effvit_cuda" and torch.version.cuda is None:
        pytest.skip("the library is loaded below, with stand-ins for torch's CUDA symbols")
    if name == "effvit_emu":
        from effvit.testing import emulator

        emulator.load()
    handle = ctypes.CDLL(str(library(name)))
    handle.effvit_declarations.restype = ctypes.c_char_p
    names = {line.split("(")[0] for line in expected_signatures(name)}
    expected = [op.declaration.text for op in OPS.values() if op.name in names]
    assert sorted(handle.effvit_declarations().decode().splitlines()) == sorted(expected)


def preload_cuda(path, tmp_path):
    """A line of Python after which the CUDA library loads here."""
    if torch.version.cuda is not None:
        return ""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", path).splitlines()]
    exported = output("nm", "-D", "--defined-only", f"{torch.__path__[0]}/lib/libtorch_cpu.so").splitlines()
    exported = {line.split()[-1] for line in exported}
    missing = [s for s in undefined if STABLE_ABI.match(s) and s not in exported]
    assert all("cuda" in s for s in missing), missing
    (tmp_path / "cuda.c").write_text("".join(f"int {s}(void) {{ return 1; }}\n" for s in missing))
    stub = tmp_path / "libtorch_cuda.so"
    output("cc", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", tmp_path / "cuda.c", "-o", stub)
    return f"ctypes.CDLL({str(stub)!r})\n"


def test_cuda_library_loads_and_matches_schemas(tmp_path):
    """Also where torch is CPU-only: functions that are never called then stand in for its CUDA symbols."""
    path = library("effvit_cuda")
    preload = preload_cuda(path, tmp_path)
    cuda_ops = [line.split("(")[0] for line in expected_signatures("effvit_cuda")]
    code = f"""
import ctypes, os, sys
os.environ["EFFVIT_BACKEND"] = "cpu"
import torch, effvit
{preload}torch.ops.load_library({str(path)!r})
symbol = ctypes.CDLL({str(path)!r}).effvit_abi_signatures
symbol.restype = ctypes.c_char_p
registered = torch._C._dispatch_has_kernel_for_dispatch_key
for op in {cuda_ops!r}:
    assert registered("effvit::" + op, "CUDA"), op
sys.stdout.write(symbol().decode())
"""
    found = sorted(output(sys.executable, "-c", code).splitlines())
    assert found == expected_signatures("effvit_cuda")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_wide_registers_only_in_isa_code():
    """An inline function of AVX-512 code that the linker shares with generic code is an illegal instruction."""
    table = (ROOT / "csrc" / "cpu" / "isa" / "isas.h").read_text()
    isas = [isa for isa in re.findall(r"^EFFVIT_ISA\((\w+)", table, re.M) if isa != "generic"]
    assert len(isas) >= 4
    # A namespace, or the end of an entry point's name.
    own = re.compile("|".join([*(f"{len(isa)}{isa}" for isa in isas), *(f"_{isa}(E|$)" for isa in isas)]))
    disassembly = subprocess.Popen(
        ["objdump", "-d", "--no-show-raw-insn", str(library("effvit_cpu"))], stdout=subprocess.PIPE, text=True
    )
    function, wide, isa_functions = "", set(), set()
    for line in disassembly.stdout:
        if line.endswith(">:\n"):
            function = line.split("<", 1)[1][:-3]
        elif re.search(r"%[yz]mm|%tmm", line):
            (isa_functions if own.search(function) else wide).add(function)
    assert disassembly.wait() == 0
    assert isa_functions, "no function uses AVX: the disassembly was not understood"
    assert wide == set()


HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system has no transparent huge pages"
)
def test_large_outputs_ask_for_huge_pages():
    """Fresh memory costs a page fault for every 4 KiB otherwise: more than the kernel that fills it."""
    q = torch.ones(1, 1, 1, 1).expand(8, 1 << 13, 4, 40)[..., :1]  # the output is fresh, the inputs are small
    v = torch.ones(1, 1, 1, 40).expand(8, 1 << 13, 4, 40)
    out, _, _ = torch.ops.effvit.linear_attention(q, q, v)
    assert out.nbytes > 32 << 20
    middle = out.data_ptr() + out.nbytes // 2
    flags = None
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= middle < int(match[2], 16)
        elif line.startswith("VmFlags:") and inside:
            flags = line.split()
    assert "hg" in flags, flags
