"""rowtune.search and rowtune.load: plans for a model that a Python program holds.

Plans are measured in a process of their own, which may run out of memory. The model goes there as a .pt2
file, torch.export's program of it: also one whose class is defined in a notebook.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowtune.errors import ModelError, PlanError, UsageError
from rowtune.graph.given_losses import as_loss
from rowtune.importers.exported import read
from rowtune.importers.trace import exported
from rowtune.plan.file import PlanFile, load_plan
from rowtune.problem import Source
from rowtune.tune.device import resolve_device
from rowtune.tune.find import Request, find, records_path
from rowtune.tune.output import check_replaceable, check_writable
from rowtune.tune.savers import last_resort
from rowtune.tune.savers import parse as parse_savers
from rowtune.tune.sizes import parse_budget, parse_size
from rowtune.tune.step import define
from rowtune.tune.study import Interrupted
from rowtune.tune.task import Progress

_SPELLED: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: ("cross_entropy", ("reduction", "ignore_index")),
    nn.MSELoss: ("mse", ("reduction",)),
    nn.L1Loss: ("l1", ("reduction",)),
    nn.SmoothL1Loss: ("smooth_l1", ("reduction", "beta")),
    nn.BCEWithLogitsLoss: ("bce_with_logits", ("reduction",)),
}
"""torch.nn's losses as they are written on a command line."""


