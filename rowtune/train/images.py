"""Files -> tensors: pixels as numbers from 0 to 1, masks as class numbers; resized, or cropped.

Pillow is loaded when the first image is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.errors import UsageError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}


def read_image(path: Path, channels: int, dims: int) -> Tensor:
    """Channels x sizes, float32. Pixels of 8 and 16 bits go from 0 to 1; arrays are taken as they are.

    Raises:
        UsageError: the file cannot be read, or has other channels; it is named.
    """
    if path.suffix.lower() == ".npy":
        array = _read_array(path)
        if array.ndim == dims:
            array = array[None]
        if array.ndim != dims + 1 or array.shape[0] != channels:
            raise UsageError(
                f"{path} has shape {'x'.join(map(str, array.shape))}; the model takes {channels} channel(s) "
                f"and {dims} size(s)"
            )
        if array.dtype.kind not in "fiub":
            raise UsageError(f"{path} holds {array.dtype}, which are no numbers to train on")
        return torch.from_numpy(np.array(array, dtype=np.float32))
    if dims != 2:
        raise UsageError(f"{path} is an image; a model with {dims} size(s) is trained on .npy files")
    if channels not in MODES:
        raise UsageError(
            f"{path}: an image has 1, 3 or 4 channels, the model {channels}; store arrays as .npy files"
        )
    return _pixels(path, MODES[channels])


def read_mask(path: Path, dims: int) -> Tensor:
    """Class numbers, int64. UsageError for a file that holds something else."""
    if path.suffix.lower() == ".npy":
        array = _read_array(path)
        array = array[0] if array.ndim == dims + 1 and array.shape[0] == 1 else array
        if array.ndim != dims or array.dtype.kind not in "iub":
            raise UsageError(
                f"{path} is {array.dtype} of shape {'x'.join(map(str, array.shape))}; a mask holds class "
                f"numbers (whole ones) and has {dims} size(s)"
            )
        return torch.from_numpy(np.array(array, dtype=np.int64))
    image = _open(path, "mask")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "P", "I", "I;16", "I;16B"):
        raise UsageError(
            f"{path} is {image.mode}; a mask holds class numbers: one channel, or colours with a palette"
        )
    return torch.from_numpy(np.array(image, dtype=np.int64))


def _read_array(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as an array: {_first_line(error)}") from error


def _pixels(path: Path, mode: str) -> Tensor:
    from PIL import ImageOps

    image = _open(path, "image")
    try:
        image = ImageOps.exif_transpose(image)
        deep = image.mode.startswith("I") or image.mode == "F"
        if deep and mode != "L":
            raise UsageError(
                f"{path} is {image.mode}, one channel of more than 8 bits; the model takes {mode}"
            )
        full = 1.0 if image.mode == "F" else 65535.0 if deep else 255.0
        array = np.array(image if deep else image.convert(mode), dtype=np.float32) / np.float32(full)
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"{path} cannot be read as an image: {_first_line(error)}") from error
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _open(path: Path, what: str) -> Any:
    """The image, decoded; a bomb is no image."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
        return image
    except Exception as error:  # Pillow's plugins raise what they come across
        raise UsageError(f"{path} cannot be read as {_an(what)}: {_first_line(error)}") from error


def _an(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Channels x size, smoothly; images without the patterns that small copies of large ones get."""
    size = tuple(size)
    if tuple(image.shape[1:]) == size:
        return image
    dims = len(size)
    return F.interpolate(image[None], size, mode=_SMOOTH[dims], antialias=dims == 2, align_corners=False)[0]


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """The class that is nearest: between two classes there is none."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None].double(), tuple(size), mode="nearest-exact")[0, 0].long()


def cut(tensor: Tensor, corner: Sequence[int], size: Sequence[int]) -> Tensor:
    """A piece of the last axes."""
    first = tensor.dim() - len(size)
    for i, (start, length) in enumerate(zip(corner, size, strict=True)):
        tensor = tensor.narrow(first + i, start, length)
    return tensor


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
