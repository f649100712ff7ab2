"""Draw the pictures of docs/how_it_works.md.

python docs/drawings.py
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
ROWS, BAND, LAYERS = 16, 4, 4
"""Of the drawn network: convolutions 3x3 with a padding of one, so each reads a row more on either side."""
ALIVE, NOW, GONE, PAPER, INK, FAINT = "#2f6fde", "#f2a33a", "#d9dee8", "#ffffff", "#1d2433", "#8b93a5"
CELL_W, CELL_H = 26, 9


def main() -> None:
    for name, made in {"bands": bands(), "sweep": sweep(), "barrier": barrier()}.items():
        (HERE / f"{name}.svg").write_text(made, encoding="utf-8")


# -- pictures ------------------------------------------------------------------------------------------------


def bands() -> str:
    """What is kept for backward: everything, the ends of stretches, or a window."""
    plain = [range(ROWS)] * (LAYERS + 1)
    ends = [range(ROWS) if i in (0, LAYERS) else range(0) for i in range(LAYERS + 1)]
    window = [range(max(0, 4 - (LAYERS - i)), min(ROWS, 8 + LAYERS - i)) for i in range(LAYERS + 1)]
    shown = [
        ("plain PyTorch", "every feature map, whole", plain),
        ("checkpointing", "the ends of a stretch; in backward all of it", ends),
        ("a band of rows", "a band and what its rows read", window),
    ]
    parts = []
    for i, (title, below, alive) in enumerate(shown):
        left = 30 + i * 250
        parts += [text(left, 28, title, 15, bold=True), text(left, 46, below, 11, FAINT)]
        parts += maps(left, 62, [[(alive[k], ALIVE)] for k in range(LAYERS + 1)])
        parts += names(left, 62 + ROWS * CELL_H + 16)
    return picture(790, 240, parts)


def frontiers(band: int) -> tuple[list[int], list[int]]:
    """(rows made below, rows that backward is through with below) of each layer after a band."""
    end = BAND * (band + 1)
    last = end == ROWS
    made = [ROWS if last else min(ROWS, end + LAYERS - k) for k in range(LAYERS + 1)]
    through = [ROWS if last else max(0, end - (LAYERS - k)) for k in range(LAYERS + 1)]
    return made, through


def sweep() -> str:
    """A single sweep, band by band: forward ahead, backward a receptive field behind."""
    parts = []
    for band in range(ROWS // BAND):
        left = 30 + band * 185
        made, through = frontiers(band)
        before = frontiers(band - 1)[0] if band else [0] * (LAYERS + 1)
        parts += [text(left, 28, f"band {band + 1}", 15, bold=True)]
        columns = []
        for k in range(LAYERS + 1):
            fresh = range(before[k], made[k])
            columns.append(
                [
                    (range(through[k]), GONE),
                    (range(through[k], made[k]), ALIVE),
                    (range(max(fresh.start, through[k]), fresh.stop), NOW),
                ]
            )
        parts += maps(left, 42, columns) + names(left, 42 + ROWS * CELL_H + 16)
    legend = [
        (NOW, "made in this band, still needed"),
        (ALIVE, "made before, still needed"),
        (GONE, "forward and backward done, memory free"),
        (PAPER, "not made yet"),
    ]
    for i, (colour, said) in enumerate(legend):
        left, top = 30 + (i % 2) * 290, 226 + (i // 2) * 20
        parts += [box(left, top, 14, 10, colour), text(left + 22, top + 9, said, 11)]
    return picture(790, 272, parts)


def barrier() -> str:
    """A batch norm in bands: one pass for the statistics, another that uses them."""
    parts = []
    for i, (title, below) in enumerate(
        [
            ("first pass", "count, mean and M2 of each band are merged"),
            ("second pass", "bands are normalised"),
        ]
    ):
        left = 30 + i * 410
        parts += [text(left, 28, title, 15, bold=True), text(left, 46, below, 11, FAINT)]
        for k in range(4):
            top = 62 + k * 34
            parts += [box(left, top, 90, 30, ALIVE if k == 1 else GONE, 4)]
            parts += [text(left + 24, top + 19, f"band {k + 1}", 11, PAPER if k == 1 else INK)]
            if i == 0:
                parts += [arrow(left + 96, top + 15, 180, 128)]
            else:
                parts += [arrow(342, 128, left - 6, top + 15)]
    parts += [box(186, 96, 150, 64, PAPER, 8), text(204, 122, "mean, variance", 13, bold=True)]
    parts += [text(204, 142, "all rows, all images", 11, FAINT)]
    parts += [text(352, 82, "barrier", 11, FAINT)]
    parts += [
        text(550, 106, "in backward the gradients of mean and", 11),
        text(550, 123, "variance are summed over bands too,", 11),
    ]
    parts += [text(550, 140, "and reach every row of the input", 11)]
    return picture(790, 214, parts)


# -- pieces --------------------------------------------------------------------------------------------------


def maps(left: float, top: float, columns: list[list[tuple[range, str]]]) -> list[str]:
    """Feature maps side by side as columns of rows, each coloured where it is said."""
    parts = []
    for k, spans in enumerate(columns):
        x = left + k * (CELL_W + 7)
        colours = [next((c for span, c in reversed(spans) if row in span), PAPER) for row in range(ROWS)]
        row = 0
        for colour, run in groupby(colours):
            rows = len(list(run))
            parts.append(box(x, top + row * CELL_H, CELL_W, rows * CELL_H, colour))
            row += rows
        lines = "".join(f"M{x:g} {top + row * CELL_H:g}h{CELL_W}" for row in range(1, ROWS))
        parts.append(f'<path d="{lines}" stroke="{FAINT}" stroke-width="0.4"/>')
    return parts


def names(left: float, top: float) -> list[str]:
    said = ["image", *(f"conv {k}" for k in range(1, LAYERS + 1))]
    return [
        text(left + k * (CELL_W + 7) - (0 if k else 2), top, name, 8.5, FAINT) for k, name in enumerate(said)
    ]


def box(x: float, y: float, width: float, height: float, fill: str, round_: float = 0) -> str:
    where = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}"'
    return f'<rect {where} fill="{fill}" stroke="{FAINT}" stroke-width="0.6"/>'


def text(x: float, y: float, said: str, size: float, fill: str = INK, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{weight}>{said}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    where = f'x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}"'
    return f'<line {where} stroke="{INK}" stroke-width="1.2" marker-end="url(#tip)"/>'


def picture(width: int, height: int, parts: list[str]) -> str:
    tip = (
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        f'<path d="M0,0 L6,3 L0,6 z" fill="{INK}"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif">'
    )
    paper = f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>'
    return "\n".join([head, tip, paper, *parts, "</svg>", ""])


if __name__ == "__main__":
    main()
