"""A heap of sizes: what is live, and the most that ever was."""

from __future__ import annotations


class Heap:
    """Blocks are counted by reference; parameter gradients are state, everything else activation.

    `peak` is the most of all live bytes, `peak_activations` the most of those that are not state, `peak_at`
    the label that was current at the peak.
    """

    def __init__(self, fixed: int) -> None:
        self.live = self.peak = fixed
        self.activations = self.peak_activations = 0
        self.size: list[int] = []
        self.refs: list[int] = []
        self.state: list[bool] = []
        self.label = self.peak_at = ""

    def new(self, size: int, *, state: bool = False) -> int:
        self.size.append(size)
        self.refs.append(1)
        self.state.append(state)
        self.live += size
        if not state:
            self.activations += size
        self.mark(0)
        return len(self.size) - 1

    def mark(self, transient: int) -> None:
        """Note the peak, with `transient` more bytes alive for a moment."""
        if self.live + transient > self.peak:
            self.peak, self.peak_at = self.live + transient, self.label
        if self.activations + transient > self.peak_activations:
            self.peak_activations = self.activations + transient

    def ref(self, block: int) -> int:
        self.refs[block] += 1
        return block

    def drop(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.live -= self.size[block]
            if not self.state[block]:
                self.activations -= self.size[block]
