"""Swin-T and DeiT-S end to end, batch 8 at 224x224: timm's before and after effvit.patch, inference, training."""

import copy

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import timm
import torch

import effvit


def path(patched=False, fused=False):
    def make(images, model):
        model = copy.deepcopy(model).to(images.dtype)  # for float64: the same rounded weights
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        if patched:
            effvit.patch(model, verify=False, verbose=False)  # the harness compares the logits and every gradient
        return lambda: model(images), {"parameters": list(model.parameters())}

    return make


def model_case(label, name, batch, size, tags, **options):
    def inputs(dtype, device):
        model = timm.create_model(name, pretrained=False, drop_path_rate=0.0, **options).eval()
        images = torch.randn(batch, 3, size, size)
        return {"images": images.to(device, dtype), "model": model.to(device, dtype)}

    return Case(
        shape=label,
        inputs=inputs,
        effvit=path(patched=True),
        peers={"eager": path(), "sdpa": path(fused=True)},
        reference=path(),
        compiled=None,
        tags=tags,
    )


def cases():
    yield model_case("Swin-T 224 batch 8", "swin_tiny_patch4_window7_224", 8, 224, ("default",))
    yield model_case("DeiT-S 224 batch 8", "deit_small_patch16_224", 8, 224, ("default",))
    yield model_case("Swin-S 384 batch 2", "swin_small_patch4_window7_224", 2, 384, ("extended",), img_size=384)
    tiny = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
    yield model_case("smoke 32 batch 1", "swin_tiny_patch4_window7_224", 1, 32, ("smoke",), **tiny)


if __name__ == "__main__":
    raise SystemExit(main("swin", cases(), kernel_op="window_attention"))
