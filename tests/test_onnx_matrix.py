"""A few cells of the ONNX matrix; benchmarks/onnx_matrix.py runs all of them."""

from __future__ import annotations

import pytest
import torch
from onnx_cells import WAYS, Way, examine, export, network

from rowtune.importers.onnx_file import load_onnx

torch.set_num_threads(1)

CELLS = [
    *(("edsr", way) for way in WAYS if way.optimised),
    ("convnext_tiny", Way("legacy", "train", True)),
    ("mobilenet_v3_large", Way("legacy", "train", False)),
    ("resnet50", Way("dynamo", "train", False)),
    ("unet3d", Way("dynamo", "train", False)),
    ("unet_bn", Way("dynamo", "eval", True)),
]


@pytest.mark.parametrize(("name", "way"), CELLS, ids=lambda part: str(part).replace(" ", "-"))
def test_cell(name, way, tmp_path):
    pytest.importorskip("onnxruntime")
    cell = examine(name, way, tmp_path)
    assert not cell.failed, cell.why
    folded = name == "unet_bn"
    assert cell.precision == ("float32" if folded else "float64")
    assert cell.compared == cell.parameters or folded


@pytest.mark.parametrize("name", ["unet_bn", "densenet121"])
def test_folded_norms_are_told(name, tmp_path):
    """The newer exporter's optimiser folds batch norms in train mode, too: all of one network, some of the
    other. What they were is lost, so the importer says so, and a cell of the matrix fails."""
    pytest.importorskip("onnxruntime")
    way = Way("dynamo", "train", True)
    cell = examine(name, way, tmp_path)
    assert cell.failed == "gradients" and "folded" in cell.why
    model, x = network(name)
    export(model, x, tmp_path / "again.onnx", way)
    loaded = load_onnx(tmp_path / "again.onnx")
    assert any("batch norm" in note and "optimize=False" in note for note in loaded.notes)
    assert loaded.norm_layers < sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
