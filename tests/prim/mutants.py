"""What the mutants of every program share: tests/prim/<program>_mutants.py lists them.

A program is a harness, compiled for the emulator without torch, that runs a few cases through ctypes. Its module has

    HARNESS   the source file to compile, relative to the repository; or to the copy of csrc that the mutant is in
    MUTANTS   plausible mistakes, each of which must be caught
    run       (library) -> pairs (name, result) of every case; without torch
    check     (results of the unmutated sources) -> None, or an AssertionError
    OPS       the operators whose kernels these are, where it is not the one of the program's name

and the `run` of every one is called by run_mutant.py in a process of its own.
"""

import ctypes
import dataclasses
import sys

import numpy as np

SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # occurs exactly once
    new: str
    by: str = ""  # parts of the emulator's message, separated by |; "" for a wrong result


def bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def call(function, *arguments):
    message = ctypes.create_string_buffer(1024)
    function.restype = None
    function(*arguments, message, ctypes.c_int64(len(message)))
    if message.value:
        print(message.value.decode())
        sys.exit(1)


def pointer(x):
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


def nbytes(x):
    return ctypes.c_int64(0 if x is None else x.nbytes)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_values(random, *shape):
    """Random float32 values that bfloat16 holds exactly."""
    return from_bf16(bf16(random.standard_normal(shape)))


def check_seeds(results):
    """Every order of threads gives the same bits."""
    for name, x in results.items():
        seed, case = name.split("_", 1)
        if seed != "0":
            assert (x == results[f"0_{case}"]).all(), name
