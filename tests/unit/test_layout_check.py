"""`boreal check` on layouts: every rule says what was found, what was expected and what is valid instead; what it
suggests is valid indeed."""

import random
import subprocess
import sys
import time

import pytest
from boreal_megatron.config.check import data_size, problems
from boreal_megatron.config.layout import nearest_split, padded_vocab, stage_pattern, stages
from boreal_megatron.config.load import load
from boreal_megatron.config.pattern import expand
from boreal_megatron.config.schema import Parallel
from tests.support import neighbours
from tests.support.configs import config_for, tiny_model
from tests.support.launch import ROOT, write_config
from tests.support.neighbours import alternatives, changed, field, suggestions

EXAMPLES = ROOT / "examples/configs"
DENSE = "*-G-G-*- / *-"
ROW = "phases.0 (only).sequence"
STEP = "phases.0 (only).positions_per_step"
BAGS = "positions (bags, folded before context parallelism cuts the row)"
ENDS = "(only parallel.pipeline_layers can leave the first and the last stage empty)"


def config_of(**overrides):
    """4 card layers, 2 key/value and 4 key heads, 8 experts; 8 windows of 64 positions a step. `__` is a dot."""
    model = tiny_model(
        pattern="*-GEG-*E / *-",
        gdn=dict(key_heads=4, value_heads=8, head_dim=16),
        moe=dict(experts=8, top_k=2, expert_hidden_size=32, shared_hidden_size=32),
    )
    phase = dict(name="only", until_steps=4, sequence=64, positions_per_step=512)
    return changed(config_for(model, phases=[phase]), {k.replace("__", "."): v for k, v in overrides.items()})


def parallel(**values):
    return {f"parallel__{name}": value for name, value in values.items()}


