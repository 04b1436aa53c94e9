"""Where the program runs: CUDA with NCCL, or CPU with gloo. The same model code runs on both.

`current()` picks once, by whether a CUDA device exists, and `Platform.setup()` prepares torch and megatron-core for it.
Nobody else asks which platform it is. A third one, which a process asks for, only imagines its device and its peers.
"""

import os
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Platform:
    """`name` is cpu, cuda or meta, `backend` the collectives library."""

    name: str
    backend: str

    def setup(self):
        """Make megatron-core usable here. Idempotent; call before anything of megatron-core is built."""
        if self.name == "cpu":
            from boreal_megatron.platform import cpu

            cpu.install()
        elif self.name == "meta":
            from boreal_megatron.platform import meta

            meta.install()
        else:
            from boreal_megatron.platform import cuda

            cuda.install(self.device())

    def device(self):
        if self.name == "cuda":
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device(self.name)

    def seed(self, seed):
        """Seed every generator that the model may draw from; model-parallel ranks get megatron-core's streams."""
        from megatron.core import tensor_parallel

        if self.name == "meta":
            return  # there is nothing to draw into
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        if self.name == "cpu":
            torch.manual_seed(seed)

    def rng_state(self):
        """Every generator's state, as a dict of byte tensors."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        states = {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
        if self.name == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def set_rng_state(self, states):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        states = dict(states)
        torch.set_rng_state(states.pop("torch"))
        if "cuda" in states:
            torch.cuda.set_rng_state(states.pop("cuda"))
        get_cuda_rng_tracker().set_states(states)


def current():
    """The platform of this process."""
    return _asked or _found()


@cache
def _found():
    return Platform("cuda", "nccl") if torch.cuda.is_available() else Platform("cpu", "gloo")


_asked = None


def imagine():
    """From now on this process does no work: its device is the meta device, and the ranks that it talks to are not
    there (`platform/meta.py`). Called before anything else asks for the platform."""
    global _asked
    from boreal_megatron.platform import meta

    _asked = Platform("meta", meta.BACKEND)


if not torch.cuda.is_available():
    from boreal_megatron.platform import cpu

    cpu.import_megatron()
