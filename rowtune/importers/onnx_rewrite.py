"""Rewrites of an ONNX graph before it becomes steps.

Exporters merge initial values that are equal (all zero biases of one size become one tensor); trained like
that, layers would share a bias. And they write a linear layer as Transpose, MatMul and Add.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import onnx

from rowtune.importers.onnx_fold import array
from rowtune.importers.onnx_node import OnnxNode, Static

# The input that tells two layers of this kind apart.
PRIMARY = {"BatchNormalization": 1, "Conv": 1, "ConvTranspose": 1, "Gemm": 1}


@dataclass(eq=False)
class Raw:
    """A node with its connections, before its inputs are resolved."""

    node: OnnxNode
    proto: onnx.NodeProto
    inputs: list[str]
    outputs: list[str]
    branches: tuple[tuple[list[Raw], list[str]], tuple[list[Raw], list[str]]] | None = None


class Use(NamedTuple):
    """An input of a node: the node's first output and operator, and the slot."""

    output: str
    op: str
    slot: int


@dataclass
class Sharing:
    """Stored tensors under further names, which inputs read those now, and how many of them are separate
    copies."""

    copies: dict[str, onnx.TensorProto] = field(default_factory=dict)
    moved: dict[str, list[Use]] = field(default_factory=dict)
    separated: int = 0


# Further outputs of these cost something, or need the operator in another form.
OPTIONAL_OUTPUTS = frozenset({"BatchNormalization", "Dropout", "LayerNormalization", "MaxPool"})


def trim(raws: list[Raw], outputs: set[str]) -> None:
    """Forget optional outputs that nobody reads: exporters list masks and statistics all the same."""
    read = {name for raw in raws for name in raw.inputs} | outputs
    read |= {n for raw in raws for side in raw.branches or () for n in _read_inside(side[0]) | set(side[1])}
    for raw in raws:
        if raw.node.op in OPTIONAL_OUTPUTS:
            while len(raw.outputs) > 1 and raw.outputs[-1] not in read:
                raw.outputs.pop()
            raw.node = replace(raw.node, outputs=len(raw.outputs))


def as_cast(raw: Raw, element: int) -> Raw:
    """CastLike with the type it casts to known: a Cast, which a constant needs no data for."""
    proto = onnx.helper.make_node("Cast", raw.inputs[:1], raw.outputs, to=element)
    node = replace(raw.node, op="Cast", attrs={"to": element})
    return Raw(node, proto, raw.inputs[:1], raw.outputs)


def name_sharers(
    raws: list[Raw],
    weights: Mapping[str, onnx.TensorProto],
    outputs: set[str],
    is_path: Callable[[str], bool],
) -> Sharing:
    """Give every user of a merged initial value its own copy, in place; truly shared weights stay shared.

    Only tensors of one repeated value are taken apart: random weights that are equal are the same weight.
    """
    sharing = Sharing()
    table = dict(weights)
    _identities(raws, table, outputs, is_path, sharing)
    users: dict[str, list[tuple[Raw, int]]] = defaultdict(list)
    for raw in raws:
        for slot, name in enumerate(raw.inputs):
            if name in table:
                users[name].append((raw, slot))
    taken = set(table)
    for name, uses in users.items():
        if len(uses) < 2:
            continue
        statistics = all(raw.node.op == "BatchNormalization" and slot >= 3 for raw, slot in uses)
        if not statistics and not _uniform(table[name]):
            continue
        owners: dict[str, str] = {}
        for raw, slot in uses:
            owner = _owner(raw, slot, table)
            if owner not in owners:
                owners[owner] = name if not owners else _fresh(raw, slot, name, taken, is_path)
                if owners[owner] != name:
                    sharing.copies[owners[owner]] = table[name]
                    sharing.separated += 1
            if owners[owner] != name:
                sharing.moved.setdefault(owners[owner], []).append(Use(raw.outputs[0], raw.node.op, slot))
            raw.inputs[slot] = owners[owner]
    return sharing


