"""ONNX operators that sum: normalisation, reductions, softmax, matrix products; and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.importers.onnx_node import Mode, OnnxNode, Value, ints, is_static, rows, tensor, tensors


def batch_norm(
    node: OnnxNode, x: Tensor, scale: Value, bias: Value, mean: Value, var: Value, *, mode: Mode
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Follows the module's mode, whatever the mode was at export: the point is to train it.

    Running statistics are updated as PyTorch does (unbiased variance, ONNX has the biased one).
    """
    if node.get("spatial", 1) != 1:
        raise node.error(
            "spatial=0 normalises every pixel by itself and has no counterpart; export at opset 9"
        )
    if node.outputs > 3:
        raise node.error("its saved statistics are used by the graph, which older opsets alone allowed")
    scale, bias, mean, var = (tensor(v, x) for v in (scale, bias, mean, var))
    for held in (x, scale, bias, mean, var):
        if not held.is_floating_point():
            raise node.error(f"it has numbers of {held.dtype} where floating ones belong; export it again")
    # ONNX weighs the old statistics, PyTorch the new ones; rounding undoes the subtraction's noise.
    momentum = round(1.0 - node.get("momentum", 0.9), 7)
    y = F.batch_norm(x, mean, var, scale, bias, mode.training, momentum, node.get("epsilon", 1e-5))
    return y if node.outputs == 1 else (y, mean, var)


def _unless(value: Value, neutral: float, x: Tensor) -> Tensor | None:
    """A scale or shift as a tensor; None for the constant that changes nothing."""
    return None if is_static(value) and bool((value == neutral).all()) else tensor(value, x)


def instance_norm(node: OnnxNode, x: Tensor, scale: Value, bias: Value) -> Tensor:
    eps = node.get("epsilon", 1e-5)
    return F.instance_norm(x, weight=_unless(scale, 1.0, x), bias=_unless(bias, 0.0, x), eps=eps)


def group_norm_of_reshapes(node: OnnxNode, x: Tensor, target: Value) -> Tensor:
    """Reshape to (N, groups, -1), instance norm, Reshape to `target`: exporters' group norm without scale.

    If `target` is x's own shape this is group norm, which keeps the rows of an image apart; else as written.
    """
    groups, eps = node.get("groups"), node.get("epsilon", 1e-5)
    sizes = [n or int(x.shape[i]) for i, n in enumerate(ints(node, target, "target shape"))]
    if len(sizes) == x.dim() and all(n in (-1, size) for n, size in zip(sizes, x.shape, strict=True)):
        return F.group_norm(x, groups, eps=eps)
    return F.instance_norm(x.reshape(x.shape[0], groups, -1), eps=eps).reshape(sizes)


def group_norm(node: OnnxNode, x: Tensor, scale: Value, bias: Value) -> Tensor:
    groups = node.get("num_groups")
    weight, shift = tensor(scale, x), tensor(bias, x)
    if node.opset < 21:
        # One scale a group until opset 20, one a channel since.
        each = x.shape[1] // groups
        weight, shift = weight.repeat_interleave(each), shift.repeat_interleave(each)
    return F.group_norm(x, groups, weight, shift, node.get("epsilon", 1e-5))


