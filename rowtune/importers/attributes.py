"""A model's attributes, put back as they were before it was traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

Contents = list[tuple[Any, Any]]


@contextlib.contextmanager
def attributes_put_back(model: nn.Module) -> Iterator[None]:
    """Some forwards leave tensors in lists that modules share (deep supervision in MONAI's DynUNet).
    torch.export puts copies of such lists back: no two modules share one after that."""
    before = [(vars(m), dict(vars(m))) for m in model.modules()]
    contents: Contents = []
    for _, attributes in before:
        for value in attributes.values():
            _collect(value, contents, set())
    try:
        yield
    finally:
        for owner, attributes in before:
            if owner.keys() != attributes.keys() or any(owner[k] is not v for k, v in attributes.items()):
                owner.clear()
                owner.update(attributes)
        for container, items in contents:
            _refill(container, items)


def _collect(value: Any, contents: Contents, seen: set[int]) -> None:
    """Lists and dictionaries, also inside one another, and what is in them."""
    if id(value) in seen or not isinstance(value, (list, dict)):
        return
    seen.add(id(value))
    contents.append((value, value.copy()))
    for item in value.values() if isinstance(value, dict) else value:
        _collect(item, contents, seen)


def _refill(container: Any, items: Any) -> None:
    if isinstance(container, list):
        container[:] = items
    else:
        container.clear()
        container.update(items)
