"""Reading ahead: the same batches whoever asks for what, errors and ends where they belong, and less waiting."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.data_runs import PHASES, STEPS, fingerprint, run_config, write_sources
from tests.support.launch import ROOT

from boreal_megatron.config import phases
from boreal_megatron.data.dataset import Loader
from boreal_megatron.data.sampler import Ledger
from boreal_megatron.errors import BorealError
from boreal_megatron.train import step as train_step
from boreal_megatron.train.state import State


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("prefetch"))


def opened(config, dp_rank=0, dp_size=1):
    return contextlib.closing(Loader(config, dp_rank, dp_size, "cpu"))


def next_phase(config, state):
    index = phases.at(config.phases, *state.now)
    return None if index is None else config.phases[index]


def follow(config, loader, state=State(), steps=STEPS):
    """Reads as training does. Returns the fingerprints of every step's batches; the states before and after each."""
    found, states = [], [state]
    while (phase := next_phase(config, states[-1])) is not None and len(found) < steps:
        batches, state, _ = train_step.read(config, loader, phase, states[-1])
        found.append([fingerprint(batch) for batch in batches])
        states.append(state)
    return found, states


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("boreal-data")]


@pytest.mark.parametrize("boundaries", ["flat", "align"])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_same_batches_from_any_step_on(sources, dp_size, boundaries):
    for dp_rank in range(dp_size):
        plain = run_config(sources, boundaries=boundaries, prefetch_workers=0)
        with opened(plain, dp_rank, dp_size) as loader:
            expected, states = follow(plain, loader)
        assert len(expected) == STEPS and len({each for step in expected for each in step}) == sum(map(len, expected))
        assert list(dict.fromkeys(state.ledger.phase for state in states[1:])) == ["tst", "ntp", "again"]
        assert states[-1].ledger.sources["a"].epoch > 0
        for workers in (1, 3):
            config = run_config(sources, boundaries=boundaries, prefetch_workers=workers)
            with opened(config, dp_rank, dp_size) as loader:
                assert follow(config, loader)[0] == expected
                # As after a rehearsal: the same loader, which has read on, is asked for an earlier step.
                assert follow(config, loader, states[2], 3)[0] == expected[2:5]
            for done in range(0, STEPS, 1 if dp_rank == 0 else 4):
                saved = json.loads(json.dumps(states[done].to_dict()))
                with opened(config, dp_rank, dp_size) as loader:
                    assert follow(config, loader, State.from_dict(saved), 3)[0] == expected[done : done + 3]
    assert not data_threads()


