"""Gated RMSNorm in plain torch.  Shapes: x, gate [.., D], weight [D].

FP32 throughout: the statistics because squares of bf16 lose digits, the product because one rounding at the end is
cheaper to reason about than three.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from boreal_kernels.shapes import accumulate_dtype

_ACT = {"silu": F.silu, "sigmoid": torch.sigmoid}


def gated_rmsnorm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, activation: str) -> Tensor:
    """See the package's docstring."""
    dtype = accumulate_dtype(x, gate, weight)
    normed = F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
    return (normed * _ACT[activation](gate.to(dtype))).to(x.dtype)
