"""--data and --val: what a folder is for, how images come to the plan's size, what is said of bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training import MODELS, classes, draw, masks, pairs, plan_file, workload

from rowtune.errors import UsageError
from rowtune.train.data import Stream, guarded, open_data
from rowtune.train.folder import FolderSet, needs
from rowtune.train.images import read_image, read_mask, resize
from rowtune.train.layout import read_layout
from rowtune.train.loop import train
from rowtune.train.metrics import metric_for
from rowtune.train.options import Options
from rowtune.tune.step import Workload

DATA = """
import torch
from torch.utils.data import Dataset, IterableDataset

class Numbers(Dataset):
    def __len__(self):
        return 7
    def __getitem__(self, i):
        return torch.full((3, 16, 12), float(i)), torch.full((16, 12), i % 3)

class Broken(Numbers):
    def __getitem__(self, i):
        raise KeyError(f"no item {i}")

class Running(IterableDataset):
    def __iter__(self):
        return iter([Numbers()[i] for i in range(5)])

class Columns:
    "As Hugging Face's datasets are in their format torch: dicts, and the class is none of torch's."
    def __len__(self):
        return 7
    def __getitem__(self, i):
        return dict(zip(("image", "label"), Numbers()[i]))

Columns.__module__ = "datasets.arrow_dataset"

class Names(Numbers):
    def __getitem__(self, i):
        return {"image": Numbers()[i][0], "label": "cat"}

def number():
    return 7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("data")
    (path / "data_models.py").write_text(MODELS.replace("train_models", "data_models"))
    (path / "data_sets.py").write_text(DATA)
    masks(path / "masks5")
    classes(path / "shades")
    pairs(path / "twice")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        yield path


def pixels(loss: str = "") -> Workload:
    return workload("data_models:Pixels", "2x3x16x12", loss)


def images() -> Workload:
    return workload("data_models:Images", "2x3x16x12")


def twice() -> Workload:
    return workload("data_models:Twice", "2x3x8x6", "mse")


def items(root: Path, work: Workload, **more: Any) -> FolderSet:
    return FolderSet(read_layout(root, "--data"), needs(work), **more)


# -- the three kinds ---------------------------------------------------------------------------------------


def test_class_folders_are_for_classification(folder: Path) -> None:
    found = items(folder / "shades", images())
    assert found.layout.classes == ("dark", "light") and len(found) == 8
    image, label = found[0]
    assert image.shape == (3, 16, 12) and image.dtype == torch.float32 and int(label) == 0
    assert 0 <= float(image.min()) and float(image.max()) < 0.4 and int(found[7][1]) == 1
    work = images()
    options = Options(epochs=8, data="shades", val="shades", optimizer="adam:lr=0.05")
    trained = train(plan_file(work), work, options)
    assert trained.validation is not None and trained.validation["accuracy"] == 1.0


