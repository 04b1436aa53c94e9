"""Proves an exported folder equal to the training model: layer by layer, in cached decoding and in generation.

    python -m boreal_megatron.convert.check CHECKPOINT FOLDER fp32|bf16 TARGET

compares and leaves export_report.json and export_report.md in the folder. The folder is loaded as anyone would load it,
through `AutoModelForCausalLM`; the training model is built in one process from the checkpoint; both compute in FP32.
Where the folder's weights are bf16 the training model's are rounded the same way first, so that the tolerance stays
tight. Memory: the whole model in FP32, one side after the other.
"""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from boreal_megatron.convert.hf import REPORT
from boreal_megatron.convert.mapping import keeps_fp32
from boreal_megatron.convert.targets import TARGETS
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.errors import BorealError
from boreal_megatron.train import store

TOLERANCE = 1e-4  # of the largest number on either side; only the order of sums differs
POSITIONS, PROMPT, NEW_TOKENS = 192, 32, 16
JSON, TEXT = REPORT


def prove(path, folder, dtype, target, keep):
    """Compare in a fresh process.

    Args:
        path: an iter_* folder.
        folder: the written export; the report goes there.
        dtype: of the written weights.
        target: the name of what it was exported as.
        keep: where the folder is kept for inspection if the two do not agree.

    Returns:
        the report, as a dict.

    Raises:
        BorealError: they compute different things, or the comparison itself failed.
    """
    with tempfile.TemporaryDirectory() as modules:  # no copy of another export's code
        command = [sys.executable, "-m", "boreal_megatron.convert.check", str(path), str(folder), dtype, target]
        mine = {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}  # the comparison is a world of its own
        env = {key: value for key, value in os.environ.items() if key not in launched} | mine
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BorealError(f"the export could not be compared (exit {done.returncode}):\n{done.stdout[-3000:]}")
    report = json.loads((folder / JSON).read_text())
    if not report["agrees"]:
        shutil.rmtree(keep, ignore_errors=True)
        folder.rename(keep)
        raise BorealError(
            f"the exported model does not compute what the trained one does: {'; '.join(report['disagreements'])}. "
            f"The folder is kept as {keep}, with its report {TEXT}; do not use it"
        )
    return report


def compare(path, folder, dtype, target):
    """The report, without the versions and the checkpoint's identity."""
    config = store.saved_config(path)
    words = Tokenizer.load(folder)
    room = config.model.max_positions - NEW_TOKENS
    ids = torch.randint(0, words.vocab_size, (min(POSITIONS, room),), generator=torch.Generator().manual_seed(20))
    with torch.no_grad():
        rules = TARGETS[target].rules(config.model) if dtype == "bf16" else None
        ours = _of_training(path, config, ids, words.eod, rules)
        gc.collect()
        theirs = _of_folder(folder, ids)
    layers = {name: _difference(ours["layers"][name], theirs["layers"][name]) for name in ours["layers"]}
    logits, decoding = (_difference(ours["logits"], theirs[what]) for what in ("logits", "decoded"))
    generation = _same_text(ours, theirs)
    measured = {**layers, "logits": logits, "cached decoding": decoding}
    disagreements = [
        f"{name} differs by {d['max_difference']:.2e}, allowed {d['allowed']:.2e}"
        for name, d in measured.items()
        if not d["max_difference"] <= d["allowed"]  # NaN is not
    ]
    if not generation["agrees"]:
        disagreements.append(f"greedy generation differs at token {generation['equal_tokens'] + 1}")
    return {
        "agrees": not disagreements,
        "disagreements": disagreements,
        "dtype": dtype,
        "positions": len(ids),
        "max_logit_difference": logits["max_difference"],
        "max_decode_difference": decoding["max_difference"],
        "measured": measured,
        "generation": generation,
    }


