"""Patterns that exporters write: random numbers by shape, casts, operators defined by simpler ones."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from test_onnx_import import load, make

import rowtune
from rowtune.errors import ModelError
from rowtune.importers.onnx_file import load_onnx

node = helper.make_node
SHAPE = (2, 4, 8, 8)


def stochastic_depth(draw: Any) -> list[Any]:
    """What torch.empty(n, 1, 1, 1).bernoulli_(0.5) * x becomes: numbers drawn for a shape, not for data."""
    return [
        node("Shape", ["x"], ["s"], start=0, end=1),
        node("Concat", ["s", "ones"], ["target"], axis=0),
        node("Expand", ["half", "target"], ["p"]),
        draw,
        node("Mul", ["x", "mask"], ["y"]),
    ]


@pytest.mark.parametrize(
    ("draw", "values"),
    [
        (node("Bernoulli", ["p"], ["mask"]), 2),
        (node("RandomUniformLike", ["p"], ["mask"]), 2),
        (node("RandomNormalLike", ["p"], ["mask"]), 2),
    ],
    ids=lambda part: getattr(part, "op_type", ""),
)
@pytest.mark.parametrize("sizes", [SHAPE, ("n", 4, "h", "w")], ids=["static", "dynamic"])
def test_random_numbers_for_a_shape(draw, values, sizes, tmp_path):
    """Drawn anew at every step, and one operator in the graph, whether or not the file knows its sizes."""
    weights = {"ones": np.int64([1, 1, 1]), "half": np.float32([0.5])}
    module = load(make(stochastic_depth(draw), weights, shape=sizes), tmp_path)
    x = torch.ones(64, *SHAPE[1:])
    torch.manual_seed(0)
    assert len(module(x)[:, 0, 0, 0].unique()) >= values
    assert not torch.equal(module(x), module(x))
    graph = rowtune.trace(module, (x,))
    assert [n.op for n in graph.nodes if n.random]
    assert "empty_like" not in {n.op for n in graph.nodes}


def test_casts_are_traced(tmp_path):
    """torch.export asserts the type before a cast; an assertion is no operator."""
    model = make([node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE), node("Relu", ["d"], ["y"])])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    module = load(model, tmp_path)
    graph = rowtune.trace(module, (torch.randn(SHAPE),))
    assert [n.op for n in graph.nodes][-1] == "relu"
    assert not any("assert" in n.op for n in graph.nodes)


def test_a_definition_that_depends_on_types(tmp_path):
    """CenterCropPad is defined by simpler operators once the rank of its stored shape is known."""
    model = make(
        [node("CenterCropPad", ["x", "shape"], ["y"], axes=[2, 3])], {"shape": np.int64([4, 6])}, opset=18
    )
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(load(model, tmp_path)(x), x[:, :, 2:6, 1:7])


def test_a_definition_within_a_definition(tmp_path):
    """SoftmaxCrossEntropyLoss is defined by NegativeLogLikelihoodLoss, and that by Gather and its kin."""
    labels = np.random.default_rng(0).integers(0, 4, (1, 8, 8))
    model = make([node("SoftmaxCrossEntropyLoss", ["x", "labels"], ["y"])], {"labels": labels})
    x = torch.randn(1, 4, 8, 8)
    wanted = torch.nn.functional.cross_entropy(x, torch.from_numpy(labels))
    torch.testing.assert_close(load(model, tmp_path)(x), wanted)


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("counted", [0, 1])
def test_a_dilated_average_pool_counts_what_it_covers(ceil, counted, tmp_path):
    pads = [1, 1, 1, 1]
    model = make(
        [
            node(
                "AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[3, 3], strides=[4, 4], pads=pads,
                ceil_mode=ceil, count_include_pad=counted,
            )
        ],
        opset=22,
    )  # fmt: skip
    x = torch.randn(1, 4, 8, 8)
    y = load(model, tmp_path)(x)
    assert y.shape[2] == (3 if ceil else 2)
    # The first window's taps lie at -1 and 2: one real element, and three of the padding.
    torch.testing.assert_close(y[:, :, 0, 0], x[:, :, 2, 2] / (4 if counted else 1))


def test_a_value_that_nothing_makes_is_named(tmp_path):
    module = load(make([node("Relu", ["x"], ["y"])]), tmp_path)
    step = module._steps[0]
    module._steps = (type(step)(step.node, step.proto, step.function, ("ghost",), step.outputs),)
    with pytest.raises(ModelError, match="ghost"):
        module(torch.randn(1, 4, 8, 8))


class Shuffled(torch.nn.Module):
    """Space to depth and back, as exporters take it apart; and a transpose that only looks like it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.pixel_unshuffle(x, 2).sigmoid()
        n, c, h, w = small.shape
        wide = small.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
        odd = x.reshape(n, 2, 2, h, 2, w * 2).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)
        return wide * 2 + odd


@pytest.mark.parametrize("dynamo", [False, True])
def test_pixel_shuffles_come_back_whole(dynamo, tmp_path):
    x = torch.randn(2, 4, 8, 12)
    file = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Shuffled(), (x,), str(file), dynamo=dynamo, **({"verbose": False} if dynamo else {})
        )
    module = load_onnx(file).module
    assert torch.equal(module(x), Shuffled()(x))
    made = [n.op for n in rowtune.trace(module, (x,)).nodes]
    assert made.count("pixel_unshuffle") == 1 and made.count("pixel_shuffle") == 1
    assert made.count("permute") == 1
