"""An ONNX graph -> an OnnxProgram: constants folded, weights told from constants, linear layers joined."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from torch import Tensor

from rowtune.errors import ModelError
from rowtune.importers.onnx_fold import FLOATS, array, attributes, evaluate
from rowtune.importers.onnx_module import Branch, Constant, Home, OnnxProgram, OnnxRef, OnnxStep, Weight
from rowtune.importers.onnx_names import GENERATED, Paths, is_path
from rowtune.importers.onnx_node import DTYPES, OnnxNode, Static
from rowtune.importers.onnx_ops import CONTROL, NORMS, NOT_FOLDED, OPERATORS
from rowtune.importers.onnx_rewrite import (
    Raw,
    Sharing,
    Use,
    as_cast,
    fuse_group_norm,
    fuse_linear,
    fuse_shuffle,
    name_sharers,
    trim,
)

# Inputs that are weights whatever kind of constant feeds them.
WEIGHT_SLOTS: dict[str, frozenset[int]] = {
    "BatchNormalization": frozenset({1, 2}),
    "Conv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "Gemm": frozenset({1, 2}),
    "MatMul": frozenset({1}),
    "PRelu": frozenset({1}),
    "rowtune.Linear": frozenset({1, 2}),
}

# What these compute is what they were given, in another form.
SAME_VALUES = frozenset({"Identity", "Reshape", "Transpose", "Unsqueeze"})

# Inputs that are running statistics.
STATISTICS = frozenset({("BatchNormalization", 3), ("BatchNormalization", 4)})

# Floating-point inputs that are numbers to compute with beforehand, not tensors to train.
STATIC_SLOTS: dict[str, frozenset[int]] = {
    "Clip": frozenset({1, 2}),
    "Dropout": frozenset({1}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({2}),
    "Range": frozenset({0, 1, 2}),
    "Resize": frozenset({1, 2}),
    "Upsample": frozenset({1}),
}


# Operators whose first output has the element type of their first input (CastLike: of its second).
KEEPS_TYPE = frozenset(OPERATORS) - {
    *("ArgMax", "ArgMin", "Bernoulli", "Cast", "Constant", "ConstantOfShape", "Equal", "EyeLike", "Greater"),
    *("GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "NonZero", "OneHot", "RandomNormal", "Size"),
    *("RandomNormalLike", "RandomUniform", "RandomUniformLike", "SequenceAt", "SequenceConstruct", "Shape"),
    *("ConcatFromSequence", "SequenceLength", "SplitToSequence", "Where"),
}


@dataclass(frozen=True)
class Built:
    """A program, the names of its normalisation layers, and how many equal weights were told apart."""

    program: OnnxProgram
    norms: tuple[str, ...]
    convolutions: int
    separated: int


def build(graph: onnx.GraphProto, opset: int) -> Built:
    """Compile a graph without local functions, all data loaded. ModelError for what cannot be imported."""
    return _Builder(graph, opset).build()


class _Builder:
    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        self.graph = graph
        self.opset = opset
        self.initial: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.known: dict[str, Static] = {}
        self.source: dict[str, str] = {}  # the operator that a known value came from
        self.kinds = {i.name: i.type.tensor_type.elem_type for i in graph.input}
        self.kinds |= {name: t.data_type for name, t in self.initial.items()}
        self.paths = Paths()
        self.refs: dict[tuple[str, str], Weight] = {}
        self.uses: dict[tuple[str, str], list[Use]] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.norms: list[str] = []

    def build(self) -> Built:
        outputs = [o.name for o in self.graph.output]
        raws = self.read(self.graph.node)
        trim(raws, set(outputs))
        self.neutral(raws)
        sharing = self.separate(raws, set(outputs))
        raws = fuse_linear(raws, self.weight_shape, set(outputs))
        raws = fuse_group_norm(raws, self.known, set(outputs))
        raws = fuse_shuffle(raws, set(outputs))
        self.refuse(raws)
        steps = self.resolve(raws)
        refs = tuple(self.ref(name, "output", 0) for name in outputs)
        inputs = tuple(i.name for i in self.graph.input if i.name not in self.initial)
        order = {name: i for i, name in enumerate(self.initial)}
        ranked = sorted(self.parameters.items(), key=lambda item: order.get(item[0], len(order)))
        program = OnnxProgram(
            inputs, _drop(steps, refs), refs, dict(ranked), dict(self.buffers), dict(self.constants),
            self.homes(sharing),
        )  # fmt: skip
        convolutions = sum(raw.node.op in ("Conv", "ConvTranspose") for raw in raws)
        return Built(program, tuple(self.norms), convolutions, sharing.separated)

    # --- reading: nodes in order, those with constant inputs computed at once

    def read(self, protos: Iterable[onnx.NodeProto], prefix: str = "") -> list[Raw]:
        raws: list[Raw] = []
        for proto in protos:
            name = prefix + (proto.name or next((o for o in proto.output if o), proto.op_type))
            count = max((i + 1 for i, o in enumerate(proto.output) if o), default=0)
            op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}::{proto.op_type}"
            raw = Raw(
                OnnxNode(op, name, self.opset, attributes(proto), count),
                proto,
                list(proto.input),
                list(proto.output[:count]),
            )
            if not self.fold(raw) and not self.choose(raw, raws):
                raws.append(raw)
        return raws

    def constant(self, name: str) -> Static | None:
        """The value of a constant that is not a weight: integers, computed constants, made-up scalars."""
        if name not in self.known and name in self.initial:
            proto = self.initial[name]
            number = math.prod(proto.dims) == 1 and GENERATED.search(name)
            if proto.data_type not in FLOATS or number:
                self.known[name], self.source[name] = array(proto), "initializer"
        return self.known.get(name)

    def fold(self, raw: Raw) -> bool:
        """Compute the node now if all its inputs are known; the shape of a weight is, its values are not."""
        op = raw.node.op
        self.type_of(raw)
        if op == "CastLike" and raw.inputs[1] in self.kinds:
            raw = as_cast(raw, self.kinds[raw.inputs[1]])
        if op in ("Shape", "Size") and raw.inputs[0] in self.initial:
            values: list[Static | None] = [np.broadcast_to(0, tuple(self.initial[raw.inputs[0]].dims))]
        elif op in NOT_FOLDED or op in CONTROL or "::" in op:
            return False
        else:
            values = [self.constant(name) if name else None for name in raw.inputs]
            if any(v is None and n for v, n in zip(values, raw.inputs, strict=True)):
                return False
            if not raw.inputs and op != "Constant":
                return False
        results = evaluate(raw.node, raw.proto, values)
        for name, value in zip([o for o in raw.outputs if o], results, strict=False):
            self.known[name] = value
            self.source[name] = self.source.get(raw.inputs[0], op) if op in SAME_VALUES else op
        return True

    def type_of(self, raw: Raw) -> None:
        """Follow element types through operators that keep them: enough to tell what CastLike casts to."""
        follows = raw.inputs[1] if raw.node.op == "CastLike" else raw.inputs[0] if raw.inputs else ""
        if follows in self.kinds and raw.node.op in KEEPS_TYPE:
            for name in raw.outputs if raw.node.op == "Split" else raw.outputs[:1]:
                self.kinds[name] = self.kinds[follows]

    def choose(self, raw: Raw, raws: list[Raw]) -> bool:
        """Put the branch of an If with a constant condition in its place; compile both otherwise."""
        if raw.node.op != "If":
            return False
        condition = self.constant(raw.inputs[0])
        sides = (raw.node.attrs["then_branch"], raw.node.attrs["else_branch"])
        if condition is None:
            raw.branches = (self.side(sides[0], raw.node.name), self.side(sides[1], raw.node.name))
            return False
        graph = sides[0 if bool(condition.reshape(-1)[0]) else 1]
        nodes, outputs = self.scoped(graph, raw.node.name)
        raws += self.read(nodes, raw.node.name + "/")
        for name, result in zip(raw.outputs, outputs, strict=False):
            proto = onnx.helper.make_node("Identity", [result], [name], name=f"{raw.node.name}/{name}")
            raws += self.read([proto])
        return True

    def side(self, graph: onnx.GraphProto, scope: str) -> tuple[list[Raw], list[str]]:
        nodes, outputs = self.scoped(graph, scope)
        return self.read(nodes, scope + "/"), outputs

    def scoped(self, graph: onnx.GraphProto, scope: str) -> tuple[list[onnx.NodeProto], list[str]]:
        """A branch's nodes with their own names made unique: two branches may use the same ones."""
        own = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output if o}
        key = f"{scope}/{graph.name or len(self.initial)}/"
        for tensor in graph.initializer:
            copied = onnx.TensorProto()
            copied.CopyFrom(tensor)
            self.initial[key + tensor.name] = copied
        nodes = []
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [key + n if n in own else n for n in node.input]
            copy.output[:] = [key + n if n in own else n for n in node.output]
            nodes.append(copy)
        return nodes, [key + o.name if o.name in own else o.name for o in graph.output]

    # --- rewriting

    def separate(self, raws: list[Raw], outputs: set[str]) -> Sharing:
        """Undo the merging of weights that merely started out equal."""
        weights = {n: t for n, t in self.initial.items() if t.data_type in FLOATS}
        sharing = name_sharers(raws, weights, outputs, is_path)
        self.initial.update(sharing.copies)
        return sharing

    def neutral(self, raws: list[Raw]) -> None:
        """Scales of one and shifts of zero under made-up names: norms without weights of their own."""
        for raw in raws:
            if raw.node.op not in NORMS or raw.node.op == "BatchNormalization":
                continue
            for name, value in zip(raw.inputs[1:3], (1.0, 0.0), strict=False):
                if self.weight_shape(name) is not None and GENERATED.search(name):
                    found = array(self.initial[name])
                    if bool((found == value).all()):
                        self.known[name], self.source[name] = found, "initializer"

    def weight_shape(self, name: str) -> tuple[int, ...] | None:
        """Dimensions of a trainable stored tensor, None for anything else."""
        proto = self.initial.get(name)
        return tuple(proto.dims) if proto is not None and proto.data_type in FLOATS else None

    def refuse(self, raws: list[Raw]) -> None:
        nodes = [raw.node for raw in _walk(raws)]
        missing = Counter(node.op for node in nodes if node.op not in OPERATORS and node.op not in CONTROL)
        if missing:
            listed = ", ".join(f"{op} ({count})" for op, count in sorted(missing.items()))
            raise ModelError(
                f"ONNX operators that cannot be trained here: {listed}; export the network without them, "
                "for instance without pre- or post-processing"
            )

    # --- resolving: every input to an earlier value, a weight or a constant

    def resolve(self, raws: list[Raw]) -> list[OnnxStep]:
        steps = []
        for raw in raws:
            args = tuple(self.ref(name, raw.node.op, slot, raw) for slot, name in enumerate(raw.inputs))
            if raw.node.op in NORMS:
                scale = args[1] if len(args) > 1 else None
                owner = scale.path.rpartition(".")[0] if isinstance(scale, Weight) else ""
                self.norms.append(owner or raw.node.name)
            branches = None
            if raw.branches is not None:
                first, second = (
                    Branch(tuple(self.resolve(inner)), tuple(self.ref(o, "output", 0) for o in outs))
                    for inner, outs in raw.branches
                )
                branches = (first, second)
            function = OPERATORS.get(raw.node.op)
            steps.append(OnnxStep(raw.node, raw.proto, function, args, tuple(raw.outputs), (), branches))
        return steps

    def ref(self, name: str, op: str, slot: int, raw: Raw | None = None) -> OnnxRef:
        if not name:
            return None
        value = self.constant(name)
        if value is None and name not in self.initial:
            return name
        # Weights that were emptied out of a file: a scale and a shift are no constants of the network.
        emptied = op in ("Mul", "Add") and self.source.get(name) == "ConstantOfShape"
        emptied = emptied and value is not None and value.size > 1
        if (emptied or slot in WEIGHT_SLOTS.get(op, ())) and self.floating(name):
            if value is not None and slot == 2 and _is_absent(value, self.source.get(name, "")):
                return None
            return self.store(name, "parameter", raw, slot)
        if (op, slot) in STATISTICS:
            return self.store(name, "buffer", raw, slot)
        if value is None and (slot in STATIC_SLOTS.get(op, ()) or name in self.known):
            value = self.known[name] = array(self.initial[name])
        if value is None:
            return self.store(name, "parameter", raw, slot)
        small = value.size <= 1 or not any(value.strides) or slot in STATIC_SLOTS.get(op, ())
        small = small or op in NORMS  # most of these are a scale of one and a shift of zero
        return Constant(value) if small or not self.floating(name) else self.store(name, "constant")

    def floating(self, name: str) -> bool:
        if name in self.initial:
            return self.initial[name].data_type in FLOATS
        return self.known[name].dtype.kind not in "biuOSU"

    def store(self, name: str, kind: str, raw: Raw | None = None, slot: int = 0) -> Weight:
        """Register a tensor as parameter, buffer or fixed array, once."""
        if raw is not None:
            self.uses.setdefault((name, kind), []).append(Use(raw.outputs[0], raw.node.op, slot))
        if (name, kind) not in self.refs:
            table = {"parameter": self.parameters, "buffer": self.buffers, "constant": self.constants}[kind]
            path = self.paths.claim(name)
            table[path] = self.stored(name)
            self.refs[name, kind] = Weight(path)
        return self.refs[name, kind]

    def homes(self, sharing: Sharing) -> dict[str, Home]:
        """Where each parameter and buffer lies in the file. One tensor may be both (zeros that are a bias and
        a running mean): the second is to have one of its own."""
        found: dict[str, Home] = {}
        taken: set[str] = set()
        for (name, kind), ref in self.refs.items():
            if kind == "constant":
                continue
            if name in taken:
                found[ref.path] = Home(ref.path, tuple(self.uses.get((name, kind), ())))
            else:
                found[ref.path] = Home(name, tuple(sharing.moved.get(name, ())))
            taken.add(name)
        return found

    def stored(self, name: str) -> Tensor:
        value = self.known[name] if name in self.known else array(self.initial[name])
        kind = DTYPES.get(self.initial[name].data_type) if name in self.initial else None
        try:
            if value.dtype.kind not in "biuf" or kind is torch.bfloat16:  # numpy has no bfloat16 of its own
                return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
            return torch.from_numpy(np.array(value, order="C"))
        except (TypeError, ValueError, MemoryError) as problem:
            raise ModelError(
                f"ONNX tensor {name!r} ({value.dtype}) cannot become a torch tensor"
            ) from problem


