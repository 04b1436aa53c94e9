"""A run that died goes on as if it had not: equal SHA-256 of parameters, moments, generators and data ledger."""

import signal

import pytest
from tests.support.launch import boreal, digests, metrics, start_and_signal, uninterrupted


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return uninterrupted(corpus, tmp_path_factory.mktemp("whole"), steps=24, every_steps=12)


def assert_ends_like(whole, folder, text):
    _, theirs, expected = whole
    assert digests(text) == expected
    ours = metrics(folder)
    assert list(ours) == list(range(1, 25))
    # Kinds of time are means over the two ranks, which wait for each other in every step.
    took = sum(sum(r["kind_seconds"].values()) for r in theirs.values())
    assert took == pytest.approx(sum(r["seconds"] for r in theirs.values()), rel=0.2)
    assert [r["loss"] for r in ours.values()] == [r["loss"] for r in theirs.values()]


def test_killed_run_ends_like_an_uninterrupted_one(whole, tmp_path):
    """SIGKILL of every process after step 4, checkpoint at 2: it resumes at 2 or 4 and crosses the phase switch again."""
    words = ["train", whole[0], f"checkpoint.folder={tmp_path}", "checkpoint.every_steps=2"]
    code, text = start_and_signal(2, words, lambda text: "iteration        3/" in text, signal.SIGKILL)
    assert code != 0
    assert "iter_0000002" in text and "iteration       24/" not in text
    resumed = boreal(2, *words[:3], "checkpoint.every_steps=12")
    assert "resuming from" in resumed
    assert_ends_like(whole, tmp_path, resumed)
    # A finished run has nothing to do, and says so with the same state.
    again = boreal(2, *words)
    assert "nothing left to do" in again
    assert digests(again) == whole[2]


def test_sigterm_to_torchrun_saves_and_leaves(whole, tmp_path):
    """After a first save, whose helper process gets the signal too: the step ends, a checkpoint is written, and the
    next start ends like an uninterrupted run."""
    words = ["train", whole[0], f"checkpoint.folder={tmp_path}", "checkpoint.every_steps=2"]
    _, text = start_and_signal(2, words, lambda text: "iteration        3/" in text, signal.SIGTERM)
    step = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert f"leaving after iteration {step}" in text, text[-3000:]
    assert 3 <= step < 24
    assert_ends_like(whole, tmp_path, boreal(2, *words[:3], "checkpoint.every_steps=12"))
