"""Sizes as people write them: 8GB is 8e9 bytes, 8GiB is 2^33, 25% is a share of what plain training takes."""

from __future__ import annotations

import re

from rowtune.errors import UsageError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}IB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")}
_MOST = 2**60


def parse_size(text: str, flag: str = "--budget") -> int:
    """Bytes; at least one. UsageError says how sizes are written."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    if not match or unit not in _UNITS:
        raise UsageError(f"{flag} is a size such as 8GB (8e9 bytes), 8GiB (2^33) or 500MB, not {text!r}")
    size = float(match[1]) * _UNITS[unit]
    if not 1 <= size <= _MOST:
        raise UsageError(f"{flag} {text} is {size:.3g} bytes; it must be at least one byte and at most 2^60")
    return int(size)


def parse_budget(text: str) -> int | float:
    """Bytes as an int, or for a percentage a fraction of plain's predicted peak as a float."""
    if not text.strip().endswith("%"):
        return parse_size(text)
    try:
        percent = float(text.strip()[:-1])
    except ValueError:
        raise UsageError(f"--budget {text!r}: a percentage is a number and %, such as 25%") from None
    if not 0 < percent <= 1000:
        raise UsageError(f"--budget {text}: a percentage of plain's peak is above 0% and at most 1000%")
    return percent / 100


def format_bytes(size: float | None) -> str:
    """Three or four digits and a decimal unit: 8.00 GB."""
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.{_digits(value)}f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def format_both(size: float) -> str:
    """As budgets are given, in decimal and in binary units: 8.00 GB (7.45 GiB)."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024
    return format_bytes(size) if unit == "B" else f"{format_bytes(size)} ({value:.{_digits(value)}f} {unit})"


def format_of(size: float | None, limit: float) -> str:
    """What is taken of what there is: 7.60 GB of 8.00 GB (7.45 GiB)."""
    return f"{format_bytes(size)} of {format_both(limit)}"


def format_count(count: float) -> str:
    """1.23 G, 45.6 M."""
    value = float(count)
    for letter in ("", " k", " M", " G"):
        if value < 999.95:
            return f"{value:.0f}" if not letter else f"{value:.{_digits(value)}f}{letter}"
        value /= 1000
    return f"{value:.{_digits(value)}f} T"


def format_seconds(seconds: float | None) -> str:
    """1.23 s, 45.6 ms."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        value = seconds * 1000
        return f"{value:.{_digits(value)}f} ms"
    return f"{seconds:.{_digits(seconds)}f} s"


def _digits(value: float) -> int:
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
