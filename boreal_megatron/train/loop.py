"""The training loop, top to bottom."""

import contextlib
import json
import math
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from boreal_megatron import parallel
from boreal_megatron.config import check, fp8, phases
from boreal_megatron.data import blend
from boreal_megatron.data.dataset import Loader, check_tokenizer
from boreal_megatron.log import Reporter, megatron_line
from boreal_megatron.model import kernels, provider, router
from boreal_megatron.plan import params
from boreal_megatron.train import checkpoint, drill, optim, state as train_state, step as train_step


def train(config, *, world, resume_drill=0):
    """Train from scratch, or from the last verified checkpoint of `checkpoint.folder`.

    Args:
        config: `config.schema.Config`.
        world: number of processes, checked against the layout before anything starts.
        resume_drill: steps of `drill.rehearse` before the run; 0 leaves it out.

    Returns:
        dict: step, finished, validation_loss (None without validation data), raw_tokens, positions, digest.
    """
    check.check(config, world)
    check_tokenizer(config)
    mesh = parallel.start(config.parallel, config.seed)
    with contextlib.closing(Loader(config, mesh.dp_rank, mesh.dp_size, mesh.device, mesh.context)) as loader:
        return run(config, mesh, loader, resume_drill)


def run(config, mesh, loader, resume_drill):
    """`train`, once its processes and its data are there."""
    resumed, passed_over = checkpoint.find(config.checkpoint, mesh)
    rehearsed = drill.rehearse(config, mesh, loader, resumed, resume_drill) if resume_drill else None
    chunks, wrapped, optimizer, state = checkpoint.begin(config, mesh, loader, resumed)
    plan = phases.spans(config.phases)
    report = Reporter(config.checkpoint.folder, mesh.last_rank, plan[-1].end_step, state.step)
    announce(report, config, mesh, loader, chunks[0], plan, state, resumed, passed_over, rehearsed)
    signals = Signals()
    saver = checkpoint.Saver(config, mesh, report, resumed)
    first_step, validation, began = state.step, None, time.perf_counter()

    while phases.at(config.phases, *state.now) is not None:
        before, step = state, train_step.take(config, wrapped, optimizer, mesh, loader, state, saver.last_good)
        state, phase = step.state, step.phase
        if phase.name != before.ledger.phase:
            report.say(f" phase {phase.name}: bags of {phase.bag_size}, windows of {phase.sequence} positions")

        seconds, began = time.perf_counter() - began, time.perf_counter()
        report.advance(state.step, step.loss)
        balance = {} if step.loads is None else router.balance(step.loads)
        report.record(
            "train",
            state.step,
            phase=phase.name,
            loss=step.loss,
            loss_minus_log_bag=step.loss - math.log(phase.bag_size),
            mtp_loss=step.mtp_loss,
            gradient_norm=step.gradient_norm,
            learning_rate=step.learning_rate,
            seconds=seconds,
            data_seconds=step.data_seconds,
            positions_per_second=phase.positions_per_step / seconds,
            raw_tokens=state.ledger.raw_tokens,
            positions=state.ledger.positions,
            expert_loads=None if step.loads is None else step.loads.int().tolist(),
            **balance,
        )
        if state.step % config.log.every_steps == 0:
            report.say(
                megatron_line(
                    step=state.step,
                    steps=plan[-1].end_step,
                    samples=state.ledger.windows,
                    seconds=seconds,
                    lr=step.learning_rate,
                    batch=phase.windows_per_step(),
                    loss=step.loss,
                    mtp_loss=step.mtp_loss,
                    norm=step.gradient_norm,
                )
            )
        saver.poll()
        over = phases.at(config.phases, *state.now) is None
        leaving = signals.seen(mesh) and not over
        if config.data.validation and not leaving and (over or state.step % config.evaluation.every_steps == 0):
            windows = config.evaluation.final_windows if over else config.evaluation.windows
            validation, _ = train_step.evaluate(config, wrapped, mesh, phase, loader, windows)
            report.record("validation", state.step, phase=phase.name, bag_size=phase.bag_size, loss=validation)
            report.say(f" validation loss at iteration {state.step}: {validation:.6f} (bags of {phase.bag_size})")
            began = time.perf_counter()
        if over or leaving or state.step % config.checkpoint.every_steps == 0:
            saver.save(wrapped, optimizer, state)
            began = time.perf_counter()
        if leaving:
            break

    saver.close()
    finished = phases.at(config.phases, *state.now) is None
    optim.gather(wrapped)
    if not finished:
        report.say(f" leaving after iteration {state.step}; the same command goes on from {saver.last_good}")
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


def announce(report, config, mesh, loader, model, plan, state, resumed, passed_over, rehearsed):
    """What is about to happen: sizes, layout, kernels, phases in both units, data, what was rehearsed, where it goes on."""
    cut, size = config.parallel, params.count(config.model)
    report.say(
        f" BOREAL {config.model.pattern} | {size['with_mtp']:,} parameters, {size['active']:,} active | "
        f"world {mesh.world}: tensor {cut.tensor}{' + sequence' if cut.sequence_parallel else ''}, "
        f"pipeline {cut.pipeline}{f' x {cut.virtual_pipeline}' if cut.virtual_pipeline > 1 else ''}, "
        f"context {cut.context}, data {mesh.dp_size}, expert {cut.expert}"
        f"{f' x tensor {cut.expert_tensor}' if cut.expert_tensor > 1 else ''} | {config.precision}"
    )
    for line in kernels.lines(model.kernels):
        report.say(f" kernels {line}")
    for line in provider.lines(model.choices):
        report.say(f" modules {line}")
    for line in fp8.lines(config):
        report.say(f" precision {line}")
    for span in plan:
        report.say(
            f" phase {span.phase.name}: {span.steps} steps, {span.end_raw_token - span.first_raw_token:,} raw tokens, "
            f"{span.steps * span.phase.positions_per_step:,} positions (planned, full bags)"
        )
    for line in blend.render(loader.blend).splitlines():
        report.say(f" {line}")
    if warning := parallel.restart_hazard():
        report.say(f" warning: {warning}")
    for problem in passed_over:
        report.say(f" passed over: {problem}")
    if rehearsed:
        report.say(f" resume drill passed: {rehearsed}")
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
