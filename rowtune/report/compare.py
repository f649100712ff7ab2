"""Two reports side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rowtune.report.page import Page
from rowtune.tune.sizes import format_bytes, format_seconds


@dataclass(frozen=True)
class Row:
    """One figure of both. `better`: which of them has less of it, where that is better."""

    name: str
    one: str
    other: str
    better: Literal["one", "other", ""] = ""


@dataclass(frozen=True)
class Comparison:
    """`note` says why two reports may not be comparable: other models, inputs, devices."""

    one: Page
    other: Page
    rows: tuple[Row, ...]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the first report, with the other under `compare`."""
        return {
            **self.one.to_dict(),
            "compare": {
                "other": self.other.to_dict(),
                "rows": [asdict(row) for row in self.rows],
                "note": self.note,
            },
        }


def compared(one: Page, other: Page) -> Comparison:
    """Figures side by side, and where the two were made for different things."""
    a, b = one.verdict, other.verdict
    c, d = one.certificate, other.certificate
    rows = (
        Row("model", one.model, other.model),
        Row("inputs", ", ".join(one.inputs), ", ".join(other.inputs)),
        Row("budget", format_bytes(a.budget_bytes), format_bytes(b.budget_bytes)),
        _least("peak", a.peak_bytes or None, b.peak_bytes or None, format_bytes),
        _least("step", a.step_seconds, b.step_seconds, format_seconds),
        _least("of plain's time", a.times_plain, b.times_plain, _times),
        Row("plain's peak", format_bytes(a.plain_peak_bytes), format_bytes(b.plain_peak_bytes)),
        Row("gradient error", _error(c.gradient_error), _error(d.gradient_error)),
        Row("plans measured", str(c.measured_plans), str(d.measured_plans)),
        Row("plan", one.words, other.words),
    )
    pairs = (
        ("models", one.model, other.model),
        ("inputs", one.inputs, other.inputs),
        ("training", one.training, other.training),
        ("versions of torch", one.versions.get("torch"), other.versions.get("torch")),
    )
    different = [name for name, x, y in pairs if x != y]
    note = f"not of the same thing: made for different {', '.join(different)}" if different else ""
    return Comparison(one, other, rows, note)


def _least(name: str, one: float | None, other: float | None, shown: Callable[[float | None], str]) -> Row:
    better: Literal["one", "other", ""] = ""
    if one is not None and other is not None and one != other:
        better = "one" if one < other else "other"
    return Row(name, shown(one), shown(other), better)


def _times(times: float | None) -> str:
    return "-" if times is None else f"{times:.2f}x"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
