"""A run that died goes on as if it had not: equal SHA-256 of parameters, moments, generators and data ledger."""

import signal

from tests.support.launch import boreal, digests, metrics, start_and_signal

EP2 = "parallel.expert=2"


def test_killed_run_ends_like_an_uninterrupted_one(config_file, tmp_path):
    """SIGKILL of both processes at step 3, after the checkpoint of step 2; the rest crosses the phase switch."""
    whole = boreal(2, "train", config_file, EP2, "phases.0.until_steps=3", f"checkpoint.folder={tmp_path / 'whole'}")
    words = ["train", config_file, EP2, "phases.0.until_steps=3", f"checkpoint.folder={tmp_path / 'killed'}"]
    code, text = start_and_signal(2, words, lambda text: "iteration        3/" in text, signal.SIGKILL)
    assert code != 0
    assert "iter_0000002" in text and "iter_0000004" not in text
    resumed = boreal(2, *words)
    assert "iter_0000002: step 2" in resumed
    assert digests(resumed) == digests(whole)
    assert len(digests(whole)) == 4
    ours, theirs = metrics(tmp_path / "killed"), metrics(tmp_path / "whole")
    assert list(ours) == [1, 2, 3, 4, 5]
    assert [r["loss"] for r in ours.values()] == [r["loss"] for r in theirs.values()]


def test_sigterm_saves_and_leaves(config_file, tmp_path):
    """SIGTERM ends the step, saves, exits 0; the next start goes on there and ends like an uninterrupted run."""
    run = tmp_path / "run"
    words = ["train", config_file, "checkpoint.every_steps=100"]
    code, text = start_and_signal(1, words, lambda text: "iteration        1/" in text, signal.SIGTERM)
    assert code == 0, text[-3000:]
    step = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert step in (1, 2, 3), "it left soon after the signal"
    assert f"leaving after iteration {step}" in text
    resumed = boreal(1, *words)
    whole = boreal(1, *words, f"checkpoint.folder={tmp_path / 'whole'}")
    assert digests(resumed) == digests(whole)


def test_finished_run_has_nothing_to_do(config_file):
    first = boreal(1, "train", config_file)
    again = boreal(1, "train", config_file)
    assert "nothing left to do" in again
    assert digests(again) == digests(first)
