"""The `boreal data` verbs: parse, call one library function, print. Summaries go to stdout, progress to stderr."""

import json
import signal

from boreal_megatron.errors import INPUT, USAGE, BorealError


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
    verb.set_defaults(run=_preprocess)

    verb = verbs.add_parser("prepare", help="write the indexes of a run's sources, so that training builds nothing")
    _config_argument(verb)
    verb.add_argument("--epochs", type=int, help="of each source; default: as many as the run will begin")
    verb.set_defaults(run=_prepare)

    verb = verbs.add_parser("blend", help="what each phase of a run reads of each source, and how often")
    _config_argument(verb)
    verb.set_defaults(run=_blend)

    verb = verbs.add_parser("trace", help="the documents and offsets in a training step's batch, by rank")
    verb.add_argument("step", type=int, metavar="STEP", help="counted from 1")
    _config_argument(verb)
    verb.add_argument("--world", type=int, default=1, help="processes of the run; default: %(default)s")
    verb.add_argument("--rank", type=int, help="show this data-parallel rank only")
    verb.add_argument("--tokenizer", metavar="DIR", help="show how each document begins")
    verb.set_defaults(run=_trace)

    verb = verbs.add_parser("inspect", help="what a dataset holds, and whether it is sound")
    verb.add_argument("prefix", metavar="PREFIX", help="dataset without .bin/.idx")
    verb.add_argument("--document", type=int, metavar="I", help="show this document instead")
    verb.add_argument("--tokenizer", metavar="DIR", help="with --document: show it as text")
    verb.set_defaults(run=_inspect)

    verb = verbs.add_parser("check", help="everything that is wrong with datasets, in one reading")
    verb.add_argument("prefixes", nargs="+", metavar="PREFIX")
    verb.set_defaults(run=_check)

    verb = verbs.add_parser("merge", help="join datasets, in the order given")
    verb.add_argument("prefixes", nargs="*", metavar="PREFIX")
    verb.add_argument("--out", metavar="PREFIX")
    verb.add_argument("--shards", metavar="OUT", help="join what `preprocess --shard` wrote for this --out")
    verb.set_defaults(run=_merge)

    verb = verbs.add_parser("split", help="divide a dataset by documents")
    verb.add_argument("prefix", metavar="PREFIX")
    shares = "a fraction, a number of documents, or rest"
    verb.add_argument("--into", nargs="+", required=True, metavar="OUT=SHARE", help=shares)
    verb.add_argument("--seed", type=int, help="place documents by their hash; default: in file order")
    verb.set_defaults(run=_split)

    verb = verbs.add_parser("sample", help="a reproducible subset of the documents")
    verb.add_argument("prefix", metavar="PREFIX")
    verb.add_argument("--out", required=True, metavar="PREFIX")
    size = verb.add_mutually_exclusive_group(required=True)
    size.add_argument("--documents", type=int)
    size.add_argument("--tokens", type=int)
    size.add_argument("--fraction", type=float)
    verb.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    verb.set_defaults(run=_sample)

    verb = verbs.add_parser("report", help="one HTML page: lengths, tokens, sources, problems")
    verb.add_argument("prefixes", nargs="+", metavar="PREFIX")
    verb.add_argument("--out", required=True, metavar="FILE.html")
    verb.add_argument("--tokenizer", metavar="DIR", help="show tokens as text")
    verb.set_defaults(run=_report)

    verb = verbs.add_parser("train-tokenizer", help="train a byte-level BPE tokenizer on text or .jsonl files")
    verb.add_argument("inputs", nargs="+", metavar="IN", help=inputs_help)
    verb.add_argument("--vocab-size", type=int, default=8192, help="default: %(default)s")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.json and tokenizer_config.json")
    verb.add_argument("--json-key", default="text", help="key of the text in a JSON object; default: %(default)s")
    verb.set_defaults(run=_train_tokenizer)

    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="machine-readable")


