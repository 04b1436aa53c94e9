"""CUDA devices and NCCL, which megatron-core is written for: one device a rank.

Nothing of megatron-core changes here, and no variable of the environment: `boreal preflight` says which would help. Its
streams, its RNG tracker (`Platform.seed`) and its collectives are used as they are; which modules run is
`model/provider.py`'s to say.
"""

import contextlib
import os

import torch

from boreal_megatron.platform import Platform

HISTORY = 200_000  # events of the allocator that are kept


class Cuda(Platform):
    """`LOCAL_RANK`, as torchrun sets it, is the device's number."""

    name, backend = "cuda", "nccl"

    def setup(self):
        torch.cuda.set_device(self.device())

    def device(self):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def device_name(self):
        return torch.cuda.get_device_name(self.device())

    def synchronize(self):
        torch.cuda.synchronize()

    def stamp(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, stamps):
        stamps[-1].synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in zip(stamps, stamps[1:])]

    def memory(self):
        return torch.cuda.mem_get_info()

    def peak_memory(self):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated

    def free_cache(self):
        torch.cuda.empty_cache()

    def ranges(self):
        return torch.cuda.nvtx.range

    @contextlib.contextmanager
    def captured(self):
        torch.cuda.profiler.start()
        try:
            yield
        finally:
            torch.cuda.profiler.stop()

    def activities(self):
        return [*super().activities(), torch.profiler.ProfilerActivity.CUDA]

    @contextlib.contextmanager
    def memory_history(self, path):
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        try:
            yield
            torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def writes_in_background(self):
        return True

    def seed(self, seed):
        from megatron.core import tensor_parallel

        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)

    def rng_state(self):
        return super().rng_state() | {"cuda": torch.cuda.get_rng_state()}
