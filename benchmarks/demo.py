"""make demo: timm's Swin-T on a photograph, before and after effvit.patch: agreement, kernels, times, a chart.

Exits with 1 if a patched output is further from the float64 model than the project's rule allows.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

import effvit
from effvit._accuracy import measure
from effvit.testing import torchvision_schemas

torchvision_schemas()  # timm imports torchvision, which a torch without its compiled part refuses

import timm  # noqa: E402

MODEL = "swin_tiny_patch4_window7_224"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph():
    """(name, uint8 [H, W, 3]) of a photograph that an installed package brings along."""
    try:
        from sklearn.datasets import load_sample_image

        return "china.jpg (scikit-learn)", torch.from_numpy(load_sample_image("china.jpg").copy())
    except ImportError:
        import matplotlib.cbook
        import matplotlib.image

        with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as f:
            return "grace_hopper.jpg (matplotlib)", torch.from_numpy(matplotlib.image.imread(f, "jpg").copy())


def crops(photo, count, size=224):
    """[count, 3, size, size]: different crops of the photograph, scaled, flipped and normalised, as for training."""
    g = torch.Generator().manual_seed(0)
    image = photo.permute(2, 0, 1).float() / 255
    short = min(image.shape[1:])
    batch = []
    for i in range(count):
        side = short - int(torch.randint(short // 2, (), generator=g)) if i else short
        top, left = (int(torch.randint(n - side + 1, (), generator=g)) for n in image.shape[1:])
        crop = image[None, :, top : top + side, left : left + side]
        crop = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        batch.append(crop.flip(-1) if i % 2 else crop)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (torch.stack(batch) - mean) / std


def outputs(model, x):
    """{name: output} of every block and of the logits."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: found.__setitem__(name, out))
        for name, module in model.named_modules()
        if isinstance(module, timm.models.swin_transformer.SwinTransformerBlock)
    ]
    with torch.no_grad():
        found["logits"] = model(x)
    for hook in hooks:
        hook.remove()
    return found


def compare(dtype, model, x, exact):
    """Runs the model before and after the patch; returns the patched model and rows of differences."""
    original = copy.deepcopy(model).to(dtype)
    patched = copy.deepcopy(original)
    effvit.patch(patched, verbose=False)  # raises if a block disagrees on random input
    before, after = outputs(original, x.to(dtype)), outputs(patched, x.to(dtype))
    rows = []
    for name, truth in exact.items():
        report = measure(after[name], truth, before[name], eps=torch.finfo(dtype).eps)
        scale = truth.abs().max().item()
        difference = (after[name].double() - before[name].double()).abs().max().item() / scale
        rows.append((name, difference, measure(before[name], truth).max_error, report))
    return original, patched, rows


def seconds(functions, device, budget):
    """Median seconds of each function and the number of rounds, interleaved so that all see the same machine.

    The first round is warm-up, and counts only where it alone spends the budget.
    """
    times = [[] for _ in functions]
    start = time.perf_counter()
    while len(times[0]) < 50 and (not times[0] or time.perf_counter() - start < budget):
        for function, record in zip(functions, times, strict=True):
            t = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            record.append(time.perf_counter() - t)
    kept = [record[1:] or record for record in times]
    return *(statistics.median(record) for record in kept), len(kept[0])


def timings(original, patched, x, budget):
    """{what: (median seconds before, after, rounds)}: the model, and the attention branch of a block of each stage."""
    device, found = x.device, {}
    with torch.no_grad():
        pair = [lambda m=m: m(x) for m in (original, patched)]
        found["Swin-T, end to end"] = seconds(pair, device, budget * 0.6)
        stages = list(zip(original.layers, patched.layers, strict=True))
        for a, b in stages:
            blocks = [(s, t) for s, t in zip(a.blocks, b.blocks, strict=True)][:2]
            for before, after in blocks:
                H, W = before.input_resolution
                if before is not blocks[0][0] and not any(before.shift_size):
                    continue
                z = torch.randn(x.shape[0], H, W, before.dim, dtype=x.dtype, device=device)
                name = f"attention {H}x{W}x{before.dim} shift {before.shift_size[0]}"
                pair = [lambda m=m, z=z: m._attn(z) for m in (before, after)]
                found[name] = seconds(pair, device, budget * 0.4 / 7)
    return found