def test_images_and_masks_are_for_segmentation(folder: Path) -> None:
    found = items(folder / "masks5", pixels())
    image, mask = found[2]
    raw = np.asarray(Image.open(folder / "masks5/images/2.png"))
    np.testing.assert_array_equal(image.numpy(), raw.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(mask.numpy(), np.asarray(Image.open(folder / "masks5/masks/2.png")))
    work = pixels()
    start = train(plan_file(work), work, Options(epochs=1, data="masks5", val="masks5", lr=0.0)).validation
    end = train(
        plan_file(work), work, Options(epochs=15, data="masks5", val="masks5", optimizer="adam:lr=0.05")
    ).validation
    assert start and end and end["mean_iou"] > start["mean_iou"] and end["loss"] < start["loss"]


def test_pairs_are_for_restoration_and_cropped_alike(folder: Path) -> None:
    found = items(folder / "twice", twice())
    for i in range(len(found)):
        image, target = found[i]
        assert image.shape == (3, 8, 6) and target.shape == (3, 16, 12)
        small = torch.nn.functional.avg_pool2d(target, 2)  # inputs were made so: the same place in both
        assert float((small - image).abs().max()) < 0.01
    torch.manual_seed(1)
    assert not torch.equal(found[0][0], found[0][0])  # another place each time
    still = items(folder / "twice", twice(), still=True)
    middle = read_image(folder / "twice/input/0.png", 3, 2)[:, 6:14, 6:12]
    assert torch.equal(still[0][0], middle) and torch.equal(still[0][0], still[0][0])
    whole = items(folder / "twice", twice(), fit="resize")[0]
    assert whole[0].shape == (3, 8, 6) and whole[1].shape == (3, 16, 12)
    work = twice()
    options = Options(epochs=20, data="twice", val="twice", optimizer="adam:lr=0.02")
    trained = train(plan_file(work), work, options)
    assert trained.validation is not None and trained.validation["psnr"] > 8


def test_volumes_lie_in_npy_files(folder: Path) -> None:
    root = folder / "volumes"
    for name, dtype in (("images", np.float32), ("masks", np.int64)):
        (root / name).mkdir(parents=True)
        for i in range(2):
            values = np.random.default_rng(i).integers(0, 2, (9, 12, 10))
            np.save(root / name / f"{i}.npy", values.astype(dtype))
    work = workload("data_models:Volume", "1x1x8x8x6", "cross_entropy")
    image, mask = items(root, work, fit="crop", still=True)[0]
    assert image.shape == (1, 8, 8, 6) and torch.equal(image[0].long(), mask)
    assert items(root, work)[1][0].shape == (1, 8, 8, 6)
    trained = train(plan_file(work), work, Options(epochs=1, data=str(root), val=str(root), fit="crop"))
    assert trained.steps == 2 and "mean_iou" in (trained.validation or {})


def test_black_and_white_are_two_classes(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "images/a.png", 16, 12, 3)
    mask = np.zeros((16, 12), np.uint8)
    mask[:4] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    work = workload("data_models:Volume", "1x1x8x8x6", "cross_entropy")
    two = items(tmp_path, images_of_two())[0][1]
    assert int(two.max()) == 1 and int(two.sum()) == 48 and two.dtype == torch.int64
    del work
    with pytest.raises(UsageError, match=r"masks/a.png has class 255, but .* 0 to 2"):
        items(tmp_path, pixels())[0]
    left_out = items(tmp_path, pixels("cross_entropy:ignore_index=255"))[0][1]
    assert int((left_out == 255).sum()) == 48


def images_of_two() -> Workload:
    from rowtune.importers.source import parse_source
    from rowtune.tune.step import define

    return define(parse_source("data_models:Pixels", ["classes=2"]), ["2x3x16x12"])


def test_masks_of_one_logit(folder: Path, tmp_path: Path) -> None:
    from rowtune.importers.source import parse_source
    from rowtune.tune.step import define

    work = define(parse_source("data_models:Pixels", ["classes=1"]), ["1x3x16x12"], loss="bce_with_logits")
    masks(tmp_path, count=2)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8)).save(path)
    mask = items(tmp_path, work)[0][1]
    assert mask.shape == (1, 16, 12) and mask.dtype == torch.float32 and float(mask.max()) == 1
    trained = train(plan_file(work), work, Options(data=str(tmp_path), val=str(tmp_path)))
    assert 0 < (trained.validation or {})["pixel_accuracy"] <= 1


def test_deep_and_turned_images(tmp_path: Path) -> None:
    deep = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = read_image(tmp_path / "deep.png", 1, 2)
    np.testing.assert_allclose(found[0].numpy(), deep / 65535, rtol=1e-6)
    turned = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = turned.getexif()
    exif[274] = 6  # a camera held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", 3, 2).shape == (3, 6, 4)
    colours = Image.fromarray(np.array([[0, 2], [1, 2]], np.uint8)).convert("P")
    colours.putdata([0, 2, 1, 2])
    colours.save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png", 2).tolist() == [[0, 2], [1, 2]]