def _of_training(path, config, ids, end, rounded_by):
    """The training model's side: {"layers": {name: [s, h]}, "logits": [s, v], "generated": ids,
    "choices": [v] of every generated id}, all FP32.
    With rules, weights are rounded as an export by them rounds."""
    from boreal_megatron import parallel
    from boreal_megatron.config.schema import Parallel, Precision
    from boreal_megatron.data import batch
    from boreal_megatron.model import boreal
    from boreal_megatron.train import checkpoint

    alone = config.plain(parallel=Parallel(), precision=Precision(compute="fp32"))
    mesh = parallel.start(alone.parallel, alone.seed)
    model = boreal.build(alone, mesh)[0].eval()
    checkpoint.load_weights(path, alone, model, mesh)
    if rounded_by:
        _round(model, rounded_by)
    half_blocks = model.decoder.layers
    places = {"embedding": model.embedding}
    places |= {f"layer {n}": half_blocks[2 * n + 1] for n in range(len(half_blocks) // 2)}

    def logits(tokens):
        found = model.logits(batch.of_tokens(tokens, mesh.device)).float().cpu()
        return found[:, : config.model.vocab_size]

    layers = {}
    hooks = _record(places, layers, lambda hidden: hidden[:, 0])  # [s, b, h]
    out = {"logits": logits(ids), "layers": layers}
    for hook in hooks:
        hook.remove()
    tokens, choices, generated = ids[:PROMPT], [], []
    while len(generated) < NEW_TOKENS and end not in generated:
        choices.append(logits(tokens)[-1])
        generated.append(int(choices[-1].argmax()))
        tokens = torch.cat((tokens, torch.tensor(generated[-1:])))
    parallel.stop()
    return out | {"generated": generated, "choices": choices}


def _round(model, rules):
    """Every weight as it comes back from a bf16 folder."""
    alone = {name: rule for rule in rules for name in rule.train if len(rule.hf) == 1 and rule.index is None}
    for name, weight in model.named_parameters():
        rule = alone.get(name)
        if rule is None:  # rows that are regrouped keep their values
            weight.copy_(weight.bfloat16())
        elif not keeps_fp32(rule.hf[0]):
            (there,) = rule.forward(weight)
            (back,) = rule.inverse(there.bfloat16())
            weight.copy_(back)


def _of_folder(folder, ids):
    """The folder's side: as above, and "decoded", the logits of feeding one token at a time through the cache."""
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    body, layers = decoder.get_decoder(), {}
    places = {"embedding": body.embed_tokens, **{f"layer {n}": layer for n, layer in enumerate(body.layers)}}
    hooks = _record(places, layers, lambda hidden: hidden[0])  # [b, s, h]
    logits = decoder(ids[None]).logits[0].float()
    for hook in hooks:
        hook.remove()
    decoded, cache = [], None
    for position in range(len(ids)):
        result = decoder(ids[None, position : position + 1], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        decoded.append(result.logits[0, 0].float())
    prompt = ids[None, :PROMPT]
    generated = decoder.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return {
        "layers": layers,
        "logits": logits,
        "decoded": torch.stack(decoded),
        "generated": generated[0, prompt.shape[1] :].tolist(),
    }


def _record(places, into, row):
    """Hooks that keep each module's output (the first, of several) as [s, h] FP32 on the CPU."""

    def keep(name):
        def hook(module, arguments, output):
            output = output[0] if isinstance(output, tuple) else output
            into[name] = row(output).detach().float().cpu().clone()

        return hook

    return [module.register_forward_hook(keep(name)) for name, module in places.items()]


def _difference(ours, theirs):
    largest = max(float(ours.abs().max()), float(theirs.abs().max()))
    return {
        "max_difference": float((ours - theirs).abs().max()),
        "largest": largest,
        "allowed": TOLERANCE * largest,
    }


def _same_text(ours, theirs):
    """Whether greedy decoding gives equal ids, up to a tie: two ids whose logits are closer than the tolerance."""
    a, b = ours["generated"], theirs["generated"]
    equal = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    found = {"agrees": True, "tokens": len(a), "equal_tokens": equal, "tie": False, "ids": a}
    if a != b:
        found["agrees"] = False
        if equal < min(len(a), len(b)):
            logits = ours["choices"][equal]
            gap = float(logits[a[equal]] - logits[b[equal]])
            found["tie"] = found["agrees"] = gap <= TOLERANCE * float(logits.abs().max())
    return found


def describe(path):
    """Which checkpoint and which software; nothing of the machine."""
    said = store.describe(path)
    packages = ("boreal-megatron", "torch", "megatron-core", "transformers", "safetensors")
    versions = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    manifest = hashlib.sha256((Path(path) / store.MANIFEST).read_bytes()).hexdigest()
    return {"checkpoint": {"step": said["state"]["step"], "manifest_sha256": manifest}, "versions": versions}


def text(report):
    """The report for people, in Markdown."""
    origin, generation = report["checkpoint"], report["generation"]
    reference = "rounded to bf16 as the folder's are, computed in FP32" if report["dtype"] == "bf16" else "FP32"
    same = f"{generation['equal_tokens']} of {generation['tokens']} ids equal"
    tie = "; the next is a tie within the tolerance" if generation["tie"] else ""
    lines = [
        "# Comparison of this export with the training model",
        "",
        f"{'They agree.' if report['agrees'] else 'THEY DISAGREE: ' + '; '.join(report['disagreements'])}",
        "",
        f"- checkpoint: step {origin['step']}, manifest SHA-256 `{origin['manifest_sha256']}`",
        f"- exported as {report['target']}; weights: {report['dtype']}; the training model's: {reference}",
        f"- {report['positions']} random positions; allowed is {TOLERANCE:.0e} of the largest number",
        f"- greedy generation with a cache, after {PROMPT} positions: {same}{tie}",
        f"- {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        "",
        "| after | largest difference | allowed | largest number |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {d['max_difference']:.2e} | {d['allowed']:.2e} | {d['largest']:.3g} |"
        for name, d in report["measured"].items()
    ]
    return "\n".join(lines) + "\n"


def main(path, folder, dtype, target):
    folder = Path(folder)
    report = {"target": target, **compare(path, folder, dtype, target), **describe(path)}
    (folder / JSON).write_text(json.dumps(report, indent=1) + "\n")
    (folder / TEXT).write_text(text(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
