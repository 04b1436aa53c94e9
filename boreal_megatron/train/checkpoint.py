"""Checkpoints of a run: megatron-core's resharding `torch_dist` format, saved and loaded on all ranks together.

What is in a checkpoint's folder, and when it counts as whole, is `store.py`'s.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies import async_utils, nvrx
from torch.distributed.checkpoint.api import CheckpointException

from boreal_megatron import platform, safe
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.model import boreal
from boreal_megatron.plan import params
from boreal_megatron.train import optim, store
from boreal_megatron.train.state import State

FAILURES = (Exception, CheckpointException)  # torch derives the second from BaseException
MASTER = ("optimizer.state.param.", "optimizer.state.fp32_param.")  # with and without the distributed optimizer


# ---------------------------------------------------------------- saving


@dataclass
class Saving:
    """A save that was requested and is not verified yet."""

    step: int
    partial: Path
    record: dict
    began: float
    waited: float = 0.0  # seconds that training stood still for it


class Saver:
    """Saves one checkpoint at a time, while training waits or (`checkpoint.async_save`) while it goes on.

    In the background a fork of each rank, which sees the weights as they were when it was made, writes that rank's
    shards; on a GPU they are copied to host memory first. A save that fails is reported and nothing else changes.

    Attributes:
        last_good: path of the last checkpoint that was verified, or None.
    """

    def __init__(self, config, mesh, report, last_good=None):
        self.config, self.mesh, self.report, self.last_good = config, mesh, report, last_good
        self.strategy, self.queue = _background() if config.checkpoint.async_save else ("mcore", None)
        self.flying, self.failure = None, None

    def save(self, wrapped, optimizer, state):
        """Request a checkpoint of this very moment. Returns after the copy, or after it was verified."""
        self.wait()
        optim.gather(wrapped)
        began, folder, step = time.perf_counter(), Path(self.config.checkpoint.folder), state.step
        self.failure = None
        self.report.say(f" checkpoint {store.name(step)}: requested")
        record = {
            "state": state.to_dict(),
            "layout": layout(self.config, self.mesh),
            "contents": "training",
        }
        # Weights, master weights and two moments, at most 4 bytes each.
        needed = 16 * params.count(self.config.model)["with_mtp"]
        self.flying = Saving(step, folder / f"{store.name(step)}.partial", record, began)
        try:
            first_rank(store.begin, folder, step, needed)
            request = dist_checkpointing.save(
                _sharded(self.config, wrapped, optimizer, self.mesh),
                str(self.flying.partial),
                async_sharded_save=True,
                async_strategy=self.strategy,
            )
            write = functools.partial(_write, request.async_fn, self.flying.partial, self.mesh.rank)
            request = request._replace(async_fn=write)
            request.add_finalize_fn(self._finish)
            if self.queue is None:
                request.execute_sync()
            else:
                self.queue.schedule_async_request(request)
                self.flying.waited = time.perf_counter() - began
        except FAILURES as error:  # whatever the writers died of, the checkpoint is not there
            self._failed(error)

    def poll(self):
        """Finish the save under way if every rank has written its part. On all ranks, once a step."""
        if self.flying and self.queue:
            self._collect(blocking=False)

    def wait(self):
        """Let the save under way finish."""
        if self.flying and self.queue:
            self._collect(blocking=True)

    def close(self):
        """Wait, and insist on the last save.

        Raises:
            BorealError: it failed.
        """
        self.wait()
        if self.failure:
            raise BorealError(self.failure)

    def _collect(self, blocking):
        began = time.perf_counter()
        flying = self.flying
        try:
            self.queue.maybe_finalize_async_calls(blocking=blocking)
        except FAILURES as error:
            self._failed(error)
        flying.waited += time.perf_counter() - began

    def _finish(self):
        """The shards and megatron-core's own files are on disk: verify them, then move the tracker."""
        flying = self.flying
        wrote = [None] * self.mesh.world
        mine = sum(f.stat().st_size for f in _shards(flying.partial, self.mesh.rank))
        dist.all_gather_object(wrote, mine)
        self.report.say(
            f" checkpoint {store.name(flying.step)}: written, {sum(wrote) / 1e6:,.1f} MB of shards in "
            f"{time.perf_counter() - flying.began:.1f} s"
        )
        writers = range(self.mesh.world)
        self.last_good = first_rank(store.finish, flying.partial, self.config, flying.record, writers)
        self.flying = None
        seconds = time.perf_counter() - flying.began
        waited = flying.waited if self.queue else seconds
        self.report.say(f" checkpoint {self.last_good}: verified")
        self.report.record(
            "checkpoint", flying.step, ok=True, seconds=seconds, waited_seconds=waited, shard_bytes=sum(wrote)
        )
        if self.mesh.rank == 0:
            options = self.config.checkpoint
            store.retire(options.folder, self.last_good, options.keep_last, options.keep_every)

    def _failed(self, error):
        step, self.flying = self.flying.step, None
        if isinstance(error, CheckpointException):  # raised on all ranks; the first one knows why
            why = ["; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())]
            dist.broadcast_object_list(why)
            error = why[0]
        good = f"the last verified checkpoint is {self.last_good}" if self.last_good else "there is no verified checkpoint"
        self.failure = f"checkpoint {store.name(step)} was not saved: {error}; {good}"
        self.report.say(f" {self.failure}")
        self.report.record("checkpoint", step, ok=False, error=str(error))


def _background():
    """megatron-core's name of the way to save in the background, and its queue."""
    if platform.current().writes_in_background() and nvrx.is_nvrx_min_version() and nvrx.has_nvrx_async_support():
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue

        # One process a save. For a persistent one that cannot start or dies, a run waits for ever (version 0.7.0).
        return "nvrx", AsyncCallsQueue(persistent=False)
    return "mcore", async_utils.AsyncCallsQueue(persistent=False)


def _write(write, partial, rank, *args, **kwargs):
    """What the writer of a rank does: megatron-core's writing, then reading back."""
    if write is not None:
        write(*args, **kwargs)
    store.read_back(partial, rank, _shards(partial, rank))


def _shards(partial, rank):
    return sorted(Path(partial).glob(f"__{rank}_*.distcp"))


def first_rank(function, *args):
    """Call a function on rank 0; its result or its BorealError on every rank."""
    said = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = function(*args)
        except BorealError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise BorealError(said[1])
    return said[0]


# ---------------------------------------------------------------- loading


def find(options, mesh):
    """The checkpoint to go on from, after every rank has checked its share of the files.

    Args:
        options: `config.checkpoint`.

    Returns:
        path, or None where there is no checkpoint yet; what is wrong with later ones that were passed over, a line each.

    Raises:
        ProblemsError: the latest one is damaged, and `checkpoint.fall_back` does not allow an earlier one.
    """
    latest = first_rank(_recovered, options.folder)
    if latest is None:
        return None, []
    passed_over = []
    for path in reversed([p for p in store.checkpoints(options.folder) if store.step_of(p) <= store.step_of(latest)]):
        problems = [f"{path.name}: {problem}" for problem in damage(path, mesh)]
        if not problems:
            return path, passed_over
        passed_over += problems
        if not options.fall_back:
            raise ProblemsError(
                f"{path} is damaged; restore its files, or say checkpoint.fall_back=true to go on from the newest one "
                "before it that is whole",
                problems,
            )
    raise ProblemsError(f"no checkpoint in {options.folder} is whole", passed_over)


def _recovered(folder):
    store.recover(folder)
    return store.latest(folder)


def damage(path, mesh):
    """`store.verify` by all ranks, each a share; the same list of problems on every rank."""
    everyone = [None] * mesh.world
    dist.all_gather_object(everyone, store.verify(path, (mesh.rank, mesh.world)))
    return [problem for problems in everyone for problem in problems]


def begin(config, mesh, loader, path):
    """A network, its optimizer and the run's state: from a checkpoint, or from nothing where path is None.

    Returns:
        chunks, wrapped, optimizer, State.

    Raises:
        ProblemsError: as `load`, or the data is not the checkpoint's.
    """
    chunks = boreal.build(config, mesh)
    wrapped = optim.wrap(config, chunks)
    optimizer = optim.build(config, wrapped)
    state = load(path, config, wrapped, optimizer, mesh) if path else State()
    return chunks, wrapped, optimizer, state.continue_on(loader.fingerprints())


def load(path, config, wrapped, optimizer, mesh):
    """Bring weights, moments and generators back, in any layout that the checkpoint was or was not written in, with or
    without the distributed optimizer. Learning rate, betas and weight decay are the configuration's.

    Generators come back when the layout is the same; in another one they keep the run's seeds. From a checkpoint of
    weights alone (`boreal import`) the optimizer starts anew.

    Args:
        path: what `find` returned.

    Returns:
        State.

    Raises:
        BorealError: not a checkpoint, or one of another model (every difference is listed).
    """
    saved = store.describe(path)
    store.check_same_model(path, saved["config"], config)
    whole = saved["contents"] == "training"
    same_layout = whole and saved["layout"] == layout(config, mesh)
    template = _sharded(config, wrapped, optimizer, mesh, is_loading=True)
    stored = safe.read_metadata(path).state_dict_metadata
    # By number: megatron-core leaves out a chunk without layers, and a shorter list is no match for the longer one.
    wanted = {"model": {str(number): _stored_only(chunk, stored) for number, chunk in enumerate(template["model"])}}
    if whole:
        wanted["moments"], slots = _moments(template["optimizer"], stored)
    if same_layout:
        wanted["rng"] = template["rng"]
    values = _read(wanted, stored, path)
    for number, chunk in enumerate(wrapped):
        chunk.module.load_state_dict(values["model"].get(str(number), {}))
    state = State.from_dict(saved["state"])
    if whole:
        network = {_place(e.key, e): e.data for e in nested_values(template["model"]) if _is_tensor(e)}
        sources = {"read": values["moments"], "network": network}
        filled = dict_list_map_outplace(lambda s: sources[s.source][s.key] if isinstance(s, _Slot) else s, slots)
        optim.load(optimizer, filled, state.step)
    else:
        optimizer.reload_model_params()
        optim.prime(optimizer)  # the template was made by a load, which gave all parameters one step
    if same_layout:
        platform.current().set_rng_state(values["rng"])
    return state


def load_weights(path, config, model, mesh):
    """Weights only, into one unwrapped chunk."""
    saved = store.describe(path)
    store.check_same_model(path, saved["config"], config)
    stored = safe.read_metadata(path).state_dict_metadata
    template = _stored_only(model.sharded_state_dict(metadata=_metadata(config, mesh)), stored)
    model.load_state_dict(_read({"model": template}, stored, path)["model"])


def _is_tensor(entry):
    return isinstance(entry, ShardedTensor | ShardedTensorFactory)


def _stored_only(template, stored):
    """The template without objects that the checkpoint does not have: a layer that has nothing to say beside its
    tensors, as all of megatron-core's own, or has not yet, as an imported FP8 one, keeps what it has."""

    def kept(entry):
        absent = isinstance(entry, ShardedObject) and entry.unique_key not in stored
        return LocalNonpersistentObject(entry.data) if absent else entry

    return dict_list_map_outplace(kept, template)


@dataclass(frozen=True)
class _Slot:
    """Where a tensor goes in what the optimizer is given: from what is read, or from the network's own weights."""

    source: str
    key: object


def _moments(template, stored):
    """What to read for the optimizer, in the checkpoint's words, and its template with slots for tensors.

    Moments have the same names in every layout. FP32 master weights are called `param` by the distributed optimizer,
    `fp32_param` by the plain one, which has none for weights that are FP32 themselves. Hyperparameters are this run's.
    """
    wanted = {}

    def slot(entry):
        if not _is_tensor(entry):
            return entry.unwrap() if isinstance(entry, LocalNonpersistentObject) else entry
        prefix = next((p for p in MASTER if entry.key.startswith(p)), None)
        if prefix is not None:
            weight = entry.key.removeprefix(prefix)
            name = next((p + weight for p in MASTER if p + weight in stored), None)
            if name is None:
                return _Slot("network", _place(weight, entry))
            entry.key = name
        number = str(len(wanted))  # experts share a key
        wanted[number] = entry
        return _Slot("read", number)

    return wanted, dict_list_map_outplace(slot, template)


def _place(key, entry):
    """What tells a rank's tensors of one key apart."""
    return key, _pieces(entry)[0].global_offset


def _pieces(entry):
    """The ShardedTensors that an entry is saved as; a gated layer's are two."""
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def _read(wanted, stored, path):
    """megatron-core's load, after a look at what it will ask for."""
    problems = []
    for entry in nested_values(wanted):
        for tensor in _pieces(entry) if _is_tensor(entry) else []:
            if tensor.key not in stored:
                problems.append(f"{tensor.key}: not in the checkpoint")
            elif tuple(stored[tensor.key].size) != tuple(tensor.global_shape):
                found, expected = tuple(stored[tensor.key].size), tuple(tensor.global_shape)
                problems.append(f"{tensor.key}: found {found}, expected {expected}")
    if problems:
        raise ProblemsError(f"{path} does not fit this network", problems)
    try:
        return dist_checkpointing.load(wanted, str(path))
    except FAILURES as error:  # a shard damaged since it was verified shows in many ways
        raise BorealError(
            f"{path} cannot be loaded: {type(error).__name__}: {error}; resume from another iter_* folder by writing "
            f"its step into {store.TRACKER}"
        ) from error


# ---------------------------------------------------------------- what is in a checkpoint


def _sharded(config, wrapped, optimizer, mesh, is_loading=False):
    metadata = _metadata(config, mesh)
    # A list of chunks; megatron-core names what is in them by the network's layers, whichever chunk has them.
    state = {"model": [chunk.module.sharded_state_dict(metadata=metadata) for chunk in wrapped]}
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    states = platform.current().rng_state()
    state["rng"] = ShardedObject("rng", states, (mesh.world,), (mesh.rank,), replica_id=0)
    return state if is_loading else dict_list_map_outplace(_something, state)


def _something(entry):
    """Layers of megatron-core's own have an `_extra_state` each, which is None, Transformer Engine's an empty tensor
    unless FP8 scaling remembers something: thousands of them for 128 experts."""
    empty = isinstance(entry, ShardedObject) and (
        entry.data is None or (torch.is_tensor(entry.data) and not entry.data.numel())
    )
    return LocalNonpersistentObject(None) if empty else entry


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


def layout(config, mesh):
    """What generators and file shapes depend on; a checkpoint of an equal layout resumes bit for bit."""
    return {"world": mesh.world, **config.parallel.model_dump(mode="json"), "distributed": config.optimizer.distributed}
