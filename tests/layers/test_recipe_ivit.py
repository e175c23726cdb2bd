"""`python -m effvit.recipes.ivit` in seconds: it trains, converts, fine-tunes; integers alone cost a point at most."""

import builtins
import json

import pytest
import torch

from effvit import _backends
from effvit.recipes import ivit

pytest.importorskip("sklearn")


def test_quick(capsys, monkeypatch):
    """The claims: what integers alone cost, and that their bits are those of training, on every instruction set."""
    measured = []
    latencies = ivit.latencies
    monkeypatch.setattr(ivit, "latencies", lambda models, *args: measured.append(models) or latencies(models, *args))
    assert ivit.main(["--quick", "--json", "--no-progress"]) == 0
    shown = capsys.readouterr()
    r = json.loads(shown.out)
    assert not shown.err
    assert r["accuracy_float"] > 80  # of ten classes, after seconds of training
    assert r["loss"] == r["accuracy_float"] - r["accuracy_integer_trained"] <= ivit.MOST_LOSS == 1.0
    assert abs(r["accuracy_int8"] - r["accuracy_float"]) < 2 and abs(r["accuracy_integer"] - r["accuracy_float"]) < 4
    assert r["same_as_training"] is True
    assert r["same_on"] == ["reference", *(f"cpu {name}" for name in _backends.isas())]
    assert all(r[f"ms_{kind}"] > 0 for kind in ("float", "int8", "integer"))
    deployed = measured[0][-1]
    assert not any(b.is_floating_point() for b in deployed.buffers()) and not list(deployed.parameters())


def test_an_instruction_set_that_differs_is_told(monkeypatch):
    """The check of bits can fail."""
    answers = iter((0, *([1] * 10)))
    monkeypatch.setattr(_backends, "isas", lambda: ["avx2"])
    monkeypatch.setattr(_backends, "isa", lambda: None)
    monkeypatch.setattr(_backends, "set_isa", lambda name: None)
    with pytest.raises(RuntimeError, match="avx2 does not give the reference's integers"):
        ivit.same_everywhere(lambda x: torch.tensor(next(answers)), torch.zeros(1))


def test_table_and_exit_code(capsys, monkeypatch):
    good = ivit.Result(98.0, 97.5, 96.0, 97.25, ["reference", "cpu avx2"], True, 3.0, 2.0, 1.0, 5.0)
    for result, code in (
        (good, 0),
        (ivit.dataclasses.replace(good, same_as_training=False), 2),
        (ivit.dataclasses.replace(good, accuracy_integer_trained=96.9), 2),
    ):
        monkeypatch.setattr(ivit, "run", lambda data, settings, result=result: result)
        assert ivit.main([]) == code
    out = capsys.readouterr().out
    assert "accuracy %" in out and "97.25" in out and "cpu avx2" in out and "as in training: NO" in out


@pytest.mark.parametrize("library", ["sklearn", "timm"])
def test_what_is_missing_is_named(library, monkeypatch, capsys):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == library:
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert ivit.main(["--quick"]) == 1
    assert "must be installed" in capsys.readouterr().err
