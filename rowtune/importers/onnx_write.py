"""Trained weights back into the user's own .onnx file: the same graph, names and opset, other values.

The copy that is written is for inference: batch norms use the statistics that training left, dropout does
nothing, whatever mode the file was exported in. (rowtune reads either as a network to train.) Data that lay
beside the model lie beside the copy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import external_data_helper
from torch import Tensor, nn

from rowtune.errors import ModelError
from rowtune.importers.onnx_file import check, graphs, parse, tensors
from rowtune.importers.onnx_module import Home, OnnxNetwork
from rowtune.importers.onnx_node import DTYPES

_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def check_homes(module: nn.Module, source: Path) -> None:
    """ModelError where a weight has no tensor of its own in the file that could take its value."""
    assert isinstance(module, OnnxNetwork)
    graph = _File(parse(source), source)
    for path, value in _state(module).items():
        graph.place(module.homes[path], value)


def write_onnx(module: nn.Module, source: Path, to: Path) -> None:
    """Write a copy of `source` with the weights of `module`, which was made from it; whole or not at all.

    Raises:
        ModelError: a weight has no place in the file, or ONNX's checker refuses the copy.
        OSError: it cannot be written.
    """
    assert isinstance(module, OnnxNetwork)
    proto = parse(source)
    beside = {t.name for t in tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL}
    folder = str(source.resolve().parent)
    taken = (
        {_location(t) for t in tensors(proto)} if source.resolve().parent == to.resolve().parent else set()
    )
    external_data_helper.load_external_data_for_model(proto, folder)
    file = _File(proto, source)
    for path, value in _state(module).items():
        file.place(module.homes[path], value)
    file.finish()
    _for_inference(proto)
    location = f"{to.name}.data" if f"{to.name}.data" not in taken else f"{to.name}.trained.data"
    for tensor in tensors(proto):
        if tensor.name in beside and tensor.HasField("raw_data"):
            external_data_helper.set_external_data(tensor, location)
    _save(proto, to, location)


def _state(module: OnnxNetwork) -> dict[str, Tensor]:
    """Parameters and statistics by path."""
    return {k: v.detach() for k, v in module.state_dict().items() if k in module.homes}


class _File:
    """The stored tensors of a file's main graph, to be given other values."""

    def __init__(self, proto: onnx.ModelProto, source: Path) -> None:
        self.graph, self.source = proto.graph, source
        self.stored: dict[str, onnx.TensorProto] = {t.name: t for t in proto.graph.initializer}
        self.makers = {node.output[0]: node for node in proto.graph.node if node.output}
        self.names = set(_names(proto)) | set(self.stored)
        self.gone: list[onnx.NodeProto] = []

    def place(self, home: Home, value: Tensor) -> None:
        """Where a layer has no tensor of its own, it gets one: by its name if the exporter noted that in an
        Identity, else under one of its own."""
        maker = self.makers.get(home.name)
        if home.uses:
            self._separate(home, value)
        elif home.name in self.stored:
            _fill(self.stored[home.name], value, self.source)
        elif (merged := self._behind(home.name)) is not None and maker is not None:
            self.gone.append(maker)
            self._add(home.name, merged, value)
        elif maker is not None and maker.op_type == "Constant" and maker.attribute[0].HasField("t"):
            _fill(maker.attribute[0].t, value, self.source)
        else:
            raise ModelError(self._homeless(home.name))

    def _behind(self, name: str) -> onnx.TensorProto | None:
        """The stored tensor of this name, or the one that Identity nodes give this name."""
        while name not in self.stored:
            maker = self.makers.get(name)
            if maker is None or maker.op_type != "Identity":
                return None
            name = maker.input[0]
        return self.stored[name]

    def _separate(self, home: Home, value: Tensor) -> None:
        """The uses of a merged tensor that belong together read a tensor of their own from now on."""
        nodes = [(self.makers.get(use.output), use.op, use.slot) for use in home.uses]
        read = {n.input[slot] for n, op, slot in nodes if n is not None and n.op_type == op}
        merged = self._behind(read.pop()) if len(read) == 1 else None
        if merged is None or any(n is None or n.op_type != op for n, op, _ in nodes):
            raise ModelError(self._homeless(home.name))  # a node of another kind is a function's call
        name, count = home.name, 2
        while name in self.names:
            name, count = f"{home.name}_{count}", count + 1
        self._add(name, merged, value)
        for node, _, slot in nodes:
            assert node is not None
            node.input[slot] = name

    def _add(self, name: str, like: onnx.TensorProto, value: Tensor) -> None:
        tensor = self.graph.initializer.add()
        tensor.CopyFrom(like)
        tensor.name = name
        self.names.add(name)
        self.stored[name] = tensor
        _fill(tensor, value, self.source)

    def finish(self) -> None:
        """Take out the Identity nodes that a tensor stands for now, and what only they read."""
        for node in self.gone:
            self.graph.node.remove(node)

    def _homeless(self, name: str) -> str:
        return (
            f"the weight {name} cannot go back into {self.source}: it was computed when the file was read, "
            "or lies in a function or a branch. Save .safetensors or .pt, or export the model again with "
            "do_constant_folding=False"
        )


def _fill(tensor: onnx.TensorProto, value: Tensor, source: Path) -> None:
    """Other values, in the file's own element type."""
    if tuple(tensor.dims) != tuple(value.shape):
        raise ModelError(
            f"the weight {tensor.name} is {list(value.shape)}, but {list(tensor.dims)} in {source}: the file "
            "has changed since the plan was made"
        )
    kept = value.cpu().to(DTYPES[tensor.data_type]).contiguous().reshape(-1)
    for name in _DATA:
        tensor.ClearField(name)
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = kept.view(torch.uint8).numpy().tobytes()


def _for_inference(proto: onnx.ModelProto) -> None:
    """Batch norm and dropout as they are used, without outputs that training alone has."""
    read = set(_reads(proto))
    for graph in graphs(proto):
        dropped: set[str] = set()
        for node in graph.node:
            if node.op_type not in ("BatchNormalization", "Dropout") or any(
                o in read for o in node.output[1:]
            ):
                continue
            dropped |= set(node.output[1:])
            del node.output[1:]
            if node.op_type == "Dropout":
                del node.input[2:]
            kept = [a for a in node.attribute if a.name != "training_mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
        told = [info for info in graph.value_info if info.name not in dropped]
        if len(told) != len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(told)


def _reads(proto: onnx.ModelProto) -> Iterator[str]:
    for graph in graphs(proto):
        for node in graph.node:
            yield from node.input
        yield from (o if isinstance(o, str) else o.name for o in graph.output)


def _names(proto: onnx.ModelProto) -> Iterator[str]:
    yield from _reads(proto)
    for graph in graphs(proto):
        for node in graph.node:
            yield from node.output


def _location(tensor: onnx.TensorProto) -> str:
    entries: Mapping[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
    return str(entries.get("location", ""))


def _save(proto: onnx.ModelProto, to: Path, location: str) -> None:
    """The data first, then the model that reads them: written beside their place, checked and renamed."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        onnx.save_model(proto, str(fresh / to.name))
        check(parse(fresh / to.name), fresh / to.name)
        for name in (location, to.name):
            if (fresh / name).exists():
                with open(fresh / name, "rb+") as written:
                    os.fsync(written.fileno())
                os.replace(fresh / name, to.parent / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
