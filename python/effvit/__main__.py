"""Command line: `python -m effvit info`."""

import argparse
import sys

from . import _info


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m effvit", description="PyTorch kernels for efficient vision models")
    parser.add_argument("command", choices=["info"], help="what is installed, which kernels run, and why")
    parser.parse_args(argv)
    return _info.main()


if __name__ == "__main__":
    sys.exit(main())