RULES = [
    ("kv_heads", dict(model__attention__kv_heads=3), 1,
     "model.attention.kv_heads=3 does not divide model.attention.heads=4; nearest: 1, 2, 4"),
    ("key_heads", dict(model__gdn__key_heads=3), 1,
     "model.gdn.key_heads=3 does not divide model.gdn.value_heads=8; nearest: 1, 2, 4"),
    ("heads that tensor must divide", dict(model__gdn__key_heads=3) | parallel(tensor=2, sequence_parallel=True), 2,
     "model.gdn.key_heads=3 does not divide model.gdn.value_heads=8, is not a multiple of parallel.tensor=2; "
     "nearest: 2, 4, 8"),
    ("top_k", dict(model__moe__top_k=9), 1, "model.moe.top_k=9 exceeds model.moe.experts=8; nearest: 6, 7, 8"),
    ("tensor", parallel(tensor=3) | dict(model__pattern=DENSE), None,
     "parallel.tensor=3 does not divide model.attention.kv_heads=2, model.gdn.key_heads=4, model.hidden_size=64, "
     "padded model.vocab_size=256, model.moe.shared_hidden_size=32; nearest: 1, 2"),
    ("tensor and everything else", parallel(tensor=3, sequence_parallel=True), 4,
     "parallel.tensor=3 does not divide model.attention.kv_heads=2, model.gdn.key_heads=4, model.hidden_size=64, "
     f"padded model.vocab_size=256, model.moe.shared_hidden_size=32, {ROW}=64, world=4; nearest: 2"),
    ("tensor and an odd vocabulary", parallel(tensor=3) | dict(model__pattern=DENSE, model__vocab_size=385), None,
     "parallel.tensor=3 does not divide model.attention.kv_heads=2, model.gdn.key_heads=4, model.hidden_size=64, "
     "padded model.vocab_size=512, model.moe.shared_hidden_size=32; nearest: 1, 2"),
    ("MoE without sequence parallelism", parallel(tensor=2), 2,
     "parallel.sequence_parallel=false must be true with MoE blocks and parallel.tensor > 1; nearest: true"),
    ("sequence parallelism alone", parallel(sequence_parallel=True), 1,
     "parallel.sequence_parallel=true must be false with parallel.tensor=1; nearest: false"),
    ("rows under sequence parallelism",
     parallel(tensor=2, sequence_parallel=True) | dict(phases__0__sequence=63, phases__0__positions_per_step=504), 2,
     f"{ROW}=63 is not a multiple of parallel.tensor=2; nearest: 42, 56, 72"),
    ("expert", parallel(expert=3), 4,
     "parallel.expert=3 does not divide model.moe.experts=8, world=4; nearest: 1, 2, 4"),
    ("expert and the world", parallel(expert=8, pipeline=2), 8,
     "parallel.expert=8: world=8 is not a multiple of parallel.pipeline*parallel.expert=2*8=16; nearest: 1, 2, 4"),
    ("expert tensor", parallel(expert_tensor=5, expert=2), 8,
     "parallel.expert_tensor=5 does not divide model.moe.expert_hidden_size=32; world=8 is not a multiple of "
     "parallel.expert*parallel.expert_tensor=2*5=10; nearest: 1, 2, 4"),
    ("expert without MoE", parallel(expert=2) | dict(model__pattern=DENSE), 2,
     "parallel.expert=2 must be 1 without MoE blocks in model.pattern; nearest: 1"),
    ("expert tensor without MoE", parallel(expert_tensor=2) | dict(model__pattern=DENSE), 2,
     "parallel.expert_tensor=2 must be 1 without MoE blocks in model.pattern; nearest: 1"),
    ("pipeline", parallel(pipeline=8), 8,
     f"parallel.pipeline=8 exceeds layers of model.pattern=4 {ENDS}; nearest: 1, 2, 4"),
    ("virtual pipeline alone", parallel(virtual_pipeline=2), 2,
     "parallel.virtual_pipeline=2 must be 1 with parallel.pipeline=1; nearest: 1"),
    ("virtual pipeline", parallel(pipeline=2, virtual_pipeline=4), 2,
     "parallel.virtual_pipeline=4: parallel.pipeline*parallel.virtual_pipeline=2*4=8 exceeds layers of "
     f"model.pattern=4 {ENDS}; nearest: 1, 2"),
    ("groups of the interleaved schedule",
     parallel(pipeline=2, virtual_pipeline=2) | dict(phases__0__positions_per_step=448), 2,
     f"{STEP}=448 is not a multiple of sequence*parallel.pipeline=64*2=128 with parallel.virtual_pipeline > 1; "
     "nearest: 384, 512"),
    ("too few pipeline_layers", parallel(pipeline=2, pipeline_layers=[4]), 2,
     "parallel.pipeline_layers=[4]: entries of parallel.pipeline_layers=1 must be parallel.pipeline=2; "
     "nearest: [2, 2]"),
    ("sum of pipeline_layers", parallel(pipeline=2, virtual_pipeline=2, pipeline_layers=[0, 2, 3, 0]), 2,
     "parallel.pipeline_layers=[0, 2, 3, 0]: sum of parallel.pipeline_layers=5 must be layers of model.pattern=4; "
     "nearest: [0, 2, 2, 0]"),
    ("empty stages in pipeline_layers", parallel(pipeline=4, pipeline_layers=[2, 0, 0, 2]), 4,
     "parallel.pipeline_layers=[2, 0, 0, 2]: empty stages between the first and last of parallel.pipeline_layers=2 "
     "must be 0; nearest: [1, 1, 1, 1]"),
    ("context by heads", parallel(context=4, context_deltanet="heads", tensor=2, sequence_parallel=True), 8,
     "parallel.context=4: model.gdn.key_heads=4 is not a multiple of parallel.tensor*parallel.context=2*4=8 with "
     "parallel.context_deltanet=heads; nearest: 1, 2; or parallel.context_deltanet=state"),
    ("halves of context", parallel(context=64), 64,
     f"parallel.context=64: {ROW}=64 is not a multiple of 2*parallel.context=2*64=128 {BAGS}; "
     f"parallel.context*(model.gdn.conv_width - 1)=64*3=192 exceeds {ROW}=64 {BAGS}; nearest: 8, 16"),
    ("reach of the convolution", parallel(context=32), 32,
     f"parallel.context=32: parallel.context*(model.gdn.conv_width - 1)=32*3=96 exceeds {ROW}=64 {BAGS}; "
     "nearest: 4, 8, 16"),
    ("context and tensor", parallel(context=2, tensor=2, sequence_parallel=True)
     | dict(phases__0__sequence=66, phases__0__positions_per_step=528), 4,
     f"parallel.context=2: {ROW}=66 is not a multiple of 2*parallel.context=2*2=4 {BAGS}; {ROW}=66 is not a multiple "
     "of parallel.context*parallel.tensor=2*2=4; nearest: 1"),
    ("world", parallel(tensor=2, sequence_parallel=True, pipeline=2), 6,
     "world=6 is not a multiple of parallel.tensor*parallel.pipeline=2*2=4; nearest: 4, 8, 16"),
    ("sequence and step", dict(phases__0__sequence=60), 1,
     f"{ROW}=60 does not divide {STEP}=512; nearest: 16, 32, 64"),
    ("step and sequence", dict(phases__0__positions_per_step=509), 4,
     f"{STEP}=509 is not a multiple of sequence=64; nearest: 256, 512"),
    ("longest sequence", dict(phases__0__sequence=1024, phases__0__positions_per_step=4096), 1,
     f"{ROW}=1024 exceeds model.max_positions=512; nearest: 128, 256, 512"),
    ("whole micro-batches", dict(micro_batch=3), 2,
     f"{STEP}=512 is not a multiple of sequence*micro_batch*data parallel size=64*3*2=384; nearest: 384, 768"),
    ("no world", {}, 0, "world=0; expected 1 process or more"),
]  # fmt: skip


