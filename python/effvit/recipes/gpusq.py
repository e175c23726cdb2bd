"""GPUSQ-ViT on a small ViT and a small Swin: `python -m effvit.recipes.gpusq` trains, prunes 2:4, quantises, measures.

The recipe of GPUSQ-ViT (arXiv:2305.10727): a float model is the teacher of its own copy, whose linear layers are 2:4
sparse and rounded to int8 while it is trained on the labels, on the teacher's logits and on the outputs of its blocks.
The result runs on `Sparse24Int8Linear`. The data is scikit-learn's digits: 1797 images of 8 x 8, in the package itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn

import effvit

from .._calibrate import evaluating
from .._progress import progress
from .._report import table
from ..testing import torchvision_schemas

TEST_IMAGES = 450
BATCH = 32
HARD, SOFT, FEATURE = 1.0, 10.0, 5.0  # GPUSQ-ViT's factors of the three losses
TEMPERATURE = 2.0
DENSE_SHARE = 0.3  # of the fine-tuning: while masked weights fade out


@dataclasses.dataclass
class Data:
    """Images [N, 1, 8, 8] between -1 and 1, and labels."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load_digits() -> Data:
    """Always the same split."""
    try:
        from sklearn import datasets
    except ImportError as e:
        raise ImportError(
            "effvit.recipes.gpusq: scikit-learn must be installed (pip install scikit-learn), for its digits"
        ) from e
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Data(images[train], labels[train], images[test], labels[test])


def make_model(name: str, seed: int) -> nn.Module:
    """A small timm model for 8 x 8 images of one channel."""
    try:
        from timm.models.swin_transformer import SwinTransformer
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as e:
        raise ImportError("effvit.recipes.gpusq: timm must be installed (pip install timm), for its models") from e
    torch.manual_seed(seed)
    common = {"img_size": 8, "in_chans": 1, "num_classes": 10}
    if name == "vit":
        model = VisionTransformer(
            patch_size=2, embed_dim=64, depth=4, num_heads=4, class_token=False, global_pool="avg", **common
        )  # fmt: skip
    else:
        model = SwinTransformer(
            patch_size=1, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4, drop_path_rate=0.0, **common
        )  # fmt: skip
    for m in model.modules():  # timm's 0.02 is meant for wider layers
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return model


MODELS = ("vit", "swin")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ("Block", "SwinTransformerBlock")]


@contextlib.contextmanager
def recorded(blocks: list[nn.Module], outputs: list):
    """While it lasts, outputs are those of the blocks in the last call of their model, in order."""
    outputs[:] = [None] * len(blocks)
    handles = [
        block.register_forward_hook(lambda module, args, out, i=i: outputs.__setitem__(i, out))
        for i, block in enumerate(blocks)
    ]
    yield
    for handle in handles:
        handle.remove()


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images moved by up to a pixel along each axis."""
    n = len(images)
    moved = torch.rand(n, generator=generator) < 0.5
    dy, dx = (torch.where(moved, torch.randint(0, 3, (n,), generator=generator), 1) for _ in range(2))
    padded, i = F.pad(images[:, 0], (1, 1, 1, 1), value=-1.0), torch.arange(8)
    rows, columns = (dy[:, None] + i)[:, :, None], (dx[:, None] + i)[:, None, :]
    return padded[torch.arange(n)[:, None, None], rows, columns][:, None]


def train(model, data, loss, epochs, rate, seed, title, bar=True, after_step=None) -> None:
    """AdamW on a one-cycle schedule; loss(images, labels)."""
    per_epoch = len(data.train) // BATCH
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in progress(range(steps), title, enabled=bar):
        if step % per_epoch == 0:
            order = torch.randperm(len(data.train), generator=generator)
        rows = order[(step % per_epoch) * BATCH :][:BATCH]
        value = loss(shifted(data.train[rows], generator), data.train_labels[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step()
    model.eval()


def distil(model, teacher, data, epochs, rate, seed, title, bar=True, after_step=None) -> None:
    """Train on labels, on the teacher's logits and on the outputs of its blocks."""
    mine, theirs = [], []

    def loss(images, labels):
        with torch.no_grad():
            target = teacher(images)
        logits = model(images)
        hard = F.cross_entropy(logits, labels)
        soft = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, -1), F.softmax(target / TEMPERATURE, -1), reduction="batchmean"
        )
        features = [F.mse_loss(a, b) / b.var() for a, b in zip(mine, theirs, strict=True)]
        return HARD * hard + SOFT * TEMPERATURE**2 * soft + FEATURE * sum(features) / len(features)

    with recorded(blocks_of(model), mine), recorded(blocks_of(teacher), theirs):
        train(model, data, loss, epochs, rate, seed, title, bar, after_step)


