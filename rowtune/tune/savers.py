"""Memory savers by name: which of them a search may use."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rowtune.errors import UsageError, meant
from rowtune.plan.choices import LOSSY
from rowtune.plan.plan import Plan, Segment

SAVERS: dict[str, str] = {
    "rows": "bands of rows (and what else bands take)",
    "checkpoint": "recompute stretches from their inputs",
    "turns": "checkpoints made of segments that are recomputed in turns",
    "images": "some images of the batch at a time",
    "recompute": "norms, activations, pools and joins that are kept for backward are made again",
    "channels_last": "the other layout of images and volumes",
    "offload": "what backward needs goes to the host meanwhile",
    "rounding": "what backward needs is rounded meanwhile (fp16, int8): needs --max-grad-error",
    "bf16": "autocast to bfloat16",
    "offload_gradients": "gradients of what skips over segments wait on the host",
    "offload_state": "the optimizer's state stays on the host, and comes for the update of each parameter",
    "capture": "forward and backward are replayed as one CUDA graph: no memory, but the host's time",
    "step_in_backward": "each gradient is used and freed as it comes: no clipping, no accumulation",
}
"""What each does. Gradients are those of plain PyTorch, with bf16 those of plain under bf16."""

DEFAULT = frozenset({"rows", "checkpoint", "turns", "images", "recompute", "channels_last"})
"""What changes neither the arithmetic nor how one may train, nor needs memory of the host."""

RESORT = frozenset({"offload", "offload_gradients", "offload_state", "step_in_backward"})
"""What else may be used, unless it is forbidden, where no plan fits without."""

ASKED = tuple(name for name in SAVERS if name not in DEFAULT | {"rounding", "capture"})
"""What saves memory and a search uses only where it is asked to, in the order of the table."""

ON_HOST = frozenset({"offload", "offload_gradients", "offload_state"})
"""What takes memory of the host."""

NOT_IN_GRAPHS = frozenset({"offload", "offload_gradients", "step_in_backward"})
"""What does not go with capture: see rowtune/plan/legal.py."""


def parse(text: str) -> frozenset[str]:
    """Names with commas: all that may be used; or changes to the default, as in "+offload,-turns".

    Raises:
        UsageError: a name is unknown, or names and changes are mixed.
    """
    words = _words(text)
    if not words:
        return DEFAULT
    changes = [word for word in words if word[0] in "+-"]
    for word in words:
        if word.lstrip("+-") not in SAVERS:
            name = word.lstrip("+-")
            raise UsageError(f"--savers: {name!r} is none of {', '.join(SAVERS)}{meant(name, SAVERS)}")
    if not changes:
        return frozenset(words)
    if len(changes) < len(words):
        raise UsageError(
            f"--savers {text}: either names of all that may be used, or changes to the default as in "
            "+offload,-turns"
        )
    more = {word[1:] for word in words if word[0] == "+"}
    return frozenset((DEFAULT | more) - {word[1:] for word in words if word[0] == "-"})


def check_capture(savers: frozenset[str], device: str) -> None:
    """Capture is of CUDA devices, and goes with what repeats itself.

    Raises:
        UsageError: it is asked for elsewhere, or beside what it does not go with.
    """
    if "capture" not in savers:
        return
    if not device.startswith("cuda"):
        raise UsageError(
            f"--savers capture replays steps as CUDA graphs, and the device is {device}: leave it out, or "
            "give --device cuda"
        )
    if others := sorted(savers & NOT_IN_GRAPHS):
        raise UsageError(f"--savers capture does not go with {', '.join(others)}: leave out one or the other")


def last_resort(text: str) -> frozenset[str]:
    """Of what `parse` reads: the savers that may be used as well where no plan fits without."""
    words = _words(text)
    if any(word[0] not in "+-" for word in words):
        return frozenset()  # all that may be used is named
    forbidden = NOT_IN_GRAPHS if "+capture" in words else frozenset()
    return RESORT - forbidden - {word[1:] for word in words}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def with_error(savers: frozenset[str], max_grad_error: float) -> frozenset[str]:
    """With the stores that round, where gradients may be off by so much.

    Raises:
        UsageError: a number out of range, or such stores without one.
    """
    if not 0 <= max_grad_error < math.inf:
        raise UsageError(f"--max-grad-error is a number of at least 0, not {max_grad_error}")
    if "rounding" in savers and not max_grad_error:
        raise UsageError(
            "--savers rounding: gradients are then off by something; --max-grad-error 0.01, say, is how much "
            "they may be, relative to the largest of a tensor"
        )
    return savers | {"rounding"} if max_grad_error else savers


def used(plan: Plan) -> frozenset[str]:
    """The names of what a plan uses."""
    uses = {
        "channels_last": plan.layout == "channels_last",
        "bf16": plan.dtype == "bf16",
        "capture": plan.capture == "on",
        "offload_gradients": plan.waiting_gradients == "host",
        "offload_state": plan.optimizer_state == "host",
        "step_in_backward": plan.step_in_backward,
    }
    segments = of_segments((*plan.segments, *plan.leaves()))
    return segments | {name for name, is_used in uses.items() if is_used}


def of_segments(segments: Iterable[Segment]) -> frozenset[str]:
    """The names of what segments use."""
    found: set[str] = set()
    for s in segments:
        uses = {
            "turns": bool(s.inside),
            "images": bool(s.images),
            "recompute": s.cheap == "recompute",
            "offload": s.store == "host",
            "rounding": s.store in LOSSY,
        }
        found |= {name for name, is_used in uses.items() if is_used} | {s.policy} - {"keep"}
    return frozenset(found)
