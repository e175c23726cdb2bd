"""What timm asks of every model of its own, asked of patched ones; the answers are those of the unpatched model."""

import copy

import pytest
import timm
import torch
from timm.models import create_feature_extractor, get_graph_node_names

import effvit
from effvit._accuracy import assert_close_to_truth

SIZE = 64
SMALL = {"img_size": SIZE, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "drop_path_rate": 0.0}
MODELS = {
    "swin_tiny_patch4_window7_224": SMALL,
    "swin_s3_tiny_224": {**SMALL, "window_size": 7},
    "deit_tiny_patch16_224": {"img_size": SIZE, "depth": 3},
    "vit_base_patch16_gap_224": {"img_size": SIZE, "embed_dim": 48, "num_heads": 3, "depth": 3, "qk_norm": True},
    "efficientvit_b0": {},
    "efficientvit_b1": {},
}


@pytest.fixture(params=MODELS, scope="module")
def name(request):
    return request.param


def pair(name, **kwargs):
    """(timm's model, the same model patched), in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**MODELS[name], "num_classes": 10, **kwargs}).eval()
    patched = copy.deepcopy(model)
    assert effvit.patch(patched, verify=False, verbose=False).replaced
    return model, patched


def image(n=2):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def same(model, patched, call):
    """call(model, image) of both: a tensor or a nest of them, by the project's rule."""
    with torch.no_grad():
        leaves = [
            [t for t in torch.utils._pytree.tree_leaves(call(m, x)) if isinstance(t, torch.Tensor)]
            for m, x in ((patched, image()), (model, image()), (copy.deepcopy(model).double(), image().double()))
        ]
    assert len(leaves[0]) == len(leaves[1]) > 0
    for found, plain, exact in zip(*leaves, strict=True):
        assert found.dtype == plain.dtype
        magnitude = exact.abs().max().expand_as(exact)
        assert_close_to_truth(found, exact, plain, magnitude=magnitude)
    return leaves[0]


def test_forward(name):
    (y,) = same(*pair(name), lambda m, x: m(x))
    assert y.shape == (2, 10)


def test_backward(name):
    """Every parameter gets a gradient, in training mode, with the batch's own statistics."""
    gradients = []
    for m in (*pair(name), pair(name)[0].double()):
        m.train()
        x = image().to(next(m.parameters()).dtype)
        m(x).square().mean().backward()
        missing = [n for n, p in m.named_parameters() if p.grad is None]
        assert not missing, missing
        gradients.append(dict(m.named_parameters()))
    plain, found, exact = gradients
    for n, p in exact.items():
        largest = max(float(q.grad.abs().max()) for q in exact.values())
        magnitude = torch.full_like(p.grad, largest)
        assert_close_to_truth(found[n].grad, p.grad, plain[n].grad, magnitude=magnitude, name=n)


def test_classifier_can_be_replaced_and_removed(name):
    model, patched = pair(name)
    for arguments in ((7,), (0,), (0, "") if "swin" in name else (5,)):  # "": without pooling, not in EfficientViT
        torch.manual_seed(3)
        model.reset_classifier(*arguments)
        torch.manual_seed(3)
        patched.reset_classifier(*arguments)
        with torch.no_grad():
            for a, b in zip(model.get_classifier().parameters(), patched.get_classifier().parameters(), strict=True):
                b.copy_(a)
        same(model, patched, lambda m, x: m(x))
    same(*pair(name, num_classes=0), lambda m, x: m(x))


def test_features(name):
    """forward_features with forward_head, the pyramid of features_only, and intermediates with and without the rest."""
    model, patched = pair(name)
    same(model, patched, lambda m, x: m.forward_features(x))
    same(model, patched, lambda m, x: m.forward_head(m.forward_features(x)))
    same(model, patched, lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True))
    same(model, patched, lambda m, x: m.forward_intermediates(x))
    same(model, patched, lambda m, x: m.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW"))
    features = pair(name, features_only=True) if "swin" not in name else pair(name, features_only=True, num_classes=0)
    maps = same(*features, lambda m, x: m(x))
    assert len(maps) == len(features[0].feature_info.channels())


def test_fx(name):
    """The graph of features: values, and gradients of what is in it."""
    model, patched = pair(name)
    last = get_graph_node_names(patched)[1][-1]
    same(model, patched, lambda m, x: create_feature_extractor(m, [last])(x))
    extractor = create_feature_extractor(patched, [last])
    extractor.train()
    sum(t.square().mean() for t in extractor(image()).values()).backward()
    assert all(p.grad is not None for p in extractor.parameters())


def test_training_options(name):
    """Gradient checkpointing, group matchers and learning-rate groups know the patched model."""
    model, patched = pair(name)
    patched.set_grad_checkpointing(True)
    patched.train()
    patched(image()).sum().backward()
    assert all(p.grad is not None for p in patched.parameters())
    assert patched.no_weight_decay() == model.no_weight_decay() if hasattr(model, "no_weight_decay") else True
    assert patched.group_matcher() == model.group_matcher()
    assert patched.state_dict().keys() == model.state_dict().keys()
