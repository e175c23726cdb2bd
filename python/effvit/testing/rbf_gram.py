"""rbf_gram's samples, bad inputs and error magnitudes."""

import torch

from effvit.reference.rbf_gram import rbf_gram as reference
from effvit.testing._samples import IS_FLOAT, IS_TENSOR, changed, every_other, to
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "rbf_gram"
TENSORS = OPS[NAME].names
BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names
# Backends that take samples in one dtype take the first.
BFLOAT16_FIRST = (torch.bfloat16, torch.float32, torch.float16)
FLOAT16_FIRST = (torch.float16, torch.float32, torch.bfloat16)

# ---- samples -------------------------------------------------------------------------------------------------------


def _sample(
    name, B, L, M, H, D, *, tags="", size=1.0, values=None, layout=None, dtypes=FLOAT_DTYPES, **kwargs
):  # fmt: skip
    """Tokens divided by D**0.25, as SOFT does; `size` multiplies them."""

    def make(dtype, device, generator):
        q, k = (torch.randn(B, n, H, D, generator=generator) * (size * D**-0.25) for n in (L, M))
        if values is not None:
            q, k = values(q, k)
        q, k = q.to(device, dtype), k.to(device, dtype)
        return (q, k) if layout is None else layout(q, k), dict(kwargs)

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _heads_first(q, k):
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))


def _tokens_first(q, k):
    return tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k))


def _misaligned(q, k):
    """Rows one element past an aligned address and an odd number of elements apart."""

    def shift(t):
        pad = 2 + t.shape[-1] % 2 - 1
        wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + pad + 1)
        return wide[..., 1 : 1 + t.shape[-1]].copy_(t)

    return shift(q), shift(k)


def _one_projection(q, k):
    """Slices of one [B, L, 2, H, D] projection; k has as many tokens as q."""
    both = torch.stack((q, k), dim=2)
    return both[:, :, 0], both[:, :, 1]


def _expanded_keys(q, k):
    return q, k[:1].expand_as(k)


def _same_tokens(q, k):
    return q, q[:, : k.shape[1]].clone()


def _all_equal(q, k):
    return q[:, :1].expand_as(q).clone(), q[:, :1].expand_as(k).clone()


def _nearly_equal(q, k):
    return q, q[:, : k.shape[1]] + 1e-3 * k


def _near_and_far(q, k):
    """Every third query and key far away: of its own neighbours too, so that the Gram matrix has ones and zeros."""
    q, k = q.clone(), k.clone()
    q[:, ::3] *= 40
    k[:, ::3] *= 30
    k[:, 1] = q[:, 1]
    return q, k


def _all_far(q, k):
    """Distances whose exponential is 0 in float64 too."""
    return q + 100, k - 100


def _away_from_the_origin(q, k):
    return q + 3, k + 3


def _heads_of_different_size(q, k):
    factor = torch.logspace(-3, 1, q.shape[2])[:, None]
    return q * factor, k * factor


