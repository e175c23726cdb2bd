"""newton_pinv's samples, bad inputs and error magnitudes."""

import torch

from effvit.reference.newton_pinv import newton_pinv as reference
from effvit.reference.rbf_gram import rbf_gram
from effvit.testing._samples import IS_FLOAT, IS_TENSOR, changed, every_other, to
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "newton_pinv"
TENSORS = OPS[NAME].names
BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names
STEPS = 20  # the schema's default

# ---- samples -------------------------------------------------------------------------------------------------------


def _tokens(B, H, m, D, generator):
    return torch.randn(B, m, H, D, generator=generator, dtype=torch.float64) * D**-0.25


def gram(B, H, m, generator, *, D=64, spread=1.0):
    """What SOFT inverts: the Gaussian Gram matrix of m tokens. The closer they are, the nearer to singular."""
    x = _tokens(B, H, m, D, generator) * spread
    return rbf_gram(x, x)


def _dominant(B, H, m, generator):
    """A dominant diagonal, not symmetric: the iteration converges, and transposes matter."""
    reach = 4 * (1 + m**0.5 / 3)
    off = torch.rand(B, H, m, m, generator=generator, dtype=torch.float64)
    return off + reach * torch.eye(m, dtype=torch.float64)


def _duplicates(B, H, m, generator):
    """Every token twice: singular but for the ridge."""
    x = _tokens(B, H, m, 16, generator)
    x[:, m // 2 : m // 2 * 2] = x[:, : m // 2]
    return rbf_gram(x, x)


def _ones(B, H, m, generator):
    """All tokens equal: rank one."""
    return torch.ones(B, H, m, m, dtype=torch.float64)


def _diagonal(B, H, m, generator):
    """Eigenvalues from 1 to 1e-3: the small ones do not get through in 20 steps."""
    return torch.diag_embed(torch.logspace(0, -3, m, dtype=torch.float64).expand(B, H, m))


def _different_scales(B, H, m, generator):
    """Matrices of very different size: each has its own alpha."""
    factor = torch.logspace(0, 4, B * H, dtype=torch.float64).reshape(B, H, 1, 1)
    return gram(B, H, m, generator) * factor


def _sample(name, B, H, m, make_a, *, tags="", layout=None, dtypes=FLOAT_DTYPES, options=None, **kwargs):
    def make(dtype, device, generator):
        a = make_a(B, H, m, generator, **(options or {})).to(device, dtype)
        return ((a if layout is None else layout(a)),), dict(kwargs)

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _heads_last(a):
    """[B, m, H, m] in memory."""
    return a.transpose(1, 2).contiguous().transpose(1, 2)


def _misaligned(a):
    wide = a.new_zeros(*a.shape[:-1], a.shape[-1] + 3)
    return wide[..., 1 : 1 + a.shape[-1]].copy_(a)


def _expanded(a):
    return a[:, :1].expand_as(a)


def _cut_out(a):
    """The leading block of a larger matrix."""
    big = a.new_ones(*a.shape[:2], a.shape[2] + 5, a.shape[3] + 2)
    return big[..., : a.shape[2], : a.shape[3]].copy_(a)


CLOSE = {"spread": 0.35}  # row sums of about 20 of 49: all 20 steps count

# fmt: off
SAMPLES = [
    # SOFT: 49 bottleneck tokens at every stage of 224 x 224, 144 at 384 x 384; 1, 2, 5 and 8 heads.
    _sample("soft_stage1", 2, 1, 49, gram, tags="vit"),
    _sample("soft_stage2", 2, 2, 49, gram, tags="vit", options=CLOSE),
    _sample("soft_stage3", 1, 5, 49, gram, tags="vit", options={"spread": 0.6}),
    _sample("soft_stage4", 2, 8, 49, gram, tags="vit", options=CLOSE),
    _sample("soft_384", 1, 2, 144, gram, tags="vit", options=CLOSE),
    _sample("soft_d32", 1, 2, 49, gram, tags="vit", options={"D": 32, "spread": 0.5}),
    _sample("dominant_49", 2, 3, 49, _dominant, tags="framework"),
    # Small: the emulator and the interpreter run them too.
    _sample("small", 2, 3, 5, _dominant, tags="small framework"),
    _sample("small_one_matrix", 1, 1, 4, _dominant, tags="small framework", iterations=9, ridge=0.5, step=1.5),
    _sample("small_strided", 2, 2, 6, _dominant, tags="small strided", layout=_heads_last),
    _sample("small_gram_17", 1, 2, 17, gram, tags="small", options=CLOSE),
    _sample("small_gram_33", 1, 1, 33, gram, tags="small", layout=_cut_out),
    _sample("small_gram_49", 1, 1, 49, gram, tags="small", options=CLOSE),
    _sample("small_dominant_65", 1, 1, 65, _dominant, tags="small", iterations=6),
    # Tiny: gradcheck of the definition.
    _sample("tiny", 1, 2, 3, _dominant, tags="tiny small"),
    _sample("tiny_1x1", 2, 1, 1, _dominant, tags="tiny small"),
    # Nasty.
    _sample("m1", 3, 2, 1, gram, tags="nasty"),
    _sample("m2", 3, 2, 2, gram, tags="nasty", options=CLOSE),
    _sample("m7", 2, 2, 7, gram, tags="nasty", options=CLOSE),
    _sample("m31", 1, 2, 31, _dominant, tags="nasty"),
    _sample("m64", 1, 2, 64, gram, tags="nasty"),
    _sample("m97", 1, 1, 97, _dominant, tags="nasty"),
    _sample("m99", 1, 2, 99, gram, tags="nasty", options=CLOSE),
    _sample("m128", 1, 1, 128, gram, tags="nasty", options=CLOSE),
    _sample("m255", 1, 1, 255, gram, tags="nasty"),
    _sample("m256", 1, 2, 256, _dominant, tags="nasty"),
    _sample("close_tokens", 1, 2, 49, gram, tags="nasty", options={"spread": 0.15}),
    _sample("very_close_tokens", 1, 2, 49, gram, tags="nasty", options={"spread": 0.02}),
    _sample("duplicates", 1, 2, 48, _duplicates, tags="nasty"),
    _sample("ones", 1, 2, 30, _ones, tags="nasty"),
    _sample("small_eigenvalues", 1, 1, 40, _diagonal, tags="nasty", ridge=0.0),
    _sample("different_scales", 2, 3, 49, _different_scales, tags="nasty"),
    _sample("no_ridge", 1, 2, 49, gram, tags="nasty", ridge=0.0),
    _sample("large_ridge", 1, 2, 49, gram, tags="nasty", ridge=0.5, options=CLOSE),
    _sample("no_step", 1, 2, 20, gram, tags="nasty", iterations=0),
    _sample("one_step", 1, 2, 20, _dominant, tags="nasty", iterations=1),
    _sample("five_steps", 1, 2, 49, gram, tags="nasty", iterations=5, options=CLOSE),
    _sample("small_first_step", 1, 2, 49, gram, tags="nasty", step=1e-3),
    _sample("forty_steps", 1, 2, 49, gram, tags="nasty", iterations=40, options=CLOSE),
    # Strides.
    _sample("heads_last", 2, 3, 49, _dominant, tags="strided", layout=_heads_last),
    _sample("misaligned", 2, 2, 21, _dominant, tags="strided", layout=_misaligned),
    _sample("expanded_heads", 2, 3, 20, _dominant, tags="strided", layout=_expanded),
    _sample("cut_out", 2, 2, 30, _dominant, tags="strided", layout=_cut_out),
    # Empty.
    _sample("empty_batch", 0, 2, 5, _dominant, tags="empty"),
    _sample("empty_heads", 2, 0, 5, _dominant, tags="empty"),
    # More matrices than a CUDA grid's y dimension.
    _sample("huge_batch", 70001, 1, 2, _dominant, tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes and layouts, small; `choose` is a random.Random."""
    m = choose.choice((1, 2, 5, 16, 17, 33, 49, 65))
    layout = choose.choice((None, _heads_last, _misaligned))
    return _sample(name, choose.randint(1, 3), choose.randint(1, 3), m, _dominant, layout=layout)


# ---- error magnitudes ---------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the last step's terms, 2|V| + |V||P||V|, in float64.

    The steps before are of the same size, and where the iteration converges their errors vanish quadratically. All
    are float32 in every kernel, so they enter by eps(float32); the result is rounded once.
    """
    (a,) = args
    steps = kwargs.get("iterations", STEPS)
    p = (a + kwargs.get("ridge", 0.01) * torch.eye(a.shape[-1], dtype=a.dtype)).abs()
    out = reference(*args, **kwargs).abs()
    v = reference(*args, **{**kwargs, "iterations": max(steps - 1, 0)}).abs()
    terms = 2 * v + (v @ p @ v if steps else 0)
    out = out + torch.finfo(torch.float32).eps / eps * terms
    if output_grads is None:
        return {"out": out}, {}
    return {"out": out}, {"a": out.mT @ output_grads[0].abs() @ out.mT}


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def memory_calls(dtype):
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        ("512x49x49", (gram(64, 8, 49, generator).to(dtype),), {}),
        ("32x256x256", (gram(16, 2, 256, generator).to(dtype),), {"iterations": 3}),
    ]


def good_call():
    """A call that works; every bad input is this one with something changed."""
    return {"a": _dominant(2, 2, 6, torch.Generator("cpu").manual_seed(0)).float()}


def _bad(name, error, match, *, schema_match=None, torch_ops=True, **changes):
    """changes: argument -> new value, or a function of the old one."""

    def make():
        return split_call(changed(good_call(), changes), TENSORS)

    return BadInput(name, make, error, match, schema_match, torch_ops)


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        call = {n: torch.zeros(2, 2, 6, 6) for n in BACKWARD_TENSORS}
        return split_call(changed(call, changes), BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op="newton_pinv_backward")


_MATRICES = r"must be \[B, H, m, m\] with m between 1 and 256, got "

# fmt: off
BAD_INPUTS = [
    # a
    _bad("a_rank_3", ValueError, rf"a {_MATRICES}\[2, 6, 6\]", a=lambda t: t[0]),
    _bad("a_rank_2", ValueError, rf"a {_MATRICES}\[6, 6\]", a=lambda t: t[0, 0]),
    _bad("a_rank_5", ValueError, rf"a {_MATRICES}\[1, 2, 2, 6, 6\]", a=lambda t: t[None]),
    _bad("a_scalar", ValueError, rf"a {_MATRICES}\[\]", a=lambda t: t.sum()),
    _bad("a_wide", ValueError, rf"a {_MATRICES}\[2, 2, 5, 6\]", a=lambda t: t[:, :, :5]),
    _bad("a_tall", ValueError, rf"a {_MATRICES}\[2, 2, 6, 5\]", a=lambda t: t[..., :5].contiguous()),
    _bad("a_m_0", ValueError, rf"a {_MATRICES}\[2, 2, 0, 0\]", a=lambda t: t[:, :, :0, :0]),
    _bad("a_m_257", ValueError, rf"a {_MATRICES}\[1, 1, 257, 257\]", a=lambda t: torch.eye(257)[None, None]),
    _bad("a_none", TypeError, f"a {IS_TENSOR}NoneType", schema_match=r"a must be .*got \[0\]", a=None),
    _bad("a_list", TypeError, f"a {IS_TENSOR}list", schema_match="argument 'a'", a=lambda t: t.tolist()),
    _bad("a_numpy", TypeError, f"a {IS_TENSOR}ndarray", schema_match="argument 'a'", a=lambda t: t.numpy()),
    _bad("a_string", TypeError, f"a {IS_TENSOR}str", schema_match="argument 'a'", a="a"),
    _bad("a_float64", TypeError, f"a {IS_FLOAT}.*(float64|Double)", a=to(torch.float64)),
    _bad("a_int32", TypeError, f"a {IS_FLOAT}.*(int32|Int)", a=to(torch.int32)),
    _bad("a_int8", TypeError, f"a {IS_FLOAT}.*(int8|Char)", a=to(torch.int8)),
    _bad("a_bool", TypeError, f"a {IS_FLOAT}.*(bool|Bool)", a=to(torch.bool)),
    _bad("a_complex64", TypeError, f"a {IS_FLOAT}.*(complex64|ComplexFloat)", a=to(torch.complex64)),
    _bad("a_float8", TypeError, f"a {IS_FLOAT}.*(float8|Float8)", a=to(torch.float8_e4m3fn)),
    _bad("a_sparse", TypeError, r"a must be (a )?dense.*got .*[sS]parse", a=lambda t: t.to_sparse()),
    _bad("a_last_stride_2", ValueError, "a must .*last stride.*1.*got", a=every_other),
    _bad("a_transposed", ValueError, "a must .*last stride.*1.*got", a=lambda t: t.mT),
    # iterations
    _bad("iterations_negative", ValueError, "iterations must be between 0 and 1000, got -1", iterations=-1),
    _bad("iterations_1001", ValueError, "iterations must be between 0 and 1000, got 1001", iterations=1001),
    _bad("iterations_beyond_int32", ValueError, "iterations must be between 0 and 1000, got", iterations=1 << 33),
    _bad("iterations_float", TypeError, r"iterations must be an int, got 20\.0", schema_match="argument 'iterations'",
         iterations=20.0),
    _bad("iterations_none", TypeError, "iterations must be an int, got None", schema_match="argument 'iterations'",
         iterations=None),
    _bad("iterations_string", TypeError, "iterations must be an int, got '20'", schema_match="argument 'iterations'",
         iterations="20"),
    _bad("iterations_bool", TypeError, "iterations must be an int, got True", torch_ops=False, iterations=True),
    # ridge
    _bad("ridge_negative", ValueError, r"ridge must be at least 0, got -0\.01", ridge=-0.01),
    _bad("ridge_nan", ValueError, "ridge must be finite, got nan", ridge=float("nan")),
    _bad("ridge_inf", ValueError, "ridge must be finite, got inf", ridge=float("inf")),
    _bad("ridge_none", TypeError, "ridge must be a real number, got NoneType", schema_match="argument 'ridge'",
         ridge=None),
    _bad("ridge_bool", TypeError, "ridge must be a real number, got bool", torch_ops=False, ridge=False),
    # step
    _bad("step_zero", ValueError, "step must be positive, got 0", step=0.0),
    _bad("step_negative", ValueError, r"step must be positive, got -1\.8", step=-1.8),
    _bad("step_nan", ValueError, "step must be finite, got nan", step=float("nan")),
    _bad("step_huge", ValueError, r"step must be finite in float32, got 1e\+39", step=1e39),
    _bad("step_tiny", ValueError, r"step must be positive, got 1e-60", step=1e-60),
    _bad("step_inf", ValueError, "step must be finite, got -inf", step=float("-inf")),
    _bad("step_list", TypeError, "step must be a real number, got list", schema_match="argument 'step'", step=[1.8]),
    # the backward op
    _bad_backward("backward_out_rank", ValueError, rf"out {_MATRICES}\[2, 6, 6\]", out=lambda t: t[0]),
    _bad_backward("backward_out_wide", ValueError, rf"out {_MATRICES}\[2, 2, 5, 6\]", out=lambda t: t[:, :, :5]),
    _bad_backward("backward_out_m_257", ValueError, rf"out {_MATRICES}\[1, 1, 257, 257\]",
                  out=lambda t: torch.eye(257)[None, None]),
    _bad_backward("backward_out_float64", TypeError, f"out {IS_FLOAT}.*(float64|Double)",
                  **dict.fromkeys(BACKWARD_TENSORS, to(torch.float64))),
    _bad_backward("backward_out_strided", ValueError, "out must be contiguous as the forward returned it",
                  out=lambda t: t.mT),
    _bad_backward("backward_grad_shape", ValueError, r"grad_out must be \[B, H, m, m\] = \[2, 2, 6, 6\], got "
                  r"\[2, 2, 6, 5\]", grad_out=lambda t: t[..., :5].contiguous()),
    _bad_backward("backward_grad_rank", ValueError, r"grad_out must be \[B, H, m, m\] = \[2, 2, 6, 6\], got "
                  r"\[2, 6, 6\]", grad_out=lambda t: t[0]),
    _bad_backward("backward_grad_dtype", TypeError, r"grad_out must be .*like out.*got .*(bfloat16|BFloat16)",
                  grad_out=to(torch.bfloat16)),
    _bad_backward("backward_grad_meta", ValueError, "grad_out must be .*on cpu.*got .*meta", grad_out=to("meta")),
    _bad_backward("backward_grad_last_stride", ValueError, "grad_out must .*last stride.*1.*got",
                  grad_out=lambda t: t.mT),
    _bad_backward("backward_grad_none", TypeError, f"grad_out {IS_TENSOR}NoneType",
                  schema_match=r"grad_out must be .*got \[0\]", grad_out=None),
]
# fmt: on

SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B H",
    resize=lambda args, kwargs: (
        (torch.cat((args[0], args[0].flip(0))).repeat(1, 2, 1, 1)[:, 1:].contiguous(),),
        kwargs,
    ),
    memory_calls=memory_calls,
)
