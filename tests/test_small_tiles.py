"""Every kernel in its smallest tiles: small samples then take every path of large ones, streamed keys, split sums."""

import pytest
import random_calls

from effvit.testing import backends, get_spec

# For the interpreter and the emulator; the CPU takes all small samples.
CASES = {
    "window_attention": ["small_shift", "small_dilated", "small_halo", "small_tail", "small_pads"],
    "linear_attention": ["small_splits_causal", "small_splits_segments", "small_segments_everything", "small_wide",
                         "small_causal_wide", "small_quadratic_chunks", "small_tails", "small_splits"],
    "rbf_gram": ["small", "small_tails"],
    "newton_pinv": ["small_gram_17"],
    "selective_scan2d": ["small"],
    "spectral_gate": ["small", "small_blocks"],
    "dwconv": ["small", "small_state_longer", "small_dilated"],
    "dwconv_glu": ["small", "small_some_gates"],
    "local_pool_attention": ["small"],
    "gated_linear_attention": ["small_channel_both", "small_segments", "small_token_strong", "small_head_both"],
    "sparse24_linear": ["small", "transposed"],
    "block_relu2_attention": ["small_causal"],
    "aft": ["small_local", "strided"],
    "rnn_scan": ["small_lstm"],
    "fft_conv": ["small", "small_2d_last"],
    "int8_matmul": ["small_unsigned", "int16_int8_3x9x21"],
    "int_attention": ["small_16_bits", "small_bias"],
}  # fmt: skip


def cases():
    for op, slow in CASES.items():
        for sample in get_spec(op).tagged("small"):
            for backend in backends(op):
                takes = sample.name in slow if backend.slow else backend.name.startswith("cpu:")
                if takes:
                    yield pytest.param(op, sample, backend, id=f"{op}-{sample.name}-{backend.name}")


@pytest.mark.parametrize("op, sample, backend", list(cases()))
def test_small_tiles(op, sample, backend):
    random_calls.check_call(get_spec(op), sample, sample.dtypes[0], [backend], small=True)


def test_small_tiles_change_something():
    """Sums are split elsewhere, so the last bits differ: the switch is connected."""
    from effvit.testing import small_tiles

    native = [b for b in backends("linear_attention") if b.name.startswith("cpu:")]
    if not native:
        pytest.skip("no compiled CPU library is loaded")
    args, kwargs = get_spec("linear_attention").sample("small_splits").build()
    plain = native[-1].forward(*args, **kwargs)
    with small_tiles():
        small = native[-1].forward(*args, **kwargs)
    assert any((a != b).any() for a, b in zip(plain, small, strict=True))
