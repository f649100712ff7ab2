"""All that a run is, in a folder of its own: whole or not at all.

    DIR/step-00000012/weights.safetensors   the network
                      ema.safetensors       its average, where one is kept
                      state.pt              optimizer, schedule, position in the data, random state

A checkpoint is written beside its place, each file and the folder forced to the disk, and then renamed; only
then does the one before it go. state.pt holds numbers and tensors only and is read as such: opening one runs
no code.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowtune.errors import UsageError

FORMAT = 1
PROCESSES = "the number of processes"
SINCE = {PROCESSES: 1}
"""Settings that checkpoints of this format did not always have, and what they were then."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class State:
    """What is not weights. `batch` is how many of the epoch's batches are behind; `began` is the random state
    that epoch began in; `others` are `random` and `began` of each rank after the first, in their order;
    `settings` are what a run that goes on must have in common with this one."""

    step: int
    epoch: int
    batch: int
    loss: float | None
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    averaged: int
    random: Mapping[str, Any]
    began: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    format: int = FORMAT
    others: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Checkpoint:
    """One that was read."""

    path: Path
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    state: State


def save(folder: Path, state: State, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None) -> Path:
    """Write a checkpoint and remove older ones; OSError where it cannot be written, those are then kept."""
    final = folder / f"step-{state.step:08d}"
    fresh = folder / f".{final.name}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write_tensors(fresh / "weights.safetensors", weights)
        if ema is not None:
            write_tensors(fresh / "ema.safetensors", ema)
        write_torch(fresh / "state.pt", {f.name: getattr(state, f.name) for f in fields(state)})
        sync(fresh)
        if final.exists():  # of an earlier run, which --force gave up
            shutil.rmtree(final)
        os.rename(fresh, final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sync(folder)
    for other in _all(folder):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return max(_all(folder), key=lambda path: int(path.name[5:]), default=None)


def load(path: Path) -> Checkpoint:
    """UsageError for one that is damaged, or of another format."""
    from safetensors.torch import load_file

    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise UsageError(
                f"the checkpoint {path} has format {state['format']}, this rowtune reads {FORMAT}"
            )
        average = path / "ema.safetensors"
        ema = load_file(average) if average.exists() else None
        return Checkpoint(path, load_file(path / "weights.safetensors"), ema, State(**state))
    except UsageError:
        raise
    except Exception as error:  # whatever a file that is not what it should be provokes in its reader
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"the checkpoint {path} is damaged ({type(error).__name__}: {reason}): remove it, and begin anew "
            "or go on from a copy"
        ) from error


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """UsageError where a run would go on as another one than it began."""
    for key, value in now.items():
        if before.get(key, SINCE.get(key)) != value:
            raise UsageError(
                f"the checkpoint {path} was made with {key} {before.get(key)}, this run has {value}: a run "
                "goes on with the flags it began with (steps and epochs may grow)"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors, on the disk when this returns. OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    try:
        save_file(copies, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sync(path)


def write_torch(path: Path, value: object) -> None:
    """By torch.save, on the disk when this returns. OSError where it cannot be written."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what torch's archive writer makes of a full disk
        raise OSError((str(error).strip().splitlines() or ["torch.save failed"])[0]) from error
    sync(path)


def sync(path: Path) -> None:
    """What was written to a file, or which files are in a folder, survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


def _all(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
