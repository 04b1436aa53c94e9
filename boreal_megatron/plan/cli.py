"""The `boreal plan` verbs: what a run needs and costs, from its description alone. No torch."""

import json
import os

from boreal_megatron.errors import BorealError

SEQUENCES = (4096, 8192, 32_768, 131_072, 262_144)


def add_parser(verbs):
    p = verbs.add_parser("plan", help="know before you launch")
    plans = p.add_subparsers(required=True, metavar="WHAT")

    p = plans.add_parser("params", help="exact parameter counts per component")
    model_arguments(p)
    p.set_defaults(run=plan_params)

    p = plans.add_parser("flops", help="model FLOPs of a position and a raw token, per component")
    model_arguments(p)
    p.add_argument(
        "--sequence",
        type=positive,
        nargs="+",
        metavar="POSITIONS",
        help="window lengths (default: usual ones that the network takes)",
    )
    p.add_argument("--bag", type=positive, default=1, metavar="K", help="raw tokens that a position stands for")
    p.set_defaults(run=plan_flops)

    p = plans.add_parser("layouts", help="every layout on so many GPUs, ranked by predicted step time, with reasons")
    p.add_argument(
        "config", nargs="+", metavar="PRESET|CONFIG", help="a preset, or YAML files and a.b.c=value overrides"
    )
    answer_arguments(p)
    p.add_argument("--gpus", type=positive, required=True)
    p.add_argument("--gpu", default="h100", metavar="KIND", help="of the table of GPUs (default: h100)")
    p.add_argument(
        "--sequence", type=positive, default=8192, metavar="POSITIONS", help="window of a preset (default: 8192)"
    )
    p.add_argument(
        "--step",
        type=positive,
        default=4_194_304,
        metavar="POSITIONS",
        help="positions a step of a preset (default: 4194304)",
    )
    p.add_argument("--raw-tokens", type=count, default=10**12, metavar="N", help="of a preset's run (default: 1e12)")
    p.add_argument(
        "--bag", type=positive, default=4, metavar="K", help="bags to compare a run without any with (default: 4)"
    )
    p.add_argument("--phase", nargs="+", metavar="NAME", help="phases of a file that count (default: all)")
    p.add_argument("--top", type=positive, default=5, help="layouts to show (default: 5)")
    p.add_argument("--hardware", metavar="FILE", help="YAML with GPUs and rates over the own table")
    p.add_argument("--out", metavar="FILE", help="write the first one's overlay")
    p.set_defaults(run=plan_layouts)

    p = plans.add_parser("calibrate", help="fit the predicted step time to a run, and say the error before and after")
    p.add_argument("folder", metavar="RUN", help="a run's checkpoint folder")
    p.add_argument("--gpu", required=True, metavar="KIND", help="what it ran on, of the table of GPUs")
    p.add_argument("--hardware", metavar="FILE", help="YAML with GPUs and rates over the own table")
    p.add_argument("--out", metavar="FILE", help="write the factors, for --hardware of `plan layouts`")
    answer_arguments(p)
    p.set_defaults(run=plan_calibrate)

    p = plans.add_parser("memory", help="bytes of every rank: weights, gradients, optimizer, activations")
    p.add_argument("config", nargs="+", help="YAML files, merged left to right, then a.b.c=value overrides")
    p.add_argument("--world", type=positive, required=True, metavar="N", help="number of GPUs")
    p.add_argument("--gpu", default="h100", metavar="NAME", help="default: h100; others: h200, those of --hardware")
    p.add_argument("--hardware", metavar="FILE", help="a YAML file with more GPUs, see plan/hardware.yaml")
    p.add_argument(
        "--imbalance", type=at_least_one, metavar="Q", help="load of the busiest rank's experts over the mean"
    )
    answer_arguments(p)
    p.set_defaults(run=plan_memory)

    p = plans.add_parser("cache", help="bytes that decoding keeps of a context, beside a network of attention only")
    model_arguments(p)
    p.add_argument(
        "--context", type=positive, nargs="+", metavar="POSITIONS", help="default: usual ones that the network takes"
    )
    p.add_argument("--batch", type=positive, default=1, help="sequences")
    p.add_argument("--dtype", default="bf16", help="of keys and values: bf16, fp8 or fp32")
    p.set_defaults(run=plan_cache)


def model_arguments(p):
    p.add_argument("model", help="a preset, or a configuration file")
    answer_arguments(p)


def answer_arguments(p):
    p.add_argument("--json", action="store_true")
    p.add_argument("--explain", action="store_true", help="what is counted, and how")


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def count(text):
    """A whole number that may be written 15e12."""
    number = float(text)
    if number < 1 or number != int(number):
        raise ValueError(text)
    return int(number)


def at_least_one(text):
    number = float(text)
    if not number >= 1:
        raise ValueError(text)
    return number


