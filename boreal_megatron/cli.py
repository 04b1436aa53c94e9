"""The `boreal` command: parse, call one library function, print.

Nothing heavy is imported before a verb needs it. Exit codes: 0 done, or left on a signal with a
checkpoint; 1 a problem; 130 interrupted. `boreal data` tells apart: 2 usage, 3 bad input, 4 storage, 5 interrupted and
resumable.
"""

import argparse
import gc
import json
import os
import sys

from boreal_megatron.errors import BorealError


def main(argv=None):
    args, more = parser().parse_known_args(argv)
    # argparse takes overrides up to the first option only; those behind it are the configuration's too.
    strange = [word for word in more if word.startswith("-") or not hasattr(args, "config")]
    if strange:
        parser().error(f"unrecognized arguments: {' '.join(strange)}")
    if more:
        args.config += more
    try:
        return args.run(args) or 0
    except BorealError as error:
        say_error(error)
        return error.code
    except KeyboardInterrupt:
        print("boreal: interrupted", file=sys.stderr)
        return 130


def say_error(error):
    """Once a node for a problem met before the run starts, which all its ranks meet; on every rank after that."""
    distributed = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if started or os.environ.get("LOCAL_RANK", "0") == "0":
        where = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
        print(f"boreal{where}: {error}", file=sys.stderr, flush=True)


def parser():
    top = argparse.ArgumentParser(prog="boreal", description="Pretraining of hybrid Gated DeltaNet language models.")
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")

    p = verbs.add_parser("train", help="train, or go on from the last checkpoint; start it with torchrun for several processes")
    config_arguments(p)
    p.add_argument(
        "--resume-drill", type=int, default=0, metavar="N",
        help="first prove that N steps repeat bit for bit after saving and loading",
    )  # fmt: skip
    p.set_defaults(run=train)

    p = verbs.add_parser("doctor", help="what is installed, what each component buys, what is known to be wrong")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=doctor)

    p = verbs.add_parser("preflight", help="prove a launch's machines before its first step; start it as the run itself")
    config_arguments(p)
    p.add_argument("--folder", help="where to try the storage; default: checkpoint.folder")
    silence = "of silence after which a rank counts as hung; default: %(default)s"
    p.add_argument("--timeout", type=float, default=180.0, metavar="SECONDS", help=silence)
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=preflight)

    p = verbs.add_parser("check", help="say everything that is wrong with a configuration")
    config_arguments(p)
    p.add_argument("--world", type=int, help="number of processes the run will have")
    p.add_argument("--dry-run", action="store_true", help="also build the ranks of that world, without its machines")
    p.add_argument("--json", action="store_true", help="what the dry run found, for programs")
    p.set_defaults(run=check)

    from boreal_megatron.data import cli as data_cli
    from boreal_megatron.plan import cli as plan_cli
    from boreal_megatron.profile import cli as profile_cli

    profile_cli.add_parser(verbs)
    plan_cli.add_parser(verbs)
    data_cli.add_parser(verbs)

    from boreal_megatron import checkpoint_tools

    checkpoint_tools.add_parser(verbs)

    p = verbs.add_parser("export", help="write a Hugging Face folder from any layout's checkpoint, without a GPU")
    p.add_argument("checkpoint", help="an iter_* folder, or the folder above it (its latest)")
    p.add_argument("out", help="the folder to write; an earlier export there is replaced")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the written weights")
    p.add_argument("--as", dest="target", metavar="KIND", default="boreal", help="boreal (default), or a model whose mathematics this one shares: qwen3_5")
    p.add_argument("--check", action="store_true", help="prove the folder equal to the trained model; needs memory for the whole model")
    p.add_argument("--tokenizer", metavar="FOLDER", help="insist that the checkpoint's tokenizer is this one")
    p.add_argument("--allow-nan", action="store_true", help="write NaN and infinities instead of refusing")
    p.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint's files with its manifest")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=export)

    p = verbs.add_parser("import", help="make a Hugging Face folder a checkpoint that training goes on from, at any layout")
    p.add_argument("folder", help="what `boreal export` wrote")
    p.add_argument("out", help="where the run's checkpoints will lie; it gets iter_0000000")
    config_arguments(p)
    p.add_argument("--allow-nan", action="store_true", help="take NaN and infinities instead of refusing")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=import_)

    p = verbs.add_parser("generate", help="continue prompts from a training checkpoint")
    p.add_argument("checkpoint", help="an iter_* folder, or the folder above it (its latest)")
    p.add_argument("--prompt", action="append", default=None, help="may be given several times")
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=generate)
    return top


def config_arguments(p):
    p.add_argument("config", nargs="+", help="YAML files, merged left to right, then a.b.c=value overrides")


def load_config(words):
    from boreal_megatron.config.load import load_words

    return load_words(words)


