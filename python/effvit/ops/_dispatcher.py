"""Private interfaces of torch's dispatcher, all in one file: tests/test_declaration.py checks each on this torch.

Everything else uses torch's public interfaces.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._functorch.vmap import unwrap_batched, wrap_batched
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.utils._python_dispatch import _disable_current_modes

LIBRARY = torch.library.Library("effvit", "FRAGMENT")

_AUTOCAST_KEYS = (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"))


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


@contextlib.contextmanager
def outside_of_every_trace():
    """What runs inside is seen by no mode and no dispatcher in Python, and autograd records it."""
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), autograd_below_autograd():
        yield


def sees_conjugates(kernel: Callable) -> Callable:
    """A kernel in Python whose complex views are conjugate where they say so.

    A dispatch mode (CommDebugMode, a FLOP counter) excludes from what it calls the keys that resolve such views: there
    `x.conj() + 1` would be `x + 1`, and the derivatives of complex products wrong.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Conjugate)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.Negative)

    @functools.wraps(kernel)
    def run(*args, **options):
        exclude = torch._C._dispatch_tls_local_exclude_set()
        if not exclude.has(torch._C.DispatchKey.Conjugate):
            return kernel(*args, **options)
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude - keys):
            return kernel(*args, **options)

    return run


def without_autocast():
    """What runs inside computes in the dtypes that it is given."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is open, by torch.func or by torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether a level of torch.func or of forward-mode AD is open."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def alive(x: object) -> object:
    """What a tensor of a level of torch.func that is closed stands for: a function that vjp returned runs after it."""
    return torch._C._functorch.unwrap_if_dead(x) if isinstance(x, torch.Tensor) else x


def tangent_of(x: object) -> torch.Tensor | None:
    """The tangent that forward-mode AD has given a tensor, of the level of torch.func where this is asked."""
    return forward_ad.unpack_dual(x, level=0).tangent if isinstance(x, torch.Tensor) else None


def primal_of(x: object) -> object:
    return forward_ad.unpack_dual(x, level=0).primal if isinstance(x, torch.Tensor) else x


def dual_of(primal: torch.Tensor, tangent: torch.Tensor | None) -> torch.Tensor:
    return primal if tangent is None else forward_ad.make_dual(primal, tangent, level=0)


def register_transforms(
    name: str,
    function: type[SingleLevelFunction],
    forward_mode: Callable,
    vmap: Callable,
    cast: Callable,
) -> None:
    """How autograd, every level of torch.func and autocast call `effvit::<name>`.

    Args:
        function: records a call for the reverse mode: ``function.apply(call, options, *tensors)``, where ``call`` is
            the op without that recording.
        forward_mode: ``(tensors, options, recorded)``, of which some have a tangent -> results with tangents; recorded:
            the reverse mode must find the tangents in what it saves.
        vmap: ``(size, in_dims, tensors, options) -> results``, the mapped dim first in all of them.
        cast: ``(dtype, *tensors) -> tensors`` for autocast.

    torch.library.register_autograd would drop tangents and refuse torch.func. Here each level of torch.func is one
    application of the rules above, to an op that the next level sees again: so any nesting is right if these are.
    """
    overload = getattr(torch.ops.effvit, name).default

    def is_recorded(tensors):
        return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)

    def has_tangents(tensors):
        return torch._C._is_fwd_grad_enabled() and any(tangent_of(t) is not None for t in tensors)

    def below_autograd(keyset, *tensors, **options):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *tensors, **options)

    def autograd(keyset, *tensors, **options):
        if in_forward_mode() and has_tangents(tensors):
            return forward_mode(tensors, options, is_recorded(tensors))
        if is_recorded(tensors):
            return function.apply(functools.partial(below_autograd, keyset), options, *tensors)
        return below_autograd(keyset, *tensors, **options)

    def level(*tensors, **options):
        tensors = unwrap_dead_wrappers(tensors)
        for device_type, _ in _AUTOCAST_KEYS:
            if torch.is_autocast_enabled(device_type) and any(t is not None and t.device.type == device_type
                                                              for t in tensors):  # fmt: skip
                return autocast(device_type, *tensors, **options)
        interpreter = retrieve_current_functorch_interpreter()
        kind, number = interpreter.key(), interpreter.level()
        if kind == _functorch.TransformType.Vmap:
            inner, in_dims = unwrap_batched(tensors, number)
            with interpreter.lower():
                if all(d is None for d in in_dims):
                    return overload(*inner, **options)
                results = vmap(interpreter.batch_size(), in_dims, inner, options)
            return wrap_batched(results, 0, number)
        if kind == _functorch.TransformType.Functionalize:
            for t in tensors:
                if t is not None and torch._is_functional_tensor(t):
                    torch._sync(t)
            views = interpreter.functionalize_add_back_views()

            def unwrap(t):
                return _functorch._unwrap_functional_tensor(t, views) if torch._is_functional_tensor(t) else t

            with interpreter.lower():
                results = overload(*_map(unwrap, tensors), **options)
            return _map(lambda t: _functorch._wrap_functional_tensor(t, number), results)
        tensors, _ = interpreter.lift(tensors, {})

        def lower(*tensors, **options):
            with interpreter.lower():
                results = overload(*_map(lambda t: _functorch._unwrap_for_grad(t, number), tensors), **options)
            return _map(lambda t: _functorch._wrap_for_grad(t, number), results)

        if kind == _functorch.TransformType.Jvp:
            return forward_mode(tensors, options, False) if has_tangents(tensors) else lower(*tensors, **options)
        if not is_recorded(tensors):
            return lower(*tensors, **options)

        def recorded(*tensors, **options):  # function.apply leaves both modes, for itself: other levels want theirs
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return lower(*tensors, **options)

        with enable_single_level_autograd_function():
            return function.apply(recorded, options, *tensors)

    def autocast(device_type, *tensors, **options):
        with without_autocast():
            return overload(*cast(torch.get_autocast_dtype(device_type), *tensors), **options)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    LIBRARY.impl(name, level, "FuncTorchDynamicLayerFrontMode")
    for device_type, key in _AUTOCAST_KEYS:
        LIBRARY.impl(name, functools.partial(autocast, device_type), key)


def _map(function: Callable, tensors):
    if isinstance(tensors, torch.Tensor):
        return function(tensors)
    return tuple(function(t) if isinstance(t, torch.Tensor) else t for t in tensors)


def shapes_depend_on(overload, names: Iterable[str]) -> None:
    """Tell DTensor which keyword arguments change the outputs' shapes: it caches what it knows of a call.

    `register_sharding` keys that cache by tensors and int keyword arguments only; a bool must be named.
    """
    from torch.distributed.tensor import DTensor

    info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload]
    info.static_kwargkey = sorted({*(info.static_kwargkey or ()), *names})
