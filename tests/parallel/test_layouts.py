"""Every layout computes what one process computes, and the bench that says so notices every known fault.

Loss, MTP loss, gradient norm and expert loads at every step, every finished gradient and every parameter by name, the
router's bias, the validation loss. What is run and what is allowed: tests/support/layouts.py. All of them
share one program.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from tests.support import layouts
from tests.support.launch import write_config
from tests.support.layouts import BY_NAME, FAULTY, LAYOUTS, REFERENCES, case, compare, launch, limits, violations

CELLS = [pytest.param(c.name, id=c.name, marks=[] if c.often else pytest.mark.slow) for c in LAYOUTS]


@pytest.fixture(scope="module")
def bench(corpus, tmp_path_factory, request):
    """Function from (cell, fault or None) to its comparison. Runs the references, then all that this session selected."""
    folder = tmp_path_factory.mktemp("layouts")
    data = {
        "tokenizer": str(corpus["tokenizer"]),
        "sources": {"text": str(corpus["train"])},
        "validation": str(corpus["valid"]),
        "boundaries": "align",
        "piece_tokens": 150,
    }
    config = write_config(folder / "config.yaml", corpus, folder / "run", **layouts.RUN, data=data)
    params = [item.callspec.params for item in request.session.items if "bench" in getattr(item, "fixturenames", ())]
    wanted = [(p["cell"], None) if "cell" in p else (FAULTY[p["fault"]][0], p["fault"]) for p in params]
    used = {BY_NAME[cell].reference for cell, _ in wanted}
    references = {name: case(folder, config, name, words) for name, words in REFERENCES.items() if name in used}
    # The references first: the other cases begin with copies of their checkpoints.
    output = launch({1: list(references.values())}, folder, timeout=300)
    assert all(Path(r["out"]).exists() for r in references.values()), output[-6000:]
    cases, plan = {}, defaultdict(list)
    for cell, fault in wanted:
        layout = BY_NAME[cell]
        reference = references[layout.reference]
        cases[cell, fault] = case(folder, config, cell, layout.words(), layout.start, reference, fault)
        plan[layout.world].append(cases[cell, fault])
    output = launch(plan, folder, timeout=3000)

    def result(cell, fault=None):
        mine = cases[cell, fault]
        assert Path(mine["out"]).exists(), output[-6000:]
        return compare(mine, references[BY_NAME[cell].reference], BY_NAME[cell].start)

    return result


@pytest.mark.parametrize("cell", CELLS)
def test_layout_equals_one_process(cell, bench, pytestconfig):
    found = bench(cell)
    if folder := pytestconfig.getoption("--layout-results"):
        file = Path(folder) / "layouts.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        known[cell] = {name: value for name, value in found.items() if not isinstance(value, str)}
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    assert not violations(found, limits(BY_NAME[cell]))


@pytest.mark.parametrize("fault", FAULTY)
def test_bench_notices(fault, bench):
    cell, expected = FAULTY[fault]
    noticed = violations(bench(cell, fault), limits(BY_NAME[cell]))
    assert expected <= noticed.keys(), noticed
