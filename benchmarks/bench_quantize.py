"""ViT and Swin models end to end, quantised by effvit.quantize_, against the float32 model, PyTorch's own dynamic int8
and OpenVINO in float32 and in int8 (nncf's post-training quantisation), where these are installed.

The weights are random and 2:4 sparse from the start, as a sparse model's are after fine-tuning: what 2:4 int8 layers
drop is zero already, so every contender computes the same model. Errors are against the float64 model.
"""

import copy
import functools
import warnings

from harness import THREADS, Case, main  # first: it pins the threads before torch starts any

# isort: split
import timm
import torch
from torch import nn

import effvit

# Relative errors of the logits up to which a model in int8 counts as the same: effvit's; that of peers, to be seen.
INT8, PEERS = 0.05, 0.5


def prune_(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = effvit.ops.sparse24_prune(module.weight.detach())


def quantised(kind):
    def make(images, model):
        model = copy.deepcopy(model)
        effvit.patch(model, verify=False, verbose=False)
        effvit.quantize_(model, verbose=False, kind=kind)
        return lambda: model(images)

    return make


def eager(images, model):
    return lambda: model(images)


def torch_dynamic(images, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end
        model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    return lambda: model(images)


@functools.lru_cache(1)  # conversion takes longer than the measurement
def converted(model, shape):
    import openvino

    return openvino.convert_model(model, example_input=torch.zeros(shape), input=[tuple(shape)])


def openvino_model(int8):
    def make(images, model):
        import openvino

        network = converted(model, images.shape)
        if int8:
            import nncf

            nncf.set_log_level("ERROR")
            data = [images, torch.randn(images.shape, generator=torch.Generator().manual_seed(1))]
            network = nncf.quantize(
                network.clone(), nncf.Dataset(data, lambda t: t.numpy()), model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
            )  # fmt: skip
        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(network, "CPU", options).create_infer_request()
        return lambda: torch.from_numpy(request.infer([images.numpy()], share_inputs=True)[0])

    return make


def model_cases(label, name, batch, size, tags, **options):
    def inputs(dtype, device):
        model = timm.create_model(name, pretrained=False, **options).eval().requires_grad_(False)
        prune_(model)
        images = torch.randn(batch, 3, size, size)
        return {"images": images.to(device, dtype), "model": model.to(device, dtype)}

    def wide(images, model):
        model = copy.deepcopy(model).double()
        return lambda: model(images)

    for kind in ("int8", "sparse24_int8"):
        yield Case(
            shape=f"{label}, {'int8' if kind == 'int8' else '2:4 int8'}",
            inputs=inputs,
            effvit=quantised(kind),
            peers={
                "eager": eager,
                "torch int8": torch_dynamic,
                "OpenVINO": openvino_model(False),
                "OpenVINO int8": openvino_model(True),
            },
            reference=wide,
            approximate={"effvit": INT8, "torch int8": PEERS, "OpenVINO int8": PEERS},
            directions=("forward",),
            dtypes=("float32",),
            tags=tags,
        )


def cases():
    yield from model_cases("DeiT-S 224 batch 1", "deit_small_patch16_224", 1, 224, ("default",))
    yield from model_cases("DeiT-S 224 batch 8", "deit_small_patch16_224", 8, 224, ("default",))
    yield from model_cases("Swin-T 224 batch 8", "swin_tiny_patch4_window7_224", 8, 224, ("default",))
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    yield from model_cases("smoke 32 batch 1", "deit_small_patch16_224", 1, 32, ("smoke",), **tiny)


if __name__ == "__main__":
    raise SystemExit(main("quantize", cases(), kernel_op="int8_linear"))
