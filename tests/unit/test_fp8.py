"""FP8's configuration: which combinations `boreal check` refuses and what it offers instead, which half-blocks and
weights are in FP8, and what megatron-core is told. What Transformer Engine then holds: tests/unit/test_te.py."""

import pytest
import torch
from boreal_megatron.config import fp8
from boreal_megatron.config.check import problems
from boreal_megatron.config.load import dump, load
from boreal_megatron.convert.mapping import mapping
from boreal_megatron.errors import ProblemsError
from boreal_megatron.model.config import transformer_config
from boreal_megatron.model.provider import SLOTS, chosen
from tests.support.configs import config_for, tiny_model
from tests.support.launch import ROOT
from tests.support.neighbours import changed, field, suggestions

TENSORWISE = {"fp8": "tensorwise"}
TP2 = {"parallel.tensor": 2, "parallel.sequence_parallel": True}


def config_of(**changes):
    """Widths that FP8 takes, whole and halved: 16 value heads make 32 gates."""
    model = tiny_model(
        attention=dict(heads=4, kv_heads=2, head_dim=16), gdn=dict(key_heads=4, value_heads=16, head_dim=16)
    )
    return config_for(model, precision=TENSORWISE, **changes)


@pytest.mark.parametrize("wrong, world, line", [
    ({"model.ffn_hidden_size": 100}, 1, "model.ffn_hidden_size=100 is not a multiple of 16 in FP8; nearest: 96, 112"),
    ({"model.moe.shared_hidden_size": 24} | TP2, 2,
     "model.moe.shared_hidden_size=24 is not a multiple of 16*parallel.tensor=16*2=32 in FP8; nearest: 32"),
    ({"model.hidden_size": 72}, 1, "model.hidden_size=72 is not a multiple of 16 in FP8; nearest: 64, 80"),
    ({"model.gdn.value_heads": 4}, 1,
     "model.gdn.value_heads=4: rows of Gated DeltaNet's in_proj=264 is not a multiple of 16 in FP8; nearest: 8"),
    ({"model.moe.expert_hidden_size": 24, "kernels.experts": "te"}, 1,
     "model.moe.expert_hidden_size=24 is not a multiple of 16 in FP8; nearest: 16, 32"),
    ({"phases.0.sequence": 24, "phases.0.positions_per_step": 48}, 1,
     "phases.0 (only).sequence=24 is not a multiple of 16 in FP8; nearest: 16, 48"),
])  # fmt: skip
def test_dims_that_do_not_divide_by_16_are_refused(wrong, world, line):
    assert problems(config_of(), 1) == []
    config = changed(config_of(), wrong)
    assert problems(config, world) == [line]
    for value in suggestions(line):
        assert problems(changed(config, {field(line): value}), world) == []
    without = changed(config, {"precision": {"compute": "bf16"}})
    assert problems(without, world) == []


def test_tensor_parallelism_counts_on_the_widths_of_a_rank():
    """BOREAL-10B: the 10,304 rows of in_proj are 16 * 644, and 644 / 8 is no whole number."""
    words = ["precision.fp8=tensorwise", "parallel.pipeline=1"]
    files = [ROOT / "examples/configs/boreal_10b_moe.yaml"]
    assert problems(load(files, [*words, "parallel.tensor=4"]), 256) == []
    [line] = problems(load(files, [*words, "parallel.tensor=8"]), 256)
    assert line == (
        "parallel.tensor=8 does not divide model.attention.kv_heads=4; rows of Gated DeltaNet's in_proj=10304 is not a "
        "multiple of 16*parallel.tensor=16*8=128 in FP8; nearest: 2, 4"
    )