def _identities(
    raws: list[Raw],
    table: dict[str, onnx.TensorProto],
    outputs: set[str],
    is_path: Callable[[str], bool],
    sharing: Sharing,
) -> None:
    """`features.2.bias = Identity(features.0.bias)` is how the older exporter notes a merged value's name."""
    same: dict[str, str] = {}
    for raw in list(raws):
        if raw.node.op != "Identity" or raw.inputs[0] not in table or raw.outputs[0] in outputs:
            continue
        source, name = raw.inputs[0], raw.outputs[0]
        if is_path(name) and _uniform(table[source]):
            table[name] = sharing.copies[name] = table[source]
            sharing.separated += 1
        else:
            same[name] = source
        raws.remove(raw)
    for raw in raws:
        raw.inputs[:] = [same.get(name, name) for name in raw.inputs]


def _owner(raw: Raw, slot: int, table: Mapping[str, onnx.TensorProto]) -> str:
    """What this use belongs to: its layer's main weight, or else the node itself."""
    primary = PRIMARY.get(raw.node.op)
    if primary is not None and slot > primary and raw.inputs[primary] in table:
        return raw.inputs[primary]
    # A layer that appears twice with one weight is one layer.
    return raw.inputs[primary] if primary is not None and slot == primary else raw.node.name + str(id(raw))


def _fresh(raw: Raw, slot: int, name: str, taken: set[str], is_path: Callable[[str], bool]) -> str:
    """A name for a copy: the bias beside its weight if that is free, else the old name with a number."""
    primary = raw.inputs[1] if slot == 2 and len(raw.inputs) > 1 else ""
    sibling = primary.removesuffix(".weight") + ".bias"
    candidate, count = name, 2
    if primary.endswith(".weight") and is_path(sibling):
        candidate = sibling
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    taken.add(candidate)
    return candidate


def _uniform(proto: onnx.TensorProto) -> bool:
    values = array(proto).reshape(-1)
    return values.size > 0 and bool((values == values[0]).all())


def fuse_linear(
    raws: list[Raw], weight_shape: Callable[[str], tuple[int, ...] | None], outputs: set[str]
) -> list[Raw]:
    """MatMul with a stored matrix (transposed or not), and the Add of a bias after it, as one layer."""
    readers = Counter(name for raw in raws for name in raw.inputs)
    readers.update(name for raw in raws for side in raw.branches or () for name in _read_inside(side[0]))
    readers.update(outputs)
    turned = {
        raw.outputs[0]: raw.inputs[0]
        for raw in raws
        if raw.node.op == "Transpose"
        and raw.node.get("perm", [1, 0]) == [1, 0]
        and len(weight_shape(raw.inputs[0]) or ()) == 2
    }
    fused: dict[str, Raw] = {}
    result: list[Raw] = []
    for raw in raws:
        if raw.node.op == "MatMul":
            raw = _linear(raw, turned, weight_shape)
            if raw.node.op == "rowtune.Linear":
                fused[raw.outputs[0]] = raw
                readers[raw.inputs[1]] += 1
        elif raw.node.op == "Add" and _add_bias(raw, fused, readers, weight_shape):
            continue
        result.append(raw)
    used = {name for raw in result for name in raw.inputs} | outputs
    used |= {
        name for raw in result for side in raw.branches or () for name in _read_inside(side[0]) | set(side[1])
    }
    return [raw for raw in result if raw.outputs[0] not in turned or raw.outputs[0] in used]


def _linear(
    raw: Raw, turned: Mapping[str, str], weight_shape: Callable[[str], tuple[int, ...] | None]
) -> Raw:
    matrix = raw.inputs[1]
    if matrix in turned:
        attrs, weight = {"transposed": 0}, turned[matrix]
    elif len(weight_shape(matrix) or ()) == 2 and weight_shape(raw.inputs[0]) is None:
        attrs, weight = {"transposed": 1}, matrix
    else:
        return raw
    node = replace(raw.node, op="rowtune.Linear", attrs=attrs)
    return Raw(node, raw.proto, [raw.inputs[0], weight], list(raw.outputs))


def _add_bias(
    raw: Raw,
    fused: dict[str, Raw],
    readers: Mapping[str, int],
    weight_shape: Callable[[str], tuple[int, ...] | None],
) -> bool:
    """Take an Add into the linear layer before it, if nobody else reads that layer's output."""
    for product, bias in (raw.inputs, raw.inputs[::-1]):
        layer = fused.get(product)
        if layer is None or readers[product] != 1 or len(layer.inputs) != 2:
            continue
        matrix = weight_shape(layer.inputs[1]) or (0, 0)
        features = matrix[1] if layer.node.get("transposed") else matrix[0]
        if weight_shape(bias) == (features,):
            layer.inputs.append(bias)
            layer.outputs[:] = raw.outputs
            return True
    return False