@pytest.mark.parametrize("overrides, world, line", [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_rule(overrides, world, line):
    config = config_of(**overrides)
    assert problems(config, world) == [line]
    for value in suggestions(line):
        other = {} if field(line) == "world" else {field(line): value}
        assert problems(changed(config, other), value if field(line) == "world" else world) == []
    for name, value in alternatives(line):
        assert problems(changed(config, {name: value}), world) == []


def test_everything_at_once():
    """A line a wrong field; the nearest value of each, put in place together, makes it right."""
    wrong = dict(
        parallel(tensor=3, pipeline=7, expert=3, pipeline_layers=[3, 4]),
        phases__0__sequence=70,
        model__moe__top_k=9,
    )
    config, world = config_of(**wrong), 7
    found = problems(config, world)
    assert {field(line) for line in found} == {
        "model.moe.top_k", "parallel.tensor", "parallel.expert", "parallel.pipeline",
        "parallel.pipeline_layers", "phases.0.sequence", "world",
    }  # fmt: skip
    config, world = mended(config, world, found)
    assert problems(config, world) == []


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 255, 641, 151_669])
def test_any_vocabulary_is_cut_by_any_power_of_two(vocabulary):
    """Up to 128; the rows do not depend on the layout."""
    config = config_of(model__vocab_size=vocabulary, model__attention__heads=8, model__attention__kv_heads=8)
    config = changed(config, {"model.gdn.key_heads": 8, "model.gdn.value_heads": 8})
    assert 0 <= padded_vocab(config.model) - vocabulary < 128 and padded_vocab(config.model) % 128 == 0
    for tensor in (2, 4, 8):
        cut = {"parallel.tensor": tensor, "parallel.sequence_parallel": True}
        assert problems(changed(config, cut), tensor) == []


def test_a_phase_of_several():
    """What is wrong with all phases at once is told once, of the one field that mends it."""
    config = load([EXAMPLES / "boreal_10b_moe.yaml"])
    (line,) = problems(config, 192)
    assert line.startswith("world=192: phases.0 (superposition).positions_per_step=4194304, phases.1 (recovery).")
    assert "is not a multiple of sequence*data parallel size=32768*24=786432; nearest: 64, 128, 256" in line
    assert problems(changed(config, {"phases.2.sequence": 30_000}), 256) == [
        "phases.2 (context).sequence=30000 does not divide phases.2 (context).positions_per_step=4194304; "
        "nearest: 8192, 16384, 32768"
    ]


