"""From a Hugging Face folder to a checkpoint that training goes on from, at any layout: the exact inverse of an export.

Names and shapes are looked through before anything is written; tensors then stream, one at a time, in the dtype on
file. The checkpoint holds weights alone: step 0, and a fresh optimizer.
"""

import json
from pathlib import Path

from boreal_megatron.config.pattern import expand
from boreal_megatron.convert import shards, writer
from boreal_megatron.convert.export import audit_tensors, audit_tokenizer, shortened
from boreal_megatron.convert.hf_config import model_from_hf
from boreal_megatron.convert.mapping import from_hf, mapping
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.train import store

SHAPE_NO_TENSOR = {"init_std", "max_positions"}  # the run decides


def import_hf(folder, out, config, *, allow_nan=False, progress=None):
    """Write OUT/iter_0000000.

    Args:
        folder: a Hugging Face folder of `model_type` "boreal".
        out: where checkpoints go; `boreal train ... checkpoint.folder=OUT` goes on from there.
        config: `schema.Config` of the run that is to go on; its network and tokenizer have to be the folder's.
        allow_nan: take NaN and infinities as they are.
        progress: called with (tensors read, tensors in all), or None.

    Returns:
        dict: checkpoint, tensors, bytes, not_finite (Hugging Face name -> count of NaN and infinities).

    Raises:
        BorealError: another network ("wrong preset") or tokenizer, tensors that are missing, extra or misshapen, NaN,
            checkpoints in OUT already, no space.
    """
    from boreal_megatron.train.state import State  # with megatron-core, which takes seconds

    shards.large_pages()
    folder, out = Path(folder), Path(out)
    model = described(folder)
    check_same_network(folder, model, config.model)
    _check_tokenizer(folder, config)
    if there := store.checkpoints(out):
        raise BorealError(f"{out} holds {there[-1].name} already; an import begins a run: choose another folder")
    reader = shards.Reader(folder)
    rules = mapping(model)
    expected = {name: shape for rule in rules for name, shape in rule.hf_shapes().items()}
    audit_tensors(f"{folder}/config.json", expected, reader)
    if mixed := [", ".join(rule.hf) for rule in rules if len({reader.dtypes[name] for name in rule.hf}) > 1]:
        raise ProblemsError(f"{folder}: tensors that training keeps as one have different dtypes", shortened(mixed))
    strange = {}
    try:
        partial = store.begin(out, 0, reader.bytes)
        writer.write_tensors(partial, from_hf(model, _watched(reader, strange, progress)))
        if strange and not allow_nan:
            listed = shortened([f"{name}: {count:,}" for name, count in strange.items()])
            raise ProblemsError(f"{folder} has NaN or infinite numbers; --allow-nan takes them as they are", listed)
        path = store.finish(partial, config, {"state": State().to_dict(), "layout": None, "contents": "weights"})
    except OSError as error:
        raise BorealError(f"the checkpoint cannot be written to {out}: {store.why(error)}") from error
    finally:
        store.recover(out)  # removes what is not finished
    return {"checkpoint": str(path), "tensors": len(reader.shapes), "bytes": reader.bytes, "not_finite": strange}


def described(folder):
    """The network that a folder's config.json describes."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise BorealError(f"{file} cannot be read: {error.strerror}; expected a Hugging Face folder") from None
    except ValueError as error:
        raise BorealError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise BorealError(f"{file} holds {type(config).__name__}, expected an object")
    return model_from_hf(config)


def check_same_network(folder, theirs, ours):
    """Refuse a configuration of another network; every field that differs is listed."""
    values = [store.flat(m.model_dump(mode="json") | {"pattern": "/".join(filter(None, expand(m.pattern)))}) for m in (theirs, ours)]
    different = [
        f"model.{key}: the folder has {values[0].get(key)!r}, the configuration {values[1].get(key)!r}"
        for key in sorted(values[0].keys() | values[1].keys())
        if values[0].get(key) != values[1].get(key) and key not in SHAPE_NO_TENSOR
    ]
    if different:
        raise ProblemsError(f"{folder} is another network than the configuration's; take its preset or model section", different)


def _watched(reader, strange, progress):
    """The reader, counting what it reads, and into `strange` what of it is NaN or infinite."""
    count = 0

    def get(name):
        nonlocal count
        tensor = reader(name)
        if bad := shards.not_finite(tensor):
            strange[name] = bad
        count += 1
        if progress:
            progress(count, len(reader.shapes))
        return tensor

    return get


def _check_tokenizer(folder, config):
    """The run's tokenizer fits the vocabulary, and is the folder's if that has one."""
    words, _ = audit_tokenizer(config.data.tokenizer, config.model)
    if (folder / "tokenizer.json").is_file():
        theirs = Tokenizer.load(folder)
        if theirs.fingerprint != words.fingerprint:
            raise BorealError(
                f"data.tokenizer={config.data.tokenizer} is another tokenizer (SHA-256 {words.fingerprint[:12]}...) than "
                f"that of {folder} ({theirs.fingerprint[:12]}...); ids would mean other words. Set data.tokenizer={folder}"
            )
