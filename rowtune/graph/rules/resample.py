"""Nearest and (bi-, tri-)linear resampling: the rows read depend on the absolute row, not on the slice.

`interpolate` on a slice is another function than a slice of `interpolate`. For whole-number magnification
without aligned corners the stencil is regular, so the operator itself runs on a slice with one row of context
and the result is cropped; every other case gathers its two source rows by absolute index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rowtune.graph.rules.pointwise import along
from rowtune.graph.rules.rule import Opaque, Question, Read, RowRule, Run, Slab
from rowtune.rows import Affine, Window, gather

aten = torch.ops.aten


def _sizes(q: Question, linear: bool) -> tuple[int, bool, list[float] | None]:
    """(number of spatial axes, align_corners, given scales per axis)."""
    spatial = len(q.out) - 2
    vec = q.node.target._overloadname == "vec"  # type: ignore[attr-defined]
    corners = bool(q.arg(2, "align_corners", False)) if linear else False
    if vec:
        scales = q.arg(3 if linear else 2, "scale_factors", None)
        return spatial, corners, [float(s) for s in scales] if scales else None
    names = {1: ["scales"], 2: ["scales_h", "scales_w"], 3: ["scales_d", "scales_h", "scales_w"]}[spatial]
    given = [q.arg((3 if linear else 2) + k, n, None) for k, n in enumerate(names)]
    return spatial, corners, [float(s) for s in given] if all(s is not None for s in given) else None


def nearest(q: Question) -> RowRule | Opaque:
    """aten.upsample_nearest1d / 2d / 3d."""
    return _resample(q, linear=False)


def linear(q: Question) -> RowRule | Opaque:
    """aten.upsample_linear1d / bilinear2d / trilinear3d, both settings of align_corners."""
    return _resample(q, linear=True)


def _resample(q: Question, linear: bool) -> RowRule | Opaque:
    x = q.node.inputs[0]
    dim = q.dims[x]
    if dim is None or dim < 2:
        return along(q, lambda q, d: d not in (0, 1), "resampling")
    spatial, corners, scales = _sizes(q, linear)
    rows, out_rows = q.shape(x)[dim], q.out[dim]
    scale = scales[dim - 2] if scales else None
    factor = out_rows // rows
    others = [scales[k] if scales else None for k in range(spatial) if k != dim - 2]
    if not corners and factor * rows == out_rows and (scale is None or scale == factor):
        window: Window = Affine(rows, out_rows, 1, factor, -(factor // 2), factor - 1 - (factor - 1) // 2)
        if not linear:
            window = Affine(rows, out_rows, 1, factor)
        run = _native(q, dim, window, factor, corners, others, linear)
        return RowRule(dim, {x: Read(dim, window)}, run)
    sources = (
        _linear_sources(rows, out_rows, scale, corners) if linear else _nearest_sources(rows, out_rows, scale)
    )
    window = gather(rows, ((lo, hi) for lo, hi, _ in sources))
    return RowRule(dim, {x: Read(dim, window)}, _by_index(q, dim, sources, corners, others, linear))


def _source_step(rows: int, out_rows: int, scale: float | None) -> float:
    return 1.0 / scale if scale else rows / out_rows


def _nearest_sources(rows: int, out_rows: int, scale: float | None) -> list[tuple[int, int, float]]:
    # PyTorch works this out in float32, so the same rounding must be used to pick the same rows.
    step = torch.tensor(_source_step(rows, out_rows, scale), dtype=torch.float32)
    picked = (torch.arange(out_rows, dtype=torch.float32) * step).floor().long().clamp_(max=rows - 1)
    return [(i, i, 0.0) for i in picked.tolist()]


def _linear_sources(
    rows: int, out_rows: int, scale: float | None, corners: bool
) -> list[tuple[int, int, float]]:
    """For each output row the two source rows and the weight of the second."""
    found = []
    for i in range(out_rows):
        if corners:
            at = i * (rows - 1) / (out_rows - 1) if out_rows > 1 else 0.0
        else:
            at = max((i + 0.5) * _source_step(rows, out_rows, scale) - 0.5, 0.0)
        lo = min(math.floor(at), rows - 1)
        found.append((lo, min(lo + 1, rows - 1), min(max(at - lo, 0.0), 1.0)))
    return found


def _call(
    q: Question,
    x: Tensor,
    dim: int,
    rows: int,
    row_scale: float,
    corners: bool,
    others: list[float | None],
    linear: bool,
) -> Tensor:
    """The operator with `rows` output rows along the band axis and its own sizes along the others."""
    size = list(q.out[2:])
    size[dim - 2] = rows
    scales: list[float | None] = list(others)
    scales.insert(dim - 2, row_scale)
    spatial = len(size)
    table: dict[tuple[int, bool], Any] = {
        (1, False): aten.upsample_nearest1d.default,
        (2, False): aten.upsample_nearest2d.default,
        (3, False): aten.upsample_nearest3d.default,
        (1, True): aten.upsample_linear1d.default,
        (2, True): aten.upsample_bilinear2d.default,
        (3, True): aten.upsample_trilinear3d.default,
    }
    middle = (corners,) if linear else ()
    return table[spatial, linear](x, size, *middle, *scales)  # type: ignore[no-any-return]


def _native(
    q: Question,
    dim: int,
    window: Window,
    factor: int,
    corners: bool,
    others: list[float | None],
    linear: bool,
) -> Run:
    x = q.node.inputs[0]

    def run(slab: Slab) -> Tensor:
        got = slab.reads[x]
        # The slice's own edges are clamped by the operator; they are real ones or rows that are cropped.
        full = _call(q, slab.tensors[x], dim, got.size * factor, float(factor), corners, others, linear)
        first = slab.rows.lo - got.lo * factor
        if first == 0 and full.shape[dim] == slab.rows.size:
            return full
        return full.narrow(dim, first, slab.rows.size)

    return run


def _by_index(
    q: Question,
    dim: int,
    sources: list[tuple[int, int, float]],
    corners: bool,
    others: list[float | None],
    linear: bool,
) -> Run:
    x = q.node.inputs[0]

    def run(slab: Slab) -> Tensor:
        image, got, rows = slab.tensors[x], slab.reads[x], slab.rows
        mine = sources[rows.lo : rows.hi]
        picked = _pick(image, dim, [lo - got.lo for lo, _, _ in mine])
        if linear:
            second = _pick(image, dim, [hi - got.lo for _, hi, _ in mine])
            view = [1] * image.dim()
            view[dim] = rows.size
            weight = torch.tensor([w for _, _, w in mine], dtype=image.dtype, device=image.device).view(view)
            picked = picked * (1 - weight) + second * weight
        if picked.shape[2:] == slab.shape[2:]:
            return picked
        return _call(q, picked, dim, rows.size, 1.0, corners, others, linear)

    return run


def _pick(image: Tensor, dim: int, index: list[int]) -> Tensor:
    return image.index_select(dim, torch.tensor(index, device=image.device))


RESAMPLES: dict[str, Callable[[Question], RowRule | Opaque]] = {
    "upsample_nearest1d": nearest,
    "upsample_nearest2d": nearest,
    "upsample_nearest3d": nearest,
    "upsample_linear1d": linear,
    "upsample_bilinear2d": linear,
    "upsample_trilinear3d": linear,
}
