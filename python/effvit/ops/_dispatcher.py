"""Private interfaces of torch's dispatcher, all in one file: tests/test_dispatcher.py checks each on the torch at hand.

Everything else uses torch's public interfaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch

LIBRARY = torch.library.Library("effvit", "FRAGMENT")


@contextlib.contextmanager
def autograd_below_autograd():
    """Record gradients inside a kernel, where the dispatcher has already left autograd behind.

    The reference of a backward op is the derivative of the reference of its forward op.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradMeta", "ADInplaceOrView"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set() - keys
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def register_autocast(name: str, cast: Callable) -> None:
    """Run the op below autocast with `cast(dtype, *args)` applied to its positional arguments."""
    overload = getattr(torch.ops.effvit, name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, _device_type=device_type, _key=key, **kwargs):
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*cast(torch.get_autocast_dtype(_device_type), *args), **kwargs)

        LIBRARY.impl(name, kernel, key)


def shapes_depend_on(overload, names: Iterable[str]) -> None:
    """Tell DTensor which keyword arguments change the outputs' shapes: it caches what it knows of a call.

    `register_sharding` keys that cache by tensors and int keyword arguments only; a bool must be named.
    """
    from torch.distributed.tensor import DTensor

    info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload]
    info.static_kwargkey = sorted({*(info.static_kwargkey or ()), *names})
