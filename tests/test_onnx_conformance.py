"""Operators that the importer claims pass the onnx package's own tests, or differ for a given reason."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from onnx import defs
from onnx_cases import LEFT_OUT, PASSED, cases, claimed, result, standing

torch.set_num_threads(1)


def test_claimed_operators_conform() -> None:
    pytest.importorskip("onnx.backend.test.case.node")
    found = {case.name: result(case) for case in cases() if claimed(case)}
    unexpected = {name: why for name, why in found.items() if why.startswith("unexpected")}
    assert not unexpected
    tally = Counter(found.values())
    print(dict(tally))  # shown by pytest -rP
    assert tally[PASSED] >= 0.94 * len(found)
    assert len(found) > 0.5 * len(cases())


def test_every_operator_of_onnx_is_accounted_for() -> None:
    """Claimed, expanded by ONNX's definition, or left out for a reason."""
    names = {schema.name for schema in defs.get_all_schemas() if schema.domain == ""}
    assert not [name for name in names if not standing(name)]
    assert not [name for name in LEFT_OUT if standing(name) == "claimed"]
