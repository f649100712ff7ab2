"""Memory of a training step: exact bytes of live tensors, and the allocator's peak.

A tensor's memory is its storage, and a storage lives until its last reference goes, Python's or autograd's.
`LiveMeter` sees every storage an operator returns and every storage's end; kernel temporaries, which no
tensor owns, it does not see. The curve is kept as a log, so that a gradient, known to be one only when
autograd assigns it to `.grad`, is counted as a gradient from the moment it was made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rowtune.runtime.optimizer_state import state_on_device
from rowtune.torch_private import TorchDispatchMode, inner_tensors, pytree, storage_of


class Memory(NamedTuple):
    """Peaks of one training step. `allocator_peak_bytes` includes kernel temporaries, None where unknown."""

    peak_bytes: int
    activation_bytes: int
    allocator_peak_bytes: int | None = None


class LiveMeter(TorchDispatchMode):
    """Counts the bytes of live storages on one device type while it is entered, backward included.

    What lived before is counted from `start` on; name there all that belongs to the step.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = torch.device(device).type
        self._live: dict[int, tuple[int, int, Any]] = {}  # storage -> serial, bytes, weak reference
        self._log: list[tuple[int, int]] = []  # serial, bytes gained or lost
        self._state: set[int] = set()  # serials of parameters, gradients and optimizer state
        self._serial = 0

    def start(self, tensors: Iterable[Tensor], state: Iterable[Tensor] = ()) -> None:
        """Register what is already live; `state` is parameters, gradients and optimizer state."""
        for tensor in tensors:
            self._see(tensor)
        self.tag(state)

    def tag(self, tensors: Iterable[Tensor]) -> None:
        """These are parameters, gradients or optimizer state, and have been since they were made."""
        for tensor in tensors:
            self._see(tensor)
            entry = self._live.get(_key(tensor))
            if entry is not None:
                self._state.add(entry[0])

    @property
    def live_bytes(self) -> int:
        return sum(size for _, size, _ in self._live.values())

    def peaks(self) -> Memory:
        """Peak of all live bytes, and of live bytes less the state live at that moment."""
        total = activations = most = most_activations = 0
        for serial, change in self._log:
            total += change
            if serial not in self._state:
                activations += change
            most, most_activations = max(most, total), max(most_activations, activations)
        return Memory(most, most_activations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out)
        elif isinstance(out, (list, tuple)):
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        for inner in inner_tensors(tensor):
            self._see_one(inner)

    def _see_one(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage_of(tensor), storage.nbytes()
        if key in self._live:
            return
        self._serial += 1
        serial = self._serial

        def gone(_: object) -> None:
            del self._live[key]
            self._log.append((serial, -size))

        self._live[key] = (serial, size, weakref.ref(storage, gone))
        self._log.append((serial, size))


def _key(tensor: Tensor) -> int:
    return storage_of(tensor) if tensor.layout == torch.strided else -1


def state_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, buffers, gradients and optimizer state, where that is not on the host."""
    found = [*module.parameters(), *module.buffers()]
    found += [p.grad for p in module.parameters() if p.grad is not None]
    return [*found, *state_on_device(optimizer)]


def measure_memory(
    step: Callable[[], object],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Iterable[Tensor],
    device: str,
    *,
    allocator: bool = False,
    steps: int = 1,
) -> Memory:
    """Peaks of a call of `step`, which must have been called before (optimizer state exists).

    On CUDA all three come from the allocator and the context, over as many `steps` as asked for, since what
    the allocator has in reserve may still grow; on the CPU the allocator's peak costs a second step and is
    measured only where asked for.
    """
    batch = list(batch)
    if device.startswith("cuda"):
        return _cuda(step, module, optimizer, device, steps)
    optimizer.zero_grad(set_to_none=True)
    meter = LiveMeter(device)
    meter.start([*batch, *state_tensors(module, optimizer)], state_tensors(module, optimizer))
    base = meter.live_bytes
    with meter:
        step()
    meter.tag(state_tensors(module, optimizer))
    memory = meter.peaks()
    if not allocator:
        return memory
    optimizer.zero_grad(set_to_none=True)
    return memory._replace(allocator_peak_bytes=base + allocator_peak(step))


def allocator_peak(step: Callable[[], object]) -> int:
    """Peak bytes that the CPU allocator hands out during a step, above what was live before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def _cuda(
    step: Callable[[], object], module: nn.Module, optimizer: torch.optim.Optimizer, device: str, steps: int
) -> Memory:
    from rowtune.tune.device import context_bytes, release, synchronize

    optimizer.zero_grad(set_to_none=True)
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fixed = sum(t.untyped_storage().nbytes() for t in state_tensors(module, optimizer) if t.is_cuda)
    for _ in range(steps):
        step()
    synchronize(device)
    allocated = int(torch.cuda.max_memory_allocated(device))
    reserved = int(torch.cuda.max_memory_reserved(device))
    return Memory(reserved + context_bytes(device), allocated - min(fixed, before), allocated)
