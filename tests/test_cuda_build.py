"""The CUDA library is built where nvcc is, without a warning of ours, and without a register spill beyond the record.

`make spills` (python tests/test_cuda_build.py) rewrites the record, tests/data/ptxas.json.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from effvit import _load

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake"
RECORD = ROOT / "tests" / "data" / "ptxas.json"
FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n(?:.*\n)*?"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def logs(target):
    """Messages of every compilation of a target, by source file; the build keeps them beside the objects."""
    found = {p.name.removesuffix(".o.log"): p for p in (BUILD / "CMakeFiles" / f"{target}.dir").rglob("*.o.log")}
    objects = {name: p.with_suffix("") for name, p in found.items()}
    return {name: p.read_text() for name, p in found.items() if objects[name].exists()}


def cuda_status():
    status = _load.build_status("effvit_cuda")
    if not BUILD.is_dir():
        pytest.skip("effvit was not built here (make build)")
    if status == "not built: nvcc was not found":
        assert shutil.which("nvcc") is None
        pytest.skip("nvcc was not found")
    return status


def demangle(names):
    if shutil.which("c++filt") is None:
        return list(names)
    return subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()


def resources():
    """{kernel: {arch: registers, stack and spill bytes}} of the CUDA library, as ptxas reported them."""
    found = [m for text in logs("effvit_cuda").values() for m in FUNCTION.finditer(text)]
    table = {}
    for match, name in zip(found, demangle(m["name"] for m in found), strict=True):
        numbers = {key: int(match[key]) for key in ("registers", "stack", "stores", "loads")}
        table.setdefault(name, {})[match["arch"]] = numbers
    return table


def test_cuda_library_is_built():
    status = cuda_status()
    assert status.startswith("nvcc"), status
    assert _load.library_path("effvit_cuda") is not None
    assert logs("effvit_cuda")


@pytest.mark.parametrize("target", ["effvit_cpu", "effvit_cuda", "effvit_emu"])
def test_no_warnings(target):
    messages = logs(target)
    if not messages:
        pytest.skip(f"{target} was not built")
    lines = [f"{name}: {line}" for name, text in messages.items() for line in text.splitlines()]
    assert [line for line in lines if "warning" in line.lower()] == []


def test_no_new_spills():
    status = cuda_status()
    record, found = json.loads(RECORD.read_text()), resources()
    assert found, "no kernel in ptxas' messages"
    if record["nvcc"] != status.split(",")[0]:
        pytest.skip(f"the record is of {record['nvcc']}, this is {status}")
    assert sorted(found) == sorted(record["kernels"]), "kernels were added or removed: make spills"
    worse = []
    for kernel, archs in found.items():
        for arch, numbers in archs.items():
            recorded = record["kernels"][kernel].get(arch, {"stack": 0, "stores": 0, "loads": 0})
            for key in ("stack", "stores", "loads"):
                if numbers[key] > recorded[key]:
                    worse.append(f"{kernel} {arch}: {key} {recorded[key]} -> {numbers[key]} bytes")
    assert worse == []


if __name__ == "__main__":
    # What this build has no architecture for stays as it was recorded.
    known = json.loads(RECORD.read_text())["kernels"]
    kernels = {n: dict(sorted((known.get(n, {}) | archs).items())) for n, archs in sorted(resources().items())}
    built_with = _load.build_status("effvit_cuda").split(",")[0]
    RECORD.write_text(json.dumps({"nvcc": built_with, "kernels": kernels}, indent=1) + "\n")
    spilling = [k for k, archs in kernels.items() if any(a["stores"] for a in archs.values())]
    print(f"{RECORD.relative_to(ROOT)}: {len(kernels)} kernels, {len(spilling)} with spills")