def _read_inside(raws: list[Raw]) -> set[str]:
    names = {name for raw in raws for name in raw.inputs}
    for raw in raws:
        for inner, outs in raw.branches or ():
            names |= _read_inside(inner) | set(outs)
    return names


def fuse_group_norm(raws: list[Raw], known: Mapping[str, Static], outputs: set[str]) -> list[Raw]:
    """Reshape to (N, groups, -1), an instance norm without scale, Reshape back: one group norm.

    Written out, it lays all rows of an image into one axis, and no plan could cut it into bands.
    """
    maker = {raw.outputs[0]: raw for raw in raws if raw.outputs}
    readers = Counter(name for raw in raws for name in raw.inputs)
    gone: set[int] = set()
    result: list[Raw] = []
    for raw in raws:
        norm = maker.get(raw.inputs[0]) if raw.node.op == "Reshape" and len(raw.inputs) == 2 else None
        first = maker.get(norm.inputs[0]) if norm is not None else None
        groups = _groups(norm, first, known) if norm is not None and first is not None else 0
        between = [r.outputs[0] for r in (norm, first) if r is not None]
        if norm and first and groups and not any(readers[o] != 1 or o in outputs for o in between):
            attrs = {"groups": groups, "epsilon": norm.node.get("epsilon", 1e-5)}
            node = replace(norm.node, op="rowtune.GroupNorm", attrs=attrs)
            gone |= {id(norm), id(first)}
            raw = Raw(node, raw.proto, [first.inputs[0], raw.inputs[1]], raw.outputs)
        result.append(raw)
    return [raw for raw in result if id(raw) not in gone]


# Transposes between two Reshapes that are a pixel shuffle (False) or undo one (True).
SHUFFLES = {(0, 1, 4, 2, 5, 3): False, (0, 1, 3, 5, 2, 4): True}


def fuse_shuffle(raws: list[Raw], outputs: set[str]) -> list[Raw]:
    """Reshape to six axes, a Transpose, Reshape back: probably a pixel shuffle or its inverse.

    Exporters write torch's pixel_unshuffle like this, and the reshapes take the band axis apart. Whether it
    is one is known when the shapes are (onnx_window.shuffle_of_reshapes).
    """
    maker = {raw.outputs[0]: raw for raw in raws if raw.outputs}
    readers = Counter(name for raw in raws for name in raw.inputs)
    ends: set[int] = set()
    gone: set[int] = set()
    result: list[Raw] = []
    for raw in raws:
        turn = maker.get(raw.inputs[0]) if raw.node.op == "Reshape" and len(raw.inputs) == 2 else None
        inverse = (
            SHUFFLES.get(tuple(turn.node.get("perm", ()))) if turn and turn.node.op == "Transpose" else None
        )
        first = maker.get(turn.inputs[0]) if turn is not None and inverse is not None else None
        if turn and first and first.node.op == "Reshape" and len(first.inputs) == 2:
            between = (turn.outputs[0], first.outputs[0])
            if id(first) not in ends and not any(readers[o] != 1 or o in outputs for o in between):
                ends.add(id(raw))  # a Reshape that ends one shuffle cannot begin another
                node = replace(raw.node, op="rowtune.Shuffle", attrs={"inverse": inverse})
                gone |= {id(turn), id(first)}
                raw = Raw(node, raw.proto, [*first.inputs, raw.inputs[1]], raw.outputs)
        result.append(raw)
    return [raw for raw in result if id(raw) not in gone]


def _groups(norm: Raw, first: Raw, known: Mapping[str, Static]) -> int:
    """The number of groups if these two are the first half of a group norm, else 0."""
    if norm.node.op != "InstanceNormalization" or first.node.op != "Reshape" or len(first.inputs) != 2:
        return 0
    target, scale, shift = (known.get(name) for name in (first.inputs[1], norm.inputs[1], norm.inputs[2]))
    if target is None or scale is None or shift is None or target.shape != (3,) or target[2] != -1:
        return 0
    if int(target[0]) != 0 or not bool((scale == 1).all()) or bool(shift.any()):
        return 0
    return int(target[1])
