"""Known faults of parallel training, put back one at a time: what the layout bench has to notice.

Each is a context manager under which the library, or megatron-core below it, is wrong in one way.
"""

import contextlib
import dataclasses
import importlib

import torch
from boreal_megatron.data import batch
from boreal_megatron.model import boreal, gated_deltanet, head
from boreal_megatron.model.packing import Packing
from boreal_megatron.train import step
from megatron.core import parallel_state

# The package exports a function of the module's name over the module.
finalize_model_grads = importlib.import_module("megatron.core.distributed.finalize_model_grads")


@contextlib.contextmanager
def replaced(owner, name, value):
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def no_sequence_parallel_sum():
    """Norm gradients stay those of a rank's own positions."""
    return replaced(finalize_model_grads, "_allreduce_non_tensor_model_parallel_grads", lambda *args: None)


def tiled_heads():
    """Value head j reads key head j mod H instead of j // (HV / H)."""
    right = gated_deltanet.gated_delta_rule

    def wrong(q, k, v, a, b, A_log, dt_bias, **options):
        H, HV = q.shape[2], v.shape[2]
        order = torch.arange(HV).view(HV // H, H).T.reshape(-1)  # the heads that read key head 0, then 1, ...
        o, *rest = right(q, k, v[:, :, order], a[:, :, order], b[:, :, order], A_log[order], dt_bias[order], **options)
        return o[:, :, order.argsort()], *rest

    return replaced(gated_deltanet, "gated_delta_rule", wrong)


@contextlib.contextmanager
def mtp_normalised_per_rank():
    """Each rank divides its MTP loss by its own count of targets. The head is promised no gradient: it would turn this
    one into NaN."""
    right = head.multi_hot_loss

    def unpromised(*args, promise, **options):
        return right(*args, **options)

    def wrong(mtp_weight, losses):
        main, count, mtp, mtp_count = losses
        total = main + mtp_weight * mtp * (count / mtp_count).detach()
        return total, count.detach().round().to(torch.int), {"losses": losses.detach().clone()}

    with replaced(head, "multi_hot_loss", unpromised), replaced(step, "loss_function", wrong):
        yield


def batched_p2p():
    """Batched point-to-point calls under virtual stages: with two stages both directions share a peer."""
    right = boreal.transformer_config

    def wrong(config):
        settings = right(config)
        settings.batch_p2p_comm, settings.overlap_p2p_comm = True, False
        return settings

    return replaced(boreal, "transformer_config", wrong)


def router_bias_not_reduced():
    """Each rank moves the router's bias by its own loads."""

    def wrong(tokens, bias, rate, tp_dp_cp_group=None):
        return bias + torch.sign(tokens.mean(dim=-1, keepdim=True) - tokens) * rate

    return replaced(finalize_model_grads, "get_updated_expert_bias", wrong)


def zigzag_rows():
    """The row is dealt out in zigzag halves while the layers take chunks to be contiguous."""
    right = batch.make

    def wrong(windows, *, context, **options):
        whole, mine = right(windows, context=(0, 1), **options), right(windows, context=context, **options)
        rank, size = context
        halves = torch.arange(whole.ids.shape[-1]).chunk(2 * size)
        index = torch.cat([halves[rank], halves[2 * size - 1 - rank]])
        cut = ("ids", "labels", "label_weight", "positions", "mtp_ids", "mtp_labels", "mtp_label_weight")
        return dataclasses.replace(mine, **{name: getattr(whole, name)[..., index] for name in cut})

    return replaced(batch, "make", wrong)


def documents_forgotten_on_later_stages():
    """Pipeline stages behind the first take the row for one document."""
    right = Packing.of

    def wrong(batch):
        if parallel_state.get_pipeline_model_parallel_rank() == 0:
            return right(batch)
        ends = batch.cu_seqlens[[0, -1]]
        return right(dataclasses.replace(batch, edges=(0, batch.edges[-1]), cu_seqlens=ends, chunk_cu_seqlens=ends))

    return replaced(Packing, "of", staticmethod(wrong))


FAULTS = {None: contextlib.nullcontext} | {
    fault.__name__: fault
    for fault in (
        no_sequence_parallel_sum,
        tiled_heads,
        mtp_normalised_per_rank,
        batched_p2p,
        router_bias_not_reduced,
        zigzag_rows,
        documents_forgotten_on_later_stages,
    )
}
