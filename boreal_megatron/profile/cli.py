"""`boreal profile`: parse, run a few steps on all ranks, print on the first; or compare what two runs of it wrote."""

import contextlib
import json
import os
from pathlib import Path

from boreal_megatron.errors import BorealError


def add_parser(verbs):
    p = verbs.add_parser("profile", help="where a step's time goes: a few real steps, under torchrun or alone")
    p.add_argument(
        "config",
        nargs="+",
        help="YAML files and a.b.c=value overrides; or, with --compare, a profile's folder: then nothing is run",
    )
    p.add_argument("--steps", type=int, default=3, help="timed steps")
    p.add_argument("--warmup", type=int, default=2, help="steps before them")
    p.add_argument("--phase", metavar="NAME", help="the phase to train in (default: the first)")
    p.add_argument("--out", default="profile", help="the folder to write; an earlier profile there is replaced")
    p.add_argument("--compare", metavar="OTHER", help="an earlier profile's folder: what got slower since")
    p.add_argument("--json", action="store_true", help="the summary, for programs")
    p.set_defaults(run=run)


def run(args):
    from boreal_megatron.profile.compare import compare, load, render

    if args.compare and Path(args.config[0]).is_dir():
        summary = load(args.config[0])
        summary["comparison"] = compare(summary, load(args.compare))
        print(json.dumps(summary) if args.json else render(summary))
        return
    from boreal_megatron.cli import load_config
    from boreal_megatron.log import bar, quiet

    config, world = load_config(args.config), int(os.environ.get("WORLD_SIZE", 1))
    # The profiler remarks on a missing GPU, on its own starting and on blocks older than itself.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    quiet()
    from boreal_megatron import parallel
    from boreal_megatron.profile.run import profile

    first = os.environ.get("RANK", "0") == "0"
    try:
        with bar("profiling", "steps") if first else contextlib.nullcontext(lambda done, total: None) as progress:
            summary = profile(
                config,
                world=world,
                out=args.out,
                steps=args.steps,
                warmup=args.warmup,
                phase=args.phase,
                baseline=args.compare,
                progress=progress,
            )
    except BorealError:
        if world == 1:  # as in `boreal train`
            parallel.stop()
        raise
    if summary is not None:
        look = f"{args.out}: open report.html, and trace.json.gz at ui.perfetto.dev"
        print(json.dumps(summary) if args.json else f"{render(summary)}\n{look}")
    parallel.stop()