def test_small_copies_are_smooth() -> None:
    """Every second column black: half the size is grey, not black."""
    stripes = torch.zeros(1, 8, 8)
    stripes[:, :, ::2] = 1
    small = resize(stripes, (4, 4))
    assert 0.3 < float(small.min()) and float(small.max()) < 0.7


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "make", "said"),
    [
        ("shades", pixels, "for classification, but the plan's loss cross_entropy .* images/ and masks/"),
        ("masks5", images, "for segmentation, but .* takes class folders"),
        ("twice", pixels, "for restoration, but .* images/ and masks/"),
        ("masks5", twice, "for segmentation, but the plan's loss mse .* takes pairs"),
    ],
)
def test_a_folder_for_another_loss(folder: Path, root: str, make: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        items(folder / root, make())


def test_a_loss_of_ones_own_may_take_anything(folder: Path) -> None:
    (folder / "own_loss.py").write_text("def loss(output, target):\n    return output.mean()\n")
    work = workload("data_models:Images", "2x3x16x12", "own_loss:loss")
    assert len(items(folder / "shades", work)) == 8
    assert metric_for(work.loss, (2, 2)) is None
    trained = train(plan_file(work), work, Options(data="shades", val="shades"))
    assert set(trained.validation or {}) == {"loss"}


def broken(root: Path, what: str) -> Path:
    """A folder of masks with one thing wrong."""
    masks(root, count=2)
    image, mask = root / "images/0.png", root / "masks/0.png"
    if what == "truncated":
        image.write_bytes(image.read_bytes()[:200])
    elif what == "no image":
        image.write_text("nothing of the kind")
    elif what == "no counterpart":
        mask.unlink()
    elif what == "twice":
        draw(root / "images/0.jpg", 16, 12, 3)
    elif what == "colours":
        draw(mask, 16, 12, 3)
    elif what == "classes":
        draw(mask, 16, 12, high=200)
    elif what == "size":
        draw(mask, 8, 12, high=3)
    elif what == "pickle":
        np.save(root / "images/0.npy", np.array([{}], dtype=object), allow_pickle=True)
        image.unlink()
    elif what == "array":
        np.save(root / "images/0.npy", np.zeros((2, 16, 12)))
        image.unlink()
    return root


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("truncated", r"images.0.png cannot be read as an image"),
        ("no image", r"images.0.png cannot be read as an image: cannot identify"),
        ("no counterpart", r"images/0 has no counterpart in masks/"),
        ("twice", r"has both 0.jpg and 0.png"),
        ("colours", r"masks.0.png is RGB; a mask holds class numbers"),
        ("classes", r"masks.0.png has class \d+, but the model's classes are 0 to 2"),
        ("size", r"masks.0.png is 8x12, its image 16x12"),
        ("pickle", r"images.0.npy cannot be read as an array"),
        ("array", r"images.0.npy has shape 2x16x12; the model takes 3 channel"),
    ],
)
def test_a_bad_file_is_named(folder: Path, tmp_path: Path, what: str, said: str) -> None:
    work = pixels()
    with pytest.raises(UsageError, match=said):
        train(plan_file(work), work, Options(data=str(broken(tmp_path, what))))


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no folder: a folder of images has class folders"):
        items(tmp_path, images())
    (tmp_path / "a").mkdir()
    draw(tmp_path / "b/1.png", 16, 12, 3)
    with pytest.raises(UsageError, match="class folder a/ has no image"):
        items(tmp_path, images())
    draw(tmp_path / "a/1.png", 16, 12, 3)
    draw(tmp_path / "c/1.png", 16, 12, 3)
    with pytest.raises(UsageError, match="3 class folders, the model 2 classes"):
        items(tmp_path, images())
    small = pairs(tmp_path / "small")
    with pytest.raises(UsageError, match=r"is 20x18, smaller than the 32x6 to be cropped: give --fit resize"):
        items(small, workload("data_models:Twice", "1x3x32x6", "mse"))[0]
    with pytest.raises(UsageError, match="3x3 times its input, but the model makes 16x12 of 8x6"):
        items(pairs(tmp_path / "thrice", times=3), twice())[0]


def test_a_bomb_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "a.png", 40, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UsageError, match=r"a.png cannot be read as an image"):
        read_image(tmp_path / "a.png", 3, 2)


# -- module:factory ----------------------------------------------------------------------------------------


