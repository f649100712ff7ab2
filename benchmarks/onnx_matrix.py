"""Zoo networks through every way of exporting them to ONNX, imported and compared with what they were.

    python benchmarks/onnx_matrix.py                     all cells: ten minutes
    python benchmarks/onnx_matrix.py unet edsr           some networks, shown and not written

What a cell must show is said in tests/onnx_cells.py. A cell that fails is recorded with its reason. Writes
benchmarks/results/onnx_matrix.json and docs/onnx_matrix.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import onnx
import onnxruntime
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from onnx_cells import NETS, WAYS, Cell, Way, examine  # noqa: E402


def shown(cell: Cell) -> str:
    line = f"{cell.network:20}{cell.way:24}"
    if cell.failed:
        return f"{line}FAILED at {cell.failed}: {cell.why}"
    numbers = f"runtime {cell.runtime_error:.0e}  gradients {cell.error:.0e} ({cell.precision})"
    bands = f"banded {cell.banded:.2f}/{cell.banded_original:.2f}"
    return f"{line}{numbers}  {cell.compared} of {cell.parameters}  {bands}"


def word(cell: Cell) -> str:
    return f"**{cell.failed}**" if cell.failed else cell.precision


def document(cells: list[Cell]) -> str:
    at = {(cell.network, cell.way): cell for cell in cells}
    ways = [str(way) for way in WAYS]
    passed = sum(not cell.failed for cell in cells)
    lines = [
        "# Networks through ONNX",
        "",
        "Written by `python benchmarks/onnx_matrix.py`; edit that, not this.",
        "",
        f"{passed} of {len(cells)} cells pass: the file imports, gives what onnxruntime gives in eval mode, "
        "has the original's output and gradients in the mode it was exported in (to 1e-9 where it says "
        "float64, to 1e-4 where it says float32: there the exporter folded weights in float32), and can be "
        "banded as far as the original. A cell in bold names the step that fails.",
        "",
        "| network | " + " | ".join(ways) + " |",
        "|---" * (len(ways) + 1) + "|",
    ]
    for name in NETS:
        row = [word(at[name, way]) if (name, way) in at else "" for way in ways]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    failures = [cell for cell in cells if cell.failed]
    if failures:
        lines += ["", "## What fails", ""]
        lines += [f"- {c.network}, {c.way}: {c.failed}: {c.why}" for c in failures]
    return "\n".join([*lines, ""])


def run(name: str, way: Way) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        return examine(name, way, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(NETS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[Cell] = []
    for name in given.networks:
        for way in WAYS:
            cells.append(run(name, way))
            print(shown(cells[-1]), flush=True)
    print(f"{sum(not c.failed for c in cells)} of {len(cells)} cells pass")
    if set(given.networks) < set(NETS):
        return
    versions = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    data = {**versions, "cells": [asdict(cell) for cell in cells]}
    out = ROOT / "benchmarks" / "results" / "onnx_matrix.json"
    out.write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "docs" / "onnx_matrix.md").write_text(document(cells))


if __name__ == "__main__":
    main()
