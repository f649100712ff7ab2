"""The flags of `rowtune search` alone; those that other commands have as well are in options.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

STORAGES = "journal:FILE, grpc://HOST:PORT, sqlite:///FILE or postgresql://USER@HOST/DATABASE"

From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="PLAN",
        help="Take over what was measured for this plan; without MODEL its network and inputs, too.",
    ),
]
PredictOnly = Annotated[
    bool, typer.Option("--predict-only", help="Measure nothing; times are those of a profile.")
]
Storage = Annotated[str, typer.Option("--storage", metavar="URL", help="Share the study: " + STORAGES + ".")]
Workers = Annotated[
    int,
    typer.Option("--workers", min=1, help="Processes that measure: one a GPU, or so many on the CPU."),
]
Trials = Annotated[int, typer.Option("--trials", min=0, help="Plans to measure, earlier runs included.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds; 0 for no limit.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where the plan goes.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget earlier trials of this study.")]