def layer_norm(
    node: OnnxNode, x: Tensor, scale: Value, bias: Value = None
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    axis = node.get("axis", -1) % x.dim()
    sizes = x.shape[axis:]
    eps = node.get("epsilon", 1e-5)
    weight, shift = _unless(scale, 1.0, x), _unless(bias, 0.0, x)
    fits = all(v is None or v.shape == sizes for v in (weight, shift))
    y = F.layer_norm(x, sizes, weight if fits else None, shift if fits else None, eps)
    if not fits:
        y = y if weight is None else y * weight
        y = y if shift is None else y + shift
    if node.outputs == 1:
        return y
    axes = list(range(axis, x.dim()))
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    return y, mean, torch.rsqrt(var + eps)


def rms_norm(node: OnnxNode, x: Tensor, scale: Value) -> Tensor:
    axis = node.get("axis", -1) % x.dim()
    weight = tensor(scale, x)
    eps = node.get("epsilon", 1e-5)
    if weight.shape == x.shape[axis:]:
        return F.rms_norm(x, x.shape[axis:], weight, eps)
    y: Tensor = F.rms_norm(x, x.shape[axis:], None, eps) * weight
    return y


def lp_normalization(node: OnnxNode, x: Tensor) -> Tensor:
    # Not F.normalize: its division by max(norm, 1e-12) is not ONNX's plain one.
    axis, p = node.get("axis", -1), node.get("p", 2)
    total = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(total == 0, torch.zeros_like(x), x / torch.where(total == 0, 1.0, total))


def mean_variance_norm(node: OnnxNode, x: Tensor) -> Tensor:
    axes = list(node.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def lrn(node: OnnxNode, x: Tensor) -> Tensor:
    """A sum over neighbouring channels, written as shifted slices: local to a pixel."""
    size = node.get("size")
    before, after = (size - 1) // 2, size // 2
    squares = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [before, after])
    channels = x.shape[1]
    total = rows(squares, 1, 0, channels)
    for shift in range(1, size):
        total = total + rows(squares, 1, shift, channels)
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    y: Tensor = x / (bias + total * (alpha / size)) ** beta
    return y


def dropout(node: OnnxNode, x: Tensor, ratio: Value = None, _training: Value = None, *, mode: Mode) -> object:
    """Follows the module's mode; the file's training_mode is that of the export."""
    share = node.get("ratio", 0.5)
    if ratio is not None:
        share = float(tensor(ratio, x).item()) if isinstance(ratio, Tensor) else float(ratio.reshape(-1)[0])
    if node.outputs == 1:
        return F.dropout(x, share, training=mode.training)
    mask = torch.ones_like(x, dtype=torch.bool)
    if mode.training:
        mask = torch.rand_like(x) >= share
        x = x * mask / (1.0 - share) if share < 1.0 else torch.zeros_like(x)
    return x, mask


Reduction = Callable[[Tensor, list[int], bool], Tensor]


def reduction(function: Reduction) -> Callable[..., Tensor]:
    """A reduction over axes given as attribute or as input; over all of them if none are given."""

    def reduce(node: OnnxNode, x: Tensor, axes: Value = None) -> Tensor:
        given = node.get("axes") if axes is None else ints(node, axes, "axes")
        if not given and node.get("noop_with_empty_axes", 0):
            # No axes: every element is reduced by itself.
            return function(x.unsqueeze(-1), [x.dim()], False)
        chosen = [a % x.dim() for a in given] if given else list(range(x.dim()))
        return function(x, chosen, bool(node.get("keepdims", 1)))

    return reduce


def r_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def r_mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = math.prod(x.shape[a] for a in axes)
    return torch.div(r_sum(x, axes, keep), count, rounding_mode="trunc")


def r_max(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amax(axes, keepdim=keep)


def r_min(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amin(axes, keepdim=keep)


def r_prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def r_l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return r_sum(x.abs(), axes, keep)


def r_l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return r_sum(x.square(), axes, keep).sqrt().to(x.dtype)


def r_log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return r_sum(x, axes, keep).log()


def r_log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


def r_sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return r_sum(x.square(), axes, keep)


def arg_extreme(node: OnnxNode, x: Tensor) -> Tensor:
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    find = torch.argmax if node.op == "ArgMax" else torch.argmin
    if not node.get("select_last_index", 0):
        return find(x, axis, keepdim=keep)
    last: Tensor = x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)
    return last


def softmax(node: OnnxNode, x: Tensor) -> Tensor:
    function = torch.log_softmax if node.op == "LogSoftmax" else torch.softmax
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    # Until opset 12 the axis cut the tensor in two, and all of the second half was one distribution.
    axis = node.get("axis", 1) % x.dim()
    if axis == x.dim() - 1 or math.prod(x.shape[axis + 1 :]) == 1:
        return function(x, axis)
    return function(x.flatten(axis), -1).reshape(x.shape)


def hardmax(node: OnnxNode, x: Tensor) -> Tensor:
    axis = node.get("axis", 1 if node.opset < 13 else -1)
    if node.opset < 13 and axis % x.dim() != x.dim() - 1:
        raise node.error("its opset flattens axes; convert the file to opset 13")
    best = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, best, 1.0)


def matmul(node: OnnxNode, a: Value, b: Value) -> Tensor:
    return torch.matmul(*tensors((a, b)))


def linear(node: OnnxNode, x: Tensor, weight: Value, bias: Value = None) -> Tensor:
    """What the importer makes of MatMul with a weight, which the file holds `transposed` or not."""
    w = tensor(weight, x)
    return F.linear(x, w.t() if node.get("transposed", 0) else w, tensor(bias, x))


def gemm(node: OnnxNode, a: Value, b: Value, c: Value = None) -> Tensor:
    a, b, c = tensors((a, b, c))
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    x = a.t() if node.get("transA", 0) else a
    weight = b if node.get("transB", 0) else b.t()
    if alpha == 1.0 and beta == 1.0 and (c is None or (c.dim() == 1 and c.shape[0] == weight.shape[0])):
        return F.linear(x, weight, c)
    y = F.linear(x, weight)
    y = y if alpha == 1.0 else y * alpha
    if c is None:
        return y
    shifted: Tensor = y + (c if beta == 1.0 else c * beta)
    return shifted


def einsum(node: OnnxNode, *values: Value) -> Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), tensors(values))
