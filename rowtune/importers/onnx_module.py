"""An imported network: a flat list of steps over named values, with the weights as ordinary parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
import torch
from torch import Tensor, nn

from rowtune.errors import ModelError
from rowtune.importers.onnx_fold import evaluate
from rowtune.importers.onnx_node import Mode, OnnxNode, Static, Value, is_static, number, to_tensor
from rowtune.importers.onnx_ops import NOT_FOLDED, WITH_MODE, Operator
from rowtune.importers.onnx_rewrite import Use


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, by its path in the module."""

    path: str


@dataclass(frozen=True, eq=False)
class Constant:
    """A number or list of numbers that is no tensor until it meets one."""

    value: Static


OnnxRef: TypeAlias = str | Weight | Constant | None
"""Where a step finds an argument: an earlier value, a weight, a constant, or nowhere (an optional input)."""


@dataclass(frozen=True, eq=False)
class Branch:
    """One side of an If: steps that also see the values around them."""

    steps: tuple[OnnxStep, ...]
    outputs: tuple[OnnxRef, ...]


@dataclass(frozen=True, eq=False)
class OnnxStep:
    """outputs = function(node, *args); `drop` names the values nobody reads later."""

    node: OnnxNode
    proto: onnx.NodeProto
    function: Operator | None
    args: tuple[OnnxRef, ...]
    outputs: tuple[str, ...]
    drop: tuple[str, ...] = ()
    branches: tuple[Branch, Branch] | None = None


@dataclass(frozen=True)
class Home:
    """Where a weight lies in the file: the stored tensor `name`. Where layers read one tensor but are trained
    apart, `uses` are the inputs that are to read one of this name."""

    name: str
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True, eq=False)
class OnnxProgram:
    """All that a module is made of: steps, tensors by path, and the homes of those that are trained."""

    inputs: tuple[str, ...]
    steps: tuple[OnnxStep, ...]
    outputs: tuple[OnnxRef, ...]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    homes: Mapping[str, Home]


class OnnxNetwork(nn.Module):
    """Takes the graph's inputs in order; returns its output, or a tuple of them.

    Batch norm and dropout follow `train()` and `eval()`. Weights are parameters under the file's names,
    running statistics are buffers; fixed arrays are buffers that stay out of the state dict.
    """

    def __init__(self, program: OnnxProgram) -> None:
        super().__init__()
        self._inputs, self._steps, self._outputs = program.inputs, program.steps, program.outputs
        self.homes = program.homes
        for path, value in program.parameters.items():
            owner, leaf = self._owner(path)
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
        for path, value in program.buffers.items():
            owner, leaf = self._owner(path)
            owner.register_buffer(leaf, value)
        for path, value in program.constants.items():
            owner, leaf = self._owner(path)
            owner.register_buffer(leaf, value, persistent=False)

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        """The submodule that holds a weight, made where it does not exist yet, and the weight's own name."""
        *parts, leaf = path.split(".")
        owner: nn.Module = self
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf

    def forward(self, *inputs: Tensor) -> Any:
        """One run; ModelError for the wrong number of inputs, or a graph that contradicts itself."""
        if len(inputs) != len(self._inputs):
            raise ModelError(
                f"the model takes {len(self._inputs)} input(s) ({', '.join(self._inputs)}), got {len(inputs)}"
            )
        device = next((p.device for p in self.parameters()), inputs[0].device if inputs else None)
        mode = Mode(self.training, device or torch.device("cpu"))
        values: dict[str, Value] = dict(zip(self._inputs, inputs, strict=True))
        self._run(self._steps, values, mode)
        results = [self._find(ref, values) for ref in self._outputs]
        results = [to_tensor(r, mode.device) if is_static(r) else r for r in results]
        return results[0] if len(results) == 1 else tuple(results)

    def _find(self, ref: OnnxRef, values: Mapping[str, Value]) -> Value:
        if isinstance(ref, str):
            if ref not in values:
                raise ModelError(f"the graph reads {ref!r}, which nothing in it makes; export it again")
            return values[ref]
        if isinstance(ref, Constant):
            return ref.value
        if ref is None:
            return None
        found: Any = self
        for part in ref.path.split("."):
            found = getattr(found, part)
        return found

    def _run(self, steps: tuple[OnnxStep, ...], values: dict[str, Value], mode: Mode) -> None:
        for step in steps:
            args = [self._find(ref, values) for ref in step.args]
            try:
                results = self._call(step, args, values, mode)
            except Exception as error:
                if not isinstance(error, ModelError):
                    error.add_note(f"in ONNX operator {step.node.op} ({step.node.name})")
                raise
            for name, result in zip(step.outputs, results, strict=False):
                values[name] = result
            for name in step.drop:
                values.pop(name, None)

    def _call(self, step: OnnxStep, args: list[Value], values: dict[str, Value], mode: Mode) -> Any:
        node = step.node
        if step.branches is not None:
            return self._branch(step, args[0], values, mode)
        static = all(a is None or is_static(a) for a in args) and any(a is not None for a in args)
        if static and node.op not in NOT_FOLDED:
            return evaluate(node, step.proto, args)
        assert step.function is not None
        options: dict[str, Any] = {"mode": mode} if node.op in WITH_MODE else {}
        result = step.function(node, *args, **options)
        return result if isinstance(result, tuple) else (result,)

    def _branch(self, step: OnnxStep, condition: Value, values: dict[str, Value], mode: Mode) -> list[Value]:
        assert step.branches is not None
        chosen = step.branches[0 if number(step.node, condition, "condition") else 1]
        inner = dict(values)
        self._run(chosen.steps, inner, mode)
        return [self._find(ref, inner) for ref in chosen.outputs]
