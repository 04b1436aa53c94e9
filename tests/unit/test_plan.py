"""Parameter counts: the published sums, and the built networks on the meta device."""

import json
import subprocess
import sys

import pytest
import torch
from boreal_megatron.config.load import resolve_preset, validate
from boreal_megatron.config.presets import PRESETS
from boreal_megatron.config.schema import Model
from boreal_megatron.plan import params
from tests.support.configs import config_for


def model_of(name, **changes):
    return validate(Model, {**resolve_preset({"preset": name}), **changes}, name)


@pytest.mark.parametrize(
    "name, tied, untied, active_non_embedding",
    [
        ("boreal-250m", 366_817_184, 522_399_648, 211_234_720),
        ("boreal-2b", 2_000_331_136, 2_311_496_064, 1_689_166_208),
        ("boreal-10b-moe", 11_381_937_280, 11_770_893_440, 3_915_093_120),
    ],
)
def test_published_counts(name, tied, untied, active_non_embedding):
    counts = params.count(model_of(name))
    assert counts["total"] == tied
    assert counts["active_non_embedding"] == active_non_embedding
    assert params.count(model_of(name, tie_embeddings=False))["total"] == untied


@pytest.mark.parametrize("name, changes", [*((name, {}) for name in PRESETS), ("tiny", {"vocab_size": 641})])
@pytest.mark.parametrize("tied", [True, False])
def test_built_model_has_the_planned_parameters(name, changes, tied, mesh, monkeypatch):
    from boreal_megatron.model import provider
    from boreal_megatron.model.boreal import BorealModel
    from boreal_megatron.model.config import transformer_config

    model = model_of(name, tie_embeddings=tied, **changes)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    with torch.device("meta"):
        config = config_for(model)
        choices = provider.chosen(config, mesh.device)
        built = BorealModel(config, transformer_config(config, choices), choices, mesh, 0)
    counts = params.count(model)
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert sum(p.numel() for p in built.parameters()) == counts["with_mtp"] + counts["padding"]
    assert sum(p.numel() for p in built.mtp.parameters()) == counts["mtp"]
    attention = built.decoder.layers[0].self_attention
    assert sum(p.numel() for p in attention.parameters()) == counts["components"]["attention"]["each"]


def test_padding_of_the_vocabulary_is_told_and_not_counted():
    """641 tokens: 768 rows, in one matrix or in two."""
    for tied, matrices in ((True, 1), (False, 2)):
        counts = params.count(model_of("tiny", vocab_size=641, tie_embeddings=tied))
        whole = params.count(model_of("tiny", vocab_size=640, tie_embeddings=tied))
        assert counts["with_mtp"] - whole["with_mtp"] == matrices * 128
        assert (counts["padding_rows"], counts["padding"]) == (127, matrices * 127 * 128)
        assert (whole["padding_rows"], whole["padding"]) == (0, 0)
        assert "127 zero rows" in params.table(counts) and "zero rows" not in params.table(whole)


def test_command_prints_counts_without_torch():
    code = (
        "import sys; from boreal_megatron.cli import main; "
        "main(['plan', 'params', 'boreal-10b-moe', '--json']); "
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = json.loads(out)
    assert found["total"] == 11_381_937_280
    assert found["components"]["moe"]["blocks"] == 10
    assert any("~10B" in claim for claim in found["card"])
