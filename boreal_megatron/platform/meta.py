"""A rank that is only imagined: its shapes are real, its memory, its device and its peers are not.

Tensors live on torch's meta device, which stores no elements, and collectives on them do nothing. So one process can
be any rank of any world, one after another (`dry_run.py`). It takes the path of CUDA ranks through megatron-core, on a
machine with or without CUDA, and no real work can be done in the process any more.
"""

import sys
from functools import cache
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg

from boreal_megatron.platform import Platform
from boreal_megatron.platform.cpu import CudaNames, functions

BACKEND = "imagined"


class Imagined(Platform):
    name, backend = "meta", BACKEND

    def setup(self):
        install()

    def seed(self, seed):
        """There is nothing to draw into."""


@cache
def install():
    """Give megatron-core's CUDA names their meaning on the meta device. Idempotent."""
    device = torch.device("meta")
    functions(device)
    CudaNames(device).__enter__()
    _gpu()
    # torch's own registration of this backend leaves out tensors on the meta device.
    dist.Backend.register_backend(BACKEND, _create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    _remember_ranks()


def _gpu():
    """The GPU that a rank imagines where there is none, a Hopper: Transformer Engine makes no module without one."""
    if torch.cuda.is_available():
        return
    capability = (9, 0)
    properties = SimpleNamespace(
        name="imagined", major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=141 << 30
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties


def _remember_ranks():
    """megatron-core counts out the groups of all ranks for each rank anew; they are the same for every one."""
    original, known = parallel_state.RankGenerator.get_ranks, {}

    def get_ranks(self, token):
        key = (self.order, *self.ordered_size, token)
        if key not in known:
            known[key] = original(self, token)
        return known[key]

    parallel_state.RankGenerator.get_ranks = get_ranks


def join(rank, world):
    """Be this rank of that world, until `parallel.stop`.

    Returns:
        dict that fills while megatron-core makes its groups: description -> the ranks of every such group, also of
        those without this rank, for which there is no object.
    """
    groups = {}

    def create_group(ranks=None, timeout=None, backend=None, pg_options=None, group_desc=None, **unused):
        groups.setdefault(group_desc, []).append(ranks)
        if rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return dist.new_group(ranks, backend=BACKEND, group_desc=group_desc)

    parallel_state.create_group = create_group
    hook = sys.excepthook
    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world)
    sys.excepthook = hook  # torch's writes the rank before each line of a traceback, and wraps the one before it
    return groups
