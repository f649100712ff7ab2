"""benchmarks/gpu_suite.sh, tried where there is no GPU: a card may be at hand for minutes only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("stage", ["verify", "budgets", "predict", "speed", "host", "profile"])
def test_a_stage_runs_dry(stage: str, tmp_path: Path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    words = [str(ROOT / "benchmarks/gpu_suite.sh"), stage, "--tiny", "--device", "cpu"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob(f"*-cpu-{stage}.json")
    found = json.loads(path.read_text())
    assert found["stage"] == stage and found["tiny"] and found["rows"]
    assert {row["status"] for row in found["rows"]} == {"ok"}, found["rows"]


def test_a_stage_that_is_none_is_refused(tmp_path: Path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run([str(ROOT / "benchmarks/gpu_suite.sh"), "dance"], env=env, capture_output=True)
    assert done.returncode != 0
