"""--data and --val -> batches on the device, an epoch at a time, from any position in it.

A dataset with a length is shuffled by the run's seed and the epoch's number, each item drawn under a seed of
its own: to go on in the middle costs nothing. What only hands out batches (a DataLoader, any iterable) is
run again up to the position, from the random state in which the epoch began.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rowtune.errors import RowtuneError, UsageError
from rowtune.train.folder import FolderSet, needs
from rowtune.train.layout import SHAPES, read_layout
from rowtune.train.options import ALL, Fit, Shard
from rowtune.train.random_state import State, capture, restore, seed_of, seeded
from rowtune.tune.step import Batch, Workload

Place = Callable[[Any], Batch]


class Feed(Protocol):
    """`batches` in an epoch, None where that is not known. `began` is the random state an epoch began in,
    where it matters; `epoch(number, start)` leaves the first batches out."""

    batches: int | None
    began: State | None

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]: ...


def open_data(
    text: str,
    work: Workload,
    *,
    fit: Fit = "",
    workers: int = 0,
    flag: str = "--data",
    shard: Shard = ALL,
) -> tuple[Feed, str]:
    """The batches that a folder or `module:factory` gives, and a description. What --val names is not
    shuffled, and its last batch may be smaller. Of --data, the `shard` is this process's.

    Raises:
        UsageError: there is no such thing, or it does not go with the model and its loss.
    """
    place = _placer(work, f"{flag} {text}")
    made, said = _open(text, work, fit, flag)
    size = work.problem.inputs[0].shape[0]
    training = flag == "--data"
    if _has_items(made):
        count = len(made)
        if count < (size * shard.of if training else 1):
            each = f"a batch of {size}" + (f" for each of {shard.of} processes" if shard.of > 1 else "")
            raise UsageError(f"{flag} {text} has {count} item(s), fewer than {each}")
        return Items(made, size, work.problem.seed, training, workers, place, shard), said
    if workers:
        raise UsageError(f"--workers is for folders and Datasets; {flag} {text} loads its batches itself")
    if isinstance(made, Dataset):
        made = DataLoader(made, batch_size=size, drop_last=training)
    if not isinstance(made, Iterable):
        raise UsageError(f"{flag} {text} returned {type(made).__name__}, neither a DataLoader nor a Dataset")
    if isinstance(getattr(made, "sampler", None), DistributedSampler):
        shard = ALL  # it hands out this process's part already
    return Stream(made, place, shard), said


def synthetic(work: Workload, shard: Shard = ALL) -> Feed:
    """One random batch, over and over, another one in each process."""
    if shard.rank:
        work = replace(work, problem=replace(work.problem, seed=work.problem.seed + shard.rank))
    batch = work.batch(device=work.problem.device)
    return Stream(_Same(batch), lambda item: item)


def _has_items(made: Any) -> bool:
    """A Dataset with a length; those of Hugging Face's `datasets` are none of torch's by type."""
    theirs = type(made).__module__.partition(".")[0] == "datasets" and hasattr(made, "__getitem__")
    return (isinstance(made, Dataset) or theirs) and hasattr(made, "__len__")


class _Same:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self.batch)


def _open(text: str, work: Workload, fit: Fit, flag: str) -> tuple[Any, str]:
    path = Path(text)
    if path.is_dir():
        need = needs(work)
        folder = FolderSet(read_layout(path, flag), need, fit, still=flag != "--data", flag=flag)
        how = "cropped" if folder.fit == "crop" else "resized"
        size = "x".join(map(str, need.input[1:]))
        return folder, f"{text} ({len(folder)} for {folder.layout.kind}, {how} to {size})"
    if fit:
        raise UsageError(f"--fit is for folders of images, {flag} {text} is none")
    name, colon, attribute = text.partition(":")
    if not colon:
        what = "is a file" if path.exists() else "does not exist"
        raise UsageError(f"{flag} {text} {what}: give a folder with {SHAPES}, or module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(name), attribute)(), text
    except Exception as error:
        raise UsageError(f"{flag} {text} (module:factory) failed: {type(error).__name__}: {error}") from error


class Items:
    """A dataset with a length, in a new order every epoch where it is shuffled; a last batch that is not full
    is left out of training only."""

    began: State | None = None

    def __init__(
        self,
        dataset: Dataset[Any],
        size: int,
        seed: int,
        training: bool,
        workers: int,
        place: Place,
        shard: Shard = ALL,
    ) -> None:
        self.dataset, self.size, self.seed, self.training = dataset, size, seed, training
        self.workers, self.place, self.shard = workers, place, shard
        self.count = len(dataset)  # type: ignore[arg-type]
        self.batches: int | None = math.ceil(self.count / size)
        if training:
            self.batches = self.count // (size * shard.of)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        assert self.batches is not None
        order = list(range(self.count))
        if self.training:
            shuffled = torch.Generator().manual_seed(seed_of(self.seed, number))
            order = torch.randperm(self.count, generator=shuffled).tolist()
        rank, of = self.shard
        places = [at * of + rank for at in range(start, self.batches)]
        groups = [[(number, i) for i in order[at * self.size : (at + 1) * self.size]] for at in places]
        loader: DataLoader[Any] = DataLoader(
            _Drawn(self.dataset, self.seed),
            batch_sampler=groups,
            num_workers=self.workers,
            generator=torch.Generator(),  # of its own: the run's is not touched
        )
        return map(self.place, loader)


class _Drawn(Dataset[Any]):
    """Each item under a seed of its own."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with seeded(self.seed, epoch, index):
            return self.dataset[index]


