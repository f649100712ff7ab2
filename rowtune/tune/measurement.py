"""What measuring one plan gave: figures, or a status and a reason. A failed trial is a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rowtune.errors import RowtuneError

Status = Literal["ok", "oom", "crash", "timeout", "wrong", "rejected"]
Effort = Literal["quick", "full"]

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one plan cost; `status` and `reason` say why there are no figures."""

    status: Status
    reason: str = ""
    peak_bytes: int | None = None
    activation_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    step_seconds: float | None = None
    max_relative_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def failure(error: BaseException) -> Measurement:
    """The status an exception stands for. torch.OutOfMemoryError says "out of memory"."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return Measurement("oom", text or "out of memory")
    if isinstance(error, RowtuneError):
        return Measurement("rejected", text)
    return Measurement("crash", f"{type(error).__name__}: {text}")
