"""Reductions of a rows segment at run time: shares merged over bands and images, and what is made of the
finished ones (a gate, a loss, running statistics)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rowtune.graph.cuts import Stretch
from rowtune.graph.graph import Graph, Node
from rowtune.kernels.moments import add_processes, merge_processes
from rowtune.plan.program import Banded, Shares
from rowtune.rows import Rows
from rowtune.runtime.dropout import Seed
from rowtune.runtime.evaluate import ALL_IMAGES, grad_dtype, run_whole
from rowtune.runtime.gradients import add


class Sums:
    """The reductions of one call.

    Args:
        tensors: segment inputs and weights by name, detached.
        totals: finished reductions, where forward was another call's.
    """

    def __init__(
        self,
        graph: Graph,
        program: Banded,
        tensors: Mapping[str, Tensor],
        seed: Seed,
        totals: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.graph, self.program, self.tensors, self.seed = graph, program, tensors, seed
        self.names = frozenset(program.sums)
        self.totals: dict[str, Tensor] = dict(totals or {})
        self.shares: dict[str, dict[int, Tensor]] = {}
        self.gradients: dict[str, Tensor] = {}

    def add(self, name: str, share: Tensor, images: Rows, piece: int) -> None:
        """The share of the rows that a piece made of these images: it is merged with those before, or waits
        beside them."""
        rule = self.program.bands.rule(name).reduces
        assert rule is not None
        by_images = self.shares.setdefault(name, {})
        at = 0 if self._image_dim(name, images) is None else images.lo
        share = share.detach()
        if share.is_floating_point():
            share = share.to(grad_dtype(share.dtype))
        if rule.total is not None:
            self._lay(self.program.shares[name], by_images, at, share, images, piece)
        else:
            by_images[at] = rule.merge(by_images[at], share) if at in by_images else share

    def _lay(
        self, among: Shares, by_images: dict[int, Tensor], at: int, share: Tensor, images: Rows, piece: int
    ) -> None:
        """A share beside the others."""
        if len(among.counts) == 1:
            by_images[at] = share.unsqueeze(0)
            return
        if at not in by_images:
            by_images[at] = share.new_empty((len(among.counts), *share.shape))
        several = len(among.counts) > among.bands
        before = self.program.image_ranges.index(images) if several else 0
        by_images[at][before * among.bands + among.places[piece]].copy_(share)

    def finish(self) -> None:
        """All shares are in."""
        for name, parts in self.shares.items():
            found = [self._total(name, parts[at]) for at in sorted(parts)]
            dim = self.program.images.dims[name]
            total = found[0] if len(found) == 1 or dim is None else torch.cat(found, dim)
            total = merge_processes(total) if self._shared(name) else total
            self.totals[name] = total.to(self.graph.values[name].dtype)
        self.shares = {}

    def _total(self, name: str, share: Tensor) -> Tensor:
        rule = self.program.bands.rule(name).reduces
        assert rule is not None
        return share if rule.total is None else rule.total(share, self.program.shares[name].counts)

    def gradient(self, name: str, images: Rows) -> Tensor | None:
        """Of a finished reduction, for these images."""
        found = self.gradients.get(name)
        dim = self._image_dim(name, images)
        return found if found is None or dim is None else found.narrow(dim, images.lo, images.size)

    def _image_dim(self, name: str, images: Rows) -> int | None:
        return None if images == ALL_IMAGES else self.program.images.dims[name]

    # -- what reads finished reductions --------------------------------------------------------------------

    def made(self, first_time: bool) -> dict[str, Tensor]:
        """Finished reductions and what is made of them; the first time buffers change as well."""
        with torch.no_grad():
            return self._run(self.totals, self.program.post, first_time)

    def unit(self, loss: str, scale: Tensor | float) -> None:
        """Gradients for `scale` times a loss that is linear in its sums, before they are known."""
        leaves = self._leaves({n: self._zeros(n) for n in self.program.sums})
        made = self._run(leaves, self._pure())
        found = torch.autograd.grad(made[loss], list(leaves.values()), allow_unused=True)
        self.gradients = {n: g * scale for n, g in zip(leaves, found, strict=True) if g is not None}

    def backward(self, grads: Mapping[str, Tensor], wanted: frozenset[str]) -> dict[str, Tensor]:
        """Gradients of the reductions for these of the segment's outputs; returns those of weights and inputs
        that are read beyond the reductions."""
        self.gradients = {n: g for n, g in grads.items() if n in self.names}
        beyond = self._beyond(grads, wanted)
        for name in self.names:
            if name in self.gradients and self._shared(name):
                self.gradients[name] = add_processes(self.gradients[name])
        return beyond

    def _beyond(self, grads: Mapping[str, Tensor], wanted: frozenset[str]) -> dict[str, Tensor]:
        """Backward through what is made of the reductions."""
        read = {n for node in self._pure() for n in node.inputs}
        others = [n for n in self.tensors if n in read and n in wanted]
        if not any(node.name in grads for node in self._pure()):
            return {}
        leaves = self._leaves({**self.totals, **{n: self.tensors[n] for n in others}})
        made = self._run(leaves, self._pure())
        outs = [(made[o], g) for o, g in grads.items() if o not in leaves and o in made]
        outs = [(t, g) for t, g in outs if t.requires_grad]
        if not outs:
            return {}
        tensors, seeds = zip(*outs, strict=True)
        asked = {n: t for n, t in leaves.items() if t.requires_grad}
        found = dict(
            zip(
                asked,
                torch.autograd.grad(tensors, list(asked.values()), seeds, allow_unused=True),
                strict=True,
            )
        )
        for name in self.names:
            g = found.get(name)
            if g is not None:
                add(self.gradients, name, g)
        return {n: g for n in others if (g := found[n]) is not None}

    def _shared(self, name: str) -> bool:
        rule = self.program.bands.rule(name).reduces
        return rule is not None and rule.shared

    def _pure(self) -> tuple[Node, ...]:
        return tuple(node for node in self.program.post if not node.effect)

    def _zeros(self, name: str) -> Tensor:
        value = self.graph.values[name]
        return torch.zeros(value.shape, dtype=value.dtype, device=next(iter(self.tensors.values())).device)

    @staticmethod
    def _leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}

    def _run(
        self, given: Mapping[str, Tensor], nodes: tuple[Node, ...], first_time: bool = False
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = dict(given)
        grad = any(t.requires_grad for t in given.values())

        def lookup(name: str) -> Tensor:
            return made[name] if name in made else self.tensors[name]

        with torch.set_grad_enabled(grad):
            for node in nodes:
                made[node.name] = run_whole(
                    node,
                    lambda n: made[n] if n in made else self.tensors[n],
                    self.seed,
                    first_time=first_time,
                )
        return made


def changed_buffers(part: Stretch) -> Iterator[str]:
    """Buffers that only nodes with an effect read."""
    read = {n for node in part.nodes if not node.effect for n in node.inputs}
    for node in part.nodes:
        if node.effect:
            yield from (n for n in node.inputs if n in part.weights and n not in read)
