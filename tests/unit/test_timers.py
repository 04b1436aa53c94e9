"""Time by kind of layer: every second goes where it was spent, and the numbers of a run do not change."""

import contextlib
import time

import pytest
import torch

from boreal_megatron.config.load import load
from boreal_megatron.data.dataset import Loader
from boreal_megatron.profile.timers import KINDS, Clock, by_kind
from boreal_megatron.train import checkpoint, state as train_state, step as train_step
from tests.support.launch import write_config

STEPS = 3  # the last one is the first on single tokens
SLEEP = 0.05  # seconds, forward and again backward; this network's own work is a small part of it


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(SLEEP)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SLEEP)
        return gradient


def sleepy(module, args, out):
    return (Sleep.apply(out[0]), *out[1:]) if isinstance(out, tuple) else Sleep.apply(out)


@contextlib.contextmanager
def sleeping(chunk):
    """A place inside of every kind of layer sleeps."""
    attention, dense, gdn, moe = chunk.decoder.layers[:4]
    places = [attention.self_attention, dense.mlp, gdn.self_attention, moe.mlp, chunk.embedding.word_embeddings]
    places += [chunk.mtp.layers[0].eh_proj, chunk.decoder.final_norm]
    hooks = [place.register_forward_hook(sleepy) for place in places]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_second_has_its_kind_and_nothing_else_changes(recompute, corpus, mesh, tmp_path):
    config = load(
        [write_config(tmp_path / "config.yaml", corpus, tmp_path / "run", recompute=recompute, micro_batch=4)], []
    )
    with contextlib.closing(Loader(config, 0, 1, mesh.device)) as loader:

        def run(timed):
            chunks, wrapped, optimizer, state = checkpoint.begin(config, mesh, loader, None)
            clock, losses = Clock(wrapped, mesh), []
            for number in range(STEPS):
                slow = sleeping(chunks[0]) if number == STEPS - 1 else contextlib.nullcontext()
                with slow, clock.running() if timed else contextlib.nullcontext():
                    began = time.perf_counter()
                    step = train_step.take(config, wrapped, optimizer, mesh, loader, state, mark=clock.mark)
                    seconds = time.perf_counter() - began
                state = step.state
                losses.append((step.loss, step.mtp_loss, step.gradient_norm))
            assert wrapped[0].config.timers is None
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in chunks[0].modules() if m is not chunks[0])
            return losses, train_state.digest(chunks, optimizer, state), clock, seconds

        plain_losses, plain_digest, clock, _ = run(timed=False)
        assert clock.taken == []
        losses, digest, clock, seconds = run(timed=True)
    assert losses == plain_losses and digest == plain_digest
    spans = clock.spans()
    assert sum(span.seconds for span in spans) == pytest.approx(seconds, abs=5e-3)
    kinds = by_kind(spans, seconds)
    assert list(kinds) == list(KINDS) and sum(kinds.values()) == pytest.approx(seconds)
    # 8 windows, 4 a micro-batch; a recomputed layer sleeps on the way back as well.
    once, micro_batches = 2 * SLEEP, 2
    again = SLEEP if recompute == "full" else 0.0
    expected = {kind: micro_batches * (once + again) for kind in ("gdn", "attention", "dense", "moe")}
    # The MTP block embeds, too; its embedding and its projection are recomputed with it.
    # Recomputed, that embedding's backward pass is ready with the main network's, and may run among its half-blocks.
    late = SLEEP if recompute == "full" else 0.0
    expected |= {"mtp": micro_batches * (2 * (once + again) - late), "heads": micro_batches * 2 * once}
    # As the kinds add up to the step, none can have another's: what is left is less than one sleep.
    short = {kind: (kinds[kind], least) for kind, least in expected.items() if kinds[kind] < least}
    assert not short
    assert 0 < kinds["optimizer"] and 0 < kinds["data"] and 0 < kinds["communication"]
    names = {span.name for span in spans}
    assert {"forward gdn 3", "backward gdn 3", "backward attention 1", "backward mtp", "backward inputs"} <= names
