"""The noaux_tc router: sigmoid scores, top-k on score + bias, weights from the unbiased scores (arXiv 2412.19437).

megatron-core's TopKRouter does the arithmetic, and its gradient finalisation moves the bias once per global batch:
bias += rate * sign(mean load - load). The router's weight is FP32 here whatever the model's dtype.
"""

import torch
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """megatron-core's router with an FP32 weight."""

    def reset_parameters(self):
        super().reset_parameters()
        self.weight.data = self.weight.data.float()


def routers(model):
    """(name, router) of every MoE layer of this chunk, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]


def loads(model, group):
    """Positions that each expert was given since the last bias update, over the whole global batch.

    Args:
        model: one chunk of the network.
        group: tensor x context x data parallel ranks, among which a global batch is split.

    Returns:
        [layers, experts] FP32, or None for a chunk without MoE.
    """
    local = [router.local_tokens_per_expert for _, router in routers(model)]
    if not local:
        return None
    total = torch.stack(local)
    torch.distributed.all_reduce(total, group=group)
    return total


def balance(loads):
    """How even the loads are (arXiv 2408.15664): MaxVio = max load / mean load - 1, averaged over layers and at worst,
    and the number of experts that nobody chose."""
    violation = loads.max(dim=1).values / loads.mean(dim=1).clamp(min=1e-9) - 1
    return {
        "max_violation_mean": violation.mean().item(),
        "max_violation_worst": violation.max().item(),
        "dead_experts": int((loads == 0).sum()),
    }