def _config_argument(verb):
    verb.add_argument("config", nargs="+", help="YAML files, merged left to right, then a.b.c=value overrides")


def _load(words):
    from boreal_megatron.config.load import load

    return load([word for word in words if "=" not in word], [word for word in words if "=" in word])


def _say(args, result, render):
    print(json.dumps(result) if args.json else render(result))


def _interrupt(number, frame):
    raise KeyboardInterrupt


def preprocess_arguments(parser):
    """Adds the options of preprocessing that Megatron's tool does not have."""
    add = parser.add_argument
    add("--workers", type=int, help="processes; default: one for each core, fewer for little text; the output is the same")
    add(
        "--engine", choices=("auto", "hf", "gigatoken", "sentencepiece"), default="auto",
        help="auto: gigatoken where it is installed and exact, else hf or sentencepiece",
    )  # fmt: skip
    add(
        "--compare", type=int, default=100, metavar="N",
        help="documents to encode with the tokenizer's own library too; default: %(default)s",
    )  # fmt: skip
    add(
        "--special-in-text", choices=("encode", "split", "error"), default="encode",
        help="special tokens written out in a text stay text, become tokens as in Megatron-LM, or are an error; "
        "default: %(default)s",
    )  # fmt: skip
    add(
        "--empty", choices=("skip", "keep"), default="skip",
        help="documents without text; keep as Megatron-LM does; default: %(default)s",
    )  # fmt: skip
    add("--id-key", metavar="KEY", help="key or column of an id that must not repeat")
    add(
        "--on-bad", choices=("fail", "skip", "quarantine"), default="fail",
        help="at a bad document; quarantine keeps its bytes; default: %(default)s",
    )  # fmt: skip
    add(
        "--max-bad", type=_share, default=0.001, metavar="SHARE",
        help="more bad ones than this (0.1%%, 0.001) and more than 20 are an error; default: 0.1%%",
    )  # fmt: skip
    add(
        "--shard", type=_shard, default=(0, 1), metavar="I/N",
        help="only the I-th of N stretches, from 0; `boreal data merge --shards` joins them",
    )  # fmt: skip
    add("--tst-bag", type=int, metavar="K", help="also write how many bags of K tokens there are")
    add(
        "--tst-boundaries", choices=("flat", "align", "drop_tail"), default="flat",
        help="where bags end; default: %(default)s",
    )  # fmt: skip