def train(args):
    config = load_config(args.config)
    from boreal_megatron.config.check import check as check_config

    world = int(os.environ.get("WORLD_SIZE", 1))
    check_config(config, world)
    from boreal_megatron.log import quiet

    quiet()
    from boreal_megatron.train.loop import train as run

    from boreal_megatron import parallel

    # Collections walk what is alive; what the imports made stays alive, and a save collects twice while training waits.
    gc.freeze()
    try:
        run(config, world=world, resume_drill=args.resume_drill)
    except BorealError:
        # The threads of process groups that are alive when a process ends can abort it, which hides the exit code.
        # Among several ranks leaving means waiting for the others.
        if world == 1:
            parallel.stop()
        raise
    finally:
        gc.unfreeze()
    parallel.stop()


def check(args):
    from boreal_megatron.config.check import check as check_config

    if args.dry_run and not args.world:
        raise BorealError("--dry-run builds the ranks of a world; say --world N")
    if args.json and not args.dry_run:
        raise BorealError("--json prints what a dry run found; add --dry-run")
    config = load_config(args.config)
    check_config(config, args.world)
    if not args.json:
        more = "" if args.world else " (say --world N to check the layout too)"
        print(f"nothing is wrong with this configuration{more}")
    if not args.dry_run:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch remarks on a process that becomes another rank
    from boreal_megatron.log import bar, quiet

    quiet()
    from boreal_megatron.dry_run import dry_run, table

    with bar("dry run", "classes") as progress:
        found = dry_run(config, args.world, progress)
    print(json.dumps(found, indent=1) if args.json else table(found))


def doctor(args):
    from boreal_megatron.log import quiet

    quiet()
    from boreal_megatron import doctor as look

    rows = look.examine()
    failed = [row for row in rows if row["state"] in look.FAILURES]
    if args.json:
        print(json.dumps({"components": rows, "install": look.install_lines()}, indent=1))
    else:
        print("\n".join([look.table(rows), "", "on a GPU machine:", *look.install_lines()]))
    return int(bool(failed))


def preflight(args):
    config = load_config(args.config)
    from boreal_megatron.log import quiet

    quiet()
    from boreal_megatron import parallel
    from boreal_megatron.preflight import run

    def say(found):
        print(json.dumps(found, indent=1) if args.json else run.text(found), flush=True)

    ok = run.preflight(config, folder=args.folder, patience=args.timeout, say=say)
    parallel.stop()
    return int(not ok)


def export(args):
    from boreal_megatron.log import bar, quiet

    quiet()
    from boreal_megatron.convert.export import export as run

    with bar("exporting", "tensors") as progress:
        found = run(
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            target=args.target,
            tokenizer=args.tokenizer,
            allow_nan=args.allow_nan,
            verify=not args.no_verify,
            prove=args.check,
            progress=progress,
        )
    if args.json:
        print(json.dumps(found))
        return
    print(
        f"wrote {found['folder']} from {found['checkpoint']}: {found['tensors']} tensors, {found['bytes'] / 1e6:,.1f} MB "
        f"in {found['files']} file{'s' if found['files'] != 1 else ''}, {found['dtype']}"
    )
    for note in found["notes"]:
        print(f"note: {note}")
    for tensor, count in found["not_finite"].items():
        print(f"warning: {tensor} has {count:,} numbers that are NaN or infinite")
    if report := found.get("report"):
        layers = max(d["max_difference"] for d in report["measured"].values())
        print(
            f"equal to the trained model over {report['positions']} positions, fp32: largest difference of logits "
            f"{report['max_logit_difference']:.2e}, of step-by-step decoding {report['max_decode_difference']:.2e}, of "
            f"anything {layers:.2e}; {report['generation']['equal_tokens']} generated ids equal (export_report.md)"
        )


def import_(args):
    config = load_config(args.config)
    from boreal_megatron.log import bar, quiet

    quiet()
    from boreal_megatron.convert.importer import import_hf

    with bar("importing", "tensors") as progress:
        found = import_hf(args.folder, args.out, config, allow_nan=args.allow_nan, progress=progress)
    if args.json:
        print(json.dumps(found))
        return
    print(f"wrote {found['checkpoint']} from {args.folder}: {found['tensors']} tensors, {found['bytes'] / 1e6:,.1f} MB")
    for tensor, count in found["not_finite"].items():
        print(f"warning: {tensor} has {count:,} numbers that are NaN or infinite")
    print(f"go on with: boreal train {' '.join(args.config)} checkpoint.folder={args.out}")


def generate(args):
    from boreal_megatron.log import quiet

    quiet()
    from boreal_megatron.generate import generate as run

    texts = run(
        args.checkpoint, args.prompt or [""], max_new_tokens=args.tokens, temperature=args.temperature, seed=args.seed
    )
    if args.json:
        print(json.dumps(texts))
    else:
        print("\n---\n".join(texts))


if __name__ == "__main__":
    sys.exit(main())
