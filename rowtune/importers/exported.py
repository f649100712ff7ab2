"""An exported program -> Graph.

The training IR keeps high-level operators (conv2d, batch_norm, ...) and in-place ones. Here in-place
operators on activations become their functional twins, split and chunk become slices, and what changes a
buffer (running statistics, num_batches_tracked) is marked as an effect, to run once per forward call.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rowtune.errors import ModelError
from rowtune.graph.barriers import taken_apart
from rowtune.graph.graph import WRITE, Graph, Node, Ref, Value, carried, live
from rowtune.graph.parts import PARTED, part_of
from rowtune.graph.regions import Region, inside
from rowtune.importers.fold import run_at_import
from rowtune.importers.functional import (
    DRAWN_IN_SHAPE,
    SHAPED_LIKE,
    apart,
    completed,
    draws,
    functional,
    masks_first,
    without_out,
)
from rowtune.importers.synced import shared_norms
from rowtune.torch_private import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD, OpOverload

_ALIASES = {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "slice", "select", "narrow"}
_ALIASES |= {"expand", "squeeze", "unsqueeze", "contiguous", "to", "t", "detach", "alias", "movedim", "chunk"}
_ALIASES |= {"split", "split_with_sizes", "unbind", "getitem", "numpy_T", "view_as", "expand_as", "diagonal"}
_BORDERS = (SET_GRAD, ENTER_AUTOCAST, EXIT_AUTOCAST)
_SPLITS = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split", "unsafe_chunk"}


class _Whole(NamedTuple):
    """A call of an operator with several outputs, of which each part used becomes a node."""

    op: str
    target: OpOverload
    args: Any
    kwargs: Any


def read(exported: torch.export.ExportedProgram, model: nn.Module, training: bool) -> Graph:
    """The graph of an exported `model`.

    Raises:
        ModelError: it has control flow, sizes that depend on data, or changes an activation through a view.
    """
    return _Reader(exported, model, training).graph()


class _Reader:
    """Walks one exported graph, once."""

    def __init__(self, exported: torch.export.ExportedProgram, model: nn.Module, training: bool) -> None:
        self.exported = exported
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.training = training
        self.model = model
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.now: dict[str, Any] = {}  # exported name -> Ref (or the slice nodes of a split)
        self.alias: dict[str, str] = {}  # value -> the value whose memory it may share
        self.stale: set[str] = set()  # views of a value that was since changed in place
        self.inputs: list[str] = []
        self.versions: dict[str, str] = {}  # a buffer's later values -> the buffer
        self.changed: dict[str, str] = {}  # what an effect returned -> the buffer that it is
        lifted = exported.graph_signature.inputs_to_lifted_tensor_constants
        self.at_import = run_at_import(exported.graph.nodes, lifted)
        self.real: dict[str, Any] = {}  # what those made
        self.grad = True  # inside `with torch.no_grad()`, False
        self.autocasts: dict[str, Any] = {}  # exported name of the `with` -> its arguments

    def graph(self) -> Graph:
        outputs: tuple[str, ...] = ()
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "get_attr":
                raise ModelError(f"the model has control flow ({node.target}); rowtune needs a static graph")
            elif node.op == "output":
                outputs = self._outputs(node)
        spec = self.exported.call_spec
        made = Graph(
            nodes=live(masks_first(self.nodes, self.values, self.inputs), outputs),
            values=self.values,
            inputs=tuple(self.inputs),
            outputs=outputs,
            input_spec=spec.in_spec,
            output_spec=spec.out_spec,
            constants=self.constants,
            training=self.training,
        )
        return taken_apart(made, shared_norms(self.model, made.nodes))

    def _placeholder(self, node: torch.fx.Node) -> None:
        signature, name = self.exported.graph_signature, node.name
        fake = node.meta.get("val")
        if name in signature.inputs_to_parameters:
            path, kind = signature.inputs_to_parameters[name], "parameter"
        elif name in signature.inputs_to_buffers:
            path, kind = signature.inputs_to_buffers[name], "buffer"
        elif name in signature.inputs_to_lifted_tensor_constants:
            path, kind = "@", "constant"
            constant = self.exported.constants[signature.inputs_to_lifted_tensor_constants[name]]
            assert isinstance(constant, Tensor)
            self.constants[name] = constant
        else:
            path, kind = "", "input"
            self.inputs.append(name)
        if not isinstance(fake, Tensor):
            self.now[name] = fake  # a plain Python input: its value is part of the graph
            self.inputs = [i for i in self.inputs if i != name]
            return
        grad = kind == "parameter" and (path not in self.parameters or self.parameters[path].requires_grad)
        self.values[name] = Value(name, kind, tuple(map(int, fake.shape)), fake.dtype, path, grad)
        self.now[name] = Ref(name)

    def _arguments(self, tree: Any) -> Any:
        if isinstance(tree, torch.fx.Node):
            if tree.name in self.real:
                return self._as_it_is_now(tree.name)
            ref = self.now[tree.name]
            if isinstance(ref, Ref) and ref.name in self.stale:
                raise ModelError(
                    f"{ref.name} is read after a view of it was changed in place; write that "
                    "operator out of place"
                )
            return ref
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._arguments(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._arguments(item) for key, item in tree.items()}
        return tree

    def _run(self, node: torch.fx.Node) -> None:
        """Run a node that is the same at every call."""

        def lookup(n: torch.fx.Node) -> Any:
            return self.real[n.name] if n.name in self.real else self.constants[n.name]

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lookup)
        with inside(self._region(grad=False)):
            self.real[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _as_it_is_now(self, name: str) -> Ref:
        """A tensor that ran at import, as a constant: it may be written to later."""
        made: Tensor = self.real[name]
        constant = f"{name}@{made._version}" if made._version else name  # no exported name holds an @
        if constant not in self.values:
            self.constants[constant] = made.clone()
            self.values[constant] = Value(constant, "constant", tuple(made.shape), made.dtype, "@")
        return Ref(constant)

    def _call(self, node: torch.fx.Node) -> None:
        if node.name in self.at_import:
            self._run(node)
            return
        if node.target is operator.getitem:
            source: Any = self.now[node.all_input_nodes[0].name]
            if isinstance(source, list):
                self.now[node.name] = source[node.args[1]]  # type: ignore[index]
                return
            if isinstance(source, _Whole):
                index: Any = node.args[1]
                one = part_of(source.target, index)
                self._append(node, f"{source.op}.{index}", one, source.args, source.kwargs, "")
                return
        target: Any = node.target
        if target in _BORDERS:
            self._border(node)
            return
        if not isinstance(target, OpOverload):
            op = getattr(target, "__name__", str(target))
            if target is not operator.getitem:
                raise ModelError(f"the exported graph calls {op}, which is not a tensor operator")
            self._append(node, op, target, self._arguments(node.args), {}, "")
            return
        if not target._schema.returns and not target._schema.is_mutable:
            return  # assertions about types and shapes, which are fixed here
        op = target._schema.name.split("::")[-1]
        args, kwargs = self._arguments(node.args), self._arguments(node.kwargs)
        if op in _SPLITS:
            self._split(node, op, args)
            return
        if op in PARTED and isinstance(node.meta["val"], (list, tuple)):
            self.now[node.name] = _Whole(op, target, args, kwargs)
            return
        if op in SHAPED_LIKE:
            target, op = SHAPED_LIKE[op]
            args = (args[0], list(node.meta["val"].shape))
        if target._schema.is_mutable and (written := self._buffer(args, kwargs)):
            self._write(node, op, args, kwargs, *written)
            return
        effect = ""
        if target._schema.is_mutable and args and isinstance(args[0], Ref):
            changed = self.changed.get(args[0].name, args[0].name)
            if self.values[changed].kind == "buffer":
                self.changed[node.name] = effect = changed
                args = (Ref(changed), *args[1:])  # a norm that is called again changes what it changed before
            else:
                twin = functional(target, op)
                args = completed(target, twin, args, kwargs)
                target, op = twin, op.rstrip("_")
                self._mutate(changed, node.name)
        elif op in ("batch_norm", "instance_norm") and args[5] and args[3] is not None:
            effect = args[3].name
        self._append(node, op, target, args, kwargs, effect)
        if target._schema.is_mutable and effect == "" and args and isinstance(args[0], Ref):
            raise ModelError(f"{op} changes its input in place and has no functional twin")

    def _border(self, node: torch.fx.Node) -> None:
        """A region begins or ends."""
        if node.target is SET_GRAD:
            self.grad = bool(node.args[0])
        elif node.target is ENTER_AUTOCAST:
            self.autocasts[node.name] = node.args
        else:
            del self.autocasts[node.all_input_nodes[0].name]

    def _region(self, grad: bool) -> Region | None:
        """What the regions around the present node say; `grad` is False where it has no gradient."""
        innermost = {device: (device, dtype, on) for device, dtype, on, *_ in self.autocasts.values()}
        return None if grad and not innermost else Region(grad, tuple(innermost.values()))

    def _buffer(self, args: Any, kwargs: Any) -> tuple[str, str] | None:
        """(the value that an operator writes to, the buffer that it is). A norm's counter stays one that is
        changed in place."""
        given = kwargs.get("out", args[0] if args else None)
        if not isinstance(given, Ref):
            return None
        buffer = self.versions.get(given.name, given.name)
        value = self.values[buffer]
        counter = value.path.endswith("num_batches_tracked") or given.name in self.changed
        return None if value.kind != "buffer" or counter else (given.name, buffer)

    def _write(self, node: Any, op: str, args: Any, kwargs: Any, current: str, buffer: str) -> None:
        """The buffer's next value, which is read from here on, and its way into the buffer. Who read the one
        before reads a copy (runtime/module.py), also when that is computed again."""
        if "out" in kwargs:
            twin = without_out(node.target)
            kwargs = {k: v for k, v in kwargs.items() if k != "out"}
        else:
            twin = functional(node.target, op)
            args = completed(node.target, twin, args, kwargs)
        if op == "copy_" and self._alike(node.args[1], node):  # aten.copy has no derivative
            op, twin, args, kwargs = "clone", torch.ops.aten.clone.default, (args[1],), {}
        self._append(node, op.rstrip("_"), twin, args, kwargs, "")
        self._mutate(current, node.name)
        self.versions[node.name] = buffer
        self._keep(buffer, node.name, node.meta["val"])

    @staticmethod
    def _alike(source: Any, node: Any) -> bool:
        """Whether a copy is of the same sizes and type as what it is copied into."""
        fake, made = getattr(source, "meta", {}).get("val"), node.meta["val"]
        return isinstance(fake, Tensor) and fake.shape == made.shape and fake.dtype == made.dtype

    def _keep(self, buffer: str, name: str, fake: Any) -> None:
        """A value goes into a buffer."""
        target = f"{buffer}_kept"
        self.values[target] = replace(self.values[buffer], name=target)
        args = (Ref(target), Ref(name))
        self._add(Node(f"{name}_kept", WRITE, torch.ops.aten.copy_.default, args, effect=target), fake)

    def _mutate(self, changed: str, name: str) -> None:
        """From here on the changed value is the new node; its other views would show the change too."""
        if not self.grad and changed in carried(self.nodes, self._trained()):
            raise ModelError(
                f"the model changes {changed} in place where gradients are off, though {changed} has one; "
                "write that operator out of place"
            )
        base = self.alias.get(changed, changed)
        family = {v for v in self.values if self.alias.get(v, v) == base} - {changed}
        if base != changed and (self.values[base].kind == "buffer" or base in self.versions):
            raise ModelError(
                f"the model writes into a part of the buffer {base}; make the whole buffer anew and copy_ it"
            )
        if self.values[base].kind == "input" or self.values[changed].kind == "parameter":
            raise ModelError(f"the model changes its input or parameter {base} in place; copy it first")
        self.stale |= family
        for key, ref in self.now.items():
            if isinstance(ref, Ref) and ref.name == changed:
                self.now[key] = Ref(name)

    def _append(self, node: Any, op: str, target: Any, args: Any, kwargs: Any, effect: str) -> None:
        random = draws(op, target, args, kwargs)
        made = Node(node.name, op, target, args, kwargs, _module(node), effect, random)
        for part, like in apart(made, node.meta["val"]):
            self._add(part, like)

    def _trained(self) -> list[str]:
        """Inputs and parameters that may have a gradient."""
        return [v.name for v in self.values.values() if v.requires_grad or v.kind == "input"]

    def _add(self, node: Node, fake: Any) -> None:
        region = self._region(self.grad and node.target not in DRAWN_IN_SHAPE)
        node = replace(node, region=region) if region else node
        self.nodes.append(node)
        self.values[node.name] = _value(node.name, fake)
        self.now[node.name] = Ref(node.name)
        if node.op in _ALIASES and node.inputs:
            self.alias[node.name] = self.alias.get(node.inputs[0], node.inputs[0])

    def _split(self, node: torch.fx.Node, op: str, args: Any) -> None:
        """split, chunk, unbind -> one slice (or select) per part, so that every node makes one tensor."""
        parts = node.meta["val"]
        if op == "unbind":
            dim = int(args[1]) if len(args) > 1 else 0
        else:
            given: Any = args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
            dim = int(given)
        start, made = 0, []
        for i, part in enumerate(parts):
            name = f"{node.name}_{i}" if f"{node.name}_{i}" not in self.values else f"{node.name}_part_{i}"
            if op == "unbind":
                target: Any = torch.ops.aten.select.int
                piece = Node(name, "select", target, (args[0], dim, i), {}, _module(node))
            else:
                target = torch.ops.aten.slice.Tensor
                stop = start + part.shape[dim]
                piece = Node(name, "slice", target, (args[0], dim, start, stop), {}, _module(node))
                start = stop
            self._add(piece, part)
            made.append(Ref(name))
        self.now[node.name] = made

    def _outputs(self, node: torch.fx.Node) -> tuple[str, ...]:
        names = []
        for item in node.args[0]:  # type: ignore[union-attr]
            ref = self._arguments(item)
            if not isinstance(ref, Ref):
                raise ModelError(f"the model returns {ref!r}; rowtune handles tensors only")
            names.append(ref.name)
        return tuple(names)


def _value(name: str, fake: Any) -> Value:
    if isinstance(fake, (list, tuple)):
        parts = tuple(_value(f"{name}.{i}", f) for i, f in enumerate(fake) if isinstance(f, Tensor))
        return Value(name, "node", (), torch.float32, parts=parts)
    if not isinstance(fake, Tensor):
        raise ModelError(f"{name} is a {type(fake).__name__} and not a tensor; rowtune needs static shapes")
    try:
        return Value(name, "node", tuple(int(s) for s in fake.shape), fake.dtype)
    except Exception as error:
        raise ModelError(f"{name} has a shape that depends on data; rowtune needs static shapes") from error


def _module(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
