#!/usr/bin/env python
"""Converts between training checkpoints and Hugging Face folders, under the name Megatron users know.

    python tools/convert_checkpoint.py export CHECKPOINT HF_FOLDER [--dtype bf16] [--check]
    python tools/convert_checkpoint.py import HF_FOLDER CHECKPOINTS run.yaml [a.b.c=value ...]

The same as `boreal export` and `boreal import`.
"""

import sys

from boreal_megatron.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] not in (["export"], ["import"]):
        sys.exit(__doc__.strip())
    sys.exit(main(sys.argv[1:]))
