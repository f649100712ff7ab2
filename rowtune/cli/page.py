"""A report in the terminal: the same content as the HTML page's (rowtune/report/page.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from rowtune.cli.charts import Point, gauge, legend, scatter
from rowtune.cli.drawn import memory_chart, strip
from rowtune.cli.screen import BAD, GOOD, MARKS, SOFT, Screen, facts, plain_table
from rowtune.tune.savers import SAVERS
from rowtune.tune.sizes import format_both, format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from rowtune.report.page import Certificate, Curve, Page, Stretch
    from rowtune.report.page import Point as Tried

CHOSEN, PLAIN, TABLE_ROWS, WIDEST, NAMED = "★", "P", 12, 100, 6
GOALS = {"memory": "less memory", "time": "less time", "size": "larger inputs"}


def show_page(screen: Screen, page: Page) -> None:
    """Every section that has something to say."""
    out = screen.out
    out.print()
    out.print(Text.assemble((page.plan, "bold"), f"  {page.model}"))
    out.print(Text(page.verdict.text, f"bold {GOOD if page.verdict.fits else BAD}"))
    out.print()
    out.print(_facts(page))
    for title, section in SECTIONS:
        section(screen, page, title)


def heading(screen: Screen, title: str) -> None:
    screen.out.print()
    screen.out.print(Text(title, "bold"))


def _facts(page: Page) -> Table:
    v, measured = page.verdict, page.measured
    rows: list[tuple[str, str | Text]] = [
        ("inputs", ", ".join(page.inputs)),
        ("training", page.training),
        ("budget", format_both(v.budget_bytes)),
        ("peak", Text.assemble(gauge(v.peak_bytes, v.budget_bytes), f"  {format_both(v.peak_bytes)}")),
        ("step", format_seconds(v.step_seconds)),
    ]
    if v.plain_peak_bytes and v.plain_step_seconds and v.times_plain:
        plain = f"{format_bytes(v.plain_peak_bytes)}, {format_seconds(v.plain_step_seconds)} a step"
        share = v.peak_bytes / v.plain_peak_bytes
        rows.append(
            (
                "plain PyTorch",
                f"{plain}: the plan takes {share:.0%} of its memory, {v.times_plain:.2f}x its time",
            )
        )
    else:
        rows.append(("plain PyTorch", "does not fit on this machine"))
    if measured.get("allocator_peak_bytes"):
        rows.append(("with kernels", f"{format_bytes(measured['allocator_peak_bytes'])} allocator's peak"))
    if page.host_bytes:
        rows.append(("on the host", f"{format_bytes(page.host_bytes)} (predicted)"))
    if page.note:
        rows.append(("note", page.note))
    return facts(rows)


def _segments(screen: Screen, page: Page, title: str) -> None:
    heading(screen, title)
    screen.out.print(strip(page.segments, min(screen.out.width, WIDEST)))
    screen.out.print(segments_table(page.segments))


def segments_table(segments: Sequence[Stretch]) -> Table:
    """A line for each segment, those inside a checkpoint indented below it."""
    columns = [("from", "left"), ("to", "left"), ("policy", "left"), ("band", "right"), ("how", "left")]
    known = any(s.seconds is not None for s in segments)
    more = [("keeps", "right"), ("at most", "right"), ("time", "right")]
    table = plain_table(*columns, *(more if known else []))
    total = sum(s.seconds or 0.0 for s in segments) or 1.0
    for s in segments:
        cells: list[str | Text] = [
            Text("  " * s.depth + s.first),
            Text(s.last),
            Text(s.policy, MARKS[s.policy][1]),
            str(s.band_rows or ""),
            _how(s),
        ]
        if known:
            seconds = "" if s.seconds is None else f"~{format_seconds(s.seconds)} {s.seconds / total:>4.0%}"
            cells += [_size(s.kept_bytes), _size(s.peak_bytes), seconds]
        table.add_row(*cells)
    return table


def _size(size: int | None) -> str:
    return "" if size is None else format_bytes(size)


def _how(s: Stretch) -> str:
    """What a segment has beside its policy and band, where it is not the usual."""
    usual = {"tapes": "split", "barriers": "store"}
    words = [s.halo] if s.halo else []
    words += [
        f"{key} {getattr(s, key)}" for key, value in usual.items() if getattr(s, key) not in ("", value)
    ]
    words += [f"{s.images} images"] if s.images else []
    words += ["cheap recomputed"] if s.cheap == "recompute" else []
    words += [f"in {s.store}" if s.store != "host" else "kept on the host"] if s.store != "device" else []
    return ", ".join(words)


def _memory(screen: Screen, page: Page, title: str) -> None:
    if page.memory is None:
        return
    heading(screen, title)
    width = min(screen.out.width, WIDEST)
    screen.out.print(memory_chart(page.memory, page.verdict.limit_bytes, width))
    rows = [("at the plan's peak", _held(page.memory.plan)), ("at plain's peak", _held(page.memory.plain))]
    screen.out.print(facts(rows))


def _held(curve: Curve) -> str:
    names = []
    for h in curve.held[:NAMED]:
        count = f" (x{h.count})" if h.count > 1 and h.role == "activation" else ""
        names.append(f"{h.name}{count} {format_bytes(h.bytes)}")
    found = f": {', '.join(names)}" if names else ""
    return f"{format_bytes(curve.peak_bytes)} in the {curve.where}{found}"


def _savings(screen: Screen, page: Page, title: str) -> None:
    if not page.savings:
        return
    heading(screen, title)
    table = plain_table(("saver", "left"), ("", "right"), ("", "left"))
    for s in page.savings:
        table.add_row(s.name, format_bytes(s.bytes) if s.bytes > 0 else "nothing", Text(SAVERS[s.name], SOFT))
    screen.out.print(table)


def _scatter(screen: Screen, page: Page, title: str) -> None:
    points = scatter_points(page.trials)
    if not points:
        return
    heading(screen, title)
    screen.out.print(scatter(points, page.verdict.limit_bytes, min(screen.out.width, WIDEST)))
    screen.out.print(_legend(points))


def scatter_points(trials: Sequence[Tried]) -> list[Point]:
    """What is drawn later lies above: plain last but the chosen plan, the front before others."""
    found = []
    for t in trials:
        if t.status != "ok" or t.peak_bytes is None or t.step_seconds is None or t.chosen:
            continue
        mark, style = (PLAIN, BAD) if t.kind == "plain" else MARKS[t.kind]
        found.append(Point(t.peak_bytes, t.step_seconds, mark, f"{'bold' if t.best else 'dim'} {style}"))
    found.sort(key=lambda p: (p.mark == PLAIN, p.style.startswith("bold")))
    chosen = [t for t in trials if t.chosen and t.peak_bytes and t.step_seconds]
    return found + [Point(t.peak_bytes or 0, t.step_seconds or 0.0, CHOSEN, f"bold {GOOD}") for t in chosen]


def _legend(points: Sequence[Point]) -> Text:
    names = {PLAIN: "plain PyTorch", CHOSEN: "chosen"} | {mark: policy for policy, (mark, _) in MARKS.items()}
    seen = {p.mark: p.style for p in points}
    entries = [(mark, seen[mark].removeprefix("dim "), name) for mark, name in names.items() if mark in seen]
    text = legend([*entries, ("┊", BAD, "budget")])
    text.append("dim: another plan is both smaller and faster", SOFT)
    return text


def _trials(screen: Screen, page: Page, title: str) -> None:
    """What fits first, by time; then what does not, by peak."""
    plans = [t for t in page.trials if t.status == "ok"]
    plans.sort(key=lambda t: (not t.fits, t.step_seconds or 0.0))
    if not plans:
        return
    heading(screen, title)
    shown = plans if screen.verbose else plans[:TABLE_ROWS]
    table = plain_table(
        ("", "left"), ("plan", "left"), ("peak", "right"), ("predicted", "right"), ("step", "right"),
        ("", "left"),
    )  # fmt: skip
    for trial in shown:
        table.add_row(*_row(trial))
    screen.out.print(table)
    if len(shown) < len(plans):
        screen.out.print(f"... and {len(plans) - len(shown)} more (-v shows all)", style=SOFT)


def _row(t: Tried) -> list[str | Text]:
    mark, style = (CHOSEN, GOOD) if t.chosen else (PLAIN, BAD) if t.kind == "plain" else MARKS[t.kind]
    word = Text("chosen", GOOD) if t.chosen else Text("" if t.fits else "over budget", "yellow")
    return [
        Text(mark, style),
        Text(t.plan),
        format_bytes(t.peak_bytes),
        Text(format_bytes(t.predicted_bytes), SOFT),
        format_seconds(t.step_seconds),
        word,
    ]


def _knobs(screen: Screen, page: Page, title: str) -> None:
    """Those with an influence, and the fastest plan that fits for each of their values."""
    shown = [k for k in page.knobs if k.matters > 0 or screen.verbose]
    if not shown:
        return
    heading(screen, title)
    table = plain_table(
        ("knob", "left"), ("", "left"), ("", "right"), ("fastest that fits, by value", "left")
    )
    for k in shown:
        choices = sorted((c for c in k.choices if c.measured), key=lambda c: c.best_seconds or float("inf"))
        words = [f"{c.value} {format_seconds(c.best_seconds) if c.best_seconds else 'none'}" for c in choices]
        bar = Text("━" * round(16 * k.matters), "cyan")
        table.add_row(Text(k.name), bar, f"{k.matters:.0%}", Text(", ".join(words)))
    screen.out.print(table)


def _failures(screen: Screen, page: Page, title: str) -> None:
    if not page.failures:
        return
    heading(screen, title)
    table = plain_table(("", "right"), ("", "left"), ("why", "left"), ("for example", "left"))
    for f in page.failures if screen.verbose else page.failures[:6]:
        style = SOFT if f.status in ("slow", "rejected") else BAD
        table.add_row(str(f.count), Text(f.status, style), Text(f.reason), Text(f.example, SOFT))
    screen.out.print(table)


def _advice(screen: Screen, page: Page, title: str) -> None:
    if not page.advice:
        return
    heading(screen, title)
    for item in page.advice:
        screen.out.print(Text.assemble((f"{GOALS[item.goal]}: ", "cyan"), item.text))
        if item.command:
            screen.out.print(Text(f"    {item.command}", SOFT), soft_wrap=True)


def _certificate(screen: Screen, page: Page, title: str) -> None:
    heading(screen, title)
    screen.out.print(facts(certificate_rows(page.certificate)))


def certificate_rows(c: Certificate) -> list[tuple[str, str | Text]]:
    rows: list[tuple[str, str | Text]] = []
    if c.peak_bytes:
        text = f"{format_bytes(c.peak_bytes)} measured, {format_bytes(c.limit_bytes)} allowed"
        if c.predicted_peak_bytes:
            off = c.peak_bytes / c.predicted_peak_bytes - 1
            text += f"; {format_bytes(c.predicted_peak_bytes)} predicted ({off:+.1%})"
        rows.append(("peak", text))
    if c.gradient_error is not None:
        allowed = f" ({c.allowed_error:g} allowed)" if c.allowed_error else ""
        rows.append(("gradients", f"equal to plain PyTorch's within {c.gradient_error:.1e}{allowed}"))
    else:
        rows.append(("gradients", "not compared with plain PyTorch's"))
    if c.step_seconds and c.bound_seconds and c.over_bound is not None:
        text = f"{format_seconds(c.step_seconds)}, {c.over_bound:+.0%} from the fastest that the planner "
        rows.append(("time", text + f"predicts within the budget ({format_seconds(c.bound_seconds)})"))
    for i, text in enumerate(c.unexplored):
        rows.append(("unexplored" if i == 0 else "", text))
    return rows


SECTIONS: tuple[tuple[str, Callable[[Screen, Page, str], None]], ...] = (
    ("The plan along the network", _segments),
    ("Memory over the step", _memory),
    ("What each saver takes off the peak, the others in place (predicted)", _savings),
    ("Memory and time of every plan measured", _scatter),
    ("Plans tried, the fastest that fit first", _trials),
    ("Knobs that mattered (share of the spread of times)", _knobs),
    ("What was not measured, and why", _failures),
    ("What to try", _advice),
    ("Certificate", _certificate),
)
