"""The README says of layouts what the bench measured, for all its cells and no others."""

from tests.support.launch import ROOT
from tests.support.layouts import BY_NAME, limits, violations
from tests.support.table import measured, parts, table


def test_table_is_what_was_measured():
    _, inside, _ = parts((ROOT / "README.md").read_text())
    assert inside == table()


def test_every_cell_was_measured_and_green():
    results = measured()
    assert results.keys() == BY_NAME.keys()
    for name, found in results.items():
        assert not violations(found, limits(BY_NAME[name])), name
