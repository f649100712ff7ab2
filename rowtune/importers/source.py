"""Where a model comes from: what the user wrote on the command line -> a torch module and its input specs.

Four kinds of source: `zoo:NAME`, `package.module:factory`, a .pt2 file, an .onnx file. An .onnx file is
data; a .pt2 file may hold pickled code and a factory is code: load those from people you trust.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowtune.errors import ModelError, RowtuneError, UsageError, meant
from rowtune.problem import Argument, Source, TensorSpec

PT2_WARNING = "a .pt2 file can execute code when it is loaded: open only files from people you trust"

_NORMS = ("BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm", "SyncBatchNorm")
_DTYPES = {str(t).split(".")[1]: t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Loaded:
    """A module in train mode with the inputs it takes, and what a person should know about it."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...]
    norm_layers: tuple[str, ...]


def parse_source(text: str, model_args: Sequence[str] = ()) -> Source:
    """The source that a command line names. UsageError for a file that does not exist or a bad argument."""
    args = tuple(_argument(item) for item in model_args)
    if text.startswith("zoo:"):
        return Source("zoo", text.removeprefix("zoo:"), args)
    suffix = Path(text).suffix.lower()
    if suffix not in (".onnx", ".pt2") and not Path(text).exists():
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
            return Source("factory", text, args)
        raise UsageError(
            f"{text!r} is no model: give zoo:NAME, package.module:factory, or an existing .onnx or .pt2 file"
            f"{_meant(text)}"
        )
    if not Path(text).exists():
        raise UsageError(f"there is no file {text}{_meant(text)}")
    if not Path(text).is_file():
        raise UsageError(f"{text} is not a file")
    if args:
        raise UsageError(f"--model-arg is for factories and zoo models; {text} is a file and takes none")
    if suffix not in (".onnx", ".pt2"):
        raise ModelError(f"{text} is neither .onnx nor .pt2; for Python code give package.module:factory")
    return Source("onnx" if suffix == ".onnx" else "pt2", text, ())


def _meant(text: str) -> str:
    """A name of the zoo without its prefix, or a file here whose name is like it."""
    from rowtune import zoo

    folder = Path(text).parent
    files = [str(p) for p in folder.glob("*") if p.suffix.lower() in (".onnx", ".pt2")]
    like = meant(text, zoo.ZOO).replace("mean '", "mean 'zoo:")
    return meant(text, files) or like


def _argument(item: str) -> tuple[str, Argument]:
    key, eq, value = item.partition("=")
    if not eq or not key.isidentifier():
        raise UsageError(f"--model-arg is key=value, not {item!r}")
    return key, _literal(value)


