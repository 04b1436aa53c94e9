"""The README's support table, made from what the layout bench measured.

    pytest tests/parallel/test_layouts.py --layout-results tests/golden     measures -> tests/golden/layouts.json
    python -m tests.support.table                                           layouts.json -> README.md
"""

import json

from tests.support.launch import ROOT
from tests.support.layouts import LAYOUTS

GOLDEN = ROOT / "tests/golden/layouts.json"
BEGIN, END = "<!-- layouts: made by tests/support/table.py -->\n", "<!-- end of layouts -->\n"
COLUMNS = ("loss", "all gradients", "gradient", "parameter")


def measured():
    """Cell -> what was measured."""
    return json.loads(GOLDEN.read_text())


def table():
    """Markdown, one row for a cell of the bench."""
    results = measured()
    rows = ["| layout | processes | loss | all gradients | worst gradient | worst parameter | `make test` |"]
    rows += ["|---|---|---|---|---|---|---|"]
    for layout in LAYOUTS:
        numbers = " | ".join(f"{results[layout.name][name]:.0e}" for name in COLUMNS)
        rows.append(f"| {layout.name} | {layout.world} | {numbers} | {'yes' if layout.often else ''} |")
    return "\n".join(rows) + "\n"


def parts(text):
    """The README before, in and after the table."""
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


def main():
    readme = ROOT / "README.md"
    before, _, after = parts(readme.read_text())
    readme.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
