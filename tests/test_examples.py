"""The examples run by banded plans, and learn; those of other libraries where these are installed.

Their searches measure nothing (tests/unmeasured.py): a real one from Python is in test_own.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import unmeasured

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On one thread; what is imported from the folder is forgotten again."""
    monkeypatch.setattr("rowtune.tune.own.find", unmeasured.find)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def example(name: str, *needs: str) -> ModuleType:
    for library in needs:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed: examples/{name}.py is not run")
    return importlib.import_module(name)


def learns(losses: list[float]) -> bool:
    return all(map(math.isfinite, losses)) and losses[-1] < 0.9 * losses[0]


def test_plain_loop() -> None:
    assert learns(example("plain_loop").main(epochs=4))


def test_nnunet_like_is_equal_to_pytorch() -> None:
    planned, plain = example("nnunet_like").main(steps=3)
    assert planned == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("lightning_callback", ("lightning",)),
        ("hf_trainer", ("transformers", "accelerate")),
        ("monai_volume", ("monai",)),
    ],
)
def test_of_other_libraries(name: str, needs: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        assert learns(example(name, *needs).main(epochs=2))


def test_every_example_is_run() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {
        "own_network", "plain_loop", "nnunet_like", "lightning_callback", "hf_trainer", "monai_volume",
    }  # fmt: skip
