"""Each layout continues one process's run: same checkpoint, same losses, norms and expert loads.

fp32 on gloo, 3 steps that cross the phase switch; loss rtol 1e-5, gradient norm rtol 1e-4, loads exact.
"""

import shutil

import pytest
from tests.support.launch import boreal, metrics, write_config

DENSE = "model.pattern=*-G-G- / *-"
LAYOUTS = {
    "tensor 2 + sequence": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "pipeline 2": ["parallel.pipeline=2"],
    "data 2, expert 2": ["parallel.expert=2"],
    "data 2, plain optimizer": ["optimizer.distributed=false"],
}


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    """A run of 5 steps in one process with checkpoints at 2 and 4; bags of 4 until step 3."""
    folder = tmp_path_factory.mktemp("one")
    phases = [
        {"name": "superposition", "until_steps": 3, "bag_size": 4, "sequence": 96, "positions_per_step": 768},
        {"name": "recovery", "until_steps": 5, "sequence": 96, "positions_per_step": 768},
    ]
    config = write_config(folder / "config.yaml", corpus, folder / "run", phases=phases)
    boreal(1, "train", config)
    return config, folder / "run"


def continue_from(source, step, target):
    """A folder that holds only the checkpoint of one step."""
    target.mkdir()
    shutil.copytree(source / f"iter_{step:07d}", target / f"iter_{step:07d}")
    (target / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    return target


def assert_same(ours, theirs, steps):
    for step in steps:
        a, b = ours[step], theirs[step]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), f"loss at step {step}"
        assert a["mtp_loss"] == pytest.approx(b["mtp_loss"], rel=1e-5), f"MTP loss at step {step}"
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4), f"norm at step {step}"
        assert a["raw_tokens"] == b["raw_tokens"]
        assert a["phase"] == b["phase"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continues_one_process(layout, one_process, tmp_path):
    config, run = one_process
    # The plain optimizer's state is another structure on disk: it starts over instead of resuming.
    scratch = "plain" in layout
    folder = tmp_path / "run" if scratch else continue_from(run, 2, tmp_path / "run")
    text = boreal(2, "train", config, f"checkpoint.folder={folder}", *LAYOUTS[layout])
    steps = (1, 2, 3, 4, 5) if scratch else (3, 4, 5)
    assert ("resuming from" in text) != scratch
    ours, theirs = metrics(folder), metrics(run)
    assert_same(ours, theirs, steps)
    for step in steps:
        assert ours[step]["expert_loads"] == theirs[step]["expert_loads"]
    # The MTP loss is real and the loads add up: rows x positions x top-k, in every MoE layer.
    assert theirs[5]["mtp_loss"] > 0
    assert [sum(layer) for layer in theirs[5]["expert_loads"]] == [768 * 2]


def test_initial_weights_do_not_depend_on_the_layout(one_process, tmp_path):
    """Tensor 2 without sequence parallelism, a dense network, from scratch: one process's losses again."""
    config, _ = one_process
    for processes, name, layout in ((1, "one", []), (2, "two", ["parallel.tensor=2"])):
        boreal(processes, "train", config, DENSE, f"checkpoint.folder={tmp_path / name}", "checkpoint.every_steps=9", *layout)
    assert_same(metrics(tmp_path / "two"), metrics(tmp_path / "one"), (1, 2, 3, 4, 5))