class Stream:
    """Whatever hands out batches."""

    def __init__(self, batches: Iterable[Any], place: Place, shard: Shard = ALL) -> None:
        self.source, self.place, self.shard = batches, place, shard
        self.began: State | None = None
        self.batches: int | None = None
        if isinstance(batches, Sized):
            with contextlib.suppress(TypeError):  # a DataLoader of an IterableDataset
                self.batches = len(batches) // shard.of

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        if start and self.began is not None:
            self._set(self.began)
        else:
            self.began = self._get()
        sampler = getattr(self.source, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(number)
        batches = iter(self.source)
        for _ in itertools.islice(batches, start * self.shard.of):
            pass
        return map(self.place, _own(batches, self.shard))

    def _generators(self) -> list[torch.Generator]:
        """Those that a DataLoader draws from besides torch's own."""
        owners = (self.source, getattr(self.source, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return [g for g in found if isinstance(g, torch.Generator)]

    def _get(self) -> State:
        return {**capture(), "loader": [g.get_state() for g in self._generators()]}

    def _set(self, state: State) -> None:
        restore(state)
        for generator, saved in zip(self._generators(), state["loader"], strict=False):
            generator.set_state(saved)


_END: Any = object()


def _own(batches: Iterator[Any], shard: Shard) -> Iterator[Any]:
    """One of each `shard.of` batches, as long as there are that many: ranks get the same number."""
    while True:
        mine: Any = None
        for number in range(shard.of):
            batch = next(batches, _END)
            if batch is _END:
                return
            mine = batch if number == shard.rank else mine
        del batch
        yield mine


def guarded(feed: Feed, epoch: int, start: int, what: str) -> Iterator[Batch]:
    """An epoch in which what fails is the data's fault, and says so in one line."""
    with _blamed(what):
        batches = feed.epoch(epoch, start)
    return _guarded(batches, what)


def _guarded(batches: Iterator[Batch], what: str) -> Iterator[Batch]:
    while True:
        with _blamed(what):
            batch: Any = next(batches, _END)
        if batch is _END:
            return
        yield batch


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        if isinstance(error, RowtuneError) and len(lines) == 1:
            raise
        said = lines[0]
        if len(lines) > 1 and "Traceback" in str(error):  # an error in a worker brings its traceback along
            said = lines[-1].partition("Error: ")[2] or lines[-1]
        raise UsageError(f"{what}: {type(error).__name__}: {said}") from error


def _placer(work: Workload, what: str) -> Place:
    """A batch as the loader hands it out -> (inputs, target) on the device, floating inputs in the model's
    type."""
    device, specs = work.problem.device, work.problem.inputs

    def place(item: Any) -> Batch:
        kind = type(item).__name__
        if isinstance(item, dict) and len(item) > 1:  # columns, as Hugging Face's datasets have them
            *columns, target = item.values()
            item = (columns, target)
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Tensor)):
            raise UsageError(
                f"{what}: a batch is (inputs, target) or a dict of such columns, all tensors, not {kind}"
            )
        given: Sequence[Any] = item[0] if isinstance(item[0], (tuple, list)) else [item[0]]
        if len(given) != len(specs) or not all(isinstance(t, Tensor) for t in given):
            raise UsageError(
                f"{what}: the model takes {len(specs)} input tensor(s), a batch has {len(given)}"
            )
        inputs = []
        for tensor, spec in zip(given, specs, strict=True):
            floating = tensor.is_floating_point() and spec.torch_dtype.is_floating_point
            inputs.append(tensor.to(device, spec.torch_dtype if floating else tensor.dtype))
        return tuple(inputs), item[1].to(device)

    return place
