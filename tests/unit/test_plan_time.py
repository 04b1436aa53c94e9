"""The time of a step: published systems, a simulated pipeline, terms worked out by hand."""

from itertools import product
from math import ceil, prod

import pytest
from boreal_megatron.config.load import parse
from boreal_megatron.config.schema import Parallel
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import hardware, time
from boreal_megatron.plan.work import Rank, Software
from tests.support.launch import ROOT
from tests.support.published import SYSTEMS, estimate

H100 = hardware.gpu("h100")


def config_of(preset, *, sequence=8192, step=4_194_304, **changes):
    """A run of one phase."""
    values = {
        "model": {"preset": preset},
        "phases": [{"name": "run", "until_steps": 10, "sequence": sequence, "positions_per_step": step}],
        "schedule": {"peak": 1e-3},
        "data": {"tokenizer": "t", "sources": {"web": "w"}},
        "checkpoint": {"folder": "f"},
    }
    return parse(values | changes, "test")


def step(preset, world, gpu=H100, software=None, **changes):
    config = config_of(preset, **changes)
    return time.step(config, config.phases[0], world, gpu, software)


def seconds(found, name):
    return sum(term.seconds for term in found.terms if term.name == name)


def once(found):
    """Seconds of what happens once a step."""
    names = ("gradient_reduce", "parameter_gather", "tied_gradients", "optimizer")
    return [term.seconds for term in found.terms if term.name in names]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_published_systems(system):
    """One table of rates for all. Two of them gave a rate each and agree by construction; the others are predictions,
    and those that miss are listed with the term that the model lacks."""
    error = estimate(system, H100).rate() / system.rate - 1
    assert (abs(error) <= 0.2) == system.agrees, f"{error:+.1%}"
    assert abs(error) < 0.01 or not system.derived
    assert system.agrees or system.missing


def simulated(micro_batches, forward, backward):
    """Seconds of 1F1B, one micro-batch after another on each rank: the formula's obvious twin."""
    ranks, done, free = len(forward), {}, [0.0] * len(forward)
    plans = []
    for rank in range(ranks):
        warm = min(ranks - rank - 1, micro_batches)
        order = [("f", i) for i in range(warm)]
        for i in range(micro_batches - warm):
            order += [("f", warm + i), ("b", i)]
        plans.append(order + [("b", i) for i in range(micro_batches - warm, micro_batches)])
    while any(plans):
        for rank, plan in enumerate(plans):
            while plan:
                way, i = plan[0]
                needs = [("f", i, rank - 1)] if way == "f" and rank else []
                if way == "b":
                    needs = [("b", i, rank + 1)] if rank < ranks - 1 else [("f", i, rank)]
                if any(need not in done for need in needs):
                    break
                start = max([free[rank], *(done[need] for need in needs)])
                free[rank] = done[way, i, rank] = start + (forward if way == "f" else backward)[rank]
                plan.pop(0)
    return max(free)


@pytest.mark.parametrize("ranks, micro_batches", product((2, 4), (4, 16)))
def test_bubble_is_the_simulated_schedules(ranks, micro_batches):
    """Equal stages and one slow one, last, as with a head: makespan is m * slowest + the other ranks' micro-batch."""
    for slow in (1.0, 1.5):
        forward = [1.0] * (ranks - 1) + [slow]
        backward = [2.0 * f for f in forward]
        totals = [3 * f for f in forward]
        assert simulated(micro_batches, forward, backward) == pytest.approx(
            micro_batches * max(totals) + sum(totals) - max(totals)
        )


def test_bubble_of_a_step():
    """8 equal micro-batches over 4 ranks wait for 3 more; with two chunks a rank, for half of that."""
    phases = {"step": 8 * 8192, "sequence": 8192}
    plain = step("boreal-10b-moe", 4, parallel={"pipeline": 4}, **phases)
    halved = step("boreal-10b-moe", 4, parallel={"pipeline": 4, "virtual_pipeline": 2}, **phases)
    busy = plain.seconds - seconds(plain, "bubble") - sum(once(plain))  # of the rank with the heads, the slowest
    assert 0.6 * 3 / 8 * busy < seconds(plain, "bubble") < 3 / 8 * busy
    assert seconds(halved, "bubble") == pytest.approx(seconds(plain, "bubble") / 2, rel=0.02)
    assert "bubble" not in {t.name for t in step("boreal-10b-moe", 4, **phases).terms}


def test_products_by_hand():
    """8,192 x 2,560 x 7,680: 64 x 30 tiles in 15 rounds of 132; the same with 128 columns fewer needs as many."""
    rank = Rank(config_of("boreal-10b-moe"), 8192, H100, Software())
    rate = H100.rates.gemm.value * 1e12 / 132
    by_hand = 15 * 2 * 128 * 256 * (2560 + H100.rates.gemm_start.value) / rate
    assert rank.product(8192, 2560, 7680) == pytest.approx(by_hand)
    assert rank.product(8192, 2560, 7680 - 128) == pytest.approx(by_hand)
    one = rank.product(512, 2560, 1536)
    assert rank.product(512, 2560, 1536, count=16) == pytest.approx(16 * one)
    tiles = 16 * 4 * 6
    assert rank.product(512, 2560, 1536, count=16, grouped=True) == pytest.approx(
        one * ceil(tiles / 132) / H100.rates.grouped.value
    )
    elements = 128 * 16 + 16 * 10**6 + 128 * 10**6
    assert rank.product(128, 16, 10**6) == pytest.approx(elements * 2 / (3350e9 * 0.8))  # no faster than memory


