"""The tail of the network: hidden states to the main and the multi-token-prediction loss.

Losses leave as (sum, weight) pairs over *target slots*: a position has k of them in superposition, one afterwards.

    objective = (main_sum + mtp_weight * mtp_sum) / main_weight

Both sums are divided by the same global weight, so the objective does not depend on how the batch is cut. The weight of
a document that has one is part of its targets' weights; without any the sum of weights is a count.
"""

import torch
from boreal_kernels import linear_multi_hot_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


def multi_hot_loss(
    weight, hidden, labels, label_weight, *, vocab_size, tp_group, sequence_parallel, promise=None, backend="auto"
):
    """Mean over each position's k targets of the cross-entropy: logsumexp minus the mean target logit
    (arXiv 2605.06546). Head and loss are one operation, which never holds all logits.

    Where the weight has a gradient buffer of megatron-core's (`main_grad`), its gradient is added there and nowhere else.

    Args:
        weight: [v/tp, h], of the embedding when tied.
        hidden: [s/sp, 1, h].
        labels: [k, 1, s] int64. label_weight: [k, 1, s] FP32, 1/k on a valid target slot and 0 elsewhere.
        vocab_size: rows of the head from there on are padding.
        promise: what the gradient of loss_sum will be. Gradients are then computed on the way forward, which saves a
            matrix product over the vocabulary; a promise that is not kept makes them NaN. None: any gradient.

    Returns:
        (loss_sum, weight_sum), FP32 scalars in units of target slots.
    """
    k = labels.shape[0]
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    loss, count = linear_multi_hot_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(1),
        label_weight.flatten(1),
        vocab_size=vocab_size,
        main_grad=getattr(weight, "main_grad", None),
        upstream=None if promise is None else promise * k,
        tp_group=tp_group,
        backend=backend,
    )
    return loss * k, count * k


class Losses:
    """Names of the entries of the loss vector that the last stage returns."""

    MAIN, MAIN_COUNT, MTP, MTP_COUNT = range(4)

    @staticmethod
    def pack(main, mtp=None):
        """(sum, count) pairs -> [4]; without an MTP head its entries are 0."""
        mtp = mtp or (torch.zeros_like(main[0]), torch.zeros_like(main[1]))
        return torch.stack([*main, *mtp])


def loss_function(mtp_weight, losses):
    """What megatron-core's schedule wants: (sum to differentiate, a count, what to log).

    Its count is an integer, which weights are not: it is 0, and `step.forward_backward` divides. The third entry is a detached clone: megatron-core divides the first in place.
    """
    total = losses[Losses.MAIN] + mtp_weight * losses[Losses.MTP]
    return total, losses.new_zeros((), dtype=torch.int), {"losses": losses.detach().clone()}
