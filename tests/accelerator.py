"""An accelerator without hardware: training steps on tensors of another device that hold no data.

Tensors without data know shapes, strides and devices. On them a step runs all its Python and calls every
operator. What an accelerator would wait for is reported: values that the host reads, copies between host
and device, CPU tensors among an operator's arguments. What it would do is counted: launches, and convolutions
of tensors that are not contiguous, which the library behind them copies first.

The device is PyTorch's own `meta`, which is fast, or one of fake tensors that exists only in name: slower,
but PyTorch takes it for an accelerator and checks devices itself. That one a process keeps for good, so it
has a program of its own (`python accelerator.py NETWORK:PLAN ...`), which writes a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from test_exact_zoo import NETS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import rowtune
import rowtune.runtime.module
from rowtune.graph.cuts import legal_cut, why_not
from rowtune.graph.graph import Graph
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import target_dtype, target_shape, with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.problem import TensorSpec
from rowtune.tune.step import Plain, plain_graph, steps_of
from rowtune.zoo import build

NAMED = "fake"
"""The device that exists only in name."""
MEMORY = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "_reshape_alias",
}  # fmt: skip
"""Nothing is launched for these, and their schemas do not call them views."""


"""Nodes of a network that is streamed once for each barrier: the steps of larger ones take too long."""


@dataclass
class Found:
    """One warm step of a network under a plan: what was launched, most of it by name, what was copied by
    convolutions, and what must not be."""

    network: str
    plan: str
    launches: int
    copies: int
    faults: list[str] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """Counts launches and implicit copies on a device, and notes what would wait for it or mix two devices.

    Args:
        known: sizes of outputs by operator and sizes of inputs, which PyTorch takes long to find.
    """

    def __init__(self, device: str, known: dict[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.known = device, known
        self.launches: Counter[str] = Counter()
        self.copies = 0
        self.faults: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = [*_tensors(args), *_tensors(kwargs.values())]
        try:
            out = self._call(func, name, args, kwargs)
        except Exception as error:
            # Noted here: on its way through the engine of autograd it may end the process.
            self.fault(f"{name}: {str(error).splitlines()[0][:200]}")
            raise
        made = [*_tensors((out,))]
        if any(t.device.type == self.device for t in (*given, *made)):
            self._see(func, name, given, made)
        return out

    def _see(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        hosted = [t for t in given if t.device.type != self.device]
        if hosted and (name in ("_to_copy", "copy_") or any(t.dim() for t in hosted)):
            self.fault(f"{name} reads a CPU tensor of shape {[*hosted[0].shape]}")
        if any(t.device.type != self.device for t in made):
            self.fault(f"{name} makes a CPU tensor of one on the device")
        if func.is_view or name in MEMORY:
            return
        self.launches[name] += 1
        if name.startswith("convolution"):
            self.copies += sum(not _dense(t) for t in given[: 1 if name == "convolution" else 2])

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if self.device == NAMED or func.is_view or name in MEMORY:
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        like = self.known.get(key)
        if like is None:
            out = func(*args, **kwargs)
            if not func._schema.is_mutable:
                self.known[key] = _key(out)
            elif out is args[0]:
                self.known[key] = "in place"
            return out
        return args[0] if like == "in place" else _made(like)

    def fault(self, what: str) -> None:
        own = [f for f in traceback.extract_stack() if "/rowtune/" in f.filename]
        where = f" ({own[-1].filename.rpartition('/rowtune/')[2]}:{own[-1].lineno})" if own else ""
        self.faults[what + where] += 1


class Numbers(TorchFunctionMode):
    """Notes tensors that are made of Python numbers on the device: a copy that no operator shows."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and out.device.type != "cpu"
        picked = func in (Tensor.__getitem__, Tensor.__setitem__) and _lists(args[1])
        if made or picked:
            self.watch.fault("a tensor is made of Python numbers")
        return out


def _lists(index: Any) -> bool:
    return any(isinstance(i, list) for i in (index if isinstance(index, tuple) else (index,)))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@dataclass(frozen=True, slots=True)
class _Like:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _key(value: Any) -> Any:
    """Arguments or outputs, with tensors by their sizes."""
    if isinstance(value, Tensor):
        return _Like(tuple(value.shape), value.stride(), value.dtype, value.device)
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _made(like: Any) -> Any:
    if isinstance(like, _Like):
        return torch.empty_strided(like.size, like.stride, dtype=like.dtype, device=like.device)
    return tuple(map(_made, like)) if isinstance(like[0], (tuple, _Like)) else like[1]


