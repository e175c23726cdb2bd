"""Measures an operator's peak memory and leaks in a process of its own: ``python -m effvit.testing._memory <op> peak``.

Resident memory is what counts: it sees every allocator, thread stacks and scratch included. Prints one JSON object.
"""

import ctypes
import gc
import json
import os
import sys
import threading


def _status(field):
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def can_measure():
    """None, or why this machine cannot measure."""
    try:
        _reset_peak()
        _status("VmHWM")
        _status("VmRSS")
        ctypes.CDLL(None).mallinfo2, ctypes.CDLL(None).malloc_trim
    except (OSError, RuntimeError, AttributeError) as e:
        return f"needs /proc/self/clear_refs and glibc's mallinfo2 and malloc_trim: {e}"
    return None


def _peak_of(call):
    """(bytes by which resident memory rose at its highest, bytes of the tensors returned)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or free blocks that are resident still hold the results
    before = _status("VmRSS")
    _reset_peak()
    result = call()
    peak = _status("VmHWM") - before
    results = result if isinstance(result, tuple) else (result,)
    return peak, sum(t.untyped_storage().nbytes() for t in results)


def _backward_arguments(spec, args, kwargs):
    import torch

    from effvit.testing._spec import as_tuple

    outputs = as_tuple(spec.op()(*args, **kwargs))
    grads = tuple(torch.ones_like(o) for o in outputs)
    return spec.backward_call(args, kwargs, outputs, grads)


def peak(spec, threads, dtypes):
    """[{call, direction, peak, outputs, allowed}] for every large call of the spec."""
    import torch

    torch.set_num_threads(threads)
    rows = []
    with torch.no_grad():
        # Threads, code pages and dispatch tables exist before the measurement; scratch of the large call does not.
        args, kwargs = spec.good_input()
        batched = {name for name, dims in spec.dynamic_dims.items() if 0 in dims}
        named = zip(spec.tensors, args, strict=False)
        declared = spec.declared.declaration.tensors
        args = tuple(torch.cat([a] * 64) if a is not None and name in batched else a for name, a in named)
        for dtype in dtypes:
            small = tuple(
                a.to(dtype) if a is not None and not t.dtype else a for t, a in zip(declared, args, strict=False)
            )
            for _ in range(3):
                spec.op()(*small, **kwargs)
                if spec.backward_call:
                    bargs, bkwargs = _backward_arguments(spec, small, kwargs)
                    spec.backward_op()(*bargs, **bkwargs)
        del small
        for dtype in dtypes:
            for name, args, kwargs in spec.memory_calls(dtype):
                calls = [("forward", lambda args=args, kwargs=kwargs: spec.op()(*args, **kwargs))]
                if spec.backward_call:
                    bargs, bkwargs = _backward_arguments(spec, args, kwargs)
                    calls.append(("backward", lambda a=bargs, k=bkwargs: spec.backward_op()(*a, **k)))
                for direction, call in calls:
                    used, outputs = _peak_of(call)
                    rows.append(
                        {
                            "call": f"{name}-{str(dtype).removeprefix('torch.')}-{direction}",
                            "peak": used,
                            "outputs": outputs,
                            "allowed": outputs + threads * spec.memory_slack_per_thread,
                        }
                    )
                del calls, call
    return rows


class _Mallinfo2(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _heap_in_use():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def leak_per_call(call, repeats):
    """Bytes of C heap that every call leaves behind."""
    for _ in range(200):
        call()
    gc.collect()
    before = _heap_in_use()
    for _ in range(repeats):
        call()
    gc.collect()
    return (_heap_in_use() - before) / repeats


def leaks(spec, repeats=1000):
    """{what: bytes per call}: the op, its backward, a failing call, and a planted leak that shows that this works."""
    import torch

    from effvit.testing._spec import with_grad

    torch.set_num_threads(1)
    args, kwargs = spec.good_input()
    found = {}
    with torch.no_grad():
        found["forward"] = leak_per_call(lambda: spec.op()(*args, **kwargs), repeats)
        if spec.backward_call:
            bargs, bkwargs = _backward_arguments(spec, args, kwargs)
            found["backward"] = leak_per_call(lambda: spec.backward_op()(*bargs, **bkwargs), repeats)
        ours = (b for b in spec.bad_inputs if b.torch_ops and b.op is None)  # what torch's schema check lets through
        bad = next(b for b in ours if b.schema_match is None or (b.declared and b.error is ValueError))
        bad_args, bad_kwargs = bad.make()

        def failing():
            try:
                spec.op()(*bad_args, **bad_kwargs)
            except (TypeError, ValueError, RuntimeError):
                return
            raise AssertionError(f"{bad.name} did not raise")

        found["error"] = leak_per_call(failing, repeats)
    if spec.backward_call:
        leaves = with_grad(args)

        def autograd():
            outputs = spec.op()(*leaves, **kwargs)
            out = outputs[0] if isinstance(outputs, tuple) else outputs
            torch.autograd.grad(out.sum(), [t for t in leaves if t is not None and t.requires_grad])

        found["autograd"] = leak_per_call(autograd, repeats)
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    found["planted"] = leak_per_call(lambda: libc.malloc(64), repeats)
    return found


def main(argv):
    import torch

    from effvit.testing import get_spec

    spec = get_spec(argv[0])
    if argv[1] == "peak":
        report = {"rows": peak(spec, int(argv[2]), [getattr(torch, d) for d in argv[3:]]), "pid": os.getpid()}
    else:
        report = {"leaks": leaks(spec), "threads": threading.active_count()}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
