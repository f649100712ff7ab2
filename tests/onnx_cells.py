"""One cell of the ONNX matrix: a network, exported one way, imported, and compared with what it was.

What a cell must show: the file imports; in eval mode it gives what onnxruntime gives; its output, the
gradients of its parameters and of its input are the original's, in the mode it was exported in; and as much
of it can be banded. benchmarks/onnx_matrix.py runs all cells, tests/test_onnx_matrix.py a few.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.onnx import TrainingMode

import rowtune
from rowtune.graph.cuts import opaque_nodes, stretches
from rowtune.graph.graph import Graph
from rowtune.importers.onnx_file import OnnxModel, load_onnx
from rowtune.zoo import build

# Reduced widths, dropout off (two runs are compared), two images of a size that the network takes.
NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "convnext_tiny": (
        {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "classes": 10, "layer_scale": 0.5}, (64, 64),
    ),
    "deeplabv3plus": (
        {
            "width": 4, "depths": (1, 1, 1, 2), "channels": 8, "low_channels": 4, "rates": (1, 2),
            "classes": 5, "dropout": 0.0,
        },
        (64, 64),
    ),
    "densenet121": ({"growth": 4, "depths": (1, 2, 1, 1), "width": 8, "classes": 10}, (64, 64)),
    "edsr": ({"blocks": 2, "channels": 4}, (16, 16)),
    "efficientnet_v2_s": (
        {"width": 0.1, "depths": (1, 2, 1, 2, 1, 1), "classes": 10, "dropout": 0.0}, (64, 64),
    ),
    "hrnet_w18": (
        {
            "width": 3, "stem": 4, "modules": (1, 1, 2), "blocks": 1, "classes": 5, "head_width": 2,
            "features": 16, "head": "segmentation",
        },
        (64, 64),
    ),
    "mobilenet_v3_large": (
        {"width": 0.1, "depths": (1, 2, 1, 1, 1, 1), "classes": 10, "dropout": 0.0}, (64, 64),
    ),
    "resnet50": ({"width": 4, "depths": (1, 1, 1, 1), "classes": 10}, (64, 64)),
    "unet": ({"base": 4, "depth": 2, "up": "bilinear"}, (32, 32)),
    "unet3d": ({"base": 2, "depth": 2, "in_channels": 3}, (16, 8, 12)),
    "unet_bn": ({"base": 4, "depth": 2}, (32, 32)),
    "vgg16": ({"width": 2, "classes": 10, "dropout": 0.0}, (224, 224)),
}  # fmt: skip

# Relative errors of output and gradients. Exporters compute folded weights in the file's own float32.
EXACT, SINGLE = 1e-9, 1e-4


@dataclass(frozen=True)
class Way:
    """How a network is exported: by which exporter, in which mode, with or without its optimisations."""

    exporter: str
    mode: str
    optimised: bool

    def __str__(self) -> str:
        return f"{self.exporter} {self.mode} {'optimised' if self.optimised else 'plain'}"


WAYS = tuple(Way(e, m, o) for e in ("legacy", "dynamo") for m in ("train", "eval") for o in (False, True))


@dataclass(frozen=True)
class Cell:
    """`failed` is the step that failed, "" if none did, and `why`. `precision` is what the errors are within;
    `compared` of `parameters` gradients were compared by name (weights that the exporter folded are others).
    `banded` is the share of activation bytes that the imported graph can band, and the original's."""

    network: str
    way: str
    failed: str = ""
    why: str = ""
    runtime_error: float | None = None
    error: float | None = None
    precision: str = ""
    compared: int = 0
    parameters: int = 0
    banded: float | None = None
    banded_original: float | None = None


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A small network with no two weights equal, and two images."""
    options, size = NETS[name]
    model = build(name, **options)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand(tensor.shape, generator=made)
    return model, torch.rand(2, 3, *size, generator=made)


def export(model: nn.Module, x: Tensor, file: Path, way: Way) -> None:
    """Exporters warn about themselves; here that is noise."""
    model.train(way.mode == "train")
    options: dict[str, Any] = {"dynamo": True, "optimize": way.optimised, "verbose": False}
    if way.exporter == "legacy":
        training = TrainingMode.TRAINING if way.mode == "train" else TrainingMode.EVAL
        options = {"dynamo": False, "training": training, "do_constant_folding": way.optimised}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            torch.onnx.export(model, (x,), str(file), **options)
        finally:
            logging.disable(logging.NOTSET)


def examine(name: str, way: Way, folder: Path) -> Cell:
    """The whole cell; a step that fails ends it with the reason."""
    cell = Cell(name, str(way))
    step = "export"
    try:
        model, x = network(name)
        file = folder / "model.onnx"
        export(model, x, file, way)
        step = "import"
        loaded = load_onnx(file)
        step = "onnxruntime"
        cell = replace(cell, runtime_error=runtime_error(file, loaded.module, x))
        assert cell.runtime_error is not None
        if cell.runtime_error > SINGLE:
            return replace(cell, failed=step, why=f"off by {cell.runtime_error:.1e}")
        step = "gradients"
        cell = _with_gradients(cell, model, loaded, x, way)
        if cell.failed:
            return cell
        step = "banding"
        return _with_banding(cell, model, loaded, x, way)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return replace(cell, failed=step, why=f"{type(error).__name__}: {lines[0][:200]}")


# -- onnxruntime ---------------------------------------------------------------------------------------------


def runtime_error(file: Path, module: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs in eval mode, relative to the largest output."""
    proto = onnx.load(file)
    for_inference(proto)
    with torch.no_grad():
        got = module.eval()(x)
    return relative(got, _by_onnxruntime(proto, x))