@pytest.fixture(scope="module")
def table(sources):
    config = run_config(sources, prefetch_workers=0)
    with opened(config) as loader:
        found, states = follow(config, loader)
    return [(next_phase(config, state), state.ledger, step) for state, step in zip(states, found)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(asked=st.lists(st.tuples(st.booleans(), st.integers(0, STEPS - 1)), min_size=1, max_size=12))
def test_whatever_was_announced_every_request_gets_its_own(sources, table, asked):
    config = run_config(sources, prefetch_workers=2)
    with opened(config) as loader:
        for announced, number in asked:
            phase, ledger, expected = table[number]
            if announced:
                loader.prefetch(phase, ledger)
            else:
                batches, _ = loader.step(phase, Ledger.from_dict(ledger.to_dict()))
                assert [fingerprint(batch) for batch in batches] == expected


def test_threads_may_read_one_source_at_any_places(sources):
    """Epochs and bag sizes that push each other out of what a Source keeps."""
    with opened(run_config(sources, boundaries="align")) as loader:
        source = loader.sources["a"]
        places = [(epoch, offset, bag) for epoch in range(5) for offset in (0, 30) for bag in (1, 3)]
        expected = {place: source.read_window(place[:2], place[2], 8) for place in places}
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                asked = random.Random(1).choices(places, k=800)
                for place, found in zip(asked, pool.map(lambda at: source.read_window(at[:2], at[2], 8), asked)):
                    assert all(np.array_equal(found[key], expected[place][key]) for key in found)
        finally:
            sys.setswitchinterval(before)


class Slow:
    """Makes a source's windows take `seconds` each, and notes which thread read them when. A real source reads."""

    def __init__(self, loader, seconds=0.05):
        self.seconds, self.windows, self.arrived = seconds, [], threading.Condition()
        for source in loader.sources.values():
            source.read_window = self._wrapped(source.read_window)

    def _wrapped(self, read_window):
        def read(*args):
            time.sleep(self.seconds)
            found = read_window(*args)
            with self.arrived:
                self.windows.append(threading.current_thread().name)
                self.arrived.notify_all()
            return found

        return read

    def wait_for(self, count):
        with self.arrived:
            return self.arrived.wait_for(lambda: len(self.windows) >= count, timeout=20)


WINDOWS = PHASES[0].windows_per_step()


def test_a_slow_source_without_threads_is_waited_for(sources):
    config = run_config(sources, prefetch_workers=0)
    with opened(config) as loader:
        slow = Slow(loader)
        state = State()
        for number in (1, 2):
            batches, state, waited = train_step.read(config, loader, PHASES[0], state)
            assert waited >= WINDOWS * slow.seconds
            assert slow.windows == ["MainThread"] * WINDOWS * number  # nothing is read before its turn


def test_a_slow_source_is_read_while_a_step_trains(sources):
    config = run_config(sources, prefetch_workers=2)
    with opened(config) as loader:
        slow = Slow(loader)
        _, state, first = train_step.read(config, loader, PHASES[0], State())
        assert first >= WINDOWS * slow.seconds / 2  # nothing was ahead; two threads
        for number in (2, 3):
            assert slow.wait_for(WINDOWS * number)  # "training": it lasts until the next step is there
            time.sleep(5 * slow.seconds)
            assert len(slow.windows) == WINDOWS * number  # and no more than the next step is read ahead
            _, state, waited = train_step.read(config, loader, PHASES[0], state)
            assert waited < slow.seconds  # not even one window, of the eight that a step in line waits for
        assert "MainThread" not in slow.windows


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_reaches_the_step_that_needs_the_batch(tmp_path, workers):
    """An id beyond the vocabulary, at the place where step 4 begins to read."""
    bad = 4
    prefixes = write_sources(tmp_path)
    config = run_config(prefixes, prefetch_workers=workers)
    with opened(config) as loader:
        _, states = follow(config, loader, steps=bad)
        source, cursor = loader.sources["b"], states[bad].ledger.sources["b"]
        [document], [inside], *_ = source.spans(cursor.epoch, cursor.offset + 5, cursor.offset + 6)
        token = int(source.reader.document_lengths[:document].sum()) + int(inside)
    stored = np.memmap(f"{prefixes['b']}.bin", np.int32, "r+")
    stored[token] = 77_777
    stored.flush()
    with opened(config) as loader:
        found, states = follow(config, loader, steps=bad)
        for _ in range(2):  # it is an error each time that it is asked for
            with pytest.raises(BorealError, match=f"source 'b' .* document {document} has id 77777 .* 0 to 19999 "):
                train_step.read(config, loader, next_phase(config, states[bad]), states[bad])
        assert follow(config, loader, State(), 1)[0] == found[:1]  # and the loader still works
    assert not data_threads()


def test_tensors_arrive_on_the_device_that_was_named(sources):
    for workers in (0, 2):
        with opened(run_config(sources, validation=sources["b"], prefetch_workers=workers)) as loader:
            loader.device = torch.device("meta")
            batches = [*loader.step(PHASES[0], Ledger())[0], *loader.validation(1, 16, 2)]
            for batch in batches:
                tensors = [value for value in vars(batch).values() if torch.is_tensor(value)]
                assert len(tensors) == 9 and {tensor.device.type for tensor in tensors} == {"meta"}


def test_an_error_of_the_plan_arrives_as_itself(sources):
    config = run_config(sources, prefetch_workers=2)
    with opened(config, dp_size=3) as loader:
        loader.prefetch(PHASES[0], Ledger())
        with pytest.raises(BorealError, match="step of 8 windows does not divide"):
            loader.step(PHASES[0], Ledger())


def test_closing_gives_up_what_is_pending(sources):
    config = run_config(sources, prefetch_workers=1)
    with opened(config) as loader:
        slow = Slow(loader, 0.3)
        loader.prefetch(PHASES[0], Ledger())
        assert slow.wait_for(1)
    done = len(slow.windows)
    assert done < WINDOWS / 2 and not data_threads()
    time.sleep(0.4)
    assert len(slow.windows) == done


def test_an_interrupt_ends_a_wait_and_the_threads(sources, tmp_path):
    """Ctrl-C while the main thread waits for a step of which every window takes a while."""
    code = f"""
import contextlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.support.data_runs import PHASES, run_config
from boreal_megatron.data.dataset import Loader
from boreal_megatron.data.sampler import Ledger
with contextlib.closing(Loader(run_config({sources!r}, prefetch_workers=2), 0, 1, "cpu")) as loader:
    for source in loader.sources.values():
        source.read_window = lambda *args: time.sleep(1.0)
    print("waiting", flush=True)
    list(loader.step(PHASES[0], Ledger())[0])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in said and process.returncode != 0
