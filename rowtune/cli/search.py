"""`rowtune search`: find the fastest exact plan that fits a budget, by measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rowtune.cli import options
from rowtune.cli import search_flags as flags
from rowtune.cli.screen import Screen, facts
from rowtune.cli.search_display import SearchDisplay
from rowtune.errors import UsageError

if TYPE_CHECKING:
    from rowtune.cost.profile import Profile
    from rowtune.tune.find import Found, Request
    from rowtune.tune.step import Workload

INTERRUPTED = 130
# A step that had the processor for less than this share of its time waited for others.
BUSY = 0.8


def command(
    *,
    model: options.OptionalModel = "",
    budget: options.Budget,
    shape: options.Shapes = None,
    model_arg: options.ModelArgs = None,
    dtype: options.Dtype = "",
    device: options.Device = "auto",
    loss: options.LossName = "",
    optimizer: options.OptimizerName = "",
    savers: options.Savers = "",
    max_grad_error: options.MaxGradError = 0.0,
    reserve: options.Reserve = "",
    host_budget: options.HostBudget = "",
    origin: flags.From = None,
    predict_only: flags.PredictOnly = False,
    device_profile: options.DeviceProfile = "",
    storage: flags.Storage = "",
    workers: flags.Workers = 1,
    trials: flags.Trials = 40,
    timeout: flags.Timeout = 0.0,
    out: flags.Out = Path("plan.json"),
    fresh: flags.Fresh = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Find the fastest exact plan that fits a budget, by measuring.

    Trials are kept beside the plan: the same command again goes on where it stopped, with another budget too.
    """
    screen = Screen(as_json, quiet, verbose)
    wanted = Wanted(
        budget, reserve, savers, max_grad_error, trials, timeout, out, fresh, force, origin, storage, workers,
        seed, host_budget,
    )  # fmt: skip
    made = wanted.checked(device_profile, predict_only)
    profile = _profile(device_profile, device) if predict_only else None
    given = Given(model, shape or (), model_arg or (), dtype, device, loss, optimizer, seed)
    request = made(given.of_plan(screen, origin) if origin and not model else given.define(screen, profile))
    if profile is not None:
        screen.json(foreseen_shown(screen, request, profile))
        return 0
    found = find_shown(screen, request, default_loss=not loss, default_optimizer=not optimizer)
    screen.json(as_dict(found, found.path))
    return INTERRUPTED if found.result.interrupted else 0


class Wanted(NamedTuple):
    """What the command line says of the search."""

    budget: str
    reserve: str
    savers: str
    max_grad_error: float
    trials: int
    timeout: float
    out: Path
    fresh: bool
    force: bool
    origin: Path | None
    storage: str
    workers: int
    seed: int
    host_budget: str

    def checked(self, device_profile: str, predict_only: bool) -> Callable[[Workload], Request]:
        """The request, once there is a workload; what makes no sense is said before a model is opened."""
        from rowtune.tune.find import Request, records_path
        from rowtune.tune.output import check_writable
        from rowtune.tune.savers import last_resort, parse, with_error
        from rowtune.tune.sizes import parse_budget, parse_size

        size = parse_budget(self.budget)
        allowed = with_error(parse(self.savers), self.max_grad_error)
        kept = parse_size(self.reserve, "--reserve") if self.reserve else 0
        host = parse_size(self.host_budget, "--host-budget") if self.host_budget else None
        if self.trials < 1 and self.origin is None:
            raise UsageError(
                f"--trials {self.trials}: nothing was measured before; --from a plan it may be 0"
            )
        if device_profile and not predict_only:
            raise UsageError("--device-profile is for --predict-only: a search times calls where it runs")
        check_writable(self.out)
        if not predict_only:
            check_writable(records_path(self.out))

        def request(work: Workload) -> Request:
            limit = self.timeout or float("inf")
            storage = _storage(self.storage, self.workers, self.out, self.fresh, work.problem.device)
            return Request(
                work, size, self.out, self.trials, limit, self.seed, kept, self.fresh, self.force,
                allowed, self.origin, storage, self.workers, self.max_grad_error, host,
                last_resort(self.savers),
            )  # fmt: skip

        return request


def _storage(url: str, workers: int, out: Path, fresh: bool, device: str) -> str:
    """Where the study is shared: a journal beside the plan, where its workers are all here; a password is
    not for the command line's history: libpq's own PGPASSWORD and ~/.pgpass do."""
    from rowtune.tune.helpers import most, share_threads
    from rowtune.tune.shared import journal_beside

    if workers > max(most(device), 1):
        raise UsageError(f"--workers {workers}: there are {most(device)} to measure on, a worker each")
    if workers > 1 and device == "cpu":
        share_threads(workers)
    if workers == 1 or url:
        return url
    if fresh:
        journal_beside(out).unlink(missing_ok=True)
    return f"journal:{journal_beside(out)}"


