"""Write the table of operators that rowtune can compute in bands, from the rules themselves.

python docs/operators.py > docs/operators.md

Which ONNX operators lead to which rule is found by importing the onnx package's own one-node models and
looking at what they become.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rowtune.errors import RowtuneError
from rowtune.graph.rules import RULES
from rowtune.graph.rules.pointwise import is_pointwise
from rowtune.importers.onnx_file import from_proto
from rowtune.importers.onnx_ops import OPERATORS
from rowtune.importers.trace import trace

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import onnx_cases as conformance

# Module of the rule -> what its family does, in the page's order; families not named here come last.
FAMILIES = {
    "pointwise": "Pointwise: output row i reads input row i",
    "reduce": "Reductions: accumulated over bands, and what reads them finished",
    "window": "Window: a stencil of rows, padded at the real border only",
    "resample": "Resampling: source rows by absolute index",
    "shape": "Moved: rows keep their contents, perhaps under another number",
    "select": "Other axes: entries of other axes are picked, repeated or summed up",
    "contract": "Products: sums over other axes than the band's",
    "patches": "Patches: a stencil of rows, one output row for every patch",
}
WITHOUT = "no row rule"
BY_TAG = "pointwise"
# Models looked at for each ONNX operator, spread over all of them: Resize alone has fifty.
SAMPLES = 6

INTRODUCTION = """\
# Operators

Written by `python docs/operators.py`; a test compares. Operators are named as in PyTorch's aten; ".0" is the
first of several outputs. An operator in these tables can be computed a band of rows at a time wherever its
rule allows (a softmax over the rows themselves, say, does not: then the rule gives the reason, which
`rowtune inspect` shows). One that has no rule is computed whole, as PyTorch does, and bounds the stretches
around it; one that reads no image at all (arithmetic on weights) is computed once for all bands.

The last column names the ONNX operators that become these, found by importing the onnx package's own
one-node models. Exact means: the same gradients, in float64 to 1e-10 (tests/test_exact_*.py,
tests/test_coverage.py).
"""


def main() -> None:
    sys.stdout.write(page())


def page() -> str:
    onnx = _onnx()
    parts = [INTRODUCTION]
    families = dict.fromkeys([*FAMILIES, *(_family(op) for op in RULES)])
    for family in families:
        rows = list(_rows(family, onnx))
        if family == "pointwise":
            tagged = _join(onnx.get(BY_TAG, ()))
            rows.append(f"| every operator that PyTorch tags as pointwise | as it stands | {tagged} |")
        parts.append(_table(FAMILIES.get(family, family.capitalize()), rows))
    parts.append(_rest(onnx))
    return "\n".join(parts)


def _table(title: str, rows: Iterable[str]) -> str:
    head = ["| operators | what the rule covers | ONNX |", "|---|---|---|"]
    return "\n".join([f"## {title}", "", *head, *rows, ""])


def _family(op: str) -> str:
    return RULES[op].__module__.rsplit(".", 1)[-1]


def _rows(family: str, onnx: dict[str, set[str]]) -> Iterator[str]:
    """One row for each rule, with all the operators that share it."""
    together: dict[str, list[str]] = {}
    for op in RULES:
        if _family(op) == family:
            together.setdefault(_meaning(op), []).append(op)
    for meaning, ops in together.items():
        names = ", ".join(f"`{op}`" for op in ops)
        yield f"| {names} | {meaning} | {_join(set().union(*(onnx.get(op, set()) for op in ops)))} |"


def _meaning(op: str) -> str:
    """The first sentence of the rule's docstring."""
    text = " ".join((RULES[op].__doc__ or "").split())
    first, stop, _ = text.partition(". ")
    return (first + stop).strip().removesuffix(".").replace("|", "/")


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(n for n in names if "." not in n))


def _onnx() -> dict[str, set[str]]:
    """aten operator (or BY_TAG, or "no row rule: ...") -> the ONNX operators that become it."""
    found: dict[str, set[str]] = {}
    for name, models in sorted(_models().items()):
        step = -(-len(models) // SAMPLES)
        for op in set().union(*(_becomes(case) for case in models[::step])):
            found.setdefault(op, set()).add(name)
    return found


def _models() -> dict[str, list[Any]]:
    """ONNX's one-node models of the operators that the importer claims, in the order of their names."""
    models: dict[str, list[Any]] = {}
    for case in sorted(conformance.cases(), key=lambda case: str(case.name)):
        names = conformance.operators(case)
        if len(names) == 1 and conformance.claimed(case):
            models.setdefault(next(iter(names)), []).append(case)
    return models


def _becomes(case: Any) -> Iterator[str]:
    opset = next(o.version for o in case.model.opset_import if o.domain == "")
    try:
        model, data = conformance.stored(case, case.data_sets[0][0])
        graph = trace(from_proto(model, opset).module, tuple(conformance.tensor(v) for v in data))
    except (RowtuneError, RuntimeError, TypeError, AssertionError):
        return  # one of those that differ for a known reason, or nothing is left to compute
    data = set(graph.inputs)
    for node in graph.nodes:
        if not data & set(node.inputs):
            continue  # a constant
        data.add(node.name)
        if node.op in RULES:
            yield node.op
        elif isinstance(node.target, torch._ops.OpOverload) and is_pointwise(node.target):
            yield BY_TAG
        else:
            yield f"{WITHOUT}: {node.op}"


def _rest(onnx: dict[str, set[str]]) -> str:
    """Operators that are never banded, and ONNX operators that leave no operator behind."""
    named = set().union(*onnx.values())
    lines = ["## Without a rule", ""]
    for key in sorted(k for k in onnx if k.startswith(WITHOUT)):
        lines.append(f"- `{key.split(': ')[1]}` (ONNX {_join(onnx[key])})")
    silent = _join(set(OPERATORS) - named)
    lines += [
        "",
        f"Imported, but gone or folded before anything is computed in ONNX's own models: {silent}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
