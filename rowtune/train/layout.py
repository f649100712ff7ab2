"""What lies in a folder of images. Its structure says what it is for:

    folder/cat/1.png  folder/dog/2.png             one folder a class          classification
    folder/images/1.png  folder/masks/1.png        a mask for every image      segmentation
    folder/input/1.png  folder/target/1.png        a pair for every name       restoration

Volumes and signals lie in .npy files in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rowtune.errors import UsageError

Kind = Literal["classification", "segmentation", "restoration"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".npy"})
PAIRS: dict[tuple[str, str], Kind] = {
    ("images", "masks"): "segmentation",
    ("input", "target"): "restoration",
}
SHAPES = "class folders, images/ and masks/, or input/ and target/"


@dataclass(frozen=True)
class Layout:
    """Files in order of their names, each with its target: a file, or the number of its class."""

    root: Path
    kind: Kind
    items: tuple[tuple[Path, Path | int], ...]
    classes: tuple[str, ...] = ()


def read_layout(root: Path, flag: str) -> Layout:
    """What the folder holds. UsageError where it holds none of the three, or a file lacks its counterpart."""
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    for (first, second), kind in PAIRS.items():
        if first in folders and second in folders:
            return Layout(root, kind, _paired(root, first, second, flag))
        if first in folders and second + "s" in folders:
            raise UsageError(
                f"{flag} {root} has {first}/ and {second}s/; the second is to be called {second}/"
            )
    items = [(file, i) for i, name in enumerate(folders) for file in _files(root / name)]
    if len(folders) < 2 or not items:
        found = ", ".join(f"{name}/" for name in folders[:5]) or "no folder"
        raise UsageError(f"{flag} {root} holds {found}: a folder of images has {SHAPES}")
    empty = [name for i, name in enumerate(folders) if not any(label == i for _, label in items)]
    if empty:
        raise UsageError(
            f"{flag} {root}: the class folder {empty[0]}/ has no image ({', '.join(sorted(SUFFIXES))})"
        )
    return Layout(root, "classification", tuple(items), tuple(folders))


def _files(folder: Path) -> list[Path]:
    """All images in it and in its folders."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())


def _paired(root: Path, first: str, second: str, flag: str) -> tuple[tuple[Path, Path], ...]:
    """Files that have the same name but for its ending."""
    left, right = (_named(root / name, flag) for name in (first, second))
    for a, b, here, there in ((left, right, first, second), (right, left, second, first)):
        alone = sorted(set(a) - set(b))
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise UsageError(
                f"{flag} {root}: {here}/{alone[0]}{more} has no counterpart in {there}/; names are the same "
                "but for their ending"
            )
    if not left:
        raise UsageError(f"{flag} {root / first} has no image ({', '.join(sorted(SUFFIXES))})")
    return tuple((left[name], right[name]) for name in sorted(left))


def _named(folder: Path, flag: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in _files(folder):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UsageError(f"{flag} {folder} has both {found[name].name} and {file.name}; keep one")
        found[name] = file
    return found
