"""Text from a training checkpoint: the Hugging Face decoder, filled in memory by the export mapping."""

import torch

from boreal_megatron.convert.export import tokenizer_folder
from boreal_megatron.convert.hf import build_hf
from boreal_megatron.convert.reader import TensorReader
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.train import store


def generate(path, prompts, *, max_new_tokens=64, temperature=0.8, top_p=0.95, seed=0):
    """Continue each prompt.

    Args:
        path: a checkpoint or the folder above it.
        prompts: texts; an empty one starts a document.
        temperature: 0 decodes greedily.
        seed: of the sampler.

    Returns:
        list of texts, prompt included.
    """
    path = store.resolve(path)
    config = store.saved_config(path)
    tokenizer = Tokenizer.load(tokenizer_folder(path, config))
    decoder = build_hf(config.model, TensorReader(path), tokenizer.eod)
    torch.manual_seed(seed)
    choice = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature > 0 else dict(do_sample=False)
    out = []
    for prompt in prompts:
        ids = torch.tensor([list(tokenizer.encode(prompt)) or [tokenizer.eod]])
        with torch.no_grad():
            continued = decoder.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **choice
            )
        tokens = [t for t in continued[0].tolist() if t != tokenizer.eod]
        out.append(tokenizer.decode(tokens))
    return out
