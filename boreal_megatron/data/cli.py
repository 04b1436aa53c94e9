"""The `boreal data` verbs: parse, call one library function, print. Summaries go to stdout, progress to stderr."""

import json


def add_parser(subparsers):
    """Adds `data` and its verbs to the `boreal` command; each sets `run`, a function from arguments to exit code."""
    data = subparsers.add_parser("data", help="tokenize text, look into datasets, train a tokenizer")
    verbs = data.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("preprocess", help="text or .jsonl files to a Megatron .bin/.idx dataset")
    inputs_help = ".jsonl (one object a line), other text (one document a file), folders"
    verb.add_argument("inputs", nargs="+", metavar="IN", help=inputs_help)
    verb.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with a tokenizer.json")
    verb.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX_<json-key>_document.*")
    verb.add_argument("--json-key", default="text", help="key of the text in a JSON object; default: %(default)s")
    verb.add_argument("--no-append-eod", action="store_true", help="no end-of-document token after each")
    verb.add_argument("--workers", type=int, help="processes; default: one for each core; the output is the same")
    verb.add_argument("--on-bad", choices=("fail", "skip"), default="fail", help="at a bad line; default: %(default)s")
    verb.add_argument("--json", action="store_true", help="machine-readable summary")
    verb.set_defaults(run=_preprocess)

    verb = verbs.add_parser("inspect", help="what a dataset holds, and whether it is sound")
    verb.add_argument("prefix", metavar="PREFIX", help="dataset without .bin/.idx")
    verb.add_argument("--document", type=int, metavar="I", help="show this document instead")
    verb.add_argument("--tokenizer", metavar="DIR", help="with --document: show it as text")
    verb.add_argument("--json", action="store_true", help="machine-readable")
    verb.set_defaults(run=_inspect)

    verb = verbs.add_parser("train-tokenizer", help="train a byte-level BPE tokenizer on text or .jsonl files")
    verb.add_argument("inputs", nargs="+", metavar="IN", help=inputs_help)
    verb.add_argument("--vocab-size", type=int, default=8192, help="default: %(default)s")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.json and tokenizer_config.json")
    verb.add_argument("--json-key", default="text", help="key of the text in a JSON object; default: %(default)s")
    verb.set_defaults(run=_train_tokenizer)


def summary(result):
    """Returns what people want to know of a `preprocess` result."""
    lines = [
        f"{result['prefix']}.bin: {result['documents']:,} documents, {result['tokens']:,} tokens of {result['dtype']} "
        f"({result['text_bytes'] / max(result['tokens'], 1):.2f} bytes of text a token)",
        f"{result['input_bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s, {result['megabytes_per_second']:.2f} MB/s",
    ]
    if result["skipped"]:
        total = sum(result["skipped"].values())
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in result["skipped"].items())
        lines.append(f"passed over {total:,}: {reasons}")
        lines += [f"  {bad}" for bad in result["skipped_first"]]
        if total > len(result["skipped_first"]):
            lines.append(f"  and {total - len(result['skipped_first']):,} more")
    return "\n".join(lines)


def _preprocess(args):
    from boreal_megatron.data.tokenize import preprocess

    result = preprocess(
        args.inputs,
        args.tokenizer,
        args.out,
        json_key=args.json_key,
        append_eod=not args.no_append_eod,
        workers=args.workers,
        on_bad=args.on_bad,
    )
    print(json.dumps(result) if args.json else summary(result))
    return 0


def _inspect(args):
    from boreal_megatron.data.inspect import document, inspect, render

    if args.document is None:
        report = inspect(args.prefix)
        print(json.dumps(report) if args.json else render(report))
        return 1 if report["problems"] else 0
    from boreal_megatron.data.tokenizer import Tokenizer

    found = document(args.prefix, args.document, Tokenizer.load(args.tokenizer) if args.tokenizer else None)
    if args.json:
        print(json.dumps(found))
    else:
        ids = " ".join(map(str, found["ids"])) + (" ..." if found["tokens"] > len(found["ids"]) else "")
        print(f"document {found['document']}: {found['tokens']:,} tokens: {ids}")
        if "text" in found:
            print(found["text"])
    return 0


def _train_tokenizer(args):
    from boreal_megatron.data.tokenize import iter_texts
    from boreal_megatron.data.tokenizer import train_bpe

    tokenizer = train_bpe(iter_texts(args.inputs, args.json_key), args.vocab_size, args.out)
    print(f"{args.out}/tokenizer.json: {tokenizer.vocab_size:,} entries, {tokenizer.eod_token} is id {tokenizer.eod}")
    return 0