def model_of(word):
    """The network that a preset's name or a configuration file describes."""
    from boreal_megatron.config.load import load, resolve_preset, validate
    from boreal_megatron.config.presets import PRESETS
    from boreal_megatron.config.schema import Model

    if word in PRESETS:
        return validate(Model, resolve_preset({"preset": word}), word)
    if not os.path.exists(word):
        raise BorealError(f"{word!r} is neither a file nor a preset; presets: {', '.join(PRESETS)}")
    return load([word]).model


def say(args, found, text, explanation):
    """One answer: JSON for programs, a table for people; the explanation under either."""
    if args.json:
        print(json.dumps(found | ({"explain": explanation} if args.explain else {}), indent=1))
    else:
        print("\n\n".join([text, explanation] if args.explain else [text]))


def write(path, text):
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BorealError(f"--out {path} cannot be written: {error.strerror}; choose another file") from error


def plan_params(args):
    from boreal_megatron.plan import params

    counts = params.count(model_of(args.model))
    claims = params.card_claims(args.model, counts)
    found = {"model": args.model, **counts, "card": claims}
    say(args, found, "\n".join([params.table(counts), *claims]), params.EXPLAIN)


def plan_flops(args):
    from boreal_megatron.plan import flops

    model = model_of(args.model)
    sequences = args.sequence or [n for n in SEQUENCES if n <= model.max_positions]
    rows = flops.report(model, sequences, args.bag)
    say(args, {"model": args.model, "sequences": rows}, flops.table(rows), flops.EXPLAIN)


def plan_layouts(args):
    from boreal_megatron.plan import hardware, layouts, report

    gpu = hardware.gpu(args.gpu, args.hardware)
    config = run_of(args)
    counted, bag = layouts.named(config, args.phase), args.bag if preset(args.config) else None
    found = layouts.search(config, args.gpus, gpu, args.top, args.phase)
    answer = {"config": args.config, "gpu": args.gpu, **report.report(found, counted, args.gpus, gpu, bag)}
    if args.out:
        words = ["boreal plan layouts", *args.config, f"--gpus {args.gpus} --gpu {args.gpu}"]
        words += ["--phase", *args.phase] if args.phase else []
        words += [f"--sequence {args.sequence} --step {args.step}"] if preset(args.config) else []
        write(args.out, report.overlay(answer, " ".join(words)))
    say(args, answer, report.table(answer), report.explanation(answer, gpu))


def plan_calibrate(args):
    from boreal_megatron.plan import calibrate, hardware

    found = calibrate.calibrate(args.folder, hardware.gpu(args.gpu, args.hardware))
    if args.out:
        first = f"# boreal plan calibrate {args.folder} --gpu {args.gpu}\n"
        write(args.out, first + hardware.with_factors(args.gpu, found["factors"], args.hardware))
    say(args, {"run": args.folder, "gpu": args.gpu, **found}, calibrate.table(found), calibrate.EXPLAIN)


def preset(words):
    """The preset that the words of a command name instead of files, or None."""
    from boreal_megatron.config.presets import PRESETS

    return words[0] if words[0] in PRESETS else None


def run_of(args):
    """The Config of files and overrides, or one of a single phase around a preset."""
    from boreal_megatron.config.load import load, parse

    name = preset(args.config)
    if name is None:
        model_of(args.config[0])  # says which presets there are
        return load([w for w in args.config if "=" not in w], [w for w in args.config if "=" in w])
    phase = {
        "name": "run",
        "until_raw_tokens": args.raw_tokens,
        "sequence": args.sequence,
        "positions_per_step": args.step,
    }
    plain = {"tokenizer": "data/tokenizer", "sources": {"web": "data/web_text_document"}}
    return parse(
        {
            "model": {"preset": name},
            "phases": [phase],
            "schedule": {"peak": 1e-3},
            "data": plain,
            "checkpoint": {"folder": "run"},
        },
        name,
        [w for w in args.config[1:] if "=" in w],
    )


def plan_memory(args):
    from boreal_megatron.config.load import load_words
    from boreal_megatron.plan import fit, hardware, memory

    gpu = hardware.gpu(args.gpu, args.hardware)
    found = fit.answer(load_words(args.config), args.world, gpu, args.gpu, args.imbalance or memory.IMBALANCE)
    say(args, found, fit.table(found), memory.EXPLAIN)
    return 0 if found["fits"] else 1


def plan_cache(args):
    from boreal_megatron.plan import cache

    model = model_of(args.model)
    contexts = args.context or [n for n in SEQUENCES if n <= model.max_positions]
    rows = [cache.count(model, context, args.batch, args.dtype) for context in contexts]
    say(args, {"model": args.model, "contexts": rows}, cache.table(rows), cache.EXPLAIN)
