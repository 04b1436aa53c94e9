"""The `boreal data` verbs: parse, call one library function, print. Summaries go to stdout, progress to stderr."""

import json


def add_parser(subparsers):
    """Adds `data` and its verbs to the `boreal` command; each sets `run`, a function from arguments to exit code."""
    data = subparsers.add_parser("data", help="tokenize text, look into datasets, train a tokenizer")
    verbs = data.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("preprocess", help="text, .jsonl or .parquet to a Megatron .bin/.idx dataset")
    inputs_help = (
        ".jsonl (one object a line), .parquet, other text (one document a file), packed as .gz .zst .bz2 .xz; "
        "folders and 'globs'"
    )
    verb.add_argument("inputs", nargs="+", metavar="IN", help=inputs_help + "; - reads JSON lines from standard input")
    preprocess_arguments(verb)
    verb.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json or tokenizer.model")
    verb.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX_<json-key>_document.*")
    verb.add_argument("--json-key", default="text", help="key or column of the text; default: %(default)s")
    verb.add_argument("--no-append-eod", action="store_true", help="no end-of-document token after each")
    verb.add_argument("--dry-run", action="store_true", help="say what would be done")
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


def preprocess_arguments(parser):
    """Adds the options of preprocessing that Megatron's tool does not have."""
    add = parser.add_argument
    add("--workers", type=int, help="processes; default: one for each core; the output is the same")
    add("--engine", choices=("auto", "hf", "gigatoken", "sentencepiece"), default="auto", help="auto: gigatoken where it is installed and exact, else hf or sentencepiece")
    add("--compare", type=int, default=100, metavar="N", help="documents to encode with the tokenizer's own library too; default: %(default)s")
    add("--special-in-text", choices=("encode", "split", "error"), default="encode", help="special tokens written out in a text stay text, become tokens as in Megatron-LM, or are an error; default: %(default)s")
    add("--empty", choices=("skip", "keep"), default="skip", help="documents without text; keep as Megatron-LM does; default: %(default)s")
    add("--id-key", metavar="KEY", help="key or column of an id that must not repeat")
    add("--on-bad", choices=("fail", "skip", "quarantine"), default="fail", help="at a bad document; quarantine keeps its bytes; default: %(default)s")
    add("--max-bad", type=_share, default=0.001, metavar="SHARE", help="more bad ones than this (0.1%%, 0.001) and more than 20 are an error; default: 0.1%%")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="only the I-th of N stretches, from 0; `boreal data merge --shards` joins them")
    add("--tst-bag", type=int, metavar="K", help="also write how many bags of K tokens there are")
    add("--tst-boundaries", choices=("flat", "align", "drop_tail"), default="flat", help="where bags end; default: %(default)s")


def preprocess_options(args):
    """Returns the arguments of `preprocess` that `preprocess_arguments` asked for."""
    names = ("workers", "engine", "compare", "empty", "id_key", "on_bad", "max_bad", "shard", "tst_bag", "tst_boundaries")
    return {"special": args.special_in_text, **{name: getattr(args, name) for name in names}}


def _share(text):
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _shard(text):
    index, _, count = text.partition("/")
    return int(index), int(count)


def summary(result):
    """Returns what people want to know of a `preprocess` result."""
    if "documents" not in result:  # of a dry run
        return "\n".join(f"{key:<20}{value}" for key, value in result.items())
    engine = result["engine"]
    lines = [
        f"{result['prefix']}.bin: {result['documents']:,} documents, {result['tokens']:,} tokens of {result['dtype']} "
        f"({result['text_bytes'] / max(result['tokens'], 1):.2f} bytes of text a token)",
        f"{result['input_bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s, {result['megabytes_per_second']:.2f} MB/s, by {engine['name']} {engine['version']} ({engine['reason']})"
        + (f"; {result['resumed_parts']} of {result['parts']} parts were done before" if result["resumed_parts"] else ""),
    ]
    if result["special_documents"]:
        how = "as text" if result["special"] == "encode" else "as tokens"
        lines.append(f"{result['special_documents']:,} documents have special tokens written out, taken {how}: {result['prefix']}.special.jsonl")
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
        dry_run=args.dry_run,
        **preprocess_options(args),
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