def test_exchanges_by_hand():
    """BOREAL-10B, 8,192 tokens of 8 copies each. At EP8 7 of them leave the rank; with one copy for each rank, as many
    as there are other ranks with one of its experts. Over two nodes half of them cross the network, or one."""
    start = 20e-6
    token, local = 2560 * 2, 8192

    def met(parts):
        """Chance that some of 8 experts out of 128, drawn one after another, lies in one of so many equal parts."""
        return 1 - prod((128 - 128 / parts - i) / (128 - i) for i in range(8))

    for expert, dispatcher, inside, across in [
        (8, "alltoall", 7, 0), (8, "hybrid", 7 * met(8), 0), (16, "alltoall", 3.5, 4), (16, "hybrid", 15 * met(16), met(2)),
    ]:  # fmt: skip
        rank = Rank(
            config_of("boreal-10b-moe", parallel={"expert": expert}), 8192, H100, Software(dispatcher=dispatcher)
        )
        by_hand = local * token * (inside / 300e9 + across / 45e9) + start
        assert rank.dispatch() == pytest.approx(by_hand), (expert, dispatcher)
    rank = Rank(config_of("boreal-10b-moe"), 8192, H100, Software())
    assert rank.exchange(1e9, 8, 1) == pytest.approx(1 / 330 + start)  # inside a node
    assert rank.exchange(1e9, 64, 1) == pytest.approx(1 / 330 + start)  # eight rails of 45
    assert rank.exchange(1e9, 64, 8) == pytest.approx(1 / 45 + start)  # one rank of each node
    assert rank.exchange(1e9, 1, 1) == 0


def test_what_changes_a_step():
    """Each choice moves the terms that it should, and no other."""
    plain = step("boreal-10b-moe", 256, parallel={"expert": 8})
    for recompute, more in (
        ("selective", ("attention_core", "delta_rule", "expert_gemm", "dispatch")),
        ("full", ("gemm",)),
    ):
        again = step("boreal-10b-moe", 256, parallel={"expert": 8}, recompute=recompute)
        grown = {t.name for t in again.terms if seconds(again, t.name) > 1.001 * seconds(plain, t.name)}
        assert set(more) <= grown and "head" not in grown and "gradient_reduce" not in grown
    assert seconds(
        step("boreal-10b-moe", 256, gpu=hardware.gpu("h200"), parallel={"expert": 8}), "elementwise"
    ) < seconds(plain, "elementwise")
    tensor = step("boreal-10b-moe", 256, parallel={"tensor": 2, "sequence_parallel": True})
    assert seconds(tensor, "tensor_communication") > 0 == seconds(plain, "tensor_communication")
    by_state = step("boreal-10b-moe", 256, sequence=32_768, parallel={"context": 4})
    by_heads = step("boreal-10b-moe", 256, sequence=32_768, parallel={"context": 4, "context_deltanet": "heads"})
    assert seconds(by_state, "delta_rule") == pytest.approx(2 * seconds(by_heads, "delta_rule"))
    assert seconds(by_heads, "context_communication") > seconds(by_state, "context_communication")
    factored = step(
        "boreal-10b-moe", 256, parallel={"expert": 8}, gpu=H100.model_copy(update={"factors": {"gdn": 2.0}})
    )
    assert factored.kinds()["gdn"] == pytest.approx(2 * plain.kinds()["gdn"])
    assert factored.seconds - plain.seconds == pytest.approx(plain.kinds()["gdn"])


def test_software_of_a_configuration():
    """Each choice of the configuration that says how something runs shows in the terms that it is for."""
    plain = step("boreal-10b-moe", 256, parallel={"expert": 8})
    for parallel, kernels, precision, less in (
        ({"overlap": True}, {}, "bf16", "gradient_reduce"),
        ({"dispatcher": "hybridep"}, {}, "bf16", "dispatch"),
        ({}, {"delta_rule": "flash_qla"}, "bf16", "delta_rule"),
        ({}, {}, {"fp8": "tensorwise"}, "gemm"),
    ):
        cut = {"expert": 8} | parallel
        found = step("boreal-10b-moe", 256, parallel=cut, kernels=kernels, precision=precision)
        smaller = {t.name for t in plain.terms if seconds(found, t.name) < 0.99 * seconds(plain, t.name)}
        assert smaller - {"parameter_gather"} == {less}
    slower = step("boreal-10b-moe", 256, parallel={"expert": 8}, kernels={"experts": "sequential", "linears": "local"})
    assert seconds(slower, "expert_gemm") > seconds(plain, "expert_gemm")
    assert seconds(slower, "gradient_accumulation") == pytest.approx(1.5 * seconds(plain, "gradient_accumulation"))


def test_terms_add_up_and_are_explained():
    found = step("boreal-10b-moe", 512, sequence=32_768, parallel=Parallel(tensor=2, sequence_parallel=True, pipeline=2, context=8, expert=16).model_dump())  # fmt: skip
    assert sum(t.seconds for t in found.terms) == pytest.approx(found.seconds)
    assert {t.name for t in found.terms} <= set(time.FORMULAS)
    assert {t.kind for t in found.terms} <= set(time.KINDS)
    assert {name for _, rates in time.FORMULAS.values() for name in rates.split()} <= set(hardware.Rates.model_fields)
    assert found.mfu() == pytest.approx(found.teraflops() / 989)


def test_a_gpu_without_rates_is_refused():
    with pytest.raises(BorealError, match="no rates; copy the section"):
        step("boreal-250m", 8, gpu=H100.model_copy(update={"rates": None}))


def test_readme_says_what_the_model_says():
    """The table of published systems in the README is today's, to the token."""
    text = (ROOT / "README.md").read_text()
    for system in SYSTEMS:
        rate, found = f"{system.rate:,}", f"{estimate(system, H100).rate():,.0f}"
        assert f"| {rate} | {found} |" in text, (system.name, rate, found)
