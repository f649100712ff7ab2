"""A torch module and example inputs -> Graph, through torch.export's training IR (exported.py reads it)."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from rowtune.errors import ModelError, UsageError
from rowtune.graph.barriers import CUMULATIVE
from rowtune.graph.graph import Graph
from rowtune.importers.attributes import attributes_put_back
from rowtune.importers.exported import read
from rowtune.importers.flat import regions_as_they_are
from rowtune.importers.hooks import hooks_without_data
from rowtune.importers.sharded import check_whole
from rowtune.importers.watched import watched
from rowtune.torch_private import FAKE_TENSOR_LOG, FakeTensorMode, fake_mode_of, pytree


def trace(
    model: nn.Module | str | os.PathLike[str],
    inputs: tuple[Any, ...] | None = None,
    *,
    training: bool = True,
    named: dict[str, Any] | None = None,
) -> Graph:
    """Export `model` (which may be a submodule of a larger one) for these example inputs.

    `model` may also be what the command line takes: an .onnx or .pt2 file, `zoo:NAME`, `module:factory`;
    inputs of the file's own sizes are made where none are given.

    `inputs` may be nested tuples and dicts of tensors; only sizes and types are read, and inputs on the meta
    device stand for ones on the model's own, without memory. The model's own training flags are put back
    afterwards.

    Raises:
        ModelError: the model cannot be exported, or changes an activation through a view.
    """
    if not isinstance(model, nn.Module):
        model, inputs = _opened(os.fspath(model), inputs)
    if inputs is None:
        raise UsageError("trace(model, inputs): example inputs are needed for a module, as a tuple")
    program, notes = exported(model, inputs, training=training, named=named)
    device = next((t.device.type for t in (*model.parameters(), *model.buffers())), "meta")
    return replace(read(program, model, training), notes=notes, device=device)


def exported(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    training: bool = True,
    named: dict[str, Any] | None = None,
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """torch.export's program of a model, and what a person should know about it; see `trace`.

    Raises:
        ModelError: the model cannot be exported.
    """
    check_whole(model)
    was_training = [(m, m.training) for m in model.modules()]
    if training != model.training:
        model.train(training)
    try:
        with (
            _quiet(),
            _unobserved(),
            torch.inference_mode(False),
            attributes_put_back(model),
            watched(model) as notes,
            hooks_without_data(model, notes),
            _traceable(model),
            regions_as_they_are(),
        ):
            given = _without_data(model, _each_on_its_own((inputs, named or {})))
            program = torch.export.export(model, *given, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, SyntaxError):  # torch.export writes the operator's argument `from` into Python
            reason = ["it calls random_, which no graph can hold; draw with torch.randint"]
        raise ModelError(
            f"torch.export could not trace {type(model).__name__} for inputs "
            f"{_shapes(inputs)}: {reason[0][:300]}"
        ) from error
    finally:
        for module, flag in was_training:
            module.training = flag
    return program, tuple(notes)


def _each_on_its_own(inputs: Any) -> Any:
    """One tensor given twice is traced as one input, and the graph is for calls with two as well."""
    seen: set[int] = set()

    def alone(t: Tensor) -> Tensor:
        again = id(t) in seen
        seen.add(id(t))
        return torch.empty_like(t) if again else t

    return pytree.tree_map_only(Tensor, alone, inputs)


def _without_data(model: nn.Module, inputs: Any) -> Any:
    """Meta tensors as fake tensors on the model's device, where torch.export would find two devices."""
    own = [*model.parameters(), *model.buffers()]
    device = own[0].device if own else torch.device("cpu")
    given = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if device.type == "meta" or not any(t.is_meta for t in given):
        return inputs
    with fake_mode_of(own) or FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(t: Tensor) -> Tensor:
            return torch.empty_like(t, device=device) if t.is_meta else mode.from_tensor(t)

        return pytree.tree_map_only(Tensor, fake, inputs)


def _opened(text: str, inputs: tuple[Any, ...] | None) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model named as on the command line, and inputs of its file's sizes where none are given."""
    from rowtune.importers.source import blank, load, parse_source

    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    loaded = load(parse_source(text), ["x".join(map(str, t.shape)) for t in tensors])
    return loaded.module, blank(loaded.inputs) if inputs is None else inputs


def _shapes(inputs: Any) -> str:
    leaves = pytree.tree_leaves(inputs)
    return ", ".join("x".join(map(str, t.shape)) if isinstance(t, Tensor) else repr(t) for t in leaves)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs the traceback of a failing operator before raising it; the error says enough."""
    loggers = [logging.getLogger(n) for n in (FAKE_TENSOR_LOG, "torch.export", "torch.fx")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _unobserved() -> contextlib.AbstractContextManager[None]:
    """Hooks of the caller on what autograd saves (offloading, compression) expect tensors with data: those of
    the tracer are kept from them."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@contextlib.contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """momentum=None makes a norm read its counter of batches while it runs, and a SyncBatchNorm asks for its
    process group: torch.export refuses both."""
    cumulative = [m for m in model.modules() if isinstance(m, _NormBase) and m.momentum is None]
    for module in cumulative:
        module.momentum = CUMULATIVE
    shared = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    for norm in shared:  # as a batch norm; rowtune shares the statistics itself
        norm.forward = MethodType(_BatchNorm.forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in cumulative:
            module.momentum = None
        for norm in shared:
            del norm.forward
