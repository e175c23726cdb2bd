"""Drop-in modules built on effvit's operators: constructors and state_dict keys of timm or of the original code."""

from torch import nn

from .._when_imported import when_imported
from .activator import ActivatorBlock, ActivatorGatingUnit
from .aft import AFTConv, AFTFull, AFTLocal, AFTSimple
from .atlas import MultiScaleAttentionBlock
from .binary import BinaryAttention, BinaryLinear, PackedBinaryLinear
from .block_sparse import BlockSparseInt8Linear, BlockSparseLinear
from .casvit import AdditiveBlock, AdditiveTokenMixer
from .codenet import DeformConvSquareDepthWise
from .cpe import ConvPosEnc, LePEAttention, PosConv
from .dct import DCTAttention
from .dualtoken import DualTokenAttention, PositionAwareTokenModule, TokenToMapAttention
from .ecoformer import EcoFormerAttention
from .efficientvit import LiteMLA
from .flashrnn import FlashGRU, FlashLSTM, FlashSLSTM
from .flatten import FocusedLinearAttention, FocusedLinearAttentionCSWin, FocusedLinearAttentionPVT
from .gfnet import GlobalFilter, SpectFormerBlock
from .gla import GatedLinearAttention
from .hit_sr import (
    SCC,
    ConvFFN,
    ConvHierarchicalTransformerBlock,
    HierarchicalTransformerBlock,
    NGramContext,
    NGramHierarchicalTransformerBlock,
    NGramSCC,
    NGramWindowPartition,
)
from .hornet import GnConv
from .hyena import HyenaOperator
from .hyena_nd import HyenaND
from .hyperzzw import HyperZZWGlobal, HyperZZWLocal
from .im2win import Im2winConv2d, im2win
from .inception_next import InceptionDWConv2d
from .int8 import Int8Linear, OutlierLinear, QATLinear
from .int8_attention import Int8Attention, Int8KVCache
from .integer import IntGELU, IntLayerNorm, IntSoftmax, QuantAct, QuantConv2d, Quantised, QuantLinear, QuantMatMul
from .integer_inference import (
    IntegerAttention,
    IntegerBlock,
    IntegerLayerNorm,
    IntegerLinear,
    IntegerMLP,
    IntegerPatchMerging,
    IntegerRequantise,
    IntegerSwin,
    IntegerViT,
)
from .integer_training import (
    IntegerBits,
    QuantAttention,
    QuantBlock,
    QuantMLP,
    QuantPatchMerging,
    QuantStage,
    QuantSwin,
    QuantViT,
)
from .l2vit import LCM, LGABlock, LinearGlobalAttention
from .lmuformer import LMU
from .long_conv import FlashButterfly, LongConv
from .mamba2 import Mamba2
from .mega import MultiHeadEMA
from .mlla import MLLABlock, MLLAttention
from .mossformer import GatedJointAttention
from .mpcvit import MPCViTAttention, XNormAttention
from .orchid import OrchidOperator
from .pam import PAMLinear
from .ptq import FakeQuantizer, PTQLinear
from .replknet import ReparamLargeKernelConv, RepLKBlock
from .retention import MultiScaleRetention, ViRRetention
from .sana import (
    LiteLA,
    LiteLAReLURope,
    PAGCFGSanaLinearAttnProcessor,
    PAGIdentitySanaLinearAttnProcessor,
    SanaLinearAttention,
    SanaLinearAttnProcessor,
    sana_attn_processors,
)
from .sgconv import SGConv
from .shift_add import DeployedPow2Linear, MatAdd, Pow2Linear, ShiftAddAttention
from .slab import LinearNorm, RepBN, SimplifiedLinearAttention, fold_affine, fuse_prepbn
from .smt import ScaleAwareModulation
from .soft import SoftmaxFreeAttention, SoftmaxFreeNormAttention
from .sparse24 import Sparse24Int8Linear, Sparse24Linear
from .svt import ScatteringBlock, ScatteringChannelMixing
from .swin_block import SwinTransformerBlock
from .table import TableFunction, TableGELU, TableSoftmax
from .tcnca import TCNCA
from .transnext import AggregatedAttention, ConvGLU, get_relative_position_cpb
from .tvconv import TVConv
from .unireplknet import DilatedReparamBlock, UniRepLKNetBlock
from .vmamba import SS2D, VSSBlock
from .vssd import NonCausalSSD, VMAMBA2Block
from .wavspa import WavSpA
from .window_attention import WindowAttention

