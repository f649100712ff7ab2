"""Where the weights go: a state dict as .safetensors or .pt, or back into the .onnx file they came from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from rowtune.errors import UsageError
from rowtune.train.checkpoint import write_tensors, write_torch
from rowtune.tune.step import Workload

Writer = Callable[[nn.Module, Path], None]


def writer_for(path: Path, work: Workload) -> Writer:
    """What writes such a file, by its ending, asked before training whether it can.

    Raises:
        UsageError: no such ending is known, or the model was no .onnx file.
        ModelError: a weight has no place of its own in the .onnx file.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return save_weights
    if suffix in (".pt", ".pth"):
        return _save_torch
    if suffix != ".onnx":
        raise UsageError(f"--save {path}: a file of weights ends in .safetensors, .pt or .onnx")
    source = work.problem.model
    if source.kind != "onnx":
        raise UsageError(
            f"--save {path}: weights go back into the .onnx file they came from, but the model is {source}; "
            "save .safetensors or .pt"
        )
    if path.exists() and path.samefile(source.text):
        raise UsageError(f"--save {path} is the model itself, which is never replaced; give another name")
    from rowtune.importers.onnx_write import check_homes, write_onnx

    check_homes(work.module, Path(source.text))
    return lambda module, to: write_onnx(module, Path(source.text), to)


def save_weights(module: nn.Module, path: Path) -> None:
    """The state dict as safetensors, whole or not at all. OSError where it cannot be written."""
    _whole(path, lambda to: write_tensors(to, module.state_dict()))


def _save_torch(module: nn.Module, path: Path) -> None:
    state = {k: v.detach().to("cpu", copy=True) for k, v in module.state_dict().items()}
    _whole(path, lambda to: write_torch(to, state))


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
