"""RMSNorm with plain weights (init 1), statistics in FP32; usable with and without sequence parallelism."""

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dim.

    Fills megatron-core's norm slots. Under sequence parallelism every rank sees its own positions, so the weight is
    marked for megatron-core's gradient sum over tensor-parallel ranks.
    """

    def __init__(self, config, hidden_size, eps=1e-6, **kwargs):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
