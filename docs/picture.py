"""Draw `rowtune report` of a plan as an SVG, for the README.

python docs/picture.py rowtune-demo/plan.json docs/report.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from rowtune.cli.report import show
from rowtune.cli.run import read_plan
from rowtune.cli.screen import Screen
from rowtune.tune.records import read_records


def main() -> None:
    plan, picture = Path(sys.argv[1]), Path(sys.argv[2])
    file = read_plan(plan)
    records = {r.digest: r for r in read_records(plan.parent / Path(file.study).name)[1]}
    screen = Screen()
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False, force_terminal=True)
    object.__setattr__(screen, "out", console)
    show(screen, file, list(records.values()), plan.name)
    svg = console.export_svg(title=f"rowtune report {plan.name}", theme=MONOKAI)
    # The picture must not load fonts from elsewhere.
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S))


if __name__ == "__main__":
    main()