def search(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    budget: str | int,
    *,
    loss: Any = None,
    optimizer: str = "",
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    reserve: str | int = 0,
    savers: str = "",
    trials: int = 40,
    timeout: float = float("inf"),
    seed: int = 0,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PlanFile:
    """Find the fastest exact plan that fits a budget, by measuring real training steps in a worker process.

    `rowtune.apply(model, found, loss=...)` trains by what is returned; `found.plan` is the plan alone,
    `found.measured` its figures (bytes, seconds). Ctrl-C ends the search with the best plan so far; where
    there is none yet it is a KeyboardInterrupt.

    Args:
        model: in the mode that it is trained in; it is not changed, and its weights are used for measuring.
        inputs: example inputs; only sizes and types are read.
        budget: bytes, "8GB" (8e9), "8GiB" (2^33), or "25%" of what plain PyTorch is predicted to take.
        loss: as for `apply`; a function has to be in a module that can be imported. By default cross-entropy
            or MSE, by the output's shape.
        optimizer: as on the command line, "adamw:lr=0.001"; its state counts. SGD with momentum by default.
        out: a plan.json to write; the records of the search (the same call again goes on where it stopped)
            and the model, as .pt2, go beside it. By default nothing is left on the disk.
        device: auto, cpu, cuda or cuda:0.
        reserve: memory of the budget left for what is not in this model.
        savers: names that plans may use, or changes as in "+offload,-turns". Where no plan fits, those of
            rowtune.tune.savers.RESORT that are not forbidden are allowed as well.
        trials, timeout: plans measured, and seconds, at most.
        force: replace a file at `out` that is something else.
        progress: told after each trial.

    Raises:
        UsageError: an argument makes no sense, or the loss cannot be had in another process.
        ModelError: the model cannot be exported.
        InfeasibleError: no plan fits; says which budget would do.
    """
    size, kept = _sizes(budget, reserve)
    name, here, allowed = spelled(loss), resolve_device(device), parse_savers(savers)
    with _folder(out) as plan:
        program, fingerprint = _program(model, inputs)
        _check_place(plan, fingerprint, force)
        with _written(program, plan, force) as path:
            work = define(Source("pt2", str(path)), device=here, loss=name, optimizer=optimizer, seed=seed)
            if work.graph.fingerprint != fingerprint:
                raise _another(type(model).__name__)
            asked = Request(
                work, size, plan, trials, timeout, seed, kept, force=force, savers=allowed,
                resort=last_resort(savers),
            )  # fmt: skip
            found = _file(asked, progress)
        kept_as = found.problem.model if out is not None else Source("python", type(model).__name__)
        return replace(found, problem=replace(found.problem, model=kept_as))


def _sizes(budget: str | int, reserve: str | int) -> tuple[int | float, int]:
    size = parse_budget(budget) if isinstance(budget, str) else budget
    kept = parse_size(reserve, "reserve") if isinstance(reserve, str) else reserve
    if type(size) not in (int, float) or size <= 0 or kept < 0:
        raise UsageError(f"budget is a size such as 8GB, or bytes above 0, not {budget!r} less {reserve!r}")
    return size, kept


def _check_place(plan: Path, fingerprint: str, force: bool) -> None:
    check_writable(plan, "out")
    check_writable(records_path(plan), "out")
    check_replaceable(plan, fingerprint, force)


def _another(name: str) -> ModelError:
    return ModelError(
        f"{name} is not the same network once it was exported to a file; search a factory on the command "
        "line instead: rowtune search package.module:factory"
    )


def _file(request: Request, progress: Callable[[Progress], None]) -> PlanFile:
    """What was found; a search that ended before there was anything is a KeyboardInterrupt."""
    try:
        return find(request, progress).file
    except Interrupted:
        raise KeyboardInterrupt from None


def load(path: str | os.PathLike[str]) -> PlanFile:
    """What a plan.json holds, strictly: the plan, what it was made for and what it was measured to take.

    Raises:
        PlanError: the file is no plan that this rowtune reads.
    """
    return load_plan(Path(path))


def spelled(loss: Any) -> str:
    """A loss as it is written on a command line, so that another process can make it; empty for None.

    Raises:
        UsageError: it cannot be written so.
    """
    if loss is None or isinstance(loss, str):
        return loss or ""
    if type(loss) in _SPELLED:
        name, options = _SPELLED[type(loss)]
        odd = [key for key in ("weight", "pos_weight") if getattr(loss, key, None) is not None]
        odd += ["label_smoothing"] if getattr(loss, "label_smoothing", 0.0) else []
        usual = type(loss)()
        more = [f"{k}={getattr(loss, k)}" for k in options if getattr(loss, k) != getattr(usual, k)]
        if not odd:
            return f"{name}:{','.join(more)}" if more else name
        raise _unspelled(f"{type(loss).__name__} with {odd[0]}")
    as_loss(loss)  # says what a loss is, where this is none
    module, name = getattr(loss, "__module__", ""), getattr(loss, "__qualname__", "")
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is loss:
        return f"{module}:{name}"
    raise _unspelled(name or type(loss).__name__)


def _unspelled(what: str) -> UsageError:
    return UsageError(
        f"the loss {what} cannot be made again in the process that measures: define a function (output, "
        "target) in a module of its own and pass that, or search with a loss by name and give this to apply"
    )


def _program(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, str]:
    """What goes to the worker, and the fingerprint of the graph that is trained."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"search takes an nn.Module, not {type(model).__name__}; `rowtune search` takes files"
        )
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not given or not all(isinstance(t, Tensor) for t in given):
        raise UsageError("search takes example inputs as a tuple of tensors")
    cumulative = [n for n, m in model.named_modules() if getattr(m, "momentum", 0.0) is None]
    if cumulative:
        raise UsageError(
            f"{cumulative[0]} has momentum=None, which an exported model cannot have: set one to search"
        )
    program, _ = exported(model, given)
    return program, read(program, model, True).fingerprint


@contextmanager
def _folder(out: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where the plan goes; with no `out` into a folder that is removed."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="rowtune-") as folder:
        yield Path(folder) / "plan.json"


@contextmanager
def _written(program: torch.export.ExportedProgram, plan: Path, force: bool) -> Iterator[Path]:
    """The model's file beside the plan, gone again where no plan comes of it; one that is there already and
    belongs to no plan of that name is left alone."""
    path = plan.with_name(f"{plan.stem}.pt2")
    if path.exists() and not force and not _belongs(path, plan):
        raise UsageError(f"{path} exists and is not the model of {plan}: give force=True, or another out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path)
    try:
        yield path
    finally:
        if not plan.exists():
            path.unlink(missing_ok=True)


def _belongs(path: Path, plan: Path) -> bool:
    try:
        return plan.exists() and Path(load_plan(plan).problem.model.text).name == path.name
    except PlanError:
        return False
