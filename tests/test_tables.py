"""The Markdown pages: tables and pictures are those of benchmarks/results, and links lead somewhere."""

import re
from pathlib import Path

import pytest
import table
from results import family, latest, measured_ops

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "docs/benchmarks.md", "docs/notes.md")


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_tables_are_what_was_measured(page):
    text = (ROOT / page).read_text()
    new, count = table.rewritten(text)
    assert count, f"{page} has no marked table"
    assert new == text, f"stale: python benchmarks/table.py --write {page}"
    assert text.count("<!-- /bench") == count, f"{page}: a marker without its other half, or with unknown options"


def test_every_measured_op_is_shown():
    """A table and a picture in docs/benchmarks.md, a row in the README."""
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    summaries = [op for name in re.findall(r"<!-- bench-summary:(\w+)", readme) for op in family(name)]
    assert sorted(summaries) == sorted(measured_ops())
    for op in measured_ops():
        assert f"<!-- bench:{op} -->" in page, op
        if len({row["shape"] for row in latest(op)}) > 1:
            assert f"benchmarks/results/cpu-{op}.png" in page, op


def anchors(path):
    """The fragments that GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{page} links to {target}"
        if fragment:
            assert fragment in anchors(linked), f"{page} links to {target}, which has no such heading"


def test_the_page_of_a_new_machine(tmp_path):
    """Results elsewhere, two runs on two instruction sets: each column is of the newest run that has it."""
    head = (ROOT / "benchmarks/results/cpu.csv").read_text().splitlines()[0].split(",")

    def row(run, isa, dtype, shape, contender, ms, ratio=""):
        found = {"op": "relu_scale", "date": run, "commit": f"c{run}", "device": "CPU", "threads": "2", "torch": "2"}
        found |= {"kernel": "cpu", "direction": "forward", "status": "ok", "best_peer": "eager"}
        found |= {"run": run, "isa": isa, "dtype": dtype, "shape": shape, "contender": contender}
        found |= {"median_ms": str(ms), "ratio": ratio}
        return ",".join(found.get(name, "") for name in head)

    lines = [",".join(head)]
    for run, isa, dtype, ratio in (
        ("2001", "avx2", "bfloat16", 2), ("2002", "avx2", "float32", 2), ("2003", "avx2", "float32", 4),
        ("2004", "amx", "float32", 8),
    ):  # fmt: skip
        for shape, times in (("a", 1), ("b", 4)):
            lines.append(row(run, isa, dtype, shape, "effvit", 1, str(ratio * times)))
            lines.append(row(run, isa, dtype, shape, "eager", ratio * times))
    path = tmp_path / "new.csv"
    path.write_text("\n".join(lines) + "\n")
    assert {r["run"] for r in latest("relu_scale", path)} == {"2004"}
    assert {r["run"] for r in latest("relu_scale", path, isa="avx2")} == {"2001", "2003"}
    assert {r["run"] for r in latest("relu_scale", path, run="2002")} == {"2002"}
    text = table.summary("relu_scale", path)
    assert "| `relu_scale` | amx | **16.0×**, least 8.0× | not measured |" in text
    assert "| `relu_scale` | avx2 | **8.0×**, least 4.0× | **4.0×**, least 2.0× |" in text
    assert "commits c2001, c2003, c2004, 2004." in text
    assert "| a | **4.0×** (1.00 ms; eager 4.00) | **2.0×** (1.00 ms; eager 2.00) |" in table.markdown(
        "relu_scale", path, isa="avx2"
    )
    rows = table.peers("relu_scale", path).splitlines()
    assert rows[0] == "| shape | effvit | eager |" and rows[3] == "| b | 1.00 ms | 32.0 ms |"
    for unknown in ({"isa": "avx512"}, {"run": "2000"}):
        with pytest.raises(LookupError, match="no run of relu_scale"):
            latest("relu_scale", path, **unknown)
