"""An .onnx file -> a trainable torch module.

The file is data and stays data: nothing in it is executed, and external weights are read from the model's
own folder only. What comes out is an ordinary module that torch.export traces like any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import checker, defs, external_data_helper, helper, inliner, shape_inference
from torch import nn

from rowtune.errors import ModelError, UsageError
from rowtune.importers.onnx_build import build
from rowtune.importers.onnx_module import OnnxNetwork
from rowtune.importers.onnx_node import DTYPES
from rowtune.importers.onnx_ops import CONTROL, OPERATORS

OLDEST_OPSET = 7
# Definitions use operators that are defined themselves; this is more than twice as deep as ONNX goes.
DEEPEST = 5

FOLDED = (
    "the exporter fused them into the convolutions; to keep them, export with "
    "torch.onnx.export(model, args, file, dynamo=False, training=torch.onnx.TrainingMode.TRAINING, "
    "do_constant_folding=False) or with dynamo=True, optimize=False"
)
NO_NORM = f"no normalisation layer found: if the network has batch norms, {FOLDED}"


@dataclass(frozen=True)
class InputSpec:
    """One graph input; a dimension is a size, a symbolic one's name, or None if the file leaves it open."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """What `load_onnx` returns; `norm_layers` counts `norm_names`, `notes` are for the user."""

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    norm_layers: int
    norm_names: tuple[str, ...]
    notes: tuple[str, ...]


def load_onnx(path: str | os.PathLike[str]) -> OnnxModel:
    """Read an ONNX file (opset 7 or newer) as a module in train mode.

    Raises:
        UsageError: there is no such file.
        ModelError: the file is damaged or not ONNX, its external data are missing or outside its folder, or
            it uses operators that cannot be trained (all of them are listed).
    """
    file = Path(path)
    proto = parse(file)
    opset = _opset(proto, file)
    _check_names(proto, file)
    _check_external(proto, file)
    check(proto, file)
    try:
        external_data_helper.load_external_data_for_model(proto, str(file.resolve().parent))
    except (OSError, ValueError, checker.ValidationError) as problem:
        raise ModelError(f"the external data of {file} cannot be read: {_first_line(problem)}") from problem
    return from_proto(proto, opset, str(file))


def from_proto(proto: onnx.ModelProto, opset: int, name: str = "the model") -> OnnxModel:
    """Import a model that is in memory, all data loaded."""
    graph = _inlined(proto, name).graph
    stored = {t.name for t in graph.initializer}
    if graph.sparse_initializer:
        raise ModelError(f"{name} has sparse weights; export it with dense ones")
    inputs = tuple(_input(info) for info in graph.input if info.name not in stored)
    built = build(graph, opset)
    notes = []
    if not built.norms and built.convolutions:
        notes.append(NO_NORM)
    elif folded := _folded_norms(graph):
        notes.append(f"{folded} batch norm(s) are missing: {FOLDED}")
    if built.separated:
        notes.append(
            f"{built.separated} weight(s) that the exporter merged because they started out equal "
            "are trained separately"
        )
    module = OnnxNetwork(built.program).train()
    odd = [n for n, p in module.named_parameters() if not torch.isfinite(p).all()]
    if odd:
        notes.append(f"{len(odd)} weight(s) hold infinite values or none that is a number, as {odd[0]} does")
    fixed = len(built.program.constants)
    if fixed:
        notes.append(f"{fixed} constant array(s) are kept fixed; only stored weights are trained")
    outputs = tuple(o.name for o in graph.output)
    return OnnxModel(module, inputs, outputs, len(built.norms), built.norms, tuple(notes))


def parse(file: Path) -> onnx.ModelProto:
    try:
        data = file.read_bytes()
    except FileNotFoundError as problem:
        raise UsageError(f"there is no file {file}") from problem
    except OSError as problem:
        raise UsageError(f"{file} cannot be read: {problem.strerror}") from problem
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except Exception as problem:  # protobuf's DecodeError, whichever protobuf onnx was built with
        raise ModelError(f"{file} is not ONNX, or is cut off; export it again") from problem
    if not proto.ir_version or not proto.graph.output:
        raise ModelError(f"{file} is not an ONNX model: it holds no graph; export it again")
    return proto


def _opset(proto: onnx.ModelProto, file: Path) -> int:
    versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    newest = defs.onnx_opset_version()
    if not versions:
        raise ModelError(f"{file} does not say which ONNX operators it uses (no opset); export it again")
    if versions[0] < OLDEST_OPSET:
        raise ModelError(
            f"{file} has opset {versions[0]}; {OLDEST_OPSET} to {newest} can be read: "
            "convert it with onnx.version_converter"
        )
    if versions[0] > newest:
        raise ModelError(
            f"{file} has opset {versions[0]}, the onnx package here knows {newest} at most: upgrade onnx, "
            "or export at an older opset"
        )
    return int(versions[0])


