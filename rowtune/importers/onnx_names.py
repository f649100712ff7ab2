"""Parameter names: the file's own where they can be module paths, something close to them otherwise."""

from __future__ import annotations

import re

from torch import nn

# Names that exporters make up; a single number under such a name is a constant, not a weight.
GENERATED = re.compile(r"^_?val_\d+$|::|/|:\d+$|^\d+$|(?i:const)|scalar_tensor|_default(_\d+)?$")

_RESERVED = frozenset(dir(nn.Module()))


def is_path(name: str) -> bool:
    """Whether `name` reads like a module path: 'features.0.weight'."""
    return re.fullmatch(r"\w+(\.\w+)*", name) is not None


class Paths:
    """Gives every weight its own legal dotted path; a path is never a prefix of another."""

    def __init__(self) -> None:
        self._leaves: set[str] = set()
        self._branches: set[str] = set()

    def claim(self, name: str) -> str:
        """`name` itself if it is legal and free, else a free path close to it."""
        parts = [re.sub(r"\W", "_", part) or "_" for part in name.split(".")] if name else ["weight"]
        path = ".".join(part + "_" if part in _RESERVED else part for part in parts)
        if _prefixes(path) & self._leaves:  # "a.b" beside a weight "a": no module can hold both
            path = path.replace(".", "_")
        wanted, count = path, 2
        while not self._free(path):
            path, count = f"{wanted}_{count}", count + 1
        self._leaves.add(path)
        self._branches |= _prefixes(path)
        return path

    def _free(self, path: str) -> bool:
        return path not in self._leaves and path not in self._branches


def _prefixes(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}
