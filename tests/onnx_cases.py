"""The onnx package's own operator tests, as cases that the importer is run on.

Each is one node (or the function that defines it) with inputs and outputs. A test counts as claimed if all
its operators stand in the table and all its types exist in torch; a claimed test passes, or stands in
DIFFERENT with a reason. Inputs that say how (axes, sizes, scales ...) are stored in the file, as exporters
do. The test suite and benchmarks/onnx_conformance.py both run them.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from rowtune.errors import ModelError
from rowtune.importers.onnx_file import from_proto, has_body
from rowtune.importers.onnx_node import DTYPES
from rowtune.importers.onnx_ops import CONTROL, OPERATORS

PASSED = "passed"

# Name prefixes of tests that fail, and why that is as it should be.
DIFFERENT: dict[str, str] = {
    "test_batchnorm_example_training_mode": "follows the module's mode, with PyTorch's unbiased variance",
    "test_batchnorm_epsilon_training_mode": "follows the module's mode, with PyTorch's unbiased variance",
    "test_bernoulli": "random",
    "test_training_dropout": "random, and follows the module's mode",
    "test_gathernd_example_int32_batch_dim1": "refused: batch_dims",
    "test_identity_opt": "refused: an optional as input",
    "test_identity_sequence": "refused: a sequence as input",
    "test_sequence_insert": "refused: a sequence as input",
    "test_maxpool_with_argmax_2d_precomputed_strides": "refused: column-major indices",
    "test_nonzero_example": "refused: the shape depends on data",
    "test_reduce_max_empty_set": "torch has no maximum of nothing",
    "test_reduce_min_empty_set": "torch has no minimum of nothing",
    "test_resize_": "refused where torch has no such resampling",
    "test_scatternd_m": "refused: reductions other than add",
    "test_top_k_same_values": "equal values come in torch's order",
    "test_blackmanwindow": "refused: a range whose length is data",
    "test_hammingwindow": "refused: a range whose length is data",
    "test_hannwindow": "refused: a range whose length is data",
}

# Operators that the importer refuses, and why.
_INTEGER = "integer arithmetic: no gradient passes through it"
_RECURRENT = "a recurrence: rowtune is for convolutional networks"
_TEXT = "text, not tensors"
_SIGNAL = "audio features, computed before the network"
_DETECTION = (
    "detection after the network: its result's shape depends on data, or no gradient passes through it"
)
_SEQUENCE = "sequences whose length changes while the network runs"
_DATA = "the shape of its result depends on data"
LEFT_OUT: dict[str, str] = {
    "BitCast": _INTEGER,
    "Col2Im": "a sum of overlapping patches; exporters write a transposed convolution",
    "Compress": _DATA,
    "ConvInteger": _INTEGER,
    "CumProd": "a running product; no convolutional network has been seen with one",
    "DFT": _SIGNAL,
    "DeformConv": "reads rows at places that depend on data; torch itself has no such operator",
    "DequantizeLinear": _INTEGER,
    "Det": "determinants; no convolutional network has been seen with one",
    "GRU": _RECURRENT,
    "ImageDecoder": "reads image files, before the network",
    "LSTM": _RECURRENT,
    "Loop": _RECURRENT,
    "MatMulInteger": _INTEGER,
    "MaxRoiPool": _DETECTION,
    "MaxUnpool": "scatters by the indices of a pool elsewhere; exporters do not write it",
    "MelWeightMatrix": _SIGNAL,
    "Multinomial": "random numbers from data; not trainable",
    "NonMaxSuppression": _DETECTION,
    "Optional": _SEQUENCE,
    "OptionalGetElement": _SEQUENCE,
    "OptionalHasElement": _SEQUENCE,
    "QLinearConv": _INTEGER,
    "QLinearMatMul": _INTEGER,
    "QuantizeLinear": _INTEGER,
    "RNN": _RECURRENT,
    "RegexFullMatch": _TEXT,
    "ReverseSequence": _RECURRENT,
    "RoiAlign": _DETECTION,
    "STFT": _SIGNAL,
    "Scan": _RECURRENT,
    "Scatter": "deprecated since opset 11: ScatterElements took its place",
    "SequenceEmpty": _SEQUENCE,
    "SequenceErase": _SEQUENCE,
    "SequenceInsert": _SEQUENCE,
    "StringConcat": _TEXT,
    "StringNormalizer": _TEXT,
    "StringSplit": _TEXT,
    "TensorScatter": "the cache of an attention layer that generates text",
    "TfIdfVectorizer": _TEXT,
    "Unique": _DATA,
}

# Coarser than float32: ONNX's reference accumulates half precision in another order.
HALF = {"float16": (2e-3, 1e-3), "bfloat16": (2e-2, 1e-2)}

STORED = {"Resize", "Clip", "Pad", "Range", "ConstantOfShape", "Upsample", "OneHot", "Dropout"}
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Pow", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}


@cache
def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return list(collect_testcases(None))


def standing(op: str) -> str:
    """How the importer stands to an operator: claimed, expanded (ONNX defines it by simpler ones), or the
    reason why it is left out; "" where nobody has thought of it yet."""
    if op in OPERATORS or op in CONTROL:
        return "claimed"
    if has_body(op):
        return "expanded"
    return LEFT_OUT.get(op, "")


def operators(case: Any) -> set[str]:
    domains = {node.domain for node in case.model.graph.node}
    names = {node.op_type for node in case.model.graph.node}
    return names if domains <= {"", "ai.onnx"} else {"foreign"}


def claimed(case: Any) -> bool:
    graph = case.model.graph
    kinds = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output) if _is_tensor(v)]
    kinds += [a.i for n in graph.node for a in n.attribute if a.name == "to"]
    known = all(DTYPES.get(k) is not None and not _unsigned(DTYPES[k]) for k in kinds)
    return operators(case) <= set(OPERATORS) and known


def _is_tensor(value: Any) -> bool:
    return bool(value.type.HasField("tensor_type"))


def _unsigned(kind: torch.dtype) -> bool:
    """torch stores these but computes almost nothing with them."""
    return kind in (torch.uint16, torch.uint32, torch.uint64)


def tensor(value: Any) -> Any:
    if isinstance(value, list):
        return [tensor(v) for v in value]
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def stored(case: Any, inputs: list[Any]) -> tuple[onnx.ModelProto, list[Any]]:
    """The model with the inputs that say how as initializers, and the data that remain."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    names = operators(case)
    main = {n.input[0] for n in model.graph.node if n.input and n.op_type not in ("Range", "ConstantOfShape")}
    kept, data = [], []
    for info, value in zip(case.model.graph.input, inputs, strict=False):
        integer = not isinstance(value, list | onnx.TensorProto) and np.asarray(value).dtype.kind in "iu"
        how = (integer and (info.name == "axes" or not names & ARITHMETIC)) or names & STORED
        if how and info.name not in main and not isinstance(value, list):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), info.name))
        else:
            kept.append(info)
            data.append(value)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model, data


