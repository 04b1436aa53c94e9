"""Parts of an HTML page that is one file: its plots are inside it, and nothing is fetched from anywhere."""

import base64
import html
import io

from boreal_megatron.errors import BorealError

LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx", "--", "oo")  # things are told apart without colour, too
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
body { color: #111; background: #fff }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .2em .8em; border-bottom: 1px solid #bbb; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
.problems { border: 3px solid #b00020; color: #b00020; padding: 0 1em; margin: 1em 0 }
img { max-width: 100% } code { background: #eee; white-space: pre-wrap }
"""


def need_matplotlib(who):
    """Raises BorealError where plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BorealError(f"{who}: plots need matplotlib. Install it: pip install 'boreal-megatron[plot]'") from None


def head(title):
    """What a page begins with; `END` ends it."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
    )


END = "</body></html>\n"


def plot(draw, alt, height=4.5):
    """A plot as an <img> that holds its PNG; `draw` is given the axes, `height` is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    data = base64.b64encode(png.getvalue()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>'


def table(titles, rows):
    """Rows of cells, strings, under their titles."""

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    return f"<table>{line(titles, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def ascii_only(text):
    """The page as ASCII, whatever the encoding of the machine; browsers show the references as the characters."""
    return text.encode("ascii", "xmlcharrefreplace").decode()
