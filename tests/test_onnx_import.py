"""ONNX files become the network they were exported from: same outputs, same gradients, same names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.onnx import TrainingMode

from rowtune.errors import ModelError, UsageError
from rowtune.importers.onnx_file import load_onnx
from rowtune.importers.onnx_module import OnnxNetwork
from rowtune.zoo import build

torch.set_num_threads(1)

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"

# Small variants with a valid input size; dropout off, so that two runs can be compared.
NETS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet50": ("resnet50", {"width": 4, "depths": (1, 1, 1, 1), "classes": 10}, 64),
    "vgg16": ("vgg16", {"width": 2, "classes": 10, "dropout": 0.0}, 224),
    "unet": ("unet", {"base": 4, "depth": 2, "up": "bilinear"}, 32),
    "unet_bn": ("unet_bn", {"base": 4, "depth": 2}, 32),
    "edsr": ("edsr", {"blocks": 2, "channels": 4}, 16),
    "convnext_tiny": (
        "convnext_tiny",
        {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "classes": 10, "layer_scale": 0.5},
        64,
    ),
}
WITH_BATCH_NORM = {"resnet50": 17, "unet_bn": 10}

EXPORTS: dict[str, dict[str, Any]] = {
    "legacy train": {"dynamo": False, "training": TrainingMode.TRAINING, "do_constant_folding": False},
    "legacy preserve": {"dynamo": False, "training": TrainingMode.PRESERVE},
    "legacy default": {"dynamo": False},
    "dynamo unoptimised": {"dynamo": True, "optimize": False, "verbose": False},
    "dynamo default": {"dynamo": True, "verbose": False},
}
KEEPS_BATCH_NORM = ("legacy train", "legacy preserve", "dynamo unoptimised")


def network(name: str, *, trained: bool = True) -> tuple[nn.Module, Tensor]:
    """A small float64 network in train mode and an input; `trained` makes no two weights equal."""
    factory, arguments, size = NETS[name]
    model = build(factory, **arguments).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()] if trained else []:
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand(tensor.shape, dtype=tensor.dtype, generator=generator)
    return model, torch.rand(2, 3, size, size, dtype=torch.float64, generator=generator)


def export(model: nn.Module, x: Tensor, file: Path, how: str) -> Path:
    """Exporters warn about themselves; here that is noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(file), **EXPORTS[how])
    return file


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


def assert_close(got: Tensor, wanted: Tensor, scale: float = 0.0) -> None:
    error = (got - wanted).abs().max().item()
    assert error <= 1e-10 * max(wanted.abs().max().item(), 1e-3 * scale, 1e-30), error


# --- round trips through torch's exporters


