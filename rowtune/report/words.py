"""A plan's decisions in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STRONGEST = ("rows", "checkpoint")


def policies(decisions: Any) -> str:
    """A plan in a few words: its segments' policies, equal neighbours once."""
    words: list[str] = []
    for s in (decisions or {}).get("segments", ()):
        word = _segment(s)
        if not words or words[-1] != word:
            words.append(word)
    layout = (decisions or {}).get("layout", "contiguous")
    words += [layout] if layout != "contiguous" else []
    return " + ".join(words) or "plain PyTorch"


def _segment(s: Mapping[str, Any]) -> str:
    word = str(s["policy"])
    if word == "rows":
        word = f"rows {s['band_rows']} {s.get('halo', 'sweep')}" if s.get("band_rows") else "images"
        word += f" x{s['images']}" if s.get("images") else ""
        word += f" {s['tapes']} tapes" if s.get("tapes", "split") != "split" else ""
        word += f" barriers {s['barriers']}" if s.get("barriers", "store") != "store" else ""
    elif s.get("cheap") == "recompute":
        word = "keep, cheap recomputed"
    elif "inside" in s:
        inside = (policies({"segments": [one]}) for one in s["inside"])
        word = f"in turns ({', '.join(dict.fromkeys(inside))})"
    store = s.get("store", "device")
    return word if store == "device" else f"{word}, on the host" if store == "host" else f"{word}, in {store}"


def kind(decisions: Mapping[str, Any] | None) -> str:
    """rows, checkpoint or keep: the strongest policy a plan uses; plain for none."""
    if decisions is None:
        return "plain"
    used = {s["policy"] for _, s in nested(decisions.get("segments", ()))}
    return next((policy for policy in STRONGEST if policy in used), "keep")


def nested(segments: Sequence[Mapping[str, Any]], depth: int = 0) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(how deep, segment), those inside a checkpoint behind it."""
    for segment in segments:
        yield depth, segment
        yield from nested(segment.get("inside", ()), depth + 1)
