"""Configuration errors: all at once, with the nearest spelling or value, before anything starts."""

import pytest
from boreal_megatron.config.check import problems
from boreal_megatron.config.load import dump, load
from boreal_megatron.errors import BorealError, ProblemsError
from tests.support.configs import config_for, tiny_model


@pytest.fixture
def example():
    from tests.support.launch import ROOT

    return ROOT / "examples/configs/tiny_cpu.yaml"


def test_unknown_and_ill_typed_keys_are_reported_together(example):
    with pytest.raises(ProblemsError) as caught:
        load([example], ["model.attention.heds=3", "micro_batc=1", "seed=x", "phases.0.bag_sise=3", "model.presett=x"])
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for expected in ("heads", "micro_batch", "bag_size", "preset"):
        assert f"did you mean '{expected}'?" in text
    assert "seed: found 'x'" in text


def test_files_merge_left_to_right_and_overrides_win(example, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("schedule: {peak: 5e-4}\nseed: 9\n")
    config = load([example, over], ["seed=11", "phases.1.sequence=128"])
    assert config.schedule.peak == 5e-4 and config.schedule.shape == "wsd"
    assert config.seed == 11
    assert config.phases[1].sequence == 128


def test_resolved_config_round_trips(example, tmp_path):
    config = load([example])
    dump(config, tmp_path / "again.yaml")
    assert load([tmp_path / "again.yaml"]) == config


@pytest.mark.parametrize("name", ["tiny_cpu", "boreal_250m", "boreal_2b", "boreal_10b_moe"])
def test_example_configs_are_right(name, example):
    worlds = {"tiny_cpu": 2, "boreal_250m": 8, "boreal_2b": 64, "boreal_10b_moe": 256}
    assert problems(load([example.parent / f"{name}.yaml"]), worlds[name]) == []


@pytest.mark.parametrize("text, expected", [("[1, 2", "not valid YAML"), ("- a", "expected keys and values")])
def test_broken_files(text, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BorealError, match=expected):
        load([tmp_path / "c.yaml"])
    with pytest.raises(BorealError, match="does not exist"):
        load([tmp_path / "nowhere.yaml"])


def test_model_and_phase_problems():
    model = tiny_model(moe=None)
    phases = [
        dict(name="a", until_steps=5, sequence=60, positions_per_step=128, blend={"nope": 1.0}),
        dict(name="a", until_steps=5, sequence=1024, positions_per_step=1024),
    ]
    found = "\n".join(problems(config_for(model, phases=phases)))
    for expected in (
        "model.moe: missing",
        "phases.0 (a).sequence=60 does not divide phases.0 (a).positions_per_step=128; nearest: 16, 32, 64",
        "phases.1 (a).sequence=1024 exceeds model.max_positions=512",
        "blend names 'nope'",
        "must grow from phase to phase",
        "names must differ",
    ):
        assert expected in found, found


def test_a_valid_configuration_has_no_problems():
    assert problems(config_for(tiny_model()), world=2) == []
