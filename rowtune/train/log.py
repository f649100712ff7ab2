"""What a run was seen to do: a line of JSON for every step and validation, and TensorBoard's events.

A disk that fills up costs the log, not the training: what went wrong is in `unwritten`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rowtune.errors import UsageError
from rowtune.plan.file import write_text
from rowtune.train.options import Options, StepReport, ValReport
from rowtune.tune.output import check_writable


class Log:
    """Writes reports where the options say. A run that goes on at `step` drops the lines after it; those of a
    validation at `step` too where that is made again."""

    def __init__(self, options: Options, step: int, again: bool) -> None:
        self.unwritten = ""
        self._path = options.metrics
        if self._path is not None:
            check_writable(self._path, "--metrics")
            lines = self._kept(self._path, step, again) if options.resume and self._path.exists() else []
            if self._path.exists() and not (options.resume or options.force):
                raise UsageError(
                    f"--metrics {self._path} exists: give --force to replace it, or another name"
                )
            write_text(self._path, "".join(line + "\n" for line in lines))
        self._board = _board(options.tensorboard, step) if options.tensorboard is not None else None

    @staticmethod
    def _kept(path: Path, step: int, again: bool) -> list[str]:
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
                at, validated = int(found["step"]), "val_loss" in found
            except (ValueError, KeyError, TypeError):
                continue  # half a line, of a kill while it was written
            if at < step or (at == step and not (validated and again)):
                kept.append(line)
        return kept

    def add(self, report: StepReport | ValReport) -> None:
        line = as_line(report)
        try:
            if self._path is not None and not self.unwritten:
                with open(self._path, "a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
            if self._board is not None and not self.unwritten:
                for name, value in line.items():
                    if isinstance(value, float):
                        side = "train" if isinstance(report, StepReport) else "val"
                        self._board.add_scalar(f"{side}/{name.removeprefix('val_')}", value, report.step)
        except OSError as error:
            where = self._path or "TensorBoard's events"
            self.unwritten = f"{where} could not be written any more: {error.strerror or error}"

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def as_line(report: StepReport | ValReport) -> dict[str, Any]:
    """A report as it stands in the log; null is a number that is none."""
    found: Mapping[str, Any] = asdict(report)
    if isinstance(report, StepReport):
        line = {k: v for k, v in found.items() if k not in ("steps", "epochs")}
    else:
        line = {"step": report.step, "epoch": report.epoch, "val_loss": report.loss, **report.metrics}
        line |= {"seconds": report.seconds, "peak_bytes": report.peak_bytes}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    try:
        make: Any = SummaryWriter
        return make(str(folder), purge_step=step + 1 if step else None)
    except OSError as error:
        raise UsageError(f"--tensorboard {folder} cannot be written: {error.strerror or error}") from error
