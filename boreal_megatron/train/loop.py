"""The training loop, top to bottom."""

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from boreal_megatron import parallel
from boreal_megatron.config import check
from boreal_megatron.data.dataset import Loader, check_tokenizer
from boreal_megatron.log import Reporter, megatron_line
from boreal_megatron.model import boreal, router
from boreal_megatron.plan import params
from boreal_megatron.train import checkpoint, health, optim, phases, schedule, state as train_state, step as train_step


def train(config, *, world):
    """Train from scratch, or from the last complete checkpoint of `checkpoint.folder`.

    Args:
        config: `config.schema.Config`.
        world: number of processes, checked against the layout before anything starts.

    Returns:
        dict: step, finished, validation_loss (None without validation data), raw_tokens, positions, digest.
    """
    check.check(config, world)
    check_tokenizer(config)
    mesh = parallel.start(config.parallel, config.seed)
    loader = Loader(config, mesh.dp_rank, mesh.dp_size, mesh.device, mesh.context)
    chunks = boreal.build(config, mesh)
    wrapped = optim.wrap(config, chunks)
    optimizer = optim.build(config, wrapped)

    state = train_state.State()
    resumed = checkpoint.latest(config.checkpoint.folder)
    if resumed:
        state = checkpoint.load(resumed, config, wrapped, optimizer, mesh)
    state = state.continue_on(loader.fingerprints())
    plan = phases.spans(config.phases)
    report = Reporter(config.checkpoint.folder, mesh.last_rank, plan[-1].end_step, state.step)
    announce(report, config, mesh, plan, state, resumed)
    signals = Signals()
    first_step, last_good, validation, began = state.step, resumed, None, time.perf_counter()

    while (index := phases.at(config.phases, *state.now)) is not None:
        phase = config.phases[index]
        if phase.name != state.ledger.phase:
            state = dataclasses.replace(state, entered=state.now)
            report.say(f" phase {phase.name}: bags of {phase.bag_size}, windows of {phase.sequence} positions")
        lr = schedule.learning_rate(config, state.now, state.entered)
        batches, ledger = loader.step(phase, state.ledger)
        optimizer.zero_grad()
        losses, loads = train_step.forward_backward(config, wrapped, mesh, phase, list(batches))
        loss, mtp_loss = train_step.means(losses)
        norm = optim.gradient_norm(optimizer)
        health.check(state.step + 1, loss, norm, last_good)
        optim.set_learning_rate(optimizer, lr, config.optimizer.weight_decay)
        optim.update(optimizer, norm, config.optimizer.clip)
        state = dataclasses.replace(state, step=state.step + 1, ledger=ledger)

        seconds, began = time.perf_counter() - began, time.perf_counter()
        report.advance(state.step, loss)
        balance = {} if loads is None else router.balance(loads)
        report.record(
            "train",
            state.step,
            phase=phase.name,
            loss=loss,
            loss_minus_log_bag=loss - math.log(phase.bag_size),
            mtp_loss=mtp_loss,
            gradient_norm=norm,
            learning_rate=lr,
            seconds=seconds,
            positions_per_second=phase.positions_per_step / seconds,
            raw_tokens=ledger.raw_tokens,
            positions=ledger.positions,
            expert_loads=None if loads is None else loads.int().tolist(),
            **balance,
        )
        if state.step % config.log.every_steps == 0:
            report.say(
                megatron_line(
                    step=state.step,
                    steps=plan[-1].end_step,
                    samples=ledger.windows,
                    seconds=seconds,
                    lr=lr,
                    batch=phase.windows_per_step(),
                    loss=loss,
                    mtp_loss=mtp_loss,
                    norm=norm,
                )
            )
        over = phases.at(config.phases, *state.now) is None
        leaving = signals.seen(mesh) and not over
        if config.data.validation and not leaving and (over or state.step % config.evaluation.every_steps == 0):
            windows = config.evaluation.final_windows if over else config.evaluation.windows
            validation, _ = train_step.evaluate(config, wrapped, mesh, phase, loader, windows)
            report.record("validation", state.step, phase=phase.name, bag_size=phase.bag_size, loss=validation)
            report.say(f" validation loss at iteration {state.step}: {validation:.6f} (bags of {phase.bag_size})")
            began = time.perf_counter()
        if over or leaving or state.step % config.checkpoint.every_steps == 0:
            last_good = checkpoint.save(config.checkpoint.folder, config, wrapped, optimizer, state, mesh)
            report.say(f" saved {last_good}")
            began = time.perf_counter()
        if leaving:
            report.say(f" leaving after iteration {state.step}; the same command goes on from {last_good}")
            break

    finished = phases.at(config.phases, *state.now) is None
    if finished and state.step == first_step:
        report.say(f" nothing left to do: {resumed} is the end of this run")
        validation = last_validation(config.checkpoint.folder)
    summary = {
        "step": state.step,
        "finished": finished,
        "validation_loss": validation,
        "raw_tokens": state.ledger.raw_tokens,
        "positions": state.ledger.positions,
        "digest": train_state.digest(chunks, optimizer, state),
    }
    report.say(" state: " + " ".join(f"{key}={value[:16]}" for key, value in summary["digest"].items()))
    report.close()
    signals.restore()
    return summary


def announce(report, config, mesh, plan, state, resumed):
    """What is about to happen: sizes, layout, phases in both units, where it goes on."""
    cut, size = config.parallel, params.count(config.model)
    report.say(
        f" BOREAL {config.model.pattern} | {size['with_mtp']:,} parameters, {size['active']:,} active | "
        f"world {mesh.world}: tensor {cut.tensor}{' + sequence' if cut.sequence_parallel else ''}, "
        f"pipeline {cut.pipeline}{f' x {cut.virtual_pipeline}' if cut.virtual_pipeline > 1 else ''}, "
        f"context {cut.context}, data {mesh.dp_size}, expert {cut.expert}"
        f"{f' x tensor {cut.expert_tensor}' if cut.expert_tensor > 1 else ''} | {config.precision}"
    )
    for span in plan:
        report.say(
            f" phase {span.phase.name}: {span.steps} steps, {span.end_raw_token - span.first_raw_token:,} raw tokens, "
            f"{span.steps * span.phase.positions_per_step:,} positions (planned, full bags)"
        )
    if warning := parallel.restart_hazard():
        report.say(f" warning: {warning}")
    if resumed:
        report.say(f" resuming from {resumed}: step {state.step}, {state.ledger.raw_tokens:,} raw tokens read")


def last_validation(folder):
    """The last validation loss that an earlier run of this folder wrote down."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return None
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return next((r["loss"] for r in reversed(records) if r["kind"] == "validation"), None)


class Signals:
    """SIGTERM and SIGINT mean: finish the step, save, leave. A second SIGINT interrupts at once."""

    def __init__(self):
        self.received = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.received = True
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def seen(self, mesh):
        """Whether any rank was told to leave; all ranks hear of it at the same step."""
        flag = torch.tensor([int(self.received)], device=mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
