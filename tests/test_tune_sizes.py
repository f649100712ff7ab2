"""Sizes: what people write, and what they get wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rowtune.cli.run import budget_within
from rowtune.errors import UsageError
from rowtune.tune.sizes import format_bytes, format_of, format_seconds, parse_budget, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8_000_000_000),
        ("8GiB", 2**33),
        ("8gib", 2**33),
        ("500MB", 500_000_000),
        ("1.5 kB", 1500),
        ("64KiB", 65536),
        ("123", 123),
        ("123B", 123),
        ("2TB", 2 * 10**12),
        ("1e9", 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_budget(text) == size and type(parse_budget(text)) is int


@pytest.mark.parametrize(("text", "share"), [("25%", 0.25), ("100%", 1.0), (" 12.5 %", 0.125)])
def test_percentages(text: str, share: float) -> None:
    assert parse_budget(text) == share and type(parse_budget(text)) is float


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "8 apples",
        "-1GB",
        "0",
        "0GB",
        "0%",
        "-5%",
        "1e30GB",
        "nan",
        "inf",
        "%",
        "nan%",
        "inf%",
        "1e99%",
        "8GBB",
    ],
)
def test_nonsense(text: str) -> None:
    with pytest.raises(UsageError, match="--budget") as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)


def test_the_flag_is_named() -> None:
    with pytest.raises(UsageError, match="--reserve"):
        parse_size("x", "--reserve")


def test_a_share_of_what_plain_took() -> None:
    """`run --budget 25%`, of a plan that knows; where it does not, bytes are asked for."""
    plan = SimpleNamespace(measured={"plain_peak_bytes": 8000})
    assert budget_within(plan, Path("p.json"), "25%") == 2000  # type: ignore[arg-type]
    assert budget_within(plan, Path("p.json"), "1KiB") == 1024  # type: ignore[arg-type]
    plan.measured["plain_peak_bytes"] = None
    with pytest.raises(UsageError, match=r"--budget 25%: p\.json does not say .* 8GB or 8GiB"):
        budget_within(plan, Path("p.json"), "25%")  # type: ignore[arg-type]


def test_both_units() -> None:
    assert format_of(7.6e9, 8e9) == "7.60 GB of 8.00 GB (7.45 GiB)"
    assert format_of(None, 2**33) == "- of 8.59 GB (8.00 GiB)"


def test_formats() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 8e9, 123_456_789, 9_999_999, 2e12, None)] == [
        "0 B", "999 B", "1.00 kB", "8.00 GB", "123 MB", "10.0 MB", "2.00 TB", "-",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0.0123, 1.0, 12.34, 0.99999, None)] == [
        "12.3 ms",
        "1.00 s",
        "12.3 s",
        "1.00 s",
        "-",
    ]
