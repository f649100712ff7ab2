"""Resampling: the rows read depend on the absolute row, not on the slice.

`interpolate` on a slice is another function than a slice of `interpolate`. For whole-number magnification
without aligned corners the stencil of nearest and (bi-, tri-)linear is regular: the operator itself runs on a
slice with one row of context, and the result is cropped. Every other case adds up its source rows (`Taps`),
found by absolute index; the other axes are then left to the operator, called with the rows' own scale of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rowtune.graph.rules.pointwise import along
from rowtune.graph.rules.rule import Opaque, Question, Read, RowRule, Run, Slab, cut
from rowtune.kernels.constants import Tables
from rowtune.rows import Affine, Window, gather

aten = torch.ops.aten


class Taps(NamedTuple):
    """The source rows of one output row, and their weights."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


class Call(NamedTuple):
    """How the operator is called: its kind, whether corners are aligned, given scales per spatial axis."""

    kind: str
    corners: bool
    scales: list[float | None]


def _question(q: Question, kind: str) -> Call:
    spatial = len(q.out) - 2
    exact = kind in ("nearest", "exact")
    corners = False if exact else bool(q.arg(2, "align_corners", False))
    first = 2 if exact else 3
    if q.node.target._overloadname == "vec":  # type: ignore[attr-defined]
        scales = q.arg(first, "scale_factors", None) or [None] * spatial
    else:
        names = {1: ["scales"], 2: ["scales_h", "scales_w"], 3: ["scales_d", "scales_h", "scales_w"]}
        scales = [q.arg(first + k, n, None) for k, n in enumerate(names[spatial])]
    given = [None if s is None else float(s) for s in scales]
    return Call(kind, corners, given if None not in given else [None] * spatial)


def nearest(q: Question) -> RowRule | Opaque:
    """Nearest neighbour, 1-D to 3-D: by absolute row."""
    return _resample(q, "nearest")


def exact(q: Question) -> RowRule | Opaque:
    """Nearest neighbour of pixel centres ("nearest-exact"), 1-D to 3-D."""
    return _resample(q, "exact")


def linear(q: Question) -> RowRule | Opaque:
    """Linear, bilinear, trilinear, both settings of align_corners."""
    return _resample(q, "linear")


def cubic(q: Question) -> RowRule | Opaque:
    """Bicubic, both settings of align_corners: four rows, those beyond the border repeat it."""
    return _resample(q, "cubic")


def smooth_linear(q: Question) -> RowRule | Opaque:
    """Bilinear with antialiasing: the triangle grows with the reduction."""
    return _resample(q, "linear_aa")


def smooth_cubic(q: Question) -> RowRule | Opaque:
    """Bicubic with antialiasing: the kernel grows with the reduction."""
    return _resample(q, "cubic_aa")


def _resample(q: Question, kind: str) -> RowRule | Opaque:
    x = q.node.inputs[0]
    dim = q.dims[x]
    if dim is None or dim < 2:
        return along(q, lambda q, d: d not in (0, 1), "resampling")
    call = _question(q, kind)
    if call.corners and kind.endswith("aa"):
        return Opaque("antialiased resampling with aligned corners")
    rows, out_rows, scale = q.shape(x)[dim], q.out[dim], call.scales[dim - 2]
    factor = out_rows // rows
    whole = not call.corners and factor * rows == out_rows and scale in (None, factor)
    if whole and kind in ("nearest", "exact", "linear"):
        window: Window = Affine(rows, out_rows, 1, factor)
        if kind == "linear":
            window = Affine(rows, out_rows, 1, factor, -(factor // 2), factor - 1 - (factor - 1) // 2)
        return RowRule(dim, {x: Read(dim, window)}, _native(q, dim, factor, call))
    if scale is not None and not call.corners and not whole and out_rows in (rows, 2 * rows):
        return Opaque("PyTorch's kernels disagree on a scale that is not the ratio of the sizes, 1 or 2")
    step = 1.0 / scale if scale else rows / out_rows
    taps = [_TAPS[kind](i, step, rows, out_rows, call.corners) for i in range(out_rows)]
    window = gather(rows, ((min(t.rows), max(t.rows)) for t in taps))
    return RowRule(dim, {x: Read(dim, window)}, _by_index(q, dim, taps, call))


def _nearest_taps(i: int, step: float, rows: int, out_rows: int, corners: bool) -> Taps:
    # PyTorch works this out in float32, so the same rounding must be used to pick the same rows.
    at = np.float32(i) * np.float32(step)
    return Taps((min(int(at), rows - 1),), (1.0,))


def _exact_taps(i: int, step: float, rows: int, out_rows: int, corners: bool) -> Taps:
    at = np.float32(i + 0.5) * np.float32(step)
    return Taps((min(int(at), rows - 1),), (1.0,))


def _position(i: int, step: float, rows: int, out_rows: int, corners: bool) -> float:
    """Where output row i lies among the input's rows."""
    if corners:
        return i * (rows - 1) / (out_rows - 1) if out_rows > 1 else 0.0
    return (i + 0.5) * step - 0.5


def _linear_taps(i: int, step: float, rows: int, out_rows: int, corners: bool) -> Taps:
    at = max(_position(i, step, rows, out_rows, corners), 0.0)
    lo = min(math.floor(at), rows - 1)
    part = min(max(at - lo, 0.0), 1.0)
    return Taps((lo, min(lo + 1, rows - 1)), (1.0 - part, part))


def _keys(t: float, a: float) -> float:
    """The cubic convolution kernel (Keys, 1981) at distance t."""
    t = abs(t)
    if t <= 1.0:
        return ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
    return ((a * t - 5.0 * a) * t + 8.0 * a) * t - 4.0 * a if t < 2.0 else 0.0


def _cubic_taps(i: int, step: float, rows: int, out_rows: int, corners: bool) -> Taps:
    at = _position(i, step, rows, out_rows, corners)
    lo = math.floor(at)
    near = range(lo - 1, lo + 3)
    return Taps(tuple(min(max(r, 0), rows - 1) for r in near), tuple(_keys(r - at, -0.75) for r in near))


def _smooth(reach: float, kernel: Callable[[float], float]) -> Callable[..., Taps]:
    """Antialiasing: a kernel of half width `reach`, stretched where the image shrinks, summing to one."""

    def taps(i: int, step: float, rows: int, out_rows: int, corners: bool) -> Taps:
        stretch = max(step, 1.0)
        centre, support = step * (i + 0.5), reach * stretch
        lo, hi = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), rows)
        weights = [kernel((r - centre + 0.5) / stretch) for r in range(lo, hi)]
        return Taps(tuple(range(lo, hi)), tuple(w / sum(weights) for w in weights))

    return taps


