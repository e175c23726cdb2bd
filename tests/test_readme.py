"""README's Python blocks, one after another in one namespace, on a smaller model."""

import re
from pathlib import Path

import pytest

MODEL = 'timm.create_model("swin_tiny_patch4_window7_224")'
SMALL = MODEL[:-1] + ", img_size=64, embed_dim=24, depths=(1, 1), num_heads=(3, 6), num_classes=10)"


def test_the_blocks_run(capsys):
    pytest.importorskip("timm")
    page = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    program = "\n".join(blocks)
    assert len(blocks) > 4 and program.count(MODEL) == 1 and program.count("(8, 3, 224, 224)") == 1
    program = program.replace(MODEL, SMALL).replace("(8, 3, 224, 224)", "(8, 3, 64, 64)")
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    assert names["logits"].shape == (8, 10) and "logits: error" in str(names["report"])
    shown = capsys.readouterr().out
    assert "layers.0.blocks.0" in shown  # what was patched