__all__ = [
    "ActivatorBlock",
    "ActivatorGatingUnit",
    "AdditiveBlock",
    "AdditiveTokenMixer",
    "AFTConv",
    "AFTFull",
    "AFTLocal",
    "AFTSimple",
    "AggregatedAttention",
    "BinaryAttention",
    "BinaryLinear",
    "BlockSparseInt8Linear",
    "BlockSparseLinear",
    "ConvFFN",
    "ConvGLU",
    "ConvHierarchicalTransformerBlock",
    "ConvPosEnc",
    "DCTAttention",
    "DeformConvSquareDepthWise",
    "DeployedPow2Linear",
    "DilatedReparamBlock",
    "DualTokenAttention",
    "EcoFormerAttention",
    "FakeQuantizer",
    "FlashButterfly",
    "FlashGRU",
    "FlashLSTM",
    "FlashSLSTM",
    "FocusedLinearAttention",
    "FocusedLinearAttentionCSWin",
    "FocusedLinearAttentionPVT",
    "fold_affine",
    "fuse_prepbn",
    "GatedJointAttention",
    "GatedLinearAttention",
    "get_relative_position_cpb",
    "GlobalFilter",
    "GnConv",
    "HierarchicalTransformerBlock",
    "HyenaND",
    "HyenaOperator",
    "HyperZZWGlobal",
    "HyperZZWLocal",
    "im2win",
    "Im2winConv2d",
    "InceptionDWConv2d",
    "Int8Attention",
    "Int8KVCache",
    "Int8Linear",
    "IntegerAttention",
    "IntegerBits",
    "IntegerBlock",
    "IntegerLayerNorm",
    "IntegerLinear",
    "IntegerMLP",
    "IntegerPatchMerging",
    "IntegerRequantise",
    "IntegerSwin",
    "IntegerViT",
    "IntGELU",
    "IntLayerNorm",
    "IntSoftmax",
    "LCM",
    "LePEAttention",
    "LGABlock",
    "LinearGlobalAttention",
    "LinearNorm",
    "LiteLA",
    "LiteLAReLURope",
    "LiteMLA",
    "LMU",
    "LongConv",
    "Mamba2",
    "MatAdd",
    "MLLABlock",
    "MLLAttention",
    "MPCViTAttention",
    "MultiHeadEMA",
    "MultiScaleAttentionBlock",
    "MultiScaleRetention",
    "NGramContext",
    "NGramHierarchicalTransformerBlock",
    "NGramSCC",
    "NGramWindowPartition",
    "NonCausalSSD",
    "OrchidOperator",
    "OutlierLinear",
    "PackedBinaryLinear",
    "PAGCFGSanaLinearAttnProcessor",
    "PAGIdentitySanaLinearAttnProcessor",
    "PAMLinear",
    "PosConv",
    "PositionAwareTokenModule",
    "Pow2Linear",
    "PTQLinear",
    "QATLinear",
    "QuantAct",
    "QuantAttention",
    "QuantBlock",
    "QuantConv2d",
    "Quantised",
    "QuantLinear",
    "QuantMatMul",
    "QuantMLP",
    "QuantPatchMerging",
    "QuantStage",
    "QuantSwin",
    "QuantViT",
    "ReparamLargeKernelConv",
    "RepBN",
    "RepLKBlock",
    "sana_attn_processors",
    "SanaLinearAttention",
    "SanaLinearAttnProcessor",
    "ScaleAwareModulation",
    "ScatteringBlock",
    "ScatteringChannelMixing",
    "SCC",
    "SGConv",
    "ShiftAddAttention",
    "SimplifiedLinearAttention",
    "SoftmaxFreeAttention",
    "SoftmaxFreeNormAttention",
    "Sparse24Int8Linear",
    "Sparse24Linear",
    "SpectFormerBlock",
    "SS2D",
    "SwinTransformerBlock",
    "TableFunction",
    "TableGELU",
    "TableSoftmax",
    "TCNCA",
    "TokenToMapAttention",
    "TVConv",
    "UniRepLKNetBlock",
    "ViRRetention",
    "VMAMBA2Block",
    "VSSBlock",
    "WavSpA",
    "WindowAttention",
    "XNormAttention",
]


def _refuse_script(self):
    raise RuntimeError(
        f"effvit::{type(self).__name__}: torch.jit.script cannot compile this layer, use torch.jit.trace, torch.export "
        "or torch.compile"
    )


def _register(timm_models):
    """torch.fx cannot trace through a layer: timm's feature extractors take it as a whole."""
    for layer in _LAYERS:
        timm_models.register_notrace_module(layer)


_LAYERS = [
    x for x in map(globals().get, __all__) if isinstance(x, type) and issubclass(x, nn.Module) and x is not RepBN
]
for _layer in _LAYERS:
    _layer.__prepare_scriptable__ = _refuse_script
when_imported("timm.models", _register)
