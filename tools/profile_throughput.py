"""Where a step's time goes: torchrun ... tools/profile_throughput.py CONFIG... [options]. As `boreal profile`."""

import sys

from boreal_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
