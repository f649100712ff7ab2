"""ONNX operators that slide a window or resample: convolutions, pools, resizing, pixel shuffles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.importers.onnx_node import OnnxNode, Value, ints, rows, tensor, tensors

CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
GLOBAL_AVG: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
GLOBAL_MAX: dict[int, Any] = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def _for_rank(node: OnnxNode, table: dict[int, Any], rank: int) -> Any:
    if rank not in table:
        raise node.error(f"it has {rank} spatial axes; 1, 2 or 3 can be trained")
    return table[rank]


def _pads(node: OnnxNode, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis, with auto_pad resolved for this input."""
    rank = len(kernel)
    auto = node.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
        begin, end = [], []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            half = total // 2
            begin.append(half if auto == "SAME_UPPER" else total - half)
            end.append(total - begin[-1])
        return begin, end
    pads = list(node.get("pads", [0] * (2 * rank)))
    return pads[:rank], pads[rank:]


def torch_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """ONNX lists all begins, then all ends, first axis first; torch pairs them, last axis first."""
    return [p for pair in reversed(list(zip(begin, end, strict=True))) for p in pair]


def conv(node: OnnxNode, x: Value, weight: Value, bias: Value = None) -> Tensor:
    x, weight, bias = tensors((x, weight, bias))
    rank = weight.dim() - 2
    begin, end = _pads(node, x, list(weight.shape[2:]))
    if begin != end:
        x, begin = F.pad(x, torch_pads(begin, end)), [0] * rank
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    function = _for_rank(node, CONV, rank)
    y: Tensor = function(x, weight, bias, strides, begin, dilations, node.get("group", 1))
    return y


def conv_transpose(node: OnnxNode, x: Value, weight: Value, bias: Value = None) -> Tensor:
    x, weight, bias = tensors((x, weight, bias))
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    extra = list(node.get("output_padding", [0] * rank))
    function = _for_rank(node, CONV_TRANSPOSE, rank)
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    begin, end = _transpose_pads(node, x, full, strides, extra)
    group = node.get("group", 1)
    if begin == end and min(begin) >= 0:
        y: Tensor = function(x, weight, bias, strides, begin, extra, group, dilations)
        return y
    # Uneven padding: everything, then cropped; rows past the end hold the bias alone, as F.pad cannot say.
    crop = [e - o for e, o in zip(end, extra, strict=True)]
    if min(begin) < 0 or min(crop) < 0:
        raise node.error("its output padding exceeds its uneven padding, which torch cannot express")
    y = function(x, weight, bias, strides, 0, 0, group, dilations)
    for axis, (b, c) in enumerate(zip(begin, crop, strict=True)):
        y = rows(y, axis + 2, b, y.shape[axis + 2] - b - c)
    return y


