"""What measuring one plan gave: figures, or a status and a reason. A failed trial is a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from rowtune.errors import RowtuneError
from rowtune.plan.plan import Plan

Status = Literal["ok", "oom", "crash", "timeout", "wrong", "slow", "rejected"]
Effort = Literal["quick", "full"]

# How PyTorch, the system and NVIDIA's libraries say it: without room for its workspace a convolution finds no
# engine.
_OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory"),
    *("unable to find an engine", "cudnn_status_alloc_failed", "cublas_status_alloc_failed"),
    *("cudnn_status_internal_error_device_allocation", "cudaerrormemoryallocation"),
)


class Timing(NamedTuple):
    """Medians over steps: by the clock that suits (`step_clock`), and processor time over all threads."""

    seconds: float
    cpu_seconds: float


class Contender(NamedTuple):
    """A plan (None: plain PyTorch) and the number of threads it runs with (0: as many as torch takes)."""

    plan: Plan | None
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one plan cost; `status` and `reason` say why there are no figures.

    step_seconds    median of warm steps; of the one step that was timed where the status is slow
    cpu_seconds     processor time of such a step, over all threads
    alloc_retries   times that CUDA's allocator had to free its cache and try again
    """

    status: Status
    reason: str = ""
    peak_bytes: int | None = None
    activation_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    step_seconds: float | None = None
    max_relative_error: float | None = None
    cpu_seconds: float | None = None
    alloc_retries: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception says, as torch.OutOfMemoryError does."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(w in said for w in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """What an exception says, in short."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def failure(error: BaseException) -> Measurement:
    """The status an exception stands for."""
    text = first_line(error)
    if out_of_memory(error):
        return Measurement("oom", text or "out of memory")
    if isinstance(error, RowtuneError):
        return Measurement("rejected", text)
    return Measurement("crash", f"{type(error).__name__}: {text}")
