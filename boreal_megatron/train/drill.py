"""The resume drill: before a long run, prove on its own machines and layout that it could be killed and go on."""

import gc
import shutil
from pathlib import Path

import torch.distributed as dist

from boreal_megatron import platform
from boreal_megatron.config import phases
from boreal_megatron.errors import ProblemsError
from boreal_megatron.log import Reporter
from boreal_megatron.train import checkpoint, optim, state as train_state, step as train_step, store


def rehearse(config, mesh, loader, resumed, steps):
    """Save, take some steps, load into a network built anew, take them again: all of it must be equal, bit for bit.

    Nothing of it stays: the run begins afterwards as if it had not been. It needs the room of one checkpoint more.

    Args:
        loader: the run's `Loader`.
        resumed: the checkpoint that the run goes on from, or None.
        steps: how many.

    Returns:
        a line that says what was proved.

    Raises:
        ProblemsError: what differed.
    """
    generators = platform.current().rng_state()
    folder = Path(config.checkpoint.folder) / "resume-drill"
    kept = config.checkpoint.model_copy(update={"folder": str(folder)})
    first, saved, then = _pass(config, mesh, loader, resumed, steps, kept)
    path = folder / store.name(saved.step)
    problems = [f"{path.name}: {problem}" for problem in checkpoint.damage(path, mesh)]
    if not problems:
        again, _, later = _pass(config, mesh, loader, path, steps)
        problems = [
            f"{what}: {name} {_short(a[name])}, then {_short(b[name])}"
            for what, a, b in (("as loaded", first[0], again[0]), (f"{steps} steps later", first[1], again[1]))
            for name in a
            if a[name] != b[name]
        ]
    dist.barrier()
    if mesh.rank == 0:
        shutil.rmtree(folder)
    platform.current().set_rng_state(generators)
    if problems:
        raise ProblemsError(f"the resume drill failed: {steps} steps from step {saved.step} do not repeat", problems)
    return (
        f"saved at step {saved.step}, loaded into a new network, {then.step - saved.step} steps repeated; losses, "
        "parameters, moments, generators and data ledger equal"
    )


def _pass(config, mesh, loader, path, steps, save_to=None):
    """(what the network was, what it is after the steps with its losses), the state before, the state after."""
    chunks, wrapped, optimizer, state = checkpoint.begin(config, mesh, loader, path)
    if save_to is not None:
        saver = checkpoint.Saver(config.model_copy(update={"checkpoint": save_to}), mesh, Reporter(None, False, 0, 0))
        saver.save(wrapped, optimizer, state)
        saver.close()
    before, start, losses = train_state.digest(chunks, optimizer, state), state, []
    for _ in range(steps):
        if phases.at(config.phases, *state.now) is None:
            break
        step = train_step.take(config, wrapped, optimizer, mesh, loader, state)
        state = step.state
        losses.append((step.loss, step.mtp_loss, step.gradient_norm))
    optim.gather(wrapped)
    after = {**train_state.digest(chunks, optimizer, state), "losses": losses}
    # The schedule's hooks hold the network in a cycle through autograd; two networks need not fit.
    settings = wrapped[0].config
    settings.grad_scale_func = settings.finalize_model_grads_func = settings.no_sync_func = None
    del chunks, wrapped, optimizer
    gc.collect()
    return (before, after), start, state


def _short(value):
    return value[:16] if isinstance(value, str) else value
