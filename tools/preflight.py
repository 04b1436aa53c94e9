"""Prove a launch's machines: torchrun ... tools/preflight.py CONFIG... [a.b.c=value ...], as `boreal preflight`."""

import sys

from boreal_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["preflight", *sys.argv[1:]]))
