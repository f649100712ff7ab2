"""What can be known without data: attributes, stored arrays, and nodes all of whose inputs are constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rowtune.errors import ModelError
from rowtune.importers import onnx_shape as shape
from rowtune.importers.onnx_node import OnnxNode, Static, Value, is_static

FLOATS = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    }
)


def array(proto: onnx.TensorProto) -> Static:
    """The values of a stored tensor. ModelError if its data do not fit its shape."""
    try:
        value: Static = numpy_helper.to_array(proto)
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError) as problem:
        raise ModelError(f"ONNX tensor {proto.name!r} cannot be read: {_first_line(problem)}") from problem
    return value


def decimal(value: float) -> float:
    """The shortest decimal of this float32: attributes are float32, but 1e-5 is what was meant."""
    return float(str(np.float32(value)))


def attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    """Attributes as Python values; tensors as arrays, graphs as they are."""
    found: dict[str, Any] = {}
    for item in proto.attribute:
        value = helper.get_attribute_value(item)
        if item.type == onnx.AttributeProto.FLOAT:
            value = decimal(value)
        elif item.type == onnx.AttributeProto.FLOATS:
            value = [decimal(v) for v in value]
        elif item.type == onnx.AttributeProto.INTS:
            value = list(value)
        elif item.type == onnx.AttributeProto.STRING:
            value = value.decode("utf-8", "replace")
        elif item.type == onnx.AttributeProto.TENSOR:
            value = array(value)
        found[item.name] = value
    return found


def evaluate(node: OnnxNode, proto: onnx.NodeProto, inputs: list[Value]) -> list[Static]:
    """The node's outputs for constant inputs, by ONNX's own reference implementation."""
    if node.op in ("Constant", "ConstantOfShape", "Identity", "Shape", "Size"):
        functions: dict[str, Any] = {
            "Constant": shape.constant,
            "ConstantOfShape": shape.constant_of_shape,
            "Identity": shape.identity,
            "Shape": shape.shape,
            "Size": shape.size,
        }
        try:
            return [np.asarray(functions[node.op](node, *inputs))]
        except ValueError as problem:
            raise node.error(_first_line(problem)) from problem
    named = {name: value for name, value in zip(proto.input, inputs, strict=True) if is_static(value)}
    try:
        results = _evaluator(node, proto, named).run(None, named)
    except Exception as problem:  # whatever a node that contradicts its inputs provokes in numpy
        raise node.error(f"it cannot be computed: {_first_line(problem)}") from problem
    return [np.asarray(result) for result in results]


def _evaluator(node: OnnxNode, proto: onnx.NodeProto, inputs: dict[str, Static]) -> ReferenceEvaluator:
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    graph = helper.make_graph([proto], "fold", values, outputs)
    # The oldest IR version that the reader takes; the node's meaning hangs on the opset alone.
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.opset)]))


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:200] if lines else type(problem).__name__
