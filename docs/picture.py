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

from rowtune.cli.page import show_page
from rowtune.cli.report import read_page
from rowtune.cli.run import read_plan
from rowtune.cli.screen import Screen


def main() -> None:
    plan, picture = Path(sys.argv[1]), Path(sys.argv[2])
    screen = Screen()
    page = read_page(screen, read_plan(plan), plan, False)
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False, force_terminal=True)
    object.__setattr__(screen, "out", console)
    show_page(screen, page)
    svg = console.export_svg(title=f"rowtune report {plan.name}", theme=MONOKAI)
    # The picture must not load fonts from elsewhere.
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S))


if __name__ == "__main__":
    main()
