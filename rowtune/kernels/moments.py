"""Statistics of train-mode norms as a reduction: count, mean and M2, from shares of bands.

Deviations are taken from each band's own mean, so that a large mean does no harm, as it does to sums of
squares (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979). What a band measures is laid beside what others did, and made statistics of at the end, in a few calls
for all bands. Statistics are float64 and of shape (3, channels), or (3, images, groups).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rowtune.kernels.constants import Tables, device_of

CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 24
"""Elements whose deviations are in memory at a time. On a CPU they stay in cache; another device has work
enough for a kernel with them, and less memory to find than for a feature map."""


def moments(x: Tensor, groups: int = 0, centred: bool = True, shared: bool = False) -> Tensor:
    """(count, mean, M2) of each channel over images and rows, or of each group of channels of each image.

    Args:
        groups: 0 for a batch norm's statistics; 1 for a layer norm's, the channels for an instance norm's.
        centred: False for an RMS norm: the mean is 0 and M2 the sum of squares.
        shared: over all processes of torch.distributed's default group (SyncBatchNorm).
    """
    return _Moments.apply(x, None, groups, centred, shared)  # type: ignore[no-untyped-call, no-any-return]


def moments_again(x: Tensor, total: Tensor, groups: int, centred: bool) -> Tensor:
    """A stand-in for the statistics of some rows whose gradient is the share that these rows have in the
    gradient of the finished statistics `total`: d mean / dx = 1/n, d M2 / dx = 2 (x - mean)."""
    return _Moments.apply(x, total, groups, centred, False)  # type: ignore[no-untyped-call, no-any-return]


def add_gradient(x: Tensor, total: Tensor, grad: Tensor, groups: int, centred: bool, into: Tensor) -> None:
    """Add to `into`, the gradient of x, what comes of the gradient of its finished statistics."""
    for some, centre, by_one, by_all, sums in _shares(x, total, grad, groups, centred, into):
        sums.addcmul_(some - centre, by_one)
        if centred:
            sums.add_(by_all)


def _shares(
    x: Tensor, total: Tensor, grad: Tensor, groups: int, centred: bool, into: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """A part of the channels at a time: some of x, what to take from it, the factors of that and of one in
    the gradient, and where the gradient goes."""
    spread, _ = _spread(x, groups)
    target, _ = _spread(into, groups)
    kept = (0, 1) if groups else (1,)
    shape = [total.shape[1 + kept.index(d)] if d in kept else 1 for d in range(spread.dim())]
    n, mean, _ = (t.view(shape) for t in total.unbind())
    _, by_mean, by_m2 = (t.view(shape) for t in grad.unbind())
    slope, shift = (torch.empty_like(mean, dtype=target.dtype) for _ in range(2))
    torch.mul(by_m2, 2, out=slope)
    torch.div(by_mean, n, out=shift)
    mean = mean.to(_wide(x)) if centred else torch.zeros_like(mean, dtype=_wide(x))
    if not centred:
        shift = torch.zeros_like(shift)
    all_of = (spread, mean, slope, shift, target)
    yield from zip(*(torch.split(t, _channels(spread), 1) for t in all_of), strict=True)


def measure(x: Tensor, groups: int = 0, centred: bool = True) -> Tensor:
    """What some rows add to the statistics of each channel, or of each group of channels of each image: the
    mean and the variance, or a centre, the sum of deviations from it, and the sum of their squares."""
    spread, dims = _spread(x, groups)
    by_kernel = by_deviations if device_of(x).type == "cpu" else by_one_kernel
    measured = by_kernel if centred else _squares
    parts = torch.split(spread, _channels(spread), 1)
    found = [measured(part.to(_wide(part)), dims) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def statistics_of(shares: Tensor, counts: tuple[int, ...], tables: Tables) -> Tensor:
    """(count, mean, M2) from what was measured of so many elements each, along the first dimension; float64
    from there on. `tables` keep counts that differ."""
    count, several = sum(counts), len(counts) > 1
    made = shares.new_full((3, *shares.shape[2:]), count, dtype=torch.float64)
    _, mean, m2 = made.unbind()
    n: Tensor | int = counts[0]
    if len({*counts}) > 1:
        n = tables.column(counts, mean.unsqueeze(0), 0)
    around = shares.shape[1] == 3  # centres
    wide = shares.double() if several or around else shares
    means, variances = _means(wide, n) if around else wide.unbind(1)
    if not several:
        mean.copy_(means[0])
        torch.mul(variances[0], count, out=m2)
        return made
    torch.sum(means * n, 0, out=mean)
    mean.div_(count)
    apart = means - mean
    torch.sum(torch.addcmul(variances, apart, apart).mul_(n), 0, out=m2)
    return made


def _means(shares: Tensor, n: Tensor | int) -> tuple[Tensor, Tensor]:
    """Means and variances of shares around centres: rounding left something of the means."""
    centres, rest, squares = shares.unbind(1)
    off = rest / n
    return centres + off, (squares / n).addcmul_(off, off, value=-1)


def merge_processes(stats: Tensor) -> Tensor:
    """Statistics of all processes together."""
    if not _several_processes():
        return stats
    found = [torch.empty_like(stats) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, stats.contiguous())
    n, means, m2 = torch.stack(found, 1).unbind()
    count = n.sum(0)
    mean = (means * n).sum(0) / count
    apart = means - mean
    return torch.stack((count, mean, m2.addcmul(apart * n, apart).sum(0)))


def add_processes(grad: Tensor) -> Tensor:
    """The gradient of shared statistics: every process's loss depends on them."""
    if _several_processes():
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
    return grad


