"""Files at the end of hours of work: asked about before it begins, and kept elsewhere where that fails."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rowtune.errors import PlanError, UsageError
from rowtune.plan.file import load_plan
from rowtune.tune.sizes import format_bytes

# A plan and its records take some ten kilobytes a trial.
ROOM = 1 << 20


def check_writable(path: Path, flag: str = "-o", size: int = ROOM) -> None:
    """UsageError where `path` cannot be made or replaced, or its disk has no room for `size` bytes."""
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} {path} is a device, no file; give a file name")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}")
    if path.exists() and not (path.stat().st_mode & 0o222 and os.access(path, os.W_OK)):
        raise UsageError(f"{flag} {path} is read-only; give another name")
    if not path.parent.stat().st_mode & 0o222:
        raise UsageError(f"{flag} {path}: the folder {path.parent} is read-only; give another one")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".rowtune-"):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot write into {path.parent} ({error.strerror})") from error
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise UsageError(
            f"{flag} {path}: the disk has {format_bytes(free)} left, but {format_bytes(size)} are needed"
        )


def keep(path: Path, write: Callable[[Path], None], what: str) -> Path:
    """Write a file, and where that fails (a disk that filled up meanwhile) one of its name in a new folder
    among the system's temporary files; returns where it is.

    Raises:
        UsageError: it can be written nowhere.
    """
    try:
        write(path)
        return path
    except OSError as error:
        reason = error.strerror or str(error)
    try:
        spare = Path(tempfile.mkdtemp(prefix="rowtune-")) / path.name
        write(spare)
        return spare
    except OSError as error:
        raise UsageError(
            f"{what} could not be written to {path} ({reason}), nor elsewhere: {error}"
        ) from error


def check_replaceable(path: Path, fingerprint: str, force: bool) -> None:
    """UsageError where `path` is something else than a plan for this model, unless forced."""
    if force or not path.exists():
        return
    try:
        other = load_plan(path).fingerprint != fingerprint
        what = "a plan for another model"
    except PlanError:
        other, what = True, "no plan that this rowtune reads"
    if other:
        raise UsageError(f"{path} exists and is {what}: give --force to replace it, or another -o")
