"""Checkpoints: megatron-core's resharding `torch_dist` format in a folder that says what it is.

    FOLDER/latest_checkpointed_iteration.txt    the step of the last complete checkpoint
    FOLDER/iter_0000100/                        shards, run_config.yaml, train_state.json, tokenizer/

A checkpoint is written under a temporary name, flushed, and renamed; only then does the tracker move. So what is
there under its own name is whole, and a failed save leaves the earlier one in place.
"""

import errno
import json
import os
import shutil
import signal
from multiprocessing import resource_tracker
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from torch.distributed.checkpoint.api import CheckpointException

from boreal_megatron import platform
from boreal_megatron.config import load as config_load
from boreal_megatron.data.tokenizer import TOKENIZER_FILES
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.plan import params
from boreal_megatron.train import optim
from boreal_megatron.train.state import State

TRACKER = "latest_checkpointed_iteration.txt"
FAILURES = (Exception, CheckpointException)  # torch derives the second from BaseException


def save(folder, config, wrapped, optimizer, state, mesh):
    """Write one checkpoint, on all ranks together.

    Returns:
        its path.

    Raises:
        BorealError: no space, or the folder cannot be written; the last complete checkpoint stays the latest.
    """
    folder = Path(folder)
    final = folder / name(state.step)
    partial = folder / (final.name + ".partial")
    problem = None
    if dist.get_rank() == 0:
        problem = _prepare(config, folder, partial)
    _agree(problem, folder)
    try:
        _start_manager()
        dist_checkpointing.save(_sharded(config, wrapped, optimizer, mesh), str(partial))
        problem = None
    except FAILURES as error:  # whatever the writers died of, the checkpoint is not there
        problem = f"writing {partial} failed: {error}"
    _agree(problem, folder)
    if dist.get_rank() == 0:
        problem = _finish(config, state, mesh, folder, partial, final)
    _agree(problem, folder)
    return final


def load(path, config, wrapped, optimizer, mesh):
    """Bring weights, moments and generators back, in any layout that the checkpoint was or was not written in.

    Generators come back when the layout is the same; in another one they keep the run's seeds.

    Returns:
        State.

    Raises:
        BorealError: not a checkpoint, or one of another model (every difference is listed).
    """
    path = Path(path)
    saved = describe(path)
    check_same_model(path, saved["config"], config)
    if saved["layout"]["distributed"] != config.optimizer.distributed:
        raise BorealError(
            f"{path} was written with optimizer.distributed={str(saved['layout']['distributed']).lower()}, which lays "
            "moments out in another way; set it so to resume"
        )
    same_layout = saved["layout"] == _layout(config, mesh)
    template = _sharded(config, wrapped, optimizer, mesh, is_loading=True, rng=same_layout)
    values = _read(template, path)
    for chunk, weights in zip(wrapped, values["model"], strict=True):
        chunk.module.load_state_dict(weights)
    optimizer.load_state_dict(values["optimizer"])
    optim.own_steps(optimizer)
    if same_layout:
        platform.current().set_rng_state(values["rng"])
    return State.from_dict(saved["state"])


def load_weights(path, config, model, mesh):
    """Weights only, into one unwrapped chunk."""
    saved = describe(path)
    check_same_model(path, saved["config"], config)
    metadata = _metadata(config, mesh)
    values = _read({"model": model.sharded_state_dict(metadata=metadata)}, path)
    model.load_state_dict(values["model"])


def latest(folder):
    """Path of the last complete checkpoint under a folder, or None.

    Raises:
        BorealError: the tracker names a checkpoint that is not there.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise BorealError(f"{tracker} holds {text[:40]!r}; expected a step number. Write the step to resume from into it")
    path = Path(folder) / name(int(text))
    if not (path / "train_state.json").exists():
        there = ", ".join(sorted(p.name for p in Path(folder).glob("iter_*") if p.suffix != ".partial")) or "none"
        raise BorealError(
            f"{tracker} names step {text}, but {path} is not a complete checkpoint; checkpoints there: {there}. "
            "Write the step of one of them into the tracker, or remove the tracker to start anew"
        )
    return path


def resolve(path):
    """A checkpoint's own path, from itself or from the folder above it."""
    path = Path(path)
    if (path / "train_state.json").exists():
        return path
    found = latest(path)
    if found is None:
        raise BorealError(f"{path} is no checkpoint: expected a folder with {TRACKER}, or an iter_* folder inside one")
    return found


