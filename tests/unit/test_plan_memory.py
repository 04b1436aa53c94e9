"""Memory and cache plans: bytes beside the dry run's, beside those alive in real steps, known answers, what is said."""

import json
import subprocess
import sys

import pytest
import yaml
from boreal_megatron.cli import main
from boreal_megatron.config.load import load, resolve_preset, validate
from boreal_megatron.config.schema import Model
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import activations, cache, fit, hardware, memory, shards
from tests.support.configs import config_for, tiny_model
from tests.support.launch import ROOT, environment

EVERY_AXIS = {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "context": 2, "expert": 2}
SPLIT = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [0, 1, 2, 0]}
LAYOUTS = {  # (changes of the network, layout, ranks, changes of the configuration)
    "one rank, FP32": ({}, {}, 1, {"precision": "fp32"}),
    "every axis": ({}, EVERY_AXIS, 16, {}),
    "every axis, state on every rank": ({}, EVERY_AXIS, 16, {"optimizer": {"distributed": False}}),
    "every axis, bf16 gradients": ({}, EVERY_AXIS, 16, {"optimizer": {"gradients": "bf16"}}),
    "untied, bf16 gradients": ({"tie_embeddings": False}, {}, 2, {"optimizer": {"gradients": "bf16", "distributed": False}}),
    "uneven stages, untied": ({"tie_embeddings": False}, SPLIT | {"context": 2}, 8, {}),
    "three stages, no MTP": ({"pattern": "*-GEG-"}, {"pipeline": 3}, 6, {}),
    "untied, no MTP": ({"pattern": "*-GEG-", "tie_embeddings": False}, {"pipeline": 2}, 2, {}),
    "expert tensor": ({}, {"expert": 2, "expert_tensor": 2}, 8, {}),
    "padded vocabulary": ({"vocab_size": 641}, {"tensor": 2, "sequence_parallel": True, "expert": 4}, 8, {}),
    "odd sizes": ({"hidden_size": 72, "ffn_hidden_size": 100}, {"tensor": 2, "sequence_parallel": True}, 12, {}),
}
DRY = """
import json, sys
from boreal_megatron import dry_run
from boreal_megatron.config.load import load
from boreal_megatron.config.schema import Config
from boreal_megatron.log import quiet

quiet()
plans = [(Config.model_validate(values), world) for values, world in json.loads(sys.stdin.read())]
print(json.dumps([dry_run.dry_run(*plan)["stages"] for plan in plans]))
"""


def dry_runs(plans):
    """The stages that the dry run finds for each (Config, ranks), in a process of its own."""
    text = json.dumps([(config.model_dump(mode="json", exclude_none=True), world) for config, world in plans])
    done = subprocess.run(
        [sys.executable, "-c", DRY], input=text, cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT}/kernels", TORCH_CPP_LOG_LEVEL="ERROR"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_state(plans):
    for (config, world), stages in zip(plans, dry_runs(plans), strict=True):
        for mine, theirs in zip(shards.held(config, world), stages, strict=True):
            assert [mine["weights"]] * 2 == theirs["weight_bytes"], (config.parallel, world)
            assert [mine["gradients"]] * 2 == theirs["gradient_bytes"], (config.parallel, world)
            assert list(mine["optimizer"]) == theirs["state_bytes"], (config.parallel, world)


@pytest.mark.slow
def test_state_is_the_dry_runs_to_the_byte():
    """test_dry_run.py compares one layout with every axis in `make test`."""
    phase = {"name": "only", "until_steps": 4, "sequence": 96, "positions_per_step": 96 * 96}
    plans = []
    for model, cut, world, changes in LAYOUTS.values():
        values = {"precision": "bf16", "phases": [phase], "parallel": cut, **changes}
        plans.append((config_for(tiny_model(**model), **values), world))
    assert_same_state(plans)


@pytest.mark.slow
def test_state_of_the_largest_network():
    """BOREAL-10B-MoE on its two worlds; 40 s of dry runs on one core."""
    files = [ROOT / "examples/configs" / name for name in ("boreal_10b_moe.yaml", "boreal_10b_moe_context.yaml")]
    assert_same_state([(load(files[:1]), 256), (load(files), 512)])


# ---------------------------------------------------------------- activations of one rank

