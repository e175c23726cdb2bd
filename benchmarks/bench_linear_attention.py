"""linear_attention against plain einsum, EfficientViT's ones column, torch.compile, and softmax attention of that size.

q, k and v are views of one projection [B, L, 3, H, D], as in the models; the output is [B, L, H, D].
"""

import dataclasses

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.ops.linear_attention import FEATURE_MAPS, NORMALIZERS, prefers_quadratic
from effvit.reference.linear_attention import FEATURE_MAPS as PHI
from effvit.reference.linear_attention import linear_attention as definition
from effvit.testing.linear_attention import SPEC

F = torch.nn.functional
SDPA_FLOPS = 5e11  # of one forward; beyond it softmax attention takes minutes on two cores


@dataclasses.dataclass(frozen=True)
class Shape:
    """Geometry and options of one case; C = H * D."""

    B: int
    L: int
    H: int
    D: int
    name: str = ""
    feature_map: str = "relu"
    normalize: str = "sum"
    causal: bool = False
    own_denominator: bool = False
    weighted: bool = False
    tags: tuple = ("default",)
    memory: bool = False

    @property
    def title(self):
        return f"{self.name or 'relu'} {self.B}x{self.L}x{self.H * self.D} d{self.D}"

    @property
    def options(self):
        return {"feature_map": self.feature_map, "normalize": self.normalize, "causal": self.causal}

    def price(self):
        tokens = (self.B, self.L, self.H, self.D)
        options = {
            "feature_map": FEATURE_MAPS.index(self.feature_map), "normalize": NORMALIZERS.index(self.normalize),
            "causal": self.causal, "quadratic": prefers_quadratic(self.L, self.L, self.D, self.D),
        }  # fmt: skip
        extra = 2 if self.own_denominator else 0
        return price_of(SPEC.cost, [tokens] * (3 + extra), **options)


MLLA = {"feature_map": "none", "normalize": "mean", "own_denominator": True}
VSSD = {"feature_map": "none", "normalize": "none", "weighted": True}
SHAPES = [
    Shape(1, 196, 6, 32),
    Shape(1, 196, 12, 64),
    Shape(8, 196, 12, 32),
    Shape(8, 196, 12, 64),
    Shape(1, 784, 6, 32),
    Shape(1, 784, 12, 64),
    Shape(8, 784, 12, 32),
    Shape(8, 784, 6, 64),
    Shape(1, 3136, 6, 32),
    Shape(1, 3136, 12, 64),
    Shape(8, 3136, 6, 32, memory=True),
    Shape(8, 3136, 6, 64),
    Shape(1, 12544, 6, 32),
    Shape(1, 12544, 12, 64),
    Shape(8, 12544, 6, 32),
    Shape(8, 12544, 3, 64),
    Shape(1, 1024, 2, 256, tags=("extended",)),
    Shape(1, 3136, 2, 256, tags=("extended",)),
    Shape(64, 49, 6, 32, "window", tags=("extended",)),
    Shape(8, 49, 16, 64, "quadratic", tags=("extended",)),
    Shape(8, 3136, 2, 32, "MLLA-T", **MLLA, tags=("extended",)),
    Shape(8, 196, 8, 32, "MLLA-T", **MLLA, tags=("extended",)),
    Shape(8, 3136, 2, 64, "VSSD", **VSSD, tags=("extended",)),
    Shape(8, 784, 6, 32, "elu1", feature_map="elu1", tags=("extended",)),
    Shape(8, 784, 6, 32, "exp", feature_map="exp", tags=("extended",)),
    Shape(1, 3136, 6, 64, "causal", causal=True, tags=("extended",)),
    Shape(8, 784, 6, 32, "causal", causal=True, tags=("extended",)),
    Shape(1, 40, 2, 16, "smoke", tags=("smoke",), memory=True),
    Shape(2, 12, 2, 16, "smoke quadratic", tags=("smoke",)),
    Shape(1, 40, 2, 16, "smoke causal", causal=True, tags=("smoke",)),
    Shape(1, 40, 2, 16, "smoke MLLA", **MLLA, tags=("smoke",)),
    Shape(1, 40, 2, 16, "smoke VSSD", **VSSD, tags=("smoke",)),
]
EPS = 1e-6


