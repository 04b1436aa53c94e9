#!/usr/bin/env python
"""Tokenizes JSONL under Megatron's own flag names; the same job as `boreal data preprocess`.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR --append-eod --workers 8
"""

import argparse
import sys

from boreal_megatron.data.cli import preprocess_arguments, preprocess_options, summary
from boreal_megatron.data.tokenize import preprocess
from boreal_megatron.errors import BorealError


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files or folders")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="one dataset for each key")
    parser.add_argument("--output-prefix", required=True)
    preprocess_arguments(parser)
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--tokenizer-type", choices=["HuggingFaceTokenizer", "GPTSentencePieceTokenizer"], default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", required=True, help="folder with tokenizer.json or tokenizer.model")
    args = parser.parse_args()
    try:
        for key in args.json_keys:
            result = preprocess(
                args.input,
                args.tokenizer_model,
                args.output_prefix,
                json_key=key,
                append_eod=args.append_eod,
                **preprocess_options(args),
            )
            print(summary(result))
    except BorealError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
