"""The search for layouts: against every combination tried out, known answers, refusals, the examples it wrote."""

import json
import re
import subprocess
import sys
import time as clock
from itertools import product

import pytest
import yaml
from boreal_megatron.cli import main
from boreal_megatron.config import check
from boreal_megatron.config.load import load
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import hardware, layouts, memory
from tests.support.launch import ROOT
from tests.unit.test_plan_time import H100, config_of

CONFIGS = ROOT / "examples/configs"
EXAMPLES = sorted(CONFIGS.glob("*_h[12]00*.yaml"))


def tiny(**changes):
    """Small enough to try everything on 4 GPUs: windows of 4,096, 8 of them a step."""
    return config_of("tiny", sequence=4096, step=8 * 4096, **changes)


def text_of(config):
    """A layout as something to compare."""
    return json.dumps(layouts.fields(config), sort_keys=True)


def every_layout(config, world):
    """All combinations of the values that the search looks at, whatever the rules say."""
    sizes = (1, 2, 4)
    for tensor, pipeline, virtual, context, mode, expert, expert_tensor, micro in product(
        sizes, sizes, sizes, (1, 2), ("state", "heads"), sizes, sizes, (1, 2, 4, 8)
    ):
        if tensor * pipeline * context > world or (context == 1 and mode == "heads") or (context > 1 and micro > 1):
            continue
        if expert_tensor not in (1, tensor) or (pipeline == 1 and virtual > 1):
            continue
        cut = config.parallel.model_copy(
            update={
                "tensor": tensor, "sequence_parallel": tensor > 1, "pipeline": pipeline, "virtual_pipeline": virtual,
                "context": context, "context_deltanet": mode, "expert": expert, "expert_tensor": expert_tensor,
            }
        )  # fmt: skip
        yield config.model_copy(update={"parallel": cut, "micro_batch": micro})


