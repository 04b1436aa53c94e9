"""Every change to a function of megatron-core, or of how torch and Transformer Engine keep checkpoints, in one place.

Each entry says why, for which versions and where upstream; `tests/unit/test_compat.py` fails once an entry is no
longer needed. Order of preference before an entry is added here: a config field, a slot, a subclass.
"""

import importlib.util
import io
import pickle
import queue
import tempfile
from importlib.metadata import version

MEGATRON_CORE = ("0.19.2", "0.20")  # tested from, up to but not including


def check_versions():
    """Refuse a megatron-core that these entries were not written for."""
    from packaging.version import Version

    from boreal_megatron.errors import BorealError

    found = Version(version("megatron-core"))
    low, high = MEGATRON_CORE
    if not Version(low) <= found < Version(high):
        raise BorealError(
            f"megatron-core {found} is installed, expected >={low},<{high}; run: pip install 'megatron-core=={low}'"
        )


def apply():
    """Install every entry. Idempotent."""
    check_versions()
    _distributed_optimizer_step()
    _plain_optimizer_fp32_weights()
    _distributed_optimizer_buckets()
    _results_of_a_save()
    _no_code_from_checkpoints()
    _output_layer_without_apex()
    _fp8_state_without_pickle()


def _distributed_optimizer_step():
    """Resuming the distributed optimizer with torch's AdamW.

    Why: the checkpoint keeps `step` in the parameter group, so `_set_main_param_and_optimizer_states` raises KeyError
    for torch AdamW, whose state holds a `step` tensor (TE's and apex's FusedAdam have none). None is skipped there.
    Versions: 0.19.2. Upstream: optimizer/distrib_optimizer.py, `_set_main_param_and_optimizer_states`.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "boreal", False):
        return

    def set_states(self, model_param, tensors):
        return original(self, model_param, {"step": None, **tensors})

    set_states.boreal = True
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _plain_optimizer_fp32_weights():
    """Checkpoints of the optimizer that is not distributed, when a bf16 network has FP32 parameters.

    Why: upstream numbers the bf16 parameters only, torch's optimizer numbers all of them, and moments meet other
    weights' shapes. Our FP32 parameters have groups of their own, so bf16 and FP32 of a group are one after the other.
    Versions: 0.19.2. Upstream: optimizer/optimizer.py, `Float16OptimizerWithFloat16Params.sharded_state_dict`.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    original = Float16OptimizerWithFloat16Params.sharded_state_dict
    if getattr(original, "boreal", False):
        return

    def sharded_state_dict(self, *args, **kwargs):
        groups = self.float16_groups
        self.float16_groups = [a + b for a, b in zip(groups, self.fp32_from_fp32_groups, strict=True)]
        try:
            return original(self, *args, **kwargs)
        finally:
            self.float16_groups = groups

    sharded_state_dict.boreal = True
    Float16OptimizerWithFloat16Params.sharded_state_dict = sharded_state_dict


def _distributed_optimizer_buckets():
    """Checkpoints of the distributed optimizer when its gradient buffer has more than one bucket.

    Why: upstream puts the buckets together without the padding between them, and cuts the result at offsets that count
    it. Moments and master weights behind a padded bucket are saved shifted, and nobody says so: with pipeline
    parallelism and a tied embedding, which has a bucket of its own, that is the embedding.
    Versions: 0.19.2. Upstream: optimizer/distrib_optimizer.py, `sharded_param_state_fully_reshardable`.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable
    if getattr(original, "boreal", False):
        return

    def without_padding(buffer):
        before, shift = 0, {}
        for number, bucket in enumerate(buffer.buckets):
            shift[number] = before
            before += bucket.grad_data.numel() - bucket.numel_unpadded
        return {p: (a - shift[n], b - shift[n], n) for p, (a, b, n) in buffer.param_index_map.items()}

    def sharded_param_state(self, *args, **kwargs):
        maps = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = without_padding(buffer)
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, before in zip(self.buffers, maps, strict=True):
                buffer.param_index_map = before

    sharded_param_state.boreal = True
    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state


def _results_of_a_save():
    """What a checkpoint's writer tells its rank.

    Why: upstream starts a Manager process for one queue. It is spawned, so it imports everything again (4-5 s of CPU
    a rank) and runs the main module's top level; and torchrun's SIGTERM to the process group kills it, so that no
    save on SIGTERM can succeed. The writer is a fork of its rank, or the rank itself: a file they share is enough.
    Versions: 0.19.2. Upstream: dist_checkpointing/strategies/filesystem_async.py, `get_write_results_queue`.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = Results()


