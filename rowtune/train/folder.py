"""A folder of images as a dataset: (input, target) in the plan's sizes, checked against the loss.

`resize` gives the whole image in the plan's size. `crop` cuts a piece of that size out: at random for
training, in the middle for validation. Pairs for restoration are cropped by default, since resizing changes
what is to be restored; an input may be smaller than its target by a whole factor, as in super-resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rowtune.errors import UsageError
from rowtune.graph.losses import LOSSES
from rowtune.train.images import cut, read_image, read_mask, resize, resize_mask
from rowtune.train.layout import Layout
from rowtune.train.options import Fit
from rowtune.tune.step import Workload


@dataclass(frozen=True)
class Need:
    """What the model reads and makes, without the batch, and what its loss takes for a target."""

    input: tuple[int, ...]
    output: tuple[int, ...]
    loss: str
    class_target: bool
    dtype: torch.dtype

    @property
    def binary(self) -> bool:
        """One channel of logits against a mask of zeros and ones."""
        return self.loss.startswith("bce_with_logits")

    @property
    def classes(self) -> int:
        return 2 if self.binary else self.output[0]

    @property
    def ignored(self) -> int | None:
        """The class number that the loss leaves out."""
        for item in self.loss.partition(":")[2].split(","):
            key, _, value = item.partition("=")
            if key == "ignore_index":
                return int(value)
        return None


def needs(work: Workload) -> Need:
    """UsageError for a model that takes several inputs."""
    specs = work.problem.inputs
    if len(specs) != 1:
        raise UsageError(
            f"a folder of images feeds one input, the model has {len(specs)}: give --data module:factory"
        )
    value = work.graph.values[work.graph.loss_output or work.graph.outputs[0]]
    return Need(
        specs[0].shape[1:], tuple(value.shape[1:]), work.problem.loss, work.loss.class_target, value.dtype
    )


class FolderSet(Dataset[tuple[Tensor, Tensor]]):
    """The items of a layout. Crops are drawn from torch's generator; `still` ones lie in the middle."""

    def __init__(self, layout: Layout, need: Need, fit: Fit = "", still: bool = False, flag: str = "--data"):
        self.layout, self.need, self.still, self.flag = layout, need, still, flag
        self.fit = fit or ("crop" if layout.kind == "restoration" else "resize")
        self._check()

    def __len__(self) -> int:
        return len(self.layout.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, target = self.layout.items[index]
        size = self.need.input[1:]
        image = read_image(path, self.need.input[0], len(size))
        full = tuple(image.shape[1:])
        corner = self._corner(path, full) if self.fit == "crop" else None
        image = resize(image, size) if corner is None else cut(image, corner, size)
        if isinstance(target, int):
            return image, torch.tensor(target)
        if self.layout.kind == "segmentation":
            return image, self._mask(target, full, corner)
        return image, self._target(target, full, corner)

    def _corner(self, path: Path, full: tuple[int, ...]) -> list[int]:
        size = self.need.input[1:]
        room = [have - want for have, want in zip(full, size, strict=True)]
        if min(room) < 0:
            raise UsageError(
                f"{path} is {_text(full)}, smaller than the {_text(size)} to be cropped: give --fit resize, "
                "or search a plan for a smaller --shape"
            )
        if self.still:
            return [n // 2 for n in room]
        return [int(torch.randint(n + 1, ())) for n in room]

    def _mask(self, path: Path, full: tuple[int, ...], corner: list[int] | None) -> Tensor:
        need = self.need
        mask = read_mask(path, len(full))
        if tuple(mask.shape) != full:
            raise UsageError(f"the mask {path} is {_text(mask.shape)}, its image {_text(full)}")
        mask = mask if corner is None else cut(mask, corner, need.input[1:])
        return self._classes(path, resize_mask(mask, need.output[1:]))

    def _classes(self, path: Path, mask: Tensor) -> Tensor:
        """Checked, and as the loss takes them. Black and white is how many write two classes."""
        need = self.need
        if need.classes == 2 and need.ignored != 255 and bool(((mask == 0) | (mask == 255)).all()):
            mask = mask.clamp(max=1)
        wrong = (mask < 0) | (mask >= need.classes)
        if need.ignored is not None:
            wrong &= mask != need.ignored
        if bool(wrong.any()):
            raise UsageError(
                f"the mask {path} has class {int(mask[wrong][0])}, but the model's classes are 0 to "
                f"{need.classes - 1}; a class to leave out is named by --loss cross_entropy:ignore_index=N"
            )
        return mask[None].to(need.dtype) if need.binary else mask

    def _target(self, path: Path, full: tuple[int, ...], corner: list[int] | None) -> Tensor:
        need = self.need
        size = need.output[1:]
        image = read_image(path, need.output[0], len(full))
        if corner is None:
            return resize(image, size).to(need.dtype)
        have = tuple(image.shape[1:])
        times = [h // f for h, f in zip(have, full, strict=True)]
        if any(h != f * k or not k for h, f, k in zip(have, full, times, strict=True)):
            raise UsageError(
                f"the target {path} is {_text(have)}, its input {_text(full)}: a target is as large, or a "
                "whole number of times"
            )
        wanted = [n * k for n, k in zip(need.input[1:], times, strict=True)]
        if tuple(wanted) != size:
            raise UsageError(
                f"the target {path} is {'x'.join(map(str, times))} times its input, but the model makes "
                f"{_text(size)} of {_text(need.input[1:])}"
            )
        return cut(image, [c * k for c, k in zip(corner, times, strict=True)], size).to(need.dtype)

    def _check(self) -> None:
        """Does the loss take what this folder holds? One of the user's own may take anything."""
        need, layout = self.need, self.layout
        if need.loss.partition(":")[0] not in LOSSES:
            return
        scores = len(need.output) == 1
        fine = {
            "classification": need.class_target and scores,
            "segmentation": (need.class_target and not scores) or (need.binary and need.output[0] == 1),
            "restoration": not need.class_target and not scores,
        }[layout.kind]
        if not fine:
            wants = "class folders" if scores else "images/ and masks/" if need.class_target else "pairs"
            wants = "images/ and masks/, or pairs" if need.binary and not scores else wants
            raise UsageError(
                f"{self.flag} {layout.root} is for {layout.kind}, but the plan's loss {need.loss} on an "
                f"output of {_text(need.output)} an image takes {wants}"
            )
        if layout.kind == "classification" and len(layout.classes) > need.output[0]:
            raise UsageError(
                f"{self.flag} {layout.root} has {len(layout.classes)} class folders, the model "
                f"{need.output[0]} classes"
            )


def _text(sizes: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, sizes))
