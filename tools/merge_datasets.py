#!/usr/bin/env python
"""Joins the data sets of a folder under Megatron's own flag names; the same job as `boreal data merge`.

    python tools/merge_datasets.py --input data/parts --output-prefix data/corpus
"""

import argparse
import sys
from pathlib import Path

from boreal_megatron.data.merge import merge, render
from boreal_megatron.errors import BorealError


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder; its data sets are joined in order of their names")
    parser.add_argument("--output-prefix", required=True)
    args = parser.parse_args()
    try:
        print(render(merge([path.with_suffix("") for path in sorted(args.input.glob("*.idx"))], args.output_prefix)))
    except BorealError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
