"""Train a configuration: torchrun ... tools/pretrain.py CONFIG... [a.b.c=value ...]. The same as `boreal train`."""

import sys

from boreal_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