# fmt: off
SAMPLES = [
    # SOFT at 224 x 224: 56 x 56 tokens and 1 head, 28 x 28 and 2, 14 x 14 and 5, 7 x 7 and 8; 49 bottleneck tokens.
    _sample("soft_stage4", 2, 49, 49, 8, 64, tags="vit framework"),
    _sample("soft_stage1", 1, 3136, 49, 1, 64, tags="vit"),
    _sample("soft_stage1_d32", 2, 3136, 49, 1, 32, tags="vit", layout=_heads_first),
    _sample("soft_stage2", 1, 784, 49, 2, 64, tags="vit", layout=_heads_first),
    _sample("soft_stage3", 2, 196, 49, 5, 64, tags="vit"),
    _sample("soft_stage3_d32", 1, 196, 49, 5, 32, tags="vit", layout=_tokens_first),
    _sample("soft_bottleneck", 2, 49, 49, 5, 64, tags="vit", values=_same_tokens),
    _sample("soft_384", 1, 2304, 144, 2, 32, tags="vit"),
    # Small: the emulator and the interpreter run them too.
    _sample("small", 2, 5, 3, 2, 8, tags="small framework"),
    _sample("small_tail", 2, 7, 5, 3, 5, tags="small framework", gamma=1.25),
    _sample("small_wide", 1, 6, 37, 1, 16, tags="small"),
    _sample("small_tall", 1, 75, 9, 2, 16, tags="small"),
    _sample("small_tiles", 1, 70, 70, 1, 33, tags="small"),
    _sample("small_d64", 1, 33, 49, 1, 64, tags="small"),
    _sample("small_strided", 2, 9, 6, 2, 12, tags="small strided", layout=_heads_first),
    _sample("small_misaligned", 2, 5, 6, 1, 16, tags="small strided", layout=_misaligned),
    _sample("small_equal", 1, 6, 6, 2, 8, tags="small", values=_same_tokens),
    _sample("small_near_and_far", 1, 12, 7, 1, 8, tags="small", values=_near_and_far),
    # The ways in which CUDA kernels read and write the matrix: rows of whole vectors, tiles that are one aligned block
    # (heads a multiple of 16 bytes apart), and in every dtype.
    _sample("small_row_vectors", 1, 9, 72, 2, 16, tags="small"),
    _sample("small_row_vectors_bfloat16", 1, 66, 72, 1, 24, tags="small", dtypes=BFLOAT16_FIRST),
    _sample("small_row_vectors_float16", 1, 70, 16, 2, 20, tags="small", dtypes=FLOAT16_FIRST),
    _sample("small_blocks", 2, 8, 5, 2, 16, tags="small"),
    _sample("small_blocks_bfloat16", 1, 67, 9, 1, 16, tags="small", dtypes=BFLOAT16_FIRST),
    _sample("small_blocks_float16", 3, 72, 9, 2, 8, tags="small", dtypes=FLOAT16_FIRST),
    _sample("small_block_tail_float16", 1, 67, 9, 1, 8, tags="small", dtypes=FLOAT16_FIRST),
    _sample("small_elements_bfloat16", 1, 5, 67, 2, 65, tags="small", dtypes=BFLOAT16_FIRST),
    _sample("small_elements_float16", 1, 70, 70, 1, 7, tags="small", dtypes=FLOAT16_FIRST),
    # Tiny: gradcheck of the definition.
    _sample("tiny", 1, 3, 2, 2, 2, tags="tiny small"),
    _sample("tiny_gamma", 2, 2, 3, 1, 1, tags="tiny", gamma=1.3),
    # Nasty.
    _sample("one_query", 3, 1, 49, 2, 32, tags="nasty"),
    _sample("one_key", 3, 49, 1, 2, 32, tags="nasty"),
    _sample("one_pair", 1, 1, 1, 1, 1, tags="nasty"),
    _sample("d1", 2, 17, 19, 2, 1, tags="nasty"),
    _sample("d7", 2, 65, 23, 2, 7, tags="nasty"),
    _sample("d255", 1, 67, 31, 1, 255, tags="nasty"),
    _sample("d256", 1, 129, 66, 2, 256, tags="nasty"),
    _sample("m256", 1, 300, 256, 1, 32, tags="nasty"),
    _sample("m257_d200", 1, 131, 257, 1, 200, tags="nasty"),
    _sample("m1000", 1, 70, 1000, 1, 24, tags="nasty"),
    _sample("many_queries", 1, 8191, 5, 1, 3, tags="nasty"),
    _sample("all_equal", 1, 40, 20, 2, 64, tags="nasty", values=_all_equal),
    _sample("same_tokens", 2, 40, 40, 2, 64, tags="nasty", values=_same_tokens, gamma=4.0),
    _sample("nearly_equal", 1, 60, 50, 1, 32, tags="nasty", values=_nearly_equal),
    _sample("near_and_far", 2, 62, 49, 2, 64, tags="nasty", values=_near_and_far),
    _sample("all_far", 1, 20, 20, 1, 64, tags="nasty", values=_all_far),
    _sample("away_from_the_origin", 1, 70, 49, 1, 64, tags="nasty", values=_away_from_the_origin),
    _sample("heads_of_different_size", 1, 70, 49, 4, 64, tags="nasty", values=_heads_of_different_size),
    _sample("narrow_kernel", 1, 70, 49, 1, 16, tags="nasty", gamma=30.0),
    _sample("wide_kernel", 1, 70, 49, 1, 16, tags="nasty", gamma=1e-4),
    # Strides.
    _sample("heads_first", 2, 65, 49, 3, 32, tags="strided", layout=_heads_first),
    _sample("tokens_first", 3, 65, 17, 2, 32, tags="strided", layout=_tokens_first),
    _sample("one_projection", 2, 50, 50, 3, 32, tags="strided", layout=_one_projection),
    _sample("misaligned", 2, 33, 21, 2, 32, tags="strided", layout=_misaligned),
    _sample("misaligned_odd", 2, 33, 21, 2, 17, tags="strided", layout=_misaligned),
    _sample("expanded_keys", 3, 33, 21, 2, 16, tags="strided", layout=_expanded_keys),
    # Empty.
    _sample("empty_batch", 0, 5, 4, 2, 8, tags="empty"),
    _sample("empty_queries", 2, 0, 4, 2, 8, tags="empty"),
    _sample("empty_keys", 2, 5, 0, 2, 8, tags="empty"),
    _sample("empty_heads", 2, 5, 4, 0, 8, tags="empty"),
    # More than a CUDA grid's y dimension of every kind.
    _sample("huge_batch", 70001, 2, 1, 1, 2, tags="huge", dtypes=(torch.float32,)),
    _sample("huge_queries", 1, 1 << 20, 2, 1, 2, tags="huge", dtypes=(torch.float32,)),
    _sample("huge_keys", 1, 3, 70001, 1, 2, tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes and layouts, small; `choose` is a random.Random."""
    L, M = (choose.choice((1, 2, 7, 16, 31, 49, 65, 130)) for _ in range(2))
    return _sample(
        name, choose.randint(1, 3), L, M, choose.randint(1, 3), choose.choice((1, 3, 8, 16, 17, 32, 64, 96)),
        gamma=choose.choice((0.1, 0.5, 2.0)), layout=choose.choice((None, _heads_first, _tokens_first)),
    )  # fmt: skip


# ---- error magnitudes ---------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms behind every component, in float64.

    The exponent is float32 in every kernel: its rounding, which is that of |q|^2 + |k|^2 + 2 |q||k|, enters the result
    by eps(float32). Results below the smallest normal number of float32, and bits of a float16 below 2**-24, are lost.
    """
    q, k = (t.transpose(1, 2) for t in args)
    gamma = kwargs.get("gamma", 0.5)
    norms = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
    exponent = gamma * (norms + 2 * (q.abs() @ k.abs().mT))
    lost = 2.0**-25 if eps == torch.finfo(torch.float16).eps else 2.0**-126
    out = reference(*args, **kwargs)
    out = out * (1 + torch.finfo(torch.float32).eps / eps * exponent) + lost / eps
    if output_grads is None:
        return {"out": out}, {}
    p = output_grads[0].abs() * out
    dq = 2 * gamma * (p.sum(-1)[..., None] * q.abs() + p @ k.abs())
    dk = 2 * gamma * (p.sum(-2)[..., None] * k.abs() + p.mT @ q.abs())
    return {"out": out}, {"q": dq.transpose(1, 2), "k": dk.transpose(1, 2)}


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call at another batch and number of queries; as many heads and keys."""
    q, k = args
    return (torch.cat((q, q.flip(0)))[:, 1:].contiguous(), torch.cat((k, k.flip(0))).contiguous()), kwargs


def memory_calls(dtype):
    generator = torch.Generator("cpu").manual_seed(0)

    def call(B, L, M, H, D):
        return tuple(torch.randn(B, n, H, D, generator=generator).to(dtype) * D**-0.25 for n in (L, M)), {}

    return [
        ("32x3136x49", *call(32, 3136, 49, 1, 64)),
        ("1x50000x256", *call(1, 50000, 256, 1, 256)),
        ("2x2000x2000", *call(2, 2000, 2000, 2, 256)),
    ]


def good_call():
    """A call that works; every bad input is this one with something changed."""
    generator = torch.Generator("cpu").manual_seed(0)
    return {"q": torch.randn(1, 6, 2, 8, generator=generator), "k": torch.randn(1, 4, 2, 8, generator=generator)}


def _bad(name, error, match, *, schema_match=None, torch_ops=True, **changes):
    """changes: argument -> new value, or a function of the old one."""

    def make():
        return split_call(changed(good_call(), changes), TENSORS)

    return BadInput(name, make, error, match, schema_match, torch_ops)


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        call = good_call() | {n: torch.zeros(1, 2, 6, 4) for n in ("grad_out", "out")}
        return split_call(changed(call, changes), BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op="rbf_gram_backward")


_LIKE_Q = r"k must be \[B, M, H, D\] like q \[1, 6, 2, 8\], got "
_BOTH = TENSORS

# fmt: off
BAD_INPUTS = [
    # q
    _bad("q_rank_3", ValueError, r"q must be \[B, L, H, D\].*got \[6, 2, 8\]", q=lambda t: t[0]),
    _bad("q_rank_5", ValueError, r"q must be \[B, L, H, D\].*got \[1, 1, 6, 2, 8\]", q=lambda t: t[None]),
    _bad("q_scalar", ValueError, r"q must be \[B, L, H, D\].*got \[\]", q=lambda t: t.sum()),
    _bad("q_none", TypeError, f"q {IS_TENSOR}NoneType", schema_match=r"q must be .*got \[0\]", q=None),
    _bad("q_list", TypeError, f"q {IS_TENSOR}list", schema_match="argument 'q'", q=lambda t: t.tolist()),
    _bad("q_numpy", TypeError, f"q {IS_TENSOR}ndarray", schema_match="argument 'q'", q=lambda t: t.numpy()),
    _bad("q_float64", TypeError, f"q {IS_FLOAT}.*(float64|Double)", **dict.fromkeys(_BOTH, to(torch.float64))),
    _bad("q_int32", TypeError, f"q {IS_FLOAT}.*(int32|Int)", **dict.fromkeys(_BOTH, to(torch.int32))),
    _bad("q_bool", TypeError, f"q {IS_FLOAT}.*(bool|Bool)", **dict.fromkeys(_BOTH, to(torch.bool))),
    _bad("q_complex64", TypeError, f"q {IS_FLOAT}.*(complex64|ComplexFloat)",
         **dict.fromkeys(_BOTH, to(torch.complex64))),
    _bad("q_float8", TypeError, f"q {IS_FLOAT}.*(float8|Float8)", **dict.fromkeys(_BOTH, to(torch.float8_e4m3fn))),
    _bad("q_sparse", TypeError, r"q must be (a )?dense.*got .*[sS]parse", q=lambda t: t.to_sparse()),
    _bad("q_head_dim_0", ValueError, r"q must .*head dim between 1 and 256, got \[1, 6, 2, 0\]",
         **dict.fromkeys(_BOTH, lambda t: t[..., :0])),
    _bad("q_head_dim_257", ValueError, r"q must .*head dim between 1 and 256, got \[1, 6, 2, 257\]",
         **dict.fromkeys(_BOTH, lambda t: torch.zeros(*t.shape[:-1], 257))),
    _bad("q_last_stride_2", ValueError, "q must .*last stride.*1.*got", q=every_other),
    # k
    _bad("k_none", TypeError, f"k {IS_TENSOR}NoneType", schema_match=r"k must be .*got \[0\]", k=None),
    _bad("k_string", TypeError, f"k {IS_TENSOR}str", schema_match="argument 'k'", k="k"),
    _bad("k_batch", ValueError, rf"{_LIKE_Q}\[2, 4, 2, 8\]", k=lambda t: torch.cat((t, t))),
    _bad("k_heads", ValueError, rf"{_LIKE_Q}\[1, 4, 1, 8\]", k=lambda t: t[:, :, :1]),
    _bad("k_head_dim", ValueError, rf"{_LIKE_Q}\[1, 4, 2, 7\]", k=lambda t: t[..., :7]),
    _bad("k_rank", ValueError, rf"{_LIKE_Q}\[1, 4, 16\]", k=lambda t: t.flatten(2)),
    _bad("k_heads_first", ValueError, rf"{_LIKE_Q}\[1, 2, 4, 8\]", k=lambda t: t.transpose(1, 2).contiguous()),
    _bad("k_bfloat16", TypeError, r"k must be .*[fF]loat.*like q.*got .*(bfloat16|BFloat16)", k=to(torch.bfloat16)),
    _bad("k_float64", TypeError, r"k must be .*[fF]loat.*like q.*got .*(float64|Double)", k=to(torch.float64)),
    _bad("k_sparse", TypeError, r"k must be (a )?dense.*got .*[sS]parse", k=lambda t: t.to_sparse()),
    _bad("k_meta", ValueError, r"k must be .*on cpu.*got .*meta", k=to("meta")),
    _bad("k_last_stride_2", ValueError, "k must .*last stride.*1.*got", k=every_other),
    # gamma
    _bad("gamma_zero", ValueError, r"gamma must be positive, got 0", gamma=0.0),
    _bad("gamma_negative", ValueError, r"gamma must be positive, got -0\.5", gamma=-0.5),
    _bad("gamma_nan", ValueError, r"gamma must be finite, got nan", gamma=float("nan")),
    _bad("gamma_huge", ValueError, r"gamma must be finite in float32, got 1e\+39", gamma=1e39),
    _bad("gamma_tiny", ValueError, r"gamma must be positive, got 1e-60", gamma=1e-60),
    _bad("gamma_inf", ValueError, r"gamma must be finite, got inf", gamma=float("inf")),
    _bad("gamma_none", TypeError, r"gamma must be a real number, got NoneType", schema_match="argument 'gamma'",
         gamma=None),
    _bad("gamma_string", TypeError, r"gamma must be a real number, got str", schema_match="argument 'gamma'",
         gamma="0.5"),
    _bad("gamma_bool", TypeError, r"gamma must be a real number, got bool", torch_ops=False, gamma=True),
    _bad("gamma_tensor", TypeError, r"gamma must be a real number, got Tensor", torch_ops=False,
         gamma=torch.tensor(0.5)),
    # the backward op
    _bad_backward("backward_grad_shape", ValueError, r"grad_out must be \[B, H, L, M\] = \[1, 2, 6, 4\], got "
                  r"\[1, 2, 4, 6\]", grad_out=lambda t: t.mT.contiguous()),
    _bad_backward("backward_grad_rank", ValueError, r"grad_out must be \[B, H, L, M\] = \[1, 2, 6, 4\], got "
                  r"\[2, 6, 4\]", grad_out=lambda t: t[0]),
    _bad_backward("backward_grad_dtype", TypeError, r"grad_out must be .*like q.*got .*(float16|Half)",
                  grad_out=to(torch.float16)),
    _bad_backward("backward_grad_meta", ValueError, r"grad_out must be .*on cpu.*got .*meta", grad_out=to("meta")),
    _bad_backward("backward_grad_last_stride", ValueError, "grad_out must .*last stride.*1.*got",
                  grad_out=every_other),
    _bad_backward("backward_grad_none", TypeError, f"grad_out {IS_TENSOR}NoneType",
                  schema_match=r"grad_out must be .*got \[0\]", grad_out=None),
    _bad_backward("backward_out_shape", ValueError, r"out must be \[B, H, L, M\] = \[1, 2, 6, 4\], got \[1, 2, 5, 4\]",
                  out=lambda t: t[:, :, :5]),
    _bad_backward("backward_out_dtype", TypeError, r"out must be .*like q.*got .*(bfloat16|BFloat16)",
                  out=to(torch.bfloat16)),
    _bad_backward("backward_out_strided", ValueError, r"out must be contiguous as the forward returned it",
                  out=lambda t: t.mT.contiguous().mT),
    _bad_backward("backward_out_meta", ValueError, r"out must be .*on cpu.*got .*meta", out=to("meta")),
    _bad_backward("backward_k_heads", ValueError, rf"{_LIKE_Q}\[1, 4, 1, 8\]", k=lambda t: t[:, :, :1]),
    _bad_backward("backward_gamma", ValueError, r"gamma must be positive, got 0", gamma=0.0),
]
# fmt: on

SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B L",
    resize=resize,
    memory_calls=memory_calls,
)