def inputs_of(shape):
    def draw(dtype, device):
        B, L, H, D = shape.B, shape.L, shape.H, shape.D
        drawn = dict(zip("qkv", torch.randn(B, L, 3, H, D).to(device, dtype).unbind(2), strict=True))
        if shape.own_denominator:  # positive features, turned in the numerator only
            drawn |= {n: torch.rand(B, L, H, D).to(device, dtype) for n in ("q_den", "k_den")}
        if shape.weighted:
            drawn["weight"] = (torch.rand(B, L, H) / L).to(device, dtype)
        return drawn

    return draw


def effvit_path(shape, op=effvit.ops.linear_attention):
    def make(**tensors):
        def fn():
            out = op(**tensors, eps=EPS, **shape.options)
            return out[0] if isinstance(out, tuple) else out

        return fn

    return make


def reference_path(shape):
    """The definition, in the dtype of its inputs (the harness passes float64)."""
    return effvit_path(shape, definition)


# ---- peers --------------------------------------------------------------------------------------------------------


def einsum_path(shape):
    """The plain formula in the order that needs fewer operations; causal: the definition, chunk by chunk."""
    phi = PHI[shape.feature_map]

    def make(q, k, v, q_den=None, k_den=None, weight=None):
        def fn():
            fq, fk = phi(q), phi(k)
            gq, gk = (fq if q_den is None else phi(q_den)), (fk if k_den is None else phi(k_den))
            if weight is not None:
                fk, gk = fk * weight[..., None], gk * weight[..., None]
            if prefers_quadratic(shape.L, shape.L, shape.D, shape.D):
                scores = torch.einsum("blhk,bmhk->bhlm", fq, fk)
                out, total = torch.einsum("bhlm,bmhv->blhv", scores, v), scores.sum(-1).transpose(1, 2)
            else:
                out = torch.einsum("blhk,bhkv->blhv", fq, torch.einsum("bmhk,bmhv->bhkv", fk, v))
                total = None if shape.normalize == "none" else torch.einsum("blhk,bhk->blh", gq, gk.sum(1))
            if shape.normalize == "none":
                return out
            return out / (total + (EPS * shape.L if shape.normalize == "mean" else EPS))[..., None]

        return fn

    return reference_path(shape) if shape.causal else make


def ones_column_path(shape):
    """EfficientViT's own code: a column of ones after v carries the denominator through the same products."""

    def make(q, k, v):
        def fn():
            fq, fk, padded = q.relu().transpose(1, 2), k.relu().transpose(1, 2), F.pad(v, (0, 1), value=1.0)
            out = fq @ (fk.transpose(-2, -1) @ padded.transpose(1, 2))
            return (out[..., :-1] / (out[..., -1:] + EPS)).transpose(1, 2)

        return fn

    return make


def sdpa_path(shape):
    def make(q, k, v, **unused):
        def fn():
            heads = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=shape.causal).transpose(1, 2)

        return fn, {name: [t] for name, t in zip("qkv", (q, k, v), strict=True)}

    return make


def cases():
    for shape in SHAPES:
        peers = {"eager": einsum_path(shape)}
        if shape.options == {"feature_map": "relu", "normalize": "sum", "causal": False}:
            peers["ones"] = ones_column_path(shape)
        if 4 * shape.B * shape.L**2 * shape.H * shape.D <= SDPA_FLOPS:
            peers["sdpa"] = sdpa_path(shape)
        extra = ("q_den", "k_den") if shape.own_denominator else ("weight",) if shape.weighted else ()
        yield Case(
            shape=shape.title,
            inputs=inputs_of(shape),
            effvit=effvit_path(shape),
            peers=peers,
            reference=reference_path(shape),
            cost=shape.price(),
            wrt=("q", "k", "v", *extra),
            unchecked=("sdpa",),
            memory=shape.memory,
            tags=shape.tags,
        )


if __name__ == "__main__":
    raise SystemExit(main("linear_attention", cases()))
