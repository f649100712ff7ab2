"""Operators that are only on their way to a gradient: nobody reads their values any more.

A convolution's gradients need its input, its weight and the gradient of its output, not the output. Where a
segment is run again for its backward, and ends in a convolution whose output nothing in it reads, the
convolution itself need not be computed again. The same goes for sums and pixel shuffles behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rowtune.kernels.constants import zero


def unvalued(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Zeros in place of aten.conv1d / conv2d / conv3d, with its gradients."""
    no_extra = [0] * len(stride)
    return _stand_in(x, weight, bias, stride, padding, dilation, False, no_extra, groups)


def unvalued_transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    """Zeros in place of aten.conv_transpose1d / 2d / 3d, with its gradients."""
    return _stand_in(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def unvalued_sum(x: Tensor, y: Tensor) -> Tensor:
    """Zeros in place of x + y, of one shape."""
    return _Sum.apply(x, y)  # type: ignore[no-untyped-call, no-any-return]


def unvalued_shuffle(x: Tensor, factor: int) -> Tensor:
    """Zeros in place of aten.pixel_shuffle."""
    return _Shuffle.apply(x, factor)  # type: ignore[no-untyped-call, no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.dtypes = x.dtype, y.dtype
        return zero(x, torch.result_type(x, y)).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad.to(ctx.dtypes[0]), grad.to(ctx.dtypes[1])


class _Shuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        *lead, channels, rows, columns = x.shape
        return zero(x).expand(*lead, channels // factor**2, rows * factor, columns * factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.pixel_unshuffle(grad, ctx.factor), None


def _stand_in(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # as for convolutions
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    return _Unvalued.apply(x, weight, bias, how)  # type: ignore[no-untyped-call, no-any-return]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does for convolutions: float64 stays what it is."""
    return t if t.dtype == torch.float64 else t.to(dtype)


class _Unvalued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.how, ctx.bias_sizes = how, None if bias is None else [*bias.shape]
        ctx.save_for_backward(x, weight)
        return zero(x).expand(_shape(x, weight, *how))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        asked = [*ctx.needs_input_grad[:3]]
        found = torch.ops.aten.convolution_backward(grad, x, weight, ctx.bias_sizes, *ctx.how, asked)
        return (*(g if want else None for g, want in zip(found, asked, strict=True)), None)


def _shape(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int]:
    sizes = []
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True)
    for size, kernel, step, pad, spread, more in axes:
        extent = spread * (kernel - 1) + 1
        sizes.append(
            (size - 1) * step - 2 * pad + extent + more
            if transposed
            else (size + 2 * pad - extent) // step + 1
        )
    return [x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], *sizes]
