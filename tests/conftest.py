"""Set-up of every test: one thread, fixed seeds, Triton's interpreter where there is no GPU, torchvision's schemas."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

import numpy as np
import pytest
import random_calls

import effvit
from effvit import _backends
from effvit.ops._op import OPS
from effvit.testing import torchvision_schemas

torchvision_schemas()


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_report_header(config):
    kernels = {device: sorted({_backends.chosen(op, device).name for op in OPS}) for device in ("cpu", "cuda")}
    versions = f"effvit {effvit.__version__}, torch {torch.__version__}"
    return f"{versions}, ISAs {_backends.isas()}, kernels {kernels}, seed {random_calls.seed()}"


def pytest_collection_finish():
    assert torch.get_num_threads() == 1, "a module set the number of threads when it was imported"
    gc.collect()
    gc.freeze()  # thousands of tests are objects that every full collection would walk through


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # so that no worker ends long after the others
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _clean_state():
    """Same random numbers for every test; threads, instruction set and default dtype as before afterwards."""
    torch.manual_seed(0)
    np.random.seed(0)
    threads, dtype, isa = torch.get_num_threads(), torch.get_default_dtype(), _backends.isa()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if isa is not None and _backends.isa() != isa:
        _backends.set_isa(isa)
