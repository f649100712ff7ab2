"""A heap of sizes: what is live, and the most that ever was."""

from __future__ import annotations


class Heap:
    """Blocks are counted by reference; parameter gradients are state, everything else activation.

    `peak` is the most of all live bytes, `peak_activations` the most of those that are not state, `peak_at`
    what was going on at the peak and the largest activation that was live then.
    """

    def __init__(self, fixed: int) -> None:
        self.live = self.peak = fixed
        self.activations = self.peak_activations = 0
        self.size: list[int] = []
        self.refs: list[int] = []
        self.state: list[bool] = []
        self.named: dict[int, str] = {}
        self.label = self.peak_label = self.largest = ""
        self.noted = 0

    @property
    def peak_at(self) -> str:
        return f"{self.largest}, {self.peak_label}" if self.largest else self.peak_label

    def new(self, size: int, name: str = "", *, state: bool = False) -> int:
        if name and not state:
            self.named[len(self.size)] = name
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
            self.peak, self.peak_label = self.live + transient, self.label
            self._note()
        if self.activations + transient > self.peak_activations:
            self.peak_activations = self.activations + transient

    def _note(self) -> None:
        """Remember the largest live activation, not at every byte that the peak grows by."""
        if self.peak < 1.005 * self.noted or not self.named:
            return
        self.noted = self.peak
        block = max(self.named, key=self.size.__getitem__)
        self.largest = self.named[block]

    def ref(self, block: int) -> int:
        self.refs[block] += 1
        return block

    def drop(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.named.pop(block, None)
            self.live -= self.size[block]
            if not self.state[block]:
                self.activations -= self.size[block]
