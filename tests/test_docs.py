"""Pages that are written from the code are up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from rowtune.graph.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def operators() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_operators", DOCS / "operators.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_operators_is_what_the_code_says(operators: ModuleType) -> None:
    """If not: python docs/operators.py > docs/operators.md"""
    assert (DOCS / "operators.md").read_text(encoding="utf-8") == operators.page()


def test_every_rule_says_what_it_covers() -> None:
    assert [op for op, rule in RULES.items() if not rule.__doc__] == []
