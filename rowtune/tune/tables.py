"""Tables of options that were recorded before, in the user's cache folder.

What a segment keeps and which calls it makes follows from the graph and this version of rowtune and torch.
So a search with another budget, or of another day, begins where the last one of this graph ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

import rowtune
from rowtune.cost.table import Kept, Option, Part, Span, Table
from rowtune.errors import RowtuneError
from rowtune.plan.plan import Segment
from rowtune.runtime.blank import Like, Signature
from rowtune.torch_private import OpOverload
from rowtune.tune.calibrate import operator
from rowtune.tune.profiles import folder

MOST = 40
"""Tables in the folder; the one that was used longest ago goes first."""


class CachedTables:
    """In files of the user's cache folder; one that cannot be read or written is none.

    Args:
        device: that the graph's tensors stand for.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def path(self, table: Table) -> Path:
        """One file for each graph, device, and what holds for all of a plan."""
        said = hashlib.sha256(f"{_version()} {self.device} {table.max_grad_error} {table.whole}".encode())
        said.update(repr(table.brought).encode())
        for line in _lines(table):
            said.update(line.encode())
        return folder() / "tables" / f"{said.hexdigest()[:24]}.bin"

    def recall(self, table: Table) -> None:
        """Add what an earlier search of this graph recorded."""
        path = self.path(table)
        with contextlib.suppress(OSError, RowtuneError):
            table.take(unpacked(path.read_bytes()))
            path.touch()

    def remember(self, table: Table) -> None:
        """Keep what was recorded for the next search."""
        path = self.path(table)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}.tmp")
            new.write_bytes(packed(table.kept))
            new.replace(path)
            by_age = sorted(path.parent.glob("*.bin"), key=lambda p: p.stat().st_mtime)
            for old in by_age[:-MOST]:
                old.unlink()


def _lines(table: Table) -> Iterator[str]:
    """All of a graph that options depend on."""
    graph = table.graph
    yield repr((table.axis, table.cuts, graph.inputs, graph.targets, graph.outputs, graph.device))
    for v in graph.values.values():
        yield repr((v.name, v.kind, v.shape, v.dtype, v.path, v.requires_grad, v.parts))
    for n in (*graph.nodes, *(n for f in graph.fused.values() for n in f.nodes)):
        target = getattr(n.target, "__qualname__", str(n.target))
        yield repr((n.name, n.op, target, n.args, n.kwargs, n.effect, n.random, n.region))


@cache
def _version() -> str:
    """Of torch, and of all of this program's text: a version's number does not change with each commit."""
    said = hashlib.sha256(str(torch.__version__).encode())
    for path in sorted(Path(rowtune.__file__).parent.rglob("*.py")):
        said.update(path.read_bytes())
    return said.hexdigest()


# -- as bytes ------------------------------------------------------------------------------------------------

_OWN = {(c.__module__, c.__qualname__): c for c in (Kept, Option, Part, Span, Segment, Like, Signature)}
_PLAIN = {("builtins", c.__name__): c for c in (int, float, bool, str, type, frozenset, set, slice)}
_NAMED = (torch.dtype, torch.layout, torch.memory_format)
"""Written by name."""
_TYPES = {("torch", c.__qualname__): c for c in (*_NAMED, torch.device, torch.Size)}


def packed(kept: Kept) -> bytes:
    """Options as bytes; operators by their names."""
    text = io.BytesIO()
    _Writer(text, protocol=5).dump(kept)
    return zlib.compress(text.getvalue(), 1)


def unpacked(data: bytes) -> Kept:
    """The inverse. Nothing but options is made of what the bytes say.

    Raises:
        RowtuneError: they are no options.
    """
    try:
        found = _Reader(io.BytesIO(zlib.decompress(data))).load()
    except Exception as error:  # whatever unpickling raises: the file is not ours, or was cut short
        raise RowtuneError(f"not a table of options: {error}") from error
    if not isinstance(found, Kept):
        raise RowtuneError(f"not a table of options but a {type(found).__name__}")
    return found


class _Writer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, OpOverload):
            return obj._schema.name, obj._overloadname
        if isinstance(obj, _NAMED):
            return str(obj).removeprefix("torch."), None
        return None


class _Reader(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        name, overload = pid
        if overload is not None:
            return operator(name, overload)
        found = getattr(torch, name)
        assert isinstance(found, _NAMED), name
        return found

    def find_class(self, module: str, name: str) -> Any:
        known: Any = (_OWN | _PLAIN | _TYPES).get((module, name))
        if known is None:
            raise RowtuneError(f"{module}.{name} is no part of an option")
        return known
