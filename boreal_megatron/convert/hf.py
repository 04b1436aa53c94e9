"""Writes a Hugging Face folder from training tensors, and builds the same model in memory.

The folder holds config.json, generation_config.json, numbered safetensors with their index, the Python files that
`trust_remote_code` needs, and the tokenizer. It appears under its name only once it is complete.
"""

import contextlib
import json
import re
import shutil
from math import prod
from pathlib import Path

import torch

from boreal_megatron.convert import hf_code, shards
from boreal_megatron.convert.hf_config import hf_config_dict
from boreal_megatron.convert.mapping import keeps_fp32, to_hf
from boreal_megatron.convert.reader import ahead
from boreal_megatron.convert.targets import TARGETS
from boreal_megatron.durable import flush
from boreal_megatron.data.tokenizer import TOKENIZER_FILES
from boreal_megatron.errors import BorealError

TOKENIZER_CORES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them makes a tokenizer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPORT = ("export_report.json", "export_report.md")
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MAX_SHARD_BYTES = 5_000_000_000
AHEAD = 400_000_000  # bytes of tensors in memory, unless a single one exceeds it
WRITER = "boreal export"  # in the index, so that no other model's folder is taken for one that may be replaced


def write_hf(folder, model, get, **options):
    """Writes an export that `from_pretrained(folder, trust_remote_code=True)` loads without this package: `fill` inside
    `being_written`."""
    with being_written(folder) as unfinished:
        return fill(unfinished, model, get, **options)


@contextlib.contextmanager
def being_written(folder):
    """Gives an empty hidden folder beside `folder`, which gets that name if all goes well and is removed otherwise.

    An earlier export of that name is replaced at the end; anything else is refused.
    """
    folder = Path(folder).absolute()
    unfinished, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "replaced"))
    with shards.errors_of_writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)  # killed between the two renames below
        _check_replaceable(folder)
        for left in (unfinished, replaced):  # by a killed export
            if left.exists():
                shutil.rmtree(left)
        unfinished.mkdir()
    try:
        yield unfinished
        with shards.errors_of_writing(folder):
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            flush(folder.parent)
            if replaced.exists():
                shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def fill(
    folder, model, get, *, tokenizer_folder, dtype, eos_token_id, target="boreal", allow_nan=False,
    max_shard_bytes=MAX_SHARD_BYTES, progress=None,
):  # fmt: skip
    """Writes all files of an export into an empty folder.

    In memory are `AHEAD` bytes of training tensors or a single larger one, with a copy of what is regrouped.

    Args:
        folder: an empty folder.
        model: `schema.Model`.
        get: training name -> full tensor; called once for each name, in the order of the network.
        tokenizer_folder: where tokenizer.json and its companions lie.
        dtype: "fp32" or "bf16"; the few tensors of `mapping.keeps_fp32` stay FP32 in both.
        eos_token_id: one id or a list of ids.
        target: a name of `targets.TARGETS`.
        allow_nan: write NaN and infinities as they are.
        max_shard_bytes: upper bound of one weight file, unless a single tensor exceeds it.
        progress: called with (tensors written, tensors in all), or None.

    Returns:
        dict: tensors, bytes (of weight files), files, not_finite (name -> count of NaN and infinities).

    Raises:
        BorealError: no tokenizer, no space, a tensor of an unexpected shape, numbers that are not finite.
    """
    target = TARGETS[target]
    config = target.config_dict(model, eos_token_id=eos_token_id, dtype=dtype)
    tokenizer = _tokenizer_files(Path(tokenizer_folder))
    rules = target.rules(model)
    plan = planned(rules, dtype, max_shard_bytes)
    size = sum(plan.sizes.values())
    needed, free = size + sum(f.stat().st_size for f in tokenizer) + 10_000_000, shutil.disk_usage(folder).free
    if free < needed:
        raise BorealError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, the export takes {needed / 1e9:.2f} GB; "
            "free some space, choose another disk, or --dtype bf16"
        )
    strange = shards.write(folder, plan, _stream(rules, get), progress)
    if strange and not allow_nan:
        raise BorealError(_not_finite(strange))
    with shards.errors_of_writing(folder):
        index = {**plan.index, "metadata": {**plan.index["metadata"], "writer": WRITER}}
        _write_json(folder / shards.INDEX, index)
        _write_json(folder / "generation_config.json", _generation_config(eos_token_id))
        for file in (*tokenizer, *(Path(hf_code.__path__[0]) / name for name in target.code_files)):
            shutil.copyfile(file, folder / file.name)
        _write_json(folder / "config.json", config)
        for path in (*(f for f in folder.iterdir() if f.name not in plan.sizes), folder):
            flush(path)
    return {"tensors": len(plan.places), "bytes": size, "files": len(plan.sizes), "not_finite": strange}


