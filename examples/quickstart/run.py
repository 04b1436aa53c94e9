"""From text to a Hugging Face model that writes, on two CPU cores: what `make quickstart` runs.

Every step leaves its result under --out and is skipped when that is there, so an interrupted run goes on where it
was; training goes on from its last checkpoint. With --shuffle-tokens the tokens of every document are put in random
order first: the control that shows how much of the loss is order, not frequency.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

from collect_text import collect  # noqa: E402

from boreal_megatron.data.indexed import IndexedReader, IndexedWriter  # noqa: E402
from boreal_megatron.data.tokenizer import Tokenizer  # noqa: E402
from boreal_megatron.errors import BorealError  # noqa: E402

VOCABULARY = 8192
PROCESSES = 2


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("quickstart-run"))
    p.add_argument("--text", type=Path, help="your own text: a file or a folder")
    p.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    p.add_argument("--shuffle-tokens", action="store_true", help="the control experiment")
    p.add_argument("--set", nargs="*", default=[], metavar="a.b.c=value", help="overrides of the training configuration")
    args = p.parse_args()
    try:
        run(args)
    except BorealError as error:
        sys.exit(f"quickstart: {error}")


def run(args):
    began = time.time()
    out = args.out.resolve()
    same_request(out, args)
    text, data, hf = out / "text", out / "data", out / "hf"

    title("1/7 collecting text")
    if not (text / "valid.jsonl").exists():
        found = collect(text, text=args.text)
        print(json.dumps(found, default=str))

    title("2/7 tokenizer")
    tokenizer = args.tokenizer.resolve() if args.tokenizer else out / "tokenizer"
    if not args.tokenizer and not (tokenizer / "tokenizer.json").exists():
        boreal("data", "train-tokenizer", text / "train.jsonl", "--vocab-size", VOCABULARY, "--out", tokenizer)

    title("3/7 preprocessing")
    for split in ("train", "valid"):
        if not (data / f"{split}_text_document.meta.json").exists():
            boreal("data", "preprocess", text / f"{split}.jsonl", "--tokenizer", tokenizer, "--out", data / split)
    if args.shuffle_tokens:
        data = shuffled(data, out / "data-shuffled")

    title("4/7 training")
    prefix = {split: data / f"{split}_text_document" for split in ("train", "valid")}
    overrides = [
        f"data.tokenizer={tokenizer}",
        f"data.sources.text={prefix['train']}",
        f"data.validation={prefix['valid']}",
        f"checkpoint.folder={out / 'checkpoints'}",
        f"model.vocab_size={Tokenizer.load(tokenizer).vocab_size}",
        *args.set,
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
    command = [*torchrun, "-m", "boreal_megatron", "train", ROOT / "examples/configs/tiny_cpu.yaml", *overrides]
    execute(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    title("5/7 loss curve")
    entropy = unigram_entropy(prefix["valid"])
    from boreal_megatron.train.plot import plot_losses

    plot_losses(out / "checkpoints", out / "loss.png", unigram_entropy=entropy)
    final = last_validation_loss(out / "checkpoints")

    title("6/7 export to Hugging Face")
    boreal("export", out / "checkpoints", hf, "--check")

    title("7/7 sentences")
    prompts = ["def ", "The ", "import "]
    boreal("generate", out / "checkpoints", *(word for p in prompts for word in ("--prompt", p)), "--tokens", 48, "--temperature", 0.6)

    summary = {
        "unigram_entropy_of_validation": round(entropy, 4),
        "final_validation_loss": round(final, 4),
        "nats_under_unigram": round(entropy - final, 4),
        "shuffled_control": args.shuffle_tokens,
        "minutes": round((time.time() - began) / 60, 2),
        "curve": str(out / "loss.png"),
        "model": str(hf),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    title("done")
    for key, value in summary.items():
        print(f"{key:<32}{value}")


def same_request(out, args):
    """Refuse to mix two requests in one folder: its results would be skipped as done."""
    request = {
        "text": str(args.text and args.text.resolve()),
        "tokenizer": str(args.tokenizer and args.tokenizer.resolve()),
        "shuffle_tokens": args.shuffle_tokens,
        "set": args.set,
    }
    note = out / "request.json"
    if note.exists() and json.loads(note.read_text()) != request:
        raise BorealError(
            f"{out} holds a run of {note.read_text().strip()}, asked for is {json.dumps(request)}; "
            "name another folder (make quickstart OUT=...), or remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(request) + "\n")


def shuffled(data, out):
    """The same documents with their tokens in random order; the end-of-document token stays last."""
    if (out / "done").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    rng = np.random.default_rng(7)
    for split in ("train", "valid"):
        reader = IndexedReader(data / f"{split}_text_document")
        writer = IndexedWriter(out / f"{split}_text_document", reader.dtype)
        for number in range(len(reader)):
            document = np.array(reader.document(number))
            rng.shuffle(document[:-1])
            writer.append(document)
        writer.close()
    (out / "done").touch()
    return out


def unigram_entropy(prefix):
    """Entropy of the data's own token frequencies, nats: the best loss of a model that knows no order."""
    reader = IndexedReader(prefix)
    counts = np.bincount(np.concatenate([reader.document(n) for n in range(len(reader))]))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def last_validation_loss(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == "validation"][-1]


def boreal(*words):
    execute([sys.executable, "-m", "boreal_megatron", *words])


def execute(command, env=None):
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=env)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        print("\nfinishing the step and saving; the same command goes on from there", flush=True)
        process.wait()
        code = 130
    if code:
        raise SystemExit(code)


def title(text):
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
