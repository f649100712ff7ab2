"""Every error a user can cause, and the exit code the command line gives it.

    RowtuneError            1
    ├── UsageError          2   a flag, a file name, a budget
    ├── ModelError          3   a model that cannot be imported or trained
    ├── InfeasibleError     4   no plan fits the budget
    ├── PlanError           5   a plan that is unreadable, or made for something else
    ├── DivergedError       6   a loss that is not a number any more
    ├── EnginesDifferError  7   recorded calls and the schedule that made them do not agree: a fault of ours
    ├── RanksError          8   one of several processes lost another
    └── GradientError       9   stores that round cost more than the plan allows

A message states the rule, the actual value and the way out, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RowtuneError(Exception):
    """Base of all errors that are the input's fault and not rowtune's."""

    exit_code = 1


class UsageError(RowtuneError):
    """A flag, path or size that makes no sense."""

    exit_code = 2


class ModelError(RowtuneError):
    """A model that cannot be imported, or cannot be trained."""

    exit_code = 3


class InfeasibleError(RowtuneError):
    """No plan fits the budget; the message names the smallest budget that would do."""

    exit_code = 4


class PlanError(RowtuneError):
    """A plan that is unreadable, of another schema, or made for another model or device."""

    exit_code = 5


class DivergedError(RowtuneError):
    """Training whose loss became infinite or not a number."""

    exit_code = 6


class EnginesDifferError(RowtuneError):
    """`run --verify-every`: the calls that were recorded, and the schedule that made them, do not agree."""

    exit_code = 7


class RanksError(RowtuneError):
    """One of several processes that train together lost another."""

    exit_code = 8


class GradientError(RowtuneError):
    """`run --check-error-every`: gradients are off by more than the plan allows; no exact one is there."""

    exit_code = 9


def meant(word: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown word: "; did you mean 'search'?", or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