def describe(path):
    """What a checkpoint says of itself: state, layout and resolved config (as a dict)."""
    path = Path(path)
    try:
        record = json.loads((path / "train_state.json").read_text())
        config = yaml.safe_load((path / "run_config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BorealError(f"{path} is not a complete checkpoint: {error}") from None
    return {"state": record["state"], "layout": record["layout"], "config": config}


def saved_config(path):
    """The Config that a checkpoint was trained with."""
    return config_load.parse(describe(path)["config"], str(Path(path) / "run_config.yaml"))


def check_same_model(path, saved, config):
    """Refuse to load another network's weights."""
    theirs, ours = _flat(saved["model"]), _flat(config.model.model_dump(mode="json", exclude_none=True))
    ignored = {"init_std", "max_positions"}  # they shape no tensor
    different = [
        f"model.{key}: the checkpoint has {theirs.get(key)!r}, the configuration {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in ignored
    ]
    if different:
        raise ProblemsError(f"{path} is a checkpoint of another model; use its run_config.yaml or another folder", different)


def name(step):
    return f"iter_{step:07d}"


def _read(template, path):
    try:
        return dist_checkpointing.load(template, str(path))
    except FAILURES as error:  # a missing or damaged shard shows in many ways
        raise BorealError(
            f"{path} cannot be loaded: {type(error).__name__}: {error}; resume from another iter_* folder by writing "
            f"its step into {TRACKER}"
        ) from error


def _start_manager():
    """Start the process through which megatron-core's writers answer, deaf to signals.

    torchrun sends SIGTERM to whole process groups. This process saves on it, and needs the other one alive to do so.
    A blocked signal stays blocked across the start of a child; ours arrives when it is unblocked.
    """
    resource_tracker.ensure_running()  # starting it unblocks both signals, so it has to be there before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        get_write_results_queue()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _sharded(config, wrapped, optimizer, mesh, is_loading=False, rng=True):
    metadata = _metadata(config, mesh)
    # A list of chunks; megatron-core names what is in them by the network's layers, whichever chunk has them.
    state = {"model": [chunk.module.sharded_state_dict(metadata=metadata) for chunk in wrapped]}
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    if rng:
        states = platform.current().rng_state()
        state["rng"] = ShardedObject("rng", states, (mesh.world,), (mesh.rank,), replica_id=0)
    return state


def _metadata(config, mesh):
    """How megatron-core lays tensors out in the file: one canonical layout, whoever writes it."""
    metadata = {
        "dp_cp_group": mesh.groups.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    if config.optimizer.distributed:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    return metadata


def _layout(config, mesh):
    return {"world": mesh.world, **config.parallel.model_dump(mode="json"), "distributed": config.optimizer.distributed}


def _prepare(config, folder, partial):
    """Make room; returns what is wrong, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("iter_*.partial"):  # of saves that were killed
            shutil.rmtree(unfinished, ignore_errors=True)
        partial.mkdir()
        # Weights, master weights and two moments, at most 4 bytes each.
        needed, free = 16 * params.count(config.model)["with_mtp"], shutil.disk_usage(folder).free
        if free < needed:
            return f"{folder} has {free / 1e9:.1f} GB free, a checkpoint needs about {needed / 1e9:.1f} GB; free some space"
    except OSError as error:
        return f"{partial} cannot be made: {_why(error)}"
    return None


def _finish(config, state, mesh, folder, partial, final):
    """Describe the checkpoint, make it durable, give it its name, move the tracker; what is wrong, or None."""
    try:
        config_load.dump(config, partial / "run_config.yaml")
        record = {"state": state.to_dict(), "layout": _layout(config, mesh)}
        (partial / "train_state.json").write_text(json.dumps(record, indent=1))
        (partial / "tokenizer").mkdir()
        for file in Path(config.data.tokenizer).glob("*"):
            if file.name in TOKENIZER_FILES:
                shutil.copy(file, partial / "tokenizer")
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
        write_atomically(folder / TRACKER, f"{state.step}\n")
    except OSError as error:
        return f"finishing {final} failed: {_why(error)}"
    return None


def write_atomically(path, text):
    """A small file that is either the old or the new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _agree(problem, folder):
    """Raise on every rank if any rank met a problem."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    found = [p for p in everyone if p]
    if found:
        good = latest(folder)
        where = f"the last complete checkpoint is {good}" if good else "there is no complete checkpoint"
        raise BorealError(f"the checkpoint was not saved: {found[0]}; {where}")


def _why(error):
    return "no space left on the disk; free some" if error.errno == errno.ENOSPC else str(error)


def _flat(values, prefix=""):
    out = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
