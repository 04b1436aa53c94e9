"""What goes wrong is said before it costs anything: found, expected, do. Nothing half-written is taken for whole."""

import shutil
import subprocess
import sys

import pytest
from boreal_megatron import parallel
from boreal_megatron.cli import main
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.train import store
from tests.support.configs import config_for, tiny_model
from tests.support.launch import ROOT, boreal, environment


def refused(capsys, *words):
    """`boreal WORDS` in this process, which must fail before torch.distributed starts; what it prints."""
    assert main([str(word) for word in words]) == 1
    return capsys.readouterr().err


def test_check_lists_every_problem_and_train_refuses_before_it_starts(config_file, capsys):
    for verb in ("check", "train"):
        text = refused(capsys, verb, config_file, "parallel.tensor=3", "phases.0.sequence=90")
        assert "parallel.tensor=3 does not divide model.attention.kv_heads=2, model.gdn.key_heads=2," in text
        assert "phases.0 (superposition).sequence=90 does not divide" in text
    assert main(["check", str(config_file)]) == 0
    text = refused(capsys, "check", config_file, "micro_batch=1", "--world", "7", "parallel.tensor=2")
    assert "world=7 is not a multiple of parallel.tensor=2; nearest: 2, 4, 8" in text
    with pytest.raises(SystemExit):
        main(["check", str(config_file), "--wrold", "7"])


def test_restarts_that_would_hang_are_announced():
    hazard = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in parallel.restart_hazard(hazard)
    assert parallel.restart_hazard(hazard | {"TORCHELASTIC_USE_AGENT_STORE": "False"}) is None
    assert parallel.restart_hazard(hazard | {"TORCHELASTIC_MAX_RESTARTS": "0"}) is None


def test_tokenizer_of_another_size_is_refused(config_file, corpus, capsys):
    for rows in (512, 8192):
        text = refused(capsys, "train", config_file, f"model.vocab_size={rows}")
        assert f"has 640 entries, model.vocab_size is {rows}" in text and "set model.vocab_size=640" in text
    assert "tokenizer.json" in refused(capsys, "train", config_file, f"data.tokenizer={corpus['train']}")


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_truncated_data_is_refused(ending, config_file, corpus, tmp_path, capsys):
    for end in (".bin", ".idx"):
        shutil.copy(f"{corpus['train']}{end}", tmp_path / f"cut{end}")
    path = tmp_path / f"cut{ending}"
    path.write_bytes(path.read_bytes()[:-7])
    assert f"cut{ending}" in refused(capsys, "train", config_file, f"data.sources.text={tmp_path / 'cut'}")


def test_checkpoint_of_another_model_is_refused(tmp_path):
    ours, theirs = config_for(tiny_model()), config_for(tiny_model(ffn_hidden_size=128, tie_embeddings=False))
    saved = theirs.model_dump(mode="json", exclude_none=True)
    with pytest.raises(ProblemsError, match="another model") as caught:
        store.check_same_model("X", saved, ours)
    assert caught.value.problems == [
        "model.ffn_hidden_size: the checkpoint has 128, the configuration 96",
        "model.tie_embeddings: the checkpoint has False, the configuration True",
    ]
    store.check_same_model("X", saved, theirs)


def test_source_that_changed_is_refused():
    from boreal_megatron.train.state import State

    state = State(sources={"text": "aaa", "code": "bbb"})
    assert state.continue_on({"text": "aaa", "new": "ccc"}).sources == {"text": "aaa", "code": "bbb", "new": "ccc"}
    with pytest.raises(ProblemsError, match="data.sources.text: its files, "):
        state.continue_on({"text": "zzz"})


def test_tracker_that_names_nothing(tmp_path):
    assert store.latest(tmp_path) is None
    (tmp_path / store.TRACKER).write_text("7\n")
    with pytest.raises(BorealError, match="names step 7, but .* is not a complete checkpoint; checkpoints there: none"):
        store.latest(tmp_path)
    (tmp_path / store.TRACKER).write_text("soon")
    with pytest.raises(BorealError, match="expected a step number"):
        store.latest(tmp_path)
    with pytest.raises(BorealError, match="is no checkpoint"):
        store.resolve(tmp_path / "empty")


def test_full_disk_keeps_the_last_checkpoint(config_file, tmp_path):
    """A file-size limit of 1 MB stops the second save's shards (SIGXFSZ ignored: EFBIG, as ENOSPC): the run says so,
    exits 1, and the first checkpoint is still the latest and loads."""
    run = tmp_path / "run"
    boreal(1, "train", config_file, "phases.0.until_steps=1", "phases.1.until_steps=2")
    before = sorted(p.name for p in run.iterdir() if p.name.startswith("iter_"))
    assert before == ["iter_0000002"]
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        "from boreal_megatron.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    script = tmp_path / "limited.py"
    script.write_text("if __name__ == '__main__':\n    " + code + "\n")
    done = subprocess.run(
        [sys.executable, script, "train", str(config_file)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    text = done.stdout + done.stderr
    assert done.returncode == 1, text[-3000:]
    assert "checkpoint iter_0000004 was not saved" in text and f"the last verified checkpoint is {run}/iter_0000002" in text
    assert "iteration        5/" in text  # a run outlives a failed save, but does not end with one
    assert (run / store.TRACKER).read_text().strip() == "2"
    assert not (run / "iter_0000004").exists()
    assert "resuming from" in boreal(1, "train", config_file)


@pytest.mark.slow
def test_a_cut_shard_stops_a_run_that_would_resume_from_it(config_file, tmp_path):
    run = tmp_path / "run"
    boreal(1, "train", config_file)
    newest = store.latest(run)
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-5000])
    text = boreal(1, "train", config_file, expect=1)
    assert f"{newest} is damaged" in text and f"{shard.name}: " in text and "checkpoint.fall_back=true" in text
    text = boreal(1, "train", config_file, "checkpoint.fall_back=true")
    assert f"passed over: iter_0000005: {shard.name}" in text and f"resuming from {run}/iter_0000004" in text
    assert store.verify(newest) == []


def test_not_finite_numbers_stop_the_run_before_the_weights_move():
    from boreal_megatron.train import health

    health.check(1, 2.0, 3.0, None)
    with pytest.raises(BorealError, match="step 5: loss=nan, gradient norm=inf.*resume from X"):
        health.check(5, float("nan"), float("inf"), "X")


def test_plan_of_an_unknown_network(capsys):
    text = refused(capsys, "plan", "params", "boreal-3b")
    assert "neither a file nor a preset; presets: tiny, boreal-250m" in text