def _dense(t: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.is_contiguous() or (t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()]))


def plans(graph: Graph, band: int) -> Iterator[tuple[str, Plan | None]]:
    """Every policy; ways to carry barriers where there are some. Two bands, or one where steps are many."""
    yield "plain", None
    yield "keep", rowtune.uniform_plan(graph, "keep")
    yield "checkpoint", rowtune.uniform_plan(graph, "checkpoint")
    for halo in ("recompute", "cache", "sweep"):
        yield halo, rowtune.uniform_plan(graph, "rows", band, halo)
    for tapes in ("whole", "late", "replay"):
        yield tapes, rowtune.uniform_plan(graph, "rows", band, "sweep", tapes=tapes)
    yield "images", rowtune.uniform_plan(graph, "rows", 2 * band, "sweep", images=1)
    if any(node.op in ("moments", "mean") or "adaptive" in node.op for node in graph.nodes):
        for barriers, rows in (("recompute", band), ("narrow", band), ("passes", 2 * band)):
            plan = rowtune.uniform_plan(graph, "rows", rows, "sweep", barriers=barriers)
            yield f"barriers {barriers}", plan
    yield "turns", in_turns(graph, band)


def in_turns(graph: Graph, band: int) -> Plan:
    """One checkpoint made of two halves, of rows where they can be."""
    places = [p for p in range(1, len(graph.nodes)) if legal_cut(graph, p)]
    middle = min(places, key=lambda p: abs(p - len(graph.nodes) // 2))
    inside = []
    for start, stop in ((0, middle), (middle, len(graph.nodes))):
        first, last = graph.nodes[start].name, graph.nodes[stop - 1].name
        rows = Segment(first, last, "rows", band, "recompute", barriers="recompute")
        inside.append(Segment(first, last, "checkpoint") if why_not(graph, start, stop, 2) else rows)
    return Plan((Segment(inside[0].first, inside[1].last, "checkpoint", inside=tuple(inside)),))


def moved(model: nn.Module, device: str) -> nn.Module:
    """The model with parameters and buffers of the same shapes on the device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device=device))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty_like(b, device=device)
    return model


def measured(
    network: str,
    known: dict[Any, Any],
    device: str = "meta",
    chosen: Iterable[str] = (),
    engine: Any = "traced",
) -> Iterator[Found]:
    """A warm step of the network under every plan, or those chosen."""
    options, size = NETS[network]
    model = build(network, **options)
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if device == NAMED else contextlib.nullcontext()
    with mode:
        moved(model, device)
    graph = plain_graph(model, [TensorSpec("x", (2, 3, *size))])
    output = graph.values[graph.outputs[0]]
    loss = parse(default_name(output.shape, (2, 3, *size)))
    training, band = with_loss(graph, loss), -(-size[0] // 2)
    with mode:
        x = torch.empty(2, 3, *size, device=device)
        dtype = target_dtype(loss, output.dtype)
        target = torch.zeros(target_shape(loss, output.shape), dtype=dtype, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for name, plan in plans(training, band):
            if chosen and name not in chosen:
                continue
            runner: Any = (
                Plain(model, loss) if plan is None else rowtune.apply(model, plan, loss, engine=engine)
            )
            if plan is not None:
                runner._programs = _Always(rowtune.lower(training, plan))
            watches = Watch(device, known), Watch(device, known)
            yield warm(network, name, watches, lambda r=runner: steps_of(r, optimizer)((x,), target))


class _Always(dict[Any, Any]):
    """One program, whatever it is asked for: tracing is what takes long."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self.program


def warm(network: str, plan: str, watches: tuple[Watch, Watch], step: Callable[[], object]) -> Found:
    """The second call of `step`, which may make nothing that the first could have kept."""
    first, second = watches
    failed = []
    try:
        with Numbers(first), first:
            step()
        with Numbers(second), second:
            step()
    except Exception as error:
        failed = [*first.faults, f"{type(error).__name__}: {str(error)[:300]}"]
    launched = second.launches
    faults = [f"{count} x {what}" for what, count in second.faults.items()]
    return Found(
        network, plan, launched.total(), second.copies, [*faults, *failed], dict(launched.most_common(9))
    )


def main(wanted: list[str]) -> None:
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # checkpoint asks
    backend_registration._setup_privateuseone_for_python_backend(NAMED, module)
    # The host's thread does the device's part of a backward, where exceptions can be caught.
    with torch.autograd.set_multithreading_enabled(False):
        for network, _, plan in (one.partition(":") for one in wanted):
            for found in measured(network, {}, NAMED, (plan,)):
                print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
