"""The planned module in eval(), without gradients, batch by batch: loss and metrics over all of --val.

In eval() the plan's bands run as well (an image that does not fit in training does not fit here either), and
the peak of a batch is measured as a step's is.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rowtune.errors import ModelError, RowtuneError, UsageError
from rowtune.importers import source
from rowtune.runtime.module import RowtuneModule
from rowtune.torch_private import pytree
from rowtune.train import ranks
from rowtune.train.data import Feed, guarded
from rowtune.train.metrics import Metric, metric_for
from rowtune.train.options import ValReport
from rowtune.train.random_state import undisturbed
from rowtune.train.sharded import gathered
from rowtune.tune.measurement import out_of_memory
from rowtune.tune.meter import measure_memory
from rowtune.tune.step import Batch, Workload


class Validator:
    """Validates a module now and then; `peak` is known from the first time on."""

    def __init__(self, work: Workload, feed: Feed, text: str) -> None:
        self.work, self.feed, self.text = work, feed, text
        self.peak: int | None = None

    def check(self, runner: RowtuneModule) -> None:
        """UsageError for a network that trains on in eval(): it would be another one after a validation."""
        work = self.work
        inputs = source.inputs(work.problem.inputs, work.problem.device)
        with evaluating(runner), gathered(runner):
            graph = runner.program(inputs, with_targets=True, outputs=True).graph
        written = next((graph.values[n.effect].path for n in graph.nodes if n.effect), "")
        if written:
            raise UsageError(
                f"--val {self.text}: in eval() the model still writes to {written} (a .pt2 file that was "
                "exported in train mode does): train without --val, or give the model as a factory or an "
                ".onnx file"
            )

    def run(
        self,
        runner: RowtuneModule,
        optimizer: torch.optim.Optimizer,
        kept: Callable[[], list[Tensor]],
        step: int,
        epoch: int,
        stopping: Callable[[], bool],
    ) -> ValReport | None:
        """None where it was told to stop. `kept` are tensors that live meanwhile, besides the optimizer's."""
        device = self.work.problem.device
        optimizer.zero_grad(set_to_none=True)
        metric = self._metric()
        total, count = 0.0, 0
        start = time.perf_counter()
        with undisturbed(device), evaluating(runner), torch.no_grad():
            for batch in guarded(self.feed, 0, 0, f"--val {self.text}"):
                if stopping():
                    return None
                inputs, target = batch
                if self.peak is None:  # the first call lowers the plan, which is no memory of a batch
                    _evaluate(runner, batch, self._metric())
                    once = functools.partial(_evaluate, runner, batch, self._metric())
                    live = [*inputs, target, *kept()]
                    self.peak = measure_memory(once, self.work.module, optimizer, live, device).peak_bytes
                loss = _evaluate(runner, batch, metric)
                total, count = total + loss * inputs[0].shape[0], count + inputs[0].shape[0]
        if not count:
            raise UsageError(f"--val {self.text} gave no batch")
        found = {} if metric is None else metric.result()
        return ValReport(step, epoch, total / count, found, time.perf_counter() - start, self.peak)

    def _metric(self) -> Metric | None:
        graph = self.work.graph
        return metric_for(self.work.loss, graph.values[graph.loss_output].shape)


def _evaluate(runner: RowtuneModule, batch: Batch, metric: Metric | None) -> float:
    """The loss of a batch, whose outputs go into the metric."""
    inputs, target = batch
    try:
        loss, outputs = runner(*inputs, targets=target, outputs=True)
        if metric is not None:
            metric.add(pytree.tree_leaves(outputs)[0], target)
        return float(loss)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, RowtuneError) or out_of_memory(error) or ranks.lost(error):
            raise
        shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"validation on inputs {shapes} failed: {reason}") from error


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode inside; afterwards every submodule is in the mode it was in, frozen norms too."""
    modes = [(m, m.training) for m in module.modules()]
    owner = module.__dict__.get("_model")  # a planned module is not its model, which holds a mode of its own
    modes += [(owner, owner.training)] if isinstance(owner, nn.Module) else []
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
