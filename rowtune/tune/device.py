"""Devices: which one, how much memory it has, and holding a process to a cap."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rowtune.errors import UsageError


def resolve_device(text: str) -> str:
    """auto | cpu | cuda[:i] -> "cpu" or "cuda:i", one that is here."""
    if text == "cpu":
        return "cpu"
    if text != "auto" and not re.fullmatch(r"cuda(:\d+)?", text):
        raise UsageError(f"--device is auto, cpu, cuda or cuda:0, not {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda:0" if count else "cpu"
    index = int(text.partition(":")[2] or 0)
    if index >= count:
        raise UsageError(f"--device {text}: this torch sees {count} CUDA device(s); use --device cpu")
    return f"cuda:{index}"


def device_name(device: str) -> str:
    """A name that says whether two measurements may be compared."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{_processor()} x{torch.get_num_threads()}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def step_clock(device: str, threads: int) -> Callable[[], float]:
    """What steps are timed by: the clock on the wall, but of one thread the processor's own time, since what
    others do on the machine is no part of a step."""
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def free_bytes(device: str) -> int:
    """What a new allocation may still take."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                return min(int(line.split()[1]) * 1024, _cgroup_free())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_free() -> int:
    """A container's own limit, where it has one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8").strip()
        return max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return 1 << 62


def cap_memory(device: str, limit: int | None) -> None:
    """Let this process take `limit` bytes of a card, its context included, and no more; None lifts the cap.

    An allocation past it is an error, as on a smaller card. Call `warm_up` first: a library's kernels are
    part of the context once they are loaded. On the CPU a budget counts live tensors, which nothing can cap.
    """
    if device.startswith("cuda"):
        release(device)  # what is cached counts against the cap
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if limit is None else max(limit - context_bytes(device), 0) / total
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def guard_host() -> None:
    """Make an allocation past what the machine has left an error in this process, and no dead machine."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = _data_bytes()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(0.9 * free_bytes("cpu")), hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def keep_freed_memory() -> None:
    """Have this process keep the host's memory that it lets go of, where the C library is glibc.

    Of itself glibc hands large blocks back to the system, and they come again as fresh pages: a fault each,
    and zeros to write. Feature maps come and go all the time, so that is a tenth of a training step on a CPU,
    or half of one (`python benchmarks/page_faults.py` prints how much). Freed memory then serves this process
    alone. Other C libraries: nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never
        libc.mallopt(MMAP_MAX, 0)


TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""From malloc.h: free bytes from which on they are handed back, and how many blocks may be mapped alone."""


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA already (reserved, not touched, memory too)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmData")


def warm_up(device: str) -> None:
    """Load the libraries that training uses: a context that is measured before is too small."""
    if device.startswith("cuda"):
        x = torch.ones(1, 8, 16, 16, device=device, requires_grad=True)
        weight = torch.ones(8, 8, 3, 3, device=device, requires_grad=True)
        made = torch.nn.functional.conv2d(x, weight, padding=1).flatten(1)
        torch.autograd.grad(made.matmul(made.detach().t()).sum(), (x, weight))
        torch.cuda.synchronize(device)


def context_bytes(device: str) -> int:
    """What CUDA and its libraries hold besides the allocator: used on the card less what torch reserved.

    Other processes on the card count as well: on a shared card this is an upper bound. 0 on the CPU.
    """
    if not device.startswith("cuda"):
        return 0
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def release(device: str) -> None:
    """Give back what is not used any more."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # one plan's memory is in pieces of which the next may make no use


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 is float32: TF32, in which convolutions keep ten bits, is off, whatever the user has set.

    torch.export reads the older of cuDNN's two switches and wants it to agree with the newer one.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision
    cudnn.allow_tf32 = False
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.allow_tf32 = before[0] == "tf32"
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision = before