def graphs(message: Any) -> Iterator[Any]:
    """The main graph, local functions, and the branches in them."""
    if isinstance(message, onnx.ModelProto):
        for part in (message.graph, *message.functions):
            yield from graphs(part)
        return
    yield message
    for node in message.node:
        for item in node.attribute:
            for graph in (item.g, *item.graphs):
                if graph.ByteSize():
                    yield from graphs(graph)


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All stored tensors: weights, constants, those of branches and functions."""
    for graph in graphs(proto):
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for item in node.attribute:
                yield from (item.t, *item.tensors)


def _check_names(proto: onnx.ModelProto, file: Path) -> None:
    """protobuf hands out names that are no UTF-8 as bytes; nothing later expects that."""
    for graph in graphs(proto):
        texts = [item.name for key in ("initializer", "input", "output") for item in _named(graph, key)]
        for node in graph.node:
            texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
            texts += [item.name for item in node.attribute]
        if any(isinstance(text, bytes) for text in texts):
            raise ModelError(f"{file} is damaged: it has names that are not text; export it again")


def _named(graph: Any, key: str) -> Any:
    """Functions list the names of their inputs and outputs, graphs list values that have one."""
    return [] if isinstance(graph, onnx.FunctionProto) else getattr(graph, key)


def _check_external(proto: onnx.ModelProto, file: Path) -> None:
    folder = file.resolve().parent
    for tensor in tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{file}: the external data of {tensor.name!r} ({location!r})"
        if not location or "\0" in location:
            raise ModelError(f"{where} have no file name; export the model again")
        if Path(location).is_absolute() or ".." in Path(location.replace("\\", "/")).parts:
            raise ModelError(
                f"{where} are outside the model's own folder, which is never read; move them beside it"
            )
        target = folder / location
        if folder not in target.resolve().parents:
            raise ModelError(f"{where} lead outside the model's own folder; copy the file beside the model")
        if not target.is_file():
            raise ModelError(f"{where} are missing; keep that file beside the model")
        _check_range(entries, target.stat().st_size, where)


def _check_range(entries: dict[str, str], size: int, where: str) -> None:
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError as problem:
        raise ModelError(f"{where} have an unreadable offset or length; export the model again") from problem
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(f"{where} end at byte {offset + length}, but the file has {size}; it is cut off")


def check(proto: onnx.ModelProto, file: Path) -> None:
    """ONNX's own rules, but for one that many files break: outputs may come without a shape. ModelError."""
    bare = [o.type.tensor_type for o in proto.graph.output if o.type.HasField("tensor_type")]
    bare = [kind for kind in bare if not kind.HasField("shape")]
    external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors(proto))
    if bare and external:
        return  # the checker takes external data from a file only, and the file would not pass
    for kind in bare:
        kind.shape.SetInParent()
    try:
        checker.check_model(proto if bare else str(file))
    except (checker.ValidationError, ValueError, RuntimeError) as problem:
        raise ModelError(f"{file} is not valid ONNX: {_first_line(problem)}") from problem


def _inlined(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model without functions: its own ones, and standard operators that ONNX defines by simpler ones."""
    try:
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
        for _ in range(DEEPEST):
            defined = _defined(proto)
            if not defined or not hasattr(inliner, "inline_selected_functions"):
                break
            proto = inliner.inline_selected_functions(_typed(proto), defined, inline_schema_functions=True)
    except (RuntimeError, ValueError, TypeError, checker.ValidationError) as problem:
        raise ModelError(f"the functions of {name} cannot be expanded: {_first_line(problem)}") from problem
    return proto


def _defined(proto: onnx.ModelProto) -> list[tuple[str, str]]:
    """Operators that are not claimed, but that ONNX defines by simpler ones."""
    unknown = {n.op_type for n in proto.graph.node if not n.domain} - set(OPERATORS) - CONTROL
    return [("", op) for op in sorted(unknown) if has_body(op)]


def _typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With the types of stored and computed values: how ONNX defines an operator may depend on them."""
    given = {info.name for info in (*proto.graph.input, *proto.graph.value_info)}
    for tensor in proto.graph.initializer:
        if tensor.name not in given:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.value_info.append(info)
    return shape_inference.infer_shapes(proto)


def _folded_norms(graph: onnx.GraphProto) -> int:
    """How many batch norms the newer exporter's optimiser removed; it does so in train mode, too."""
    rules = [p.value for node in graph.node for p in node.metadata_props if p.key.endswith("rule_name")]
    return sum("FuseBatchNorm" in rule for rule in rules)


def has_body(op: str) -> bool:
    """Whether ONNX defines this operator by simpler ones."""
    if not defs.has(op):
        return False
    schema: Any = defs.get_schema(op)
    return bool(schema.has_function or schema.has_context_dependent_function)


def _input(info: onnx.ValueInfoProto) -> InputSpec:
    kind = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        raise ModelError(f"input {info.name!r} is no tensor; only tensors can be fed to a network")
    if kind.elem_type not in DTYPES:
        raise ModelError(f"input {info.name!r} has an element type that torch lacks; export in float32")
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or None)
        for d in kind.shape.dim
    )
    return InputSpec(info.name, shape, DTYPES[kind.elem_type])


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:300] if lines else type(problem).__name__
