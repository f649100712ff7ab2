"""Random numbers of a run: torch's, Python's and NumPy's generators, kept and put back together.

Items of a dataset are drawn apart: each under a seed that follows from the run's seed, the epoch and the
item's number. So it does not matter in which process an item is read, or whether those before it were.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def begin(seed: int) -> None:
    """All generators from one seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def capture(device: str = "cpu") -> State:
    """The state of all generators, of types that `torch.load(weights_only=True)` takes."""
    version, numbers, gauss = random.getstate()
    drawn: dict[str, Any] = dict(np.random.get_state(legacy=False))
    words = [int(n) for n in drawn["state"]["key"]]
    state: State = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [words, int(drawn["state"]["pos"]), int(drawn["has_gauss"]), float(drawn["gauss"])],
    }
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: State, device: str = "cpu") -> None:
    """Put back what `capture` returned."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    words, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, cached))
    if device.startswith("cuda") and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def undisturbed(device: str = "cpu") -> Iterator[None]:
    """What is drawn inside is not missed outside: a run draws the same with and without validation."""
    state = capture(device)
    try:
        yield
    finally:
        restore(state, device)


def seed_of(*parts: int) -> int:
    """A seed that these numbers give, far from those that other numbers give."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


@contextlib.contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Everything inside is drawn from these numbers, and nothing outside notices."""
    with undisturbed():
        seed = seed_of(*parts)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
