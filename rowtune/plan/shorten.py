"""A banding with rows taken out of the middle, where only sizes are wanted.

Interior bands are alike: the same steps on as many rows, some rows further down. Once a short schedule has
passed through one *period*, a stretch of rows after which everything that is alive stands as before but for
its place, a longer one only repeats that period. So plans of tall images are predicted from some dozens of
bands (runtime/left_out.py). Whole tensors keep their true sizes: those are the graph's, not the banding's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from rowtune.graph.bands import Banding
from rowtune.graph.cuts import Stretch
from rowtune.graph.graph import Graph
from rowtune.graph.rules import Read
from rowtune.rows import Affine, Chained, Gather, Window

Ratios = dict[str, Fraction]

# A resampling table whose rows do not come round within so many output rows is not shortened.
LONGEST_PERIOD = 64
# Aligned corners make a table drift by a row or so over the whole image: that often it may slip.
SLIPS = 2


def ratios(bands: Banding, part: Stretch, heights: Mapping[str, int], start: str) -> Ratios | None:
    """Rows of every banded value for one row of `start`, as far from the borders; None where some operator
    reads its rows at no fixed rate, or two paths disagree. What hangs together with none of those before (a
    shortcut's convolution, whose input comes from elsewhere) goes by its output: outputs advance by the same
    share of their `heights`."""
    found: Ratios = {start: Fraction(1)}
    for name, height in heights.items():
        found.setdefault(name, Fraction(height, heights[start]))
        if not _spread(bands, part, found):
            return None
    return found


def _spread(bands: Banding, part: Stretch, found: Ratios) -> bool:
    """Find the rates of all that hangs together with what is found; False where that is not possible."""
    changed = True
    while changed:
        changed = False
        for node in (*reversed(part.nodes), *part.nodes):
            for name, read in banded_reads(bands, node.name):
                assert read.window is not None
                rate = _rate(read.window)
                if rate is None:
                    return False
                if node.name in found and name not in found:
                    found[name], changed = found[node.name] * rate, True
                elif name in found and node.name not in found:
                    found[node.name], changed = found[name] / rate, True
                elif name in found and found[name] != found[node.name] * rate:
                    return False
    return True


def banded_reads(bands: Banding, node: str) -> list[tuple[str, Read]]:
    """What a node reads a band of."""
    reads = bands.rule(node).reads
    return [(n, r) for n, r in reads.items() if r.window is not None and bands.dims[n] is not None]


def _rate(window: Window) -> Fraction | None:
    """Input rows for one output row."""
    if isinstance(window, Affine):
        return Fraction(window.step, window.over)
    if isinstance(window, Gather) and window.out_rows >= 4:
        a, b = window.out_rows // 4, window.out_rows * 3 // 4
        return Fraction(window.firsts[b] - window.firsts[a], b - a).limit_denominator(LONGEST_PERIOD)
    if isinstance(window, Chained):
        outer, inner = _rate(window.outer), _rate(window.inner)
        return None if outer is None or inner is None else outer * inner
    return None


def period_of(found: Ratios, band_rows: int) -> int:
    """The fewest whole bands of `start` that are whole rows of every value."""
    return math.lcm(band_rows, *(r.denominator for r in found.values()))


def without(graph: Graph, bands: Banding, part: Stretch, removed: Mapping[str, int]) -> Banding | None:
    """The banding with `removed` rows of each value of `part` taken out; None where a table of rows does not
    repeat itself where they are."""
    rules = dict(bands.rules)
    for node in part.nodes:
        rule = bands.rule(node.name)
        reads = dict(rule.reads)
        for name, read in banded_reads(bands, node.name):
            assert read.window is not None
            window = _shorter(read.window, removed.get(name, 0), removed.get(node.name, 0))
            if window is None:
                return None
            reads[name] = Read(read.dim, window)
        rules[node.name] = replace(rule, reads=reads)
    short = replace(bands, rules=rules, removed=dict(removed))
    return short if all(short.height(graph.values[n]) > 0 for n in removed) else None


def _shorter(window: Window, rows: int, out_rows: int) -> Window | None:
    if isinstance(window, Affine):
        return replace(window, rows=window.rows - rows, out_rows=window.out_rows - out_rows)
    if isinstance(window, Chained):
        rate = _rate(window.outer)
        between = None if rate is None else out_rows * rate
        if between is None or between.denominator != 1:
            return None
        outer = _shorter(window.outer, int(between), out_rows)
        inner = _shorter(window.inner, rows, int(between))
        return None if outer is None or inner is None else Chained(outer, inner)
    assert isinstance(window, Gather)
    if not out_rows:
        return window
    keep = (window.out_rows - out_rows) // 2
    tables = [_cut_out(table, keep, out_rows, rows) for table in (window.firsts, window.ends)]
    if tables[0] is None or tables[1] is None:
        return None
    return Gather(window.rows - rows, tables[0], tables[1])


def _cut_out(table: tuple[int, ...], keep: int, count: int, rows: int) -> tuple[int, ...] | None:
    """`table` without `count` entries from `keep` on, whatever follows `rows` less; None where the entries
    left out do not repeat at this rate."""
    rate = Fraction(rows, count)
    step = rate.denominator
    slipped = sum(
        table[i + step] - table[i] != rate.numerator for i in range(max(keep - step, 0), keep + count)
    )
    if slipped > SLIPS * step:
        return None
    top = table[:keep]
    least = top[-1] if top else 0
    return top + tuple(max(i - rows, least) for i in table[keep + count :])
