"""What `boreal check` suggests instead of a wrong layout does run: two real steps, one of each bag size."""

from collections import defaultdict
from pathlib import Path

import pytest
from boreal_megatron.config.check import problems
from boreal_megatron.config.load import load
from tests.support.launch import metrics, write_config
from tests.support.layouts import case, launch
from tests.support.neighbours import alternatives, cases, changed, field, suggestions

SHORT = ["phases.0.until_steps=1", "phases.1.until_steps=2"]


def written(values):
    """Overrides as words for the command line."""
    return [f"{path}={str(value).lower() if isinstance(value, bool) else value}" for path, value in values.items()]


@pytest.mark.slow
def test_every_suggestion_runs(corpus, tmp_path):
    config = write_config(tmp_path / "config.yaml", corpus, tmp_path / "run")
    right = load([config], [])
    plan = defaultdict(list)
    for name, overrides, world in cases():
        lines = problems(changed(right, overrides), world)
        assert len(lines) == 1, (name, lines)
        line = lines[0]
        mends = [{field(line): value} for value in suggestions(line)] + [dict([other]) for other in alternatives(line)]
        assert mends, line
        for mend in mends:
            values = {**overrides, **mend}
            ranks = values.pop("world", world)
            text = f"{name} {' '.join(written(mend))}"
            plan[ranks].append(case(tmp_path, config, text, [*written(values), *SHORT]))
    output = launch(plan.items(), tmp_path, timeout=1500)
    for one in (one for some in plan.values() for one in some):
        assert Path(one["out"]).exists(), (one["name"], output[-4000:])
        assert metrics(one["run"]).keys() == {1, 2}, one["name"]
