"""Trained weights go back into the user's own .onnx file: same graph, other values, equal in onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, checker, helper, numpy_helper
from torch import nn

from rowtune.errors import ModelError
from rowtune.importers.onnx_file import load_onnx
from rowtune.importers.onnx_write import check_homes, write_onnx

X = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Two batch norms of one size, whose first statistics exporters merge, a dropout, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.m = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.m(self.b(torch.relu(self.n(self.a(x))))))
        return self.head(self.drop(x.mean((2, 3))))


EXPORTS: dict[str, dict[str, Any]] = {
    "training": {"dynamo": False, "training": torch.onnx.TrainingMode.TRAINING, "do_constant_folding": False},
    "fused": {"dynamo": False},
    "dynamo": {"dynamo": True, "optimize": False, "external_data": True, "verbose": False},
}


def trained(path: Path) -> Any:
    """Three steps, hard enough that every weight and statistic moves."""
    module = load_onnx(path).module.train()
    assert module.training
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        out = module(X).flatten(1)
        (out - torch.linspace(-1, 1, out.shape[1])).square().mean().backward()
        optimizer.step()
    return module.eval()


def run(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


def written(path: Path, out: Path) -> Any:
    """Train, write, and compare with onnxruntime and with what the copy says when it is read again."""
    before = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    module = trained(path)
    check_homes(module, path)
    write_onnx(module, path, out)
    checker.check_model(str(out))
    with torch.no_grad():
        wanted = module(X).numpy()
    np.testing.assert_allclose(run(out), wanted, rtol=1e-5, atol=1e-6)
    again = load_onnx(out).module.state_dict()
    assert again.keys() == module.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in module.state_dict().items())
    assert all(p.read_bytes() == data for p, data in before.items())  # the user's own files
    return module


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_exported_network_comes_home(tmp_path: Path, kind: str) -> None:
    net = Net().train(kind != "fused")
    path, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (X,), str(path), **EXPORTS[kind])
    module = written(path, out)
    first, second = (onnx.load(p, load_external_data=False) for p in (path, out))
    assert [o.version for o in first.opset_import] == [o.version for o in second.opset_import]
    assert [i.name for i in first.graph.input] == [i.name for i in second.graph.input]
    assert {t.name for t in first.graph.initializer} <= {t.name for t in second.graph.initializer}
    if kind != "fused":
        assert "n.running_mean" in module.homes and float(module.state_dict()["n.running_mean"].abs().sum())
        nodes = {node.op_type for node in second.graph.node}
        assert "BatchNormalization" in nodes
    external = {t.name for t in first.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert bool(external) == (kind == "dynamo") == (tmp_path / "out.onnx.data").exists()
    assert external == {t.name for t in second.graph.initializer if t.data_location == TensorProto.EXTERNAL}


def tensor(name: str, *shape: int, fill: float | None = None) -> onnx.TensorProto:
    drawn = np.random.default_rng(sum(map(ord, name))).standard_normal(shape) * 0.3
    values = drawn if fill is None else np.full(shape, fill)
    return numpy_helper.from_array(values.astype(np.float32), name)


def model(path: Path, nodes: list[Any], stored: list[onnx.TensorProto], out: str = "y") -> Path:
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 12, 8])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [2, 3, 12, 8])], stored,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(made)
    onnx.save(made, path)
    return path


def conv(x: str, w: str, y: str, *bias: str) -> Any:
    return helper.make_node("Conv", [x, w, *bias], [y], name=y, pads=[1, 1, 1, 1])


def norm(x: str, y: str, *weights: str) -> Any:
    return helper.make_node("BatchNormalization", [x, *weights], [y], name=y)


def merged_biases(path: Path) -> Path:
    """One tensor of zeros is the bias of two layers."""
    nodes = [conv("x", "a.weight", "h", "zeros"), conv("h", "b.weight", "y", "zeros")]
    return model(path, nodes, [tensor("a.weight", 3, 3, 3, 3), tensor("b.weight", 3, 3, 3, 3),
                               tensor("zeros", 3, fill=0.0)])  # fmt: skip


def noted_biases(path: Path) -> Path:
    """The same, with the names the older exporter notes, one of which two layers share again."""
    nodes = [
        helper.make_node("Identity", ["a.bias"], ["b.bias"]),
        conv("x", "a.weight", "h", "a.bias"), conv("h", "b.weight", "i", "b.bias"),
        conv("i", "c.weight", "y", "b.bias"),
    ]  # fmt: skip
    weights = [tensor(f"{n}.weight", 3, 3, 3, 3) for n in "abc"]
    return model(path, nodes, [*weights, tensor("a.bias", 3, fill=0.0)])


def merged_statistics(path: Path) -> Path:
    """Zeros that are shift and running mean at once, and ones that are scale and running variance, of two."""
    nodes = [
        conv("x", "a.weight", "h"), norm("h", "i", "ones", "zeros", "zeros", "ones"),
        conv("i", "b.weight", "j"), norm("j", "y", "ones", "zeros", "zeros", "ones"),
    ]  # fmt: skip
    stored = [tensor("a.weight", 3, 3, 3, 3), tensor("b.weight", 3, 3, 3, 3)]
    return model(path, nodes, [*stored, tensor("ones", 3, fill=1.0), tensor("zeros", 3, fill=0.0)])


def constant_weights(path: Path) -> Path:
    """Weights in Constant nodes, as some exporters keep them."""
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor("", 3, 3, 3, 3)),
        helper.make_node("Constant", [], ["b"], value=tensor("", 3)), conv("x", "w", "y", "b"),
    ]  # fmt: skip
    return model(path, nodes, [])


@pytest.mark.parametrize("make", [merged_biases, noted_biases, merged_statistics, constant_weights])
def test_weights_without_a_tensor_of_their_own_get_one(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "m.onnx")
    module = written(path, tmp_path / "out.onnx")
    biases = [v for k, v in module.state_dict().items() if v.dim() == 1]
    assert len({tuple(b.tolist()) for b in biases}) == len(biases)  # they were trained apart


def test_a_weight_that_was_computed_cannot_go_back(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["flat"], value=tensor("", 81)),
        helper.make_node("Constant", [], ["shape"],
                         value=numpy_helper.from_array(np.array([3, 3, 3, 3]), "")),
        helper.make_node("Reshape", ["flat", "shape"], ["w"]), conv("x", "w", "y"),
    ]  # fmt: skip
    path = model(tmp_path / "m.onnx", nodes, [])
    with pytest.raises(ModelError, match=r"weight w cannot go back into .*Save .safetensors"):
        check_homes(load_onnx(path).module, path)


@pytest.mark.parametrize("biases", [["zeros", "zeros"], ["own", "zeros"]])
def test_what_lies_in_a_function_stays_there(tmp_path: Path, biases: list[str]) -> None:
    """Two layers in a function read one tensor of zeros: neither can have one of its own."""
    opset = [helper.make_opsetid("", 17)]
    inside = [conv("a", "v", "h", biases[0]), conv("h", "w", "b", biases[1])]
    function = helper.make_function(
        "own.domain", "Two", ["a", "v", "w", *sorted(set(biases))], ["b"], inside, opset
    )
    weights = [tensor("v", 3, 3, 3, 3), tensor("w", 3, 3, 3, 3), tensor("own", 3), tensor("zeros", 3, fill=0)]
    stored = [t for t in weights if t.name in ("v", "w", *biases)]
    graph = helper.make_graph(
        [helper.make_node("Two", ["x", "v", "w", *sorted(set(biases))], ["y"], domain="own.domain")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 12, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 12, 8])], stored,
    )  # fmt: skip
    made = helper.make_model(
        graph,
        functions=[function],
        opset_imports=[*opset, helper.make_opsetid("own.domain", 1)],
        ir_version=9,
    )
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    if len(set(biases)) == 1:
        with pytest.raises(ModelError, match="lies in a function or a branch"):
            check_homes(load_onnx(path).module, path)
    else:
        written(path, tmp_path / "out.onnx")


def test_a_file_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", [conv("x", "w", "y")], [tensor("w", 3, 3, 3, 3)])
    module = load_onnx(path).module
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[0, 0, 0, 0])]
    model(path, nodes, [tensor("w", 3, 3, 1, 1)])
    with pytest.raises(ModelError, match=r"\[3, 3, 1, 1\] in .*has changed"):
        write_onnx(module, path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists() and len(list(tmp_path.iterdir())) == 1


def test_half_precision_stays_what_it_was(tmp_path: Path) -> None:
    """A network that is trained in float32 goes back into a file of float16."""
    half = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float16), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 3, 12, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, 3, 12, 8])], [half],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    module = load_onnx(path).module.float()
    with torch.no_grad():
        module.w.fill_(0.1)
    write_onnx(module, path, tmp_path / "out.onnx")
    (found,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert found.data_type == TensorProto.FLOAT16
    assert (numpy_helper.to_array(found) == np.float16(0.1)).all()
