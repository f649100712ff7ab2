"""Which values a keep segment need not keep: a minimum cut, as in PyTorch's own partitioner.

Backward wants some values. Those that are cheap to make are made again from others, so what is kept is a set
of values from which all that are wanted follow, of the least bytes: the least cut between where values come
from and where they are wanted (as AOTAutograd's min_cut_rematerialization_partition; the idea of leaving out
normalised and activated maps is that of In-Place ABN, arXiv 1712.02616, and of gradient checkpointing on
DenseNet, arXiv 1707.06990).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rowtune.graph.graph import Node

PRODUCTS = frozenset({"linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))})
"""Operators whose weights nothing but matrix products and convolutions read."""

COSTLY = PRODUCTS | {
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
    *("loss", "loss_sums", "cumsum", "sort", "topk"),
}
"""Operators whose outputs are not made again: they do more than read and write what they have."""

NORMS = frozenset({"batch_norm", "instance_norm"})
"""Operators that may change a buffer, and run again without doing so."""

LONGEST = 4
"""Operators in a row that are run again for one value: a chain through all of a network would cost as much
as a checkpoint of it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Memory that a node makes.

    bytes    0 for what lives anyway
    parents  the blocks that the node reads
    cheap    whether the node may run again
    wanted   whether backward reads it
    """

    name: str
    bytes: int
    parents: tuple[str, ...] = ()
    cheap: bool = False
    wanted: bool = False


def is_cheap(node: Node) -> bool:
    """Whether running the node again costs about what reading its inputs does."""
    if node.op in COSTLY or (node.random and node.op != "dropout"):
        return False
    return not node.effect or node.op in NORMS


def made_again(blocks: Sequence[Block]) -> frozenset[str]:
    """The names of the blocks that are not kept but made again, of blocks in the order they are made; of the
    sets that keep the fewest bytes, the smallest."""
    import networkx as nx

    if not any(b.cheap for b in blocks):
        return frozenset()
    cheap = _short(blocks)
    flow = nx.DiGraph()  # from where values are wanted to where they come from: the cut nearest the former
    for b in blocks:
        flow.add_edge((b.name, "out"), (b.name, "in"), capacity=b.bytes)
        if b.wanted:
            flow.add_edge("wanted", (b.name, "out"))
        if b.name in cheap:
            for parent in b.parents:
                flow.add_edge((b.name, "in"), (parent, "out"))
        else:
            flow.add_edge((b.name, "in"), "made")
    if "wanted" not in flow or "made" not in flow:
        return frozenset()
    _, (near, _) = nx.minimum_cut(flow, "wanted", "made")
    return frozenset(b.name for b in blocks if (b.name, "in") in near)


def _short(blocks: Sequence[Block]) -> frozenset[str]:
    """The cheap blocks that at most `LONGEST` operators make from others."""
    length: dict[str, int] = {}
    for b in blocks:
        chain = 1 + max((length.get(p, 0) for p in b.parents), default=0)
        length[b.name] = chain if b.cheap and chain <= LONGEST else 0
    return frozenset(name for name, n in length.items() if n)