def test_combinations_that_cannot_run_are_refused():
    config = config_of(kernels={"linears": "local", "experts": "te"}, parallel={"dispatcher": "deepep"})
    found = problems(changed(config, {"precision": {"compute": "fp32", "fp8": "delayed"}}), 1)
    for words in (
        "precision.fp8=delayed with precision.compute=fp32; expected bf16",
        "precision.fp8=delayed with kernels.linears=local; FP8 needs Transformer Engine's",
        "precision.fp8=delayed with kernels.experts=te: a checkpoint cannot keep",
        "parallel.dispatcher=deepep with parallel.expert*parallel.expert_tensor=1; expected more than 1",
    ):
        assert sum(words in line for line in found) == 1, found
    with pytest.raises(ProblemsError, match="precision.fp8: found 'mxfp8'; Input should be 'tensorwise', 'delayed' or"):
        largest("precision.fp8=mxfp8")


def largest(*words):
    return load([ROOT / "examples/configs/boreal_10b_moe.yaml"], words)


def test_bf16_gradients_are_of_bf16_weights():
    text = "optimizer.gradients=bf16 with precision.compute=fp32; expected fp32, or bf16 weights to go with it"
    assert problems(config_for(tiny_model(), precision="fp32", optimizer={"gradients": "bf16"}), 1) == [text]
    assert not problems(config_for(tiny_model(), precision="bf16", optimizer={"gradients": "bf16"}), 1)


def test_a_name_alone_is_the_compute_precision(tmp_path):
    plain = largest("precision=fp32")
    assert plain.precision.compute == "fp32" and plain.precision.fp8 is None and str(plain.precision) == "fp32"
    config = largest("precision.fp8=blockwise")  # over `precision: bf16`
    assert str(config.precision) == "bf16 with FP8 (blockwise)"
    dump(config, tmp_path / "config.yaml")
    assert load([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("recipe, inside, ends", [
    ("tensorwise", range(2, 22), (2, 2)), ("blockwise", range(2, 22), (2, 2)), ("delayed", range(24), None),
])  # fmt: skip
def test_first_and_last_layer_are_two_half_blocks_each(recipe, inside, ends):
    """BOREAL-250M: 12 card layers of 2 half-blocks, which megatron-core counts as 24 layers."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    file = ROOT / "examples/configs/boreal_250m.yaml"
    config = load([file], [f"precision.fp8={recipe}"])
    assert fp8.half_blocks(config) == inside
    settings = transformer_config(config, {})
    assert settings.fp8_recipe == recipe and settings.fp8 == ("e4m3" if recipe == "blockwise" else "hybrid")
    assert (settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16) == (ends or (1, 1))
    assert [n for n in range(24) if not is_first_last_bf16_layer(settings, n)] == [*inside]
    assert ("layers 0 and 11 in bf16" in fp8.lines(config)[0]) == bool(ends)
    assert transformer_config(load([file]), {}).fp8 is None and fp8.lines(load([file])) == []


def test_a_network_for_machines_without_the_libraries():
    """Export checks and resharding use it."""
    config = config_of(kernels={"linears": "te", "experts": "te"}, parallel={"expert": 2, "dispatcher": "hybridep"})
    plain = config.plain()
    names = {choice.name for slot, choice in chosen(plain, torch.device("cpu")).items() if slot in SLOTS}
    assert names == {"local", "sdpa", "sequential"} and plain.precision.fp8 is None
    assert plain.parallel.expert == 2 and plain.parallel.dispatcher == "alltoall" and plain.model == config.model


def test_every_weight_is_in_the_table():
    """In FP8 are the matrices inside layers but routed experts, which kernels.experts=te adds."""
    config = config_of()
    names = [name for rule in mapping(config.model) for name in rule.train if not name.endswith("expert_bias")]
    found = {name: fp8.row_of(config, name).precision for name in names}
    inside = ("linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2", "eh_proj")
    matrices = {name for name in names if name.split(".")[-2] in inside}
    experts = {name for name in names if ".experts.experts." in name}
    assert experts and {name for name, what in found.items() if what == fp8.FP8} == matrices - experts
    in_fp32 = {name.rpartition(".")[2] for name, what in found.items() if what == fp8.FP32}
    assert in_fp32 == {"A_log", "dt_bias", "weight"}
    with_te = changed(config, {"kernels.experts": "te"})
    assert all(fp8.row_of(with_te, name).precision == fp8.FP8 for name in experts)