def _several_processes() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def update_running(
    mean: Tensor, var: Tensor, stats: Tensor, momentum: float | None, batches: Tensor | None = None
) -> Tensor:
    """Running statistics after one more batch, in place; with momentum None their cumulative average over
    `batches` batches. An instance norm's statistics are averaged over the images. As in PyTorch's own norms
    autograd does not see the change: such a norm saves the running statistics, but does not read them."""
    with torch.no_grad():
        n, now, m2 = stats.unbind()
        unbiased = m2 / (n - 1)
        if now.dim() > 1:
            now, unbiased = now.mean(0), unbiased.mean(0)
        for running, new in ((mean.data, now), (var.data, unbiased)):
            if momentum is not None:
                running.lerp_(new.to(running.dtype), momentum)
            elif batches is not None:  # on the device: to read the counter would be to wait for it
                running.lerp_(new.to(running.dtype), batches.to(running.dtype).reciprocal())
    return torch.empty(0, dtype=torch.bool, device=mean.device)


def normalise(
    x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """x normalised by statistics, channel by channel, and scaled: pointwise over rows. The statistics are
    inputs like any other and get a gradient."""
    if not groups:
        return _Normalise.apply(x, stats, weight, bias, eps)  # type: ignore[no-untyped-call, no-any-return]
    # Every channel of every image has statistics of its own: one image of images x channels channels.
    images, channels = x.shape[:2]
    stats = stats.repeat_interleave(channels // groups, 2).reshape(3, -1)
    weight, bias = (None if t is None else t.repeat(images) for t in (weight, bias))
    flat = x.reshape(1, images * channels, *x.shape[2:])
    return _Normalise.apply(flat, stats, weight, bias, eps).view(x.shape)  # type: ignore[no-untyped-call, no-any-return]


def spread_of(
    stats: Tensor, correction: float | None, power: float, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Variance (power 1) or deviation (0.5) from finished statistics; without a correction, of M2 itself."""
    n, _, m2 = stats.unbind()
    found = m2 if correction is None else m2 / (n - correction)
    return (found if power == 1.0 else found.sqrt()).reshape(shape).to(dtype)


def _statistics(x: Tensor, groups: int, centred: bool) -> Tensor:
    """Of all rows at once."""
    share = measure(x, groups, centred)
    return statistics_of(share.unsqueeze(0), (x.numel() // share[0].numel(),), Tables())


def _spread(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """(x, the dimensions that share a statistic)."""
    if not groups:
        return x, (0, *range(2, x.dim()))
    return x.view(x.shape[0], groups, -1, *x.shape[2:]), tuple(range(2, x.dim() + 1))


def _as_one_image(x: Tensor) -> Tensor:
    """The same memory, with the stride of a single image that its layout has. Where views left another,
    PyTorch's batch norm on a CPU takes the layout to be contiguous here and channels_last there (torch 2.13),
    and reads the gradient at the wrong places."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if x.shape[0] != 1 or order is None or x.is_contiguous() or not x.is_contiguous(memory_format=order):
        return x
    return x.as_strided(x.shape, (x.numel(), *x.stride()[1:]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _channels(spread: Tensor) -> int:
    """How many channels, or groups of them, make a chunk."""
    chunk = CHUNK if device_of(spread).type == "cpu" else DEVICE_CHUNK
    return max(1, chunk * spread.shape[1] // max(spread.numel(), 1))


def _squares(wide: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Not centred: deviations from zero, whose sum nobody asks for."""
    squares = wide.square().mean(dims)
    return torch.stack((torch.zeros_like(squares), squares))


def by_one_kernel(wide: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What takes a device least launches (on a CPU it is slow)."""
    var, mean = torch.var_mean(wide, dims, correction=0)
    return torch.stack((mean, var))


def by_deviations(wide: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What a CPU does fast."""
    centre = wide.mean(dims, keepdim=True)
    deviations = wide - centre
    rest = deviations.sum(dims)
    squares = deviations.square_().sum(dims)
    return torch.stack((centre.view(rest.shape), rest, squares))


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, total: Tensor | None, groups: int, centred: bool, shared: bool
    ) -> Tensor:
        ctx.groups, ctx.centred, ctx.shared = groups, centred, shared
        made = _statistics(x, groups, centred) if total is None else torch.zeros_like(total)
        made = merge_processes(made) if shared else made
        ctx.save_for_backward(x, made if total is None else total)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, total = ctx.saved_tensors
        grad = add_processes(grad) if ctx.shared else grad
        made = torch.empty_like(x, dtype=_wide(x))
        for some, centre, by_one, by_all, out in _shares(x, total, grad, ctx.groups, ctx.centred, made):
            torch.sub(some, centre, out=out).mul_(by_one).add_(by_all)
        return made.to(x.dtype), None, None, None, None


class _Normalise(torch.autograd.Function):
    """PyTorch's own batch norm with given statistics, which have no gradient there; here they have (the count
    is a constant)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        x = _as_one_image(x)
        dtype = weight.dtype if weight is not None else _wide(x)
        narrow_mean, narrow_var = stats[1].to(dtype), torch.empty_like(stats[2], dtype=dtype)
        torch.div(stats[2], stats[0], out=narrow_var)
        ctx.save_for_backward(x, stats, weight, narrow_mean, narrow_var)
        ctx.eps = eps
        return torch.batch_norm(x, weight, bias, narrow_mean, narrow_var, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, weight, narrow_mean, narrow_var = ctx.saved_tensors
        grad = _as_one_image(grad)
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, narrow_mean, narrow_var, narrow_mean, narrow_var, False, ctx.eps,
            [ctx.needs_input_grad[0], True, True],
        )  # fmt: skip
        by_stats = None
        if ctx.needs_input_grad[1]:
            n, _, m2 = stats.unbind()
            spread = torch.add(m2, n, alpha=ctx.eps)  # n (var + eps)
            slope, scale = (n / spread).sqrt(), spread.reciprocal() if weight is None else weight / spread
            slope = slope if weight is None else slope * weight
            by_stats = torch.zeros_like(stats)
            by_stats[1].addcmul_(by_bias, slope, value=-1)
            by_stats[2].addcmul_(by_weight, scale, value=-0.5)
        _, _, scaled, shifted, _ = ctx.needs_input_grad
        return by_x, by_stats, by_weight if scaled else None, by_bias if shifted else None, None
