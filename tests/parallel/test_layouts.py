"""Every layout computes what one process computes, also after another layout's checkpoint, and the bench that says so
notices every known fault.

Loss, MTP loss, gradient norm and expert loads at every step, every finished gradient and every parameter by name, the
router's bias, the validation loss, the windows that were read. What is run and what is allowed:
tests/support/layouts.py. All of them share one program.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from tests.support import layouts
from tests.support.launch import write_config
from tests.support.layouts import (
    BY_NAME, FAULTY, FIRST, LAYOUTS, REFERENCES, RESHARDS, SWITCH, case, compare, launch, limits, violations
)  # fmt: skip


def marked(value, name, often):
    return pytest.param(value, id=name, marks=[] if often else pytest.mark.slow)


CELLS = [marked(c.name, c.name, c.often) for c in LAYOUTS]
OFTEN = {"no_sequence_parallel_sum", "documents_forgotten_on_later_stages"}
FAULTS = [marked(fault, fault, fault in OFTEN) for fault in FAULTY]
PAIRS = [marked(pair, " to ".join(pair), often) for pair, often in RESHARDS.items()]


@pytest.fixture(scope="module")
def bench(corpus, tmp_path_factory, request):
    """Function from a cell, (cell, fault) or (cell, cell to go on in) to its comparison. Runs the references, then all
    that this session selected, then what goes on from their checkpoints."""
    folder = tmp_path_factory.mktemp("layouts")
    data = {
        "tokenizer": str(corpus["tokenizer"]),
        "sources": {"text": str(corpus["train"])},
        "validation": str(corpus["valid"]),
        "boundaries": "align",
        "piece_tokens": 150,
    }
    config = write_config(folder / "config.yaml", corpus, folder / "run", **layouts.RUN, data=data)
    mine = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params for item in mine if "bench" in item.fixturenames]
    faults = [p["fault"] for p in asked if "fault" in p]
    pairs = [p["pair"] for p in asked if "pair" in p]
    cells = dict.fromkeys([p["cell"] for p in asked if "cell" in p] + [before for before, _ in pairs])
    used = {BY_NAME[name].reference for name in (*cells, *(FAULTY[f][0] for f in faults), *(after for _, after in pairs))}
    references = {name: case(folder, config, name, words, every=FIRST) for name, words in REFERENCES.items() if name in used}
    begin = {before: SWITCH for before, _ in pairs}  # writes a checkpoint for another to go on from
    cases, first, then = {}, defaultdict(list), defaultdict(list)

    def plan(key, cell, where, name, **more):
        layout = BY_NAME[cell]
        more = {"source": references[layout.reference], "start": layout.start, **more}
        cases[key] = case(folder, config, name, layout.words(), **more)
        where[layout.world].append(cases[key])

    for cell in cells:
        plan(cell, cell, first, cell, **({"every": begin[cell]} if cell in begin else {}))
    for fault in faults:
        plan((FAULTY[fault][0], fault), FAULTY[fault][0], first, FAULTY[fault][0], fault=fault)
    for before, after in pairs:
        plan((before, after), after, then, f"{before} to {after}", source=cases[before], start=SWITCH)
    plan = [(1, list(references.values())), *first.items(), *then.items()]
    imagined = request.config.getoption("--imagined-cuda")
    output = launch(plan, folder, timeout=3000, devices=["tests.support.imagined_cuda"] if imagined else [])
    assert all(Path(r["out"]).exists() for r in references.values()), output[-6000:]

    def result(key, cell):
        mine = cases[key]
        assert Path(mine["out"]).exists(), output[-6000:]
        return compare(mine, references[BY_NAME[cell].reference], mine["start"])

    return result


@pytest.mark.parametrize("cell", CELLS)
def test_layout_equals_one_process(cell, bench, pytestconfig):
    found = bench(cell, cell)
    if folder := pytestconfig.getoption("--layout-results"):
        file = Path(folder) / "layouts.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        known[cell] = {name: value for name, value in found.items() if not isinstance(value, str)}
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    assert not violations(found, limits(BY_NAME[cell]))


@pytest.mark.parametrize("pair", PAIRS)
def test_another_layouts_checkpoint_goes_on(pair, bench):
    """Written where the phases change; weights, moments, router bias and data ledger go on in the other layout."""
    assert not violations(bench(pair, pair[1]), limits(BY_NAME[pair[1]]))


@pytest.mark.parametrize("fault", FAULTS)
def test_bench_notices(fault, bench):
    cell, expected = FAULTY[fault]
    noticed = violations(bench((cell, fault), cell), limits(BY_NAME[cell]))
    assert expected <= noticed.keys(), noticed