OTHER = {  # sizes, widths and counts that no formula was written beside
    "vocab_size": 700,
    "hidden_size": 80,
    "ffn_hidden_size": 208,
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 28, "rope_fraction": 0.5, "rope_theta": 1e4},
    "gdn": {"key_heads": 4, "value_heads": 8, "head_dim": 20, "conv_width": 3},
    "moe": {"experts": 6, "top_k": 3, "expert_hidden_size": 28, "shared_hidden_size": 60},
}


def other(pattern, *, windows=2, **changes):
    phase = {"name": "only", "until_steps": 4, "sequence": 96, "positions_per_step": 96 * windows}
    phase |= changes.pop("phase", {})
    micro_batch = changes.pop("micro_batch", windows)
    values = {"precision": "bf16", "micro_batch": micro_batch, "phases": [phase], **changes}
    return config_for(tiny_model(**OTHER, pattern=pattern), **values)


@pytest.mark.parametrize(
    "config",
    [
        other("*-GEG-*-/*-", phase={"bag_size": 4}),
        other("*-GEG-*-/*-", precision="fp32"),
        other("GE*E/G-", windows=3),
        other("GE*E/G-", windows=3, precision="fp32", kernels={"experts": "grouped_mm"}),
        other("*-GEG-*-/*-", recompute="selective"),
        other("*-GEG-*-/*-", recompute="full"),
        other("*-GEG-", precision="fp32", recompute="full", windows=4),
    ],
    ids=["bags", "FP32", "GDN in MTP", "grouped", "selective", "full", "FP32, full"],
)
def test_activations_are_those_of_a_real_step(mesh, config):
    from tests.support.memory_worker import measure

    (found,) = measure(config, mesh)
    (stage,) = memory.per_rank(config, 1, kernels=activations.CPU)["stages"]
    assert stage["peak"] == pytest.approx(found["peak"], rel=0.05)
    if config.recompute == "none":
        row = activations.Row.of(config, config.phases[0], activations.CPU)
        handed_on = (
            row.stream if config.precision.compute == "bf16" else 0
        )  # in FP32 the next norm keeps it, and has it counted
        for name, size in found["kept"].items():
            planned = sum(activations.kept(row, name[-1]).values())
            assert size - handed_on == pytest.approx(planned, rel=0.01), name


@pytest.mark.parametrize("context", [1, 2])
def test_triton_keeps_what_its_operations_save(context):
    """The core of Gated DeltaNet through the Triton operations' own autograd, on tensors without storage, with the two
    passes over the rule of a context-parallel rank; and the sizes that the plan repeats, because it imports no kernels."""
    import torch
    from boreal_kernels.causal_conv1d import fused as convolution
    from boreal_kernels.gated_delta_rule import chunks, reference
    from boreal_kernels.gated_delta_rule import fused as rule
    from boreal_kernels.gated_rmsnorm import fused as norm
    from boreal_kernels.multi_hot_ce import linear
    from boreal_kernels.multi_hot_ce import reference as loss
    from tests.support.memory_worker import Alive

    config = other("G-", parallel={"context": context})
    row = activations.Row.of(config, config.phases[0])
    T, (H, HV, K) = row.T, row.gdn()
    R, W = HV // H, config.model.gdn.conv_width

    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    x, weight, scale = new(1, T, H, (2 + 2 * R) * K + 2 * R), new(H * (2 + R) * K, W), new(K)
    A_log, dt_bias, cu_seqlens = new(HV, dtype=torch.float32), new(HV, dtype=torch.float32), new(3, dtype=torch.int32)
    with Alive() as alive:
        qkv, z, b, a = (x * 1).split([(2 + R) * K, R * K, R, R], dim=-1)
        (q, k, v), _ = convolution.apply(
            qkv, weight, activation="silu", cu_seqlens=cu_seqlens, initial_state=None, output_final_state=False,
            split=(K, K, R * K),
        )  # fmt: skip
        v = v.unflatten(-1, (R, K)).flatten(2, 3)
        inputs = (q, k, v, a.flatten(2), b.flatten(2), A_log, dt_bias)
        state = None
        if context > 1:  # as if the other ranks' states were this one's
            ends = dict(output_final_state=True, output_transition=True)
            _, own, through = rule.gated_delta_rule(
                *inputs, cu_seqlens=cu_seqlens, initial_state=None, scale=1.0, **ends
            )
            state = own + through
            del own, through
        ends = dict(output_final_state=False, output_transition=False)
        o, _, _ = rule.gated_delta_rule(*inputs, cu_seqlens=cu_seqlens, initial_state=state, scale=1.0, **ends)
        z = z.unflatten(-1, (R, K))
        out = norm.gated_rmsnorm(o.reshape(z.shape), z, scale, 1e-6, "silu")
        del qkv, q, k, v, z, b, a, inputs, o, state
    planned = activations.deltanet_triton(row) | activations.deltanet_outside(row)
    if context > 1:
        planned["states across ranks"] = 2 * HV * K * K * 4  # of two documents, one each
    assert alive.bytes == pytest.approx(sum(planned.values()), rel=1e-3) and out.requires_grad
    assert (chunks.CHUNK, reference.CHUNK) == (activations.CHUNK, activations.TORCH_CHUNK)
    assert (loss.LINEAR_ROWS, loss.BLOCK_ELEMENTS) == (activations.LOSS_ROWS, activations.LOSS_BLOCK)
    assert linear.BUDGET_BYTES == activations.LOSS_BUDGET


