"""Phases and learning rates against hand-computed values."""

import math

import pytest
from boreal_megatron.config import phases
from boreal_megatron.train.schedule import learning_rate
from tests.support.configs import config_for, tiny_model


def config(schedule, *stages):
    base = dict(sequence=64, positions_per_step=128)
    return config_for(tiny_model(), phases=[{"name": str(n), **base, **s} for n, s in enumerate(stages)], schedule=schedule)


def test_phases_end_in_steps_or_raw_tokens():
    c = config(dict(peak=1.0), dict(until_raw_tokens=5120, bag_size=4), dict(until_steps=30))
    plan = phases.spans(c.phases)
    assert [(s.first_step, s.end_step) for s in plan] == [(0, 10), (10, 30)]
    assert [(s.first_raw_token, s.end_raw_token) for s in plan] == [(0, 5120), (5120, 5120 + 20 * 128)]
    assert phases.at(c.phases, 0, 0) == 0
    assert phases.at(c.phases, 10, 5119) == 0, "padded bags read less; the phase goes on"
    assert phases.at(c.phases, 11, 5120) == 1
    assert phases.at(c.phases, 29, 9999) == 1
    assert phases.at(c.phases, 30, 9999) is None
    assert plan[0].progress((5, 2560), (0, 0)) == 0.5
    # A phase of padded bags took 4 steps more than planned: the next one begins at 0 all the same.
    assert plan[1].progress((14, 5120), (14, 5120)) == 0.0
    assert plan[1].progress((22, 9999), (14, 5120)) == 0.5


def test_warmup_then_cosine_to_a_tenth():
    c = config(dict(peak=1.0, warmup_steps=10), dict(until_steps=110))
    lr = [learning_rate(c, (step, 0), (0, 0)) for step in range(111)]
    assert lr[0] == pytest.approx(0.1)
    assert lr[9] == pytest.approx(1.0)
    assert lr[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr[110] == pytest.approx(0.1)


def test_wsd_is_flat_then_falls():
    c = config(dict(peak=2.0, warmup_steps=0, shape="wsd", decay_fraction=0.2, final_fraction=0.0), dict(until_steps=100))
    assert learning_rate(c, (79, 0), (0, 0)) == pytest.approx(2.0)
    assert learning_rate(c, (90, 0), (0, 0)) == pytest.approx(1.0)
    assert learning_rate(c, (99, 0), (0, 0)) == pytest.approx(0.1)


def test_one_curve_spans_phases_and_pieces_stand_alone():
    """Two phases share a linear schedule; the third holds, the fourth anneals (as BOREAL-10B's cards do)."""
    c = config(
        dict(peak=1.0, warmup_steps=0, shape="linear", final_fraction=0.0),
        dict(until_raw_tokens=50 * 512, bag_size=4),
        dict(until_steps=100),
        dict(until_steps=110, learning_rate=dict(shape="constant", start=0.3, end=0.3)),
        dict(until_steps=120, learning_rate=dict(shape="linear", start=0.3, end=0.1)),
    )
    assert learning_rate(c, (25, 25 * 512), (0, 0)) == pytest.approx(0.75)
    assert learning_rate(c, (75, 99999), (50, 99999)) == pytest.approx(0.25)
    assert learning_rate(c, (105, 99999), (100, 99999)) == pytest.approx(0.3)
    assert learning_rate(c, (115, 99999), (110, 99999)) == pytest.approx(0.2)
