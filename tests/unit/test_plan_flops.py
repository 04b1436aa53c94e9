"""FLOPs and the table of GPUs: published figures, an independent count by torch, what the command says."""

import json
import subprocess
import sys

import pytest
import torch
from boreal_megatron.cli import main
from boreal_megatron.config.load import resolve_preset, validate
from boreal_megatron.config.schema import Model
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import flops, hardware
from tests.support.configs import config_for
from tests.support.published import QWEN3_8B, QWEN35_35B_A3B
from torch.utils.flop_counter import FlopCounterMode


def model_of(name):
    return validate(Model, resolve_preset({"preset": name}), name)


def giga(model, sequence):
    return {c: n / 1e9 for c, n in flops.training(model, sequence).items()}


def test_published_totals():
    """Qwen3-8B: 49.03 at 4K. Qwen3.5-35B-A3B: 22.47 by the record's rates (280.97 TFLOP/s at 12,503 tokens/s, where
    megatron-core counts less of the delta rule), 22.75 with it in full."""
    assert sum(giga(QWEN3_8B, 4096).values()) == pytest.approx(49.03, abs=0.005)
    assert sum(giga(QWEN35_35B_A3B, 4096).values()) == pytest.approx(22.75, abs=0.02)


@pytest.mark.parametrize(
    "name, sequence, total",
    [("boreal-10b-moe", 8192, 32.15), ("boreal-10b-moe", 32_768, 40.46), ("boreal-10b-moe", 262_144, 118.0), ("boreal-250m", 8192, 3.73)],
)  # fmt: skip
def test_known_totals(name, sequence, total):
    assert sum(giga(model_of(name), sequence).values()) == pytest.approx(total, rel=1e-3)


def test_known_components():
    """BOREAL-10B at 8K, each worked out by hand from its shapes."""
    found = giga(model_of("boreal-10b-moe"), 8192)
    by_hand = {
        "gdn_projections": 30 * 6 * 2560 * (2 * 1024 + 2 * 4096 + 64 + 4096) / 1e9,
        "attention_core": 10 * 3 * 2 * 8192 * 20 * 256 / 1e9,
        "dense": 30 * 6 * 3 * 2560 * 7680 / 1e9,
        "routed_experts": 10 * 6 * 8 * 3 * 2560 * 768 / 1e9,
        "gdn_inter": 30 * 3 * 32 * 3 * 2 * 128 * 128 / 1e9,
        "mtp_head": 6 * 2560 * 151_936 / 1e9,
    }
    assert {c: found[c] for c in by_hand} == pytest.approx(by_hand, rel=1e-12)
    kinds = flops.by_kind(flops.training(model_of("boreal-10b-moe"), 8192))
    assert sum(kinds.values()) / 1e9 == pytest.approx(sum(found.values()))
    assert kinds["moe"] / 1e9 == pytest.approx(2.831 + 0.708 + 0.0197, rel=1e-3)


def test_torch_counts_the_same_products(mesh):
    """The built network's feed-forward and projections, run forward and counted by torch."""
    from boreal_megatron.model import boreal

    model, sequence = model_of("tiny"), 64
    (network,) = boreal.build(config_for(model), mesh)
    attention, dense, gdn = (network.decoder.layers[i] for i in (0, 1, 2))
    parts = {
        ("-", "dense"): [dense.mlp],
        ("*", "attention_projections"): [attention.self_attention.linear_qkv, attention.self_attention.linear_proj],
        ("G", "gdn_projections"): [gdn.self_attention.in_proj, gdn.self_attention.out_proj],
    }
    for (letter, component), modules in parts.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for module in modules:
                width = module.weight.shape[1] if hasattr(module, "weight") else model.hidden_size
                module(torch.randn(sequence, 1, width))
        assert counter.get_total_flops() == sequence * flops.half_block(model, letter, sequence)[component], component


def test_command_answers_without_torch():
    code = (
        "import sys; from boreal_megatron.cli import main; "
        "main(['plan', 'flops', 'boreal-10b-moe', '--sequence', '8192', '--bag', '4', '--json', '--explain']); "
        "assert not {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = json.loads(out)
    (row,) = found["sequences"]
    assert row["raw_token"] == row["position"] / 4 and row["components"]["dense"] / 1e9 == pytest.approx(
        10.617, abs=1e-3
    )
    assert "causal half" in found["explain"]


def test_table_shows_every_component(capsys):
    main(["plan", "flops", "boreal-250m", "--bag", "4"])
    shown = capsys.readouterr().out
    assert all(c in shown for c in flops.forward(model_of("boreal-250m"), 4096))
    assert "routed_experts" not in shown and "32,768" in shown and "131,072" not in shown
    assert "0.932" in shown  # 3.728 GFLOP a position at 8K, a quarter of it a raw token


def test_gpus_by_key_and_by_cudas_name(tmp_path):
    assert hardware.gpu("NVIDIA H200") == hardware.gpu("H200") == hardware.gpu("h200")
    assert hardware.of_device("NVIDIA H100 80GB HBM3").bf16 == 989 and hardware.of_device("cpu") is None
    with pytest.raises(BorealError, match="unknown GPU 'h20'; known: h100, h200; did you mean h200"):
        hardware.gpu("h20")
    own = tmp_path / "own.yaml"
    own.write_text(
        "h200: {nic: 100}\nbox: {memory_gib: 24, bf16: 100, fp8: 200, hbm: 900, nvlink: 30, nic: 3, gpus_per_node: 2}\n"
    )
    assert hardware.gpu("h200", own).nic == 100 and hardware.gpu("h200", own).hbm == 4800
    assert hardware.gpu("box", own).gpus_per_node == 2
    own.write_text("box: {memory_gib: -1}\n")
    with pytest.raises(BorealError, match="memory_gib"):
        hardware.gpu("box", own)
