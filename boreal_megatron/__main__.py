"""`python -m boreal_megatron` is `boreal`; torchrun starts it as `torchrun ... -m boreal_megatron train CONFIG`."""

import sys

from boreal_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