# ---- what is measured ------------------------------------------------------------------------------------------------


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the test images."""
    with evaluating(model):
        return float((model(data.test).argmax(-1) == data.test_labels).double().mean() * 100)


def bytes_on_disk(model: nn.Module) -> int:
    """Of the state_dict as a safetensors file; without safetensors, of its tensors."""
    try:
        from safetensors.torch import save_model
    except ImportError:
        return effvit.quantize.size_of(model)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        save_model(model, path)
        return os.path.getsize(path)


def latencies(models: list[nn.Module], images: torch.Tensor, repeats: int) -> list[float]:
    """Median milliseconds of a batch, the models in turn."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for repeat in range(repeats + 2):
            for model, found in zip(models, times, strict=True):
                start = time.perf_counter()
                model(images)
                if repeat >= 2:  # warm
                    found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


@dataclasses.dataclass
class Result:
    """One model: percent of the test images, bytes on disk, milliseconds of a batch."""

    model: str
    accuracy_float: float
    accuracy_int8: float
    accuracy_sparse24_int8_one_shot: float
    accuracy_sparse24_int8: float
    bytes_float: int
    bytes_int8: int
    bytes_sparse24_int8: int
    ms_float: float
    ms_int8: float
    ms_sparse24_int8: float
    seconds: float

    @property
    def drop(self) -> float:
        return self.accuracy_float - self.accuracy_sparse24_int8


@dataclasses.dataclass
class Settings:
    """Epochs, peak learning rates, timing."""

    epochs: int = 50
    fine_tuning_epochs: int = 20
    rate: float = 2e-3
    fine_tuning_rate: float = 1e-3
    seed: int = 0
    batch: int = 64  # whose latency is measured
    repeats: int = 30
    bar: bool = True


def run(name: str, data: Data, settings: Settings) -> Result:
    """The whole recipe on one model."""
    start, bar, seed = time.perf_counter(), settings.bar, settings.seed
    model = make_model(name, seed)
    train(
        model, data, lambda x, y: F.cross_entropy(model(x), y), settings.epochs, settings.rate, seed + 1,
        f"{name}: float", bar,
    )  # fmt: skip
    quantised, one_shot, student = (copy.deepcopy(model) for _ in range(3))
    effvit.quantize_(quantised, verbose=False)
    effvit.quantize_(one_shot, kind="sparse24_int8", verbose=False)

    steps = settings.fine_tuning_epochs * (len(data.train) // BATCH)
    masks = effvit.sparsify_(student, decay="linear", steps=max(int(DENSE_SHARE * steps), 1), verbose=False)
    effvit.quantize_(student, kind="sparse24_int8", qat=True, verbose=False)
    distil(
        student, model, data, settings.fine_tuning_epochs, settings.fine_tuning_rate, seed + 2,
        f"{name}: 2:4 int8", bar, masks.step,
    )  # fmt: skip
    effvit.convert_(student, verbose=False)

    models = [model, quantised, student]
    times = latencies(models, data.test[: settings.batch], settings.repeats)
    return Result(
        name, *(accuracy(m, data) for m in (model, quantised, one_shot, student)), *map(bytes_on_disk, models), *times,
        time.perf_counter() - start,
    )  # fmt: skip


def shown(results: list[Result], batch: int) -> str:
    head = ("model", "", "accuracy %", "KiB on disk", f"ms per batch of {batch}")
    rows = []
    for r in results:
        rows += [
            (r.model, "float", f"{r.accuracy_float:.2f}", f"{r.bytes_float / 1024:.0f}", f"{r.ms_float:.2f}"),
            ("", "int8", f"{r.accuracy_int8:.2f}", f"{r.bytes_int8 / 1024:.0f}", f"{r.ms_int8:.2f}"),
            ("", "2:4 int8, pruned at once", f"{r.accuracy_sparse24_int8_one_shot:.2f}", "", ""),
            ("", "2:4 int8, fine-tuned", f"{r.accuracy_sparse24_int8:.2f}", f"{r.bytes_sparse24_int8 / 1024:.0f}",
             f"{r.ms_sparse24_int8:.2f}"),
        ]  # fmt: skip
    return "\n".join(table(head, rows))


def main(argv: list[str] | None = None) -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m effvit.recipes.gpusq", description="GPUSQ-ViT on digits: float, int8 and 2:4 int8 compared"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="of the float model")
    parser.add_argument("--fine-tuning-epochs", type=int, default=defaults.fine_tuning_epochs, help="2:4 and int8")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--quick", action="store_true", help="a few epochs, seconds: does it run?")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    args = parser.parse_args(argv)
    settings = Settings(args.epochs, args.fine_tuning_epochs, seed=args.seed, bar=not args.no_progress)
    if args.quick:
        settings = dataclasses.replace(settings, epochs=3, fine_tuning_epochs=1, repeats=3)
    torchvision_schemas()  # timm imports torchvision, whose binary may not match this torch
    try:
        data = load_digits()
        results = [run(name, data, settings) for name in args.models]
    except ImportError as e:
        print(e, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([dataclasses.asdict(r) | {"drop": r.drop} for r in results], indent=1))
    else:
        print(shown(results, settings.batch))
        print(f"{torch.get_num_threads()} threads, {sum(r.seconds for r in results):.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
