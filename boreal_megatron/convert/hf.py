"""Writes a Hugging Face folder from training tensors, and builds the same model in memory.

The folder holds config.json, generation_config.json, numbered safetensors with their index, the two Python files that
`trust_remote_code` needs, and the tokenizer. It appears under its name only once it is complete.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from boreal_megatron.convert import hf_code
from boreal_megatron.convert.hf_config import hf_config_dict
from boreal_megatron.convert.mapping import keeps_fp32, mapping, to_hf
from boreal_megatron.data.tokenizer import TOKENIZER_FILES
from boreal_megatron.errors import BorealError

INDEX = "model.safetensors.index.json"
CODE_FILES = ("configuration_boreal.py", "modeling_boreal.py")
TOKENIZER_CORES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them makes a tokenizer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_hf(
    folder, model, get, *, tokenizer_folder, dtype, eos_token_id, max_shard_bytes=5_000_000_000, progress=None
):
    """Writes an export that `from_pretrained(folder, trust_remote_code=True)` loads without this package.

    Args:
        folder: where it goes; an earlier export there is replaced, anything else is refused.
        model: `schema.Model`.
        get: training name -> full tensor; called once for each name, in the order of the network.
        tokenizer_folder: where tokenizer.json and its companions lie.
        dtype: "fp32" or "bf16"; the few tensors of `mapping.keeps_fp32` stay FP32 in both.
        eos_token_id: one id or a list of ids.
        max_shard_bytes: upper bound of one weight file, unless a single tensor exceeds it.
        progress: called with (tensors written, tensors in all), or None.

    Raises:
        BorealError: the folder is taken, the tokenizer is missing, or a tensor has an unexpected shape.
    """
    folder = Path(folder)
    config = hf_config_dict(model, eos_token_id=eos_token_id, dtype=dtype)
    tokenizer = _tokenizer_files(Path(tokenizer_folder))
    _check_replaceable(folder)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)  # what an interrupted export left
    unfinished.mkdir()
    try:
        _write_weights(unfinished, model, get, DTYPES[dtype], max_shard_bytes, progress)
        _write_json(unfinished / "config.json", config)
        _write_json(unfinished / "generation_config.json", _generation_config(eos_token_id))
        for file in (*tokenizer, *(Path(hf_code.__path__[0]) / name for name in CODE_FILES)):
            shutil.copyfile(file, unfinished / file.name)
        _put_in_place(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


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


def _write_weights(folder, model, get, dtype, max_shard_bytes, progress):
    """Writes tensors into numbered files as they come; the count in the names is known, and put, at the end."""
    total = sum(len(rule.hf) for rule in mapping(model))
    shards = []  # names in each written file
    pending, pending_bytes, all_bytes = {}, 0, 0

    def flush():
        shards.append(list(pending))
        save_file(pending, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        pending.clear()

    for count, (name, tensor) in enumerate(to_hf(model, get), 1):
        kind = torch.float32 if keeps_fp32(name) else dtype
        tensor = tensor.detach().to("cpu", kind, copy=True).contiguous()  # a copy: parts of one tensor share memory
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        all_bytes += tensor.nbytes
        if progress:
            progress(count, total)
    flush()

    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": all_bytes}, "weight_map": weight_map})


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
    if folder.is_dir() and (not any(folder.iterdir()) or _is_export(folder)):
        return
    raise BorealError(f"{folder}: found something that is not an export; expected a free name; choose another folder")


def _is_export(folder):
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "boreal" and (folder / INDEX).is_file()


def _put_in_place(unfinished, folder):
    """Renames the finished folder to its name; an earlier export steps aside first and goes last."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    if replaced.exists():
        shutil.rmtree(replaced)


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2) + "\n")