BASES = {
    "tiny": ("tiny_cpu.yaml", {}, 2),
    "2b": ("boreal_2b.yaml", {}, 64),
    "10b": ("boreal_10b_moe.yaml", {}, 256),
    "10b, context and virtual stages": (
        "boreal_10b_moe.yaml", {"parallel.context": 2, "parallel.virtual_pipeline": 5}, 256,
    ),
}  # fmt: skip
SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
FIELDS = [*(f"parallel.{name}" for name in SIZES), "micro_batch", "world"]
FIELDS += [f"phases.{phase}.{name}" for phase in (0, 1) for name in ("sequence", "positions_per_step")]


def value_at(config, path):
    for part in path.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def corrupt(random, config, world, path):
    """Some other value of a field."""
    if path == "world":
        return random.choice([random.randint(1, 1024), world + random.randint(1, 9)])
    old = value_at(config, path)
    if path.startswith("phases"):
        return random.choice([old + 1, old + old // 2, old * 3, old // 3, random.randint(1, 2 * old)])
    return random.choice([1, 2, 3, 5, 6, 7, 9, 16, 24, 64, random.randint(1, 100)])


def corrupted(name, wrong, count):
    """(config, world) of seeded random corruptions of a valid run that `check` refuses."""
    file, overrides, world = BASES[name]
    config = changed(load([EXAMPLES / file]), overrides)
    assert problems(config, world) == []
    dice = random.Random(f"{name} {wrong}")
    while count:
        values = {path: corrupt(dice, config, world, path) for path in dice.sample(FIELDS, wrong)}
        bad = changed(config, values), values.get("world", world)
        if problems(*bad):
            count -= 1
            yield values, *bad


@pytest.mark.parametrize("name", BASES)
def test_every_suggestion_for_one_wrong_field_is_valid(name):
    for values, config, world in corrupted(name, 1, 80):
        found = problems(config, world)
        assert len(found) == 1 and suggestions(found[0]), (values, found)
        path = field(found[0])
        for value in suggestions(found[0]):
            left = problems(changed(config, {path: value}), value if path == "world" else world)
            assert left == [], (values, found, value)
        for other, value in alternatives(found[0]):
            assert problems(changed(config, {other: value}), world) == []


def runs(config, world):
    """Whether a configuration can run, spelt out: the twin of the table of rules for what `FIELDS` changes."""
    model, cut, (main, mtp) = config.model, config.parallel, expand(config.model.pattern)
    tensor, pipeline, virtual, context = cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.context
    moe, letters, layers = model.moe, main + mtp, len(main) // 2
    vocabulary = -(-model.vocab_size // 128) * 128
    whole = [model.attention.kv_heads, model.gdn.key_heads, model.ffn_hidden_size, model.hidden_size, vocabulary]
    ok = all(size % tensor == 0 for size in whole + ([moe.shared_hidden_size] if moe else []))
    ok &= not cut.sequence_parallel or tensor > 1
    if "E" in letters:
        ok &= tensor == 1 or cut.sequence_parallel
        ok &= moe.experts % cut.expert == 0 and moe.expert_hidden_size % cut.expert_tensor == 0
    else:
        ok &= cut.expert == cut.expert_tensor == 1
    ok &= pipeline * virtual <= layers and (virtual == 1 or pipeline > 1)
    if world % (tensor * pipeline * context) or world % (pipeline * cut.expert * cut.expert_tensor):
        return False
    for phase in config.phases:
        row = phase.sequence * config.micro_batch
        ok &= phase.positions_per_step % phase.sequence == 0 and phase.sequence <= model.max_positions
        micro_batches, rest = divmod(phase.positions_per_step, row * data_size(config, world))
        ok &= rest == 0 and (virtual == 1 or micro_batches % pipeline == 0)
        if context > 1:
            ok &= row % (2 * context) == 0 and row / context >= model.gdn.conv_width - 1
        if cut.sequence_parallel:
            ok &= row % (context * tensor) == 0
    return bool(ok)


@pytest.mark.parametrize("name", BASES)
def test_no_problems_means_that_it_runs(name):
    file, overrides, world = BASES[name]
    config = changed(load([EXAMPLES / file]), overrides)
    dice, seen = random.Random(name), set()
    for wrong in (1, 1, 2, 3) * 100:
        values = {path: corrupt(dice, config, world, path) for path in dice.sample(FIELDS, wrong)}
        other, size = changed(config, values), values.get("world", world)
        seen.add(runs(other, size))
        assert (problems(other, size) == []) == runs(other, size), values
    assert seen == {True, False}


def mended(config, world, lines):
    """Every line's nearest value in place of the wrong one."""
    values = {}
    for line in lines:
        path, found = field(line), suggestions(line)
        now = world if path == "world" else value_at(config, path)
        values[path] = min(found, key=lambda value: abs(value - now)) if isinstance(now, int) else found[0]
    return changed(config, values), values.get("world", world)


@pytest.mark.parametrize("name", BASES)
def test_the_nearest_values_mend_two_wrong_fields_together(name):
    """Nearly always: the search mends one field after another and does not go back."""
    cases = list(corrupted(name, 2, 60))
    left = [
        values
        for values, config, world in cases
        if not all(map(suggestions, found := problems(config, world))) or problems(*mended(config, world, found))
    ]
    assert len(left) <= 2, left


def test_neighbours_for_real_runs(tmp_path):
    """The cases that another test runs under torchrun: one line each, of the wrong field."""
    corpus = dict(tokenizer="none", train="none", valid="none")
    base = load([write_config(tmp_path / "config.yaml", corpus, tmp_path / "run")])
    for name, overrides, world in neighbours.cases():
        config = changed(base, overrides)
        (line,) = problems(config, world)
        path = field(line)
        assert path in overrides or path == "world", (name, line)
        assert suggestions(line)
        for value in suggestions(line):
            assert problems(changed(config, {path: value}), value if path == "world" else world) == []


def test_check_is_quick():
    """A refusal takes milliseconds (a second is the promise), and the command imports neither torch nor megatron."""
    config = load([EXAMPLES / "boreal_10b_moe.yaml"])
    seconds = []
    for tensor in (3, 3, 5, 7):
        began = time.process_time()
        assert problems(changed(config, {"parallel.tensor": tensor, "parallel.pipeline": 9}), 1000)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 1
    code = (
        "import sys; from boreal_megatron.cli import main; "
        f"assert main(['check', {str(EXAMPLES / 'boreal_10b_moe.yaml')!r}, '--world', '512']) == 0; "
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_data_parallel_size():
    config = config_of(**parallel(tensor=2, sequence_parallel=True, pipeline=2, context=2))
    assert data_size(config, 32) == 4
    assert problems(config, 32) == []


@pytest.mark.parametrize(
    "cut, expected",
    [
        (dict(), [5]),
        (dict(pipeline=2), [3, 2]),
        (dict(pipeline=2, virtual_pipeline=2), [2, 1, 1, 1]),
        (dict(pipeline=4, pipeline_layers=(0, 3, 2, 0)), [0, 3, 2, 0]),
        (dict(pipeline=2, virtual_pipeline=2, pipeline_layers=(0, 3, 2, 0)), [0, 3, 2, 0]),
    ],
)
def test_stages(cut, expected):
    assert stages(5, Parallel(**cut)) == expected


def test_stage_pattern():
    pattern = "*-G-GE*E/*-"
    assert stage_pattern(pattern, Parallel()) == "*-G-GE*E/*-"
    assert stage_pattern(pattern, Parallel(pipeline=2, virtual_pipeline=2)) == "*-|G-|GE|*E/*-"
    assert stage_pattern(pattern, Parallel(pipeline=4, pipeline_layers=(0, 2, 2, 0))) == "|*-G-|GE*E|/*-"
    assert stage_pattern("*-G-", Parallel(pipeline=3, pipeline_layers=(0, 1, 1))) == "|*-|G-"


@pytest.mark.parametrize(
    "given, layers, count, expected",
    [
        ((3, 17, 17, 4), 40, 4, [3, 16, 17, 4]),
        ((0, 19, 19, 0), 40, 4, [0, 20, 20, 0]),
        ((0, 4, 0, 0), 4, 4, [0, 3, 1, 0]),
        ((9,), 5, 2, [3, 2]),
        ((0, 0), 2, 2, [2, 0]),
        ((1, 1, 1, 1), 2, 4, [0, 1, 1, 0]),
    ],
)
def test_nearest_split(given, layers, count, expected):
    assert nearest_split(given, layers, count) == expected
