"""What a trainer has around a model does not disturb tracing: hooks, modes, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rowtune

X = torch.randn(1, 3, 16, 8)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def pointer(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.data_ptr()
    return tensor


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autograd.graph.saved_tensors_hooks(pointer, lambda t: t),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
        torch.inference_mode,
        Seen,
        Called,
        lambda: torch.device("cpu"),
    ],
)
def test_nothing_around_a_model_changes_its_graph(
    around: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    model = network()
    alone = rowtune.trace(model, (X,)).fingerprint
    with around():
        assert rowtune.trace(model, (X,)).fingerprint == alone


def looks(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    assert output.data_ptr()


def reads(module: nn.Module, args: Any) -> None:
    args[0].detach().numpy()


def test_hooks_that_look_at_data_are_left_out_and_named() -> None:
    model = network()
    alone = rowtune.trace(model, (X,)).fingerprint
    model[0].register_forward_hook(looks)
    model[3].register_forward_pre_hook(reads)
    handle = nn.modules.module.register_module_forward_hook(looks)
    try:
        graph = rowtune.trace(model, (X,))
    finally:
        handle.remove()
    assert graph.fingerprint == alone
    left_out = [note for note in graph.notes if "not part of the graph" in note]
    assert {note.split(" does")[0] for note in left_out} == {
        "a forward hook on all modules", "a forward hook on 0", "a forward hook on 3",
    }  # fmt: skip
    assert model[0]._forward_hooks and next(iter(model[0]._forward_hooks.values())) is looks
    model(X)  # they look at data as before


def test_hooks_on_tensors_are_traced_beside_those() -> None:
    model = network()
    model[0].register_forward_hook(looks)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    graph = rowtune.trace(model, (X,))
    assert "mul" in [node.op for node in graph.nodes]


def test_a_planned_module_runs_under_such_hooks() -> None:
    torch.manual_seed(0)
    model = network()
    expected = model(X)
    model[0].register_forward_hook(looks)
    plan = rowtune.uniform_plan(rowtune.trace(model, (X,)), "rows", 4)
    with pytest.warns(UserWarning) as said:
        assert torch.allclose(rowtune.apply(model, plan)(X), expected, atol=1e-6)
    assert any("not part of the graph" in str(warning.message) for warning in said)
