"""A plan from prediction alone: no step is run, and the device need not be here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rowtune.cost.profile import Profile
from rowtune.errors import InfeasibleError
from rowtune.plan.file import PlanFile, save_plan
from rowtune.tune.find import Request, budget_bytes, check_state, host_bytes, unmeasured, with_last_resort
from rowtune.tune.front import joined, predicted_points
from rowtune.tune.host import on_host
from rowtune.tune.infeasible import round_up
from rowtune.tune.output import check_replaceable, keep
from rowtune.tune.savers import check_capture
from rowtune.tune.sizes import format_bytes
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.tables import CachedTables
from rowtune.tune.task import Situation


def foresee(
    request: Request, profile: Profile, note: Callable[[str], None] = lambda _: None
) -> tuple[PlanFile, str]:
    """The programme's plan for the budget, and its front, with times of a profile; written to the request's
    place, or elsewhere where that fails: returns the file and where it is.

    Peaks are those of tensors. What a card takes beside them (its context, the allocator's reserve) is not
    known without it: give a reserve for it. `note` is told where nothing fits without the last resort.

    Raises:
        UsageError: the output belongs to something else.
        InfeasibleError: no plan fits; says which budget would do.
    """
    return with_last_resort(request, lambda asked: _foreseen(asked, profile), note)


def _foreseen(request: Request, profile: Profile) -> tuple[PlanFile, str]:
    work, budget = request.work, budget_bytes(request)
    # Its kernels, not those of the device at hand.
    work = replace(work, graph=replace(work.graph, device=profile.kind.partition(":")[0]))
    limit = budget - request.reserve
    check_replaceable(request.out, work.graph.fingerprint, request.force)
    check_capture(request.savers, work.graph.device)
    check_state(work, limit, request.savers)
    space = ProgrammeSpace(
        work.graph,
        work.optimizer,
        lambda work, seconds: profile,
        request.savers,
        request.max_grad_error,
        CachedTables(work.problem.device),
        host_bytes(request),
    )
    space.tell(Situation(limit, None, (), request.timeout))
    guess = {knob.name: knob.choices[0] for knob in space.knobs}
    plan = space.plan(guess)
    cost = on_host(space.predict(plan), host_bytes(request))
    if cost.peak_bytes > limit:
        raise InfeasibleError(
            f"no plan fits {format_bytes(limit)}: the smallest is predicted to need "
            f"{format_bytes(cost.peak_bytes)}, set by {cost.peak_at}; give --budget "
            f"{round_up(cost.peak_bytes + request.reserve)} or a smaller --shape"
        )
    points = joined((), predicted_points(space, more=[plan]))
    name = profile.device + (f", {profile.threads} threads" if profile.threads else "")
    file = replace(unmeasured(request, budget, plan, cost), front=points, predicted_for=name)
    path = keep(request.out, lambda path: save_plan(file, path), "the plan")
    return file, str(path)
