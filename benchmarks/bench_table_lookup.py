"""table_lookup as a GELU on int8 against PyTorch's indexing of the same table, and against float32 F.gelu."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit.layers.table import table_of
from effvit.ops._op import Cost

SHAPES = {  # rows, C, tag
    "DeiT-S hidden 197x1536": (197, 1536, "default"),
    "DeiT-S hidden 8x197x1536": (1576, 1536, "default"),
    "Swin-T stage 1 hidden 2x3136x384": (6272, 384, "default"),
    "1 row 1x1536": (1, 1536, "default"),
    "smoke 3x20": (3, 20, "smoke"),
}


def inputs(shape, dtype, device):
    x = torch.randint(-128, 128, shape, dtype=torch.int8)
    return {"x": x.to(device), "table": table_of(F.gelu, 0.05, 0.05).to(device)}


def indexed(x, table):
    return lambda: table[x.int() + 128]


def floats(x, table):
    y = x.float() * 0.05
    return lambda: F.gelu(y)


def cases():
    for name, (rows, c, tag) in SHAPES.items():
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=(rows, c): inputs(shape, dtype, device),
            effvit=lambda x, table: lambda: effvit.table_lookup(x, table),
            peers={"indexing": indexed, "float32 gelu": floats},
            reference=lambda x, table: lambda: table[x.int() + 128].double(),
            cost=lambda direction, dtype, n=rows * c: Cost(n, 2 * n),
            baseline="float32 gelu",
            compiled="indexing",
            unchecked=("effvit", "indexing", "float32 gelu", "compile"),  # integers: the suite compares them
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("table_lookup", cases()))
