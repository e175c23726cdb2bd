"""I-ViT on a small ViT: `python -m effvit.recipes.ivit` trains it, converts it to integers alone, fine-tunes, measures.

The recipe of I-ViT (arXiv:2207.01405): a float model is calibrated and converted as it is (PTQ), and fine-tuned with
the integers in its forward passes (QAT). What is deployed runs without floating point; that its integers are those of
the operators' definitions on every instruction set of the CPU is checked here. The data is scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import effvit

from .. import _backends
from .._calibrate import evaluating
from .._report import table
from ..ops._op import OPS
from . import gpusq
from .gpusq import Data, latencies, load_digits, train

MOST_LOSS = 1.0  # points of accuracy that integers alone may cost


def make_model(seed: int) -> nn.Module:
    """A ViT with a class token, for 8 x 8 images of one channel."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as e:
        raise ImportError("effvit.recipes.ivit: timm must be installed (pip install timm), for its models") from e
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4)
    for m in model.modules():  # timm's 0.02 is meant for wider layers
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    return model


class OnReference(TorchDispatchMode):
    """Operators run their definitions in PyTorch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "effvit":
            return OPS[func.overloadpacket.__name__].reference(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def same_everywhere(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The definition and the CPU's instruction sets, which give the same integers; RuntimeError where one does not."""
    with torch.no_grad():
        with OnReference():
            expected = model(x)
        names, before = ["reference"], _backends.isa()
        try:
            for name in _backends.isas():
                _backends.set_isa(name)
                if not torch.equal(model(x), expected):
                    raise RuntimeError(f"effvit.recipes.ivit: {name} does not give the reference's integers")
                names.append(f"cpu {name}")
        finally:
            if before is not None:
                _backends.set_isa(before)
    return names


def agrees_with_training(trained: nn.Module, deployed: nn.Module, images: torch.Tensor) -> bool:
    """Whether the deployed model has the integers of the trained one."""
    with evaluating(trained):
        return torch.equal(trained.quantised(images).integers, deployed(deployed.quantize_input(images)))


def accuracy(model, data: Data) -> float:
    """Percent of the test images."""
    call = model.predict if hasattr(model, "predict") else model
    with evaluating(model):
        return float((call(data.test).argmax(-1) == data.test_labels).double().mean() * 100)


@dataclasses.dataclass
class Settings:
    """Epochs, peak learning rates, timing."""

    epochs: int = 20
    fine_tuning_epochs: int = 4
    rate: float = 2e-3
    fine_tuning_rate: float = 2e-4
    seed: int = 0
    batch: int = 64  # whose latency is measured
    repeats: int = 20
    bar: bool = True


@dataclasses.dataclass
class Result:
    """Percent of the test images, milliseconds of a batch, and where on this CPU the integers were the same."""

    accuracy_float: float
    accuracy_int8: float
    accuracy_integer: float
    accuracy_integer_trained: float
    same_on: list[str]
    same_as_training: bool
    ms_float: float
    ms_int8: float
    ms_integer: float
    seconds: float

    @property
    def loss(self) -> float:
        """Points that integers alone cost, after fine-tuning."""
        return self.accuracy_float - self.accuracy_integer_trained


def run(data: Data, settings: Settings) -> Result:
    """The whole recipe."""
    start, bar, seed = time.perf_counter(), settings.bar, settings.seed
    model = make_model(seed)

    def cross_entropy(model):
        return lambda x, y: F.cross_entropy(model(x), y)

    train(model, data, cross_entropy(model), settings.epochs, settings.rate, seed + 1, "float", bar)
    int8 = copy.deepcopy(model)
    effvit.quantize_(int8, verbose=False)
    batches = data.train[:512].split(64)
    converted, _ = effvit.to_integer(model, batches, progress=bar)
    trained = effvit.prepare_integer(model, batches, progress=bar)
    train(
        trained, data, cross_entropy(trained), settings.fine_tuning_epochs, settings.fine_tuning_rate, seed + 2,
        "integers", bar,
    )  # fmt: skip
    deployed, _ = effvit.to_integer(trained)
    x = deployed.quantize_input(data.test[: settings.batch])
    same_on = same_everywhere(deployed, x)
    floats = data.test[: settings.batch]
    times = latencies([lambda _: model(floats), lambda _: int8(floats), deployed], x, settings.repeats)
    return Result(
        *(accuracy(m, data) for m in (model, int8, converted, deployed)), same_on,
        agrees_with_training(trained, deployed, data.test), *times, time.perf_counter() - start,
    )  # fmt: skip


def shown(r: Result, batch: int) -> str:
    head = ("", "accuracy %", f"ms per batch of {batch}")
    rows = [
        ("float", f"{r.accuracy_float:.2f}", f"{r.ms_float:.2f}"),
        ("int8 linear layers (effvit.quantize_)", f"{r.accuracy_int8:.2f}", f"{r.ms_int8:.2f}"),
        ("integers alone, converted", f"{r.accuracy_integer:.2f}", ""),
        ("integers alone, fine-tuned", f"{r.accuracy_integer_trained:.2f}", f"{r.ms_integer:.2f}"),
    ]
    lines = table(head, rows)
    trained = "yes" if r.same_as_training else "NO"
    lines.append(f"the same integers on: {', '.join(r.same_on)}; as in training: {trained}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m effvit.recipes.ivit", description="I-ViT on digits: float, int8 and integers alone compared"
    )
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="of the float model")
    parser.add_argument("--fine-tuning-epochs", type=int, default=defaults.fine_tuning_epochs, help="with integers")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--quick", action="store_true", help="fewer epochs, in seconds")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    args = parser.parse_args(argv)
    settings = Settings(args.epochs, args.fine_tuning_epochs, seed=args.seed, bar=not args.no_progress)
    if args.quick:
        settings = dataclasses.replace(settings, epochs=8, fine_tuning_epochs=2, repeats=3)
    gpusq.torchvision_schemas()  # timm imports torchvision, whose binary may not match this torch
    try:
        result = run(load_digits(), settings)
    except ImportError as e:
        print(e, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(dataclasses.asdict(result) | {"loss": result.loss}, indent=1))
    else:
        print(shown(result, settings.batch))
        print(f"{torch.get_num_threads()} threads, {result.seconds:.0f} s in all")
    return 0 if result.same_as_training and result.loss <= MOST_LOSS else 2


if __name__ == "__main__":
    sys.exit(main())