def seen(work: Workload, text: str, epoch: int = 0, start: int = 0, **more: Any) -> list[list[float]]:
    feed, _ = open_data(text, work, **more)
    return [x[:, 0, 0, 0].tolist() for (x,), _ in guarded(feed, epoch, start, text)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and newer, of any worker
def test_a_dataset_is_shuffled_for_training_only(folder: Path) -> None:
    work = pixels()
    first, second = (seen(work, "data_sets:Numbers", epoch) for epoch in (0, 1))
    assert [len(b) for b in first] == [2, 2, 2] and first != second
    assert seen(work, "data_sets:Numbers", 0, start=2) == first[2:]
    assert seen(work, "data_sets:Numbers", flag="--val") == [[0, 1], [2, 3], [4, 5], [6]]
    assert seen(work, "data_sets:Columns", 0) == first
    assert seen(work, "data_sets:Running") == [[0, 1], [2, 3]]
    assert seen(work, "data_sets:Numbers", workers=1) == first


@pytest.mark.parametrize(
    ("text", "workers", "said"),
    [
        ("data_sets:number", 0, "returned int, neither a DataLoader nor a Dataset"),
        ("data_sets:nothing", 0, "AttributeError"),
        ("data_sets:Broken", 0, "KeyError.*no item"),
        ("data_sets:Names", 0, "a batch is .* all tensors, not dict"),
        ("data_sets:Running", 1, "--workers is for folders and Datasets"),
        ("no/such/folder", 0, "does not exist: give a folder with class folders"),
        ("data_sets.py", 0, "is a file: give a folder"),
    ],
)
def test_data_that_are_none(folder: Path, text: str, workers: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        seen(pixels(), text, workers=workers)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_an_error_in_a_worker_is_one_line() -> None:
    """As torch hands it over, its traceback and all."""

    def batches() -> Iterator[Any]:
        yield 1
        raise ValueError(
            "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            '  File "x.py", line 3, in f\n    raise ValueError("no item")\nValueError: no item\n'
        )

    found = guarded(Stream(batches(), lambda item: item), 0, 0, "--data x")
    assert next(found) == 1
    with pytest.raises(UsageError) as caught:
        next(found)
    assert str(caught.value) == "--data x: ValueError: no item"
    with pytest.raises(UsageError, match="--data x: RuntimeError: gone"):
        guarded(Stream(Gone(), lambda item: item), 0, 0, "--data x")


class Gone:
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("gone")


def test_fit_is_for_folders(folder: Path) -> None:
    with pytest.raises(UsageError, match="--fit is for folders"):
        open_data("data_sets:Numbers", pixels(), fit="crop")


def test_too_few_images_for_a_batch(folder: Path) -> None:
    work = workload("data_models:Pixels", "8x3x16x12")
    with pytest.raises(UsageError, match="masks5 has 5 item"):
        open_data("masks5", work)
    assert len(seen(work, "masks5", flag="--val")) == 1


# -- metrics -----------------------------------------------------------------------------------------------


def test_metrics_against_their_definitions() -> None:
    drawn = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 150, 5, generator=drawn)
    target = torch.randint(0, 3, (3, 150, 5), generator=drawn)  # class 3 never occurs, but is predicted
    target[0, :9] = 255
    from rowtune.graph.losses import parse

    metric = metric_for(parse("cross_entropy:ignore_index=255"), tuple(scores.shape))
    assert metric is not None
    for i in range(3):
        metric.add(scores[i : i + 1], target[i : i + 1])
    found, counts = scores.argmax(1), target != 255
    overlaps = []
    for c in range(4):
        hit = ((found == c) & (target == c) & counts).sum()
        overlaps.append(float(hit / (((found == c) | (target == c)) & counts).sum()))
    right = float(((found == target) & counts).sum() / counts.sum())
    assert metric.result() == pytest.approx({"mean_iou": sum(overlaps) / 4, "pixel_accuracy": right})

    noise = metric_for(parse("l1"), (2, 3, 70, 4))
    assert noise is not None
    image = torch.rand(2, 3, 70, 4, generator=drawn)
    noise.add(image + 0.1, image)
    assert noise.result() == pytest.approx({"psnr": 20.0}, rel=1e-4)

    labels = metric_for(parse("cross_entropy"), (4, 3))
    assert labels is not None
    labels.add(torch.eye(3), torch.tensor([0, 1, 0]))
    assert labels.result() == pytest.approx({"accuracy": 2 / 3})
