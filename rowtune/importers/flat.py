"""torch.export with `with` blocks left in the list of operators, as marks where they begin and end.

By itself it moves what lies in `torch.no_grad()` or `torch.autocast()` into submodules, and then forgets the
gradient mode inside an autocast region (2.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from rowtune.torch_private import region_passes

_AUTOCAST, _SET_GRAD = region_passes()


def _unchanged(graph_module: Any, signature: Any) -> tuple[Any, Any]:
    return graph_module, signature


def _gradients_off(self: Any) -> None:
    """torch.inference_mode as a graph can have it: gradients off, and nothing more."""
    self._inference_mode_context = torch.set_grad_enabled(not self.mode)


@contextlib.contextmanager
def regions_as_they_are() -> Iterator[None]:
    """While a model is traced; with gradients on, whatever the caller's mode: that joins when it runs."""
    with (
        torch.enable_grad(),
        patch.object(torch.inference_mode, "__enter__", _gradients_off),
        patch.object(_AUTOCAST, "replace_autocast_with_hop_pass", _unchanged),
        patch.object(_SET_GRAD, "replace_set_grad_with_hop_pass", _unchanged),
    ):
        yield
