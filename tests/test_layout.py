"""One file per op and layer, torch behind one header, launches behind prim, and the formatters' verdict."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from effvit.ops._op import OPS
from layout import LAYERS, OWN_TEST, ROWS, ROWS_STAND_FOR, WAIVERS

ROOT = Path(__file__).resolve().parent.parent
OP_NAMES = [name for name, op in OPS.items() if op.backward_of is None]
# Files of these folders that belong to no op.
SHARED = {
    "__init__", "_checks", "_declaration", "_dispatcher", "_op", "_sparse24", "_int8", "_transforms", "_common",
    "_tiles", "_rows", "_int8_epilogue", "_gemm", "_sparse24_tiles", "abi", "common", "rows", "rows_op", "declared",
    "math", "int8_epilogue", "int8_tiles", "_integer", "_int_rows", "int_rows", "int_rows_op", "int_math", "_lut",
    "lut", "int8_dense", "int_epilogue", "_stencil",
}  # fmt: skip


def sources(*suffixes):
    """Files that git tracks or would track; every file of these suffixes where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        names = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        names = [p for p in ROOT.rglob("*") if not {"build", ".venv"} & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in names if p.suffix in suffixes and p.is_file())


def relative(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_op_has_one_file_per_layer(op, layer):
    path = ROOT / LAYERS[layer].format(op=op)
    if layer in ROWS_STAND_FOR and (ROOT / ROWS.format(op=op)).is_file():
        assert not path.exists(), f"{relative([path])[0]} exists, and {ROWS.format(op=op)} too"
    elif (op, layer) in WAIVERS:
        assert not path.exists(), f"{relative([path])[0]} exists: remove its waiver"
    else:
        assert path.is_file(), f"missing {relative([path])[0]}; write it, or waive ({op!r}, {layer!r}) with a reason"


def test_waivers_name_ops_layers_and_reasons():
    for (op, layer), reason in WAIVERS.items():
        assert op in OP_NAMES and layer in LAYERS and len(reason) > 10, (op, layer, reason)


@pytest.mark.parametrize("layer", ["public function", "reference", "cuda kernel", "cuda binding", "triton", "test"])
def test_no_file_without_op(layer):
    folder, pattern = (LAYERS | {"test": OWN_TEST})[layer].rsplit("/", 1)
    prefix, suffix = pattern.split("{op}")
    for path in (ROOT / folder).glob(f"{prefix}*{suffix}"):
        name = path.name.removeprefix(prefix).removesuffix(suffix)
        part = any(name.startswith((f"{op}_", f"_{op}_")) for op in OP_NAMES)  # of the op's file
        known = name in OP_NAMES or name in SHARED or name.endswith("_test")
        assert known or part, f"{relative([path])[0]} belongs to no op"


def test_no_file_is_too_long():
    """Who needs more than 700 lines has two things in one file; tables of samples aside."""
    long = [
        p for p in sources(".py", ".h", ".cpp", ".cu", ".cuh", ".sh", ".txt") if len(p.read_text().splitlines()) > 700
    ]
    assert [p for p in relative(long) if not p.startswith("python/effvit/testing/")] == []


def test_readme_lists_every_op():
    """A row of the table of operators each, with a cell for every backend, and nothing else."""
    section = (ROOT / "README.md").read_text().split("\n## What there is\n")[1].split("\n## ")[0]
    head, line, *rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("|")]
    assert len(head) == 6 and set("".join(line)) == {"-"}
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[0])) == sorted(OP_NAMES)
    for row in rows:
        assert len(row) == len(head) and all(cell.strip() for cell in row), row


@pytest.mark.parametrize("op", OP_NAMES)
def test_changelog_names_every_op(op):
    assert f"`effvit::{op}`" in (ROOT / "CHANGELOG.md").read_text()


def test_only_stable_h_includes_torch():
    include = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.M)
    found = [p for p in sources(".h", ".cpp", ".cu", ".cuh") if include.search(p.read_text())]
    assert relative(found) == ["csrc/common/stable.h"]


def test_kernels_include_no_torch():
    """Kernels and params are used without torch, by the emulator, the microbenchmarks and NVRTC."""
    kernels = [p for p in sources(".cuh") if "cuda" in p.parts]
    names = (".inl.h", "_params.h")
    kernels += [p for p in sources(".h") if p.name.endswith(names) or {"isa", "emu"} & set(p.parts)]
    assert len(kernels) > 3
    binding = re.compile(r'^\s*#\s*include\s*[<"].*(stable|common/binding)\.h[>"]', re.M)
    assert relative(p for p in kernels if binding.search(p.read_text())) == []


def test_no_launch_syntax_outside_prim():
    files = [p for p in sources(".cuh", ".cu", ".h", ".cpp") if not {"prim", "bench"} & set(p.parts)]
    assert relative(p for p in files if "<<<" in p.read_text()) == []


def test_no_python_in_operator_libraries():
    files = sources(".h", ".cpp", ".cu", ".cuh")
    assert relative(p for p in files if re.search(r"#\s*include\s*[<\"](Python\.h|pybind11/)", p.read_text())) == []


def test_every_file_says_what_it_is():
    silent = [p for p in sources(".py") if not p.read_text().lstrip().startswith(('"""', 'r"""', "#!"))]
    silent += [p for p in sources(".h", ".cpp", ".cu", ".cuh") if not p.read_text().startswith("//")]
    assert relative(silent) == []


def test_lines_fit():
    long = []
    for path in sources(".py", ".h", ".cpp", ".cu", ".cuh", ".toml", ".txt", ".sh"):
        numbered = enumerate(path.read_text().splitlines(), 1)
        long += [f"{relative([path])[0]}:{i}" for i, line in numbered if len(line) > 120]
    assert long == []


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    run(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_format():
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_clang_format():
    beside = Path(sys.executable).parent / "clang-format"
    program = str(beside) if beside.exists() else "clang-format"
    run(program, "--dry-run", "-Werror", *map(str, sources(".h", ".cpp", ".cu", ".cuh")))