def _by_onnxruntime(proto: onnx.ModelProto, x: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return torch.from_numpy(np.asarray(found))


def for_inference(proto: onnx.ModelProto) -> None:
    """A file exported for training as the same network in eval mode, which is all that onnxruntime runs.

    The newer exporter gives a Conv3d without bias one of zeros, of the wrong rank; onnxruntime refuses that.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer}
    expanded = {node.output[0] for node in proto.graph.node if node.op_type == "Expand"}
    for node in proto.graph.node:
        if node.op_type == "Conv" and ranks.get(node.input[1]) == 5 and expanded & set(node.input[2:]):
            del node.input[2:]
    for graph in (proto.graph, *proto.functions):
        for node in graph.node:
            if node.op_type == "BatchNormalization":
                for item in node.attribute:
                    if item.name == "training_mode":
                        item.i = 0
                del node.output[1:]
            elif node.op_type == "Dropout":
                del node.input[2:]


# -- gradients -----------------------------------------------------------------------------------------------


def relative(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    largest = max(wanted.abs().max().item(), floor, 1e-30)
    return (got - wanted).abs().max().item() / largest


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients by parameter name and the input's, for a loss that treats no two outputs alike."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    weight = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * weight + 0.1 * y.square()).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), found, x.grad


def _with_gradients(cell: Cell, model: nn.Module, loaded: OnnxModel, x: Tensor, way: Way) -> Cell:
    """In float64, and in train mode running statistics as well."""
    ours, theirs, x = loaded.module.double(), model.double(), x.double()
    for module in (ours, theirs):
        module.train(way.mode == "train")
    same = _same_weights(ours, theirs)
    y, wanted, dx = gradients(theirs, x)
    z, got, dz = gradients(ours, x)
    largest = max(g.abs().max().item() for g in wanted.values())
    errors = [relative(z, y), relative(dz, dx)]
    for mine, other in same.items():
        turned = got[mine].shape != wanted[other].shape
        errors.append(relative(got[mine].t() if turned else got[mine], wanted[other], 1e-3 * largest))
    buffers = dict(theirs.named_buffers())
    errors += [
        relative(b, buffers[k]) for k, b in ours.named_buffers() if k in buffers and b.is_floating_point()
    ]
    error = max(errors)
    cell = replace(cell, error=error, compared=len(same), parameters=len(wanted))
    if error > SINGLE:
        noted = any("batch norm" in note for note in loaded.notes)
        folded = "; the exporter folded batch norm away, as the importer's note says" if noted else ""
        return replace(cell, failed="gradients", why=f"off by {error:.1e}{folded}")
    if way.mode == "train" and len(same) < len(wanted):
        missing = sorted(set(wanted) - set(same.values()))
        return replace(cell, failed="gradients", why=f"no parameter for {', '.join(missing[:3])} ...")
    return replace(cell, precision="float64" if error <= EXACT else "float32")


def _same_weights(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """Parameters of the same values: by name, or by values (a linear weight, transposed, lost its name)."""
    wanted = dict(theirs.named_parameters())
    found: dict[str, str] = {}
    for name, parameter in ours.named_parameters():
        candidates = [name] if name in wanted else [n for n in wanted if n not in found.values()]
        for other in candidates:
            value = wanted[other]
            forms = (value, value.t()) if value.dim() == 2 else (value,)
            if any(v.shape == parameter.shape and torch.equal(v, parameter) for v in forms):
                found[name] = other
                break
    return found


# -- banding -------------------------------------------------------------------------------------------------


def _with_banding(cell: Cell, model: nn.Module, loaded: OnnxModel, x: Tensor, way: Way) -> Cell:
    training = way.mode == "train"
    graphs = [rowtune.trace(m.train(training), (x.double(),)) for m in (loaded.module, model)]
    (ours, left), (theirs, left_before) = (banded(g) for g in graphs)
    cell = replace(cell, banded=ours, banded_original=theirs)
    if left > left_before + 0.01 * sum(graphs[1].values[node.name].bytes for node in graphs[1].nodes):
        known = {op for _, op, _ in opaque_nodes(graphs[1])}
        new = sorted({f"{op}: {why}" for _, op, why in opaque_nodes(graphs[0]) if op not in known})
        return replace(
            cell, failed="banding", why=f"{ours:.2f} instead of {theirs:.2f}: {'; '.join(new)}"[:300]
        )
    return cell


def banded(graph: Graph) -> tuple[float, int]:
    """Activation bytes made by operators that stand in a stretch of rows, as a share; bytes of the others."""
    inside = {node.name for a, b in stretches(graph, 2) for node in graph.nodes[a:b]}
    sizes = {node.name: graph.values[node.name].bytes for node in graph.nodes}
    left = sum(size for name, size in sizes.items() if name not in inside)
    return 1 - left / sum(sizes.values()), left
