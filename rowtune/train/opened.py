"""Plan file -> workload: the model as it is now, and whether the plan is still one for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rowtune.cost.predict import predict
from rowtune.errors import PlanError, UsageError
from rowtune.graph.losses import parse
from rowtune.importers.source import parse_shape
from rowtune.plan.file import PlanFile
from rowtune.problem import TensorSpec
from rowtune.tune.device import resolve_device
from rowtune.tune.optimizers import parse_optimizer
from rowtune.tune.step import Workload, prepare


def open_plan(
    file: PlanFile, device: str = "auto", shapes: Sequence[str] = (), seed: int | None = None
) -> tuple[Workload, int]:
    """The workload a plan was made for, checked against it, and the predicted peak of a step.

    Raises:
        PlanError: the model's structure changed, the device is not here, or the decisions do not fit it.
    """
    try:
        here = resolve_device(file.problem.device if device == "auto" else device)
    except UsageError as error:
        if device != "auto":
            raise
        raise PlanError(
            f"the plan was made for {file.problem.device}, which is not here; search again"
        ) from error
    if here.partition(":")[0] != file.problem.device.partition(":")[0]:
        raise PlanError(
            f"the plan was made for {file.problem.device}, not {here}; search again on this device"
        )
    try:
        parse(file.problem.loss)
        parse_optimizer(file.problem.optimizer)
    except UsageError as error:
        raise PlanError(f"the plan's loss or optimizer: {error}; search again") from error
    problem = replace(file.problem, device=here, seed=file.problem.seed if seed is None else seed)
    if shapes:
        problem = replace(problem, inputs=_reshaped(file, shapes))
    work = prepare(problem)
    if work.graph.fingerprint != file.fingerprint:
        raise PlanError(
            f"the plan was made for a model with fingerprint {file.fingerprint}, but {problem.model} "
            f"now has {work.graph.fingerprint}; search again"
        )
    return work, int(predict(work.graph, file.plan, work.optimizer).peak_bytes)


def _reshaped(file: PlanFile, shapes: Sequence[str]) -> tuple[TensorSpec, ...]:
    wanted = [parse_shape(text) for text in shapes]
    specs = list(file.problem.inputs)
    names = [spec.name for spec in specs]
    for i, (name, shape) in enumerate(wanted):
        at = names.index(name) if name in names else i
        if (name and name not in names) or at >= len(specs) or len(shape) != len(specs[at].shape):
            raise UsageError(f"--shape: the plan's inputs are {', '.join(map(str, specs))}")
        specs[at] = replace(specs[at], shape=shape)
    return tuple(specs)