class Given(NamedTuple):
    """What the command line says of the network and how it is trained."""

    model: str
    shapes: Sequence[str]
    arguments: Sequence[str]
    dtype: str
    device: str
    loss: str
    optimizer: str
    seed: int

    def define(self, screen: Screen, profile: Profile | None) -> Workload:
        """The workload; without a measurement its device need not be here."""
        from rowtune.importers.source import parse_source
        from rowtune.tune.device import resolve_device
        from rowtune.tune.step import define

        if not self.model:
            raise UsageError("give a MODEL, or --from a plan for one")
        away = profile is not None and self.device == "auto"
        here = profile.kind if away and profile is not None else resolve_device(self.device)
        source = parse_source(self.model, self.arguments)
        screen.opening(source)
        return define(
            source, self.shapes, dtype=self.dtype, device=here, loss=self.loss, optimizer=self.optimizer,
            seed=self.seed,
        )  # fmt: skip

    def of_plan(self, screen: Screen, plan: Path) -> Workload:
        """The workload of a plan's file."""
        from rowtune.cli.run import read_plan
        from rowtune.train.opened import open_plan

        changed = {"--shape": self.shapes, "--model-arg": self.arguments, "--dtype": self.dtype,
                   "--loss": self.loss, "--optimizer": self.optimizer}  # fmt: skip
        for flag in (flag for flag, value in changed.items() if value):
            raise UsageError(f"{flag} with --from {plan} but without a MODEL: the plan says that already")
        file = read_plan(plan)
        screen.opening(file.problem.model)
        return open_plan(file, self.device)[0]


def _profile(name: str, device: str) -> Profile:
    """The named profile, or that of the device which is here."""
    from rowtune.cost.profile import Profile
    from rowtune.tune.device import resolve_device
    from rowtune.tune.profiles import chosen, known

    return chosen(name) if name else known(resolve_device(device)) or Profile()


def foreseen_shown(screen: Screen, request: Request, profile: Profile) -> dict[str, Any]:
    """Plan without measuring, and say what is predicted; the JSON of --predict-only."""
    from rowtune.tune.foresee import foresee
    from rowtune.tune.savers import used
    from rowtune.tune.sizes import format_bytes, format_of, format_seconds

    screen.notes(note for note in request.work.loaded.notes)
    with screen.err.status("predicting ..."):
        file, path = foresee(request, profile, screen.note)
    p, budget = file.predicted, file.budget_bytes
    share = p["peak_bytes"] / budget
    rows = [
        ("plan", f"{path} (predicted only: nothing of it was measured)"),
        ("peak", f"{format_of(p['peak_bytes'], budget)}, {share:.0%}"),
        ("step", f"~{format_seconds(p['seconds'])} on {file.predicted_for}"),
        ("savers", ", ".join(sorted(used(file.plan))) or "none"),
        ("front", f"{len(file.front)} plans, from {format_bytes(file.front[0]['peak_bytes'])} up"),
    ]
    screen.out.print(facts(rows))
    screen.note(f"next: rowtune search --from {path} measures it where it is to run; rowtune run {path}")
    return {
        "status": "ok", "plan": path, "predicted_for": file.predicted_for, "budget_bytes": budget,
        "predicted_peak_bytes": p["peak_bytes"], "predicted_step_seconds": p["seconds"],
        "loss": file.problem.loss, "optimizer": file.problem.optimizer,
        "front": [{k: m[k] for k in ("peak_bytes", "step_seconds")} for m in file.front],
    }  # fmt: skip


def find_shown(screen: Screen, request: Request, *, default_loss: bool, default_optimizer: bool) -> Found:
    """Search with a live display, then say what was found."""
    from rowtune.importers.source import PT2_WARNING
    from rowtune.tune.find import budget_bytes, find
    from rowtune.tune.study import Interrupted

    problem = request.work.problem
    screen.notes(note for note in request.work.loaded.notes if note != PT2_WARNING)
    budget = budget_bytes(request)
    screen.err.print(
        facts(
            [
                ("model", f"{problem.model}  {', '.join(map(str, problem.inputs))}"),
                ("device", problem.device),
                ("loss", problem.loss + (" (default)" if default_loss else "")),
                ("optimizer", problem.optimizer + (" (default)" if default_optimizer else "")),
                ("state", _state(request, budget - request.reserve)),
            ]
        )
    )
    try:
        with SearchDisplay(screen, budget - request.reserve) as display:
            found = find(request, display.update, screen.note)
    except Interrupted:
        raise KeyboardInterrupt from None
    _say(screen, found)
    if found.unwritten:
        screen.note(f"some trials are not in the records ({found.unwritten})")
    if found.path != request.out:
        screen.note(f"{request.out} could not be written; the plan is in {found.path}")
    return found


