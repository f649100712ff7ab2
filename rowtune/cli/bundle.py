"""`rowtune report --bundle FILE`: what a bug report needs, and nothing of the model's weights or data."""

from __future__ import annotations

import json
import platform
import traceback
import zipfile
from pathlib import Path
from typing import Any

from rowtune.cli.screen import Screen
from rowtune.errors import RowtuneError
from rowtune.plan.file import PlanFile


def write_bundle(screen: Screen, plan: Path, file: PlanFile, to: Path, force: bool) -> None:
    """Plan, records of the study, versions, and the calls of one step, as a zip archive.

    Raises:
        UsageError: the archive exists, or cannot be written.
    """
    from rowtune.errors import UsageError
    from rowtune.tune.output import check_writable

    if to.exists() and not force:
        raise UsageError(f"--bundle {to} exists: give --force to replace it, or another name")
    check_writable(to, "--bundle")
    screen.err.print("[dim]recording a step ...[/]")
    parts = {"versions.json": json.dumps(_versions(), indent=1), "calls.json": _calls(file, str(plan))}
    records = plan.parent / Path(file.study).name
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(plan, "plan.json")
        if file.study and records.is_file():
            archive.write(records, records.name)
        for name, text in parts.items():
            archive.writestr(name, text)
    screen.note(f"{to}: plan, records, versions and the calls of one step; no weights, no data")


def _versions() -> dict[str, Any]:
    import torch

    from rowtune import __version__

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "rowtune": __version__, "torch": str(torch.__version__), "cuda": torch.version.cuda,
        "python": platform.python_version(), "platform": platform.platform(), "devices": cards,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _calls(file: PlanFile, plan: str) -> str:
    """The calls of a step as JSON; where they cannot be had, why."""
    from rowtune.cli.calls import as_dict
    from rowtune.plan.lower import lower
    from rowtune.runtime.recorder import record
    from rowtune.train.opened import open_plan

    try:
        work, _ = open_plan(file)
        return json.dumps(as_dict(record(lower(work.graph, file.plan)), plan))
    except RowtuneError as error:
        return json.dumps({"error": str(error)})
    except Exception:
        return json.dumps({"error": traceback.format_exc()})
