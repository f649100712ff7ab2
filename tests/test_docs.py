"""Pages that are written from the code are up to date."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import rowtune
from rowtune.graph.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["operators", "api"])
def test_a_page_is_what_the_code_says(name: str) -> None:
    """If not: python docs/operators.py > docs/operators.md, and so on."""
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == script(name).page()


def test_all_that_rowtune_exports_is_on_the_page_of_the_api() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [n for n in rowtune.__all__ if f"`rowtune.{n}" not in page and n != "__version__"] == []


def test_links_lead_somewhere() -> None:
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text(encoding="utf-8"))]
    here = [(page, link) for page, link in links if "://" not in link]
    lost = [(page.name, link) for page, link in here if not reached(page, link)]
    assert lost == [] and len(here) > 40


def reached(page: Path, link: str) -> bool:
    """The file is there, and a heading that makes the anchor."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name) if name else page
    if not target.exists() or not anchor:
        return target.exists()
    heads = [line.lstrip("# ") for line in target.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    return anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_rule_says_what_it_covers() -> None:
    assert [op for op, rule in RULES.items() if not rule.__doc__] == []
