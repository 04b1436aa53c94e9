"""One training step and one evaluation, through megatron-core's pipeline schedules."""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from boreal_megatron.config import phases
from boreal_megatron.config.schema import Phase
from boreal_megatron.model.head import Losses, loss_function
from boreal_megatron.train import health, optim, schedule
from boreal_megatron.train.state import State


@dataclass(frozen=True)
class Step:
    """What one step did; `state` is the run's after it. Losses in nats a target, `mtp_loss` None without an MTP head;
    `data_seconds` that the slowest rank stood still for its batches; `loads` [MoE layers, experts], tokens that each
    expert got, or None without experts."""

    state: State
    phase: Phase
    loss: float
    mtp_loss: float | None
    gradient_norm: float
    learning_rate: float
    data_seconds: float
    loads: torch.Tensor | None


def take(config, wrapped, optimizer, mesh, loader, state, last_good=None, mark=lambda kind: None):
    """Read a global batch, run it forward and backward, move the weights.

    Args:
        wrapped: this rank's DDP-wrapped chunks, a list.
        state: the run's, with a phase left to train in.
        last_good: the checkpoint that an error names.
        mark: called with what the time belongs to from there on (`profile.timers.Clock.mark`).

    Returns:
        Step.
    """
    phase = config.phases[phases.at(config.phases, *state.now)]
    if phase.name != state.ledger.phase:
        state = dataclasses.replace(state, entered=state.now)
    lr = schedule.learning_rate(config, state.now, state.entered)
    mark("data")
    batches, after, data_seconds = read(config, loader, phase, state)
    mark("optimizer")
    optimizer.zero_grad()
    losses, loads = forward_backward(config, wrapped, mesh, phase, batches)
    mark("optimizer")
    loss, mtp_loss = means(losses)
    norm = optim.gradient_norm(optimizer)
    health.check(state.step + 1, loss, norm, last_good)
    optim.set_learning_rate(optimizer, lr, config.optimizer.weight_decay)
    optim.update(optimizer, norm, config.optimizer.clip)
    mark("communication")
    return Step(after, phase, loss, mtp_loss, norm, lr, _longest(data_seconds, mesh), loads)


def read(config, loader, phase, state):
    """This rank's micro-batches of the next step; those of the step after it begin to be read.

    Returns:
        the micro-batches, a list; the State after the step; seconds that this took.
    """
    began = time.perf_counter()
    batches, ledger = loader.step(phase, state.ledger)
    after = dataclasses.replace(state, step=state.step + 1, ledger=ledger)
    if (following := phases.at(config.phases, *after.now)) is not None:
        loader.prefetch(config.phases[following], ledger)
    batches = list(batches)
    return batches, after, time.perf_counter() - began


def _longest(seconds, mesh):
    """One rank that waits makes all wait: in the next collective, where it does not show whose fault it was."""
    found = torch.tensor(seconds, device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def forward_backward(config, wrapped, mesh, phase, batches, *, train=True):
    """Run a global batch through the pipeline; in training, gradients are reduced and divided by the global
    weight of all targets at the end.

    Args:
        wrapped: this rank's DDP-wrapped chunks, a list.
        batches: this rank's micro-batches, a list.

    Returns:
        (losses [4] FP32 of `head.Losses`, summed over the global batch, on every rank;
        loads [MoE layers, experts] of the whole network, on the host, or None without experts and in evaluation).
    """
    wrapped[0].config.moe_router_bias_update_rate = phase.router_bias_rate  # one config for all chunks
    for chunk in wrapped:
        chunk.train(train)
        if train:
            chunk.zero_grad_buffer()

    def forward_step(iterator, model):
        return model(next(iterator), phase.mtp_weight), partial(loss_function, phase.mtp_weight)

    with torch.set_grad_enabled(train):
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in wrapped],  # every chunk is told where the documents lie
            model=wrapped,
            num_microbatches=len(batches),
            seq_length=phase.sequence * config.micro_batch,  # a micro-batch is one packed row
            micro_batch_size=1,
            forward_only=not train,
        )
    losses = torch.zeros(4, device=mesh.device)
    for output in outputs:
        losses += output["losses"]
    dist.all_reduce(losses, group=mesh.groups.dp_cp)
    dist.all_reduce(losses, group=mesh.groups.pp)  # zeros on every stage but the last
    if train:
        weight = losses[Losses.MAIN_COUNT]
        for chunk in wrapped:
            chunk.scale_gradients(torch.where(weight > 0, 1.0 / weight, 0.0))
    return losses, _all_stages([chunk.module.expert_loads for chunk in wrapped], mesh) if train else None


def _all_stages(loads, mesh):
    """The expert loads of every pipeline stage's chunks, in the network's order, on every rank, in the host's memory:
    a device's tensor would arrive at the other ranks as one of the device that it left."""
    stages = [[None if chunk is None else chunk.cpu() for chunk in loads]]
    if mesh.groups.pp.size() > 1:
        mine, stages = stages[0], [None] * mesh.groups.pp.size()
        dist.all_gather_object(stages, mine, group=mesh.groups.pp)
    # The first chunks of all stages come before the second ones.
    found = [stage[number] for number in range(len(loads)) for stage in stages if stage[number] is not None]
    return torch.cat(found) if found else None


def means(losses):
    """(main loss, MTP loss or None) in nats a target."""
    values = losses.tolist()
    weight, count = values[Losses.MAIN_COUNT], values[Losses.MTP_COUNT]
    main = values[Losses.MAIN] / weight if weight else 0.0
    return main, values[Losses.MTP] / count if count else None


def evaluate(config, wrapped, mesh, phase, loader, windows):
    """Validation loss of the first `windows` rows, with the phase's bags: nats a target, before and without mixing
    in the MTP loss."""
    batches = list(loader.validation(phase.bag_size, phase.sequence, windows))
    losses, _ = forward_backward(config, wrapped, mesh, phase, batches, train=False)
    return means(losses)