def preprocess_options(args):
    """Returns the arguments of `preprocess` that `preprocess_arguments` asked for."""
    names = "workers engine compare empty id_key on_bad max_bad shard tst_bag tst_boundaries".split()
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
        f"{result['input_bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s, {result['megabytes_per_second']:.2f} MB/s, "
        f"by {engine['name']} {engine['version']} ({engine['reason']})",
    ]
    if result["resumed_parts"]:
        lines.append(f"{result['resumed_parts']} of {result['parts']} parts were done before")
    if result["special_documents"]:
        how = "as text" if result["special"] == "encode" else "as tokens"
        lines.append(
            f"{result['special_documents']:,} documents have special tokens written out, taken {how}: "
            f"{result['prefix']}.special.jsonl"
        )
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

    before = signal.signal(signal.SIGTERM, _interrupt)  # as schedulers stop jobs
    try:
        result = preprocess(
            args.inputs,
            args.tokenizer,
            args.out,
            json_key=args.json_key,
            append_eod=not args.no_append_eod,
            dry_run=args.dry_run,
            **preprocess_options(args),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    _say(args, result, summary)


def _prepare(args):
    from boreal_megatron.data.prepare import prepare
    from boreal_megatron.data.progress import Bar

    bars = {}

    def progress(what, done, total):
        if what not in bars:
            bars[what] = Bar(what, total, unit=" items").__enter__()
        bars[what].update(done - bars[what].done)
        if done >= total:
            bars[what].__exit__(None, None, None)

    def render(result):
        return "\n".join(
            f"{name}: {found['items']:,} items, {found['files']} files, {found['bytes']:,} bytes in {found['folder']}"
            for name, found in result.items()
        )

    _say(args, prepare(_load(args.config), args.epochs, progress), render)


def _blend(args):
    from boreal_megatron.data import blend

    config = _load(args.config)
    value = blend.describe(config, *blend.open_sources(config, tokens=False))
    _say(args, value, blend.render)
    return INPUT if value["problems"] else 0


def _trace(args):
    from boreal_megatron.config.check import data_size
    from boreal_megatron.data.progress import Bar
    from boreal_megatron.data.tokenizer import Tokenizer
    from boreal_megatron.data.trace import render, trace

    config = _load(args.config)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    with Bar("trace", None, unit=" steps") as shown:

        def progress(done, total):
            shown.total = total
            shown.update(done - shown.done)

        found = trace(config, args.step, data_size(config, args.world), tokenizer=tokenizer, progress=progress)
    _say(args, found, lambda found: render(found, args.rank))


def _check(args):
    from boreal_megatron.data.inspect import check, render_check

    result = check(args.prefixes)
    _say(args, result, render_check)
    return INPUT if result["problems"] else 0


def _merge(args):
    from boreal_megatron.data.merge import merge, merge_shards, render

    if bool(args.shards) == bool(args.prefixes and args.out):
        raise BorealError("merge: Expected: either data sets and --out, or --shards alone.", USAGE)
    if args.shards:
        _say(args, merge_shards(args.shards), lambda results: "\n".join(map(render, results)))
    else:
        _say(args, merge(args.prefixes, args.out), render)


def _split(args):
    from boreal_megatron.data.subset import render, split

    shares = {}
    for word in args.into:
        out, _, share = word.rpartition("=")
        try:
            shares[out] = None if share == "rest" else float(share) if "." in share else int(share)
        except ValueError:
            raise BorealError(f"--into {word}: Expected: OUT=0.99, OUT=1000 or OUT=rest.", USAGE) from None
    _say(args, split(args.prefix, shares, args.seed), render)


def _sample(args):
    from boreal_megatron.data.subset import render, sample

    size = {"documents": args.documents, "tokens": args.tokens, "fraction": args.fraction}
    _say(args, sample(args.prefix, args.out, seed=args.seed, **size), render)


def _report(args):
    from boreal_megatron.data.report import render, report
    from boreal_megatron.data.tokenizer import Tokenizer

    result = report(args.prefixes, args.out, Tokenizer.load(args.tokenizer) if args.tokenizer else None)
    _say(args, result, render)
    return INPUT if result["problems"] else 0


def _inspect(args):
    from boreal_megatron.data.inspect import document, inspect, render

    if args.document is None:
        report = inspect(args.prefix, progress=True)
        _say(args, report, render)
        return INPUT if report["problems"] else 0
    from boreal_megatron.data.tokenizer import Tokenizer

    found = document(args.prefix, args.document, Tokenizer.load(args.tokenizer) if args.tokenizer else None)
    _say(args, found, _shown_document)


def _shown_document(found):
    ids = " ".join(map(str, found["ids"])) + (" ..." if found["tokens"] > len(found["ids"]) else "")
    lines = [f"document {found['document']}: {found['tokens']:,} tokens: {ids}"]
    return "\n".join(lines + ([found["text"]] if "text" in found else []))


def _train_tokenizer(args):
    from boreal_megatron.data.tokenize import iter_texts
    from boreal_megatron.data.tokenizer import train_bpe

    made = train_bpe(iter_texts(args.inputs, args.json_key), args.vocab_size, args.out)
    result = {"folder": args.out, "vocab_size": made.vocab_size, "eod": made.eod, "eod_token": made.eod_token}
    line = f"{args.out}/tokenizer.json: {made.vocab_size:,} entries, {made.eod_token} is id {made.eod}"
    _say(args, result, lambda _: line)
