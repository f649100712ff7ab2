"""Tensors as small whole numbers, a scale for each channel of each image; masks as bits.

Rounding is stochastic, so that errors average out over the many elements that a weight's gradient sums up
(ActNN, Chen et al., arXiv 2104.14129). The dice are a hash of each element's own bits: no generator changes
its state, and the same tensor is rounded the same way again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PARTS, CHUNK = 8, 1 << 12
"""A tensor is rounded in so many parts, if they have as many elements: what that itself takes is little
beside the tensor."""
GOLDEN = -1640531535
"""2^32 over the golden ratio: a multiplier that spreads the bits of small differences."""


class Codes(NamedTuple):
    """`codes` are int8, in the order of memory; `order` are the dimensions from outermost to innermost."""

    codes: Tensor
    scale: Tensor
    order: tuple[int, ...]
    dtype: torch.dtype


def rounded(t: Tensor, most: int) -> Codes:
    """Codes of -most to most. Every element obeys |kept - x| <= max|x| / most, the maximum over its block (a
    channel of an image; of tensors of two dimensions or less, a row); signs are kept, and zeros are zeros."""
    order = order_of(t.stride())
    inner = tuple(range(2, t.dim())) or (t.dim() - 1,)
    size = torch.maximum(t.amax(inner, keepdim=True), -t.amin(inner, keepdim=True))
    wide = size.to(torch.promote_types(t.dtype, torch.float32))
    scale = (wide / most).clamp_min_(torch.finfo(torch.float32).tiny)
    t, scale = t.permute(order).contiguous(), scale.permute(order)
    codes = torch.empty(t.shape, dtype=torch.int8, device=t.device)
    for part, by, out in _chunks(t, scale, codes):
        out.copy_(_codes(part, by, most))
    return Codes(codes, scale.contiguous(), order, t.dtype)


def restored(kept: Codes) -> Tensor:
    """The tensor that the codes stand for, dense in the order that it had."""
    found = kept.codes.to(kept.scale.dtype).mul_(kept.scale).to(kept.dtype)
    return found.permute(_back(kept.order))


def in_place(kept: Codes) -> tuple[Tensor, Tensor]:
    """Codes and scale with the dimensions in the order that the tensor had."""
    back = _back(kept.order)
    return kept.codes.permute(back), kept.scale.permute(back)


def _codes(t: Tensor, scale: Tensor, most: int) -> Tensor:
    scaled = t / scale
    bits = t.to(torch.float32).view(torch.int32).mul(GOLDEN).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    size = scaled.abs()
    least = size.ceil().clamp_(max=1)  # what is not zero stays so
    dice = bits.to(size.dtype).div_(1 << 16)
    return torch.maximum(size.add_(dice).floor_().clamp_(max=most), least).copysign_(scaled)


def _chunks(t: Tensor, scale: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts along the longest of the three outermost dimensions."""
    if t.dim() == 0 or t.numel() <= CHUNK:
        yield t, scale, codes
        return
    dim = max(range(min(3, t.dim())), key=lambda d: t.shape[d])
    length = max(1, t.shape[dim] * max(CHUNK, t.numel() // PARTS) // t.numel())
    for start in range(0, t.shape[dim], length):
        some = min(length, t.shape[dim] - start)
        by = scale.narrow(dim, start, some) if scale.shape[dim] > 1 else scale
        yield t.narrow(dim, start, some), by, codes.narrow(dim, start, some)


def order_of(stride: Sequence[int]) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost."""
    return tuple(sorted(range(len(stride)), key=lambda d: (-int(stride[d]), d)))


def _back(order: tuple[int, ...]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def halved(codes: Tensor, dim: int) -> Tensor:
    """Codes of -7 to 7, neighbours along a dimension two in a byte."""
    whole = (slice(None),) * dim
    low, high = (codes[(*whole, slice(at, None, 2))].add(8).view(torch.uint8) for at in (0, 1))
    low.narrow(dim, 0, high.shape[dim]).bitwise_or_(high.bitwise_left_shift_(4))
    return low


def doubled(halves: Tensor, dim: int, many: int) -> Tensor:
    """The codes again, of which there were so many."""
    both = torch.stack((halves.bitwise_and(15), halves.bitwise_right_shift(4)), dim + 1)
    return both.flatten(dim, dim + 1).narrow(dim, 0, many).view(torch.int8).sub_(8)


def packed(mask: Tensor) -> Tensor:
    """A mask, eight elements in a byte."""
    flat = mask.flatten().to(torch.uint8)
    if flat.numel() % 8:
        flat = torch.cat((flat, flat.new_zeros(8 - flat.numel() % 8)))
    bits = flat.view(-1, 8)
    made = bits[:, 0].clone()
    for i in range(1, 8):
        made.bitwise_or_(bits[:, i].bitwise_left_shift(i))
    return made


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask again."""
    found = torch.empty((bits.numel(), 8), dtype=torch.bool, device=bits.device)
    for i in range(8):
        torch.ne(bits.bitwise_and(1 << i), 0, out=found[:, i])
    return found.flatten()[: shape.numel()].view(shape)