def planned(rules, dtype, max_shard_bytes):
    """The `shards.Plan` of an export."""
    entries = [
        (name, shape, torch.float32 if keeps_fp32(name) else DTYPES[dtype])
        for rule in rules
        for name, shape in rule.hf_shapes().items()
    ]
    return shards.Plan(entries, max_shard_bytes)


def build_hf(model, get, eos_token_id):
    """The Hugging Face model in memory, in eval mode, holding copies of the training tensors.

    Args:
        model: `schema.Model`.
        get: training name -> full tensor; dtype and device are kept, except for what `mapping.keeps_fp32` names.
        eos_token_id: one id or a list of ids.

    Returns:
        `BorealForCausalLM`.
    """
    # transformers takes seconds to import, and only this function needs it.
    from transformers import GenerationConfig

    from boreal_megatron.convert.hf_code.modeling_boreal import BorealConfig, BorealForCausalLM

    state = {}
    for name, tensor in to_hf(model, get):
        if not name.startswith("mtp."):
            dtype = torch.float32 if keeps_fp32(name) else tensor.dtype
            state[name] = tensor.detach().to(dtype, copy=True).contiguous()
    config = hf_config_dict(model, eos_token_id=eos_token_id, dtype="fp32")
    config["dtype"] = str(state["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    with torch.device("meta"):
        decoder = BorealForCausalLM(BorealConfig(**config))
    if model.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    decoder.load_state_dict(state, assign=True)
    decoder.tie_weights()
    decoder.generation_config = GenerationConfig(**_generation_config(eos_token_id))
    return decoder.eval()


def _stream(rules, get):
    """(name, tensor) in the order of the rules; nothing here may hold a tensor while the next is read."""
    sizes = [4 * sum(prod(shape) for shape in rule.train.values()) for rule in rules]
    for pairs in ahead(lambda number: rules[number].to_hf(get), sizes, AHEAD):
        while pairs:
            yield pairs.pop(0)
        del pairs


def _not_finite(strange, shown=20):
    lines = [f"{name}: {count:,}" for name, count in list(strange.items())[:shown]]
    more = [f"... and {len(strange) - shown} more tensors"] if len(strange) > shown else []
    listed = "\n".join(f"  - {line}" for line in lines + more)
    return (
        f"NaN or infinite numbers in {len(strange)} tensors; expected none. Export an earlier checkpoint, or add "
        f"--allow-nan to look into this one\n{listed}"
    )


def _generation_config(eos_token_id):
    first = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    return {"eos_token_id": eos_token_id, "pad_token_id": first}


def _tokenizer_files(folder):
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in TOKENIZER_CORES for file in files):
        raise BorealError(
            f"tokenizer folder {folder}: found none of {', '.join(TOKENIZER_CORES)}; expected the folder of a "
            "Hugging Face tokenizer; pass the one the data was tokenized with"
        )
    return files


def _check_replaceable(folder):
    """Accepts a free name, an empty folder or an earlier export."""
    if not folder.exists():
        return
    ours = {"config.json", "generation_config.json", shards.INDEX, "__pycache__", *TOKENIZER_FILES, *REPORT}
    ours |= {name for target in TARGETS.values() for name in target.code_files}
    there = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    foreign = sorted(name for name in there if name not in ours and not SHARD.fullmatch(name))
    if folder.is_dir() and not foreign and (not there or _is_export(folder)):
        return
    found = f" ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''})" if foreign else ""
    raise BorealError(f"{folder}: found something that is not an export{found}; expected a free name; choose another folder")


def _is_export(folder):
    try:
        return json.loads((folder / shards.INDEX).read_text())["metadata"]["writer"] == WRITER
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2) + "\n")
