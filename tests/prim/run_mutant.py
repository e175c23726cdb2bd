"""Runs one compiled library of tests/test_mutants.py in a process of its own and saves what it computed. No torch.

python run_mutant.py PROGRAM LIBRARY OUT.npz
"""

import ctypes
import importlib
import sys

import numpy as np
from mutants import SEEDS


def main():
    program, path, out = sys.argv[1:]
    library = ctypes.CDLL(path)
    run = importlib.import_module(f"{program}_mutants").run
    results = {}
    for seed in SEEDS:
        library.effvit_emu_set_seed(ctypes.c_uint64(seed))
        for name, x in run(library):
            results[f"{seed}_{name}"] = x
    np.savez(out, **results)


if __name__ == "__main__":
    main()
