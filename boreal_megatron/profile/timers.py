"""What a training step spends its time on, by kind of layer, cheap enough for every run.

A step is cut into stretches that follow each other: a *mark* says what kind the time belongs to from there on, until
the next mark. Stretches can neither overlap nor leave a gap, so they add up to the step. A mark is one CUDA event,
which nobody waits for, or one reading of the clock on a CPU.

Forward, a half-block begins where its module is called. Backward, it begins where the gradient of its output is
there, a hook on that tensor: one after the other, as the network is a chain. A recomputed half-block is called again on
the way back and counts for its kind. Hooks change no value, and they are there in measured steps only.

    gdn, attention, dense, moe   half-blocks of the main network, tensor, context and expert exchanges included
    heads                        embedding, rotary angles, final norm, output head, both losses
    mtp                          the MTP block with its half-blocks and its embedding (recomputed, that embedding's backward
                                 pass may run among the main network's half-blocks, and counts there)
    communication                waiting for other pipeline stages; reducing and dividing gradients; summing the loss
    optimizer                    clearing gradients, their norm, clipping, the update
    data                         waiting for batches and copying them to the device
    idle                         all else of the step: Python between the parts, logging

The device's own gaps within a half-block count for that half-block.
"""

import contextlib
import threading
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist

from boreal_megatron import platform
from boreal_megatron.plan import flops
from boreal_megatron.profile.rates import LETTERS

KINDS = (*flops.KINDS, "communication", "optimizer", "data", "idle")


class Span(NamedTuple):
    """A stretch of a step: of which kind, what exactly (`forward gdn 2`: half-block 2 of the network), how long."""

    kind: str
    name: str
    seconds: float


class Clock:
    """Marks of one rank's training steps.

    Args:
        wrapped: this rank's DDP-wrapped chunks, a list.
        mesh: `parallel.Mesh`.
        annotate: name -> a context manager that shows a stretch to another tool; None for none.
    """

    def __init__(self, wrapped, mesh, annotate=None):
        self.chunks, self.settings = [chunk.module for chunk in wrapped], wrapped[0].config
        # Between the parts of the schedule a pipeline stage waits for its neighbours.
        self.between = "communication" if mesh.groups.pp.size() > 1 else "idle"
        self.annotate, self.thread, self.open = annotate, None, {}
        self.marks = None  # of the step that is being measured: (kind, name, stamp)
        self.taken = []  # of the last one

    def mark(self, kind, name=None):
        """From here on the time belongs to `kind`. Nothing, outside of `running`."""
        if self.marks is None:
            return
        assert kind in KINDS, kind
        self.marks.append((kind, name or kind, platform.current().stamp()))
        if self.annotate:
            self._close()
            self.open[threading.get_ident()] = shown = self.annotate(name or kind)
            shown.__enter__()

    @contextlib.contextmanager
    def running(self):
        """Measure the training step inside; `spans` has it afterwards."""
        settings, finalize = self.settings, self.settings.finalize_model_grads_func

        def finalized(*args, **kwargs):
            self.mark("communication", "gradients")
            return finalize(*args, **kwargs)

        hooks = [hook for chunk in self.chunks for hook in self._hooks(chunk)]
        settings.timers, settings.finalize_model_grads_func = self._timer, finalized
        self.marks, self.thread = [], threading.get_ident()
        self.mark("idle")
        try:
            yield
        finally:
            self.mark("idle")
            self._close()
            self.taken, self.marks = self.marks, None
            settings.timers, settings.finalize_model_grads_func = None, finalize
            for hook in hooks:
                hook.remove()

    def spans(self):
        """The stretches of the last measured step, in their order: a list of Span."""
        kinds, names, stamps = zip(*self.taken)
        return [Span(*each) for each in zip(kinds, names, platform.current().between(stamps))]

    def _close(self):
        """End what is shown to another tool in this thread; a GPU's backward pass has a thread of its own."""
        if shown := self.open.pop(threading.get_ident(), None):
            shown.__exit__(None, None, None)

    # -------------------------------------------------------------- where marks are set

    def _hooks(self, chunk):
        stack = chunk.decoder
        for letter, layer in zip(stack.layer_type_list, stack.layers, strict=True):
            yield from self._watch(layer, LETTERS[letter], f"{LETTERS[letter]} {layer.layer_number}")
        if len(stack.layers):
            inputs = "heads" if chunk.pre_process else self.between
            yield stack.layers[0].register_forward_pre_hook(
                lambda module, args, values: self._at_gradient(
                    values["hidden_states"], inputs, "backward inputs", last=True
                ),
                with_kwargs=True,
            )
        if hasattr(stack, "final_norm"):
            yield from self._watch(stack.final_norm, "heads", "head")
        if chunk.mtp_process:
            yield from self._watch(chunk.mtp, "mtp", "mtp")
            yield chunk.mtp.register_forward_hook(lambda *_: self.mark("heads", "forward head"))

    def _watch(self, module, kind, name):
        yield module.register_forward_pre_hook(lambda *_: self.mark(kind, f"forward {name}"))
        yield module.register_forward_hook(lambda _, args, out: self._at_gradient(out, kind, f"backward {name}"))

    def _at_gradient(self, tensor, kind, name, last=False):
        """Mark the moment when the gradient of a module's output is complete."""
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor

        def reached(gradient):
            self.mark(kind, name)
            if last and threading.get_ident() != self.thread:
                self._close()

        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(reached)

    def _timer(self, name, log_level=None):
        """megatron-core's `timers`: its schedules start and stop one around everything that they do."""
        starts = {
            "forward-backward": (self.between, "schedule"),
            "forward-compute": ("heads", "forward inputs"),
            "backward-compute": ("heads", "backward head"),
        }
        return _Timer(self, starts.get(name), (self.between, "schedule") if name.endswith("-compute") else None)


class _Timer(NamedTuple):
    """One of megatron-core's timers; what to mark where it starts and stops, None for nothing."""

    clock: Clock
    begins: tuple | None
    ends: tuple | None

    def start(self, barrier=False):
        if self.begins:
            self.clock.mark(*self.begins)

    def stop(self, barrier=False):
        if self.ends:
            self.clock.mark(*self.ends)


def by_kind(spans, step_seconds):
    """Seconds of each of KINDS in one step.

    Args:
        spans: of the step.
        step_seconds: the whole step's; what is not in the spans is idle.
    """
    sums = dict.fromkeys(KINDS, 0.0)
    for span in spans:
        sums[span.kind] += span.seconds
    sums["idle"] += step_seconds - sum(sums.values())
    return sums


def by_name(spans):
    """{name: seconds} of the spans, in their order."""
    sums = defaultdict(float)
    for span in spans:
        sums[span.name] += span.seconds
    return dict(sums)


def mean_over_ranks(seconds, mesh):
    """Mean over all ranks of each kind's seconds. With pipeline stages no rank has all kinds; a kind's share of the
    mean is its share of all devices' time."""
    total = torch.tensor([seconds[kind] for kind in KINDS], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(total)
    return dict(zip(KINDS, (total / mesh.world).tolist(), strict=True))
