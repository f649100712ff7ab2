"""apply(model, plan, loss): an nn.Module that computes what the model computes, the way the plan says.

The module shares the model's parameters, buffers and submodules (the same objects under the same names), so
optimizers, state dicts, .to() and DistributedDataParallel see no difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rowtune.errors import PlanError, UsageError
from rowtune.graph.given_losses import as_loss
from rowtune.graph.graph import WRITE, Graph
from rowtune.graph.losses import Loss
from rowtune.graph.training import NORMS, TARGET, with_loss
from rowtune.importers.sharded import check_whole
from rowtune.importers.trace import trace
from rowtune.plan.adapt import eval_plan
from rowtune.plan.file import PlanFile
from rowtune.plan.lower import lower
from rowtune.plan.plan import Plan, checked
from rowtune.plan.program import Program
from rowtune.runtime.layout import arranged
from rowtune.runtime.lists.run import Lists
from rowtune.runtime.precision import autocast
from rowtune.runtime.segments import run_segment
from rowtune.runtime.step_run import Engine as Engine
from rowtune.runtime.step_run import StepRun
from rowtune.runtime.stores.host import HostPool
from rowtune.runtime.waiting import Skips
from rowtune.torch_private import pytree, storage_of

LossLike = Loss | str | Callable[[Tensor, Tensor], Tensor] | None


def apply(
    model: nn.Module,
    plan: Plan | PlanFile,
    loss: LossLike = None,
    *,
    fingerprint: str | None = None,
    graph: Graph | None = None,
    engine: Engine = "listed",
) -> RowtuneModule:
    """Run `model` by `plan`.

    Without a loss, calling the result returns what the model returns. With one, `module(*inputs,
    targets=t)` returns the loss (a scalar), and `module(*inputs, targets=t, outputs=True)` returns
    (loss, detached outputs); a single sweep is possible then. In eval mode the model's own eval graph runs,
    banded too.

    Args:
        plan: a plan, or what `search` and `load` return: its plan, for a model of its structure only.
        loss: a name as on the command line, a torch.nn loss, or a function (output, target) -> scalar. It
            looks at the model's first output.
        fingerprint: of the graph the plan was made for; a model of another structure is refused.
        graph: what `trace` made of this model, on this device and in this mode: inputs of its sizes need not
            be traced again.
        engine: listed: rows segments run the calls that their first step made, one after another; traced:
            their schedules run every time, which takes the host longer (a second opinion).

    Raises:
        UsageError: the loss is none of these, or the model is sharded (fully_shard) already.
        PlanError: the plan holds values that no plan file may hold.
    """
    if isinstance(plan, PlanFile):
        fingerprint, plan = fingerprint or plan.fingerprint, plan.plan
    return RowtuneModule(model, checked(plan), as_loss(loss), fingerprint, graph, engine)


class RowtuneModule(nn.Module):
    """See `apply`. `loss_scale` multiplies the gradients that a single sweep computes inside forward; set it
    to the scale that will multiply the loss before backward (fp16 loss scaling), 1 otherwise."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        loss: Loss | None,
        fingerprint: str | None,
        graph: Graph | None = None,
        engine: Engine = "listed",
    ) -> None:
        super().__init__()
        check_whole(model)
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]
        self.__dict__["_model"] = model  # not a submodule: names stay the model's own
        self.training = model.training
        self.plan = plan
        self.engine = engine
        self.loss = loss
        self.loss_scale: float | Tensor = 1.0
        self.seed: Tensor | None = None  # of random masks, where somebody else draws it
        self._fingerprint, self._graph = fingerprint, graph
        self._graph_flags = _flags(self)
        self._programs: dict[Any, Program] = {}
        self.lists = Lists()
        self.host = HostPool()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their programs anew."""
        return {**self.__dict__, "_programs": {}, "_graph": None, "lists": Lists(), "host": HostPool()}

    def train(self, mode: bool = True) -> RowtuneModule:
        super().train(mode)
        self.__dict__["_model"].training = mode
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # runs as it is: it is compiled by nobody
    def forward(
        self, *inputs: Any, targets: Tensor | None = None, outputs: bool = False, **named: Any
    ) -> Any:
        """The model's outputs; with `targets`, the loss (and the detached outputs where asked)."""
        if targets is not None and self.loss is None:
            raise UsageError("targets were given to a module without a loss; give apply(..., loss=...)")
        program = self.program(inputs, named, with_targets=targets is not None, outputs=outputs)
        flat = [t for t in pytree.tree_leaves((inputs, named)) if isinstance(t, Tensor)]
        with autocast(self.plan.dtype, flat[0].device.type):
            found = self._run(program, flat, targets)
        graph = program.graph
        if targets is not None:
            model_outputs = found[1:]
            if not outputs:
                return found[0]
            assert graph.output_spec is not None
            return found[0], pytree.tree_unflatten([t.detach() for t in model_outputs], graph.output_spec)
        assert graph.output_spec is not None
        return pytree.tree_unflatten(found, graph.output_spec)

    # -- programs ------------------------------------------------------------------------------------------

    def program(
        self,
        inputs: tuple[Any, ...],
        named: dict[str, Any] | None = None,
        *,
        with_targets: bool,
        outputs: bool = False,
    ) -> Program:
        """The program for inputs of these shapes and types, made once for each."""
        key = (
            tuple((tuple(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else t
                  for t in pytree.tree_leaves((inputs, named or {}))),
            with_targets, outputs, self.training, _flags(self),
        )  # fmt: skip
        if key not in self._programs:
            self._programs[key] = self._make_program(inputs, named or {}, with_targets, outputs)
        return self._programs[key]

    def _make_program(
        self, inputs: tuple[Any, ...], named: dict[str, Any], with_targets: bool, outputs: bool
    ) -> Program:
        check_whole(self.__dict__["_model"])
        graph = self._graph if self._graph_flags == _flags(self) else None
        if graph is None or graph.training != self.training or not _is_for(graph, inputs, named):
            graph = trace(self.__dict__["_model"], inputs, training=self.training, named=named)
        for note in () if self._programs else graph.notes:
            warnings.warn(note, stacklevel=2)
        if self.training and self._fingerprint not in (None, graph.fingerprint):
            raise PlanError(
                f"the plan was made for a graph with fingerprint {self._fingerprint}; this model's is "
                f"{graph.fingerprint}. Search again for this model"
            )
        if with_targets:
            assert self.loss is not None
            graph = with_loss(graph, self.loss, keep_outputs=outputs)
        return lower(graph, self.plan if self.training else eval_plan(graph, self.plan))

    def drawn_seed(self, inputs: tuple[Any, ...]) -> int:
        """The seed of the next step with targets: as a call draws it itself, unless `seed` is given."""
        return _step_seed(self.program(inputs, with_targets=True).graph)

    def flags(self) -> int:
        """Changes with what a trace depends on beside its inputs."""
        return _flags(self)

    # -- running -------------------------------------------------------------------------------------------

    def _run(self, program: Program, flat: list[Tensor], targets: Tensor | None) -> list[Tensor]:
        graph = program.graph
        env: dict[str, Any] = dict(zip(graph.inputs, arranged(flat, self.plan.layout), strict=True))
        env |= _fixed(graph, self)
        if targets is not None:
            self._check_target(graph, targets)
            assert self.loss is not None
            env[TARGET] = targets
            with torch.no_grad():
                norms = self.loss.norms(targets, graph.values[graph.loss_output].shape)
            env[NORMS] = norms.to(graph.values[NORMS].dtype)
        lists = self.lists if self.engine == "listed" else None
        given = (*flat, *(t for n, t in env.items() if graph.values[n].kind != "input"))
        stored = any(s.store != "device" for s in self.plan.segments)
        outside = frozenset(map(storage_of, given)) if stored else frozenset()
        seed = _step_seed(graph) if self.seed is None else self.seed
        host = self.host
        step = StepRun(program, seed, self.loss_scale, lists, outside=outside, host=host, skips=Skips(host))
        flat.clear()
        for segment, dead in zip(program.segments, program.drops, strict=True):
            run_segment(step, segment, env)
            for name in dead:
                env.pop(name, None)
        return [env[name] for name in graph.outputs]

    def _check_target(self, graph: Graph, targets: Tensor) -> None:
        value = graph.values[TARGET]
        assert self.loss is not None
        if self.loss.row_local and tuple(targets.shape) != value.shape:
            raise UsageError(
                f"the loss {self.loss.name} on an output of shape "
                f"{tuple(graph.values[graph.loss_output].shape)} needs targets of shape {value.shape}, "
                f"not {tuple(targets.shape)}; a function (output, target) as the loss takes any targets"
            )


def _is_for(graph: Graph, inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a graph was traced for inputs like these."""
    leaves, structure = pytree.tree_flatten((inputs, named))
    if structure != graph.input_spec or not all(isinstance(t, Tensor) for t in leaves):
        return False
    traced = [(graph.values[name].shape, graph.values[name].dtype) for name in graph.inputs]
    return traced == [(tuple(t.shape), t.dtype) for t in leaves]


def _fixed(graph: Graph, module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now: fetched at each call, for FSDP and parametrizations. Who reads
    a buffer that is written to gets a copy: what is recomputed from it comes after the write."""
    found: dict[str, Tensor] = {}
    written = {graph.values[n.effect].path: n.effect for n in graph.nodes if n.op == WRITE}
    for value in graph.values.values():
        if value.kind in ("parameter", "buffer"):
            owner, _, name = value.path.rpartition(".")
            now = getattr(module.get_submodule(owner) if owner else module, name)
            read_before = written.get(value.path, value.name) != value.name
            found[value.name] = now.clone() if read_before else now
        elif value.kind == "constant":
            found[value.name] = graph.constants[value.name]
    return found


def _step_seed(graph: Graph) -> int:
    """One seed a forward call, from torch's own generator, where something random will be drawn."""
    if not any(node.random for node in graph.nodes):
        return 0
    return int(torch.randint(0, 2**31 - 1, ()).item())


def _flags(module: nn.Module) -> int:
    """What else a trace depends on: all flags of the model's modules, `training` of each (frozen norms) and
    those of its own (nnU-Net turns `decoder.deep_supervision` off to validate)."""
    found = (vars(m).values() for m in module.__dict__["_model"].modules())
    return hash(tuple(v for values in found for v in values if v is True or v is False))
