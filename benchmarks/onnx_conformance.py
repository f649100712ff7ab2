"""The onnx package's node tests on every operator that the importer claims, as one command.

    python benchmarks/onnx_conformance.py

Writes benchmarks/results/onnx_conformance.json and docs/onnx.md. A test is counted at each operator in it;
`claimed` are the tests whose operators and element types the importer claims all of, `passed` those of them
that pass. The same cases run in tests/test_onnx_conformance.py.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import defs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from onnx_cases import PASSED, cases, claimed, operators, result, standing  # noqa: E402


@dataclass
class Tally:
    """Tests of one operator; `differ` counts claimed ones that do not pass, by reason."""

    standing: str
    all: int = 0
    claimed: int = 0
    passed: int = 0
    differ: dict[str, int] = field(default_factory=dict)

    def add(self, verdict: str) -> None:
        self.claimed += 1
        if verdict == PASSED:
            self.passed += 1
        else:
            self.differ[verdict] = self.differ.get(verdict, 0) + 1


def tallies() -> tuple[dict[str, Tally], Tally]:
    """By operator, and of all tests together."""
    names = sorted({s.name for s in defs.get_all_schemas() if s.domain == ""})
    found = {name: Tally(standing(name)) for name in names}
    total = Tally("")
    for case in cases():
        mine = [found[op] for op in operators(case) if op in found]
        expanded = [tally for tally in mine if tally.standing == "expanded"]
        verdict = result(case) if claimed(case) or expanded else None
        for tally in (*mine, total):
            tally.all += 1
            if verdict is not None and (claimed(case) or tally in expanded):
                tally.add(verdict)
    return found, total


def document(found: dict[str, Tally], total: Tally) -> str:
    table = {name: t for name, t in found.items() if t.standing == "claimed"}
    expanded = {name: t for name, t in found.items() if t.standing == "expanded"}
    left: dict[str, list[str]] = defaultdict(list)
    for name, tally in found.items():
        if tally.standing not in ("claimed", "expanded"):
            left[tally.standing].append(name)
    lines = [
        "# ONNX operators",
        "",
        "Written by `python benchmarks/onnx_conformance.py`; edit that, not this.",
        "",
        f"onnx {onnx.__version__} has {len(found)} operators in its main domain (opset "
        f"{defs.onnx_opset_version()}). The importer claims {len(table)} of them, expands {len(expanded)} "
        f"by ONNX's own definition and leaves out {sum(map(len, left.values()))}. Of the package's "
        f"{total.all} node tests {total.claimed} use nothing but claimed operators and types that torch has, "
        f"and {total.passed} of those pass ({100 * total.passed / total.claimed:.1f}%).",
        "",
        "## Claimed",
        "",
        "| operator | passed / claimed / all tests | where claimed tests differ |",
        "|---|---|---|",
    ]
    for name, tally in table.items():
        why = "; ".join(f"{reason} ({n})" for reason, n in tally.differ.items())
        lines.append(f"| {name} | {tally.passed} / {tally.claimed} / {tally.all} | {why} |")
    lines += [
        "",
        "## Expanded by ONNX's own definition",
        "",
        "Not promised, but done as far as the definition goes.",
        "",
        "| operator | passed / all tests |",
        "|---|---|",
        *(f"| {name} | {tally.passed} / {tally.all} |" for name, tally in expanded.items()),
        "",
        "## Left out",
        "",
    ]
    lines += ["| operators | why |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {why} |" for why, names in left.items()]
    return "\n".join([*lines, ""])


def main() -> None:
    torch.set_num_threads(1)
    found, total = tallies()
    data: dict[str, Any] = {
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "total": asdict(total),
        "operators": {name: asdict(tally) for name, tally in found.items()},
    }
    out = ROOT / "benchmarks" / "results" / "onnx_conformance.json"
    out.write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "docs" / "onnx.md").write_text(document(found, total))
    print(f"passed {total.passed}, claimed {total.claimed}, all {total.all}")
    for why, count in total.differ.items():
        print(f"{count:5} {why}")


if __name__ == "__main__":
    main()