def test_rmsnorm_keeps_less_on_cuda():
    """RMSNorm's forward pass on imagined CUDA tensors and on CPU tensors."""
    import torch
    from boreal_megatron.model.norm import RMSNorm
    from tests.support.memory_worker import Alive
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = other("G-")
    for kernels, device in ((activations.CUDA, "cuda"), (activations.CPU, "cpu")):
        row = activations.Row.of(config, config.phases[0], kernels)
        norm = RMSNorm.__new__(RMSNorm)
        torch.nn.Module.__init__(norm)
        norm.eps = 1e-6
        with torch._C.DisableTorchFunction(), FakeTensorMode():  # the CPU platform would make CUDA a CPU
            norm.weight = torch.nn.Parameter(torch.empty(48, dtype=torch.bfloat16, device=device))
            x = torch.empty(40, 1, 48, dtype=torch.bfloat16, device=device, requires_grad=True)
            with Alive() as alive:
                y = norm(x)
            assert alive.bytes - y.nbytes == sum(activations.norm(row, "", 40, 48).values()), device


# ---------------------------------------------------------------- schedules, answers, bad input


def test_micro_batches_in_flight():
    chunk = memory.Chunk({"dense": 10}, 10, 13)

    def flight(stages, rank, chunks, count):
        row = activations.Row.of(other("*-", parallel={"pipeline": stages}), config_for(tiny_model()).phases[0])
        return memory.fullest([chunk] * chunks, row, rank, count)[2]

    assert [flight(4, rank, 1, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [flight(4, rank, 1, 2) for rank in range(4)] == [2, 2, 2, 1]
    # Interleaved: 2 (p - r - 1) + (v - 1) p warm-up passes of chunks and one more, a chunk being half a micro-batch.
    assert [flight(4, rank, 2, 8) for rank in range(4)] == [5.5, 4.5, 3.5, 2.5]


def ten_billion(*overrides):
    return load([ROOT / "examples/configs/boreal_10b_moe.yaml"], overrides)


def test_answers(capsys, tmp_path):
    config, h100 = ten_billion("recompute=none"), hardware.gpu("h100")
    assert not memory.fits(config, 256, h100)
    found = fit.answer(config, 256, h100, "h100")
    assert found["left"] < 0 and found["phase"] == "context" and 1 <= len(found["nearest"]) <= 3
    for choice in found["nearest"]:
        assert memory.fits(fit.changed(config, choice["change"]), 256, h100), choice
    tiny = fit.answer(config, 256, h100.model_copy(update={"memory_gib": 8.0}), "tiny")
    assert len(tiny["nearest"]) == 1 and tiny["left"] < tiny["nearest"][0]["left"] < 0  # the nearest there is
    alone = ten_billion("recompute=none", "parallel.expert=1")
    more = memory.per_rank(alone, 256)["stages"][0]
    less = memory.per_rank(config, 256)["stages"][0]
    assert more["weights"] > 2 * less["weights"] and more["activations"]["moe"] < less["activations"]["moe"]
    assert memory.per_rank(alone, 256)["imbalance"] == 1.0  # a rank with all experts gets all positions

    words = ["plan", "memory", str(ROOT / "examples/configs/boreal_10b_moe.yaml"), "recompute=none", "--world", "256"]
    assert main([*words, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["left"] == found["left"]
    assert all(
        stage["total"] == sum(stage[p] for p in ("weights", "gradients", "optimizer", "peak", "buffers", "reserved"))
        for stage in answer["stages"]
    )
    mine = tmp_path / "gpus.yaml"
    mine.write_text(yaml.safe_dump({"big": hardware.gpu("h200").model_dump() | {"memory_gib": 288.0}}))
    assert main([*words, "--gpu", "big", "--hardware", str(mine), "--explain"]) == 0
    text = capsys.readouterr().out
    assert "~ moe" in text and "~ reserved" in text and "GiB left on stage 0" in text and "~ imbalance" in text
    assert main([*words, "--gpu", "h300"]) == 1
    assert "known: h100, h200; did you mean h" in capsys.readouterr().err
    assert main([*words[:-1], "100"]) == 1
    assert "world=100" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, world",
    [
        (["boreal_250m.yaml"], 8),
        (["boreal_2b.yaml"], 64),
        (["boreal_10b_moe.yaml"], 256),
        (["boreal_10b_moe.yaml", "boreal_10b_moe_context.yaml"], 512),
    ],
)
def test_examples_fit_into_80_gb(names, world):
    config = load([ROOT / "examples/configs" / name for name in names])
    assert memory.fits(config, world, hardware.gpu("h100"))


def test_plans_start_without_torch():
    code = "import sys; from boreal_megatron.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["plan", "memory", "examples/configs/boreal_10b_moe.yaml", "--world", "256", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize(
    "preset, context, known",
    [
        ("boreal-10b-moe", 262_144, {"keys_values": 10_737_418_240, "states": 62_914_560, "convolutions": 1_105_920}),
        ("boreal-250m", 32_768, {"keys_values": 201_326_592, "states": 9_437_184}),
        ("boreal-2b", 65_536, {"keys_values": 1_610_612_736, "states": 37_748_736}),
    ],
)
def test_known_caches(preset, context, known):
    found = cache.count(validate(Model, resolve_preset({"preset": preset}), preset), context)
    assert {key: found[key] for key in known} == known
    layers = found["attention_layers"] + found["gdn_layers"]
    assert found["pure_attention"] * found["attention_layers"] == found["keys_values"] * layers


def test_a_published_pure_attention_network():
    """Qwen3-8B at 256K: 36 layers, 8 key/value heads of 128."""
    from tests.support.published import QWEN3_8B

    found = cache.count(QWEN3_8B.model_copy(update={"max_positions": 262_144}), 262_144)
    assert found["total"] == found["pure_attention"] == 38_654_705_664


def test_cache_command(capsys):
    assert main(["plan", "cache", "boreal-10b-moe", "--context", "262144", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["contexts"]
    assert row["total"] == 10_737_418_240 + 62_914_560 + 1_105_920
    assert main(["plan", "cache", "boreal-250m", "--context", "40000"]) == 1
    assert "nearest: 32,768" in capsys.readouterr().err
    with pytest.raises(BorealError, match="expected one of fp32, bf16, fp8"):
        cache.count(tiny_model(), 64, dtype="int4")


def test_fp8_keeps_weights_twice_more():
    """Two bytes of every weight that FP8 computes with; those of the routed experts only where it has them, too."""
    h, ffn, shared, expert, count = 96, 160, 64, 32, 8
    model = {
        "pattern": "*-GEG-*-/*-",
        "hidden_size": h,
        "ffn_hidden_size": ffn,
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16, "rope_fraction": 0.5, "rope_theta": 1e4},
        "gdn": {"key_heads": 4, "value_heads": 8, "head_dim": 16},
        "moe": {"experts": count, "top_k": 2, "expert_hidden_size": expert, "shared_hidden_size": shared},
    }

    def reserved(**changes):
        (stage,) = memory.per_rank(config_for(tiny_model(**model), **changes), 1)["stages"]
        return stage["reserved"]

    attention = 4 * 16 * h + 2 * (4 + 2) * 16 * h  # output; queries, gates, keys and values
    gdn = 8 * 16 * h + (2 * 4 * 16 + 2 * 8 * 16 + 2 * 8) * h  # output; queries, keys, values, gates, decay and beta
    products = 3 * attention + 2 * gdn + 4 * 3 * ffn * h + 3 * shared * h + 2 * h * h
    fp8 = {"precision": {"compute": "bf16", "fp8": "tensorwise"}}
    for kernels, elements in ({}, products), ({"experts": "te"}, products + 3 * count * expert * h):
        assert reserved(**fp8, kernels=kernels) - reserved(precision="bf16", kernels=kernels) == 2 * elements
