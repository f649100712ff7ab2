"""The ONNX operators that can be imported: one table, operator name -> function of a node and its values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from rowtune.importers import onnx_norm as norm
from rowtune.importers import onnx_pointwise as point
from rowtune.importers import onnx_resize as resize
from rowtune.importers import onnx_shape as shape
from rowtune.importers import onnx_window as window
from rowtune.importers.onnx_norm import reduction
from rowtune.importers.onnx_pointwise import binary, comparison, extreme, unary, variadic

Operator = Callable[..., Any]

OPERATORS: dict[str, Operator] = {
    # windows and resampling
    "AveragePool": window.average_pool,
    "Conv": window.conv,
    "ConvTranspose": window.conv_transpose,
    "DepthToSpace": window.depth_to_space,
    "GlobalAveragePool": window.global_average_pool,
    "GlobalLpPool": window.global_lp_pool,
    "GlobalMaxPool": window.global_max_pool,
    "GridSample": window.grid_sample,
    "LpPool": window.lp_pool,
    "MaxPool": window.max_pool,
    "Pad": window.pad,
    "Resize": resize.resize,
    "SpaceToDepth": window.space_to_depth,
    "Upsample": resize.upsample,
    # pointwise, one input
    "Abs": unary(torch.abs),
    "Acos": unary(torch.acos),
    "Acosh": unary(torch.acosh),
    "Asin": unary(torch.asin),
    "Asinh": unary(torch.asinh),
    "Atan": unary(torch.atan),
    "Atanh": unary(torch.atanh),
    "BitwiseNot": unary(torch.bitwise_not),
    "Cast": point.cast,
    "Ceil": unary(torch.ceil),
    "Celu": point.celu,
    "Clip": point.clip,
    "Cos": unary(torch.cos),
    "Cosh": unary(torch.cosh),
    "Elu": point.elu,
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Gelu": point.gelu,
    "HardSigmoid": point.hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "Identity": shape.identity,
    "IsInf": point.is_inf,
    "IsNaN": unary(torch.isnan),
    "LeakyRelu": point.leaky_relu,
    "Log": unary(torch.log),
    "Mish": unary(F.mish),
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Reciprocal": unary(torch.reciprocal),
    "Relu": unary(torch.relu),
    "Round": unary(torch.round),
    "Selu": point.selu,
    "Shrink": point.shrink,
    "Sigmoid": unary(torch.sigmoid),
    "Sign": unary(torch.sign),
    "Sin": unary(torch.sin),
    "Sinh": unary(torch.sinh),
    "Softplus": unary(F.softplus),
    "Softsign": unary(F.softsign),
    "Sqrt": unary(torch.sqrt),
    "Swish": point.swish,
    "Tan": unary(torch.tan),
    "Tanh": unary(torch.tanh),
    "ThresholdedRelu": point.thresholded_relu,
    # pointwise, several inputs
    "Add": binary(operator.add),
    "And": comparison(torch.logical_and),
    "BitShift": point.bit_shift,
    "BitwiseAnd": comparison(torch.bitwise_and),
    "BitwiseOr": comparison(torch.bitwise_or),
    "BitwiseXor": comparison(torch.bitwise_xor),
    "CastLike": point.cast_like,
    "Div": point.div,
    "Equal": binary(operator.eq),
    "Greater": binary(operator.gt),
    "GreaterOrEqual": binary(operator.ge),
    "Less": binary(operator.lt),
    "LessOrEqual": binary(operator.le),
    "Max": extreme(torch.maximum, "min"),
    "Mean": point.mean,
    "Min": extreme(torch.minimum, "max"),
    "Mod": point.mod,
    "Mul": binary(operator.mul),
    "Or": comparison(torch.logical_or),
    "PRelu": point.prelu,
    "Pow": point.power,
    "Sub": binary(operator.sub),
    "Sum": variadic(torch.add),
    "Where": point.where,
    "Xor": comparison(torch.logical_xor),
    # normalisation, reductions, products
    "ArgMax": norm.arg_extreme,
    "ArgMin": norm.arg_extreme,
    "BatchNormalization": norm.batch_norm,
    "Dropout": norm.dropout,
    "Einsum": norm.einsum,
    "Gemm": norm.gemm,
    "GroupNormalization": norm.group_norm,
    "Hardmax": norm.hardmax,
    "InstanceNormalization": norm.instance_norm,
    "LRN": norm.lrn,
    "LayerNormalization": norm.layer_norm,
    "LogSoftmax": norm.softmax,
    "LpNormalization": norm.lp_normalization,
    "MatMul": norm.matmul,
    "MeanVarianceNormalization": norm.mean_variance_norm,
    "RMSNormalization": norm.rms_norm,
    "ReduceL1": reduction(norm.r_l1),
    "ReduceL2": reduction(norm.r_l2),
    "ReduceLogSum": reduction(norm.r_log_sum),
    "ReduceLogSumExp": reduction(norm.r_log_sum_exp),
    "ReduceMax": reduction(norm.r_max),
    "ReduceMean": reduction(norm.r_mean),
    "ReduceMin": reduction(norm.r_min),
    "ReduceProd": reduction(norm.r_prod),
    "ReduceSum": reduction(norm.r_sum),
    "ReduceSumSquare": reduction(norm.r_sum_square),
    "Softmax": norm.softmax,
    # data movement, shapes, sequences
    "Bernoulli": shape.bernoulli,
    "Concat": shape.concat,
    "ConcatFromSequence": shape.concat_from_sequence,
    "Constant": shape.constant,
    "ConstantOfShape": shape.constant_of_shape,
    "CumSum": shape.cumsum,
    "Expand": shape.expand,
    "EyeLike": shape.eye_like,
    "Flatten": shape.flatten,
    "Gather": shape.gather,
    "GatherElements": shape.gather_elements,
    "GatherND": shape.gather_nd,
    "NonZero": shape.nonzero,
    "OneHot": shape.one_hot,
    "RandomNormal": shape.random,
    "RandomNormalLike": shape.random_like,
    "RandomUniform": shape.random,
    "RandomUniformLike": shape.random_like,
    "Range": shape.range_,
    "Reshape": shape.reshape,
    "ScatterElements": shape.scatter_elements,
    "ScatterND": shape.scatter_nd,
    "SequenceAt": shape.sequence_at,
    "SequenceConstruct": shape.sequence_construct,
    "SequenceLength": shape.sequence_length,
    "Shape": shape.shape,
    "Size": shape.size,
    "Slice": shape.slice_,
    "Split": shape.split,
    "SplitToSequence": shape.split_to_sequence,
    "Squeeze": shape.squeeze,
    "Tile": shape.tile,
    "TopK": shape.top_k,
    "Transpose": shape.transpose,
    "Trilu": shape.trilu,
    "Unsqueeze": shape.unsqueeze,
    # not ONNX: what the importer makes of MatMul (+ Add) with a weight, and of a group norm and a pixel
    # shuffle taken apart
    "rowtune.Linear": norm.linear,
    "rowtune.Shuffle": window.shuffle_of_reshapes,
    "rowtune.GroupNorm": norm.group_norm_of_reshapes,
}

# Called with `mode=`: training or not, and the device.
WITH_MODE = frozenset(
    {
        *("BatchNormalization", "Bernoulli", "Dropout", "RandomNormal", "RandomNormalLike"),
        *("RandomUniform", "RandomUniformLike"),
    }
)

# Results differ from call to call, or from mode to mode: never computed beforehand.
NOT_FOLDED = WITH_MODE

# The interpreter's own: a branch is a graph, not a value.
CONTROL = frozenset({"If"})

NORMS = frozenset(
    {
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "RMSNormalization",
        "rowtune.GroupNorm",
    }
)
