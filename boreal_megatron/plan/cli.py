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


def model_arguments(p):
    p.add_argument("model", help="a preset, or a configuration file")
    p.add_argument("--json", action="store_true")
    p.add_argument("--explain", action="store_true", help="what is counted, and how")


def positive(text):
    number = int(text)
    if number < 1:
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
