"""Draw the top of `rowtune report --html` of a plan, for the README. Needs a Chromium.

python docs/picture.py rowtune-demo/plan.json docs/report.png
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from rowtune.cli.report import read_page
from rowtune.cli.run import read_plan
from rowtune.cli.screen import Screen
from rowtune.report.html import write_html

WIDTH, HEIGHT = 1180, 1190
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    plan, picture = Path(sys.argv[1]), Path(sys.argv[2])
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    page = read_page(Screen(quiet=True), read_plan(plan), plan, False)
    with tempfile.TemporaryDirectory() as folder:
        html, shot = Path(folder) / "report.html", Path(folder) / "shot.png"
        write_html(page.to_dict(), html)
        size = f"--window-size={WIDTH},{HEIGHT}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        subprocess.run([browser, *flags, f"--screenshot={shot}", f"{html.as_uri()}#light"], check=True)
        small = io.BytesIO()
        Image.open(shot).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    picture.write_bytes(small.getvalue())


if __name__ == "__main__":
    main()
