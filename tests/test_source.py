"""Where models come from: kinds of sources, their shapes, and what is wrong with them in one line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from rowtune.errors import ModelError, UsageError
from rowtune.importers.source import inputs, load, parse_shape, parse_source
from rowtune.problem import Source, TensorSpec
from rowtune.tune.step import plain_graph

FACTORY = """
import torch
from torch import nn

def net(channels=4, scale=1.0, bias=True, sizes=(3, 3), name="x"):
    torch.manual_seed(torch.initial_seed())
    return nn.Sequential(nn.Conv2d(3, channels, sizes, padding=1, bias=bias), nn.BatchNorm2d(channels))

def not_a_module():
    return 3

def fails():
    raise ValueError("no such\\nweights")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "source_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "source_factories", raising=False)
    return tmp_path


def test_zoo_takes_arguments_and_shape(folder: Path) -> None:
    loaded = load(parse_source("zoo:unet", ["base=4", "depth=1"]), ["2x3x32x48"])
    assert loaded.inputs == (TensorSpec("input", (2, 3, 32, 48)),)
    assert loaded.module.training and not loaded.norm_layers
    assert load(parse_source("zoo:unet", ["base=4"])).inputs[0].shape == (1, 3, 512, 512)


def test_weights_follow_the_seed(folder: Path) -> None:
    for text in ("zoo:unet", "source_factories:net"):
        source = parse_source(text, ["base=4"] if text.startswith("zoo") else [])
        first, again, other = (load(source, ["1x3x32x32"], seed=s).module for s in (1, 1, 2))
        weights = [next(m.parameters()) for m in (first, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_factory_arguments_are_read_as_what_they_look_like(folder: Path) -> None:
    source = parse_source(
        "source_factories:net", ["channels=6", "scale=0.5", "bias=false", "sizes=1,3", "name=a"]
    )
    assert dict(source.args) == {"channels": 6, "scale": 0.5, "bias": False, "sizes": (1, 3), "name": "a"}
    loaded = load(source, ["1x3x8x8"])
    assert isinstance(loaded.module, nn.Sequential) and loaded.module[0].weight.shape == (6, 3, 1, 3)
    assert loaded.norm_layers == ("1",)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("zoo:nosuch", UsageError, "nosuch"),
        ("missing.onnx", UsageError, "no file missing.onnx"),
        ("missing.pt2", UsageError, "no file missing.pt2"),
        ("not a model", UsageError, "zoo:NAME"),
        ("source_factories:absent", ModelError, "absent"),
        ("no_such_module_here:net", ModelError, "no_such_module_here"),
        ("source_factories:not_a_module", ModelError, "nn.Module"),
        ("source_factories:fails", ModelError, "ValueError: no such"),
        ("broken.pt2", ModelError, "broken.pt2"),
        ("source_factories.py", ModelError, "neither"),
        (".", UsageError, "not a file"),
    ],
)
def test_bad_sources_say_why(folder: Path, text: str, error: type[Exception], says: str) -> None:
    (folder / "broken.pt2").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(error, match=says) as caught:
        load(parse_source(text), ["1x3x8x8"])
    assert "\n" not in str(caught.value)


def test_a_factory_needs_a_shape(folder: Path) -> None:
    with pytest.raises(UsageError, match="--shape"):
        load(parse_source("source_factories:net"))


@pytest.mark.parametrize("text", ["3", "1x3x0x8", "1x3xHxW", "1,3,8,8", "", "1x3x8x8x", "x:"])
def test_bad_shapes(text: str) -> None:
    if text == "3":
        assert parse_shape(text) == ("", (3,))
        return
    with pytest.raises(UsageError, match="--shape"):
        parse_shape(text)


def test_shape_must_fit_the_model(folder: Path) -> None:
    source = Source("zoo", "unet", (("base", 4),))
    for shapes, says in (
        [["1x3x8"], "3 sizes"],
        [["other:1x3x8x8"], "inputs are input"],
        [["1x3x8x8"] * 2, "2 --shape"],
    ):
        with pytest.raises(UsageError, match=says):
            load(source, shapes)


def test_model_arguments_are_for_code(folder: Path) -> None:
    (folder / "a.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="--model-arg"):
        parse_source("a.onnx", ["k=1"])
    with pytest.raises(UsageError, match="key=value"):
        parse_source("zoo:unet", ["base"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pt2 file whose batch and width are open."""
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    batch, width = torch.export.Dim("batch"), torch.export.Dim("width")
    program = torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch, 3: width},))
    torch.export.save(program, str(path))
    return path


def test_pt2_warns_and_asks_for_open_sizes(exported: Path) -> None:
    with pytest.raises(UsageError, match=r"--shape \w+:1x3x16x512"):
        load(parse_source(str(exported)))
    loaded = load(parse_source(str(exported)), ["1x3x16x24"])
    assert loaded.inputs[0].shape == (1, 3, 16, 24)
    assert any("execute code" in note for note in loaded.notes)
    assert len(loaded.norm_layers) == 1
    assert loaded.module(*inputs(loaded.inputs)).shape == (1, 4, 16, 24)


def test_dtype_changes_module_and_floating_inputs(folder: Path) -> None:
    loaded = load(parse_source("source_factories:net"), ["1x3x8x8"], "float64")
    assert loaded.inputs[0].dtype == "float64"
    assert next(loaded.module.parameters()).dtype == torch.float64
    with pytest.raises(UsageError, match="--dtype"):
        load(parse_source("source_factories:net"), ["1x3x8x8"], "int8")


def test_inputs_are_the_same_for_the_same_seed() -> None:
    specs = (TensorSpec("a", (2, 3)), TensorSpec("b", (4,), "int64"))
    first, again, other = inputs(specs, seed=3), inputs(specs, seed=3), inputs(specs, seed=4)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert first[1].dtype == torch.int64 and set(first[1].tolist()) <= {0, 1}


def test_an_absurd_shape_is_an_error_of_one_line() -> None:
    with pytest.raises(UsageError, match="does not fit"):
        inputs((TensorSpec("a", (1, 3, 10**9, 10**9)),))


def test_onnx_asks_for_open_sizes_and_counts_norm_layers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    path = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(1, 3, 16, 16),),
            path,
            dynamo=False,
            input_names=["image"],
            dynamic_axes={"image": {0: "batch", 2: "height"}},
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
        )
    with pytest.raises(UsageError, match="--shape image:1x3x512x16"):
        load(parse_source(path))
    loaded = load(parse_source(path), ["image:2x3x24x16"])
    assert loaded.inputs == (TensorSpec("image", (2, 3, 24, 16)),) and len(loaded.norm_layers) == 1
    assert loaded.module.training and loaded.module(*inputs(loaded.inputs)).shape == (2, 4, 24, 16)


def test_a_module_on_another_device_is_traced_there() -> None:
    """Blanks have no device of their own: a verification traces the module where it trains."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    specs = (TensorSpec("x", (2, 3, 10**6, 16)),)
    here = plain_graph(net, specs)
    assert plain_graph(net.to("meta"), specs).fingerprint == here.fingerprint
    assert here.values[here.outputs[0]].shape == (2, 4, 10**6, 16)
