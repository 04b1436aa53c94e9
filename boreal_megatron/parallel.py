"""The process mesh: one place that starts torch.distributed and touches megatron-core's global state.

Everyone else is given a `Mesh`, or the `ProcessGroupCollection` inside it.
"""

import atexit
import datetime
import os
import tempfile
from dataclasses import dataclass

import torch.distributed as dist

from boreal_megatron import platform  # imports megatron-core in its own way

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from boreal_megatron import compat


@dataclass(frozen=True)
class Mesh:
    """This process's place. `groups` are megatron-core's process groups."""

    groups: ProcessGroupCollection
    rank: int
    world: int
    device: object

    @property
    def dp_rank(self):
        return self.groups.dp.rank()

    @property
    def dp_size(self):
        return self.groups.dp.size()

    @property
    def pp_rank(self):
        return self.groups.pp.rank()

    @property
    def context(self):
        """(rank, size) of context parallelism."""
        return self.groups.cp.rank(), self.groups.cp.size()

    @property
    def last_rank(self):
        """The rank that prints: the last, as in Megatron, because it has the loss."""
        return self.rank == self.world - 1


def start(layout, seed, store=None, timeout=None):
    """Join torch.distributed (torchrun's variables, or a world of one without them) and build the mesh.

    The caller has checked that the layout divides the world (`config.check`).

    Args:
        layout: `config.schema.Parallel`. seed: the run's.
        store: torch's, where the caller has joined one already.
        timeout: seconds after which a collective fails; torch's default without it.
    """
    here = platform.current()
    here.setup()
    compat.apply()
    if not dist.is_initialized():
        limit = None if timeout is None else datetime.timedelta(seconds=timeout)
        if store is not None:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            dist.init_process_group(here.backend, store=store, rank=rank, world_size=world, timeout=limit)
        elif "WORLD_SIZE" in os.environ:
            dist.init_process_group(here.backend)
        else:
            folder = tempfile.TemporaryDirectory()
            atexit.register(folder.cleanup)
            store = dist.FileStore(os.path.join(folder.name, "store"), 1)
            dist.init_process_group(here.backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
    here.seed(seed)
    return Mesh(
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        device=here.device(),
    )


def restart_hazard(environment=os.environ):
    """A warning where torchrun would restart workers that cannot find each other, or None.

    torch 2.15's workers share their agent's store, and restarted ones read the addresses of the dead
    (pytorch/pytorch#135712); tests/parallel/test_multinode.py fails once torch no longer needs the variable.
    """
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return (
            f"torchrun has --max-restarts {restarts} and shares its store: restarted workers will hang; "
            "start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    return None


def stop():
    """Leave torch.distributed in order."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
