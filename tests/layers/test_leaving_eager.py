"""Every layer under torch.func, forward mode, torch.jit.trace and torch.fx; patched models in ONNX and core ATen."""

import copy
import functools
import io

import pytest
import timm
import torch
from layer_suite import absolute_terms, randomise, tokens
from timm.models import create_feature_extractor, get_graph_node_names
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import effvit
from effvit import layers
from effvit._accuracy import assert_close_to_truth
from effvit.testing._spec import as_tuple

H, W, C = 4, 6, 8
ROTATIONS = torch.polar(torch.ones(H * W, 2), tokens(H * W, 2, seed=9))[None, None]
TOKENS, MAP = (2, H * W, C), (2, H, W, C)


def quantised(layer, **options):
    return layer.from_linear(randomise(torch.nn.Linear(C, 12)), **options)


def blocks(layer, **options):
    return layer.from_linear(randomise(torch.nn.Linear(32, 48)), density=0.5, **options)


def fitted(layer):
    """EcoFormer's, which fits its hash functions in its first call."""
    randomise(layer)(tokens(2, H * W, C, seed=3))
    return layer


BLOCKS = (2, 5, 32)
SHORT = (2, 9, C)  # recurrences, token after token
# name: (module, shape of its input, call). Every exported module but those of integers is here: see
# test_every_layer_is_here.
POSITIONS = layers.get_relative_position_cpb((H, W), (H // 2, W // 2))
SHORT = (2, 9, C)  # recurrences, token after token
# name: (module, shape of its input, call). Every exported module is here but those of integers and those that another
# is made of when it is calibrated or deployed: see test_every_layer_is_here.
LAYERS = {
    "AggregatedAttention": (
        lambda: layers.AggregatedAttention(C, (H, W), 2, sr_ratio=2), TOKENS, lambda m, x: m(x, H, W, *POSITIONS)
    ),
    "ActivatorBlock": (lambda: layers.ActivatorBlock(C, 12), TOKENS, None),
    "ActivatorGatingUnit": (lambda: layers.ActivatorGatingUnit(C, 12, norm=False), TOKENS, None),
    "AdditiveBlock": (lambda: layers.AdditiveBlock(C, 2.0), (2, C, H, W), None),
    "AdditiveTokenMixer": (lambda: layers.AdditiveTokenMixer(C), (2, C, H, W), None),
    "AFTConv": (lambda: layers.AFTConv(C, 2, kernel_size=3), TOKENS, lambda m, x: m(x, (H, W))),
    "AFTFull": (lambda: layers.AFTFull(C, H * W, factor_dim=3), TOKENS, None),
    "AFTLocal": (lambda: layers.AFTLocal(C, 40, 4, factor_dim=None), TOKENS, None),
    "AFTSimple": (lambda: layers.AFTSimple(C, 12), TOKENS, None),
    "BinaryAttention": (lambda: layers.BinaryAttention(C, 2, binary_projections=False), TOKENS, None),
    "BinaryLinear": (lambda: layers.BinaryLinear(C, 12, activation="gelu"), TOKENS, None),
    "BlockSparseInt8Linear": (lambda: blocks(layers.BlockSparseInt8Linear, activation="silu"), BLOCKS, None),
    "BlockSparseLinear": (lambda: layers.BlockSparseLinear(32, 48, blocks=4, activation="gelu"), BLOCKS, None),
    "ConvFFN": (lambda: layers.ConvFFN(C, 2 * C), TOKENS, lambda m, x: m(x, (H, W))),
    "ConvGLU": (lambda: layers.ConvGLU(C, 12), TOKENS, lambda m, x: m(x, H, W)),
    "ConvHierarchicalTransformerBlock": (
        lambda: layers.ConvHierarchicalTransformerBlock(C, (H, W), 2, (2, 2), (2, 2)), TOKENS, lambda m, x: m(x, (H, W))
    ),
    "ConvPosEnc": (lambda: layers.ConvPosEnc(C, 5), (2, C, H, W), None),
    "DCTAttention": (lambda: layers.DCTAttention(C, 2, 7), TOKENS, None),
    "DeformConvSquareDepthWise": (
        lambda: layers.DeformConvSquareDepthWise(C, 6, offset_bound=2), (2, C, H, W), None
    ),
    "DilatedReparamBlock": (lambda: layers.DilatedReparamBlock(C, 5), (2, C, H, W), None),
    "DualTokenAttention": (
        lambda: layers.DualTokenAttention(C, 2, token_size=(2, 3), num_downsamples=1, feature_map="relu"),
        MAP, lambda m, x: m(x, x[:, :2, :3].flatten(1, 2)),
    ),
    "EcoFormerAttention": (
        lambda: fitted(layers.EcoFormerAttention(C, 2, bits=4, anchors=5, top=3, steps=5)), TOKENS, None
    ),
    "FlashButterfly": (
        lambda: layers.FlashButterfly(C, 12, transposed=False, lam=0.01, block_fft_conv_args={"max_m": 4}), SHORT, None
    ),
    "FlashGRU": (lambda: layers.FlashGRU(C, 12, 2), (2, 5, C), lambda m, x: m(x)[0]),
    "FlashLSTM": (lambda: layers.FlashLSTM(C, 12, 2), (2, 5, C), lambda m, x: m(x)[0]),
    "FlashSLSTM": (lambda: layers.FlashSLSTM(C, 12, 2), (2, 5, C), lambda m, x: m(x)[0]),
    "FocusedLinearAttention": (lambda: layers.FocusedLinearAttention(C, (H, W), 2, kernel_size=3), TOKENS, None),
    "FocusedLinearAttentionCSWin": (
        lambda: layers.FocusedLinearAttentionCSWin(C, 4, -1, num_heads=2, kernel_size=3), (2, 16, C),
        lambda m, x: m((x, x * 0.5, x + 1)),
    ),
    "FocusedLinearAttentionPVT": (
        lambda: layers.FocusedLinearAttentionPVT(C, H * W, 2, sr_ratio=2, kernel_size=3), TOKENS,
        lambda m, x: m(x, H, W),
    ),
    "GlobalFilter": (lambda: layers.GlobalFilter(C, H, W // 2 + 1), TOKENS, lambda m, x: m(x, (H, W))),
    "GnConv": (lambda: layers.GnConv(C, order=3, s=0.5), (2, C, H, W), None),
    "GatedLinearAttention": (
        lambda: layers.GatedLinearAttention(hidden_size=C, num_heads=2, gate_low_rank_dim=3, use_short_conv=True),
        SHORT, None,
    ),
    "GatedJointAttention": (lambda: layers.GatedJointAttention(C, 7, 6, 2.0, kernel_size=3), TOKENS, None),
    "HierarchicalTransformerBlock": (
        lambda: layers.HierarchicalTransformerBlock(C, (H, W), 2, (2, 2), (2, 2)), TOKENS, lambda m, x: m(x, (H, W))
    ),
    "HyenaND": (lambda: layers.HyenaND(C, 6, order=3, filter_order=5, directional_mode="4dir"), MAP, None),
    "HyenaOperator": (lambda: layers.HyenaOperator(C, 8, order=3, filter_order=5, bidirectional=True), SHORT, None),
    "HyperZZWGlobal": (lambda: layers.HyperZZWGlobal(3, 5, 6, 2), (2, 3, 5, 5), None),
    "HyperZZWLocal": (lambda: layers.HyperZZWLocal(C, 3, 6, 2), (2, C, H, W), None),
    "Im2winConv2d": (lambda: layers.Im2winConv2d(C, 6, 3, stride=2, padding=1, groups=2), (2, C, H, W), None),
    "InceptionDWConv2d": (lambda: layers.InceptionDWConv2d(C, band_kernel_size=5), (2, C, H, W), None),
    "Int8Attention": (lambda: layers.Int8Attention(C, 2), TOKENS, None),
    "Int8Linear": (lambda: quantised(layers.Int8Linear, activation="gelu"), TOKENS, None),
    "LCM": (lambda: layers.LCM(C), TOKENS, lambda m, x: m(x, (H, W))),
    "LePEAttention": (
        lambda: layers.LePEAttention(C, 4, 0, 2, num_heads=2), (2, 16, C), lambda m, x: m((x, x * 0.5, x + 1))
    ),
    "LGABlock": (lambda: layers.LGABlock(C, 2, enhanced=True), TOKENS, lambda m, x: m(x, (H, W))[0]),
    "LinearGlobalAttention": (lambda: layers.LinearGlobalAttention(C, 2), TOKENS, None),
    "LinearNorm": (lambda: layers.LinearNorm(C, warm=0, step=10), TOKENS, None),
    "LiteLA": (lambda: layers.LiteLA(C, C, dim=4, qk_norm=True), TOKENS, None),
    "LiteLAReLURope": (
        lambda: layers.LiteLAReLURope(C, C, dim=4), TOKENS,
        lambda m, x: m(x, rotary_emb=ROTATIONS),
    ),
    "LiteMLA": (lambda: layers.LiteMLA(C, C, dim=4), (2, C, H, W), None),
    "LMU": (lambda: layers.LMU(C, 2, seq_len=8, theta=8), SHORT, lambda m, x: m(x.mT).mT),
    "LongConv": (lambda: layers.LongConv(C, 12, bidirectional=True, transposed=False, lam=0.01), SHORT, None),
    "Mamba2": (lambda: layers.Mamba2(C, d_state=4, headdim=8), SHORT, None),
    "MatAdd": (lambda: layers.MatAdd(), TOKENS, lambda m, x: m(x, x.transpose(-2, -1))),
    "MLLABlock": (lambda: layers.MLLABlock(C, (H, W), 2), TOKENS, None),
    "MLLAttention": (lambda: layers.MLLAttention(C, (H, W), 2), TOKENS, None),
    "MPCViTAttention": (lambda: layers.MPCViTAttention(C, 2), TOKENS, None),
    "MultiHeadEMA": (lambda: layers.MultiHeadEMA(C, 3, bidirectional=True), SHORT, None),
    "MultiScaleAttentionBlock": (
        lambda: layers.MultiScaleAttentionBlock(C, 2, 4, merge_ratio=2, local2global=2), (2, 4, 4, C),
        lambda m, x: torch.cat([t.reshape(x.shape[0], -1, C) for t in m(m.tokens(x))], dim=1),
    ),
    "MultiScaleRetention": (
        lambda: layers.MultiScaleRetention(hidden_size=C, num_heads=2), SHORT, None
    ),
    "NGramContext": (lambda: layers.NGramContext(C, (2, 2), 2, 2), MAP, None),
    "NGramHierarchicalTransformerBlock": (
        lambda: layers.NGramHierarchicalTransformerBlock(C, (H, W), 2, (2, 2), (2, 2)), TOKENS,
        lambda m, x: m(x, (H, W)),
    ),
    "NGramSCC": (lambda: layers.NGramSCC(C, (2, 2), (2, 2), 2), MAP, None),
    "NGramWindowPartition": (
        lambda: layers.NGramWindowPartition(C, 2, 2, 2), MAP, lambda m, x: m(x).unflatten(0, (x.shape[0], -1))
    ),
    "NonCausalSSD": (lambda: layers.NonCausalSSD(C, headdim=8, d_state=4), TOKENS, lambda m, x: m(x, H, W)),
    "OrchidOperator": (lambda: layers.OrchidOperator(C, 12, filter_order=5), SHORT, None),
    "OutlierLinear": (lambda: quantised(layers.OutlierLinear, threshold=1.5), TOKENS, None),
    "PAMLinear": (lambda: layers.PAMLinear(C, 12), TOKENS, None),
    "PositionAwareTokenModule": (
        lambda: layers.PositionAwareTokenModule(C, 2, token_size=(2, 3), num_downsamples=1),
        MAP, lambda m, x: m(x, x[:, :2, :3].flatten(1, 2))[0],
    ),
    "PosConv": (lambda: layers.PosConv(C, C), TOKENS, lambda m, x: m(x, (H, W))),
    "Pow2Linear": (lambda: layers.Pow2Linear(C, 12), TOKENS, None),
    "QATLinear": (lambda: layers.QATLinear(randomise(torch.nn.Linear(C, 12)), activation="gelu"), TOKENS, None),
    "ReparamLargeKernelConv": (lambda: layers.ReparamLargeKernelConv(C, C, 5, 1, C, 3), (2, C, H, W), None),
    "RepBN": (lambda: layers.RepBN(C), TOKENS, None),
    "RepLKBlock": (lambda: layers.RepLKBlock(C, 12, 5, 3), (2, C, H, W), None),
    "SanaLinearAttention": (lambda: layers.SanaLinearAttention(C, heads=2, dim_head=4), TOKENS, None),
    "ScaleAwareModulation": (lambda: layers.ScaleAwareModulation(C, 2), TOKENS, lambda m, x: m(x, H, W)),
    "ScatteringBlock": (
        lambda: layers.ScatteringBlock(C, mlp_ratio=1.5, size=(H, W), num_blocks=2), TOKENS, lambda m, x: m(x, H, W)
    ),
    "ScatteringChannelMixing": (
        lambda: layers.ScatteringChannelMixing(C, (H, W), num_blocks=2), TOKENS, lambda m, x: m(x, H, W)
    ),
    "SCC": (lambda: layers.SCC(C, (2, 2), (2, 2), 2), MAP, None),
    "SGConv": (lambda: layers.SGConv(C, l_max=16, kernel_dim=4, bidirectional=True, transposed=False), SHORT, None),
    "ShiftAddAttention": (lambda: layers.ShiftAddAttention(C, 2, res_kernel_size=3), TOKENS, None),
    "SimplifiedLinearAttention": (lambda: layers.SimplifiedLinearAttention(C, (H, W), 2, kernel_size=3), TOKENS, None),
    "SoftmaxFreeAttention": (lambda: layers.SoftmaxFreeAttention(C, 2, 2, 3), TOKENS, lambda m, x: m(x, H, W)),
    "SoftmaxFreeNormAttention": (lambda: layers.SoftmaxFreeNormAttention(C, 2, 2, 3), TOKENS, lambda m, x: m(x, H, W)),
    "Sparse24Int8Linear": (lambda: quantised(layers.Sparse24Int8Linear, activation="silu"), TOKENS, None),
    "Sparse24Linear": (lambda: layers.Sparse24Linear(C, 12), TOKENS, None),
    "SpectFormerBlock": (
        lambda: layers.SpectFormerBlock(C, 2.0, h=H, w=W // 2 + 1, init_values=0.5), TOKENS, lambda m, x: m(x, (H, W))
    ),
    "SS2D": (lambda: layers.SS2D(C, d_state=3), MAP, None),
    "SwinTransformerBlock": (lambda: layers.SwinTransformerBlock(C, (H, W), 2, window_size=4, shift_size=2), MAP, None),
    "TableFunction": (lambda: layers.TableFunction(torch.tanh, block=4), TOKENS, None),
    "TableGELU": (lambda: layers.TableGELU(block=8), TOKENS, None),
    "TableSoftmax": (lambda: layers.TableSoftmax(), TOKENS, None),
    "TCNCA": (lambda: layers.TCNCA(C, 4, 6, chunk_size=5, depth=2), TOKENS, None),
    "TokenToMapAttention": (
        lambda: layers.TokenToMapAttention(C, 2, feature_map="relu"), TOKENS, lambda m, x: m(x, x[:, :3])
    ),
    "TVConv": (lambda: layers.TVConv(C, TVConv_inter_chans=4, TVConv_Bias=True, h=H, w=W), (2, C, H, W), None),
    "UniRepLKNetBlock": (
        lambda: layers.UniRepLKNetBlock(C, 7, layer_scale_init_value=0.5, ffn_factor=1.5), (2, C, H, W), None
    ),
    "ViRRetention": (lambda: layers.ViRRetention(C, 2, class_token="first"), SHORT, None),
    "VMAMBA2Block": (lambda: layers.VMAMBA2Block(C, (H, W), 2, d_state=4), TOKENS, None),
    "VSSBlock": (lambda: layers.VSSBlock(C, ssm_d_state=1, forward_type="v05_noz", ssm_ratio=1.0), MAP, None),
    "WavSpA": (lambda: layers.WavSpA(C, 2, wavelet="db2", learned=True), SHORT, None),
    "WindowAttention": (lambda: layers.WindowAttention(C, 2, window_size=4), MAP, lambda m, x: m(x, shift=(2, 2))),
    "XNormAttention": (lambda: layers.XNormAttention(C, 2), TOKENS, None),
}  # fmt: skip


def in_double(m):
    return copy.deepcopy(m).double()


def test_every_layer_is_here():
    exported = {
        n for n in layers.__all__ if isinstance(x := getattr(layers, n), type) and issubclass(x, torch.nn.Module)
    }
    of_integers = {n for n in exported if getattr(layers, n).__module__.startswith("effvit.layers.integer")}
    assert {"QuantAct", "IntSoftmax", "IntegerSwin"} <= of_integers  # in models: tests/layers/test_integer_models.py
    made = {"DeployedPow2Linear", "FakeQuantizer", "PackedBinaryLinear", "PTQLinear"}  # in the tests of what makes them
    assert exported - of_integers - made == set(LAYERS)


class Called(torch.nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer = layer
        self.call = call or (lambda m, x: m(x))

    def forward(self, x):
        return self.call(self.layer, x)


@pytest.fixture(params=LAYERS)
def layer(request):
    """(module in eval mode, input)"""
    make, shape, call = LAYERS[request.param]
    return Called(randomise(make()), call).eval(), tokens(*shape)


def test_trace(layer):
    """A trace computes what the layer does, for another batch as well, and survives saving."""
    m, x = layer
    traced = torch.jit.trace(m, x, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for given in (x, tokens(5, *x.shape[1:], seed=4)):
        with torch.no_grad(), torch.jit.optimized_execution(False):
            result = as_tuple(loaded(given))
            for r, y, t in zip(result, as_tuple(m(given)), as_tuple(in_double(m)(given.double())), strict=True):
                assert_close_to_truth(r, t, y)


def test_func(layer, monkeypatch):
    """Per-sample gradients of every parameter by vmap(grad) are autograd's, and a jvp is the derivative."""
    m, x = layer
    if not list(m.parameters()):
        pytest.skip("no parameters")
    names, parameters = zip(*m.named_parameters(), strict=True)
    cotangent = tokens(*as_tuple(m(x))[0].shape[1:], seed=5)

    def loss(parameters, one):
        y = torch.func.functional_call(m, dict(zip(names, parameters, strict=True)), (one[None],))
        return (as_tuple(y)[0][0] * cotangent).sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    with monkeypatch.context() as patched:  # the definition of the operators in place of them: a yardstick
        patched.setattr(layers._ops, "_covered", lambda *_: False)
        plain = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[i]), parameters, materialize_grads=True)
        exact = in_double(m)
        with absolute_terms(exact, {}) as terms:
            y = as_tuple(exact(x[i : i + 1].double()))[0]
            truth = torch.autograd.grad(
                (y[0] * cotangent.double()).sum(), tuple(exact.parameters()), materialize_grads=True
            )  # fmt: skip
        largest = torch.stack([t.abs().max() for t in truth if t.numel()]).max()
        for name, f, p, e, t in zip(names, found, plain, expected, truth, strict=True):
            yardsticks = [e] if torch.equal(p, f) else [e, p[i]]
            magnitude = torch.maximum(largest, terms.get(f"gradient of {name}", largest)).expand_as(t)
            assert_close_to_truth(f[i], t, yardsticks, magnitude=magnitude, name=name)


def test_forward_mode(layer, monkeypatch):
    """The directional derivative of the output along input and parameters, by torch.func and by forward_ad."""
    m, x = layer
    names, parameters = zip(*m.named_parameters(), strict=True) if list(m.parameters()) else ((), ())
    primals = (*parameters, x)
    tangents = tuple(tokens(*p.shape, seed=7 + i) for i, p in enumerate(primals))

    def call(m, *primals):
        return as_tuple(torch.func.functional_call(m, dict(zip(names, primals[:-1], strict=True)), (primals[-1],)))[0]

    def derivative(m, dtype):
        cast = [tuple(t.detach().to(dtype) for t in ts) for ts in (primals, tangents)]
        return torch.func.jvp(functools.partial(call, m), *cast)

    _, found = derivative(m, torch.float32)
    _, truth = derivative(in_double(m), torch.float64)
    # Yardsticks: the same number by reverse mode, twice, the derivative of v -> vjp(v) . tangent; and, where that is
    # something else, in forward mode with the definition of the operators in place of them.
    leaves = [p.detach().requires_grad_() for p in primals]
    with sdpa_kernel(SDPBackend.MATH):
        y = call(m, *leaves)
        v = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, leaves, v, create_graph=True, materialize_grads=True)
        yardsticks = [torch.autograd.grad(sum((g * t).sum() for g, t in zip(pulled, tangents, strict=True)), v)[0]]
    with monkeypatch.context() as patched:
        patched.setattr(layers._ops, "_covered", lambda *_: False)
        _, plain = derivative(m, torch.float32)
        yardsticks += [] if torch.equal(plain, found) else [plain]
    magnitude = truth.abs().max().expand_as(truth)
    assert float(truth.abs().max()) > 0
    assert_close_to_truth(found, truth, yardsticks, magnitude=magnitude)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p.detach(), t) for p, t in zip(primals, tangents, strict=True)]
        assert_close_to_truth(
            forward_ad.unpack_dual(call(m, *duals)).tangent, truth, yardsticks, magnitude=magnitude
        )  # fmt: skip


def test_script_works_or_says_what_to_do(layer):
    m, x = layer
    if type(m.layer) is layers.RepBN:
        with torch.no_grad():
            assert_close_to_truth(torch.jit.script(m.layer)(x), in_double(m)(x.double()), m(x))
        return
    with pytest.raises(
        RuntimeError, match=rf"^effvit::{type(m.layer).__name__}: torch\.jit\.script cannot .* use torch"
    ):
        torch.jit.script(torch.nn.Sequential(m.layer))


# ---- patched models ------------------------------------------------------------------------------------------------


def swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, embed_dim=24, depths=(2, 2), num_heads=(3, 6), num_classes=10
    )


def efficientvit():
    return timm.create_model("efficientvit_b0", num_classes=10)


@pytest.fixture(params=[swin, efficientvit])
def patched(request):
    """(the model, the patched model), 64x64"""
    torch.manual_seed(0)
    model = request.param().eval()
    other = copy.deepcopy(model)
    effvit.patch(other, verbose=False)
    return model, other


IMAGES = tokens(2, 3, 64, 64)


def agrees(result, model, x):
    with torch.no_grad():
        assert_close_to_truth(torch.as_tensor(result), in_double(model)(x.double()), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(patched, dynamo, tmp_path):
    """Without unpatching, at any batch size."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, other = patched
    file = tmp_path / "model.onnx"
    kind = {"dynamic_shapes": {"x": {0: "batch"}}} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(other, (IMAGES,), str(file), dynamo=dynamo, input_names=["x"], **kind)
    session = onnxruntime.InferenceSession(str(file))
    for x in (IMAGES, tokens(3, 3, 64, 64, seed=2)):
        (result,) = session.run(None, {"x": x.numpy()})
        agrees(result, model, x)


def test_decompositions(patched):
    model, other = patched
    program = torch.export.export(other, (IMAGES,)).run_decompositions(effvit.decompositions())
    calls = {n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {c.namespace for c in calls} == {"aten"}
    with torch.no_grad():
        agrees(program.module()(IMAGES), model, IMAGES)


def test_feature_extractor(patched):
    """torch.fx through timm: the same nodes, and the same values at each."""
    model, other = patched
    nodes = get_graph_node_names(other)[1]
    assert nodes and not other.training
    common = [n for n in nodes if n in set(get_graph_node_names(model)[1]) and "attn" not in n]
    chosen = common[:: max(len(common) // 6, 1)]
    with torch.no_grad():
        features = create_feature_extractor(other, chosen)(IMAGES)
        expected = create_feature_extractor(model, chosen)(IMAGES)
        exact = create_feature_extractor(in_double(model), chosen)(IMAGES.double())
    for n in chosen:
        if isinstance(exact[n], torch.Tensor):
            magnitude = exact[n].abs().max().expand_as(exact[n])
            assert_close_to_truth(features[n], exact[n], expected[n], magnitude=magnitude, name=n)


def test_trace_of_a_patched_model(patched):
    model, other = patched
    traced = torch.jit.trace(other, IMAGES, check_trace=False)
    with torch.no_grad():
        for x in (IMAGES, tokens(3, 3, 64, 64, seed=2)):
            agrees(traced(x), model, x)


def test_script_of_a_patched_model(patched):
    _, other = patched
    with pytest.raises(RuntimeError, match=r"patched model, call effvit\.unpatch\(model\) first"):
        torch.jit.script(other)
    agrees(other(IMAGES).detach(), unpatched(other), IMAGES)


def unpatched(model):
    model = copy.deepcopy(model)
    assert effvit.unpatch(model, verbose=False)
    return model


def test_flops_of_a_patched_model(patched):
    """All that the model computes is counted: what is around the operators, and their own."""
    from torch.utils.flop_counter import FlopCounterMode

    _, other = patched
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        other(IMAGES)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    ours = {op: n for op, n in counts.items() if op.startswith("effvit.")}
    assert len(ours) == 1 and all(n > 0 for n in ours.values())


def test_forward_mode_of_a_patched_model(patched):
    """The directional derivative along the image and every parameter is the unpatched model's."""
    model, other = patched
    names, parameters = zip(*model.named_parameters(), strict=True)
    tangents = tuple(tokens(*p.shape, seed=i) * p.detach().abs().mean() for i, p in enumerate(parameters))

    def derivative(m, dtype):
        def call(parameters, x):
            return torch.func.functional_call(m, dict(zip(names, parameters, strict=True)), (x,))

        cast = [tuple(t.detach().to(dtype) for t in ts) for ts in (parameters, tangents)]
        x = IMAGES.to(dtype)
        return torch.func.jvp(call, (cast[0], x), (cast[1], torch.ones_like(x)))[1]

    truth = derivative(in_double(model), torch.float64)
    assert float(truth.abs().max()) > 0
    magnitude = truth.abs().max().expand_as(truth)
    assert_close_to_truth(
        derivative(other, torch.float32), truth, derivative(model, torch.float32), magnitude=magnitude
    )  # fmt: skip
