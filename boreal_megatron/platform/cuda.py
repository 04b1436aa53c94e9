"""CUDA devices and NCCL, which megatron-core is written for: one device a rank, and kernels in the order of their launch.

Nothing of megatron-core changes here. Its streams, its RNG tracker (`Platform.seed`) and its collectives are used as
they are; which modules run is `model/provider.py`'s to say.
"""

import os

import torch


def install(device):
    """Make this rank's device the current one. Idempotent; call before the first CUDA kernel."""
    # One hardware queue: a collective that is launched before a product also starts before it, and runs beside it. With
    # more of them the product may take all of the device first. Read once, when the driver starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(device)
