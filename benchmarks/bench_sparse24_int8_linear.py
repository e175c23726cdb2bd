"""sparse24_int8_linear against int8_linear on the decompressed weight, and the peers of bench_int8_linear.py."""

from bench_int8_linear import cases

from harness import main

if __name__ == "__main__":
    raise SystemExit(main("sparse24_int8_linear", cases(sparse=True)))
