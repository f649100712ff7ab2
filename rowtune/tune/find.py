"""From a workload and a budget to a plan file: the search with its real parts put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from rowtune.cost.predict import Cost, predict
from rowtune.cost.profile import Profile
from rowtune.errors import InfeasibleError, UsageError
from rowtune.plan.file import MEASURED, PlanFile, save_plan
from rowtune.plan.plan import Plan
from rowtune.tune.device import device_name
from rowtune.tune.front import joined, measured_point, pace, predicted_points
from rowtune.tune.helpers import Helpers
from rowtune.tune.host import half_of_free, on_host
from rowtune.tune.inherit import inherit
from rowtune.tune.output import check_replaceable, keep
from rowtune.tune.profiles import calibration
from rowtune.tune.records import RecordFile, correction
from rowtune.tune.reference import plain_peak
from rowtune.tune.savers import DEFAULT, ON_HOST, check_capture, used
from rowtune.tune.shared import Shared
from rowtune.tune.sizes import format_bytes
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.step import Workload
from rowtune.tune.study import Search, search
from rowtune.tune.supervisor import Worker
from rowtune.tune.tables import CachedTables
from rowtune.tune.task import Progress, SearchResult, Task


@dataclass(frozen=True)
class Request:
    """What to search for. `budget` is bytes, or a fraction of plain's predicted peak as a float; `origin` is
    a plan file whose measurements are taken over, and then `trials` are new ones.
    `storage` is where other processes and machines work on the same study, `workers` of them here.
    `host_budget` is what plans may keep in the host's memory; None: half of what is free. `resort` are savers
    that plans may use as well where none fits without."""

    work: Workload
    budget: int | float
    out: Path
    trials: int = 40
    timeout: float = float("inf")
    seed: int = 0
    reserve: int = 0
    fresh: bool = False
    force: bool = False
    savers: frozenset[str] = DEFAULT
    origin: Path | None = None
    storage: str = ""
    workers: int = 1
    max_grad_error: float = 0.0
    host_budget: int | None = None
    resort: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """`path` is where the plan is: elsewhere than asked for where it could not be written there. `unwritten`
    says why trials are missing in the records' file. `resort` are the savers of the plan that were allowed
    because none fits without."""

    file: PlanFile
    result: SearchResult
    path: Path
    unwritten: str = ""
    resort: frozenset[str] = frozenset()


def records_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.records.jsonl")


def budget_bytes(request: Request) -> int:
    """The budget in bytes; UsageError where the reserve leaves nothing of it."""
    budget = request.budget
    size = int(budget * plain_peak(request.work)) if isinstance(budget, float) else budget
    if size <= request.reserve:
        raise UsageError(
            f"--reserve {format_bytes(request.reserve)} leaves nothing of the budget {format_bytes(size)}"
        )
    return size


def state_bytes(work: Workload, savers: frozenset[str] = frozenset()) -> int:
    """What no plan with these savers can change: parameters, buffers, their gradients (of one parameter at
    least) and the optimizer's state."""
    trained = [p.numel() * p.itemsize for p in work.module.parameters() if p.requires_grad]
    fixed = sum(t.numel() * t.itemsize for t in (*work.module.parameters(), *work.module.buffers()))
    gradients = max(trained) if "step_in_backward" in savers else sum(trained)
    own = [work.optimizer.state(tuple(p.shape), p.dtype) for p in work.module.parameters() if p.requires_grad]
    return fixed + gradients + (max(own) if "offload_state" in savers else sum(own))


def check_state(work: Workload, limit: int, savers: frozenset[str]) -> None:
    """InfeasibleError where there is no room for anything else."""
    size = state_bytes(work, savers)
    if size < limit:
        return
    more = [name for name in ("offload_state", "step_in_backward") if name not in savers]
    allow = f"allow --savers {','.join('+' + name for name in more)}, " if more else ""
    raise InfeasibleError(
        f"parameters, gradients and the optimizer's state ({work.problem.optimizer}) alone take "
        f"{format_bytes(size)} of the {format_bytes(limit)} that there are: no plan can change that; "
        f"{allow}give a larger --budget, an --optimizer with less state such as sgd:lr=0.01, or "
        "--dtype bfloat16"
    )