def _is_absent(bias: Static, source: str) -> bool:
    """A bias of zeros that the exporter computed stands for bias=False; training one would add weights."""
    return source not in ("Constant", "ConstantOfShape", "initializer") and not bias.any()


def _walk(raws: Sequence[Raw]) -> Iterable[Raw]:
    for raw in raws:
        yield raw
        for inner, _ in raw.branches or ():
            yield from _walk(inner)


def _names(steps: Sequence[OnnxStep]) -> set[str]:
    """All values that these steps read, branches included."""
    found: set[str] = set()
    for step in steps:
        found |= {ref for ref in step.args if isinstance(ref, str)}
        for branch in step.branches or ():
            found |= _names(branch.steps) | {ref for ref in branch.outputs if isinstance(ref, str)}
    return found


def _drop(steps: Sequence[OnnxStep], outputs: Sequence[OnnxRef]) -> tuple[OnnxStep, ...]:
    """Let every value go after its last reader: an evaluation holds no more than it needs."""
    alive = {ref for ref in outputs if isinstance(ref, str)}
    result: list[OnnxStep] = []
    for step in reversed(steps):
        read = _names([step])
        produced = {o for o in step.outputs if o}
        last = (read | produced) - alive
        result.append(replace(step, drop=tuple(sorted(last))))
        alive |= read
    return tuple(reversed(result))