@pytest.mark.parametrize("how", EXPORTS)
@pytest.mark.parametrize("name", NETS)
def test_round_trip(name: str, how: str, tmp_path: Path) -> None:
    model, x = network(name)
    keeps = how in KEEPS_BATCH_NORM or name not in WITH_BATCH_NORM
    if not keeps:
        model.eval()
    loaded = load_onnx(export(model, x, tmp_path / "model.onnx", how))
    model.train(keeps)
    loaded.module.train(keeps)
    assert loaded.inputs[0].shape == tuple(x.shape) and loaded.inputs[0].dtype == torch.float64
    assert loaded.norm_layers == (WITH_BATCH_NORM.get(name, 0) if keeps else 0) or name == "convnext_tiny"
    assert any("no normalisation" in note for note in loaded.notes) == (loaded.norm_layers == 0)
    y, wanted, dx = gradients(model, x)
    z, got, dz = gradients(loaded.module, x)
    assert_close(z, y)
    largest = max(g.abs().max().item() for g in wanted.values())
    assert_close(dz, dx)
    if not keeps:
        return  # folded weights are other weights; output and input gradient are what is left to compare
    for key, gradient in got.items():
        assert_close(gradient, _original(key, gradient, wanted), largest)
    assert len(got) == len(wanted)
    buffers = dict(model.named_buffers())
    for key, buffer in loaded.module.named_buffers():
        assert_close(buffer, buffers[key])
    if how in ("legacy train", "dynamo unoptimised"):
        state = {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
        assert set(loaded.module.state_dict()) == state


def _original(key: str, gradient: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    """By name; a linear weight that the exporter transposed lost its name and is found by its shape."""
    if key in wanted:
        return wanted[key]
    same = [g.t() for g in wanted.values() if g.dim() == 2 and g.t().shape == gradient.shape]
    return min(same, key=lambda g: (g - gradient).abs().max().item())


@pytest.mark.parametrize("name", ["unet", "convnext_tiny"])
def test_weights_that_start_equal_stay_apart(name: str, tmp_path: Path) -> None:
    # dynamo's default export cannot be mended: it drops biases that are zero.
    model, x = network(name, trained=False)
    loaded = load_onnx(export(model, x, tmp_path / "model.onnx", "legacy default"))
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in loaded.module.parameters()) == count
    assert any("trained separately" in note for note in loaded.notes)
    _, wanted, _ = gradients(model, x)
    _, got, _ = gradients(loaded.module, x)
    largest = max(g.abs().max().item() for g in wanted.values())
    for key, gradient in got.items():
        assert_close(gradient, _original(key, gradient, wanted), largest)


@pytest.mark.parametrize("how", KEEPS_BATCH_NORM)
def test_torch_export_is_high_level(how: str, tmp_path: Path) -> None:
    model, x = network("resnet50")
    loaded = load_onnx(export(model, x, tmp_path / "model.onnx", how))
    exported = torch.export.export(loaded.module.train(), (x,), strict=False)
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert names.count("aten.batch_norm.default") == 17
    training = [n.args[5] for n in exported.graph.nodes if str(n.target) == "aten.batch_norm.default"]
    assert all(training)
    allowed = {"conv2d", "batch_norm", "relu", "max_pool2d", "add", "linear", "flatten", "reshape", "mean"}
    allowed |= {"adaptive_avg_pool2d"}
    assert {name.split(".")[1] for name in names} <= allowed
    again = exported.module()
    assert_close(again(x), model(x))
    parameters = dict(again.named_parameters())
    assert set(parameters) == {n for n, _ in model.named_parameters()}
    assert all(parameters[n] is p for n, p in loaded.module.named_parameters())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vgg16", {"conv2d", "relu", "max_pool2d", "avg_pool2d", "flatten", "linear", "dropout"}),
        ("unet", {"conv2d", "relu", "max_pool2d", "cat", "upsample_bilinear2d"}),
        ("edsr", {"conv2d", "relu", "add", "pixel_shuffle"}),
        ("convnext_tiny", {"conv2d", "permute", "layer_norm", "linear", "gelu", "mul", "add", "flatten"}),
    ],
)
def test_torch_export_of_other_networks(name: str, wanted: set[str], tmp_path: Path) -> None:
    model, x = network(name)
    loaded = load_onnx(export(model, x, tmp_path / "model.onnx", "legacy train"))
    exported = torch.export.export(loaded.module, (x,), strict=False)
    names = {str(n.target).split(".")[1] for n in exported.graph.nodes if n.op == "call_function"}
    assert names - {"adaptive_avg_pool2d"} == wanted


@pytest.mark.parametrize("how", ["legacy train", "dynamo unoptimised"])
@pytest.mark.parametrize("name", ["resnet50", "unet", "edsr", "convnext_tiny"])
def test_onnxruntime_agrees_in_eval_mode(name: str, how: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = network(name)
    model, x = model.float().eval(), x.float()
    file = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(file), **{**EXPORTS[how], "training": TrainingMode.EVAL})
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    got = load_onnx(file).module.eval()(x).detach().numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


# --- models that others exported


