"""May this file be written? Asked before a search begins, so that an hour's work is not lost at its end."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rowtune.errors import PlanError, UsageError
from rowtune.plan.file import load_plan


def check_writable(path: Path, flag: str = "-o") -> None:
    """UsageError where `path` cannot be made or replaced."""
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give a file name")
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
