"""Write the page of the Python API from the docstrings.

python docs/api.py > docs/api.md
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import rowtune
from rowtune import zoo
from rowtune.cost.predict import Cost
from rowtune.errors import RowtuneError
from rowtune.graph.losses import LOSSES
from rowtune.runtime.module import RowtuneModule

# In the order in which they are met, with what each part is for.
PARTS: dict[str, tuple[Any, ...]] = {
    "Find a plan, train by it": (rowtune.search, rowtune.load, rowtune.apply, RowtuneModule.forward),
    "Step by step": (rowtune.trace, rowtune.uniform_plan, rowtune.predict, Cost, rowtune.lower),
    "Plans": (rowtune.Plan, rowtune.Segment, rowtune.PlanFile),
    "While training": (
        rowtune.capture,
        rowtune.keep_freed_memory,
        rowtune.step_in_backward,
        rowtune.step_from_host,
    ),
}
INTRODUCTION = """\
# The Python API

Written by `python docs/api.py` from the docstrings; a test compares. [python.md](python.md) says how these go
together in a loop of one's own. `import rowtune` loads no torch; a name does when it is first used.
"""
OWN_LOSS = """\
Any function (output, target) -> scalar will do as well. One with `row_local = True` that returns a map (each
row of it from the same rows of output and target) can be computed in bands: its loss is the map's mean.
"""


def main() -> None:
    sys.stdout.write(page())


def page() -> str:
    parts = [INTRODUCTION]
    for title, things in PARTS.items():
        parts += [f"## {title}\n", *map(entry, things)]
    return "\n".join([*parts, *_losses(), *_zoo(), *_errors()])


def entry(thing: Any) -> str:
    """A heading, how it is called, and its docstring."""
    name = thing.__qualname__ if thing.__module__ == RowtuneModule.__module__ else thing.__name__
    shown = (
        name if name.startswith("RowtuneModule") else f"rowtune.{name}" if name in rowtune.__all__ else name
    )
    if is_dataclass(thing):
        fields = [f"    {n}: {t}" for n, t in thing.__annotations__.items()]
        code = "\n".join([f"class {name}:", *fields])
    else:
        code = called(shown, thing)
    return f"### `{shown}`\n\n```python\n{code}\n```\n\n{text(thing)}\n"


def called(name: str, function: Callable[..., Any]) -> str:
    """A signature, over several lines where it is long."""
    found = inspect.signature(function)
    words: list[str] = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words and not _starred(words):
            words.append("*")
        if parameter.name != "self":
            words.append(_parameter(parameter))
    whole = f"{name}({', '.join(words)}) -> {found.return_annotation}"
    if len(whole) <= 100:
        return whole
    lines = "".join(f"    {word},\n" for word in words)
    return f"{name}(\n{lines}) -> {found.return_annotation}"


def _starred(words: list[str]) -> bool:
    return any(word.startswith("*") for word in words)


def _parameter(p: inspect.Parameter) -> str:
    sign = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    default = "" if p.default is p.empty else " = ..." if callable(p.default) else f" = {p.default!r}"
    return f"{sign}{p.name}: {p.annotation}{default}"


def text(thing: Any) -> str:
    """A docstring as Markdown: `Args:` and `Raises:` as lists, columns of fields as they stand."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    made: list[str] = []
    section, columns = "", False
    for line in lines:
        if line in ("Args:", "Raises:"):
            section = line
            made.append(f"**{'Arguments' if line == 'Args:' else 'Raises'}**\n")
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, _, rest = line.strip().partition(": ")
            made.append(f"- `{name}`: {rest}" if rest else f"- {name}")
        elif section:
            made.append(f"  {line.strip()}" if line.strip() else "")
        else:
            column = bool(line) and (line.startswith("    ") or "   " in line)
            if column != columns and (column or not line):
                made.append("```text" if column else "```")
                columns = column
            made.append(line)
    return "\n".join([*made, "```"] if columns else made)


def _losses() -> Iterator[str]:
    yield "## Losses\n"
    yield "By name for `loss=` and `--loss`, options as in `cross_entropy:ignore_index=255`:\n"
    yield "| name | options | what |\n|---|---|---|"
    for name, make in LOSSES.items():
        options = ", ".join(f"`{p}`" for p in inspect.signature(make).parameters)
        yield f"| `{name}` | {options} | {_first(make)} |"
    yield ""
    yield OWN_LOSS


def _zoo() -> Iterator[str]:
    yield "## Networks to try\n"
    yield "`rowtune.zoo.NAME(...)` in Python, `zoo:NAME` on the command line:\n"
    yield "| name | arguments |\n|---|---|"
    for name, make in zoo.ZOO.items():
        options = ", ".join(f"`{p.name}={p.default!r}`" for p in inspect.signature(make).parameters.values())
        yield f"| `{name}` | {options} |"
    yield ""


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "All derive from `rowtune.errors.RowtuneError`; `exit_code` is the command line's.\n"
    yield "| error | exit code | when |\n|---|---|---|"
    for kind in _below(RowtuneError):
        yield f"| `{kind.__name__}` | {kind.exit_code} | {_first(kind)} |"
    yield ""


def _below(kind: type[RowtuneError]) -> Iterator[type[RowtuneError]]:
    for each in sorted(kind.__subclasses__(), key=lambda k: (k.exit_code, k.__name__)):
        if each.__module__ == RowtuneError.__module__:
            yield each
            yield from _below(each)


def _first(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((thing.__doc__ or "").split("\n\n")[0].split()).replace("|", "/")


if __name__ == "__main__":
    main()
