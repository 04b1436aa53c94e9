"""From a training checkpoint to a Hugging Face folder, proved by comparing logits before it is called done."""

import shutil
from pathlib import Path

import torch

from boreal_megatron.convert.hf import build_hf, write_hf
from boreal_megatron.convert.reader import TensorReader
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.errors import BorealError
from boreal_megatron.train import checkpoint

TOLERANCE = 1e-4  # fp32 logits; both sides compute the same network in another order


def export(path, out, *, dtype="fp32", progress=None):
    """Write the folder and compare logits with the training model's, both in FP32: those of the written folder, or,
    when its weights are rounded to bf16, those of the same mapping before rounding.

    Args:
        path: a checkpoint or the folder above it.
        out: the Hugging Face folder.
        dtype: "fp32" or "bf16", of the written weights.
        progress: called with (tensors written, tensors in all).

    Returns:
        dict: checkpoint, folder, positions compared, max_logit_difference, max_decode_difference.

    Raises:
        BorealError: the two models disagree; the folder stays for inspection under the name `OUT.disagrees`.
    """
    path = checkpoint.resolve(path)
    config = checkpoint.saved_config(path)
    folder = tokenizer_folder(path, config)
    tokenizer = Tokenizer.load(folder)
    reader = TensorReader(path)
    write_hf(
        out, config.model, reader, tokenizer_folder=folder, dtype=dtype, eos_token_id=tokenizer.eod, progress=progress
    )
    ids = sample_ids(config, tokenizer)
    ours = training_logits(path, config, ids)
    decoder = _written(out) if dtype == "fp32" else build_hf(config.model, reader, tokenizer.eod).float()
    with torch.no_grad():
        theirs = decoder(ids[None]).logits[0]
        steps = decode_step_by_step(decoder, ids)
    found = {
        "checkpoint": str(path),
        "folder": str(out),
        "positions": len(ids),
        "max_logit_difference": (ours - theirs).abs().max().item(),
        "max_decode_difference": (steps - theirs).abs().max().item(),
    }
    worst = max(found["max_logit_difference"], found["max_decode_difference"])
    if not worst < TOLERANCE:
        bad = Path(f"{out}.disagrees")
        shutil.rmtree(bad, ignore_errors=True)
        Path(out).rename(bad)
        raise BorealError(
            f"the exported model's logits differ from the trained model's by {worst:.2e}, expected < {TOLERANCE:.0e}; "
            f"the folder is kept as {bad}; do not use it, and report the checkpoint's run_config.yaml"
        )
    return found


def tokenizer_folder(path, config):
    """The tokenizer that lies in the checkpoint, or the one the run was given."""
    inside = Path(path) / "tokenizer"
    return inside if inside.is_dir() else Path(config.data.tokenizer)


def sample_ids(config, tokenizer, length=192):
    """Some ids to compare on: seeded, over the whole vocabulary, longer than two chunks of the recurrence."""
    length = min(length, config.model.max_positions)
    return torch.randint(0, tokenizer.vocab_size, (length,), generator=torch.Generator().manual_seed(20))


def training_logits(path, config, ids):
    """[s, v] FP32 logits of the training model, built in this one process in FP32."""
    from boreal_megatron import parallel
    from boreal_megatron.config.schema import Parallel
    from boreal_megatron.data import batch
    from boreal_megatron.model import boreal

    alone = config.model_copy(update={"parallel": Parallel(), "precision": "fp32"})
    mesh = parallel.start(alone.parallel, alone.seed)
    model = boreal.build(alone, mesh)[0].eval()
    checkpoint.load_weights(path, alone, model, mesh)
    with torch.no_grad():
        return model.logits(batch.of_tokens(ids, mesh.device)).float().cpu()


def decode_step_by_step(decoder, ids):
    """[s, v] logits of feeding one token at a time through the cache."""
    out, cache = [], None
    for position in range(len(ids)):
        result = decoder(ids[None, position : position + 1], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        out.append(result.logits[0, 0])
    return torch.stack(out)


def _written(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