def _transpose_pads(
    node: OnnxNode, x: Tensor, full: list[int], strides: list[int], extra: list[int]
) -> tuple[list[int], list[int]]:
    rank = len(full)
    auto = node.get("auto_pad", "NOTSET")
    shape = node.get("output_shape")
    if shape is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if shape is None:
        pads = [0] * (2 * rank) if auto == "VALID" else list(node.get("pads", [0] * (2 * rank)))
        return pads[:rank], pads[rank:]
    totals = [f + o - n for f, o, n in zip(full, extra, shape[-rank:], strict=True)]
    if min(totals) < 0:
        # The requested shape is larger than the product: the missing rows are output padding.
        extra[:] = [o + max(-t, 0) for o, t in zip(extra, totals, strict=True)]
        totals = [max(t, 0) for t in totals]
    small = [t // 2 for t in totals]
    large = [t - t // 2 for t in totals]
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def max_pool(node: OnnxNode, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    begin, end = _pads(node, x, kernel)
    wide = any(p > ((k - 1) * d + 1) // 2 for p, k, d in zip(begin, kernel, dilations, strict=True))
    if node.outputs > 1 and (begin != end or wide or node.get("storage_order", 0)):
        raise node.error("indices are available for even padding and row-major order only")
    if begin != end or wide:
        low = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        x, begin = F.pad(x, torch_pads(begin, end), value=low), [0] * rank
    function = _for_rank(node, MAX_POOL, rank)
    options = (kernel, strides, begin, dilations, bool(node.get("ceil_mode", 0)))
    if node.outputs == 1:
        y: Tensor = function(x, *options)
        return y
    y, index = function(x, *options, return_indices=True)
    # torch counts within one channel's plane, ONNX within the whole tensor.
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * math.prod(x.shape[2:])
    return y, index + planes.reshape(x.shape[0], x.shape[1], *[1] * rank)


def average_pool(node: OnnxNode, x: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    if any(d != 1 for d in node.get("dilations", [1] * rank)):
        return _dilated_average(node, x, kernel)
    begin, end = _pads(node, x, kernel)
    strides, ceil = node.get("strides", [1] * rank), bool(node.get("ceil_mode", 0))
    counted = bool(node.get("count_include_pad", 0))
    function = _for_rank(node, AVG_POOL, rank)
    wide = any(p > k // 2 for p, k in zip(begin, kernel, strict=True))
    if begin == end and not wide:
        y: Tensor = function(x, kernel, strides, begin, ceil, counted)
        return y
    pads = torch_pads(begin, end)
    total: Tensor = function(F.pad(x, pads), kernel, strides, 0, ceil)
    if counted:
        return total
    # Both averages divide by the same window, so their ratio divides by the real elements alone.
    share: Tensor = function(F.pad(torch.ones_like(x[:1, :1]), pads), kernel, strides, 0, ceil)
    return total / share


def _dilated_average(node: OnnxNode, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """torch's average pools have no dilation; a convolution of ones does, channel by channel."""
    rank, channels = len(kernel), x.shape[1]
    begin, end = _pads(node, x, kernel)
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations")
    function = _for_rank(node, CONV, rank)
    pads, beyond = torch_pads(begin, end), torch_pads([0] * rank, _beyond(node, x, kernel))
    padded = F.pad(F.pad(x, pads), beyond)
    total: Tensor = function(padded, x.new_ones(channels, 1, *kernel), None, strides, 0, dilations, channels)
    counted = F.pad(torch.ones_like(x[:1, :1]), pads, value=float(node.get("count_include_pad", 0)))
    ones = x.new_ones(1, 1, *kernel)
    size: Tensor = function(F.pad(counted, beyond), ones, None, strides, 0, dilations)
    return total / size


def _beyond(node: OnnxNode, x: Tensor, kernel: Sequence[int]) -> list[int]:
    """Elements after the padding that ceil_mode's last window reaches; it starts before the padding's end."""
    rank = len(kernel)
    begin, end = _pads(node, x, kernel)
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    found = []
    for size, b, e, k, s, d in zip(x.shape[2:], begin, end, kernel, strides, dilations, strict=True):
        span, length = (k - 1) * d + 1, size + b + e
        last = -(-(length - span) // s) * s if node.get("ceil_mode", 0) else 0
        last -= s if last >= size + b else 0
        found.append(max(last + span - length, 0))
    return found


def lp_pool(node: OnnxNode, x: Tensor) -> Tensor:
    """The p-norm of each window: an average of powers, times the window's size (padding adds zeros)."""
    kernel, p = node.get("kernel_shape"), node.get("p", 2)
    if any(_beyond(node, x, kernel)):
        raise node.error("ceil_mode makes windows of unlike sizes; export with floor")
    counted = replace(node, attrs={**node.attrs, "count_include_pad": 1})
    mean = average_pool(counted, x.abs() ** p)
    y: Tensor = (mean * math.prod(kernel)) ** (1.0 / p)
    return y


def global_lp_pool(node: OnnxNode, x: Tensor) -> Tensor:
    axes, p = list(range(2, x.dim())), node.get("p", 2)
    y: Tensor = (x.abs() ** p).sum(axes, keepdim=True) ** (1.0 / p)
    return y


def global_average_pool(node: OnnxNode, x: Tensor) -> Tensor:
    y: Tensor = _for_rank(node, GLOBAL_AVG, x.dim() - 2)(x, 1)
    return y


def global_max_pool(node: OnnxNode, x: Tensor) -> Tensor:
    y: Tensor = _for_rank(node, GLOBAL_MAX, x.dim() - 2)(x, 1)
    return y


def depth_to_space(node: OnnxNode, x: Tensor) -> Tensor:
    block = node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        # The same shuffle with the channels in another order; reordering them is local to a pixel.
        n, c, h, w = x.shape
        x = x.reshape(n, block * block, c // block**2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return F.pixel_shuffle(x, block)


def space_to_depth(node: OnnxNode, x: Tensor) -> Tensor:
    block = node.get("blocksize")
    y = F.pixel_unshuffle(x, block)
    if node.get("mode", "DCR") != "DCR":
        return y
    n, c, h, w = y.shape
    return y.reshape(n, c // block**2, block * block, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffle_of_reshapes(node: OnnxNode, x: Tensor, split: Value, target: Value) -> Tensor:
    """Reshape to six axes, a transpose, Reshape back: a pixel shuffle or its inverse, which keep rows apart,
    where the sizes are those of one; else as written."""
    parts, result = (_resolved(x, ints(node, sizes, "target shape")) for sizes in (split, target))
    inverse = node.get("inverse")
    if x.dim() == 4 and len(parts) == 6:
        n, c, h, w = x.shape
        block = parts[3]
        fine = inverse and parts == [n, c, h // block, block, w // block, block]
        if fine and result == [n, c * block**2, h // block, w // block]:
            return F.pixel_unshuffle(x, block)
        fine = not inverse and parts == [n, c // block**2, block, block, h, w]
        if fine and result == [n, c // block**2, h * block, w * block]:
            return F.pixel_shuffle(x, block)
    order = (0, 1, 3, 5, 2, 4) if inverse else (0, 1, 4, 2, 5, 3)
    return x.reshape(parts).permute(order).reshape(result)


def _resolved(x: Tensor, sizes: list[int]) -> list[int]:
    """A Reshape's target in full: 0 copies the size of x, -1 stands for the rest."""
    full = [n or int(x.shape[i]) for i, n in enumerate(sizes)]
    rest = x.numel() // max(math.prod(n for n in full if n != -1), 1)
    return [rest if n == -1 else n for n in full]


def grid_sample(node: OnnxNode, x: Value, grid: Value) -> Tensor:
    x, grid = tensors((x, grid))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.get("mode", "linear"), node.get("mode"))
    padding = node.get("padding_mode", "zeros")
    return F.grid_sample(x, grid, mode, padding, bool(node.get("align_corners", 0)))


def pad(node: OnnxNode, x: Tensor, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    if node.opset < 11:
        amounts, fill = node.get("pads"), node.get("value", 0.0)
    else:
        amounts = ints(node, pads, "padding")
        fill = 0 if value is None else tensor(value, x).reshape(-1)[0].item()
    begin, end = [0] * x.dim(), [0] * x.dim()
    chosen = range(x.dim()) if axes is None else [a % x.dim() for a in ints(node, axes, "axes")]
    for i, axis in enumerate(chosen):
        begin[axis], end[axis] = amounts[i], amounts[i + len(chosen)]
    mode = node.get("mode", "constant")
    if not any(begin) and not any(end):
        return x
    if mode == "constant":
        return F.pad(x, torch_pads(begin, end), value=fill)
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    spatial = x.dim() - 2
    if mode not in names or any(begin[:2]) or any(end[:2]) or not 1 <= spatial <= 3 or min(begin + end) < 0:
        raise node.error(f"mode {mode!r} is available for positive padding of 1 to 3 spatial axes only")
    return F.pad(x, torch_pads(begin[2:], end[2:]), mode=names[mode])