def test_search_against_every_combination():
    """It keeps those that `check` has nothing against, and the first is the fastest that fits, recomputing or not."""
    config, world = tiny(), 4
    right = [c for c in every_layout(config, world) if not check.problems(c, world)]
    rejected = {}
    possible = layouts._possible(config, world, H100, rejected, [config.precision])
    found = [layouts.laid_out(config, chosen) for chosen in possible]
    assert len(right) > 50 and sorted(map(text_of, found)) == sorted(map(text_of, right))
    assert sum(reason.layouts for reason in rejected.values()) > 0

    def needs(candidate):
        return memory.needed(memory.per_rank(candidate, world))

    every = [c.model_copy(update={"recompute": r}) for c in right for r in layouts.RECOMPUTE]
    bytes_of = {text_of(c): needs(c) for c in every}
    some = sorted(bytes_of.values())[len(every) // 10]  # so that 90 % of them do not fit
    small = H100.model_copy(update={"memory_gib": some / memory.GIB})
    fastest = min(layouts.Costs(c, world, small).estimate(c).seconds for c in every if bytes_of[text_of(c)] <= some)
    best = layouts.search(config, world, small, top=1).best[0]
    assert best.seconds == pytest.approx(fastest) and best.bytes == bytes_of[text_of(best.config)] <= some


def test_known_answer_without_torch(tmp_path):
    """BOREAL-10B on 512 H100 at 8K: in seconds, without torch; experts within a node, no pipeline, nothing recomputed;
    superposition of half the tokens in bags of 4 takes 5/8 of the time."""
    out = tmp_path / "overlay.yaml"
    code = (
        "import sys; from boreal_megatron.cli import main; "
        f"main(['plan', 'layouts', 'boreal-10b-moe', '--gpus', '512', '--raw-tokens', '15e12', '--json', '--explain', '--out', {str(out)!r}]); "
        "assert not {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)"
    )
    began = clock.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert clock.perf_counter() - began < 60  # seconds on a free core; a busy machine takes several times that
    found = json.loads(done.stdout)
    best = found["layouts"][0]
    cut, (step,) = best["parallel"], best["steps"]
    assert (cut["tensor"], cut["pipeline"], cut["context"]) == (2, 1, 1) and cut["expert"] in (4, 8)
    assert best["recompute"] == "none" and best["memory_gib"] < 79.1
    assert 0.2 < step["mfu"] < 0.43  # between the published field and the goal for a fully overlapped stack
    assert step["seconds"] == pytest.approx(4_194_304 / 512 / step["positions_per_second_per_gpu"])
    run = found["run"]
    assert run["days"] == pytest.approx(
        run["raw_tokens"] / (512 * step["positions_per_second_per_gpu"]) / 86_400, rel=1e-6
    )
    assert run["superposition"]["days"] == pytest.approx(run["days"] * 5 / 8)
    assert run["gpu_hours"] == pytest.approx(run["days"] * 24 * 512)
    reasons = " ".join(reason["text"] for reason in found["rejected"])
    for word in (
        "parallel.tensor=8 does not divide model.attention.kv_heads=4",
        "GiB on its fullest rank",
        "positions_per_step",
    ):
        assert word in reasons
    assert "nic" in found["assumed"] and "not modelled" in found["explain"]
    assert yaml.safe_load(out.read_text())["parallel"] == cut


def test_one_gpu_has_one_layout(capsys):
    main(["plan", "layouts", "boreal-250m", "--gpus", "1", "--step", "32768", "--sequence", "4096"])
    shown = capsys.readouterr().out
    assert "DP1" in shown and "half of them in bags of 4" in shown and "not calibrated" in shown


def test_what_is_impossible_names_the_nearest(tmp_path, capsys):
    with pytest.raises(BorealError, match=r"no layout for 5 GPUs(.|\n)*nearest number of GPUs that has one: 4, 6$"):
        layouts.search(tiny(), 5, H100)
    with pytest.raises(BorealError, match=r"fits into 0.5 GiB; the smallest needs \d+\.\d GiB .*: take GPUs with more"):
        layouts.search(tiny(), 1, H100.model_copy(update={"memory_gib": 0.5}))
    dense = config_of("boreal-250m", sequence=8192, step=2**17)
    least = memory.needed(memory.per_rank(dense.model_copy(update={"recompute": "full"}), 1)) / memory.GIB
    with pytest.raises(BorealError, match=": take 2 GPUs, or ones with more memory"):
        layouts.search(dense, 1, H100.model_copy(update={"memory_gib": least - 0.1}))
    with pytest.raises(BorealError, match="no phase is called contxt; the run has: run"):
        layouts.search(tiny(), 1, H100, names=["contxt"])
    with pytest.raises(BorealError, match=r"configuration: 1 problem\n.*sequence=4095 does not divide .*; nearest: 1024, 2048, 4096"):
        layouts.search(config_of("tiny", sequence=4095, step=8 * 4096), 4, H100)
    with pytest.raises(BorealError, match=r"model.moe: missing, but model.pattern has E"):
        layouts.search(load([CONFIGS / "boreal_250m.yaml"], ["model.pattern=2x(*-GEG-G-)"]), 8, H100)
    with pytest.raises(BorealError, match="no rates; copy the section"):
        layouts.search(tiny(), 1, H100.model_copy(update={"rates": None}))
    with pytest.raises(BorealError, match="neither a file nor a preset; presets: tiny"):
        from boreal_megatron.cli import parser

        args = parser().parse_args(["plan", "layouts", "boreal-11b", "--gpus", "8"])
        args.run(args)
    words = ["plan", "layouts", "tiny", "--gpus", "1", "--sequence", "4096", "--step", "32768"]
    assert main([*words, "--out", str(tmp_path / "no" / "x.yaml")]) == 1
    assert "x.yaml cannot be written: No such file or directory" in capsys.readouterr().err


def test_software_is_the_configurations(capsys):
    """Overrides change the time, and what is no rule between numbers is left out with its reason."""
    words = ["plan", "layouts", "boreal-10b-moe", "--gpus", "16", "--step", "262144", "--top", "1"]
    main([*words, "parallel.overlap=true", "parallel.dispatcher=hybridep", "--json"])
    tuned = json.loads(capsys.readouterr().out)
    main([*words, "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert tuned["run"]["days"] < plain["run"]["days"]
    assert tuned["layouts"][0]["parallel"]["overlap"] and tuned["layouts"][0]["parallel"]["expert"] > 1


def test_other_precisions_are_shown_and_never_chosen(tmp_path, capsys):
    """FP8 is faster and left out of the ranking and of the overlay; where it cannot be, the reason is there."""
    out = tmp_path / "overlay.yaml"
    words = ["plan", "layouts", "boreal-10b-moe", "--gpus", "16", "--step", "262144", "--top", "1", "--json"]
    main([*words, "--out", str(out)])
    found = json.loads(capsys.readouterr().out)
    (other,) = found["other_precisions"]
    assert (found["precision"], other["precision"]) == ("bf16", "bf16 with FP8 (tensorwise)")
    assert other["steps"][0]["seconds"] < found["layouts"][0]["steps"][0]["seconds"]
    assert "precision" not in yaml.safe_load(out.read_text())

    unaligned = layouts.search(tiny(), 4, H100)
    assert not unaligned.others
    text = "parallel.tensor=1: rows of Gated DeltaNet's in_proj=392 is not a multiple of 16 in FP8"
    assert text in [reason.text for reason in unaligned.rejected]

    main([*words, "kernels.linears=local"])
    found = json.loads(capsys.readouterr().out)
    assert not found["other_precisions"]
    assert any("kernels.linears=local; FP8 needs" in reason["text"] for reason in found["rejected"])

    main([*words, "precision.fp8=blockwise"])
    found = json.loads(capsys.readouterr().out)
    assert found["precision"] == "bf16 with FP8 (blockwise)"
    assert [row["precision"] for row in found["other_precisions"]] == ["bf16"]


def test_bounds_never_pass_the_time():
    """Or the fastest layout could be missed. The closer one is what a step takes, but for what is once a step."""
    config = config_of("boreal-10b-moe", sequence=8192, step=2**21)
    costs = layouts.Costs(config, 64, H100)
    ratios = []
    for layout in layouts._possible(config, 64, H100, {}, [config.precision]):
        for recompute in layouts.RECOMPUTE:
            chosen = layout | {"recompute": recompute}
            seconds = costs.estimate(layouts.laid_out(config, chosen)).seconds
            assert 0.4 * seconds < costs.soon(chosen) <= costs.at_least(chosen) * (1 + layouts.ROUNDING)
            ratios.append(costs.at_least(chosen) / seconds)
    assert len(ratios) > 500 and 0.7 < min(ratios) and 0.95 < max(ratios) <= 1


def test_factors_change_the_choice_of_time_only():
    """A calibrated table gives other times for the same layouts."""
    plain = layouts.Costs(tiny(), 4, H100).estimate(tiny())
    factors = H100.model_copy(update={"factors": {"gdn": 3.0, "idle": 0.5}})
    slower = layouts.Costs(tiny(), 4, factors).estimate(tiny())
    kinds = plain.estimates[0].kinds()
    assert slower.estimates[0].seconds == pytest.approx(1.5 * (plain.estimates[0].seconds + 2 * kinds["gdn"]))


def command_of(example):
    """(Config, world, GPU, phases, Config that was asked about) by the command in an example's first line."""
    from boreal_megatron.cli import parser
    from boreal_megatron.plan.cli import run_of

    args = parser().parse_args(example.read_text().splitlines()[0].removeprefix("# boreal ").split())
    args.config = [word if "=" in word else str(ROOT / word) for word in args.config]
    files = [word for word in args.config if "=" not in word]
    return load([*files, example]), args.gpus, hardware.gpu(args.gpu), args.phase, run_of(args)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_right_and_as_fast_as_they_say(example):
    """`boreal check` passes, every rank fits, and the comment's figures are today's."""
    config, world, gpu, names, _ = command_of(example)
    assert check.problems(config, world) == []
    candidate = layouts.Costs(config, world, gpu, names).estimate(config)
    counted = config.model_copy(update={"phases": layouts.named(config, names)})
    needs = memory.needed(memory.per_rank(counted, world)) / memory.GIB
    assert needs <= gpu.memory_gib
    said = re.search(r"measured: ([\d,]+) positions .* ([\d.]+) GiB", example.read_text())
    assert float(said[1].replace(",", "")) == pytest.approx(candidate.estimates[0].rate(), rel=0.02)
    assert float(said[2]) == pytest.approx(needs, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_what_the_planner_chooses(example):
    config, world, gpu, names, asked = command_of(example)
    best = layouts.search(asked, world, gpu, names=names).best[0]
    assert layouts.fields(config) == layouts.fields(best.config)


def test_there_are_examples_for_8_256_and_512_gpus():
    assert {command_of(example)[1] for example in EXAMPLES} == {8, 256, 512}