class Results:
    """`put` and `get_nowait` of a queue that holds one item, between a process and its forks."""

    def __init__(self):
        self.file = tempfile.TemporaryFile(buffering=0)

    def put(self, item):
        self.file.seek(0)
        self.file.truncate()
        self.file.write(pickle.dumps(item))

    def get_nowait(self):
        self.file.seek(0)
        data = self.file.read()
        self.file.truncate(0)
        try:
            return pickle.loads(data)
        except (EOFError, pickle.UnpicklingError):  # nothing, or what a writer that was killed had written
            raise queue.Empty("its writer died") from None


def _no_code_from_checkpoints():
    """Reading a checkpoint runs no code of it.

    Why: torch reads `.metadata` with `pickle.load`, and objects with `torch.load(weights_only=False)`; either calls
    what the file names. megatron-core names the classes that do so and offers no other.
    Versions: torch 2.11 to 2.15. Upstream: torch/distributed/checkpoint/filesystem.py, `read_metadata`;
    default_planner.py, `load_bytes`.
    """
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint._nested_dict import set_element
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import StorageMeta

    from boreal_megatron import safe

    def read_metadata(self, *args, **kwargs):
        metadata = safe.read_metadata(self.path)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes(self, read_item, value):
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], safe.load_object(value))
        else:
            self.state_dict[name] = safe.load_object(value)

    filesystem.FileSystemReader.read_metadata = read_metadata
    DefaultLoadPlanner.load_bytes = load_bytes


def _output_layer_without_apex():
    """`gradient_accumulation_fusion` for Transformer Engine's linears where NVIDIA's apex is missing.

    Why: upstream's output layer refuses the flag without apex's extension. Ours multiplies nothing (`model/head.py` has
    loss and gradients of its own), and `model/provider.py` sets the flag for linears that accumulate by themselves.
    Versions: 0.19.2. Upstream: tensor_parallel/layers.py, `ColumnParallelLinear.__init__`.
    """
    from megatron.core.tensor_parallel import layers

    layers._grad_accum_fusion_available = True


def _fp8_state_without_pickle():
    """What delayed FP8 scaling remembers, in a checkpoint: scales and amax histories as plain tensors.

    Why: Transformer Engine pickles them with the recipe, and since 2.19 refuses to read that back unless an environment
    variable allows any pickle to run. The recipe is the configuration's; other recipes remember nothing.
    Versions: Transformer Engine 2.19. Upstream: pytorch/module/base.py, `get_extra_state`, `set_extra_state`.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return
    import torch
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    sides, tensors = ("scaling_fwd", "scaling_bwd"), ("scale", "amax_history")

    def get_extra_state(self):
        if not (self.fp8 and self.fp8_meta["recipe"].delayed()):
            return torch.empty(0, dtype=torch.uint8)
        state = {f"{side}.{name}": getattr(self.fp8_meta[side], name).cpu() for side in sides for name in tensors}
        file = io.BytesIO()
        torch.save(state, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is None or not state.numel():
            return
        saved = torch.load(io.BytesIO(state.cpu().numpy().tobytes()), weights_only=True)
        history = saved["scaling_fwd.amax_history"]  # [steps, 3 tensors of each product]
        self.fp8_meta["recipe"] = DelayedScaling(amax_history_len=history.shape[0])
        self.fp8_meta["num_gemms"] = history.shape[1] // 3
        self.init_fp8_meta_tensors(self.fp8_meta["recipe"])
        for key, value in saved.items():
            side, name = key.split(".")
            getattr(self.fp8_meta[side], name).copy_(value)

    TransformerEngineBaseModule.get_extra_state = get_extra_state
    TransformerEngineBaseModule.set_extra_state = set_extra_state