def run(case: Any) -> None:
    opset = next(o.version for o in case.model.opset_import if o.domain == "")
    for inputs, outputs in case.data_sets:
        model, data = stored(case, inputs)
        module = from_proto(model, opset).module.eval()
        got = module(*[tensor(v) for v in data])
        for result, wanted in zip(got if isinstance(got, tuple) else (got,), outputs, strict=False):
            compare(case, result, tensor(wanted))


def compare(case: Any, result: Any, wanted: Any) -> None:
    if isinstance(wanted, list):
        for a, b in zip(result, wanted, strict=True):
            compare(case, a, b)
        return
    rtol, atol = max(case.rtol, 1e-5), max(case.atol, 1e-5)
    for name, (relative, absolute) in HALF.items():
        if name == str(wanted.dtype).removeprefix("torch."):
            rtol, atol = max(rtol, relative), max(atol, absolute)
    torch.testing.assert_close(result.detach(), wanted, rtol=rtol, atol=atol, equal_nan=True)


def result(case: Any) -> str:
    """ "passed", or why not: of a test that should differ, or unexpected (with the error)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(case)
    except Exception as error:
        known = next((why for prefix, why in DIFFERENT.items() if case.name.startswith(prefix)), "")
        refused = isinstance(error, ModelError) or not case.name.startswith("test_resize_")
        if known and refused:
            return known
        return f"unexpected: {type(error).__name__}: {str(error)[:200]}"
    return PASSED
