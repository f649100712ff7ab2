"""A report as one page for a browser: a template of the package with the report's JSON in it, and nothing to
be fetched from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rowtune.plan.file import write_text
from rowtune.report.finite import finite

PARTS = {"/*style*/": "page.css", "/*charts*/": "charts.js", "/*page*/": "page.js"}
TITLE, DATA = "<!--title-->", "/*data*/null"
"""Where the parts go: all are put in at once, so that none is looked for in another."""


def html(shown: Mapping[str, Any]) -> str:
    """The page, of what `Page.to_dict` or `Comparison.to_dict` gives.

    Its script of id `report` holds the very object that `--json` prints. `<` is written as an escape there,
    so that no name of a model or a node can end the script.
    """
    title = f"{shown['plan']}: {shown['verdict']['text']}"
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        title = title.replace(letter, entity)
    data = json.dumps(finite(shown)).replace("<", "\\u003c")
    parts = {place: _asset(name) for place, name in PARTS.items()} | {TITLE: title, DATA: data}
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], _asset("page.html"))


def _asset(name: str) -> str:
    return (files("rowtune.report") / "assets" / name).read_text(encoding="utf-8")


def write_html(shown: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all."""
    write_text(path, html(shown))
