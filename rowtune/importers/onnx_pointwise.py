"""ONNX operators that act on every element by itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.importers.onnx_node import (
    OnnxNode,
    Value,
    number,
    operands,
    tensor,
    tensors,
    to_tensor,
    torch_dtype,
)


def unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: function(x)


def binary(function: Callable[[Any, Any], Any]) -> Callable[..., Tensor]:
    return lambda node, a, b: function(*operands(a, b))


def comparison(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Functions of torch that insist on two tensors."""
    return lambda node, a, b: function(*tensors((a, b)))


def variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, *values: reduce(function, tensors(values))


def extreme(function: Callable[[Tensor, Tensor], Tensor], bound: str) -> Callable[..., Tensor]:
    """Max and Min; against one constant number they are a clamp, which is what was exported."""

    def choose(node: OnnxNode, *values: Value) -> Tensor:
        if len(values) == 2:
            for x, limit in (values, values[::-1]):
                left, right = operands(x, limit)
                if isinstance(left, Tensor) and isinstance(right, bool | int | float):
                    low, high = (right, None) if bound == "min" else (None, right)
                    return torch.clamp(left, low, high)
        return reduce(function, tensors(values))

    return choose


def div(node: OnnxNode, a: Value, b: Value) -> Tensor:
    left, right = operands(a, b)
    whole = not (left if isinstance(left, Tensor) else right).is_floating_point()
    # ONNX divides integers as C does, towards zero.
    return torch.div(*tensors((a, b)), rounding_mode="trunc") if whole else operator.truediv(left, right)


def mod(node: OnnxNode, a: Value, b: Value) -> Tensor:
    left, right = tensors((a, b))
    return torch.fmod(left, right) if node.get("fmod", 0) else torch.remainder(left, right)


def power(node: OnnxNode, a: Value, b: Value) -> Tensor:
    base, exponent = operands(a, b)
    kind = base.dtype if isinstance(base, Tensor) else tensor(a, b).dtype
    return torch.pow(base, exponent).to(kind)


def mean(node: OnnxNode, *values: Value) -> Tensor:
    return reduce(torch.add, tensors(values)) / len(values)


def clip(node: OnnxNode, x: Tensor, low: Value = None, high: Value = None) -> Tensor:
    if node.opset < 11:
        return torch.clamp(x, node.get("min"), node.get("max"))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # Not torch.clamp: with low > high ONNX wants high, and NaN limits differ by version.
        x = x if low is None else torch.maximum(x, tensor(low, x))
        return x if high is None else torch.minimum(x, tensor(high, x))
    bounds = [None if v is None else number(node, v, "limits") for v in (low, high)]
    return x if bounds == [None, None] else torch.clamp(x, *bounds)


def where(node: OnnxNode, condition: Value, a: Value, b: Value) -> Tensor:
    left, right = operands(a, b)
    if isinstance(condition, Tensor) and (isinstance(left, Tensor) or isinstance(right, Tensor)):
        return torch.where(condition, left, right)
    chosen, yes, no = tensors((condition, a, b))
    return torch.where(chosen, yes, no)


def cast(node: OnnxNode, x: Tensor) -> Tensor:
    kind = torch_dtype(node, node.get("to"))
    return x if x.dtype == kind else x.to(kind)


def cast_like(node: OnnxNode, x: Value, like: Value) -> Value:
    target = like.dtype if isinstance(like, Tensor) else to_tensor(like).dtype
    if isinstance(x, Tensor):
        return x if x.dtype == target else x.to(target)
    if target is torch.bfloat16:
        return to_tensor(x).to(target)
    # A number stays a number: nothing of it is left in an exported graph.
    return x.astype(str(target).removeprefix("torch."))


def bit_shift(node: OnnxNode, a: Value, b: Value) -> Tensor:
    left, right = tensors((a, b))
    return left << right if node.get("direction") == "LEFT" else left >> right


def is_inf(node: OnnxNode, x: Tensor) -> Tensor:
    above, below = node.get("detect_positive", 1), node.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(above)) | (torch.isneginf(x) & bool(below))


def elu(node: OnnxNode, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.0))


def celu(node: OnnxNode, x: Tensor) -> Tensor:
    return F.celu(x, node.get("alpha", 1.0))


def selu(node: OnnxNode, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.67326319), node.get("gamma", 1.05070102)
    if math.isclose(alpha, 1.67326319, rel_tol=1e-6) and math.isclose(gamma, 1.05070102, rel_tol=1e-6):
        return F.selu(x)
    y: Tensor = F.elu(x, alpha) * gamma
    return y


def leaky_relu(node: OnnxNode, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


def prelu(node: OnnxNode, x: Tensor, slope: Value) -> Tensor:
    weight = tensor(slope, x)
    if weight.numel() == 1:
        return F.prelu(x, weight.reshape(1))
    per_channel = weight.dim() == x.dim() - 1 and weight.shape[0] == weight.numel() == x.shape[1]
    if per_channel:
        return F.prelu(x, weight.reshape(-1))
    return torch.where(x >= 0, x, x * weight)


def gelu(node: OnnxNode, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


def hard_sigmoid(node: OnnxNode, x: Tensor) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def shrink(node: OnnxNode, x: Tensor) -> Tensor:
    bias, limit = node.get("bias", 0.0), node.get("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


def swish(node: OnnxNode, x: Tensor) -> Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


def thresholded_relu(node: OnnxNode, x: Tensor) -> Tensor:
    return F.threshold(x, node.get("alpha", 1.0), 0.0)
