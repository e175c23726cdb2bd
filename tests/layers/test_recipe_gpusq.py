"""`python -m effvit.recipes.gpusq` in seconds: it trains, prunes, quantises, and prints what it measured."""

import builtins
import json

import pytest
import torch
import torch.nn.functional as F

from effvit.layers import Int8Linear, Sparse24Int8Linear
from effvit.recipes import gpusq

pytest.importorskip("sklearn")


def test_quick(capsys, monkeypatch):
    """Both models learn something, and what is measured are float, int8 and 2:4 int8 models."""
    measured = []
    latencies = gpusq.latencies
    monkeypatch.setattr(gpusq, "latencies", lambda models, *args: measured.append(models) or latencies(models, *args))
    assert gpusq.main(["--quick", "--json", "--no-progress"]) == 0
    shown = capsys.readouterr()
    results = json.loads(shown.out)
    assert [r["model"] for r in results] == ["vit", "swin"] and not shown.err
    for r, (model, int8, sparse) in zip(results, measured, strict=True):
        if r["model"] == "vit":  # the Swin has hardly begun by then
            assert r["accuracy_float"] > 20  # of ten classes; 450 images: chance is 10, with a deviation of 1.4
        assert abs(r["accuracy_int8"] - r["accuracy_float"]) < 4
        assert r["drop"] == r["accuracy_float"] - r["accuracy_sparse24_int8"]
        assert r["bytes_sparse24_int8"] < 0.75 * r["bytes_int8"] < 0.75 * 0.4 * r["bytes_float"]
        assert all(r[f"ms_{kind}"] > 0 for kind in ("float", "int8", "sparse24_int8"))
        kinds = [{type(m) for m in x.modules()} for x in (model, int8, sparse)]
        assert [Int8Linear in k for k in kinds] == [False, True, False]
        assert [Sparse24Int8Linear in k for k in kinds] == [False, False, True]
        count = sum(isinstance(m, Int8Linear) for m in int8.modules())
        assert count == sum(isinstance(m, Sparse24Int8Linear) for m in sparse.modules()) >= 16


def test_table_and_progress(capsys, monkeypatch):
    numbers = (98.0, 97.5, 60.0, 97.25, 4096, 2048, 1024, 3.0, 2.0, 1.0, 5.0)
    monkeypatch.setattr(gpusq, "run", lambda name, data, settings: gpusq.Result(name, *numbers))
    assert gpusq.main(["--models", "swin"]) == 0
    out = capsys.readouterr().out
    assert "accuracy %" in out and "97.25" in out and "swin" in out and "vit" not in out
    data = gpusq.load_digits()
    model = gpusq.make_model("vit", 0)
    few = gpusq.Data(data.train[:64], data.train_labels[:64], data.test, data.test_labels)
    gpusq.train(model, few, lambda x, y: F.cross_entropy(model(x), y), 1, 1e-3, 0, "vit: float")
    err = capsys.readouterr().err
    assert "vit: float" in err and not model.training


def test_data_and_augmentation():
    """A fixed split without overlap; half of the images unmoved, the others by a pixel at most."""
    data = gpusq.load_digits()
    assert data.train.shape == (1347, 1, 8, 8) and data.test.shape == (450, 1, 8, 8)
    assert float(data.train.min()) == -1 and float(data.train.max()) == 1
    assert torch.equal(gpusq.load_digits().test, data.test)
    moved = gpusq.shifted(data.train, torch.Generator().manual_seed(0))
    same = (moved == data.train).flatten(1).all(1)
    assert 0.5 < float(same.double().mean()) < 0.62  # half, and a ninth of the rest
    padded = F.pad(data.train, (1, 1, 1, 1), value=-1.0)
    crops = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    assert (crops == moved).flatten(2).all(2).any(0).all()


def test_distillation_is_three_losses(monkeypatch):
    """The value that is minimised, from its formula; the teacher is not trained."""
    data, losses = gpusq.load_digits(), []
    student, teacher = gpusq.make_model("vit", 0), gpusq.make_model("vit", 1).eval()
    before = [p.clone() for p in teacher.parameters()]

    def once(model, data, loss, *args):
        losses.append(loss(data.train[:5], data.train_labels[:5]))

    monkeypatch.setattr(gpusq, "train", once)
    gpusq.distil(student, teacher, data, 1, 1e-3, 0, "title")
    x, y = data.train[:5], data.train_labels[:5]

    def walk(model):
        h, features = model.pos_drop(model.patch_embed(x) + model.pos_embed), []
        for block in model.blocks:
            h = block(h)
            features.append(h)
        return model(x), features

    (logits, mine), (target, theirs) = walk(student), walk(teacher)
    p, q = (torch.softmax(t / 2, -1) for t in (target, logits))
    soft = 4 * (p * (p / q).log()).sum() / 5
    feature = sum(((a - b) ** 2).mean() / b.var() for a, b in zip(mine, theirs, strict=True)) / 4
    torch.testing.assert_close(losses[0], F.cross_entropy(logits, y) + 10 * soft + 5 * feature)
    losses[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "library, function", [("sklearn", gpusq.load_digits), ("timm", lambda: gpusq.make_model("vit", 0))]
)
def test_what_is_missing_is_named(library, function, monkeypatch, capsys):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == library:
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"effvit.recipes.gpusq: .* must be installed \(pip install"):
        function()
    assert gpusq.main(["--quick"]) == 1
    assert "must be installed" in capsys.readouterr().err