T = TypeVar("T")


def with_last_resort(
    request: Request, found: Callable[[Request], T], note: Callable[[str], None] = lambda _: None
) -> T:
    """What is found for a request; where no plan fits, with its last resort allowed. `note` is told. (State
    of few bits stays on the device.)

    Raises:
        InfeasibleError: no plan fits even then.
    """
    if request.work.optimizer.low_bit:
        stays = frozenset({"offload_state"})
        request = replace(request, savers=request.savers - stays, resort=request.resort - stays)
    more = request.resort - request.savers
    try:
        return found(request)
    except InfeasibleError as error:
        if not more:
            raise
        note(f"{str(error).partition(';')[0]}; trying with {', '.join(sorted(more))} as well")
    return found(replace(request, savers=request.savers | more, resort=frozenset()))


def study_identity(work: Workload) -> dict[str, Any]:
    """What must be equal for a measurement to be used again."""
    problem = work.problem
    return {
        "fingerprint": work.graph.fingerprint,
        "inputs": [str(spec) for spec in problem.inputs],
        "dtype": problem.dtype,
        "device": problem.device,
        "machine": device_name(problem.device),
        "loss": problem.loss,
        "optimizer": problem.optimizer,
        "torch": str(torch.__version__),
    }


def find(
    request: Request,
    progress: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> Found:
    """Search and write the plan; an existing one is replaced only by a finished one. `note` is told where
    nothing fits without the last resort.

    Raises:
        UsageError: the output belongs to something else.
        InfeasibleError: no plan fits.
    """
    found = with_last_resort(request, lambda asked: _find(asked, progress), note)
    return replace(found, resort=used(found.file.plan) & request.resort - request.savers)


def _find(request: Request, progress: Callable[[Progress], None]) -> Found:
    work, out = request.work, request.out
    check_capture(request.savers, work.problem.device)
    check_replaceable(out, work.graph.fingerprint, request.force)
    budget = budget_bytes(request)
    records = RecordFile(records_path(out), study_identity(work), fresh=request.fresh or _foreign(request))
    limit = budget - request.reserve
    check_state(work, limit, request.savers)
    origin = request.origin
    inherited = frozenset() if origin is None else inherit(origin, records, study_identity(work))
    request = replace(request, host_budget=host_bytes(request))
    shared = _shared(request, budget)
    helpers = Helpers(request, budget, request.workers - 1)
    with Worker(work.problem, limit) as worker, helpers:
        space = _space(request, worker)
        task = replace(
            _task(request, limit, worker, space, records, shared),
            inherited=inherited,
            progress=progress,
            started=helpers.start,
            ended=helpers.stop,
        )
        result = search(task)
        overhead = task.overhead()
    ratio = correction(result.records, overhead)
    points = joined(
        map(measured_point, result.front), predicted_points(space, overhead, ratio, pace(space, result.front))
    )
    file = _plan_file(request, budget, result, space.profile, points)
    path = keep(out, lambda path: save_plan(file, path), "the plan")
    return Found(file, result, path, records.unwritten)


def explored(request: Request) -> None:
    """Take part in a shared search until it has its trials; who began it does all the rest."""
    budget = budget_bytes(request)
    limit = budget - request.reserve
    with Worker(request.work.problem, limit) as worker:
        space, shared = _space(request, worker), _shared(request, budget)
        Search(_task(request, limit, worker, space, RecordFile(None, {}), shared)).explore()


def _space(request: Request, worker: Worker) -> ProgrammeSpace:
    work = request.work
    device = work.problem.device
    return ProgrammeSpace(
        work.graph,
        work.optimizer,
        calibration(device, worker.calibrate),
        request.savers,
        request.max_grad_error,
        CachedTables(device),
        host_bytes(request),
    )


def host_bytes(request: Request) -> int:
    """What a plan may keep in the host's memory."""
    return half_of_free(request.workers) if request.host_budget is None else request.host_budget


def _task(
    request: Request,
    limit: int,
    worker: Worker,
    space: ProgrammeSpace,
    records: RecordFile,
    shared: Shared | None,
) -> Task:
    cpu = request.work.problem.device == "cpu"
    return Task(
        space=space,
        predict=lambda plan: on_host(space.predict(plan), host_bytes(request)),
        measure=worker.measure,
        records=records,
        limit=limit,
        reserve=request.reserve,
        overhead=lambda: 0 if cpu else worker.overhead_bytes,
        race=worker.race,
        threads=(1,) if cpu and torch.get_num_threads() > 1 else (),
        trials=request.trials,
        timeout=request.timeout,
        seed=request.seed,
        may=lambda p: _may(request, space, p),
        shared=shared,
        tell=space.tell,
        least=space.least,
    )


def _may(request: Request, space: ProgrammeSpace, plan: Plan) -> bool:
    """Whether a plan that was measured for another search may win this one."""
    names = used(plan)
    if not names <= request.savers or plan.allowed_error > request.max_grad_error:
        return False
    return not names & ON_HOST or space.predict(plan).host_bytes <= host_bytes(request)


def _shared(request: Request, budget: int) -> Shared | None:
    """The study that others work on as well: the same network, trained alike, under the same budget."""
    if not request.storage:
        return None
    own = study_identity(request.work)
    kind = {"device": own.pop("device").partition(":")[0], "machine": own.pop("machine"),
            "torch": own.pop("torch")}  # fmt: skip
    what = json.dumps(
        [own, sorted(request.savers), request.max_grad_error, budget, request.reserve], sort_keys=True
    )
    short = hashlib.sha256(what.encode()).hexdigest()[:8]
    name = f"{request.work.problem.model} in {format_bytes(budget)}, {short}"
    return Shared(request.storage, name, kind)


def _foreign(request: Request) -> bool:
    """With --force, records of another study go the way of the plan they belong to."""
    path = records_path(request.out)
    if not (request.force and path.exists()):
        return False
    try:
        RecordFile(path, study_identity(request.work))
    except Exception:
        return True
    return False


def _plan_file(
    request: Request,
    budget: int,
    result: SearchResult,
    profile: Profile,
    points: tuple[dict[str, Any], ...],
) -> PlanFile:
    work, best, plain = request.work, result.best, result.plain
    assert best.decisions is not None
    cpu = work.problem.device == "cpu"
    plan = Plan.from_dict(dict(best.decisions))
    cost = predict(work.graph, plan, work.optimizer, profile)
    measured: dict[str, Any] = {k: v for k, v in asdict(best).items() if k in MEASURED}
    measured["plain_peak_bytes"] = plain.peak_bytes if plain else None
    measured["plain_step_seconds"] = plain.step_seconds if plain else None
    return replace(
        unmeasured(request, budget, plan, cost),
        measured=measured,
        front=points,
        study=records_path(request.out).name,
        threads=best.threads or (torch.get_num_threads() if cpu and request.workers > 1 else 0),
    )


def unmeasured(request: Request, budget: int, plan: Plan, cost: Cost) -> PlanFile:
    """A plan's file, as far as it is known without a step of it."""
    # A model's file in the plan's folder is named without the folder: the two can then move together.
    problem = request.work.problem
    model = Path(problem.model.text)
    if problem.model.kind in ("onnx", "pt2") and model.parent.resolve() == request.out.parent.resolve():
        problem = replace(problem, model=replace(problem.model, text=model.name))
    return PlanFile(
        problem=problem,
        fingerprint=request.work.graph.fingerprint,
        budget_bytes=budget,
        plan=plan,
        predicted={
            "peak_bytes": cost.peak_bytes,
            "host_bytes": cost.host_bytes,
            "activation_bytes": cost.activation_bytes,
            "seconds": cost.seconds,
            "peak_at": cost.peak_at,
        },
        measured={},
        reserve_bytes=request.reserve,
    )