_TAPS: dict[str, Callable[..., Taps]] = {
    "nearest": _nearest_taps,
    "exact": _exact_taps,
    "linear": _linear_taps,
    "cubic": _cubic_taps,
    "linear_aa": _smooth(1.0, lambda t: max(0.0, 1.0 - abs(t))),
    "cubic_aa": _smooth(2.0, lambda t: _keys(t, -0.5)),
}

_OPERATORS: dict[tuple[str, int], Any] = {
    ("nearest", 1): aten.upsample_nearest1d.default,
    ("nearest", 2): aten.upsample_nearest2d.default,
    ("nearest", 3): aten.upsample_nearest3d.default,
    ("exact", 1): aten._upsample_nearest_exact1d.default,
    ("exact", 2): aten._upsample_nearest_exact2d.default,
    ("exact", 3): aten._upsample_nearest_exact3d.default,
    ("linear", 1): aten.upsample_linear1d.default,
    ("linear", 2): aten.upsample_bilinear2d.default,
    ("linear", 3): aten.upsample_trilinear3d.default,
    ("cubic", 2): aten.upsample_bicubic2d.default,
    ("linear_aa", 2): aten._upsample_bilinear2d_aa.default,
    ("cubic_aa", 2): aten._upsample_bicubic2d_aa.default,
}


def _call(q: Question, x: Tensor, dim: int, rows: int, row_scale: float, call: Call) -> Tensor:
    """The operator with `rows` output rows along the band axis and its own sizes along the others."""
    size, scales = list(q.out[2:]), list(call.scales)
    size[dim - 2], scales[dim - 2] = rows, row_scale
    middle = () if call.kind in ("nearest", "exact") else (call.corners,)
    return _OPERATORS[call.kind, len(size)](x, size, *middle, *scales)  # type: ignore[no-any-return]


def _native(q: Question, dim: int, factor: int, call: Call) -> Run:
    x = q.node.inputs[0]

    def run(slab: Slab) -> Tensor:
        got = slab.reads[x]
        # The slice's own edges are clamped by the operator; they are real ones or rows that are cropped.
        full = _call(q, slab.tensors[x], dim, got.size * factor, float(factor), call)
        return cut(full, dim, slab.rows.lo - got.lo * factor, slab.rows.size)

    return run


def _by_index(q: Question, dim: int, taps: list[Taps], call: Call) -> Run:
    x = q.node.inputs[0]
    # The same size is not the same image where a scale is given: 7 rows times 1.1 are 7 other rows.
    others = [d for d in range(2, len(q.out)) if d != dim]
    tables = Tables()
    same = all(q.out[d] == q.shape(x)[d] and call.scales[d - 2] in (None, 1.0) for d in others)

    def run(slab: Slab) -> Tensor:
        image, first = slab.tensors[x], slab.reads[x].lo
        mine = taps[slab.rows.lo : slab.rows.hi]
        total: Tensor | None = None
        for k in range(max(len(t.rows) for t in mine)):
            # A row with fewer taps than others reads its first one again, with no weight.
            rows = tuple((t.rows[k] if k < len(t.rows) else t.rows[0]) - first for t in mine)
            picked = image.index_select(dim, tables.index(rows, image))
            if any(t.weights != (1.0,) for t in mine):
                weights = tuple(t.weights[k] if k < len(t.rows) else 0.0 for t in mine)
                picked = picked * tables.column(weights, image, dim)
            total = picked if total is None else total + picked
        assert total is not None
        if same:
            return total
        if call.kind.endswith("aa") and slab.rows.size == 1:
            # PyTorch 2.13 mistakes the order in memory of a single column (and of its gradient): make two.
            return _call(q, torch.cat([total, total], dim), dim, 2, 1.0, call).narrow(dim, 0, 1)
        return _call(q, total, dim, slab.rows.size, 1.0, call)

    return run


RESAMPLES: dict[str, Callable[[Question], RowRule | Opaque]] = {
    "upsample_nearest1d": nearest,
    "upsample_nearest2d": nearest,
    "upsample_nearest3d": nearest,
    "_upsample_nearest_exact1d": exact,
    "_upsample_nearest_exact2d": exact,
    "_upsample_nearest_exact3d": exact,
    "upsample_linear1d": linear,
    "upsample_bilinear2d": linear,
    "upsample_trilinear3d": linear,
    "upsample_bicubic2d": cubic,
    "_upsample_bilinear2d_aa": smooth_linear,
    "_upsample_bicubic2d_aa": smooth_cubic,
}
