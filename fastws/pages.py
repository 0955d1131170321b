"""Reports as one HTML file with their figures and tables inside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#767676"  # distinct also for the colour-blind
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: white; border-radius: 6px; border: 1px solid #8886; }
figure { margin: 1.5rem 0; } figcaption, small { opacity: .8; } code, pre { font-size: .9em; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: 6px; }
"""


def require_matplotlib(command: str) -> None:
    """Says what to install, before minutes are spent."""
    if not find_spec("matplotlib"):
        raise ValueError(
            f"{command}: matplotlib must be installed for the report, got none; pip install 'fast-weight-space[eval]'"
        )


def document(title: str, body: Iterable[str]) -> str:
    """The whole page; ``body`` is HTML."""
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}<title>{html.escape(title)}</title></head>" + (
        f"<body>{''.join(body)}</body></html>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def figure(drawn: "Figure", caption: str) -> str:
    return f"<figure>{image(drawn, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def image(figure: "Figure", caption: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return (
        f"<img alt='{html.escape(caption)}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"
    )


def make_figure(panels: int = 1, height: float = 4.0, width: float = 8.0):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes
