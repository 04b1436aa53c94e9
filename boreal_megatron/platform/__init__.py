"""Where the program runs: CUDA with NCCL, or CPU with gloo. The same model code runs on both.

`current()` picks once, by whether a CUDA device exists, and `Platform.setup()` prepares torch and megatron-core for it.
What the program does differently is a method here; which modules and kernels run is chosen by the device where they are
(`model/provider.py`, `model/kernels.py`). A third platform, which a process asks for, only imagines its device and peers.
"""

import contextlib
import time
from functools import cache

import torch


class Platform:
    """A CPU; the others differ from it. `name` is cpu, cuda or meta, `backend` the collectives library."""

    name, backend = "cpu", "gloo"

    def setup(self):
        """Make megatron-core usable here. Idempotent; call before anything of megatron-core is built."""
        from boreal_megatron.platform import cpu

        cpu.install()

    def device(self):
        return torch.device(self.name)

    def device_name(self):
        """What CUDA calls the device; None elsewhere."""
        return None

    def synchronize(self):
        """Wait until the device has done what it was given; on a CPU operations are done when they return."""

    def stamp(self):
        """This point in the device's work, noted without waiting for the device to come there."""
        return time.perf_counter()

    def between(self, stamps):
        """Seconds from each of `stamp`'s points to the next; waits for the device to have come to the last."""
        return [b - a for a, b in zip(stamps, stamps[1:])]

    def memory(self):
        """(free, total) bytes of the device; None where it has no memory of its own."""
        return None

    def peak_memory(self):
        """A function that says how many bytes were allocated at most since this call; None where nobody counts."""
        return lambda: None

    def free_cache(self):
        """Give back what torch keeps of freed memory."""

    def ranges(self):
        """What shows a stretch of work to nsys, name -> a context manager; None where there is no nsys."""
        return None

    def captured(self):
        """A context whose work `nsys profile --capture-range=cudaProfilerApi` captures."""
        return contextlib.nullcontext()

    def activities(self):
        """What torch.profiler is to watch."""
        return [torch.profiler.ProfilerActivity.CPU]

    def memory_history(self, path):
        """A context after which `path` holds what torch's allocator did in it; nothing where it has no such record."""
        return contextlib.nullcontext()

    def writes_in_background(self):
        """Whether NVIDIA's resiliency extension may write checkpoints, where it is installed."""
        return False

    def seed(self, seed):
        """Seed every generator that the model may draw from; model-parallel ranks get megatron-core's streams."""
        from megatron.core import tensor_parallel

        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        torch.manual_seed(seed)  # the streams are cut from the same generator

    def rng_state(self):
        """Every generator's state, as a dict of byte tensors."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}

    def set_rng_state(self, states):
        """Go on from what `rng_state` gave. A GPU's generators are of another kind: on another device than theirs,
        states change nothing."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        if ("cuda" in states) != (self.name == "cuda"):
            return
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
    if not torch.cuda.is_available():
        return Platform()
    from boreal_megatron.platform.cuda import Cuda

    return Cuda()


_asked = None


def imagine():
    """From now on this process does no work: its device is the meta device, and the ranks that it talks to are not
    there (`platform/meta.py`). Called before anything else asks for the platform."""
    global _asked
    from boreal_megatron.platform.meta import Imagined

    _asked = Imagined()


if not torch.cuda.is_available():
    from boreal_megatron.platform import cpu

    cpu.import_megatron()