def _literal(text: str) -> Argument:
    """3 -> int, 0.5 -> float, true/false -> bool, "3,4" -> tuple, anything else -> str."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    parts = [_literal(part) for part in text.split(",") if part] if "," in text else []
    if parts and all(type(part) in (int, float) for part in parts):
        return tuple(parts)  # type: ignore[arg-type]
    return text


def load(source: Source, shapes: Sequence[str] = (), dtype: str = "", seed: int = 0) -> Loaded:
    """The module in train mode and its input specs; weights that are drawn are drawn from `seed`.

    Raises:
        UsageError: a shape flag is missing or makes no sense.
        ModelError: the model cannot be had.
    """
    if dtype and dtype not in _DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(_DTYPES)}, not {dtype!r}")
    wanted = [parse_shape(text) for text in shapes]
    try:
        module, found, notes, norms = _LOADERS[source.kind](source, seed)
    except RowtuneError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{source} could not be loaded: {_one_line(error)}") from error
    inputs = _resolve(found, wanted, source)
    if dtype:
        module = module.to(_DTYPES[dtype])
        inputs = tuple(_retype(spec, dtype) for spec in inputs)
    return Loaded(module, inputs, notes, norms)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _retype(spec: TensorSpec, dtype: str) -> TensorSpec:
    floating = spec.torch_dtype.is_floating_point
    return TensorSpec(spec.name, spec.shape, dtype) if floating else spec


Shape = tuple[int | str | None, ...]
Found = tuple[nn.Module, list[tuple[str, Shape | None, str]], tuple[str, ...], tuple[str, ...]]


def _zoo(source: Source, seed: int) -> Found:
    from rowtune import zoo

    module = zoo.build(source.text, **{"seed": seed, **dict(source.args)})
    return module, [("input", zoo.example_shape(source.text), "float32")], (), norm_layers(module)


def _factory(source: Source, seed: int) -> Found:
    module_name, _, attribute = source.text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    factory: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        factory = getattr(factory, part)
    torch.manual_seed(seed)
    module = factory(**dict(source.args)) if callable(factory) else factory
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source} returned {type(module).__name__}; a factory returns a torch.nn.Module")
    module.train()
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = "float32" if weight is None else str(weight.dtype).split(".")[1]
    return module, [("input", None, dtype)], (), norm_layers(module)


def _pt2(source: Source, seed: int) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.load(source.text)
        module = exported.module()
    names = exported.graph_signature.user_inputs
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    inputs: list[tuple[str, Shape | None, str]] = []
    for name in names:
        fake = nodes[str(name)].meta["val"]
        if isinstance(fake, Tensor):
            shape = tuple(size if isinstance(size, int) else str(size) for size in fake.shape)
            inputs.append((str(name), shape, str(fake.dtype).split(".")[1]))
    calls = [
        node
        for node in exported.graph.nodes
        if re.search(r"(batch|group|layer|instance|rms)_norm", node.name)
    ]
    notes = [PT2_WARNING]
    if any("batch_norm" in node.name and node.args[5] is False for node in calls):
        notes.append(
            "exported in eval mode: batch norm uses its running statistics; export model.train() to train it"
        )
    return module, inputs, tuple(notes), tuple(node.name for node in calls)


def _onnx(source: Source, seed: int) -> Found:
    from rowtune.importers.onnx_file import load_onnx

    model = load_onnx(source.text)
    inputs: list[tuple[str, Shape | None, str]] = []
    for spec in model.inputs:
        inputs.append((spec.name, tuple(spec.shape), str(spec.dtype).removeprefix("torch.")))
    model.module.train()
    return model.module, inputs, tuple(model.notes), tuple(model.norm_names)


def _python(source: Source, seed: int) -> Found:
    raise ModelError(
        f"the plan was made in Python for a {source.text} that no file holds: train with "
        "rowtune.apply(model, rowtune.load(plan)), or give rowtune.search an out=, which keeps the model too"
    )


_LOADERS: Mapping[str, Any] = {
    "zoo": _zoo, "factory": _factory, "pt2": _pt2, "onnx": _onnx, "python": _python,
}  # fmt: skip


def norm_layers(module: nn.Module) -> tuple[str, ...]:
    """Names of the normalisation layers, by the class's name (so that a user's own LayerNorm2d counts)."""
    return tuple(name for name, m in module.named_modules() if any(n in type(m).__name__ for n in _NORMS))


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """`[name:]NxCxHxW` -> (name or "", sizes)."""
    name, _, sizes = text.rpartition(":")
    if not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise UsageError(f"--shape is [name:]NxCxHxW, e.g. 1x3x512x512, not {text!r}")
    shape = tuple(int(size) for size in sizes.split("x"))
    if 0 in shape:
        raise UsageError(f"--shape {text}: every size is at least 1")
    return name, shape


def _resolve(
    found: Sequence[tuple[str, Shape | None, str]],
    wanted: Sequence[tuple[str, tuple[int, ...]]],
    source: Source,
) -> tuple[TensorSpec, ...]:
    """Give every input its sizes: from --shape by name, then in order, then from the file."""
    if source.kind == "factory" and len(wanted) > 1:  # a factory does not say what its inputs are
        found = [(name or f"input{i}", None, found[0][2]) for i, (name, _) in enumerate(wanted)]
    elif source.kind == "factory" and wanted:
        found = [(wanted[0][0] or "input", None, found[0][2])]
    names = [name for name, _, _ in found]
    named = {name: shape for name, shape in wanted if name}
    unnamed = [shape for name, shape in wanted if not name]
    unknown = sorted(set(named) - set(names))
    if unknown:
        raise UsageError(f"--shape {unknown[0]}:...: the model's inputs are {', '.join(names)}")
    if len(wanted) > len(found):
        raise UsageError(f"{len(wanted)} --shape flags, but the model has {len(found)} input(s)")
    for name in names:
        if name not in named and unnamed:
            named[name] = unnamed.pop(0)
    return tuple(TensorSpec(n, _sizes(n, s, named.get(n), source), dtype) for n, s, dtype in found)


def _sizes(name: str, found: Shape | None, given: tuple[int, ...] | None, source: Source) -> tuple[int, ...]:
    if given is not None:
        if found is not None and len(given) != len(found):
            raise UsageError(f"--shape for {name} has {len(given)} sizes, but {source} takes {len(found)}")
        return given
    if found is None:
        raise UsageError(f"{source} does not say its input's shape: give --shape NxCxHxW")
    sizes = [1 if i == 0 and not isinstance(s, int) else s for i, s in enumerate(found)]
    open_ = [str(s) if s else f"dimension {i}" for i, s in enumerate(sizes) if not isinstance(s, int)]
    if open_:
        template = "x".join(str(s) if isinstance(s, int) else (s or "?") for s in sizes)
        raise UsageError(
            f"input {name} is {template}: give --shape {name}:{_example(sizes)} ({', '.join(open_)} open)"
        )
    return tuple(s for s in sizes if isinstance(s, int))


def _example(sizes: Sequence[int | str | None]) -> str:
    return "x".join(str(s) if isinstance(s, int) else "512" for s in sizes)


def blank(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Inputs without memory, for tracing: only sizes and types are read, and `trace` takes them to stand on
    the module's own device."""
    return tuple(_allocate(spec, "meta") for spec in specs)


def inputs(specs: Sequence[TensorSpec], device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs, the same for the same seed: normal where floating, else 0 or 1."""
    generator = torch.Generator(device=device).manual_seed(seed)
    made = []
    for spec in specs:
        tensor = _allocate(spec, device)
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
        else:
            tensor.random_(0, 2, generator=generator)
        made.append(tensor)
    return tuple(made)


def _allocate(spec: TensorSpec, device: str) -> Tensor:
    try:
        return torch.empty(spec.shape, dtype=spec.torch_dtype, device=device)
    except (RuntimeError, TypeError, ValueError) as error:  # too many elements for any number
        where = "any memory" if device == "meta" else f"the memory of {device}"
        raise UsageError(f"an input of shape {spec} does not fit into {where}") from error
