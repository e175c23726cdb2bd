"""Operators on tensors that are split across the ranks of a process group."""

from .fft_conv import channels_of_rank, distributed_fft_conv
from .halo import halo_dwconv, halo_exchange, halo_window_attention
from .sequence_parallel import sequence_parallel_gated_linear_attention, sequence_parallel_linear_attention

__all__ = [
    "channels_of_rank", "distributed_fft_conv", "halo_dwconv", "halo_exchange", "halo_window_attention",
    "sequence_parallel_gated_linear_attention", "sequence_parallel_linear_attention",
]  # fmt: skip