@pytest.mark.parametrize("file", sorted(LIGHT.glob("light_*.onnx")), ids=lambda f: f.stem)
def test_light_models_train(file: Path) -> None:
    loaded = load_onnx(file)
    model = loaded.module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 100
            parameter.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
    x = torch.rand(_sizes(loaded.inputs[0].shape), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    y = model(x)
    loss = (y.flatten() * torch.linspace(-1.0, 1.0, y.numel())).sum()
    loss.backward()
    assert torch.isfinite(loss)
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.5 * len(before)


def _sizes(shape: tuple[int | str | None, ...]) -> list[int]:
    return [n if isinstance(n, int) else 1 for n in shape]


# --- hand-made graphs


def make(
    nodes: list[Any],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    shape: tuple[Any, ...] = (1, 4, 8, 8),
    opset: int = 17,
    functions: list[Any] | None = None,
) -> onnx.ModelProto:
    """A model from x to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions or [])


def load(model: onnx.ModelProto, folder: Path) -> OnnxNetwork:
    onnx.save(model, str(folder / "m.onnx"))
    module = load_onnx(folder / "m.onnx").module
    assert isinstance(module, OnnxNetwork)
    return module


def test_shape_arithmetic_leaves_no_trace(tmp_path: Path) -> None:
    node = helper.make_node
    model = make(
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["n"]),
            node("Unsqueeze", ["n", "axis"], ["n1"]),
            node("Concat", ["n1", "minus"], ["target"], axis=0),
            node("Reshape", ["x", "target"], ["y"]),
        ],
        {"zero": np.int64([0])[0:1].reshape(()), "axis": np.int64([0]), "minus": np.int64([-1])},
    )
    module = load(model, tmp_path)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(module(x), x.reshape(2, -1))
    exported = torch.export.export(module, (x,), strict=False)
    calls = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.reshape.default"]


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Add", ["t", "t"], ["b"])]
    function = helper.make_function("local", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    model = make([helper.make_node("Twice", ["x"], ["y"], domain="local")], functions=[function])
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(load(model, tmp_path)(x), 2 * torch.relu(x))


@pytest.mark.parametrize("rows", [4, 8])
def test_if_on_shapes(rows: int, tmp_path: Path) -> None:
    def branch(op: str) -> Any:
        out = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["x"], ["r"])], op, [], [out])

    node = helper.make_node
    model = make(
        [
            node("Shape", ["x"], ["s"], start=2, end=3),
            node("Equal", ["s", "four"], ["c"]),
            node("Squeeze", ["c"], ["c0"]),
            node("If", ["c0"], ["y"], then_branch=branch("Relu"), else_branch=branch("Neg")),
        ],
        {"four": np.int64([4])},
        (1, 4, "H", 8),
    )
    x = torch.randn(1, 4, rows, 8)
    assert torch.equal(load(model, tmp_path)(x), torch.relu(x) if rows == 4 else -x)


def test_if_with_a_constant_condition_and_weights_inside(tmp_path: Path) -> None:
    def branch(name: str, value: float) -> Any:
        out = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        weight = numpy_helper.from_array(np.full((4, 1, 1), value, np.float32), "w")
        return helper.make_graph([helper.make_node("Mul", ["x", "w"], ["r"])], name, [], [out], [weight])

    model = make(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch("a", 2.0), else_branch=branch("b", 3.0))],
        {"c": np.array(False)},
    )
    module = load(model, tmp_path)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(module(x), 3 * x)
    assert [p.numel() for p in module.parameters()] == [4]


@pytest.mark.parametrize("how", ["legacy train", "dynamo unoptimised", "dynamo default"])
def test_group_norm_comes_back_whole(how: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()).double()
    nn.init.normal_(model[1].weight)  # type: ignore[arg-type]
    nn.init.normal_(model[1].bias)  # type: ignore[arg-type]
    x = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    loaded = load_onnx(export(model, x, tmp_path / "m.onnx", how))
    assert_close(loaded.module(x), model(x))
    assert sum(p.numel() for p in loaded.module.parameters()) == sum(p.numel() for p in model.parameters())
    exported = torch.export.export(loaded.module, (x,), strict=False)
    names = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert "aten.group_norm.default" in names and loaded.norm_layers == 1


@pytest.mark.parametrize(("value", "count"), [([1.0] * 4, 2), ([1.0, 2.0, 3.0, 4.0], 1)])
def test_only_initial_fills_are_taken_apart(value: list[float], count: int, tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["t"]), helper.make_node("Mul", ["t", "w"], ["y"])]
    weight = np.float32(value).reshape(4, 1, 1)
    assert len(list(load(make(nodes, {"w": weight}), tmp_path).parameters())) == count


def test_batch_norm_of_a_reused_layer_keeps_one_set_of_weights(tmp_path: Path) -> None:
    names = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    weights = {n: np.full(4, i % 2, np.float32) for i, n in enumerate(names)}
    model = make(
        [
            helper.make_node("BatchNormalization", ["x", *names], ["t"]),
            helper.make_node("BatchNormalization", ["t", *names], ["y"]),
        ],
        weights,
    )
    module = load(model, tmp_path)
    assert {n for n, _ in module.named_parameters()} == set(names[:2])
    assert {n for n, _ in module.named_buffers()} == set(names[2:])


def test_names_that_are_no_paths_become_some(tmp_path: Path) -> None:
    names = ["gpu_0/w", "onnx::Mul_1", "train.weight", "a", "a.b", "forward"]
    nodes, last = [], "x"
    for i, name in enumerate(names):
        out = "y" if i + 1 == len(names) else f"t{i}"
        nodes.append(helper.make_node("Mul", [last, name], [out]))
        last = out
    weights = {name: np.arange(4, dtype=np.float32).reshape(4, 1, 1) + i for i, name in enumerate(names)}
    found = [n for n, _ in load(make(nodes, weights), tmp_path).named_parameters()]
    assert (
        set(found) == {"gpu_0_w", "onnx__Mul_1", "train_.weight", "a", "a.b_2", "forward_"} or len(found) == 6
    )


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.float32])
def test_element_types(kind: Any, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).random((2, 4, 3, 3)).astype(kind)
    model = make([helper.make_node("Conv", ["x", "c.weight"], ["y"])], {"c.weight": weight})
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    module = load(model, tmp_path)
    expected = torch.from_numpy(weight)
    assert torch.equal(module.state_dict()["c.weight"], expected)
    assert module(torch.ones(1, 4, 8, 8, dtype=expected.dtype)).dtype == expected.dtype


def test_bfloat16(tmp_path: Path) -> None:
    weight = helper.make_tensor("c.weight", TensorProto.BFLOAT16, (1, 4, 1, 1), [0.5, 1.0, 2.0, -1.5])
    model = make([helper.make_node("Conv", ["x", "c.weight"], ["y"])])
    model.graph.initializer.append(weight)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    module = load(model, tmp_path)
    state = module.state_dict()["c.weight"]
    assert state.dtype == torch.bfloat16 and state.flatten().tolist() == [0.5, 1.0, 2.0, -1.5]


@pytest.mark.parametrize("opset", [7, 9])
def test_old_opsets(opset: int, tmp_path: Path) -> None:
    node = helper.make_node
    model = make(
        [
            node("Clip", ["x"], ["a"], min=-0.5, max=0.5),
            node("Pad", ["a"], ["b"], pads=[0, 0, 1, 1, 0, 0, 1, 1]),
            node("Slice", ["b"], ["c"], starts=[1], ends=[9], axes=[2]),
            node("Dropout", ["c"], ["d"], ratio=0.25),
            node("Softmax", ["d"], ["e"], axis=1),
            node("Squeeze", ["e"], ["y"], axes=[0]),
        ],
        opset=opset,
    )
    module = load(model, tmp_path).eval()
    x = torch.randn(1, 4, 8, 8)
    padded = torch.nn.functional.pad(x.clamp(-0.5, 0.5), [1, 1, 1, 1])[:, :, 1:9]
    wanted = padded.flatten(1).softmax(1).reshape(padded.shape)[0]
    torch.testing.assert_close(module(x), wanted)


def test_dropout_follows_the_mode(tmp_path: Path) -> None:
    module = load(
        make([helper.make_node("Dropout", ["x", "r"], ["y"])], {"r": np.float32([0.5])[0:1]}), tmp_path
    )
    x = torch.ones(1, 4, 8, 8)
    assert set(module.train()(x).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(module.eval()(x), x)


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    model, x = network("edsr")
    file = export(model, x, tmp_path / "a.onnx", "legacy train")
    onnx.save(
        onnx.load(file),
        str(tmp_path / "b.onnx"),
        save_as_external_data=True,
        location="b.bin",
        size_threshold=0,
    )
    assert (tmp_path / "b.bin").exists()
    assert_close(load_onnx(tmp_path / "b.onnx").module(x), model(x))


def test_module_can_be_moved_copied_and_counted(tmp_path: Path) -> None:
    import copy

    model, x = network("unet_bn")
    loaded = load_onnx(export(model, x, tmp_path / "m.onnx", "legacy train"))
    twin = copy.deepcopy(loaded.module).float()
    assert twin(x.float()).dtype == torch.float32
    assert loaded.norm_names[0] == "down.0.1"
    with pytest.raises(ModelError):
        loaded.module(x, x)


def test_constants_follow_a_cast_of_the_module(tmp_path: Path) -> None:
    table = np.float32([[1.0, 2.0], [3.0, 4.0]])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(table)),
        helper.make_node("Add", ["x", "c"], ["a"]),
        helper.make_node("Max", ["a", "two"], ["y"]),
    ]
    module = load(make(nodes, {"two": np.float32(2.0).reshape(1, 1)}, (1, 1, 2, 2)), tmp_path)
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    y = module.double()(x)
    assert y.dtype == torch.float64
    assert_close(y, torch.maximum(x + torch.from_numpy(table), torch.tensor(2.0, dtype=torch.float64)))


# --- bad input

Corrupt = Callable[[Path], Path]


def _conv(folder: Path) -> Path:
    weight = np.ones((2, 4, 3, 3), np.float32)
    onnx.save(make([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight}), str(folder / "m.onnx"))
    return folder / "m.onnx"


def _truncated(folder: Path) -> Path:
    file = _conv(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def _bytes(content: bytes) -> Corrupt:
    def write(folder: Path) -> Path:
        (folder / "m.onnx").write_bytes(content)
        return folder / "m.onnx"

    return write


def _model(model: Callable[[], onnx.ModelProto]) -> Corrupt:
    return lambda folder: _bytes(model().SerializeToString())(folder)


def _external(location: str, *, length: int = 0, link: bool = False) -> Corrupt:
    def write(folder: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        (folder / "secret.bin").write_bytes(b"\0" * 4 * 288)
        (inside / "w.bin").write_bytes(b"\0" * 4 * 288)
        if link:
            os.symlink(folder / "secret.bin", inside / "link.bin")
        model = make([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": np.ones((2, 4, 3, 3), np.float32)})
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "length": str(length or 4 * 72)}.items():
            tensor.external_data.add(key=key, value=value)
        (inside / "m.onnx").write_bytes(model.SerializeToString())
        return inside / "m.onnx"

    return write


def _unsupported() -> onnx.ModelProto:
    nodes = [
        helper.make_node("NonMaxSuppression", ["x", "x"], ["a"]),
        helper.make_node("Det", ["x"], ["b"]),
        helper.make_node("Det", ["x"], ["y"]),
    ]
    return make(nodes)


BAD: dict[str, tuple[Corrupt, type[Exception], str]] = {
    "missing": (lambda folder: folder / "none.onnx", UsageError, "no file"),
    "folder": (lambda folder: folder, UsageError, "cannot be read"),
    "empty": (_bytes(b""), ModelError, "no graph"),
    "text": (_bytes(b"I am a text file, honestly.\n" * 20), ModelError, "not ONNX"),
    "zeros": (_bytes(b"\0" * 100), ModelError, "ONNX"),
    "truncated": (_truncated, ModelError, "cut off"),
    "missing external": (_external("gone.bin"), ModelError, "missing"),
    "traversal": (_external("../secret.bin"), ModelError, "outside"),
    "hidden traversal": (_external("sub/../../secret.bin"), ModelError, "outside"),
    "absolute": (_external("/etc/hostname"), ModelError, "outside"),
    "symlink": (_external("link.bin", link=True), ModelError, "outside"),
    "short external": (_external("w.bin", length=10**6), ModelError, "cut off"),
    "no location": (_external(""), ModelError, "no file name"),
    "wrong length": (_external("w.bin", length=8), ModelError, "cannot be read"),
    "old opset": (
        _model(lambda: make([helper.make_node("Relu", ["x"], ["y"])], opset=6)),
        ModelError,
        "opset 6",
    ),
    "new opset": (
        _model(lambda: make([helper.make_node("Relu", ["x"], ["y"])], opset=999)),
        ModelError,
        "999",
    ),
    "dangling": (_model(lambda: make([helper.make_node("Relu", ["q"], ["y"])])), ModelError, "not valid"),
    "bad attribute": (
        _model(lambda: make([helper.make_node("Relu", ["x"], ["y"], z=1)])),
        ModelError,
        "not valid",
    ),
    "unknown operator": (_model(lambda: make([helper.make_node("Relo", ["x"], ["y"])])), ModelError, "Relo"),
    "foreign operator": (
        _model(lambda: make([helper.make_node("Magic", ["x"], ["y"], domain="local")])),
        ModelError,
        "local::Magic",
    ),
    "unsupported": (_model(_unsupported), ModelError, "Det (2), NonMaxSuppression (1)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path) -> None:
    corrupt, kind, fragment = BAD[case]
    with pytest.raises(kind) as caught:
        load_onnx(corrupt(tmp_path))
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("node", "weights", "opset", "fragment"),
    [
        (
            helper.make_node(
                "Resize", ["x", "", "s"], ["y"], mode="linear", coordinate_transformation_mode="asymmetric"
            ),
            {"s": np.float32([1, 1, 2, 2])},
            17,
            "asymmetric",
        ),
        (
            helper.make_node("Resize", ["x", "", "s"], ["y"], mode="nearest", nearest_mode="ceil"),
            {"s": np.float32([1, 1, 2, 2])},
            17,
            "ceil",
        ),
        (
            helper.make_node("Upsample", ["x", "s"], ["y"], mode="linear"),
            {"s": np.float32([1, 1, 2, 2])},
            9,
            "opset 11",
        ),
        (helper.make_node("Reshape", ["x", "s"], ["y"]), {"s": np.int64([7, 7])}, 17, ""),
    ],
)
def test_what_torch_cannot_express_is_refused(
    node: Any, weights: Any, opset: int, fragment: str, tmp_path: Path
) -> None:
    module = load(make([node], weights, opset=opset), tmp_path)
    kind = ModelError if fragment else RuntimeError
    with pytest.raises(kind) as caught:
        module(torch.rand(1, 4, 8, 8))
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", range(1, 20))
def test_damaged_anywhere(cut: int, tmp_path: Path) -> None:
    data = bytearray(_conv(tmp_path).read_bytes())
    data[len(data) * cut // 20] ^= 0xFF
    (tmp_path / "m.onnx").write_bytes(bytes(data))
    try:
        load_onnx(tmp_path / "m.onnx")
    except ModelError as error:
        assert "\n" not in str(error)
