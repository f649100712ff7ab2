"""ONNX Resize and Upsample, where torch computes exactly the same function; otherwise an error that says so.

ONNX names dozens of combinations of coordinate, rounding and border rules. torch has a few; for nearest
neighbour the source rows of both are listed and compared, so that a combination is accepted exactly where it
agrees at this size.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from rowtune.importers.onnx_node import OnnxNode, Value, ints, plain

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def upsample(node: OnnxNode, x: Tensor, scales: Value = None) -> Tensor:
    """Opset 7 has the scales as an attribute, 8 and 9 as an input; always asymmetric coordinates, floor."""
    factors = _floats(node, node.get("scales") if scales is None else scales)
    assert factors is not None
    return _resample(node, x, factors, None, "asymmetric", "floor")


def resize(node: OnnxNode, x: Tensor, *inputs: Value) -> Tensor:
    if node.opset < 11:
        return upsample(node, x, *inputs)
    _roi, scales, sizes = (*inputs, None, None, None)[:3]
    _refuse(node)
    axes = [a % x.dim() for a in node.get("axes", range(x.dim()))]
    factors, targets = _floats(node, scales), None
    if factors:
        factors = _spread(factors, axes, [1.0] * x.dim())
    else:
        factors = None
        given = [float(n) for n in ints(node, sizes, "sizes")]
        targets = [int(n) for n in _spread(given, axes, [float(n) for n in x.shape])]
    coordinate = node.get("coordinate_transformation_mode", "half_pixel")
    return _resample(node, x, factors, targets, coordinate, node.get("nearest_mode", "round_prefer_floor"))


def _refuse(node: OnnxNode) -> None:
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        raise node.error(f"keep_aspect_ratio_policy {policy!r}; only 'stretch' can be trained")
    if node.get("antialias", 0):
        raise node.error("antialias=1 has no exact counterpart; export with antialias=False")


def _floats(node: OnnxNode, value: Value) -> list[float] | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        raise node.error("its scales must follow from shapes and constants, but this model computes them")
    return [float(plain(v)) for v in value]


def _spread(values: list[float], axes: list[int], default: list[float]) -> list[float]:
    for axis, value in zip(axes, values, strict=True):
        default[axis] = value
    return default


def _resample(
    node: OnnxNode,
    x: Tensor,
    factors: list[float] | None,
    targets: list[int] | None,
    coordinate: str,
    nearest: str,
) -> Tensor:
    """`factors` or `targets` for all axes of x, leading two unchanged; the result in torch's own operator."""
    rank = x.dim() - 2
    sizes = [int(n) for n in x.shape]
    out = targets or [math.floor(n * f) for n, f in zip(sizes, factors or [], strict=True)]
    if rank not in LINEAR or out[:2] != sizes[:2]:
        raise node.error(
            f"it resizes {sizes} to {out}; only 1 to 3 spatial axes after batch and channels can be"
        )
    if out == sizes:
        return x
    scales = (factors or [o / n for o, n in zip(out, sizes, strict=True)])[2:]
    axes = list(zip(sizes[2:], out[2:], scales, strict=True))
    where = {"scale_factor": tuple(scales)} if factors else {"size": tuple(out[2:])}
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        return F.interpolate(x, mode=_nearest(node, axes, coordinate, nearest), **where)
    if mode == "cubic" and (node.get("cubic_coeff_a", -0.75) != -0.75 or node.get("exclude_outside", 0)):
        raise node.error(
            "cubic with coefficient other than -0.75 or exclude_outside=1 is not torch's bicubic"
        )
    corners = _align_corners(node, axes, coordinate, mode)
    if mode == "cubic" and rank != 2:
        raise node.error(f"cubic over {rank} spatial axes; torch has it for 2")
    name = "bicubic" if mode == "cubic" else LINEAR[rank]
    return F.interpolate(x, mode=name, align_corners=corners, **where)


def _align_corners(node: OnnxNode, axes: list[tuple[int, int, float]], coordinate: str, mode: str) -> bool:
    if mode not in ("linear", "cubic"):
        raise node.error(f"mode {mode!r}; 'nearest', 'linear' and 'cubic' can be trained")
    # With scales that do not divide, ONNX aligns to the fractional length, torch to the rounded one.
    if coordinate == "align_corners" and all(math.isclose(o, n * s, rel_tol=1e-6) for n, o, s in axes):
        return True
    if coordinate == "half_pixel":
        return False
    # The two differ for an output of one row only.
    if coordinate == "pytorch_half_pixel" and all(o > 1 or n == 1 for n, o, _ in axes):
        return False
    if coordinate == "half_pixel_symmetric" and all(math.isclose(o, n * s, rel_tol=1e-6) for n, o, s in axes):
        return False
    raise node.error(
        f"mode {mode!r} with coordinate_transformation_mode {coordinate!r} is not a function of torch; "
        "export at opset 11 or later with half_pixel or align_corners"
    )


def _nearest(node: OnnxNode, axes: list[tuple[int, int, float]], coordinate: str, rounding: str) -> str:
    whole = all(s == int(s) for _, _, s in axes)
    if (coordinate, rounding) == ("asymmetric", "floor"):
        return "nearest"
    if whole and "half_pixel" in coordinate and rounding.startswith("round"):
        return "nearest"
    for name, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
        same = all(
            _source(i, n, o, s, coordinate, rounding) == min(math.floor((i + shift) / s), n - 1)
            for n, o, s in axes
            for i in range(o)
        )
        if same:
            return name
    raise node.error(
        f"mode 'nearest' with coordinate_transformation_mode {coordinate!r} and nearest_mode {rounding!r} "
        "is not a function of torch at this size; export with asymmetric and floor"
    )


def _source(i: int, n: int, out: int, scale: float, coordinate: str, rounding: str) -> int | None:
    """The input row that ONNX reads for output row i, or None for a rule not known here."""
    positions = {
        "asymmetric": i / scale,
        "half_pixel": (i + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (i + 0.5) / scale - 0.5 if out > 1 else 0.0,
        "half_pixel_symmetric": n / 2 * (1 - out / (n * scale)) + (i + 0.5) / scale - 0.5,
        "align_corners": i * (n - 1) / (out - 1) if out > 1 else 0.0,
    }
    if coordinate not in positions:
        return None
    x = positions[coordinate]
    rows = {
        "round_prefer_floor": math.ceil(x - 0.5),
        "round_prefer_ceil": math.floor(x + 0.5),
        "floor": math.floor(x),
        "ceil": math.ceil(x),
    }
    return min(max(rows[rounding], 0), n - 1)