def table(header, rows):
    cells = [header, *([str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *rest = zip(row, widths, strict=True)
        print("  " + first[0].ljust(first[1]) + "".join("  " + c.rjust(w) for c, w in rest))
    print()


def kernels(patched, x):
    """What effvit says about each call of the patched model: one line per distinct geometry."""
    calls = {}
    real = effvit.ops.window_attention

    def spy(q, k, v, *args, **kwargs):
        calls.setdefault((tuple(q.shape), kwargs["shift"]), ((q, k, v, *args), kwargs))
        return real(q, k, v, *args, **kwargs)

    effvit.ops.window_attention = spy
    try:
        with torch.no_grad():
            patched(x)
    finally:
        effvit.ops.window_attention = real
    rows = []
    for (shape, shift), (args, kwargs) in calls.items():
        e = effvit.explain("window_attention", *args, **kwargs)
        rows.append((list(shape), shift[0], e.kernel, f"{e.flops / 1e6:.0f}", f"{e.bytes / 1e6:.1f}", e.bound))
    table(["q [B, H, W, h, d]", "shift", "kernel", "MFLOP", "MB", "bound by"], rows)
    last = effvit.explain("window_attention", *args, **kwargs)
    print("\n".join(line for line in str(last).splitlines() if line.lstrip().startswith(("runs", "no"))) + "\n")


def draw(path, photo, name, results, device):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 5.2), width_ratios=[1, 1.3, 1.6], layout="constrained"
    )
    left.imshow(photo.numpy())
    left.set_title(name, fontsize=10)
    left.axis("off")
    colours = {torch.float32: ("#9db4d3", "#27548a"), torch.bfloat16: ("#e8c39e", "#c05a12")}
    for dtype, (rows, _) in results.items():
        label = str(dtype).removeprefix("torch.")
        light, dark = colours[dtype]
        x = range(len(rows))
        middle.plot(x, [r[2] for r in rows], "o--", color=light, label=f"timm, {label}")
        middle.plot(x, [r[3].max_error for r in rows], "o-", ms=4, color=dark, label=f"effvit, {label}")
    names = [r[0].removeprefix("layers.").replace(".blocks.", ".") for r in rows]
    middle.set_xticks(range(len(names)), names, rotation=60, fontsize=8)
    middle.set_yscale("log")
    middle.set_title("error against float64, after each block", fontsize=10)
    middle.legend(fontsize=8)
    middle.grid(alpha=0.3)
    what = list(next(iter(results.values()))[1])
    height = 0.8 / len(results)
    for i, (dtype, (_, times)) in enumerate(results.items()):
        y = [n + i * height for n in range(len(what))]
        ratios = [times[w][0] / times[w][1] for w in what]
        bars = right.barh(y, ratios, height, color=colours[dtype][1], label=str(dtype).removeprefix("torch."))
        right.bar_label(bars, [f"{r:.2f}x" for r in ratios], fontsize=8, padding=2)
    right.axvline(1, color="black", lw=0.8)
    right.set_yticks([n + height / 2 for n in range(len(what))], what, fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.12)
    right.set_title(f"speed-up over timm on {device} (time before / after)", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"chart: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=14, help="time to measure each dtype for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    args = parser.parse_args()
    device = torch.device(args.device)
    name, photo = photograph()
    x = crops(photo, args.batch).to(device)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, pretrained=False).eval().to(device)
    print(f"{MODEL}, random weights, {args.batch} crops of {name}, {device}, {torch.get_num_threads()} threads\n")
    results, wrong = {}, 0
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        # The truth of a dtype is that dtype's rounded weights and input, computed in float64.
        exact = outputs(copy.deepcopy(model).to(dtype).double(), x.to(dtype).double())
        original, patched, rows = compare(dtype, model, x, exact)
        print(f"{label}: differences, relative to the largest value of a token (logits: of an image)")
        table(
            ["output of", "patched - timm", "timm error", "effvit error", "allowed", ""],
            [
                (n, f"{d:.1e}", f"{e:.1e}", f"{r.max_error:.1e}", f"{r.max_allowed:.1e}", "ok" if r.ok else "WRONG")
                for n, d, e, r in rows
            ],
        )
        wrong += sum(not r.ok for *_, r in rows)
        print(f"{label}: kernels")
        kernels(patched, x.to(dtype))
        times = timings(original, patched, x.to(dtype), args.seconds)
        print(f"{label}: median times, interleaved")
        table(
            ["", "timm ms", "effvit ms", "ratio", "rounds"],
            [(w, f"{a * 1e3:.2f}", f"{b * 1e3:.2f}", f"{a / b:.2f}x", n) for w, (a, b, n) in times.items()],
        )
        results[dtype] = rows, times
    draw(args.output, photo, name, results, device)
    if wrong:
        print(f"FAILED: {wrong} outputs are further from float64 than the rule allows")
        return 1
    print("all outputs agree: no patched error exceeds twice timm's own plus two roundings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