def _state(request: Request, limit: int) -> str:
    from rowtune.tune.find import check_state, state_bytes
    from rowtune.tune.sizes import format_bytes

    check_state(request.work, limit, request.savers | request.resort)
    size = state_bytes(request.work)
    return f"{format_bytes(size)} of parameters, gradients, optimizer: {size / limit:.0%} of the budget"


def _say(screen: Screen, found: Found) -> None:
    from rowtune.tune.savers import used
    from rowtune.tune.sizes import format_bytes, format_of, format_seconds

    m, budget, out = found.file.measured, found.file.budget_bytes, found.path
    lines = [
        (
            "plan",
            f"{out}" + (" (best so far: the search was interrupted)" if found.result.interrupted else ""),
        ),
        (
            "peak",
            f"{format_of(m['peak_bytes'], budget)}, {m['peak_bytes'] / budget:.0%}",
        ),
        ("step", format_seconds(m["step_seconds"])),
    ]
    if m["plain_peak_bytes"]:
        time, peak = m["step_seconds"] / m["plain_step_seconds"], m["peak_bytes"] / m["plain_peak_bytes"]
        plain = f"{format_bytes(m['plain_peak_bytes'])}, {format_seconds(m['plain_step_seconds'])} a step"
        lines.append(("plain", f"{plain}: the plan takes {peak:.0%} of the memory and {time:.2f}x the time"))
    else:
        lines.append(("plain", "does not fit on this machine"))
    if m["max_relative_error"] is not None:
        allowed = found.file.plan.allowed_error
        more = f", where {allowed:g} is allowed" if allowed else ""
        lines.append(("gradients", f"equal to plain's within {m['max_relative_error']:.1e}{more}"))
    lines.append(("savers", ", ".join(sorted(used(found.file.plan))) or "none"))
    if found.file.threads:
        lines.append(("threads", f"{found.file.threads}: faster than torch's own number"))
    screen.out.print(facts(lines))
    worked = m.get("cpu_seconds")
    if found.file.problem.device == "cpu" and worked is not None and worked < BUSY * m["step_seconds"]:
        screen.note(
            f"the machine was busy: of a step's {format_seconds(m['step_seconds'])} this process worked "
            f"{format_seconds(worked)}; times and the choice between plans may be off"
        )
    if found.resort:
        screen.note(_resorted(found))
    screen.note(f"next: rowtune run {out}   rowtune report {out}")


def _resorted(found: Found) -> str:
    """Why the plan uses what is a last resort, and what that means."""
    from rowtune.tune.sizes import format_bytes

    text = f"nothing fits without a last resort: the plan uses {', '.join(sorted(found.resort))}"
    if host := found.file.predicted["host_bytes"]:
        text += f"; the plan keeps {format_bytes(host)} in the host's memory"
    if "step_in_backward" in found.resort:
        text += "; it trains without clipping or accumulation of gradients"
    return text


def as_dict(found: Found, out: Path) -> dict[str, Any]:
    """The JSON of search."""
    from rowtune.tune.savers import used

    m = found.file.measured
    records = found.result.records
    return {
        "status": "interrupted" if found.result.interrupted else "ok",
        "plan": str(out),
        "peak_bytes": m["peak_bytes"],
        "step_seconds": m["step_seconds"],
        "plain_peak_bytes": m["plain_peak_bytes"],
        "plain_step_seconds": m["plain_step_seconds"],
        "trials": found.result.measured,
        "rejected": sum(r.status == "rejected" for r in records),
        "slow": sum(r.status == "slow" for r in records),
        "failed": sum(r.status not in ("ok", "slow", "rejected") for r in records),
        "budget_bytes": found.file.budget_bytes,
        "predicted_peak_bytes": found.file.predicted["peak_bytes"],
        "activation_bytes": m["activation_bytes"],
        "allocator_peak_bytes": m["allocator_peak_bytes"],
        "max_relative_error": m["max_relative_error"],
        "savers": sorted(used(found.file.plan)),
        "last_resort": sorted(found.resort),
        "host_bytes": found.file.predicted["host_bytes"],
        "loss": found.file.problem.loss,
        "optimizer": found.file.problem.optimizer,
    }
