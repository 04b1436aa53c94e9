"""The evaluation harness on an export: `lm_eval --model hf`, offline, on a task of a few documents."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from tests.support.decoders import build
from tests.support.launch import environment
from tests.support.networks import random_weights, tiny
from transformers import AutoTokenizer

from boreal_megatron.convert.hf import write_hf

INSTALL = "python -m pip install 'lm-eval>=0.4.13'"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=f"needs lm-eval: {INSTALL}"),
]

MODEL = tiny(vocab_size=640)  # both mixers, dense and MoE
DOCUMENTS = [
    {"text": "import os\nimport", "choices": ["sys", "collections.abc", "x = 1"], "answer": 0},
    {"text": "def __init__(self", "choices": ["):", ", name, value, default=None):"], "answer": 1},
    {"text": "for line in file:\n    print(", "choices": ["line", "file)", "self.assertEqual(a, b)"], "answer": 0},
    {"text": "x", "choices": ["= 0", "is not None and len(x) > 0"], "answer": 0},
    {"text": "    def test_" + "a_longer_name_that_goes_on_" * 6, "choices": ["b(self):", "pass"], "answer": 0},
]
TASK = """\
task: boreal_few
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


def loglikelihood(decoder, tokenizer, text, continuation):
    """Of a continuation after a text, and whether greedy decoding would give it, from the logits of one pass."""
    start = len(tokenizer(text).input_ids)
    ids = torch.tensor([tokenizer(text + continuation).input_ids])
    with torch.no_grad():
        scores = decoder(ids, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)  # [tokens, vocab]
    expected = ids[0, start:]
    return scores.gather(1, expected.unsqueeze(1)).sum().item(), bool((scores.argmax(-1) == expected).all())


def test_scores_are_those_of_the_logits(corpus, tmp_path):
    out, tasks, results = tmp_path / "model", tmp_path / "tasks", tmp_path / "results"
    weights = random_weights(MODEL)
    write_hf(out, MODEL, weights.__getitem__, tokenizer_folder=corpus["tokenizer"], dtype="fp32", eos_token_id=0)
    tasks.mkdir()
    documents = tasks / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tasks / "boreal_few.yaml").write_text(TASK.format(documents=documents))
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "boreal_few", "--include_path", tasks]
        + ["--model_args", f"pretrained={out},trust_remote_code=True,dtype=float32", "--device", "cpu"]
        + ["--batch_size", "4", "--output_path", results, "--log_samples"],
        env=environment(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (samples,) = results.rglob("samples_boreal_few_*.jsonl")
    (summary,) = results.rglob("results_*.json")

    decoder, tokenizer = build(MODEL), AutoTokenizer.from_pretrained(out)
    right, compared = 0, set()
    for sample in map(json.loads, samples.read_text().splitlines()):
        document, scores = sample["doc"], []
        for choice, (found, greedy) in zip(document["choices"], sample["filtered_resps"], strict=True):
            expected, expected_greedy = loglikelihood(decoder, tokenizer, document["text"], " " + choice)
            assert abs(float(found) - expected) < 1e-3 * abs(expected), (document["text"], choice)
            assert str(greedy) == str(expected_greedy)
            scores.append(expected)
            compared.add(round(expected, 3))
        right += scores.index(max(scores)) == document["answer"]
    assert len(compared) == sum(len(document["choices"]) for document in DOCUMENTS), "scores that are all alike"
    assert json.loads(summary.read_text())["results"]["boreal_few"]["acc,none"] == right / len(DOCUMENTS)
