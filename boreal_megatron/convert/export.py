"""From a training checkpoint to a Hugging Face folder: looked through, streamed, and on request proved equal.

Neither a GPU nor the layout that wrote the checkpoint is needed, and no more memory than the largest tensor and 1 GB.
"""

import threading
from pathlib import Path

from boreal_megatron.convert import check, hf, shards
from boreal_megatron.convert.mapping import training_shapes
from boreal_megatron.convert.reader import TensorReader
from boreal_megatron.convert.targets import TARGETS
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.train import store

SHOWN = 20  # problems of one kind that are listed


def export(
    path, out, *, dtype="fp32", target="boreal", tokenizer=None, allow_nan=False, verify=True, prove=False,
    max_shard_bytes=hf.MAX_SHARD_BYTES, progress=None,
):  # fmt: skip
    """Write the folder.

    Args:
        path: a checkpoint or the folder above it.
        out: the Hugging Face folder; an earlier export there is replaced.
        dtype: "fp32" or "bf16", of the written weights.
        target: a name of `targets.TARGETS`.
        tokenizer: a folder whose tokenizer has to be the checkpoint's own; needed where the checkpoint has none.
        allow_nan: write NaN and infinities, and report them.
        verify: compare the checkpoint's files with its manifest meanwhile.
        prove: compare the folder with the training model before it gets its name (`check.prove`), which takes the
            memory of a whole model in FP32.
        max_shard_bytes: upper bound of one weight file, unless a single tensor exceeds it.
        progress: called with (tensors written, tensors in all).

    Returns:
        dict: checkpoint, folder, dtype, tensors, bytes, files, not_finite, notes, and with `prove` the report.

    Raises:
        BorealError: damaged or incomplete checkpoint, one of another model, wrong tokenizer, NaN, no space, or (kept
            under the name `OUT.disagrees`) an export that computes something else.
    """
    shards.large_pages()
    path = store.resolve(path)
    config = store.saved_config(path)
    if target not in TARGETS:
        raise BorealError(f"--as {target}: expected one of {', '.join(TARGETS)}")
    if different := TARGETS[target].check(config.model):
        raise ProblemsError(f"{path} cannot be exported as {target}; leave out --as, which exports it as it is", different)
    folder = tokenizer_folder(path, config, tokenizer)
    words, notes = audit_tokenizer(folder, config.model)
    reader = TensorReader(path)
    audit_tensors(f"{path}/run_config.yaml", training_shapes(TARGETS[target].rules(config.model)), reader)
    damage = _InBackground(store.verify, path) if verify else None
    with hf.being_written(out) as unfinished:
        found = hf.fill(
            unfinished, config.model, reader, tokenizer_folder=folder, dtype=dtype, eos_token_id=words.eod,
            target=target, allow_nan=allow_nan, max_shard_bytes=max_shard_bytes, progress=progress,
        )  # fmt: skip
        if damage and (problems := damage.result()):
            raise ProblemsError(f"{path} is damaged; export another checkpoint, or fetch its files again", problems)
        if prove:
            found["report"] = check.prove(path, unfinished, dtype, target, keep=Path(f"{out}.disagrees"))
    return {"checkpoint": str(path), "folder": str(out), "dtype": dtype, **found, "notes": notes}


def tokenizer_folder(path, config, given=None):
    """The tokenizer that lies in the checkpoint; without one the given one, or the one that the run was given.

    Raises:
        BorealError: the given one is another than the checkpoint's.
    """
    inside = Path(path) / "tokenizer"
    if not (inside / "tokenizer.json").is_file():
        return Path(given or config.data.tokenizer)
    if given is not None:
        ours, theirs = Tokenizer.load(given), Tokenizer.load(inside)
        if ours.fingerprint != theirs.fingerprint:
            raise BorealError(
                f"{given} is another tokenizer ({ours.vocab_size} entries, SHA-256 {ours.fingerprint[:12]}...) than "
                f"the one this checkpoint was trained with ({theirs.vocab_size} entries, {theirs.fingerprint[:12]}...); "
                f"leave it out: the export takes the checkpoint's own, {inside}"
            )
    return inside


def audit_tokenizer(folder, model):
    """(Tokenizer, list of remarks) of a tokenizer that fits the vocabulary.

    Raises:
        BorealError: it has ids that the network has no rows for.
    """
    words = Tokenizer.load(folder)
    if words.vocab_size > model.vocab_size:
        raise BorealError(
            f"tokenizer {folder} has ids up to {words.vocab_size - 1}, the network has rows for {model.vocab_size} "
            "(model.vocab_size); it is not the tokenizer of this checkpoint"
        )
    unused = model.vocab_size - words.vocab_size
    return words, [f"{unused} of the {model.vocab_size} vocabulary rows belong to no token of the tokenizer"] * bool(unused)


def audit_tensors(description, expected, reader):
    """Refuse unless there are exactly the expected tensors.

    Args:
        description: the file that says what is expected.
        expected: name -> shape.
        reader: with `shapes` and `dtypes`, by name.

    Raises:
        ProblemsError: missing, extra, misshapen tensors and unknown dtypes, all in one list.
    """
    found, dtypes = reader.shapes, reader.dtypes
    kinds = [
        [f"{name}: missing, expected {expected[name]}" for name in expected if name not in found],
        [f"{name}: found {found[name]}, but the network has no such tensor" for name in found if name not in expected],
        [f"{name}: found shape {found[name]}, expected {s}" for name, s in expected.items() if found.get(name, s) != s],
        [f"{name}: found {dtypes[name]}, expected FP32 or BF16" for name in found if dtypes[name] not in shards.CODES],
    ]
    if problems := [line for lines in kinds for line in shortened(lines)]:
        raise ProblemsError(f"the weights are not those of the network that {description} describes", problems)


def shortened(lines):
    """The first of many lines, and how many more there are."""
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more like these"]


class _InBackground:
    """A function's result, computed beside other work; abandoned when the program ends before."""

    def __init__(self, function, *args):
        self._found = None
        self._thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._thread.start()

    def _run(self, function, *args):
        try:
            self._found = function(*args), None
        except Exception as error:
            self._found = None, error

    def result(self):
        self._thread.join()
        value, error = self._found
        if error:
            raise error
        return value
