"""The tail of the network: hidden states to the main and the multi-token-prediction loss.

Losses leave as (sum, weight) pairs over *target slots*: a position has k of them in superposition, one afterwards.

    objective = (main_sum + mtp_weight * mtp_sum) / main_weight

Both sums are divided by the same global count, so the objective does not depend on how the batch is cut.
"""

import torch
from boreal_kernels import multi_hot_cross_entropy


def multi_hot_loss(output_layer, weight, hidden, labels, label_weight, vocab_size, tp_group):
    """Mean over each position's k targets of the cross-entropy: logsumexp minus the mean target logit
    (arXiv 2605.06546).

    Args:
        output_layer: the column-parallel head; `weight` its weight when tied, else None.
        hidden: [s/sp, 1, h].
        labels: [k, 1, s] int64. label_weight: [k, 1, s] FP32, 1/k on a valid target slot and 0 elsewhere.
        vocab_size: rows of the head from there on are padding.

    Returns:
        (loss_sum, weight_sum), FP32 scalars in units of target slots.
    """
    k, b, s = labels.shape
    logits, _ = output_layer(hidden, weight=weight)  # [s, 1, v/tp]
    columns = logits.shape[-1]
    tokens = max(0, vocab_size - tp_group.rank() * columns)  # of this rank's columns; none, where all are padding
    if tokens < columns:
        logits[..., tokens:] = -torch.inf  # no probability, and so no gradient: padding rows stay zero
    loss, count = multi_hot_cross_entropy(
        logits.reshape(b * s, -1), labels.reshape(k, b * s), label_weight.reshape(k, b * s), tp_group=tp_group
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
    """What megatron-core's schedule wants: (sum to differentiate, target slots, what to log).

    The third entry is a detached clone: megatron-core divides the first in place.
    """
    total = losses[Losses.MAIN] + mtp_weight * losses[Losses.MTP]
    count = losses[Losses.MAIN_COUNT].detach().round().to(torch.int)
    return total, count, {"losses": losses.detach().clone()}
